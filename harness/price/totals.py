"""What the trials of a plan cost together: time, device-hours and money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clusters.profiles import Price
from harness.core.forecast import Duration, ShapeForecast, Source, Totals

HOUR_S = 3600.0
_ORDER: tuple[Source, ...] = ("arithmetic", "records", "probe")  # from rough to sure


@dataclass(frozen=True)
class Places:
    """Where the trials run.

    Attributes:
        at_once: trials; None: not known.
        gpus: of a trial, 0 on a CPU; shares count as shares.
        cpus: of a trial.
        nodes: that are paid for; None: not known.
    """

    at_once: int | None
    gpus: float
    cpus: float
    nodes: int | None


def totals(
    shapes: Sequence[ShapeForecast],
    left: Mapping[str, int],
    places: Places,
    price: Price | None,
    encoding: Duration | None = None,
) -> Totals:
    """The totals of the trials that are left.

    Args:
        shapes: of the plan.
        left: key of a shape → its trials without a finished record.
        places: where they run.
        price: of the machines.
        encoding: of all input files, once for all trials, which share the work; None: it is in the trials' times.
    """
    count = sum(left.values())
    own = [shape for shape in shapes if left.get(shape.key)]
    disk = [shape.disk_bytes for shape in own]
    running = max((shape.checkpoint_bytes or 0 for shape in own), default=0) * (places.at_once or 1)
    found = Totals(
        trials=count,
        at_once=places.at_once,
        disk_bytes=sum((n or 0) * left[shape.key] for n, shape in zip(disk, own, strict=True)) + running
        if None not in disk
        else None,
    )
    times = [shape.trial for shape in own]
    if not own or None in times:
        return found
    each = [time.times(left[shape.key]) for time, shape in zip(times, own, strict=True) if time]
    whole = _sum([*each, *([encoding] if encoding else [])])
    at_once = places.at_once
    longest = max(time.middle_s for time in times if time)
    wall = whole.times(max(1 / at_once, longest / whole.middle_s)) if at_once else None
    slot = whole.times(places.gpus or 1.0)
    money = _money(whole, wall, places, price)
    return found.model_copy(
        update={"wall": wall, "slot": slot, "money": money, "currency": price.currency if price and money else ""}
    )


def _sum(times: Sequence[Duration]) -> Duration:
    low, middle, high = (sum(getattr(time, f"{end}_s") for time in times) for end in ("low", "middle", "high"))
    return Duration(low_s=low, middle_s=middle, high_s=high, source=min((t.source for t in times), key=_ORDER.index))


def _money(
    whole: Duration, wall: Duration | None, places: Places, price: Price | None
) -> tuple[float, float, float] | None:
    if price is None or (price.per == "gpu" and not places.gpus):
        return None
    if price.per == "node":
        if wall is None or places.nodes is None:
            return None
        paid, factor = wall, float(places.nodes)
    else:
        paid, factor = whole, places.gpus if price.per == "gpu" else places.cpus
    ends = (paid.low_s, paid.middle_s, paid.high_s)
    low, middle, high = (seconds / HOUR_S * factor * price.per_hour for seconds in ends)
    return low, middle, high
