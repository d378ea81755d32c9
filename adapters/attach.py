"""Attaches adapters to a language model by hooks, so that detaching restores the model.

Parameters stay outside the model, as ``layers.<path>.changes.<method>.deltas.group_<name>.<parameter>``.
Shapes: B rows, T positions, I input features, O output features, D whichever of the two is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from adapters.base import AdapterMethod, Change, Delta, ModelChange
from adapters.one_input import ROLES, OneInput
from adapters.placement.checkpointing import Checkpointing
from adapters.placement.first_pass import Passes, check_axes, input_of
from adapters.placement.four_bit import FourBit
from adapters.placement.offload import device_of, dtype_of
from adapters.placement.own_forward import OwnForward, is_bare_linear
from adapters.placement.parts import check_part, targets_of_part
from adapters.placement.roles import Target, find_targets
from adapters.placement.router import Layout, Router
from adapters.placement.row_order import check_row_order
from harness.core.errors import UserError


class AdaptedLayer(nn.Module):
    """The changes of one layer, or of one role's part of a fused layer, and the hooks that apply them."""

    rows_D: Tensor | None

    def __init__(
        self,
        target: Target,
        changes: Mapping[str, Change],
        router: Router,
        passes: Passes | None = None,
        owner: str | None = None,
    ) -> None:
        super().__init__()
        self.owner = owner  # in a tower or connector, the group of all its tokens
        self.changes = nn.ModuleDict(changes)
        self.router = router
        self.passes = passes or Passes(())
        self.target = target
        rows = None if target.rows is None else torch.tensor(target.rows)
        self.register_buffer("rows_D", rows, persistent=False)  # this role's outputs of a fused layer
        self._probe = tuple(self.parameters())[:1]  # tells where the parameters are; in a tuple: not registered again
        self.one_input: OneInput | None = None  # where changes may be computed together with the layer
        self._place = 0
        self.together = True  # whether changes may be computed together with the layer
        self._of = {name: tuple(c for c in changes.values() if c.acts_on == name) for name in ("input", "output")}
        for change in changes.values():
            router.prepare_lookup(change.groups)

    def attach(self, layer: nn.Module) -> list[RemovableHandle | OwnForward]:
        """Register only the hooks that some change needs; take over the forward that one may compute with its own."""
        handles: list[RemovableHandle | OwnForward] = []
        first = next(iter(self._of["output"]), None)
        joint = first is not None and type(first).with_layers is not Change.with_layers
        self.one_input = None
        if joint and self.rows_D is None and is_bare_linear(layer):
            self.reads(OneInput([self.part(layer)]), 0)
            handles.append(OwnForward(layer, self._forward))
        elif first is not None:
            handles.append(layer.register_forward_hook(self._after))
        if self._of["input"]:
            handles.append(layer.register_forward_pre_hook(self._before))
        return handles

    def part(self, layer: Any) -> tuple[nn.Linear, Change]:
        """The layer and the first change of its output."""
        return layer, self._of["output"][0]

    def reads(self, one_input: OneInput, place: int) -> None:
        """The layer reads what others do, of which it is the one at ``place``."""
        self.one_input, self._place = one_input, place

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTI = input_of(self.target.path, args)
        return (self._change(module, "input", x_BTI, x_BTI), *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], y_BTO: Any) -> Tensor:
        return self._change(module, "output", input_of(self.target.path, args, y_BTO), y_BTO)

    def _forward(self, *args: Any) -> Tensor:
        return self._change(self.target.layer, "output", input_of(self.target.path, args), None)

    def _layout(self, x_BTI: Tensor) -> Layout:
        """The layout of the pass, which must fit the layer's input, (B, T, I) or flattened (B × T, I)."""
        if torch.compiler.is_compiling() and self.owner is None:
            return self.router.layout
        try:
            if self.owner is not None:
                return self.router.of_one_group(self.owner, x_BTI.shape[1], x_BTI.device)
            layout = self.router.layout
        except UserError as error:
            raise UserError(f"layer {self.target.path}: {error}") from None
        check_axes(self.target.path, x_BTI, self.passes, layout.length)
        self.passes.ran(self.target.path)
        return layout

    def _change(self, module: Any, acts_on: str, x_BTI: Tensor, value_BTD: Tensor | None) -> Tensor:
        """The changed value; None: the output that the layer has yet to compute."""
        axes = x_BTI.shape[:-1]
        if self.owner is not None and len(axes) != 2:  # Qwen's towers have the tokens of all pictures in one axis
            if self.one_input is not None and len(self.one_input.parts) > 1:
                self.reads(OneInput([self.part(module)]), 0)  # layers that read the same do not get the same view of it
            x_BTI = x_BTI.reshape(1, -1, x_BTI.shape[-1])
            value_BTD = None if value_BTD is None else value_BTD.reshape(1, -1, value_BTD.shape[-1])
            return self._changed(module, acts_on, x_BTI, value_BTD, self._layout(x_BTI)).view(*axes, -1)
        layout = self._layout(x_BTI)
        if x_BTI.dim() > 2:
            return self._changed(module, acts_on, x_BTI, value_BTD, layout)
        # OPT flattens rows and positions before its feed-forward layers
        x_BTI = x_BTI.view(-1, layout.length, x_BTI.shape[-1])
        if value_BTD is not None:
            value_BTD = value_BTD.view(-1, layout.length, value_BTD.shape[-1])
        return self._changed(module, acts_on, x_BTI, value_BTD, layout).flatten(0, 1)

    def _changed(self, module: Any, acts_on: str, x_BTI: Tensor, value_BTD: Tensor | None, layout: Layout) -> Tensor:
        if self.training != module.training:  # the caller may switch the base alone; dropout follows it
            self.train(module.training)
        device = x_BTI.device if value_BTD is None else value_BTD.device
        if layout.group_ids_XT.device != device:  # the model's layers are on several devices
            layout = layout.on(device)
        if x_BTI.device != device:  # accelerate moves inputs inside the layer
            x_BTI = x_BTI.to(device)
        if self._probe and self._probe[0].device != device:  # the base was moved without its adapters
            self.to(device)
        changes = self._of[acts_on]
        if value_BTD is None:
            joint = self.one_input if self.together and _in_python() else None
            value_BTD = None if joint is None else joint.output(self._place, x_BTI, layout)
            if value_BTD is None:
                value_BTD = F.linear(x_BTI, module.weight, module.bias)
            else:
                changes = changes[1:]
        rows_D = self.rows_D if acts_on == "output" else None
        whole_BTD = value_BTD
        if rows_D is not None:
            value_BTD = value_BTD.index_select(-1, rows_D)
        for change in changes:
            value_BTD = change(x_BTI, value_BTD, layout)
            if value_BTD is None:  # a hook that returns None leaves the layer's output as it is
                raise ValueError(f"layer {self.target.path}: {type(change).__name__} returned None; allowed: a tensor")
        return value_BTD if rows_D is None else whole_BTD.index_copy(-1, rows_D, value_BTD)


def _in_python() -> bool:
    """Whether autograd functions may be called as they are: not compiled, nor transformed by torch.func."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


@dataclass
class _Use:
    """A method with one set of options and the groups that use it."""

    method: AdapterMethod
    groups: list[str] = field(default_factory=list)


class Adapters(nn.Module):
    """All adapter parameters of one language model, kept outside the model.

    Args:
        language_model: a Hugging Face causal LM; its own parameters are not changed.
        methods: group → method.
        router: provides the groups, and the layout of each pass.
        seed: of the initialisation; groups and layers are initialised in a fixed order.
        ungrouped: a method without groups (full fine-tuning, another attention), instead of ``methods``.
        roles: path pattern → role, for an architecture that is not in the table of known families.
        shared_group: of ``methods``, the group that acts on every token beside the token's own; None: there is none.
        medium_group: the group of the tokens of a vision or audio tower, where ``where`` names parts; None: none.

    Raises:
        UserError: the architecture is unknown, lacks a role or part that the user named, or a method acts on no layer.
    """

    def __init__(
        self,
        language_model: nn.Module,
        methods: Mapping[str, AdapterMethod],
        router: Router,
        seed: int,
        ungrouped: AdapterMethod | None = None,
        roles: Mapping[str, Any] | None = None,
        shared_group: str | None = None,
        medium_group: str | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.groups = (*((shared_group,) if shared_group else ()), *router.groups)
        self._named = roles is not None
        generator = torch.Generator().manual_seed(seed)
        uses = _uses(methods, ungrouped)
        targets: dict[str, Target] = {}
        deltas: dict[tuple[str, str], dict[str, Delta]] = {}  # (layer, method) → group → delta
        of_method: dict[str, dict[str, Target]] = {}
        for use in uses.values():
            _check_parts(language_model, use, medium_group)
        for name, group in [(name, group) for name, use in uses.items() for group in use.groups]:
            method = uses[name].method
            for target in _targets(language_model, method, roles, group in (medium_group, shared_group)):
                targets[target.key] = of_method.setdefault(name, {})[target.key] = target
                deltas.setdefault((target.key, name), {})[group] = method.delta(target, generator)
        _check_not_behind_an_encoder(language_model, (target.path for target in targets.values()))
        shared = {name: uses[name].method.shared([*found.values()], generator) for name, found in of_method.items()}
        self.shared = nn.ModuleDict({name: module for name, module in shared.items() if module is not None})
        self.passes = Passes(target.path for target in targets.values() if target.part == "language")
        self.layers = nn.ModuleDict()
        for key, target in targets.items():
            changes: dict[str, Change] = {}
            for name, use in uses.items():
                own = deltas.get((key, name), {})
                common = own.pop(shared_group, None) if shared_group else None
                for delta in own.values():
                    delta.below = () if common is None else (common,)
                if own:
                    changes[name] = use.method.change(target, own, shared.get(name), generator)
                if shared_group and common is not None:
                    changes[name].add_shared(shared_group, common)
            owner = None if target.part == "language" else medium_group
            self.layers[key] = AdaptedLayer(target, changes, router, self.passes, owner)
        built = {
            name: use.method.model_change(language_model, tuple(use.groups), router, shared.get(name), generator)
            for name, use in uses.items()
        }
        self.model_changes = nn.ModuleDict({name: change for name, change in built.items() if change is not None})
        for name, use in uses.items():
            acts = any(there.roles() for there in use.method.by_part().values())
            if use.groups and not acts and name not in self.model_changes:
                raise UserError(
                    f"{use.method.label()} acts on no layer with these options: {use.method.config!r}; "
                    "'where' must include a role that the method acts on"
                )
        self._undo: list[Callable[[], None]] = []

    def place(self, language_model: Any) -> None:
        """Put each layer's adapters on the device of their layer, in fp32 (float64 on a float64 layer)."""
        embedding = language_model.get_input_embeddings()
        self.shared.to(device_of(embedding), dtype_of(language_model))
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101 - for the type checker
            adapted = language_model.get_submodule(layer.target.path)
            layer.to(device_of(adapted), dtype_of(adapted))
        for change in self.model_changes.values():
            assert isinstance(change, ModelChange)  # noqa: S101
            change.place(language_model)

    def attach(self, language_model: nn.Module) -> None:
        """Register the hooks on the model.

        Raises:
            UserError: a layer whose role is given explicitly has positions before rows, or gradients could not pass
                through a 4-bit layer.
        """
        if self._named:
            paths = {layer.target.path for layer in self.layers.values() if isinstance(layer, AdaptedLayer)}
            self.passes.unordered = frozenset(check_row_order(language_model, paths))
        self._undo.append(FourBit(language_model).undo)
        self._undo.append(Checkpointing(language_model, self.router).undo)
        self._undo += [handle.remove for handle in self.passes.attach(language_model)]
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101 - for the type checker
            self._undo += [handle.remove for handle in layer.attach(language_model.get_submodule(layer.target.path))]
        self._join(language_model)
        for change in self.model_changes.values():
            assert isinstance(change, ModelChange)  # noqa: S101
            self._undo.append(_copied_with_the_model(change.attach(language_model)))

    def compute_together(self, wanted: bool) -> None:
        """Whether adapters may be computed together with their layers (the default), which differs by rounding only."""
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101 - for the type checker
            layer.together = wanted

    def _join(self, language_model: nn.Module) -> None:
        """Let layers of one block that read the same input compute their outputs together."""
        blocks: dict[tuple[str, frozenset[str]], list[AdaptedLayer]] = {}
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101 - for the type checker
            roles = next((roles for roles in ROLES if layer.target.role in roles), None)
            if layer.one_input is not None and roles is not None:
                blocks.setdefault((layer.target.path.rpartition(".")[0], roles), []).append(layer)
        for layers in blocks.values():
            parts = [layer.part(language_model.get_submodule(layer.target.path)) for layer in layers]
            if all(parts[0][1].joins(change) for _, change in parts):
                together = OneInput(parts)
                for place, layer in enumerate(layers):
                    layer.reads(together, place)

    def detach(self) -> None:
        """Remove the hooks: the model computes what it did before."""
        while self._undo:
            self._undo.pop()()

    def changes(self) -> Iterator[Change]:
        """All methods' changes of all layers."""
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101
            for change in layer.changes.values():
                assert isinstance(change, Change)  # noqa: S101
                yield change

    def deltas_of(self, group: str) -> Iterator[tuple[str, Target, Delta]]:
        """Per layer that the group's methods adapt: the method's name, the layer, and the group's parameters for it."""
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101 - for the type checker
            for name, change in layer.changes.items():
                assert isinstance(change, Change)  # noqa: S101
                if change.has(group):
                    yield name, layer.target, change.delta(group)

    def shared_of(self, group: str) -> nn.Module:
        """What the layers of the group's first method share; the same method with other options has another name."""
        return self.shared.get_submodule(next(name for name, _, _ in self.deltas_of(group)))

    def parameters_by_group(self) -> dict[str, int]:
        """Group → its number of trainable parameters, without parameters that groups share."""
        counts = {group: sum(count_trainable(delta) for _, _, delta in self.deltas_of(group)) for group in self.groups}
        for model_change in self.model_changes.values():
            assert isinstance(model_change, ModelChange)  # noqa: S101
            for group, module in model_change.by_group().items():
                counts[group] += count_trainable(module)
        return counts

    def parameters_by_role(self) -> dict[str, int]:
        """Role → number of trainable parameters on its layers; ``model`` → those that are not in a layer."""
        counts: dict[str, int] = {}
        for layer in self.layers.values():
            assert isinstance(layer, AdaptedLayer)  # noqa: S101
            part = layer.target.part
            role = layer.target.role if part == "language" else f"{part} {layer.target.role}"
            counts[role] = counts.get(role, 0) + count_trainable(layer)
        elsewhere = count_trainable(self.shared) + count_trainable(self.model_changes)
        return {**counts, "model": elsewhere} if elsewhere else counts


def _targets(language_model: nn.Module, method: AdapterMethod, roles: Any, of_medium: bool) -> list[Target]:
    """The layers that a method acts on for one group, which may be that of the tower's tokens."""
    found: list[Target] = []
    for part, there in method.by_part().items():
        if part == "language" and there.roles():
            found += find_targets(language_model, there.roles(), roles, there.named_roles())
        elif part != "language" and of_medium:
            found += targets_of_part(language_model, part, there.roles(), there.named_roles())
    return found


def _check_not_behind_an_encoder(model: Any, paths: Iterable[str]) -> None:
    """Check that layers see the tokens of ``input_ids``: those of a decoder that has an encoder see its own.

    Raises:
        UserError: one does not.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    decoder = set(model.get_decoder().modules())
    behind = next((path for path in paths if model.get_submodule(path) in decoder), None)
    if behind is not None:
        raise UserError(
            f"layer {behind}: the decoder of a {type(model).__name__} has tokens of its own, of which context_ids, "
            "those of the encoder's, do not tell; allowed: a causal language model, or explicit roles of the encoder's "
            "layers"
        )


def _check_parts(model: nn.Module, use: _Use, medium_group: str | None) -> None:
    """Check that a method can act on the towers and connectors that it is asked for.

    Raises:
        UserError: it cannot, the model has no such part, or no group of the method's owns its tokens.
    """
    for part, there in use.method.by_part().items():
        if part == "language":
            continue
        medium = check_part(model, part)
        if use.method.joins_groups:
            raise UserError(
                f"where: {part}: {use.method.label()} joins the tokens of several contexts, and those of this part are "
                "of one; allowed: language"
            )
        if not there.roles():
            raise UserError(f"where: {part}: {use.method.label()} acts on no layer there; leave it out")
        if medium_group not in use.groups:
            found = f"no adapter of {use.method.label()}" if medium_group is None else f"the group {medium_group!r}"
            raise UserError(
                f"where: {part}: its tokens have {found}; name their context in contexts_from ({medium.token}), and "
                "give its group this method"
            )


def _copied_with_the_model(undo: Callable[[], None]) -> Callable[[], None]:
    """``undo``, or in the place of a closure an object that cannot be copied: its copy would act on the original."""
    return _Closure(undo) if isinstance(undo, FunctionType) and undo.__closure__ else undo


class _Closure:
    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __call__(self) -> None:
        self._undo()

    def __reduce__(self) -> Any:
        raise UserError(
            f"a model with this adapter cannot be copied or pickled: {self._undo.__qualname__} is a closure; "
            "ModelChange.attach should return a method or a functools.partial"
        )


def count_trainable(module: nn.Module) -> int:
    """Number of trainable parameters, each counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _uses(methods: Mapping[str, AdapterMethod], ungrouped: AdapterMethod | None) -> dict[str, _Use]:
    """Name → method and its groups. Groups that use a method with the same options share one entry."""
    uses: dict[str, _Use] = {}
    wanted: Sequence[tuple[str | None, AdapterMethod]] = [
        *((group, part) for group, method in methods.items() for part in method.parts),
        *((None, part) for part in (ungrouped.parts if ungrouped else ())),
    ]
    for group, part in wanted:
        same = [u for u in uses.values() if type(u.method) is type(part) and u.method.config == part.config]
        if same:
            use = same[0]
        else:
            taken = sum(use.method.name == part.name for use in uses.values())
            use = uses.setdefault(part.name if not taken else f"{part.name}_{taken + 1}", _Use(part))
        if group is not None and part.grouped:
            use.groups.append(group)
    return uses
