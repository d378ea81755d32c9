"""Image captioning in the layout of COCO, https://cocodataset.org/#download (2017 train and val images, annotations):

    root/train2017/000000358083.jpg
    root/annotations/captions_train2017.json:
        {"images": [{"id": 391895, "file_name": "000000391895.jpg", "height": 360, "width": 640}, ...],
         "annotations": [{"id": 770337, "image_id": 391895,
                          "caption": "A man with a red helmet on a small moped on a dirt road."}, ...]}

Anything written in this format is read the same way; the built-in task ``scenes`` is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import BaseModel, ValidationError

from harness.errors import UserError, did_you_mean
from tasks.base import Config, Example, Split, Task


class CocoCaptionsConfig(Config):
    """Where the pictures and captions lie."""

    root: Path  # the folder that holds annotations/ and the image folders
    train: str = "train2017"  # the image folder; its captions are annotations/captions_<train>.json
    validation: str = "val2017"
    test: str | None = None  # none: half of the validation images, chosen by a hash of their ids


class CocoCaptions(Task):
    """Caption a picture; several people's captions are the references."""

    contexts: ClassVar = ("image", "text")
    modalities: ClassVar = {"image": "image"}
    metric: ClassVar = "captions"
    Config: ClassVar = CocoCaptionsConfig
    config: CocoCaptionsConfig

    def prepare(self) -> None:
        """Read and check every split. COCO is not downloaded: its images are 19 GB and under licences of their own."""
        _ = self._splits

    def examples(self, split: Split) -> Sequence[Example]:
        """The images of a split in the order of its annotation file."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, tuple[Example, ...]]:
        root = self.config.root.expanduser()
        train = read_captions(root, self.config.train)
        validation = read_captions(root, self.config.validation)
        if self.config.test is None:
            test = tuple(example for example in validation if _in_test_half(example.id))
            validation = tuple(example for example in validation if not _in_test_half(example.id))
        else:
            test = read_captions(root, self.config.test)
        splits: dict[Split, tuple[Example, ...]] = {"train": train, "validation": validation, "test": test}
        _check_disjoint(root, splits)
        return splits


def _in_test_half(example_id: str) -> bool:
    return hashlib.sha256(example_id.encode()).digest()[0] % 2 == 1


def _check_disjoint(root: Path, splits: dict[Split, tuple[Example, ...]]) -> None:
    seen: dict[str, Split] = {}
    for split, examples in splits.items():
        for example in examples:
            if seen.setdefault(example.id, split) != split:
                raise UserError(
                    f"{root}: image {example.id} is in {seen[example.id]} and in {split}; splits may not overlap"
                )


class _Image(BaseModel):
    id: int
    file_name: str


class _Annotation(BaseModel):
    image_id: int
    caption: str


class _CaptionFile(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]


def read_captions(root: Path, name: str) -> tuple[Example, ...]:
    """Read ``root/annotations/captions_<name>.json`` and find its pictures in ``root/<name>``.

    Returns:
        One example for each image in the order of the file, its id the image's, its references the captions with
        white space collapsed (COCO's own hold stray line breaks).

    Raises:
        UserError: a file or folder is missing, the JSON is broken or of another format, an id is twice there, an
            image has no caption or no file, a caption is empty or of an image that is not listed.
    """
    path = root / "annotations" / f"captions_{name}.json"
    images_folder = root / name
    captions = _parse(path)
    _require_folder(images_folder, "images")
    if not captions.images:
        raise UserError(f"{path}: images: the list is empty; at least one image is needed")
    references: dict[int, list[str]] = {}
    for number, image in enumerate(captions.images):
        if image.id in references:
            raise UserError(f"{path}: images[{number}].id: {image.id} is there twice; ids are unique")
        references[image.id] = []
    for number, annotation in enumerate(captions.annotations):
        if annotation.image_id not in references:
            raise UserError(f"{path}: annotations[{number}].image_id: {annotation.image_id} is not among the images")
        caption = " ".join(annotation.caption.split())
        if not caption:
            raise UserError(f"{path}: annotations[{number}].caption of image {annotation.image_id} is empty")
        references[annotation.image_id].append(caption)
    examples = []
    for number, image in enumerate(captions.images):
        if not references[image.id]:
            raise UserError(f"{path}: images[{number}]: image {image.id} has no caption; every image needs one or more")
        picture = _picture(path, images_folder, number, image)
        examples.append(Example(str(image.id), {"image": picture}, tuple(references[image.id])))
    return tuple(examples)


def _picture(path: Path, folder: Path, number: int, image: _Image) -> Path:
    where = f"{path}: images[{number}].file_name: {image.file_name!r}"
    relative = PurePosixPath(image.file_name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{where} leads out of {folder}; allowed: names inside it")
    picture = folder / relative
    if not picture.is_file():
        raise UserError(f"{where} is not in {folder}")
    return picture


def _require_folder(folder: Path, what: str) -> None:
    if folder.is_dir():
        return
    parent = next(parent for parent in folder.parents if parent.is_dir())
    present = (entry.name for entry in parent.iterdir() if entry.is_dir())
    missing = folder.relative_to(parent).parts[0]
    raise UserError(f"{folder}: the folder of {what} does not exist; in {parent} {did_you_mean(missing, present)}")


def _parse(path: Path) -> _CaptionFile:
    _require_folder(path.parent, "annotations")
    if not path.is_file():
        present = (entry.name for entry in path.parent.glob("*.json"))
        raise UserError(f"{path}: the annotation file does not exist; {did_you_mean(path.name, present)}")
    try:
        return _CaptionFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        line = error.doc.split("\n")[error.lineno - 1]
        shown = line[max(0, error.colno - 60) : error.colno + 60]  # COCO's files are one line of megabytes
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: broken JSON, {error.msg}: {shown!r}"
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "the whole file"
        raise UserError(f"{path}: {key}: {problem['msg']}; found {str(problem['input'])[:80]!r}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
