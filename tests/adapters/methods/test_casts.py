"""Adapters in fp32 on a bf16 base: each parameter is cast once per pass, whatever the layout, and not per new token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import base
from adapters.placement.router import Router
from tests.support.adapted import adapted_model, each_spec
from tests.support.adapters import disturb
from tests.support.models import tiny_llama

with_forms = each_spec(
    "lora", "lora, many columns", "pissa", "dora", "dora, many columns", "vera", "bitfit", "ia3", "ln_tuning",
    "bottleneck", "parallel bottleneck", "moka",
)  # fmt: skip
# A new token has one group: no layout to choose a form for.
each_method = each_spec("lora", "pissa", "dora", "vera", "bitfit", "bottleneck", "moka")
SPANS_T = torch.arange(64) // 16 % 2
LAYOUTS = {
    "4 spans": SPANS_T,
    "32 spans": torch.arange(64) // 2 % 2,
    "rows differ": torch.stack([SPANS_T, 1 - SPANS_T]),
}


class Casts(TorchDispatchMode):
    """Counts casts, in all and of each of the tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
        self.of: Counter[str] = Counter()
        self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._to_copy and (kwargs or {}).get("dtype") is not None:
            self.all += 1
            name = self.names.get(args[0].untyped_storage().data_ptr())
            if name is not None:
                self.of[name] += 1
        return func(*args, **(kwargs or {}))


def casts(adapted: Any, run: Callable[[], Any]) -> Casts:
    with Casts(dict(adapted.adapters.state_dict(keep_vars=True))) as mode:
        run()
    return mode


@with_forms
def test_a_pass_casts_a_parameter_once_whatever_the_layout(spec: Any) -> None:
    """Forward, and again backward, where casts that were not kept are made anew."""
    adapted = adapted_model(tiny_llama().bfloat16(), spec).train()
    x_BTD = torch.randn(2, 64, 32).bfloat16().requires_grad_()
    numbers: dict[str, tuple[int, int]] = {}

    def check(name: str, ids: Tensor) -> None:
        kept: list[Tensor] = []
        forward = casts(
            adapted, lambda: kept.append(adapted(inputs_embeds=x_BTD, context_ids=ids, use_cache=False).logits)
        )
        backward = casts(adapted, lambda: kept[0].sum().backward())  # type: ignore[no-untyped-call]
        for found in (forward, backward):
            assert found.of == Counter(dict.fromkeys(found.of, 1)), (name, found.of)
        numbers[name] = (forward.all, backward.all)

    for name, ids in LAYOUTS.items():
        check(name, ids)
    # LoRA's forms cast either every group's pair, or the pairs of all groups together.
    forms = spec["method"] in ("lora", "dora")
    assert forms or len({forward for forward, _ in numbers.values()}) == 1, numbers
    assert numbers["32 spans"][0] <= numbers["4 spans"][0]


@each_method
def test_a_new_token_casts_no_parameter(spec: Any) -> None:
    adapted = adapted_model(tiny_llama().bfloat16(), spec).eval()

    def found(new_tokens: int) -> Counter[str]:
        def run() -> None:
            adapted.generate(
                torch.arange(12).view(2, 6), context_ids=SPANS_T[12:18], new_token_context="text",
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

        return casts(adapted, run).of

    # The first new token is that of the prompt's pass; the second may need what the prompt's form has not cast alone.
    assert found(6) == found(2)


@each_method
def test_generation_is_that_of_passes_without_a_generation_and_knows_new_weights(spec: Any) -> None:
    """The prompt lacks the group of the new tokens, whose constants are computed with the first of them."""
    adapted = adapted_model(tiny_llama(), spec).eval()
    x_BTD = torch.randn(2, 5, 32)
    embed = adapted.base_model.get_input_embeddings()
    seen = []
    for _ in range(2):
        ids_BT = adapted.generate(
            inputs_embeds=x_BTD, context_ids=torch.zeros(5, dtype=torch.long), new_token_context="text",
            max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        embeds_BTD = torch.cat([x_BTD, embed(ids_BT)], dim=1)
        contexts_T = torch.tensor([0] * 5 + [1] * 5)
        with torch.no_grad():
            logits_BTV = adapted(inputs_embeds=embeds_BTD, context_ids=contexts_T, use_cache=False).logits
        assert torch.equal(logits_BTV[:, 4:-1].argmax(dim=-1), ids_BT)
        seen.append(ids_BT)
        with torch.no_grad():
            for p in adapted.adapters.parameters():
                p.data.add_(torch.randn(p.shape), alpha=0.5)  # as DeepSpeed writes: the version counter does not see it
    assert not torch.equal(*seen)


def test_the_rows_of_a_table_have_the_gradients_of_an_embedding() -> None:
    """What a GPU uses: one product in the place of additions to the same rows."""
    router = Router({"a": "a", "b": "b", "none": None})
    for ids_XT in (torch.tensor([[0, 1, 1, 2, 0, 1]]), torch.tensor([[0, 1, 1], [2, 2, 1]])):
        router.set_context_ids(ids_XT)
        lookup = router.layout.lookup(("a", "b"))
        table_GD = torch.randn(3, 4, requires_grad=True)
        weight_XTD = torch.randn(*ids_XT.shape, 4)
        found_XTD = base._Rows.apply(table_GD, *lookup)  # type: ignore[no-untyped-call]
        (found_GD,) = torch.autograd.grad((found_XTD * weight_XTD).sum(), table_GD)
        of_float64 = table_GD.detach().double().requires_grad_()
        expected_XTD = F.embedding(lookup.index_XT, of_float64)
        (expected_GD,) = torch.autograd.grad((expected_XTD * weight_XTD.double()).sum(), of_float64)
        assert torch.equal(found_XTD, expected_XTD.float())
        torch.testing.assert_close(found_GD[:2].double(), expected_GD[:2], rtol=1e-6, atol=1e-6)
        assert not found_GD[2].any()  # where no group acts there is no parameter


def test_a_delta_is_called_once_per_pass_for_all_spans_of_its_group() -> None:
    """A method of one's own, whose delta computes something from its parameters."""
    calls: list[tuple[int, ...]] = []

    class Shift(base.Delta):
        def __init__(self) -> None:
            super().__init__()
            self.shift_D = nn.Parameter(torch.zeros(4))

        def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
            calls.append(tuple(value_BTD.shape))
            return value_BTD + self.shift_D * x_BTI

    change = base.Change({"a": Shift(), "b": Shift()})
    disturb(change.parameters())
    router = Router({"a": "a", "b": "b", "none": None})
    x_BTI, value_BTD = torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    rows_BT = torch.tensor([[0, 1, 2, 0, 1, 1, 0], [1, 1, 2, 0, 0, 1, 0]])
    for ids_XT, shapes in ((rows_BT[:1], [(2, 3, 4), (2, 3, 4)]), (rows_BT, [(6, 4), (6, 4)])):
        router.set_context_ids(ids_XT)
        calls.clear()
        found_BTD = change(x_BTI, value_BTD, router.layout)
        assert calls == shapes
        table_GD = torch.stack([change.delta("a").shift_D, change.delta("b").shift_D, torch.zeros(4)])
        torch.testing.assert_close(found_BTD, value_BTD + table_GD[ids_XT] * x_BTI)
