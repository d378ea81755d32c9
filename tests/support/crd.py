"""A CustomResourceDefinition as a validator: what Kubernetes says to an object of its kind, without a Kubernetes.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/. Unknown fields are
errors, as with ``kubectl``'s strict validation. Rules in CEL (``x-kubernetes-validations``) are not evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

Json = dict[str, Any]
_INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
_TAKEN = ("type", "pattern", "enum", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
          "minimum", "maximum", "multipleOf", "uniqueItems", "title", "description")  # fmt: skip


def schema_of(definition: Json, version: str) -> Json:
    """The JSON schema of a version of a CustomResourceDefinition.

    Raises:
        ValueError: it has no such version.
    """
    spec = definition["spec"]
    found = {each["name"]: each for each in spec["versions"] if each.get("served", True)}
    if version not in found:
        raise ValueError(f"{definition['metadata']['name']}: no version {version!r}; it has {', '.join(found)}")
    root = _converted(found[version]["schema"]["openAPIV3Schema"])
    root["properties"] |= {
        "apiVersion": {"const": f"{spec['group']}/{version}"},
        "kind": {"const": spec["names"]["kind"]},
        "metadata": {"type": "object", "required": ["name"]},  # Kubernetes' own; its name is checked by the operator
    }
    return {**root, "required": [*root.get("required", []), "apiVersion", "kind", "metadata"]}


def errors_of(schema: Json, value: Json) -> list[str]:
    """What is wrong with an object, each with its path, as ``spec.rayClusterSpec: …``."""
    found = sorted(_Validator(schema).iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def _converted(schema: Mapping[str, Any]) -> Json:
    """A structural schema of Kubernetes as JSON schema."""
    result: Json = {key: schema[key] for key in _TAKEN if key in schema}
    for key in ("minimum", "maximum"):
        if schema.get(f"exclusive{key.capitalize()}") and key in result:
            result[f"exclusive{key.capitalize()}"] = result.pop(key)
    if schema.get("format") in _INTEGERS:
        low, high = _INTEGERS[schema["format"]]
        result["minimum"], result["maximum"] = (
            max(low, result.get("minimum", low)),
            min(high, result.get("maximum", high)),
        )
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    for key in ("allOf", "anyOf", "oneOf"):
        # Parts of a structural schema have no types of their own, except those of int-or-string.
        if key in schema and not schema.get("x-kubernetes-int-or-string"):
            result[key] = [_part(each) for each in schema[key]]
    if "not" in schema:
        result["not"] = _part(schema["not"])
    result |= _array(schema) if schema.get("type") == "array" else _object(schema)
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def _part(schema: Mapping[str, Any]) -> Json:
    """A part of ``allOf`` and the like, which restricts values and says nothing of unknown fields."""
    found = _converted({**schema, "x-kubernetes-preserve-unknown-fields": True})
    return {**found, "required": schema["required"]} if "required" in schema else found


def _array(schema: Mapping[str, Any]) -> Json:
    result: Json = {"items": _converted(schema["items"])} if "items" in schema else {}
    if schema.get("x-kubernetes-list-type") == "set":
        result["uniqueItems"] = True
    if schema.get("x-kubernetes-list-type") == "map":
        result["x-kubernetes-list-map-keys"] = schema["x-kubernetes-list-map-keys"]
    return result


def _object(schema: Mapping[str, Any]) -> Json:
    result: Json = {}
    fields: Mapping[str, Any] = schema.get("properties", {})
    if fields:
        result["properties"] = {name: _converted(each) for name, each in fields.items()}
    # Defaults are filled in before the object is judged.
    if required := [name for name in schema.get("required", []) if "default" not in fields.get(name, {})]:
        result["required"] = required
    more = schema.get("additionalProperties")
    unknown = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(more, Mapping):
        result["additionalProperties"] = _converted(more)
    elif schema.get("type") == "object" and more is not True and not unknown:
        result["additionalProperties"] = False
    return result


def _different_keys(_: object, keys: list[str], value: object, __: object) -> Iterator[ValidationError]:
    """The items of a list are told apart by some of their fields."""
    seen = set()
    for item in value if isinstance(value, list) else []:
        found = tuple(str(item.get(key)) for key in keys)
        if found in seen:
            yield ValidationError(f"two items with {', '.join(keys)} {', '.join(found)}")
        seen.add(found)


_Validator = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _different_keys})
