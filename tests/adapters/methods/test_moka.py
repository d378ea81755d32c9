"""MokA: against loops in float64, its causality, padding and the KV cache.

Shapes: B rows, T positions, I and O input and output features, R rank, D width, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from adapters.attach import AdaptedLayer, Adapters, count_trainable
from adapters.base import AdapterMethod
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.methods.moka import MokA, MokAConfig
from adapters.placement import roles
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.models import tiny_llama, tiny_opt
from tests.support.three_contexts import embeds, logits
from tests.support.tiers import pairwise

pytestmark = pytest.mark.quick

CONTEXTS = ("image", "question", "answer")
IMAGE, QUESTION, ANSWER = 0, 1, 2
ROWS = {
    "rows differ": torch.tensor([[2, 0, 0, 1, 1, 0, 2, 2], [0, 0, 1, 0, 1, 2, 0, 2]]),
    "rows alike": torch.tensor([[2, 0, 0, 0, 1, 1, 2, 2]]),
    "no image": torch.tensor([[2, 1, 1, 2, 2, 2, 2, 2]]),
    "no text": torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0]]),
}
GROUPINGS: dict[str, Any] = {
    "specific": "specific",
    "image against text": {"image": "image", "question": "text", "answer": "text"},
    "answer has none": {"image": "image", "question": "text", "answer": None},
    "agnostic": "agnostic",
}
VQA = MokAConfig(rank=3, text_groups=("question", "answer"), instruction_groups=("question",))


def adapt(model: Any, config: MokAConfig, grouping: Any = "specific", method: AdapterMethod | None = None) -> Adapters:
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    adapters = Adapters(model, dict.fromkeys(router.groups, method or MokA(config)), router, seed=0)
    disturb(adapters.parameters(), scale=0.2)
    adapters.attach(model)
    return adapters


def by_loops(x_BTI: Tensor, change: Any, groups: list[list[str | None]], config: MokAConfig, real: Tensor) -> Tensor:
    """The equations, one token at a time: what is added to the layer's output (B, T, O)."""
    text = config.text_groups or ()
    update = torch.zeros(*x_BTI.shape[:2], change.lora_B.shape[0], dtype=x_BTI.dtype)
    for b, row in enumerate(groups):
        states = [None if g is None else change.delta(g).lora_A @ x_BTI[b, t] for t, g in enumerate(row)]
        for t, (group, state) in enumerate(zip(row, states, strict=True)):
            if state is None:
                continue
            if group not in text:
                if config.instruction_groups:
                    keys = [s for s, g in enumerate(row) if g in config.instruction_groups and real[b, s]]
                else:
                    keys = [s for s, g in enumerate(row) if g in text and s < t and real[b, s]]
                if keys:
                    key_SR = torch.stack([states[s] for s in keys])  # type: ignore[misc]
                    weight_S = (key_SR @ state / math.sqrt(config.rank)).softmax(dim=0)
                    state = state + config.cross_modal_scale * weight_S @ key_SR  # noqa: PLW2901
            update[b, t] = (config.alpha or config.rank) / config.rank * change.lora_B @ state
    return update


@pairwise(
    grouping=GROUPINGS,
    ids_XT=ROWS,
    instruction={"an instruction": True, "no instruction": False},
    padded={"padded": True, "not padded": False},
)
def test_forward_and_gradients_equal_the_equations(
    grouping: Any, ids_XT: Tensor, instruction: bool, padded: bool
) -> None:
    """float64, so 1e-12 is rounding only. A group without a token has zero gradients, not None."""
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    text = {"question", "answer", "text"} & set(router.groups) or set(router.groups)
    named = next((group for group in ("question", "text") if group in text), None)
    config = MokAConfig(
        rank=3, alpha=5.0, cross_modal_scale=0.7, text_groups=tuple(sorted(text)),
        instruction_groups=(named,) if instruction and named else None,
    )  # fmt: skip
    method, linear = MokA(config), nn.Linear(12, 8).double()
    target, generator = roles.Target("linear", "v", 12, 8, layer=linear), torch.Generator().manual_seed(3)
    cross_modal = method.shared([target], generator)
    change: Any = method.change(
        target, {g: method.delta(target, generator) for g in router.groups}, cross_modal, generator
    )
    disturb(change.double().parameters())
    AdaptedLayer(target, {"moka": change}, router).attach(linear)
    router.set_context_ids(ids_XT)
    real_BT = torch.ones(2, 8).bool()
    if padded:
        real_BT[:, :2] = False
        router.use(router.layout.with_mask(real_BT))
    x_BTI = torch.randn(2, 8, 12, dtype=torch.float64, requires_grad=True)
    weight_BTO = torch.randn(2, 8, 8, dtype=torch.float64)
    groups = [[router.grouping[CONTEXTS[i]] for i in row] for row in ids_XT.expand(2, -1).tolist()]
    wanted = [x_BTI, *change.parameters()]

    found_BTO = linear(x_BTI)
    found = torch.autograd.grad((found_BTO * weight_BTO).sum(), wanted)  # raises where a parameter is not in the graph
    base_BTO = nn.functional.linear(x_BTI, linear.weight, linear.bias)
    expected_BTO = base_BTO + by_loops(x_BTI, change, groups, config, real_BT)
    expected = torch.autograd.grad((expected_BTO * weight_BTO).sum(), wanted, allow_unused=True)

    torch.testing.assert_close(found_BTO, expected_BTO, rtol=1e-12, atol=1e-12)
    for grad, expected_grad in zip(found, expected, strict=True):
        zero = torch.zeros_like(grad) if expected_grad is None else expected_grad
        torch.testing.assert_close(grad, zero, rtol=1e-12, atol=1e-12)


def test_with_one_group_it_is_lora() -> None:
    model, ids_XT = tiny_llama(), ROWS["rows differ"]
    moka = adapt(model, MokAConfig(rank=3, alpha=5.0), "agnostic")
    found_BTV = logits(model, moka, embeds(), ids_XT)
    moka.detach()
    lora = adapt(model, VQA, "agnostic", LoRA(LoRAConfig(rank=3, alpha=5.0)))
    weights = moka.state_dict()
    own = {n: n.replace("changes.lora", "changes.moka") for n in lora.state_dict()}
    lora.load_state_dict(
        {n: weights[m.replace("deltas.group_all.lora_B", "lora_B")] for n, m in own.items()}, strict=True
    )
    torch.testing.assert_close(logits(model, lora, embeds(), ids_XT), found_BTV, rtol=1e-5, atol=1e-5)


def test_every_group_has_an_a_and_all_share_a_b() -> None:
    adapters = adapt(tiny_llama(), MokAConfig(rank=3, text_groups=("answer",)))
    widths = {
        "q": (32, 32),
        "k": (32, 16),
        "v": (32, 16),
        "o": (32, 32),
        "gate": (32, 48),
        "up": (32, 48),
        "down": (48, 32),
    }
    of_a = 2 * 3 * sum(inside for inside, _ in widths.values())
    assert adapters.parameters_by_group() == dict.fromkeys(CONTEXTS, of_a)
    assert count_trainable(adapters) == 3 * of_a + 2 * 3 * sum(outside for _, outside in widths.values())


@pytest.mark.parametrize(
    ("config", "reached"), [(MokAConfig(rank=3, text_groups=("question", "answer")), False), (VQA, True)]
)
def test_a_later_question_reaches_the_image_only_as_an_instruction_and_an_answer_never(
    config: MokAConfig, reached: bool
) -> None:
    model, ids_XT = tiny_llama(), torch.tensor([[QUESTION, IMAGE, IMAGE, QUESTION, ANSWER, ANSWER]])
    adapters = adapt(model, config)
    before_BTV = logits(model, adapters, embeds(1, 6), ids_XT)
    for changed in (3, 4):
        x_BTD = embeds(1, 6)
        x_BTD[:, changed] += 1
        differs_T = (logits(model, adapters, x_BTD, ids_XT) != before_BTV).any(dim=-1)[0]
        assert differs_T[changed:].all()
        assert differs_T[1:3].tolist() == [reached and changed == 3] * 2
        assert not differs_T[0]


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_opt])
@torch.no_grad()
def test_generation_from_left_padded_rows_equals_one_row_at_a_time(make_model: Any) -> None:
    """Padding has the instruction's id: only the attention mask keeps it from being a key. KV cache against none."""
    model, x_BTD = make_model(), embeds()
    ids_BT = torch.tensor([[2, 0, 0, 1, 1, 0, 1, 2], [1, 1, 0, 0, 1, 0, 1, 2]])
    mask_BT = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]])
    adapters = adapt(model, VQA)

    def generate(x: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        adapters.router.set_context_ids(ids)
        with layouts_while_generating(model, adapters.router, "answer"):
            tokens: Tensor = model.generate(
                inputs_embeds=x, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None,
                pad_token_id=0, **options,
            )  # fmt: skip
        return tokens

    together = generate(x_BTD, ids_BT, mask_BT)
    for index, start in enumerate((0, 2)):
        row = slice(index, index + 1)
        alone = generate(x_BTD[row, start:], ids_BT[row, start:], torch.ones(1, 8 - start).long(), use_cache=False)
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("new", ["image", "question"])
def test_what_a_kv_cache_cannot_serve_is_refused(new: str) -> None:
    model = tiny_llama()
    adapters = adapt(model, VQA)
    adapters.router.set_context_ids(ROWS["rows alike"])
    with (
        layouts_while_generating(model, adapters.router, new),
        pytest.raises(
            UserError, match=r"must be text and not instruction \(text groups: question, answer\).*use_cache=False"
        ),
    ):
        model.generate(inputs_embeds=embeds(1), max_new_tokens=3, pad_token_id=0, eos_token_id=None)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_llama()
    adapters = adapt(model, MokAConfig(rank=3, dropout=0.5, text_groups=("answer",)))
    ids_XT = ROWS["rows alike"]
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits(model, adapters, embeds(), ids_XT), logits(model, adapters, embeds(), ids_XT))
    model.eval()
    still_BTV = logits(model, adapters, embeds(), ids_XT)
    assert torch.equal(logits(model, adapters, embeds(), ids_XT), still_BTV)
    adapters.detach()
    plain = adapt(model, MokAConfig(rank=3, text_groups=("answer",)))
    assert torch.equal(logits(model, plain, embeds(), ids_XT), still_BTV)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_groups": ("questoin",)}, "text_groups: found 'questoin'; allowed: .*did you mean 'question'"),
        (
            {"text_groups": ("answer",), "instruction_groups": ("question",)},
            "instruction_groups: found 'question'; allowed: answer",
        ),
        ({}, r"text_groups: found none, and no context is named 'text'; allowed: .* of image, question, answer"),
    ],
)
def test_groups_that_do_not_exist_or_are_not_text_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny_llama(), MokAConfig(rank=3, **options))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"cross_modal_scale\n.*greater than or equal to 0"):
        MokAConfig(cross_modal_scale=-1.0)
    with pytest.raises(ValidationError, match=r"text_groups\n.*at least 1 item"):
        MokAConfig(text_groups=())


def test_a_mask_of_four_dimensions_is_refused() -> None:
    model = tiny_llama()
    adapters = adapt(model, MokAConfig(rank=3, text_groups=("answer",)))
    with pytest.raises(UserError, match=r"moka: attention_mask: found 4 dimensions"):
        logits(model, adapters, embeds(), ROWS["rows alike"], attention_mask=torch.ones(2, 1, 8, 8).bool())


@pytest.mark.parametrize(
    ("contexts", "grouping", "expected"),
    [
        (("text", "image"), "specific", ("text",)),
        (("text", "image"), {"image": "seen", "text": "read"}, ("read",)),
        (("text", "image"), "agnostic", ("all",)),
        (("text", "image", "audio"), {"image": "seen", "audio": "heard", "text": None}, ()),  # nothing to attend to
        (("image", "answer"), "agnostic", ("all",)),
        (("image", "answer"), "specific", None),
    ],
    ids=str,
)
def test_text_is_known_by_its_name_not_by_its_place(contexts: Any, grouping: Any, expected: Any) -> None:
    router = Router(resolve_grouping(grouping, contexts)[0])
    make = partial(Adapters, tiny_llama(), dict.fromkeys(router.groups, MokA(MokAConfig(rank=3))), router, seed=0)
    if expected is None:
        with pytest.raises(UserError, match="text_groups: found none"):
            make()
    else:
        adapters = make()
        assert adapters.shared["moka"].text_groups(router.groups) == expected
