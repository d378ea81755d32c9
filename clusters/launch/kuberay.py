"""Kubernetes: a RayJob for the KubeRay operator, and a ConfigMap that brings the experiment to it.

Fields: https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/rayjob-quick-start.html and
https://ray-project.github.io/kuberay/reference/api/. Before anything is created, the Kubernetes of the job judges both
objects, the RayJob by the definition of the operator that is installed there (``kubectl apply --dry-run=server``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from clusters.launch.job import (
    PROFILE,
    RAY_SETTINGS,
    Job,
    Launch,
    brought,
    call,
    check_program,
    is_own,
    plain_name,
    read_launch,
    submitted,
)
from clusters.profiles import KubeRay, Pod
from harness.core.errors import UserError

MANIFEST = "rayjob.yaml"
_MOUNT = "/harness/experiment"  # of the ConfigMap, in the head
_LONGEST_NAME = 47  # characters of a RayJob's name; the operator appends to it, and Kubernetes allows 63
_ENDED = ("Complete", "Failed")  # of status.jobDeploymentStatus; a RayJob in another state runs or will run
_DELETE_S = 600.0  # the operator ends the cluster of a deleted RayJob
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
    """Submits with ``kubectl apply``."""

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
        """Check that the pods can reach the storage, that the name is free, and that Kubernetes takes the manifest.

        Raises:
            UserError: one is not so, or kubectl is not here, or cannot reach Kubernetes.
        """
        check_program("kubectl", "a RayJob")
        kuberay = _section(job)
        if "://" not in job.output and (kuberay.volume_claim is None or not _below(job.output, kuberay.mount_path)):
            raise UserError(
                f"storage: found {job.output!r}; allowed: a URL, or a folder below kuberay.mount_path "
                f"({kuberay.mount_path}) with a volume_claim"
            )
        if (found := _found(job)) is not None and not _is_of(job, read_launch(job.folder.parent)):
            raise UserError(
                f"namespace {kuberay.namespace}: it has a RayJob {_name(job)} ({found}) that was not launched from "
                f"{job.folder.parent}; delete it there, or give the experiment another name"
            )
        call([*_kubectl(kuberay.namespace), "apply", "--dry-run=server", "-f", "-"], given=self.render(job)[MANIFEST])

    def submit(self, job: Job) -> Launch:
        """Create the objects. A RayJob of the run folder that has ended is replaced: applied again, it would not run.

        Raises:
            UserError: Kubernetes has refused them.
        """
        kubectl, name = _kubectl(_section(job).namespace), _name(job)
        if _found(job) in _ENDED:
            call([*kubectl, "delete", "rayjob", name, "--ignore-not-found"], _DELETE_S)
        call([*kubectl, "apply", "-f", str(job.folder / MANIFEST)])
        return submitted(job, name, address=_section(job).namespace)

    def state(self, launch: Launch) -> str | None:
        """The RayJob's deployment status, such as Running."""
        path = "jsonpath={.status.jobDeploymentStatus}"
        command = [*_kubectl(launch.address), "get", "rayjob", launch.job_id, "-o", path]
        try:
            return call(command).strip() or "Initializing"
        except UserError as error:
            return "ended" if "NotFound" in str(error) else None

    def stop(self, launch: Launch) -> str | None:
        """Send SIGTERM to the driver in the head; a deleted pod would have no time for its report.

        Raises:
            UserError: kubectl failed.
        """
        kubectl = _kubectl(launch.address)
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
        command = [*_kubectl(launch.address), "logs", f"--selector=job-name={launch.job_id}", "--tail=-1"]
        return [*command, "--follow"] if follow else command


def _section(job: Job) -> KubeRay:
    assert job.profile.kuberay is not None  # noqa: S101 - checked when the profile was read
    return job.profile.kuberay


def _below(folder: str, mount: str) -> bool:
    return f"{folder.rstrip('/')}/".startswith(f"{mount.rstrip('/')}/")


def _kubectl(namespace: str) -> list[str]:
    return ["kubectl", "--namespace", namespace]


def _name(job: Job) -> str:
    return plain_name(job.folder.parent.name, _LONGEST_NAME)


def _found(job: Job) -> str | None:
    """The state of the RayJob that has the job's name; None if there is none.

    Raises:
        UserError: kubectl failed, for example because the operator is not installed.
    """
    path = "jsonpath={.metadata.name} {.status.jobDeploymentStatus}"
    command = [*_kubectl(_section(job).namespace), "get", "rayjob", _name(job), "--ignore-not-found", "-o", path]
    try:
        found, _, state = call(command).strip().partition(" ")
    except UserError as error:
        missing = "doesn't have a resource type" in str(error)
        raise UserError(f"{error}; is the KubeRay operator installed there?") if missing else error from None
    return (state or "Initializing") if found else None  # the operator has not seen a new one yet


def _is_of(job: Job, launch: Launch | None) -> bool:
    """Whether the latest launch of the job's run folder made the RayJob of the job's name."""
    if launch is None or not is_own(launch):
        return False
    return (launch.kind, launch.job_id, launch.address) == ("kuberay", _name(job), _section(job).namespace)


def _keys(job: Job) -> dict[str, str]:
    """The files that the ConfigMap brings: their paths below the experiment's folder → their keys.

    Keys have no slashes and spaces; the volume gives the files their paths again.
    """
    paths = [PROFILE, *brought(job)]
    return {path: f"{number}-{re.sub(r'[^-._a-zA-Z0-9]+', '-', path)[-200:]}" for number, path in enumerate(paths)}


def _config_map(job: Job, name: str) -> dict[str, Any]:
    """The experiment, its plugin files and the profile.

    Raises:
        UserError: they are too large, or one is no text.
    """
    texts = {PROFILE: job.profile.text()}
    for path, file in brought(job).items():
        try:
            texts[path] = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a text file in UTF-8, which a ConfigMap could bring: {error}") from error
    if (size := sum(len(text.encode()) for text in texts.values())) > _MOST_BYTES:
        raise UserError(f"{job.experiment}: {size:,} bytes with its plugins; a ConfigMap may have {_MOST_BYTES:,}")
    metadata = {"name": f"{name}-experiment", "namespace": _section(job).namespace}
    data = {key: texts[path] for path, key in _keys(job).items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _ray_job(job: Job, name: str) -> dict[str, Any]:
    kuberay = _section(job)
    command = job.command(job.profile.python or "python", f"{_MOUNT}/{job.experiment.name}", f"{_MOUNT}/{PROFILE}")
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
        items = [{"key": key, "path": path} for path, key in _keys(job).items()]
        volumes.append({"name": "experiment", "configMap": {"name": f"{_name(job)}-experiment", "items": items}})
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
