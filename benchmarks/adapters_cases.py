"""The cases that benchmarks/adapters.py compares: one language model and what is attached to it in each case.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.router import Router
from benchmarks.adapters_comparators import MaskLoRA, OneHotLoRA
from harness.core.contexts import Segment, resolve_grouping

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 512  # small, so that the head does not dominate the layers


@dataclass(frozen=True)
class Size:
    """Size of the model and the batch."""

    width: int = 768
    feed_forward: int = 2048
    heads: int = 12
    layers: int = 12
    rows: int = 16
    length: int = 128


class Key(NamedTuple):
    """A case: its form, its rank (0: none) and the number of contexts in the sequence."""

    form: str
    rank: int = 0
    contexts: int = 1


FROZEN = Key("frozen")
FORMS: dict[str, Callable[[int], AdapterMethod]] = {
    "ours": lambda rank: LoRA(LoRAConfig(rank=rank)),
    "mask": lambda rank: MaskLoRA(LoRAConfig(rank=rank)),
    "one-hot": lambda rank: OneHotLoRA(LoRAConfig(rank=rank)),
    "BitFit": lambda _: BitFit(BitFitConfig()),
    "IA3": lambda _: IA3(IA3Config()),
}


class Case:
    """A model and what ``attached`` attaches to it temporarily."""

    def __init__(self, model: Any, trained: nn.Module, adapters: Adapters | None = None) -> None:
        self.model, self.trained, self.adapters = model, trained, adapters

    @contextmanager
    def attached(self) -> Iterator[Any]:
        """The model with this case attached."""
        if self.adapters is not None:
            self.adapters.attach(self.model)
        try:
            yield self.model
        finally:
            if self.adapters is not None:
                self.adapters.detach()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → trained parameter."""
        return {name: p for name, p in self.trained.named_parameters() if p.requires_grad}


class Bench:
    """One frozen llama with random weights, one batch, and the cases over them.

    The input embeddings need a gradient, as the output of a trained projector does.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=size.width, intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=size.length,
        )  # fmt: skip
        self.size, self.device = size, device
        self.model = LlamaForCausalLM(config).requires_grad_(False).to(device).train()
        self.embeds_BTD = torch.randn(size.rows, size.length, size.width, device=device).requires_grad_()
        self.labels_BT = torch.randint(VOCABULARY, (size.rows, size.length), device=device)

    def case(self, key: Key) -> Case:
        """Build one case."""
        if key == FROZEN:
            return Case(self.model, nn.Module())
        if key.form == "peft":
            shared = {id(p): p for p in self.model.parameters()}  # share the frozen weights
            config = peft.LoraConfig(r=key.rank, lora_alpha=key.rank, target_modules=PROJECTIONS)
            model = peft.inject_adapter_in_model(config, copy.deepcopy(self.model, shared))
            return Case(model, model)
        names = [f"context_{number}" for number in range(key.contexts)]
        router = Router(resolve_grouping("specific", names)[0])
        edges = [number * self.size.length // key.contexts for number in range(key.contexts + 1)]
        router.set_layout([Segment(edges[n], edges[n + 1], name) for n, name in enumerate(names)], self.device)
        method = FORMS[key.form](key.rank)
        adapters = Adapters(self.model, dict.fromkeys(router.groups, method), router, seed=0).to(self.device)
        return Case(self.model, adapters, adapters)

    def forward(self, model: Any) -> Tensor:
        """The loss."""
        loss: Tensor = model(inputs_embeds=self.embeds_BTD, labels=self.labels_BT, use_cache=False).loss
        return loss

    def step(self, case: Case) -> Tensor:
        """Forward and backward of the whole model; gradients stay on the parameters."""
        with case.attached() as model:
            loss = self.forward(model)
            loss.backward()
            return loss.detach()

    def clear(self, case: Case) -> None:
        """Drop the gradients."""
        self.embeds_BTD.grad = None
        for p in case.parameters().values():
            p.grad = None
