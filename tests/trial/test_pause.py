"""A trial that pauses at a rung of halving gives, when it goes on, what it would have given without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.record import TrialRecord, paused_path, read_record, record_path, waiting_at
from harness.trial.engine import Engine
from harness.trial.trial import Progress
from tests.support.trials import Recorder, examples_of, finished_trial, run, spec_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, Path, Recorder, list[Progress]]:
    return finished_trial(tmp_path_factory.mktemp("finished"))


@pytest.mark.e2e
def test_a_paused_trial_goes_on_to_the_same_result(finished: Any, tmp_path: Path) -> None:
    whole, folder, _, _ = finished
    spec, tracker = spec_of(tmp_path), Recorder()
    waits = paused_path(tmp_path, spec.trial_id)
    assert spec.trial_id == whole.trial_id
    paused = run(spec, tmp_path, tracker=tracker, rungs=(1, 2))
    assert (paused.status, paused.reason) == ("paused", "waits at epoch 1 for the others of its row")
    assert paused.history == whole.history[:1]
    assert (paused.metrics, paused.data.steps if paused.data else 0) == ({}, whole.history[0].step)
    assert read_record(waits) == paused
    assert not record_path(tmp_path, spec.trial_id).exists()
    assert (tracker.pauses, tracker.finished) == (1, [])

    assert [waiting_at(tmp_path, spec.trial_id, rungs) for rungs in ((1, 2), (2,))] == [1, None]

    second = run(spec, tmp_path, rungs=(2,))
    assert (second.status, second.history) == ("paused", whole.history[:2])
    ended = run(spec, tmp_path, tracker=tracker)
    same = {"history", "metrics", "data", "parameters", "best_epoch", "answers", "status"}
    assert ended.model_dump(include=same) == whole.model_dump(include=same)
    assert examples_of(tmp_path, ended).equals(examples_of(folder, whole))
    weights = [at / "trials" / spec.trial_id / "best.safetensors" for at in (tmp_path, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not waits.exists()
    assert not (tmp_path / "trials" / spec.trial_id / "checkpoint").exists()
    assert tracker.finished == [ended]


def test_a_trial_killed_between_its_checkpoint_and_its_pause_pauses_again(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, budget={"examples": 32, "epochs": 2})
    paused = run(spec, tmp_path, rungs=(1,))
    paused_path(tmp_path, spec.trial_id).unlink()
    again = run(spec, tmp_path, rungs=(1,))
    assert (again.status, again.history) == ("paused", paused.history)


def test_a_rung_within_a_gradient_accumulation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks before compute find it; a checkpoint would lose the accumulated gradients."""
    monkeypatch.setattr(Engine, "accumulating", True)
    record = run(spec_of(tmp_path, budget={"examples": 8, "epochs": 2}), tmp_path, rungs=(1,))
    assert record.status == "failed"
    assert "epoch 1 ends within a gradient accumulation" in str(record.reason)
