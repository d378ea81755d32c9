"""The built-in image task: caption pictures drawn by code, in any number, without a download.

They are written in COCO's own layout (see ``tasks/formats/coco.py``) below ``$HARNESS_CACHE``, by default
``~/.cache/harness``, and read by the same reader:

    scenes/<key>/train/000010000000.png
    scenes/<key>/annotations/captions_train.json: ..., {"id": 0, "image_id": 10000000,
        "caption": "a pair of large red stars are to the left of a small blue circle."}, ...

Picture ``i`` of a split depends on (data_seed, split, i) alone, so a larger set begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.base import Example, Split
from tasks.drawing import scene as scene_drawing
from tasks.drawing import scene_captions
from tasks.drawing.task import FIRST_ID, DrawnTask
from tasks.formats.coco import read_captions, write_annotations

CAPTIONS_PER_PICTURE = 5


class Scenes(DrawnTask):
    """Caption a drawn picture of shapes whose colours, sizes, counts and relations matter."""

    contexts = ("image", "text")
    modalities: Mapping[str, str] = {"image": "image"}
    metrics = ("captions",)
    folder_name = "scenes"

    def examples(self, split: Split) -> Sequence[Example]:
        """The pictures of a split in the order of their numbers."""
        return read_captions(self.folder, split)

    def write_split(self, folder: Path, split: Split, count: int) -> None:
        """Draw a split and list it."""
        images: list[dict[str, Any]] = []
        captions: dict[int, Sequence[str]] = {}
        for index in range(count):
            rng = scene_drawing.generator(self.config.data_seed, split, index)
            scene = scene_drawing.draw_scene(rng, split)
            picture = scene_drawing.paint(scene, scene_drawing.place(scene, rng), rng)
            image_id = FIRST_ID[split] + index
            name = f"{image_id:012d}.png"
            picture.save(folder / split / name)
            images.append({"id": image_id, "file_name": name, "height": picture.height, "width": picture.width})
            captions[image_id] = scene_captions.captions(scene, rng, CAPTIONS_PER_PICTURE)
        write_annotations(folder, split, images, captions)
