"""A vision encoder of random weights, where only its shapes matter."""

from __future__ import annotations

import json
from pathlib import Path

TOKENS = 64  # as Swin V2 gives of a picture of 256 pixels


def vision_64(folder: Path, width: int) -> None:
    """Write an encoder of 64 tokens per picture (SigLIP's class, two layers) as a Hugging Face folder.

    Args:
        folder: to write.
        width: of its features.
    """
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=width // 24,
        image_size=64, patch_size=8,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64}, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
