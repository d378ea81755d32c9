"""The identity of processes."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from harness.core.process import is_dead, this_process


def test_this_process_is_alive_and_a_later_one_with_its_id_is_not_the_same() -> None:
    mine = this_process()
    assert is_dead(mine) is False
    assert is_dead({**mine, "started": mine["started"] - 60}) is True


def test_a_process_that_has_ended_is_dead_also_before_its_parent_asks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = {**this_process(), "pid": child.pid, "started": psutil.Process(child.pid).create_time()}
    assert is_dead(process) is False
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert is_dead(process) is True
    child.wait()
    assert is_dead(process) is True


def test_nothing_is_known_of_processes_elsewhere() -> None:
    assert is_dead({**this_process(), "machine": "another"}) is None
    assert is_dead({}) is None
    assert is_dead({**this_process(), "pid": "?"}) is None
