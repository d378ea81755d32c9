"""Vision encoders of ``transformers`` and ``timm``, by hub id or folder, each with its own image processor.

Timm's are read through the wrapper of ``transformers``: ``timm/resnet50.a1_in1k``, or a folder whose ``config.json``
has ``model_type: timm_wrapper``.

Shapes: B pictures, C channels, H × W pixels, N tokens (class tokens included), D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from harness.core import hub
from harness.core.errors import UserError
from tasks.encoder import Encoder
from tasks.modalities.encoders.layers import DTYPES, dtype_without_weights, features_of, hidden_states_of
from tasks.modalities.encoders.options import ALL_TOKENS, VisionOptions

# What stands before the patches in sequences of transformers' classes, by the names of their embeddings' parameters.
_LEADING = ("class_embedding", "cls_token", "distillation_token", "register_tokens")


class PretrainedVision(Encoder):
    """A vision tower and its processor, which is read when the first picture comes.

    Features are those after the last layer, unless options name another. The pooler is never used, and many checkpoints
    lack its weights, so it is removed.

    Args:
        model: with or without weights; on the ``meta`` device, ``encode`` tells the shape of features.
        read_processor: reads the model's own image processor.
        options: which features are tokens.
    """

    items_per_call = 1  # large, so it is as fast, and a file's features depend on no other file

    def __init__(self, model: Any, read_processor: Callable[[], Any], options: VisionOptions = ALL_TOKENS) -> None:
        super().__init__()
        if isinstance(getattr(model, "pooler", None), nn.Module) and any(True for _ in model.pooler.parameters()):
            model.pooler = None
        self.model, self._read_processor, self.options = model, read_processor, options
        self.width = _width(model)
        timm = getattr(model, "timm_model", None)
        self._arguments = hidden_states_of(options.layer)
        if timm is not None:
            self._arguments |= {"do_pooling": False}  # the pooled features would be thrown away
        # Of inner layers timm returns maps of channels first, whatever is the model's own layout.
        self._channels_last = options.layer is None and getattr(timm, "output_fmt", "NCHW") == "NHWC"

    @cached_property
    def processor(self) -> Any:
        """The image processor of ``transformers``."""
        return self._read_processor()

    @torch.no_grad()
    def encode(self, items: Sequence[Image.Image]) -> list[Tensor]:
        """Features (N, D) of each picture, in the encoder's precision; a convolutional grid is read row by row."""
        # One by one: some processors pad or resize to match the others of the batch.
        pixels = [self.processor(images=item, return_tensors="pt")["pixel_values"] for item in items]
        alike = len({pixels_1CHW.shape for pixels_1CHW in pixels}) == 1
        weight = next(self.model.parameters())
        encoded: list[Tensor] = []
        for pixels_BCHW in [torch.cat(pixels)] if alike else pixels:
            made = self.model(pixel_values=pixels_BCHW.to(weight), **self._arguments)
            encoded += self._tokens(features_of(made, self.options.layer), pixels_BCHW.shape[-2:])
        return encoded

    def _tokens(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """The tokens (B, N, D) of pictures of this size: a map's cells row by row, class tokens before them.

        Raises:
            UserError: there is no class token to leave out, or no map to average.
        """
        if features.dim() == 4:
            x_BDHW = features.permute(0, 3, 1, 2) if self._channels_last else features
            x_BND, leading = x_BDHW.flatten(2).mT, 0
            shape: tuple[int, int] | None = (x_BDHW.shape[2], x_BDHW.shape[3])
        else:
            x_BND, leading = features, self._leading
            shape = grid_shape(x_BND.shape[1] - leading, *size)
        if self.options.select_strategy == "default":
            if not leading:
                raise UserError("select_strategy: found 'default', but there is no class token; allowed: full")
            x_BND, leading = x_BND[:, leading:], 0
        if self.options.grid is None:
            return x_BND
        if shape is None or any(own < wanted for own, wanted in zip(shape, self.options.grid, strict=True)):
            found = "no map of the picture" if shape is None else f"a map of {shape[0]}x{shape[1]}"
            raise UserError(f"pooling: found {self.options.pooling!r}, but there is {found} to average")
        map_BDHW = x_BND[:, leading:].mT.reshape(len(x_BND), -1, *shape)
        return torch.cat([x_BND[:, :leading], F.adaptive_avg_pool2d(map_BDHW, self.options.grid).flatten(2).mT], dim=1)

    @property
    def _leading(self) -> int:
        """Tokens that are not of the picture's map, and stand before it: the class token, registers."""
        if (timm := getattr(self.model, "timm_model", None)) is not None:
            return int(getattr(timm, "num_prefix_tokens", 0))
        own = getattr(self.model, "embeddings", None)
        found = dict(own.named_parameters(recurse=False)) if isinstance(own, nn.Module) else {}
        return sum(found[name].shape[-2] if found[name].dim() > 1 else 1 for name in _LEADING if name in found)


def load(name: str, trust_remote_code: bool, options: VisionOptions = ALL_TOKENS) -> PretrainedVision:
    """Load weights and processor, and check that they fit by encoding a grey picture.

    Raises:
        UserError: one of them could not be loaded, they do not fit, weights are missing, it is not a vision encoder, or
            it has not the features that the options name.
    """
    from transformers import AutoModel

    width = empty(name, trust_remote_code, options).width
    place, revision = hub.resolve(name), hub.revision_of(name)
    try:
        model, report = AutoModel.from_pretrained(
            place,
            revision=revision,
            dtype=DTYPES[options.dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # each library that reads the files has its own
        raise UserError(hub.load_error(name, error)) from error
    tower = _tower(model)
    encoder = PretrainedVision(tower, partial(_processor, name, trust_remote_code), options).eval()
    encoder.width = width
    needed = {f"{'' if tower is model else 'vision_model.'}{key}" for key in encoder.model.state_dict()}
    missing = sorted(needed & set(report["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"backbone.encoders: {name!r}: weights are missing: {', '.join(missing[:3])}{more}")
    try:
        (features_ND,) = encoder.encode([_grey()])
    except UserError:
        raise
    except Exception as error:  # models raise anything for pixels they do not expect
        reason = " ".join(str(error).split())
        raise UserError(
            f"backbone.encoders: {name!r}: model and image processor do not work together: {reason}"
        ) from error
    if features_ND.dim() != 2 or features_ND.shape[1] != encoder.width:
        found = tuple(features_ND.shape)
        raise UserError(f"backbone.encoders: {name!r}: features of shape {found}; needed: (tokens, {encoder.width})")
    return encoder


def empty(name: str, trust_remote_code: bool, options: VisionOptions = ALL_TOKENS) -> PretrainedVision:
    """The encoder on the ``meta`` device.

    Raises:
        UserError: there is no such configuration, it is not a vision encoder's, or it has not the features that the
            options name.
    """
    from transformers import AutoModel

    config = copy.deepcopy(hub.load_config(name, trust_remote_code))
    kind = f"backbone.encoders: {name!r} ({config.model_type})"
    try:
        with torch.device("meta"):
            dtype = dtype_without_weights(options, config)
            model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration that AutoModel does not know, a missing library
        raise UserError(f"{kind} is not a vision encoder: {' '.join(str(error).split())[:300]}") from error
    tower = _tower(model)
    if tower.main_input_name != "pixel_values":
        raise UserError(f"{kind} is not a vision encoder: it takes {tower.main_input_name}, not pixel_values")
    if getattr(tower.config, "mask_ratio", 0):
        raise UserError(f"{kind} masks random parts of every picture (mask_ratio); use an encoder without masking")
    if not _width(tower):
        raise UserError(f"{kind} is not a vision encoder: its configuration has neither hidden_size nor hidden_sizes")
    encoder = PretrainedVision(tower, partial(_processor, name, trust_remote_code), options)
    if options.model_copy(update={"dtype": ALL_TOKENS.dtype}) == ALL_TOKENS:
        return encoder
    try:
        encoder.width = encoder.eval().encode([_grey()])[0].shape[1]
    except UserError:
        raise
    except Exception as error:  # a class that cannot tell its shapes, or has no inner layers
        raise UserError(f"{kind} does not return such features: {' '.join(str(error).split())[:300]}") from error
    return encoder


def grid_shape(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square patches of a picture; None: so many tokens are no such grid."""
    rows = round(max(tokens, 0) ** 0.5 * (height / width) ** 0.5)
    if rows and tokens % rows == 0 and tokens // rows * height == rows * width:
        return rows, tokens // rows
    return None


def _grey() -> Image.Image:
    return Image.new("RGB", (64, 48), "grey")


def _processor(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            hub.resolve(name), revision=hub.revision_of(name), backend="pil", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each library that reads the files has its own
        raise UserError(hub.load_error(name, error)) from error


def _width(model: Any) -> int:
    """D of the last layer (a convolutional network has one width for each stage); 0: not in the configuration."""
    if (timm := getattr(model, "timm_model", None)) is not None:
        return int(timm.num_features)
    config = model.config
    stages = getattr(config, "hidden_sizes", None) or [0]
    return int(getattr(config, "hidden_size", None) or stages[-1])


def _tower(model: Any) -> Any:
    """The image half of a two-tower model (CLIP, SigLIP); any other model unchanged."""
    return getattr(model, "vision_model", model)
