"""The DeepSpeed engine against a plain PyTorch loop, its errors, and its checkpoints.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import get_scheduler

from adapters.attach import Adapters
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from harness.experiment.sections import Optimizer
from harness.model.batch import IGNORED, Batch
from harness.model.context_model import ContextModel
from harness.trial.engine import Engine
from harness.trial.measure import PeakMemory
from tests.support.adapters import disturb
from tests.support.batches import batch_of
from tests.support.batches import model_of as context_model_of
from tests.support.models import tiny_llama
from tests.support.trials import partition_everything

STEPS = 5
# Clipping is active at 0.2 (checked below) and every step has another learning rate.
OPTIONS = Optimizer(
    learning_rate=2e-2, per_device_train_batch_size=4, adam_beta1=0.8, weight_decay=0.1, max_grad_norm=0.2,
    lr_scheduler_type="cosine", warmup_ratio=0.4,
)  # fmt: skip
# ZeRO-1 and -2 are one class of DeepSpeed's, and what is trained is one list of parameters to it.
each_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
each_kind = pytest.mark.parametrize("kind", ["lora", "full"])
each_kind_and_stage = pytest.mark.parametrize(
    ("kind", "stage"),
    [
        pytest.param(kind, stage, marks=pytest.mark.slow if (kind == "full" and stage != 3) or stage == 1 else [])
        for kind in ("lora", "full")
        for stage in (0, 1, 2, 3)
    ],
)


@pytest.fixture(autouse=True)
def _partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    partition_everything(monkeypatch)


def model_of(kind: str, tied: bool = False) -> ContextModel:
    """The same weights at every call."""
    language_model = tiny_llama()
    if tied:
        language_model.config.tie_word_embeddings = True
        language_model.tie_weights()
        assert language_model.lm_head.weight is language_model.model.embed_tokens.weight
    language_model.requires_grad_(kind == "full")
    contexts = ("image", "text")
    router = Router(resolve_grouping("specific", contexts)[0] if kind == "lora" else dict.fromkeys(contexts))
    adapters = Adapters(language_model, dict.fromkeys(router.groups, LoRA(LoRAConfig(rank=3))), router, seed=0)
    adapters.attach(language_model)
    torch.manual_seed(3)
    return context_model_of(language_model, {"image": 20}, adapters, router).train()


def batches(count: int = STEPS) -> list[Batch]:
    """Targets of different lengths, so that a mean over rows is not a mean over tokens."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        targets_BT = torch.randint(3, 20, (4, 9), generator=generator)
        for row, length in enumerate((9, 3, 6, 1)):
            targets_BT[row, length:] = IGNORED
        made.append(batch_of({"image": torch.randn(4, 4, 20, generator=generator)}, targets_BT))
    return made


def plain_losses(kind: str, options: Optimizer = OPTIONS) -> tuple[list[float], list[float], ContextModel]:
    """Losses, gradient norms before clipping, and the trained model of a loop in plain PyTorch."""
    model = model_of(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate or 0.0, betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon, weight_decay=options.weight_decay,
    )  # fmt: skip
    accumulation = options.gradient_accumulation_steps
    steps = STEPS // accumulation
    scheduler = get_scheduler(options.lr_scheduler_type, optimizer, round(options.warmup_ratio * steps), steps)
    losses, norms = [], []
    for number, batch in enumerate(batches(), start=1):
        nll_B, tokens_B = model(batch)
        loss: Tensor = nll_B.sum() / tokens_B.sum()
        losses.append(loss.item())
        (loss / accumulation).backward()
        if number % accumulation == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm or math.inf).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, norms, model


def engine_of(kind: str, stage: int = 0, options: Optimizer = OPTIONS) -> Engine:
    return Engine(model_of(kind), options, total_steps=STEPS // options.gradient_accumulation_steps, zero_stage=stage)


@each_kind_and_stage
def test_every_zero_stage_trains_as_plain_pytorch_does(kind: str, stage: int, tmp_path: Path) -> None:
    """fp32, 5 steps: 1e-4 relative on the losses and 1e-4 absolute on weights that moved by 1e-2 and more."""
    expected, norms, model = plain_losses(kind)
    assert all(norm > 2 * OPTIONS.max_grad_norm for norm in norms), "clipping was not put to the test"
    engine = engine_of(kind, stage)
    rates = []
    found = []
    for batch in batches():
        rates.append(engine.learning_rate)
        found.append(engine.train_step(batch))
    assert found == pytest.approx(expected, rel=1e-4)
    cosine = [0.5 * (1 + math.cos(math.pi * n / 3)) for n in range(3)]
    assert rates == pytest.approx([2e-2 * x for x in (0, 0.5, *cosine)], abs=1e-9)
    engine.save_weights(tmp_path / "weights.safetensors")
    weights = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = dict(model_of(kind).named_parameters())
    assert set(weights) == set(trained)
    for name, p in trained.items():
        torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=1e-4, msg=name)
    assert max((p - start[name]).abs().max().item() for name, p in trained.items()) > 1e-2
    frozen = {n: p for n, p in engine.model.named_parameters() if n not in trained}
    if stage < 3:  # stage 3 partitions parameters
        assert all(torch.equal(p, start[name]) for name, p in frozen.items())
    engine.close()


@each_stage
def test_gradients_are_accumulated(stage: int) -> None:
    options = OPTIONS.model_copy(update={"gradient_accumulation_steps": 2, "warmup_ratio": 0.0})
    engine = engine_of("lora", stage, options)
    assert [engine.train_step(batch) for batch in batches()] == pytest.approx(
        plain_losses("lora", options)[0], rel=1e-4
    )
    engine.close()


@each_stage
def test_a_fused_step_differs_by_rounding_only(stage: int) -> None:
    """Losses of 5 steps, with decay and clipping: 1e-5 relative."""
    options = OPTIONS.model_copy(update={"weight_decay": 0.1, "gradient_accumulation_steps": 1})
    found = []
    for fused in (True, False):
        model = model_of("lora")
        model.adapters.compute_together(fused)
        engine = Engine(model, options, STEPS, stage, fused=fused)
        found.append([engine.train_step(batch) for batch in batches()])
        engine.close()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.quick
def test_clipping_can_be_disabled() -> None:
    options = OPTIONS.model_copy(update={"max_grad_norm": 0.0, "adam_epsilon": 0.1})
    expected = plain_losses("lora", options)[0]
    clipped = plain_losses("lora", options.model_copy(update={"max_grad_norm": 0.2}))[0]
    engine = engine_of("lora", 0, options)
    found = [engine.train_step(batch) for batch in batches()]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(clipped, rel=1e-3)
    engine.close()


@each_kind_and_stage
def test_bf16_learns(kind: str, stage: int) -> None:
    options = OPTIONS.model_copy(update={"bf16": True, "max_grad_norm": 1.0, "lr_scheduler_type": "constant"})
    engine = engine_of(kind, stage, options)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    batch = batches(1)[0]
    losses = [engine.train_step(batch) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(losses)  # all finite
    engine.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_not_finite_is_an_error_and_changes_no_weight(stage: int, tmp_path: Path) -> None:
    engine = engine_of("lora", stage)
    engine.train_step(batches()[0])
    engine.save_weights(tmp_path / "before.safetensors")
    broken = copy.deepcopy(batches()[1])
    broken.items["image"].features_MD[9, 5] = math.nan
    with pytest.raises(FloatingPointError, match="training loss became nan; a lower learning_rate may help"):
        engine.train_step(broken)
    engine.save_weights(tmp_path / "after.safetensors")
    before, after = (safetensors.torch.load_file(tmp_path / f"{x}.safetensors") for x in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.close()


# ── Weights


@torch.no_grad()
def nll(engine: Engine) -> Tensor:
    nll_B: Tensor = engine.model(batches()[0])[0]
    return nll_B


@each_stage
def test_saved_weights_are_restored_exactly(stage: int, tmp_path: Path) -> None:
    engine = engine_of("lora", stage)
    path = tmp_path / "new folder" / "weights.safetensors"
    for batch in batches()[:3]:
        engine.train_step(batch)
    engine.save_weights(path)
    expected_B = nll(engine)
    for batch in batches()[3:]:
        engine.train_step(batch)
    assert not torch.equal(nll(engine), expected_B)
    engine.load_weights(path)
    assert torch.equal(nll(engine), expected_B)
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]
    engine.close()


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    engine = engine_of("lora")
    path = tmp_path / "weights.safetensors"
    engine.save_weights(path)
    tensors = safetensors.torch.load_file(path)
    tensors["stranger"] = tensors.pop("projectors.image.layers.1.bias")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(KeyError, match=r"missing: \['projectors.image.layers.1.bias'\], unexpected: \['stranger'\]"):
        engine.load_weights(path)
    engine.close()


# ── Checkpoints


@each_kind_and_stage
def test_a_resumed_engine_continues_bit_exactly(kind: str, stage: int, tmp_path: Path) -> None:
    first = engine_of(kind, stage)
    for batch in batches()[:3]:
        first.train_step(batch)
    first.save(tmp_path, "three")
    expected = [first.train_step(batch) for batch in batches()[3:]]
    first.close()
    resumed = engine_of(kind, stage)
    resumed.load(tmp_path, "three")
    assert [resumed.train_step(batch) for batch in batches()[3:]] == expected
    resumed.close()


def test_bf16_resumes_bit_exactly_too(tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"bf16": True})
    first = engine_of("lora", 0, options)
    for batch in batches()[:3]:
        first.train_step(batch)
    first.save(tmp_path, "three")
    expected = [first.train_step(batch) for batch in batches()[3:]]
    first.close()
    resumed = engine_of("lora", 0, options)
    resumed.load(tmp_path, "three")
    assert [resumed.train_step(batch) for batch in batches()[3:]] == expected
    resumed.close()


def test_a_checkpoint_contains_only_the_trainable_parameters(tmp_path: Path) -> None:
    engine = engine_of("lora")
    engine.train_step(batches()[0])
    engine.save(tmp_path, "one")
    saved = torch.load(tmp_path / "one" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert set(saved) == {name for name, p in engine.model.named_parameters() if p.requires_grad}
    engine.close()


@each_kind
@pytest.mark.parametrize("stage", [0, 3])
def test_tied_embeddings_are_saved_only_if_trained_and_once(kind: str, stage: int, tmp_path: Path) -> None:
    def tied() -> Engine:
        return Engine(model_of(kind, tied=True), OPTIONS, STEPS, stage)

    first = tied()
    names = {name for name, p in first.model.named_parameters() if p.requires_grad}
    assert not any("lm_head" in name for name in names)
    assert any("embed_tokens" in name for name in names) is (kind == "full")
    first.train_step(batches()[0])
    first.save(tmp_path, "one")
    first.save_weights(tmp_path / "weights.safetensors")
    expected = [first.train_step(batch) for batch in batches()[1:]]
    first.close()
    assert set(safetensors.torch.load_file(tmp_path / "weights.safetensors")) == names
    (state,) = (tmp_path / "one").glob("*model_states.pt")
    assert set(torch.load(state, weights_only=False)["module"]) == names
    resumed = tied()
    resumed.load(tmp_path, "one")
    assert [resumed.train_step(batch) for batch in batches()[1:]] == expected
    resumed.load_weights(tmp_path / "weights.safetensors")
    with resumed._gathered(resumed._kept):
        model = resumed.model.language_model
        assert model.lm_head.weight is model.model.embed_tokens.weight
    resumed.close()


@each_stage
def test_a_missing_checkpoint_is_an_error(stage: int, tmp_path: Path) -> None:
    engine = engine_of("lora", stage)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'nine' in"):
        engine.load(tmp_path, "nine")
    engine.close()


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.made),))


@pytest.mark.parametrize("file", ["*model_states.pt", "*optim_states.pt"])
def test_a_checkpoint_runs_no_code(file: str, tmp_path: Path) -> None:
    engine = Engine(model_of("lora"), OPTIONS, STEPS, zero_stage=2)
    engine.train_step(batches(1)[0])
    engine.save(tmp_path, "epoch-1")
    (path,) = (tmp_path / "epoch-1").glob(file)
    content = torch.load(path, weights_only=False)
    torch.save({**content, "ds_version": Hostile(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match=rf"{path.name}: has more than data, so it is not read; remove the folder"):
        engine.load(tmp_path, "epoch-1")
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists(), "the file would have run code"
    with pytest.raises(ValueError, match=r"names the checkpoint '\.\./\.\./epoch-1', which is not in it"):
        engine.load(tmp_path / "a" / "b", "../../epoch-1")
    engine.close()


def test_a_checkpoint_of_other_trainable_parameters_is_an_error_that_names_them(tmp_path: Path) -> None:
    engine = engine_of("lora")
    engine.train_step(batches()[0])
    engine.save(tmp_path, "one")
    engine.close()
    other = engine_of("full")
    with pytest.raises(KeyError, match=r"missing: \['language_model.*unexpected: \['adapters\.layers"):
        other.load(tmp_path, "one")
    other.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_what_another_stage_of_the_trial_trains_is_kept_and_resumed(stage: int, tmp_path: Path) -> None:
    """The language model is frozen here, but was trained before: it belongs to the weights and to the checkpoint."""
    model = model_of("lora")
    before = {f"language_model.{name}": p for name, p in model.language_model.named_parameters()}
    disturb(before.values())
    expected = {name: p.detach().clone() for name, p in before.items()}
    keeps = [*expected, *(name for name, p in model.named_parameters() if p.requires_grad)]
    first = Engine(model, OPTIONS, STEPS, stage, keeps)
    first.train_step(batches()[0])
    first.save(tmp_path, "one")
    first.save_weights(tmp_path / "weights.safetensors")
    first.close()
    saved = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert set(saved) == set(keeps)
    resumed = Engine(model_of("lora"), OPTIONS, STEPS, stage, keeps)
    resumed.load(tmp_path, "one")
    resumed.save_weights(tmp_path / "again.safetensors")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in keeps)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    resumed.close()


@pytest.mark.parametrize("stage", [0, 2])
def test_weight_decay_leaves_scales_alone(stage: int) -> None:
    """IA3 on images that no batch has: its scales stay one, while those of text move and the projector decays."""
    language_model, contexts = tiny_llama(), ("image", "text")
    language_model.requires_grad_(False)
    router = Router(resolve_grouping("specific", contexts)[0])
    adapters = Adapters(language_model, dict.fromkeys(router.groups, IA3(IA3Config())), router, seed=0)
    adapters.attach(language_model)
    model = context_model_of(language_model, {"image": 20}, adapters, router).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    engine = Engine(model, OPTIONS, STEPS, stage)
    for _ in range(STEPS):
        engine.train_step(batch_of({"image": torch.zeros(4, 0, 20)}, torch.randint(3, 20, (4, 9))))
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, before[name]) for name, p in after.items() if "group_image" in name)
    assert not any(torch.equal(p, before[name]) for name, p in after.items() if "group_text" in name)
    projector = [name for name in after if "adapters" not in name]
    assert all(after[name].abs().sum() < before[name].abs().sum() for name in projector)
    engine.close()


def test_without_weight_decay_there_is_one_group_as_before() -> None:
    engine = engine_of("lora", options=OPTIONS.model_copy(update={"weight_decay": 0.0}))
    assert [len(group["params"]) for group in engine._optimizer.param_groups] == [len(engine._trainable)]
    engine.close()


def test_accumulating_is_true_between_steps() -> None:
    engine = engine_of("lora", 0, OPTIONS.model_copy(update={"gradient_accumulation_steps": 2}))
    waiting = []
    for batch in batches(4):
        engine.train_step(batch)
        waiting.append(engine.accumulating)
    assert waiting == [True, False, True, False]
    engine.close()


# ── Memory


@each_kind
def test_memory_by_kind_is_that_of_the_tensors(kind: str) -> None:
    """fp32 Adam: two moments of four bytes for every trained parameter, gradients likewise."""
    engine = engine_of(kind)
    engine.train_step(batches()[0])
    memory = engine.memory(1234, PeakMemory(torch.device("cpu")))
    parameters = list(engine.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    assert memory.weights_bytes == 4 * sum(p.numel() for p in parameters)
    assert memory.gradients_bytes == 4 * trained
    counters = 4 * sum(p.requires_grad for p in parameters)  # Adam's step, one for each tensor
    assert memory.optimizer_bytes == 8 * trained + counters
    assert memory.activations_bytes == 1234
    engine.close()


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_memory_under_zero_counts_every_parameter_once(stage: int) -> None:
    """One process: nothing is shared with others, so the figures are those of stage 0."""
    engine, plain = engine_of("lora", stage), engine_of("lora", 0)
    for e in (engine, plain):
        e.train_step(batches()[0])
    peak = PeakMemory(torch.device("cpu"))
    found, expected = engine.memory(0, peak), plain.memory(0, peak)
    assert found.weights_bytes == expected.weights_bytes
    assert found.gradients_bytes == expected.gradients_bytes
    moments = 8 * sum(p.numel() for p in plain.model.parameters() if p.requires_grad)
    # From stage 1 on there may also be a flat copy of the trained parameters, padded to a multiple of a few bytes.
    assert moments <= found.optimizer_bytes <= 1.5 * moments + 1024
    engine.close()
    plain.close()
