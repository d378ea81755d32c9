"""The two-stage recipe of LLaVA: first the projector alone, then the language model with it.

Liu et al. 2023, arXiv 2304.08485, section 4.2 "Training": stage 1 (pre-training for feature alignment) trains the
projector with everything else frozen, stage 2 (fine-tuning end to end) the projector and the language model; each has
its own optimizer and schedule. There the two stages read different data. Here both read the trial's budget, so that
the recipe sees the examples and takes the steps that every other method does.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from adapters import base
from adapters.baselines import Full, FullConfig
from harness.errors import UserError


class LLaVAConfig(FullConfig):
    """Options."""

    projector_epochs: PositiveInt = 1  # of the budget's epochs, those that train the projector alone
    projector_learning_rate: Annotated[float, Field(gt=0)] | None = None  # of that stage; None: the trial's


class LLaVA(Full):
    """Full fine-tuning after a stage that trains the projector alone."""

    summary = "the LLaVA recipe: some epochs of the projector alone, then full fine-tuning"
    Config = LLaVAConfig
    config: LLaVAConfig

    def label(self) -> str:
        """``LLaVA two-stage``, and whether the embeddings stay frozen."""
        return "LLaVA two-stage" if self.config.embeddings else "LLaVA two-stage, embeddings frozen"

    def stages(self, epochs: int) -> tuple[base.Stage, ...]:
        """The projector's epochs, then all that are left.

        Raises:
            UserError: none are left.
        """
        first = self.config.projector_epochs
        if epochs <= first:
            raise UserError(
                f"projector_epochs: found {first} of budget.epochs={epochs}, which leaves no epoch for the language "
                f"model; allowed: fewer than budget.epochs"
            )
        return (
            base.Stage(first, trains_language_model=False, learning_rate=self.config.projector_learning_rate),
            base.Stage(epochs - first, trains_language_model=True),
        )
