"""Baselines: no adapter (only the projector is trained) and full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from adapters import base
from adapters.placement.parts import parameters_of_part


class NoAdapter(base.AdapterMethod):
    """Trains the projector only ("none" in Context-PEFT, arXiv 2312.08900)."""

    summary = "no adapter: only the projector is trained"
    grouped = False

    def label(self) -> str:
        """``none``."""
        return "none"


class FullConfig(base.Config):
    """Options."""

    later: ClassVar = frozenset({"parts"})
    embeddings: bool = True  # also train token embeddings and output layer; learned positions are always trained
    # Of a vision- or audio-language model those that are trained; None: in an experiment language, in harness.adapt
    # the whole model.
    parts: Annotated[tuple[Literal["language", "vision", "audio", "connector"], ...], Field(min_length=1)] | None = None


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
        """``full fine-tuning``, plus the parts where they are named, and a note if the embeddings stay frozen."""
        return f"full fine-tuning{self._which()}"

    def _which(self) -> str:
        of = "" if self.config.parts is None else f" of {', '.join(self.config.parts)}"
        return of if self.config.embeddings else f"{of}, embeddings frozen"

    def reaches(self) -> frozenset[str]:
        """The parts that are named."""
        return frozenset(self.config.parts or ("language",))

    def trained(self, language_model: Any) -> Iterable[nn.Parameter]:
        """All parameters, or those of the named parts; without ``embeddings`` not those of input embeddings and output
        layer (often the same tensor).

        Raises:
            UserError: the model has no such part.
        """
        parts = self.config.parts
        if parts is None:
            own = list(language_model.parameters())
        else:
            own = [p for part in dict.fromkeys(parts) for p in parameters_of_part(language_model, part)]
        if self.config.embeddings:
            return own
        ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        frozen = {id(p) for module in ends if module is not None for p in module.parameters()}
        return [p for p in own if id(p) not in frozen]
