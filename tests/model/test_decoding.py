"""Greedy decoding of a shrinking batch gives the tokens of transformers' own ``generate``.

Shapes: B rows, T positions, N new tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.attach import Adapters
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from harness.core.registry import Entry
from harness.model.decoding import decodes, greedy
from tests.support.adapters import LORA, disturb
from tests.support.families import OPTIONS, tiny
from tests.support.models import tiny_llama
from tests.support.registered import CONTEXTS, adapters_of, every_plugin_and

IMAGE, TEXT = 0, 1
# Rows whose layouts differ, padded on the left; the padding belongs to the text.
PADDING = torch.tensor([0, 2, 0, 4, 1, 0, 3, 0])
ROWS = torch.tensor(
    [
        [1, 0, 0, 0, 0, 0, 0, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    ]
    * 2
)
ALIKE = ROWS[:1].expand(8, -1)
NEW = 10
SHRINKS = ("llama", "qwen2", "qwen3", "smollm3", "gemma", "glm", "glm4", "opt", "gpt2", "gpt_neox")


def mask_of(padding_B: Tensor, length: int) -> Tensor:
    return torch.arange(length) >= padding_B[:, None]


def embeds(model: Any) -> Tensor:
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(*ROWS.shape, width, generator=torch.Generator().manual_seed(1))


def by_transformers(model: Any, router: Router, x_BTD: Tensor, mask_BT: Tensor, eos: int | None) -> Tensor:
    with layouts_while_generating(model, router, "text"):
        ids_BN: Tensor = model.generate(
            inputs_embeds=x_BTD, attention_mask=mask_BT.long(), do_sample=False, max_new_tokens=NEW,
            eos_token_id=eos, pad_token_id=eos,
        )  # fmt: skip
    return ids_BN


def an_end(free_BN: Tensor) -> int:
    """The token that would end rows at the most different places."""
    places = {
        token: len({row.index(token) if token in row else NEW for row in free_BN.tolist()})
        for token in Counter(free_BN.flatten().tolist())
    }
    best = max(places, key=lambda token: places[token])
    assert places[best] > 2
    return best


def both(model: Any, router: Router, ids_XT: Tensor, padding_B: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens by transformers and by ``greedy``, and the rows of each of its passes."""
    x_BTD, mask_BT = embeds(model), mask_of(padding_B, ROWS.shape[1])
    rows: list[int] = []

    def count(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs_embeds"]))

    with torch.no_grad(), router.one_pass():
        router.set_context_ids(ids_XT)
        eos = an_end(by_transformers(model, router, x_BTD, mask_BT, None))
        router.set_context_ids(ids_XT)
        expected_BN = by_transformers(model, router, x_BTD, mask_BT, eos)
        router.set_context_ids(ids_XT)
        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        found_BN = greedy(model, router, x_BTD, mask_BT, "text", NEW, eos)
        handle.remove()
    return expected_BN, found_BN, rows


def attached(model: Any) -> Router:
    router = Router(resolve_grouping("specific", CONTEXTS)[0])
    adapters = Adapters(model, dict.fromkeys(router.groups, LORA), router, seed=0)
    disturb(adapters.parameters())
    adapters.attach(model)
    return router


@pytest.mark.quick
@pytest.mark.parametrize("family", SHRINKS)
@pytest.mark.parametrize(
    ("ids_XT", "padding_B"), [(ROWS, PADDING), (ALIKE, torch.zeros_like(PADDING))], ids=["ragged", "alike"]
)
def test_every_known_family_says_the_same_in_a_batch_that_shrinks(
    family: str, ids_XT: Tensor, padding_B: Tensor
) -> None:
    model = tiny(family)
    assert decodes(model)
    expected_BN, found_BN, rows = both(model, attached(model), ids_XT, padding_B)
    assert torch.equal(found_BN, expected_BN)
    assert rows[0] == 8 > rows[-1]
    assert rows == sorted(rows, reverse=True)


@every_plugin_and("lora", "dora", "bottleneck", "moka", "mmca", "soft_prompt")
def test_every_method_says_the_same_in_a_batch_that_shrinks(entry: Entry) -> None:
    model = tiny_llama()
    adapters = adapters_of(entry, model, "specific")
    disturb(adapters.parameters(), scale=0.1)
    adapters.attach(model)
    adapters.eval()
    expected_BN, found_BN, rows = both(model, adapters.router, ROWS, PADDING)
    assert torch.equal(found_BN, expected_BN)
    assert rows[-1] < 8


def test_a_batch_whose_rows_all_end_at_once_ends_there() -> None:
    model = tiny_llama()
    router = attached(model)
    with torch.no_grad(), router.one_pass():
        model.lm_head.weight.zero_()  # the first token, whatever was read
        router.set_context_ids(ALIKE)
        found_BN = greedy(model, router, embeds(model), mask_of(PADDING, 10), "text", NEW, eos_id=0)
    assert found_BN.tolist() == [[0]] * 8


def windowed(model: Any) -> None:
    model.config.layer_types = ["sliding_attention"] * 2
    model.config.sliding_window = 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.generation_config, "repetition_penalty", 1.3),
        lambda model: setattr(model.generation_config, "suppress_tokens", [5]),
        lambda model: setattr(model.generation_config, "min_new_tokens", 3),
        lambda model: setattr(model.generation_config, "cache_implementation", "static"),
        windowed,
    ],
    ids=["repetition_penalty", "suppress_tokens", "min_new_tokens", "cache", "window"],
)
def test_a_model_with_settings_of_its_own_is_left_to_transformers(change: Any) -> None:
    model = tiny_llama()
    assert decodes(model)
    change(model)
    assert not decodes(model)


@pytest.mark.parametrize("family", sorted(set(OPTIONS) - set(SHRINKS)))
def test_families_with_windows_or_inputs_of_their_own_are_left_to_transformers(family: str) -> None:
    assert not decodes(tiny(family))
