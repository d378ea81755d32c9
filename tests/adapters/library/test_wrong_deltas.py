"""A delta that returns nothing, or another shape, is an error that names it, in every layout: never the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.registry import ADAPTERS
from harness.core.origin import describe
from harness.core.registry import Plugin, add_file
from tests.support.adapted import IDS_T, ROWS_BT, adapted_model
from tests.support.adapters import embeds
from tests.support.models import tiny_llama

METHOD = """
import torch
from torch import nn

from harness import AdapterConfig, AdapterMethod, Delta


class WrongConfig(AdapterConfig):
    returns: str


class WrongDelta(Delta):
    def __init__(self, width, returns):
        super().__init__()
        self.beta, self.returns = nn.Parameter(torch.zeros(width)), returns

    def forward(self, x_BTI, value_BTD):
        value_BTD = value_BTD + self.beta
        return {"nothing": None, "one": value_BTD[..., :1], "right": value_BTD}[self.returns]


class Wrong(AdapterMethod):
    summary = "adds a vector"
    Config = WrongConfig

    def label(self):
        return "Wrong"

    def roles(self):
        return frozenset({"q", "v"})

    def delta(self, target, generator):
        return WrongDelta(target.out_features, self.config.returns)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ADAPTERS, "added", [])
    (path := tmp_path / "wrong.py").write_text(METHOD, encoding="utf-8")
    add_file(path, "plugins", [ADAPTERS])
    return path


@pytest.mark.parametrize("ids", [IDS_T, ROWS_BT], ids=["spans", "tokens"])
@pytest.mark.parametrize("grouping", ["agnostic", "specific"])
@pytest.mark.parametrize(("returns", "found"), [("nothing", "NoneType"), ("one", r"\(.*, 1\)"), ("right", "")])
def test_a_delta_that_returns_something_else_is_named(
    file: Path, returns: str, found: str, grouping: str, ids: torch.Tensor
) -> None:
    adapted = adapted_model(tiny_llama(), {"method": "wrong", "returns": returns}, grouping)

    def run() -> None:
        adapted(inputs_embeds=embeds(), context_ids=ids, use_cache=False)

    if not found:
        run()
        return
    with pytest.raises(
        ValueError, match=rf"the delta of group \w+ returned {found}; allowed: a tensor of shape"
    ) as error:
        run()
    plugin = Plugin(name="wrong", distribution="wrong.py", result_version=1, target=f"{file}:Wrong")
    line = METHOD.splitlines().index("class WrongDelta(Delta):") + 1
    assert f"plugin wrong (wrong.py), {file}:{line} class WrongDelta" in describe(error.value, [plugin], Path("log"))
