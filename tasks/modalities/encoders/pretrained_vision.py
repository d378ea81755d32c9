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
from PIL import Image
from torch import Tensor, nn

from harness.core import hub
from harness.core.errors import UserError
from tasks.encoder import Encoder


class PretrainedVision(Encoder):
    """A vision tower and its processor, which is read when the first picture comes.

    Features are those after the last layer. The pooler is never used, and many checkpoints lack its weights, so it is
    removed.

    Args:
        model: with or without weights; on the ``meta`` device, ``encode`` tells the shape of features.
        read_processor: reads the model's own image processor.
    """

    items_per_call = 1  # large, so it is as fast, and a file's features depend on no other file

    def __init__(self, model: Any, read_processor: Callable[[], Any]) -> None:
        super().__init__()
        if isinstance(getattr(model, "pooler", None), nn.Module) and any(True for _ in model.pooler.parameters()):
            model.pooler = None
        self.model, self._read_processor = model, read_processor
        self.width = _width(model)
        timm = getattr(model, "timm_model", None)
        self._options = {} if timm is None else {"do_pooling": False}  # the pooled features would be thrown away
        self._channels_last = getattr(timm, "output_fmt", "NCHW") == "NHWC"

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
            features = self.model(pixel_values=pixels_BCHW.to(weight), **self._options).last_hidden_state
            encoded += self._tokens(features)
        return encoded

    def _tokens(self, features: Tensor) -> Tensor:
        """A grid's cells row by row (B, N, D); a sequence as it is."""
        if features.dim() != 4:
            return features
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).transpose(1, 2)


def load(name: str, trust_remote_code: bool) -> PretrainedVision:
    """Load weights and processor, and check that they fit by encoding a grey picture.

    Raises:
        UserError: one of them could not be loaded, they do not fit, weights are missing, or it is not a vision encoder.
    """
    from transformers import AutoModel

    empty(name, trust_remote_code)
    place, revision = hub.resolve(name), hub.revision_of(name)
    try:
        model, report = AutoModel.from_pretrained(
            place,
            revision=revision,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # each library that reads the files has its own
        raise UserError(hub.load_error(name, error)) from error
    tower = _tower(model)
    encoder = PretrainedVision(tower, partial(_processor, name, trust_remote_code)).eval()
    needed = {f"{'' if tower is model else 'vision_model.'}{key}" for key in encoder.model.state_dict()}
    missing = sorted(needed & set(report["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"backbone.encoders: {name!r}: weights are missing: {', '.join(missing[:3])}{more}")
    try:
        (features_ND,) = encoder.encode([Image.new("RGB", (64, 48), "grey")])
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


def empty(name: str, trust_remote_code: bool) -> PretrainedVision:
    """The encoder on the ``meta`` device.

    Raises:
        UserError: there is no such configuration, or it is not a vision encoder's.
    """
    from transformers import AutoModel

    config = copy.deepcopy(hub.load_config(name, trust_remote_code))
    kind = f"backbone.encoders: {name!r} ({config.model_type})"
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration that AutoModel does not know, a missing library
        raise UserError(f"{kind} is not a vision encoder: {' '.join(str(error).split())[:300]}") from error
    tower = _tower(model)
    if tower.main_input_name != "pixel_values":
        raise UserError(f"{kind} is not a vision encoder: it takes {tower.main_input_name}, not pixel_values")
    if getattr(tower.config, "mask_ratio", 0):
        raise UserError(f"{kind} masks random parts of every picture (mask_ratio); use an encoder without masking")
    if not _width(tower):
        raise UserError(f"{kind} is not a vision encoder: its configuration has neither hidden_size nor hidden_sizes")
    return PretrainedVision(tower, partial(_processor, name, trust_remote_code))


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
