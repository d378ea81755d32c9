"""The logits of positions that predict targets, against those that every family computes for all positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from harness.model.batch import Targets
from harness.model.target_logits import target_logits
from tests.support.families import OPTIONS, tiny

pytestmark = pytest.mark.quick

# Rows of one target and of several, of which two are predicted from one position; row 1 has none.
TARGETS = Targets.of([[(0, 3, 5), (0, 4, 9), (0, 5, 2)], [(0, 3, 7), (0, 8, 2)], [(2, 6, 2)]])


def whole(model: Any, x_BTD: Tensor) -> Tensor:
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False).logits
    return logits_BTV[TARGETS.row_N, TARGETS.source_N]


def inputs(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(3, 10, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("family", OPTIONS)
def test_every_familys_logits_are_those_of_its_own_forward(family: str) -> None:
    model = tiny(family, torch.float64)
    x_BTD = inputs(model)
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
    expected_NV = whole(model, x_BTD)
    seen.clear()
    found_NV = target_logits(model, x_BTD, TARGETS)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-12, atol=1e-12)
    assert found_NV.std() > 1e-3
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 1  # that of this test


@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 7}),
    ],
)
def test_logits_that_are_capped_or_scaled_are_so_here(family: str, option: dict[str, Any]) -> None:
    common = {**OPTIONS["llama"], "logit_scale": 1.0, **option}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common)).eval().double()
    x_BTD = inputs(model)
    found_NV = target_logits(model, x_BTD, TARGETS)
    torch.testing.assert_close(found_NV, whole(model, x_BTD), rtol=1e-12, atol=1e-12)
    hidden: list[Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, y: hidden.append(y[0]))
    target_logits(model, x_BTD, TARGETS)
    assert (hidden[0] - found_NV).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("trocr", {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "d_model": 32}),
        ("xlstm", {"hidden_size": 32, "num_blocks": 2, "num_hidden_layers": 2, "num_heads": 2}),
    ],
)
def test_a_family_that_keeps_all_logits_gives_those_of_the_targets(family: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, **options)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    x_BTD = inputs(model)
    found_NV = target_logits(model, x_BTD, TARGETS)
    torch.testing.assert_close(found_NV, whole(model, x_BTD), rtol=1e-12, atol=1e-12)
    assert found_NV.std() > 1e-3


def test_gradients_are_those_of_all_positions() -> None:
    model = tiny("llama", torch.float64)
    head = model.get_output_embeddings().weight.requires_grad_()
    x_BTD = inputs(model).requires_grad_()
    weight_NV = torch.randn(6, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((whole(model, x_BTD) * weight_NV).sum(), [x_BTD, head])
    found = torch.autograd.grad((target_logits(model, x_BTD, TARGETS) * weight_NV).sum(), [x_BTD, head])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_does_not_name_its_output_layer_computes_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", torch.float64)
    x_BTD = inputs(model)
    expected_NV = target_logits(model, x_BTD, TARGETS)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(target_logits(model, x_BTD, TARGETS), expected_NV, rtol=1e-12, atol=1e-12)


def test_logits_of_an_unknown_shape_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", torch.float64)
    plain = model.forward

    def forward(**options: Any) -> Any:
        output = plain(**options)
        output.logits = output.logits.transpose(0, 1)
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RuntimeError, match=r"logits of the shape \(6, 1, 64\), which is unknown"):
        target_logits(model, inputs(model), TARGETS)


def test_targets_are_summed_one_by_one() -> None:
    values_N = torch.arange(1.0, 7.0)
    assert TARGETS.sums(values_N).tolist() == [6.0, 9.0, 6.0]
    assert TARGETS.first_source == 3
    assert (TARGETS.count, TARGETS.longest) == (3, 3)
    assert TARGETS.ignored().label_N.unique().tolist() == [-100]
