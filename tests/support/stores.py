"""Real stores of MLflow on this machine: its server, which can be killed and started again, and PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """``mlflow server`` with SQLite and its artifacts in a folder, always at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.2)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes; SIGSTOP makes it hang."""
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait(30)
            self._process = None

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self.send(signal.SIGKILL)


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """A server in a new folder, until the end of the block."""
    folder.mkdir()
    started = Server(folder)
    try:
        started.start()
        yield started
    finally:
        started.kill()


def install_postgresql() -> str | None:
    """Install Debian's package if it is missing and this is root; returns why there is none."""
    if _postgresql() is not None:
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "PostgreSQL is not installed: apt-get install postgresql, as root"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # without starting its service
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]):
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip()[-200:]}"
    return None if _postgresql() else "the package postgresql has no initdb"


def _postgresql() -> Path | None:
    """The folder of the programs of the newest version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgresql() -> Iterator[str]:
    """A private PostgreSQL on a free port of 127.0.0.1; yields its URI. It refuses to be root, so it is nobody then."""
    programs, port = _postgresql(), free_port()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    as_user: dict[str, object] = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody", "nogroup")
        as_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    data = folder / "data"
    make = [str(programs / "initdb"), "-D", str(data), "-U", "harness", "--auth=trust", "--no-sync"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd="/", **as_user)  # type: ignore[call-overload]
    serve = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    server = subprocess.Popen(serve, cwd="/", stderr=subprocess.DEVNULL, **as_user)  # type: ignore[call-overload]
    try:
        until = time.monotonic() + 60
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, check=False, stdout=subprocess.DEVNULL).returncode:
            assert time.monotonic() < until, "PostgreSQL did not start"
            time.sleep(0.2)
        yield f"postgresql+psycopg2://harness@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        server.wait(30)
        shutil.rmtree(folder)
