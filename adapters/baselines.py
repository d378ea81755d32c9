"""What adapters are judged against: no adapter at all (the projector alone is trained), and full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from adapters import base


class NoAdapter(base.AdapterMethod):
    """Trains the projector only (the paper's row "none")."""

    summary = "no adapter: only the projector is trained"
    grouped = False

    def label(self) -> str:
        """``none``."""
        return "none"


class FullConfig(base.Config):
    """Options."""

    embeddings: bool = True  # train the token embeddings and the output layer too; learned positions always are


class Full(base.AdapterMethod):
    """Trains the weights of the language model itself, and the projector.

    Embeddings are what Hugging Face calls the input and output embeddings: the table of tokens and the layer that
    scores the vocabulary, often one tensor. Learned positions (OPT, GPT-2) are none of them: trained in either case.
    """

    summary = "full fine-tuning: the language model's own weights are trained"
    grouped = False
    Config = FullConfig
    config: FullConfig

    def label(self) -> str:
        """``full fine-tuning``, and whether the embeddings stay frozen."""
        return "full fine-tuning" if self.config.embeddings else "full fine-tuning, embeddings frozen"

    def trained(self, language_model: Any) -> Iterable[nn.Parameter]:
        """All parameters, or all but those of the input embeddings and the output layer (often the same tensor)."""
        if self.config.embeddings:
            return list(language_model.parameters())
        ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        frozen = {id(p) for module in ends if module is not None for p in module.parameters()}
        return [p for p in language_model.parameters() if id(p) not in frozen]
