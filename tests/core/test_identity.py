"""A plugin's identity is its name, distribution and result version: its class may move, its results may not change
unnoticed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import harness
from adapters.registry import ADAPTERS
from harness.core import registry
from harness.core.errors import UserError
from harness.core.registry import identity, plugins_in
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model.build import build
from tasks.base import Split, Task
from tasks.scenes import Scenes
from tasks.trends import Trends
from tests.support.adapters import disturb, embeds
from tests.support.installed import replace_entry_points
from tests.support.models import tiny_llama

METHOD = "from adapters.methods.lora import LoRA\n\n\nclass Mine(LoRA):\n    '''A method of one's own.'''\n{}"
TASK = "from tasks.text import Text\n\n\nclass Chat(Text):\n    '''A task of one's own.'''\n{}"
LAYOUT = torch.tensor([0] * 4 + [1] * 7)


class Package:
    """A distribution of one adapter method and one task, which can be released again with another layout."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.points, self.version = folder, [], "1.0"  # type: ignore[var-annotated]
        known = registry.entry_points
        replace_entry_points(
            monkeypatch, lambda group: [*known(group=group), *(p for p in self.points if p.group == group)]
        )
        monkeypatch.syspath_prepend(folder)

    def release(self, version: str, module: str, body: str = "", task_body: str = "") -> None:
        """Put both classes into one module and register them; earlier modules are removed."""
        for old in self.folder.glob("mine_*.py"):
            old.unlink()
            sys.modules.pop(old.stem, None)
        (self.folder / f"{module}.py").write_text(METHOD.format(body) + "\n\n" + TASK.format(task_body))

        class Installed(EntryPoint):
            dist = SimpleNamespace(name="my-package", version=version)  # type: ignore[assignment]

        self.points[:] = [
            Installed("mine", f"{module}:Mine", "harness.adapters"),
            Installed("chat", f"{module}:Chat", "harness.tasks"),
        ]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    (tmp_path / "site").mkdir()
    yield Package(tmp_path / "site", monkeypatch)
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


@pytest.fixture
def spec(tmp_path: Path, experiment_file: Callable[[str], Path]) -> Callable[[], TrialSpec]:
    folder = tmp_path / "chat"
    folder.mkdir()
    from tasks.text import Text

    options = json.dumps(Text.sample(folder))
    path = experiment_file(
        f"task: {{name: chat, {options[1:-1]}}}\nadapters: [{{method: mine, rank: 2, learning_rate: 1e-3}}]\n"
    )
    return lambda: expand(Experiment.from_yaml(path))[0]


def test_a_class_that_moves_keeps_its_trial_ids_and_loads_its_saved_adapter(
    package: Package, spec: Callable[[], TrialSpec], tmp_path: Path
) -> None:
    package.release("1.0", "mine_before")
    before = spec()
    adapted = harness.adapt(tiny_llama(), {"method": "mine", "rank": 2}, grouping="specific")
    disturb(adapted.adapters.parameters())
    adapted.save(tmp_path / "saved")
    expected = adapted(inputs_embeds=embeds(), context_ids=LAYOUT).logits

    package.release("1.1", "mine_after")
    after = spec()
    assert after.trial_id == before.trial_id
    assert after.adapter.plugins[0].target == "mine_after:Mine"
    assert after.adapter.plugins[0].version == "1.1"
    again = harness.load_adapter(tiny_llama(), tmp_path / "saved")
    assert torch.equal(again(inputs_embeds=embeds(), context_ids=LAYOUT).logits, expected)
    assert build(after, torch.device("cpu")).parameters.adapter > 0  # it is loaded from where it is now


@pytest.mark.parametrize("raised", ["body", "task_body"])
def test_a_raised_result_version_is_another_trial(package: Package, spec: Callable[[], TrialSpec], raised: str) -> None:
    package.release("1.0", "mine_before")
    before = spec()
    package.release("1.0", "mine_before", **{raised: "    result_version = 2\n"})
    after = spec()
    assert after.trial_id != before.trial_id
    ids = {plugin.id for plugin in plugins_in(after.model_dump(mode="json"))}
    assert ("my-package:mine@2" in ids, "my-package:chat@2" in ids) == (raised == "body", raised == "task_body")


@pytest.mark.parametrize("version", ["0", "True", "'1'", "1.5", "None"])
def test_a_result_version_is_a_positive_integer(package: Package, version: str) -> None:
    package.release("1.0", "mine_before", f"    result_version = {version}\n")
    with pytest.raises(
        UserError, match=r"mine_before:Mine: result_version: found .*; allowed: an integer of 1 or more"
    ):
        ADAPTERS.plugin("mine")


def test_an_identity_leaves_out_how_to_load_a_plugin(package: Package, spec: Callable[[], TrialSpec]) -> None:
    package.release("1.0", "mine_before")
    content = spec().model_dump(mode="json")
    assert identity(content)["task"]["plugin"] == "my-package:chat@1"
    assert identity(content)["adapter"]["plugins"] == ["my-package:mine@1"]
    assert "mine_before" not in json.dumps(identity(content))
    assert {"my-package:chat@1", "my-package:mine@1", "context-peft-harness:exact_match@1"} <= {
        plugin.id for plugin in plugins_in(content)
    }


# ── What the built-in tasks draw, by result version. A digest that differs is another data set: raise the task's
# ``result_version`` and add a line here.

DRAWN = {
    (Scenes, 1): "629f9b18a2c0ffa4",
    (Trends, 1): "c93f20f2b3a8f91b",
}


@pytest.mark.parametrize("task_class", [Scenes, Trends])
def test_what_is_drawn_belongs_to_a_result_version(
    task_class: type[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    task = task_class(task_class.Config.model_validate({f"{s}_examples": 24 for s in ("train", "validation", "test")}))
    task.prepare()
    digest = hashlib.sha256()
    splits: tuple[Split, ...] = ("train", "validation", "test")
    for split in splits:
        for example in task.examples(split):
            digest.update(repr((example.id, example.references)).encode())
            for _, path in example.files:
                # Pixels rather than bytes: how a PNG is compressed is the library's affair.
                content = np.asarray(Image.open(path)).tobytes() if path.suffix == ".png" else path.read_bytes()
                digest.update(content)
    assert digest.hexdigest()[:16] == DRAWN[task_class, task_class.result_version]


def test_another_result_version_draws_into_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Scenes(Scenes.Config()).folder
    monkeypatch.setattr(Scenes, "result_version", 2)
    assert Scenes(Scenes.Config()).folder != before
