"""Language models and encoders by name: built in (``builtin/tiny-llama``), a local folder, or a Hugging Face hub id.

Every one of them comes through the same functions; ``check_backbone`` tells before any compute whether it can be had.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError, did_you_mean
from harness.experiment import Backbone
from harness.tiny_vision import TinyVision

PRETRAINED = Path(__file__).parent / "pretrained"
TINY_VISION = "builtin/tiny-vision"
BUILTIN = {"language model": ("builtin/tiny-llama",), "encoder": (TINY_VISION,)}
HUB_TIMEOUT_S = 10.0


class HubUnreachableError(UserError):
    """A model that is not here and that the hub, which cannot be asked now, may have."""


# Configurations of hub models that `harness plan` must be able to count offline, as published on the hub.
KNOWN_CONFIGS = Path(__file__).parent / "known_configs.json"


def _builtin(name: str) -> Path:
    return PRETRAINED / name.removeprefix("builtin/")


def _is_builtin(name: str) -> bool:
    return name.startswith("builtin/")


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def bos_id(self) -> int:
        """Token that opens a sequence; models without one (Qwen2) open with their end-of-text token."""
        tokenizer = self.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

    @property
    def eos_id(self) -> int:
        """Token that ends a target."""
        return int(self.tokenizer.eos_token_id)


class Encoder(nn.Module):
    """A frozen encoder with its own preprocessing: decoded items → input tensor → features (B, N, width)."""

    def __init__(self, model: nn.Module, width: int, processor: Any = None) -> None:
        super().__init__()
        self.model, self.width, self.processor = model, width, processor

    def preprocess(self, images: Sequence[Any]) -> Tensor:
        """PIL images → pixel values (B, C, H, W), fp32."""
        if self.processor is None:
            assert isinstance(self.model, TinyVision)  # noqa: S101 - the only encoder without a processor
            return self.model.preprocess(images)
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Features of every token, class tokens included: (B, N, width)."""
        pixels = pixel_values_BCHW.to(next(self.model.parameters()).dtype)
        if self.processor is None:
            features: Tensor = self.model(pixels)
        else:
            features = self.model(pixel_values=pixels).last_hidden_state
        return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def load_language_model(backbone: Backbone) -> LanguageModel:
    """Load weights and tokenizer, in fp32, evaluation mode.

    Raises:
        UserError: it cannot be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = backbone.language_model
    trust = backbone.trust_remote_code
    try:
        model = AutoModelForCausalLM.from_pretrained(_place(name), dtype=torch.float32, trust_remote_code=trust).eval()
        tokenizer = AutoTokenizer.from_pretrained(_place(name), trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(_cannot(name, error)) from error
    return LanguageModel(model, tokenizer)


def load_encoder(modality: str, backbone: Backbone) -> Encoder:
    """Load a frozen encoder with its preprocessing, in fp32, evaluation mode.

    Raises:
        UserError: it cannot be had.
    """
    name = backbone.encoders[modality]
    if name == TINY_VISION:
        tiny = TinyVision.load(_builtin(name))
        return Encoder(tiny, tiny.width).eval()
    from transformers import AutoImageProcessor, AutoModel

    trust = backbone.trust_remote_code
    try:
        model = AutoModel.from_pretrained(_place(name), dtype=torch.float32, trust_remote_code=trust)
        processor = AutoImageProcessor.from_pretrained(_place(name), use_fast=False, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(_cannot(name, error)) from error
    tower = vision_tower(model)
    return Encoder(tower, int(tower.config.hidden_size), processor).eval()


def vision_tower(model: Any) -> Any:
    """The image half of a two-tower model (CLIP, SigLIP); any other model as it is."""
    return getattr(model, "vision_model", model)


def _place(name: str) -> str:
    return str(_builtin(name) if _is_builtin(name) else Path(name).expanduser()) if _looks_like_folder(name) else name


def _cannot(name: str, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    hint = did_you_mean(name, builtin_names())
    return f"backbone {name!r} cannot be had, neither as a folder nor from the hub ({reason}); {hint}"


def builtin_names() -> list[str]:
    """Names of the built-in backbones."""
    return [name for names in BUILTIN.values() for name in names]


@cache
def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The configuration behind a name, without weights: the hub's local cache and the known ones go before the network.

    Returns:
        A ``transformers`` configuration; for the built-in vision encoder its options.

    Raises:
        UserError: no such built-in, folder, or reachable hub id.
    """
    from transformers import AutoConfig

    if name == TINY_VISION:
        return json.loads((_builtin(name) / "config.json").read_text(encoding="utf-8"))
    if _looks_like_folder(name) and not Path(_place(name)).is_dir():
        raise UserError(f"{name!r}: no such folder; a backbone is a folder, a hub id, or {', '.join(builtin_names())}")
    known = json.loads(KNOWN_CONFIGS.read_text(encoding="utf-8"))
    try:
        return AutoConfig.from_pretrained(_place(name), trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        if name in known:
            return AutoConfig.for_model(**known[name])
        _ask_hub(name, error)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _ask_hub(name: str, reason: Exception) -> None:
    """See in one short call whether the hub has the model: a download would retry for half a minute.

    Raises:
        UserError: it has not.
        HubUnreachableError: it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if _looks_like_folder(name):
        raise UserError(_cannot(name, reason)) from reason
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise UserError(_cannot(name, error)) from error
    except Exception as error:  # of the HTTP library underneath, which has changed before
        raise HubUnreachableError(_cannot(name, error)) from error


def _looks_like_folder(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", "builtin/")) or Path(name).is_dir()


def check_backbone(backbone: Backbone) -> None:
    """Fail now rather than in every trial: each model must be here or within reach.

    Raises:
        UserError: a model is neither built in, nor a folder, nor in the hub's local cache, nor on the hub.
    """
    from transformers.utils import cached_file

    kinds = [(backbone.language_model, "language model"), *((name, "encoder") for name in backbone.encoders.values())]
    for name, kind in kinds:
        _check_kind(name, kind)
        if _looks_like_folder(name):
            load_config(name, backbone.trust_remote_code)
        else:
            try:
                cached_file(name, "config.json", local_files_only=True)
            except OSError as error:
                _ask_hub(name, error)


def build_empty(backbone: Backbone) -> tuple[Any, dict[str, tuple[nn.Module, int]]]:
    """The language model and the encoders (modality → module, width) on the ``meta`` device: shapes without weights.

    Raises:
        UserError: a model is not to be had, or is of the wrong kind.
    """
    from transformers import AutoModelForCausalLM

    trust = backbone.trust_remote_code
    with torch.device("meta"):
        name = backbone.language_model
        _check_kind(name, "language model")
        try:
            language_model = AutoModelForCausalLM.from_config(load_config(name, trust), trust_remote_code=trust)
        except ValueError as error:
            raise UserError(f"backbone.language_model: {name!r} is not a causal language model") from error
        encoders = {modality: _empty_encoder(name, trust) for modality, name in backbone.encoders.items()}
    return language_model, encoders


def _empty_encoder(name: str, trust_remote_code: bool) -> tuple[nn.Module, int]:
    from transformers import AutoModel

    _check_kind(name, "encoder")
    config = load_config(name, trust_remote_code)
    if name == TINY_VISION:
        tiny = TinyVision(config["width"], config["layers"], config["heads"])
        return tiny, tiny.width
    tower = vision_tower(AutoModel.from_config(config, trust_remote_code=trust_remote_code))
    return tower, int(tower.config.hidden_size)


def _check_kind(name: str, kind: str) -> None:
    if _is_builtin(name) and name not in BUILTIN[kind]:
        raise UserError(f"backbone: {name!r} is not a built-in {kind}; {did_you_mean(name, BUILTIN[kind])}")
