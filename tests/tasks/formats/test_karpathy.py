"""Karpathy's splits on tiny folders of COCO 2014, COCO 2017, Flickr8k and Flickr30k."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.core.errors import Problems, UserError
from tasks.captioning import CocoCaptions

SPLITS = ("train", "validation", "test")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


def entry(number: int, split: str, filename: str, **more: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": ["a", "dog"], "raw": f" A dog,\n{number}-{n}. ", "imgid": number, "sentid": 5 * number + n}
        for n in range(5)
    ]
    sentids = [sentence["sentid"] for sentence in sentences]
    return {"filename": filename, "imgid": number, "split": split, "sentids": sentids, "sentences": sentences, **more}


def write(path: Path, images: list[dict[str, Any]], name: str = "coco") -> Path:
    path.write_text(json.dumps({"images": images, "dataset": name}))
    return path


def coco2014(root: Path) -> Path:
    images = []
    for number, split in enumerate(("train", "restval", "val", "test", "test")):
        folder = "train2014" if split == "train" else "val2014"
        filename, cocoid = f"COCO_{folder}_{100 + number:012d}.jpg", 100 + number
        images.append(entry(number, split, filename, filepath=folder, cocoid=cocoid))
        picture(root / folder / filename)
    return write(root / "dataset_coco.json", images)


def ids(task: CocoCaptions) -> list[list[str]]:
    return [[example.id for example in task.examples(split)] for split in SPLITS]


def karpathy(root: Path, path: Path) -> CocoCaptions:
    return CocoCaptions(CocoCaptions.Config(root=root, karpathy=path))


def test_restval_is_trained_on_and_all_five_captions_are_kept(tmp_path: Path) -> None:
    task = karpathy(tmp_path, coco2014(tmp_path))
    assert ids(task) == [["100", "101"], ["102"], ["103", "104"]]
    example = task.examples("train")[1]
    assert example.inputs == (("image", tmp_path / "val2014" / "COCO_val2014_000000000101.jpg"),)
    assert example.references == tuple(f"A dog, 1-{n}." for n in range(5))


def test_the_images_of_2017_serve_as_well(tmp_path: Path) -> None:
    path = coco2014(tmp_path)
    for number, file in enumerate(sorted(tmp_path.glob("*2014/*.jpg"), key=lambda file: file.name[-16:])):
        folder = tmp_path / ("val2017" if number == 3 else "train2017")
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name[-16:])
    task = karpathy(tmp_path, path)
    assert ids(task) == [["100", "101"], ["102"], ["103", "104"]]
    assert task.examples("test")[0].files[0][1] == tmp_path / "val2017" / "000000000103.jpg"


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k"])
def test_flickr_has_one_folder_and_ids_of_the_file(tmp_path: Path, name: str) -> None:
    images = []
    for number, split in enumerate(("train", "train", "val", "test")):
        filename = f"{2513260012 + number}_03d33305cf.jpg"
        picture(tmp_path / "images" / filename)
        images.append(entry(number, split, filename))
    task = karpathy(tmp_path / "images", write(tmp_path / f"dataset_{name}.json", images, name))
    assert ids(task) == [["0", "1"], ["2"], ["3"]]
    assert all(len(example.references) == 5 for split in SPLITS for example in task.examples(split))


def _change(number: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda images: images[number].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_change(1, split="validation"), r"images\[1\]\.split: unknown split 'validation'; allowed: restval, test"),
        (_change(1, filename="gone.jpg"), r"images\[1\]\.filename: 'val2014/gone\.jpg' is not in"),
        (_change(1, filename="../../secret.jpg"), r"images\[1\]\.filename: 'val2014/\.\./\.\./secret\.jpg' leads out"),
        (_change(1, cocoid=100), r"images\[1\]: image 100 is listed twice"),
        (_change(1, sentences=[]), r"images\[1\]\.sentences: image 101 has no caption"),
        (_change(1, sentences=[{"raw": "  "}]), r"images\[1\]\.sentences\[0\]\.raw is empty"),
        (lambda images: images[1].pop("filename"), r"images\.1\.filename: Field required"),
        (lambda images: [images[1].pop(key) for key in ("imgid", "cocoid")], r"neither cocoid nor imgid is given"),
        (lambda images: images.pop(2), r"no examples for validation"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(
    tmp_path: Path, edit: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    path = coco2014(tmp_path)
    images = json.loads(path.read_text())["images"]
    edit(images)
    with pytest.raises(UserError, match=message):
        karpathy(tmp_path, write(path, images)).prepare()


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = coco2014(tmp_path)
    images = json.loads(path.read_text())["images"]
    images[0]["split"], images[1]["filename"], images[2]["sentences"] = "dev", "gone.jpg", []
    with pytest.raises(Problems, match=r"^3 problems:\n.*images\[0\]\.split.*\n.*images\[1\].*\n.*images\[2\]"):
        karpathy(tmp_path, write(path, images)).prepare()


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = coco2014(tmp_path)
    with pytest.raises(UserError, match=r"dataset_coc\.json: .*docs/tasks/coco_capt.*does not exist.*'dataset_coco"):
        karpathy(tmp_path, tmp_path / "dataset_coc.json").prepare()
    with pytest.raises(UserError, match=r"nowhere: the folder of images does not exist"):
        karpathy(tmp_path / "nowhere", path).prepare()
    path.write_text('{"images": [')
    with pytest.raises(UserError, match=r"dataset_coco\.json: line 1, column 12: broken JSON"):
        karpathy(tmp_path, path).prepare()


@pytest.mark.real_data
def test_real_coco_images_in_his_format(tmp_path: Path) -> None:
    if "COCO_ROOT" not in os.environ:
        pytest.skip("COCO_ROOT is not set: the folder of COCO's images and annotations")
    root = Path(os.environ["COCO_ROOT"])
    content = json.loads((root / "annotations" / "captions_val2017.json").read_text())
    images = []
    for number, image in enumerate(content["images"]):
        split = ("restval", "val", "test")[number % 3]
        filename = f"COCO_val2014_{image['file_name']}"
        told = [a["caption"] for a in content["annotations"] if a["image_id"] == image["id"]]
        images.append(entry(number, split, filename, filepath="val2014", cocoid=image["id"]))
        images[-1]["sentences"] = [{"raw": caption} for caption in told]
    task = karpathy(root, write(tmp_path / "dataset_coco.json", images))
    official = CocoCaptions(CocoCaptions.Config(root=root))
    expected = {e.id: e for split in SPLITS[1:] for e in official.examples(split)}
    assert {e.id: e for split in SPLITS for e in task.examples(split)} == expected
