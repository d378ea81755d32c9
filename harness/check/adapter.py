"""What every adapter method promises, checked on a tiny Llama with two contexts and the method's default options.

Each check yields problems; the first line of its docstring is what it requires. ``harness check`` runs them, and
``tests/contracts`` on every registered method. Shapes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from adapters.base import AdapterMethod
from harness.core.contexts import STACKED
from harness.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONTEXTS = ("image", "text")
GROUPINGS: dict[str, Any] = {
    "agnostic": "agnostic",
    "specific": "specific",
    "text alone": {"image": None, "text": "language"},
}
# A row each: two long segments, interleaved, the image last, and text alone; 0 is image, 1 is text.
ROWS = (
    (1, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    (1, 0, 1, 0, 0, 1, 1, 0, 1, 1),
    (1, 1, 1, 1, 1, 0, 0, 0, 0, 0),
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
)
_LENGTH, _WIDTH = len(ROWS[0]), 32
_TOLERANCE = 1e-4  # of fp32 logits that are summed in another order


@dataclass(frozen=True)
class AdapterSubject:
    """An adapter method to check.

    Attributes:
        plugin: its class.
        name: its registered name.
        folder: for saved adapters.
    """

    plugin: type[AdapterMethod]
    name: str
    folder: Path

    @cached_property
    def method(self) -> AdapterMethod:
        """The method with its default options."""
        return self.plugin(self.plugin.Config())

    @property
    def groupings(self) -> dict[str, Any]:
        """The groupings to check; a method without groups takes only the default one."""
        stacked = {STACKED: STACKED} if self.method.not_stacked is None else {}
        return GROUPINGS | stacked if self.method.grouped else {"agnostic": "agnostic"}

    def adapted(self, grouping: Any = "specific", scale: float = 0.2, seed: int = 0) -> Any:
        """A tiny model with the adapter, whose parameters are moved away from their initialisation by ``scale``."""
        from adapters.library.adapted_model import adapt

        grouping = grouping if self.method.grouped else "agnostic"
        model = adapt(tiny_model(), {"method": self.name}, CONTEXTS, grouping, seed)
        _disturb(model.adapters.parameters(), scale)
        return model.eval()


def tiny_model() -> Any:
    """A Llama of two layers, with the same weights at every call; on the ``meta`` device inside ``torch.device``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=_WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _disturb(parameters: Any, scale: float, seed: int = 2) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=scale)


def _rows(*numbers: int) -> Tensor:
    import torch

    return torch.tensor([ROWS[number] for number in numbers or range(len(ROWS))])


def _embeds(rows: int = len(ROWS)) -> Tensor:
    import torch

    return torch.randn(rows, _LENGTH, _WIDTH, generator=torch.Generator().manual_seed(1))


def _logits(model: Any, x_BTD: Tensor, ids_BT: Tensor, **options: Any) -> Tensor:
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, context_ids=ids_BT, use_cache=False, **options).logits
    return logits_BTV


def _bare(model: Any, x_BTD: Tensor) -> Tensor:
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False).logits
    return logits_BTV


def _gradients(model: Any, logits_BTV: Tensor, weight_BTV: Tensor) -> dict[str, Tensor]:
    """Gradients of the adapter's parameters, for a loss in which every position counts differently."""
    model.zero_grad()
    loss: Tensor = (logits_BTV.float() * weight_BTV).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}


def _weights() -> Tensor:
    import torch

    return torch.randn(len(ROWS), _LENGTH, 64, generator=torch.Generator().manual_seed(5))


def _trains(model: Any) -> bool:
    return any(p.requires_grad for p in model.adapters.parameters())


def _apart(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> str:
    """How far two tensors are apart, if that is more than rounding; "" if it is not."""
    if one.shape != other.shape:
        return f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
    gap, size = (one - other).abs().max().item(), max(1.0, other.abs().max().item())
    return "" if gap <= tolerance * size else f"a difference of up to {gap:.2g}"


def it_says_what_it_is(subject: AdapterSubject) -> Iterator[str]:
    """`label` and `summary` are one line each, and not empty."""
    for name, text in (("label()", subject.method.label()), ("summary", getattr(subject.plugin, "summary", ""))):
        if not isinstance(text, str) or not text.strip() or "\n" in text:
            yield f"{name} is {text!r}; required: one line of text"


def options_are_strict(subject: AdapterSubject) -> Iterator[str]:
    """Unknown options are rejected, and options cannot be changed later."""
    try:
        subject.plugin.Config(no_such_option=1)  # type: ignore[call-arg]
    except ValidationError:
        pass
    else:
        yield "the unknown option 'no_such_option' is accepted; Config must extend harness.AdapterConfig"
    try:
        subject.method.config.anything = 1
    except (ValidationError, ValueError, TypeError, AttributeError):
        return
    yield "an option can be set after the method was made; Config must be frozen"


def it_attaches(subject: AdapterSubject) -> Iterator[str]:
    """It attaches to a language model with every grouping, and the model computes finite logits."""
    import torch

    for name, grouping in subject.groupings.items():
        with torch.no_grad():
            found_BTV = _logits(subject.adapted(grouping, scale=0.0), _embeds(), _rows())
        if tuple(found_BTV.shape) != (len(ROWS), _LENGTH, 64):
            yield f"{name}: logits of shape {tuple(found_BTV.shape)}; required: {(len(ROWS), _LENGTH, 64)}"
        elif not found_BTV.isfinite().all():
            yield f"{name}: the logits are not finite"


def it_starts_as_the_base(subject: AdapterSubject) -> Iterator[str]:
    """Before training, the model computes exactly what the base computes, unless `identity_at_start` is False."""
    import torch

    with torch.no_grad():
        expected_BTV = _bare(tiny_model(), _embeds())
        for name, grouping in subject.groupings.items():
            same = torch.equal(_logits(subject.adapted(grouping, scale=0.0), _embeds(), _rows()), expected_BTV)
            if same is not subject.method.identity_at_start:
                found = "the same logits as" if same else "other logits than"
                yield f"{name}: {found} the base, but identity_at_start is {subject.method.identity_at_start}"


def it_starts_from_the_seed(subject: AdapterSubject) -> Iterator[str]:
    """Its initial parameters depend only on the seed."""
    import torch

    first = subject.adapted(scale=0.0, seed=5).adapters.state_dict()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(99)
        again = subject.adapted(scale=0.0, seed=5).adapters.state_dict()
    if list(first) != list(again):
        yield "the names of its parameters differ from one call to the next"
        return
    for name, tensor in first.items():
        if not torch.equal(tensor, again[name]):
            yield f"{name} differs with the same seed; draw it from the generator that is passed to `delta`"


def it_is_counted_without_weights(subject: AdapterSubject) -> Iterator[str]:
    """Parameters are counted on the `meta` device as they are with weights, equally many in every group."""
    import torch

    for name, grouping in subject.groupings.items():
        with torch.device("meta"):
            empty = subject.adapted(grouping).adapters.parameters_by_group()
        counts = subject.adapted(grouping).adapters.parameters_by_group()
        if counts != empty:
            yield f"{name}: {empty} on the meta device, {counts} with weights"
        adapters = subject.adapted(grouping).adapters
        if (total := sum(p.numel() for p in adapters.parameters() if p.requires_grad)) != sum(
            adapters.parameters_by_role().values()
        ):
            yield f"{name}: {total:,} trainable parameters, by role {adapters.parameters_by_role()}"
        if len(set(counts.values())) > 1:
            yield f"{name}: groups have different numbers of parameters: {counts}"
        if subject.method.grouped and not any(p.requires_grad for p in subject.adapted(grouping).parameters()):
            yield f"{name}: nothing is trained"


def decay_keeps_the_identity(subject: AdapterSubject) -> Iterator[str]:
    """Weight decay leaves a new adapter the identity; `undecayed` of a delta names parameters that it would spoil."""
    import torch

    from harness.core.weight_decay import parameter_groups

    if not subject.method.identity_at_start:
        return
    with torch.no_grad():
        expected_BTV = _bare(tiny_model(), _embeds())
        for name, grouping in subject.groupings.items():
            model = subject.adapted(grouping, scale=0.0)
            for group in parameter_groups(model.adapters, 0.5):
                for p in group["params"]:
                    p.mul_(1 - group["weight_decay"])
            if gap := _apart(_logits(model, _embeds(), _rows()), expected_BTV, 1e-5):
                yield f"{name}: {gap} to the base after one step of decay without a gradient"


def it_leaves_no_trace(subject: AdapterSubject) -> Iterator[str]:
    """Attached it changes the output, and detached it leaves no hook and no changed weight."""
    import torch

    with torch.no_grad():
        expected_BTV, weights = _bare(tiny_model(), _embeds()), tiny_model().state_dict()
        for name, grouping in subject.groupings.items():
            model = subject.adapted(grouping, scale=1.0)
            if _trains(model) and torch.equal(_logits(model, _embeds(), _rows()), expected_BTV):
                yield f"{name}: its parameters were changed, and the output was not"
            base = model.detach()
            if hooked := [n for n, m in base.named_modules() if m._forward_hooks or m._forward_pre_hooks]:
                yield f"{name}: {hooked[0] or 'the model'} still has a hook after detach"
            found = base.state_dict()
            if list(found) != list(weights):
                yield f"{name}: the base has other parameters after detach"
            elif changed := [n for n, x in found.items() if not torch.equal(x, weights[n])]:
                yield f"{name}: {changed[0]} is changed after detach"
            elif not torch.equal(_bare(base, _embeds()), expected_BTV):
                yield f"{name}: the base computes other logits after detach"


def rows_do_not_depend_on_the_batch(subject: AdapterSubject) -> Iterator[str]:
    """Rows with different layouts in one batch equal each row alone, in outputs and gradients."""
    model, x_BTD, weight_BTV = subject.adapted(), _embeds(), _weights()
    together_BTV = _logits(model, x_BTD, _rows())
    found = _gradients(model, together_BTV, weight_BTV) if _trains(model) else {}
    expected: dict[str, Any] = {}
    for row in range(len(ROWS)):
        alone_1TV = _logits(model, x_BTD[row : row + 1], _rows(row))
        if gap := _apart(together_BTV[row : row + 1].detach(), alone_1TV.detach()):
            yield f"row {row}: {gap} to the same row alone"
        for name, grad in (_gradients(model, alone_1TV, weight_BTV[row : row + 1]) if found else {}).items():
            expected[name] = expected.get(name, 0) + grad
    for name, grad in expected.items():
        if name in found and (gap := _apart(found[name], grad, 1e-3)):
            yield f"gradient of {name}: {gap} to the sum over single rows"


def absent_groups_have_zero_gradients(subject: AdapterSubject) -> Iterator[str]:
    """Every parameter has a finite gradient in every batch, which is zero if its group has no token."""
    model = subject.adapted()
    if not _trains(model):
        return
    names = {name for name, p in model.adapters.named_parameters() if p.requires_grad}
    for what, ids_BT in (("text only", _rows(3)), ("image only", _rows(3) * 0), ("both", _rows())):
        logits_BTV = _logits(model, _embeds(len(ids_BT)), ids_BT)
        grads = _gradients(model, logits_BTV, _weights()[: len(ids_BT)])
        if missing := sorted(names - grads.keys()):
            yield f"{what}: {missing[0]} has no gradient; it must be zero, not None, for distributed training"
        absent = {"text only": "group_image", "image only": "group_text"}.get(what, "none")
        for name, grad in grads.items():
            if not grad.isfinite().all():
                yield f"{what}: the gradient of {name} is not finite"
            elif absent in name.split(".") and grad.any():
                yield f"{what}: {name} has a gradient, but no token is of its group"


def groups_are_isolated(subject: AdapterSubject) -> Iterator[str]:
    """A group's parameters change only tokens of that group in a layer, unless `joins_groups` is True."""
    import torch

    if subject.method.joins_groups or not subject.method.grouped:
        return
    model, text_BT = subject.adapted(), _rows() == CONTEXTS.index("text")
    seen: list[torch.Tensor] = []
    first = model.base_model.model.layers[0]
    modules = (first.input_layernorm, first.self_attn.q_proj, first.self_attn.v_proj)
    handles = [m.register_forward_hook(lambda _m, _a, y: seen.append(y[:, -_LENGTH:].clone())) for m in modules]
    with torch.no_grad():
        _logits(model, _embeds(), _rows())
        _disturb((p for n, p in model.adapters.named_parameters() if "group_image" in n.split(".")), 1.0, seed=7)
        _logits(model, _embeds(), _rows())
    for handle in handles:
        handle.remove()
    for place, before_BTO, after_BTO in zip(("norm", "q", "v"), seen[:3], seen[3:], strict=True):
        if not torch.equal(before_BTO[text_BT], after_BTO[text_BT]):
            yield f"layer {place}: parameters of the group image change tokens of the group text"


def equal_groups_are_one(subject: AdapterSubject) -> Iterator[str]:
    """Groups with equal weights compute what one group for all contexts computes, unless `joins_groups` is True."""
    import torch

    if subject.method.joins_groups or not subject.method.grouped:
        return
    one, two = subject.adapted("agnostic"), subject.adapted("specific")
    weights = one.adapters.state_dict()
    names = {
        n: n.replace("group_image", "group_all").replace("group_text", "group_all") for n in two.adapters.state_dict()
    }
    if unknown := [name for name in names.values() if name not in weights]:
        yield f"the grouping specific has a parameter {unknown[0]} that the grouping agnostic lacks"
        return
    two.adapters.load_state_dict({name: weights[other] for name, other in names.items()})
    with torch.no_grad():
        if gap := _apart(_logits(two, _embeds(), _rows()), _logits(one, _embeds(), _rows()), 1e-5):
            yield f"{gap} between two groups with equal weights and one group"


def stacked_groups_are_the_sum_of_their_parts(subject: AdapterSubject) -> Iterator[str]:
    """If `not_stacked` is None: a new shared group leaves the others as they are, and they leave it."""
    import torch

    if subject.method.not_stacked is not None or not subject.method.grouped:
        return
    fresh = subject.adapted(STACKED, scale=0.0).adapters.state_dict()
    for part, grouping in (("group_shared", "agnostic"), ("", "specific")):
        stacked, plain = subject.adapted(STACKED), subject.adapted(grouping)
        names = {n: n.replace("group_all", part) for n in plain.adapters.state_dict()}
        own = stacked.adapters.state_dict()
        if unknown := [name for name in names.values() if name not in own]:
            yield f"{STACKED} lacks a parameter {unknown[0]}, which the grouping {grouping} has"
            return
        kept = {other: own[other] for other in names.values()}
        stacked.adapters.load_state_dict(fresh | kept)
        plain.adapters.load_state_dict({name: own[other] for name, other in names.items()})
        with torch.no_grad():
            if gap := _apart(_logits(stacked, _embeds(), _rows()), _logits(plain, _embeds(), _rows())):
                yield f"{gap} between {STACKED} with the parameters of {grouping} alone, and {grouping}"


def merging_keeps_the_output(subject: AdapterSubject) -> Iterator[str]:
    """Where it can be merged into the weights, the merged model computes the same."""
    import torch

    model = subject.adapted("agnostic")
    with torch.no_grad():
        expected_BTV = _logits(model, _embeds(), _rows())
        try:
            base = model.merge()
        except UserError:  # not offered
            return
        if gap := _apart(_bare(base, _embeds()), expected_BTV):
            yield f"{gap} after merge"


def saving_keeps_the_output(subject: AdapterSubject) -> Iterator[str]:
    """Saved and loaded onto the same base, it computes exactly the same."""
    import torch

    from adapters.library.adapted_model import load_adapter

    model = subject.adapted()
    with torch.no_grad():
        expected_BTV = _logits(model, _embeds(), _rows())
        model.save(subject.folder / "saved")
        loaded = load_adapter(tiny_model(), subject.folder / "saved", CONTEXTS).eval()
        if not torch.equal(_logits(loaded, _embeds(), _rows()), expected_BTV):
            yield "other logits after save and load_adapter"


def padding_has_no_effect(subject: AdapterSubject) -> Iterator[str]:
    """A row padded on either side computes what it computes alone."""
    import torch

    model, x_BTD, real = subject.adapted(), _embeds(2), 7
    with torch.no_grad():
        alone_1TV = _logits(model, x_BTD[:1, :real], _rows(0)[:, :real])
        for side, place in (("left", slice(_LENGTH - real, _LENGTH)), ("right", slice(0, real))):
            row_TD, ids_T, mask_T = x_BTD[1].clone(), _rows(3)[0], torch.zeros(_LENGTH, dtype=torch.long)
            row_TD[place], ids_T[place], mask_T[place] = x_BTD[0, :real], _rows(0)[0, :real], 1
            mask_BT = torch.stack([mask_T, torch.ones_like(mask_T)])
            found_BTV = _logits(
                model, torch.stack([row_TD, x_BTD[1]]), torch.stack([ids_T, _rows(1)[0]]), attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
            )  # fmt: skip
            if gap := _apart(found_BTV[:1, place], alone_1TV):
                yield f"padded on the {side}: {gap} to the row alone"


def checkpointing_keeps_the_gradients(subject: AdapterSubject) -> Iterator[str]:
    """With activation checkpointing, gradients are those without it."""
    model, weight_BTV = subject.adapted(), _weights()
    if not _trains(model):
        return
    model.train()
    model.adapters.eval()  # no dropout
    expected = _gradients(model, _logits(model, _embeds().requires_grad_(), _rows()), weight_BTV)
    model.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = _gradients(model, _logits(model, _embeds().requires_grad_(), _rows()), weight_BTV)
    for name, grad in expected.items():
        if gap := _apart(found[name], grad, 1e-5) if name in found else "no gradient":
            yield f"gradient of {name}: {gap} with activation checkpointing"


def outputs_can_be_changed_in_place(subject: AdapterSubject) -> Iterator[str]:
    """A layer's output can be changed in place, as by code of the model that follows it."""
    import torch

    for grouping, ids_BT in itertools.product(("agnostic", "specific"), (_rows(), _rows(0, 0))):
        found = []
        for change in (torch.add, torch.Tensor.add_):
            model = subject.adapted(grouping)
            for module in model.base_model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(lambda _module, _args, y_BTO, change=change: change(y_BTO, 0.1))
            logits_BTV = _logits(model, _embeds(len(ids_BT)), ids_BT)
            grads = _gradients(model, logits_BTV, _weights()[: len(ids_BT)]) if _trains(model) else {}
            found.append({"the output": logits_BTV.detach(), **{f"gradient of {name}": g for name, g in grads.items()}})
        for name, expected in found[0].items():
            if gap := _apart(found[1][name], expected, 1e-5):
                yield f"{grouping}: {name}: {gap} to what changed copies of the outputs give"


def generation_needs_no_cache(subject: AdapterSubject) -> Iterator[str]:
    """Generation with a KV cache computes what it computes without one."""
    import torch

    model = subject.adapted()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # Tokens: with `inputs_embeds`, generate uses a cache even with use_cache=False (transformers 5.23).
    ids_BT = torch.randint(64, (len(ROWS), _LENGTH), generator=torch.Generator().manual_seed(3))
    prompt = {"input_ids": ids_BT, "context_ids": _rows(), "new_token_context": CONTEXTS[1]}
    cached, plain = (
        model.generate(**prompt, **options, use_cache=own, output_scores=True, return_dict_in_generate=True)
        for own in (True, False)
    )
    for step, (cached_BV, plain_BV) in enumerate(zip(cached.scores, plain.scores, strict=True), 1):
        if gap := _apart(cached_BV, plain_BV, 1e-5):
            yield f"token {step}: {gap} between the logits with a KV cache and without one"
            return


FIRST: Sequence[Any] = (it_says_what_it_is, options_are_strict, it_attaches)
THEN: Sequence[Any] = (
    it_starts_as_the_base,
    it_starts_from_the_seed,
    it_is_counted_without_weights,
    decay_keeps_the_identity,
    it_leaves_no_trace,
    rows_do_not_depend_on_the_batch,
    absent_groups_have_zero_gradients,
    groups_are_isolated,
    equal_groups_are_one,
    stacked_groups_are_the_sum_of_their_parts,
    merging_keeps_the_output,
    saving_keeps_the_output,
    padding_has_no_effect,
    checkpointing_keeps_the_gradients,
    outputs_can_be_changed_in_place,
    generation_needs_no_cache,
)
