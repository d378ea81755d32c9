"""How a sweep ends; tests/e2e runs whole sweeps."""

from __future__ import annotations

import signal
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
