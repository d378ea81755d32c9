"""A trial of Tune from rung to rung, alone and as a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.record import record_path
from harness.sweep import rungs as module
from harness.sweep.rungs import Rungs, run_to_end


class Folder:
    """Trials that wait where the test says, and what is reported of them."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.reports, self.attempts = run, list[dict[str, Any]](), list[dict[str, list[int]]]()
        self.waits: dict[str, int] = {}
        monkeypatch.setattr(module.tune, "report", self.reports.append)
        monkeypatch.setattr(module, "waiting_at", self._waiting_at)

    def _waiting_at(self, _run: Path, key: str, rungs: set[int]) -> int | None:
        return self.waits[key] if self.waits.get(key) in rungs else None

    def go(self, attempt: Any, *trials: str, rungs: tuple[int, ...] = (1, 2)) -> None:
        members = [{"trial_id": key, "rungs": rungs, "epochs": 4} for key in trials]

        def noted(left: Rungs) -> bool:
            self.attempts.append({key: sorted(own) for key, own in left.items()})
            return bool(attempt(left))

        run_to_end({**members[0], "members": members}, self.run, noted)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(tmp_path, monkeypatch)


def test_all_of_a_pack_wait_then_go_on_from_their_rung(folder: Folder) -> None:
    def attempt(left: Rungs) -> None:
        folder.waits = {key: min(own) for key, own in left.items() if own}

    folder.go(attempt, "a", "b", rungs=(2,))
    assert folder.attempts == [{"a": [2], "b": [2]}, {"a": [], "b": []}]
    assert folder.reports == [
        {"fraction": 0.5, "phase": "paused", "epoch": 2, "rung": 2, "waiting": ["a", "b"], "others": 0},
        {"fraction": 1.0, "phase": "done"},
    ]


def test_one_that_waits_at_a_later_rung_is_left_alone(folder: Folder) -> None:
    """A kill came between the two; the others come to their rung first."""
    folder.waits = {"a": 2}

    def attempt(left: Rungs) -> None:
        folder.waits |= {key: min(own) for key, own in left.items() if own}
        folder.waits = {key: rung for key, rung in folder.waits.items() if key not in left or left[key]}

    folder.go(attempt, "a", "b")
    assert folder.attempts == [{"b": [1, 2]}, {"b": [2]}, {"a": [], "b": []}]
    assert [(report.get("rung"), report.get("waiting"), report.get("others")) for report in folder.reports] == [
        (1, ["b"], 1),
        (2, ["a", "b"], 0),
        (None, None, None),
    ]


def test_one_that_was_pruned_meanwhile_does_not_go_on(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(left: Rungs) -> None:
        folder.waits = {key: min(own) for key, own in left.items() if own}

    def report(sent: dict[str, Any]) -> None:
        if sent.get("rung") == 1:  # by the scheduler
            folder.waits.pop("b")
            record_path(folder.run, "b").parent.mkdir(parents=True)
            record_path(folder.run, "b").touch()

    monkeypatch.setattr(module.tune, "report", report)
    folder.go(attempt, "a", "b", rungs=(1,))
    assert folder.attempts == [{"a": [1], "b": [1]}, {"a": []}]


def test_a_request_to_stop_is_reported(folder: Folder) -> None:
    folder.go(lambda _: True, "a", "b")
    assert folder.reports == [{"fraction": 0.0, "phase": "stopped"}]


def test_those_that_have_ended_do_not_run_again(folder: Folder) -> None:
    def attempt(left: Rungs) -> None:
        folder.waits = {"a": 1} if 1 in left["a"] else {}

    folder.go(attempt, "a", "b")
    assert folder.attempts == [{"a": [1, 2], "b": [1, 2]}, {"a": [2]}]
