"""Two drivers and one run folder, in real processes, on a file system whose locks hold nobody back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

# Holds the folder and says so. "elsewhere" makes this machine another one; every lock is granted, as by some NFS.
HOLDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from filelock import FileLock
    from harness.core import lease, process
    from harness.core.errors import UserError
    from harness.sweep.lock import exclusive

    FileLock.acquire = lambda self, *_, **__: None
    lease.RENEW_S, lease.DEAD_S = 0.2, 3.0
    if sys.argv[2] == "elsewhere":
        here = process._machine()
        process._machine = lambda: here + " of another node"
    try:
        with exclusive(Path(sys.argv[1]), print) as held:
            print("held", flush=True)
            while sys.stdin.readline():
                held.check()
                print("still", flush=True)
    except UserError as error:
        print("refused:", error, flush=True)
""")


def driver(folder: Path, where: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(folder), where]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_two_drivers_cannot_hold_a_folder_where_locks_hold_nobody(tmp_path: Path, where: str) -> None:
    first = driver(tmp_path, "here")
    assert line_of(first) == "held\n"
    second = driver(tmp_path, where)
    if where == "elsewhere":
        assert "waiting up to 3 s" in line_of(second)
    assert line_of(second).startswith(f"refused: {tmp_path}: in use by another sweep or profile (process {first.pid} ")
    end(second)
    end(first)
    third = driver(tmp_path, where)
    assert line_of(third) == "held\n"
    end(third)


def test_of_drivers_that_start_at_once_one_gets_it(tmp_path: Path) -> None:
    drivers = [driver(tmp_path, where) for where in ("here", "elsewhere") * 2]
    said = [line_of(process) for process in drivers]
    said = [line_of(process) if "waiting" in line else line for process, line in zip(drivers, said, strict=True)]
    assert sum(line == "held\n" for line in said) == 1, said
    assert sum(line.startswith("refused: ") for line in said) == 3
    for process in drivers:
        end(process)


def test_the_lock_of_a_killed_driver_is_free_at_once_here_and_after_a_while_elsewhere(tmp_path: Path) -> None:
    for _ in range(5):
        killed = driver(tmp_path, "here")
        assert line_of(killed) == "held\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    following = driver(tmp_path, "elsewhere")
    began = time.monotonic()
    assert "waiting up to 3 s" in line_of(following)
    assert line_of(following) == "held\n"
    assert 2.5 < time.monotonic() - began < 30
    end(following)


def test_a_driver_that_was_stopped_for_too_long_is_told_that_another_has_its_folder(tmp_path: Path) -> None:
    stopped = driver(tmp_path, "here")
    assert line_of(stopped) == "held\n"
    os.kill(stopped.pid, signal.SIGSTOP)  # as a machine that hangs
    following = driver(tmp_path, "elsewhere")
    assert "waiting" in line_of(following)
    assert line_of(following) == "held\n"
    os.kill(stopped.pid, signal.SIGCONT)
    time.sleep(1.0)  # it renews its lease every 0.2 s
    assert stopped.stdin is not None
    stopped.stdin.write("\n")
    stopped.stdin.close()
    stopped.wait(30)
    assert stopped.returncode == 1, "SweepEndedError ends it"
    assert following.stdin is not None
    following.stdin.write("\n")
    following.stdin.flush()
    assert line_of(following) == "still\n"
    end(following)
