"""COCO's own layout of captioned images, https://cocodataset.org/#format-data:

    root/train2017/000000358083.jpg
    root/annotations/captions_train2017.json:
        {"images": [{"id": 391895, "file_name": "000000391895.jpg", "height": 360, "width": 640}, ...],
         "annotations": [{"id": 770337, "image_id": 391895,
                          "caption": "A man with a red helmet on a small moped on a dirt road."}, ...]}

Data in other formats are written in this one (``write_annotations``) and read by the same reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from harness.core.errors import ProblemList, UserError
from tasks.base import Example, Part
from tasks.containers.text_files import folder_looks_like, unicode_problem
from tasks.formats.data_files import DataFiles, or_compressed, require_file, require_folder
from tasks.formats.json_file import parse_json

# COCO's ids are numbers; those of other sets in its format are names.
Id = Annotated[str, Field(coerce_numbers_to_str=True)]


class _Image(BaseModel):
    id: Id
    file_name: str
    domain: str | None = None  # NoCaps: in-domain, near-domain, out-domain


class _Annotation(BaseModel):
    image_id: Id
    caption: str


class _CaptionFile(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]


class Captioned(NamedTuple):
    """An image of an annotation file: its example, and its domain if the file gives one."""

    example: Example
    domain: str | None


def read_captions(root: Path, name: str) -> tuple[Example, ...]:
    """Read ``root/annotations/captions_<name>.json`` and find its pictures in ``root/<name>``.

    Returns:
        One example for each image in the order of the file, its id the image's, its references the captions with
        white space collapsed (COCO's own contain stray line breaks).

    Raises:
        UserError: a file or folder is missing or cannot be read, the JSON is broken or has another format, an id occurs
            twice, an image has no caption or no file or one outside the data set, a caption is empty or belongs to
            an image that is not listed. All problems of the file at once.
    """
    return tuple(captioned.example for captioned in read_captioned(root, name))


def read_captioned(root: Path, name: str) -> tuple[Captioned, ...]:
    """As ``read_captions``, with the domains of the images.

    Raises:
        UserError: as ``read_captions``.
    """
    path = captions_file(root, name)
    try:
        if not path.parent.exists() and (hint := folder_looks_like(root)):
            raise UserError(f"{path.parent}: the folder of annotations does not exist{hint}")
        require_folder(path.parent, "annotations")
        require_file(path, "annotation file")
        content = parse_json(path, _CaptionFile)
        require_folder(root / name, "images")
        return _combine(path, content, root, name)
    except OSError as error:  # no permission, a file system that is gone
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def captions_file(root: Path, name: str) -> Path:
    """The annotation file of an image folder, which may be compressed."""
    return or_compressed(root / "annotations" / f"captions_{name}.json")


def _combine(path: Path, content: _CaptionFile, root: Path, name: str) -> tuple[Captioned, ...]:
    problems = ProblemList()
    files = DataFiles()
    if not content.images:
        problems.add(f"{path}: images: the list is empty; at least one image is needed")
    references: dict[str, list[str]] = {}
    for number, image in enumerate(content.images):
        if image.id in references:
            problems.add(f"{path}: images[{number}].id: {image.id} is listed twice; ids are unique")
        references[image.id] = []
    captioned_ids = set()  # including those with an empty caption: one problem, not two
    for number, annotation in enumerate(content.annotations):
        captioned_ids.add(annotation.image_id)
        caption = " ".join(annotation.caption.split())
        if annotation.image_id not in references:
            problems.add(f"{path}: annotations[{number}].image_id: {annotation.image_id} is not among the images")
        elif not caption:
            problems.add(f"{path}: annotations[{number}].caption of image {annotation.image_id} is empty")
        elif problem := unicode_problem(caption):
            problems.add(f"{path}: annotations[{number}].caption of image {annotation.image_id}: {problem}")
        else:
            references[annotation.image_id].append(caption)
    captioned = []
    for number, image in enumerate(content.images):
        if image.id not in captioned_ids:
            problems.add(f"{path}: images[{number}]: image {image.id} has no caption; every image needs one or more")
        try:
            picture = files.find(root / name, image.file_name, f"{path}: images[{number}].file_name")
        except UserError as error:
            problems.add(error)
        else:
            example = Example(image.id, (Part("image", picture),), tuple(references[image.id]))
            captioned.append(Captioned(example, image.domain))
    problems.raise_any()
    return tuple(captioned)


def write_annotations(
    root: Path,
    name: str,
    images: Iterable[Mapping[str, Any]],
    captions: Mapping[int, Sequence[str]] | Mapping[str, Sequence[str]],
) -> None:
    """Write ``root/annotations/captions_<name>.json``.

    Args:
        images: with ``id`` and ``file_name``.
        captions: image id → its captions.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, texts in captions.items():
        for text in texts:
            annotations.append({"id": len(annotations), "image_id": image_id, "caption": text})
    path = root / "annotations" / f"captions_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": list(images), "annotations": annotations}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
