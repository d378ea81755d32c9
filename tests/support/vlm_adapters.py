"""Adapted vision- and audio-language models, and a reference for their adapters: a masked product by hand.

The reference computes every group's update for every token, of which a one-hot matrix of contexts selects one. Shapes:
B rows, T positions, I and O input and output features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.vlms import MEDIA, VLMS, small

LORA = {"method": "lora", "rank": 2}
ROWS = [(2, 3), (1, 5)]  # different, so the first is padded on the left
NEVER = [MEDIA, MEDIA + 1]  # a placeholder that is generated has no vector, and any model fails
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": NEVER, "eos_token_id": None}
FAST = ("qwen2_5_vl", "smolvlm", "gemma3", "qwen2_audio")
SOME_SLOW = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VLMS]
every_class = pytest.mark.parametrize("name", VLMS)
each_class = pytest.mark.parametrize("name", SOME_SLOW)
# The prompt of a PaliGemma sees itself as a whole: one that is longer by a token is another for all of them.
causal = pytest.mark.parametrize(
    "name", [one for one, name in zip(SOME_SLOW, VLMS, strict=True) if name != "paligemma"]
)


def adapted(name: str, spec: Any = None, model: Any = None, grouping: Any = "specific") -> harness.AdaptedModel:
    """An adapted model whose adapters are not the identity, with contexts from its placeholder tokens."""
    medium = VLMS[name].context
    base = small(name) if model is None else model
    contexts_from = {MEDIA: medium}
    found = harness.adapt(base, spec or LORA, (medium, "text"), grouping, contexts_from=contexts_from)
    disturb(found.adapters.parameters(), scale=0.2)
    return found


def logits(model: Any, given: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given, **more).logits
    return found


def real(given: dict[str, Any]) -> Tensor:
    """Where there is no padding."""
    found: Tensor = given["attention_mask"].bool()
    return found


@contextmanager
def by_one_hot(base: Any, model: harness.AdaptedModel, given: dict[str, Any]) -> Iterator[None]:
    """The updates of a LoRA on linear layers: in the language model selected by a one-hot matrix of contexts.

    In a tower or connector every token gets the one update that there is.
    """
    medium_BT = given["input_ids"] == MEDIA
    one_hot = {model.contexts[0]: medium_BT.double(), "text": (~medium_BT).double()}
    inner = language_model_of(base)
    pairs: dict[str, list[tuple[str, slice, Tensor, Tensor]]] = {}
    parameters = dict(model.adapters.named_parameters())
    for name, A_RI in parameters.items():
        if name.endswith("lora_A"):
            key, _, rest = name.removeprefix("layers.").partition(".changes.")
            path, _, role = key.replace("/", ".").partition(":")
            B_OR = parameters[name.replace("lora_A", "lora_B")]
            outputs = base.get_submodule(path).out_features
            size, fused = len(B_OR), "qkv"[-(outputs // len(B_OR)) :]  # Granite's has keys and values alone
            place = fused.index(role) if role else 0
            own = slice(place * size, (place + 1) * size)
            context = rest.partition("group_")[2].partition(".")[0]
            pairs.setdefault(path, []).append((context, own, A_RI, B_OR))
    handles = []
    for path, own_pairs in pairs.items():

        def add(
            _module: Any, args: tuple[Tensor, ...], y_BTO: Tensor, path: str = path, own_pairs: Any = own_pairs
        ) -> Tensor:
            y_BTO = y_BTO.clone()
            for context, own, A_RI, B_OR in own_pairs:
                update_BTO = F.linear(F.linear(args[0], A_RI), B_OR)
                if path.startswith(inner):
                    mask_BT = one_hot[context]
                    new_B1 = torch.full_like(mask_BT[:, :1], context == "text")
                    update_BTO = update_BTO * (mask_BT if y_BTO.shape[1] > 1 else new_B1)[..., None]
                y_BTO[..., own] += update_BTO
            return y_BTO

        handles.append(base.get_submodule(path).register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


def language_model_of(base: Any) -> str:
    """The path of the inner language model."""
    decoder = base.get_decoder()
    found: str = next(path for path, module in base.named_modules() if module is decoder)
    return found


def linear_layers(base: Any, *inside: str) -> set[str]:
    return {
        path for path, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and path.startswith(tuple(f"{at}." for at in inside))
    }  # fmt: skip


def adapted_layers(model: harness.AdaptedModel) -> set[str]:
    return {key.partition(":")[0].replace("/", ".") for key in model.adapters.layers}


def refused(match: str, **options: Any) -> None:
    base = options.pop("model", None) or small("llava")
    before = set(base.state_dict())
    with pytest.raises(UserError, match=match):
        harness.adapt(base, **{"spec": LORA, "contexts": ("image", "text"), "grouping": "specific", **options})
    assert set(base.state_dict()) == before
    assert not hasattr(base, "_context_peft_adapted")
