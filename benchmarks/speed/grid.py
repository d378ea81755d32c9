"""24 trials by ``harness run`` and by one process per trial with ``Trainer`` and ``peft``, two at a time."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.speed import jobs
from benchmarks.speed.measure import (
    CORES,
    ROOT,
    Row,
    Say,
    Tree,
    by_key,
    environment,
    failure,
    ratios,
    row,
    run,
    seconds,
)

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec

MINUTES = 20.0  # a round of 24 trials on two cores
ARMS: tuple[jobs.Arm, ...] = ("fixed", "trimmed")
TARGETS = {"fixed": 6.0, "trimmed": 2.5}
WHAT = {
    "fixed": "encoder in the loop, rows padded to `max_target_length`",
    "trimmed": "features encoded once for all trials, rows padded to the longest of the batch",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--trials", type=int, choices=(6, 12, 24), default=24, help="a part of the grid, for all arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what to compare with")
    parser.add_argument("--resources", default="{}", help="YAML: of our experiment, such as '{pack: off}'")
    parser.add_argument("--budget", default="{}", help="YAML: other values of the budget, such as '{examples: 64}'")


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Run the grid in turn in all arms.

    Args:
        options: of ``add_options``, and ``rounds``.
        folder: for files.
        say: tells progress.
    """
    content = jobs.grid(options.trials, yaml.safe_load(options.resources), yaml.safe_load(options.budget))
    specs = jobs.planned(content, folder)
    made, found = jobs.Jobs(), []
    arms = ["ours", *options.arms]
    for number in range(options.rounds):
        one: dict[str, Any] = {}
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            here = folder / f"{arm}-{number}"
            here.mkdir()
            say(f"grid, round {number + 1} of {options.rounds}, {arm}: {len(specs)} trials")
            one[arm] = _ours(folder / "speed.yaml", here) if arm == "ours" else _theirs(arm, specs, made, here, say)
            say(f"grid, {arm}: {one[arm]['wall_s']:.0f} s")
        found.append(one)
    return {"trials": jobs.names(specs), "resources": yaml.safe_load(options.resources), "rounds": found}


def _ours(experiment: Path, folder: Path) -> dict[str, Any]:
    """``harness run`` as its users call it, with records, MLflow and report; without the profile of the methods."""
    command = [
        str(Path(sys.executable).with_name("harness")),
        "run",
        str(experiment),
        "-o",
        str(folder),
        "--no-measure",
    ]
    took = run(command, folder / "log.txt")
    scores, phases = {}, []
    for path in folder.glob("speed/trials/*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["status"] != "finished":
            raise SystemExit(f"{path}: {record['status']}: {record.get('reason')}")
        adapter = record["spec"]["adapter"]
        name = f"{adapter['label']} {adapter['grouping_name']}, seed {record['seed']}"
        scores[name] = record["metrics"]["test"]
        phases.append(record["phases_s"])
    return {"wall_s": took.wall_s, "cpu_s": took.cpu_s, "scores": scores, "phases_s": _means(phases)}


@dataclass
class _Running:
    """A process of the comparator."""

    process: subprocess.Popen[bytes]
    job: Path
    name: str


def _theirs(arm: jobs.Arm, specs: Sequence[TrialSpec], made: jobs.Jobs, folder: Path, say: Say) -> dict[str, Any]:
    """One process per trial, two at a time, with one thread each."""
    features = folder / "features.pt" if arm == "trimmed" else None
    todo = []
    for name, spec in zip(jobs.names(specs), specs, strict=True):
        path = folder / f"{spec.trial_id}.json"
        jobs.write_job(made.of(spec, arm, features), path)
        todo.append((name, path))
    module = [sys.executable, "-m", "benchmarks.comparators.trainer_peft"]
    began, scores, phases = time.monotonic(), {}, []
    with Tree() as tree:
        if features is not None:
            # Pictures of every seed: the jobs of one seed after the other add what the file lacks.
            for path in {spec.seed: path for spec, (_, path) in zip(specs, todo, strict=True)}.values():
                run([*module, str(path), "--features", str(features)], folder / "features.txt")
        waiting, running = list(todo), list[_Running]()
        while waiting or running:
            while waiting and len(running) < CORES:
                name, path = waiting.pop(0)
                running.append(_Running(_start([*module, str(path)], path.with_suffix(".txt")), path, name))
            time.sleep(0.05)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                if one.process.returncode:
                    raise SystemExit(
                        failure([*module, str(one.job)], one.process.returncode, one.job.with_suffix(".txt"))
                    )
                result = json.loads(one.job.with_suffix(".result.json").read_text(encoding="utf-8"))
                scores[one.name] = result["scores"]
                phases.append(result["seconds"])
                if len(scores) % 6 == 0:
                    say(f"grid, {arm}: {len(scores)} of {len(specs)}")
    wall_s = time.monotonic() - began
    return {"wall_s": wall_s, "cpu_s": tree.cpu_s, "scores": scores, "phases_s": _means(phases)}


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)


def _means(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for one in phases for key in one)
    return {key: round(statistics.mean(one.get(key, 0.0) for one in phases), 3) for key in keys}


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table."""
    rounds, count = found["rounds"], len(found["trials"])
    ours = by_key(rounds, "ours", "wall_s")
    return [
        row(
            f"{count} trials of the quickstart's setting; `Trainer` + `peft`: {WHAT[arm]}",
            seconds(ours),
            seconds(by_key(rounds, arm, "wall_s")),
            ratios(ours, by_key(rounds, arm, "wall_s")),
            at_least=TARGETS[arm],
        )
        for arm in ARMS
        if arm in rounds[0]
    ]


def notes(found: Mapping[str, Any]) -> str:
    """Markdown: phases, and the scores of all arms side by side."""
    first = found["rounds"][0]
    arms = [arm for arm in ("ours", *ARMS) if arm in first]
    lines = [
        f"Two trials at a time with one thread each, on the same two cores, in all arms. {jobs.WHAT_SPECIFIC_IS}. Test "
        "perplexity, mean over the seeds:",
        "",
        f"| | {' | '.join(arms)} |",
        f"|---{'|---:' * len(arms)}|",
    ]
    labels = dict.fromkeys(name.partition(",")[0] for name in found["trials"])
    for label in labels:
        values = (_mean_of(first[arm]["scores"], label) for arm in arms)
        lines.append(f"| {label} | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines += ["", f"Seconds of a trial, mean: {'; '.join(f'{arm}: {_phases(first[arm])}' for arm in arms)}.", ""]
    for arm in arms[1:]:
        lines.append(_noise(first["ours"]["scores"], first[arm]["scores"], arm))
    return "\n".join(lines)


def _mean_of(scores: Mapping[str, Mapping[str, float]], label: str) -> float:
    return statistics.mean(one["perplexity"] for name, one in scores.items() if name.partition(",")[0] == label)


def _phases(arm: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.1f}" for key, value in arm["phases_s"].items())


def _noise(ours: Mapping[str, Any], theirs: Mapping[str, Any], arm: str) -> str:
    """How far the two are apart, beside how far two seeds of ours are apart."""
    same = [name for name in ours if "agnostic" in name]
    logs = {name: math.log(one["perplexity"]) for name, one in ours.items()}
    apart = [abs(logs[name] - math.log(theirs[name]["perplexity"])) for name in same]
    seeds: dict[str, list[float]] = {}
    for name in same:
        seeds.setdefault(name.partition(",")[0], []).append(logs[name])
    spread = [max(values) - min(values) for values in seeds.values() if len(values) > 1]
    between = f"; two seeds of ours differ by {100 * statistics.median(spread):.1f} %" if spread else ""
    return (
        f"Of agnostic adapters, which are the same models, the test perplexities of ours and {arm} differ by "
        f"{100 * statistics.median(apart):.1f} % (median of {len(apart)} pairs; initial weights and dropout differ)"
        f"{between}."
    )
