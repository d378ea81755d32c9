"""The adapter contract: a method, and what it adds to one layer.

Shapes: B rows, T positions, I input features, O output features of a layer, D whichever of the two is changed, G
groups, X 1 or B rows (see ``Layout``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adapters.placement.offload import device_of, dtype_of
from adapters.placement.order import order_of, sort, unsort
from adapters.placement.roles import Target
from adapters.placement.router import Layout, Router
from adapters.where import Parts, Place, Role, Where, place_label, places_of, roles_of
from harness.core.errors import UserError
from harness.core.origin import during

__all__ = ["Place", "Role", "Where", "place_label", "places_of", "roles_of"]  # what the methods' options take
_PREFIX = "group_"


class Config(BaseModel):
    """Base class of a method's options: typed and frozen; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    later: ClassVar[frozenset[str]] = frozenset()  # options that a released method did not have, left out where None

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later options where they are not set: ids of such trials are as before there were these."""
        content: dict[str, Any] = dump(self)
        return {key: value for key, value in content.items() if value is not None or key not in self.later}


class Delta(nn.Module, ABC):
    """One group's change to one layer. At initialisation it is the identity.

    ``acts_on`` is what it changes: the layer's output, or the layer's input before the layer reads it. ``undecayed``
    names the parameters for which zero is not the identity.
    """

    acts_on: Literal["input", "output"] = "output"
    undecayed: tuple[
        str, ...
    ] = ()  # parameters that are not the identity at zero: weight decay must not pull them there
    # Of stacked groups: the delta of the group that all tokens share, which acts together with this one. In a tuple:
    # it is no submodule, and saved once.
    below: tuple[Any, ...] = ()

    @abstractmethod
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """The changed value (B, T, D). Tokens of several rows may come flattened: (N, I) and (N, D) → (N, D).

        Called once per pass for all tokens of the group; spans that are apart come concatenated along T.

        Args:
            x_BTI: the layer's input.
            value_BTD: what ``acts_on`` selects: the layer's output (B, T, O), or its input (B, T, I) again.
        """

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of a linear layer equivalent to the given layer with this delta.

        Raises:
            UserError: no linear layer is equivalent.
        """
        raise UserError(f"{type(self).__name__} cannot be merged into the layer's weights")

    def vector(self, name: str) -> Tensor:
        """A vector parameter (D,), with that of ``below``, if any, where the two are one vector."""
        own_D: Tensor = getattr(self, name)
        return own_D


class Change(nn.Module):
    """One method's change to one layer, for all groups that use the method with the same options.

    This default splits the tokens by group, applies only the owning group's delta to each, and concatenates the
    results. A method with a faster form, or whose groups interact, overrides ``AdapterMethod.change`` to return a
    subclass.
    """

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__()
        # The prefix prevents clashes between group names and ModuleDict's methods.
        self.deltas = nn.ModuleDict({f"{_PREFIX}{group}": delta for group, delta in deltas.items()})
        self.groups = tuple(deltas)
        self.acts_on = next(iter(deltas.values())).acts_on

    def with_layers(
        self, x_BTI: Tensor, parts: Sequence[tuple[nn.Linear, Change]], layout: Layout
    ) -> tuple[Tensor, ...] | None:
        """The outputs (B, T, O) of layers with their changes, if they are faster together; None: one after the other.

        Called for the first changes of the outputs, where nothing but the layers themselves computes them.

        Args:
            x_BTI: the layers' input.
            parts: this change's layer with it; and others with theirs, each of which this change ``joins``.
            layout: which group owns each position.
        """
        return None

    def joins(self, other: Change) -> bool:
        """Whether ``with_layers`` may compute this change together with that of another layer that reads the same."""
        return False

    def delta(self, group: str) -> Any:
        """The delta of one group."""
        return self.deltas[_PREFIX + group]

    def add_shared(self, group: str, delta: Delta) -> None:
        """Take in the parameters of the group that is ``below`` the others: it owns no token alone."""
        self.deltas[_PREFIX + group] = delta

    def has(self, group: str) -> bool:
        """Whether the group has parameters here."""
        return _PREFIX + group in self.deltas

    def changed(self, group: str, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """The group's change of tokens that are all its own; called once per pass, for all of them together."""
        return self._returned(group, x_BTI, value_BTD)

    def _returned(self, group: str, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """What the delta returns: None would leave the base as it is, another shape fail in a layer far behind.

        Raises:
            ValueError: it is no tensor of the value's shape.
        """
        changed_BTD: Any = self.delta(group)(x_BTI, value_BTD)
        if isinstance(changed_BTD, Tensor) and changed_BTD.shape == value_BTD.shape:
            return changed_BTD
        shape = tuple(changed_BTD.shape) if isinstance(changed_BTD, Tensor) else type(changed_BTD).__name__
        with during(of=self.delta(group)):
            raise ValueError(
                f"the delta of group {group} returned {shape}; allowed: a tensor of shape {tuple(value_BTD.shape)}"
            )

    def alone(self, layout: Layout) -> str | None:
        """The group that computes the whole pass: the only one; without gradients, the one that owns every position."""
        if layout.owned_by(self.groups):
            return self.groups[0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None  # the other groups stay in the graph
        return layout.owner if layout.owner in self.groups else None

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """The value (B, T, D) with every group's change at its own positions."""
        alone = self.alone(layout)
        if alone is not None:  # nothing to split or concatenate
            return self.changed(alone, x_BTI, value_BTD, layout)
        if torch.compiler.is_compiling():
            return self._by_mask(x_BTI, value_BTD, layout)
        if layout.spans is not None:
            return self._by_span(x_BTI, value_BTD, layout)
        return self._by_token(x_BTI, value_BTD, layout)

    def _by_span(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        assert layout.spans is not None  # noqa: S101 - for the type checker
        # One split, whose backward is one concatenation, rather than one slice per span.
        sizes = [span.stop - span.start for span in layout.spans]
        xs, pieces = torch.split(x_BTI, sizes, dim=1), list(torch.split(value_BTD, sizes, dim=1))
        for group in self.groups:
            own = [index for index, span in enumerate(layout.spans) if span.group == group]
            if len(own) == 1:
                pieces[own[0]] = self.changed(group, xs[own[0]], pieces[own[0]], layout)
            elif own:
                # All spans at once: what a delta does with its parameters (casts, norms) is done once.
                x_BMI, value_BMD = (torch.cat([of[index] for index in own], dim=1) for of in (xs, pieces))
                changed_BMD = self.changed(group, x_BMI, value_BMD, layout)
                for index, piece in zip(own, torch.split(changed_BMD, [sizes[i] for i in own], dim=1), strict=True):
                    pieces[index] = piece
            elif torch.is_grad_enabled():
                # A group without a token in this batch stays in the graph: ZeRO needs a gradient, even if zero, for
                # the same parameters on every rank and step.
                pieces.append(self.changed(group, x_BTI[:, :0], value_BTD[:, :0], layout))
        return torch.cat(pieces, dim=1)

    def _by_token(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """Rows have different layouts: sort the tokens by group, change each group's, and put them back.

        Changing no token keeps the group in the graph.
        """
        order = order_of(layout, self.groups, x_BTI.shape[0])
        sizes = [piece.stop - piece.start for piece in order.pieces]
        xs, values = (torch.split(sort(of.flatten(0, 1), order), sizes) for of in (x_BTI, value_BTD))
        pieces = [self.changed(g, x, value, layout) for g, x, value in zip(self.groups, xs, values, strict=False)]
        return unsort(torch.cat([*pieces, values[-1]]), order).view_as(value_BTD)

    def _by_mask(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """Every group's change of every token, of which each token keeps its own.

        More work, but the same for all layouts of one shape: torch.compile makes one graph for them.
        """
        owner_XTG, changed_BTD = layout.lookup(self.groups).owner_XTG, value_BTD
        for index, group in enumerate(self.groups):
            own_XT1 = owner_XTG[..., index, None]
            changed_BTD = torch.where(own_XT1, self._returned(group, x_BTI, value_BTD), changed_BTD)
        return changed_BTD

    def vector(self, name: str, layout: Layout, absent: float, dtype: torch.dtype) -> Tensor:
        """The vector parameter ``name`` of each token's group (X, T, D); (D,) if one group computes the whole pass.

        ``absent`` where none of these groups acts.
        """
        group = self.alone(layout)
        if group is not None:
            own_D: Tensor = layout.constant((self, name, group, dtype), lambda: self._parameter(group, name).to(dtype))
            return own_D
        vectors = {group: self._parameter(group, name) for group in self.groups}
        return self.of_tokens(vectors, layout, absent).to(dtype)

    def _parameter(self, group: str, name: str) -> Tensor:
        found_D: Tensor = self.delta(group).vector(name)
        return found_D

    def of_tokens(self, vectors: Mapping[str, Tensor], layout: Layout, absent: float) -> Tensor:
        """The vector of each token's group (X, T, D), of group → (D,); ``absent`` where none of them acts."""
        rows = [vectors[group] for group in self.groups]
        table_GD = torch.stack([*rows, torch.full_like(rows[0], absent)])
        lookup = layout.lookup(self.groups)
        if table_GD.device.type == "cpu" or torch._C._are_functorch_transforms_active():
            return F.embedding(lookup.index_XT, table_GD)
        found_XTD: Tensor = _Rows.apply(table_GD, *lookup)  # type: ignore[no-untyped-call]
        return found_XTD


class _Rows(torch.autograd.Function):
    """``F.embedding`` for a table of few rows (G + 1, D), the last of which has no gradient.

    Its backward is one product, which adds in a fixed order. Embedding's own is made for rows that are rarely the same:
    a GPU adds thousands of tokens to the same few rows one after the other. (A CPU is as fast with it, and exact.)
    """

    @staticmethod
    def forward(ctx: Any, table_GD: Tensor, owner_XTG: Tensor, index_XT: Tensor) -> Tensor:
        ctx.save_for_backward(owner_XTG)
        return F.embedding(index_XT, table_GD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_XTD: Tensor) -> tuple[Tensor, None, None]:
        (owner_XTG,) = ctx.saved_tensors
        g_GD = owner_XTG.flatten(0, 1).T.to(g_XTD.dtype) @ g_XTD.flatten(0, 1)
        return torch.cat([g_GD, g_GD.new_zeros(1, g_GD.shape[1])]), None, None


class ModelChange(nn.Module, ABC):
    """What a method adds to the model as a whole rather than to single layers, with its own parameters.

    Parameters in ``by_group`` belong to one group; the others are shared by all groups.
    """

    @abstractmethod
    def attach(self, language_model: nn.Module) -> Callable[[], None]:
        """Attach to the model.

        Returns:
            What restores the model: a method or a ``functools.partial``, so that a copy of the model restores itself. A
            closure would restore the original; a model with one cannot be copied.
        """

    def place(self, language_model: Any) -> None:
        """Put the parameters on the device where the model begins, in fp32 (float64 on a float64 model)."""
        embedding = language_model.get_input_embeddings()
        self.to(device_of(embedding), dtype_of(embedding))

    def by_group(self) -> Mapping[str, nn.Module]:
        """Group → the module that holds its parameters."""
        return {}


@dataclass(frozen=True)
class Stage:
    """A part of training with its own optimizer and schedule (the LLaVA recipe has two)."""

    epochs: int
    trains_language_model: bool
    learning_rate: float | None = None  # None: the trial's learning rate


class AdapterMethod(ABC):
    """A way to adapt a frozen language model. Subclass it and register the class under ``harness.adapters``.

    A method that changes layers returns their ``roles`` and builds a ``delta`` for one group and one layer, which is
    all that most methods need. The other hooks are optional.
    """

    summary: ClassVar[str]  # one line for `harness adapters`
    result_version: ClassVar[int] = 1  # raise it when results change: trials get new ids, saved adapters are refused
    grouped: ClassVar[bool] = True  # has separate parameters per adapter group
    identity_at_start: ClassVar[bool] = True  # before training, the model computes what the base computes
    joins_groups: ClassVar[bool] = False  # a token's change depends on tokens of other groups too (MokA)
    reads_past: ClassVar[bool] = False  # it depends on the contexts of the tokens in a KV cache (MMCA)
    # Why two groups, one that all tokens share and the token's own, cannot act on a token together; None: they can,
    # because deltas take ``Delta.below`` into account.
    not_stacked: ClassVar[str | None] = "it does not say what two groups do to one token together"
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def files(cls) -> Sequence[Path]:
        """Files that the method depends on, besides code: tables, codebooks. Their content is part of trial ids."""
        return ()

    @abstractmethod
    def label(self) -> str:
        """Name in the leaderboard: ``LoRA r=4``."""

    @property
    def name(self) -> str:
        """Short name in parameter paths: ``lora``."""
        return type(self).__name__.lower()

    @property
    def parts(self) -> tuple[AdapterMethod, ...]:
        """The methods that it combines, in the order in which they act; for a single method, itself."""
        return (self,)

    def for_groups(self, groups: Sequence[str]) -> dict[str, AdapterMethod]:
        """The method of each group: the same for all of them, unless groups differ."""
        return dict.fromkeys(groups, self)

    @property
    def only_changes_layers(self) -> bool:
        """Whether it leaves the base model as it is, and only changes what single layers of it read and return."""
        plain = AdapterMethod.model_change, AdapterMethod.trained
        return all((type(part).model_change, type(part).trained) == plain for part in self.parts)

    def roles(self) -> frozenset[str]:
        """Roles of the layers that it acts on (see ``find_targets``)."""
        return frozenset()

    def named_roles(self) -> frozenset[str]:
        """The roles that the user named individually in ``where``: the model must have each of them."""
        where = getattr(self.config, "where", None)
        return frozenset(where) & self.roles() if isinstance(where, tuple) else frozenset()

    def by_part(self) -> dict[str, AdapterMethod]:
        """Part of the model → this method with the ``where`` of that part; without parts, the language model's."""
        where = getattr(self.config, "where", None)
        if not isinstance(where, Parts):
            return {"language": self}
        return {part: self._at(place) for part, place in where.named().items()}

    def reaches(self) -> frozenset[str]:
        """The parts of a vision-language model that it changes or trains."""
        return frozenset(self.by_part())

    def _at(self, place: Place) -> AdapterMethod:
        return type(self)(self.config.model_copy(update={"where": place}))

    def delta(self, target: Target, generator: torch.Generator) -> Delta:
        """One group's parameters for one layer, initialised from ``generator``."""
        raise NotImplementedError(f"{type(self).__name__} has roles but does not override delta()")

    def shared(self, targets: Sequence[Target], generator: torch.Generator) -> nn.Module | None:
        """A module that all layers and groups share (VeRA's frozen projections)."""
        return None

    def change(
        self, target: Target, deltas: Mapping[str, Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> Change:
        """Combine the deltas of one layer's groups (group → delta) into one module."""
        return Change(deltas)

    def model_change(
        self,
        language_model: nn.Module,
        groups: Sequence[str],
        router: Router,
        shared: nn.Module | None,
        generator: torch.Generator,
    ) -> ModelChange | None:
        """The change to the model as a whole, if any (soft prompts, another attention)."""
        return None

    def trained(self, language_model: nn.Module) -> Iterable[nn.Parameter]:
        """The base model's own parameters that the method trains (full fine-tuning)."""
        return ()

    def stages(self, epochs: int) -> tuple[Stage, ...]:
        """The stages of a trial of ``epochs`` epochs; one unless the recipe has several."""
        return (Stage(epochs, trains_language_model=True),)


def check_rank(rank: int, target: Target) -> None:
    """Check that a rank fits a layer.

    Raises:
        UserError: it exceeds the smaller of the layer's input and output features.
    """
    largest = min(target.in_features, target.out_features)
    if rank > largest:
        raise UserError(
            f"rank {rank} is larger than layer {target.path} ({target.role}), which has "
            f"{target.in_features} inputs and {target.out_features} outputs; allowed: 1 to {largest}"
        )
