"""What a plan will cost, in the terminal: a table of its shapes, and the totals in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from harness.core.durations import duration
from harness.core.forecast import GIB, Duration, Forecast, ShapeForecast, Totals
from results.leaderboard.format import ABSENT, number

_HOUR_S = 3600.0
_UNITS = (("TiB", 1 << 40), ("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10))
_SHOWN = 40  # shapes of a table; a grid may have thousands


def show_forecast(found: Forecast, console: Console, names: Mapping[str, str] | None = None) -> None:
    """Print the shapes, what will not fit, and the totals; ``names`` are those of settings, as in ``plan_table``."""
    console.print(_table(found, names or {}))
    if (more := len(found.shapes) - _SHOWN) > 0:
        console.print(f"… and {more} more")
    for line in (*_problems(found), *_totals(found)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(found: Forecast, names: Mapping[str, str]) -> Table:
    with_setting = any(shape.setting for shape in found.shapes)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    sizes = [shape.memory.device_bytes for shape in found.shapes if shape.memory]
    unit, one = next(((unit, one) for unit, one in _UNITS if max(sizes, default=0) >= one), _UNITS[-1])
    table.title = f"predicted: {unit} of memory in a worker, ms of a step, and time of a trial"
    for heading in ("method", "#" if names else "setting") if with_setting else ("method",):
        table.add_column(heading)
    for heading in ("weights", "gradients", "optimizer", "activations", "peak", "step", "trial"):
        table.add_column(heading, justify="right", no_wrap=True)
    for shape in found.shapes[:_SHOWN]:
        setting = [names.get(shape.setting, shape.setting)] if with_setting else []
        table.add_row(shape.name, *setting, *_cells(shape, one))
    return table


def _cells(shape: ShapeForecast, unit: int) -> list[str]:
    memory = shape.memory
    if memory is None:
        return [ABSENT] * 7
    kinds = (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.activations_bytes)
    sizes = [number(size / unit) for size in (*kinds, memory.device_bytes)]
    sizes[-1] += " !" if shape.fits is False else ""
    step = ABSENT if shape.step_s is None else number(1000 * shape.step_s.middle_s)
    return [*sizes, step, ABSENT if shape.trial is None else _about(shape.trial.middle_s)]


def _about(seconds: float) -> str:
    """``12.3 s``, ``4 min``: nobody knows the seconds, and the names of methods need the place."""
    return f"{round(seconds / 60)} min" if 60 <= round(seconds) < 3570 else duration(seconds)


def amount(size: float) -> str:
    """``2.03 MiB``."""
    for unit, one in _UNITS:
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} B"


def _problems(found: Forecast) -> Iterator[str]:
    holds = found.device_memory_bytes
    for shape in found.shapes:
        name = ": ".join(filter(None, (shape.setting, shape.name)))
        if shape.fits is False and shape.memory and holds:
            yield f"does not fit: {name}: needs {amount(shape.memory.device_bytes)}, and there are {amount(holds)}"
            yield from (f"  fits with {remedy}" for remedy in shape.remedies)
            if not shape.remedies:
                yield "  no single change of batch size, ZeRO stage, workers, offload or precision makes it fit"
    reasons: dict[str, int] = {}
    for shape in found.shapes:
        if shape.reason:
            reasons[shape.reason] = reasons.get(shape.reason, 0) + 1
    yield from (f"{count} of {len(found.shapes)} methods: {reason}" for reason, count in reasons.items())
    if any(shape.of_sample for shape in found.shapes):
        yield "lengths are those of the task's own sample: its data is not on this machine (`harness prepare`)"


def _totals(found: Forecast) -> Iterator[str]:
    holds = f", {amount(found.device_memory_bytes)} for each trial" if found.device_memory_bytes else ""
    yield f"device: {found.device}{holds}"
    totals = found.totals
    yield _time_line(totals)
    if totals.slot:
        kind = "GPU-hours" if found.on_gpu else "slot-hours (on a CPU: hours of a trial's place)"
        yield f"{kind}: {_between(totals.slot)}"
    if totals.money:
        low, middle, high = totals.money
        yield f"price: {middle:.2f} {totals.currency} ({low:.2f} to {high:.2f})"
    if totals.disk_bytes:
        yield f"disk: {amount(totals.disk_bytes)}, with the checkpoints of running trials"
    if totals.features_bytes:
        yield f"features: {amount(totals.features_bytes)}, once for all trials, in {totals.features_place}"
    sources = {shape.trial.source for shape in found.shapes if shape.trial}
    words = {
        "probe": "measured steps (--probe)",
        "records": "finished trials of this run",
        "arithmetic": f"{found.rate} (--probe measures)",
    }
    if sources:
        yield f"times: from {', '.join(words[source] for source in sorted(sources))}"
    yield from (f"note: {note}" for note in found.notes)


def _time_line(totals: Totals) -> str:
    if not totals.trials:
        return "no trials are left to run"
    left = f"{totals.trials} trial{'s' * (totals.trials != 1)} to run"
    if totals.wall is None:
        return f"{left}; how long together is not known"
    ends = f"{duration(totals.wall.low_s)} to {duration(totals.wall.high_s)}"
    return f"{left}, {totals.at_once} at a time: about {duration(totals.wall.middle_s)} ({ends})"


def _between(time: Duration) -> str:
    low, middle, high = (number(seconds / _HOUR_S) for seconds in (time.low_s, time.middle_s, time.high_s))
    return f"{middle} ({low} to {high})"
