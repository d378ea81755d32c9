"""Measures training steps of several trials in turn, each with the engine and the step of a real trial.

Every round takes a few steps with each model, on the same batches, the reference first in one round and last in the
next. What else happens on the machine then falls on all models alike, so the ratio of a round is that of the methods.
Runs in a process of its own: see profile_process.py.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.core.exhaustion import is_out_of_memory
from harness.core.probed import Probed
from harness.core.schema import Schema
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.build import TrialData
from harness.model.components import method_of
from harness.tracking.tracker import NoTracker
from harness.trial.energy import Meter, meter_of
from harness.trial.measure import PeakMemory, return_freed_memory
from harness.trial.trial import Trial

ROUNDS = 15  # the interval of the median is then from the 4th to the 12th value
EARLY, NARROW = 8, 0.05  # after so many rounds it ends if the interval of the ratio is so narrow, see ``is_narrow``
FEWEST_ROUNDS = 6  # with fewer there is no interval of 95 % for a median
BLOCK_S = 0.03  # of one model in a round, at least
METERED_BLOCK_S = 0.5  # where energy is measured: NVML's counter is updated about every 100 ms
LONGEST_S = 60.0  # of all rounds of a method, unless it has FEWEST_ROUNDS
_MEMORY_STEPS = 2  # optimizer steps: the second has the optimizer's state


logger = logging.getLogger(__name__)


class Job(Schema):
    """What to measure: of specs that differ at most in adapter, learning rate and epochs."""

    specs: tuple[TrialSpec, ...]  # the first is the reference
    resources: Resources
    run: str = ""  # its folder, which knows the digests of its files, for the features on disk
    memory: tuple[int, ...] = ()  # numbers of the specs whose memory is measured
    speed: tuple[int, ...] = ()  # of those whose speed is, in turn with the reference; 0: the reference alone
    at_once: int = 1  # processes that measure memory
    probe: tuple[int, ...] = ()  # of those of which a few steps and some evaluation are measured, each alone


class StageTimes(Schema):
    """The steps of one stage of a trial, by round."""

    share: float  # of the trial's steps
    step_s: tuple[float, ...]
    step_j: tuple[float, ...] | None  # None: the device does not tell
    examples_per_step: float
    tokens_per_step: float


class Answer(Schema):
    """What was measured for one spec of a job, or why it was not."""

    index: int  # of the spec in the job
    begun: bool = False  # nothing yet: its measurement has begun
    reason: str | None = None
    out_of_memory: bool = False
    device: str = ""
    peak_bytes: int | None = None  # None also where the system does not tell
    probed: Probed | None = None
    stages: tuple[StageTimes, ...] = ()
    reference: tuple[StageTimes, ...] = ()  # in the same rounds; empty for the reference itself


@dataclass(frozen=True)
class _Block:
    """A few steps of one model."""

    steps: int
    seconds: float
    joules: float | None
    examples: int
    tokens: int


class Lane:
    """One stage of a trial, built and ready to take training steps on its own data.

    Args:
        spec: of the trial.
        stage: number of the stage.
        resources: for threads and ZeRO stage.
        folder: for temporary files.
        data: of a trial that differs at most in its adapter and learning rate; None: it is read.
    """

    def __init__(
        self, spec: TrialSpec, stage: int, resources: Resources, folder: Path, data: TrialData | None = None
    ) -> None:
        # Not compiled: that takes longer than what is measured here.
        resources = resources.model_copy(update={"torch_compile": False})
        self.trial = Trial(spec, folder, resources, NoTracker(), lambda _: None)
        self.trial.build(data)
        stages = self.trial.stages
        ends = stages.ends
        self.share = (ends[stage] - (ends[stage - 1] if stage else 0)) / ends[-1]
        stages.start(stages.starts[stage])
        stages.built.model.train()
        size = spec.optimizer.per_device_train_batch_size
        order = stages.built.order
        self._batches = order.batches(1, size)
        if order.length_of is None and len(self._batches) > 1 and len(self._batches[-1]) < size:
            self._batches.pop()  # an incomplete one
        self._accumulation = spec.optimizer.gradient_accumulation_steps

    @property
    def data(self) -> TrialData:
        """For further lanes."""
        return self.trial.stages.built.data

    def block(self, first: int, steps: int, meter: Meter | None = None) -> _Block:
        """Take some optimizer steps; batches are made before, so that their time does not count.

        Args:
            first: number of the first step, which determines the batches: equal for all lanes.
            steps: number of steps.
            meter: for energy.
        """
        numbers = range(first * self._accumulation, (first + steps) * self._accumulation)
        batches = [self.trial.batch(self._batches[number % len(self._batches)]) for number in numbers]
        clock = self.trial.clock
        before = clock.seconds, clock.examples, clock.tokens
        joules = meter.joules() if meter else 0.0
        for batch in batches:
            self.trial.step_on(batch)
        seconds = clock.seconds - before[0]  # waits for the device, whose energy is read next
        used = meter.joules() - joules if meter else None
        return _Block(steps, seconds, used, clock.examples - before[1], clock.tokens - before[2])

    def warm_up(self) -> None:
        """Take the steps that are not counted."""
        while self.trial.clock.warming_up:
            self.block(0, 1)

    def close(self) -> None:
        """Free the model."""
        self.data.features.flush()
        self.trial.stages.close()
        del self.trial
        gc.collect()  # DeepSpeed's engine has reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _lanes(spec: TrialSpec, resources: Resources, data: TrialData | None = None) -> Iterator[list[Lane]]:
    """A lane for each stage of a trial, warmed up."""
    lanes: list[Lane] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for stage in range(_stages_of(spec)):
                lanes.append(Lane(spec, stage, resources, Path(folder), data or (lanes[0].data if lanes else None)))
                lanes[-1].warm_up()
            yield lanes
        finally:
            for lane in lanes:
                lane.close()


def _stages_of(spec: TrialSpec) -> int:
    return len(method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs))


def peak_growth(spec: TrialSpec, resources: Resources, data: TrialData | None = None) -> int | None:
    """Growth of the memory from before the model was built to the peak of training, in bytes; the most of all stages.

    Call it in a fresh process: memory that an allocator retains would hide growth. The first model is thrown away. It
    leaves the encoders, and the buffers and code of the libraries that any first step loads, which are no property of
    the method.

    Args:
        spec: of the trial.
        resources: for threads and ZeRO stage.
        data: of a trial that differs at most in its adapter and learning rate; None: it is read.

    Returns:
        None where the system does not tell the peak.
    """
    peaks = []
    return_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(_stages_of(spec)):
            for keeps in (False, True):
                lane = Lane(spec, stage, resources, Path(folder), data)
                before, data = lane.trial.peak.before_bytes, lane.data
                peak = PeakMemory(lane.trial.device)
                lane.block(0, _MEMORY_STEPS)
                if keeps:
                    peaks.append((before, peak.peak_bytes()))
                lane.close()
                del lane, peak
    grown = [most - before for before, most in peaks if before is not None and most is not None]
    return max(grown) if len(grown) == len(peaks) else None


def interleave(job: Job, tell: Callable[[Answer], None], data: TrialData | None = None) -> None:
    """Measure the speed of specs of a job, each in turn with the reference; ``tell`` is called after each.

    A spec that cannot be measured is told with the reason, and the next one follows. If the reference cannot be
    measured, only that is told.

    Args:
        job: its specs, and which of them.
        tell: receives the answers.
        data: of the specs; None: it is read.
    """
    tell(Answer(index=0, begun=True))
    try:
        with _lanes(job.specs[0], job.resources, data) as reference:
            meter = meter_of(reference[0].trial.device)
            for index in job.speed:
                tell(Answer(index=index, begun=True))
                try:
                    tell(_answer(index, job, reference, meter))
                except Exception as error:  # a method that fails must not stop the others
                    tell(failure(index, error))
    except Exception as error:
        tell(failure(0, error))


def _answer(index: int, job: Job, reference: Sequence[Lane], meter: Meter | None) -> Answer:
    if index == 0:
        times, _ = _rounds(reference, [], meter)
        return Answer(index=0, stages=times)
    with _lanes(job.specs[index], job.resources, reference[0].data) as lanes:
        others, own = _rounds(reference, lanes, meter)
    return Answer(index=index, stages=own, reference=others)


def failure(index: int, error: Exception) -> Answer:
    """The answer for a spec that could not be measured."""
    logger.exception("not measured", exc_info=error)
    full = is_out_of_memory(error)
    text = " ".join(str(error).split())[:300]
    reason = f"out of memory: {text}".rstrip(": ") if full else f"{type(error).__name__}: {text}"
    return Answer(index=index, reason=reason, out_of_memory=full)


def _rounds(
    reference: Sequence[Lane], lanes: Sequence[Lane], meter: Meter | None
) -> tuple[tuple[StageTimes, ...], tuple[StageTimes, ...]]:
    """Blocks of all lanes in turn; returns the times of the reference's and of the other lanes."""
    every = [*reference, *lanes]
    slowest = fastest = 0.0
    for lane in every:  # a block that is not counted: how long is a step?
        one = lane.block(0, 1)
        slowest, fastest = slowest + one.seconds, min(fastest or one.seconds, one.seconds)
    steps = max(1, math.ceil((METERED_BLOCK_S if meter else BLOCK_S) / fastest))
    count = max(FEWEST_ROUNDS, min(ROUNDS, int(LONGEST_S / (steps * slowest))))
    found: list[list[_Block]] = [[] for _ in every]
    for number in range(count):
        if lanes and is_narrow(_ratios(every, found, len(reference))):
            break
        for place in range(len(every)) if number % 2 == 0 else reversed(range(len(every))):
            found[place].append(every[place].block(1 + number * steps, steps, meter))
    times = [_times(lane, blocks) for lane, blocks in zip(every, found, strict=True)]
    return tuple(times[: len(reference)]), tuple(times[len(reference) :])


def is_narrow(ratios: Sequence[float]) -> bool:
    """Whether no more rounds are needed: ``EARLY`` of them agree.

    The interval of 8 values is from the lowest to the highest and misses the median with a probability of 0.8 %, that
    of 15 with 3.5 %. Together that is less than 5 %, so the interval is of 95 % at whichever of the two it ends.
    """
    return len(ratios) == EARLY and max(ratios) - min(ratios) <= NARROW * statistics.median(ratios)


def _ratios(every: Sequence[Lane], found: Sequence[Sequence[_Block]], reference: int) -> list[float]:
    """By round the time of the other lanes over that of the first ones, those of the reference."""
    means = [[lane.share * block.seconds for block in blocks] for lane, blocks in zip(every, found, strict=True)]
    others, own = means[:reference], means[reference:]
    return [sum(mine) / sum(its) for mine, its in zip(zip(*own, strict=True), zip(*others, strict=True), strict=True)]


def _times(lane: Lane, blocks: Sequence[_Block]) -> StageTimes:
    steps = sum(block.steps for block in blocks)
    joules = [block.joules / block.steps for block in blocks if block.joules is not None]
    return StageTimes(
        share=lane.share,
        step_s=tuple(block.seconds / block.steps for block in blocks),
        step_j=tuple(joules) if len(joules) == len(blocks) else None,
        examples_per_step=sum(block.examples for block in blocks) / steps,
        tokens_per_step=sum(block.tokens for block in blocks) / steps,
    )
