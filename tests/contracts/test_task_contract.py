"""What every registered task promises: a new plugin gets these checks by registering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from pydantic import ValidationError

from harness.registry import METRICS, MODALITIES, TASKS, Entry
from tasks.base import Example, Split, Task

SPLITS: tuple[Split, ...] = get_args(Split)


def write_coco(folder: Path) -> dict[str, Any]:
    """Sixteen small pictures in COCO's layout."""
    for split, first in (("train2017", 100), ("val2017", 200)):
        (folder / split).mkdir()
        ids = range(first, first + 8)
        for image_id in ids:
            Image.new("RGB", (9, 7), (image_id, 40, 90)).save(folder / split / f"{image_id}.png")
        images = [{"id": i, "file_name": f"{i}.png", "height": 7, "width": 9} for i in ids]
        texts = ("a plain picture .", "one colour")
        annotations = [{"id": 10 * i + n, "image_id": i, "caption": text} for i in ids for n, text in enumerate(texts)]
        path = folder / "annotations" / f"captions_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return {"root": folder}


# Options of tasks that cannot do without, or would be slow without; any other task is tried with its defaults.
OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "coco_captions": write_coco,
    "scenes": lambda _: {"train_examples": 6, "validation_examples": 4, "test_examples": 5},
}


@pytest.fixture(params=TASKS.entries().values(), ids=TASKS.entries())
def new_task(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Task]:
    """Makes the same task anew at each call."""
    entry: Entry = request.param
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    task_class = TASKS.load(entry.target)
    options = OPTIONS.get(entry.name, lambda _: {})(tmp_path)
    return lambda: task_class(task_class.Config(**options))


def examples_of(task: Task) -> dict[Split, list[Example]]:
    task.prepare()
    return {split: list(task.examples(split)) for split in SPLITS}


def test_it_names_its_contexts_and_what_reads_and_scores_them(new_task: Callable[[], Task]) -> None:
    task = type(new_task())
    assert len(set(task.contexts)) == len(task.contexts) >= 2
    assert set(task.modalities) == set(task.contexts[:-1])  # the last one is the target text
    assert all(MODALITIES.find(name) for name in task.modalities.values())
    metric = METRICS.load(METRICS.find(task.metric).target)
    assert metric.labels


def test_its_options_refuse_unknown_keys(new_task: Callable[[], Task]) -> None:
    config = new_task().config
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        type(config)(**config.model_dump(), no_such_option=1)


def test_every_split_has_examples_whose_ids_are_unique_over_the_task(new_task: Callable[[], Task]) -> None:
    splits = examples_of(new_task())
    assert all(splits[split] for split in SPLITS)
    ids = [example.id for examples in splits.values() for example in examples]
    assert len(set(ids)) == len(ids)
    files = [path for examples in splits.values() for e in examples for path in set(e.inputs.values())]
    assert len(set(files)) == len(files)  # no input is in two splits


def test_every_example_has_references_and_inputs_that_decode(new_task: Callable[[], Task]) -> None:
    task = new_task()
    readers = {context: MODALITIES.load(MODALITIES.find(name).target)() for context, name in task.modalities.items()}
    for examples in examples_of(task).values():
        for example in examples:
            assert example.references
            assert all(isinstance(text, str) and text.strip() for text in example.references)
            assert set(example.inputs) == set(readers)
            for context, path in example.inputs.items():
                assert readers[context].load(path) is not None


def test_it_is_the_same_in_every_process_and_at_every_call(new_task: Callable[[], Task]) -> None:
    task = new_task()
    first = examples_of(task)
    assert examples_of(task) == first  # prepare is idempotent
    assert examples_of(new_task()) == first
