"""Bottleneck adapters: where they act, their options, how many parameters they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from adapters.methods.bottleneck import Bottleneck, BottleneckConfig
from adapters.placement.roles import Target
from harness.core.errors import UserError
from tests.support.adapters import adapt
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt


def bottleneck(**options: Any) -> Bottleneck:
    return Bottleneck(BottleneckConfig(bottleneck_size=4, **options))


@pytest.mark.parametrize(
    ("make_model", "options", "inside"),
    [
        (tiny_llama, {}, ["self_attn.o_proj", "mlp.down_proj"]),
        (tiny_llama, {"where": "A"}, ["self_attn.o_proj"]),
        (tiny_llama, {"where": "F"}, ["mlp.down_proj"]),
        (tiny_llama, {"where": ("down",)}, ["mlp.down_proj"]),
        (tiny_llama, {"placement": "parallel"}, ["mlp"]),
        (tiny_llama, {"placement": "parallel", "where": "F"}, ["mlp"]),
        (tiny_opt, {}, ["self_attn.out_proj", "fc2"]),
        (tiny_gpt2, {}, ["attn.c_proj", "mlp.c_proj"]),
        (tiny_gpt2, {"placement": "parallel"}, ["mlp"]),
    ],
)
def test_where_it_acts_and_how_many_parameters_that_is(make_model: Any, options: Any, inside: list[str]) -> None:
    model = make_model()
    adapters = adapt(model, bottleneck(**options))
    paths = [path.replace("/", ".").partition(".0.")[2] for path in adapters.layers if "/0/" in path]
    assert sorted(paths) == sorted(inside)
    assert len(adapters.layers) == 2 * len(inside)
    each = 32 * 4 + 4 + 4 * 32 + 32  # down, its bias, up, its bias; all blocks are 32 wide
    assert adapters.parameters_by_group() == {"image": 2 * len(inside) * each, "text": 2 * len(inside) * each}


def test_a_parallel_one_wants_a_feed_forward_block_that_is_a_module() -> None:
    with pytest.raises(UserError, match=r"opt model has no layer with .*mlp.*; it has .*'?down"):
        adapt(tiny_opt(), bottleneck(placement="parallel"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size\n.*greater than 0"),
        ({"placement": "beside"}, "placement\n.*'serial' or 'parallel'"),
        ({"non_linearity": "tanh"}, "non_linearity\n.*'relu', 'gelu' or 'silu'"),
        ({"scale": 2.0}, "scale\n.*only a parallel bottleneck has a scale"),
        ({"scale": 0.0, "placement": "parallel"}, "scale\n.*greater than 0"),
        ({"where": ("q", "o")}, r"where\n.*allowed: A, F, AF, \[o\], \[down\]"),
        ({"where": "A", "placement": "parallel"}, "where\n.*feed-forward block only; allowed: F, AF"),
        ({"where": ("down",), "placement": "parallel"}, "where\n.*feed-forward block only; allowed: F, AF"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BottleneckConfig(**options)


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)])
@pytest.mark.parametrize("placement", ["serial", "parallel"])
def test_the_non_linearity_is_the_one_named(name: Any, function: Any, placement: Any) -> None:
    layer = nn.Sequential(nn.Linear(1, 1))
    delta: Any = bottleneck(placement=placement, non_linearity=name).delta(
        Target("o", "o", 1, 1, layer=layer), torch.Generator()
    )
    nn.init.eye_(delta.down_weight)
    nn.init.eye_(delta.up_weight)
    value = torch.linspace(-2, 2, 9)[:, None]
    nothing = torch.zeros_like(value)
    found = delta(nothing, value) - value if placement == "serial" else delta(value, nothing)
    torch.testing.assert_close(found, function(value))


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "bottleneck 4 serial"),
        ({"where": "A"}, "bottleneck 4 serial A"),
        ({"where": ("down",)}, "bottleneck 4 serial down"),
        ({"placement": "parallel"}, "bottleneck 4 parallel"),
        ({"placement": "parallel", "where": "F"}, "bottleneck 4 parallel"),
    ],
)
def test_labels(options: dict[str, Any], label: str) -> None:
    assert bottleneck(**options).label() == label
