"""Schema of ``forecast.json`` in a run folder: what its trials were predicted to cost, before they ran.

``harness plan`` shows a forecast, ``harness run`` writes it; results read it without torch, and compare it with what
was measured. What is not known is absent, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import FiniteFloat

from harness.core.files import write_atomically
from harness.core.schema import Schema, read_strictly

FILE_NAME = "forecast.json"
GIB = 1 << 30
Source = Literal["probe", "records", "arithmetic"]


class MemoryForecast(Schema):
    """Memory that one worker of a trial needs, by kind, as a record has it (``harness.core.record.Memory``).

    Attributes:
        activations_bytes: saved for backward, the most over the first batches.
        working_bytes: activations with what is alive beside them, at the longest row: the most at any moment.
        offloaded_bytes: the part of weights and optimizer that is in main memory.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    working_bytes: int
    offloaded_bytes: int = 0

    @property
    def recorded_bytes(self) -> int:
        """The sum of the kinds that a record has."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    @property
    def device_bytes(self) -> int:
        """The most that the device must hold."""
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes - self.offloaded_bytes
        return held + max(self.working_bytes, self.activations_bytes)


class Duration(Schema):
    """Seconds, with the interval that they are expected in, and from what they were predicted.

    ``arithmetic``: operations by the rate of a device, which is rough. ``probe``: measured steps of this shape.
    ``records``: finished trials of this shape, or of others of the same run, on the same device.
    """

    low_s: FiniteFloat
    middle_s: FiniteFloat
    high_s: FiniteFloat
    source: Source

    def times(self, factor: float) -> Duration:
        """So many times as long."""
        scaled = {name: getattr(self, name) * factor for name in ("low_s", "middle_s", "high_s")}
        return self.model_copy(update=scaled)


class ShapeForecast(Schema):
    """What one trial of a shape costs: a method with its options and grouping, on one backbone, budget and batch.

    Attributes:
        key: SHA-256 of all that it depends on, without the device.
        trial_ids: of all seeds and learning rates.
        trainable: parameters; None: the backbone's configuration could not be loaded.
        step_s: seconds of an optimizer step.
        disk_bytes: that a finished trial keeps.
        checkpoint_bytes: while it runs, in addition.
        of_sample: whether the lengths of its rows are those of the task's own sample, because its data is not here.
        reason: why something is unknown.
        fits: whether a device holds it; None: not known.
        remedies: what would make it fit, each checked by the same arithmetic.
    """

    key: str
    name: str
    setting: str
    trial_ids: tuple[str, ...]
    trainable: int | None = None
    memory: MemoryForecast | None = None
    step_s: Duration | None = None
    trial: Duration | None = None
    disk_bytes: int | None = None
    checkpoint_bytes: int | None = None
    of_sample: bool = False
    reason: str | None = None
    fits: bool | None = None
    remedies: tuple[str, ...] = ()


class Totals(Schema):
    """What the trials that have no finished record cost together.

    Attributes:
        trials: that are left.
        at_once: of them.
        wall: from beginning to end, with so many at once.
        slot: seconds of all trials one after another, times their devices: GPU-seconds, or on a CPU seconds of a
            trial's place.
        disk_bytes: of all.
        features_bytes: of encoders' features in the cache on disk; None: not known, or there is no such cache.
        features_place: the folder of that cache, and what it may take.
        money: low, middle, high; None: the profile has no price, or the time is not known.
        currency: of the money.
    """

    trials: int
    at_once: int | None = None
    wall: Duration | None = None
    slot: Duration | None = None
    disk_bytes: int | None = None
    features_bytes: int | None = None
    features_place: str = ""
    money: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    currency: str = ""


class Forecast(Schema):
    """``forecast.json``.

    Attributes:
        device: whose rate and memory were used.
        device_memory_bytes: None: not known.
        on_gpu: whether trials run on GPUs.
        rate: from what times were predicted, in words.
        shapes: in the order of the plan.
        totals: of the trials that are left.
        notes: what a reader must know of the numbers.
    """

    schema_version: Literal[1] = 1
    device: str
    device_memory_bytes: int | None = None
    on_gpu: bool = False
    rate: str = ""
    shapes: tuple[ShapeForecast, ...]
    totals: Totals
    notes: tuple[str, ...] = ()


def write_forecast(run: Path, forecast: Forecast) -> None:
    """Write it into a run folder, atomically."""
    write_atomically(run / FILE_NAME, forecast.model_dump_json(indent=1) + "\n")


def read_forecast(run: Path) -> Forecast | None:
    """Read that of a run folder; None if it has none.

    Raises:
        ValueError: the file is not a forecast of this schema; the message names it.
    """
    try:
        return read_strictly(Forecast, run / FILE_NAME, "the forecast of a run")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{run / FILE_NAME}: not the forecast of a run: {error}") from error
