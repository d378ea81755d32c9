"""The encoder of a vision- or audio-language model: its tower, and its connector where that is frozen.

Where the tower is part of the training step, the encoder is the model's processor alone (``harness/model/tower.py``).
What it returns for an item has the tokens too that the model's processor writes for it: in some classes there are
marks around an image, its tiles and its rows. They are embedded by the language model, so ids are kept, not embeddings.

Shapes: N rows of an item, H of them its head, F features, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model import vision_language
from harness.model.grid_positions import Grid
from harness.model.media import RECORDINGS
from harness.model.tower import VALUES, Tensors, Tower, copy_of, features_of
from tasks.encoder import Encoder

_AT_ONCE = 8  # pictures: of each there may be a dozen tiles
_SHORT_S = 0.5  # a recording that is not shorter has features
_MASKS = ("feature_attention_mask", "input_features_mask")
IMAGE = -1  # in the ids of a picture or recording: a feature is there


@dataclass(frozen=True)
class Written:
    """What stands at an image's place in a row.

    Attributes:
        ids: of the tokens, ``IMAGE`` where a feature is.
        features_FD: one for each of these, or several where a connector that is trained makes one of them; or what the
            tower reads, in rows.
        grid: rows and columns of the features, where positions tell it.
        tensors: what these rows are, where they are what the tower reads.
    """

    ids: tuple[int, ...]
    features_FD: Tensor
    grid: Grid | None = None
    tensors: Tensors | None = None

    def packed(self) -> Tensor:
        """All of it as rows (H + F, D), in fp32: the caches of features know tensors alone."""
        width = self.features_FD.shape[1]
        tensors = [] if self.tensors is None else self.tensors.numbers()
        numbers = [0, len(self.ids), len(tensors), *(self.grid or (0, 0)), *self.ids, *tensors]
        head = torch.tensor(numbers, dtype=torch.float32)
        head = torch.cat([head, head.new_zeros(-len(head) % width)]).view(-1, width)
        head[0, 0] = len(head)
        return torch.cat([head.to(self.features_FD.device), self.features_FD.float()])

    @classmethod
    def of(cls, rows_ND: Tensor) -> Written:
        """What ``packed`` returned; its features are a view."""
        length = int(rows_ND[0, 0])
        _, count, more, rows, columns, *numbers = rows_ND[:length].flatten().long().tolist()
        tensors = Tensors.of(numbers[count : count + more]) if more else None
        return cls(tuple(numbers[:count]), rows_ND[length:], (rows, columns) if rows else None, tensors)

    def runs(self) -> list[tuple[tuple[int, ...], Tensor | None]]:
        """Consecutive tokens, and consecutive features with as many places, in their order.

        Of what a tower reads, all rows are with the places of every run.
        """
        found: list[tuple[tuple[int, ...], Tensor | None]] = []
        places = self.ids.count(IMAGE)
        each, start, at = len(self.features_FD) // max(places, 1), 0, 0
        while start < len(self.ids):
            stop = start
            while stop < len(self.ids) and (self.ids[stop] == IMAGE) == (self.ids[start] == IMAGE):
                stop += 1
            if self.ids[start] == IMAGE:
                taken = (stop - start) * each
                own_FD = self.features_FD if self.tensors else self.features_FD[at : at + taken]
                found.append(((0,) * (stop - start), own_FD))
                at += taken
            else:
                found.append((self.ids[start:stop], None))
            start = stop
        return found


class OwnEncoder(Encoder):
    """A vision- or audio-language model without its language model, and its processor.

    Args:
        model: the whole model; its language model is removed.
        processor: of the model.
        backbone: for ``connector``.
        weights: whether it has some; else what ``encode`` returns has features of zeros.
        in_step: whether the tower runs in the training step, so that what it reads is encoded.
    """

    def __init__(self, model: Any, processor: Any, backbone: Backbone, weights: bool, in_step: bool = False) -> None:
        super().__init__()
        self.kind, self.config = vision_language.kind_of(backbone)
        self.medium = self.kind.medium
        self.processor, self.in_step, self._weights = processor, in_step, weights
        self.trained = backbone.connector == "trained"
        self.apart = self.trained and not in_step
        levels = self.kind.levels(self.config)
        self.text_width = (1 + levels) * int(model.get_input_embeddings().embedding_dim)
        inner, decoder = model.model, model.get_decoder()
        for name, child in list(inner.named_children()):
            if child is decoder:
                setattr(inner, name, nn.Module())
                self._text = name
        self.model = inner
        self._takes = self.medium.takes(inner)
        self.width = VALUES if in_step else self.text_width
        if self.trained and levels:
            raise UserError(
                f"backbone.connector: {self.config.model_type!r} has one for each of its {1 + levels} levels of "
                "features, which are not trained apart from its vision tower; allowed: frozen"
            )
        if self.apart:
            if self.kind.rows is None:
                raise UserError(
                    f"backbone.connector: that of {self.config.model_type!r} needs more than its features, such as the "
                    "size of each picture, so it cannot be trained apart from its tower; allowed: frozen"
                )
            self.width = self.kind.width(self.config)

    @property
    def connector(self) -> Any:
        """Maps features of the tower to the width of the language model."""
        return self.model.get_submodule(self.kind.connector)

    @property
    def rows(self) -> int:
        """Features of the tower that the connector reads at once."""
        return 1 if self.kind.rows is None else self.kind.rows(self.config)

    @property
    def each(self) -> int:
        """Features that become one position."""
        return self.rows // self.kind.tokens(self.config) if self.apart else 1

    @torch.no_grad()
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        """What stands at the place of each picture, as ``Written.packed``."""
        made = [self._process(item) for item in items]
        if self.in_step:
            return [self._read(*one) for one in made]
        found: list[Tensor] = []
        for start in range(0, len(made), _AT_ONCE):
            part = made[start : start + _AT_ONCE]
            counts = [ids.count(IMAGE) * self.each for ids, _ in part]
            features = self._features([pixels for _, pixels in part], counts)
            for (ids, pixels), own_FD in zip(part, features, strict=True):
                found.append(Written(ids, own_FD, self._grid(pixels)).packed())
        return found

    @property
    def blank(self) -> Any:
        """A grey picture, or a recording of faint noise."""
        return self.medium.blank()

    def read_blank(self) -> None:
        """Process it, which needs values: a tower may be made where tensors have none."""
        self._blank = self._process(self.blank)

    def check(self, item: Any) -> str | None:
        """Reject recordings that the model would cut, and those of which it would read nothing."""
        if self.medium is not RECORDINGS:
            return None
        longest_s = self.kind.longest_s(self.processor) if self.kind.longest_s else math.inf
        if item.seconds > longest_s:
            return f"{item.seconds:.1f} s long; {self.config.model_type} takes at most {longest_s:g} s"
        if item.seconds < _SHORT_S and IMAGE not in self._process(item)[0]:
            return f"{item.seconds * 1000:.1f} ms long; {self.config.model_type} makes no feature of it"
        return None

    def tower(self) -> Tower:
        """The tower and the connector, for the training step.

        Raises:
            ValueError: the processor is that of another model.
        """
        ids, pixels = self._blank
        if self._weights:
            with torch.no_grad():
                own = {name: x.to(self.device) for name, x in pixels.items()}
                _check_counts(features_of(self.model, [own]), [ids.count(IMAGE)])
        return Tower(self.model, self._text, self.kind.connector, self._takes, pixels)

    def _read(self, ids: tuple[int, ...], pixels: dict[str, Tensor]) -> Tensor:
        """What the tower reads of a picture."""
        tensors, values_MW = Tensors.packed(pixels, self._takes)
        return Written(ids, values_MW, self._grid(pixels), tensors).packed()

    def _process(self, item: Any) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """The tokens of a picture, and what the tower reads of it."""
        place = getattr(self.processor, self.kind.place)
        read = self.medium.read(self.processor, [item], place, add_special_tokens=False, return_tensors="pt")
        written, feature = read["input_ids"][0].tolist(), vision_language.item_token(self.processor, self.kind)
        ids = [IMAGE if token == feature else token for token in self.kind.item_in(self.processor, written)]
        return tuple(ids), {name: _tensor(name, value) for name, value in read.items() if name in self._takes}

    def _grid(self, pixels: dict[str, Tensor]) -> Grid | None:
        """Rows and columns of a picture's features; None: positions do not tell them."""
        if not self.kind.grid:
            return None
        _, rows, columns = pixels["image_grid_thw"][0].tolist()
        size = self.config.vision_config.spatial_merge_size
        return rows // size, columns // size

    def _features(self, pixels: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> list[Tensor]:
        """The features (F, D) of pictures, in one pass where their tensors have the same shapes."""
        if not self._weights:
            return [torch.zeros(count, self.width) for count in counts]
        placed = [{name: x.to(self.device) for name, x in own.items()} for own in pixels]
        into: list[Tensor] = []
        handle = self.connector.register_forward_pre_hook(lambda _, args: into.append(args[0]))
        try:
            flat_FD = features_of(self.model, placed)
        finally:
            handle.remove()
        if self.apart:
            flat_FD = torch.cat([x.reshape(-1, x.shape[-1]) for x in into])
        _check_counts(flat_FD, counts)
        return list(torch.split(flat_FD, list(counts)))


def _tensor(name: str, value: Tensor) -> Tensor:
    """Of the processor; masks as such: some classes have numbers there, which would count as sizes."""
    return value.bool() if name in _MASKS else value


def _check_counts(features_FD: Tensor, counts: Sequence[int]) -> None:
    """Check that a model makes as many features of pictures as its processor writes tokens for them.

    Raises:
        ValueError: it does not.
    """
    if len(features_FD) != sum(counts):
        raise ValueError(
            f"the model makes {len(features_FD):,} features of pictures for which its processor writes {sum(counts):,} "
            "tokens: the processor is that of another model"
        )


def make(backbone: Backbone, modality: str, weights: bool, in_step: bool = False) -> OwnEncoder:
    """The encoder of ``backbone.model``.

    Args:
        backbone: that names it.
        modality: of the task, which it must read.
        weights: whether they are loaded; else it is on the ``meta`` device.
        in_step: see ``OwnEncoder``.

    Raises:
        UserError: the model or its processor could not be loaded, it reads another modality, or its connector cannot be
            trained apart.
    """
    kind, config = vision_language.kind_of(backbone)
    if kind.medium.modality != modality:
        raise UserError(
            f"backbone.model: {backbone.model!r} ({config.model_type}) reads {kind.medium.modality}, but the task has "
            f"{modality}; allowed: a task of {kind.medium.modality}, or language_model and encoders"
        )
    processor = vision_language.load_processor(backbone)
    if weights:
        found = OwnEncoder(vision_language.load(backbone), processor, backbone, weights=True, in_step=in_step)
    else:
        with torch.device("meta"):
            found = OwnEncoder(vision_language.empty(backbone), processor, backbone, weights=False, in_step=in_step)
    if in_step:
        found.read_blank()
    return found


class Connector(nn.Module):
    """At a projector's place: the features of an encoder that ends with its connector pass through.

    Args:
        module: the model's connector, which is trained; None: it is part of the encoder.
        rows: features that it reads at once.
    """

    def __init__(self, module: nn.Module | None = None, rows: int = 1) -> None:
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, features_MD: Tensor, lengths: Sequence[int]) -> Tensor:
        """The positions (P, D) of items.

        Args:
            features_MD: features of all items, concatenated.
            lengths: of the items; they sum to M.
        """
        if self.module is None:
            return features_MD
        x_KRD = features_MD.view(-1, self.rows, features_MD.shape[1])
        made: Tensor = self.module(x_KRD)
        return made.flatten(0, 1)


def connector_of(encoders: Mapping[str, Encoder], empty_on: str | None = None) -> Connector | Tower | None:
    """The connector of a vision-language model, to be trained or not; None: each context has a projector of ours.

    Where the tower runs in the step, both.

    Args:
        encoders: by modality.
        empty_on: the device of a copy without values; None: it has those of the model.
    """
    own = next((encoder for encoder in encoders.values() if isinstance(encoder, OwnEncoder)), None)
    if own is None:
        return None
    if own.in_step:
        return copy_of(own.tower(), own.trained, empty_on)
    if not own.apart:
        return Connector()
    module = copy.deepcopy(own.connector, {id(p): p for p in own.connector.parameters()})
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            value = p.detach().float().clone() if empty_on is None else torch.empty(p.shape, device=empty_on)
            part._parameters[name] = nn.Parameter(value)
    return Connector(module, own.rows)
