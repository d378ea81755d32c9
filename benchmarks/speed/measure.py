"""What the parts of ``make bench`` share: the machine, progress, processes with their CPU time and memory, rows."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
CORES = 2
_SAMPLE_S = 0.2


@dataclass(frozen=True)
class Row:
    """One line of the table in docs/performance.md.

    Attributes:
        what: is measured.
        ours: the value of the harness.
        other: what it is compared with.
        ratio: what the target is about.
        target: to reach.
        met: whether it is reached; None: not measured, ``ratio`` says why.
    """

    what: str
    ours: str
    other: str
    ratio: str
    target: str
    met: bool | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def row(what: str, ours: str, other: str, ratio: float, at_least: float = 0.0, at_most: float = 0.0) -> Row:
    """A row whose ratio has a target."""
    if at_least:
        return Row(what, ours, other, f"{ratio:.2f}×", f"at least {at_least:g}×", ratio >= at_least)
    return Row(what, ours, other, f"{ratio:.3f}×", f"at most {at_most:g}×", ratio <= at_most)


def skipped(what: str, reason: str, target: str) -> Row:
    """A row that was not measured."""
    return Row(what, "–", "–", reason, target, None)


def ratios(ours: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of other ÷ ours within a round, so that a slow round affects both."""
    return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def machine() -> dict[str, Any]:
    """What was measured on, and with what."""
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "cores used": len(os.sched_getaffinity(0)),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "load before": round(os.getloadavg()[0], 2),
    }


def use_cores(count: int = CORES) -> None:
    """Let this process and what it starts run on the first ``count`` cores alone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


class Say:
    """Tells what is measured, and how long it still takes.

    Args:
        console: to print on.
        expected_s: of all that is to come.
    """

    def __init__(self, console: Console, expected_s: float) -> None:
        self.console, self.expected_s, self.began = console, expected_s, time.monotonic()

    def __call__(self, text: str, fraction: float | None = None) -> None:
        """Print a line; with the fraction of all that is done, the time left follows from the time taken."""
        took = time.monotonic() - self.began
        left = took * (1 / fraction - 1) if fraction else max(0.0, self.expected_s - took)
        self.console.print(f"[{_clock(took)}, about {_clock(left)} left] {text}", highlight=False, markup=False)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def environment() -> dict[str, str]:
    """Of the processes that are measured: one thread each, no other tracking server, nothing from the hub."""
    given = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return given | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Tree:
    """Samples a process and all that it starts, until the block ends: their CPU time and, if asked, their memory.

    Args:
        pid: of the first process; None: all that this process has started.
        memory: whether proportional set sizes are sampled; reading them takes time.

    Attributes:
        peak_pss_bytes: the most that all processes together had at a time.
        by_process: process → its command, the most that it had, and CPU seconds.
    """

    def __init__(self, pid: int | None = None, memory: bool = False) -> None:
        self._own = psutil.Process(pid) if pid else psutil.Process()
        self._leave_out = None if pid else os.getpid()
        self._memory, self._ends = memory, threading.Event()
        self.peak_pss_bytes = 0
        self.by_process: dict[int, Seen] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Tree:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes, as last seen."""
        return sum(seen.cpu_s for seen in self.by_process.values())

    def _watch(self) -> None:
        while not self._ends.wait(_SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        """Look once."""
        total, processes = 0, []
        with suppress(psutil.Error):
            processes = [self._own, *self._own.children(recursive=True)]
        for process in processes:
            if process.pid == self._leave_out:
                continue
            with suppress(psutil.Error, OSError):
                seen = self.by_process.setdefault(process.pid, Seen(" ".join(process.cmdline())))
                seen.cpu_s = sum(process.cpu_times()[:2])
                if self._memory:
                    pss = pss_bytes(process.pid)
                    total += pss
                    seen.command = " ".join(process.cmdline())  # Ray renames its workers
                    seen.peak_pss_bytes = max(seen.peak_pss_bytes, pss)
        self.peak_pss_bytes = max(self.peak_pss_bytes, total)


@dataclass
class Seen:
    """One process."""

    command: str
    peak_pss_bytes: int = 0
    cpu_s: float = 0.0


def pss_bytes(pid: int) -> int:
    """Proportional set size: its own memory, and its share of what it has in common with others."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss")


@dataclass
class Timed:
    """What a command took."""

    wall_s: float
    cpu_s: float
    output: str = field(repr=False, default="")


def run(command: Sequence[str], log: Path) -> Timed:
    """Run a command to its end.

    Raises:
        SystemExit: it fails; the end of its output is told.
    """
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        with Tree(process.pid) as tree:
            code = process.wait()
    took = time.monotonic() - began
    if code:
        raise SystemExit(failure(command, code, log))
    return Timed(took, tree.cpu_s, log.read_text(encoding="utf-8", errors="replace"))


def failure(command: Sequence[str], code: int, log: Path) -> str:
    """What to say of a command that failed."""
    end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    return f"{' '.join(command)}\nended with code {code}:\n{end}"


def seconds(values: Sequence[float]) -> str:
    """The median, as the table shows it."""
    median = statistics.median(values)
    return f"{median:.0f} s" if median >= 10 else f"{median:.2f} s"


def mib(size_bytes: float) -> str:
    """Memory, as the table shows it."""
    return f"{size_bytes / 2**20:,.0f} MiB"


def by_key(rounds: Sequence[Mapping[str, Any]], *path: str) -> list[Any]:
    """A value of every round."""
    found = []
    for one in rounds:
        value: Any = one
        for key in path:
            value = value[key]
        found.append(value)
    return found
