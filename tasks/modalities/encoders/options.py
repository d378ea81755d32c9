"""What an experiment may say of a pretrained encoder beside its name: which features are its tokens, and its dtype.

Imports no torch: an experiment is planned without it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tasks.base import Config


class EncoderOptions(Config):
    """Of any pretrained encoder."""

    # An index of the ``hidden_states`` that its class returns, as ``vision_feature_layer`` of LLaVA; None: what the
    # class calls ``last_hidden_state``, which many classes normalise once more.
    layer: int | None = None
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"  # of weights and features; auto: that of its checkpoint


class VisionOptions(EncoderOptions):
    """Of a vision encoder."""

    # As ``vision_feature_select_strategy`` of LLaVA. full: all tokens; default: without class token and registers.
    select_strategy: Literal["full", "default"] = "full"
    # Rows x columns: the map is averaged to so many tokens; None: all of it.
    pooling: Annotated[str, Field(pattern=r"^[1-9]\d{0,2}x[1-9]\d{0,2}$")] | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of what is left of the map; None: all of it."""
        if self.pooling is None:
            return None
        rows, columns = self.pooling.split("x")
        return int(rows), int(columns)


LAST_LAYER, ALL_TOKENS = EncoderOptions(), VisionOptions()
