"""Loads language models by name: built in (``builtin/tiny-llama``), a local folder, or a Hugging Face hub id.

Encoders are loaded by their modalities (``tasks/modalities/``); ``check_backbone`` checks both before any compute.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.core import hub
from harness.core.errors import UserError, did_you_mean
from harness.experiment.sections import Backbone
from harness.model import vision_language
from harness.model.components import errors_at
from harness.model.quantisation import (
    GGUF,
    PACKED,
    check_checkpoint,
    check_libraries,
    check_not_quantised,
    gguf_file,
    loading_options,
    outside,
    pack,
    pack_empty,
)
from harness.model.vision_language import DTYPES

TINY_LLAMA = "builtin/tiny-llama"


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with its tokenizer; of a vision-language model also its processor."""

    model: Any
    tokenizer: Any
    tokens: dict[str, list[int]] = field(default_factory=dict)  # ids of texts that have been tokenised
    processor: Any = None

    @property
    def max_positions(self) -> int | None:
        """See ``max_positions``."""
        return max_positions(self.model)

    @property
    def eos_id(self) -> int:
        """Token that ends a target."""
        return int(self.tokenizer.eos_token_id)


def load_language_model(backbone: Backbone) -> LanguageModel:
    """Load weights in the dtype that is asked for, in evaluation mode, and the tokenizer.

    The weights are read where they lie, so that the process never holds them twice.

    Raises:
        UserError: the model could not be loaded.
    """
    from transformers import AutoModelForCausalLM

    if backbone.model is not None:
        return with_processor(_load_decoder(backbone), backbone)
    name, quantised = backbone.pinned_language_model, loading_options(backbone)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            hub.resolve(name), dtype=DTYPES[backbone.dtype], **quantised, **_options(backbone)
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(hub.load_error(name, error)) from error
    return LanguageModel(pack(model) if backbone.quantization in PACKED else model, load_tokenizer(backbone))


def _load_decoder(backbone: Backbone) -> Any:
    """The language model of a vision-language model, whose tower and connector are never quantised.

    Raises:
        UserError: the model could not be loaded.
    """
    if backbone.quantization is None:
        return vision_language.decoder_of(vision_language.load(backbone))
    with torch.device("meta"):
        empty = vision_language.empty(backbone)
    options = loading_options(backbone, outside(empty.get_decoder(), empty))
    return vision_language.decoder_of(pack(vision_language.load(backbone, **options)))


def with_processor(model: Any, backbone: Backbone) -> LanguageModel:
    """A language model, with weights or without, with its tokenizer or its processor.

    Raises:
        UserError: one of these could not be loaded.
    """
    if backbone.model is None:
        return LanguageModel(model, load_tokenizer(backbone))
    processor = vision_language.load_processor(backbone)
    return LanguageModel(model, processor.tokenizer, processor=processor)


def load_tokenizer(backbone: Backbone) -> Any:
    """Load the tokenizer; a missing ``eos_token`` is that of the generation configuration or the configuration.

    Raises:
        UserError: it could not be loaded, or nothing names an end-of-text token.
    """
    from transformers import AutoTokenizer

    name = backbone.pinned_language_model
    if backbone.model is not None:
        return vision_language.load_processor(backbone).tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub.resolve(name), **_in_gguf(backbone), **_options(backbone))
    except (OSError, ValueError) as error:
        raise UserError(hub.load_error(name, error)) from error
    if tokenizer.eos_token_id is None:
        for kind in ("bos", "eos"):
            token = _special_token(backbone, tokenizer, f"{kind}_token_id")
            if token is not None and getattr(tokenizer, f"{kind}_token") is None:
                tokenizer.add_special_tokens({f"{kind}_token": token})  # so that it is left out when decoding
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"backbone.language_model: {name!r}: neither its tokenizer nor its config.json or generation_config.json "
            "names an eos token, which ends every target; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _special_token(backbone: Backbone, tokenizer: Any, key: str) -> str | None:
    """A token by its id in the generation configuration, else in the configuration; of several ids, the first."""
    from transformers import GenerationConfig

    name, found = backbone.pinned_language_model, []
    with suppress(OSError, ValueError):
        found.append(GenerationConfig.from_pretrained(hub.resolve(name), revision=hub.revision_of(name)))
    found.append(_config(backbone))
    for config in found:
        ids = getattr(config, key, None)
        first = ids[0] if isinstance(ids, list | tuple) and ids else ids
        if isinstance(first, int) and 0 <= first < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(first)
            return None if token is None else str(token)
    return None


def _options(backbone: Backbone) -> dict[str, Any]:
    revision = hub.revision_of(backbone.pinned_language_model)
    return {"revision": revision, "trust_remote_code": backbone.trust_remote_code}


def _in_gguf(backbone: Backbone) -> dict[str, str]:
    """The argument that names a GGUF file, where there is one."""
    file = gguf_file(backbone)
    return {} if file is None else {"gguf_file": file}


def _config(backbone: Backbone) -> Any:
    """The configuration of the language model.

    Raises:
        UserError: it could not be loaded.
    """
    return hub.load_config(backbone.pinned_language_model, backbone.trust_remote_code, gguf_file(backbone))


def max_positions(model: Any) -> int | None:
    """How many positions a language model has; None if it has no fixed number (rotary, ALiBi, recurrent, …).

    Learned and tabulated positions end: one more is an index error. Rotary ones do not.
    """
    config, kinds = model.config, {type(module).__name__ for module in model.modules()}
    if any("Rotary" in kind or "Sinusoidal" in kind for kind in kinds) or getattr(config, "alibi", False):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def check_backbone(backbone: Backbone) -> None:
    """Check before any trial starts that each model is available locally or on the hub.

    Raises:
        UserError: a model is not built in, not a folder, and neither in the hub's local cache nor on the hub.
    """
    _check_kind(backbone.language_model)
    if backbone.quantization is not None:
        check_libraries(backbone.quantization)
    check_checkpoint(backbone)
    # Built-in encoders are checked by their modality: some have no weights, so no folder.
    encoders = {
        f"encoders.{m}": name
        for m, name in backbone.encoders.items()
        if not hub.is_builtin(name) and m not in backbone.encoder_plugins
    }
    models = {"language_model": backbone.pinned_language_model, **encoders}
    if backbone.model is not None:
        models = {"model": backbone.pinned_language_model}
    for key, name in models.items():
        if key != "language_model" or backbone.quantization != GGUF:
            with errors_at(key):
                hub.check_reachable(name, backbone.trust_remote_code)
    check_not_quantised(backbone)


def build_empty(backbone: Backbone, device: str = "meta") -> Any:
    """The language model without its weights.

    Args:
        backbone: that names it.
        device: ``meta`` for shapes alone.

    Raises:
        UserError: its configuration could not be loaded, or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    name, trust = backbone.pinned_language_model, backbone.trust_remote_code
    _check_kind(name)
    with torch.device(device):
        if backbone.model is not None:
            whole = vision_language.empty(backbone)
            if backbone.quantization in PACKED:
                pack_empty(whole, backbone.quantization, outside(whole.get_decoder(), whole))
            return vision_language.decoder_of(whole)
        with errors_at("language_model"):
            config = copy.deepcopy(_config(backbone))  # a model keeps it, and adapters may change it
        wanted = DTYPES[backbone.dtype]
        dtype = (config.dtype or torch.float32) if wanted == "auto" else wanted
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
        except ValueError as error:
            raise UserError(f"backbone.language_model: {name!r} is not a causal language model") from error
    return pack_empty(model, backbone.quantization) if backbone.quantization in PACKED else model


def _check_kind(name: str) -> None:
    if hub.is_builtin(name) and name != TINY_LLAMA:
        raise UserError(f"backbone: {name!r} is not a built-in language model; {did_you_mean(name, [TINY_LLAMA])}")
