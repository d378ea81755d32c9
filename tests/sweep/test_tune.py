"""Resources of a trial on a Ray cluster; tests/e2e runs whole sweeps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.experiment.sections import Resources
from harness.sweep import tune
from harness.sweep.tune import at_once, per_trial


def test_auto_uses_a_gpu_if_there_is_one() -> None:
    assert per_trial(Resources(), {"CPU": 2.0}) == {"cpu": 1, "gpu": 0.0}
    assert per_trial(Resources(), {"CPU": 8.0, "GPU": 4.0}) == {"cpu": 1, "gpu": 1.0}
    assert per_trial(Resources(gpus_per_worker=0.25, cpus_per_worker=2), {"CPU": 8.0, "GPU": 1.0}) == {
        "cpu": 2,
        "gpu": 0.25,
    }


def test_more_resources_than_available_are_an_error() -> None:
    with pytest.raises(UserError, match=r"resources\.gpus_per_worker: found 1, .* cluster has 0"):
        per_trial(Resources(gpus_per_worker=1.0), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"resources\.cpus_per_worker: found 4, .* cluster has 2"):
        per_trial(Resources(cpus_per_worker=4), {"CPU": 2.0})


@pytest.mark.parametrize(
    ("resources", "available", "expected"),
    [
        (Resources(), {"CPU": 2.0}, 2),
        (Resources(cpus_per_worker=2), {"CPU": 5.0}, 2),
        (Resources(gpus_per_worker=0.1), {"CPU": 64.0, "GPU": 1.0}, 10),
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
    monkeypatch.setattr(tune, "connect", lambda *_: nullcontext())
    monkeypatch.setattr(tune.ray, "cluster_resources", lambda: {"CPU": 8.0})
    wanted: Any = SimpleNamespace(
        trials=[(None, None)] * 2, resources=Resources(), run=tmp_path, experiment="x", profile=None, files=()
    )
    display: Any = SimpleNamespace(opened=lambda run, at_once: opened.append((run, at_once)))
    with pytest.raises(KeyboardInterrupt, match=r"^$") if ended < 2 else nullcontext():
        tune.sweep(wanted, display)
    assert opened == [(tmp_path, 2)]
