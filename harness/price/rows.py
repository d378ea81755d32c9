"""The first training batches of a trial as they will be, but for the values of the encoders' features.

How many tokens a file becomes is asked of its encoder without weights, on the ``meta`` device, so nothing is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from harness.core.errors import UserError
from harness.core.paths import relative_to
from harness.experiment.plan import TrialSpec
from harness.model.backbones import build_empty, with_processor
from harness.model.batch import Batch
from harness.model.batches import BatchMaker
from harness.model.budget import Order
from harness.model.components import empty_encoders, make_modalities, make_task
from harness.model.features import Features
from harness.model.row_lengths import RowLengths
from harness.model.workers import Workers
from tasks.base import Example, Task
from tasks.drawing.task import DrawnTask
from tasks.registry import TASKS

FIRST = 3  # batches: those whose activations a record has
_LOOKED_AT = 2048  # training items whose texts are counted for the longest row
_GROUPED = 512  # examples, at least, of which batches of similar lengths are made: their files are read


@dataclass(frozen=True)
class Rows:
    """What a trial trains on.

    Attributes:
        first: the largest of the first batches, of which a record has the activations; items may share rows.
        alone: the same where the model allows no shared rows.
        longest: positions of the longest row that was looked at; with ``group_by_length``, of rows of the first batch
            that together have as many.
        of_sample: whether these are examples that the task brings along, because its data is not on this machine.
    """

    first: Batch
    alone: Batch
    longest: int
    of_sample: bool


class FeatureSizes(Features):
    """Features without values, of the right number of tokens; files are read as they are, without augmentation.

    Args:
        task: for its modalities.
        spec: for the encoders.
    """

    def __init__(self, task: Task, spec: TrialSpec) -> None:
        super().__init__(task, make_modalities(spec), empty_encoders(spec), torch.device("meta"))
        self._sizes: dict[tuple[str, Path], Tensor] = {}

    def of(self, examples: Sequence[Example], views: Sequence[int] | None = None) -> list[list[Tensor]]:
        """Zeros of the shape that the encoders would return."""
        wanted = [[(self.task.modalities[context], path) for context, path in example.files] for example in examples]
        new = dict.fromkeys(want for wants in wanted for want in wants if want not in self._sizes)
        for modality in {modality for modality, _ in new}:
            paths = [path for own, path in new if own == modality]
            found = self.encoders[modality].encode([self.modalities[modality].load(path) for path in paths])
            self._sizes |= {(modality, path): x_ND for path, x_ND in zip(paths, found, strict=True)}
        sizes = {want: self._sizes[want] for wants in wanted for want in wants}
        # Of a file one tensor. An encoder that says more than how many tokens there are says it without weights too.
        made = {want: torch.zeros(x_ND.shape) if x_ND.is_meta else x_ND for want, x_ND in sizes.items()}
        return [[made[want] for want in wants] for wants in wanted]


def rows_of(spec: TrialSpec, train: Sequence[Example] | None, workers: int = 1, share: bool = True) -> Rows:
    """The rows that a worker of a trial trains on.

    Args:
        spec: of the trial.
        train: the examples of its budget; None: they are not on this machine.
        workers: that share each batch.
        share: whether items whose inputs begin alike share a row.

    Raises:
        UserError: the data is not here, and the task has no sample of it; or a tokenizer could not be loaded.
    """
    with _task_and_examples(spec, train) as (task, examples):
        maker = _maker(spec, task)
        order = Order(examples, spec.seed, spec.budget.references)
        draws, size = order.epoch(1), spec.optimizer.per_device_train_batch_size
        by_length = train is not None and spec.optimizer.train_sampling_strategy == "group_by_length"
        if train is None:
            draws = draws * (size // len(draws) + 1)
        of_batches = [draws[start : start + size] for start in range(0, min(len(draws), FIRST * size), size)]
        if by_length:  # the first one is the largest
            some = examples[: max(_GROUPED, FIRST * size)]
            of_batches = replace(order, examples=some, length_of=RowLengths(maker, some)).batches(1, size)[:FIRST]
        share = share and order.repeats_inputs
        share = share and (spec.budget.references == "grouped" or not spec.backbone.projector_dropout)
        batches, alone = list[Batch](), list[Batch]()
        for of_batch in of_batches:
            own = order.share(of_batch, Workers(0, workers))
            alone.append(maker.train(examples, own, share=False))
            batches.append(maker.train(examples, own, share=True) if share else alone[-1])
        first, other = (max(found, key=lambda batch: batch.token_ids_BT.numel()) for found in (batches, alone))
        looked_at = [(examples[draw.example], draw.reference) for draw in draws[:_LOOKED_AT]]
        texts_positions = (maker.text_positions(example, example.references[n]) for example, n in looked_at)
        files = max(n for batch in alone for n in _file_positions(batch, task))
        rows, length = first.token_ids_BT.shape
        longest = files + max(texts_positions)
        # A batch of longer rows has fewer of them.
        return Rows(first, other, max(length, longest // rows if by_length else longest), train is None)


def _file_positions(batch: Batch, task: Task) -> list[int]:
    """Positions of encoded files in each row, with the marks around them."""
    contexts = [number for number, context in enumerate(task.contexts) if context in task.modalities]
    return [int(n) for n in torch.isin(batch.context_ids_BT, torch.tensor(contexts)).sum(dim=1)]


def _maker(spec: TrialSpec, task: Task) -> BatchMaker:
    backbone = spec.pinned_backbone
    language_model = with_processor(build_empty(backbone), backbone)
    return BatchMaker(FeatureSizes(task, spec), language_model, spec.budget, backbone)


@contextmanager
def _task_and_examples(spec: TrialSpec, train: Sequence[Example] | None) -> Iterator[tuple[Task, Sequence[Example]]]:
    if train is not None:
        yield make_task(spec), train
        return
    with tempfile.TemporaryDirectory() as folder:
        task = _sample(spec, Path(folder))
        yield task, task.examples("train")


def _sample(spec: TrialSpec, folder: Path) -> Task:
    """The task with the examples that it brings along, in ``folder``.

    Raises:
        UserError: it brings none.
    """
    task_class = TASKS.load(spec.task.plugin.target)
    config = spec.task.config | dict(task_class.sample(folder))
    task: Task = task_class(task_class.Config.model_validate(config, context=relative_to(spec.relative_to)))
    if task.members() and len(task.members()) > 1:
        raise UserError(f"task {spec.task.name}: its data is not on this machine; `harness prepare` gets it")
    if isinstance(task, DrawnTask):
        task.folder = folder / "drawn"  # not into the cache: a plan writes nothing
    task.prepare()
    return task
