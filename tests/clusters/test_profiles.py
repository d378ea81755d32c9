"""Profiles: those of the harness are valid, and errors name the file, the line and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters.profiles import BUILT_IN, built_in, load_profile
from harness.core.errors import UserError

pytestmark = pytest.mark.quick

VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "SBATCH_PARTITION", "HARNESS_STORAGE", "HARNESS_IMAGE")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", built_in())
def test_a_profile_of_the_harness_is_read_and_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    monkeypatch.setenv("HARNESS_STORAGE", "s3://bucket/runs")
    monkeypatch.setenv("HARNESS_IMAGE", "registry/harness:1")
    profile = load_profile(name)
    assert profile.kind == profile.name == name
    first = (BUILT_IN / f"{name}.yaml").read_text().splitlines()
    assert first[0].startswith("# ")
    assert any(line.startswith("#") and f"--profile {name}" in line for line in first)
    copy = tmp_path / f"{name}.yaml"
    copy.write_text(profile.text())
    assert load_profile(copy) == profile


def test_the_address_of_a_cluster_is_found_by_rays_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_profile("local").ray_address() is None
    assert load_profile("ray").ray_address() == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert load_profile("ray").ray_address() == "ray://head:10001"
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert load_profile("slurm").ray_address() == "ray://head:10001"
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match=r"profile slurm: .*RAY_ADDRESS is not set.*harness launch FILE"):
        load_profile("slurm").ray_address()


def test_an_unknown_profile_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"found 'slrum', .*allowed: kuberay, local, ray, ray_up, slurm; did you mean 'slurm'"
    ):
        load_profile("slrum")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    written(tmp_path, "kind: local\n")
    with pytest.raises(UserError, match=r"other\.yaml: no such file; this folder has: .*mine\.yaml"):
        load_profile(tmp_path / "other.yaml")


def test_the_partition_of_the_slurm_profile_is_slurms_own_variable() -> None:
    with pytest.raises(UserError, match=r"slurm\.yaml, line 8, slurm\.partition: .*SBATCH_PARTITION is not set"):
        load_profile("slurm")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: slrum\n", r"line 1, kind: found 'slrum'; allowed: kuberay, .*; did you mean 'slurm'"),
        ("kind: slurm\n", r"slurm: kind slurm needs this key"),
        ("kind: slurm\nslurm: {nodes: 2}\n", r"line 2, slurm\.partition: this key is required"),
        (
            "kind: slurm\nslurm:\n  partition: a\n  node: 2\n",
            r"line 4, slurm\.node: unknown key 'node'; allowed: account, .*did you mean 'nodes'",
        ),
        ("kind: slurm\nslurm: {partition: a, nodes: 0}\n", r"slurm\.nodes: input should be greater than 0; found 0"),
        ("kind: slurm\nslurm: {partition: a, options: [exclusive]}\n", r"slurm\.options\[0\]: .*found 'exclusive'"),
        ('kind: slurm\nslurm: {partition: "a\\nb"}\n', r"slurm\.partition: string should match pattern"),
        ("kind: local\nslurm: {partition: a}\n", r"line 2, slurm: for kind slurm, but found kind 'local'"),
        ("kind: local\naddress: auto\n", r"line 2, address: for kind ray, but found kind 'local'"),
        ("kind: ray\n", r"address: kind ray needs this key"),
        ("kind: kuberay\nkuberay: {image: a}\n", r"storage: kind kuberay needs this key: a URL such as s3://"),
        (
            "kind: kuberay\nstorage: s3://b\nkuberay: {image: a, head: {memory: 8 GB}}\n",
            r"line 3, kuberay\.head\.memory: string should match pattern .*found '8 GB'",
        ),
        (
            "kind: ray_up\nstorage: s3://b\nray_up: {provider: {type: aws}, ssh_user: me, head: {node_config: {}},\n"
            "  worker: {node_config: {}, min_workers: 5, max_workers: 4}}\n",
            r"line 4, ray_up\.worker\.min_workers: found 5; allowed: at most max_workers \(4\)",
        ),
        ("kind: local\nenv: {HF_TOKEN: hf_x}\n", r"line 2, env\.HF_TOKEN: may be a secret.*under secrets"),
        ("kind: local\nenv: {a-b: x}\n", r"env\.a-b.*: string should match pattern"),
        ("- kind\n", r"not a mapping; allowed keys: name, kind, address"),
    ],
)
def test_an_invalid_profile_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.yaml.*{says}"):
        load_profile(written(tmp_path, text))


def test_devices_and_prices(tmp_path: Path) -> None:
    own = (
        "kind: slurm\nslurm: {partition: gpu, nodes: 2, gpus_per_node: 4, cpus_per_task: 16}\n"
        "device: {name: NVIDIA H100, memory_gib: 80, tflops: 400}\nprice: {per_hour: 2.5, currency: EUR, per: gpu}\n"
    )
    profile = load_profile(written(tmp_path, own))
    assert profile.nodes() == [{"CPU": 16.0, "GPU": 4.0}] * 2
    assert profile.device is not None
    assert profile.device.memory_gib == 80
    assert profile.price is not None
    assert (profile.price.per_hour, profile.price.currency, profile.price.per) == (2.5, "EUR", "gpu")
    assert load_profile("local").nodes() is None
    for wrong, says in (("currency: euro", "price.currency"), ("per: core", "price.per"), ("per_hours: 1", "per_hour")):
        with pytest.raises(UserError, match=says):
            load_profile(written(tmp_path, own.replace("currency: EUR, per: gpu", wrong)))
