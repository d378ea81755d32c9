"""Adapters live where their layer lives: its device, its dtype, its mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import harness
from adapters.attach import AdaptedLayer
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, ROWS_BT, SPECS, adapted_model, logits
from tests.support.adapters import embeds
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt
from tests.support.tiers import some_fast

METHODS = (
    "lora", "pissa", "dora", "vera", "bitfit", "ln_tuning", "parallel bottleneck", "moka", "soft_prompt", "mmca+lora",
)  # fmt: skip
HOWS = ("cpu", "disk")


def offloaded(model: Any, how: str, folder: Path) -> Any:
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    return model


# Both are the same hook of accelerate: fast tests of the disk are LoRA and the methods that read the weights.
@some_fast(
    "case",
    {f"{name}-{how}": (SPECS[name], how) for name in METHODS for how in HOWS},
    slow=[f"{name}-disk" for name in METHODS if name not in ("lora", "pissa", "dora")],
)
def test_an_offloaded_base_computes_what_a_plain_one_does(case: tuple[Any, str], tmp_path: Path) -> None:
    spec, how = case
    plain = adapted_model(tiny_llama(), spec)
    adapted = adapted_model(offloaded(tiny_llama(), how, tmp_path / "base"), spec)
    plain.adapters.compute_together(False)  # as where something else computes the layers
    assert next(adapted.base_model.parameters()).is_meta
    assert {p.device.type for p in adapted.adapters.parameters()} == {"cpu"}
    torch.testing.assert_close(logits(adapted, embeds(), ROWS_BT), logits(plain, embeds(), ROWS_BT))
    for one in (adapted, plain):
        one(inputs_embeds=embeds(), context_ids=IDS_T, use_cache=False).logits.sum().backward()
    for found, expected in zip(adapted.adapters.parameters(), plain.adapters.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    adapted.save(tmp_path / "adapter")  # reads values of the base, to know it again
    again = harness.load_adapter(tiny_llama(), tmp_path / "adapter")
    again.adapters.compute_together(False)
    assert torch.equal(logits(again, embeds(), IDS_T), logits(plain, embeds(), IDS_T))
    if spec["method"] != "ln_tuning":  # all norms are ones
        with pytest.raises(UserError, match="saved on another base model"):
            harness.load_adapter(tiny_llama(seed=1), tmp_path / "adapter")


@pytest.mark.parametrize("make_model", [tiny_opt, tiny_gpt2])
def test_dora_reads_offloaded_weights_of_other_families(make_model: Any, tmp_path: Path) -> None:
    plain = adapted_model(make_model(), SPECS["dora"])
    adapted = adapted_model(offloaded(make_model(), "cpu", tmp_path), SPECS["dora"])
    torch.testing.assert_close(logits(adapted, embeds(), ROWS_BT), logits(plain, embeds(), ROWS_BT))


def test_offloaded_weights_are_neither_trained_nor_merged_into(tmp_path: Path) -> None:
    model = offloaded(tiny_llama(), "cpu", tmp_path)
    with pytest.raises(UserError, match="offloaded cannot be trained"):
        harness.adapt(model, {"method": "full"})
    adapted = harness.adapt(model, LORA)  # it was left free
    with pytest.raises(UserError, match=r"lora cannot be merged at layer model\.layers\.0.*its weight is offloaded"):
        adapted.merge()


def test_each_adapter_has_the_device_and_the_dtype_rule_of_its_layer() -> None:
    model = tiny_llama().bfloat16()
    model.model.layers[0].mlp.double()
    model.model.layers[1].to("meta")
    adapted = harness.adapt(model, LORA)
    for layer in adapted.adapters.layers.values():
        assert isinstance(layer, AdaptedLayer)
        weight = model.get_submodule(layer.target.path).weight
        wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
        assert {(p.device, p.dtype) for p in layer.parameters()} == {(weight.device, wanted)}


def test_adapters_follow_a_base_that_is_moved() -> None:
    model = tiny_llama()
    adapted = adapted_model(model, SPECS["bitfit"])
    model.to("meta")
    with adapted.router.one_pass():
        adapted.router.set_context_ids(ROWS_BT)
        assert model.model.layers[0].mlp.up_proj(embeds().to("meta")).is_meta
    layer = adapted.adapters.layers["model/layers/0/mlp/up_proj"]
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_the_layout_is_found_on_every_device() -> None:
    adapted = adapted_model(tiny_llama())
    with adapted.router.one_pass():
        for ids in (IDS_T[None], ROWS_BT):
            adapted.router.set_context_ids(ids)
            layout = adapted.router.layout
            moved = layout.on(torch.device("meta"))
            assert moved is layout.on(torch.device("meta"))
            assert moved.spans == layout.spans
            assert moved.lookup(adapted.router.groups).index_XT.is_meta
            assert layout.on(torch.device("cpu")) is layout


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "moka", "peft"])
def test_dropout_follows_the_mode_of_the_layer(method: str) -> None:
    spec: dict[str, Any] = {"method": method, "rank": 3, "dropout": 0.5}
    if method == "peft":
        spec = {"method": "peft", "config": {"peft_type": "LORA", "r": 3, "lora_dropout": 0.5}}
    model = tiny_llama()
    adapted = adapted_model(model, spec, "agnostic" if method == "peft" else "specific")

    def differ() -> bool:
        return not torch.equal(logits(adapted, embeds(), IDS_T), logits(adapted, embeds(), IDS_T))

    assert not differ()
    model.train()  # the base alone
    assert differ()
    model.eval()
    assert not differ()
    adapted.train()
    assert differ()
    for layer in model.model.layers:
        layer.eval()
    assert not differ()
