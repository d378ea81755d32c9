"""Layers that adapters cannot act on, as only a pass shows, are refused by name."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, ROWS_BT, adapted_model, logits
from tests.support.adapters import embeds
from tests.support.models import tiny_llama, tiny_opt

DOWN = "model.layers.1.mlp.down_proj"


def replaced(forward: Any, path: str = DOWN) -> Any:
    """A model one of whose layers sees what ``forward(layer, x)`` passes to it."""

    class Replaced(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Any:
            return forward(self.inner, x)

    model = tiny_llama()
    above, _, name = path.rpartition(".")
    holder = model.get_submodule(above)
    setattr(holder, name, Replaced(getattr(holder, name)))
    return model


def run(model: Any, ids: Tensor = ROWS_BT, rows: int = 3, spec: Any = LORA, role: str = "down") -> Any:
    adapted = adapted_model(model, spec, roles={f"{DOWN}.inner": role})
    return logits(adapted, embeds(rows), ids[:rows] if ids.dim() == 2 else ids)


# ── Axes

WRONG_AXES: dict[str, tuple[Any, str]] = {
    "rows missing": (lambda layer, x: torch.stack([layer(row) for row in x]), r"\(11,\)"),
    "some tokens": (lambda layer, x: torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1), r"\(3, 4\)"),
    "some tokens, flattened": (lambda layer, x: layer(x.flatten(0, 1)[:22]).sum() + 0 * x[..., :32], r"\(22,\)"),
    "an axis before": (lambda layer, x: layer(x[None])[0], r"\(1, 3, 11\)"),
    "more rows": (lambda layer, x: layer(x.repeat(2, 1, 1))[:3], r"\(6, 11\)"),
}


@pytest.mark.parametrize(("forward", "found"), WRONG_AXES.values(), ids=WRONG_AXES)
@pytest.mark.parametrize("ids", [IDS_T, ROWS_BT], ids=["alike", "rows"])
@pytest.mark.parametrize("spec", [LORA, {"method": "ia3"}], ids=["output", "input"])
def test_other_axes_are_refused(forward: Any, found: str, ids: Tensor, spec: Any) -> None:
    message = rf"^layer model\.layers\.1\.mlp\.down_proj\.inner: its input has the axes {found} .*\(3, 11\) here"
    with pytest.raises(UserError, match=message):
        run(replaced(forward), ids, spec=spec)


def transposed(layer: Any, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1)).transpose(0, 1)


def flattened(layer: Any, x: Tensor) -> Tensor:
    turned = x.transpose(0, 1)
    return layer(turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).transpose(0, 1)


@pytest.mark.parametrize("forward", [transposed, flattened])
def test_positions_before_rows_are_refused_before_any_pass(forward: Any) -> None:
    model = replaced(forward).train()
    state = torch.random.get_rng_state()
    with pytest.raises(UserError, match=rf"layer {DOWN}\.inner: positions come before rows in its input, \(T × B\)"):
        adapted_model(model, LORA, roles={f"{DOWN}.inner": "down"})
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_flattened_axes_of_unknown_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replaced(RIGHT_AXES["flattened"])
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, inputs_embeds, **kw: plain(inputs_embeds=inputs_embeds, **kw))
    with pytest.raises(UserError, match=r"down_proj\.inner: its input has rows and positions flattened, and whether"):
        run(model)
    harness.detach(model)
    assert run(model, rows=1, ids=IDS_T).shape == (1, 11, 64)


RIGHT_AXES: dict[str, Any] = {
    "flattened": lambda layer, x: layer(x.flatten(0, 1)).view(*x.shape[:2], -1),
    "several times": lambda layer, x: (layer(x) + layer(x)) / 2,
}


@pytest.mark.parametrize("forward", RIGHT_AXES.values(), ids=RIGHT_AXES)
def test_flattened_axes_and_several_calls_are_right(forward: Any) -> None:
    for ids in (IDS_T, ROWS_BT):
        found_BTV, expected_BTV = run(replaced(forward), ids), run(replaced(lambda layer, x: layer(x)), ids)
        torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


def test_calls_that_give_no_tensor_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"down_proj\.inner: its input is keyword arguments only; adapters need a tensor"
    ):
        run(replaced(lambda layer, x: layer(input=x)))
    tuples = replaced(lambda layer, x: layer(x)[0])
    inner = tuples.get_submodule(f"{DOWN}.inner")
    plain = inner.forward
    inner.forward = lambda x: (plain(x), None)
    with pytest.raises(UserError, match=r"down_proj\.inner: its output is a tuple; adapters need a tensor"):
        run(tuples)


# ── Layers that do not run


def test_a_layer_whose_weight_is_read_is_refused_once_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.placement.first_pass._has_compiled", lambda: False)  # other tests have
    model = replaced(lambda layer, x: nn.functional.linear(x, layer.weight))
    with pytest.raises(UserError, match=r"did not run in the first pass: model\.layers\.1\.mlp\.down_proj\.inner; "):
        run(model)
    harness.detach(model)
    assert model(inputs_embeds=embeds()).logits.shape == (3, 11, 64)


def test_only_the_first_whole_pass_is_looked_at() -> None:
    adapted = adapted_model(tiny_opt())
    layer = adapted.base_model.model.decoder.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        logits(adapted, embeds(), IDS_T)  # not a pass
    handle.remove()
    adapted.base_model.config.layerdrop = 0.5
    adapted.train()
    adapted.base_model.model.decoder.layerdrop = 1.1  # every block is left out
    logits(adapted, embeds(), IDS_T)
    adapted.eval()
    logits(adapted, embeds(), IDS_T)
    adapted.base_model.model.decoder.layers = adapted.base_model.model.decoder.layers[:1]
    logits(adapted, embeds(), IDS_T)  # it ran before


def test_threads_have_rows_of_their_own() -> None:
    adapted = adapted_model(tiny_llama())
    expected = [logits(adapted, embeds(rows), IDS_T) for rows in (2, 5)]
    wrong: list[int] = []

    def work(index: int, rows: int) -> None:
        for _ in range(10):
            if not torch.equal(logits(adapted, embeds(rows), IDS_T), expected[index]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=one) for one in ((0, 2), (1, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
