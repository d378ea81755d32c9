"""Perplexity over five references of every picture: with shared prefixes and with a row per reference."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed import jobs, models
from benchmarks.speed.measure import Row, Say, by_key, ratios, row, seconds

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec

MINUTES = 1.0
REPEATS = 3  # in a round
TARGET = 3.0
ENCODERS = {"the built-in encoder, 16 tokens": None, "64 picture tokens": 96}  # width of a random one


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--examples", type=int, default=64, help="pictures with five references each")


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Score the validation pictures, in turn with and without shared prefixes, in this process.

    Args:
        options: of ``add_options``, and ``rounds``.
        folder: for files.
        say: tells progress.
    """
    found: dict[str, Any] = {}
    for number, (name, width) in enumerate(ENCODERS.items()):
        spec = _spec(options.examples, width, folder / str(number))
        found[name] = _compare(spec, options.rounds * REPEATS)
        say(f"scoring with {name}", (number + 1) / len(ENCODERS))
    return {"examples": options.examples, "encoders": found}


def _spec(examples: int, width: int | None, folder: Path) -> TrialSpec:
    content = jobs.grid(6, {}, {"examples": 16, "epochs": 1})
    content["adapters"] = [{"method": "lora", "rank": 4, "grouping": "specific", "learning_rate": 1e-2}]
    content["eval"] |= {"validation_examples": examples, "test_examples": 2}
    folder.mkdir()
    if width is not None:
        models.vision_64(folder / "vision", width)
        content["backbone"]["encoders"] = {"image": str(folder / "vision")}
    (spec,) = jobs.planned(content, folder)
    return spec


def _compare(spec: TrialSpec, repeats: int) -> dict[str, Any]:
    import torch

    from harness.experiment.sections import Resources
    from harness.model.batches import BatchMaker
    from harness.model.build import build
    from harness.trial.evaluate import Evaluator

    torch.set_num_threads(Resources().cpus_per_worker)
    built = build(spec, torch.device("cpu"))
    examples = built.splits.validation
    built.batches.features.precompute([], examples, lambda: None)
    built.model.eval()

    def evaluator(batches: BatchMaker, shared: bool) -> Evaluator:
        return Evaluator(built.model, batches, spec.eval, torch.device("cpu"), shared_prefix=shared)

    arms = {"shared": evaluator(built.batches, True), "alone": evaluator(built.batches, False)}
    rounds: list[dict[str, float]] = []
    values = {name: arm.likelihood(examples).perplexity for name, arm in arms.items()}  # also warms up
    for number in range(repeats):
        one = {}
        for name in arms if number % 2 == 0 else reversed(arms):
            began = time.process_time()
            arms[name].likelihood(examples)
            one[name] = time.process_time() - began
        rounds.append(one)
    return {"rounds": rounds, "perplexity": values}


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table."""
    lines = []
    for name, one in found["encoders"].items():
        shared, alone = (by_key(one["rounds"], arm) for arm in ("shared", "alone"))
        what = f"perplexity of {found['examples']} pictures over five references, {name}; a row per reference"
        lines.append(row(what, seconds(shared), seconds(alone), ratios(shared, alone), at_least=TARGET))
    return lines


def notes(found: Mapping[str, Any]) -> str:
    """Markdown."""
    return f"CPU time of one thread, medians; both find {_perplexities(list(found['encoders'].values()))}."


def _perplexities(found: Sequence[Mapping[str, Any]]) -> str:
    pairs = [(one["perplexity"]["shared"], one["perplexity"]["alone"]) for one in found]
    return " and ".join(f"perplexity {a:.4f} (shared) and {b:.4f}" for a, b in pairs)
