"""The adapter contract: what a method is, and what it adds to one layer.

Shapes: B rows, T positions, I input features, O output features of a layer, D whichever of them is changed, G groups,
X 1 or B rows (see adapters/router.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.roles import ATTENTION, FEED_FORWARD, Target
from adapters.router import Layout, Router
from harness.errors import UserError

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
Where = Literal["A", "F", "AF"] | Annotated[tuple[Role, ...], Field(min_length=1)]
_PREFIX = "group_"


class Config(BaseModel):
    """Base of every method's options: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Delta(nn.Module, ABC):
    """One group's change to one layer. At initialisation it changes nothing.

    ``acts_on`` says what it changes: the layer's output, or its input before the layer sees it.
    """

    acts_on: Literal["input", "output"] = "output"

    @abstractmethod
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """The changed value. The leading dimensions may also be tokens of several rows in one list: (N, I) and (N, D).

        Args:
            x_BTI: the layer's input.
            value_BTD: what ``acts_on`` names: the layer's output (B, T, O), or its input again.
        """

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer that computes what layer and delta compute together.

        Raises:
            UserError: no linear layer does.
        """
        raise UserError(f"{type(self).__name__} cannot be merged into the layer's weights")


class Change(nn.Module):
    """What one method does to one layer, for all the groups that use it with the same options.

    This one cuts the tokens by group, lets only the owning group's delta compute, and joins the pieces. A method that
    knows a faster form, or whose groups act on one another, subclasses it (``AdapterMethod.change``).
    """

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__()
        # The prefix keeps a group from having the name of one of ModuleDict's methods.
        self.deltas = nn.ModuleDict({f"{_PREFIX}{group}": delta for group, delta in deltas.items()})
        self.groups = tuple(deltas)
        self.acts_on = next(iter(deltas.values())).acts_on

    def delta(self, group: str) -> Any:
        """The group's delta."""
        return self.deltas[_PREFIX + group]

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """The value with every group's change at its own positions."""
        if layout.owned_by(self.groups):  # agnostic: nothing to cut or join
            changed_BTD: Tensor = self.delta(self.groups[0])(x_BTI, value_BTD)
            return changed_BTD
        if layout.spans is not None:
            return self._by_span(x_BTI, value_BTD, layout)
        return self._by_token(x_BTI, value_BTD, layout)

    def _by_span(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        assert layout.spans is not None  # noqa: S101 - for the type checker
        # One split, whose backward is one concatenation, rather than a slice for every span.
        sizes = [span.stop - span.start for span in layout.spans]
        parts = zip(layout.spans, torch.split(x_BTI, sizes, dim=1), torch.split(value_BTD, sizes, dim=1), strict=True)
        pieces = [self.delta(span.group)(x, value) if span.group in self.groups else value for span, x, value in parts]
        if torch.is_grad_enabled():
            # A group without a token in this batch still takes part in the graph: ZeRO needs every rank and step to
            # produce a gradient for the same parameters, be it zero.
            present = {span.group for span in layout.spans}
            pieces += [self.delta(g)(x_BTI[:, :0], value_BTD[:, :0]) for g in self.groups if g not in present]
        return torch.cat(pieces, dim=1)

    def _by_token(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """Rows differ: gather each group's tokens, change them, put them back. Gathering none keeps the graph whole."""
        x_NI, value_ND = x_BTI.flatten(0, 1), value_BTD.flatten(0, 1)
        for group in self.groups:
            where_M = layout.positions[group]
            changed_MD = self.delta(group)(x_NI[where_M], value_ND[where_M])
            value_ND = value_ND.index_copy(0, where_M, changed_MD)
        return value_ND.view_as(value_BTD)

    def table(self, name: str, layout: Layout, absent: float) -> Tensor:
        """A vector parameter of each token's own group, (X, T, D); ``absent`` where none of these groups acts."""
        rows = [getattr(self.delta(group), name) for group in self.groups]
        table_GD = torch.stack([*rows, torch.full_like(rows[0], absent)])
        return F.embedding(layout.lookup(self.groups).index_XT, table_GD)


class ModelChange(nn.Module, ABC):
    """What a method adds to the model as a whole rather than to its layers. Its parameters are its own.

    ``by_group`` tells which parameters belong to which group; the others are shared by all groups.
    """

    @abstractmethod
    def attach(self, language_model: nn.Module) -> Callable[[], None]:
        """Take effect on the model; what is returned undoes it and leaves the model as it was."""

    def by_group(self) -> Mapping[str, nn.Module]:
        """Group → the module that holds its parameters."""
        return {}


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own optimizer and schedule (the LLaVA recipe has two)."""

    epochs: int
    trains_language_model: bool
    learning_rate: float | None = None  # None: the trial's own


class AdapterMethod(ABC):
    """A way to adapt a frozen language model. Subclass it and register the class under ``harness.adapters``.

    A method that changes layers names their ``roles`` and builds a ``delta`` for one group and one layer; that is all
    most methods need. The other hooks are for methods that are more than that.
    """

    summary: ClassVar[str]  # one line for `harness adapters`
    result_version: ClassVar[int] = 1  # raise it when results change: trials get new ids, saved adapters are refused
    grouped: ClassVar[bool] = True  # has a group of parameters per context group
    identity_at_start: ClassVar[bool] = True  # before training the model computes what the base does
    joins_groups: ClassVar[bool] = False  # a token's change depends on tokens of other groups too (MokA)
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def label(self) -> str:
        """How the leaderboard calls it: ``LoRA r=4``."""

    @property
    def name(self) -> str:
        """Short name in the paths of parameters: ``lora``."""
        return type(self).__name__.lower()

    @property
    def parts(self) -> tuple[AdapterMethod, ...]:
        """The methods it is made of, in the order in which they act; a single method is its own only part."""
        return (self,)

    def roles(self) -> frozenset[str]:
        """Roles of the layers it acts on (see adapters/roles.py)."""
        return frozenset()

    def named_roles(self) -> frozenset[str]:
        """Those of its roles that the user named one by one: the model must have each of them."""
        where = getattr(self.config, "where", None)
        return frozenset(where) & self.roles() if isinstance(where, tuple) else frozenset()

    def delta(self, target: Target, generator: torch.Generator) -> Delta:
        """One group's parameters for one layer, drawn from ``generator``."""
        raise NotImplementedError(f"{type(self).__name__} names roles but builds no delta")

    def shared(self, targets: Sequence[Target], generator: torch.Generator) -> nn.Module | None:
        """What all layers and groups share (VeRA's frozen projections)."""
        return None

    def change(
        self, target: Target, deltas: Mapping[str, Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> Change:
        """The deltas of one layer's groups, brought together."""
        return Change(deltas)

    def model_change(
        self,
        language_model: nn.Module,
        groups: Sequence[str],
        router: Router,
        shared: nn.Module | None,
        generator: torch.Generator,
    ) -> ModelChange | None:
        """What it adds to the model as a whole (soft prompts, another attention)."""
        return None

    def trained(self, language_model: nn.Module) -> Iterable[nn.Parameter]:
        """The base's own parameters that it trains (full fine-tuning)."""
        return ()

    def stages(self, epochs: int) -> tuple[Stage, ...]:
        """How a trial's epochs are divided; one stage unless the recipe has several."""
        return (Stage(epochs, trains_language_model=True),)


def check_rank(rank: int, target: Target) -> None:
    """A rank that a layer cannot have.

    Raises:
        UserError: it is larger than the layer.
    """
    largest = min(target.in_features, target.out_features)
    if rank > largest:
        raise UserError(
            f"rank {rank} is larger than layer {target.path} ({target.role}), which has "
            f"{target.in_features} inputs and {target.out_features} outputs; allowed: 1 to {largest}"
        )


def roles_of(where: Where) -> frozenset[str]:
    """A: attention, F: feed-forward, AF: both (the paper's Table 1); or the roles themselves."""
    if isinstance(where, tuple):
        return frozenset(where)
    return {"A": ATTENTION, "F": FEED_FORWARD, "AF": ATTENTION | FEED_FORWARD}[where]


def place_label(where: Where) -> str:
    """For a label: nothing for everywhere, `` A``, `` q,v``."""
    if isinstance(where, tuple):
        return " " + ",".join(where)
    return "" if where == "AF" else f" {where}"
