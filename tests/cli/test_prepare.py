"""``harness prepare``: what it counts, and that ``--check`` finds all problems at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from harness.cli import prepare as prepare_module
from harness.core.errors import UserError
from tasks.captioning import CocoCaptions
from tasks.registry import MODALITIES, TASKS
from tests.support.preparing import checked

Write = Callable[[str], Path]
ADAPTERS = "adapters: [{method: none, learning_rate: 1e-3}]\n"

# A modality of numbers in files, with an encoder that rejects numbers above its limit, and a task on such files.
PLUGIN = """
from pathlib import Path
import torch
from tasks.base import Config, Example, Modality, Part, Task
from tasks.encoder import Encoder

class Most(Encoder):
    width = 1
    def __init__(self, most):
        super().__init__()
        self.most = most
    def encode(self, items):
        return [torch.tensor([[item]]) for item in items]
    def check(self, item):
        return f"{item} is above {self.most}" if item > self.most else None

class Numbers(Modality):
    default_encoder = "100"
    def load(self, path):
        return 1 / (1 / float(path.read_text()))
    def encoder(self, name, trust_remote_code=False):
        return Most(float(name))
    empty_encoder = encoder
    def remark(self, item):
        return "negative, read as it is" if item < 0 else None

class NumbersConfig(Config):
    root: Path

class ReadNumbers(Task):
    contexts = ("number", "text")
    modalities = {"number": "numbers"}
    metrics = ("exact_match",)
    Config = NumbersConfig
    @classmethod
    def sample(cls, folder):
        raise NotImplementedError
    def prepare(self):
        pass
    def examples(self, split):
        found = sorted(self.config.root.glob(f"{split}*.txt"))
        return [Example(p.stem.partition("-")[2] or p.stem, (Part("number", p),), (p.stem.rstrip("_"),)) for p in found]
"""


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    root.mkdir()
    CocoCaptions.sample(root)
    return root


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment_file: Write) -> Callable[..., Path]:
    """Writes files of numbers, and an experiment on them with a plugin; returns the path of the experiment."""
    for registry in (TASKS, MODALITIES):
        monkeypatch.setattr(registry, "added", [])
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "numbers").mkdir()

    def write(more: str = "", **texts: str) -> Path:
        for name, text in {"train1": "3", "validation1": "4", "test1": "5", **texts}.items():
            (tmp_path / "numbers" / f"{name.replace('__', '-')}.txt").write_text(text)
        task = f"plugins: [plugin.py]\ntask: {{name: read_numbers, root: {tmp_path / 'numbers'}}}\n"
        return experiment_file(task + ADAPTERS + more)

    return write


def line_of(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line.split()


def picture(coco: Path, number: int) -> Path:
    folder = "train2017" if number < 8 else "val2017"
    return coco / folder / f"{number:012d}.jpg"


def test_without_check_the_splits_are_counted_and_no_file_is_read(coco: Path) -> None:
    picture(coco, 3).write_bytes(b"not a picture")
    fine, text = checked("coco_captions", f"root={coco}", check=False)
    assert fine
    assert line_of(text, "train") == ["train", "8", "2", "8", "image", "→", "text"]
    counts = [int(line_of(text, split)[1]) for split in ("validation", "test")]
    assert sum(counts) == 8
    assert "not a picture" not in text
    with pytest.raises(UserError, match=r"captions_train2018\.json: the annotation file does not exist"):
        checked("coco_captions", f"root={coco}", "train=train2018", check=False)


def test_correct_data_has_no_problems(coco: Path) -> None:
    fine, text = checked("coco_captions", f"root={coco}")
    assert fine
    assert "no problems found" in text
    assert "longest reference: 24 characters, of example '7'" in text
    assert "file:" not in text
    assert "warning" not in text


def test_all_problems_are_found_at_once(coco: Path) -> None:
    for name in ("train2017", "val2017"):
        path = coco / "annotations" / f"captions_{name}.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["caption"] = " "
        content["images"][1]["file_name"] = "gone.jpg"
        path.write_text(json.dumps(content))
    fine, text = checked("coco_captions", f"root={coco}")
    assert not fine
    assert text.startswith("1. ")
    assert ": 4 problems, listed above" in text
    assert text.count("is empty") == text.count("'gone.jpg' is not in") == 2


def test_all_broken_files_are_found_at_once_with_the_conversions(coco: Path) -> None:
    picture(coco, 0).write_bytes(b"")
    picture(coco, 1).write_bytes(b"not a picture")
    for number in (2, 3):
        Image.new("L", (4, 4), 50 * number).save(picture(coco, number))
    fine, text = checked("coco_captions", f"root={coco}")
    assert not fine
    assert ": 2 problems, listed above" in text
    assert f". {picture(coco, 0)}: the file is empty (0 bytes)" in text
    assert f". {picture(coco, 1)}: cannot be decoded as a picture" in text
    assert f"2 files: grey-scale, read as RGB ({picture(coco, 2)}, …)" in text


def test_the_same_content_in_two_splits_is_a_warning(coco: Path) -> None:
    names = {
        split: CocoCaptions(CocoCaptions.Config(root=coco)).examples(split)[0].files[0][1]
        for split in ("train", "test")
    }
    shutil.copy(names["train"], names["test"])
    fine, text = checked("coco_captions", f"root={coco}")
    assert fine
    assert f"warning: 1 file of train with the same content in test: {names['train']} and {names['test']}." in text
    assert "in validation:" not in text


def test_many_problems_are_written_to_a_file(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHOWN", 3)
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        picture(coco, number).write_bytes(b"")
    fine, text = checked("coco_captions", f"root={coco}")
    assert not fine
    assert text.count("0 bytes") == 3
    assert f"… and 5 more; all of them: {tmp_path / 'coco_captions-problems.txt'}" in text
    listed = (tmp_path / "coco_captions-problems.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in listed] == [str(picture(coco, number)) for number in range(8)]


def test_the_plugins_and_encoders_of_an_experiment_are_used(numbers: Callable[..., Path]) -> None:
    path = numbers("backbone: {encoders: {numbers: ['6', '3']}}\n", test2="7", validation2="-2")
    fine, text = checked(path)
    assert not fine
    assert "test1.txt: 5.0 is above 3.0" in text
    assert "test2.txt: 7.0 is above 6.0" in text
    assert "train1.txt: 3.0" not in text
    assert "1 file: negative, read as it is" in text
    assert line_of(text, "validation ") == ["validation", "2", "1", "2", "number", "→", "text"]


def test_a_decoder_that_crashes_is_a_problem_of_its_file(numbers: Callable[..., Path]) -> None:
    fine, text = checked(numbers(train2="0", test2="seven"))
    assert not fine
    assert ": 2 problems, listed above" in text
    assert "train2.txt: cannot be read as numbers 100: ZeroDivisionError: float division by zero" in text
    assert "test2.txt: cannot be read as numbers 100: ValueError: could not convert string to float: 'seven'" in text


def test_examples_are_checked_against_the_contract(numbers: Callable[..., Path]) -> None:
    fine, text = checked(numbers(test__twice="1", train__twice="2"))
    assert not fine
    assert "read_numbers: id 'twice' is in train and again in test" in text
    path = numbers()
    for name in ("test1", "test-twice"):
        (path.parent / "numbers" / f"{name}.txt").unlink()
    assert "read_numbers: no examples for test" in checked(path)[1]


def test_a_budget_that_cannot_be_met_is_a_problem(numbers: Callable[..., Path]) -> None:
    fine, text = checked(numbers("budget: {examples: [1, 9]}\n"))
    assert not fine
    assert ": 1 problem, listed above" in text
    assert "budget.examples: task read_numbers: requests 9 examples, but there are 1" in text


def test_tasks_of_an_axis_are_named_by_what_differs(experiment_file: Write) -> None:
    task = "task: {name: scenes, train_examples: [2, 3], validation_examples: 2, test_examples: 2}\n"
    fine, text = checked(experiment_file(task + ADAPTERS), check=False)
    assert fine
    assert [int(line.split()[1]) for line in text.splitlines() if line.startswith(" train")] == [2, 3]
    assert "scenes train_examples=2" in text
    assert "scenes train_examples=3" in text


def test_a_wrong_call_says_what_is_allowed(coco: Path, experiment_file: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown task 'coco_caption'; allowed: .*did you mean 'coco_captions'\?"):
        checked("coco_caption")
    with pytest.raises(UserError, match=r"--set.rot: unknown key 'rot'; allowed: .*did you mean 'root'\?"):
        checked("coco_captions", f"rot={coco}")
    with pytest.raises(UserError, match=r"--set root: found no '='"):
        checked("coco_captions", "root")
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        checked(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"--set root=x: the options of an experiment are in its file"):
        checked(experiment_file("task: scenes\n" + ADAPTERS), "root=x")
