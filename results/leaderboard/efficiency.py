"""Quality against cost: Pareto fronts, cost per point of CIDEr, and one aggregate score over several tasks.

Time and memory are those of the run's profile, where all rows of a setting have been profiled together: measured alone
and in turn with the reference. Otherwise memory is the sum by kind of the model being trained (weights, gradients,
optimizer, activations), which is exact and the same on every machine; and time is that of the training phases, which
depends on what else the machine did, and is labelled as not comparable.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from harness.core.record import MetricInfo, TrialRecord
from results.leaderboard.profiled import entry_of
from results.leaderboard.rows import Row, by_seed
from results.leaderboard.sweeps import budget_of, settings_alike
from results.leaderboard.table import Leaderboard
from results.statistics.intervals import Estimate, estimate, interquartile_mean

CostName = Literal["parameters", "memory", "time", "examples"]
_NO_ADAPTER = "none"  # the method relative to which points are gained


@dataclass(frozen=True)
class Cost:
    """One kind of cost, however it was measured."""

    name: CostName
    label: str = field(compare=False)  # how it was measured too


PARAMETERS = Cost("parameters", "trainable parameters")
MEMORY = Cost("memory", "memory of the model in training")
TIME = Cost("time", "training time, as trained (not comparable)")
PROFILED_MEMORY = Cost("memory", "peak memory in training")
PROFILED_TIME = Cost("time", "training time alone on the device")
EXAMPLES = Cost("examples", "examples seen in training")


@dataclass(frozen=True)
class Point:
    """A row by its means. It is on the front if no other is at least as good in both and better in one."""

    row: Row
    name: str
    cost: float
    quality: Estimate
    on_front: bool


@dataclass(frozen=True)
class Front:
    """The rows of one setting, or of one sweep, by one cost, cheapest first."""

    setting: str
    cost: Cost
    points: tuple[Point, ...]


@dataclass(frozen=True)
class PerPoint:
    """Cost of one point (0.01) of CIDEr."""

    seconds: float | None  # of training, by the profile if there is one
    parameters: float | None  # trainable


@dataclass(frozen=True)
class RowEfficiency:
    """A row, the costs for which it is on the front, and the cost of its CIDEr."""

    row: Row
    fronts: tuple[Cost, ...]
    per_point: PerPoint | None  # None: no CIDEr above 0
    per_gain: PerPoint | None  # per point above the row without an adapter; None: no such row, or no gain


@dataclass(frozen=True)
class SettingEfficiency:
    """The costs of one setting."""

    setting: str
    rows: tuple[RowEfficiency, ...]
    fronts: tuple[Front, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AcrossTasks:
    """Scores relative to the reference over several tasks: the interquartile mean of each seed, then over seeds."""

    tasks: tuple[str, ...]
    reference: str
    rows: tuple[AcrossRow, ...]  # best first
    words: str  # how it is computed, and what its intervals cover


@dataclass(frozen=True)
class AcrossRow:
    """One method with one grouping; the reference is 1, and more is better."""

    name: str
    relative: Estimate
    tasks: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Efficiency:
    """The section of the page."""

    settings: tuple[SettingEfficiency, ...]
    examples: tuple[Front, ...]  # by examples seen, over the settings of each sweep
    cider: MetricInfo | None  # the metric whose points are counted
    across: AcrossTasks | None  # None with one task


def build_efficiency(board: Leaderboard) -> Efficiency:
    """Costs of all ranked rows that have the primary score, by setting."""
    cider = _cider(board)
    settings = (_setting(board, setting, cider) for setting in board.settings)
    return Efficiency(
        settings=tuple(one for one in settings if one.rows),
        examples=tuple(_by_examples(board)),
        cider=cider,
        across=_across_tasks(board),
    )


def _cider(board: Leaderboard) -> MetricInfo | None:
    """The primary metric if it is CIDEr, else the first metric that is."""
    metrics = (board.primary, *board.run.plan.metrics)
    return next((info for info in metrics if info.name.rpartition("/")[2] == "cider"), None)


def _setting(board: Leaderboard, setting: str, cider: MetricInfo | None) -> SettingEfficiency:
    rows = [row for row in board.of(setting) if board.primary.name in row.metrics]
    devices = sorted({record.device for row in rows for record in row.finished})
    profiled = is_profiled(board, rows)
    memory: tuple[Cost, Callable[[Row], float | None]] = (MEMORY, memory_bytes)
    seconds = train_seconds
    if profiled:
        seconds = partial(profiled_seconds, board)
        if all(profiled_memory(board, row) is not None for row in rows):
            memory = PROFILED_MEMORY, partial(profiled_memory, board)
    costs = [(PARAMETERS, trainable), memory]
    notes = []
    if profiled:
        costs.append((PROFILED_TIME, seconds))
    elif len(devices) > 1:
        notes.append(f"trained on different devices ({'; '.join(devices)}): their training times are not comparable")
    else:
        costs.append((TIME, seconds))
    fronts = []
    for cost, read in costs:
        measured = [(row, row.name, value) for row in rows if (value := read(row)) is not None]
        missing = [row.name for row in rows if read(row) is None]
        if measured:
            fronts.append(Front(setting, cost, _points(measured, board.primary)))
        if missing:
            notes.append(f"{cost.label} not measured: {', '.join(missing)}")
    bare = next((row for row in rows if row.method == _NO_ADAPTER), None)
    found = [
        RowEfficiency(
            row,
            tuple(front.cost for front in fronts if any(p.row is row and p.on_front for p in front.points)),
            _per_point(row, cider, None, seconds),
            _per_point(row, cider, bare, seconds) if bare is not None and row is not bare else None,
        )
        for row in rows
    ]
    return SettingEfficiency(setting, tuple(found), tuple(fronts), tuple(notes))


def trainable(row: Row) -> float | None:
    """Trainable parameters."""
    return row.parameters.trainable if row.parameters else None


def memory_bytes(row: Row) -> float | None:
    """Weights, gradients, optimizer and activations of the model in training, mean over the seeds."""
    memories = [record.memory for record in row.finished if record.memory is not None]
    if not memories:
        return None
    return statistics.fmean(
        one.weights_bytes + one.gradients_bytes + one.optimizer_bytes + one.activations_bytes for one in memories
    )


def train_seconds(row: Row) -> float | None:
    """Training time as it was while training, mean over the seeds: not comparable between rows."""
    return row.train_time_s.mean if row.train_time_s else None


def is_profiled(board: Leaderboard, rows: Sequence[Row]) -> bool:
    """Whether all rows were profiled in turn with one reference, on one device: their times are comparable."""
    entries = [entry_of(board.run, row) for row in rows]
    measured = [entry for entry in entries if entry is not None and entry.step_time_s is not None]
    same = {(entry.reference_trial_ids, entry.device) for entry in measured}
    return len(measured) == len(rows) and len(same) == 1


def profiled_seconds(board: Leaderboard, row: Row) -> float | None:
    """Time of all training steps of a trial, alone on the device."""
    entry = entry_of(board.run, row)
    steps = next((record.data.steps for record in row.finished if record.data is not None), None)
    if entry is None or entry.step_time_s is None or steps is None:
        return None
    return entry.step_time_s.median * steps


def profiled_memory(board: Leaderboard, row: Row) -> float | None:
    """Growth of memory from before the model was built to the peak of training, in a process of its own."""
    entry = entry_of(board.run, row)
    return entry.peak_memory_bytes.median if entry and entry.peak_memory_bytes else None


def _points(measured: Sequence[tuple[Row, str, float]], primary: MetricInfo) -> tuple[Point, ...]:
    """Sorted by cost, then by quality; a point is on the front if it is better than all before it."""
    sign = 1 if primary.higher_is_better else -1

    def goodness(row: Row) -> float:
        return sign * row.metrics[primary.name].mean

    best: tuple[float, float] | None = None  # goodness and cost of the front's last point
    found = []
    for row, name, cost in sorted(measured, key=lambda one: (one[2], -goodness(one[0]))):
        good = goodness(row)
        on_front = best is None or good > best[0] or (good, cost) == best
        best = (good, cost) if on_front else best
        found.append(Point(row, name, cost, row.metrics[primary.name], on_front))
    return tuple(found)


def _per_point(
    row: Row, cider: MetricInfo | None, bare: Row | None, time: Callable[[Row], float | None]
) -> PerPoint | None:
    """The cost of a point gained over ``bare``, on the seeds that both have; all seconds and parameters count."""
    if cider is None:
        return None
    own = by_seed(row.finished, cider.name)
    without = dict.fromkeys(own, 0.0) if bare is None else by_seed(bare.finished, cider.name)
    gains = [100 * (own[seed] - without[seed]) for seed in own if seed in without]
    gain = statistics.fmean(gains) if gains else 0.0
    if gain <= 0:
        return None
    seconds, parameters = time(row), trainable(row)
    return PerPoint(
        None if seconds is None else seconds / gain,
        None if parameters is None else parameters / gain,
    )


def _by_examples(board: Leaderboard) -> list[Front]:
    """Fronts over the settings that differ only in their budget."""
    found = []
    for rest, settings in settings_alike(board, ("budget.examples", "budget.epochs")).items():
        seen = {setting: budget_of(one, "examples") * budget_of(one, "epochs") for setting, one in settings.items()}
        if len(set(seen.values())) < 2:
            continue
        measured = [
            (row, f"{row.name}, {setting}" if setting else row.name, float(count))
            for setting, count in seen.items()
            for row in board.of(setting)
            if board.primary.name in row.metrics
        ]
        found.append(Front(rest, EXAMPLES, _points(measured, board.primary)))
    return found


Scores = dict[int, list[float]]  # by seed, of all settings of a task


def _across_tasks(board: Leaderboard) -> AcrossTasks | None:
    tasks = {setting: name for setting in board.settings if (name := _task_of(board, setting))}
    names = tuple(dict.fromkeys(tasks.values()))
    if len(names) < 2:
        return None
    relative: dict[str, dict[str, Scores]] = {}  # row → task → by seed
    covered: dict[str, list[str]] = {}  # row → settings
    for setting, task in tasks.items():
        rows = board.of(setting)
        reference = next((row for row in rows if row.is_reference and not row.differences), None)
        for row in rows if reference is not None else ():
            if reference is None or row is reference or not (ratios := _relative(row, reference, board.primary)):
                continue
            covered.setdefault(row.name, []).append(setting)
            for seed, ratio in ratios.items():
                relative.setdefault(row.name, {}).setdefault(task, {}).setdefault(seed, []).append(ratio)
    every = list(dict.fromkeys(setting for settings in covered.values() for setting in settings))
    found = [
        _across_row(name, by_task, [setting for setting in every if setting not in covered[name]])
        for name, by_task in relative.items()
        if len(by_task) > 1
    ]
    rows_ = sorted((row for row in found if row is not None), key=lambda row: -row.relative.mean)
    return AcrossTasks(names, board.reference_name, tuple(rows_), _across_words(board)) if rows_ else None


def _task_of(board: Leaderboard, setting: str) -> str | None:
    records: list[TrialRecord] = [record for row in board.of(setting) for record in row.finished]
    return next((str(one.spec["task"]["name"]) for one in records if isinstance(one.spec.get("task"), Mapping)), None)


def _relative(row: Row, reference: Row, primary: MetricInfo) -> dict[int, float]:
    """By seed the ratio to the reference, above 1 if better; seeds with a score of 0 or less have no ratio."""
    own, other = row.values(primary.name), reference.values(primary.name)
    if not primary.higher_is_better:
        own, other = other, own
    return {seed: own[seed] / other[seed] for seed in own if seed in other and min(own[seed], other[seed]) > 0}


def _across_row(name: str, by_task: dict[str, Scores], lacking: list[str]) -> AcrossRow | None:
    shared = sorted(set.intersection(*(set(scores) for scores in by_task.values())))
    middles = [interquartile_mean([statistics.fmean(scores[seed]) for scores in by_task.values()]) for seed in shared]
    found = estimate(middles)
    if found is None:
        return None
    notes = (f"without {', '.join(setting or 'the one setting' for setting in lacking)}",) if lacking else ()
    return AcrossRow(name, found, tuple(by_task), notes)


def _across_words(board: Leaderboard) -> str:
    metric = board.primary
    ratio = f"method / {board.reference_name}" if metric.higher_is_better else f"{board.reference_name} / method"
    return (
        f"Test {metric.label} relative to {board.reference_name} of the same setting and seed ({ratio}: above 1 is "
        "better), averaged over the settings of a task; for each seed the mean of the middle half of the tasks, "
        "then the mean over seeds. The intervals cover only the seeds, not the "
        "choice of test examples or tasks. A seed without a score above 0 on both sides is left out."
    )
