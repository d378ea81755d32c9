"""ZeRO with two processes trains as one process does, also where one of them lacks a context.

Two processes are started once, meet through a file (no port), and do one job after another: a process cannot leave its
group and join another. What they trained is then compared with a loop in plain PyTorch in this process.

Shapes: B rows, P prefix positions, T target positions.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed import FileStore
from transformers import get_scheduler

from adapters import base
from adapters.attach import Adapters
from adapters.methods.bitfit import BitFit
from adapters.methods.combination import combine
from adapters.methods.ia3 import IA3
from adapters.methods.lora import LoRA
from adapters.placement.router import Layout, Router
from adapters.registry import ADAPTERS
from harness.core.contexts import Segment, resolve_grouping
from harness.core.weight_decay import parameter_groups
from harness.experiment.sections import Optimizer
from harness.model.batch import IGNORED, Batch
from harness.model.context_model import ContextModel
from harness.model.shared_prefix import arranged
from harness.trial.engine import Engine, join_process_group
from tests.support.batches import batch_of
from tests.support.batches import model_of as context_model_of
from tests.support.models import tiny_llama
from tests.support.processes import run_ranks
from tests.support.trials import partition_everything

STEPS, RANKS, TIMEOUT_S = 3, 2, 250
OPTIONS = Optimizer(
    learning_rate=1e-2, per_device_train_batch_size=2, adam_beta1=0.8, adam_epsilon=1e-4, weight_decay=0.1,
    max_grad_norm=0.5, lr_scheduler_type="cosine",
)  # fmt: skip
GROUPED = [name for name, entry in ADAPTERS.entries().items() if ADAPTERS.load(entry.target).grouped]
STACKED = [f"stacked {name}" for name in ("lora", "vera", "bottleneck", "ia3")]


class Job(NamedTuple):
    """What the processes train; the name of a folder."""

    method: str
    stage: int
    image_on_rank_1: bool = False
    together: bool = True  # False: without what brings gradients into one order
    shared: bool = False  # rank 0 has its two targets in one row, rank 1 in two

    @property
    def folder(self) -> str:
        return (
            f"{self.method} zero{self.stage} image {self.image_on_rank_1} together {self.together} shared {self.shared}"
        )


class SpanBySpan(base.Change):
    """As a plugin may write it: groups act in the order of their tokens, which differs between processes."""

    def _by_span(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        assert layout.spans is not None
        absent = [g for g in self.groups if g not in {span.group for span in layout.spans}]
        pieces = [without_touch(self, x_BTI, value_BTD, layout)]
        return torch.cat([*pieces, *(self.delta(g)(x_BTI[:, :0], value_BTD[:, :0]) for g in absent)], dim=1)


class SlicedLoRA(LoRA):
    """LoRA whose groups act in the order of their tokens."""

    def change(self, target: Any, deltas: Any, shared: Any, generator: Any) -> base.Change:
        return SpanBySpan(deltas)


def image_first(batch: Batch) -> Batch:
    """The image before BOS, so that a group that is absent in one process is the first to act in the other."""
    (_, (_, stop, image), (_, end, text)) = batch.segments or ()

    def turned(x_BT: Tensor) -> Tensor:
        return torch.cat([x_BT[:, :stop].roll(-1, dims=1), x_BT[:, stop:]], dim=1)

    items = batch.items["image"]
    return replace(
        batch,
        token_ids_BT=turned(batch.token_ids_BT),
        context_ids_BT=turned(batch.context_ids_BT),
        items={"image": replace(items, positions_P=items.positions_P - 1)},
        segments=(Segment(0, stop - 1, image), Segment(stop - 1, end, text)),
    )


def model_of(name: str) -> ContextModel:
    """Context-specific; the same weights at every call. ``all forms``: every way in which a change reads parameters."""
    shared = "shared" if name in STACKED else None
    method_class = combine((LoRA, SlicedLoRA, IA3, BitFit)) if name == "all forms" else ADAPTERS.load(
        ADAPTERS.find(name.removeprefix("stacked ")).target
    )  # fmt: skip
    method = method_class(method_class.Config(**({"rank": 3, "where": ("v", "down")} if name == "all forms" else {})))
    language_model = tiny_llama()
    router = Router(resolve_grouping("specific", ("image", "text"))[0])
    groups = [*([shared] if shared else []), *router.groups]
    adapters = Adapters(language_model, method.for_groups(groups), router, seed=0, shared_group=shared)
    adapters.attach(language_model)
    torch.manual_seed(3)
    return context_model_of(language_model, {"image": 20}, adapters, router).train()


def batches(rank: int, image_on_rank_1: bool) -> list[Batch]:
    """What a rank sees: two rows, with 12 target tokens on rank 0 and 7 on rank 1."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(STEPS):
        targets_BT = torch.randint(3, 20, (4, 9), generator=generator)
        for row, length in enumerate((9, 3, 1, 6)):
            targets_BT[row, length:] = IGNORED
        rows = slice(2 * rank, 2 * rank + 2)
        tokens = 4 if rank == 0 or image_on_rank_1 else 0
        features = torch.randn(4, 4, 20, generator=generator)[rows, :tokens]
        made.append(image_first(batch_of({"image": features}, targets_BT[rows])))
    return made


def of_one_image(rank: int, shared: bool) -> list[Batch]:
    """What a rank sees whose two targets have the same image, in one row or in two."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(STEPS):
        features = torch.randn(RANKS, 1, 4, 20, generator=generator)[rank]
        targets_BT = torch.randint(3, 20, (RANKS, 2, 9), generator=generator)[rank]
        targets_BT[1, 4 + rank :] = IGNORED
        if not shared:
            made.append(batch_of({"image": features.expand(2, -1, -1)}, targets_BT))
            continue
        targets = [[token for token in row if token != IGNORED] for row in targets_BT.tolist()]
        inputs = torch.tensor([[token for target in targets for token in target[:-1]]])
        made.append(arranged(batch_of({"image": features}, inputs), [(5, [(0, target) for target in targets])]))
    return made


def seen(rank: int, job: Job, shared: bool = False) -> list[Batch]:
    return of_one_image(rank, shared) if job.shared else batches(rank, job.image_on_rank_1)


# ── In the two processes


def process(rank: int, folder: Path, jobs: Sequence[Job]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    join_process_group(FileStore(str(folder / "store"), RANKS), rank, RANKS)
    partition_everything(pytest.MonkeyPatch())
    for job in jobs:
        model = model_of(job.method)
        engine = Engine(model, OPTIONS, STEPS, job.stage, units=model.adapters.changes())
        if not job.together:
            engine._ordered = []
        losses = [engine.train_step(batch) for batch in seen(rank, job, shared=rank == 0)]
        engine.save_weights(folder / job.folder / "weights.safetensors")
        (folder / job.folder / f"losses-{rank}.json").write_text(json.dumps(losses), encoding="utf-8")
        engine.close()


# ── In this process


def run(jobs: Sequence[Job], folder: Path) -> Path:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])  # torch and DeepSpeed are imported once, not in each process
    run_ranks(server, RANKS, process, folder, jobs, timeout_s=TIMEOUT_S)
    return folder


def one_process(
    model: ContextModel, steps: Sequence[Sequence[Batch]]
) -> tuple[list[float], dict[str, Tensor]]:  # fmt: skip
    """Losses and trained weights of a plain loop that sees what all ranks see in every step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups(model, OPTIONS.weight_decay), lr=OPTIONS.learning_rate or 0.0,
        betas=(OPTIONS.adam_beta1, OPTIONS.adam_beta2), eps=OPTIONS.adam_epsilon,
    )  # fmt: skip
    scheduler = get_scheduler(OPTIONS.lr_scheduler_type, optimizer, 0, STEPS)
    losses = []
    for parts in steps:
        scored = [model(batch) for batch in parts]
        loss: Tensor = sum(nll_B.sum() for nll_B, _ in scored) / sum(tokens_B.sum() for _, tokens_B in scored)
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), OPTIONS.max_grad_norm)
        optimizer.step()
        scheduler.step()
    return losses, {name: p.detach() for name, p in trained.items()}


def expected(job: Job) -> tuple[list[float], dict[str, Tensor]]:
    by_rank = [seen(rank, job) for rank in range(RANKS)]
    return one_process(model_of(job.method), list(zip(*by_rank, strict=True)))


def found(folder: Path, job: Job) -> tuple[list[float], dict[str, Tensor]]:
    """What each rank says is the loss of the whole batch, and the weights."""
    texts = [(folder / job.folder / f"losses-{rank}.json").read_text(encoding="utf-8") for rank in range(RANKS)]
    losses, others = map(json.loads, texts)
    assert losses == others
    return losses, safetensors.torch.load_file(folder / job.folder / "weights.safetensors")


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def check(folder: Path, job: Job) -> None:
    """fp32, sums in another order: 1e-5, of losses relative, of weights that move by 1e-3 and more absolute."""
    (losses, weights), (their_losses, their_weights) = expected(job), found(folder, job)
    assert their_losses == pytest.approx(losses, rel=1e-5)
    assert difference(their_weights, weights) < 1e-5
    start = dict(model_of(job.method).named_parameters())
    for group in ("group_image", "group_text"):
        assert max((weights[n] - start[n]).abs().max().item() for n in weights if group in n) > 1e-3


JOBS = [
    *(Job("all forms", stage, image) for image in (True, False) for stage in range(4)),
    *(Job("all forms", stage, shared=True) for stage in range(4)),
]
UNORDERED = Job("all forms", 2, together=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run([*JOBS, UNORDERED], tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.folder)
@pytest.mark.e2e
def test_two_processes_train_as_one_does(trained: Path, job: Job) -> None:
    check(trained, job)


@pytest.mark.e2e
def test_gradients_in_different_orders_would_be_wrong(trained: Path) -> None:
    """ZeRO-2 adds up what comes first in one process and what comes first in the other."""
    assert difference(found(trained, UNORDERED)[1], expected(UNORDERED)[1]) > 1e-3


@pytest.fixture(scope="module")
def trained_by_every_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs = [Job(name, stage) for name in [*GROUPED, *STACKED] for stage in (2, 3)]
    return run(jobs, tmp_path_factory.mktemp("methods"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", [*GROUPED, *STACKED])
def test_every_method_trains_right_where_one_process_lacks_a_context(
    trained_by_every_method: Path, name: str, stage: int
) -> None:
    check(trained_by_every_method, Job(name, stage))


# ── One process, a context in some steps only


def without_touch(change: base.Change, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
    """``Change._by_span`` as it would be if an absent group took no part in the graph."""
    assert layout.spans is not None
    sizes = [span.stop - span.start for span in layout.spans]
    parts = zip(layout.spans, torch.split(x_BTI, sizes, dim=1), torch.split(value_BTD, sizes, dim=1), strict=True)
    return torch.cat([change.delta(s.group)(x, v) if s.group in change.groups else v for s, x, v in parts], dim=1)


@pytest.mark.parametrize(
    ("stage", "touch", "as_units", "right"),
    [
        *((stage, True, as_units, True) for stage in range(4) for as_units in (True, False)),
        # Without a gradient ZeRO-3 keeps the one of the step before, unless the change is gathered as one.
        (3, False, False, False),
        (3, False, True, True),
    ],
)
def test_a_step_without_a_context_in_one_process(
    stage: int, touch: bool, as_units: bool, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition_everything(monkeypatch)
    steps = [batches(step % 2, image_on_rank_1=False)[step] for step in range(STEPS)]
    _, weights = one_process(model_of("all forms"), [[batch] for batch in steps])
    if not touch:
        monkeypatch.setattr(base.Change, "_by_span", without_touch)
        monkeypatch.setattr(SpanBySpan, "_by_span", without_touch)
    model = model_of("all forms")
    engine = Engine(model, OPTIONS, STEPS, stage, units=model.adapters.changes() if as_units else ())
    for batch in steps:
        engine.train_step(batch)
    engine.save_weights(tmp_path / "weights.safetensors")
    engine.close()
    their_weights = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert (difference(their_weights, weights) < 1e-5) is right
