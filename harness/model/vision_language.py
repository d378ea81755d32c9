"""Vision- and audio-language models as backbones: which classes are right here, and which module is the language model.

Such a model is a tower, a connector, and a decoder over embeddings. The decoder becomes the language model of a
trial (``Decoder``), the tower its encoder (``harness/model/own_encoder.py``). The logits of a row are those of the
class's own ``forward`` on what its processor makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from harness.core import hub
from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model.decoder import BothWays, Decoder
from harness.model.media import PICTURES, RECORDINGS, Medium

DTYPES: Mapping[str | None, Any] = {  # of the key backbone.dtype
    None: torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "auto": "auto",
}


@dataclass(frozen=True)
class Kind:
    """A class of vision- or audio-language models.

    Attributes:
        medium: what it reads.
        longest_s: of recordings that read whole, seconds, by its processor; None: all.
        connector: its module that maps features of the tower to the width of the language model.
        rows: features of the tower that the connector reads at once, by the configuration; None: what the class does
            with them depends on more than these, so the connector cannot be trained apart.
        tokens: what it makes of them.
        width: of each of them.
        grid: whether positions tell where a feature is in its picture (``harness/model/grid_positions.py``).
        place: attribute of the processor: the text at whose place it writes an item.
        feature_id: attribute of the processor: the id of the token at whose place a feature is; None: as of the medium.
        ends: attributes of the processor: the ids of the first and the last token of an item; None: an item is all
            that the processor writes for it.
        around: texts that the processor writes before and after these, which are tokenised with what is beside them.
        completed: of a text, with marks at the places of items, what the processor makes of it before it is tokenised.
        both_ways: what sees itself as a whole, also positions that follow.
        cap: beyond which the class lets no logit be, by the configuration; None: it does not change them.
        levels: how many further features of each position layers of the language model add to their outputs (DeepStack,
            arXiv 2406.04334), by the configuration.
    """

    connector: str = "multi_modal_projector"
    rows: Callable[[Any], int] | None = None
    tokens: Callable[[Any], int] = lambda _: 1
    width: Callable[[Any], int] = lambda config: int(config.vision_config.hidden_size)
    grid: bool = False
    place: str = "image_token"
    feature_id: str | None = None
    ends: tuple[str, str] | None = None
    around: Callable[[Any], tuple[str, str]] = lambda _: ("", "")
    completed: Callable[[Any, str, str], str] = lambda _, text, __: text
    both_ways: Literal["images", "prompts"] | None = None
    cap: Callable[[Any], float | None] = lambda _: None
    levels: Callable[[Any], int] = lambda _: 0
    medium: Medium = PICTURES
    longest_s: Callable[[Any], float] | None = None

    def item_in(self, processor: Any, ids: Sequence[int]) -> list[int]:
        """The tokens of an item, of those that a processor writes for it alone."""
        if self.ends is None:
            return list(ids)
        first, last = (_attribute(processor, name) for name in self.ends)
        return list(ids[ids.index(first) : len(ids) - list(reversed(ids)).index(last)])


def _attribute(processor: Any, path: str) -> Any:
    found = processor
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _one(_config: Any) -> int:
    return 1


def _patches(config: Any) -> int:
    """Patches of a tile."""
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)


def _width_of_layers(config: Any) -> int:
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))


def _width_of_square(config: Any) -> int:
    """Of the patches that are put together to one."""
    return int(config.vision_config.hidden_size) * int(1 / config.downsample_ratio) ** 2


def _prefix(processor: Any, text: str, mark: str) -> str:
    """Of PaliGemma: the start token after the last picture, and a line break at the end."""
    pictures, last, rest = text.rpartition(mark)
    return f"{pictures}{last}{processor.tokenizer.bos_token}{rest}\n"


def _lines_around(processor: Any) -> tuple[str, str]:
    """Of Gemma 3: line breaks around the marks of an image."""
    before, _, rest = processor.full_image_sequence.partition(processor.boi_token)
    return before, rest.rpartition(processor.tokenizer.eoi_token)[2]


_IDEFICS = Kind("connector", _patches, lambda config: _patches(config) // config.scale_factor**2)
_HEARS = Kind(place="audio_token", medium=RECORDINGS)
_VIDEO = "video_processor"
# transformers' model_type → how it is read. Each is compared with its class's own forward in
# tests/model/test_vision_language.py.
KINDS: Mapping[str, Kind] = {
    "llava": Kind(rows=_one, width=_width_of_layers),
    "llava_next": Kind(),
    "llava_onevision": Kind(),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": Kind(rows=_one, width=_width_of_square),
    "mistral3": Kind(),
    "gemma3": Kind(
        rows=_patches,
        tokens=lambda config: int(config.mm_tokens_per_image),
        feature_id="tokenizer.image_token_id",
        ends=("tokenizer.boi_token_id", "tokenizer.eoi_token_id"),
        around=_lines_around,
        both_ways="images",
    ),
    "paligemma": Kind(
        rows=_one,
        ends=("image_token_id", "image_token_id"),
        completed=_prefix,
        both_ways="prompts",
        cap=lambda config: getattr(config.text_config, "final_logit_softcapping", None),
    ),
    "qwen2_vl": Kind("visual.merger", grid=True),
    "qwen2_5_vl": Kind("visual.merger", grid=True),
    "qwen3_vl": Kind(
        "visual.merger", grid=True, levels=lambda config: len(config.vision_config.deepstack_visual_indexes)
    ),
    # Its spectrograms have the length of Whisper's, and what is longer is cut.
    "qwen2_audio": replace(_HEARS, longest_s=lambda processor: processor.feature_extractor.chunk_length),
    "granite_speech": replace(_HEARS, connector="projector"),
    "glmasr": replace(_HEARS, longest_s=lambda processor: processor.max_audio_len),
    "audioflamingo3": replace(_HEARS, longest_s=lambda processor: processor.max_audio_len),
}
# model_type → why its rows would be others than those of its class.
REFUSED: Mapping[str, str] = {
    "voxtral": "its processor reads recordings only as mistral-common arranges them",
}


def kind_of(backbone: Backbone) -> tuple[Kind, Any]:
    """The class of ``backbone.model``, and its configuration.

    Raises:
        UserError: it cannot be loaded, is neither a vision- nor an audio-language model, or of a class that would not
            be exact.
    """
    name = backbone.pinned_language_model
    config = hub.load_config(name, backbone.trust_remote_code)
    if getattr(config, "has_lora_adapter", False):  # Granite Speech 3
        raise UserError(
            f"backbone.model: {name!r} has a LoRA adapter of its own for recordings, which would be trained or lost; "
            "allowed: a model whose config.json has has_lora_adapter: false"
        )
    if kind := KINDS.get(config.model_type):
        return kind, config
    from transformers.models.auto import modeling_auto

    found = f"backbone.model: {name!r} is of the class {config.model_type!r}"
    allowed = f"allowed: {', '.join(sorted(KINDS))}"
    if reason := REFUSED.get(config.model_type):
        raise UserError(f"{found}: {reason}; {allowed}")
    known = (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    reads = any(hasattr(config, name) for name in ("vision_config", "audio_config", "encoder_config"))
    if any(config.model_type in names for names in known) and reads:
        raise UserError(f"{found}, whose rows were never compared with its own forward; {allowed}")
    raise UserError(
        f"{found}, which is no vision- or audio-language model; {allowed}; a language model is backbone.language_model"
    )


def _class_of(config: Any) -> Any:
    """The class of transformers that makes a model of a configuration."""
    import transformers

    known = type(config) in transformers.AutoModelForMultimodalLM._model_mapping
    return transformers.AutoModelForMultimodalLM if known else transformers.AutoModelForSeq2SeqLM


def load(backbone: Backbone, **options: Any) -> Any:
    """The whole model with its weights, in evaluation mode.

    Args:
        backbone: that names it.
        options: of ``from_pretrained``, for its quantisation.

    Raises:
        UserError: it could not be loaded, or its weights are those of other shapes.
    """
    _, config = kind_of(backbone)
    name = backbone.pinned_language_model
    try:
        model, report = _class_of(config).from_pretrained(
            hub.resolve(name),
            revision=hub.revision_of(name),
            trust_remote_code=backbone.trust_remote_code,
            dtype=DTYPES[backbone.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(hub.load_error(name, error)) from error
    if others := sorted(report["mismatched_keys"]):
        key, found, wanted = others[0]
        raise UserError(
            f"backbone.model: {name!r}: {key} has the shape {tuple(found)} in its weights, but {tuple(wanted)} by its "
            f"config.json ({len(others)} tensors differ); allowed: weights and config.json of one model"
        )
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"backbone.model: {name!r}: weights are missing: {', '.join(missing[:3])}{more}")
    return model.eval()


def empty(backbone: Backbone) -> Any:
    """The whole model without weights, on the device of the context, where tensors may have no values.

    Raises:
        UserError: as in ``kind_of``, or its configuration does not fit its class.
    """
    from transformers.initialization import no_init_weights

    _, known = kind_of(backbone)
    config = copy.deepcopy(known)  # a model keeps it, and adapters may change it
    wanted = DTYPES[backbone.dtype]
    dtype = (config.dtype or torch.float32) if wanted == "auto" else wanted
    try:
        with no_init_weights():  # SigLIP's looks at values
            model = _class_of(config).from_config(config, dtype=dtype, trust_remote_code=backbone.trust_remote_code)
        model.tie_weights()
        return model.eval()
    except (ValueError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"backbone.model: {backbone.pinned_language_model!r}: {reason}") from error


def load_processor(backbone: Backbone) -> Any:
    """The model's processor, whose pictures are read by Pillow.

    Raises:
        UserError: it could not be loaded, or it names no token that stands for an item.
    """
    from transformers import AutoProcessor, PreTrainedTokenizerFast

    kind, config = kind_of(backbone)
    name = backbone.pinned_language_model
    options: dict[str, Any] = {
        "revision": hub.revision_of(name),
        "trust_remote_code": backbone.trust_remote_code,
        "backend": "pil",
    }
    try:
        own = _of_pictures(hub.resolve(name), config.model_type, options["revision"]) or AutoProcessor
        found = own.from_pretrained(hub.resolve(name), **options)
    except ImportError as error:
        raise UserError(f"backbone.model: {name!r}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # each processor has its own, for a file that is missing
        raise UserError(
            f"backbone.model: {name!r}: its processor could not be loaded: {' '.join(str(error).split())[:300]}; "
            "allowed: the processor that the model was published with"
        ) from error
    written, what = item_token(found, kind), kind.medium.modality
    if written is None:
        raise UserError(
            f"backbone.model: {name!r}: its processor ({type(found).__name__}) has no {what} token; allowed: the "
            "processor that the model was published with"
        )
    if written != (wanted := getattr(config, kind.medium.placeholder)):
        raise UserError(
            f"backbone.model: {name!r}: its processor writes token {written} for {kind.medium.named}, and its "
            f"config.json names {wanted}; allowed: the processor that the model was published with"
        )
    if not isinstance(found.tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"backbone.model: {name!r}: its tokenizer ({type(found.tokenizer).__name__}) does not say from where in a "
            "text a token is; allowed: a fast tokenizer (tokenizer.json)"
        )
    return found


def item_token(processor: Any, kind: Kind) -> int | None:
    """The id of the token that a processor writes once for each feature; None: it has none.

    Args:
        processor: of a model.
        kind: of the model.
    """
    own = _attribute(processor, kind.feature_id or kind.medium.placeholder)
    place = getattr(processor, kind.place, None)
    if not isinstance(place, str) or isinstance(own, int):
        return own if isinstance(place, str) else None
    found: int | None = processor.tokenizer.get_vocab().get(place)
    return found


class _NoVideo(dict[str, Any]):
    """At the place of a video processor; SmolVLM's chat template asks for its attributes."""

    num_frames = fps = None


def _of_pictures(place: str, model_type: str, revision: str) -> Any:
    """The class of a processor of pictures and videos, without the videos; None: it has none of these.

    Videos are read by torchvision, whose builds for CPUs are in no index that pip asks by itself.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
    from transformers.processing_utils import ProcessorMixin

    try:
        named = ProcessorMixin.get_processor_dict(place, revision=revision)[0].get("processor_class")
    except OSError:  # older models have no processor_config.json
        named = None
    kind = processor_class_from_name(named or PROCESSOR_MAPPING_NAMES.get(model_type))
    if kind is None or _VIDEO not in getattr(kind, "get_attributes", list)():
        return None

    own = kind.get_attributes()
    reads: Any = type(
        kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: [a for a in own if a != _VIDEO])}
    )

    def arguments(_: Any, *args: Any, **options: Any) -> list[Any]:
        found: list[Any] = reads._get_arguments_from_pretrained(*args, **options)
        found.insert(own.index(_VIDEO), _NoVideo())
        return found

    def check(self: Any, name: str, value: Any) -> Any:
        return None if name == _VIDEO else kind.check_argument_for_proper_class(self, name, value)

    changed = {"_get_arguments_from_pretrained": classmethod(arguments), "check_argument_for_proper_class": check}
    return type(kind.__name__, (kind,), changed)


def decoder_of(model: Any) -> Any:
    """The language model of a vision-language model, with the names of its layers in a plain causal LM.

    It shares the modules of the model, which is left as it is.
    """
    from transformers import GenerationMixin, PreTrainedModel

    text = model.get_decoder()
    own = next(kind for kind in type(text).__mro__ if PreTrainedModel in kind.__bases__)
    known = KINDS.get(model.config.model_type, Kind())
    base = BothWays if known.both_ways else Decoder
    kind = type(f"{type(model).__name__}Decoder", (base, own, GenerationMixin), {})
    decoder = kind(text, model.get_output_embeddings(), known.levels(model.config))
    if known.both_ways:
        decoder.both_ways, decoder.masks_of_class = known.both_ways, type(model).create_masks_for_generate
        decoder.cap = known.cap(model.config)
    with suppress(AttributeError):
        decoder.generation_config = model.generation_config
    return decoder.eval()
