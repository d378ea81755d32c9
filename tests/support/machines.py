"""Machines for ``ray up`` on this machine: each has processes, a home folder and an address of 127.0.0.0/8 of its own.

Ray takes them for those of a cloud (provider ``external``): it starts and ends them, and reaches them by ``ssh`` and
``rsync``. ``ssh`` is a program of ours that enters a machine's namespace of processes, so that ``ray stop`` on a
machine ends nothing elsewhere. Needs root.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider

PROGRAMS = ("unshare", "nsenter", "rsync", "tmux")
HEAD = "127.0.0.11"
_CLONE = Path(__file__).resolve().parents[2]
_SSH = """\
#!/bin/bash
# ssh [-tt] [-i KEY] [-o OPTION] [-l USER] [USER@]MACHINE COMMAND...
while [[ $1 == -* ]]; do case $1 in -o|-i|-l) shift 2 ;; *) shift ;; esac; done
home={folder}/${{1#*@}}
shift
[ -f "$home/pid" ] || {{ echo "ssh: connect to host: Connection refused" >&2; exit 255; }}
exec nsenter --target "$(cat "$home/pid")" --pid --mount --wd="$home" -- env -i HOME="$home" USER=root \\
  SHELL=/bin/bash LANG=C.UTF-8 TERM=xterm PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin OMP_NUM_THREADS=1 \\
  RAY_TMPDIR="$home" TMUX_TMPDIR="$home" PYTHONPATH={clone} bash -c "${{*:-true}}"
"""


def missing() -> str | None:
    """Why there can be no machines here."""
    if os.geteuid() != 0:
        return "needs root (unshare)"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@contextmanager
def machines(folder: Path, files: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A cloud without machines.

    Args:
        folder: short: sockets are in it. What the machines have is in ``folder/ADDRESS``.
        files: that every new machine has in its home folder.

    Yields:
        The environment in which Ray reaches its machines.
    """
    (folder / "bin").mkdir(parents=True)
    ssh = folder / "bin/ssh"
    ssh.write_text(_SSH.format(folder=folder, clone=_CLONE), encoding="utf-8")
    ssh.chmod(0o755)
    image = {**files, ".bashrc": f"export PATH={folder}/bin:$PATH\n"}  # login shells set another one
    (folder / "image.json").write_text(json.dumps(image), encoding="utf-8")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    try:
        yield {**os.environ, "PATH": path, "PYTHONPATH": str(_CLONE), "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    finally:
        if (head := folder / HEAD / "pid").exists():
            os.kill(int(head.read_text()), signal.SIGKILL)  # and with it all that was started from there


class Machines(NodeProvider):  # type: ignore[misc]
    """``provider: {type: external, module: tests.support.machines.Machines, folder: FOLDER}``; ids are addresses."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.folder = Path(provider_config["folder"])

    @contextmanager
    def _state(self) -> Iterator[dict[str, dict[str, str]]]:
        """The tags of the machines by address; `ray up` and the head's autoscaler are different processes."""
        path = self.folder / "machines.json"
        with (self.folder / "machines.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads(path.read_text()) if path.exists() else {}
            before = json.dumps(state)
            yield state
            if json.dumps(state) != before:
                path.write_text(json.dumps(state))

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._state() as state:
            return [node for node, tags in state.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        with self._state() as state:
            return node_id in state

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._state() as state:
            return dict(state[node_id])

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._state() as state:
            state[node_id].update(tags)

    def external_ip(self, node_id: str) -> str:
        return node_id

    internal_ip = external_ip

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        with self._state() as state:
            for _ in range(count):
                address = next(a for number in range(11, 100) if (a := f"127.0.0.{number}") not in state)
                _start(self.folder / address, json.loads((self.folder / "image.json").read_text()))
                state[address] = dict(tags)

    def terminate_node(self, node_id: str) -> None:
        with self._state() as state:
            del state[node_id]
        process = self.folder / node_id / "pid"
        os.kill(int(process.read_text()), signal.SIGKILL)
        process.unlink()


def _start(home: Path, image: Mapping[str, str]) -> None:
    """A machine is the first process of a namespace, whose number there is in a file; with it all others end."""
    for name, text in image.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    outside = subprocess.Popen(
        ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "tail", "-f", "/dev/null"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    (home / "pid").write_text(found[0], encoding="utf-8")
