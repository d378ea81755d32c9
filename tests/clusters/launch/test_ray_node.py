"""Ray on the nodes of a Slurm job: free ports, and processes that are deaf to SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from clusters.launch import ray_node

pytestmark = pytest.mark.quick


def test_ports_are_different_and_free() -> None:
    ports = ray_node.free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        with closing(socket.socket()) as each:
            each.bind(("", port))


def test_the_address_of_a_job_is_one_that_others_reach() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clusters.launch.ray_node", "address"], capture_output=True, text=True, check=True
    )
    host, _, port = done.stdout.strip().rpartition(":")
    assert socket.inet_aton(host)
    assert 1024 <= int(port) < 65536


def test_the_first_node_is_the_head_and_the_others_join_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("TMPDIR", "/scratch")
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    head, one, other = (ray_node.start_command("10.0.0.1:7000", rank, cpus=16) for rank in range(3))
    assert {"--head", "--port=7000", "--node-ip-address=10.0.0.1", "--temp-dir=/scratch/harness-12/ray"} <= set(head)
    assert "--address=10.0.0.1:7000" in one
    assert not {"--head", "--port=7000"} & set(one)
    assert all("--num-cpus=16" in command for command in (head, one, other))
    agents = [next(word for word in c if word.startswith("--dashboard-agent-listen-port=")) for c in (head, one, other)]
    assert len(set(agents)) == 3  # they may share a machine


def test_what_ray_starts_does_not_get_sigterm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its processes inherit the mask; Java does with -Xrs."""
    code = f"import os, signal; os.kill(os.getpid(), signal.SIGTERM); open({str(tmp_path / 'alive')!r}, 'w')"
    monkeypatch.setattr(ray_node, "start_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    variables = {"RAY_ADDRESS": "10.0.0.1:7000", "SLURM_PROCID": "0", "SLURM_JOB_ID": "12", "TMPDIR": str(tmp_path)}
    for name, value in (variables | {"JAVA_TOOL_OPTIONS": "-Xmx1g"}).items():
        monkeypatch.setenv(name, value)
    pid = os.fork()
    if pid == 0:
        ray_node._start()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "alive").exists()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())  # of this process
    assert stat.S_IMODE((tmp_path / "harness-12").stat().st_mode) == 0o700


def test_a_folder_of_ray_that_others_could_have_filled_is_refused(tmp_path: Path) -> None:
    open_to_all, link = tmp_path / "open", tmp_path / "link"
    ray_node._make_private(tmp_path / "own")
    ray_node._make_private(tmp_path / "own")  # the second node on a machine
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link.symlink_to(tmp_path / "own")
    for folder in (open_to_all, link):
        with pytest.raises(SystemExit, match=f"{folder.name}: somebody else can write to it"):
            ray_node._make_private(folder)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """What is asked of Ray's autoscaler, for a head and one worker."""
    import ray
    from ray.autoscaler import sdk

    asked: list[list[dict[str, float]]] = []
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "harness_worker": 1}},
    ]
    nodes.append({**nodes[1], "Alive": False})
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 12.0})
    monkeypatch.setattr(sdk, "request_resources", lambda bundles=(): asked.append(bundles))
    return asked


def test_workers_are_asked_for_and_let_go(
    held: list[list[dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    ray_node._hold(1, 1, 0)
    ray_node._hold(3, 1, 0)
    assert capsys.readouterr().out == "".join(f"1 of {n} workers, 12 CPUs with the head\n" for n in (1, 3))
    with pytest.raises(SystemExit, match=r"^2 workers are needed, and no more came in 0 s; monitor\.log"):
        ray_node._hold(3, 2, 0)
    ray_node._release()
    one = {"harness_worker": 1}
    assert held == [[one], [one] * 3, [one] * 3, []]
