"""Resources of a trial on a Ray cluster, and the choice of the next trial; tests/e2e runs whole sweeps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.errors import SweepEndedError, UserError
from harness.experiment.sections import Resources
from harness.sweep import tune
from harness.sweep.tune import _KeepStartingWorkers, at_once, per_trial


def test_auto_uses_a_gpu_if_there_is_one() -> None:
    assert per_trial(Resources(), {"CPU": 2.0}) == {"cpu": 1, "gpu": 0.0}
    assert per_trial(Resources(), {"CPU": 8.0, "GPU": 4.0}) == {"cpu": 1, "gpu": 1.0}
    assert per_trial(Resources(gpus_per_trial=0.25, cpus_per_trial=2), {"CPU": 8.0, "GPU": 1.0}) == {
        "cpu": 2,
        "gpu": 0.25,
    }


def test_more_resources_than_available_are_an_error() -> None:
    with pytest.raises(UserError, match=r"resources\.gpus_per_trial: found 1, .* cluster has 0"):
        per_trial(Resources(gpus_per_trial=1.0), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"resources\.cpus_per_trial: found 4, .* cluster has 2"):
        per_trial(Resources(cpus_per_trial=4), {"CPU": 2.0})


@pytest.mark.parametrize(
    ("resources", "available", "expected"),
    [
        (Resources(), {"CPU": 2.0}, 2),
        (Resources(cpus_per_trial=2), {"CPU": 5.0}, 2),
        (Resources(gpus_per_trial=0.1), {"CPU": 64.0, "GPU": 1.0}, 10),
        (Resources(max_concurrent_trials=3), {"CPU": 64.0}, 3),
        (Resources(), {"CPU": 64.0}, 20),
    ],
)
def test_how_many_trials_run_at_once(resources: Resources, available: dict[str, float], expected: int) -> None:
    wanted: Any = SimpleNamespace(trials=range(20), resources=resources)
    assert at_once(wanted, per_trial(resources, available), available) == expected


@pytest.mark.parametrize("ended", [1, 2])
def test_a_sweep_that_tune_ended_early_was_interrupted(
    ended: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune handles Ctrl-C itself, and returns as if all was done."""
    opened: list[tuple[Path, int]] = []

    class Tuner:
        def __init__(self, _wanted: Any, _request: Any, events: Any) -> None:
            self.events = events

        def fit(self) -> None:
            self.events.ended = ended

    monkeypatch.setattr(tune, "_tuner", Tuner)
    monkeypatch.setattr(tune.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(tune.ray, "cluster_resources", lambda: {"CPU": 8.0})
    wanted: Any = SimpleNamespace(trials=range(2), resources=Resources(), run=tmp_path, experiment="x")
    display: Any = SimpleNamespace(opened=lambda run, at_once: opened.append((run, at_once)))
    with pytest.raises(KeyboardInterrupt, match=r"^$") if ended < 2 else nullcontext():
        tune.sweep(wanted, display)
    assert opened == [(tmp_path, 2)]


def test_a_sweep_whose_last_node_died_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune would wait forever for a node that can run the next trial."""
    asked: list[bool] = []
    nodes = [{"Alive": True}, {"Alive": False}]
    monkeypatch.setattr(tune.ray, "nodes", lambda: asked.append(True) or nodes)
    events = tune._Events(tmp_path, "x", SimpleNamespace())  # type: ignore[arg-type]
    events.on_step_begin(0, [])
    assert not asked, "not at every step"
    events.asked -= tune._NODES_S
    events.on_step_begin(1, [])
    nodes[0]["Alive"] = False
    events.on_step_begin(2, [])
    assert len(asked) == 1
    events.asked -= tune._NODES_S
    with pytest.raises(SweepEndedError, match=r"^Ray has died: one of its processes \(raylet, DashboardAgent, Runtime"):
        events.on_step_begin(3, [])


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
    choose = _KeepStartingWorkers().choose_trial_to_run
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
    scheduler = _KeepStartingWorkers()
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
