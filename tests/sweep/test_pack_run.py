"""What a worker that runs a pack tells; tests/e2e runs whole sweeps."""

from __future__ import annotations

from typing import Any

import pytest

from harness.sweep import pack_run
from harness.trial.trial import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pack_run.time, "monotonic", lambda: now[0])
    return now


def test_a_pack_reports_once_a_second_what_has_changed_and_every_end(clock: list[float]) -> None:
    sent: list[dict[str, Any]] = []
    report = pack_run.PackReport(sent.append)
    first, second = Progress(0.1, "train"), Progress(0.2, "train")
    report.progressed("a", first)
    assert sent == [{"phase": "train", "members": {"a": vars(first)}}]
    report.progressed("a", first)
    report.progressed("b", first)
    report.progressed("a", second)
    assert len(sent) == 1
    clock[0] += 1.0
    report.progressed("b", second)
    assert sent[1:] == [{"phase": "train", "members": {"a": vars(second), "b": vars(second)}}]
    report.progressed("a", second)
    report.ended("a")
    assert sent[2:] == [{"phase": "train", "members": {}, "ended": ["a"]}]
