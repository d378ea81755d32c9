"""The manifest against KubeRay's published definition, where a copy of it is given; its text is not ours to keep.

``KUBERAY_CRD=ray.io_rayjobs.yaml pytest tests/clusters/launch/test_crd.py``; it is in KubeRay's Helm chart
(``helm show crds kuberay/kuberay-operator``) and in every cluster that has the operator
(``kubectl get crd rayjobs.ray.io -o yaml``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusters.launch.launchers import LAUNCHERS
from tests.support.crd import errors_of, schema_of
from tests.support.launching import PROFILES, job, written_profile

DEFINITION = """\
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: boats.example.com}
spec:
  group: example.com
  names: {kind: Boat}
  versions:
  - name: v1
    served: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          apiVersion: {type: string}
          kind: {type: string}
          metadata: {type: object}
          spec:
            type: object
            required: [crew, flag]
            properties:
              crew: {type: integer, format: int32, minimum: 0, exclusiveMinimum: true}
              flag: {type: string, default: none}
              name: {type: string, nullable: true, enum: [Anna, null]}
              draught:
                anyOf: [{type: integer}, {type: string}]
                pattern: ^[0-9]+(m|cm)?$
                x-kubernetes-int-or-string: true
              labels: {type: object, additionalProperties: {type: string}}
              anything: {type: object, x-kubernetes-preserve-unknown-fields: true}
              sails:
                type: array
                maxItems: 3
                items: {type: object, required: [name], properties: {name: {type: string}, area: {type: number}}}
                x-kubernetes-list-type: map
                x-kubernetes-list-map-keys: [name]
"""


def boat(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "example.com/v1", "kind": "Boat", "metadata": {"name": "anna"}, "spec": spec}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"crew": 2}, []),  # the flag has a default
        ({"crew": 2, "name": None, "draught": 3, "labels": {"a": "b"}, "anything": {"x": [1]}}, []),
        ({"crew": 2, "draught": "30cm", "sails": [{"name": "jib"}, {"name": "main", "area": 1.5}]}, []),
        ({}, ["spec: 'crew' is a required property"]),
        ({"crew": 0}, ["spec.crew: 0 is less than or equal to the minimum of 0"]),
        ({"crew": 2**31}, [f"spec.crew: {2**31} is greater than the maximum of {2**31 - 1}"]),
        ({"crew": "2"}, ["spec.crew: '2' is not of type 'integer'"]),
        ({"crew": 2, "draught": 1.5}, ["spec.draught: 1.5 is not of type 'integer', 'string'"]),
        ({"crew": 2, "draught": "deep"}, ["spec.draught: 'deep' does not match '^[0-9]+(m|cm)?$'"]),
        ({"crew": 2, "labels": {"a": 1}}, ["spec.labels.a: 1 is not of type 'string'"]),
        ({"crew": 2, "Flag": "x"}, ["spec: Additional properties are not allowed ('Flag' was unexpected)"]),
        ({"crew": 2, "sails": [{"name": "a"}, {"name": "a"}]}, ["spec.sails: two items with name a"]),
        ({"crew": 2, "sails": [{"area": 1}]}, ["spec.sails.0: 'name' is a required property"]),
    ],
)
def test_a_definition_judges_as_kubernetes_does(spec: dict[str, Any], says: list[str]) -> None:
    schema = schema_of(yaml.safe_load(DEFINITION), "v1")
    assert errors_of(schema, boat(**spec)) == says


def test_the_version_and_the_kind_are_judged_too() -> None:
    definition = yaml.safe_load(DEFINITION)
    assert errors_of(schema_of(definition, "v1"), {**boat(crew=1), "kind": "Ship"}) == ["kind: 'Boat' was expected"]
    with pytest.raises(ValueError, match=r"boats\.example\.com: no version 'v2'; it has v1"):
        schema_of(definition, "v2")


def test_the_manifest_is_valid_by_the_published_definition(tmp_path: Path) -> None:
    path = os.environ.get("KUBERAY_CRD")
    if path is None:
        pytest.skip("KUBERAY_CRD is not set: the path of a copy of ray.io_rayjobs.yaml")
    schema = schema_of(yaml.safe_load(Path(path).read_text(encoding="utf-8")), "v1")
    made = job(tmp_path, written_profile(tmp_path, PROFILES["kuberay"]), output="s3://bucket/runs")
    _, manifest = yaml.safe_load_all(LAUNCHERS["kuberay"].render(made)["rayjob.yaml"])
    assert errors_of(schema, manifest) == []
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "two"
    assert errors_of(schema, manifest) == [
        "spec.rayClusterSpec.workerGroupSpecs.0.replicas: 'two' is not of type 'integer'"
    ]
