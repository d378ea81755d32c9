"""Forecasts what a plan will cost: ``forecast_of`` for ``harness plan``, ``keep_forecast`` for a run.

Memory and work are arithmetic (harness/price). Times come from finished trials of the same run, from a probe of the
shape on this device, or from the operations and the rate of a device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
import torch
from rich.console import Console

from clusters.profiles import Profile
from harness.core import probed as probes
from harness.core.errors import UserError
from harness.core.forecast import (
    GIB,
    Duration,
    Forecast,
    MemoryForecast,
    ShapeForecast,
    read_forecast,
    write_forecast,
)
from harness.core.summaries import Summary, read_summaries
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.build import Splits
from harness.model.on_disk import cache_of
from harness.price.disk import FeatureSpace, checkpoint_bytes, kept_bytes
from harness.price.duration import Amounts, Rate, given_rate, measured_rate, rough, step_of, trial_of
from harness.price.footprint import Footprint, Footprints
from harness.price.memory import memory_of
from harness.price.remedies import remedies
from harness.price.shapes import PlannedRun, Shape, fingerprint, shapes_of
from harness.price.times import calibrated, encoding_from, recorded, step_from, trial_from
from harness.price.totals import Places, totals
from harness.price.trace import Traced
from harness.sweep.counts import PlannedData
from harness.sweep.placement import Amounts as NodeAmounts
from harness.sweep.placement import at_once, per_worker, this_machine
from harness.trial.measure import this_device
from tasks.base import Example

LONGEST_S = 8.0  # CPU seconds of a plan's forecast; shapes after that take over the forecast of one of their kind


def forecast_of(
    prepared: PlannedRun,
    profile: Profile,
    console: Console | None = None,
    *,
    probe: bool = False,
    limit_s: float | None = None,
    data: PlannedData | None = None,
) -> Forecast:
    """The forecast of a plan.

    Args:
        prepared: the plan.
        profile: where it runs.
        console: for the progress of a probe.
        probe: measure every shape that was not probed before.
        limit_s: CPU seconds that it may take, roughly; shapes after that take over what is known of their kind.
        data: of the tasks, as far as it has been read.

    Raises:
        UserError: a probe was asked for on another machine than this one.
    """
    if probe:
        from harness.sweep.probe import probe_plan

        probe_plan(prepared, profile, console or Console())
    return _Forecasting(prepared, profile, limit_s, data=data).forecast()


def keep_forecast(prepared: PlannedRun, profile: Profile) -> None:
    """Write the forecast of a run into its folder, for its report; what an earlier run predicted stays.

    It is made after the trials, so that they need not wait for it, but only from what was known before them.

    Args:
        prepared: the plan.
        profile: where it ran.

    Raises:
        ValueError: the forecast that is there cannot be read.
    """
    earlier = read_forecast(prepared.folder)
    before = {shape.trial_ids: shape for shape in earlier.shapes} if earlier else {}
    shapes = shapes_of(prepared.specs, prepared.plan.trials)
    if all(shape.trial_ids in before for shape in shapes):
        return
    found = _Forecasting(prepared, profile, LONGEST_S, records={}).forecast()
    kept = tuple(before.get(shape.trial_ids, shape) for shape in found.shapes)
    write_forecast(prepared.folder, found.model_copy(update={"shapes": kept}))


def amounts_of(spec: TrialSpec, splits: Splits) -> Amounts:
    """How much data a trial has."""
    every = spec.budget.references != "one"
    texts = [len(example.references) for example in splits.test]
    files = {path for part in (splits.train, splits.validation, splits.test) for e in part for _, path in e.files}
    return Amounts(
        draws=sum(len(e.references) for e in splits.train) if every else len(splits.train),
        validation=sum(len(example.references) for example in splits.validation),
        test=sum(texts),
        texts=len(texts),
        files=len(files),
    )


class _Forecasting:
    """Makes one forecast."""

    def __init__(
        self,
        prepared: PlannedRun,
        profile: Profile,
        limit_s: float | None,
        records: Mapping[str, Summary] | None = None,
        data: PlannedData | None = None,
    ) -> None:
        self.prepared, self.profile = prepared, profile
        self.resources: Resources = prepared.experiment.resources
        self.records = read_summaries(prepared.folder).known if records is None else records
        self.notes: dict[str, None] = {}
        self.data, self.footprints = data or PlannedData(), Footprints(self.resources)
        self.space = FeatureSpace()
        self.limit_s, self.began = limit_s, time.process_time()
        self.like: dict[tuple[str, str, str], ShapeForecast] = {}
        self.nodes: Sequence[NodeAmounts] | None = profile.nodes()
        if self.nodes is None and profile.kind == "local":
            self.nodes = [this_machine()]
        self.here = profile.kind == "local"
        self.places = self._places()
        self.device, self.device_bytes = self._device()
        self.rate = self._rate()

    def forecast(self) -> Forecast:
        """All shapes, and their totals."""
        shapes = shapes_of(self.prepared.specs, self.prepared.plan.trials)
        found = self._with_records([self._shape(shape) for shape in shapes], shapes)
        finished = {i for i, record in self.records.items() if record.status in ("finished", "pruned")}
        left = {one.key: sum(i not in finished for i in one.trial_ids) for one in found}
        return Forecast(
            device=self.device,
            device_memory_bytes=self.device_bytes,
            on_gpu=self.places.gpus > 0,
            rate=self.rate.source if self.rate else "",
            shapes=tuple(found),
            totals=totals(found, left, self.places, self.profile.price, self._encoding(found)).model_copy(
                update=self._features()
            ),
            notes=tuple(self.notes),
        )

    def _encoding(self, found: Sequence[ShapeForecast]) -> Duration | None:
        """The time of encoding all files, where it is in no trial's: of a probe, else by arithmetic."""
        if any(one.trial is not None and one.trial.source == "probe" for one in found):
            return encoding_from(self.space.encoding_s) if self.space.encoding_s else None
        if self.rate is None or not self.space.encoding_flops:
            return None
        return rough(self.rate.seconds(self.space.encoding_flops, 0))

    def _kept_on_disk(self) -> bool:
        with suppress(UserError):  # which is a note already
            return cache_of(self.resources) is not None
        return False

    def _features(self) -> dict[str, Any]:
        """What features take in the cache on disk."""
        try:
            cache = cache_of(self.resources)
        except UserError as error:
            self.notes[str(error)] = None
            return {}
        if cache is None:
            return {}
        place = f"{cache.folder} (at most {cache.limit_bytes / GIB:g} GiB)"
        return {"features_bytes": self.space.size_bytes, "features_place": place}

    def _places(self) -> Places:
        resources, count = self.resources, len(self.prepared.specs)
        cpus = float(resources.workers * resources.cpus_per_worker)
        if self.nodes is None:
            self.notes["how many trials run at once is known when the cluster is there"] = None
            auto = resources.gpus_per_worker == "auto"
            return Places(None, 0.0 if auto else resources.workers * float(resources.gpus_per_worker), cpus, None)
        try:
            asked = per_worker(resources, self.nodes)
        except UserError as error:
            self.notes[str(error)] = None
            return Places(None, 0.0, cpus, len(self.nodes))
        each = at_once(resources, asked, self.nodes, count)
        return Places(each, resources.workers * asked["GPU"], cpus, len(self.nodes))

    def _device(self) -> tuple[str, int | None]:
        """Name and memory of the device of a worker: what the profile says, else what this machine has."""
        given = self.profile.device
        name = given.name if given and given.name else None
        if given and given.memory_gib:
            return name or f"{self.profile.name}'s device", round(given.memory_gib * GIB)
        if not self.here:
            self.notes[f"profile {self.profile.name}: `device: {{memory_gib: …}}` says what has to fit"] = None
            return name or f"{self.profile.name}'s device", None
        if torch.cuda.is_available():
            return name or this_device(), int(torch.cuda.get_device_properties(0).total_memory)
        return name or this_device(), int(psutil.virtual_memory().total) // max(1, self.places.at_once or 1)

    def _rate(self) -> Rate | None:
        given = self.profile.device
        if given and given.tflops:
            return given_rate(given.tflops)
        if self.here:
            return measured_rate(self.resources.cpus_per_worker)
        self.notes[f"profile {self.profile.name}: `device: {{tflops: …}}` is needed to predict times"] = None
        return None

    def _shape(self, shape: Shape) -> ShapeForecast:
        bare = ShapeForecast(
            key=" ".join((shape.name, *shape.kind)), name=shape.name, setting=shape.setting, trial_ids=shape.trial_ids
        )
        if self.limit_s is not None and time.process_time() - self.began > self.limit_s:
            like = self.like.get(shape.kind)
            if like is None:
                return bare.model_copy(update={"reason": f"not computed within {self.limit_s:g} s; --all computes it"})
            reason = "taken over from the same method with other options; --all computes it"
            own = {key: getattr(bare, key) for key in ("key", "name", "setting", "trial_ids")}
            return like.model_copy(update={**own, "reason": reason})
        found = self._computed(shape.spec, bare.model_copy(update={"key": fingerprint(shape.spec, self.resources)}))
        self.like.setdefault(shape.kind, found)
        return found

    def _computed(self, spec: TrialSpec, found: ShapeForecast) -> ShapeForecast:
        splits, train, reason = None, None, None
        try:
            splits, drawn = self.data.of(spec)
            train = splits.train if drawn else None
        except Exception as error:  # a forecast is never in the way: what is not known is said
            reason = _in_words(error)
        try:
            footprint = self.footprints.of(spec, train)
        except Exception as error:
            return found.model_copy(update={"reason": reason or _in_words(error)})
        found = self._with_memory(spec, found.model_copy(update={"reason": reason}), footprint, train)
        if splits is None:
            return found
        if train is not None:
            with suppress(UserError):
                self.space.add(spec, splits)
        amounts = amounts_of(spec, splits)
        step, trial = self._times(found.key, footprint.stages[-1], spec, amounts)
        disk = kept_bytes(footprint.stages[-1], amounts)
        return found.model_copy(update={"step_s": step, "trial": trial, "disk_bytes": disk})

    def _with_memory(
        self, spec: TrialSpec, found: ShapeForecast, footprint: Footprint, train: Sequence[Example] | None
    ) -> ShapeForecast:
        memory = memory_of(footprint.largest, spec, self.resources, footprint.longest)
        last = memory_of(footprint.stages[-1], spec, self.resources, footprint.longest)
        fits = memory.device_bytes <= self.device_bytes if self.device_bytes else None
        return found.model_copy(
            update={
                "trainable": max(traced.trained for traced in footprint.stages),
                "memory": last.model_copy(update={"working_bytes": max(last.working_bytes, _beyond(memory, last))}),
                "checkpoint_bytes": checkpoint_bytes(footprint.largest),
                "of_sample": footprint.of_sample,
                "fits": fits,
                "remedies": self._remedies(spec, train) if fits is False else (),
            }
        )

    def _times(
        self, key: str, traced: Traced, spec: TrialSpec, amounts: Amounts
    ) -> tuple[Duration | None, Duration | None]:
        measured = probes.known(key, this_device()) if self.here else None
        if measured:
            if self._kept_on_disk():  # encoding is paid once, not in every trial
                self.space.measured(spec, measured.file_s)
                amounts = replace(amounts, files=0)
            return step_from(measured), trial_from(measured, spec, amounts)
        if self.rate is None:
            return None, None
        step = step_of(traced, spec, self.rate)
        return step, trial_of(step.middle_s, traced, spec, amounts, self.rate)

    def _remedies(self, spec: TrialSpec, train: Sequence[Example] | None) -> tuple[str, ...]:
        def needs(changed: TrialSpec, resources: Resources) -> MemoryForecast:
            footprint = Footprints(resources).of(changed, train)
            return memory_of(footprint.largest, changed, resources, footprint.longest)

        return remedies(spec, self.resources, self.device_bytes or 0, needs)

    def _with_records(self, found: list[ShapeForecast], shapes: Sequence[Shape]) -> list[ShapeForecast]:
        """The forecasts with the times of finished trials on the same device, their own or those of others."""
        walls = {one.key: self._walls(one) for one in found}
        ratios = [
            wall / one.trial.middle_s for one in found if one.trial for wall in walls[one.key] if one.trial.middle_s
        ]
        return [one.model_copy(update={"trial": _better(one, walls[one.key], ratios)}) for one in found]

    def _walls(self, shape: ShapeForecast) -> list[float]:
        records = [self.records[i] for i in shape.trial_ids if i in self.records]
        device = this_device() if self.here else None
        return [r.wall_time_s for r in records if r.status == "finished" and (device is None or r.device == device)]


def _better(shape: ShapeForecast, walls: Sequence[float], ratios: Sequence[float]) -> Duration | None:
    if walls:
        return recorded(walls)
    if ratios and shape.trial and shape.trial.source == "arithmetic":
        return calibrated(shape.trial, ratios)
    return shape.trial


def _beyond(memory: MemoryForecast, last: MemoryForecast) -> int:
    """The working memory with which the last stage needs as much as the stage that needs most."""
    return last.working_bytes + memory.device_bytes - last.device_bytes


def _in_words(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
