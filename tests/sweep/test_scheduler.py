"""The order in which Tune starts trials; tests/e2e runs whole sweeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from harness.sweep.scheduler import KeepStartingWorkers


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


def test_the_installed_tune_has_what_the_choice_reads() -> None:
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.tune.execution.tune_controller import TuneController

    used = set(TuneController.__init__.__code__.co_names)
    assert {"_trial_to_actor", "_resetting_trials", "_actor_manager"} <= used
    assert callable(RayActorManager.is_actor_started)
    assert {"_resetting_trials", "_trial_task_failure"} <= set(TuneController._schedule_trial_reset.__code__.co_names)
    assert "_trial_task_failure" in TuneController._actor_failed.__code__.co_names
