"""What a plugin file imports from its folder is part of it: of trial ids, of what is loaded, of what errors name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.beside import modules_beside
from harness.core.origin import describe
from harness.core.registry import Plugin
from harness.experiment.load import Experiment
from harness.experiment.plan import expand
from tasks.registry import METRICS

METRIC = """
import sys
from pathlib import Path

from harness import Metric, Scores

sys.path.insert(0, str(Path(__file__).parent))
import words_beside


class Listed(Metric):
    labels = {"listed": "Listed"}

    def score(self, predictions, references):
        return Scores({"listed": words_beside.share(predictions)}, {})
"""
TEXT = (
    "plugins: [listed.py]\ntask: trends\neval: {metrics: [listed]}\nadapters: [{method: none, learning_rate: 1e-3}]\n"
)
HELPER = "def share(texts):\n    return {}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(METRICS, "added", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "listed.py").write_text(METRIC, encoding="utf-8")
    (tmp_path / "words_beside.py").write_text(HELPER.format(0.25), encoding="utf-8")
    (tmp_path / "e.yaml").write_text(TEXT, encoding="utf-8")
    yield tmp_path / "e.yaml"
    sys.modules.pop("words_beside", None)


def metric(file: Path) -> tuple[str, Plugin]:
    (spec,) = expand(Experiment.from_yaml(file))
    (plugin,) = (p for p in spec.task.metrics[""].values() if p.name == "listed")
    return spec.trial_id, plugin


def test_another_module_beside_a_plugin_makes_another_trial_and_is_what_runs(file: Path) -> None:
    first, plugin = metric(file)
    assert metric(file) == (first, plugin)
    assert METRICS.load(plugin.target)().score({}, {}).corpus == {"listed": 0.25}
    file.with_name("words_beside.py").write_text(HELPER.format(0.75), encoding="utf-8")
    second, changed = metric(file)
    assert second != first
    assert METRICS.load(changed.target)().score({}, {}).corpus == {"listed": 0.75}
    file.with_name("words_beside.py").write_text(HELPER.format(0.25), encoding="utf-8")
    assert metric(file) == (first, plugin)


def test_an_error_in_a_module_beside_a_plugin_names_both(file: Path) -> None:
    helper = file.with_name("words_beside.py")
    helper.write_text("def share(texts):\n    raise KeyError('gone')\n", encoding="utf-8")
    _, plugin = metric(file)
    with pytest.raises(KeyError, match="gone") as caught:
        METRICS.load(plugin.target)().score({}, {})
    found = describe(caught.value, [plugin], Path("log.txt"))
    assert f"plugin listed (listed.py), {helper}:2 in share" in found


def test_modules_are_found_through_each_other_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    written = {
        "plugin.py": "import torch, os.path, one\nfrom package.inner import name\ndef late():\n    import later\n",
        "one.py": "import plugin\nimport two as other\n",
        "two.py": "syntax error here",
        "later.py": "from . import sibling\n",
        "sibling.py": "import unused_name\n",
        "package/__init__.py": "",
        "package/inner.py": "from .near import x\nfrom .. import one\nfrom ... import outside\n",
        "package/near.py": "",
        "package/unused.py": "",
        "unused.py": "",
        "../outside.py": "",
    }
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    found = [path.relative_to(folder).as_posix() for path in modules_beside(folder / "plugin.py")]
    assert found == [
        "later.py", "one.py", "package/__init__.py", "package/inner.py", "package/near.py", "sibling.py", "two.py",
    ]  # fmt: skip
