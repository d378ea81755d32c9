"""Checkpoints of the peft library: what we export computes the same there, what it wrote computes the same here.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import harness
from adapters.library.peft_forms import CONFIG, TENSORS
from harness import UserError
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt
from tests.support.peft import relative

MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2}
CONTEXT_IDS = torch.tensor([1] + [0] * 5 + [1] * 5)  # image is 0, text 1
QV = {"target_modules": ["q_proj", "v_proj"]}


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    x_BTD = embeds().to(next(model.parameters()).dtype)
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False, **kwargs).logits
    return logits_BTV


def adapted_by_us(model: Any, spec: dict[str, Any], **kwargs: Any) -> harness.AdaptedModel:
    adapted = harness.adapt(model, spec, **kwargs).eval()
    disturb(adapted.adapters.parameters())
    return adapted


def written_by_peft(folder: Path, config: Any, make_model: Callable[[], Any] = tiny_llama) -> Tensor:
    """Save a checkpoint with random weights as PEFT does; its logits."""
    model: Any = peft.get_peft_model(make_model(), config).eval()
    disturb([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder)
    return logits(model)


def options_of(adapted: harness.AdaptedModel) -> dict[str, Any]:
    choice = adapted.spec.by_group["all"]
    return {"method": choice.name, **choice.method.config.model_dump(mode="json")}


# ── Export

EXPORTED: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "alpha": 5.0},
    "lora of the default alpha, on some roles, with dropout": {
        "method": "lora", "rank": 4, "dropout": 0.1, "where": ["o", "down"],
    },
    "rslora": {"method": "lora", "rank": 4, "alpha": 6.0, "use_rslora": True},
    "lora of an alpha that is no integer": {"method": "lora", "rank": 3, "alpha": 6.5},
    "rslora of an alpha below one": {"method": "lora", "rank": 3, "alpha": 0.3, "use_rslora": True},
    "dora": {"method": "dora", "rank": 3, "alpha": 6.0},
    "dora of an alpha below one": {"method": "dora", "rank": 3, "alpha": 0.5},
    "ia3": {"method": "ia3"},
    "ia3 of the feed-forward part": {"method": "ia3", "where": "F"},
    "vera": {"method": "vera", "rank": 5},
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("spec", EXPORTED.values(), ids=EXPORTED)
def test_what_is_exported_has_the_same_logits_in_peft_and_comes_back_unchanged(
    spec: dict[str, Any], family: str, tmp_path: Path
) -> None:
    """fp32 on both sides: rounding only."""
    adapted = adapted_by_us(MODELS[family](), spec)
    expected_BTV = logits(adapted, context_ids=CONTEXT_IDS)
    assert relative(logits(MODELS[family]()), expected_BTV) > 1e-3
    adapted.export_peft(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path)).eval()
    assert relative(logits(theirs), expected_BTV) < 1e-5
    again = harness.import_peft(MODELS[family](), tmp_path)
    assert torch.equal(logits(again, context_ids=CONTEXT_IDS), expected_BTV)
    options = options_of(again)
    assert {key: options[key] for key in spec if key != "where"} == {k: v for k, v in spec.items() if k != "where"}


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_pair_that_starts_from_the_weight_is_exported_as_all_that_it_adds(
    start: str, use_rslora: bool, tmp_path: Path
) -> None:
    spec = {"method": "lora", "rank": 3, "alpha": 5.0, "init_lora_weights": start, "use_rslora": use_rslora}
    adapted = adapted_by_us(tiny_llama().double(), spec)
    adapted.export_peft(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama().double(), str(tmp_path)).eval()
    assert theirs.peft_config["default"].r == 6
    expected_BTV = logits(adapted, context_ids=CONTEXT_IDS)
    assert relative(logits(theirs), expected_BTV) < 1e-12
    again = harness.import_peft(tiny_llama().double(), tmp_path)
    assert relative(logits(again, context_ids=CONTEXT_IDS), expected_BTV) < 1e-12


def test_the_files_say_what_peft_and_a_reader_need(tmp_path: Path) -> None:
    adapted_by_us(tiny_llama(), {"method": "lora", "where": "A"}).export_peft(tmp_path / "llama")
    raw = json.loads((tmp_path / "llama" / CONFIG).read_text(encoding="utf-8"))
    assert sorted(raw["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (raw["peft_type"], raw["task_type"], raw["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    # GPT-2 has two layers called c_proj: the shortest names that distinguish them.
    adapted_by_us(tiny_gpt2(), {"method": "ia3"}).export_peft(tmp_path / "gpt2")
    raw = json.loads((tmp_path / "gpt2" / CONFIG).read_text(encoding="utf-8"))
    assert sorted(raw["target_modules"]) == ["attn.c_attn", "mlp.c_proj"]
    assert raw["feedforward_modules"] == ["mlp.c_proj"]
    assert raw["fan_in_fan_out"] is True
    vector = load_file(tmp_path / "gpt2" / TENSORS)["base_model.model.transformer.h.0.attn.c_attn.ia3_l"]
    assert vector.shape == (96, 1)
    assert (vector[:32] == 1).all()  # q is not scaled
    assert (vector[32:] != 1).all()


def test_one_of_several_groups_is_exported_by_its_name_or_its_contexts(tmp_path: Path) -> None:
    grouping = {"image": "vision", "audio": "vision", "text": "language", "code": "formal"}
    spec = {
        "vision": {"method": "vera", "rank": 4}, "language": {"method": "vera", "rank": 5}, "formal": {"method": "ia3"},
    }  # fmt: skip
    adapted = adapted_by_us(tiny_llama(), spec, contexts=tuple(grouping), grouping=grouping)
    for name, context, kind in (("vision", 0, "VERA"), ("audio", 1, "VERA"), ("text", 2, "VERA"), ("code", 3, "IA3")):
        adapted.export_peft(tmp_path / name, group=name)
        theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / name)).eval()
        assert theirs.peft_config["default"].peft_type == kind
        # Where all tokens are the group's, the two are the same.
        alone_BTV = logits(adapted, context_ids=torch.full((11,), context))
        assert relative(logits(theirs), alone_BTV) < 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "lora", "rank": 3, "alpha": 5.0},
        {"method": "lora", "rank": 4, "alpha": 6.0, "use_rslora": True},
        {"method": "lora", "rank": 3, "init_lora_weights": "olora"},
        {"method": "ia3"},
    ],
    ids=str,
)
def test_two_stacked_groups_are_one_checkpoint_where_their_sum_or_product_is_one(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    adapted = adapted_by_us(tiny_llama(), spec, grouping="shared+specific")
    for number, group in enumerate(("image", "text")):
        adapted.export_peft(tmp_path / group, group)
        theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / group)).eval()
        alone_BTV = logits(adapted, context_ids=torch.full((11,), number))
        assert relative(logits(theirs), alone_BTV) < 1e-5
    adapted.export_peft(tmp_path / "shared", "shared")
    shared: Any = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "shared")).eval()
    for name, p in adapted.adapters.named_parameters():
        if "group_image" in name:
            start = harness.adapt(tiny_llama(), spec, grouping="shared+specific").adapters.get_parameter(name)
            p.data.copy_(start)
    assert relative(logits(shared), logits(adapted, context_ids=torch.zeros(11).long())) < 1e-4


def test_stacked_groups_that_one_checkpoint_cannot_carry(tmp_path: Path) -> None:
    adapted = adapted_by_us(tiny_llama(), {"method": "vera", "rank": 4}, grouping="shared+specific")
    with pytest.raises(UserError, match=r"contexts differ: image: shared \+ image, text: shared \+ text; name one"):
        adapted.export_peft(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"vera: two stacked groups act on these tokens, .*allowed: the shared group alone"
    ):
        adapted.export_peft(tmp_path / "out", "image")
    assert not (tmp_path / "out").exists()
    adapted.export_peft(tmp_path / "out", "shared")


@pytest.mark.parametrize(
    ("spec", "grouping", "group", "message"),
    [
        ({"method": "lora"}, "specific", None, "contexts differ: image: image, text: text; name one: group='image'"),
        ({"method": "lora"}, {"image": "vision", "text": None}, None, "image: vision, text: no adapter"),
        ({"method": "lora"}, {"image": "vision", "text": None}, "text", "no group or context 'text' with an adapter"),
        ({"method": "lora"}, "specific", "imag", "'imag'.*did you mean 'image'"),
        (
            {"method": "bitfit"},
            "agnostic",
            None,
            "BitFit has no equivalent in the peft library; allowed: lora, dora, ia3",
        ),
        ({"method": "lora+bitfit"}, "agnostic", None, "LoRA r=8 . BitFit has no equivalent in the peft library"),
        ({"method": "none"}, "agnostic", None, "none has no adapter group"),
    ],
)
def test_what_has_no_form_in_peft_is_an_error(
    spec: dict[str, Any], grouping: Any, group: str | None, message: str, tmp_path: Path
) -> None:
    adapted = harness.adapt(tiny_llama(), spec, grouping=grouping)
    with pytest.raises(UserError, match=message):
        adapted.export_peft(tmp_path / "out", group)
    assert not (tmp_path / "out").exists()


def test_a_part_of_a_fused_layer_and_a_folder_that_is_a_file_are_errors(tmp_path: Path) -> None:
    adapted = harness.adapt(tiny_gpt2(), {"method": "lora", "where": ["q", "v"]})
    with pytest.raises(UserError, match=r"q part of the fused layer transformer\.h\.0\.attn\.c_attn"):
        adapted.export_peft(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file: cannot be written"):
        harness.adapt(tiny_llama(), {"method": "ia3"}).export_peft(tmp_path / "file")


# ── Import

WRITTEN: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "lora": (
        tiny_llama,
        peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, lora_dropout=0.1, **QV),
        {"method": "lora", "rank": 4, "alpha": 16.0, "use_rslora": True, "dropout": 0.1, "where": ["q", "v"]},
    ),
    "lora everywhere": (
        tiny_opt,
        peft.LoraConfig(r=2, target_modules="all-linear"),
        {"method": "lora", "rank": 2, "alpha": 8.0, "where": ["down", "k", "o", "q", "up", "v"]},
    ),
    "lora on a fused layer": (
        tiny_gpt2,
        peft.LoraConfig(r=2, target_modules=r".*\.attn\.c_(attn|proj)"),
        {"method": "lora", "rank": 2, "where": ["k", "o", "q", "v"]},
    ),
    "dora": (
        tiny_llama,
        peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, **QV),
        {"method": "dora", "rank": 4, "alpha": 12.0},
    ),
    "ia3": (tiny_llama, peft.IA3Config(), {"method": "ia3", "where": ["down", "k", "v"]}),
    "vera": (tiny_llama, peft.VeraConfig(r=4, **QV), {"method": "vera", "rank": 4, "where": ["q", "v"]}),
    "vera that keeps its projections as a seed": (
        tiny_llama,
        peft.VeraConfig(r=4, save_projection=False, projection_prng_key=7, **QV),
        {"method": "vera"},
    ),
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_what_peft_wrote_has_the_same_logits_here(written: tuple[Any, Any, dict[str, Any]], tmp_path: Path) -> None:
    make_model, config, options = written
    expected_BTV = written_by_peft(tmp_path, config, make_model)
    model = make_model()
    bare_BTV = logits(model)
    adapted = harness.import_peft(model, tmp_path)
    assert relative(bare_BTV, expected_BTV) > 1e-3
    assert relative(logits(adapted, context_ids=CONTEXT_IDS), expected_BTV) < 1e-5
    assert options.items() <= options_of(adapted).items()
    adapted.detach()
    assert torch.equal(logits(model), bare_BTV)


@pytest.mark.parametrize("config", [peft.LoraConfig(r=4, lora_alpha=16, **QV), peft.IA3Config()], ids=["lora", "ia3"])
def test_as_one_contexts_group_it_acts_on_the_tokens_of_that_context_only(config: Any, tmp_path: Path) -> None:
    written_by_peft(tmp_path, config)
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    adapted = harness.import_peft(tiny_llama(), tmp_path, context="image")
    assert adapted.spec.grouping == {"image": "image", "text": None}
    path = "model.layers.0.self_attn.v_proj"
    layers = tiny_llama(), theirs.base_model.model, adapted.base_model
    adapted.router.set_context_ids(CONTEXT_IDS[None])
    with torch.no_grad():
        bare_BTO, agnostic_BTO, found_BTO = (model.get_submodule(path)(embeds()) for model in layers)
    image = CONTEXT_IDS == 0
    assert torch.equal(found_BTO[:, ~image], bare_BTO[:, ~image])
    torch.testing.assert_close(found_BTO[:, image], agnostic_BTO[:, image])
    assert (found_BTO[:, image] != bare_BTO[:, image]).any(dim=-1).all()
    # Where all tokens are the image's it is the agnostic adapter; where none are, the base.
    everywhere = torch.zeros(11, dtype=torch.long)
    assert relative(logits(adapted, context_ids=everywhere), logits(theirs)) < 1e-5
    assert torch.equal(logits(adapted, context_ids=everywhere + 1), logits(tiny_llama()))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: found 'LOHA'; allowed: IA3, LORA, VERA"),
        ({"lora_alpha": "16"}, "lora_alpha: found '16'; allowed: a number"),
        ({"lora_alpha": True}, "lora_alpha: found True; allowed: a number"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: found {'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: found {'q_proj': 2}"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: found \['lm_head'\]"),
        ({"bias": "all"}, "bias: found 'all'"),
        ({"lora_bias": True}, "lora_bias: found True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa', which changes the base"),
        ({"layers_to_transform": [0]}, r"unexpected: .*layers\.1\.self_attn\.q_proj"),
        ({"exclude_modules": ["v_proj"]}, r"unexpected: .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"missing: base_model.*k_proj\.lora_A\.weight"),
        ({"target_modules": None}, "target_modules: found none"),
        ({"r": 8}, r"q_proj\.lora_A\.weight must have shape \(8, 32\); found \(4, 32\)"),
        ({"r": "four"}, "r='four'.*integer"),
        ({"a_feature_of_tomorrow": 3}, "a_feature_of_tomorrow: found 3"),
    ],
)
def test_what_cannot_be_imported_is_an_error_and_leaves_the_model_as_it_was(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written_by_peft(tmp_path, peft.LoraConfig(r=4, **QV))
    change_config(tmp_path, **changes)
    model = tiny_llama()
    bare_BTV = logits(model)
    with pytest.raises(UserError, match=message):
        harness.import_peft(model, tmp_path)
    assert torch.equal(logits(model), bare_BTV)
    harness.adapt(model, {"method": "lora"}).detach()  # the failed attempt left nothing behind


def test_a_feature_that_is_off_in_a_newer_version_is_no_obstacle(tmp_path: Path) -> None:
    expected_BTV = written_by_peft(tmp_path, peft.LoraConfig(r=4, **QV))
    change_config(tmp_path, a_feature_of_tomorrow=None)
    adapted = harness.import_peft(tiny_llama(), tmp_path)
    assert relative(logits(adapted, context_ids=CONTEXT_IDS), expected_BTV) < 1e-5


@pytest.mark.parametrize(
    ("make_model", "config", "message"),
    [
        (
            tiny_llama,
            peft.LoraConfig(target_modules=["layers.0.self_attn.q_proj", "v_proj"]),
            "some of the roles down, gate, k, o, q, up, v; found in addition to v: model.layers.0.self_attn.q_proj",
        ),
        (tiny_llama, peft.LoraConfig(target_modules=["lm_head"]), r"unexpected: .*lm_head\.base_layer"),
        (tiny_opt, peft.IA3Config(), "some of the roles down, k, v; .*q_proj"),
        (tiny_gpt2, peft.IA3Config(), "scale on the queries"),
        (
            tiny_llama,
            peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=["v_proj"]),
            "feedforward_modules: .*found the input of model.layers.0.self_attn.v_proj",
        ),
    ],
    ids=["one layer", "the output layer", "queries", "queries of a fused layer", "the wrong side"],
)
def test_layers_that_are_not_whole_roles_are_an_error(
    make_model: Any, config: Any, message: str, tmp_path: Path
) -> None:
    written_by_peft(tmp_path, config, make_model)
    with pytest.raises(UserError, match=message):
        harness.import_peft(make_model(), tmp_path)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read: .*No such file"):
        harness.import_peft(tiny_llama(), tmp_path)
    written_by_peft(tmp_path, peft.LoraConfig(r=4, **QV))
    tensors = load_file(tmp_path / TENSORS)
    name = next(iter(tensors))
    save_file({key: x for key, x in tensors.items() if key != name}, tmp_path / TENSORS)
    with pytest.raises(UserError, match=f"missing: {name}$"):
        harness.import_peft(tiny_llama(), tmp_path)
    save_file({**tensors, "another": torch.ones(1)}, tmp_path / TENSORS)
    with pytest.raises(UserError, match=r"unexpected: another$"):
        harness.import_peft(tiny_llama(), tmp_path)
    (tmp_path / TENSORS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: cannot be read"):
        harness.import_peft(tiny_llama(), tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(UserError, match=r"cannot be read: .*allowed: safetensors, not adapter_model\.bin"):
        harness.import_peft(tiny_llama(), tmp_path)
    (tmp_path / CONFIG).write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="found list; allowed: a mapping"):
        harness.import_peft(tiny_llama(), tmp_path)


def test_an_unknown_context_an_adapted_model_and_a_missing_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by_peft(tmp_path, peft.LoraConfig(r=4, **QV))
    with pytest.raises(UserError, match="context: found 'imag'; allowed: image, text; did you mean 'image'"):
        harness.import_peft(tiny_llama(), tmp_path, context="imag")
    adapted = harness.import_peft(tiny_llama(), tmp_path)
    with pytest.raises(UserError, match="found an adapted model"):
        harness.import_peft(adapted, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for action in (lambda: harness.import_peft(tiny_llama(), tmp_path), lambda: adapted.export_peft(tmp_path)):
        with pytest.raises(UserError, match=r"pip install 'context-peft-harness\[peft\]'"):
            action()


def test_dropout_of_dora_is_said_to_differ(tmp_path: Path) -> None:
    expected_BTV = written_by_peft(tmp_path, peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.1, **QV))
    with pytest.warns(UserWarning, match="DoRA's dropout acts on the low-rank path only"):
        adapted = harness.import_peft(tiny_llama(), tmp_path).eval()
    assert relative(logits(adapted, context_ids=CONTEXT_IDS), expected_BTV) < 1e-5
