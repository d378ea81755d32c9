"""Exported trials: a fresh process writes the texts that the trial wrote, and nothing in a folder can run code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import harness
from harness.core.errors import UserError
from harness.trained.folder import read_description, spec_of
from tests.support.trials import BITFIT, FULL, LORA, examples_of, run
from tests.support.trials import spec_of as trial_spec

PER_CONTEXT = {"image": {"method": "lora", "rank": 3}, "text": {"method": "lora+bitfit", "rank": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": FULL,
    "bitfit": BITFIT,
    "none": {"method": "none", "learning_rate": 3e-3},
    "vera": {"method": "vera", "rank": 4, "learning_rate": 1e-2},
    "soft prompt": {"method": "soft_prompt", "learning_rate": 1e-2},
    "mmca": {"method": "mmca+lora", "rank": 2, "learning_rate": 1e-2},
    "combination": {"method": "ia3+bitfit", "grouping": "specific", "learning_rate": 1e-2},
    "another method per context": {"groups": PER_CONTEXT, "learning_rate": 1e-2},
    "stacked groups": {"method": "lora", "rank": 2, "grouping": "shared+specific", "learning_rate": 1e-2},
}
ONE_EPOCH = {"budget": {"examples": 16, "epochs": 1}}


def trained_by(adapter: dict[str, Any], folder: Path, **sections: Any) -> tuple[Path, dict[str, tuple[Path, str]]]:
    """A finished trial's folder, and example id → its picture and the text that the trial wrote."""
    record = run(trial_spec(folder, adapter, **(ONE_EPOCH | sections)), folder)
    assert record.status == "finished", record.reason
    rows = examples_of(folder, record)
    rows = rows[rows.split == "test"]
    found = {row.example_id: (Path(json.loads(row.inputs)[0][2]), row.prediction) for row in rows.itertuples()}
    return folder / "trials" / record.trial_id, found


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Path, str]]]:
    return trained_by(LORA, tmp_path_factory.mktemp("run"), budget={"examples": 32, "epochs": 3})


@pytest.fixture(scope="module")
def exported(lora: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.export_trial(lora[0], tmp_path_factory.mktemp("exported") / "model")


@pytest.mark.parametrize(
    "name",
    [name if name in ("lora", "full") else pytest.param(name, marks=pytest.mark.e2e) for name in METHODS],
)
def test_a_loaded_model_writes_what_its_trial_wrote(name: str, tmp_path: Path) -> None:
    trial, written = trained_by(METHODS[name], tmp_path)
    trained = harness.load_trained(harness.export_trial(trial, tmp_path / "model"))
    assert trained.files == ("image",)
    assert trained.predict([{"image": path} for path, _ in written.values()]) == [text for _, text in written.values()]
    assert not any(p.requires_grad for p in trained.model.parameters())


@pytest.mark.parametrize(
    ("name", "groups", "options"),
    [
        ("another method per context", "image: image, text: text", "image.rank=3"),
        ("stacked groups", "image: shared + image, text: shared + text", "rank=2"),
    ],
)
def test_what_has_several_groups_is_described_and_is_no_checkpoint_of_one(
    name: str, groups: str, options: str, tmp_path: Path
) -> None:
    trial, _ = trained_by(METHODS[name], tmp_path)
    for form, message in (("peft", f"the contexts differ: {groups}; name one"), ("merge", f"found {groups} ")):
        with pytest.raises(UserError, match=re.escape(message)):
            harness.export_trial(trial, tmp_path / form, **{form: True})
        assert not (tmp_path / form).exists()
    text = (harness.export_trial(trial, tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    assert f"| groups | {groups} |" in text
    assert options in text


@pytest.mark.e2e
def test_a_fresh_process_captions_pictures_as_the_trial_did(lora: Any, exported: Path, tmp_path: Path) -> None:
    shown = list(lora[1].values())[:3]
    assert len({text for _, text in lora[1].values()}) > 1, "texts that do not depend on the picture test nothing"
    command = [sys.executable, "-m", "harness", "predict", str(exported), *(str(path) for path, _ in shown)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"{path}\t{text}" for path, text in shown]


def test_the_card_has_the_scores_and_the_provenance(lora: Any, exported: Path) -> None:
    record = json.loads((lora[0] / "record.json").read_text(encoding="utf-8"))
    text = (exported / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "context-peft-harness"
    assert f"| test | perplexity | {record['metrics']['test']['perplexity']:.5g} |" in text
    for fact in ("# LoRA r=2 specific on scenes", record["trial_id"], "builtin/tiny-llama", "image: image, text: text"):
        assert fact in text


def test_its_adapters_load_onto_the_bare_language_model(lora: Any, exported: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(Path(harness.__file__).parent / "pretrained" / "tiny-llama").eval()
    adapted = harness.load_adapter(base, exported / "adapter", contexts=("image", "text"))
    trained = harness.load_trained(exported)
    ids_BT = torch.tensor([[0, 5, 9, 7]])
    context_ids_BT = torch.tensor([[1, 1, 1, 1]])
    with torch.no_grad():
        found = adapted(input_ids=ids_BT, context_ids=context_ids_BT).logits
        with trained.model.router.one_pass():
            trained.model.router.set_context_ids(context_ids_BT)
            expected = trained.model.language_model(input_ids=ids_BT).logits
    torch.testing.assert_close(found, expected)


def test_one_group_is_written_for_peft_and_merged(tmp_path: Path) -> None:
    trial, _ = trained_by({"method": "lora", "rank": 2, "grouping": "agnostic", "learning_rate": 6e-3}, tmp_path)
    folder = harness.export_trial(trial, tmp_path / "model", peft=True, merge=True)
    trained = harness.load_trained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    ids_BT = torch.tensor([[0, 5, 9, 7]])
    with torch.no_grad(), trained.model.router.one_pass():
        trained.model.router.set_context_ids(torch.tensor([[1, 1, 1, 1]]))
        expected = trained.model.language_model(input_ids=ids_BT).logits
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-4)
    assert (folder / "peft" / "adapter_config.json").is_file()
    assert (folder / "merged" / "tokenizer.json").is_file()


def test_a_form_that_the_groups_do_not_allow_leaves_no_folder(lora: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merge: all contexts must share a group"):
        harness.export_trial(lora[0], tmp_path / "model", merge=True)
    assert not (tmp_path / "model").exists()
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: exists and is not empty; allowed: a new folder"):
        harness.export_trial(lora[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def changed(exported: Path, folder: Path, change: Any) -> Path:
    """A copy of an exported folder, with another content of its trained.json."""
    folder.mkdir()
    for path in exported.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "trained.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_folder_names_no_code_to_load(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")

    def evil(content: dict[str, Any]) -> None:
        content["spec"]["task"]["plugin"]["target"] = f"{tmp_path / 'evil.py'}:Task"
        content["spec"]["adapter"]["plugins"][0]["target"] = "evil:Adapter"

    folder = changed(exported, tmp_path / "model", evil)
    spec = spec_of(read_description(folder), folder)
    assert spec.task.plugin.target == "tasks.scenes:Scenes"
    assert spec.adapter.plugins[0].target == "adapters.methods.lora:LoRA"
    harness.load_trained(folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_repository_runs_only_if_the_caller_allows_it(exported: Path, tmp_path: Path) -> None:
    folder = changed(exported, tmp_path / "model", lambda c: c["spec"]["backbone"].update(trust_remote_code=True))
    with pytest.raises(UserError, match="its models run code of their repositories; allow it with trust_remote_code"):
        harness.load_trained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=7), "format_version: found 7; allowed: 1"),
        (lambda c: c.update(extra=1), "not an exported model: extra: Extra inputs are not permitted"),
        (lambda c: c.update(weights_sha256="0" * 64), "not the weights that were exported"),
        (lambda c: c["spec"]["adapter"]["plugins"][0].update(result_version=9), r"trained with the adapter .*:lora@9"),
        (lambda c: c["spec"]["task"]["plugin"].update(name="scense"), "unknown task 'scense'; .*did you mean 'scenes'"),
        (lambda c: c["spec"]["fingerprints"].update(language_model="sha256:" + "0" * 64), "have changed since"),
    ],
)  # fmt: skip
def test_another_folder_is_refused_by_name(change: Any, message: str, exported: Path, tmp_path: Path) -> None:
    folder = changed(exported, tmp_path / "model", change)
    with pytest.raises(UserError, match=message):
        harness.load_trained(folder)


def test_what_is_no_exported_folder_is_refused(lora: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a trial's folder: `harness export` makes one"):
        harness.load_trained(lora[0])
    with pytest.raises(UserError, match="allowed: a folder that `harness export` wrote"):
        harness.load_trained(tmp_path)
    with pytest.raises(UserError, match="contains no trial record"):
        harness.export_trial(tmp_path, tmp_path / "model")


def test_inputs_are_checked(lora: Any, exported: Path, tmp_path: Path) -> None:
    trained = harness.load_trained(exported)
    picture = next(iter(lora[1].values()))[0]
    for inputs, message in (
        ({"imgae": picture}, "inputs: no context 'imgae'; .*did you mean 'image'"),
        ({"image": tmp_path / "none.png"}, r"none.png: no such file \(context 'image'\)"),
        ({}, "inputs: none is given; allowed: image, text"),
    ):
        with pytest.raises(UserError, match=message):
            trained.predict([inputs])
    with pytest.raises(UserError, match="max_new_tokens: found 0; allowed: 1 or more"):
        trained.predict([{"image": picture}], max_new_tokens=0)
    with pytest.raises(UserError, match="member: found 'scenes'"):
        trained.predict([{"image": picture}], member="scenes")
    assert len(trained.predict([{"image": picture}], max_new_tokens=2)[0].split()) <= 2
