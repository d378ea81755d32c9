"""Loads language models by name: built in (``builtin/tiny-llama``), a local folder, or a Hugging Face hub id.

Encoders are loaded by their modalities (``tasks/modalities/``); ``check_backbone`` checks both before any compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.core import hub
from harness.core.errors import UserError, did_you_mean
from harness.experiment.sections import Backbone

TINY_LLAMA = "builtin/tiny-llama"


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def bos_id(self) -> int:
        """Token that begins a sequence; for models without a BOS token (Qwen2), their end-of-text token."""
        tokenizer = self.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

    @property
    def eos_id(self) -> int:
        """Token that ends a target."""
        return int(self.tokenizer.eos_token_id)


def load_language_model(backbone: Backbone) -> LanguageModel:
    """Load weights in fp32, in evaluation mode, and the tokenizer.

    Raises:
        UserError: the model could not be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = backbone.pinned_language_model
    place = hub.resolve(name)
    options: dict[str, Any] = {"revision": hub.revision_of(name), "trust_remote_code": backbone.trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(hub.load_error(name, error)) from error
    return LanguageModel(model, tokenizer)


def check_backbone(backbone: Backbone) -> None:
    """Check before any trial starts that each model is available locally or on the hub.

    Raises:
        UserError: a model is not built in, not a folder, and neither in the hub's local cache nor on the hub.
    """
    _check_kind(backbone.language_model)
    # Built-in encoders are checked by their modality: some have no weights, so no folder.
    encoders = [name for name in backbone.encoders.values() if not hub.is_builtin(name)]
    for name in (backbone.pinned_language_model, *encoders):
        hub.check_reachable(name, backbone.trust_remote_code)


def build_empty(backbone: Backbone) -> Any:
    """The language model on the ``meta`` device: shapes without weights.

    Raises:
        UserError: its configuration could not be loaded, or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    name, trust = backbone.pinned_language_model, backbone.trust_remote_code
    _check_kind(name)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(hub.load_config(name, trust), trust_remote_code=trust)
        except ValueError as error:
            raise UserError(f"backbone.language_model: {name!r} is not a causal language model") from error


def _check_kind(name: str) -> None:
    if hub.is_builtin(name) and name != TINY_LLAMA:
        raise UserError(f"backbone: {name!r} is not a built-in language model; {did_you_mean(name, [TINY_LLAMA])}")
