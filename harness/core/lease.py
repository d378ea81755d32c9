"""A lease of a run folder: one sweep or profile at a time holds it, and renews it while it works.

A lease is a numbered file, ``.lease/000007.json``, and the highest number counts. A new one is made with the storage's
own "create if there is none", which one of several contenders wins; the highest is never removed, so all see the same.
Whether a holder on this machine is alive is known at once; of one on another machine it is seen by whether its file
changes, with this machine's clock alone.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from harness.core.errors import SweepEndedError
from harness.core.files import write_atomically
from harness.core.process import is_dead, this_process
from harness.core.storage import StorageError

RENEW_S = 15.0
DEAD_S = 60.0  # a holder that has not renewed its lease for so long is dead
_PLACE = ".lease"
_FILE = re.compile(r"^\.lease/(\d{6})\.json$")
_OWNER = ".lease-owner"  # in the local copy: by it a later process knows that a dead holder was of this copy


class Place(Protocol):
    """Where a lease is: a folder at a URL, or one that machines share. Its methods raise StorageError."""

    url: str

    def files(self, below: str = "") -> dict[str, str]:
        """The files in one of its folders by name."""

    def read(self, name: str) -> bytes | None:
        """The content of a file; None: there is none."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file if there is none; of several who do so at once, one gets True."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file that exists."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, folder: Place, number: int, owner: str, each: Callable[[], None] = lambda: None) -> None:
        self.folder, self.number, self.owner, self.each = folder, number, owner, each
        self._ended = threading.Event()
        self._lost = False

    def check(self) -> None:
        """Check that it still holds.

        Raises:
            SweepEndedError: this process could not renew it for so long that another has taken it over.
        """
        if self._lost:
            raise SweepEndedError(f"{self.folder.url}: another harness has taken over this run folder")

    def renew_until_ended(self) -> None:
        """Renew it now and then, in a thread; without a connection, later."""
        beat = 0
        while not self._ended.wait(RENEW_S):
            beat += 1
            try:
                if max(_numbers(self.folder)) > self.number:
                    self._lost = True
                    return
                self.folder.write(_name(self.number), _content(self.owner, beat))
                self.each()
            except (StorageError, ValueError):
                continue

    def end(self) -> None:
        """Give it back, unless another process has taken it over."""
        self._ended.set()
        if not self._lost:
            self.folder.write(_name(self.number), _content(self.owner, 0, released=True))


@contextmanager
def leased(
    folder: Place, copy: Path | None, note: Callable[[str], None], each: Callable[[], None] = lambda: None
) -> Iterator[Lease]:
    """Hold the lease of a folder.

    Args:
        folder: the run folder.
        copy: of one at a URL: its copy on this machine, whose lease this process holds.
        note: told that it is waited for a holder that may be dead.
        each: called whenever the lease is renewed, in its thread.

    Raises:
        StorageError: another process holds it, or the storage cannot be used.
    """
    lease = _acquired(folder, _owner_of(copy) if copy else uuid.uuid4().hex, note)
    lease.each = each
    thread = threading.Thread(target=lease.renew_until_ended, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        try:
            lease.end()
        except StorageError as error:
            note(f"{error}; the next run waits {DEAD_S:g} s before it takes over")


def holder_of(folder: Place) -> str | None:
    """The machine and process that hold the lease of a folder; None: nobody does.

    Whether a process of another machine is alive is judged by the clocks of both.

    Raises:
        StorageError: the storage cannot be read.
    """
    numbers = _numbers(folder)
    held = _read(folder, max(numbers)) if numbers else {}
    if not held or held.get("released"):
        return None
    dead = is_dead(_process(held))
    if dead or (dead is None and time.time() - float(held.get("renewed_at", 0)) > 2 * DEAD_S):
        return None
    return str(held.get("holder"))


def _acquired(folder: Place, owner: str, note: Callable[[str], None]) -> Lease:
    numbers = _numbers(folder)
    latest = max(numbers, default=0)
    if latest:
        held = _read(folder, latest)
        # The lease of the copy is ours, so a holder of the same copy is dead.
        if not held.get("released") and held.get("owner") != owner:
            _see_its_end(folder, latest, held, note)
    if not folder.create(_name(latest + 1), _content(owner, 0)) or max(_numbers(folder)) > latest + 1:
        raise StorageError(_in_use(folder, "another harness"))
    folder.remove(_name(number) for number in numbers)
    return Lease(folder, latest + 1, owner)


def _see_its_end(folder: Place, number: int, held: dict[str, Any], note: Callable[[str], None]) -> None:
    """Return once it is certain that the holder is dead, or has given the lease back.

    Raises:
        StorageError: it is alive.
    """
    dead = is_dead(_process(held))
    if dead:
        return
    if dead is False:
        raise StorageError(_in_use(folder, str(held.get("holder"))))
    note(f"{folder.url}: in use by {held.get('holder')}; waiting up to {DEAD_S:g} s to see whether it is alive")
    deadline = time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(min(5.0, RENEW_S / 3, DEAD_S / 3))
        now = _read(folder, number)
        if now.get("released"):
            return
        if now != held:
            raise StorageError(_in_use(folder, str(held.get("holder"))))


def _in_use(folder: Place, holder: str) -> str:
    again = "wait until it has ended, or `harness run --fresh`"
    return f"{folder.url}: in use by another sweep or profile ({holder}); {again}"


def _numbers(folder: Place) -> list[int]:
    return [int(found[1]) for name in folder.files(_PLACE) if (found := _FILE.match(name))]


def _name(number: int) -> str:
    return f"{_PLACE}/{number:06d}.json"


def _read(folder: Place, number: int) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(_name(number)) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _content(owner: str, beat: int, released: bool = False) -> bytes:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    content = {"owner": owner, "holder": holder, "process": this_process()}
    return json.dumps({**content, "beat": beat, "renewed_at": time.time(), "released": released}).encode()


def _process(held: Mapping[str, Any]) -> Mapping[str, Any]:
    found = held.get("process")
    return found if isinstance(found, dict) else {}


def _owner_of(copy: Path) -> str:
    path = copy / _OWNER
    if not path.is_file():
        write_atomically(path, f"{socket.gethostname()} {uuid.uuid4().hex}")
    return path.read_text(encoding="utf-8")
