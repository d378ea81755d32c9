"""Trials that fail, each in its own way: recorded as what it is, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.sweep.oom import oom_kills
from tests.support.small_grid import by_outcome, run_of, run_to_end, write_grid

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
LORA, DIVERGING = "{method: lora, rank: 1, learning_rate: 1e-2}", "{method: full, learning_rate: 1e30}"
MEMORY = Path("/sys/fs/cgroup/memory")  # version 1 of control groups
LIMIT_BYTES = 256 << 20


def test_each_failure_is_recorded_as_what_it_is_and_the_others_go_on(tmp_path: Path) -> None:
    write_grid(
        tmp_path, f"{LORA}, {DIVERGING}", seeds=1, how="[broken, stuck, hungry, fine]",
        resources="max_concurrent_trials: 1, trial_timeout_s: 30",
    )  # fmt: skip
    code, output = run_to_end(tmp_path)
    assert code == 1, output
    found = by_outcome(tmp_path)
    assert {name: record.status for name, record in found.items()} == {
        "lora fine": "finished",
        "lora broken": "failed",
        "lora hungry": "out_of_memory",
        "lora stuck": "failed",
        **{f"full {how}": "failed" for how in ("broken", "stuck", "hungry", "fine")},
    }
    reasons = {name: record.reason or "" for name, record in found.items()}
    assert reasons["lora broken"].startswith("KeyError: 'no such word' (metric outcome; plugin small")
    assert reasons["lora hungry"].startswith("MemoryError")
    assert reasons["lora stuck"].startswith("no progress for 30 s (in phase test) (log: ")
    assert reasons["full fine"].startswith("FloatingPointError")
    log = (tmp_path / "runs/small/trials" / found["lora stuck"].trial_id / "log.txt").read_text()
    assert "Timeout (0:00:30)!" in log
    assert "in stuck" in log, "the stack of the stuck process"
    assert "1 of 8 trials finished, 7 failed" in output
    for reason in reasons.values():
        assert not reason or reason[:60] in output

    code, output = run_to_end(tmp_path, "--only", "method=full")  # the second failures
    assert code == 1
    assert "4 of 8 trials selected" in output
    code, output = run_to_end(tmp_path, "--only", "method=full and how=fine")
    assert code == 1
    assert "1 trial failed twice in the same way and is not tried again; --retry failed does it" in output
    assert "nothing to compute" in output
    trial = tmp_path / "runs/small/trials" / found["full fine"].trial_id
    assert sorted(path.name for path in trial.glob("attempt-*.json")) == ["attempt-1.json"]


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with little memory."""
    if os.geteuid() or not (MEMORY / "memory.limit_in_bytes").exists() or oom_kills() is None:
        pytest.skip("needs root, version 1 of control groups, and a kernel that counts what it kills")
    group = MEMORY / f"harness-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    yield group
    group.rmdir()


def test_a_worker_that_the_kernel_kills_for_its_memory_is_recorded_as_out_of_memory(
    tmp_path: Path, small_group: Path
) -> None:
    write_grid(tmp_path, LORA, seeds=1, how="[greedy, fine]", resources="max_concurrent_trials: 1, max_failures: 0")
    before = oom_kills() or 0
    code, output = run_to_end(tmp_path, SMALL_CGROUP=str(small_group))
    assert (oom_kills() or 0) > before, "the kernel killed nothing"
    assert code == 1, output
    records = by_outcome(tmp_path)
    assert records["lora fine"].status == "finished"
    assert records["lora greedy"].status == "out_of_memory"
    reason = "the kernel killed the worker process because there was no memory"
    assert (records["lora greedy"].reason or "").startswith(reason)
    assert len(run_of(tmp_path).records) == 2
