"""What models with an encoder of their own read beside text: pictures, or recordings.

Shapes: F features, D width, N items of one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tasks.modalities.encoders.recording import SAMPLING_RATE, Recording


@dataclass(frozen=True)
class Medium:
    """A kind of input.

    Attributes:
        modality: registry name of the modality whose decoded items these are; in chat templates the type of a part.
        named: in messages.
        argument: of the processor.
        placeholder: name in the configuration of the id of the token at whose place a feature stands.
        options: of the processor.
        blank: an item without content.
        given: what the processor takes for an item.
        takes: names of what the processor makes of items for the tower, of a model.
        features: of the tower and the connector (F, D), of a model and these by name, of several items joined.
    """

    modality: str
    named: str
    argument: str
    placeholder: str
    options: Mapping[str, Any]
    blank: Callable[[], Any]
    given: Callable[[Any], Any]
    takes: Callable[[Any], list[str]]
    features: Callable[[Any, Mapping[str, Tensor]], Tensor]

    def read(self, processor: Any, items: Sequence[Any], text: str, **options: Any) -> Any:
        """What a processor makes of a text with items."""
        given = {self.argument: [self.given(item) for item in items]}
        return processor(**given, text=[text], **self.options, **options)


def _of_pictures(model: Any, joined: Mapping[str, Tensor]) -> Tensor:
    made = model.get_image_features(**joined)
    # With those that inner layers of the language model add.
    levels = [made.pooler_output, *(getattr(made, "deepstack_features", None) or ())]
    return torch.cat([_flat(level) for level in levels], dim=-1)


def _of_recordings(model: Any, joined: Mapping[str, Tensor]) -> Tensor:
    if model.config.model_type == "qwen2_audio":
        return _of_qwen2_audio(model, joined["input_features"], joined["feature_attention_mask"])
    if model.config.model_type == "granite_speech":
        made = model.get_audio_features(joined["input_features"]).pooler_output
        return _flat(made[joined["input_features_mask"]])
    return _flat(model.get_audio_features(**joined).pooler_output)


def _of_qwen2_audio(model: Any, features_NMS: Tensor, mask_NS: Tensor) -> Tensor:
    """As in ``Qwen2AudioModel.forward``, which has no method for it."""
    from transformers.masking_utils import create_bidirectional_mask

    tower = model.audio_tower
    lengths_N, counts_N = tower._get_feat_extract_output_lengths(mask_NS.sum(-1))
    frames = (features_NMS.shape[-1] - 2) // 2 + 1
    at_S = torch.arange(frames, device=lengths_N.device)
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=features_NMS.new_zeros(len(features_NMS), frames, 1),
        attention_mask=(at_S < lengths_N[:, None]).long(),
    )
    made_NFD = model.multi_modal_projector(tower(features_NMS, attention_mask=mask).last_hidden_state)
    made: Tensor = made_NFD[torch.arange(made_NFD.shape[1], device=counts_N.device) < counts_N[:, None]]
    return made


def _flat(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Features of all items (F, D), of a class that returns them in one tensor or in several."""
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in ([rows] if isinstance(rows, Tensor) else rows)])


def _noise() -> Recording:
    """A second of faint noise: of silence, a spectrogram has no maximum to be scaled by."""
    return Recording(np.random.default_rng(0).normal(0, 1e-3, SAMPLING_RATE).astype(np.float32))


PICTURES = Medium(
    modality="image",
    named="a picture",
    argument="images",
    placeholder="image_token_id",
    options={},
    blank=lambda: Image.new("RGB", (64, 48), "grey"),
    given=lambda item: item,
    takes=lambda model: sorted(inspect.signature(model.get_image_features).parameters),
    features=_of_pictures,
)
RECORDINGS = Medium(
    modality="audio",
    named="a recording",
    argument="audio",
    placeholder="audio_token_id",
    options={"sampling_rate": SAMPLING_RATE},
    blank=_noise,
    given=lambda item: item.samples,
    takes=lambda _: ["feature_attention_mask", "input_features", "input_features_mask"],
    features=_of_recordings,
)
