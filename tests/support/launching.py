"""Jobs to launch with made-up paths, for the tests of launchers."""

from __future__ import annotations

from pathlib import Path

from clusters.launch.job import FOLDER, Job
from clusters.profiles import load_profile

EXPERIMENT = """\
name: grid
task: {name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}
adapters:
  - {method: lora, rank: [2, 4], learning_rate: 6e-3}
budget: {examples: 24, epochs: 2}
resources: {profile: false}
"""

_SLURM = """\
kind: slurm
python: /shared/harness/.venv/bin/python
env: {HF_HOME: /shared/hf cache}
secrets: [HF_TOKEN]
slurm:
  partition: gpu
  account: lab
  nodes: 2
  cpus_per_task: 16
  gpus_per_node: 4
  mem: 128G
  time: "24:00:00"
  options: [--exclusive]
  setup: [module load cuda/12]
"""
_KUBERAY = """\
kind: kuberay
storage: s3://bucket/runs
env: {AWS_REGION: us-west-2}
secrets: [HF_TOKEN]
kuberay:
  image: registry/harness:0.1
  namespace: peft
  worker: {cpus: 8, memory: 32Gi, gpus: 1}
  workers: 2
  volume_claim: datasets
  secret: harness
  service_account: trainer
  node_selector: {cloud.google.com/gke-accelerator: nvidia-l4}
"""
_RAY_UP = """\
kind: ray_up
storage: s3://bucket/runs
python: harness_clone/.venv/bin/python
ray_up:
  provider: {type: aws, region: us-west-2}
  ssh_user: ubuntu
  head: {node_config: {InstanceType: m5.2xlarge}}
  worker: {node_config: {InstanceType: g5.xlarge}, min_workers: 1, max_workers: 4}
  setup: [make -C harness_clone venv]
"""
_RAY = "kind: ray\naddress: auto\njob_server: http://head:8265\npython: /shared/harness/.venv/bin/python\n"
# One of each kind.
PROFILES = {"slurm": _SLURM, "kuberay": _KUBERAY, "ray_up": _RAY_UP, "ray": _RAY, "local": "kind: local\n"}


def written_profile(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def job(folder: Path, profile: str | Path, run: str = "/shared/runs/grid", output: str = "/shared/runs") -> Job:
    """A job of an experiment in ``folder``; the run folder is not made."""
    experiment = folder / "grid.yaml"
    experiment.write_text(EXPERIMENT, encoding="utf-8")
    return Job("grid", experiment, (), output, Path(run) / FOLDER, load_profile(profile))
