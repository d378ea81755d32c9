"""The quickstart with five seeds: 40 trials, and the profile of its eight methods."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.speed.measure import CORES, ROOT, Row, Say, by_key, run, seconds

MINUTES = 8.0
SEEDS = 5
TARGET_S = 240.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--seeds", type=int, default=SEEDS)


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Run the quickstart's experiment as ``make quickstart`` does, with more seeds.

    Args:
        options: of ``add_options``, and ``rounds``.
        folder: for files.
        say: tells progress.
    """
    content = yaml.safe_load((ROOT / "experiments" / "quickstart.yaml").read_text(encoding="utf-8"))
    content["seeds"] = list(range(options.seeds))
    content["resources"] = {"max_concurrent_trials": CORES}
    experiment = folder / "quickstart.yaml"
    experiment.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    found = []
    for number in range(options.rounds):
        here = folder / str(number)
        here.mkdir()
        command = [str(Path(sys.executable).with_name("harness")), "run", str(experiment), "-o", str(here)]
        took = run(command, here / "log.txt")
        found.append({"wall_s": took.wall_s, "cpu_s": took.cpu_s})
        say(f"quickstart, round {number + 1} of {options.rounds}: {took.wall_s:.0f} s", (number + 1) / options.rounds)
    return {"trials": 8 * options.seeds, "rounds": found}


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table."""
    times = by_key(found["rounds"], "wall_s")
    worst = max(times)
    return [
        Row(
            f"the quickstart with {found['trials']} trials and the profile of its methods, after installation",
            seconds(times), "–", "–", f"at most {TARGET_S:.0f} s", worst <= TARGET_S,
        )
    ]  # fmt: skip


def notes(found: Mapping[str, Any]) -> str:
    """Markdown."""
    cpu = by_key(found["rounds"], "cpu_s")
    return f"From the command to the written report, with Ray, MLflow and metrics; CPU time {seconds(cpu)}."
