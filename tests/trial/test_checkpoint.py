"""Checkpoints inside an epoch: a trial that goes on from one ends, bit by bit, as one that nobody stopped."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core.record import TrialRecord, record_path
from harness.experiment.plan import TrialSpec
from harness.trial import checkpoint, measure, trial
from harness.trial.engine import Engine
from harness.trial.trial import Progress
from tests.support.parity import assert_same_result
from tests.support.trials import LORA, Recorder, run, spec_of

DROPOUT = LORA | {"dropout": 0.3}
LLAVA = {"method": "llava", "learning_rate": 3e-3, "projector_learning_rate": 1e-2}
SMALL = {"examples": 20, "epochs": 2}  # three batches each, the last one of four examples
BATCHES = {"per_device_train_batch_size": 8, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3}
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}


class Killed(BaseException):
    """Stands for SIGKILL: no error handler catches it."""


class Steps:
    """Counts calls of ``Engine.train_step``; kills the trial before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken, self.last = 0, 10**9
        step = Engine.train_step

        def counted(engine: Engine, batch: Any) -> float:
            if self.taken >= self.last:
                raise Killed(f"killed before batch {self.taken + 1}")
            self.taken += 1
            return step(engine, batch)

        monkeypatch.setattr(Engine, "train_step", counted)

    def next(self, count: int) -> None:
        self.taken, self.last = 0, count


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def folder_of(run_folder: Path, spec: TrialSpec) -> Path:
    return run_folder / "trials" / spec.trial_id / "checkpoint"


def small(folder: Path, adapter: Mapping[str, Any] = DROPOUT, **sections: Any) -> TrialSpec:
    return spec_of(folder, adapter, **({"budget": SMALL, "optimizer": BATCHES} | sections))


@dataclass(frozen=True)
class Whole:
    """A trial of six batches in two epochs that nobody disturbed."""

    spec: TrialSpec
    record: TrialRecord
    folder: Path

    def assert_same(self, record: TrialRecord, folder: Path) -> None:
        assert_same_result(record, folder, self.record, self.folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    spec = small(folder)
    record = run(spec, folder)
    assert record.status == "finished", record.reason
    return Whole(spec, record, folder)


CASES = [
    pytest.param(DROPOUT, {}, 0, 2, id="dropout"),
    pytest.param(DROPOUT, {"optimizer": BATCHES | BY_LENGTH}, 0, 2, id="batches by length"),
    pytest.param(
        LLAVA, {"optimizer": BATCHES | {"gradient_accumulation_steps": 2}}, 0, 1, id="two stages, accumulated",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        DROPOUT | {"learning_rate": 0.2}, {"budget": SMALL | {"epochs": 4, "patience": 1}}, 0, 2,
        id="patience", marks=pytest.mark.slow,
    ),
    pytest.param(DROPOUT, {"optimizer": BATCHES | {"bf16": True}}, 1, 2, id="bf16, ZeRO-1", marks=pytest.mark.slow),
    pytest.param(LLAVA, {}, 3, 2, id="two stages, ZeRO-3", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "sections", "zero_stage", "kills"), CASES)
@pytest.mark.e2e
def test_a_trial_killed_after_any_batch_ends_as_one_that_was_not(
    adapter: dict[str, Any], sections: dict[str, Any], zero_stage: int, kills: int, steps: Steps, tmp_path: Path
) -> None:
    """Every attempt is killed two steps after the one before: inside the first epoch, then inside the second."""
    (tmp_path / "whole").mkdir()
    spec = small(tmp_path, adapter, **sections)
    expected = run(spec, tmp_path / "whole", zero_stage=zero_stage)
    assert len(expected.history) == 2
    again, killed = tmp_path / "again", 0
    while True:
        steps.next(2 * spec.optimizer.gradient_accumulation_steps)
        try:
            resumed = run(spec, again, checkpoint_interval_s=0.0, zero_stage=zero_stage)
            break
        except Killed:
            killed += 1
    assert killed == kills
    assert_same_result(resumed, again, expected, tmp_path / "whole")
    assert not folder_of(again, spec).exists()


def test_a_trial_that_is_asked_to_stop_saves_where_it_is(whole: Whole, steps: Steps, tmp_path: Path) -> None:
    spec, again = whole.spec, tmp_path / "again"
    tracker = Recorder()
    steps.next(10**9)
    record = run(spec, again, tracker=tracker, stop=lambda: steps.taken == 4)
    assert (record.status, record.reason) == ("cancelled", "asked to stop at step 5 of 6")
    assert not record_path(again, spec.trial_id).exists()
    assert (tracker.pauses, tracker.finished) == (1, [])
    assert [path.name for path in folder_of(again, spec).iterdir() if path.is_dir()] == ["epoch-2-step-5"]
    steps.next(10**9)
    assert run(spec, again, stop=lambda: True).status == "cancelled"
    assert steps.taken == 0
    resumed = run(spec, again)
    assert steps.taken == 1
    whole.assert_same(resumed, again)
    # Of what came before too: five steps in the first process, of which three warm up, and a warm-up step here.
    assert resumed.throughput is not None
    assert resumed.throughput.measured_steps == 2
    assert resumed.memory is not None
    assert whole.record.memory is not None
    assert resumed.memory.activations_bytes == whole.record.memory.activations_bytes
    assert resumed.phases_s["train"] > record.phases_s["train"] > 0
    log = (again / "trials" / spec.trial_id / "log.txt").read_text(encoding="utf-8")
    assert "stopped: asked to stop at step 5 of 6" in log
    assert "resumed after epoch 1, step 5, batch 2 of epoch 2" in log


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["build", "encode", "validate", "test"])
def test_a_trial_stops_in_every_phase(
    phase: str, whole: Whole, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)
    shutil.rmtree(Path(os.environ["HARNESS_CACHE"], "features"))  # of the whole trial: nothing would be encoded
    spec, again = whole.spec, tmp_path / "again"
    phases: list[str] = []

    def report(progress: Progress) -> None:
        phases.append(progress.phase)

    steps.next(10**9)
    assert run(spec, again, report, stop=lambda: any(one.startswith(phase) for one in phases)).status == "cancelled"
    trained = steps.taken
    assert trained == {"build": 0, "encode": 0, "validate": 3, "test": 6}[phase]
    resumed = run(spec, again)
    assert steps.taken == 6, "what was trained is not trained again"
    whole.assert_same(resumed, again)
    assert (resumed.memory, resumed.throughput) != (None, None)


@pytest.mark.slow
def test_a_stopped_trial_goes_on_to_its_rung(whole: Whole, steps: Steps, tmp_path: Path) -> None:
    spec, again = whole.spec, tmp_path / "again"
    steps.next(10**9)
    assert run(spec, again, rungs=(1,), stop=lambda: steps.taken == 1).status == "cancelled"
    paused = run(spec, again, rungs=(1,))
    assert (paused.status, paused.history) == ("paused", whole.record.history[:1])
    assert steps.taken == 3
    assert run(spec, again, stop=lambda: steps.taken == 4).status == "cancelled"
    whole.assert_same(run(spec, again), again)


@pytest.mark.slow
def test_a_checkpoint_is_made_when_the_interval_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps take an hour, and the interval is 1.5 hours, which two steps exceed; also at the end of an epoch."""
    now, made = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    step, save = Engine.train_step, Engine.save

    def slow(engine: Engine, batch: Any) -> float:
        now[0] += 3600.0
        return step(engine, batch)

    def costly(engine: Engine, folder: Path, tag: str) -> None:
        made.append(tag)
        now[0] += 600.0
        save(engine, folder, tag)

    monkeypatch.setattr(Engine, "train_step", slow)
    monkeypatch.setattr(Engine, "save", costly)
    with caplog.at_level(logging.WARNING):
        record = run(small(tmp_path), tmp_path, checkpoint_interval_s=5400.0)
    assert record.status == "finished", record.reason
    assert made == ["epoch-1-step-2", "epoch-1", "epoch-2-step-5", "epoch-2"]
    told = "a checkpoint took 600.0 s, 11 % of resources.checkpoint_interval_s: 5400"
    assert [r.getMessage() for r in caplog.records if "a checkpoint took" in r.getMessage()] == [told]


# ── Checkpoints that cannot be used


@pytest.fixture(scope="module")
def stopped(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped in the second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch)
        assert run(whole.spec, folder, stop=lambda: steps.taken == 4).status == "cancelled"
    return folder


def cut_short(folder: Path) -> None:
    largest = max(folder.glob("epoch-*/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def lose_a_file(folder: Path) -> None:
    next(folder.glob("epoch-*/worker-0.safetensors")).unlink()


def fill_with_zeros(folder: Path) -> None:
    """As a file of the right size whose blocks never reached the disk."""
    largest = max(folder.glob("epoch-*/*.pt"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))


def spoil_the_state(folder: Path) -> None:
    (folder / "state.json").write_text("{", encoding="utf-8")


def name_another_place(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    (folder / "state.json").write_text(json.dumps(state | {"tag": "../../elsewhere"}), encoding="utf-8")


def plant_code(folder: Path) -> None:
    """As somebody does who can write into a run folder that is not theirs."""

    class Planted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "code has run"),)

    path = max(folder.glob("epoch-*/*.pt"), key=lambda path: path.stat().st_size)
    torch.save({"module": Planted()}, path)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["files"][path.name] = path.stat().st_size
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (plant_code, "has more than data, so it is not read"),
        pytest.param(cut_short, "bytes instead of", marks=pytest.mark.slow),
        pytest.param(lose_a_file, "worker-0.safetensors: found None bytes", marks=pytest.mark.slow),
        pytest.param(fill_with_zeros, "epoch-2-step-5: ", marks=pytest.mark.slow),
        pytest.param(spoil_the_state, "state.json: 1 validation error", marks=pytest.mark.slow),
        pytest.param(name_another_place, "state.json: 1 validation error", marks=pytest.mark.slow),
    ],
)
def test_a_broken_checkpoint_is_told_and_the_trial_starts_again(
    spoil: Any, told: str, whole: Whole, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    spoil(folder_of(tmp_path / "run", whole.spec))
    with caplog.at_level(logging.WARNING):
        record = run(whole.spec, tmp_path / "run")
    whole.assert_same(record, tmp_path / "run")
    (line,) = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
    assert line.startswith("the checkpoint cannot be used, so the trial starts again: ")
    assert told in line


@pytest.mark.slow
def test_a_checkpoint_of_the_layout_before_this_one_is_used(whole: Whole, steps: Steps, tmp_path: Path) -> None:
    """It was made at the end of an epoch only, and said neither the sizes of its files nor what a worker knew."""
    spec, again = whole.spec, tmp_path / "again"
    steps.next(10**9)
    run(spec, again, rungs=(1,))
    state = folder_of(again, spec) / "state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    kept = ("history", "best_epoch", "step", "phases_s", "activations_bytes", "tag", "layout")
    state.write_text(json.dumps({key: content[key] for key in kept}), encoding="utf-8")
    next(state.parent.glob("epoch-1/worker-0.safetensors")).unlink()
    resumed = run(spec, again)
    assert steps.taken == 6, "three steps in each process"
    whole.assert_same(resumed, again)


@pytest.mark.slow
def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(
    whole: Whole, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, again = whole.spec, tmp_path / "again"
    flush = checkpoint._flushed

    def dying(folder: Path) -> dict[str, int]:
        if folder.name == "epoch-1-step-2":
            raise Killed("killed while it is written")
        return flush(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flushed", dying)
        with pytest.raises(Killed, match="killed while it is written"):
            run(spec, again, checkpoint_interval_s=0.0)
    assert sorted(path.name for path in folder_of(again, spec).glob("epoch-*")) == ["epoch-1-step-1", "epoch-1-step-2"]
    steps.next(10**9)
    whole.assert_same(run(spec, again), again)
    assert steps.taken == 5


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_and_not_the_trial(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec, again = whole.spec, tmp_path / "again"
    save = Engine.save

    def full(engine: Engine, folder: Path, tag: str) -> None:
        save(engine, folder, tag)
        if tag == "epoch-1-step-2":
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")  # as torch says it

    monkeypatch.setattr(Engine, "save", full)
    with caplog.at_level(logging.WARNING):
        record = run(spec, again, checkpoint_interval_s=0.0)
    whole.assert_same(record, again)
    assert "the checkpoint after step 2 could not be written: [enforce fail" in caplog.text
