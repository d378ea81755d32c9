"""A typed subset of KubeRay's RayJob and of Kubernetes' pod template: the fields that the harness renders.

Names, types and required fields as in KubeRay's API reference (https://ray-project.github.io/kuberay/reference/api/,
ray.io/v1) and Kubernetes' (https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.34/). The published
definition is in no package of PyPI, npm or Debian; tests/clusters/launch/test_crd.py takes a copy of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
ConfigName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$")]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _KeyRef(_Object):
    name: ConfigName
    key: str


class _From(_Object):
    secretKeyRef: _KeyRef


class _Variable(_Object):
    name: str
    value: str | None = None
    valueFrom: _From | None = None


class _Resources(_Object):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class _Mount(_Object):
    name: Name
    mountPath: Annotated[str, Field(pattern=r"^/[^:]*$")]


class _Container(_Object):
    name: Name
    image: str
    env: list[_Variable] = []
    resources: _Resources
    volumeMounts: list[_Mount] = []


class _Claim(_Object):
    claimName: ConfigName


class _Item(_Object):
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]
    path: Annotated[str, Field(pattern=r"^[^/]")]


class _ConfigMap(_Object):
    name: ConfigName
    items: list[_Item] = []


class _Volume(_Object):
    name: Name
    persistentVolumeClaim: _Claim | None = None
    configMap: _ConfigMap | None = None


class _PodSpec(_Object):
    containers: Annotated[list[_Container], Field(min_length=1)]
    volumes: list[_Volume] = []
    serviceAccountName: ConfigName | None = None
    nodeSelector: dict[str, str] = {}


class _PodTemplate(_Object):
    spec: _PodSpec


class _Group(_Object):
    rayStartParams: dict[str, str]
    template: _PodTemplate


class _WorkerGroup(_Group):
    groupName: Name
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=0)]


class _Authentication(_Object):
    mode: Literal["disabled", "token"]


class _Cluster(_Object):
    rayVersion: str
    authOptions: _Authentication
    headGroupSpec: _Group
    workerGroupSpecs: list[_WorkerGroup]


class _Spec(_Object):
    entrypoint: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    rayClusterSpec: _Cluster


class _Metadata(_Object):
    # The operator's own rules, which its definition does not have: a letter first, and room for what it appends.
    name: Annotated[Name, Field(pattern=r"^[a-z]", max_length=47)]
    namespace: Name


class RayJobManifest(_Object):
    """A RayJob as the harness renders it."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: _Metadata
    spec: _Spec
