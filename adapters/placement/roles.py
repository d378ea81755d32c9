"""The role of each layer in a language model.

Roles are looked up by exact layer path: in the table of known families, in the one that ``discover`` makes for other
architectures from exact names and shapes, or in one given explicitly; never by substring.
A fused layer has several roles: a method that targets all of them gets the layer as one target (``qkv``, as the paper
counts its fused gate and up); a method that targets some of them gets one target per role, which owns a subset of the
fused layer's outputs.

Shapes: I input features, O output features.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters.placement.discovery import Discovery, discover, why_not, with_stars
from adapters.placement.families import ATTENTION, FAMILIES, FEED_FORWARD, ROLES, Fused, Table
from adapters.placement.layers import features_of, is_conv1d, is_linear
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
    part: str = "language"  # of the model: one of adapters.placement.parts.PARTS

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
        if not (isinstance(layer, nn.Linear) or is_conv1d(layer)) or not readable:
            raise UserError(
                f"layer {self.path} ({type(layer).__name__}) has no weight matrix that can be read: "
                "it is not linear, or it is quantised"
            )
        weight_OI: Tensor = weight.T if is_conv1d(layer) else weight
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
        explicit: path pattern → role, as in ``parse_roles``, instead of the known and the discovered ones.
        named: the subset of ``roles`` that the user named individually, which the model must have.

    Raises:
        UserError: the architecture is unknown (the message lists its linear layers), it lacks all of ``roles`` or one
            of ``named``, adapters cannot act on layers of these roles, or ``explicit`` does not fit it.
    """
    known = _family(language_model) if explicit is None else Discovery(parse_roles(explicit))
    found = matches(language_model, known.table)
    found = [match for match in found if not known.paths or match[0] in known.paths]
    if explicit is not None:
        _check_fit(language_model, known.table, found)
    elif not found:
        raise UserError(_unknown(language_model, known))
    has = {role for _, _, role in found if isinstance(role, str)}
    has |= {role for _, _, fused in found if isinstance(fused, Fused) for role in fused.roles}
    _check_roles(language_model, roles, named, has, known)
    config = getattr(language_model, "config", None)
    return [target for path, layer, role in found for target in targets_at(path, layer, role, roles, config)]


def _check_roles(
    language_model: nn.Module, roles: frozenset[str], named: frozenset[str], has: set[str], known: Discovery
) -> None:
    """Check that the model has the wanted roles; warn of layers that some roles would need and cannot be adapted.

    Raises:
        UserError: a role that must be there is missing, or none of ``roles`` can be adapted in all its layers.
    """
    refused = [refusal for refusal in known.refusals if refusal.roles & roles]
    partly = frozenset().union(*(refusal.roles for refusal in refused)) & roles
    why = "".join(f"\n{r.path} ({', '.join(sorted(r.roles & roles))}) cannot be adapted: {r.reason}" for r in refused)
    missing = named - has or (frozenset() if roles & has else roles)
    if missing:
        raise UserError(
            f"the {_model_type(language_model)} model has no layer with the role {', '.join(sorted(missing))}; "
            f"it has {', '.join(sorted(has))}{why}"
        )
    if named & partly or (partly and not (roles & has) - partly):
        other = ", ".join(sorted(has - partly)) or "none"
        raise UserError(
            f"the {_model_type(language_model)} model: layers with the role {', '.join(sorted(partly))} cannot all be "
            f"adapted{why}\nallowed: other roles in 'where' ({other}), or explicit roles, of the layers to adapt\n"
            f"{_as_roles(known.table)}"
        )
    if refused:
        warnings.warn(f"the {_model_type(language_model)} model is adapted without these layers:{why}", stacklevel=2)


def matches(language_model: nn.Module, table: Table) -> list[tuple[str, nn.Module, str | Fused]]:
    """Path, layer and role of every layer that matches the table, in the model's order."""
    patterns = [(re.compile(re.escape(path).replace(r"\*", "[0-9]+")), role) for path, role in table.items()]
    return [
        (path, layer, role)
        for path, layer in language_model.named_modules()
        for pattern, role in patterns
        if pattern.fullmatch(path)
    ]


def targets_at(path: str, layer: nn.Module, role: str | Fused, wanted: frozenset[str], config: Any) -> list[Target]:
    """A layer as a target, or as one of each of its roles that is wanted; none: it has no wanted role.

    Args:
        path: of the layer.
        layer: it.
        role: its role.
        wanted: roles.
        config: for the numbers of heads of a fused layer; None: its roles have equal shares.

    Raises:
        UserError: the layer cannot have that role.
    """
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
        first = next((module for module in layer.modules() if is_linear(module)), None)
        width = 0 if first is None else features_of(first)[0]
    elif role == "norm":
        shape: Any = getattr(layer, "normalized_shape", getattr(getattr(layer, "weight", None), "shape", ()))
        width = int(shape[0]) if len(shape) == 1 else 0
    elif is_linear(layer):
        return features_of(layer)
    else:
        width = 0
    if not width:
        kind = {"mlp": "a block with linear layers", "norm": "a normalisation"}.get(str(role), "a linear layer")
        raise UserError(f"layer {path} is {type(layer).__name__}, not {kind}: it cannot have the role {_text(role)}")
    return width, width


def _model_type(language_model: nn.Module) -> str:
    return str(getattr(getattr(language_model, "config", None), "model_type", type(language_model).__name__))


def _text(role: str | Fused) -> str:
    return role if isinstance(role, str) else ", ".join(role.roles)


# ── Unknown architectures


def _family(language_model: nn.Module) -> Discovery:
    model_type = _model_type(language_model)
    return Discovery(dict(FAMILIES[model_type])) if model_type in FAMILIES else discover(language_model)


def _unknown(language_model: nn.Module, known: Discovery) -> str:
    """The error for an unknown architecture: its linear layers, and the ``roles`` argument to fill in."""
    reason = "no layer has a name that is known"
    if known.table:
        reason = f"no layer matches {next(iter(known.table))}"
    elif known.refusals:
        reason = "; ".join(f"{refusal.path}: {refusal.reason}" for refusal in known.refusals)
    linear: dict[str, str] = {}
    for path, module in language_model.named_modules():
        if is_linear(module):
            linear.setdefault(with_stars(path), "{} → {}".format(*features_of(module)))
    output = getattr(language_model, "get_output_embeddings", lambda: None)()
    proposed = {
        with_stars(path): _propose(path)
        for path, module in language_model.named_modules()
        if is_linear(module) and module is not output and why_not(language_model, path) is None
    }
    return (
        f"language model of type {_model_type(language_model)!r}: its layer roles are unknown; {reason}\n"
        f"its linear layers: {', '.join(f'{path} ({shape})' for path, shape in linear.items())}\n"
        "set the roles explicitly: q, k, v, o, gate, up, down; [q, k, v] or [gate, up] for a fused layer with "
        "concatenated outputs; {roles: [q, k, v], per_head: true} for one with outputs grouped by head; mlp for the "
        f"whole block, norm; omit layers that adapters must not change\n{_as_roles(proposed)}"
    )


def _as_roles(table: Table) -> str:
    """Lines to copy, in Python and in an experiment, of the linear layers whose roles can be written explicitly."""
    proposed: dict[str, Any] = {}
    for path, role in table.items():
        if isinstance(role, str) and role not in {"mlp", "norm"}:
            proposed[path] = role
        elif isinstance(role, Fused) and role.sizes is None and not role.per_head:
            proposed[path] = list(role.roles)
    in_yaml = ", ".join(f"{path}: {role}" for path, role in proposed.items())
    return f"in Python: roles={json.dumps(proposed)}\nin an experiment: backbone: {{roles: {{{in_yaml}}}}}"


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
        paths = [path for path, _, _ in matches(language_model, {pattern: table[pattern]})]
        if not paths:
            known = {with_stars(path) for path, _ in language_model.named_modules() if path}
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
        reason = why_not(language_model, path)
        if reason is not None:
            raise UserError(f"layer roles: {path} cannot have the role {_text(role)}: {reason}")
        targets_at(path, layer, role, ROLES, config)
