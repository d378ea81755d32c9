"""Name the object behind a cloud of points: a modality, its encoder and a task in one file, which draws its own data:

python point_clouds.py clouds

clouds/train/ball-000.xyz: one point per line, x y z
    0.4127 -1.0231 0.2208
    1.1936 0.0417 0.5519
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from harness import Example, ExperimentPath, Modality, Part, Preview, Split, Task, TaskConfig, UserError

if TYPE_CHECKING:
    from harness import Encoder

THINGS = ("ball", "box", "plate", "pencil")  # words that builtin/tiny-llama knows
QUESTION = "what is this?"
ENCODER = "builtin/distances"  # names that begin with builtin/ are never looked for on the hub
TOKEN_POINTS = 32  # points per token
BINS = 12


def distances(_weights: bool) -> Encoder:
    """The encoder, which has no weights. The class is in here: planning an experiment should not wait for torch."""
    import torch

    from harness import Encoder

    class Distances(Encoder):
        """Shape distributions (Osada et al. 2002, https://doi.org/10.1145/571647.571648), invariant to rotation.

        A token for every 32 points: their distances from the centre of the cloud and from each other, as two
        histograms (square roots of shares) in units of the mean distance from the centre.
        """

        width = 2 * BINS

        def encode(self, items: Sequence[NDArray[np.float64]]) -> list[torch.Tensor]:
            """Features (N, 24) of each cloud."""
            return [torch.from_numpy(_features(points)) for points in items]

    return Distances()


class PointCloud(Modality):
    """Points in space, from an ASCII .xyz file; arrays of shape (P, 3)."""

    default_encoder = ENCODER
    built_in: ClassVar = {ENCODER: distances}

    def load(self, path: Path) -> NDArray[np.float64]:
        """Read all points.

        Raises:
            UserError: the file is missing or empty, or a line is not three finite numbers.
        """
        points = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            try:
                x, y, z = map(float, line.split())
            except ValueError:
                raise UserError(f"{path}: line {number}: found {line[:80]!r}; allowed: three numbers") from None
            points.append((x, y, z))
        if not points or not np.isfinite(points).all():
            raise UserError(f"{path}: allowed: at least one point, of finite numbers")
        return np.array(points)

    def preview(self, item: NDArray[np.float64]) -> Preview:
        """The cloud from the direction in which it is widest, nearer points darker."""
        from PIL import Image, ImageDraw

        centred = item - item.mean(axis=0)
        turned = centred @ np.linalg.eigh(centred.T @ centred)[1][:, ::-1]  # its principal axes
        reach = np.abs(turned).max() or 1.0
        picture = Image.new("RGB", (200, 200), "white")
        draw = ImageDraw.Draw(picture)
        for x, y, z in turned[turned[:, -1].argsort()] / reach:
            shade, across, down = int(110 - 90 * z), 100 + 90 * x, 100 - 90 * y
            draw.ellipse((across - 2, down - 2, across + 2, down + 2), fill=(shade, shade, 220))
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        return Preview("png", buffer.getvalue())


def _features(points_P3: NDArray[np.float64]) -> NDArray[np.float32]:
    centred_P3 = points_P3 - points_P3.mean(axis=0)
    centred_P3 = centred_P3 / (np.linalg.norm(centred_P3, axis=1).mean() or 1.0)
    rows = []
    for start in range(0, len(centred_P3), TOKEN_POINTS):
        part_P3 = centred_P3[start : start + TOKEN_POINTS]
        from_middle = np.linalg.norm(part_P3, axis=1)
        between = np.linalg.norm(part_P3[:, None] - part_P3, axis=-1)
        rows.append(np.concatenate([_histogram(from_middle, 2.0), _histogram(between, 4.0)]))
    return np.array(rows, dtype=np.float32)


def _histogram(distances: NDArray[np.float64], longest: float) -> NDArray[np.float64]:
    counts, _ = np.histogram(distances.clip(max=longest), bins=BINS, range=(0.0, longest))
    return np.sqrt(counts / distances.size)  # unit length, whatever the distances


class CloudsConfig(TaskConfig):
    """Where the clouds are."""

    root: ExperimentPath  # the folder with train/, validation/ and test/; relative to the experiment's file


class Clouds(Task):
    """Name the object that a cloud of points shows; the file's name begins with it."""

    contexts = ("cloud", "question", "answer")
    modalities: Mapping[str, str] = {"cloud": "point_cloud"}  # the others are text
    metrics = ("exact_match",)
    Config = CloudsConfig
    config: CloudsConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sixteen clouds."""
        draw(folder, {"train": 8, "validation": 4, "test": 4})
        return {"root": folder}

    def prepare(self) -> None:
        """Check that the folders exist.

        Raises:
            UserError: one is missing.
        """
        for split in ("train", "validation", "test"):
            if not (self.config.root / split).is_dir():
                raise UserError(f"{self.config.root}: has no folder {split}; `python point_clouds.py FOLDER` draws one")

    def examples(self, split: Split) -> Sequence[Example]:
        """The clouds of a split, sorted by name.

        Raises:
            UserError: a file's name does not begin with a known object.
        """
        examples = []
        for path in sorted((self.config.root / split).glob("*.xyz")):
            thing = path.name.partition("-")[0]
            if thing not in THINGS:
                raise UserError(f"{path}: allowed: names that begin with {', '.join(THINGS)}, and a hyphen")
            inputs = (Part("cloud", path), Part("question", QUESTION))
            examples.append(Example(f"{split}/{path.stem}", inputs, (f"a {thing}",)))
        return examples


def draw(folder: Path, sizes: Mapping[Split, int]) -> None:
    """Write this many clouds for each split, cycling through the objects."""
    for number, (split, count) in enumerate(sizes.items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            thing = THINGS[index % len(THINGS)]
            points = _cloud(thing, np.random.default_rng([number, index]))
            np.savetxt(folder / split / f"{thing}-{index:03}.xyz", points, fmt="%.4f")


def _cloud(thing: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Points on an object, randomly rotated and scaled."""
    count = int(rng.integers(64, 161))
    points = rng.normal(size=(count, 3))
    if thing == "ball":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif thing == "box":  # a cube's surface: the largest coordinate is that of a side
        points = rng.uniform(-1, 1, (count, 3))
        points /= np.abs(points).max(axis=1, keepdims=True)
    elif thing == "plate":
        points[:, 2] = 0.0
        points *= np.sqrt(rng.uniform(0, 1, (count, 1))) / np.linalg.norm(points, axis=1, keepdims=True)
    else:
        points = rng.uniform(-1, 1, (count, 1)) * np.array([1.0, 0.0, 0.0])
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved: NDArray[np.float64] = (points + rng.normal(0, 0.03, (count, 3))) @ turn * rng.uniform(0.5, 2.0)
    return moved + rng.normal(size=3)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), {"train": 256, "validation": 32, "test": 64})
