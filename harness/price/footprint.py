"""The traced step of a shape, kept in the cache: the same shape is traced once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor

from harness.core.errors import UserError
from harness.core.files import cache_folder, digests_of, write_atomically
from harness.core.registry import identity
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.batch import Batch
from harness.model.components import tower_in_step
from harness.price.rows import Rows, rows_of
from harness.price.trace import Traced, trace
from tasks.base import Example

_ROOT = Path(__file__).resolve().parents[2]
_RATE = {"optimizer": {"learning_rate"}}  # rows do not depend on it
_CODE = ("adapters", "harness/model", "harness/price")  # on which a traced step depends


@dataclass(frozen=True)
class Footprint:
    """A step of each stage of a trial, on the largest of its first batches.

    Attributes:
        stages: in order; the last one is what a record has.
        longest: positions of the longest row over those of the traced batch.
        of_sample: whether the rows are those of the task's own sample.
    """

    stages: tuple[Traced, ...]
    longest: float
    of_sample: bool

    @property
    def largest(self) -> Traced:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda traced: traced.trained_bytes * 4 + traced.working_bytes)


class Footprints:
    """Footprints of specs; rows are shared by specs that train on the same.

    Args:
        resources: of every trial.
    """

    def __init__(self, resources: Resources | None = None) -> None:
        self._resources = resources or Resources()
        self._rows: dict[str, Rows] = {}

    def of(self, spec: TrialSpec, train: Sequence[Example] | None) -> Footprint:
        """The footprint of a trial.

        Args:
            spec: of the trial.
            train: the examples of its budget; None: they are not on this machine.

        Raises:
            UserError: the model or the rows cannot be made from what is on this machine.
        """
        depends = {"task", "backbone", "seed", "budget", "optimizer"}
        key = f"{tower_in_step(spec)} {spec.model_dump_json(include=depends, exclude=_RATE)}"
        if key not in self._rows:
            self._rows[key] = rows_of(spec, train, self._resources.workers, self._resources.shared_prefix)
        rows = self._rows[key]
        longest = rows.longest / rows.first.token_ids_BT.shape[1]
        return Footprint(_traced(spec, rows, self._resources), longest, rows.of_sample)


def _traced(spec: TrialSpec, rows: Rows, resources: Resources) -> tuple[Traced, ...]:
    """The step on rows that items share, if the model takes them (see ``harness.model.sharing``), else on others."""
    if rows.first is not rows.alone:
        projectors = len(rows.first.items) if spec.backbone.projector_dropout else 0
        with suppress(TypeError, ValueError, RuntimeError, UserError):
            found = _traced_on(spec, rows.first, resources)
            if all(stage.drawn <= projectors for stage in found):
                return found
    return _traced_on(spec, rows.alone, resources)


def _traced_on(spec: TrialSpec, batch: Batch, resources: Resources) -> tuple[Traced, ...]:
    path = cache_folder("traced", f"{_key(spec, batch, resources)}.json")
    with suppress(OSError, ValueError, TypeError):  # a cache that cannot be read costs time only
        return tuple(Traced(**stage) for stage in json.loads(path.read_text(encoding="utf-8")))
    found = trace(spec, batch, resources)
    with suppress(OSError):
        write_atomically(path, json.dumps([asdict(stage) for stage in found]))
    return tuple(found)


def _key(spec: TrialSpec, batch: Batch, resources: Resources) -> str:
    adapter = spec.adapter.model_dump(
        mode="json", include={"method", "plugins", "grouping", "config", "groups", "shared_group"}
    )
    geometry = [
        list(batch.token_ids_BT.shape),
        _digest(batch.targets.row_N, batch.targets.source_N, batch.targets.place_N),
        batch.parts is not None and _digest(batch.parts.parts_BT),
        [list(segment) for segment in batch.segments or ()],
        {context: [items.lengths, items.tensors] for context, items in batch.items.items()},
    ]
    if batch.segments is None:
        geometry.append(_digest(batch.context_ids_BT))
    content = [
        identity({"adapter": adapter, "backbone": spec.backbone.model_dump(mode="json")}),
        spec.fingerprints,
        spec.optimizer.bf16,
        spec.budget.epochs,
        [resources.gradient_checkpointing, resources.attn_implementation, resources.chunked_loss],
        geometry,
        [str(torch.__version__), transformers.__version__, _code()],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()


@cache
def _code() -> list[str]:
    """Digests of the code that a traced step depends on."""
    return digests_of([path for folder in _CODE for path in sorted((_ROOT / folder).rglob("*.py"))])
