"""The parameter counts of the paper's table 3."""

from __future__ import annotations

import pytest

from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig

PAPER_LAYER = {
    "q": (768, 768),
    "k": (768, 768),
    "v": (768, 768),
    "o": (768, 768),
    "up": (768, 6144),
    "down": (3072, 768),
}
TABLE_3 = [
    (IA3(IA3Config()), 55_296, 110_592),
    (BitFit(BitFitConfig()), 119_808, 239_616),
    (LoRA(LoRAConfig(rank=1)), 202_752, 405_504),
    (LoRA(LoRAConfig(rank=8)), 1_622_016, 3_244_032),
    (LoRA(LoRAConfig(rank=64)), 12_976_128, 25_952_256),
]
each_row = pytest.mark.parametrize(
    ("method", "agnostic", "specific"), TABLE_3, ids=lambda x: getattr(x, "label", str)()
)
