"""Time of a trial from the operations it takes, and the rate of a device. Rough: see ``SPREAD``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from harness.core.forecast import Duration
from harness.experiment.plan import TrialSpec
from harness.price.trace import Traced

SPREAD = 3.0  # a trial is expected to take between a third and three times as long as the arithmetic says
REACHED = 0.4  # share of the FLOP/s of a device's data sheet that training reaches
KERNEL_S = 1e-5  # of starting an operation on a GPU, from Python
START_S = 3.0  # of a trial beside its passes: building, loading, scoring, writing
_MATRIX = 384  # small enough for a tenth of a second on one core, large enough for its full rate
_REPEATS = 3


@dataclass(frozen=True)
class Rate:
    """How fast a device computes.

    Attributes:
        flops_per_s: floating-point operations in large matrix products.
        operation_s: of any operation, however small.
        source: in words.
    """

    flops_per_s: float
    operation_s: float
    source: str

    def seconds(self, flops: float, operations: float) -> float:
        """Of so many."""
        return flops / self.flops_per_s + operations * self.operation_s


@dataclass(frozen=True)
class Amounts:
    """How much data a trial has.

    Attributes:
        draws: training items of an epoch.
        validation: references of the validation examples.
        test: references of the test examples.
        texts: test examples, for which texts are generated.
        files: different input files.
    """

    draws: int
    validation: int
    test: int
    texts: int
    files: int = 0


def given_rate(tflops: float) -> Rate:
    """The rate of a device by its data sheet."""
    return Rate(tflops * 1e12 * REACHED, KERNEL_S, f"{REACHED:.0%} of the profile's {tflops:g} TFLOP/s; rough")


def measured_rate(threads: int, bf16: bool = False) -> Rate:
    """The rate of this machine's GPU, or of so many threads of its CPU, measured in a fraction of a second."""
    cuda = torch.cuda.is_available()
    device, size = ("cuda", 4096) if cuda else ("cpu", _MATRIX)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        small = torch.ones(64, device=device, requires_grad=True)
        flops = 2 * size**3 / min(_timed(lambda: x @ x, 4) for _ in range(_REPEATS))
        operation_s = min(_timed(lambda: small * 2, 200) for _ in range(_REPEATS))
    finally:
        torch.set_num_threads(before)
    return Rate(flops, 2 * operation_s, "operations by this machine's rate; rough")


def _timed(call: object, times: int) -> float:
    assert callable(call)  # noqa: S101 - for the type checker
    cuda = torch.cuda.is_available()
    call()
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def step_of(traced: Traced, spec: TrialSpec, rate: Rate) -> Duration:
    """The time of an optimizer step, with all batches that its gradient is accumulated over."""
    middle = rate.seconds(traced.step_flops, traced.step_operations) * spec.optimizer.gradient_accumulation_steps
    return rough(middle)


def trial_of(step_s: float, traced: Traced, spec: TrialSpec, amounts: Amounts, rate: Rate) -> Duration:
    """The time of a whole trial: training, validation after every epoch, and the test of the best epoch.

    Args:
        step_s: of an optimizer step.
        traced: a step.
        spec: of the trial.
        amounts: of its data.
        rate: of the device, for what is no training step.
    """
    return rough(START_S + training_s(step_s, spec, amounts) + evaluation_s(traced, spec, amounts, rate))


def training_s(step_s: float, spec: TrialSpec, amounts: Amounts) -> float:
    """Seconds of all training steps."""
    batches = math.ceil(amounts.draws / spec.optimizer.per_device_train_batch_size) * spec.budget.epochs
    return step_s * batches / spec.optimizer.gradient_accumulation_steps


def scored(spec: TrialSpec, amounts: Amounts) -> int:
    """References that a trial scores: validation in every epoch and once more, test with right and wrong inputs."""
    return amounts.validation * (spec.budget.epochs + 1) + 2 * amounts.test


def evaluation_s(traced: Traced, spec: TrialSpec, amounts: Amounts, rate: Rate) -> float:
    """Seconds of scoring and generating."""
    size = spec.eval.per_device_eval_batch_size
    flops_per_position = traced.forward_flops / traced.positions
    rows = scored(spec, amounts)
    positions = rows * traced.row_positions
    scoring = rate.seconds(positions * flops_per_position, math.ceil(rows / size) * traced.forward_operations)
    tokens = spec.eval.max_new_tokens
    generated = amounts.texts * (traced.row_positions + tokens * spec.eval.num_beams)
    passes = math.ceil(amounts.texts / size) * tokens
    return scoring + rate.seconds(generated * flops_per_position, passes * traced.forward_operations)


def rough(middle_s: float) -> Duration:
    """A time that only arithmetic says."""
    return Duration(low_s=middle_s / SPREAD, middle_s=middle_s, high_s=middle_s * SPREAD, source="arithmetic")
