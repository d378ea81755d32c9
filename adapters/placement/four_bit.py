"""4-bit layers of bitsandbytes on a CPU keep a form of their weights that gradients pass through.

On CPUs with AVX512-BF16 they repack their weights in the first evaluation without gradients, for good; from then on
they call an operator without a backward (bitsandbytes 0.50): their input gets no gradient, and torch only warns.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.core.errors import UserError


class FourBit:
    """The 4-bit layers of a model, which are not repacked as long as adapters train through them.

    Args:
        language_model: of any kind; without such layers nothing happens.

    Raises:
        UserError: a layer is repacked already.
    """

    def __init__(self, language_model: nn.Module) -> None:
        self._layers: list[Any] = []
        for path, layer in language_model.named_modules():
            if not getattr(layer, "support_avx512bf16_for_cpu", False):
                continue
            weight: Any = getattr(layer, "weight", None)
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                self.undo()
                raise UserError(
                    f"layer {path}: bitsandbytes has repacked its 4-bit weights in an evaluation on this CPU, and "
                    "gradients through them would be wrong; load the model again and adapt it before it is evaluated"
                )
            vars(layer)["support_avx512bf16_for_cpu"] = False
            self._layers.append(layer)

    def undo(self) -> None:
        """Let bitsandbytes do as it likes again."""
        while self._layers:
            vars(self._layers.pop())["support_avx512bf16_for_cpu"] = True
