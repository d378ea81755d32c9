"""Fingerprints of models: they change with what from_pretrained reads, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from harness.core import files, hub, weights
from harness.core.errors import UserError
from harness.core.naming import settings
from harness.core.record import Plan, PlannedTrial, TrialRecord, read_run, write_record

pytestmark = pytest.mark.quick

COMMIT = "27dcfa74d334bc871f3234de431e71c6eeba5dd6"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub.resolve("builtin/tiny-llama"), tmp_path / "model"))


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "modeling.py", "v.model",
        "source.spm", "bpe.codes", "additional_chat_templates/tools.jinja",
    ],
)  # fmt: skip
def test_whatever_from_pretrained_reads_changes_the_fingerprint(model: Path, name: str) -> None:
    before = weights.fingerprint(str(model))
    (model / name).parent.mkdir(exist_ok=True)
    content = (model / name).read_bytes() if (model / name).exists() else b""
    write(model / name, content + b" ")
    assert weights.fingerprint(str(model)) != before


def test_a_copy_has_the_same_fingerprint_and_what_is_not_read_does_not_enter(model: Path, tmp_path: Path) -> None:
    before = weights.fingerprint(str(model))
    for name in ("README.md", "optimizer.pt", "training_args.bin", "trainer_state.json", ".gitattributes"):
        write(model / name, b"x")
    (model / "onnx").mkdir()
    write(model / "onnx" / "model.bin", b"x")
    copy = shutil.copytree(model, tmp_path / "a copy")
    assert weights.fingerprint(str(model)) == before == weights.fingerprint(str(copy))
    assert before == weights.fingerprint("builtin/tiny-llama")
    assert str(before).startswith("sha256:")


def test_shards_in_a_subfolder_are_weights_and_those_of_a_checkpoint_are_not(model: Path) -> None:
    for folder in ("shards", "checkpoint-5"):
        (model / folder).mkdir()
        write(model / folder / "model-00001-of-00001.safetensors", b"1")
    shards = {"a": "shards/model-00001-of-00001.safetensors", "b": "../../away.safetensors", "c": "/away.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    before = weights.fingerprint(str(model))
    write(model / "checkpoint-5" / "model-00001-of-00001.safetensors", b"2")
    assert weights.fingerprint(str(model)) == before
    write(model / "shards" / "model-00001-of-00001.safetensors", b"2")
    assert weights.fingerprint(str(model)) != before


def test_weights_of_the_same_size_and_time_are_other_weights(model: Path) -> None:
    before, file = weights.fingerprint(str(model)), model / "model.safetensors"
    stat, content = file.stat(), file.read_bytes()
    write(file, content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.fingerprint(str(model)) != before


def test_a_file_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    read: list[str] = []
    digest_of = files.digest_of
    monkeypatch.setattr(files, "digest_of", lambda path: (read.append(path.name), digest_of(path))[1])
    first = weights.fingerprint(str(model))
    assert "model.safetensors" in read
    read.clear()
    assert (weights.fingerprint(str(model)), read) == (first, [])
    write(tmp_path / "cache" / "fingerprints.json", b"not JSON")
    assert (weights.fingerprint(str(model)), bool(read)) == (first, True)


def test_a_cache_that_cannot_be_written_costs_only_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights.fingerprint(str(model))
    monkeypatch.setenv("HARNESS_CACHE", "/proc/nobody")
    assert weights.fingerprint(str(model)) == expected


def test_a_hub_id_has_the_commit_of_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_unreachable", [])
    refs = tmp_path / "models--someone--small" / "refs"
    refs.mkdir(parents=True)
    write(refs / "main", COMMIT.encode())
    write(refs / "v2", COMMIT[::-1].encode())
    assert weights.fingerprint("someone/small") == f"commit:{COMMIT}"
    assert (
        weights.fingerprint("someone/small", "v2")
        == f"commit:{COMMIT[::-1]}"
        == weights.fingerprint("someone/small@v2")
    )
    assert weights.fingerprint("someone/other", COMMIT) == f"commit:{COMMIT}"
    assert weights.fingerprint("someone/absent-offline") is None
    assert weights.pinned("someone/small", f"commit:{COMMIT}") == f"someone/small@{COMMIT}"
    assert weights.pinned("./model", "sha256:00") == "./model"


def test_a_hub_id_is_split_from_its_revision_and_a_folder_is_not(tmp_path: Path) -> None:
    assert (hub.resolve("a/b@v1"), hub.revision_of("a/b@v1"), hub.revision_of("a/b")) == ("a/b", "v1", "main")
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert (hub.resolve(str(folder)), hub.split_revision(str(folder))) == (str(folder), (str(folder), None))


def test_weights_that_changed_since_the_plan_are_refused(model: Path) -> None:
    backbone = {"language_model": str(model), "encoders": {}}
    planned = {"language_model": weights.fingerprint(str(model))}
    weights.check_unchanged(backbone, planned)
    write(model / "tokenizer_config.json", b"{}")
    with pytest.raises(UserError, match=r"backbone\.language_model: .*model.* have changed since"):
        weights.check_unchanged(backbone, planned)


def spec(name: str, fingerprint: str) -> dict[str, object]:
    adapter = {"label": "LoRA", "grouping_name": "", "config": {}}
    return {"adapter": adapter, "backbone": {"language_model": name}, "fingerprints": {"language_model": fingerprint}}


def test_only_other_weights_under_one_name_are_a_setting() -> None:
    specs = {"1": spec("a", "sha256:" + "1" * 64), "2": spec("b", "sha256:" + "2" * 64)}
    assert settings(specs) == {"1": "language_model=a", "2": "language_model=b"}
    specs["2"] = spec("a", "sha256:" + "2" * 64)
    assert settings(specs) == {"1": "language_model_weights=111111111111", "2": "language_model_weights=222222222222"}


def test_a_run_folder_says_whose_weights_changed(tmp_path: Path) -> None:
    planned = PlannedTrial(trial_id="new", label="LoRA", method="lora", grouping="", setting="", seed=0)
    plan = Plan(
        experiment="e", experiment_file="", primary_metric="perplexity", metrics=(), trials=(planned,),
        fingerprints={"language_model ./model": "sha256:2"},
    )  # fmt: skip
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    record = TrialRecord(
        trial_id="a", experiment="e", status="finished", spec={}, seed=0, wall_time_s=1.0, started_at=""
    )
    for trial_id, own in (
        ("a", spec("./model", "sha256:1")),
        ("b", spec("./model", "sha256:1")),
        ("c", spec("./other", "sha256:1")),
        ("d", {key: value for key, value in spec("./model", "").items() if key != "fingerprints"}),
    ):
        write_record(tmp_path, record.model_copy(update={"trial_id": trial_id, "spec": own}))
    older = "recorded by an earlier version, without fingerprints of its models"
    assert read_run(tmp_path).foreign_lines == [
        "2 records belong to trials not in the plan: language_model weights changed (./model)",
        "1 record belongs to a trial not in the plan",
        f"1 record belongs to a trial not in the plan: {older}",
    ]
    assert json.loads((tmp_path / "plan.json").read_text())["fingerprints"] == {"language_model ./model": "sha256:2"}
