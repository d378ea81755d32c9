"""The projector of a context: maps features of a frozen encoder to the width of the language model.

Shapes: K items, M tokens of all items, concatenated, P positions of the items in the sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness.core.errors import UserError
from harness.experiment.sections import Backbone


class Projector(nn.Module):
    """Dropout and one linear layer (Context-PEFT, arXiv 2312.08900), or two as in LLaVA 1.5 (arXiv 2310.03744).

    Optionally adds learned position embeddings to the projected tokens of an item, and a learned token before and after
    it. The paper lists both as future work.

    Args:
        feature_width: width of the encoder's features.
        width: of the language model.
        options: for the keys ``projector…``.
    """

    def __init__(self, feature_width: int, width: int, options: Backbone) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(options.projector_dropout), nn.Linear(feature_width, width)]
        if options.projector == "mlp":
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers)
        count = options.projector_positions
        # 0.02: the usual standard deviation of token embeddings in pretrained language models.
        self.positions = None if count is None else nn.Parameter(0.02 * torch.randn(count, width))
        self.boundary = nn.Parameter(0.02 * torch.randn(2, width)) if options.projector_boundary_tokens else None

    def forward(self, features_MD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Project items to (P, D). The result depends on every parameter, even without items.

        Args:
            features_MD: features of all items, concatenated.
            lengths: of the K items; they sum to M.

        Raises:
            UserError: an item has more tokens than ``projector_positions``.
        """
        x_MD: Tensor = self.layers(features_MD)
        if self.positions is not None:
            if max(lengths, default=0) > len(self.positions):
                raise UserError(
                    f"backbone.projector_positions: {len(self.positions)} positions, but an input has "
                    f"{max(lengths)} tokens; allowed: {max(lengths)} or more"
                )
            order_M = torch.tensor([i for length in lengths for i in range(length)], dtype=torch.long)
            x_MD = x_MD + self.positions[order_M.to(x_MD.device)]
        if self.boundary is None:
            return x_MD
        begin_1D, end_1D = self.boundary[:1], self.boundary[1:]
        pieces = (
            [piece for x_ND in torch.split(x_MD, list(lengths)) for piece in (begin_1D, x_ND, end_1D)]
            if lengths
            else []
        )
        # The empty slices keep all parameters in the graph of a batch without items, as ZeRO requires.
        return torch.cat([self.boundary[:0], x_MD[:0], *pieces])
