"""The adapter contract, and how adapters attach to a language model: by hooks, so that detaching leaves it as it was.

Shapes: B rows, T positions, I input features, O output features of a linear layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapters.roles import ATTENTION, FEED_FORWARD, find_targets
from harness.contexts import Router

Where = Literal["A", "F", "AF"]
_PREFIX = "group_"


class Config(BaseModel):
    """Base of every method's options: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Delta(nn.Module, ABC):
    """One group's change to one linear layer. At initialisation it changes nothing.

    ``acts_on`` says what it changes: the layer's output, or its input before the layer sees it.
    """

    acts_on: Literal["input", "output"] = "output"

    @abstractmethod
    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """The changed value.

        Args:
            x_BTI: the layer's input.
            value_BTD: what ``acts_on`` names: the layer's output (B, T, O), or its input again.
        """


class AdapterMethod(ABC):
    """A way to adapt a frozen language model. Subclass it and register the class under ``harness.adapters``."""

    summary: ClassVar[str]  # one line for `harness adapters`
    grouped: ClassVar[bool] = True  # has a group of parameters per context group
    trains_language_model: ClassVar[bool] = False  # the base's own weights are trained
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def label(self) -> str:
        """How the leaderboard calls it: ``LoRA r=4``."""

    def roles(self) -> frozenset[str]:
        """Roles of the layers it acts on (see adapters/roles.py)."""
        return frozenset()

    def delta(self, role: str, in_features: int, out_features: int, generator: torch.Generator) -> Delta:
        """One group's parameters for one layer, drawn from ``generator``."""
        raise NotImplementedError(f"{type(self).__name__} names roles but builds no delta")

    def num_parameters(self, role: str, in_features: int, out_features: int) -> int:
        """How many parameters ``delta`` would have, without building it."""
        raise NotImplementedError(f"{type(self).__name__} names roles but counts no parameters")


def roles_of(where: Where) -> frozenset[str]:
    """A: attention, F: feed-forward, AF: both (the paper's Table 1)."""
    return {"A": ATTENTION, "F": FEED_FORWARD, "AF": ATTENTION | FEED_FORWARD}[where]


class AdaptedLinear(nn.Module):
    """The deltas of one linear layer, one per group, and the hooks that apply them."""

    def __init__(self, deltas: Mapping[str, Delta], router: Router) -> None:
        super().__init__()
        # The prefix keeps a group from having the name of one of ModuleDict's methods.
        self.deltas = nn.ModuleDict({f"{_PREFIX}{group}": delta for group, delta in deltas.items()})
        self.router = router

    def by_group(self) -> dict[str, nn.Module]:
        """Group → delta."""
        return {name.removeprefix(_PREFIX): delta for name, delta in self.deltas.items()}

    def attach(self, linear: nn.Module) -> list[RemovableHandle]:
        """Hook onto the layer; only the kinds of hook that some group needs."""
        acts_on = {delta.acts_on for delta in self.deltas.values()}
        handles: list[RemovableHandle] = []
        if "input" in acts_on:
            handles.append(linear.register_forward_pre_hook(self._before))
        if "output" in acts_on:
            handles.append(linear.register_forward_hook(self._after))
        return handles

    def _before(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._change("input", args[0], args[0]), *args[1:])

    def _after(self, _module: nn.Module, args: tuple[Tensor, ...], y_BTO: Tensor) -> Tensor:
        return self._change("output", args[0], y_BTO)

    def _change(self, acts_on: str, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """Let every group change the value at its own positions; only the owning group computes."""
        if x_BTI.dim() == 2:  # OPT joins rows and positions before its feed-forward layers
            rows = (x.view(-1, self.router.length, x.shape[-1]) for x in (x_BTI, value_BTD))
            return self._change(acts_on, *rows).flatten(0, 1)
        deltas: dict[str | None, nn.Module] = {g: d for g, d in self.by_group().items() if d.acts_on == acts_on}
        spans = self.router.spans(x_BTI.shape[1])
        if len(spans) == 1 and list(deltas) == [spans[0].group]:  # agnostic: nothing to cut or join
            changed_BTD: Tensor = deltas[spans[0].group](x_BTI, value_BTD)
            return changed_BTD
        # One split, whose backward is one concatenation, rather than a slice for every span.
        sizes = [span.stop - span.start for span in spans]
        parts = zip(spans, torch.split(x_BTI, sizes, dim=1), torch.split(value_BTD, sizes, dim=1), strict=True)
        pieces = [deltas[span.group](x, value) if span.group in deltas else value for span, x, value in parts]
        if torch.is_grad_enabled():
            # A group without a token in this batch still takes part in the graph: ZeRO needs every rank and step to
            # produce a gradient for the same parameters, be it zero.
            present = {span.group for span in spans}
            absent = [delta for group, delta in deltas.items() if group not in present]
            pieces += [delta(x_BTI[:, :0], value_BTD[:, :0]) for delta in absent]
        return torch.cat(pieces, dim=1)


class Adapters(nn.Module):
    """All adapter parameters of one language model, outside of it: ``layers.<path>.deltas.group_<name>.<parameter>``.

    Args:
        language_model: a Hugging Face causal LM; its own parameters are left as they are.
        methods: group → method.
        router: knows the groups, and each batch's layout.
        seed: of the initialisation; groups and layers draw in a fixed order.
    """

    def __init__(
        self, language_model: nn.Module, methods: Mapping[str, AdapterMethod], router: Router, seed: int
    ) -> None:
        super().__init__()
        self.router = router
        generator = torch.Generator().manual_seed(seed)
        layers: dict[str, dict[str, Delta]] = {}
        for group, method in methods.items():
            for target in find_targets(language_model, method.roles()) if method.roles() else []:
                delta = method.delta(target.role, target.in_features, target.out_features, generator)
                layers.setdefault(target.path, {})[group] = delta
        # A dot is not allowed in the name of a submodule.
        self.layers = nn.ModuleDict(
            {path.replace(".", "/"): AdaptedLinear(deltas, router) for path, deltas in layers.items()}
        )
        self._handles: list[RemovableHandle] = []

    def attach(self, language_model: nn.Module) -> None:
        """Put the hooks onto the model."""
        for path, layer in self.layers.items():
            assert isinstance(layer, AdaptedLinear)  # noqa: S101 - for the type checker
            self._handles += layer.attach(language_model.get_submodule(path.replace("/", ".")))

    def detach(self) -> None:
        """Take the hooks off: the model computes what it did before."""
        while self._handles:
            self._handles.pop().remove()

    def parameters_by_group(self) -> dict[str, int]:
        """Number of parameters of each group."""
        counts = dict.fromkeys(self.router.groups, 0)
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLinear)  # noqa: S101
            for group, delta in layer.by_group().items():
                counts[group] += sum(p.numel() for p in delta.parameters())
        return counts
