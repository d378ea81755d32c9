"""One training step of a trial's model, traced without values: what it saves, needs and computes.

The model and the batch are fake tensors (``torch._subclasses.FakeTensorMode``): every operation runs with its shapes
and types only, by the rules of a CPU. So the result is exact for any model and adapter, in about half a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.batch import Batch
from harness.model.build import compute_as, empty_model
from harness.model.components import empty_encoders, method_of
from harness.model.packed import count, packed_layers, scale_bytes
from harness.model.tower import Tower
from harness.price.flops import FORMULAS


@dataclass(frozen=True)
class Traced:
    """One forward and backward pass on a batch, and the model that made it. A method's stages have one each.

    Attributes:
        weights: elements of all parameters.
        trained: elements of the trained parameters.
        tensors: number of the trained parameters.
        weights_bytes, trained_bytes: of the same; a frozen base may have another dtype than what is trained.
        activations_bytes: saved for backward; a storage counts once, parameters do not count.
        working_bytes: the most that was alive at once besides the parameters and their gradients.
        forward_flops, step_flops: of forward; of forward and backward together.
        forward_operations, step_operations: calls of a kernel.
        positions: rows times columns of the batch.
        row_positions: its columns.
        drawn: operations of forward that draw random numbers: dropout.
    """

    weights: int
    trained: int
    tensors: int
    weights_bytes: int
    trained_bytes: int
    activations_bytes: int
    working_bytes: int
    forward_flops: int
    step_flops: int
    forward_operations: int
    step_operations: int
    positions: int
    row_positions: int
    drawn: int


def trace(spec: TrialSpec, batch: Batch, resources: Resources | None = None) -> list[Traced]:
    """Trace one step of each of a trial's stages.

    Args:
        spec: of the trial.
        batch: a worker's share.
        resources: for how the language model computes.

    Raises:
        UserError: the model cannot be built from its configuration.
        Exception: an operation of a plugin needs the values of a tensor.
    """
    encoders = empty_encoders(spec)
    stages = method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs)
    found = []
    for stage in stages:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = empty_model(spec, encoders, device="cpu").train()
            compute_as(model.language_model, resources or Resources())
            model.chunked_loss = (resources or Resources()).chunked_loss
            if spec.optimizer.bf16:
                _to_bf16(model)
            if not stage.trains_language_model:
                for name, p in model.named_parameters():
                    p.requires_grad_(p.requires_grad and name.startswith("projectors."))
            found.append(_traced(model, batch))
    return found


def _to_bf16(model: nn.Module) -> None:
    """As ``model.to(torch.bfloat16)``, which exchanges values, and fake tensors have none; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def half(x: Tensor | None) -> Any:
        if x is None or not x.is_floating_point():
            return x
        if id(x) not in made:
            y = x.detach().to(torch.bfloat16)
            made[id(x)] = nn.Parameter(y, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else y
        return made[id(x)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in list(own.items()):
                own[name] = half(x)


def _traced(model: nn.Module, batch: Batch) -> Traced:
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = [*parameters, *(x for layer in packed_layers(model) for x in layer.buffers())]
    alive, saved = _Alive(held), _Saved(held)
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with flops, alive:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x), _values_needed_by(model):
            nll_B, tokens_B = model(batch)
            loss = nll_B.sum() / tokens_B.sum()
        forward, drawn = (flops.get_total_flops(), alive.operations), alive.drawn
        loss.backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
    return Traced(
        weights=count(model),
        trained=sum(p.numel() for p in trained),
        tensors=len(trained),
        weights_bytes=sum(p.numel() * p.element_size() for p in parameters) + scale_bytes(model),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        activations_bytes=saved.bytes,
        working_bytes=max(saved.bytes, alive.most - gradients),
        forward_flops=forward[0],
        step_flops=flops.get_total_flops(),
        forward_operations=forward[1],
        step_operations=alive.operations,
        positions=batch.token_ids_BT.numel(),
        row_positions=batch.token_ids_BT.shape[1],
        drawn=drawn,
    )


@contextmanager
def _values_needed_by(model: nn.Module) -> Iterator[None]:
    """Say of a tower in the step that it looks at values, which are not there.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        tower = next((own for own in model.modules() if isinstance(own, Tower)), None)
        if tower is None:
            raise
        raise UserError(
            f"what a step of {type(tower.model).__name__} takes with its tower in it depends on its inputs, not on "
            "their shapes alone; harness profile measures it"
        ) from error


class _Saved:
    """Counts what autograd saves, as ``harness.trial.measure.saved_for_backward`` does of real tensors."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._known = {p.untyped_storage()._cdata: p.untyped_storage() for p in parameters}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage  # kept, so that no other gets its number
            self.bytes += storage.nbytes()
        return x


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention could, but does not without dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    default = next((a.default_value for a in func._schema.arguments if a.name == "dropout_p"), None)
    return bool({"dropout_p": default, **given, **kwargs}["dropout_p"] != 0)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and the most bytes of storages that are alive at once."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.drawn = self.now = self.most = 0
        self._known: dict[int, object] = {p.untyped_storage()._cdata: p for p in parameters}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.drawn += _draws(func, args, kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return

        def freed(_: object) -> None:
            self.now -= size
            self._known.pop(number, None)

        self._known[number] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
