"""The search for the learning rate of a row: what it is, how its candidates are halved, and which of them is ahead.

The leaderboard, halving and the samplers that learn from results all rank candidates with ``ranked``, so that a search
is decided as the leaderboard would decide it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from harness.core.inside import TrialId
from harness.core.schema import Schema, read_strictly

DECISIONS = "halving.json"  # in the run folder
Sampler = Literal["grid", "random", "qmc", "tpe", "gp"]
ADAPTIVE: tuple[Sampler, ...] = ("tpe", "gp")  # the next candidate depends on the results of the earlier ones
Rate = Annotated[FiniteFloat, Field(gt=0)]


class _Options(Schema):
    model_config = ConfigDict(strict=True)


class Range(_Options):
    """Where the candidates of a search come from: one of the two, from the lower to the upper end."""

    log_uniform: tuple[Rate, Rate] | None = None  # every order of magnitude is equally likely
    uniform: tuple[Rate, Rate] | None = None

    @model_validator(mode="after")
    def _one_in_order(self) -> Self:
        given = [ends for ends in (self.log_uniform, self.uniform) if ends is not None]
        if len(given) != 1:
            raise ValueError("give one of log_uniform and uniform, such as {log_uniform: [1e-4, 1e-2]}")
        if given[0][0] >= given[0][1]:
            raise ValueError(f"the lower end comes first, such as [{min(given[0]):g}, {max(given[0]):g}]")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end."""
        ends = self.log_uniform or self.uniform
        assert ends is not None  # noqa: S101 - the validator
        return ends


class Search(_Options):
    """How the learning rates of one adapter entry are proposed."""

    learning_rate: Range | tuple[Rate, ...]  # values: a grid
    candidates: PositiveInt
    sampler: Sampler
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the sampler; "grid" has no randomness


class Halving(_Options):
    """Successive halving of the candidates of a row, on their validation perplexity.

    Attributes:
        rungs: epochs after which candidates are compared; the same for all methods.
        reduction_factor: of n candidates, ⌈n / factor⌉ go on.
    """

    rungs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    reduction_factor: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ValueError("epochs in ascending order, each once")
        return self

    def kept(self, candidates: int, rungs: int | None = None) -> int:
        """How many of so many candidates are left after the first rungs; None: after all."""
        for _ in self.rungs[:rungs]:
            candidates = math.ceil(candidates / self.reduction_factor)
        return candidates

    @property
    def text(self) -> str:
        """``halving at epochs 1, 2 by 2``."""
        epochs = f"epoch{'s' * (len(self.rungs) > 1)} {', '.join(map(str, self.rungs))}"
        return f"halving at {epochs} by {self.reduction_factor}"


def ranked(candidates: Sequence[Mapping[int, float]]) -> list[int]:
    """The candidates that may be chosen, best first, by their validation perplexity.

    A candidate that has fewer seeds than another cannot be chosen, because its mean may be over the easier seeds. For
    the same reason the mean is over the seeds that all remaining candidates have, if there are any. Of equal candidates
    the first comes first.

    Args:
        candidates: of each one, seed → validation perplexity.

    Returns:
        Their indices; empty if none has a seed.
    """
    most = max((len(by_seed) for by_seed in candidates), default=0)
    if most == 0:
        return []
    able = [index for index, by_seed in enumerate(candidates) if len(by_seed) == most]
    shared = set(candidates[able[0]]).intersection(*(candidates[index] for index in able))
    means = {i: statistics.fmean(candidates[i][seed] for seed in sorted(shared or candidates[i])) for i in able}
    return sorted(able, key=lambda index: means[index])


class AtRung(Schema):
    """One learning rate at a rung."""

    learning_rate: FiniteFloat | None
    validation_perplexity: dict[int, FiniteFloat]  # by seed, the lowest up to the rung; a seed that failed is absent
    goes_on: bool


class Decision(Schema):
    """Which learning rates of a row go on from a rung."""

    row: str  # digest of its trials and of the halving
    name: str
    epoch: int
    candidates: tuple[AtRung, ...]  # those that had come so far
    out: tuple[TrialId, ...]  # ids of the trials that do not go on; none of them is run again

    def goes_on(self, rate: float | None) -> bool:
        """Whether a learning rate goes on; False too if it was pruned before."""
        return any(one.goes_on for one in self.candidates if one.learning_rate == rate)


class Decisions(Schema):
    """``halving.json``: all decisions of a run folder, in the order in which they were made."""

    schema_version: Literal[1] = 1
    decisions: tuple[Decision, ...] = ()


def read_decisions(run: Path) -> tuple[Decision, ...]:
    """The decisions of halving in a run folder; none if there is no such file.

    Raises:
        ValueError: the file is not what it should be.
    """
    try:
        return read_strictly(Decisions, run / DECISIONS, "the decisions of halving").decisions
    except (FileNotFoundError, NotADirectoryError):
        return ()
