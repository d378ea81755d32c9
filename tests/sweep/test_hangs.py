"""Trials that make no progress; tests/faults has real ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from harness.sweep import oom
from harness.sweep.hangs import Hangs, stack_if_stuck


def test_a_trial_is_stuck_after_the_limit_without_progress_and_not_before() -> None:
    hangs = Hangs(15.0)
    hangs.progressed("a", "build")
    hangs._looked -= 10.0
    assert hangs.stuck(["a", "b"]) == {}
    hangs.progressed("a", "train")
    hangs.progressed("b", "test")
    hangs._looked -= 10.0
    assert hangs.stuck(["a", "b"]) == {}
    hangs.progressed("a", "train")
    hangs._looked -= 10.0
    assert hangs.stuck(["a", "b"]) == {"b": "no progress for 15 s (in phase test)"}
    hangs.ended("b")
    hangs._looked -= 10.0
    assert hangs.stuck(["a"]) == {"a": "no progress for 15 s (in phase train)"}


def test_a_process_that_starts_has_time_to_read_its_libraries() -> None:
    hangs = Hangs(15.0)
    hangs.progressed("a")
    for _ in range(30):  # and a moment more, in which the worker writes its stacks
        hangs._looked -= 10.0
        assert hangs.stuck(["a"]) == {}
    hangs._looked -= 10.0
    assert hangs.stuck(["a"]) == {"a": "no progress for 300 s (in phase start)"}


def test_without_a_limit_nothing_is_stuck() -> None:
    hangs = Hangs(None)
    for _ in range(3):
        hangs._looked -= 10.0
        assert hangs.stuck(["a"]) == {}


def test_a_process_that_makes_no_progress_writes_where_it_is(tmp_path: Path) -> None:
    log = tmp_path / "trial" / "log.txt"
    with stack_if_stuck(log, 0.2) as progressed:
        for _ in range(6):
            time.sleep(0.05)
            progressed()
        assert log.read_text() == ""
        time.sleep(0.4)
    assert "Timeout (0:00:00.200000)!" in log.read_text()
    assert "test_a_process_that_makes_no_progress_writes_where_it_is" in log.read_text()
    with stack_if_stuck(tmp_path / "other" / "log.txt", None) as progressed:
        progressed()
    assert not (tmp_path / "other").exists()


def test_the_kernel_counts_what_it_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom, "_COUNTS", tmp_path / "vmstat")
    assert oom.oom_kills() is None
    (tmp_path / "vmstat").write_text("pgfault 7\n")
    assert oom.oom_kills() is None
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 3\noom_kill_other 9\n")
    assert oom.oom_kills() == 3
