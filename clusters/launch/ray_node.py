"""Ray on the nodes of a job: ``python -m clusters.launch.ray_node COMMAND``.

In a Slurm job: ``address``, ``start`` and ``wait NODES``. On the head of cloud machines: ``hold WORKERS LEAST SECONDS``
asks Ray's autoscaler for workers and waits for them, and ``release`` lets them go.

Several jobs, or several nodes of one job, may share a machine, so every port is one that is free there.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import time
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path

WORKER = "harness_worker"  # a resource that only workers of cloud machines have
CONNECT_S = 300.0  # the nodes of a job may start minutes apart


def free_ports(count: int) -> list[int]:
    """Different ports that are free on this machine now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def own_ip() -> str:
    """The address of this machine that others reach; nothing is sent."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("8.8.8.8", 53))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def start_command(address: str, rank: int, cpus: int) -> list[str]:
    """The ``ray start`` of a node of the job.

    Args:
        address: of the head, ``IP:PORT``.
        rank: of the node; 0 is the head.
        cpus: of the node. Its GPUs are those that Slurm made visible (CUDA_VISIBLE_DEVICES).
    """
    host, _, port = address.rpartition(":")
    agent, client = free_ports(2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if rank == 0:
        command += ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
        command += [f"--temp-dir={_private_folder()}/ray"]
        if find_spec("grpc"):  # ray[client]: its server would take port 10001
            command += [f"--ray-client-server-port={client}"]
    else:
        command += [f"--address={address}", f"--node-ip-address={own_ip()}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"]
    return [*command, f"--num-cpus={cpus}"]


def _private_folder() -> Path:
    """Where the folder of Ray is on every node: Ray opens its own to everybody, so nobody else may enter this one."""
    temporary = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    return Path(temporary) / f"harness-{os.environ['SLURM_JOB_ID']}"


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can enter; another node of the job on this machine may have made it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        sys.exit(f"{folder}: somebody else can write to it; remove it on {socket.gethostname()}")


def _start() -> None:
    """Become the Ray node of this task; all its processes inherit that SIGTERM is blocked.

    Slurm sends SIGTERM to every process of every step; Ray would be gone before the driver has ended its trials.
    """
    address, rank = os.environ["RAY_ADDRESS"], int(os.environ["SLURM_PROCID"])
    if rank > 0:
        _wait_for(address)
    _make_private(_private_folder())
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.cpu_count() or 1)
    del os.environ["RAY_ADDRESS"]  # `ray start --head` refuses to start with it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # Java, which scores captions in a trial, would unblock it without -Xrs.
    os.environ["JAVA_TOOL_OPTIONS"] = f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} -Xrs".strip()
    command = start_command(address, rank, cpus)
    os.execv(command[0], command)  # noqa: S606


def _wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    until = time.monotonic() + CONNECT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                sys.exit(f"Ray's head at {address}: {error}, for {CONNECT_S:g} s")
            time.sleep(1)


def _wait(nodes: int) -> None:
    import ray

    address = os.environ["RAY_ADDRESS"]
    _wait_for(address)
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    alive = _alive(nodes, CONNECT_S)
    if alive < nodes:
        sys.exit(f"Ray: {alive} of {nodes} nodes after {CONNECT_S:g} s; their logs are beside this one")
    print(f"Ray at {address}: {alive} node{'s' * (alive != 1)}, {ray.cluster_resources().get('CPU', 0):g} CPUs")  # noqa: T201


def _alive(nodes: int, limit_s: float, resource: str = "") -> int:
    """How many nodes, of those with a resource, are alive as soon as there are enough, or after the limit."""
    import ray

    until = time.monotonic() + limit_s
    while True:
        nodes_alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        alive = sum(not resource or resource in resources for resources in nodes_alive)
        if alive >= nodes or time.monotonic() > until:
            return alive
        time.sleep(1)


def _hold(workers: int, least: int, limit_s: float) -> None:
    """Ask for workers, which stay until they are let go; after the limit, go on with those that are there."""
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init("auto", log_to_driver=False, logging_level="ERROR")
    request_resources(bundles=[{WORKER: 1}] * workers)
    alive = _alive(workers, limit_s, WORKER)
    print(f"{alive} of {workers} workers, {ray.cluster_resources().get('CPU', 0):g} CPUs with the head")  # noqa: T201
    if alive < least:
        sys.exit(f"{least} workers are needed, and no more came in {limit_s:g} s; monitor.log of Ray's head says why")


def _release() -> None:
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init("auto", log_to_driver=False, logging_level="ERROR")
    request_resources(bundles=[])


if __name__ == "__main__":
    if sys.argv[1] == "address":
        print(f"{own_ip()}:{free_ports(1)[0]}")  # noqa: T201
    elif sys.argv[1] == "start":
        _start()
    elif sys.argv[1] == "hold":
        _hold(*map(int, sys.argv[2:]))
    elif sys.argv[1] == "release":
        _release()
    else:
        _wait(int(sys.argv[2]))
