"""How trials of several workers end, and, slowly, whole sweeps of them; tests/trial/test_worker.py trains with two."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.record import TrialRecord
from harness.experiment.sections import Resources
from harness.sweep import events
from harness.sweep.ranks import Heard, Job, RankDiedError, alike, cause_of, failed_record, request
from harness.trial.outcome import Outcome
from tests.support.trials import spec_of

DONE = [Outcome(rank) for rank in range(3)]
NAN = "FloatingPointError: the training loss became nan"


def failed(rank: int, reason: str = "ValueError: broken (example 7)", **fields: Any) -> Outcome:
    return Outcome(rank, "failed", reason, "Traceback …", **fields)


def lost(rank: int) -> Outcome:
    return failed(rank, "RuntimeError: Connection closed by peer", lost=True)


def test_a_trial_that_finished_has_no_cause() -> None:
    assert cause_of(Heard(3, tuple(DONE), {})) is None
    assert alike(DONE)


def test_a_worker_that_dies_after_rank_0_has_all_costs_nothing() -> None:
    assert cause_of(Heard(2, (DONE[0],), {1: "killed"})) is None


def test_the_first_failure_is_the_cause_and_not_those_that_follow_from_it() -> None:
    first, second = failed(1), failed(2, "KeyError: other")
    assert cause_of(Heard(3, (lost(0), first, second), {})) is first


@pytest.mark.parametrize(
    ("heard", "message"),
    [
        (Heard(3, (lost(0),), {2: "the node died"}), r"^rank 2 of 3 died: the node died$"),
        (Heard(3, (failed(1),), {0: "killed"}), r"^rank 0 of 3 died: killed$"),
        (Heard(2, (lost(0), lost(1)), {}), r"^rank 0 of 2 lost another one: RuntimeError: Connection closed by peer$"),
    ],
)
def test_a_trial_that_lost_a_worker_starts_again(heard: Heard, message: str) -> None:
    with pytest.raises(RankDiedError, match=message):
        cause_of(heard)


def test_a_failure_names_its_rank_unless_it_is_the_same_in_all(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    job = Job(spec.model_dump_json(), "", "unit", str(tmp_path), "", None)
    began = datetime.now(UTC)

    def record_of(*outcomes: Outcome) -> TrialRecord:
        heard = Heard(2, outcomes, {})
        cause = cause_of(heard)
        assert cause is not None
        return failed_record(heard, cause, job, began)

    one = record_of(failed(1))
    assert (one.status, one.reason) == ("failed", "rank 1 of 2: ValueError: broken (example 7)")
    assert (one.trial_id, one.experiment, one.workers) == (spec.trial_id, "unit", 2)
    # What rank 0 knows of a trial that failed elsewhere is kept.
    known = one.model_copy(update={"best_epoch": 3})
    assert record_of(failed(1), lost(0), failed(0, "KeyError: later", record=known)).best_epoch == 3
    everywhere = record_of(failed(1, f"{NAN} (example 1)"), failed(0, f"{NAN} (example 0)", record=known))
    assert everywhere.reason == f"{NAN} (example 0)"


def test_a_worker_has_a_bundle_of_its_own() -> None:
    asked = {"CPU": 2.0, "GPU": 0.0}
    assert request(Resources(), asked) == {"cpu": 2.0, "gpu": 0.0}
    several = request(Resources(workers=3), asked)
    assert several.bundles == [{"CPU": 2.0}] * 3
    assert several.head_bundle_is_empty


def test_a_trial_that_lost_a_worker_too_often_names_it(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    error = "ray::ImplicitFunc.train() (pid=7)\n  raise\nharness.sweep.ranks.RankDiedError: rank 1 of 2 died: killed\n"
    trial = SimpleNamespace(
        config={"trial": {"members": [{"trial_id": spec.trial_id, "spec": spec.model_dump_json()}]}},
        run_metadata=SimpleNamespace(start_time=None),
        failure=error,
    )
    record = events._died(trial, spec.trial_id, "unit", tmp_path / "log.txt", None)
    assert (record.reason or "").startswith("the worker process died: rank 1 of 2 died: killed (log: ")
