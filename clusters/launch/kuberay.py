"""Kubernetes: a RayJob for the KubeRay operator, and a ConfigMap that brings the experiment to it.

Fields: https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/rayjob-quick-start.html and
https://ray-project.github.io/kuberay/reference/api/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from clusters.launch.job import RAY_SETTINGS, Job, Launch, call, check_program, submitted
from clusters.profiles import KubeRay, Pod
from harness.core.errors import UserError

MANIFEST = "rayjob.yaml"
_MOUNT = "/harness/experiment"  # of the ConfigMap, in the head
_LONGEST_NAME = 47  # characters; the operator appends to it, and Kubernetes allows 63
# Ends the driver in the head, where only Python is sure to be installed.
_TERMINATE = (
    "import psutil; [p.terminate() for p in psutil.process_iter(['cmdline']) "
    "if (p.info['cmdline'] or [])[1:4] == ['-m', 'harness', 'run']]"
)
_MOST_BYTES = 1_000_000  # of a ConfigMap (https://kubernetes.io/docs/concepts/configuration/configmap/)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class KubeRayLauncher:
    """Submits with ``kubectl create``."""

    def render(self, job: Job) -> dict[str, str]:
        """The manifest of both objects.

        Raises:
            UserError: the secrets have no Secret, or the files do not fit into a ConfigMap.
        """
        if job.profile.secrets and _section(job).secret is None:
            raise UserError(f"profile {job.profile.name}, kuberay.secret: secrets needs the name of a Secret")
        name = _name(job)
        documents = [_config_map(job, name), _ray_job(job, name)]
        return {MANIFEST: yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)}

    def check(self, job: Job) -> None:
        """Check that kubectl is here, and that the pods can reach the storage.

        Raises:
            UserError: one is not.
        """
        check_program("kubectl", "a RayJob")
        kuberay = _section(job)
        if "://" not in job.output and (kuberay.volume_claim is None or not _below(job.output, kuberay.mount_path)):
            raise UserError(
                f"storage: found {job.output!r}; allowed: a URL, or a folder below kuberay.mount_path "
                f"({kuberay.mount_path}) with a volume_claim"
            )

    def submit(self, job: Job) -> Launch:
        """Create the objects.

        Raises:
            UserError: Kubernetes has refused them.
        """
        namespace, name = _section(job).namespace, _name(job)
        call(["kubectl", "--namespace", namespace, "apply", "-f", str(job.folder / MANIFEST)])
        return submitted(job, name, address=namespace)

    def state(self, launch: Launch) -> str | None:
        """The RayJob's deployment status, such as Running."""
        path = "jsonpath={.status.jobDeploymentStatus}"
        command = ["kubectl", "--namespace", launch.address, "get", "rayjob", launch.job_id, "-o", path]
        try:
            return call(command).strip() or "Initializing"
        except UserError as error:
            return "ended" if "NotFound" in str(error) else None

    def stop(self, launch: Launch) -> str | None:
        """Send SIGTERM to the driver in the head; a deleted pod would have no time for its report.

        Raises:
            UserError: kubectl failed.
        """
        kubectl = ["kubectl", "--namespace", launch.address]
        path = "jsonpath={.status.rayClusterName}"
        cluster = call([*kubectl, "get", "rayjob", launch.job_id, "-o", path]).strip()
        selector = f"--selector=ray.io/cluster={cluster},ray.io/node-type=head"
        pod = call([*kubectl, "get", "pods", selector, "-o", "name"]).split()
        if not pod:
            raise UserError(f"rayjob {launch.job_id}: it has no head now, so nothing runs")
        call([*kubectl, "exec", pod[0], "--", "python", "-c", _TERMINATE])
        return f"the driver in {pod[0]} got SIGTERM"

    def log_command(self, launch: Launch, follow: bool) -> list[str] | None:
        """``kubectl logs`` of the pod that submitted the job to its cluster, which prints the driver's output."""
        command = [
            "kubectl",
            "--namespace",
            launch.address,
            "logs",
            f"--selector=job-name={launch.job_id}",
            "--tail=-1",
        ]
        return [*command, "--follow"] if follow else command


def _section(job: Job) -> KubeRay:
    assert job.profile.kuberay is not None  # noqa: S101 - checked when the profile was read
    return job.profile.kuberay


def _below(folder: str, mount: str) -> bool:
    return f"{folder.rstrip('/')}/".startswith(f"{mount.rstrip('/')}/")


def _name(job: Job) -> str:
    """The name of the run folder as Kubernetes allows it: ``quickstart@2`` is ``quickstart-2``."""
    return re.sub(r"[^a-z0-9]+", "-", job.folder.parent.name.lower()).strip("-")[:_LONGEST_NAME].strip("-")


def _config_map(job: Job, name: str) -> dict[str, Any]:
    """The experiment, its plugin files and the profile.

    Raises:
        UserError: they are too large, or two have the same name.
    """
    files = {job.profile_file.name: job.profile.text()}
    for path in (job.experiment, *job.plugins):
        if path.name in files:
            raise UserError(f"{path}: another file of this experiment is called {path.name} too; rename one")
        files[path.name] = path.read_text(encoding="utf-8")
    if (size := sum(len(text.encode()) for text in files.values())) > _MOST_BYTES:
        raise UserError(f"{job.experiment}: {size:,} bytes with its plugins; a ConfigMap may have {_MOST_BYTES:,}")
    metadata = {"name": f"{name}-experiment", "namespace": _section(job).namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files}


def _ray_job(job: Job, name: str) -> dict[str, Any]:
    kuberay = _section(job)
    command = job.command(
        job.profile.python or "python", f"{_MOUNT}/{job.experiment.name}", f"{_MOUNT}/{job.profile_file.name}"
    )
    worker_template = _pod(job, kuberay.worker, "ray-worker", {})
    if kuberay.node_selector:
        worker_template["spec"]["nodeSelector"] = kuberay.node_selector
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # the operator makes a Secret with it
        "headGroupSpec": {
            "rayStartParams": {},
            "template": _pod(job, kuberay.head, "ray-head", {"name": "experiment", "mountPath": _MOUNT}),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": kuberay.workers,
                "minReplicas": kuberay.workers,
                "maxReplicas": kuberay.workers,
                "rayStartParams": {},
                "template": worker_template,
            }
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": kuberay.namespace},
        "spec": {
            "entrypoint": command,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": kuberay.ttl_after_finished_s,
            "rayClusterSpec": cluster,
        },
    }


def _pod(job: Job, size: Pod, container: str, experiment: dict[str, str]) -> dict[str, Any]:
    """The pod template of a Ray node; ``experiment``: the mount of the ConfigMap, in the head."""
    kuberay = _section(job)
    settings = {name: value for name, value in RAY_SETTINGS.items() if name != "RAY_AUTH_MODE"}  # set by the operator
    env: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in {**settings, **job.profile.env}.items()]
    for name in job.profile.secrets:
        env.append({"name": name, "valueFrom": {"secretKeyRef": {"name": kuberay.secret or "", "key": name}}})
    resources: dict[str, Any] = {"cpu": str(size.cpus), "memory": size.memory}
    if size.gpus:
        resources["nvidia.com/gpu"] = str(size.gpus)
    mounts, volumes = [], []
    if kuberay.volume_claim:
        mounts.append({"name": "shared", "mountPath": kuberay.mount_path})
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": kuberay.volume_claim}})
    if experiment:
        mounts.append(experiment)
        volumes.append({"name": "experiment", "configMap": {"name": f"{_name(job)}-experiment"}})
    main: dict[str, Any] = {
        "name": container,
        "image": kuberay.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
    }
    main |= {key: value for key, value in (("env", env), ("volumeMounts", mounts)) if value}
    spec: dict[str, Any] = {"containers": [main]}
    if volumes:
        spec["volumes"] = volumes
    if kuberay.service_account:
        spec["serviceAccountName"] = kuberay.service_account
    return {"spec": spec}
