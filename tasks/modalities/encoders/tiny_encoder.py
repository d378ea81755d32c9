"""Base class of the built-in encoders: a configuration of three numbers, saved with the weights in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file

from harness.core.errors import UserError
from tasks.encoder import Encoder

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


class TinyEncoder(Encoder):
    """A small encoder that this project trains."""

    model_type: ClassVar[str]

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.config = {"model_type": self.model_type, "width": width, "layers": layers, "heads": heads}

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path, weights: bool = True) -> Self:
        """Load what ``save`` wrote, in evaluation mode; without its weights, on the ``meta`` device.

        Raises:
            UserError: a file is missing, belongs to another model, or its weights do not fit its configuration.
        """
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            kind = config.pop("model_type")
            if kind != cls.model_type:
                raise UserError(f"{folder / _CONFIG}: model_type is {kind!r}; allowed: {cls.model_type}")
            if not weights:
                with torch.device("meta"):
                    return cls(**config).eval()
            encoder = cls(**config)
            encoder.load_state_dict(load_file(folder / _WEIGHTS), strict=True)
        except UserError:
            raise
        except Exception as error:  # each library has its own exceptions for broken files
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder}: not a {cls.__name__} encoder as `harness backbones build` makes it: {reason}"
            ) from error
        return encoder.eval()
