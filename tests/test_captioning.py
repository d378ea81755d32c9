"""The COCO reader: a small folder in COCO's layout, broken in every way people break it, and real COCO."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage

from harness.errors import UserError
from tasks.captioning import CocoCaptions, read_captions
from tasks.modalities.image import Image


def write_coco(root: Path, name: str, ids: list[int], captions: int = 2) -> Path:
    """Write a split in COCO's layout and return its annotation file."""
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image_id in ids:
        PilImage.new("RGB", (4, 4), "red").save(root / name / f"{image_id:012d}.jpg")
    content = {
        "images": [{"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": 4, "width": 4} for image_id in ids],
        "annotations": [
            {"id": 100 * image_id + number, "image_id": image_id, "caption": f"Picture {image_id}, \n told {number}. "}
            for number in range(captions)
            for image_id in ids
        ],
    }
    path = root / "annotations" / f"captions_{name}.json"
    path.write_text(json.dumps(content))
    return path


def coco(root: Path, **options: Any) -> CocoCaptions:
    return CocoCaptions(CocoCaptions.Config(root=root, **options))


def test_images_keep_their_order_and_their_captions(tmp_path: Path) -> None:
    write_coco(tmp_path, "train2017", [7, 3])
    first, second = read_captions(tmp_path, "train2017")
    assert (first.id, second.id) == ("7", "3")
    assert first.inputs == {"image": tmp_path / "train2017" / "000000000007.jpg"}
    assert first.references == ("Picture 7, told 0.", "Picture 7, told 1.")


def test_validation_is_halved_into_disjoint_fixed_parts(tmp_path: Path) -> None:
    write_coco(tmp_path, "train2017", [1000])
    write_coco(tmp_path, "val2017", list(range(60)))
    task = coco(tmp_path)
    task.prepare()
    validation, test = ({example.id for example in task.examples(split)} for split in ("validation", "test"))
    assert validation.isdisjoint(test)
    assert validation | test == {str(number) for number in range(60)}
    assert min(len(validation), len(test)) > 15
    assert [example.id for example in coco(tmp_path).examples("test")] == [e.id for e in task.examples("test")]


def test_a_test_split_of_its_own(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        write_coco(tmp_path, name, [number])
    task = coco(tmp_path, train="a", validation="b", test="c")
    assert [example.id for split in ("train", "validation", "test") for example in task.examples(split)] == list("012")


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path, "a", [1, 2])
    write_coco(tmp_path, "b", [2])
    with pytest.raises(UserError, match=r"image 2 is in train and in validation"):
        coco(tmp_path, train="a", validation="b", test="b").prepare()


def _edit(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for where, value in changes.items():
            part, key = where.split("_", 1)
            content[part][1][key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(annotations_image_id=99), r"annotations\[1\]\.image_id: 99 is not among the images"),
        (_edit(annotations_caption=" \n"), r"annotations\[1\]\.caption of image 5 is empty"),
        (_edit(annotations_caption=None), r"annotations\.1\.caption: Input should be a valid string; found 'None'"),
        (_edit(images_id=4), r"images\[1\]\.id: 4 is there twice"),
        (_edit(images_file_name="gone.jpg"), r"images\[1\]\.file_name: 'gone.jpg' is not in .*train2017"),
        (_edit(images_file_name="../secret.jpg"), r"'\.\./secret\.jpg' leads out of .*train2017"),
        (_edit(images_file_name="/etc/passwd"), r"'/etc/passwd' leads out of"),
        (
            lambda content: content["images"].append({"id": 9, "file_name": "9.jpg"}),
            r"images\[2\]: image 9 has no caption",
        ),
        (lambda content: content["images"].clear(), r"images: the list is empty"),
        (lambda content: content.pop("annotations"), r"captions_train2017\.json: annotations: Field required"),
    ],
)
def test_a_wrong_annotation_file_is_refused_with_the_place(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = write_coco(tmp_path, "train2017", [4, 5])
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path, "train2017")


def test_broken_json_shows_the_line(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "train2017", [4])
    path.write_text('{"images": [\n {"id": 4 "file_name": "4.jpg"}\n]}')
    with pytest.raises(
        UserError, match=r"captions_train2017\.json: line 2, column 11: broken JSON.*\{\"id\": 4 \"file_name"
    ):
        read_captions(tmp_path, "train2017")
    path.write_text("")
    with pytest.raises(UserError, match="line 1, column 1: broken JSON"):
        read_captions(tmp_path, "train2017")
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match=r"captions_train2017\.json: cannot be read: .*utf-8"):
        read_captions(tmp_path, "train2017")


def test_missing_folders_and_files_name_what_is_there(tmp_path: Path) -> None:
    write_coco(tmp_path, "train2017", [4])
    with pytest.raises(UserError, match=r"captions_train2071\.json: .*did you mean 'captions_train2017\.json'\?"):
        read_captions(tmp_path, "train2071")
    (tmp_path / "train2017").rename(tmp_path / "train_2017")
    with pytest.raises(
        UserError, match=r"train2017: the folder of images does not exist; .*did you mean 'train_2017'\?"
    ):
        read_captions(tmp_path, "train2017")
    with pytest.raises(UserError, match=r"cocco/annotations: the folder of annotations does not exist; in .*allowed: "):
        read_captions(tmp_path / "cocco", "train2017")


@pytest.mark.real_data
def test_real_coco_images_and_captions() -> None:
    if "COCO_ROOT" not in os.environ:
        pytest.skip("COCO_ROOT is not set: the folder of COCO's images and annotations")
    task = coco(Path(os.environ["COCO_ROOT"]))
    task.prepare()
    for split in ("train", "validation", "test"):
        examples = task.examples(split)
        assert len(examples) >= 20
        assert all(len(example.references) >= 5 for example in examples)
        for example in examples[:10]:
            picture = Image().load(example.inputs["image"])
            assert picture.mode == "RGB"
            assert min(picture.size) > 100
