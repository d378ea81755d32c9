"""Texts that go on from prompts read once score, and are generated, as where every row is read from its beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.experiment.sections import Evaluation
from harness.model import prefixes
from harness.model.batches import BatchMaker
from harness.model.build import Built, build
from harness.model.context_model import ContextModel
from harness.trial.evaluate import Evaluator, mismatched
from tests.support.adapters import disturb
from tests.support.trials import spec_of

CPU = torch.device("cpu")
# Whether texts go on from a prompt: not where a method adds positions, or tokens look at others in ways of their own.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({"method": "full"}, True),
    "lora": ({"method": "lora", "grouping": "specific"}, True),
    "dora": ({"method": "dora", "grouping": "specific"}, True),
    "ia3": ({"method": "ia3", "grouping": "specific"}, True),
    "bitfit": ({"method": "bitfit", "grouping": {"image": None, "text": "text"}}, True),
    "mmca": ({"method": "mmca"}, True),
    "moka": ({"method": "moka", "grouping": "specific"}, False),
    "soft_prompt": ({"method": "soft_prompt", "grouping": "specific"}, False),
}


def evaluator(model: ContextModel, batches: BatchMaker, size: int = 16, shared: bool = True) -> Evaluator:
    options = Evaluation(per_device_eval_batch_size=size, max_new_tokens=12)
    return Evaluator(model, batches, options, CPU, shared_prefix=shared)


class Read:
    """Positions that a language model reads: rows times length of every pass."""

    def __init__(self, model: ContextModel) -> None:
        self.positions: list[tuple[int, int]] = []
        self.handle = model.language_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        x = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        self.positions.append(tuple(x.shape[:2]))

    def __enter__(self) -> Read:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize(("adapter", "goes_on"), WAYS.values(), ids=WAYS)
def test_scores_and_texts_are_those_without_a_cache(tmp_path: Path, adapter: dict[str, Any], goes_on: bool) -> None:
    built = build(spec_of(tmp_path, adapter | {"learning_rate": 1e-3}), CPU)
    disturb(built.model.adapters.parameters(), scale=0.1)
    built.model.eval()
    examples = built.splits.test
    others = mismatched(examples, seed=0)
    plain, found = evaluator(built.model, built.batches, shared=False), evaluator(built.model, built.batches, 7)
    for shown in (None, others):
        expected, own = plain.likelihood(examples, shown), found.likelihood(examples, shown)
        np.testing.assert_allclose(own.nll, expected.nll, rtol=5e-6)
        np.testing.assert_allclose(own.first_nll, expected.first_nll, rtol=5e-6)
        np.testing.assert_array_equal(own.tokens, expected.tokens)
        assert own.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert built.model.goes_on is goes_on
    assert found.generate(examples) == plain.generate(examples)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    lora = {"method": "lora", "grouping": "specific", "learning_rate": 1e-3}
    ready = build(spec_of(tmp_path_factory.mktemp("built"), lora), CPU)
    disturb(ready.model.adapters.parameters(), scale=0.1)
    ready.model.eval()
    return ready


def test_a_prompt_is_read_once_for_texts_references_and_wrong_inputs(built: Built) -> None:
    examples = built.splits.test
    ready = evaluator(built.model, built.batches, 64)
    assert ready._goes_on(examples, examples)
    with Read(built.model) as read:
        ready.generate(examples)
        ready.likelihood(examples)
        ready.likelihood(examples, mismatched(examples, seed=0))
    prompt = 1 + 16  # BOS and the picture
    assert read.positions[0] == (12, prompt)
    assert all(length < prompt or rows > 12 for rows, length in read.positions[1:])
    longest = max(built.batches.target_length(text) for e in examples for text in e.references)
    assert [shape for shape in read.positions if shape[1] > 1] == [(12, prompt), (60, longest), (60, longest)]


def test_prompts_that_are_not_kept_are_read_again(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = built.splits.test
    expected = evaluator(built.model, built.batches).likelihood(examples)
    monkeypatch.setattr(prefixes, "KEPT_BYTES", 0)
    ready = evaluator(built.model, built.batches, 5)
    with Read(built.model) as read:
        found = [ready.likelihood(examples) for _ in range(2)]
    for one in found:
        np.testing.assert_allclose(one.nll, expected.nll, rtol=5e-6)
    assert sum(rows for rows, length in read.positions if length == 17) == 2 * 12


def test_a_model_with_windows_reads_every_row_from_its_beginning(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    config = built.model.language_model.config
    monkeypatch.setattr(built.model, "goes_on", None)
    monkeypatch.setattr(config, "layer_types", ["sliding_attention"] * 4, raising=False)
    monkeypatch.setattr(config, "sliding_window", 4, raising=False)
    assert not evaluator(built.model, built.batches)._goes_on(built.splits.test, built.splits.test)
