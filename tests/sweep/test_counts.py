"""What a plan counts before anything is downloaded, drawn or prepared; harness/cli has the tests of its messages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.experiment.load import Experiment
from harness.experiment.plan import expand
from harness.sweep.counts import PlannedData, check_counts
from tasks.captioning import CocoCaptions
from tasks.drawing.task import DrawnConfig
from tasks.formats.hub_datasets import DatasetSource, written_to
from tasks.registry import TASKS
from tasks.scenes import Scenes

pytestmark = pytest.mark.quick

Count = Callable[..., list[str]]
Write = Callable[[str], Path]

LORA = "adapters: [{method: lora, rank: 4, learning_rate: 6e-3}]\n"
PLAIN = """
from harness import Example, ExperimentPath, Task, TaskConfig

class Options(TaskConfig):
    root: ExperimentPath

class Lines(Task):
    contexts = ("question", "text")
    modalities = {}
    metrics = ("exact_match",)
    Config = Options

    @classmethod
    def sample(cls, folder):
        return {"root": str(folder)}

    def prepare(self):
        raise AssertionError("a plan prepares nothing")

    def examples(self, split):
        lines = (self.config.root / f"{split}.txt").read_text().split()
        return [Example(f"{split} {line}", {"question": line}, (line,)) for line in lines]
"""


@pytest.fixture
def count(
    experiment_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TASKS, "added", [])

    def run(task: str, examples: int, rest: str = "") -> list[str]:
        text = f"task: {task}\n{LORA}budget: {{examples: {examples}}}\n{rest}"
        specs = expand(Experiment.from_yaml(experiment_file(text)))
        before = {path for path in tmp_path.rglob("*") if "lock" in path.name or path.is_dir()}
        found = check_counts(specs, PlannedData())
        assert {path for path in tmp_path.rglob("*") if "lock" in path.name or path.is_dir()} == before, "it wrote"
        return found

    return run


def coco(folder: Path) -> Path:
    folder.mkdir()
    CocoCaptions.sample(folder)  # eight pictures to train on
    return folder


@pytest.mark.parametrize("drawn", [False, True])
def test_the_tasks_of_a_mixture_drawn_or_not(count: Count, tmp_path: Path, drawn: bool) -> None:
    if drawn:
        Scenes(DrawnConfig(train_examples=4, validation_examples=2, test_examples=2)).prepare()
    scenes = "{name: scenes, train_examples: 4, validation_examples: 2, test_examples: 2}"
    mixture = f"{{name: mixture, tasks: [{scenes}, {{name: coco_captions, root: {coco(tmp_path / 'coco')}}}]}}"
    assert count(mixture, 12) == []
    says = "budget.examples: task mixture: requests 13 examples, but there are 12; allowed: at most 12"
    with pytest.raises(UserError, match=re.escape(says)):
        count(mixture, 13)
    weighted = mixture.replace("name: scenes,", "name: scenes, weight: 3,")
    with pytest.raises(UserError, match=r"9 of 12 examples would come from 'scenes', which has 4"):
        count(weighted, 12)
    with pytest.raises(UserError, match=r"eval\.test_examples: .* the 1 selected examples contain none of '"):
        count(mixture, 12, "eval: {test_examples: 1}\n")


def test_a_mixture_with_a_task_whose_data_are_not_here(count: Count, tmp_path: Path) -> None:
    (reason,) = count(f"{{name: mixture, tasks: [scenes, {{name: coco_captions, root: {tmp_path / 'absent'}}}]}}", 9)
    assert reason.startswith(f"task mixture: {tmp_path / 'absent'}")


def test_a_plain_task_of_a_plugin(count: Count, tmp_path: Path) -> None:
    (tmp_path / "lines.py").write_text(PLAIN, encoding="utf-8")
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text("a b c", encoding="utf-8")
    task, plugin = "{name: lines, root: .}", "plugins: [lines.py]\n"
    assert count(task, 3, plugin) == []
    with pytest.raises(UserError, match=r"^budget\.examples: task lines: requests 4 examples, but there are 3"):
        count(task, 4, plugin)
    (tmp_path / "test.txt").unlink()
    (reason,) = count(task, 4, plugin)
    assert reason.startswith("task lines: [Errno 2] No such file or directory")
    (tmp_path / "lines.py").write_text(PLAIN.replace("return [Example", "return lines.x or [Example"), encoding="utf-8")
    (tmp_path / "test.txt").write_text("a", encoding="utf-8")
    (reason,) = count(task, 4, plugin)
    assert reason.startswith("task lines: its examples cannot be read before they are prepared: AttributeError(")


WRONG = {
    "gone": ("found[1] = Example(split, {'question': Path('gone.png')}, ('b',))", r"'train': gone\.png: no such file"),
    "order": ("random.shuffle(found)", r"train changes between two reads: at position \d+ there was example "),
    "generator": ("found = iter(found)", r"examples\('train'\): found list_iterator; allowed: a list of "),
    "an id twice": ("found[1] = found[0]", r"example 'train 0' at position 1: another example has this id"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_a_run_refuses_of_a_plugins_examples_a_plan_refuses(count: Count, tmp_path: Path, what: str) -> None:
    line, message = WRONG[what]
    text = PLAIN.replace("from harness", "import random\nfrom pathlib import Path\nfrom harness", 1)
    text = (
        text.replace("        return [Example(", "        found = [Example(")
        + f"        {line}\n        return found\n"
    )
    (tmp_path / "plain.py").write_text(text, encoding="utf-8")
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(map(str, range(40))), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        count("{name: lines, root: .}", 3, "plugins: [plain.py]\n")


def test_a_data_set_of_the_hub_only_if_it_is_in_the_cache(count: Count, tmp_path: Path) -> None:
    task = "{name: coco_captions, dataset: {path: some/thing}}"
    (reason,) = count(task, 9)
    assert reason == "task coco_captions: its data may have to be downloaded; once it is in the cache, it is counted"
    cached, here = written_to(DatasetSource(path="some/thing")), coco(tmp_path / "coco")
    (cached / "annotations").mkdir(parents=True)
    for name, old in (("train", "train2017"), ("validation", "val2017")):
        shutil.copytree(here / old, cached / name)
        shutil.copy(here / f"annotations/captions_{old}.json", cached / f"annotations/captions_{name}.json")
    assert count(task, 8) == []
    with pytest.raises(UserError, match=r"^budget\.examples: task coco_captions: requests 9 examples, but there are 8"):
        count(task, 9)


def test_shards_that_do_not_exist_are_named(count: Count, tmp_path: Path) -> None:
    shards = "{path: parquet, data_files: {train: part-*, validation: v*}}"
    (reason,) = count(f"{{name: coco_captions, dataset: {shards}}}", 9)
    assert f"dataset.data_files.train: no file matches '{tmp_path}/part-*'" in reason
