"""A grid of trials of less than a second each, some of which fail as its task's option says, run as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from harness.core.record import Run, TrialRecord, read_run

PLUGIN = '''
import ctypes
import os
import resource
from pathlib import Path

from harness import Example, Metric, Part, Scores, Task, TaskConfig


class Outcome(Metric):
    """Ends a trial as the references say."""

    labels = {"outcome": "Outcome"}

    def score(self, predictions, references):
        how = next(iter(references.values()))[0].split()[0]
        getattr(self, how)()
        return Scores({"outcome": 1.0}, {key: {"outcome": 1.0} for key in predictions})

    def fine(self):
        pass

    def broken(self):
        raise KeyError("no such word")

    def hungry(self):
        """Allocates more than the process may have."""
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), before[1]))
        kept = []
        try:
            while True:
                kept.append(bytearray(16 << 20))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def greedy(self):
        """Allocates more than the control group has, until the kernel kills the process."""
        Path(os.environ["SMALL_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
        kept = []
        while True:
            kept.append(b"x" * (16 << 20))

    def stuck(self):
        """Sleeps in C, with Python's lock held: no thread of Python runs."""
        ctypes.PyDLL(None).sleep(10_000)


class SmallConfig(TaskConfig):
    how: str = "fine"


class Small(Task):
    """Say what a number is."""

    contexts = ("question", "answer")
    modalities = {}
    metrics = ("outcome",)
    Config = SmallConfig

    @classmethod
    def sample(cls, folder):
        return {}

    def prepare(self):
        pass

    def examples(self, split):
        how = self.config.how
        return [Example(f"{split}-{n}", (Part("question", f"what is {n}?"),), (f"{how} is {n}",)) for n in range(8)]
'''
LORA = "{method: lora, rank: [1, 2, 3], grouping: agnostic, learning_rate: 1e-2}"


def write_grid(
    folder: Path,
    adapters: str = LORA,
    seeds: int = 10,
    how: str = "fine",
    resources: str = "checkpoint_interval_s: 0",
) -> None:
    """Write ``small.py`` and ``small.yaml``: by default 30 trials."""
    (folder / "small.py").write_text(PLUGIN, encoding="utf-8")
    lines = [
        "name: small", "plugins: [small.py]", f"task: {{name: small, how: {how}}}", f"adapters: [{adapters}]",
        "budget: {epochs: 2}", f"seeds: {list(range(seeds))}", "optimizer: {per_device_train_batch_size: 4}",
        "eval: {max_new_tokens: 2}", f"resources: {{profile: false, {resources}}}",
    ]  # fmt: skip
    (folder / "small.yaml").write_text("\n".join(lines), encoding="utf-8")


def start(folder: Path, *options: str, output: int | IO[Any] = subprocess.DEVNULL, **variables: str) -> Any:
    """``harness run small.yaml`` as a process."""
    command = [sys.executable, "-m", "harness", "run", "small.yaml", *options]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT, text=True
    )


def run_to_end(folder: Path, *options: str, timeout_s: float = 900.0, **variables: str) -> tuple[int, str]:
    """Run it to its end: exit code and output."""
    driver = start(folder, *options, output=subprocess.PIPE, **variables)
    try:
        output = driver.communicate(timeout=timeout_s)[0]
    finally:
        driver.kill()
    return driver.returncode, output


def run_of(folder: Path, name: str = "small") -> Run:
    """What its run folder holds."""
    return read_run(folder / "runs" / name)


def by_outcome(folder: Path) -> dict[str, TrialRecord]:
    """Its records, by method and by how their trials were to end."""
    records = run_of(folder).records.values()
    return {f"{r.spec['adapter']['method']} {r.spec['task']['config']['how']}": r for r in records}
