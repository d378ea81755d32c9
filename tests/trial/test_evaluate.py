"""Perplexity over references against one at a time, wrong inputs, generation in batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.experiment.sections import Evaluation
from harness.model.build import Built, build
from harness.trial.evaluate import Evaluator, Likelihood, mismatched
from tasks.base import Example
from tests.support.adapters import disturb
from tests.support.trials import spec_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The built-in backbones with disturbed adapters on 12 drawn images."""
    ready = build(spec_of(tmp_path_factory.mktemp("evaluate")), CPU)
    disturb(ready.model.adapters.parameters(), scale=0.05)
    ready.model.eval()
    return ready


def evaluator(built: Built, batch_size: int = 16, **more: Any) -> Evaluator:
    options = Evaluation(per_device_eval_batch_size=batch_size, max_new_tokens=8)
    return Evaluator(built.model, built.batches, options, CPU, **more)


@torch.no_grad()
def one_at_a_time(built: Built, examples: list[Example], shown: list[Example]) -> tuple[list[float], list[int]]:
    """Reference without batches: log softmax in float64, summed over the target's token ids."""
    nll, tokens = [], []
    tokenizer, eos = built.batches.language_model.tokenizer, built.batches.language_model.eos_id
    for example, other in zip(examples, shown, strict=True):
        total, count = 0.0, 0
        for text in example.references:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], eos]
            batch = built.batches.make([other], [text])
            logits: list[Any] = []
            handle = built.model.language_model.register_forward_hook(lambda _m, _a, y, kept=logits: kept.append(y))
            built.model(batch)
            handle.remove()
            log_p_TV = logits[0].logits[0].double().log_softmax(dim=-1)
            total -= sum(log_p_TV[position, token].item() for position, token in enumerate(ids))
            count += len(ids)
        nll.append(total)
        tokens.append(count)
    return nll, tokens


@pytest.fixture(scope="module")
def expected(built: Built) -> tuple[list[float], list[int]]:
    return one_at_a_time(built, built.splits.test, built.splits.test)


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_likelihood_sums_over_references_for_any_batch_size(built: Built, expected: Any, batch_size: int) -> None:
    examples, ticks = built.splits.test, list[None]()
    expected_nll, expected_tokens = expected
    found = evaluator(built, batch_size, tick=lambda: ticks.append(None)).likelihood(examples)
    np.testing.assert_allclose(found.nll, expected_nll, rtol=1e-5)
    assert found.tokens.tolist() == expected_tokens
    assert found.perplexity == pytest.approx(math.exp(sum(expected_nll) / sum(expected_tokens)), rel=1e-5)
    assert len(ticks) == math.ceil(5 * len(examples) / batch_size)


def test_with_wrong_inputs_only_the_images_change(built: Built) -> None:
    examples = built.splits.test
    others = mismatched(examples, seed=0)
    assert others is not None
    expected_nll, expected_tokens = one_at_a_time(built, examples, others)
    found = evaluator(built).likelihood(examples, others)
    np.testing.assert_allclose(found.nll, expected_nll, rtol=1e-5)
    assert found.tokens.tolist() == expected_tokens
    own = evaluator(built).likelihood(examples)
    assert not np.allclose(found.nll, own.nll, rtol=1e-4)


# Methods whose tokens look at other tokens in ways of their own cannot share: their references get rows of their own.
SHARED = {
    "full": ({"method": "full"}, True),
    "lora": ({"method": "lora", "grouping": "specific"}, True),
    "dora": ({"method": "dora", "grouping": "specific"}, True),
    "ia3": ({"method": "ia3", "grouping": "agnostic"}, True),
    "bitfit": ({"method": "bitfit", "grouping": {"image": None, "text": "text"}}, True),
    "mmca": ({"method": "mmca"}, True),
    "moka": ({"method": "moka", "grouping": "specific"}, False),
    "soft_prompt": ({"method": "soft_prompt", "grouping": "specific"}, False),
}


@pytest.mark.parametrize(("adapter", "shares"), SHARED.values(), ids=SHARED)
def test_references_in_one_row_score_as_in_rows_of_their_own(
    tmp_path: Path, adapter: dict[str, Any], shares: bool
) -> None:
    ready = build(spec_of(tmp_path, adapter | {"learning_rate": 1e-3}), CPU)
    disturb(ready.model.adapters.parameters(), scale=0.05)
    ready.model.eval()
    ready.model.goes_on = False
    sizes: list[int] = []
    ready.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    examples = ready.splits.test
    others = mismatched(examples, seed=0)
    for shown in (None, others):
        alone = evaluator(ready, 16, shared_prefix=False).likelihood(examples, shown)
        found = evaluator(ready, 16).likelihood(examples, shown)
        np.testing.assert_allclose(found.nll, alone.nll, rtol=2e-6)
        np.testing.assert_allclose(found.first_nll, alone.first_nll, rtol=2e-6)
        np.testing.assert_array_equal(found.tokens, alone.tokens)
    assert ready.model.shares_prefixes is shares
    assert (sizes[-1] == 16 // 5) is shares  # rows of the last batch


def test_a_model_without_position_ids_gets_rows_of_one_reference(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = built.model.language_model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "position_ids" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return plain(*args, **kwargs)

    expected = evaluator(built, shared_prefix=False).likelihood(built.splits.test)
    monkeypatch.setattr(built.model, "shares_prefixes", None)
    monkeypatch.setattr(built.model, "goes_on", False)
    monkeypatch.setattr(built.model.language_model, "forward", forward)
    found = evaluator(built).likelihood(built.splits.test)
    assert built.model.shares_prefixes is False
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)


def test_a_model_that_ignores_the_mask_gets_rows_of_one_reference(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = built.model.language_model.forward
    monkeypatch.setattr(built.model, "shares_prefixes", None)
    monkeypatch.setattr(built.model, "goes_on", False)
    monkeypatch.setattr(
        built.model.language_model, "forward", lambda *args, **kwargs: plain(*args, **kwargs | {"attention_mask": None})
    )
    expected = evaluator(built, shared_prefix=False).likelihood(built.splits.test)
    found = evaluator(built).likelihood(built.splits.test)
    assert built.model.shares_prefixes is False
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)


def test_two_rows_tell_whether_a_model_can_share(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first batch, which has 16: the shortest and the longest."""
    monkeypatch.setattr(built.model, "shares_prefixes", None)
    monkeypatch.setattr(built.model, "goes_on", False)
    sizes: list[int] = []
    handle = built.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    evaluator(built, 16 * 5).likelihood(built.splits.test)
    handle.remove()
    assert sizes[:3] == [2 * 5, 2, min(16, len(built.splits.test))]


def test_rows_longer_than_a_sliding_window_are_not_shared(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built.model, "shares_prefixes", None)
    monkeypatch.setattr(built.model, "goes_on", False)
    monkeypatch.setattr(built.model.language_model.config, "sliding_window", 64, raising=False)
    evaluator(built).likelihood(built.splits.test)
    assert built.model.shares_prefixes is None


def test_generation_does_not_depend_on_the_batches(built: Built) -> None:
    examples = built.splits.test
    found = evaluator(built, 5).generate(examples)
    assert list(found) == [example.id for example in examples]
    for example in examples[:4]:
        alone = evaluator(built, 1).generate([example])
        assert alone == {example.id: found[example.id]}
    special = set(built.batches.language_model.tokenizer.all_special_tokens)
    assert not any(token in text for text in found.values() for token in special)
    assert any(found.values())


def numbered(count: int) -> list[Example]:
    return [Example(str(i), {"image": Path(f"{i}.png")}, ("text",)) for i in range(count)]


@pytest.mark.parametrize("count", range(2, 51))
def test_mismatched_is_a_derangement(count: int) -> None:
    examples = numbered(count)
    for seed in range(3):
        others = mismatched(examples, seed)
        assert others is not None
        assert sorted(int(other.id) for other in others) == list(range(count))
        assert all(other.id != example.id for other, example in zip(others, examples, strict=True))
        assert others == mismatched(examples, seed)
    if count > 5:
        assert mismatched(examples, 0) != mismatched(examples, 1)


def test_a_single_example_cannot_be_mismatched() -> None:
    assert mismatched(numbered(1), seed=0) is None


def test_perplexity_is_weighted_by_tokens_not_examples() -> None:
    found = Likelihood(np.array([10.0, 1.0]), np.array([2, 8]), np.zeros(2), np.ones(2)).perplexity
    assert found == pytest.approx(math.exp(1.1))


@pytest.mark.parametrize("nll", [math.nan, math.inf, 1e6])
def test_a_perplexity_that_is_not_finite_is_an_error(nll: float) -> None:
    with pytest.raises(FloatingPointError, match=r"perplexity is not finite .*a lower learning_rate may help"):
        _ = Likelihood(np.array([nll, 1.0]), np.array([2, 8]), np.zeros(2), np.ones(2)).perplexity
