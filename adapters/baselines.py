"""What adapters are judged against: no adapter at all (the projector alone is trained), and full fine-tuning."""

from __future__ import annotations

from adapters import base


class NoAdapter(base.AdapterMethod):
    """Trains the projector only (the paper's row "none")."""

    summary = "no adapter: only the projector is trained"
    grouped = False

    def label(self) -> str:
        """``none``."""
        return "none"


class Full(base.AdapterMethod):
    """Trains every weight of the language model, embeddings included, and the projector."""

    summary = "full fine-tuning: the language model's own weights are trained"
    grouped = False
    trains_language_model = True

    def label(self) -> str:
        """``full fine-tuning``."""
        return "full fine-tuning"
