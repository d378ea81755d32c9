"""The built-in task: caption pictures drawn by code, as many as one likes, without a download.

They are written in COCO's own layout (see ``tasks/coco_format.py``) below ``$HARNESS_CACHE``, by default
``~/.cache/harness``, and read by the same reader:

    scenes/<key>/train/000010000000.png
    scenes/<key>/annotations/captions_train.json: ..., {"id": 0, "image_id": 10000000,
        "caption": "a pair of large red stars are to the left of a small blue circle."}, ...

Picture ``i`` of a split depends on (data_seed, split, i) alone, so a larger set begins with the smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.errors import UserError
from tasks import scene_drawing, scene_grammar
from tasks.base import Config, Example, Split, Task
from tasks.cache_folder import cache_folder, write_once
from tasks.coco_format import read_captions, write_annotations

CAPTIONS_PER_PICTURE = 5
# Image ids start here, so that they are unique over the task however many pictures a split has.
_FIRST_ID: dict[Split, int] = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
_MAX_EXAMPLES = 10_000_000


class ScenesConfig(Config):
    """How many pictures; the seed decides which."""

    train_examples: int = Field(default=2048, ge=1, le=_MAX_EXAMPLES)
    validation_examples: int = Field(default=512, ge=1, le=_MAX_EXAMPLES)
    test_examples: int = Field(default=512, ge=1, le=_MAX_EXAMPLES)
    data_seed: int = 0


class Scenes(Task):
    """Caption a drawn picture of shapes whose colours, sizes, counts and relations matter."""

    contexts = ("image", "text")
    modalities: Mapping[str, str] = {"image": "image"}
    metrics = ("captions",)
    Config = ScenesConfig
    config: ScenesConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """A few pictures; they are drawn below ``$HARNESS_CACHE``, as always."""
        return {"train_examples": 8, "validation_examples": 4, "test_examples": 4}

    @cached_property
    def folder(self) -> Path:
        """Where this configuration's pictures lie; another one as soon as the drawing or the grammar changes."""
        key = hashlib.sha256(self.config.model_dump_json().encode())
        for module in (scene_drawing, scene_grammar):
            key.update(Path(str(module.__file__)).read_bytes())
        return cache_folder("scenes", key.hexdigest()[:16])

    def prepare(self) -> None:
        """Draw the pictures, once for all processes of this machine.

        Raises:
            UserError: the cache folder cannot be written to.
        """
        try:
            write_once(self.folder, self._write)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the pictures of the task scenes: {error}") from error

    def examples(self, split: Split) -> Sequence[Example]:
        """The pictures of a split in the order of their numbers."""
        return read_captions(self.folder, split)

    def _write(self, folder: Path) -> None:
        for split in _FIRST_ID:
            self._write_split(folder, split)

    def _write_split(self, folder: Path, split: Split) -> None:
        count: int = getattr(self.config, f"{split}_examples")
        images: list[dict[str, Any]] = []
        captions: dict[int, Sequence[str]] = {}
        (folder / split).mkdir()
        for index in range(count):
            rng = scene_drawing.generator(self.config.data_seed, split, index)
            scene = scene_drawing.draw_scene(rng, split)
            picture = scene_drawing.paint(scene, scene_drawing.place(scene, rng), rng)
            image_id = _FIRST_ID[split] + index
            name = f"{image_id:012d}.png"
            picture.save(folder / split / name)
            images.append({"id": image_id, "file_name": name, "height": picture.height, "width": picture.width})
            captions[image_id] = scene_grammar.captions(scene, rng, CAPTIONS_PER_PICTURE)
        write_annotations(folder, split, images, captions)
