"""The task coco_captions: a small folder in COCO's layout, with all common errors, and real COCO."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from pydantic import ValidationError

from harness.core.errors import Problems, UserError
from tasks.captioning import CocoCaptions
from tasks.formats.coco import read_captions
from tasks.formats.karpathy import read_karpathy
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
    assert first.inputs == (("image", tmp_path / "train2017" / "000000000007.jpg"),)
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
    with pytest.raises(UserError, match=r"id '2' is in train and again in validation"):
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
        (_edit(images_id=4), r"images\[1\]\.id: 4 is listed twice"),
        (_edit(images_file_name="gone.jpg"), r"images\[1\]\.file_name: 'gone.jpg' is not in .*train2017"),
        (_edit(images_file_name="../secret.jpg"), r"'\.\./secret\.jpg' leads out of .*train2017"),
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


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    for name, ids in (("train2017", [4, 5, 6]), ("val2017", [7, 8])):
        path = write_coco(tmp_path, name, ids, captions=1)
        content = json.loads(path.read_text())
        content["annotations"][0] |= {"caption": " ", "image_id": content["images"][0]["id"]}
        content["annotations"].append({"id": 1, "image_id": 99, "caption": "of nothing"})
        content["images"][1]["file_name"] = "gone.jpg"
        path.write_text(json.dumps(content))
    with pytest.raises(Problems, match=r"^6 problems:") as raised:
        coco(tmp_path).prepare()
    found = [re.sub(r".*/(captions_\w+\.json: [\w.\[\]]+).*", r"\1", text) for text in raised.value.messages]
    assert found == [
        *("captions_train2017.json: annotations[0].caption", "captions_train2017.json: annotations[3].image_id"),
        "captions_train2017.json: images[1].file_name",
        *("captions_val2017.json: annotations[0].caption", "captions_val2017.json: annotations[2].image_id"),
        "captions_val2017.json: images[1].file_name",
    ]


def test_every_entry_of_another_format_is_told(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "train2017", [4, 5], captions=1)
    content = json.loads(path.read_text())
    del content["images"][0]["file_name"]
    content["annotations"][1]["caption"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(
        Problems, match=r"images\.0\.file_name: Field required[^\n]*\n.*annotations\.1\.caption: Input sh"
    ):
        read_captions(tmp_path, "train2017")
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"captions_train2017\.json: the whole file: Input should be an object"):
        read_captions(tmp_path, "train2017")


def test_a_link_out_of_the_data_set_is_followed(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    write_coco(root, "train2017", [4, 5])
    picture = root / "train2017" / "000000000004.jpg"
    picture.rename(tmp_path / "outside.jpg")
    picture.symlink_to(tmp_path / "outside.jpg")
    assert read_captions(root, "train2017")[0].files[0][1] == picture


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, "train2017", [4])
    is_file = Path.is_file

    def denied(path: Path) -> bool:  # tests may run as root, whom no permission stops
        if path.suffix == ".jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(UserError, match=r"'000000000004\.jpg' in .*train2017 cannot be read: Permission denied"):
        read_captions(tmp_path, "train2017")


def test_captions_of_any_length_and_script_are_kept(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "train2017", [4], captions=3)
    texts = ["une élève à vélo", "一个人骑着自行车 🚲", "long " * 2000]
    content = json.loads(path.read_text())
    for annotation, text in zip(content["annotations"], texts, strict=True):
        annotation["caption"] = text
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_captions(tmp_path, "train2017")[0].references == (*texts[:2], texts[2].strip())


def test_the_layout_of_2014(tmp_path: Path) -> None:
    for name, ids in (("train2014", [4, 5]), ("val2014", list(range(40, 50)))):
        path = write_coco(tmp_path, name, ids)
        for image_id in ids:
            file = tmp_path / name / f"{image_id:012d}.jpg"
            file.rename(file.with_name(f"COCO_{name}_{file.name}"))
        path.write_text(re.sub(r'"(\d{12}\.jpg)"', rf'"COCO_{name}_\1"', path.read_text()))
    task = coco(tmp_path, train="train2014", validation="val2014")
    assert [file.name for e in task.examples("train") for _, file in e.files] == [
        "COCO_train2014_000000000004.jpg",
        "COCO_train2014_000000000005.jpg",
    ]
    assert len(task.examples("validation")) + len(task.examples("test")) == 10


def write_nocaps(root: Path) -> None:
    """Two images of each domain, with the fields of https://nocaps.org/download."""
    path = write_coco(root, "val", [0, 1, 2, 3, 4, 5])
    content = json.loads(path.read_text())
    for image in content["images"]:
        domain = ("in-domain", "near-domain", "out-domain")[image["id"] % 3]
        image |= {"license": 0, "domain": domain, "open_images_id": f"00{image['id']}", "date_captured": "2018-11-06"}
    path.write_text(json.dumps(content))


def test_nocaps_is_tested_on_after_training_on_coco(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", "train2017", [0, 1])  # ids that NoCaps has as well
    write_coco(tmp_path / "coco", "val2017", [2, 3])
    write_nocaps(tmp_path / "nocaps")
    options = {"test_root": tmp_path / "nocaps", "test": "val"}
    task = coco(tmp_path / "coco", **options)
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [2, 2, 6]
    assert [example.id for example in task.examples("test")] == [f"val-{number}" for number in range(6)]
    far = coco(tmp_path / "coco", **options, test_domain="out-domain")
    assert [example.id for example in far.examples("test")] == ["val-2", "val-5"]
    with pytest.raises(
        UserError, match=r"test_domain: no image of .*nocaps/val .*'outdomain'; .*did you mean 'out-domain'"
    ):
        coco(tmp_path / "coco", **options, test_domain="outdomain").prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of root .* and dataset"),
        ({"root": "a", "dataset": {"path": "owner/name"}}, "exactly one of root .* and dataset"),
        ({"dataset": {"path": "owner/name"}, "karpathy": "k.json"}, "karpathy: needs root"),
        ({"root": "a", "karpathy": "k.json", "train": "train2014"}, "train: .*karpathy has all splits"),
        ({"dataset": {"path": "owner/name"}, "validation": "v"}, "validation: .*dataset has its own"),
        ({"root": "a", "karpathy": "k.json", "test": "val"}, "test: with dataset or karpathy it needs test_root"),
        ({"root": "a", "test_root": "b"}, "test_root: needs test"),
        ({"root": "a", "test_domain": "in-domain"}, "test_domain: needs test"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CocoCaptions.Config.model_validate_json(json.dumps(options))


@pytest.mark.parametrize("source", [{"root": "a"}, {"root": "a", "karpathy": "k.json"}, {"dataset": {"path": "a/b"}}])
def test_options_with_all_defaults_written_out_are_the_same(source: dict[str, Any]) -> None:
    """As trials get them."""
    config = CocoCaptions.Config.model_validate_json(json.dumps(source | {"augmentation": {"crop_scale": [0.5, 1]}}))
    assert CocoCaptions.Config.model_validate_json(config.model_dump_json()) == config


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path, "train2017", [1])
    write_coco(tmp_path, "val2017", [15])  # one image has no two halves
    with pytest.raises(UserError, match=r"no examples for test"):
        coco(tmp_path).prepare()


def test_only_with_augmentation_are_training_pictures_changed(tmp_path: Path) -> None:
    plain, changed = coco(tmp_path), coco(tmp_path, augmentation={"horizontal_flip": 1.0})
    assert (plain.augmented, changed.augmented) == (frozenset(), frozenset({"image"}))
    picture = PilImage.effect_noise((8, 6), 90).convert("RGB")
    rng = np.random.default_rng(0)
    assert plain.augment("image", picture, rng).tobytes() == picture.tobytes()
    assert np.array_equal(np.asarray(changed.augment("image", picture, rng)), np.asarray(picture)[:, ::-1])


def test_the_sample_has_three_splits(tmp_path: Path) -> None:
    task = CocoCaptions(CocoCaptions.Config.model_validate_json(json.dumps(CocoCaptions.sample(tmp_path))))
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [8, 4, 4]
    assert task.examples("train")[3].references == ("A plain picture of 3 .", "One colour, nothing else")


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
    with pytest.raises(UserError, match=r"captions_train2017\.json: line 1: not UTF-8 \(byte 0xff\)"):
        read_captions(tmp_path, "train2017")


def test_annotations_in_utf_16_and_compressed(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "train2017", [4, 5])
    expected = read_captions(tmp_path, "train2017")
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_text().encode("utf-16")))
    path.unlink()
    assert read_captions(tmp_path, "train2017") == expected


def test_half_a_surrogate_pair_is_named_with_its_caption(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "train2017", [4, 5])
    content = json.loads(path.read_text())
    content["annotations"][2]["caption"] = "so nice \ud83d"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"line 1, column \d+: half of a surrogate pair, .*so nice"):
        read_captions(tmp_path, "train2017")


@pytest.mark.parametrize(
    ("name", "content", "layout"),
    [
        ("Flickr8k.token.txt", "1000268201_693b08cb0e.jpg#0\tA child in a pink dress .\n", "Flickr's token file"),
        (
            "captions.txt",
            "image,caption\n1000268201_693b08cb0e.jpg,A child in a pink dress .\n",
            "Flickr's captions as a",
        ),
        ("results.csv", "image_name| comment_number| comment\n1.jpg| 0| A child .\n", "Flickr's captions as a table"),
    ],
)
def test_a_layout_that_is_not_read_is_named(tmp_path: Path, name: str, content: str, layout: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"annotations does not exist; this looks like {layout}.*\({name}\)"):
        read_captions(tmp_path, "train2017")
    with pytest.raises(UserError, match=rf"{name}: line 1, column .*broken JSON.*; this looks like {layout}"):
        read_karpathy(tmp_path / name, tmp_path)


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
            picture = Image().load(example.files[0][1])
            assert picture.mode == "RGB"
            assert min(picture.size) > 100
