# ruff: noqa: E501 - one wrong input per line reads as a table
"""Explicit roles, and errors about unknown models and missing roles. The paper's Table 3 on a real GLM.

test_families.py has the models that are known.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.roles import ATTENTION, FEED_FORWARD, ROLES, Target, find_targets, parse_roles
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from harness.core.errors import UserError
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model.build import count_parameters
from tests.support.adapters import disturb, embeds
from tests.support.families import logits, tiny
from tests.support.models import tiny_llama, tiny_opt
from tests.support.paper_table import each_row

Write = Callable[[str], Path]
Q = frozenset({"q"})
UNKNOWN: dict[str, dict[str, Any]] = {  # small models of types that the table of families does not have
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 64},
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 2,
    },
}  # fmt: skip
MPT_ROLES = {
    "transformer.blocks.*.attn.Wqkv": ["q", "k", "v"],
    "transformer.blocks.*.attn.out_proj": "o",
    "transformer.blocks.*.ffn.up_proj": "up",
    "transformer.blocks.*.ffn.down_proj": "down",
}
RWKV_ROLES = {
    "rwkv.blocks.*.attention.key": "k",
    "rwkv.blocks.*.attention.value": "v",
    "rwkv.blocks.*.attention.receptance": "q",
    "rwkv.blocks.*.attention.output": "o",
    "rwkv.blocks.*.feed_forward.key": "up",
    "rwkv.blocks.*.feed_forward.receptance": "gate",
    "rwkv.blocks.*.feed_forward.value": "down",
}


def unknown(model_type: str) -> Any:
    torch.manual_seed(0)
    options = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **UNKNOWN[model_type]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    disturb(model.parameters(), scale=0.1)
    return model.eval().requires_grad_(False)


# ── A model that is not known


def test_an_unknown_architecture_is_an_error_that_prints_its_linear_layers_and_the_line_to_write() -> None:
    """Both lines are taken from the message as they stand, with the roles filled in that it cannot know."""
    model = unknown("rwkv")
    with pytest.raises(UserError, match=r"'rwkv'.*unknown; no layer has a name that is known\nits linear.* ") as caught:
        find_targets(model, Q)
    for layer in ("blocks.*.attention.key (32 → 32)", "blocks.*.feed_forward.value (48 → 32)", "head (32 → 64)"):
        assert layer in str(caught.value)
    lines = str(caught.value).splitlines()
    (in_python,) = (ast.literal_eval(line.partition("roles=")[2]) for line in lines if line.startswith("in Python: "))
    (in_yaml,) = (yaml.safe_load(line.partition(": ")[2]) for line in lines if line.startswith("in an experiment: "))
    assert in_yaml == {"backbone": {"roles": in_python}}
    assert in_python == dict.fromkeys(RWKV_ROLES, "ROLE")
    with pytest.raises(UserError, match=r"key: unknown role 'ROLE'; allowed: down, "):
        find_targets(model, Q, in_python)
    assert len(find_targets(model, ATTENTION | FEED_FORWARD, RWKV_ROLES)) == 14


def test_fused_experts_are_refused_by_name() -> None:
    model = unknown("mixtral")
    experts = r"model\.layers\.\*\.mlp\.experts \(.*\) cannot be adapted: MixtralExperts: its experts are fused"
    for roles in (FEED_FORWARD, frozenset({"down"}), frozenset({"mlp"})):
        with pytest.raises(UserError, match=rf"mixtral model has no layer with the role .*\n{experts}"):
            find_targets(model, roles)
    with pytest.warns(UserWarning, match=rf"mixtral model is adapted without these layers:\n{experts}"):
        assert {t.role for t in find_targets(model, ATTENTION | FEED_FORWARD)} == {"q", "k", "v", "o"}
    assert {t.role for t in find_targets(model, ATTENTION)} == {"q", "k", "v", "o"}
    with pytest.raises(
        UserError, match=r"mlp\.experts is MixtralExperts, not a linear layer: it cannot have the role up"
    ):
        find_targets(model, Q, {"model.layers.*.mlp.experts": "up"})


def test_experts_that_are_separate_layers_see_only_some_tokens_and_are_refused() -> None:
    model = unknown("mixtral")
    for block in model.model.layers:
        block.mlp.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(32, 48), "w2": nn.Linear(48, 32)}) for _ in "ab"
        )
    with pytest.raises(
        UserError, match=r"mlp\.experts \(down\) cannot be adapted: ModuleList: .*only the tokens routed"
    ):
        find_targets(model, frozenset({"down"}))
    with pytest.raises(
        UserError, match=r"experts\.0\.w1 cannot have the role up: an expert sees only the tokens routed"
    ):
        find_targets(model, frozenset({"up"}), {"model.layers.*.mlp.experts.*.w1": "up"})


def test_a_known_type_without_its_causal_lm_around_it_is_not_known() -> None:
    with pytest.raises(UserError, match=r"no layer matches model\.layers\.\*\.self_attn\.q_proj\n.*: layers\.\*"):
        find_targets(tiny_llama().model, Q)


# ── A role that is not there


def test_a_role_that_the_architecture_lacks_is_an_error_that_says_what_it_has() -> None:
    with pytest.raises(
        UserError, match=r"opt model has no layer with the role gate; it has down, k, norm, o, q, up, v$"
    ):
        find_targets(tiny_opt(), frozenset({"gate"}))


def test_of_some_roles_that_a_method_wants_the_model_need_not_have_all() -> None:
    roles = {t.role for t in find_targets(tiny_opt(), FEED_FORWARD)}
    assert roles == {"up", "down"}


@pytest.mark.parametrize("has", ["up", "q"])
def test_roles_named_one_by_one_must_all_be_there(has: str) -> None:
    with pytest.raises(UserError, match=r"opt model has no layer with the role gate, mlp; it has "):
        find_targets(tiny_opt(), frozenset({has, "gate", "mlp"}), named=frozenset({"gate", "mlp", has}))


# ── By hand


@pytest.mark.parametrize("roles", [("q", "v"), ("q", "k", "v", "up")], ids="-".join)
def test_an_unknown_model_learns_with_roles_by_hand(roles: Any) -> None:
    model = unknown("mpt")
    bare_BTV = logits(model)
    router = Router(resolve_grouping("specific", ("image", "text"))[0])
    router.set_context_ids(torch.tensor([[1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]]))
    method = LoRA(LoRAConfig(rank=2, where=roles))
    adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0, roles=MPT_ROLES)
    parts = ["Wqkv:q", "Wqkv:v"] if roles == ("q", "v") else ["Wqkv", "up_proj"]
    assert [key.rpartition("/")[2] for key in adapters.layers] == parts * 2
    adapters.attach(model)
    assert torch.equal(logits(model), bare_BTV)
    disturb(adapters.parameters())
    logits(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())
    adapters.detach()
    assert torch.equal(logits(model), bare_BTV)


def test_by_hand_goes_before_the_table() -> None:
    targets = find_targets(tiny_llama(), ROLES, {"model.layers.1.self_attn.q_proj": "o"})
    assert [(t.path, t.role) for t in targets] == [("model.layers.1.self_attn.q_proj", "o")]


def test_a_star_is_a_number_and_a_path_is_whole() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a_1", "a_12", "a_x", "xa_1", "a_1b", "a_")})
    assert [t.path for t in find_targets(model, Q, {"a_*": "q"})] == ["a_1", "a_12"]


def test_head_by_head_is_what_bloom_computes() -> None:
    """BLOOM joins q, k and v of every head; values are seen in what its attention makes of one token."""
    model = unknown("bloom")
    path = "transformer.h.*.self_attention.query_key_value"
    per_head = {path: {"roles": ["q", "k", "v"], "per_head": True}}
    value, output = find_targets(model, frozenset({"v"}), per_head)[0], model.transformer.h[0].self_attention.dense
    seen: dict[str, torch.Tensor] = {}
    assert value.layer is not None
    value.layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    output.register_forward_pre_hook(lambda _m, args: seen.update(o=args[0]))
    model(inputs_embeds=embeds(length=1))
    bias = value.layer.get_parameter("bias")[list(value.rows or ())]
    # A single token's attention is its own value.
    torch.testing.assert_close(seen["o"], seen["x"] @ value.weight().T + bias)


def test_one_key_head_for_all_queries_is_read_from_the_configuration() -> None:
    targets = find_targets(
        unknown("gpt_bigcode"), frozenset({"q", "k"}), {"transformer.h.0.attn.c_attn": ["q", "k", "v"]}
    )
    assert [(t.role, t.rows) for t in targets] == [("q", tuple(range(32))), ("k", tuple(range(32, 40)))]


WRONG: dict[str, tuple[Any, str]] = {
    "not a mapping": (["q"], r"found \['q'\]; allowed: a mapping, path pattern → role"),
    "nothing": ({}, r"found \{\}; allowed: a mapping, path pattern → role"),
    "pattern": ({3: "q"}, r"found the path pattern 3; allowed: a string"),
    "role": ({"a": "query"}, r"a: unknown role 'query'; allowed: down, gate, "),
    "near role": ({"a": "dwn"}, r"a: unknown role 'dwn'; .*did you mean 'down'\?"),
    "no role": ({"a": None}, r"a: unknown role None; allowed: "),
    "role in list": ({"a": ["q", "x"]}, r"a: unknown role 'x'; allowed: "),
    "list in list": ({"a": ["q", ["k"]]}, r"a: unknown role \['k'\]; allowed: "),
    "attention and feed-forward": ({"a": ["q", "gate"]}, r"found \['q', 'gate'\]; .*several of q, k and v, or gate and up"),
    "outputs of different inputs": ({"a": ["q", "o"]}, r"found \['q', 'o'\]; .*several of q, k and v, or gate and up"),
    "twice": ({"a": ["q", "q"]}, r"found \['q', 'q'\]; .*several of q, k and v, or gate and up"),
    "one": ({"a": ["q"]}, r"found \['q'\]; .*several of q, k and v, or gate and up"),
    "empty": ({"a": []}, r"found \[\]; .*several of q, k and v, or gate and up"),
    "gate per head": ({"a": {"roles": ["gate", "up"], "per_head": True}}, r"found \['gate', 'up'\]; .*not per head"),
    "per head of one": ({"a": {"roles": "q", "per_head": True}}, r"found 'q'; .*several of q, k and v, or gate and up"),
    "keys": ({"a": {"roles": ["q", "k"], "heads": True}}, r"found \{.*; allowed: keys roles \(a list\) and per_head \(true or false\)"),
    "per head no boolean": ({"a": {"roles": ["q", "k"], "per_head": 1}}, r"found \{.*; allowed: keys roles .* and per_head"),
}  # fmt: skip


@pytest.mark.parametrize(("by_hand", "message"), WRONG.values(), ids=WRONG)
def test_roles_by_hand_of_a_wrong_form_are_refused(by_hand: Any, message: str) -> None:
    with pytest.raises(
        UserError, match=f"^layer roles: .*{message}" if isinstance(by_hand, dict) and by_hand else message
    ):
        parse_roles(by_hand)


C_ATTN = "transformer.h.*.attn.c_attn"
UNFIT: dict[str, tuple[str, Any, str]] = {
    "no such layer": ("gpt2", {"transformer.h.*.attn.c_attm": "q"}, r"c_attm matches no layer of this gpt2 model \(\* matches a number\); .*did you mean 'transformer\.h\.\*\.attn\.c_attn'"),
    "part of a name": ("gpt2", {"c_attn": "q"}, r"c_attn matches no layer of this gpt2 model"),
    "a second pattern without a layer": ("gpt2", {C_ATTN: "q", "c_attn": "q"}, r"roles: c_attn matches no layer of this gpt2 model"),
    "twice": ("gpt2", {C_ATTN: "q", "transformer.h.1.attn.c_attn": "k"}, r"h\.1\.attn\.c_attn matches .*h\.\*\.attn\.c_attn and .*h\.1\.attn\.c_attn; each layer must match one entry"),
    "does not divide": ("gpt_neox", {"gpt_neox.layers.*.mlp.dense_h_to_4h": ["q", "k"]}, r"4h has 48 outputs, which does not fit q \(4 × 8\), k \(4 × 8\), concatenated"),
    "divides into other heads": ("gpt2", {"transformer.h.*.mlp.c_fc": ["q", "k", "v"]}, r"c_fc has 48 outputs, which does not fit q \(4 × 8\), k \(4 × 8\), v \(4 × 8\), concatenated"),
    "odd gate and up": ("mixtral", {"lm_head": ["gate", "up"], "model.layers.*.mlp.gate": "q"}, r"mlp\.gate is MixtralTopKRouter, not a linear layer: it cannot have the role q$"),
    "unequal heads per head": ("phi3", {"model.layers.*.mlp.gate_up_proj": {"roles": ["q", "k", "v"], "per_head": True}}, r"has 96 outputs, which does not fit q \(4 × 8\), k \(2 × 8\), v \(2 × 8\), grouped by head"),
    "a block as a layer": ("gpt2", {"transformer.h.*.attn": "q"}, r"attn is GPT2Attention, not a linear layer: it cannot have the role q"),
    "an embedding as a layer": ("gpt2", {"transformer.wte": "q"}, r"wte is Embedding, not a linear layer"),
    "a layer as a norm": ("gpt2", {C_ATTN: "norm"}, r"c_attn is Conv1D, not a normalisation: it cannot have the role norm"),
    "a norm as a block": ("gpt2", {"transformer.h.*.ln_1": "mlp"}, r"ln_1 is LayerNorm, not a block with linear layers: it cannot have the role mlp"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "by_hand", "message"), UNFIT.values(), ids=UNFIT)
def test_roles_by_hand_that_do_not_fit_the_model_are_refused(family: str, by_hand: Any, message: str) -> None:
    """Whatever the method wants: also the entries that it does not ask for are looked at."""
    with pytest.raises(UserError, match=message):
        find_targets(unknown(family) if family in UNKNOWN else tiny(family), frozenset({"down"}), by_hand)


def test_gate_and_up_of_an_odd_number_of_outputs_are_refused() -> None:
    with pytest.raises(UserError, match="layer fc has 5 outputs, which does not fit gate, up, concatenated"):
        find_targets(nn.ModuleDict({"fc": nn.Linear(4, 5)}), ROLES, {"fc": ["gate", "up"]})


def test_head_by_head_needs_the_number_of_heads() -> None:
    with pytest.raises(UserError, match="layer fc has 6 outputs, which does not fit q, k, v, grouped by head"):
        find_targets(
            nn.ModuleDict({"fc": nn.Linear(4, 6)}), ROLES, {"fc": {"roles": ["q", "k", "v"], "per_head": True}}
        )


# ── By hand in an experiment


def spec_of(experiment_file: Write, backbone: str, roles: str) -> TrialSpec:
    text = f"task: scenes\nbackbone: {{language_model: {backbone}{roles}}}\n"
    (spec,) = expand(Experiment.from_yaml(experiment_file(
        text + "adapters: [{method: lora, rank: 2, where: [[q, v, down]]}]\noptimizer: {learning_rate: 1e-3}\n"
    )))  # fmt: skip
    return spec


def test_an_experiment_gives_roles_by_hand(experiment_file: Write, tmp_path: Path) -> None:
    unknown("rwkv").config.save_pretrained(tmp_path / "rwkv")
    with pytest.raises(UserError, match=r"'rwkv'.*unknown; .*") as caught:
        count_parameters(spec_of(experiment_file, str(tmp_path / "rwkv"), ""))
    line = str(caught.value).splitlines()[-1].partition("roles: ")[2][:-1]
    for path, role in RWKV_ROLES.items():
        line = line.replace(f"{path}: ROLE", f"{path}: {role}")
    spec = spec_of(experiment_file, str(tmp_path / "rwkv"), f", roles: {line}")
    assert spec.backbone.roles == RWKV_ROLES
    # Two layers of q 32 → 32, v 32 → 32 and down 48 → 32, rank 2, one group.
    assert count_parameters(spec).adapter == 2 * 2 * (64 + 64 + 80)
    unknown("mpt").config.save_pretrained(tmp_path / "mpt")
    line = "{transformer.blocks.*.attn.Wqkv: [q, k, v], transformer.blocks.*.ffn.down_proj: down}"
    spec = spec_of(experiment_file, str(tmp_path / "mpt"), f", roles: {line}")
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
    other = line.replace("[q, k, v]", "{roles: [q, k, v], per_head: true}")
    assert spec_of(experiment_file, str(tmp_path / "mpt"), f", roles: {other}").trial_id != spec.trial_id


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("{a.*.b: query}", r"experiment.yaml.*backbone\.roles: layer roles: a\.\*\.b: unknown role 'query'"),
        (
            "{a.*.b: [q, gate]}",
            r"experiment.yaml.*backbone\.roles: layer roles: a\.\*\.b: found .*several of",
        ),
        ("{}", r"experiment.yaml.*backbone\.roles: layer roles: .*a mapping"),
        ("q", r"experiment.yaml.*backbone\.roles: input should be a mapping \(key: value\), such as .*: q}; found 'q'"),
    ],
)
def test_wrong_roles_in_an_experiment_are_named_with_their_place(
    experiment_file: Write, roles: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(experiment_file, "builtin/tiny-llama", f", roles: {roles}")


# ── The paper's Table 3


@each_row
def test_table_3_on_a_glm(method: AdapterMethod, agnostic: int, specific: int) -> None:
    """The paper's own language model is a GLM of this shape; its fused gate and up is adapted as one layer."""
    config = GlmConfig(
        num_hidden_layers=12, hidden_size=768, num_attention_heads=12, num_key_value_heads=12, head_dim=64,
        intermediate_size=3072, attention_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = GlmForCausalLM(config)
        for grouping, expected in (("agnostic", agnostic), ("specific", specific)):
            router = Router(resolve_grouping(grouping, ("image", "text"))[0])
            adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
            assert sum(p.numel() for p in adapters.parameters()) == expected


# ── Weights


def test_a_weight_that_is_not_a_matrix_of_numbers_is_refused() -> None:
    narrow = nn.Linear(4, 4).to(torch.float8_e4m3fn)  # its scales would be elsewhere
    for layer in (narrow, nn.LayerNorm(4), nn.Embedding(4, 4)):
        with pytest.raises(
            UserError, match=rf"layer a\.b \({type(layer).__name__}\) has no weight matrix that can be read"
        ):
            Target("a.b", "q", 4, 4, layer=layer).weight()
