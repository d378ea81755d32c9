"""A command with what its processes listen on and what ``ps`` shows of them, looked at until it ends."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_LOOPBACK = ("127.", "::1", "::ffff:127.")


@dataclass
class Watched:
    """What was seen.

    Attributes:
        exit_code: of the command.
        output: standard output and error.
        listening: (address, process name) of every TCP port that was listened on, and of every UDP socket.
        command_lines: of all processes of this machine.
        tokens: Ray's, in the environment of its own processes.
        modes: permissions of the folders in the one that is kept.
    """

    exit_code: int
    output: str
    listening: set[tuple[str, str]] = field(default_factory=set)
    command_lines: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    modes: set[int] = field(default_factory=set)

    def reachable(self) -> set[tuple[str, str]]:
        """What other machines can reach."""
        return {(address, name) for address, name in self.listening if not address.startswith(_LOOPBACK)}


def watch(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    keep: tuple[Path, Path] | None = None,
    timeout_s: float = 400,
) -> Watched:
    """Run a command, looking at it and all that it starts every 0.3 s.

    Args:
        command: what to run.
        folder: where; its output is written there.
        environment: added to that of this process.
        keep: a folder that the command removes at its end, and where its files are to be found afterwards.
        timeout_s: after which it is killed.
    """
    log = folder / "output.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
        seen = Watched(-1, "")
        until = time.monotonic() + timeout_s
        root = psutil.Process(process.pid)
        while process.poll() is None and time.monotonic() < until:
            for one in _family(root):
                _look(one, seen)
            seen.command_lines |= {" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
            if keep:
                seen.modes |= {stat.S_IMODE(each.stat().st_mode) for each in keep[0].iterdir()}
                _link(*keep)
            time.sleep(0.3)
    if process.poll() is None:
        process.kill()
    seen.exit_code, seen.output = process.wait(), log.read_text(encoding="utf-8")
    return seen


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _look(process: psutil.Process, seen: Watched) -> None:
    try:
        name = process.name()
        if name in ("gcs_server", "raylet"):
            seen.tokens.add(process.environ().get("RAY_AUTH_TOKEN", ""))
        for each in process.net_connections(kind="inet"):
            if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                seen.listening.add((each.laddr.ip, name))
    except psutil.Error:  # it has just ended
        return


def _link(source: Path, to: Path) -> None:
    """Give the files of a folder a second name each, under which they grow, and stay when the first is removed."""
    for path in source.rglob("*"):
        other = to / path.relative_to(source)
        with suppress(OSError):  # removed at this moment
            if path.is_file() and not path.is_symlink() and not other.exists():
                other.parent.mkdir(parents=True, exist_ok=True)
                other.hardlink_to(path)


def files_with(word: str, places: Iterable[Path]) -> list[Path]:
    """The files, also below folders, whose content or name has a word."""
    found = []
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if word in str(path) or (path.is_file() and word.encode() in path.read_bytes()):
                found.append(path)
    return found
