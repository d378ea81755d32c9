"""Peak memory of a LoRA trial beside ``Trainer`` and ``peft``, and of a pack of 8 beside 8 processes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed import jobs
from benchmarks.speed.measure import ROOT, Row, Say, by_key, environment, failure, mib, ratios, row, skipped

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec

MINUTES = 4.0
PACK = 8
ALONE_TARGET, PACK_TARGET = 0.7, 0.25
PACK_WHAT = f"a pack of {PACK} LoRA trials; {PACK} processes at the same time"
_MODULE = "benchmarks.speed.memory_process"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--examples", type=int, default=64, help="for training and for each evaluation")


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Run whole trials, each in a process of its own, with training, validation and test.

    Args:
        options: of ``add_options``, and ``rounds``.
        folder: for files.
        say: tells progress.
    """
    settings = {"built-in models": _content(options.examples)}
    if (models := os.environ.get("REAL_MODELS")) and (root := os.environ.get("FLICKR_ROOT")):
        settings["SmolLM2-135M"] = _real(Path(models), Path(root))
    found: dict[str, Any] = {"alone": {}}
    for name, content in settings.items():
        rounds = []
        for number in range(options.rounds):
            here = folder / f"{len(found['alone'])}-{number}"
            here.mkdir()
            rounds.append(_alone(content, here))
            say(f"memory of a trial, {name}")
        found["alone"][name] = rounds
    if importlib.util.find_spec("harness.trial.pack"):
        here = folder / "pack"
        here.mkdir()
        found["pack"] = [_packed(_content(options.examples), here)]
        say("memory of a pack")
    return found


def _content(examples: int) -> dict[str, Any]:
    content = jobs.grid(6, {}, {"examples": examples, "epochs": 1})
    content["adapters"] = [{"method": "lora", "rank": 4, "grouping": "agnostic", "learning_rate": 1e-3}]
    content["eval"] |= {"validation_examples": examples, "test_examples": examples}
    return content


def _real(models: Path, root: Path) -> dict[str, Any]:
    content = _content(8)
    content["task"] = {"name": "coco_captions", "root": str(root)}
    content["backbone"]["language_model"] = str(models / "smollm2" / "fp32")
    content["optimizer"] |= {"per_device_train_batch_size": 8}
    content["eval"] |= {"validation_examples": 4, "test_examples": 4, "per_device_eval_batch_size": 8,
                        "max_new_tokens": 8}  # fmt: skip
    return content


def _alone(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One trial in each arm, one after the other."""
    (spec,), (small,) = jobs.planned(content, folder), jobs.planned(_smaller(content), folder)
    made, warm = jobs.Jobs(), jobs.Jobs()
    found = {"ours": _run_all([_ours([small], [spec], folder / "ours")])[0]}
    for arm in ("fixed", "trimmed"):
        work, less = (replace(one.of(which, arm, None), metrics=[]) for one, which in ((made, spec), (warm, small)))
        found[arm] = _run_all([_write("peft", asdict(less), asdict(work), folder / arm)])[0]
    return found


def _packed(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A pack, and its trials in processes of their own."""
    rates = [1e-3 * (1 + number) for number in range(PACK)]
    content = {**content, "adapters": [content["adapters"][0] | {"learning_rate": rates}]}
    specs, small = jobs.planned(content, folder), jobs.planned(_smaller(content), folder)
    (pack,) = _run_all([_ours(small, specs, folder / "pack")])
    alone = _run_all([_ours([small[n]], [specs[n]], folder / f"alone-{n}") for n in range(PACK)])
    return {"pack": pack, "alone": {key: sum(one[key] for one in alone) for key in alone[0]}}


def _smaller(content: Mapping[str, Any]) -> dict[str, Any]:
    """For warming up."""
    size = content["optimizer"]["per_device_train_batch_size"]
    return {**content, "budget": content["budget"] | {"examples": size},
            "eval": content["eval"] | {"validation_examples": 2, "test_examples": 2}}  # fmt: skip


def _ours(small: Sequence[TrialSpec], specs: Sequence[TrialSpec], stem: Path) -> list[str]:
    return _write("ours", *([_without_metrics(spec) for spec in some] for some in (small, specs)), stem)


def _without_metrics(spec: TrialSpec) -> dict[str, Any]:
    """The spec for JSON. Texts are generated, but not scored: that is Java's memory, in a process of its own."""
    content = spec.model_dump(mode="json")
    content["task"]["metrics"] = {"": {}}
    return content


def _write(arm: str, warm_up: Any, work: Any, stem: Path) -> list[str]:
    """The command of a process; its files begin with ``stem``."""
    paths = [stem.with_name(f"{stem.name}-{name}.json") for name in ("warm", "work", "out")]
    for path, content in zip(paths, (warm_up, work), strict=False):
        path.write_text(json.dumps(content), encoding="utf-8")
    return [sys.executable, "-m", _MODULE, arm, *map(str, paths)]


def _run_all(commands: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Run processes at the same time; what each of them measured."""
    running = []
    for command in commands:
        log = Path(command[-1]).with_suffix(".txt")
        with log.open("wb") as out:
            started = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        running.append((command, started, log))
    for command, process, log in running:
        if code := process.wait():
            raise SystemExit(failure(command, code, log))
    return [json.loads(Path(command[-1]).read_text(encoding="utf-8")) for command in commands]


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table."""
    lines = []
    for name, rounds in found["alone"].items():
        for arm in ("fixed", "trimmed"):
            ours, theirs = by_key(rounds, "ours", "growth"), by_key(rounds, arm, "growth")
            what = f"peak memory of a LoRA r=4 trial, {name}; `Trainer` + `peft`, equal batch, {arm} rows"
            lines.append(row(what, mib(ours[0]), mib(theirs[0]), ratios(theirs, ours), at_most=ALONE_TARGET))
    if "pack" not in found:
        return [*lines, skipped(PACK_WHAT, "not measured: this version has no packs", f"at most {PACK_TARGET:g}×")]
    for key, what in (("pss", "whole processes"), ("growth", "without what libraries need")):
        pack, alone = by_key(found["pack"], "pack", key), by_key(found["pack"], "alone", key)
        ratio = ratios(alone, pack)
        lines.append(row(f"{PACK_WHAT}; {what}", mib(pack[0]), mib(alone[0]), ratio, at_most=PACK_TARGET))
    return lines


def notes(found: Mapping[str, Any]) -> str:
    """Markdown."""
    first = {name: rounds[0] for name, rounds in found["alone"].items()}
    whole = "; ".join(
        f"{name}: " + ", ".join(f"{arm} {mib(one['rss'])}" for arm, one in arms.items()) for name, arms in first.items()
    )
    return (
        "Whole trials: training, validation, generation, likelihoods. Growth of the resident memory of a process from "
        "after a small trial of the same kind, which loads the libraries, to the peak; of a pack also the "
        f"proportional set size (PSS) of whole processes, summed. Peaks of whole processes: {whole}. Texts are "
        "not scored, because that is the memory of Java, in a process of its own."
    )
