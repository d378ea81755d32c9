"""``harness launch``, ``logs`` and ``stop``; a real Slurm is in tests/clusters/launch/test_slurm_cluster.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from clusters.launch.job import FOLDER, read_launch
from harness.cli import launch
from harness.sweep.stopping import REQUEST
from tests.support.cli import Harness, assert_refused, caller
from tests.support.launching import EXPERIMENT, written_profile


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Harness:
    monkeypatch.chdir(tmp_path)
    for name in ("SBATCH_PARTITION", "HARNESS_STORAGE", "HARNESS_IMAGE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "grid.yaml").write_text(EXPERIMENT, encoding="utf-8")
    return caller(monkeypatch, capsys)


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_render_only_prints_the_job_and_writes_nothing(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    shown = harness("launch", "grid.yaml", "--profile", "slurm", "--render-only", "--no-measure")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("#!/bin/bash\n#SBATCH --job-name=grid\n#SBATCH --partition=gpu\n")
    assert f"-m harness run {tmp_path}/grid.yaml --profile {tmp_path}/runs/grid/launch/profile.yaml" in shown.out
    assert "--no-measure" in shown.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (
            "slrum",
            "profile: found 'slrum', which is no profile of the harness and no YAML file; allowed: kuberay, local",
        ),
        ("slurm", "slurm.partition: environment variable SBATCH_PARTITION is not set"),
        ("kuberay", "storage: environment variable HARNESS_STORAGE is not set"),
        (
            "kind: slurm\nslurm: {partition: cpu}\n",
            "slurm.partition: found 'cpu'; allowed: gpu, high; did you mean 'gpu'",
        ),
        (
            "kind: slurm\nsecrets: [NO_SUCH]\nslurm: {partition: gpu}\n",
            "secrets: NO_SUCH is not set in this environment",
        ),
        (
            "kind: slurm\nstorage: s3://b\nslurm: {partition: gpu}\n",
            "storage: found 's3://b'; kind slurm needs a folder",
        ),
        (
            "kind: kuberay\nstorage: /runs\nkuberay: {image: a}\n",
            "kubectl: not found on the PATH; a RayJob is submitted",
        ),
        ("kind: local\nstorage: foo://x\n", "foo://x: unknown scheme 'foo'; allowed: file, gs, memory, s3"),
        ("kind: kuberay\nstorage: s3:///\nkuberay: {image: a}\n", "s3://: found no folder in it"),
        ("kind: ray\naddress: auto\n", "profile mine, job_server: harness launch needs it"),
        ("kind: ray\naddress: auto\njob_server: http://127.0.0.1:9\nsecrets: [HOME]\n", "Ray shows the environment"),
    ],
)
def test_what_cannot_be_submitted_is_told_before(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, says: str
) -> None:
    program(tmp_path, "sinfo", "echo gpu; echo high")
    submitted = program(tmp_path, "sbatch", f": > {tmp_path}/submitted").parent
    monkeypatch.setenv("PATH", str(submitted))  # nothing else is installed
    name = str(written_profile(tmp_path, profile)) if "\n" in profile else profile
    assert_refused(harness("launch", "grid.yaml", "--profile", name), says)
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "runs").exists()


ON_MACHINES = {
    "kuberay": "kuberay: {image: a}",
    "ray_up": "ray_up: {ssh_user: me, provider: {type: aws}, head: {node_config: {}}, worker: {node_config: {}}}",
}


@pytest.mark.parametrize(("kind", "section"), ON_MACHINES.items(), ids=ON_MACHINES)
def test_a_plugin_that_machines_of_their_own_would_not_have_is_refused(
    kind: str, section: str, harness: Harness, tmp_path: Path
) -> None:
    plugin = tmp_path / "sums.py"
    (tmp_path / "plugged.yaml").write_text(f"{EXPERIMENT}plugins: [{plugin}]\n", encoding="utf-8")
    profile = written_profile(tmp_path, f"kind: {kind}\nstorage: s3://b/runs\n{section}\n")
    refused = harness("launch", "plugged.yaml", "--profile", profile, "--render-only")
    assert_refused(
        refused, f"plugged.yaml, line 7, plugins[0]: found '{plugin}'; for kind {kind} they are brought from"
    )


def test_without_sbatch_the_script_can_be_printed(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    profile = written_profile(tmp_path, "kind: slurm\nslurm: {partition: gpu}\n")
    refused = harness("launch", "grid.yaml", "--profile", profile)
    assert_refused(
        refused, "sbatch: not found on the PATH; a Slurm job is submitted with it. Launch where it is installed"
    )
    assert harness("launch", "grid.yaml", "--profile", profile, "--render-only").code == 0


def test_what_slurm_refuses_is_told_in_its_words(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "sinfo", "echo gpu")
    folder = program(tmp_path, "sbatch", "echo 'sbatch: Invalid account' >&2; exit 1").parent
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    profile = written_profile(tmp_path, "kind: slurm\nslurm: {partition: gpu, account: x}\n")
    assert_refused(harness("launch", "grid.yaml", "--profile", profile), "exit code 1: sbatch: Invalid account")
    assert read_launch(tmp_path / "runs/grid") is None


def test_a_launched_process_is_followed_and_stopped(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is a stand-in here, which prints its arguments and ends by SIGTERM with code 3."""
    monkeypatch.setattr(launch, "FOLLOW_S", 0.01)
    monkeypatch.setattr(launch, "ASK_S", 0.01)
    python = program(
        tmp_path, "python", 'echo "called $*"; trap "echo ended in order; exit 3" TERM; while true; do sleep 0.1; done'
    )
    profile = written_profile(tmp_path, f"kind: local\npython: {python}\nenv: {{HF_HOME: /hf}}\n")
    run = tmp_path / "runs/grid"
    launched = harness("launch", "grid.yaml", "--profile", profile, "--output", tmp_path / "runs")
    record = read_launch(run)
    assert record is not None
    assert launched.out.splitlines()[0] == f"submitted: local job {record.job_id}; run folder: {run}"
    assert (record.kind, record.profile, record.host) == ("local", "mine", os.uname().nodename)
    assert json.loads((run / FOLDER / "launch.json").read_text())["submitted_at"] == record.submitted_at
    status = harness("status", run)
    assert f"local job {record.job_id}, running; submitted {record.submitted_at}; nothing has run yet" in status.out
    assert_refused(
        harness("launch", "grid.yaml", "--profile", profile), f"in use by local job {record.job_id} (running)"
    )
    assert harness("stop", run).out == f"process {record.job_id} got SIGTERM\n"
    assert (run / REQUEST).exists()
    shown = harness("logs", run, "--follow")  # until the end
    assert f"called -m harness run {tmp_path}/grid.yaml --profile {run}/launch/profile.yaml --output" in shown.out
    assert shown.out.endswith("ended in order\n")
    for _ in range(50):
        if "local job" in (line := harness("status", run).out) and "ended" in line:
            break
        time.sleep(0.1)
    assert "ended; submitted" in line
    assert_refused(harness("stop", run), "nothing runs here")


def test_the_log_of_a_trial_is_found_by_the_beginning_of_its_id(harness: Harness, tmp_path: Path) -> None:
    for trial, text in (("12ab", "epoch 1\n"), ("12cd", "epoch 2\n")):
        folder = tmp_path / "runs/grid/trials" / trial
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(text)
    assert harness("logs", "runs/grid", "12c").out == "epoch 2\n"
    assert "'12' is 2 trials; allowed: 12ab, 12cd" in harness("logs", "runs/grid", "12").err
    assert "'zz' is no trial with a log; allowed: 12ab, 12cd" in harness("logs", "runs/grid", "zz").err
    assert "not started by harness launch" in harness("logs", "runs/grid").err
    assert "nowhere: no such run folder" in harness("stop", "nowhere").err
