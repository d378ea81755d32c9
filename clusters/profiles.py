"""Profiles: where an experiment runs, as one typed YAML file each; those of the harness are in ``clusters/profiles/``.

A profile changes no result and no trial id. Values are checked as those of an experiment are: unknown keys are errors
that name the line, the allowed keys and the nearest one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.source import read_yaml, write_yaml
from harness.core.validation import check

BUILT_IN = Path(__file__).with_name("profiles")
Kind = Literal["local", "ray", "slurm", "kuberay", "ray_up"]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# Kubernetes' resource quantities, such as 500m or 16Gi
# (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/).
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")]
# One line: it is written into a script.
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\r\n\x00]+$")]
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)", re.IGNORECASE)


class _Section(BaseModel):
    """Frozen and strict; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Slurm(_Section):
    """A Slurm job; keys are the options of sbatch (https://slurm.schedmd.com/sbatch.html)."""

    partition: Line
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    nodes: PositiveInt = 1
    cpus_per_task: PositiveInt = 1  # of each node: there is one task, a Ray node, on each
    gpus_per_node: NonNegativeInt = 0
    mem: Line | None = None  # of each node, such as 64G; default: the partition's
    time: Line | None = None  # limit of the job, such as 24:00:00; default: the partition's
    grace_s: PositiveInt = 120  # before the time limit, the sweep is asked to end
    requeue: bool = True  # after the time limit or a preemption, the job is queued again and goes on
    options: tuple[Annotated[str, Field(pattern=r"^--?[a-zA-Z][^\r\n]*$")], ...] = ()  # others, such as --exclusive
    setup: tuple[Line, ...] = ()  # shell lines on every node before Python starts, such as module load cuda


class Pod(_Section):
    """The resources of a Ray node in Kubernetes."""

    cpus: PositiveInt = 2
    memory: Quantity = "8Gi"
    gpus: NonNegativeInt = 0


class KubeRay(_Section):
    """A RayJob of the KubeRay operator (https://docs.ray.io/en/latest/cluster/kubernetes/)."""

    image: Line  # with the harness installed, and its version of Ray
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")] = "default"
    head: Pod = Pod()
    worker: Pod = Pod()
    workers: NonNegativeInt = 1
    volume_claim: Line | None = None  # a PersistentVolumeClaim (ReadWriteMany), mounted at `mount_path` in every pod
    mount_path: Annotated[str, Field(pattern=r"^/")] = "/shared"
    secret: Line | None = None  # a Secret that has the variables named by `secrets` as its keys
    service_account: Line | None = None
    node_selector: dict[str, str] = Field(default_factory=dict)  # of the workers
    ttl_after_finished_s: NonNegativeInt = 3600  # the cluster is deleted so long after the job has ended


class Machine(_Section):
    """A kind of virtual machine; ``node_config`` is in the words of the provider."""

    node_config: dict[str, Any]
    resources: dict[str, NonNegativeInt] = Field(default_factory=dict)  # default: Ray asks the provider


class Workers(Machine):
    """The worker machines of a run, from its beginning until they are idle after its end."""

    max_workers: PositiveInt = 1  # so many are started
    min_workers: NonNegativeInt = 1  # so many must be there before the trials begin; the others may be a while later


class RayUp(_Section):
    """A cluster of cloud machines that ``ray up`` starts (https://docs.ray.io/en/latest/cluster/vms/)."""

    provider: dict[str, Any]  # such as {type: aws, region: us-west-2}
    ssh_user: Line
    head: Machine
    worker: Workers
    image: Line | None = None  # of a container on every machine; default: none
    idle_timeout_minutes: PositiveInt = 5  # after the run, until its workers end
    setup: tuple[Line, ...] = ()  # shell lines on every machine that install the harness


class Device(_Section):
    """What one device of the nodes can do: a GPU, or on nodes without GPUs the memory of a node."""

    name: Line | None = None  # such as NVIDIA H100
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    tflops: Annotated[float, Field(gt=0)] | None = None  # by its data sheet, in the precision of training


class Price(_Section):
    """What the machines cost."""

    per_hour: Annotated[float, Field(ge=0)]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    per: Literal["gpu", "cpu", "node"] = "gpu"


Node = Mapping[str, float]  # "CPU", "GPU" → how many

OWN_MACHINES: tuple[Kind, ...] = ("kuberay", "ray_up")  # with file systems of their own, gone after the run


class Profile(_Section):
    """Where an experiment runs.

    Attributes:
        name: default: that of the file, without its ending.
        kind: this machine, a Ray cluster that runs already, or a job that starts one.
        address: of the Ray cluster, for kind ``ray``: ``auto`` (this machine is one of its nodes) or ``HOST:PORT``.
        job_server: of the Ray cluster, for ``harness launch`` with kind ``ray``: ``http://HOST:8265``.
        storage: the folder or URL that contains the run folders, reachable from every node; None: ``./runs``.
        ship_code: whether a sweep sends the harness and the plugins to the nodes of a running cluster; auto: if one has
            not the same.
        env: environment variables and their values, written into scripts and manifests.
        secrets: names of environment variables whose values are written nowhere: they are taken from the environment
            of ``harness launch``, or from a Kubernetes Secret.
        python: of the harness, where it runs; None: the one that launches, in a container ``python``.
        device: what a device of the nodes can do, for ``harness plan``; None: what is found on this machine.
        price: of the machines, for ``harness plan``.
        slurm, kuberay, ray_up: what the kind of this name needs.
    """

    name: str = ""
    kind: Kind
    address: Line | None = None
    job_server: Annotated[str, Field(pattern=r"^https?://[^\s]+$")] | None = None
    storage: Line | None = None
    ship_code: bool | Literal["auto"] = "auto"
    env: dict[VariableName, Line] = Field(default_factory=dict)
    secrets: tuple[VariableName, ...] = ()
    python: Line | None = None
    device: Device | None = None
    price: Price | None = None
    slurm: Slurm | None = None
    kuberay: KubeRay | None = None
    ray_up: RayUp | None = None

    def ray_address(self) -> str | None:
        """The address for ``ray.init``; None: a Ray of its own on this machine, or that of ``RAY_ADDRESS``.

        Raises:
            UserError: the kind needs a job that ``harness launch`` starts, and this process is not in one.
        """
        if self.kind in ("local", "ray"):
            return self.address
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            raise UserError(
                f"profile {self.name}: kind {self.kind} runs in a job, and RAY_ADDRESS is not set here; "
                f"start one with `harness launch FILE --profile {self.name}`"
            )
        return address

    def cluster_address(self) -> str | None:
        """The address of a cluster that runs already; None: a new Ray is started on this machine."""
        return self.ray_address() or os.environ.get("RAY_ADDRESS")

    def nodes(self) -> list[Node] | None:
        """The CPUs and GPUs of every node that a job gets; None: they are those of a machine or cluster that runs."""
        if self.slurm:
            job = self.slurm
            return [{"CPU": float(job.cpus_per_task), "GPU": float(job.gpus_per_node)}] * job.nodes
        if self.kuberay:
            pods = [self.kuberay.head, *[self.kuberay.worker] * self.kuberay.workers]
            return [{"CPU": float(pod.cpus), "GPU": float(pod.gpus)} for pod in pods]
        if self.ray_up and self.ray_up.worker.resources:
            found = self.ray_up.worker.resources
            node = {key: float(found.get(key, 0)) for key in ("CPU", "GPU")}
            return [node] * self.ray_up.worker.max_workers
        return None

    def text(self) -> str:
        """YAML from which the same profile is read; variables are replaced by their values."""
        return write_yaml(self.model_dump(mode="json", exclude_defaults=True))


LOCAL = Profile(name="local", kind="local")


def built_in() -> list[str]:
    """The names of the profiles of the harness."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: the name of a profile of the harness, such as ``slurm``, or the path of a YAML file.

    Raises:
        UserError: there is no such profile, or it is invalid; the message says where, what was found and what is
            allowed.
    """
    given = str(name_or_path)
    if given in built_in():
        path = BUILT_IN / f"{given}.yaml"
    elif Path(given).suffix in (".yaml", ".yml"):
        path = Path(given)
    else:
        allowed = did_you_mean(given, built_in())
        raise UserError(f"profile: found {given!r}, which is no profile of the harness and no YAML file; {allowed}")
    content, top = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping; allowed keys: {', '.join(Profile.model_fields)}")
    if "kind" in content and content["kind"] not in get_args(Kind):
        allowed = did_you_mean(str(content["kind"]), get_args(Kind))
        raise UserError(f"{top / 'kind'}: found {content['kind']!r}; {allowed}")
    profile = check(Profile, {"name": path.stem, **content}, top)
    _check_kind(profile, top)
    return profile


def _check_kind(profile: Profile, top: Cursor) -> None:
    """Check that the keys are those of the profile's kind.

    Raises:
        UserError: one is missing or of another kind, or a value may be a secret.
    """
    own = {"ray": ("address", "job_server"), "slurm": ("slurm",), "kuberay": ("kuberay",), "ray_up": ("ray_up",)}
    for kind, keys in own.items():
        for key in keys:
            if kind != profile.kind and getattr(profile, key) is not None:
                raise UserError(f"{top / key}: for kind {kind}, but found kind {profile.kind!r}")
    needed = [key for key in own.get(profile.kind, ()) if key != "job_server"]
    needed += ["storage"] if profile.kind in OWN_MACHINES else []
    for key in needed:
        if getattr(profile, key) is None:
            hint = ": a URL such as s3://bucket/runs, or a folder that all nodes share" if key == "storage" else ""
            raise UserError(f"{top / key}: kind {profile.kind} needs this key{hint}")
    if (ray_up := profile.ray_up) and ray_up.worker.min_workers > ray_up.worker.max_workers:
        raise UserError(
            f"{top / 'ray_up' / 'worker' / 'min_workers'}: found {ray_up.worker.min_workers}; allowed: at most "
            f"max_workers ({ray_up.worker.max_workers})"
        )
    for name in profile.env:
        if SECRET.search(name):
            raise UserError(
                f"{top / 'env' / name}: may be a secret, whose value is written nowhere; list the name under secrets"
            )
