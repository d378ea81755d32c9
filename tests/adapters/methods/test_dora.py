"""DoRA: equal to Hugging Face PEFT's, its norm, its options. The equations themselves: test_layer_methods.py.

Shapes: B rows, T positions, I and O input and output features of a layer.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.methods import dora
from adapters.methods.dora import DoRA, DoRAConfig, DoRADelta
from adapters.placement.roles import Target
from adapters.placement.router import Router
from harness.core.errors import UserError
from tests.support.adapted import adapted_model, logits
from tests.support.adapters import adapt, disturb, embeds
from tests.support.models import tiny_llama, with_biases
from tests.support.peft import MODULES, check_equal


def delta_of(layer: Any, rows: tuple[int, ...] | None = None, **options: Any) -> Any:
    outside, inside = layer.weight.shape
    target = Target("linear", "v", inside, len(rows or range(outside)), rows, layer)
    return DoRA(DoRAConfig(rank=3, **options)).delta(target, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make_model", MODULES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_agnostic_equals_pefts_layers_in_forward_and_gradients(make_model: Any) -> None:
    """Float64, a bias in every OPT and GPT-2 layer, a fused and transposed one in GPT-2."""
    model, theirs = with_biases(make_model).double(), with_biases(make_model).double()
    adapters = adapt(model, DoRA(DoRAConfig(rank=3, alpha=5.0)), "agnostic").double()
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=MODULES[make_model])
    peft_model: Any = get_peft_model(theirs, config)
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, parameter in adapters.named_parameters():
        _, path, _, _, _, _, kind = name.split(".")
        inside = "weight" if kind != "lora_magnitude_vector" else "default.weight"
        kind = kind if inside == "default.weight" else f"{kind}.default"
        pairs.append((parameter, theirs.get_parameter(f"{path.replace('/', '.')}.{kind}.{inside}")))
        pairs[-1][1].data.copy_(parameter.data)
    check_equal(model, peft_model, theirs, pairs)


def test_it_starts_with_the_norm_of_every_row_of_the_weight() -> None:
    linear = nn.Linear(12, 8)
    delta = delta_of(linear, rows=(1, 4, 5))
    torch.testing.assert_close(delta.lora_magnitude_vector, linear.weight[[1, 4, 5]].norm(dim=1))
    assert torch.equal(delta.ratio(), torch.ones(3))
    assert set(delta.state_dict()) == {"lora_A", "lora_B", "lora_magnitude_vector"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_starts_as_the_identity_in_half_precision_too(dtype: torch.dtype) -> None:
    linear = nn.Linear(12, 8).to(dtype)
    delta = delta_of(linear)
    assert delta.lora_magnitude_vector.dtype == torch.float32
    y_BTO = linear(torch.randn(2, 5, 12, dtype=dtype))
    for adapter in (delta, delta.to(dtype)):
        assert torch.equal(adapter(torch.randn(2, 5, 12, dtype=dtype), y_BTO), y_BTO)


def test_a_row_of_zeros_in_the_weight_stays_one_and_has_finite_gradients() -> None:
    linear = nn.Linear(12, 8)
    nn.init.zeros_(linear.weight[2])
    delta = delta_of(linear)
    x_BTI = torch.randn(2, 5, 12)
    y_BTO = delta(x_BTI, linear(x_BTI))
    assert torch.equal(y_BTO, linear(x_BTI))
    y_BTO.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in delta.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_each_groups_norm_is_computed_once_however_many_spans_it_has(grad: bool) -> None:
    """And not for a group without a token, whose gradients are zero."""
    model = tiny_llama()
    adapters = adapt(model, DoRA(DoRAConfig(rank=3, where=("q",))))
    adapters.router.set_context_ids(torch.tensor([[1, 1, 1, 1, 1, 1]]))
    with patch.object(DoRADelta, "ratio", autospec=True, side_effect=DoRADelta.ratio) as ratio:
        with torch.set_grad_enabled(grad):
            found_BTV = model(inputs_embeds=embeds(3, 6), use_cache=False).logits
        assert ratio.call_count == 2  # two layers
        if grad:
            found_BTV.sum().backward()
            for name, p in adapters.named_parameters():
                assert p.grad is not None, name
                assert p.grad.any() == ("text" in name), name
        ratio.reset_mock()
        adapters.router.set_context_ids(torch.tensor([[1, 0, 1, 0, 1, 0]]))
        model(inputs_embeds=embeds(3, 6), use_cache=False)
        assert ratio.call_count == 2 * 2


def decode(adapted: Any, tokens: int, past: Any = None, write: Any = None) -> tuple[Tensor, Any]:
    """Decode given tokens one by one with a KV cache, outside of ``generate``: their logits, and the cache."""
    ids_BT = torch.randint(64, (2, 4 + tokens), generator=torch.Generator().manual_seed(4))
    found: list[Tensor] = []
    for start, stop in ((0, 4), *((n, n + 1) for n in range(4, 4 + tokens))):
        output = adapted(
            ids_BT[:, start:stop], context_ids=torch.ones(stop - start).long(), past_key_values=past, use_cache=True
        )
        past = output.past_key_values
        found.append(output.logits[:, -1].detach())
        if write is not None and stop == 6:
            write()
    return torch.stack(found), past


def test_a_decoding_loop_of_the_callers_own_computes_the_norm_once_per_sequence() -> None:
    adapted = adapted_model(tiny_llama(), {"method": "dora", "rank": 3})
    layers = 14
    with torch.no_grad(), patch.object(DoRADelta, "ratio", autospec=True, side_effect=DoRADelta.ratio) as ratio:
        found, _ = decode(adapted, 5)
        assert ratio.call_count == layers  # of the group text, in the pass over the prompt
        decode(adapted, 5)
        assert ratio.call_count == 2 * layers  # another sequence: anew
    whole = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))
    expected = logits(adapted, adapted.base_model.get_input_embeddings()(whole), torch.ones(9).long())
    torch.testing.assert_close(found[-1], expected[:, -1], rtol=1e-4, atol=1e-4)


def named(module: nn.Module, part: str) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if part in name]


def move(p: nn.Parameter) -> None:
    p.data = p.data * 1.2


WRITES: dict[str, Any] = {
    "a matrix": lambda adapted: [p.mul_(1.5) for p in named(adapted.adapters, "lora_B")],
    "a magnitude": lambda adapted: [p.mul_(2) for p in named(adapted.adapters, "magnitude")],
    "the layers' weights": lambda adapted: [p.mul_(1.2) for p in named(adapted.base_model, "proj")],
    "their place": lambda adapted: [move(p) for p in named(adapted.base_model, "proj")],
    "weights that are loaded": lambda adapted: adapted.load_state_dict(
        {name: 1.3 * tensor for name, tensor in adapted.state_dict().items()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_while_decoding_is_seen_by_the_next_token(what: str) -> None:
    """Against a model that keeps nothing between passes."""
    adapted = adapted_model(tiny_llama(), {"method": "dora", "rank": 3})
    other = copy.deepcopy(adapted)
    with torch.no_grad():
        found, _ = decode(adapted, 5, write=lambda: WRITES[what](adapted))
        with patch.object(DoRADelta, "written", return_value=None):
            expected, _ = decode(other, 5, write=lambda: WRITES[what](other))
        assert torch.equal(found, expected)
        unwritten, _ = decode(adapted_model(tiny_llama(), {"method": "dora", "rank": 3}), 5)
    assert torch.equal(found[:3], unwritten[:3])
    assert not torch.equal(found[3:], unwritten[3:])


def test_what_no_counter_sees_is_seen_by_the_next_sequence_and_after_a_training_pass() -> None:
    """DeepSpeed writes through ``.data``; so does whoever loads weights so."""
    adapted = adapted_model(tiny_llama(), {"method": "dora", "rank": 3})
    with torch.no_grad():
        _, past = decode(adapted, 2)
    adapted(torch.ones(2, 3).long(), context_ids=torch.zeros(3).long()).logits.sum().backward()  # of the other group
    for name, p in adapted.adapters.named_parameters():
        if name.endswith("lora_B"):
            p.data.mul_(1.5)
    again = copy.deepcopy(adapted)
    with torch.no_grad(), patch.object(DoRADelta, "ratio", autospec=True, side_effect=DoRADelta.ratio) as ratio:
        found = adapted(torch.ones(2, 1).long(), context_ids=torch.ones(1).long(), past_key_values=past).logits
        assert ratio.call_count == 14  # though it continues a sequence
        assert torch.equal(decode(adapted, 3)[0], decode(again, 3)[0])
    assert found.isfinite().all()


def test_on_a_bf16_base_it_equals_the_plain_path_in_float64() -> None:
    """Forward and gradients, up to the rounding of bf16; parameters are in fp32."""

    def found(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor | None]]:
        torch.manual_seed(0)
        linear = nn.Linear(12, 8).to(torch.bfloat16).to(dtype)
        target = Target("linear", "v", 12, 8, None, linear)
        method, generator = DoRA(DoRAConfig(rank=3, alpha=5.0)), torch.Generator().manual_seed(0)
        change = method.change(target, {g: method.delta(target, generator) for g in ("a", "b")}, None, generator)
        disturb(change.parameters(), scale=0.1)
        change = change.double() if dtype == torch.float64 else change
        router = Router({"a": "a", "b": "b"})
        router.set_context_ids(torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]]))
        x_BTI = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        y_BTO = linear(x_BTI)
        if dtype == torch.float64:  # the plain path: each delta, token by token
            owner_BT = router.layout.group_ids_XT
            tokens = [(change.delta("ab"[owner_BT[b, t]]), b, t) for b in range(2) for t in range(6)]
            changed_BTO = torch.stack([d(x_BTI[b, t], y_BTO[b, t]) for d, b, t in tokens]).view_as(y_BTO)
        else:
            changed_BTO = change(x_BTI, y_BTO, router.layout)
        changed_BTO.double().square().sum().backward()  # type: ignore[no-untyped-call]
        return changed_BTO.detach().double(), {name: p.grad for name, p in change.named_parameters()}

    (found_BTO, grads), (expected_BTO, expected_grads) = found(torch.bfloat16), found(torch.float64)
    torch.testing.assert_close(found_BTO, expected_BTO, rtol=2e-2, atol=2e-2)
    for name, grad in grads.items():
        expected = expected_grads[name]
        assert grad is not None
        assert expected is not None
        torch.testing.assert_close(grad.double(), expected, rtol=3e-2, atol=2e-2 * float(expected.abs().max()))


def test_under_autocast_the_norm_keeps_full_precision() -> None:
    delta = delta_of(nn.Linear(64, 32))
    disturb(delta.parameters())
    expected_O = delta.ratio()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(delta.ratio(), expected_O)


def test_dropout_acts_in_training_only_and_on_the_low_rank_path_only() -> None:
    linear = nn.Linear(6, 4)
    plain, dropping = delta_of(linear), delta_of(linear, dropout=0.5)
    x_BTI = torch.ones(1, 400, 6)
    torch.manual_seed(0)
    # With B zero and another magnitude, W x is all there is.
    for delta in (plain, dropping):
        disturb([delta.lora_magnitude_vector])
    torch.testing.assert_close(dropping(x_BTI, linear(x_BTI)), plain(x_BTI, linear(x_BTI)))
    for delta in (plain, dropping):
        disturb([delta.lora_B])
    dropped_BTO, expected_BTO = dropping(x_BTI, linear(x_BTI)), plain(x_BTI, linear(x_BTI))
    assert dropped_BTO[0].unique(dim=0).shape[0] > 30
    torch.testing.assert_close(dropped_BTO.mean(dim=1), expected_BTO.mean(dim=1), rtol=0.2, atol=0.2)
    torch.testing.assert_close(dropping.eval()(x_BTI, linear(x_BTI)), expected_BTO)


def test_it_is_built_and_runs_without_memory() -> None:
    with torch.device("meta"):
        delta = delta_of(nn.Linear(12, 8), rows=(1, 4, 5))
        y_BTO = delta(torch.empty(2, 5, 12), torch.empty(2, 5, 3))
    assert (y_BTO.shape, y_BTO.device.type) == ((2, 5, 3), "meta")
    assert sum(p.numel() for p in delta.parameters()) == 3 * (12 + 3) + 3


def test_a_weight_that_cannot_be_read_is_an_error_that_names_the_layer() -> None:
    linear: Any = nn.Linear(12, 8)
    linear.weight = nn.Parameter(torch.zeros(8, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"layer linear \(Linear\) has no weight matrix that can be read"):
        delta_of(linear)


def test_a_rank_larger_than_the_layer_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"rank 17 is larger than layer .*k_proj \(k\), .* 32 inputs and 16 outputs; allowed: 1 to 16"
    ):
        adapt(tiny_llama(), DoRA(DoRAConfig(rank=17)))


@pytest.mark.parametrize("rows", [None, (1, 4, 5)])
def test_what_a_method_before_it_changed_is_merged_as_it_is_computed(rows: tuple[int, ...] | None) -> None:
    """BitFit then DoRA: the added bias is scaled with ``W x``, the layer's own bias is not."""
    linear = nn.Linear(12, 8).double()
    delta = delta_of(linear, rows).double()
    disturb(delta.parameters())
    part = list(rows or range(8))
    added_O, x_BTI = torch.randn(len(part)).double(), torch.randn(2, 5, 12).double()
    expected_BTO = delta(x_BTI, linear(x_BTI)[..., part] + added_O)
    weight_OI, bias_O = delta.merge(linear.weight[part], linear.bias[part] + added_O)
    torch.testing.assert_close(F.linear(x_BTI, weight_OI, bias_O), expected_BTO, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank\n.*greater than 0"),
        ({"alpha": 0.0}, "alpha\n.*greater than 0"),
        ({"dropout": 1.0}, "dropout\n.*less than 1"),
        ({"where": "B"}, "where.*\n.*'A', 'F' or 'AF'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DoRAConfig(**options)


def test_labels() -> None:
    assert DoRA(DoRAConfig()).label() == "DoRA r=8"
    assert DoRA(dora.DoRAConfig(rank=2, where=("q", "v"))).label() == "DoRA r=2 q,v"
