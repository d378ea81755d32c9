"""The previews that a trial leaves for the report, without a model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from harness.core.registry import Plugin
from harness.core.samples import PREVIEWS, SHOWN, draw_ids
from harness.model.features import Features
from harness.trial.previews import write_previews
from tasks.base import Example, Modality, Part, Preview
from tasks.modalities.series import Series

PLUGIN = Plugin(name="series", distribution="tests", result_version=1, target="tasks.modalities.series:Series")


class Counting(Series):
    """Counts what it decodes."""

    loaded: ClassVar[list[Path]] = []

    def load(self, path: Path) -> Any:
        self.loaded.append(path)
        return super().load(path)


class Texts(Series):
    def preview(self, item: Any) -> Preview:
        return Preview.text(f"{len(item)} values")


class Failing(Series):
    def preview(self, item: Any) -> Preview:
        raise ZeroDivisionError("no luck")


class Silent(Series):  # as if it had none
    preview = Modality.preview  # type: ignore[assignment]


class Sometimes(Series):
    def preview(self, item: Any) -> Preview | None:  # type: ignore[override]
        return super().preview(item) if item[0] else None


class Task:
    modalities: ClassVar = {"curve": "series"}

    def members(self) -> dict[str, Any]:
        return {"": self}


def examples(folder: Path, count: int = 20) -> list[Example]:
    found = []
    for number in range(count):
        path = folder / f"{number}.csv"
        path.write_text(f"{number}\n2\n3\n", encoding="utf-8")
        found.append(Example(f"e{number}", (Part("question", "how?"), Part("curve", path)), ("up",)))
    return found


def write(run: Path, test: list[Example], modality: Modality, version: int = 1) -> dict[str, list[str | None]]:
    features: Any = Features(Task(), {"series": modality}, {}, torch.device("cpu"))  # type: ignore[arg-type]
    return write_previews(run, test, features, {"series": PLUGIN.model_copy(update={"result_version": version})})


def test_the_drawn_examples_have_previews_and_trials_share_them(tmp_path: Path) -> None:
    test, run = examples(tmp_path), tmp_path / "run"
    Counting.loaded.clear()
    found = write(run, test, Counting())
    assert list(found) == draw_ids([one.id for one in test], [])
    assert len(Counting.loaded) == SHOWN
    assert {text for text, _ in found.values()} == {None}  # the question
    for example_id, (_, name) in found.items():
        assert name is not None
        with PilImage.open(io.BytesIO((run / PREVIEWS / name).read_bytes())) as picture:
            assert picture.format == "PNG"
        values = np.array([float(example_id[1:]), 2, 3])
        assert (run / PREVIEWS / name).read_bytes() == Series().preview(values).content
    assert write(run, test, Counting()) == found
    assert len(Counting.loaded) == SHOWN
    other = write(run, test, Counting(), version=2)
    assert other.keys() == found.keys()
    assert not {name for _, name in other.values()} & {name for _, name in found.values()}


def test_texts_are_kept_as_texts(tmp_path: Path) -> None:
    found = write(tmp_path, examples(tmp_path, 1), Texts())
    ((_, name),) = found.values()
    assert name is not None
    assert name.endswith(".txt")
    assert (tmp_path / PREVIEWS / name).read_text(encoding="utf-8") == "3 values"


def test_what_has_no_preview_is_not_decoded_and_what_fails_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = examples(tmp_path, 2)
    assert write(tmp_path, test, Silent()) == {}
    assert set(write(tmp_path, test, Sometimes())) == {"e1"}
    assert caplog.messages == []
    assert write(tmp_path / "other", test, Failing()) == {}
    assert f"no preview of {tmp_path / '0.csv'}: ZeroDivisionError: no luck" in caplog.messages
    assert not (tmp_path / "other").exists()
