"""Baselines: no adapter (only the projector is trained) and full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from adapters import base


class NoAdapter(base.AdapterMethod):
    """Trains the projector only ("none" in Context-PEFT, arXiv 2312.08900)."""

    summary = "no adapter: only the projector is trained"
    grouped = False

    def label(self) -> str:
        """``none``."""
        return "none"


class FullConfig(base.Config):
    """Options."""

    embeddings: bool = True  # also train token embeddings and output layer; learned positions are always trained


class Full(base.AdapterMethod):
    """Trains the language model's own weights, and the projector.

    Embeddings are Hugging Face's input and output embeddings: the token table and the layer that scores the vocabulary,
    often one tied tensor. Learned positions (OPT, GPT-2) do not count as embeddings: they are always trained.
    """

    summary = "full fine-tuning: the language model's own weights are trained"
    grouped = False
    Config = FullConfig
    config: FullConfig

    def label(self) -> str:
        """``full fine-tuning``, plus a note if the embeddings stay frozen."""
        return "full fine-tuning" if self.config.embeddings else "full fine-tuning, embeddings frozen"

    def trained(self, language_model: Any) -> Iterable[nn.Parameter]:
        """All parameters, or all except those of input embeddings and output layer (often the same tensor)."""
        if self.config.embeddings:
            return list(language_model.parameters())
        ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        frozen = {id(p) for module in ends if module is not None for p in module.parameters()}
        return [p for p in language_model.parameters() if id(p) not in frozen]
