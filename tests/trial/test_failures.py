"""Trials that are killed and resumed, and trials that fail."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from harness.core.record import PlannedTrial, TrialRecord, read_record, record_path
from harness.model import build, components
from harness.model.batches import BatchMaker
from harness.tracking import delivery
from harness.tracking.delivery import Destination
from harness.tracking.journal import Journal
from harness.tracking.tracker import MlflowTracker
from harness.trial import trial
from harness.trial.engine import Engine
from harness.trial.trial import Progress
from tasks.modalities.encoders.tiny_vision import TinyVision
from tasks.scenes import Scenes
from tests.support.trials import FULL, LORA, Recorder, examples_of, finished_trial, run, scored_by, spec_of

SMALL = {"examples": 16, "epochs": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, Path, Recorder, list[Progress]]:
    return finished_trial(tmp_path_factory.mktemp("finished"), budget=SMALL)


# ── Crash and resume


class Killed(BaseException):
    """Stands for SIGKILL: no error handler catches it."""


def killed_in_epoch(number: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.phase == "train" and progress.epoch == number:
            raise Killed(f"killed in epoch {number}")

    return report


@pytest.mark.parametrize(
    ("adapter", "bf16"),
    [
        pytest.param(LORA, True, id="lora in bf16"),
        pytest.param(FULL, False, id="full in fp32"),
        pytest.param(LORA, False, id="lora in fp32", marks=pytest.mark.slow),
        pytest.param(FULL, True, id="full in bf16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_trial_resumes_with_the_same_result(
    adapter: dict[str, Any], bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)  # report every step
    optimizer = {"per_device_train_batch_size": 8, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "bf16": bf16}
    (tmp_path / "whole").mkdir()
    (tmp_path / "died").mkdir()
    spec = spec_of(tmp_path, adapter, optimizer=optimizer, budget={"examples": 16, "epochs": 3})
    expected = run(spec, tmp_path / "whole")
    assert expected.status == "finished", expected.reason
    with pytest.raises(Killed, match="killed in epoch"):
        run(spec, tmp_path / "died", killed_in_epoch(2), checkpoint_interval_s=0.0)
    folder = tmp_path / "died" / "trials" / spec.trial_id
    assert not (folder / "record.json").exists()
    assert sorted(path.name for path in folder.glob("checkpoint/epoch-*")) == ["epoch-1"]

    epochs: list[int] = []
    resumed = run(
        spec, tmp_path / "died", lambda p: epochs.append(p.epoch) if p.phase == "train" else None,
        checkpoint_interval_s=0.0,
    )  # fmt: skip
    assert set(epochs) == {2, 3}
    assert resumed.history == expected.history
    assert resumed.metrics == expected.metrics
    assert resumed.best_epoch == expected.best_epoch
    assert resumed.data == expected.data
    pd.testing.assert_frame_equal(examples_of(tmp_path / "died", resumed), examples_of(tmp_path / "whole", expected))
    assert not (folder / "checkpoint").exists()


def test_without_a_checkpoint_a_killed_trial_starts_again(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)
    with pytest.raises(Killed, match="killed in epoch"):
        run(spec_of(tmp_path, budget=SMALL), tmp_path, killed_in_epoch(2), checkpoint_interval_s=3600.0)
    assert run(spec_of(tmp_path, budget=SMALL), tmp_path).metrics == finished[0].metrics


# ── Ways to fail


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train_step(_engine: Engine, _batch: Any) -> float:
        raise error

    monkeypatch.setattr(Engine, "train_step", train_step)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("two\n  lines"), "failed", "ValueError: two lines"),
        (MemoryError("no room"), "out_of_memory", "MemoryError: no room"),
        (torch.OutOfMemoryError("CUDA is full"), "out_of_memory", "OutOfMemoryError: CUDA is full"),
    ],
    ids=["error", "memory", "GPU memory"],
)
def test_a_failed_trial_records_the_reason(
    error: BaseException, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    tracker = Recorder()
    record = run(spec_of(tmp_path), tmp_path, tracker=tracker)
    assert record.status == status
    message, _, where = (record.reason or "").partition(" (")
    assert message == reason
    assert len(re.findall(r"\d{8}", where.partition("examples ")[2].partition(";")[0])) == 8, "the batch's examples"
    assert where.endswith(f"log: {tmp_path}/trials/{record.trial_id}/log.txt)")
    assert record.metrics == {}
    assert read_record(record_path(tmp_path, record.trial_id)) == record == tracker.finished[0]
    log = (tmp_path / "trials" / record.trial_id / "log.txt").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log
    assert "train_step" in log


PLUGINS = """
from tasks.base import Metric, Scores


class Broken(Metric):
    labels = {"broken": "Broken"}

    def score(self, predictions, references):
        return Scores({"broken": self.of(predictions)}, {})

    def of(self, predictions):
        raise KeyError("no such word")
"""


def test_an_error_in_a_plugin_names_it_with_file_line_and_log(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGINS, encoding="utf-8")
    spec = scored_by(spec_of(tmp_path, budget={"examples": 8, "epochs": 1}), f"{path}:Broken")
    reason = run(spec, tmp_path).reason or ""
    assert reason.startswith("KeyError: 'no such word' (metric stand_in; plugin stand_in (tests), ")
    assert f"{path}:12 in of; log: {tmp_path}/trials/{spec.trial_id}/log.txt)" in reason


RETURNS = """
import sys
from tasks.base import Metric, Scores


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Broken(Metric):
    labels = {"broken": "Broken"}

    def score(self, predictions, references):
        WHAT
"""


@pytest.mark.parametrize(
    ("what", "message", "place"),
    [
        ("return {}", "ValueError: the metric returned dict; allowed: harness.Scores", "11 class Broken"),
        (
            "return Scores({'broken': float('nan')})",
            "ValueError: the metric returned nan as broken of the corpus; allowed: a finite number",
            "11 class Broken",
        ),
        (
            "return Scores({'broken': 1.0}, {'x': {'broken': 1.0}})",
            "ValueError: the metric returned scores of 'x', which is no id of an example it scored",
            "11 class Broken",
        ),
        ("sys.exit(3)", "RuntimeError: sys.exit(3) was called, which would end the process", "15 in score"),
        ("raise Unprintable", "Unprintable: its text cannot be told: RuntimeError", "15 in score"),
        ("raise ValueError('a \\udc80')", r"ValueError: a \udc80", "15 in score"),
    ],
    ids=["a mapping", "not finite", "of another example", "ends the process", "has no text", "has no characters"],
)
def test_a_metric_that_is_wrong_is_named_and_recorded(
    what: str, message: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test's captured log goes to the main process of pytest-xdist, which takes no lone surrogate.
    monkeypatch.setattr("_pytest.logging.LogCaptureHandler.emit", lambda *_: None)
    (path := tmp_path / "mine.py").write_text(RETURNS.replace("WHAT", what), encoding="utf-8")
    spec = scored_by(spec_of(tmp_path, budget={"examples": 8, "epochs": 1}), f"{path}:Broken")
    assert run(spec, tmp_path).status == "failed"
    reason = read_record(record_path(tmp_path, spec.trial_id)).reason or ""
    assert reason.startswith(message)
    assert f" (metric stand_in; plugin stand_in (tests), {path}:{place}; log: {tmp_path}/trials/" in reason
    log = (tmp_path / "trials" / spec.trial_id / "log.txt").read_text(encoding="utf-8")
    assert "the trial failed" in log
    assert "Traceback (most recent call last)" in log


def test_what_was_measured_and_is_no_record_fails_the_trial_and_not_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.Trial, "_test", lambda _: {"perplexity": float("nan")})
    record = run(spec_of(tmp_path, budget={"examples": 8, "epochs": 1}), tmp_path)
    assert record.status == "failed"
    assert re.match(r"ValidationError: 1 validation error for TrialRecord metrics", record.reason or "")
    assert read_record(record_path(tmp_path, record.trial_id)) == record


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda x: [item[0] for item in x],
            r"ValueError: .* features of shape \(\d+,\) for item 0; allowed: \(N, \d+\)",
        ),
        (lambda x: [item * torch.nan for item in x], r"ValueError: .* features of item 0 that are not finite"),
        (lambda x: x[1:], r"ValueError: the encoder returned \d+ items for \d+ files"),
        (lambda x: [item.numpy() for item in x], r"ValueError: the encoder returned ndarray for item 0"),
        (lambda x: x.nothing, r"AttributeError: .* has no attribute 'nothing'"),
    ],
    ids=["shape", "not finite", "too few", "no tensor", "error"],
)
def test_an_encoder_that_is_wrong_is_named_with_the_examples(
    spoil: Callable[[Any], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TinyVision.encode
    monkeypatch.setattr(TinyVision, "encode", lambda self, items: spoil(encode(self, items)))
    record = run(spec_of(tmp_path), tmp_path, feature_cache=str(tmp_path / "features"))
    assert record.status == "failed"
    assert re.search(message + r".*\(encoder of modality image; .*examples \d+, .* more; log: ", record.reason or "")


def test_a_token_id_that_the_model_does_not_have_names_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchMaker, "_encode", lambda *_: [5, 10**6])
    reason = run(spec_of(tmp_path), tmp_path).reason or ""
    assert re.match(r"ValueError: the tokenizer returned token id 1000000; allowed: 0 to \d+, .*examples \d+, ", reason)


def test_a_split_that_changes_between_two_reads_stops_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, reads = Scenes.examples, []

    def shuffled(task: Scenes, split: Any) -> Any:
        reads.append(split)
        found = list(examples(task, split))
        return found[::-1] if split == "test" and reads.count("test") > 1 else found

    monkeypatch.setattr(Scenes, "examples", shuffled)
    reason = run(spec_of(tmp_path), tmp_path).reason or ""
    assert re.match(
        r"UserError: task scenes: test changes between two reads: at position 0 there was example '", reason
    )


def test_the_log_has_epochs_resumes_and_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)
    train_step = Engine.train_step

    def warned(engine: Engine, batch: Any) -> float:
        warnings.warn("a plugin warns", UserWarning, stacklevel=1)
        return train_step(engine, batch)

    monkeypatch.setattr(Engine, "train_step", warned)
    spec = spec_of(tmp_path, budget=SMALL | {"max_target_length": 3})
    with pytest.raises(Killed, match="killed in epoch"):
        run(spec, tmp_path, killed_in_epoch(2), checkpoint_interval_s=0.0)
    record = run(spec, tmp_path, checkpoint_interval_s=0.0)
    log = (tmp_path / "trials" / spec.trial_id / "log.txt").read_text(encoding="utf-8")
    losses = [f"epoch {e.epoch} of 2, step {e.step}: train loss {e.train_loss:.6g}" for e in record.history]
    assert [line for line in losses if line in log] == losses
    assert log.index(losses[0]) < log.index("resumed after epoch 1, step 2") < log.index(losses[1])
    assert "UserWarning: a plugin warns" in log.partition("resumed after")[2]
    assert record.warnings
    assert f"WARNING {record.warnings[0]}" in log


def test_an_image_that_cannot_be_decoded_fails_the_trial_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    spec = spec_of(tmp_path)
    task = components.make_task(spec)
    task.prepare()
    picture = build.choose_splits(spec, task).test[0].files[0][1]
    picture.write_bytes(b"not a picture")
    record = run(spec, tmp_path)
    assert record.status == "failed"
    assert str(picture) in (record.reason or "")
    assert record.history == ()


def test_a_failed_trial_does_not_affect_the_next_one_in_the_same_process(finished: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, RuntimeError("first"))
        assert run(spec_of(tmp_path, budget=SMALL), tmp_path).status == "failed"
    again = run(spec_of(tmp_path, budget=SMALL), tmp_path)
    assert again.status == "finished"
    assert again.metrics == finished[0].metrics


def test_a_failing_tracking_server_changes_nothing_and_what_it_lacks_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("server is gone")

    client = SimpleNamespace(create_run=gone, search_runs=gone)
    monkeypatch.setattr(delivery, "connect", lambda _uri: client)
    spec = spec_of(tmp_path, budget={"examples": 8, "epochs": 1})
    planned = PlannedTrial(
        trial_id=spec.trial_id, label="LoRA r=2", method="lora", grouping="specific", setting="", seed=0
    )
    folder = tmp_path / "trials" / spec.trial_id
    record = run(spec, tmp_path, tracker=MlflowTracker(Destination("any", "1", "parent"), spec, planned, folder))
    assert (record.status, record.warnings, record.mlflow_run_id) == ("finished", (), None)
    assert read_record(record_path(tmp_path, spec.trial_id)) == record
    (epoch,) = record.history
    kept = {point.key: (point.value, point.step) for point in Journal(folder).points}
    assert kept["epoch/train_loss"] == (epoch.train_loss, epoch.step)
    assert "MLflow does not answer (ConnectionError: server is gone)" in (folder / "log.txt").read_text()


def test_texts_longer_than_allowed_are_truncated_and_counted_in_a_warning(tmp_path: Path) -> None:
    budget = {"examples": 8, "epochs": 1, "max_target_length": 5}
    record = run(spec_of(tmp_path, budget=budget), tmp_path)
    (warning,) = record.warnings
    assert "target texts were longer than max_target_length=5 tokens and were truncated" in warning
    assert examples_of(tmp_path, record)["tokens"].max() <= 5 * 6  # five references of five tokens and EOS


def test_requesting_more_examples_than_there_are_fails_with_both_numbers(tmp_path: Path) -> None:
    record = run(spec_of(tmp_path, budget={"examples": 65, "epochs": 1}), tmp_path)
    assert record.status == "failed"
    assert "UserError: budget.examples: task scenes: requests 65 examples, but there are 64" in (record.reason or "")
