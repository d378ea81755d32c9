"""How a sweep ends; tests/e2e runs whole sweeps."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.experiment.sections import Resources
from harness.sweep import tune


@pytest.mark.parametrize("ended", [1, 2])
def test_a_sweep_that_tune_ended_early_was_interrupted(
    ended: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune handles Ctrl-C itself, and returns as if all was done."""
    opened: list[tuple[Path, int]] = []
    handler = signal.getsignal(signal.SIGINT)

    class Tuner:
        def __init__(self, _wanted: Any, _packs: Any, _request: Any, events: Any, _grace: Any) -> None:
            self.events = events

        def fit(self) -> None:
            self.events.ended = ended
            signal.signal(signal.SIGINT, lambda *_: None)  # as Tune does

    monkeypatch.setattr(tune, "_tuner", Tuner)
    monkeypatch.setattr(tune, "connect", lambda *_: nullcontext())
    monkeypatch.setattr(tune, "nodes_alive", lambda: [{"CPU": 8.0}])
    wanted: Any = SimpleNamespace(
        trials=[(None, None)] * 2,
        resources=Resources(),
        run=tmp_path,
        experiment="x",
        profile=None,
        files=(),
        stored=None,
        lease=None,
    )
    display: Any = SimpleNamespace(opened=lambda run, at_once: opened.append((run, at_once)), noted=lambda _: None)
    with pytest.raises(KeyboardInterrupt, match=r"^$") if ended < 2 else nullcontext():
        tune.sweep(wanted, display)
    assert opened == [(tmp_path, 2)]
    assert signal.getsignal(signal.SIGINT) is handler, "the next Ctrl-C, in the profile or a notebook, has its effect"


def test_each_trial_of_tune_is_told_what_to_do_when_it_is_made(tmp_path: Path) -> None:
    """A grid of 10,000 trials in the parameter space, which Tune copies for each, would take minutes."""
    made: list[str] = []

    def packs() -> Iterator[dict[str, Any]]:
        for trial_id in ("a", "b", "c"):
            made.append(trial_id)
            yield {"trial_id": trial_id}

    search = tune.InTurn(packs(), at_once=2)
    grid = tune.tune.Experiment("grid", run=lambda config: None, num_samples=3, storage_path=str(tmp_path))
    search.add_configurations([grid])
    trials = [search.next_trial(), search.next_trial()]
    assert search.next_trial() is None, "two may run at once"
    assert made == ["a", "b"]
    search.on_trial_complete(trials[0].trial_id)
    trials.append(search.next_trial())
    for trial in trials:
        trial.resolve_config_placeholders({})
    assert [trial.config for trial in trials] == [{"trial": {"trial_id": trial_id}} for trial_id in made]
    search.on_trial_complete(trials[1].trial_id)
    assert search.next_trial() is None
    assert search.is_finished()


def test_what_is_to_do_is_not_in_the_files_of_tune(tmp_path: Path) -> None:
    search = tune.InTurn(iter([{"trial_id": "a"}]), at_once=None)
    assert vars(pickle.loads(pickle.dumps(search))) == {}
    search.save_to_dir(str(tmp_path), "session")
    assert not list(tmp_path.iterdir())
