"""Layer roles found by structure and names: fused layers are split as the model splits them, and what cannot be is
refused.

Shapes: B rows, T positions, O outputs of a fused layer, A inputs of attention's output layer, F of down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
from adapters.placement.discovery import discover
from adapters.placement.roles import ATTENTION, FEED_FORWARD, ROLES, find_targets
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.zoo import FAMILIES_PAGE, axes_of_calls, causal_lms, page, small

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
AT = 2  # the position that is disturbed
# Every class of attention that fuses queries, keys and values, in every layout that it has.
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "codegen": ("codegen", {}),
    "dbrx": ("dbrx", {}),
    "falcon, one key head": ("falcon", {"multi_query": True}),
    "falcon, grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, head by head": ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    "gpt_bigcode, one key head": ("gpt_bigcode", {"multi_query": True}),
    "gpt_bigcode, head by head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gpt-sw3": ("gpt-sw3", {}),
    "mpt": ("mpt", {}),
    "openai-gpt": ("openai-gpt", {}),
    "persimmon": ("persimmon", {"qk_layernorm": False}),
    "phi4_multimodal": ("phi4_multimodal", {}),
}


def shaken(model_type: str, **more: Any) -> Any:
    model = small(model_type, **more)
    disturb(model.parameters(), scale=0.2)
    return model.double()


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen_by(layer: nn.Module, model: Any, *changes: tuple[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
    """The input of ``layer``, with the outputs of other layers changed."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))]
    handles += [other.register_forward_hook(lambda _m, _a, y, f=f: f(y.clone())) for other, f in changes]
    with hooks(*handles), torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return seen[0]


@pytest.mark.parametrize(("model_type", "more"), FUSED.values(), ids=FUSED)
def test_fused_queries_keys_and_values_are_split_as_the_model_splits_them(
    model_type: str, more: dict[str, Any]
) -> None:
    model = shaken(model_type, **more)
    q, k, v, o = (find_targets(model, frozenset({role}))[0] for role in "qkvo")
    layer, after = q.layer, o.layer
    assert layer is k.layer is v.layer
    assert layer is not None
    assert after is not None
    rows = [sorted(target.rows or ()) for target in (q, k, v)]
    assert sorted(chain(*rows)) == list(range(find_targets(model, frozenset("qkv"))[0].out_features))

    def zero(target: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        return layer, lambda y_BTO: y_BTO.index_fill(-1, torch.tensor(target.rows), 0.0)

    def noise(target: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        def change(y_BTO: Tensor) -> Tensor:
            drawn = torch.randn(len(target.rows), generator=torch.Generator().manual_seed(1), dtype=y_BTO.dtype)
            y_BTO[:, AT, list(target.rows)] += drawn
            return y_BTO

        return layer, change

    bare_BTA = seen_by(after, model)
    moved_T = (seen_by(after, model, noise(q)) - bare_BTA).abs().amax(dim=(0, 2)) > 1e-9
    assert moved_T.tolist() == [position == AT for position in range(7)]  # a query is of its own position only
    moved_T = (seen_by(after, model, noise(k)) - bare_BTA).abs().amax(dim=(0, 2)) > 1e-9
    assert moved_T.tolist() == [position >= AT for position in range(7)]
    no_query_BTA = seen_by(after, model, zero(q))  # then keys do not matter, whatever they are
    torch.testing.assert_close(seen_by(after, model, zero(q), noise(k)), no_query_BTA, rtol=1e-9, atol=1e-9)
    assert (seen_by(after, model, zero(q), noise(v)) - no_query_BTA).abs().max() > 1e-3
    assert seen_by(after, model, zero(v)).abs().max() == 0


@pytest.mark.parametrize(
    "model_type", ["zamba2", "moshi", "modernbert-decoder", "granitemoehybrid", "granitemoe_swa", "phi4_multimodal"]
)
def test_fused_gate_and_up_are_split_as_the_model_splits_them(model_type: str) -> None:
    """The result is linear in up and not in gate."""
    model = shaken(model_type).float()  # experts compute in no other precision
    for name, p in model.named_parameters():
        if "adapter_list" in name:
            p.zero_()  # Zamba2 adds low-rank layers of its own to the fused layer's outputs
    gate, up, down = (find_targets(model, frozenset({role}), _explicit(model))[0] for role in ("gate", "up", "down"))
    assert gate.layer is up.layer
    assert down.layer is not None

    def negate(target: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        def change(y: Tensor) -> Tensor:
            y[..., list(target.rows)] *= -1
            return y

        return target.layer, change

    bare = seen_by(down.layer, model)
    torch.testing.assert_close(seen_by(down.layer, model, negate(up)), -bare, rtol=1e-5, atol=1e-6)
    assert (seen_by(down.layer, model, negate(gate)) + bare).abs().max() > 1e-3


def _explicit(model: Any) -> dict[str, Any] | None:
    """Roles of what can be adapted, where others of the same role cannot."""
    found = discover(model)
    if not found.refusals:
        return None
    return {p: r if isinstance(r, str) else list(r.roles) for p, r in found.table.items() if not _is_qkv(r)}


def _is_qkv(role: Any) -> bool:
    return not isinstance(role, str) and "q" in role.roles


# ── Refused


def test_a_fused_layer_of_an_unknown_class_is_refused_with_its_name() -> None:
    model = small("mpt")
    for block in model.transformer.blocks:
        block.attn.__class__ = type("OtherAttention", (nn.Module,), {})
    with pytest.raises(UserError, match=r"no layer with the role k; .*\n.*\.attn\.Wqkv \(k\) .*OtherAttention splits"):
        find_targets(model, frozenset({"k"}))
    assert len(find_targets(model, FEED_FORWARD)) == 8


def test_a_layer_with_other_shapes_than_its_name_says_is_refused_with_its_name() -> None:
    model = small("arcee")
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 15)
    with pytest.raises(UserError, match=r"self_attn\.k_proj \(k\) cannot.*15 outputs are not those of 2 heads"):
        find_targets(model, frozenset({"k"}))
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 40)
    with pytest.raises(UserError, match=r"layers\.\*\.mlp\.up_proj .*up has 40 outputs, but down has 48 inputs"):
        find_targets(model, frozenset({"up"}))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minicpm3", "longcat_flash"])
def test_keys_and_values_from_a_compressed_cache_are_refused(model_type: str) -> None:
    """``kv_b_proj`` acts on all positions of the cache, as (B, 1, positions, R)."""
    model = small(model_type)
    paths = {target.path.rpartition(".")[2] for target in find_targets(model, frozenset({"q"}))}
    assert paths == {"q_b_proj"}
    with pytest.warns(UserWarning, match=r"self_attn.*\.kv_b_proj \(k, v\) cannot be adapted: it computes keys and"):
        assert {t.role for t in find_targets(model, ATTENTION)} == {"q", "o"}
    with pytest.raises(UserError, match=r"no layer with the role v; .*\n.*kv_b_proj \(v\) cannot be adapted"):
        harness.adapt(model, {"method": "lora", "rank": 2, "where": ["q", "v"]})
    path = next(name for name, _ in model.named_modules() if name.endswith(".kv_b_proj"))
    with pytest.raises(UserError, match=r"kv_b_proj cannot have the role v: it computes keys and values of all pos"):
        harness.adapt(model, {"method": "lora", "rank": 2, "where": ["v"]}, roles={path: "v"})


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba"])
def test_a_layer_that_is_never_called_cannot_have_a_role(model_type: str) -> None:
    model = small(model_type)
    path = next(name for name, _ in model.named_modules() if name.endswith(".dt_proj"))
    with pytest.raises(UserError, match=r"\.dt_proj cannot have the role up: .*the layer itself is never called"):
        find_targets(model, frozenset({"up"}), {path: "up"})
    if model_type != "jamba":
        with pytest.raises(UserError, match=r"its layer roles are unknown") as caught:
            find_targets(model, frozenset({"up"}))
        assert "dt_proj" not in str(caught.value).partition("in Python: ")[2]


def test_an_encoder_beside_the_language_model_has_no_roles() -> None:
    for model_type in ("gemma3", "moss_transcribe_diarize", "git"):
        if model_type in causal_lms():
            paths = {target.path for target in find_targets(small(model_type), ROLES)}
            assert paths
            assert not any("tower" in path or "encoder.vision" in path for path in paths)


@pytest.mark.parametrize("model_type", ["blt", "cpmant", "prophetnet", "xlnet"])
def test_a_model_whose_layers_see_no_single_sequence_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UserError, match=rf"'{model_type}': its layer roles are unknown; \w+: its? .*(bytes|positions)"):
        find_targets(small(model_type, "meta"), ROLES)


def test_attention_to_something_else_has_no_roles() -> None:
    paths = {target.path for target in find_targets(small("bart"), ROLES)}
    assert paths
    assert not any("encoder_attn" in path or "layernorm_embedding" in path for path in paths)


# ── Every causal LM class of the installed transformers


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_lms())
def test_every_layer_with_a_role_runs_on_rows_and_positions(model_type: str) -> None:
    """What the hooks need, of every layer that the roles point at, in a small model of every class."""
    try:
        model = small(model_type)
    except Exception as error:
        pytest.skip(f"transformers builds no small model: {error}")
    found = discover(model)
    if not found.table:
        with pytest.raises(UserError, match="its layer roles are unknown"):
            find_targets(model, ROLES)
        return
    calls = axes_of_calls(model, found.paths, IDS)
    assert calls.keys() == found.paths
    for path, shapes in calls.items():
        assert set(shapes) <= {(2, 7), (14,)}, path


@pytest.mark.slow
def test_the_page_of_families_is_what_the_installed_transformers_give() -> None:
    assert FAMILIES_PAGE.read_text(encoding="utf-8") == page(), "regenerate it: python -m tests.support.zoo"
