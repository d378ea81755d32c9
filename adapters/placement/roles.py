"""The role of each layer in a language model.

Roles are looked up by exact layer path, in the table of known families or in one given explicitly, never by substring.
A fused layer has several roles: a method that targets all of them gets the layer as one target (``qkv``, as the paper
counts its fused gate and up); a method that targets some of them gets one target per role, which owns a subset of the
fused layer's outputs.

Shapes: I input features, O output features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.placement.families import ATTENTION, FAMILIES, FEED_FORWARD, ROLES, Fused, Table
from adapters.placement.offload import tensor_of
from harness.core.errors import UserError, did_you_mean

__all__ = ["ATTENTION", "FAMILIES", "FEED_FORWARD", "ROLES", "Fused", "Target", "find_targets", "parse_roles"]
_FUSABLE = (frozenset({"q", "k", "v"}), frozenset({"gate", "up"}))
_PLACEHOLDER = "ROLE"  # in the roles that an error suggests, where no role can be guessed


@dataclass(frozen=True)
class Target:
    """A layer that an adapter can act on, or one role's part of a fused layer."""

    path: str  # module path in the language model: "model.layers.0.self_attn.q_proj"
    role: str
    in_features: int  # for a norm or a whole feed-forward block: its width
    out_features: int
    rows: tuple[int, ...] | None = None  # indices of the fused layer's outputs that belong to this role; None: all
    layer: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Unique name without dots, which submodule names must not contain."""
        return self.path.replace(".", "/") + ("" if self.rows is None else f":{self.role}")

    def weight(self) -> Tensor:
        """The layer's weight (O, I), transposed if the layer stores it as (I, O).

        Raises:
            UserError: the layer is not linear or its weight is quantised.
        """
        layer = self.layer
        weight = tensor_of(layer, "weight")
        # 8-bit integers and floats cannot be interpreted without their scales.
        readable = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
        if not isinstance(layer, nn.Linear | Conv1D) or not readable:
            raise UserError(
                f"layer {self.path} ({type(layer).__name__}) has no weight matrix that can be read: "
                "it is not linear, or it is quantised"
            )
        weight_OI: Tensor = weight.T if isinstance(layer, Conv1D) else weight
        return weight_OI if self.rows is None else weight_OI[torch.as_tensor(self.rows, device=weight_OI.device)]


def find_targets(
    language_model: nn.Module,
    roles: frozenset[str],
    explicit: Mapping[str, Any] | None = None,
    named: frozenset[str] = frozenset(),
) -> list[Target]:
    """The layers that have one of ``roles``, in the model's order.

    Args:
        language_model: a Hugging Face causal LM.
        roles: roles to find; the model may lack some of them (OPT has no gate).
        explicit: path pattern → role, as in ``parse_roles``, instead of the table of known families.
        named: the subset of ``roles`` that the user named individually, which the model must have.

    Raises:
        UserError: the architecture is unknown (the message lists its linear layers), it lacks all of ``roles`` or one
            of ``named``, or ``explicit`` does not fit it.
    """
    table = _family(language_model) if explicit is None else parse_roles(explicit)
    found = _matches(language_model, table)
    if explicit is not None:
        _check_fit(language_model, table, found)
    elif not found:
        raise UserError(_unknown(language_model, f"no layer matches {next(iter(table))}"))
    has = {role for _, _, role in found if isinstance(role, str)}
    has |= {role for _, _, fused in found if isinstance(fused, Fused) for role in fused.roles}
    missing = named - has or (frozenset() if roles & has else roles)
    if missing:
        raise UserError(
            f"the {_model_type(language_model)} model has no layer with the role {', '.join(sorted(missing))}; "
            f"it has {', '.join(sorted(has))}"
        )
    config = getattr(language_model, "config", None)
    return [target for path, layer, role in found for target in _targets(path, layer, role, roles, config)]


def _matches(language_model: nn.Module, table: Table) -> list[tuple[str, nn.Module, str | Fused]]:
    """Path, layer and role of every layer that matches the table, in the model's order."""
    patterns = [(re.compile(re.escape(path).replace(r"\*", "[0-9]+")), role) for path, role in table.items()]
    return [
        (path, layer, role)
        for path, layer in language_model.named_modules()
        for pattern, role in patterns
        if pattern.fullmatch(path)
    ]


def _targets(path: str, layer: nn.Module, role: str | Fused, wanted: frozenset[str], config: Any) -> list[Target]:
    inside, outside = _features(path, layer, role)
    if isinstance(role, str):
        return [Target(path, role, inside, outside, layer=layer)] if role in wanted else []
    rows = role.rows(path, outside, config)
    if set(role.roles) <= wanted:
        return [Target(path, role.name, inside, outside, layer=layer)]
    return [Target(path, r, inside, len(rows[r]), rows[r], layer) for r in role.roles if r in wanted]


def _features(path: str, layer: nn.Module, role: str | Fused) -> tuple[int, int]:
    """Input and output features.

    Raises:
        UserError: the layer cannot have that role.
    """
    if role == "mlp":  # it adds to the residual stream, so its output is as wide as its input
        first = next((module for module in layer.modules() if _is_linear(module)), None)
        width = 0 if first is None else _linear_features(first)[0]
    elif role == "norm":
        shape: Any = getattr(layer, "normalized_shape", getattr(getattr(layer, "weight", None), "shape", ()))
        width = int(shape[0]) if len(shape) == 1 else 0
    elif _is_linear(layer):
        return _linear_features(layer)
    else:
        width = 0
    if not width:
        kind = {"mlp": "a block with linear layers", "norm": "a normalisation"}.get(str(role), "a linear layer")
        raise UserError(f"layer {path} is {type(layer).__name__}, not {kind}: it cannot have the role {_text(role)}")
    return width, width


def _is_linear(layer: nn.Module) -> bool:
    """True for quantised layers too, which name their features as ``nn.Linear`` does."""
    return isinstance(layer, Conv1D) or (hasattr(layer, "in_features") and hasattr(layer, "out_features"))


def _linear_features(layer: Any) -> tuple[int, int]:
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (int(layer.in_features), int(layer.out_features))


def _model_type(language_model: nn.Module) -> str:
    return str(getattr(getattr(language_model, "config", None), "model_type", type(language_model).__name__))


def _text(role: str | Fused) -> str:
    return role if isinstance(role, str) else ", ".join(role.roles)


# ── Unknown architectures


def _family(language_model: nn.Module) -> Table:
    model_type = _model_type(language_model)
    if model_type not in FAMILIES:
        raise UserError(_unknown(language_model, f"known types: {', '.join(sorted(FAMILIES))}"))
    return FAMILIES[model_type]


def _unknown(language_model: nn.Module, reason: str) -> str:
    """The error for an unknown architecture: its linear layers, and the ``roles`` argument to fill in."""
    linear: dict[str, str] = {}
    for path, module in language_model.named_modules():
        if _is_linear(module):
            linear.setdefault(_with_stars(path), "{} → {}".format(*_linear_features(module)))
    output = getattr(language_model, "get_output_embeddings", lambda: None)()
    proposed = {
        _with_stars(path): _propose(path)
        for path, module in language_model.named_modules()
        if _is_linear(module) and module is not output
    }
    experts = {_with_stars(path) for path, _ in language_model.named_modules() if path.endswith(".experts")}
    moe = f"\nadapters inside experts ({', '.join(sorted(experts))}) are not supported" if experts else ""
    in_yaml = ", ".join(f"{path}: {role}" for path, role in proposed.items())
    return (
        f"language model of type {_model_type(language_model)!r}: its layer roles are unknown; {reason}\n"
        f"its linear layers: {', '.join(f'{path} ({shape})' for path, shape in linear.items())}{moe}\n"
        "set the roles explicitly: q, k, v, o, gate, up, down; [q, k, v] or [gate, up] for a fused layer with "
        "concatenated outputs; {roles: [q, k, v], per_head: true} for one with outputs grouped by head; mlp for the "
        "whole block, norm; omit layers that adapters must not change\n"
        f"in Python: roles={json.dumps(proposed)}\n"
        f"in an experiment: backbone: {{roles: {{{in_yaml}}}}}"
    )


def _with_stars(path: str) -> str:
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", path)


def _propose(path: str) -> str:
    """The role of a linear layer of this name in the known families, if they agree; only suggested, never applied."""
    names = path.split(".")
    for end in (".".join(["", *names[-2:]]), f".{names[-1]}"):
        known = {role for table in FAMILIES.values() for name, role in table.items() if name.endswith(end)}
        role = known.pop() if len(known) == 1 else _PLACEHOLDER
        if isinstance(role, str) and role != _PLACEHOLDER:
            return role
    return _PLACEHOLDER


# ── Explicit roles


def parse_roles(explicit: Mapping[str, Any]) -> dict[str, str | Fused]:
    """Explicit roles, validated as far as possible without a model.

    Args:
        explicit: path pattern, where * matches a number → role; or the list of roles of a fused layer, in the order of
            its outputs; or ``{"roles": [...], "per_head": True}`` if the outputs are grouped by head.

    Raises:
        UserError: the mapping has another form, or a role is unknown.
    """
    if not isinstance(explicit, Mapping) or not explicit:
        raise UserError(f"layer roles: found {explicit!r}; allowed: a mapping, path pattern → role")
    for pattern in explicit:
        if not isinstance(pattern, str):
            raise UserError(
                f"layer roles: found the path pattern {pattern!r}; allowed: a string such as 'layers.*.fc1'"
            )
    return {pattern: _parse_role(pattern, value) for pattern, value in explicit.items()}


def _parse_role(pattern: str, value: Any) -> str | Fused:
    where = f"layer roles: {pattern}"
    per_head = False
    if isinstance(value, Mapping):
        if set(value) != {"roles", "per_head"} or not isinstance(value["per_head"], bool):
            raise UserError(f"{where}: found {dict(value)}; allowed: keys roles (a list) and per_head (true or false)")
        value, per_head = value["roles"], value["per_head"]
    several = isinstance(value, Sequence) and not isinstance(value, str)
    for role in value if several else [value]:
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{where}: unknown role {role!r}; {did_you_mean(str(role), ROLES)}")
    if not several and not per_head:
        return str(value)
    allowed = _FUSABLE[:1] if per_head else _FUSABLE
    if not several or len(value) < 2 or len(set(value)) < len(value) or not any(set(value) <= a for a in allowed):
        raise UserError(
            f"{where}: found {value!r}; allowed for a fused layer: several of q, k and v, or gate and up (not per head)"
        )
    return Fused(tuple(value), per_head)


def _check_fit(language_model: nn.Module, table: Table, found: Sequence[tuple[str, nn.Module, str | Fused]]) -> None:
    """Check that every pattern matches a layer, no layer matches two, and every layer can have its role.

    Raises:
        UserError: one of these does not hold.
    """
    patterns_of: dict[str, list[str]] = {}
    for pattern in table:
        paths = [path for path, _, _ in _matches(language_model, {pattern: table[pattern]})]
        if not paths:
            known = {_with_stars(path) for path, _ in language_model.named_modules() if path}
            raise UserError(
                f"layer roles: {pattern} matches no layer of this {_model_type(language_model)} model "
                f"(* matches a number); {did_you_mean(pattern, known)}"
            )
        for path in paths:
            patterns_of.setdefault(path, []).append(pattern)
    twice = next((f"{path} matches {' and '.join(p)}" for path, p in patterns_of.items() if len(p) > 1), None)
    if twice:
        raise UserError(f"layer roles: {twice}; each layer must match one entry")
    config = getattr(language_model, "config", None)
    for path, layer, role in found:
        _targets(path, layer, role, ROLES, config)
