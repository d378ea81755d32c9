"""What the trials of each row were predicted to cost, and what they cost: ``forecast.json`` against the records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.core.durations import duration
from harness.core.forecast import ShapeForecast, read_forecast
from harness.core.record import Memory, Run, TrialRecord
from results.leaderboard.format import ABSENT, number, ratio

_MIB = 1 << 20
_SOURCES = {"probe": "probed", "records": "earlier trials", "arithmetic": "arithmetic"}


@dataclass(frozen=True)
class PredictedLine:
    """One row, as text. Ratios are actual to predicted."""

    name: str
    setting: str
    memory: str
    actual_memory: str
    memory_ratio: str
    time: str
    actual_time: str
    time_ratio: str
    source: str


@dataclass(frozen=True)
class Predicted:
    """The rows with a forecast and a finished trial, in the order of the forecast, and forecasts that are broken."""

    lines: tuple[PredictedLine, ...]
    problems: tuple[str, ...]


def build_predicted(run: Run) -> Predicted:
    """Compare the forecasts in the run's folders with its records."""
    lines: list[PredictedLine] = []
    problems: list[str] = []
    for folder in dict.fromkeys(run.folders.values()) or (run.folder,):
        try:
            found = read_forecast(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        for shape in found.shapes if found else ():
            records = [run.records[i] for i in shape.trial_ids if i in run.records]
            finished = [record for record in records if record.status == "finished"]
            if finished:
                lines.append(_line(shape, finished))
    return Predicted(tuple(lines), tuple(problems))


def _line(shape: ShapeForecast, records: Sequence[TrialRecord]) -> PredictedLine:
    said = shape.memory.recorded_bytes if shape.memory else None
    sums = [recorded_bytes(record.memory) for record in records if record.memory]
    took = max(sums) if sums else None
    time, wall_s = shape.trial, statistics.fmean(record.wall_time_s for record in records)
    return PredictedLine(
        name=shape.name,
        setting=shape.setting,
        memory=_mib(said),
        actual_memory=_mib(took),
        memory_ratio=ratio(took / said) if took and said else ABSENT,
        time=f"{duration(time.middle_s)} ({duration(time.low_s)} to {duration(time.high_s)})" if time else ABSENT,
        actual_time=duration(wall_s),
        time_ratio=ratio(wall_s / time.middle_s) if time and time.middle_s else ABSENT,
        source=_SOURCES[time.source] if time else ABSENT,
    )


def recorded_bytes(memory: Memory) -> int:
    """The sum of the kinds that a forecast has too."""
    return memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes + memory.activations_bytes


def _mib(size: int | None) -> str:
    return ABSENT if size is None else number(size / _MIB)
