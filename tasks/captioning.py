"""Image captioning as on COCO, https://cocodataset.org/#download: several people's captions of each picture.

    root/train2017/000000358083.jpg
    root/annotations/captions_train2017.json:
        {"images": [{"id": 391895, "file_name": "000000391895.jpg", "height": 360, "width": 640}, ...],
         "annotations": [{"id": 770337, "image_id": 391895,
                          "caption": "A man with a red helmet on a small moped on a dirt road."}, ...]}

Everything in this format is read the same way (``tasks/formats/coco.py``): COCO of 2014 and 2017, NoCaps, the
built-in task ``scenes``. Karpathy's splits of COCO and Flickr are read by ``tasks/formats/karpathy.py``, data sets of
the hub and shards by ``tasks/formats/hub_datasets.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from harness.core.errors import ProblemList, UserError, did_you_mean
from harness.core.paths import ExperimentPath
from tasks.base import Config, Example, Split
from tasks.formats.coco import captions_file, read_captioned, read_captions, write_annotations
from tasks.formats.hub_datasets import DatasetSource, materialise
from tasks.formats.karpathy import read_karpathy
from tasks.modalities.augmentation import Augmentation
from tasks.splits import FileTask, in_test_half

Splits = Mapping[Split, tuple[Example, ...]]


class CocoCaptionsConfig(Config):
    """Where the pictures and captions are (``root`` or ``dataset``), the splits, and augmentation while training."""

    root: ExperimentPath | None = None  # the folder that holds annotations/ and the image folders
    dataset: DatasetSource | None = None  # instead of root: a hub data set or shards
    karpathy: ExperimentPath | None = None  # Karpathy's JSON: his splits of the images below root
    train: str = "train2017"  # the image folder; its captions are annotations/captions_<train>.json
    validation: str = "val2017"
    test: str | None = None  # none: half of the validation images, chosen by a hash of their ids
    test_root: ExperimentPath | None = None  # none: root; another data set to test on, such as NoCaps
    test_domain: str | None = None  # test only on these images of NoCaps: in-domain, near-domain, out-domain
    augmentation: Augmentation = Field(default_factory=Augmentation)  # of training pictures; none by default

    @model_validator(mode="after")
    def _fits_together(self) -> CocoCaptionsConfig:
        if (self.root is None) == (self.dataset is None):
            raise ValueError("exactly one of root (a folder) and dataset (a hub id or shards) is needed")
        if self.karpathy is not None and self.root is None:
            raise ValueError("karpathy: needs root, the folder of the images")
        for option in ("train", "validation"):
            changed = getattr(self, option) != type(self).model_fields[option].default
            if changed and (self.dataset is not None or self.karpathy is not None):
                instead = "dataset has its own split names" if self.dataset is not None else "karpathy has all splits"
                raise ValueError(f"{option}: cannot be combined with this source; {instead}")
        if self.test is not None and self.test_root is None and (self.dataset is not None or self.karpathy is not None):
            raise ValueError("test: with dataset or karpathy it needs test_root, the folder that contains it")
        for option in ("test_root", "test_domain"):
            if getattr(self, option) is not None and self.test is None:
                raise ValueError(f"{option}: needs test, the name of the image folder")
        return self


class CocoCaptions(FileTask):
    """Caption a picture; the captions of several people are the references."""

    contexts = ("image", "text")
    modalities: Mapping[str, str] = {"image": "image"}
    metrics = ("captions",)
    Config = CocoCaptionsConfig
    config: CocoCaptionsConfig

    def __init__(self, config: CocoCaptionsConfig) -> None:
        super().__init__(config)
        if config.augmentation.active:
            self.augmented = frozenset({"image"})

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sixteen small pictures: eight to train on, four each to validate and test."""
        for name, ids in (("train2017", range(8)), ("val2017", range(15, 23))):
            (folder / name).mkdir()
            images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 12, "width": 16} for i in ids]
            for i, image in zip(ids, images, strict=True):
                Image.new("RGB", (16, 12), (9 * i, 90, 160)).save(folder / name / str(image["file_name"]))
            captions = {i: (f"A plain picture of {i} .", "One colour,\n nothing else") for i in ids}
            write_annotations(folder, name, images, captions)
        return {"root": str(folder)}

    def augment(self, context: str, item: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Change a picture as configured by ``augmentation``."""
        return self.config.augmentation.apply(item, rng)

    def annotation_files(self) -> list[Path]:
        """The captions of every split."""
        config = self.config
        if config.karpathy is not None:
            found = [config.karpathy]
        else:
            names = (config.train, config.validation) if config.dataset is None else tuple(config.dataset.splits)
            found = [captions_file(self.root, name) for name in names]
        if config.test is not None:
            found.append(captions_file(config.test_root or self.root, config.test))
        return [Path(path) for path in found]

    def read_splits(self, problems: ProblemList) -> Splits:
        """The images of a split in the order of its annotation file.

        COCO is not downloaded: its images are 19 GB and have their own licences.
        """
        splits = dict(self._read())
        if self.config.test is not None:
            splits["test"] = self._read_test(self.config.test)
        elif "test" not in splits:
            whole = splits["validation"]
            splits["validation"] = tuple(example for example in whole if not in_test_half(example.id))
            splits["test"] = tuple(example for example in whole if in_test_half(example.id))
        return splits

    @cached_property
    def root(self) -> Path:
        """The folder that is read: the given one, or the one that the data set is written to."""
        if self.config.dataset is not None:
            return materialise(self.config.dataset)
        return Path(str(self.config.root))

    def _read(self) -> Splits:
        """All splits of the source, except a test split that is configured separately or taken from validation."""
        config = self.config
        if config.karpathy is not None:
            return read_karpathy(config.karpathy, self.root)
        if config.dataset is not None:
            return _read_folder(self.root, {split: split for split in config.dataset.splits})
        return _read_folder(self.root, {"train": config.train, "validation": config.validation})

    def _read_test(self, name: str) -> tuple[Example, ...]:
        domain = self.config.test_domain
        root = self.config.test_root or self.root
        captioned = read_captioned(root, name)
        domains = {image.domain for image in captioned if image.domain is not None}
        if domain is not None and domain not in domains:
            raise UserError(
                f"test_domain: no image of {root}/{name} has the domain {domain!r}; {did_you_mean(domain, domains)}"
            )
        examples = (image.example for image in captioned if domain in (None, image.domain))
        # NoCaps counts from 0, so its ids also occur in COCO.
        return tuple(replace(e, id=f"{name}-{e.id}") if self.config.test_root else e for e in examples)


def _read_folder(root: Path, names: Mapping[Split, str]) -> Splits:
    problems = ProblemList()
    splits: dict[Split, tuple[Example, ...]] = {}
    for split, name in names.items():
        try:
            splits[split] = read_captions(root, name)
        except UserError as error:
            problems.add(error)
    problems.messages = list(dict.fromkeys(problems.messages))  # a missing folder is reported by every split
    problems.raise_any()
    return splits
