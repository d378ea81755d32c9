"""Adapters saved and loaded again: the same logits, or an error that names what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import harness
from adapters.library.checkpoint import JSON_NAME, TENSORS_NAME
from adapters.methods.ia3 import IA3
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, ROWS_BT, adapted_model, logits, traces
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_llama, tiny_opt

PER_GROUP = {"image": {"method": "lora+bitfit", "rank": 2, "where": ["q", "v"]}, "text": {"method": "ia3"}}
Q_A = "adapters.layers.model/layers/0/self_attn/q_proj.changes.lora.deltas.group_image.lora_A"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder and the logits of what was saved there."""
    folder = tmp_path_factory.mktemp("saved") / "new" / "folder"
    adapted = adapted_model(tiny_llama(), PER_GROUP)
    adapted.save(folder)
    return folder, logits(adapted, embeds(), ROWS_BT)


@pytest.fixture
def folder(saved: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved[0], tmp_path / "adapter"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / JSON_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_id = json.loads((folder / JSON_NAME).read_text())["save_id"]
    save_file(tensors, folder / TENSORS_NAME, metadata={"save_id": save_id})


# ── What comes back


@pytest.mark.e2e
def test_a_fresh_process_computes_the_same_logits(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    script = (
        "import sys, harness; from safetensors.torch import save_file\n"
        "from tests.support.adapted import ROWS_BT, logits\n"
        "from tests.support.adapters import embeds\n"
        "from tests.support.models import tiny_llama\n"
        "adapted = harness.load_adapter(tiny_llama(), sys.argv[1])\n"
        "save_file({'logits': logits(adapted, embeds(), ROWS_BT)}, sys.argv[2])"
    )
    out = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", script, str(saved[0]), str(out)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3], timeout=200)
    assert torch.equal(load_file(out)["logits"], saved[1])


def test_the_files_hold_the_adapters_and_say_what_they_are(saved: tuple[Path, Tensor]) -> None:
    assert sorted(path.name for path in saved[0].iterdir()) == [JSON_NAME, TENSORS_NAME]
    content = json.loads((saved[0] / JSON_NAME).read_text())
    assert content["format_version"] == 2
    assert content["contexts"] == ["image", "text"]
    assert content["grouping"] == {"image": "image", "text": "text"}
    ours = {"distribution": "context-peft-harness", "result_version": 1, "version": version("context-peft-harness")}
    assert content["groups"]["image"]["plugins"] == [{"name": name, **ours} for name in ("lora", "bitfit")]
    assert content["groups"]["image"]["options"]["rank"] == 2
    assert content["groups"]["image"]["options"]["where"] == ["q", "v"]
    assert set(content["versions"]) == {"context-peft-harness", "torch", "transformers"}
    q_weight = content["base"]["layers"]["model.layers.0.self_attn.q_proj"]["weight"]
    assert q_weight["shape"] == [32, 32]
    assert len(q_weight["sample"]) == 8
    tensors = load_file(saved[0] / TENSORS_NAME)
    # q and v: LoRA pair and bias (2 layers), k, v and down: IA3 (2 layers). Nothing of the base.
    assert len(tensors) == 2 * (2 * 3 + 3)
    assert tensors[Q_A].shape == (2, 32)


@pytest.mark.parametrize(
    ("spec", "grouping"),
    [
        (LORA, "agnostic"),
        ({"image": LORA, "text": None}, "specific"),
        ({"method": "bitfit"}, {"image": None, "text": "language"}),
        ({"method": "none"}, "agnostic"),
        ({"method": "full", "embeddings": False}, "agnostic"),
    ],
    ids=str,
)
def test_saved_and_loaded_is_the_same_model(spec: Any, grouping: Any, tmp_path: Path) -> None:
    adapted = adapted_model(tiny_opt(), spec, grouping)
    disturb([p for p in adapted.parameters() if p.requires_grad], scale=0.1)
    adapted.save(tmp_path)
    again = harness.load_adapter(tiny_opt(), tmp_path, contexts=("image", "text"))
    assert torch.equal(logits(again, embeds(), IDS_T), logits(adapted, embeds(), IDS_T))
    again.save(tmp_path / "again")
    first, second = (json.loads((folder / JSON_NAME).read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first.pop("save_id") != second.pop("save_id")
    assert first == second
    assert again.num_trainable_parameters(by="group") == adapted.num_trainable_parameters(by="group")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }


def test_a_second_save_replaces_the_first_whole(tmp_path: Path) -> None:
    adapted = adapted_model(tiny_llama())
    adapted.save(tmp_path)
    disturb(adapted.adapters.parameters(), seed=9)
    adapted.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON_NAME, TENSORS_NAME]
    again = harness.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, embeds(), IDS_T), logits(adapted, embeds(), IDS_T))


def test_what_the_caller_trains_of_the_base_is_saved_too(tmp_path: Path) -> None:
    adapted = adapted_model(tiny_llama())
    adapted.base_model.lm_head.weight.requires_grad_(True)
    disturb([adapted.base_model.lm_head.weight])
    adapted.save(tmp_path)
    again = harness.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, embeds(), IDS_T), logits(adapted, embeds(), IDS_T))
    assert again.base_model.lm_head.weight.requires_grad
    again.detach()
    assert not again.base_model.lm_head.weight.requires_grad


def test_the_same_base_in_another_dtype_is_the_same_base(saved: tuple[Path, Tensor]) -> None:
    for dtype, adapter_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        adapted = harness.load_adapter(tiny_llama().to(dtype), saved[0])
        assert {p.dtype for p in adapted.adapters.parameters()} == {adapter_dtype}


def test_roles_given_by_hand_are_saved(tmp_path: Path) -> None:
    roles = {"model.layers.*.self_attn.q_proj": "q"}
    adapted = adapted_model(tiny_llama(), {"method": "lora", "where": ["q"]}, roles=roles)
    adapted.save(tmp_path)
    assert harness.load_adapter(tiny_llama(), tmp_path).spec.roles == roles


# ── What does not fit


def changed(**config: int) -> Any:
    """Another shape, with tiny_llama's weights wherever they fit."""
    model = tiny_llama()
    other = LlamaForCausalLM(LlamaConfig.from_dict({**model.config.to_dict(), **config}))
    weights = model.state_dict()
    own = other.state_dict()
    other.load_state_dict(
        {n: weights[n] if n in weights and weights[n].shape == x.shape else x for n, x in own.items()}
    )
    return other


def nudged() -> Any:
    """One layer differs, by 2 %."""
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    return model


@pytest.mark.parametrize(
    ("make_base", "message"),
    [
        (tiny_opt, "saved on a llama model; found a opt model"),
        (lambda: tiny_llama(seed=1), r"another base model: model.layers.0.self_attn.q_proj.weight held .*; found "),
        (
            lambda: changed(intermediate_size=56),
            r"base model: model.layers.0.mlp.down_proj.weight had shape \(32, 48\); found \(32, 56\)",
        ),
        (nudged, r"another base model: model.layers.1.self_attn.v_proj.weight held .*; found "),
        (
            lambda: changed(num_hidden_layers=1),
            r"layer model.layers.1.self_attn.q_proj had the parameters \['weight'\]; found \[\]",
        ),
        (
            lambda: changed(num_hidden_layers=3),
            "missing: adapters.layers.model/layers/2/mlp/down_proj.changes.ia3.deltas.group_text.ia3_l, ",
        ),
    ],
    ids=["another type", "other weights", "wider", "one layer differs", "a layer less", "a layer more"],
)
def test_another_base_is_an_error_that_names_the_layer(
    make_base: Any, message: str, saved: tuple[Path, Tensor]
) -> None:
    model = make_base()
    before = traces(model)
    with pytest.raises(UserError, match=message):
        harness.load_adapter(model, saved[0])
    assert traces(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_A), f"{TENSORS_NAME}: missing: {Q_A}$"),
        (lambda t: t.update(extra=torch.zeros(2)), f"{TENSORS_NAME}: unexpected: extra$"),
        (lambda t: t.update({"base.no.weight": torch.zeros(2)}), "unexpected: base.no.weight$"),
        (lambda t: t.update({Q_A: torch.zeros(3, 32)}), rf"{Q_A} must have shape \(2, 32\); found \(3, 32\)"),
    ],
    ids=["missing", "unexpected", "unexpected of the base", "shape"],
)
def test_tensors_that_do_not_fit_are_named_and_the_base_is_left_alone(change: Any, message: str, folder: Path) -> None:
    edit_tensors(folder, change)
    model = tiny_llama()
    before, weights = traces(model), {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        harness.load_adapter(model, folder)
    assert traces(model) == before
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=1), "format_version: found 1; this harness reads 2"),
        (lambda c: c.pop("format_version"), "format_version: found None; this harness reads 2"),
        (lambda c: c.pop("grouping"), "grouping: field required"),
        (lambda c: c.update(extra=1), "extra: extra inputs are not permitted"),
        (lambda c: c["grouping"].pop("text"), "context 'text' is missing"),
        (lambda c: c["groups"].pop("text"), "spec: group 'text' is missing"),
        (lambda c: c["groups"]["image"]["options"].update(rank=0), "spec.image.rank: .*greater than 0; found 0"),
        (lambda c: c["groups"]["image"]["options"].update(rnk=1), "image.rnk: unknown key 'rnk'; .*mean 'rank'"),
        (lambda c: c.update(save_id="0"), "are not from one save; save the adapter again"),
        (lambda c: c["groups"]["text"]["plugins"][0].update(name="ia4"), "'ia4' of .* not installed; .*mean 'ia3'"),
    ],
)  # fmt: skip
def test_a_json_file_that_says_something_else_is_named(change: Any, message: str, folder: Path) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=f"{folder}.*{message}"):
        harness.load_adapter(tiny_llama(), folder)


def test_a_file_cannot_name_code_to_run(folder: Path) -> None:
    edit(folder, lambda c: c["groups"]["text"]["plugins"][0].update(target="evil_adapter:Evil"))
    with pytest.raises(UserError, match=r"groups\.text\.plugins\.0\.target: extra inputs are not permitted"):
        harness.load_adapter(tiny_llama(), folder)


def test_a_method_whose_results_changed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IA3, "result_version", 2)
    message = "adapter method 'ia3' of context-peft-harness .*, result version 1; registered now: .*, result version 2"
    with pytest.raises(UserError, match=message):
        harness.load_adapter(tiny_llama(), folder)
    edit(folder, lambda c: c["groups"]["text"]["plugins"][0].update(distribution="another", result_version=2))
    with pytest.raises(UserError, match=r"'ia3' of another .*; registered now: context-peft-harness"):
        harness.load_adapter(tiny_llama(), folder)


def test_other_contexts_are_named(saved: tuple[Path, Tensor]) -> None:
    for contexts in (("text", "image"), ("image", "audio", "text")):
        with pytest.raises(UserError, match=rf"contexts: found \('image', 'text'\); expected \('{contexts[0]}'"):
            harness.load_adapter(tiny_llama(), saved[0], contexts=contexts)


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"nowhere: no {JSON_NAME} in it"):
        harness.load_adapter(tiny_llama(), tmp_path / "nowhere")
    (folder / TENSORS_NAME).write_bytes(b"nothing that safetensors reads")
    with pytest.raises(UserError, match=f"{TENSORS_NAME}: cannot be read: "):
        harness.load_adapter(tiny_llama(), folder)
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(UserError, match=f"no {TENSORS_NAME} in it"):
        harness.load_adapter(tiny_llama(), folder)
    (folder / JSON_NAME).write_text('{"format_version": 1,')
    (folder / TENSORS_NAME).touch()
    with pytest.raises(UserError, match=f"{JSON_NAME}: cannot be read as JSON: "):
        harness.load_adapter(tiny_llama(), folder)


def test_saving_and_loading_want_a_folder_and_a_free_model(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    adapted = adapted_model(tiny_llama())
    with pytest.raises(UserError, match="file: adapters cannot be saved: "):
        adapted.save(tmp_path / "file")
    with pytest.raises(UserError, match="already has adapters"):
        harness.load_adapter(adapted.base_model, saved[0])
    adapted.detach()
    with pytest.raises(UserError, match="was detached"):
        adapted.save(tmp_path)
