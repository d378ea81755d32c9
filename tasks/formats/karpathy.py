"""Karpathy's splits of COCO, Flickr8k and Flickr30k, https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip:

    dataset_coco.json:
        {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895, "imgid": 0,
                     "split": "test", "sentids": [770337, ...],
                     "sentences": [{"raw": "A man with a red helmet on a small moped on a dirt road. ", "tokens": [...],
                                    "imgid": 0, "sentid": 770337}, ...]}, ...],
         "dataset": "coco"}

``restval`` is the rest of COCO's validation images and is used for training, as usual: 113,287 images to train,
5,000 to validate, 5,000 to test. Flickr's files have neither ``filepath`` nor ``cocoid``; their images are in one
folder.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from harness.core.errors import ProblemList, UserError, did_you_mean
from tasks.base import Example, Part, Split
from tasks.containers.text_files import unicode_problem
from tasks.formats.data_files import DataFiles, require_file, require_folder
from tasks.formats.json_file import parse_json

SPLITS: dict[str, Split] = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


class _Sentence(BaseModel):
    raw: str


class _Image(BaseModel):
    filename: str
    split: str
    sentences: list[_Sentence]
    imgid: int | None = None
    cocoid: int | None = None
    filepath: str = ""

    @property
    def id(self) -> int | None:
        return self.imgid if self.cocoid is None else self.cocoid

    @property
    def places(self) -> list[str]:
        """Where the picture may be below the root: COCO's releases of 2014 and 2017 name the same ones differently."""
        name = f"{self.filepath}/{self.filename}" if self.filepath else self.filename
        if self.cocoid is None:
            return [name]
        return [name, f"train2017/{self.cocoid:012d}.jpg", f"val2017/{self.cocoid:012d}.jpg"]


class _KarpathyFile(BaseModel):
    images: list[_Image]


def read_karpathy(path: Path, root: Path) -> dict[Split, tuple[Example, ...]]:
    """Read Karpathy's JSON and find its pictures below ``root``.

    Args:
        path: ``dataset_coco.json``, ``dataset_flickr8k.json`` or ``dataset_flickr30k.json``.
        root: COCO's folder (of 2014, or of 2017, whose pictures are the same), or Flickr's folder of images.

    Returns:
        The examples of each split in the order of the file; ids are COCO's, or else the file's ``imgid``; references
        are the raw sentences with white space collapsed.

    Raises:
        UserError: the file or folder is missing, or it has another format, an unknown split, a repeated id, a missing
            picture or an empty caption; all problems at once.
    """
    require_file(path, "file with Karpathy's splits (docs/tasks/coco_captions.md has its address)")
    require_folder(root, "images")
    return _combine(path, parse_json(path, _KarpathyFile), root)


def _combine(path: Path, content: _KarpathyFile, root: Path) -> dict[Split, tuple[Example, ...]]:
    problems = ProblemList()
    files = DataFiles()
    splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    seen: set[int | None] = set()
    for number, image in enumerate(content.images):
        where = f"{path}: images[{number}]"
        if image.id is None:
            problems.add(f"{where}: neither cocoid nor imgid is given; one of them is the image's id")
        elif image.id in seen:
            problems.add(f"{where}: image {image.id} is listed twice; ids are unique")
        seen.add(image.id)
        captions = tuple(" ".join(sentence.raw.split()) for sentence in image.sentences)
        if not captions:
            problems.add(f"{where}.sentences: image {image.id} has no caption; every image needs one or more")
        for number_of, text in enumerate(captions):
            if problem := unicode_problem(text) if text else "is empty":
                problems.add(f"{where}.sentences[{number_of}].raw {problem}")
        if image.split not in SPLITS:
            problems.add(f"{where}.split: unknown split {image.split!r}; {did_you_mean(image.split, SPLITS)}")
        try:
            places = [place for place in image.places if (root / place).is_file()] or image.places
            picture = files.find(root, places[0], f"{where}.filename")
        except UserError as error:
            problems.add(error)
        else:
            example = Example(str(image.id), (Part("image", picture),), captions)
            splits[SPLITS.get(image.split, "train")].append(example)
    problems.raise_any()
    return {split: tuple(examples) for split, examples in splits.items()}
