"""Recorded attention against an independent computation from queries and keys, and all error cases."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.cli.attention import attention_of, default_trials, give_weights, record_attention, restore
from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.record import Plan, PlannedTrial, TrialRecord, read_run, write_record
from harness.core.samples import draw_ids
from harness.experiment.plan import TrialSpec
from harness.model.build import Built, build
from results.page.attention import FILE_NAME, read_attention
from tests.support.runs import METRICS, fake_plan, write_run
from tests.support.trials import LORA, examples_of, run, spec_of

HEADS, WIDTH = 4, 24  # of the built-in language model: heads, features of a head
CPU = torch.device("cpu")
CAPTION = "a red circle is left of a small square ."


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def plan_of(specs: list[TrialSpec]) -> Plan:
    trials = tuple(
        PlannedTrial(trial_id=s.trial_id, label=s.adapter.label, method=s.adapter.method, grouping="specific",
                     setting="", seed=s.seed) for s in specs
    )  # fmt: skip
    return Plan(
        experiment="unit", experiment_file="unit.yaml", primary_metric="perplexity", metrics=METRICS[:1], trials=trials
    )


class Recorded(NamedTuple):
    """A run of one trial whose attention was recorded."""

    folder: Path
    spec: TrialSpec
    record: TrialRecord
    printed: str

    @property
    def trial(self) -> Path:
        return self.folder / "trials" / self.record.trial_id


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    spec = spec_of(folder, LORA, budget={"examples": 32, "epochs": 1})
    write_atomically(folder / "plan.json", plan_of([spec]).model_dump_json())
    record = run(spec, folder)
    output = console()
    record_attention(folder, [], 4, output)
    return Recorded(folder, spec, record, output.file.getvalue())  # type: ignore[attr-defined]


@contextmanager
def projected(built: Built) -> Iterator[list[dict[str, Tensor]]]:
    """The outputs of each layer's q and k projections, including adapters."""
    layers = built.model.language_model.model.layers
    found: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = [
        getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
            lambda _module, _args, y_BTO, store=store, name=name: store.update({name: y_BTO[0].double()})
        )
        for layer, store in zip(layers, found, strict=True)
        for name in "qk"
    ]
    yield found
    for handle in handles:
        handle.remove()


def scores_of(layer: dict[str, Tensor], positions_T: Tensor) -> Tensor:
    """Scaled products (H, T, T) of rotated queries and keys (Su et al. 2021, arXiv 2104.09864), in float64."""
    frequencies = 10_000.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    turn_TE = (positions_T.double()[:, None] * frequencies).repeat(1, 2)
    rotated = {}
    for name, y_TO in layer.items():
        x_THE = y_TO.view(len(y_TO), HEADS, WIDTH)
        half_THE = torch.cat([-x_THE[..., WIDTH // 2 :], x_THE[..., : WIDTH // 2]], dim=-1)
        rotated[name] = x_THE * turn_TE.cos()[:, None] + half_THE * turn_TE.sin()[:, None]
    return torch.einsum("qhe,khe->hqk", rotated["q"], rotated["k"]) / math.sqrt(WIDTH)


def softmax(scores_HTT: Tensor, seen_TT: Tensor) -> Tensor:
    return scores_HTT.masked_fill(~seen_TT, -math.inf).softmax(dim=-1)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def untrained(folder: Path, adapter: dict[str, Any] = LORA, task: str = "scenes", **backbone: Any) -> Built:
    """With adapters that are not the identity."""
    options = {"name": task, "train_examples": 8, "validation_examples": 2, "test_examples": 2}
    spec = spec_of(folder, adapter, metric="", task=options, backbone=backbone, budget={"examples": 8})
    built = build(spec, CPU)
    built.model.eval()
    generator = torch.Generator().manual_seed(0)
    for p in built.model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return built


def test_recorded_weights_are_those_of_the_models_own_queries_and_keys(recorded: Recorded) -> None:
    header, weights = read_attention(recorded.trial / FILE_NAME)
    built = restore(recorded.spec, recorded.trial)
    by_id = {example.id: example for example in built.splits.test}
    assert len(header.examples) == 4
    for example in header.examples:
        caption = "".join(example.tokens)
        batch = built.batches.make([by_id[example.example_id]], [caption])
        with projected(built) as layers, torch.no_grad():
            built.model(batch)
        length = 1 + 16 + len(example.tokens)  # BOS, patches, caption
        for layer, found in zip(weights[example.example_id], layers, strict=True):
            whole_HTT = softmax(scores_of(found, torch.arange(length)), causal(length))
            expected_HCN = whole_HTT[:, 17:, 1:17].numpy()
            np.testing.assert_allclose(layer, expected_HCN, atol=2e-4, rtol=1e-3)  # float16 on disk
            assert layer.sum(axis=-1).min() > 0
            assert layer.sum(axis=-1).max() < 1


def test_the_model_recorded_is_the_one_that_was_scored(recorded: Recorded) -> None:
    """Eager attention, which gives its weights, computes what SDPA did, and the best epoch's weights are in place."""
    eager = restore(recorded.spec, recorded.trial)
    example = eager.splits.test[0]
    batch = eager.batches.make([example], [example.references[0]])
    logits = []
    hook = eager.model.language_model.register_forward_hook(lambda _m, _a, out: logits.append(out.logits))
    with torch.no_grad():
        nll_B = eager.model(batch)[0]
        eager.model.language_model.set_attn_implementation("sdpa")
        eager.model(batch)
    hook.remove()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)  # logits reach 20
    scored = examples_of(recorded.folder, recorded.record).query("split == 'test'").set_index("example_id")
    assert nll_B.item() == pytest.approx(scored.loc[example.id, "nll_first"], rel=1e-5)


def test_the_examples_are_the_gallerys_and_their_tokens_join_to_the_captions(recorded: Recorded) -> None:
    header, _ = read_attention(recorded.trial / FILE_NAME)
    scored = examples_of(recorded.folder, recorded.record).query("split == 'test'").set_index("example_id")
    assert [example.example_id for example in header.examples] == draw_ids(list(scored.index), [])[:4]
    assert (header.trial_id, header.started_at) == (recorded.record.trial_id, recorded.record.started_at)
    for example in header.examples:
        row = scored.loc[example.example_id]
        assert "".join(example.tokens) == row["prediction"]
        assert [["image", "file", example.path]] == json.loads(row["inputs"])
        assert (example.leading, example.rows, example.columns, example.box) == (0, 4, 4, (0, 0, 1, 1))
        assert example.softmaxes == 1
    assert f"4 examples → {recorded.trial / FILE_NAME}" in recorded.printed
    assert not list(recorded.trial.glob(".*partial"))


def test_soft_prompts_shift_the_places_and_take_their_share(tmp_path: Path) -> None:
    built = untrained(tmp_path, {"method": "soft_prompt", "num_virtual_tokens": 3, "grouping": "specific",
                                 "learning_rate": 1e-2})  # fmt: skip
    give_weights(built)
    with projected(built) as layers:
        example, weights_LHCN = attention_of(built, built.splits.test[0], CAPTION)
    length = 17 + len(example.tokens)
    positions = torch.cat([torch.arange(3), torch.arange(3), 3 + torch.arange(length)])
    group = torch.tensor([0] * 3 + [1] * 3 + [1] + [0] * 16 + [1] * len(example.tokens))  # image, text
    prompt = torch.arange(6 + length) < 6
    seen = causal(6 + length) & (~prompt[None] | (group[:, None] == group[None]))
    for layer, found in zip(weights_LHCN, layers, strict=True):
        expected_HCN = softmax(scores_of(found, positions), seen)[:, 6 + 17 :, 7 : 7 + 16].float()
        torch.testing.assert_close(layer, expected_HCN, atol=1e-5, rtol=1e-4)


def test_the_softmaxes_of_mmca_share_the_whole(tmp_path: Path) -> None:
    built = untrained(tmp_path, {"method": "mmca", "learning_rate": 1e-2})
    give_weights(built)
    with projected(built) as layers:
        example, weights_LHCN = attention_of(built, built.splits.test[0], CAPTION)
    assert example.softmaxes == 2
    length = 17 + len(example.tokens)
    image = (torch.arange(length) >= 1) & (torch.arange(length) < 17)
    for layer, found in zip(weights_LHCN, layers, strict=True):
        scores_HCN = scores_of(found, torch.arange(length))[:, 17:, image]
        torch.testing.assert_close(layer, scores_HCN.softmax(dim=-1).float() / 2, atol=1e-5, rtol=1e-4)


def test_boundary_tokens_are_no_patches_and_an_added_space_is_no_caption(tmp_path: Path) -> None:
    built = untrained(tmp_path, projector_boundary_tokens=True, add_prefix_space=True)
    give_weights(built)
    with projected(built) as layers:
        example, weights_LHCN = attention_of(built, built.splits.test[0], "naïve 漢字 !")
    assert "".join(example.tokens) == "naïve 漢字 !"
    assert "" in example.tokens  # a character of several tokens
    length = 19 + len(example.tokens)
    for layer, found in zip(weights_LHCN, layers, strict=True):
        whole_HTT = softmax(scores_of(found, torch.arange(length)), causal(length))
        torch.testing.assert_close(layer, whole_HTT[:, 19:, 2:18].float(), atol=1e-5, rtol=1e-4)


def test_captions_longer_than_the_training_targets_are_whole_and_empty_ones_are_kept(tmp_path: Path) -> None:
    built = untrained(tmp_path)
    give_weights(built)
    long = " ".join([CAPTION] * 12)
    example, weights_LHCN = attention_of(built, built.splits.test[0], long)
    assert "".join(example.tokens) == long
    assert weights_LHCN.shape == (4, HEADS, len(example.tokens), 16)
    assert len(example.tokens) > 63
    example, weights_LHCN = attention_of(built, built.splits.test[0], "")
    assert (example.tokens, weights_LHCN.shape) == ((), (4, HEADS, 0, 16))


def test_a_trial_in_bf16_is_computed_in_bf16(tmp_path: Path) -> None:
    built = untrained(tmp_path)
    give_weights(built)
    expected = attention_of(built, built.splits.test[0], CAPTION)[1]
    built.model.bfloat16()
    found = attention_of(built, built.splits.test[0], CAPTION)[1]
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.1)
    assert not torch.equal(found, expected)


def test_a_series_is_one_row_of_tokens(tmp_path: Path) -> None:
    built = untrained(tmp_path, task="trends")
    give_weights(built)
    example, weights_LHCN = attention_of(built, built.splits.test[0], "it rises .")
    assert (example.leading, example.rows, example.columns) == (0, 1, weights_LHCN.shape[-1])
    assert example.columns > 1


def test_weights_that_are_no_shares_or_are_not_given_are_refused(tmp_path: Path) -> None:
    built = untrained(tmp_path)
    with pytest.raises(UserError, match="a llama model does not return the attention weights"):
        attention_of(built, built.splits.test[0], CAPTION)  # still SDPA
    give_weights(built)
    attention = built.model.language_model.model.layers[1].self_attn
    attention.register_forward_hook(lambda _m, _a, out: (out[0], 0.7 * out[1]), prepend=True)
    with pytest.raises(UserError, match=r"a llama model sum to 1 ± 0.3"):
        attention_of(built, built.splits.test[0], CAPTION)


# ── Which trials


def test_by_default_the_reference_and_the_best_rows_of_the_last_setting(tmp_path: Path) -> None:
    plan = fake_plan(settings=("examples=64", "examples=1024"))
    write_run(tmp_path, plan)
    found = [t for one in default_trials(read_run(tmp_path)) for t in plan.trials if t.trial_id == one]
    assert [(t.label, t.grouping, t.seed, t.setting) for t in found] == [
        ("Full fine-tuning", "", 0, "examples=1024"),
        ("LoRA r=4", "specific", 0, "examples=1024"),
        ("LoRA r=4", "agnostic", 0, "examples=1024"),
        ("BitFit", "specific", 0, "examples=1024"),
    ]


def test_a_setting_without_finished_trials_is_skipped(tmp_path: Path) -> None:
    plan = fake_plan(settings=("examples=64", "examples=1024"), seeds=(0,))
    write_run(tmp_path / "a", plan, lambda trial, record: record if trial.setting == "examples=64" else None)
    assert len(default_trials(read_run(tmp_path / "a"))) == 4
    write_run(tmp_path / "b", plan, lambda trial, record: None)
    with pytest.raises(UserError, match="no trial has finished yet"):
        default_trials(read_run(tmp_path / "b"))


@pytest.mark.parametrize(
    ("trials", "examples", "message"),
    [
        (["{id}x"], 1, r"plan\.json: no trial '\w+x' among its 1; did you mean '\w+'\?"),
        (["{id}"], 0, "--examples: found 0; allowed: 1 or more"),
    ],
)
def test_a_wrong_argument_is_named(recorded: Recorded, trials: list[str], examples: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        record_attention(
            recorded.folder, [one.format(id=recorded.record.trial_id) for one in trials], examples, console()
        )


def test_missing_files_are_named_before_the_model_is_built(recorded: Recorded, tmp_path: Path) -> None:
    def attempt(message: str) -> None:
        with pytest.raises(UserError, match=message):
            record_attention(tmp_path, [recorded.record.trial_id], 1, console())

    attempt(r"no plan\.json here")
    write_atomically(tmp_path / "plan.json", plan_of([recorded.spec]).model_dump_json())
    attempt("contains no trial record")
    write_record(tmp_path, recorded.record.model_copy(update={"status": "failed", "reason": "NaN"}))
    attempt(r"the trial is failed \(NaN\); allowed: a finished trial")
    write_record(tmp_path, recorded.record)
    attempt("best.safetensors: no such file")
    folder = tmp_path / "trials" / recorded.record.trial_id
    save_file({"other": torch.zeros(1)}, folder / "best.safetensors")
    attempt("examples.parquet: could not be read")
    (folder / "examples.parquet").write_bytes((recorded.trial / "examples.parquet").read_bytes())
    attempt(r"best\.safetensors: not the weights of this trial: .*missing")
    spec = json.loads(json.dumps(recorded.record.spec))
    spec["task"] |= {"modalities": {}}
    write_record(tmp_path, recorded.record.model_copy(update={"spec": spec}))
    attempt(r"task scenes has only text \(image, text\)")
    assert not (folder / FILE_NAME).exists()


def test_the_file_holds_half_precision_numbers_by_example_id(recorded: Recorded) -> None:
    tensors = load_file(recorded.trial / FILE_NAME)
    header, _ = read_attention(recorded.trial / FILE_NAME)
    assert set(tensors) == {example.example_id for example in header.examples}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
