"""Captioned images that the library ``datasets`` reads, written once in COCO's own layout.

The source is a hub id (https://huggingface.co/datasets/jxie/flickr8k), a folder saved in the hub's layout, or shards on
disk:

    {path: webdataset, data_files: {train: "shards/train-*.tar", validation: "shards/val-*.tar"}, image_column: jpg,
     caption_column: txt}                                              # 00000.jpg, 00000.txt, 00001.jpg, …
    {path: parquet, data_files: {train: train.parquet, validation: val.parquet}, caption_column: captions}
        {"image": {"bytes": b"\\xff\\xd8…", "path": "391895.jpg"}, "captions": ["A man with a red helmet.", …]}

    {path: pictures}      # pictures/train/0.jpg, pictures/train/metadata.jsonl: {"file_name": "0.jpg", "text": "a dog"}

A row holds a picture or names it, ``{"bytes": null, "path": "images/391895.jpg"}`` or ``"images/391895.jpg"``: below
the folder of the data set or of its shards. Images are written byte for byte. Rows are streamed, so that ``datasets``
keeps no second copy.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image, UnidentifiedImageError
from pydantic import PrivateAttr, ValidationInfo, field_validator, model_validator

from harness.core.errors import ProblemList, UserError, did_you_mean
from harness.core.files import cache_folder
from harness.core.paths import check_pattern, folder_of, locate, locate_pattern
from tasks.base import Config, Split
from tasks.cache_folder import write_once
from tasks.containers.picture_metadata import without_metadata
from tasks.containers.text_files import unicode_problem
from tasks.formats.coco import write_annotations
from tasks.formats.data_files import DataFiles, MissingFileError

SHARDS = ("parquet", "webdataset")  # what `datasets` calls the packaged readers of files that hold images


class DatasetSource(Config):
    """The arguments of ``datasets.load_dataset``, and which columns hold what."""

    path: str  # parquet, webdataset, a folder, or a hub id
    name: str | None = None  # the configuration of the data set
    revision: str | None = None  # branch, tag or commit; none: what the hub has at first use, then kept
    data_files: dict[str, str | list[str]] | None = None  # split → files or globs
    train: str = "train"  # names of the splits
    validation: str = "validation"
    test: str | None = None  # none: half of the validation images, chosen by a hash of their ids
    image_column: str = "image"
    caption_column: str | list[str] = "caption"  # a caption or a list of them (json.captions: a key of a JSON column)
    id_column: str | None = None  # rows with the same id are one image; none: every row is an image
    _start: Path = PrivateAttr(default=Path())  # the folder that relative paths start from

    @field_validator("path")
    @classmethod
    def _known_path(cls, path: str, info: ValidationInfo) -> str:
        if path in SHARDS:
            return path
        check_pattern(glob.escape(path), info)
        if not locate(path, folder_of(info)).is_dir() and "/" not in path:
            raise ValueError(f"{path!r} is neither a folder nor a hub id (owner/name); {did_you_mean(path, SHARDS)}")
        return path

    @model_validator(mode="after")
    def _shards_have_files(self, info: ValidationInfo) -> Self:
        if self.path in SHARDS and not self.data_files:
            raise ValueError(f"data_files: {self.path} needs the files of each split, as in {{train: 'train-*'}}")
        self._start = folder_of(info)
        if self.path in SHARDS:
            for value in (self.data_files or {}).values():
                for pattern in [value] if isinstance(value, str) else value:
                    check_pattern(pattern, info)
        return self

    @property
    def folder(self) -> Path | None:
        """The folder that ``path`` leads to; None: it is no folder."""
        found = locate(self.path, self._start)
        return found if self.path not in SHARDS and found.is_dir() else None

    def located(self, pattern: str) -> str:
        """Where a path or pattern of ``data_files`` leads."""
        return locate_pattern(pattern, self._start)

    @property
    def splits(self) -> dict[Split, str]:
        """The names of the splits that are configured."""
        names: dict[Split, str | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: name for split, name in names.items() if name is not None}


def materialise(source: DatasetSource) -> Path:
    """Write the data set below ``$HARNESS_CACHE/coco_captions``, once for all processes of this machine.

    Files on disk are identified by path, size and modification time; a data set of the hub by its name and
    ``revision``.

    Returns:
        A folder in COCO's layout whose image folders are called train, validation and, where there is one, test.

    Raises:
        UserError: it could not be loaded, a column or split is missing, a row is broken (all of them at once), or the
            cache cannot be written to.
    """
    files = _local_files(source)
    folder = written_to(source, files)
    if folder.is_dir():
        return folder
    try:
        write_once(folder, lambda partial: _write(source, files, partial))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the pictures of {source.path}: {error}") from error
    return folder


def written_to(source: DatasetSource, files: Mapping[str, list[str]] | None = None) -> Path:
    """The folder that ``materialise`` writes to, or wrote to before. Nothing is downloaded or written.

    Args:
        source: the data set.
        files: its ``data_files``, if their patterns are already resolved.

    Raises:
        UserError: a pattern of ``data_files`` matches no file.
    """
    names = _flat(source, files or _local_files(source))
    stamps = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in names]
    key = hashlib.sha256(json.dumps([source.model_dump(mode="json"), stamps]).encode()).hexdigest()[:16]
    return cache_folder("coco_captions", key)


def _local_files(source: DatasetSource) -> dict[str, list[str]] | None:
    """``data_files`` with globs of files on disk replaced by what they match now, in order."""
    if source.data_files is None:
        return None
    if source.path not in SHARDS:
        return {split: [value] if isinstance(value, str) else value for split, value in source.data_files.items()}
    problems = ProblemList()
    files: dict[str, list[str]] = {}
    for split, value in source.data_files.items():
        files[split] = []
        for pattern in [value] if isinstance(value, str) else value:
            matches = glob.glob(source.located(pattern), recursive=True)  # noqa: PTH207 - absolute ones too
            found = [pattern] if "://" in pattern else sorted(matches)
            if not found:
                problems.add(f"dataset.data_files.{split}: no file matches {source.located(pattern)!r}")
            files[split] += [name if "://" in name else str(Path(name).absolute()) for name in found]
    problems.raise_any()
    return files


def _flat(source: DatasetSource, files: Mapping[str, list[str]] | None) -> list[str]:
    if source.path not in SHARDS:
        return sorted(_below(source.folder.absolute(), set())) if source.folder else []
    return [name for names in (files or {}).values() for name in names if "://" not in name]


def _below(folder: Path, seen: set[Path]) -> Iterator[str]:
    """All files below a folder, links followed."""
    real = folder.resolve()
    if not folder.is_dir() or real in seen:
        return
    seen.add(real)
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _below(folder / entry.name, seen)
        elif entry.is_file():
            yield str(folder / entry.name)


def _write(source: DatasetSource, files: Mapping[str, list[str]] | None, folder: Path) -> None:
    problems = ProblemList()
    revision, splits, is_folder_of_pictures = _open(source, files)
    for split, rows in splits.items():
        pictures = _NamedPictures(_folders(source, files, split), trusted=is_folder_of_pictures)
        _SplitWriter(source, folder, split, problems, pictures).write(_rows(source, split, rows))
    problems.raise_any()
    origin = {"source": source.model_dump(mode="json"), "revision": revision}
    (folder / "source.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _folders(source: DatasetSource, files: Mapping[str, list[str]] | None, split: Split) -> list[Path]:
    """What the names of pictures may be relative to: the folder of the data set, or those of the split's files."""
    if source.folder is not None:
        return [source.folder.absolute()]
    names = (files or {}).get(source.splits[split], [])
    return list(dict.fromkeys(Path(name).absolute().parent for name in names if "://" not in name))


def _open(
    source: DatasetSource, files: Mapping[str, list[str]] | None
) -> tuple[str, dict[Split, Iterable[Mapping[str, Any]]], bool]:
    """The commit (of a hub data set) or fingerprint, the rows of each split, images as their bytes or with their path,
    and whether the paths are from a list of files rather than from rows.
    """
    import datasets

    path = str(source.folder or source.path)
    try:
        builder = datasets.load_dataset_builder(path, source.name, revision=source.revision, data_files=files)
        opened = builder.as_streaming_dataset()
    except Exception as error:  # the hub, the file system and each format's reader have their own
        raise UserError(f"dataset.path: {source.path!r} cannot be read: {_reason(error)}") from error
    problems = ProblemList()
    for name in source.splits.values():
        if name not in opened:
            problems.add(f"dataset: {source.path!r} has no split {name!r}; {did_you_mean(name, opened)}")
    problems.raise_any()
    rows: dict[Split, Iterable[Mapping[str, Any]]] = {}
    for split, name in source.splits.items():
        _check_columns(source, name, opened[name].features, problems)
        rows[split] = opened[name]
    problems.raise_any()
    try:
        raw = datasets.Image(decode=False)
        rows = {s: opened[n].cast_column(source.image_column, raw) for s, n in source.splits.items()}
    except Exception as error:
        raise UserError(f"dataset.image_column: {source.image_column!r} holds no images: {_reason(error)}") from error
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

    return str(builder.hash), rows, isinstance(builder, FolderBasedBuilder)


def _check_columns(
    source: DatasetSource, split: str, features: Mapping[str, Any] | None, problems: ProblemList
) -> None:
    wanted = {"image_column": [source.image_column], "caption_column": _caption_columns(source)}
    if source.id_column is not None:
        wanted["id_column"] = [source.id_column]
    for option, columns in wanted.items():
        for column in columns:
            if features is not None and not {column, column.partition(".")[0]} & features.keys():
                problems.add(
                    f"dataset.{option}: split {split!r} has no column {column!r}; {did_you_mean(column, features)}"
                )


def _caption_columns(source: DatasetSource) -> list[str]:
    return [source.caption_column] if isinstance(source.caption_column, str) else source.caption_column


def _rows(source: DatasetSource, split: Split, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    number = -1
    try:
        for number, row in enumerate(rows):  # noqa: B007
            yield row
    except Exception as error:  # a truncated shard, a lost connection
        raise UserError(
            f"dataset: {source.path!r}, split {split!r}: cannot be read after row {number}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


class _NamedPictures:
    """Reads pictures that rows name instead of holding them.

    Args:
        folders: what a name may be relative to; absolute ones must be inside one of them.
        trusted: `datasets` found the files itself (``imagefolder``): they may be on the hub, or in an archive.
    """

    def __init__(self, folders: Sequence[Path] = (), trusted: bool = False) -> None:
        self.folders, self.trusted = folders, trusted
        self._files = DataFiles()

    def read(self, name: str) -> bytes:
        """The file's content.

        Raises:
            UserError: it does not exist, is outside the folders, or cannot be read.
        """
        try:
            if self.trusted and "://" in name:
                from datasets.utils.file_utils import xopen

                with xopen(name, "rb") as file:
                    return bytes(file.read())
            return self._find(name).read_bytes()
        except UserError:
            raise
        except Exception as error:  # the hub and each archive format have their own
            raise UserError(f"picture {name[:200]!r} cannot be read: {_reason(error)}") from error

    def _find(self, name: str) -> Path:
        missing: UserError | None = None
        for folder in self.folders:
            inside = name
            if Path(name).is_absolute() and Path(name).is_relative_to(folder):
                inside = str(Path(name).relative_to(folder))
            try:
                return self._files.find(folder, inside, "picture")
            except MissingFileError as error:
                missing = error
        raise missing or UserError(f"picture {name[:200]!r}: a name, and no folder on this machine that it is below")


class _SplitWriter:
    """Writes the images of one split as they are read, then the annotations."""

    def __init__(
        self,
        source: DatasetSource,
        folder: Path,
        split: Split,
        problems: ProblemList,
        pictures: _NamedPictures | None = None,
    ) -> None:
        self.source, self.folder, self.split, self.problems = source, folder, split, problems
        self.pictures = pictures or _NamedPictures()
        self.images: list[dict[str, str]] = []
        self.captions: dict[str, list[str]] = {}
        self.digests: dict[str, bytes] = {}  # image id → SHA-256 of the file

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write all rows; what is wrong with one of them is added to the problems."""
        (self.folder / self.split).mkdir()
        for number, row in enumerate(rows):
            try:
                self._add(number, row)
            except UserError as error:
                self.problems.add(f"dataset: split {self.source.splits[self.split]!r}, row {number}: {error}")
        write_annotations(self.folder, self.split, self.images, self.captions)

    def _add(self, number: int, row: Mapping[str, Any]) -> None:
        texts = _texts(row, _caption_columns(self.source))
        image = row.get(self.source.image_column) or {}
        content = image.get("bytes")
        if not content and image.get("path"):
            content = self.pictures.read(image["path"])
        if not content:
            raise UserError(
                f"column {self.source.image_column!r} holds no image; one stored in the row or named by it is needed"
            )
        image_id = self._id(number, row)
        digest = hashlib.sha256(content).digest()
        if self.source.id_column is None and digest == next(reversed(self.digests.values()), None):
            raise UserError(
                "the same picture as in the row before; if each row is one caption, set id_column to the image's id"
            )
        if self.digests.setdefault(image_id, digest) != digest:
            raise UserError(f"image {image_id} had a different picture in an earlier row; ids are unique")
        if image_id in self.captions:
            self.captions[image_id] += texts
            return
        file_name = f"{number:012d}{_suffix(content)}"
        (self.folder / self.split / file_name).write_bytes(content)
        self.images.append({"id": image_id, "file_name": file_name})
        self.captions[image_id] = texts

    def _id(self, number: int, row: Mapping[str, Any]) -> str:
        if self.source.id_column is None:
            return f"{self.split}-{number}"
        value = _value(row, self.source.id_column)
        if not isinstance(value, str | int) or not str(value).strip():
            raise UserError(f"column {self.source.id_column!r}: found {value!r}; allowed: a number or a name")
        return str(value)


def _texts(row: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """The captions of a row.

    Raises:
        UserError: one is empty or not a text (`datasets` reads captions like "2014-01-01" from JSON as dates).
    """
    found: list[str] = []
    for column in columns:
        value = _value(row, column)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"column {column!r}: found {str(text)[:80]!r} ({type(text).__name__}); allowed: text")
            if problem := unicode_problem(text):
                raise UserError(f"column {column!r}: {problem}")
            found.append(text)
    if not found:
        raise UserError(f"no caption in {', '.join(columns)}; every image needs one or more")
    return found


def _value(row: Mapping[str, Any], column: str) -> Any:
    """A column, or a key in a column of JSON (``json.captions`` of a WebDataset)."""
    if column in row:
        return row[column]
    first, _, key = column.partition(".")
    return row[first].get(key) if isinstance(row.get(first), dict) else None


def _suffix(content: bytes) -> str:
    """The file name's suffix for an encoded image, by its first bytes.

    Raises:
        UserError: Pillow does not know the format.
    """
    reason: Exception | None = None
    for data in (content, without_metadata(content, oriented=False)):
        if data is None:
            continue
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return f".{(picture.format or '').lower()}".replace("jpeg", "jpg")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = reason or error
    raise UserError(f"not a picture ({len(content)} bytes): {reason}")
