"""Several methods as one, from the experiment file to training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adapters import base
from adapters.attach import Adapters
from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.combination import combine
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.router import Router
from harness.core.contexts import Segment, resolve_grouping
from harness.core.errors import UserError
from harness.core.record import MetricInfo
from harness.experiment.load import Experiment
from harness.experiment.plan import describe, expand
from harness.model.build import count_parameters
from harness.model.components import method_of
from tests.support.adapters import embeds
from tests.support.models import tiny_llama

Write = Callable[[str], Path]
METRICS = (MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),)


def experiment(entries: str) -> str:
    """An experiment whose second line is the list of adapters."""
    return f"task: scenes\nadapters: [{entries}]\noptimizer: {{learning_rate: 1e-3}}\n"


def test_it_plans_with_the_options_of_both(experiment_file: Write) -> None:
    text = experiment("{method: lora+bitfit, rank: [2, 4], where: A, grouping: specific}, {method: bitfit+ia3}")
    read = Experiment.from_yaml(experiment_file(text))
    specs = expand(read)
    labels = [(trial.label, trial.grouping, trial.method) for trial in describe(read, specs, METRICS, "").trials]
    assert labels == [
        ("LoRA r=2 A + BitFit A", "specific", "lora+bitfit"),
        ("LoRA r=4 A + BitFit A", "specific", "lora+bitfit"),
        ("BitFit + IA3", "agnostic", "bitfit+ia3"),
    ]
    assert len({spec.trial_id for spec in specs}) == 3
    assert [plugin.name for plugin in specs[0].adapter.plugins] == ["lora", "bitfit"]
    lora, bitfit = method_of(specs[0].adapter).parts
    assert lora.config == LoRAConfig(rank=2, where="A")
    assert bitfit.config == BitFitConfig(where="A")


def test_it_counts_what_its_parts_do_together(experiment_file: Write) -> None:
    text = experiment("{method: [lora, bitfit, lora+bitfit], grouping: specific}")
    lora, bitfit, both = (count_parameters(spec) for spec in expand(Experiment.from_yaml(experiment_file(text))))
    assert both.adapter == lora.adapter + bitfit.adapter
    assert both.by_group == {group: lora.by_group[group] + bitfit.by_group[group] for group in ("image", "text")}
    assert both.trainable == both.adapter + both.projector


@pytest.mark.parametrize(
    ("entry", "key", "message"),
    [
        ("{method: lora+bitfit, rnak: 4}", "rnak", "unknown key 'rnak'; allowed: .*rank.*; did you mean 'rank'?"),
        (
            "{method: bitfit+ia3, rank: 4}",
            "rank",
            "unknown key 'rank'; allowed: grouping, groups, init_from, learning_rate, method, search, tried_learning",
        ),
        ("{method: lora+nope}", "method", "unknown adapter 'nope'; allowed: bitfit, .*; did you mean 'none'?"),
        ("{method: lora+}", "method", "unknown adapter ''; allowed: bitfit, "),
        ("{method: lora+bitfit, rank: 0}", "rank", "input should be greater than 0; found 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(experiment_file: Write, entry: str, key: str, message: str) -> None:
    where = re.escape(f"experiment.yaml, line 2, adapters[0].{key}: ")
    with pytest.raises(UserError, match=where + message.replace("?", r"\?")):
        Experiment.from_yaml(experiment_file(experiment(entry)))


def test_a_method_twice_is_an_error(experiment_file: Write) -> None:
    with pytest.raises(UserError, match=r"each method once; found LoRA\+LoRA"):
        Experiment.from_yaml(experiment_file(experiment("{method: lora+lora}")))


class OtherRankConfig(base.Config):
    rank: str = "high"


class OtherRank(BitFit):
    Config = OtherRankConfig


def test_an_option_that_means_two_things_is_an_error() -> None:
    with pytest.raises(UserError, match=r"LoRA\+OtherRank cannot be combined: .*option 'rank'"):
        combine((LoRA, OtherRank))


def test_its_options_are_typed_like_those_of_its_parts() -> None:
    config_class: Any = combine((LoRA, BitFit)).Config
    with pytest.raises(ValidationError, match=r"rank\n.*valid integer"):
        config_class(rank="4")
    with pytest.raises(ValidationError, match="frozen"):
        config_class().rank = 5


def test_it_computes_one_after_the_other_and_all_of_it_learns() -> None:
    """A step of SGD moves every parameter of both; at the start the model is what it was."""
    model = tiny_llama()
    x_BTD = embeds()
    with torch.no_grad():
        bare_BTV = model(inputs_embeds=x_BTD, use_cache=False).logits
    method = combine((LoRA, BitFit))(combine((LoRA, BitFit)).Config(rank=3))
    router = Router(resolve_grouping("specific", ("image", "text"))[0])
    router.set_layout([Segment(0, 1, "text"), Segment(1, 6, "image"), Segment(6, 11, "text")])
    adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
    adapters.attach(model)
    assert torch.equal(model(inputs_embeds=x_BTD, use_cache=False).logits, bare_BTV)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.01)
    start = {name: p.detach().clone() for name, p in adapters.named_parameters()}
    losses = []
    for _ in range(3):  # lora_A moves from the second step on, when B is no longer zero
        loss = model(inputs_embeds=x_BTD, use_cache=False).logits.square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    unmoved = {name for name, p in adapters.named_parameters() if torch.equal(p, start[name])}
    assert unmoved == set()
    names = {name.split(".changes.")[1].split(".")[0] for name in start}
    assert names == {"lora", "bitfit"}
