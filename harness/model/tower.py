"""The tower and the connector of a vision-language model in the training step, where they have adapters or are trained.

A tower that is frozen is an encoder, whose features are computed once (``harness/model/own_encoder.py``). One that
changes stands at the place of a projector instead: it reads what the model's processor makes of a picture, which is
kept as features otherwise are, and runs in every step.

Shapes: M values rows of all pictures, W values in each, P positions, F features, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.core.errors import UserError
from harness.model.vision_language import KINDS

VALUES = 256  # in a row of what a picture's tensors have
_FLOAT, _BOOL, _INTEGER = range(3)


class Tensors(NamedTuple):
    """The shapes of a picture's tensors, and the values of those that are integers.

    The values of others are in rows (M, W); integers, such as the size of a picture, decide on shapes, and so stay on
    the host.

    Attributes:
        shapes: name, number of its dtype and shape of each.
        integers: the values of those that are integers, in order.
    """

    shapes: tuple[tuple[int, int, tuple[int, ...]], ...]
    integers: tuple[int, ...]

    def numbers(self) -> list[int]:
        """All of it, for ``of``."""
        flat = [n for name, kind, shape in self.shapes for n in (name, kind, len(shape), *shape)]
        return [len(self.shapes), *flat, *self.integers]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Tensors:
        """What ``numbers`` returned."""
        count, at, shapes = numbers[0], 1, []
        for _ in range(count):
            name, kind, axes = numbers[at : at + 3]
            shapes.append((name, kind, tuple(numbers[at + 3 : at + 3 + axes])))
            at += 3 + axes
        return cls(tuple(shapes), tuple(numbers[at:]))

    @classmethod
    def packed(cls, given: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensors, Tensor]:
        """The tensors of a picture, and the values (M, W) of those that are no integers, in fp32.

        Args:
            given: by name.
            names: all that there may be.
        """
        shapes, integers, values = [], list[int](), list[Tensor]()
        for name, x in given.items():
            kind = _FLOAT if x.is_floating_point() else _BOOL if x.dtype == torch.bool else _INTEGER
            shapes.append((names.index(name), kind, tuple(x.shape)))
            if kind == _INTEGER:
                integers += x.flatten().tolist()
            else:
                values.append(x.flatten().float())
        flat = torch.cat(values) if values else torch.zeros(0)
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % VALUES)])
        return cls(tuple(shapes), tuple(integers)), flat.view(-1, VALUES)

    def unpacked(self, values_MW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors by name, on the device of the values and in their dtype."""
        flat, at, own = values_MW.flatten(), 0, iter(self.integers)
        found = {}
        for name, kind, shape in self.shapes:
            size = math.prod(shape)
            if kind == _INTEGER:
                found[names[name]] = torch.tensor([next(own) for _ in range(size)], device=flat.device).view(shape)
                continue
            x = flat[at : at + size].view(shape)
            found[names[name]] = x if kind == _FLOAT else x.bool()
            at += size
        return found


def features_of(model: Any, pictures: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The features (F, D) of pictures, as the language model reads them; in one pass where shapes allow it.

    Args:
        model: a vision-language model without its language model.
        pictures: what its processor makes of each.
    """
    if len({tuple((name, x.shape[1:]) for name, x in own.items()) for own in pictures}) > 1:
        return torch.cat([features_of(model, [own]) for own in pictures])
    joined = {name: torch.cat([own[name] for own in pictures]) for name in pictures[0]}
    return KINDS[model.config.model_type].medium.features(model, joined)


class Tower(nn.Module):
    """The tower and the connector of a vision-language model.

    Args:
        model: without its language model.
        text: name of the module at whose place the language model was.
        connector: path of the connector.
        names: of the tensors that its processor may make of a picture.
        blank: what it makes of a grey one, which is read where a batch has none: every parameter takes part in a step.
    """

    def __init__(
        self, model: Any, text: str, connector: str, names: Sequence[str], blank: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.model, self.text, self.names = model, text, tuple(names)
        self._connector_path = connector
        self._blank = blank

    @property
    def connector(self) -> Any:
        """Maps features of the tower to the width of the language model."""
        return self.model.get_submodule(self._connector_path)

    def with_own_values(self) -> None:
        """Give what is trained values of its own: those of the encoder are other trials' too."""
        for p in self.parameters():
            if p.requires_grad:
                p.data = p.detach().clone()

    def train(self, mode: bool = True) -> Tower:
        """As of any module, but batch normalisation (Granite Speech) keeps its statistics.

        With those of a batch, the features of an item would depend on the others.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, values_MW: Tensor, lengths: Sequence[int], pictures: Sequence[Tensors]) -> Tensor:
        """The positions (P, D) of pictures.

        Args:
            values_MW: of all pictures.
            lengths: how many rows each has.
            pictures: their tensors.
        """
        read = [
            own.unpacked(values, self.names)
            for own, values in zip(pictures, torch.split(values_MW, list(lengths)), strict=True)
        ]
        made_PD = features_of(self.model, read or [self._like(values_MW)])
        return made_PD if read else made_PD[:0]

    def _like(self, values_MW: Tensor) -> dict[str, Tensor]:
        """The grey picture, on the device and in the dtype of values."""
        device, dtype = values_MW.device, values_MW.dtype
        return {n: x.to(device, dtype) if x.is_floating_point() else x.to(device) for n, x in self._blank.items()}


class Whole(nn.Module):
    """A trial's vision-language model with the paths of its class, in which adapters of all parts find their layers.

    Its modules are those of the decoder and the tower, which the trial runs; a pass of it is one of the decoder.

    Args:
        decoder: the language model.
        tower: the rest.
    """

    def __init__(self, decoder: Any, tower: Tower) -> None:
        super().__init__()
        inside = nn.Module()
        for name, child in tower.model.named_children():
            inside.add_module(name, decoder.model if name == tower.text else child)
        self.config, self.model, self.lm_head = tower.model.config, inside, decoder.lm_head
        self._decoder = (decoder,)  # in a tuple: its modules are registered above
        self._tower = (tower,)

    @property
    def tower(self) -> Tower:
        """The rest."""
        return self._tower[0]

    def get_decoder(self) -> Any:
        """The language model without its output layer."""
        return self._decoder[0].model

    def get_input_embeddings(self) -> Any:
        """The table of the tokens."""
        return self._decoder[0].get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The output layer."""
        return self.lm_head

    def forward(self, *args: Any, **options: Any) -> Any:
        """As of the decoder."""
        return self._decoder[0](*args, **options)

    def register_forward_pre_hook(self, *args: Any, **options: Any) -> Any:
        """Of the decoder: it is what a trial calls."""
        return self._decoder[0].register_forward_pre_hook(*args, **options)

    def register_forward_hook(self, *args: Any, **options: Any) -> Any:
        """As ``register_forward_pre_hook``."""
        return self._decoder[0].register_forward_hook(*args, **options)


def whole_of(language_model: Any, projector: nn.Module | None) -> Any:
    """What adapters are attached to: the language model, or the whole one where its tower is in the step.

    Args:
        language_model: of a trial.
        projector: a tower, or something else at its place.
    """
    return Whole(language_model, projector) if isinstance(projector, Tower) else language_model


def group_of_pictures(grouping: Mapping[str, str | None], contexts: Iterable[str]) -> str | None:
    """The group of the tokens of a tower: that of the contexts whose files it reads; None: they have no adapter.

    Raises:
        UserError: they have several.
    """
    groups = {context: grouping.get(context) for context in contexts}
    if len(set(groups.values())) > 1:
        found = ", ".join(f"{context}: {group or 'no adapter'}" for context, group in groups.items())
        raise UserError(
            f"where: one tower reads the files of several contexts, which have different groups ({found}); allowed: "
            "one group for them, or where of the language model alone"
        )
    return next(iter(groups.values()), None)


def copy_of(tower: Tower, trained: bool, empty_on: str | None = None) -> Tower:
    """A copy whose parameters are new, so that what is done to them leaves the original alone.

    Args:
        tower: the original; parameters of the copy have the same memory.
        trained: whether the connector is trained: it then has values of its own, in fp32.
        empty_on: the device of a copy without values; None: it has them.
    """

    def own(x: Tensor) -> Tensor:
        return x.detach() if empty_on is None else torch.empty(x.shape, dtype=x.dtype, device=empty_on)

    connector = {id(p) for p in tower.connector.parameters()} if trained else set()
    memo: dict[int, Any] = {id(tower._blank): tower._blank, **{id(x): own(x) for x in tower.buffers()}}
    for p in tower.parameters():
        value = own(p).float().clone() if id(p) in connector else own(p)
        memo[id(p)] = nn.Parameter(value, requires_grad=id(p) in connector)
    found = copy.deepcopy(tower, memo)
    if trained:
        found.connector.register_forward_pre_hook(_in_its_dtype)
    return found


def _in_its_dtype(connector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tower may be computed in fewer bits than a connector that is trained."""
    return (args[0].to(next(connector.parameters()).dtype), *args[1:])
