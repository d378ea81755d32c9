"""What is submitted, word for word: the files in golden/; ``UPDATE_GOLDEN=1 pytest`` writes them anew."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from clusters.launch.job import Job, check_no_secret
from clusters.launch.launchers import LAUNCHERS
from harness.core.errors import UserError
from harness.core.files import cache_folder
from tests.support.kuberay import RayJobManifest
from tests.support.launching import EXPERIMENT, PROFILES, job, written_profile

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def rendered(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Job, dict[str, str]]:
    """The job and the files of the kind that a test is parametrised with."""
    kind = request.param
    storage = "s3://bucket/runs" if kind in ("kuberay", "ray_up") else "/shared/runs"
    made = job(tmp_path, written_profile(tmp_path, PROFILES[kind]), output=storage)
    return made, LAUNCHERS[made.profile.kind].render(made)


def of(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rendered", [kind], indirect=True)


@pytest.mark.parametrize("rendered", list(PROFILES), indirect=True)
def test_a_rendered_file_is_the_golden_one(rendered: tuple[Job, dict[str, str]], tmp_path: Path) -> None:
    made, files = rendered
    for name, text in files.items():
        from clusters.launch import job as job_module

        root = str(Path(job_module.__file__).resolve().parents[2])
        found = text.replace(str(tmp_path), "/home/me").replace(made.python, "PYTHON").replace(root, "CLONE")
        found = found.replace(str(cache_folder()), "CACHE")
        golden = GOLDEN / f"{made.profile.kind}-{name}"
        if os.environ.get("UPDATE_GOLDEN"):
            golden.write_text(found, encoding="utf-8")
        assert found == golden.read_text(encoding="utf-8")


@of("slurm")
def test_the_batch_script_is_valid_bash_and_names_secrets_only(
    rendered: tuple[Job, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, files = rendered
    monkeypatch.setenv("HF_TOKEN", "hf_123456789")
    check_no_secret(LAUNCHERS["slurm"].render(made), made.profile.secrets)
    (script,) = files.values()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    head = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --export=HOME,LANG,PATH,USER,HF_TOKEN" in head
    assert "export HF_HOME='/shared/hf cache'" in script


@of("kuberay")
def test_the_manifest_has_the_fields_of_kuberays_reference(rendered: tuple[Job, dict[str, str]]) -> None:
    config, manifest = yaml.safe_load_all(rendered[1]["rayjob.yaml"])
    RayJobManifest.model_validate(manifest)
    assert config["data"]["1-grid.yaml"] == EXPERIMENT
    pods = [
        manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"],
        manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"],
    ]
    for pod in pods:
        assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "harness", "key": "HF_TOKEN"}}} in (
            pod["containers"][0]["env"]
        )
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names


def test_the_typed_subset_of_the_manifest_refuses_what_kubernetes_would(tmp_path: Path) -> None:
    made = job(tmp_path, written_profile(tmp_path, PROFILES["kuberay"]), output="s3://bucket/runs")
    _, manifest = yaml.safe_load_all(LAUNCHERS["kuberay"].render(made)["rayjob.yaml"])

    def changed(**spec: Any) -> dict[str, Any]:
        return {**manifest, "spec": {**manifest["spec"], **spec}}

    for wrong in ({"entryPoint": "x"}, {"ttlSecondsAfterFinished": "3600"}, {"rayClusterSpec": {"rayVersion": "2"}}):
        with pytest.raises(ValueError, match=r"validation error"):
            RayJobManifest.model_validate(changed(**wrong))


@of("ray_up")
def test_rays_own_validator_accepts_the_cluster(rendered: tuple[Job, dict[str, str]]) -> None:
    cluster = yaml.safe_load(rendered[1]["cluster.yaml"])
    validate_config(prepare_config(cluster))
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="Additional properties are not allowed"):
        validate_config(prepare_config({**cluster, "head_command": []}))


@pytest.mark.parametrize("kind", list(PROFILES))
def test_a_secret_in_a_rendered_file_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "k-123456")
    text = PROFILES[kind] if "env:" in PROFILES[kind] else f"{PROFILES[kind]}env: {{}}\n"
    profile = written_profile(tmp_path, text)
    made = job(tmp_path, profile, output="s3://bucket/runs")
    made = replace(made, profile=made.profile.model_copy(update={"env": {"HF_HOME": "${MY} k-123456"}}))
    files = {**LAUNCHERS[made.profile.kind].render(made), "profile": made.profile.text()}
    with pytest.raises(UserError, match="would contain the value of MY_API_KEY") as refused:
        check_no_secret(files, made.profile.secrets)
    assert "k-123456" not in str(refused.value)


def test_a_url_with_a_password_is_refused() -> None:
    with pytest.raises(UserError, match=r"rayjob\.yaml: would contain a https URL with a password"):
        check_no_secret({"rayjob.yaml": "mlflow_uri: https://me:pass@host/"}, ())
