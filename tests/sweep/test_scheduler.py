"""The order in which Tune starts trials; tests/e2e runs whole sweeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from harness.sweep.scheduler import HalveRows, KeepStartingWorkers


def controller(*trials: Any, starting: tuple[str, ...] = (), resetting: tuple[str, ...] = ()) -> Any:
    """What Tune's controller knows: a worker is requested for each trial, and those of ``starting`` are starting."""
    workers = {trial: f"worker of {trial.trial_id}" for trial in trials}
    return SimpleNamespace(
        get_trials=lambda: list(trials),
        _trial_to_actor=workers,
        _resetting_trials={trial for trial in trials if trial.trial_id in resetting},
        _actor_manager=SimpleNamespace(
            is_actor_started=lambda worker: worker in {f"worker of {trial_id}" for trial_id in starting}
        ),
    )


class Waiting(SimpleNamespace):
    __hash__ = object.__hash__


def waiting(*names: str) -> list[Waiting]:
    return [Waiting(trial_id=name, status="PENDING") for name in names]


def test_a_free_worker_takes_a_trial_for_which_no_worker_is_starting() -> None:
    first, second, third = waiting("a", "b", "c")
    choose = KeepStartingWorkers().choose_trial_to_run
    assert choose(controller(first, second, third)) is first
    assert choose(controller(first, second, third, starting=("a",))) is second
    assert choose(controller(first, second, third, starting=("a",), resetting=("b",))) is third
    assert choose(controller(first, starting=("a",))) is first, "no other trial: a free worker is faster"
    assert choose(controller(first, resetting=("a",))) is None
    first.status = "RUNNING"
    assert choose(controller(first, second)) is second


def test_a_worker_that_dies_between_two_trials_fails_the_next_one_once() -> None:
    """Tune tells of it twice: of the actor, when it sets the trial to RUNNING first, and of the task that resets it."""
    failed: list[tuple[str, str]] = []
    next_trial, other = waiting("next", "other")
    known = controller(next_trial, other, resetting=("next",))

    def fail(trial: Any, exception: Exception) -> None:
        failed.append((trial.trial_id, str(exception)))
        trial.status = "PENDING"  # it is tried again

    known._trial_task_failure = fail
    scheduler = KeepStartingWorkers()
    scheduler.on_trial_add(known, next_trial)
    scheduler.on_trial_add(known, other)
    next_trial.status = "RUNNING"
    known._trial_task_failure(next_trial, RuntimeError("actor"))
    known._trial_task_failure(next_trial, RuntimeError("reset"))
    assert failed == [("next", "actor")]
    assert scheduler.choose_trial_to_run(known) is next_trial, "no longer taken for one that is being reset"
    for trial in (next_trial, other):
        trial.status = "RUNNING"
        known._trial_task_failure(trial, RuntimeError("train"))
    assert failed[1:] == [("next", "train"), ("other", "train")]


def test_trials_that_have_ended_are_forgotten_once_their_worker_is_free() -> None:
    ended, failed, stopping, next_trial = trials = waiting("ended", "failed", "stopping", "next")
    ended.status, failed.status, stopping.status = "TERMINATED", "ERROR", "TERMINATED"
    known = controller(stopping, next_trial)  # these have a worker
    known._trials = list(trials)
    known.get_trials = lambda: known._trials
    known._trial_metadata = {trial.trial_id: "{}" for trial in trials}
    known._trials_to_cache, known._stopped_trials, known._failed_trials = {ended}, {ended, stopping}, {failed}
    known._trial_task_failure = None
    scheduler = KeepStartingWorkers()
    scheduler.on_trial_add(known, next_trial)
    assert scheduler.choose_trial_to_run(known) is next_trial
    assert known._trials == [stopping, next_trial]
    assert list(known._trial_metadata) == ["stopping", "next"]
    assert (known._trials_to_cache, known._stopped_trials, known._failed_trials) == (set(), {stopping}, set())


def test_the_installed_tune_has_what_the_choice_reads() -> None:
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.tune.execution.tune_controller import TuneController

    used = set(TuneController.__init__.__code__.co_names)
    assert {"_trial_to_actor", "_resetting_trials", "_actor_manager"} <= used
    assert {"_trials", "_trial_metadata", "_trials_to_cache", "_stopped_trials", "_failed_trials"} <= used
    assert callable(RayActorManager.is_actor_started)
    assert {"_resetting_trials", "_trial_task_failure"} <= set(TuneController._schedule_trial_reset.__code__.co_names)
    assert "_trial_task_failure" in TuneController._actor_failed.__code__.co_names


class Rows:
    """Rows whose decision is made by the test."""

    def __init__(self) -> None:
        self.decisions: dict[str, bool | None] = {}
        self.calls: list[str] = []

    def update(self, trial_id: str) -> None:
        self.calls.append(f"update {trial_id}")

    def goes_on(self, trial_id: str, epoch: int) -> bool | None:
        return self.decisions.get(trial_id)

    def prune(self, trial_id: str) -> None:
        self.calls.append(f"prune {trial_id}")


def halved(*trials: Any) -> tuple[Rows, HalveRows, Any]:
    """The scheduler with a controller that does what it is told at once."""
    rows, known = Rows(), controller(*trials)
    for trial in trials:
        members = [{"trial_id": trial_id} for trial_id in trial.trial_id.split("+")]
        trial.config = {"trial": {**members[0], "members": members}}
    known._search_alg = SimpleNamespace(on_trial_complete=lambda _: None)
    known._set_trial_status = lambda trial, status: setattr(trial, "status", status)
    known.stop_trial = lambda trial: setattr(trial, "status", "TERMINATED")
    return rows, HalveRows(rows), known  # type: ignore[arg-type]


def at_rung(trial: Any, *waiting: str, others: int = 0) -> dict[str, Any]:
    return {"rung": 1, "waiting": list(waiting) or [trial.trial_id], "others": others}


def test_a_trial_at_a_rung_pauses_until_its_row_is_decided() -> None:
    first, second, third = waiting("a", "b", "c")
    rows, scheduler, known = halved(first, second, third)
    assert scheduler.on_trial_result(known, first, {"phase": "train"}) == "CONTINUE"
    assert scheduler.on_trial_result(known, first, at_rung(first)) == "PAUSE"
    first.status = "RUNNING"  # Tune still saves it
    rows.decisions = {"a": True, "b": False, "c": True}
    assert scheduler.on_trial_result(known, second, at_rung(second)) == "STOP"
    assert scheduler.on_trial_result(known, third, at_rung(third)) == "CONTINUE", "the last one need not pause"
    assert rows.calls == ["update a", "update b", "prune b", "update c"]
    second.status, third.status = "TERMINATED", "RUNNING"
    assert scheduler.choose_trial_to_run(known) is None, "not before it has paused"
    first.status = "PAUSED"
    assert scheduler.choose_trial_to_run(known) is first
    assert first.status == "PENDING"


def test_a_paused_trial_that_is_pruned_ends_and_frees_its_place_among_those_that_may_run() -> None:
    first, second = waiting("a", "b")
    rows, scheduler, known = halved(first, second)
    freed: list[str] = []
    known._search_alg = SimpleNamespace(on_trial_complete=freed.append)
    scheduler.on_trial_result(known, first, at_rung(first))
    first.status = "PAUSED"
    assert scheduler.choose_trial_to_run(known) is second
    assert (first.status, freed) == ("PAUSED", ["a"])
    rows.decisions = {"a": False}
    assert scheduler.choose_trial_to_run(known) is second
    assert (first.status, rows.calls[-1]) == ("TERMINATED", "prune a")


def test_a_pack_at_a_rung_goes_on_with_those_that_are_left() -> None:
    pack, other = waiting("a+b+c", "d")
    rows, scheduler, known = halved(pack, other)
    assert scheduler.on_trial_result(known, pack, {"phase": "train", "ended": ["c"]}) == "CONTINUE"
    assert rows.calls == ["update c"], "it failed, for which its row need not wait"
    rows.decisions = {"a": True}
    assert scheduler.on_trial_result(known, pack, at_rung(pack, "a", "b")) == "PAUSE", "the row of b is not decided"
    assert "prune" not in str(rows.calls)
    pack.status = "PAUSED"
    rows.decisions = {"a": True, "b": False}
    assert scheduler.choose_trial_to_run(known) is pack
    assert (pack.status, rows.calls[-1]) == ("PENDING", "prune b")
    rows.decisions = {"a": False, "b": False}
    assert scheduler.on_trial_result(known, pack, at_rung(pack, "a")) == "STOP"
    assert scheduler.on_trial_result(known, pack, at_rung(pack, "a", others=1)) == "CONTINUE", "one is at a later rung"


def test_a_trial_that_failed_for_good_is_read_when_its_record_is_written() -> None:
    first, second = waiting("a", "b")
    rows, scheduler, known = halved(first, second)
    scheduler.on_trial_error(known, first)
    scheduler.on_trial_error(known, second)
    first.status, second.status = "ERROR", "PENDING"  # the second is tried again
    assert scheduler.choose_trial_to_run(known) is second
    assert rows.calls == ["update a"]
    scheduler.on_trial_complete(known, second, {})
    assert rows.calls == ["update a", "update b"]


def test_the_installed_tune_has_what_pausing_needs() -> None:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.search.basic_variant import BasicVariantGenerator

    assert "_search_alg" in TuneController.__init__.__code__.co_names
    assert callable(TuneController._set_trial_status)
    assert "_live_trials" in BasicVariantGenerator.on_trial_complete.__code__.co_names
