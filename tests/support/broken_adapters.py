"""A correct adapter method, and methods that fail one check each, with the message they must cause."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from adapters.base import AdapterMethod, Config, Delta
from adapters.placement.roles import Target
from harness.check import adapter as checks


class GoodConfig(Config):
    """No options."""


class Scale(Delta):
    """``gamma ⊙ y``."""

    undecayed = ("gamma",)

    def __init__(self, out_features: int, siblings: list[Any]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(out_features))
        siblings.append(self)
        self.siblings = (siblings,)  # of one method, in all groups and layers; not a list of submodules

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return value_BTD * self.gamma

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        return weight_OI * self.gamma[:, None], bias_O * self.gamma


class GoodAdapter(AdapterMethod):
    summary = "scales outputs"
    Config = GoodConfig
    made: ClassVar[type[Scale]] = Scale

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.siblings: list[Any] = []

    def label(self) -> str:
        return "Scale"

    def roles(self) -> frozenset[str]:
        return frozenset({"q", "v", "up"})

    def delta(self, target: Target, generator: torch.Generator) -> Delta:
        return self.made(target.out_features, self.siblings)


class LooseConfig(BaseModel):
    """Accepts unknown options."""


class NotFinite(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return super().forward(x_BTI, value_BTD) * torch.nan


class NoIdentity(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return super().forward(x_BTI, value_BTD) * 1.5


class GlobalSeed(Scale):
    def __init__(self, out_features: int, siblings: list[Any]) -> None:
        super().__init__(out_features, siblings)
        self.gamma = nn.Parameter(torch.randn(out_features))


class OtherOnMeta(Scale):
    def __init__(self, out_features: int, siblings: list[Any]) -> None:
        super().__init__(out_features, siblings)
        self.more = nn.Parameter(torch.zeros(1 if self.gamma.is_meta else 2))


class NoEffect(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return value_BTD + 0.0 * self.gamma


class MixesRows(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return super().forward(x_BTI, value_BTD) + x_BTI.mean()


class NoGradient(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return value_BTD * self.gamma.detach() + (self.gamma * torch.inf).sum() * 0


class Leaks(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        (siblings,) = self.siblings
        return super().forward(x_BTI, value_BTD) * torch.stack([other.gamma.mean() for other in siblings]).mean()


class CountsGroups(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        (siblings,) = self.siblings
        return super().forward(x_BTI, value_BTD) * len(siblings)


class MergesTwice(Scale):
    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        weight_OI, bias_O = super().merge(weight_OI, bias_O)
        return super().merge(weight_OI, bias_O)


class Unsaved(Scale):
    def __init__(self, out_features: int, siblings: list[Any]) -> None:
        super().__init__(out_features, siblings)
        self.offset = torch.randn(out_features)

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return super().forward(x_BTI, value_BTD) + self.offset


class Decays(Scale):
    undecayed = ()


class CountsCalls(Scale):
    calls = 0

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x_BTI, value_BTD) * (1 + self.calls / 10)


class CountsPositions(Scale):
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return super().forward(x_BTI, value_BTD) + torch.arange(value_BTD.shape[-2])[:, None] / 10


class SavesItsOutput(Scale):
    """The gradient of a hyperbolic tangent is computed from its value."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return super().forward(x_BTI, value_BTD).tanh()


class Stacks(Scale):
    """Both groups' scales, as a method must that says it can be stacked."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        for delta in self.below:
            value_BTD = value_BTD * delta.gamma
        return super().forward(x_BTI, value_BTD)


def _method(made: type[Scale] = Scale, **attributes: Any) -> type[GoodAdapter]:
    return type(f"{made.__name__}Method", (GoodAdapter,), {"made": made, **attributes})


class StackedAdapter(GoodAdapter):
    not_stacked = None
    made = Stacks


ADAPTER_CASES: dict[Any, list[tuple[type, str]]] = {
    checks.it_says_what_it_is: [(_method(summary="two\nlines"), r"summary is 'two\\nlines'; required: one line")],
    checks.options_are_strict: [(_method(Config=LooseConfig), "unknown option 'no_such_option' is accepted")],
    checks.it_attaches: [(_method(NotFinite), "agnostic: the logits are not finite")],
    checks.it_starts_as_the_base: [
        (_method(NoIdentity), "specific: other logits than the base, but identity_at_start is True"),
        (_method(identity_at_start=False), "agnostic: the same logits as the base, but identity_at_start is False"),
    ],
    checks.it_starts_from_the_seed: [(_method(GlobalSeed), "gamma differs with the same seed")],
    checks.it_is_counted_without_weights: [(_method(OtherOnMeta), "on the meta device")],
    checks.it_leaves_no_trace: [(_method(NoEffect), "its parameters were changed, and the output was not")],
    checks.rows_do_not_depend_on_the_batch: [(_method(MixesRows), r"row \d: a difference .* to the same row alone")],
    checks.absent_groups_have_zero_gradients: [(_method(NoGradient), "gradient of .*gamma is not finite")],
    checks.groups_are_isolated: [(_method(Leaks), "layer q: parameters of the group image change tokens")],
    checks.stacked_groups_are_the_sum_of_their_parts: [
        (_method(not_stacked=None), "between shared\\+specific with the parameters of agnostic alone, and agnostic"),
    ],
    checks.equal_groups_are_one: [(_method(CountsGroups), "between two groups with equal weights and one group")],
    checks.merging_keeps_the_output: [(_method(MergesTwice), "a difference of up to .* after merge")],
    checks.saving_keeps_the_output: [(_method(Unsaved), "other logits after save and load_adapter")],
    checks.decay_keeps_the_identity: [(_method(Decays), "specific: a difference of up to .* after one step of decay")],
    checks.checkpointing_keeps_the_gradients: [(_method(CountsCalls), "gradient of .*gamma: a difference .* with act")],
    checks.generation_needs_no_cache: [(_method(CountsPositions), "token 2: a difference .* with a KV cache and with")],
    checks.outputs_can_be_changed_in_place: [
        (_method(SavesItsOutput), "needed for gradient computation has been modified by an inplace operation")
    ],
    checks.padding_has_no_effect: [(_method(CountsPositions), "padded on the (left|right): a difference")],
}
