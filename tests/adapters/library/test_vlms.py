"""``harness.adapt`` on a small model of every vision- and audio-language class, called as its users call it.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import harness
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.models import tiny_llama
from tests.support.vlm_adapters import (
    GREEDY,
    LORA,
    NEVER,
    ROWS,
    adapted,
    adapted_layers,
    by_one_hot,
    causal,
    each_class,
    every_class,
    language_model_of,
    linear_layers,
    logits,
    real,
    refused,
)
from tests.support.vlms import BOS, EOS, MEDIA, VLMS, inputs, small


@every_class
def test_adapters_that_are_zero_leave_the_class_as_it_is(name: str) -> None:
    given, base = inputs(name, ROWS), small(name)
    expected_BTV = logits(base, given)
    medium = VLMS[name].context
    model = harness.adapt(base, LORA, (medium, "text"), "specific", contexts_from={MEDIA: medium})
    assert torch.equal(logits(model, given), expected_BTV)
    assert torch.equal(logits(model.detach(), given), expected_BTV)


@every_class
def test_each_token_gets_the_update_of_its_context(name: str) -> None:
    given = inputs(name, ROWS, dtype=torch.float64)
    model = adapted(name, model=small(name, torch.float64))
    found_BTV = logits(model, given, use_cache=False)
    base = small(name, torch.float64)
    plain_BTV = logits(base, given, use_cache=False)
    with by_one_hot(base, model, given):
        expected_BTV = logits(base, given, use_cache=False)
    assert (expected_BTV - plain_BTV)[real(given)].abs().amax() > 0.1
    torch.testing.assert_close(found_BTV[real(given)], expected_BTV[real(given)], rtol=1e-9, atol=1e-9)
    assert adapted_layers(model) == linear_layers(base, language_model_of(base))


@each_class
def test_generated_tokens_get_the_update_of_the_last_context(name: str) -> None:
    given, model = inputs(name, ROWS, dtype=torch.float64), adapted(name, model=small(name, torch.float64))
    found_BT = model.generate(**given, **GREEDY)
    base = small(name, torch.float64)
    plain_BT = base.generate(**given, **GREEDY)
    with by_one_hot(base, model, given):
        assert found_BT.tolist() == base.generate(**given, **GREEDY).tolist()
    assert found_BT.tolist() != plain_BT.tolist()


def continued(name: str, model: Any, given: dict[str, Any], steps: int) -> Tensor:
    """The ids (B, steps) of greedy decoding that computes the whole sequence in every step."""
    given, types = dict(given), VLMS[name].types
    length = given["input_ids"].shape[1]
    for _ in range(steps):
        logits_B1V = logits(model, given, use_cache=False)[:, -1:]
        logits_B1V[..., NEVER] = -torch.inf
        new_B1 = logits_B1V.argmax(-1)
        given["input_ids"] = torch.cat([given["input_ids"], new_B1], dim=1)
        given["attention_mask"] = F.pad(given["attention_mask"], (0, 1), value=1)
        if types is not None:
            given[types] = F.pad(given[types], (0, 1))
    new_BT: Tensor = given["input_ids"][:, length:]
    return new_BT


@causal
def test_generated_texts_are_those_of_a_loop_without_a_cache(name: str) -> None:
    given, model = inputs(name, ROWS, dtype=torch.float64), adapted(name, model=small(name, torch.float64))
    found_BT = model.generate(**given, **GREEDY)[:, -5:]
    assert found_BT.tolist() == continued(name, model, given, 5).tolist()


@each_class
def test_beams_are_those_of_a_search_without_a_cache(name: str) -> None:
    given, model = inputs(name, ROWS, dtype=torch.float64), adapted(name, model=small(name, torch.float64))
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS}
    with_cache_BT = model.generate(**given, **beams)
    assert with_cache_BT.tolist() == model.generate(**given, **beams, use_cache=False).tolist()


@causal
def test_a_pass_over_new_tokens_knows_the_contexts_of_those_in_the_cache(name: str) -> None:
    given, model = inputs(name, [(2, 3), (2, 3)], dtype=torch.float64), adapted(name, model=small(name, torch.float64))
    whole_BTV = logits(model, given, use_cache=False)
    keep = given["input_ids"].shape[1] - 2
    first = {key: t[:, :keep] if t.shape == given["input_ids"].shape else t for key, t in given.items()}
    with torch.no_grad():
        before = model(**first, use_cache=True)
        after_BTV = model(input_ids=given["input_ids"][:, keep:], past_key_values=before.past_key_values).logits
    torch.testing.assert_close(after_BTV, whole_BTV[:, keep:], rtol=1e-9, atol=1e-9)


@each_class
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    given, model = inputs(name, ROWS), adapted(name)
    expected_BTV = logits(model, given)
    model.save(tmp_path)
    loaded = harness.load_adapter(small(name), tmp_path)
    assert torch.equal(logits(loaded, given), expected_BTV)
    assert loaded.spec.contexts_from == {MEDIA: VLMS[name].context}


@each_class
def test_merged_it_computes_the_same(name: str) -> None:
    given, model = (
        inputs(name, ROWS, dtype=torch.float64),
        adapted(name, model=small(name, torch.float64), grouping="agnostic"),
    )
    expected_BTV = logits(model, given)
    torch.testing.assert_close(logits(model.merge(), given), expected_BTV, rtol=1e-9, atol=1e-9)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows with labels and a column that no model takes, which Trainer leaves out."""

    def __init__(self, name: str) -> None:
        self.rows = [self._row(name, seed) for seed in range(2)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]

    def _row(self, name: str, seed: int) -> dict[str, Tensor]:
        given = inputs(name, [(2, 3)], seed=seed)
        labels_1T = given["input_ids"].masked_fill(given["input_ids"] == MEDIA, -100)
        rows = {key: t if key == "pixel_values" and t.dim() == 2 else t[0] for key, t in given.items()}
        return {**rows, "labels": labels_1T[0], "file": torch.tensor(seed)}


@each_class
def test_trainer_trains_it(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    arguments = TrainingArguments(
        *(str(tmp_path),), max_steps=1, per_device_train_batch_size=2, learning_rate=0.1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(name))
    whole = trainer.data_collator

    def collated(rows: list[dict[str, Tensor]]) -> Any:  # Qwen's patches are of no row
        patches = [row.pop("pixel_values") for row in rows if row.get("pixel_values", torch.empty(0)).dim() == 2]
        return whole(rows) | ({"pixel_values": torch.cat(patches)} if patches else {})

    trainer.data_collator = collated
    trainer.train()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {key for key in before if key.startswith("adapters.")}


@pytest.mark.parametrize(
    ("contexts_from", "match"),
    [
        ({64: "image"}, r"contexts_from: found the token id 64; allowed: 0 to 63 \(.* image_token_id 60\)"),
        ({-1: "image"}, "contexts_from: found the token id -1; allowed: an integer of the vocabulary"),
        ({"<image>": "image"}, "contexts_from: found the token id '<image>'"),
        ({True: "image"}, "contexts_from: found the token id True"),
        ({60: "imgae"}, "contexts_from: 60: unknown context 'imgae'; .*image"),
        ({}, "contexts_from: found {}; allowed: token id → context"),
        (60, "contexts_from: found 60; allowed: token id → context"),
    ],
)
def test_contexts_from_that_are_wrong_are_refused(contexts_from: Any, match: str) -> None:
    refused(match, contexts_from=contexts_from)


def test_a_model_without_token_ids_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    refused(
        "contexts_from: a ViTModel reads no token ids", model=ViTModel(ViTConfig(**tiny)), contexts_from={3: "image"}
    )
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    refused("contexts_from: a T5ForConditionalGeneration has an encoder", model=t5, contexts_from={3: "image"})


def test_vectors_need_their_context_ids() -> None:
    model = adapted("llava")
    with pytest.raises(UserError, match="context_ids: found none"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_causal_language_model_takes_contexts_from_its_tokens_too() -> None:
    ids_BT = torch.tensor([[BOS, 7, 7, 8, 9], [BOS, 8, 7, 9, 9]])
    model = harness.adapt(tiny_llama(), LORA, grouping="specific", contexts_from={7: "image"})
    disturb(model.adapters.parameters())
    found_BTV = logits(model, {"input_ids": ids_BT})
    assert torch.equal(found_BTV, logits(model, {"input_ids": ids_BT}, context_ids=(ids_BT != 7).long()))
