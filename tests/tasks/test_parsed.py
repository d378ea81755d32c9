"""Large annotation files are parsed once; what comes from the cache is what was parsed."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.files import cache_folder
from harness.model.budget import choose
from tasks import parsed
from tasks.base import Example, Part
from tasks.parsed import ParsedExamples
from tasks.registry import TASKS
from tasks.splits import SPLITS

KINDS = ("vqa", "coco_captions", "text", "audio_captions")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, for files of any size."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parsed, "LEAST_BYTES", 0)
    return cache_folder("annotations")


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the tasks that parsed something."""
    found: list[str] = []
    for name in (*KINDS, "speech"):
        kind = TASKS.load(TASKS.find(name).target)

        def counted(self: Any, problems: Any, plain: Any = kind.read_splits, name: str = name) -> Any:
            found.append(name)
            return plain(self, problems)

        monkeypatch.setattr(kind, "read_splits", counted)
    return found  # type: ignore[return-value]


def sample(name: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return dict(TASKS.load(TASKS.find(name).target).sample(folder))


def task_of(name: str, options: dict[str, Any]) -> Any:
    kind = TASKS.load(TASKS.find(name).target)
    return kind(kind.Config.model_validate(options))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept_is_what_was_parsed(name: str, parses: list[str], tmp_path: Path) -> None:
    options = sample(name, tmp_path / "data")
    task = task_of(name, options)
    expected = {split: list(own) for split, own in task._read_and_check().items()}
    parses.clear()
    for _ in range(3):
        again = task_of(name, options)
        again.prepare()
        for split in SPLITS:
            found = again.examples(split)
            assert isinstance(found, ParsedExamples)
            assert found == expected[split]
            assert list(found) == expected[split]
            assert [found[-1], *found[:2]] == [expected[split][-1], *expected[split][:2]]
            assert found.ids == [example.id for example in expected[split]]
            assert all(type(value) in (str, type(tmp_path)) for example in found for _, value in example.inputs)
            for count in ("all", len(found) // 2):
                assert choose(found, count, 3, "") == choose(expected[split], count, 3, "")  # type: ignore[arg-type]
    assert parses == [name]


def test_small_files_and_folders_without_annotations_are_read_each_time(
    parses: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        task_of("speech", {"root": sample("speech", tmp_path / f"speech{_}")["root"]}).prepare()
    monkeypatch.setattr(parsed, "LEAST_BYTES", 1 << 20)
    options = sample("vqa", tmp_path / "vqa")
    for _ in range(2):
        task_of("vqa", options).prepare()
    assert parses == ["speech"] * 2 + ["vqa"] * 2
    assert not cache.exists()


def edit_question(root: Path) -> None:
    path = next(root.glob("*train2014_questions.json"))
    path.write_text(path.read_text(encoding="utf-8").replace("What color", "Which color"), encoding="utf-8")


def add_picture(root: Path) -> None:
    shutil.copyfile(next((root / "train2014").iterdir()), root / "train2014" / "new.jpg")


@pytest.mark.parametrize("change", [edit_question, add_picture])
def test_what_has_changed_is_parsed_again(change: Any, parses: list[str], tmp_path: Path) -> None:
    options = sample("vqa", tmp_path / "data")
    task_of("vqa", options).prepare()
    change(tmp_path / "data")
    task_of("vqa", options).prepare()
    task_of("vqa", options).prepare()
    assert len(parses) == 2


def test_other_options_are_parsed_on_their_own(parses: list[str], tmp_path: Path) -> None:
    options = sample("vqa", tmp_path / "data")
    one = task_of("vqa", options).examples("train")
    other = task_of("vqa", options | {"question_template": "Q: {question} A:"}).examples("train")
    assert len(parses) == 2
    assert one[0].inputs[1] != other[0].inputs[1]


def test_a_picture_that_is_gone_is_told_although_annotations_are_kept(tmp_path: Path) -> None:
    options = sample("vqa", tmp_path / "data")
    task_of("vqa", options).prepare()
    next((tmp_path / "data" / "train2014").iterdir()).unlink()
    with pytest.raises(UserError, match=r"COCO_train2014_.*is not in"):
        task_of("vqa", options).prepare()


def test_broken_annotations_are_never_kept(cache: Path, tmp_path: Path) -> None:
    options = sample("vqa", tmp_path / "data")
    path = next((tmp_path / "data").glob("*train2014_questions.json"))
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="broken JSON"):
            task_of("vqa", options).prepare()
    assert list(cache.glob("*.arrow")) == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "link", "not arrow"])
def test_a_corrupted_file_is_made_again(
    harm: str, parses: list[str], cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = sample("vqa", tmp_path / "data")
    expected = list(task_of("vqa", options).examples("train"))
    (path,) = cache.glob("*.arrow")
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-7])
    elif harm == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:  # with a digest that is right
        from harness.core.disk_cache import DiskCache

        key = path.name.partition("-")[0]
        path.unlink()
        DiskCache(cache, 1 << 30, "").add(key, b"ARROW1 is how it begins", ".arrow")
    found = task_of("vqa", options).examples("train")
    assert list(found) == expected
    assert len(parses) == 2
    assert "it is removed and made again" in caplog.text
    task_of("vqa", options).prepare()
    assert len(parses) == 2


def test_a_cache_that_cannot_be_written_is_told_and_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = sample("vqa", tmp_path / "data")
    expected = list(task_of("vqa", options).examples("train"))
    monkeypatch.setenv("HARNESS_CACHE", "/proc/nobody")
    assert list(task_of("vqa", options).examples("train")) == expected
    assert "annotations are parsed in every trial: /proc/nobody/annotations" in caplog.text


def test_processes_that_need_it_at_once_parse_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = sample("vqa", tmp_path / "data")
    kind = TASKS.load(TASKS.find("vqa").target)
    plain = kind.read_splits

    def slow(self: Any, problems: Any) -> Any:
        (tmp_path / f"parsed-{time.monotonic_ns()}").touch()
        time.sleep(0.3)
        return plain(self, problems)

    monkeypatch.setattr(kind, "read_splits", slow)

    def work() -> None:
        assert len(task_of("vqa", options).examples("train")) == 8

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("parsed-*"))) == 1


def test_names_that_are_no_text_are_not_kept(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    example = Example("1", (Part("image", Path("\udcff.jpg")),), ("a",))
    splits: Any = {"train": [example], "validation": [replace(example, id="2")], "test": []}
    from harness.core.disk_cache import DiskCache

    cache.mkdir(parents=True)
    assert parsed._kept(DiskCache(cache, 1 << 20, ""), "0" * 32, splits) is splits
    assert "annotations are parsed in every trial" in caplog.text


def test_a_million_answers_share_their_texts(tmp_path: Path) -> None:
    options = sample("vqa", tmp_path / "data")
    found = task_of("vqa", options).examples("train")
    first, second = (example.references for example in found[0::2][:2])
    assert json.dumps(first) == json.dumps([*first])
    assert first[0] is first[1]
    assert found[0].inputs[0].value is found[1].inputs[0].value
    assert second
