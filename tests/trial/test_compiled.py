"""Compiled blocks (torch.compile): losses, gradients and scores as without, and reasons where there are none."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from harness.core.errors import UserError
from harness.core.record import TrialRecord
from harness.experiment.sections import Resources
from harness.model import compiled
from harness.model.backbones import build_empty
from harness.model.build import compute_as
from harness.model.compiled import Compiled, blocks_of, check_compiler
from harness.sweep.packs import makes_packs
from harness.sweep.preflight import check_models
from harness.trial.measure import WARMUP_STEPS
from harness.trial.trial import Trial
from tests.support.trials import FULL, LORA, Recorder, run, spec_of

BUDGET = {"budget": {"examples": 64, "epochs": 1}}
NONE = {"method": "none", "learning_rate": 3e-3}
STEPS = 8
MOST_GRAPHS = 4  # of rows that are alike and that differ, of one row, and of sizes that are alike by chance


def trained(folder: Path, adapter: dict[str, Any], **resources: Any) -> TrialRecord:
    folder.mkdir()
    record = run(spec_of(folder, adapter, **BUDGET), folder, **resources)
    assert record.status == "finished", record.reason
    return record


def gradients(folder: Path, adapter: dict[str, Any], **resources: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """The loss and the gradients of each of a few batches, whose rows have several lengths."""
    folder.mkdir()
    trial = Trial(spec_of(folder, adapter, **BUDGET), folder, Resources(**resources), Recorder(), lambda _: None)
    trial.build()
    trial.stages.start()
    model = trial.stages.built.model.train()
    found = []
    for number, draws in enumerate(trial.stages.built.order.batches(1, STEPS)):
        batch = trial.batch(draws[: len(draws) - number % 3])
        torch.manual_seed(number)  # of the projector's dropout
        nll_B, tokens_B = model(batch)
        loss = nll_B.sum() / tokens_B.sum()
        found.append((loss.detach(), list(torch.autograd.grad(loss, trial.stages.engine.trainable))))
    trial.stages.close()
    return found


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In the place of torch.compile: what would be compiled, run as it is."""
    asked: list[Any] = []

    def run(_: Compiled, plain: Any) -> Any:
        asked.append(plain)
        return plain

    monkeypatch.setattr(Compiled, "run", run)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", [NONE, LORA, FULL], ids=["none", "lora", "full"])
def test_losses_and_gradients_are_those_of_the_plain_model(
    adapter: dict[str, Any], again: bool, tmp_path: Path
) -> None:
    expected = gradients(tmp_path / "plain", adapter)
    counters.clear()
    found = gradients(tmp_path / "compiled", adapter, torch_compile=True, gradient_checkpointing=again)
    for (loss, own), (expected_loss, its) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for mine, other in zip(own, its, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert 0 < counters["stats"]["unique_graphs"] <= MOST_GRAPHS
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [NONE, LORA, FULL], ids=["none", "lora", "full"])
def test_a_compiled_trial_has_the_same_scores_and_tells_the_time_of_compiling(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    plain, found = trained(tmp_path / "plain", adapter), trained(tmp_path / "compiled", adapter, torch_compile=True)
    assert found.trial_id == plain.trial_id
    assert found.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=1e-5)
    assert found.metrics["test"]["perplexity"] == pytest.approx(plain.metrics["test"]["perplexity"], rel=1e-4)
    assert found.phases_s["compile"] > 0
    assert "compile" not in plain.phases_s
    assert found.phases_s["train"] < found.phases_s["compile"]
    assert found.throughput is not None
    assert 0 < found.throughput.measured_steps < 8 - WARMUP_STEPS + 1
    assert found.warnings == plain.warnings


def test_training_steps_alone_are_compiled(not_built: list[Any], tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", LORA)
    found = trained(tmp_path / "compiled", LORA, torch_compile=True)
    blocks, steps = 4, 8
    assert len(not_built) == blocks * (steps - 1)  # not in the first, which tells whether blocks draw random numbers
    assert {one.__qualname__ for one in not_built} == {"LlamaDecoderLayer.forward"}
    assert found.metrics == plain.metrics
    assert found.warnings == ()


def test_recomputed_blocks_are_compiled_too(not_built: list[Any], tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", LORA, gradient_checkpointing=True)
    found = trained(tmp_path / "compiled", LORA, torch_compile=True, gradient_checkpointing=True)
    assert len(not_built) == 4 * 7
    assert found.metrics == plain.metrics
    assert plain.memory is not None
    assert found.memory is not None
    assert found.memory.activations_bytes <= plain.memory.activations_bytes


def test_blocks_with_dropout_stay_plain_and_the_record_says_so(not_built: list[Any], tmp_path: Path) -> None:
    adapter = LORA | {"dropout": 0.1}
    plain = trained(tmp_path / "plain", adapter)
    found = trained(tmp_path / "compiled", adapter, torch_compile=True)
    assert not_built == []
    assert found.metrics == plain.metrics
    (warning,) = found.warnings
    assert warning == (
        "resources.torch_compile: not compiled: LlamaDecoderLayer has dropout, for which it would draw other numbers"
    )


def test_blocks_compute_as_before_when_a_trial_has_ended(not_built: list[Any], tmp_path: Path) -> None:
    model = build_empty(spec_of(tmp_path).backbone)
    blocks = blocks_of(model)
    one = Compiled(blocks)
    assert all("forward" in vars(block) for block in blocks)
    one.close()
    assert not any("forward" in vars(block) for block in blocks)
    from torch._dynamo.callback import callback_handler

    assert one._starts not in callback_handler.start_callbacks
    assert one._ends not in callback_handler.end_callbacks


def test_compiled_trials_are_not_packed() -> None:
    assert makes_packs(Resources(), gpus=1)
    assert not makes_packs(Resources(torch_compile=True), gpus=1)


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    vars(model.model.layers[1])["forward"] = lambda x, **_: x


def without_blocks(model: Any) -> None:
    model.model.layers = nn.ModuleList()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (hooked, "LlamaForCausalLM has forward hooks of its own in its blocks, which are not compiled; allowed: false"),
        (replaced, "LlamaForCausalLM has forward hooks of its own in its blocks"),
        (without_blocks, "LlamaForCausalLM has no blocks of transformers' class GradientCheckpointingLayer"),
    ],
)
def test_a_base_that_cannot_be_compiled_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    model = build_empty(spec_of(tmp_path).backbone)
    compute_as(model, Resources(torch_compile=True))
    change(model)
    with pytest.raises(UserError, match=re.escape(f"resources.torch_compile: {says}")):
        compute_as(model, Resources(torch_compile=True))
    compute_as(model, Resources())


def test_a_quantised_base_is_refused_before_compute(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    spec = spec_of(tmp_path, LORA, backbone={"quantization": "nf4"})
    with pytest.raises(
        UserError, match=r"resources\.torch_compile: the weights .* are packed \(backbone\.quantization\)"
    ):
        check_models([spec], Resources(torch_compile=True))


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled.torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as changed:
        changed.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
        with pytest.raises(UserError, match=r"torch_compile: .* has no Python\.h: install the headers"):
            check_compiler()
    from torch._inductor import cpp_builder, exc

    def none() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"resources\.torch_compile: found no C\+\+ compiler: install g\+\+"):
        check_compiler()
