"""Folders at URLs (``s3://bucket/runs``) through fsspec, each with a copy on this machine that all code works on.

What was pulled and pushed is known from ``.storage.json`` in the copy: a file that was never pushed is pushed by the
next push, whatever happened in between; one that somebody has changed or removed there is so here after a pull.
Credentials come from the environment or the configuration of the storage's library, never from a URL.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from harness.core.errors import UserError, did_you_mean
from harness.core.files import cache_folder, disk_full_named, write_atomically

T = TypeVar("T")
logger = logging.getLogger(__name__)

STATE = ".storage.json"  # in a copy: its URL, and what each file was when it was last pulled or pushed
_EXTRAS = {"s3": "s3", "gs": "gcs", "file": "", "memory": ""}  # scheme → what to install with the harness
_OPTIONS: Mapping[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}}
}
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?!/)(.*)$|^([A-Za-z][A-Za-z0-9+.-]+):///(.*)$", re.DOTALL)
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, ImportError, ValueError)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
_WEIGHTS = re.compile(r"(^|/)best\.safetensors$|(^|/)checkpoint/")  # large, and not needed to read results
_LAST = re.compile(r"(^|/)(state|record|plan)\.json$")  # say that what was pushed before them is complete


class StorageError(UserError):
    """A storage cannot be used, or could not be reached for longer than was waited; what is here stays here."""


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL; a path that was made of one, which has lost a slash, is one too."""
    return _URL.match(str(place)) is not None


def normalised(place: str | Path) -> str:
    """A URL in one spelling, without a slash at its end.

    Raises:
        StorageError: the scheme is unknown, or there is a password in it.
    """
    text = str(place)
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    path = f"/{rest.strip('/')}" if scheme == "file" else rest.strip("/")
    if "@" in urlsplit(f"{scheme}://{path}").netloc:
        raise StorageError(
            f"{scheme}://…@…: found a user name or a password in a URL; credentials are taken from the environment, "
            "such as AWS_ACCESS_KEY_ID, or from the storage's own configuration"
        )
    if scheme not in _EXTRAS:
        raise StorageError(f"{scheme}://{path}: unknown scheme {scheme!r}; {did_you_mean(scheme, _EXTRAS)}")
    if not path.strip("/") or ".." in path.split("/"):
        raise StorageError(f"{scheme}://{path}: found no folder in it; allowed: such as s3://bucket/runs")
    return f"{scheme}://{path}"


class Folder:
    """A folder at a URL: its files by their names, ``trials/ID/record.json``.

    Args:
        url: of the folder.
        patience_s: how long a connection that is lost is tried again, besides what the library itself tries.

    Raises:
        StorageError: the scheme is unknown, or its library is not installed.
    """

    def __init__(self, url: str, patience_s: float = 0.0) -> None:
        import fsspec

        self.url, self.patience_s = normalised(url), patience_s
        scheme = self.url.partition(":")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(scheme, {})
            )
        except ImportError as error:
            raise StorageError(
                f"{self.url}: {scheme}:// needs another package; install it with "
                f"pip install -e '.[{_EXTRAS[scheme]}]' in the clone of the harness"
            ) from error

    def below(self, name: str) -> Folder:
        """A folder in this one."""
        return Folder(f"{self.url}/{name}", self.patience_s)

    def path(self, name: str) -> str:
        """A file's path in the words of fsspec.

        Raises:
            StorageError: it would leave the folder.
        """
        if not _is_inside(name):
            raise StorageError(f"{self.url}: has a file {name!r}, whose name leads out of the folder; remove it there")
        return f"{self._root}/{name}"

    def files(self, below: str = "") -> dict[str, str]:
        """The files in it or in one of its folders by name, each with what changes when its content does.

        Raises:
            StorageError: it cannot be listed.
        """
        root = self.path(below) if below else self._root
        try:
            found = self.retried(lambda: self._fs.find(root, detail=True), "listed")
        except FileNotFoundError as error:  # of a bucket; a folder without files is no error
            if self.url.startswith(("file:", "memory:")):
                return {}
            raise StorageError(f"{self.url}: no such bucket; create it first") from error
        start = len(self._root.rstrip("/")) + 1
        return {str(info["name"])[start:]: _stamp_there(info) for info in found.values()}

    def folders(self) -> list[str]:
        """The names of the folders in it.

        Raises:
            StorageError: it cannot be listed.
        """
        try:
            found = self.retried(lambda: self._fs.ls(self._root, detail=True), "listed")
        except FileNotFoundError:
            self.files()  # says that there is no bucket
            return []
        return sorted(PurePosixPath(str(one["name"])).name for one in found if one["type"] == "directory")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None: there is none."""
        try:
            return bytes(self.retried(lambda: self._fs.cat_file(self.path(name)), "read"))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._make_parent(name)
        self.retried(lambda: self._fs.pipe_file(self.path(name), content), "written")

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file if there is none; of several who do so at once, one gets True."""
        self._make_parent(name)
        try:
            self.retried(lambda: self._fs.pipe_file(self.path(name), content, mode="create"), "written")
        except FileExistsError:
            return False
        return True

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Download files into a folder, each complete or not at all."""
        unfinished = folder / f".pulled-{uuid.uuid4().hex}"
        try:
            for name in names:
                there, to, part = self.path(name), folder / name, unfinished / name
                with disk_full_named(to):
                    part.parent.mkdir(parents=True, exist_ok=True)
                    self.retried(partial(self._fs.get_file, there, str(part)), "read")
                    to.parent.mkdir(parents=True, exist_ok=True)
                    part.replace(to)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def put(self, names: Iterable[str], folder: Path) -> None:
        """Upload files of a folder, in this order."""
        for name in names:
            there, here = self.path(name), folder / name
            self._make_parent(name)
            self.retried(partial(self._put, here, there), "written")

    def _put(self, here: Path, there: str) -> None:
        """Object storages show a file when it is complete; a file system needs two steps."""
        if not self.url.startswith("file:"):
            self._fs.put_file(str(here), there)
            return
        parent, _, name = there.rpartition("/")
        unfinished = f"{parent}/.{name}.{uuid.uuid4().hex}"
        self._fs.put_file(str(here), unfinished)
        self._fs.mv(unfinished, there)

    def _make_parent(self, name: str) -> None:
        """Object storages have no folders, file systems do."""
        if self.url.startswith("file:"):
            self._fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""
        for name in names:
            with suppress(FileNotFoundError):
                self.retried(partial(self._fs.rm_file, self.path(name)), "removed")

    def retried(self, call: Callable[[], T], done: str) -> T:
        """Call; if the connection fails, again until ``patience_s`` have passed.

        Raises:
            StorageError: it still fails, or is not allowed.
            FileNotFoundError: as the call.
            FileExistsError: as the call.
        """
        began, wait_s = time.monotonic(), 1.0
        while True:
            try:
                return call()
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # the libraries of storages raise many types
                final = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
                if final or time.monotonic() - began >= self.patience_s:
                    said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                    raise StorageError(f"{self.url}: could not be {done}: {said}{_hint(error)}") from error
                logger.warning("%s: %s; trying again", self.url, type(error).__name__)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 30.0)


def _hint(error: Exception) -> str:
    if type(error).__name__ in _PERMANENT_NAMES or isinstance(error, PermissionError):
        return "; check the credentials: AWS_ACCESS_KEY_ID …, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS"
    return ""


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and not {"", ".", ".."} & set(parts) and "\\" not in name and "\0" not in name


def _stamp_there(info: Mapping[str, Any]) -> str:
    changes = (info.get(key) for key in ("ETag", "etag", "md5Hash", "generation", "mtime", "created", "LastModified"))
    return f"{info['size']} {next((str(value) for value in changes if value), '')}"


class Copy:
    """A folder at a URL and its copy on this machine.

    Args:
        there: the folder at the URL.
        here: the copy.
    """

    def __init__(self, there: Folder, here: Path) -> None:
        self.there, self.here = there, here
        self._known: dict[str, list[Any]] = {}  # name → stamp there, size and time here
        with suppress(OSError, ValueError):
            known = json.loads((here / STATE).read_text(encoding="utf-8"))["files"]
            self._known = {name: stamp for name, stamp in known.items() if _is_inside(name)}

    def pull(self, below: str = "", weights: bool = False) -> None:
        """Make the copy as the storage is; files that were never pushed are kept.

        Args:
            below: only this folder in it.
            weights: weights and checkpoints of trials, too.

        Raises:
            StorageError: the storage cannot be read.
        """
        found = {name: stamp for name, stamp in self.there.files(below).items() if weights or not _WEIGHTS.search(name)}
        for name in found:
            self.there.path(name)
        found = {name: stamp for name, stamp in found.items() if not _is_private(name)}
        changed = [
            name
            for name, stamp in found.items()
            if self._known.get(name, [None])[0] != stamp or not (self.here / name).is_file()
        ]
        self.there.get(sorted(changed, key=_order), self.here)
        for name in changed:
            self._note(name, found[name])
        inside = f"{below}/" if below else ""
        for name in [known for known in self._known if known.startswith(inside) and known not in found]:
            if weights or not _WEIGHTS.search(name):
                (self.here / name).unlink(missing_ok=True)
                del self._known[name]
        if not below:
            self._save()

    def push(self, removed: bool = False) -> None:
        """Push the files that are new or have changed here; those that say that others are complete come last.

        Args:
            removed: also remove what was pulled or pushed, and is not here any more.

        Raises:
            StorageError: the storage cannot be written to; the next push goes on.
        """
        here = [path for path in self.here.rglob("*") if path.is_file() and not path.is_symlink()]
        names = [name for path in here if not _is_private(name := path.relative_to(self.here).as_posix())]
        changed = [name for name in names if self._known.get(name, [None])[1:] != _stamp_here(self.here / name)]
        try:
            for name in sorted(changed, key=_order):
                before = _stamp_here(self.here / name)
                self.there.put([name], self.here)
                self._known[name] = ["", *before]
            gone = set(self._known) - set(names) if removed else set()
            self.there.remove(sorted(gone))
            for name in gone:
                del self._known[name]
            if changed:
                stamps = self.there.files()
                for name in changed:
                    self._known[name][0] = stamps.get(name, "")
        finally:
            self._save()

    def remove(self, name: str) -> None:
        """Remove a file here and there."""
        (self.here / name).unlink(missing_ok=True)
        self.there.remove([name])
        self._known.pop(name, None)

    def remove_gone(self, name: str) -> None:
        """Remove there, in all folders, the files of this name that were pulled or pushed and are not here any more."""
        gone = [known for known in self._known if known.rpartition("/")[2] == name and not (self.here / known).exists()]
        self.there.remove(gone)
        for one in gone:
            del self._known[one]
        if gone:
            self._save()

    def _note(self, name: str, stamp: str) -> None:
        self._known[name] = [stamp, *_stamp_here(self.here / name)]

    def _save(self) -> None:
        self.here.mkdir(parents=True, exist_ok=True)
        write_atomically(self.here / STATE, json.dumps({"url": self.there.url, "files": self._known}))


def _order(name: str) -> tuple[bool, str]:
    return _LAST.search(name) is not None, name


def _is_private(name: str) -> bool:
    """Files of this machine alone: locks, partial files, Ray's folder."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or parts[0] == "ray"


def _stamp_here(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def copy_folder(url: str, kind: str = "runs") -> Path:
    """Where the copy of a run folder is on this machine.

    Args:
        url: of the run folder.
        kind: ``runs``, or ``trials`` of the workers.
    """
    parent, _, name = normalised(url).rpartition("/")
    return cache_folder("storage", kind, hashlib.sha256(parent.encode()).hexdigest()[:12], name)


def run_copy(url: str | Path, patience_s: float = 0.0) -> Copy:
    """The run folder at a URL, with its copy on this machine.

    Raises:
        StorageError: the URL cannot be used.
    """
    return Copy(Folder(normalised(url), patience_s), copy_folder(normalised(url)))


def local_folder(place: str | Path, weights: bool = False) -> Path:
    """A run folder as it is, or the copy of one at a URL, as it is there now.

    Args:
        place: a folder or a URL.
        weights: weights of trials, too.

    Raises:
        StorageError: the storage cannot be read, or has no run there.
    """
    if not is_url(place):
        return Path(place)
    copy = run_copy(place)
    copy.pull(weights=weights)
    if not (copy.here / "plan.json").is_file():
        parent, _, name = copy.there.url.rpartition("/")
        beside = Folder(parent).folders() if not parent.endswith("/") else []
        hint = f"; run folders beside it: {did_you_mean(name, beside).removeprefix('allowed: ')}" if beside else ""
        raise StorageError(f"{copy.there.url}: no plan.json there; a run folder is what `harness run` writes{hint}")
    return copy.here


def url_of(folder: Path) -> str | None:
    """The URL that a folder is the copy of, if it is one: only in the cache, where nobody else's folders are."""
    if not folder.resolve().is_relative_to(cache_folder("storage").resolve()):
        return None
    try:
        return str(json.loads((folder / STATE).read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError):
        return None


def push_copy(folder: Path) -> None:
    """Push what has changed in the copy of a run folder; nothing if it is no copy.

    Raises:
        StorageError: the storage cannot be written to.
    """
    if url := url_of(folder):
        Copy(Folder(url), folder).push()
