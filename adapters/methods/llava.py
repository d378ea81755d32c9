"""The two-stage recipe of LLaVA: first train the projector alone, then projector and language model.

Liu et al. 2023, arXiv 2304.08485, section 4.2 "Training": stage 1 (pre-training for feature alignment) trains the
projector with everything else frozen, stage 2 (fine-tuning) the projector and the language model; each has
its own optimizer and schedule. In the paper the two stages use different data. Here both use the trial's budget,
so that the recipe sees the same examples and takes the same steps as every other method.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from adapters import base
from adapters.methods.baselines import Full, FullConfig
from harness.core.errors import UserError


class LLaVAConfig(FullConfig):
    """Options."""

    projector_epochs: PositiveInt = 1  # how many of the budget's epochs train the projector alone
    projector_learning_rate: Annotated[float, Field(gt=0)] | None = (
        None  # of the first stage; None: the trial's learning rate
    )


class LLaVA(Full):
    """A stage that trains the projector alone, then full fine-tuning."""

    summary = "the LLaVA recipe: some epochs train the projector alone, then full fine-tuning"
    Config = LLaVAConfig
    config: LLaVAConfig

    def label(self) -> str:
        """``LLaVA two-stage``, plus the parts where they are named, and a note if the embeddings stay frozen."""
        return f"LLaVA two-stage{self._which()}"

    def stages(self, epochs: int) -> tuple[base.Stage, ...]:
        """The projector's epochs, then the remaining ones.

        Raises:
            UserError: no epochs remain.
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
