"""Jobs to launch with made-up paths, for the tests of launchers."""

from __future__ import annotations

from pathlib import Path

from clusters.launch.job import FOLDER, Job
from clusters.profiles import load_profile

EXPERIMENT = """\
name: grid
task: {name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}
adapters:
  - {method: lora, rank: [2, 4], learning_rate: 6e-3}
budget: {examples: 24, epochs: 2}
resources: {profile: false}
"""


def written_profile(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def job(folder: Path, profile: str | Path, run: str = "/shared/runs/grid", output: str = "/shared/runs") -> Job:
    """A job of an experiment in ``folder``; the run folder is not made."""
    experiment = folder / "grid.yaml"
    experiment.write_text(EXPERIMENT, encoding="utf-8")
    return Job("grid", experiment, (), output, Path(run) / FOLDER, load_profile(profile))
