"""The training steps of trials, as whoever takes them sees them: a trial alone, or several that take them together."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from harness.model.budget import Draw

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """What came of a training step of one trial."""

    loss: float  # of the batch
    duration_s: float  # that the trial took


Steps = Generator[list[Draw], Taken, T]  # yields what each training step trains on, and is sent what came of it


def take_each(steps: Steps[T], take: Callable[[list[Draw]], Taken]) -> T:
    """Take all training steps; an error of one is raised where the trial waits for what came of it.

    Args:
        steps: of one trial.
        take: takes a step.

    Returns:
        What the generator returns.
    """
    try:
        draws = next(steps)
        while True:
            try:
                taken = take(draws)
            except BaseException as error:  # the trial is what handles it
                draws = steps.throw(error)
            else:
                draws = steps.send(taken)
    except StopIteration as end:
        returned: T = end.value
        return returned
