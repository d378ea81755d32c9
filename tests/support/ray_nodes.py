"""A Ray cluster of several nodes on this machine, in processes, a folder and ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray

_MEMORY = 80 * 2**20  # bytes of each node's object store: the least that Ray takes
# Holds the cluster: prints the address and the raylets' processes, and ends with its standard input.
_HOLDER = """
import json, sys
from ray.cluster_utils import Cluster
cpus = json.loads(sys.argv[1])
args = dict(object_store_memory=int(sys.argv[2]), include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=dict(args, num_cpus=cpus[0]))
nodes = [cluster.head_node, *(cluster.add_node(num_cpus=n, **args) for n in cpus[1:])]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(json.dumps([cluster.address, raylets]), flush=True)
for line in sys.stdin:
    nodes[int(line)].kill_all_processes(check_alive=False, allow_graceful=False)
cluster.shutdown()
"""

# One more node; `ray start` has no loopback. As ray.cluster_utils does it.
_NODE = """
import sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams
params = RayParams(gcs_address=sys.argv[1], redis_address=sys.argv[1], num_cpus=int(sys.argv[2]), num_gpus=0,
                   object_store_memory=int(sys.argv[3]), min_worker_port=0, max_worker_port=0, node_manager_port=0,
                   include_log_monitor=False, dashboard_agent_listen_port=None)
node = Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)
time.sleep(100_000)
"""


@dataclass
class RayNodes:
    """A cluster; the first node is its head."""

    address: str
    raylets: list[int]  # process ids
    environment: dict[str, str]
    _holder: subprocess.Popen[str]
    _joined: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def kill(self, number: int) -> None:
        """Kill all processes of a node."""
        assert self._holder.stdin is not None
        self._holder.stdin.write(f"{number}\n")
        self._holder.stdin.flush()

    def node_of(self, process: int) -> int | None:
        """The number of the node that a process belongs to; None: it has ended, or is of another one."""
        try:
            parents = [parent.pid for parent in psutil.Process(process).parents()]
        except psutil.NoSuchProcess:
            return None
        return next((n for n, raylet in enumerate(self.raylets) if raylet in parents), None)

    def join(self, hidden: Sequence[Path], cpus: int = 1, python: Path | None = None) -> None:
        """Start another node, which does not see some folders, with a Python of its own. Needs root."""
        hide = " && ".join([*(f"mount -t tmpfs none '{folder}'" for folder in hidden), 'exec "$@"'])
        node = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", hide, "sh", python or sys.executable, "-c", _NODE, self.address, str(cpus),
             str(_MEMORY)],
            env=self.environment, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._joined.append(node)
        deadline = time.monotonic() + 120
        while not any("raylet" in child.name() for child in psutil.Process(node.pid).children(recursive=True)):
            assert node.poll() is None, "the node did not start"
            assert time.monotonic() < deadline, "the node did not start in time"
            time.sleep(0.5)

    def end(self) -> None:
        """End all processes of the cluster."""
        processes = [psutil.Process(one.pid) for one in (*self._joined, self._holder) if one.poll() is None]
        everything = [child for one in processes for child in one.children(recursive=True)]
        for node in self._joined:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
        if self._holder.stdin is not None:
            self._holder.stdin.close()
        try:
            self._holder.wait(timeout=60)
        finally:
            for process in (*everything, *processes):
                if process.is_running():
                    process.kill()
            for one in (*self._joined, self._holder):
                one.wait(timeout=30)


@contextmanager
def ray_nodes(cpus: Sequence[int]) -> Iterator[RayNodes]:
    """A cluster whose nodes have so many CPUs each."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RAY_"))}
    environment |= {"RAY_TMPDIR": folder, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, json.dumps(list(cpus)), str(_MEMORY)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    try:
        address, raylets = json.loads(holder.stdout.readline())
    except ValueError:
        holder.kill()
        raise AssertionError("the cluster did not start") from None
    nodes = RayNodes(address, raylets, environment, holder)
    try:
        yield nodes
    finally:
        nodes.end()
        shutil.rmtree(folder, ignore_errors=True)


def bare_python(folder: Path) -> Path:
    """A Python with all libraries, but without the harness and what is installed with it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text(f"{Path(ray.__file__).parents[1]}\n", encoding="utf-8")
    return folder / "bin" / "python"
