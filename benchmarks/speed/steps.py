"""Times of a training step: methods beside the frozen model, groups beside none, the engine beside a bare loop."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed import jobs
from benchmarks.speed.measure import Row, Say, ratios, row

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec
    from harness.model.batch import Batch
    from harness.trial.trial import Trial

MINUTES = 4.0
REPEATS = 40  # steps of every case, in turn, in a round
CONTEXTS = (1, 2, 4, 8)
RANK = 4
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "none", "learning_rate": 1e-3},
    {"method": "lora", "rank": RANK, "grouping": ["agnostic", "specific"], "learning_rate": 1e-3},
    {"method": "bitfit", "grouping": ["agnostic", "specific"], "learning_rate": 1e-3},
    {"method": "ia3", "grouping": ["agnostic", "specific"], "learning_rate": 1e-3},
    {"method": "full", "learning_rate": 1e-4},
)
TARGETS = {"LoRA ÷ frozen": 1.15, "specific ÷ agnostic": 1.03, "engine ÷ bare loop": 1.03}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--repeats", type=int, default=REPEATS, help="steps of every case in a round")


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Take steps of all methods in turn in this process, each through the engine and in a bare loop.

    Args:
        options: of ``add_options``, and ``rounds``.
        folder: for files.
        say: tells progress.
    """
    repeats = options.rounds * options.repeats
    steps = _of_methods(step_specs(folder), folder, repeats)
    say("steps of the quickstart's methods", 0.5)
    contexts = _of_contexts(repeats)
    say("steps with 1, 2, 4 and 8 contexts", 1.0)
    return {"steps_s": steps, "contexts_s": contexts}


def step_specs(folder: Path) -> Sequence[TrialSpec]:
    """Trials of all methods in the quickstart's setting."""
    content = jobs.grid(6, {}, {"examples": 256, "epochs": 1})
    content["adapters"] = list(METHODS)
    content["eval"] |= {"validation_examples": 2, "test_examples": 2}
    return jobs.planned(content, folder)


def in_turn(cases: Mapping[str, Callable[[int], None]], repeats: int, warm_up: int = 3) -> dict[str, list[float]]:
    """CPU seconds of every case in every round; the order turns around from round to round.

    Args:
        cases: name → a step; it gets the number of the round.
        repeats: rounds that are counted.
        warm_up: rounds before these.
    """
    for _ in range(warm_up):
        for step in cases.values():
            step(0)
    found: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            for name in cases if number % 2 == 0 else reversed(cases):
                began = time.process_time()
                cases[name](number)
                found[name].append(time.process_time() - began)
    finally:
        gc.enable()
    return found


def _of_methods(specs: Sequence[TrialSpec], folder: Path, repeats: int) -> dict[str, list[float]]:
    cases: dict[str, Callable[[int], None]] = {}
    data = None
    for spec in specs:
        name = f"{spec.adapter.label} {spec.adapter.grouping_name}".strip()
        for how, made in (("engine", engine_step), ("bare", _bare_step)):
            trial = built_trial(spec, folder / "trial", data)
            data = trial.stages.built.data
            cases[f"{name}, {how}"] = made(trial)
    return in_turn(cases, repeats)


def built_trial(spec: TrialSpec, folder: Path, data: Any = None, **resources: Any) -> Trial:
    """A trial with its model, ready to train; ``resources`` as in an experiment."""
    from harness.experiment.sections import Resources
    from harness.tracking.tracker import NoTracker
    from harness.trial.trial import Trial

    trial = Trial(spec, folder, Resources(**resources), NoTracker(), lambda _: None)
    trial.build(data)
    trial.stages.built.model.train()
    return trial


def batches_of(trial: Trial) -> list[Batch]:
    """The first epoch."""
    draws, size = trial.stages.built.order.epoch(1), trial.spec.optimizer.per_device_train_batch_size
    return [trial.batch(draws[start : start + size]) for start in range(0, len(draws), size)]


def engine_step(trial: Trial) -> Callable[[int], None]:
    """A step as in a trial."""
    batches = batches_of(trial)
    trial.stages.start()
    engine = trial.stages.engine
    return lambda number: void(engine.train_step(batches[number % len(batches)]))


def _bare_step(trial: Trial) -> Callable[[int], None]:
    """The same model in a loop of torch alone: forward, backward, clipping, AdamW, schedule."""
    import torch
    from transformers import get_scheduler

    batches, model, options = batches_of(trial), trial.stages.built.model, trial.spec.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    assert options.learning_rate is not None
    betas = (options.adam_beta1, options.adam_beta2)
    optimizer = torch.optim.AdamW(trained, options.learning_rate, betas, options.adam_epsilon, weight_decay=0.0)
    steps = trial.stages.total_steps
    schedule = get_scheduler(options.lr_scheduler_type, optimizer, round(options.warmup_ratio * steps), steps)

    def step(number: int) -> None:
        nll_B, tokens_B = model(batches[number % len(batches)])
        loss = nll_B.sum() / tokens_B.sum()
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def void(_: Any) -> None:
    """Drop a value."""


def _of_contexts(repeats: int) -> dict[str, list[float]]:
    """LoRA on a frozen model of the built-in one's shapes, its positions divided evenly among the contexts."""
    import torch

    from benchmarks.adapters_cases import FROZEN, Bench, Key, Size

    size = Size(width=96, feed_forward=256, heads=4, layers=4, rows=16, length=48)
    bench = Bench(size, torch.device("cpu"))
    keys = {"frozen": FROZEN, **{str(number): Key("ours", RANK, number) for number in CONTEXTS}}
    cases = {name: bench.case(key) for name, key in keys.items()}

    def step(name: str) -> Callable[[int], None]:
        def take(_: int) -> None:
            bench.step(cases[name])
            bench.clear(cases[name])

        return take

    return in_turn({name: step(name) for name in cases}, repeats)


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table."""
    steps, contexts = found["steps_s"], found["contexts_s"]
    lora = {name: f"LoRA r={RANK} {name}" for name in ("agnostic", "specific")}
    lines = [
        _line(f"a step of LoRA r={RANK}, {name}; of the frozen model and its projector", steps, f"{label}, engine",
              "none, engine", "LoRA ÷ frozen")
        for name, label in lora.items()
    ]  # fmt: skip
    lines.append(
        _line("LoRA, 2 contexts in a batch; agnostic", steps, f"{lora['specific']}, engine",
              f"{lora['agnostic']}, engine", "specific ÷ agnostic")
    )  # fmt: skip
    lines += [
        _line(f"LoRA, {number} contexts in every row; one", contexts, str(number), "1", "specific ÷ agnostic")
        for number in CONTEXTS[1:]
    ]
    lines += [
        _line(f"the engine, {label}; a bare loop", steps, f"{label}, engine", f"{label}, bare", "engine ÷ bare loop")
        for label in ("none", lora["specific"], "full fine-tuning")
    ]
    return lines


def _line(what: str, times: Mapping[str, Sequence[float]], name: str, other: str, target: str) -> Row:
    ours, theirs = (sorted(times[key])[len(times[key]) // 2] for key in (name, other))
    ratio = ratios(times[other], times[name])
    return row(what, f"{1e3 * ours:.1f} ms", f"{1e3 * theirs:.1f} ms", ratio, at_most=TARGETS[target])


def notes(found: Mapping[str, Any]) -> str:
    """Markdown: all steps."""
    frozen = found["steps_s"]["none, engine"]
    cells = [f"{name} {ratios(frozen, times):.2f}" for name, times in found["steps_s"].items()]
    return (
        f"CPU time of one thread, {len(frozen)} steps of each in turn. All of them, ÷ none through the engine: "
        f"{'; '.join(cells)}."
    )
