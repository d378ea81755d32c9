"""Connects a sweep to Ray: a new one on this machine, or an existing cluster, whose nodes are checked before any trial.

The nodes of a cluster need the libraries. Our packages and the plugins are sent to those that lack them. Values of
environment variables travel in the trials' arguments, because Ray writes runtime environments into its logs.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from clusters.profiles import Profile
from harness.core.errors import UserError
from harness.core.storage import Folder
from harness.experiment.plan import TrialSpec
from harness.sweep.events import Display
from harness.sweep.nodes import Question, ask_nodes, check_nodes, lacks_code
from harness.sweep.ray_folder import ray_folder
from harness.sweep.ray_library import WORKER_SETTINGS, address_of, own_token, ray
from harness.sweep.ship import collect, files_of, packages_of, plugins_of
from harness.sweep.stopping import handler_kept, last_words

_CONNECT_S = 5.0
_WATCH_S = 5.0  # how often the head node is asked whether it is there
_SILENT = 3  # it has died if it does not answer so often in turn
_CLIENT = "ray://"
_DIED = (
    "the run has died: it was killed, or ended by Ray, of which a process was killed; finished trials are kept; run "
    "the same experiment again to continue"
)


# Credentials and places that trials need where they are set here; more are named in a profile.
FORWARDED = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION",
    "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_APPLICATION_CREDENTIALS",
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME",
)  # fmt: skip


def environment(profile: Profile) -> dict[str, str]:
    """The variables that trials need on the machines of a cluster, with their values; empty on this machine."""
    if not profile.cluster_address():
        return {}
    here = {name: os.environ[name] for name in (*FORWARDED, *profile.secrets) if name in os.environ}
    return {**here, **profile.env}


@contextmanager
def connect(
    profile: Profile, specs: Sequence[TrialSpec], run: str | Path, files: Sequence[str], display: Display
) -> Iterator[None]:
    """Connect to Ray for the length of a sweep; a connection that exists already is used as it is.

    Args:
        profile: where to run.
        specs: of the trials.
        run: the run folder, or its URL, which every node must reach.
        files: files and folders that the trials read.
        display: told which nodes differ, and that the head node has died.

    Raises:
        UserError: the cluster cannot be reached, or a node cannot run the trials.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of what the records say in a line
    started = not ray.is_initialized()
    with ExitStack() as at_end:
        if not started and sum(node["Alive"] for node in ray.nodes()) > 1:
            _check(profile, specs, run, files, display.noted, shipped=True)
        elif started and (address := profile.cluster_address()):
            at_end.callback(_disconnect)
            _connect(address, profile, specs, run, files, display.noted)
        elif started:
            at_end.enter_context(own_ray())
        keep_quiet = at_end.enter_context(last_words(_DIED))

        def abandon(line: str) -> None:
            keep_quiet()
            display.abandoned(line)

        at_end.enter_context(_watched_head(abandon))
        yield


@contextmanager
def own_ray() -> Iterator[None]:
    """A Ray of this process alone: on loopback, with its own token, in a folder that nobody else can enter."""
    with own_token(), ray_folder() as folder:
        try:
            with handler_kept():
                # Without an address, Ray would join a cluster that runs on this machine, or wait for a dead one.
                ray.init(
                    "local",
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    _temp_dir=str(folder),
                )
            yield
        finally:
            _disconnect()


def _disconnect() -> None:
    if ray.is_initialized():
        ray.shutdown()


def _connect(
    address: str,
    profile: Profile,
    specs: Sequence[TrialSpec],
    run: str | Path,
    files: Sequence[str],
    note: Callable[[str], None],
) -> None:
    plugins = plugins_of(specs)
    packages = packages_of(plugins)
    ship = profile.ship_code
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # a submitted job: its own runtime environment brings the code
        ship = False
    if ship == "auto":
        _init(address, {})
        plugin_files = [str(path) for path in files_of(plugins)]
        nodes = ask_nodes(Question(None, plugin_files, packages))
        ship = lacks_code(nodes) or any(node.answer.get("unreadable") for node in nodes)
        if ship:
            ray.shutdown()
    if not ship:
        if not ray.is_initialized():
            _init(address, {})
        files = [*files, *(str(path) for path in files_of(plugins))]
        _check(profile, specs, run, files, note, shipped=False)
        return
    with tempfile.TemporaryDirectory(prefix="harness-code-") as folder:
        collect(plugins, Path(folder))
        _init(address, {"working_dir": folder})
        _check(profile, specs, run, files, note, shipped=True)


def _init(address: str, runtime_env: Mapping[str, Any]) -> None:
    """Connect to a cluster.

    Raises:
        UserError: it cannot be reached, or has another version of Ray or Python.
    """
    where = f"address {address!r}"
    if address.startswith(_CLIENT):
        raise UserError(
            f"{where}: a sweep needs a driver inside the cluster; on one of its machines use address: auto, from "
            "outside of it `harness launch`, which submits a job"
        )
    # How often Ray tries to connect, about 10 s each; by default 20 times.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")
    try:
        found = address_of(address)
        _check_answers(found, where)
        with handler_kept():
            ray.init(
                address=found,
                runtime_env={"env_vars": dict(WORKER_SETTINGS), **runtime_env},
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except UserError:
        raise
    except Exception as error:  # Ray raises many types: no cluster, another version, a wrong token
        with suppress(Exception):
            ray.shutdown()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{where}: cannot connect to Ray: {' '.join(lines)[:400]}") from error


def _check_answers(address: str, where: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{where}: allowed: auto, or HOST:PORT, such as 10.0.0.1:6379")
    if not _answers(address):
        raise UserError(f"{where}: no Ray cluster answers there; start it, or give the address of one that runs")


def _check(
    profile: Profile,
    specs: Sequence[TrialSpec],
    run: str | Path,
    files: Sequence[str],
    note: Callable[[str], None],
    shipped: bool,
) -> None:
    """Ask all nodes, with a file in the run folder that they have to find.

    Raises:
        UserError: a node cannot run the trials.
    """
    token = f".seen-{uuid.uuid4().hex}"
    packages = packages_of(plugins_of(specs))
    if isinstance(run, str):
        there = Folder(run)
        there.write(token, token.encode())
        question = Question(None, files, packages, (run, token), environment(profile))
    else:
        (run / token).write_text(token, encoding="utf-8")
        question = Question((str(run / token), token), files, packages)
    try:
        for line in check_nodes(ask_nodes(question), run, shipped):
            note(line)
    finally:
        if isinstance(run, str):
            there.remove([token])
        else:
            (run / token).unlink(missing_ok=True)


@contextmanager
def _watched_head(abandon: Callable[[str], None]) -> Iterator[None]:
    """End this process, with the reason, if the head node of its cluster dies.

    Whatever Ray is asked then, it waits for its head for a minute, which no exception interrupts, and ends the process
    without a word of what to do.
    """
    address = str(ray.get_runtime_context().gcs_address)
    ended = threading.Event()

    def watch() -> None:
        silent = 0
        while not ended.wait(_WATCH_S):
            silent = 0 if _answers(address) else silent + 1
            if silent >= _SILENT:
                abandon(
                    f"Ray's head node ({address}) has died; finished trials are kept; run the same experiment again "
                    "to continue"
                )
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True
