"""Trials of two workers train, evaluate and resume as those of one do, through the real engine and gloo.

Two processes are started once for each list of jobs: a process cannot leave its group. What they leave is compared
with the same trials in this process. The budget is such that the last batch of an epoch has one example, so that one of
the two workers has none.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch.distributed import FileStore

from harness.core.record import TrialRecord, read_record, record_path
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.workers import joined
from harness.tracking.tracker import NoTracker
from harness.trial.engine import join_process_group
from harness.trial.log import LOG
from harness.trial.steps import Steps
from harness.trial.trial import Trial
from harness.trial.worker import run_worker
from tests.support.parity import assert_same_result
from tests.support.processes import run_ranks
from tests.support.trials import FULL, LORA, examples_of, partition_everything, run, spec_of

RANKS, TIMEOUT_S = 2, 280
KINDS: Mapping[str, Mapping[str, Any]] = {
    "none": {"method": "none", "learning_rate": 3e-3},
    "lora": LORA,
    "full": FULL,
    "llava": {"method": "llava", "learning_rate": 3e-3},
    "by length": LORA,
}
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {"by length": {"train_sampling_strategy": "group_by_length"}}
NAN = {"method": "full", "learning_rate": 1e30}


@dataclass(frozen=True)
class Job:
    """A trial of the two workers, in a folder of its own."""

    name: str
    spec: str  # JSON
    resources: dict[str, Any]
    fails_in_epoch: int | None = None
    stops_after: int | None = None  # questions: then the second worker alone is asked to stop; and the trial goes on

    @property
    def trial_id(self) -> str:
        return TrialSpec.model_validate_json(self.spec).trial_id


@dataclass
class Ended:
    """What the jobs left: the outcome of each rank, without its record."""

    folder: Path
    outcomes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def record(self, job: Job) -> TrialRecord:
        return read_record(record_path(self.folder / job.name, job.trial_id))

    def log(self, job: Job) -> str:
        return (self.folder / job.name / "trials" / job.trial_id / LOG).read_text(encoding="utf-8")


def small(folder: Path, kind: Mapping[str, Any], quantization: str | None = None, **optimizer: Any) -> TrialSpec:
    folder.mkdir(parents=True, exist_ok=True)
    return spec_of(
        folder,
        kind,
        backbone={"projector_dropout": 0.0, "quantization": quantization},
        budget={"examples": 29, "epochs": 2},
        optimizer={"per_device_train_batch_size": 7, **optimizer},
        eval={"max_new_tokens": 6, "per_device_eval_batch_size": 5},
    )


# ── In the two processes


def process(rank: int, folder: Path, jobs: Sequence[Job]) -> None:
    join_process_group(FileStore(str(folder / "store"), RANKS), rank, RANKS)
    partition_everything(pytest.MonkeyPatch())
    for job in jobs:
        spec, resources = TrialSpec.model_validate_json(job.spec), Resources(workers=RANKS, **job.resources)
        arguments = spec, "unit", folder / job.name, resources, NoTracker(), lambda _: None
        if job.stops_after is not None:
            batches = counted(job.stops_after if rank else 10**9)
            stopped = run_worker(*arguments, stop=batches)
            assert (stopped.status, stopped.failed) == ("cancelled", False)
        with failing(job.fails_in_epoch):
            outcome = run_worker(*arguments)
        said = {key: value for key, value in asdict(outcome).items() if key != "record"}
        (folder / job.name / f"outcome-{rank}.json").write_text(json.dumps(said), encoding="utf-8")


@contextmanager
def failing(in_epoch: int | None) -> Iterator[None]:
    """Trials fail when this epoch begins."""
    whole = Trial._epoch

    def epoch(trial: Trial, number: int) -> Steps[None]:
        if number == in_epoch:
            raise KeyError("stopped by the test")
        return whole(trial, number)

    with mock.patch.object(Trial, "_epoch", epoch):
        yield


def counted(limit: int) -> Callable[[], bool]:
    """Whether it was asked so often: a trial asks when it begins, before every batch, and after every epoch."""
    calls = itertools.count(1)
    return lambda: next(calls) > limit


# ── In this process


def run_two(folder: Path, jobs: Sequence[Job]) -> Ended:
    for job in jobs:
        (folder / job.name).mkdir(parents=True, exist_ok=True)
    run_ranks(multiprocessing.get_context("spawn"), RANKS, process, folder, jobs, timeout_s=TIMEOUT_S)
    ended = Ended(folder)
    for job in jobs:
        texts = [(folder / job.name / f"outcome-{rank}.json").read_text(encoding="utf-8") for rank in range(RANKS)]
        ended.outcomes[job.name] = [json.loads(text) for text in texts]
    return ended


def close(one: TrialRecord, other: TrialRecord, tolerance: float) -> None:
    """The curves and the scores agree, and all that says what the trials are is equal."""
    assert one.data == other.data
    assert one.best_epoch == other.best_epoch
    assert one.parameters == other.parameters
    assert one.warnings == other.warnings
    assert [e.step for e in one.history] == [e.step for e in other.history]
    for name in ("train_loss", "validation_perplexity", "learning_rate"):
        mine, theirs = ([getattr(epoch, name) for epoch in record.history] for record in (one, other))
        assert mine == pytest.approx(theirs, rel=tolerance), name
    for split, scores in one.metrics.items():
        assert scores == pytest.approx(other.metrics[split], rel=tolerance), split


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, Path, list[Job], Ended]:
    """A kind of adapter with one worker, and with two in every stage of ZeRO."""
    folder = tmp_path_factory.mktemp(kind)
    spec = small(folder / "one", KINDS[kind], **OPTIMIZERS.get(kind, {}))
    one = run(spec, folder / "one")
    jobs = [Job(f"zero{stage}", spec.model_dump_json(), {"zero_stage": stage}) for stage in range(4)]
    return one, folder / "one", jobs, run_two(folder, jobs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_two_workers_leave_what_one_does(pair: tuple[TrialRecord, Path, list[Job], Ended], stage: int) -> None:
    """fp32, dropout off, sums in another order: 1e-5 relative on every loss and perplexity, and the same texts."""
    one, folder, jobs, ended = pair
    job = jobs[stage]
    assert [outcome["status"] for outcome in ended.outcomes[job.name]] == ["finished"] * 2, ended.outcomes[job.name]
    two = ended.record(job)
    assert (one.workers, two.workers) == (1, 2)
    close(two, one, 1e-5)
    mine, theirs = examples_of(ended.folder / job.name, two), examples_of(folder, one)
    assert list(mine["example_id"]) == list(theirs["example_id"])
    assert list(mine["prediction"]) == list(theirs["prediction"])
    np.testing.assert_allclose(mine["nll"], theirs["nll"], rtol=1e-5)
    assert list(mine["tokens"]) == list(theirs["tokens"])
    assert sorted(path.name for path in (ended.folder / job.name / "trials" / job.trial_id).iterdir()) == [
        "best.safetensors", "examples.parquet", "log.txt", "record.json",
    ]  # fmt: skip
    # One log, by rank 0.
    assert ended.log(job).count("epoch 2 of 2") == 1
    assert two.throughput is not None
    assert one.throughput is not None
    assert two.throughput.measured_steps == one.throughput.measured_steps
    assert two.memory is not None
    assert one.memory is not None
    parts = 2 if stage >= 2 else 1
    assert two.memory.gradients_bytes == pytest.approx(one.memory.gradients_bytes / parts, rel=0.01)
    assert two.memory.weights_bytes <= one.memory.weights_bytes * (0.6 if stage == 3 else 1)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Job], Ended]:
    """Trials in bf16, offloaded, that fail, and that were interrupted."""
    folder = tmp_path_factory.mktemp("others")
    lora, resumed = small(folder / "one", LORA), {"checkpoint_interval_s": 0.0}
    bf16 = small(folder / "one", LORA, bf16=True, gradient_accumulation_steps=2)
    dropout = small(folder / "one", LORA | {"dropout": 0.3}).model_dump_json()
    with failing(2):
        assert run(lora, folder / "from one", **resumed).status == "failed"
    jobs = [
        Job("bf16", bf16.model_dump_json(), {"zero_stage": 2}),
        Job("optimizer", lora.model_dump_json(), {"zero_stage": 2, "offload": "optimizer"}),
        Job("parameters", lora.model_dump_json(), {"zero_stage": 3, "offload": "parameters"}),
        Job("nan", small(folder / "one", NAN).model_dump_json(), {}),
        Job("from one", lora.model_dump_json(), resumed),
        Job("whole", lora.model_dump_json(), resumed, fails_in_epoch=2),
        Job("dropout", dropout, {"zero_stage": 2}),
        Job("stopped", dropout, {"zero_stage": 2}, stops_after=8),
        Job("spread", lora.model_dump_json(), {**resumed, "zero_stage": 2}, fails_in_epoch=2),
    ]
    return folder, {job.name: job for job in jobs}, run_two(folder, jobs)


Others = tuple[Path, dict[str, Job], Ended]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 1e-2), ("optimizer", 1e-5), ("parameters", 1e-5)])
def test_other_ways_of_training_agree_too(others: Others, name: str, tolerance: float, tmp_path: Path) -> None:
    _folder, jobs, ended = others
    assert ended.outcomes[name][0]["status"] == "finished", ended.outcomes[name]
    # In bf16 the stages themselves differ, with one worker too: stage 0 accumulates gradients in another precision.
    one = run(TrialSpec.model_validate_json(jobs[name].spec), tmp_path, zero_stage=jobs[name].resources["zero_stage"])
    two = ended.record(jobs[name])
    assert two.data == one.data
    for mine, theirs in zip(two.history, one.history, strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, rel=tolerance)
        assert mine.validation_perplexity == pytest.approx(theirs.validation_perplexity, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_two_workers_on_packed_weights_leave_what_one_does(form: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    spec = small(tmp_path / "one", LORA, form)
    one = run(spec, tmp_path / "one")
    jobs = [Job(f"zero{stage}", spec.model_dump_json(), {"zero_stage": stage}) for stage in range(4)]
    ended = run_two(tmp_path, jobs)
    for job in jobs[:3]:
        assert ended.outcomes[job.name][0]["status"] == "finished", ended.outcomes[job.name]
        two = ended.record(job)
        close(two, one, 1e-5)
        assert two.memory is not None
        assert one.memory is not None
        assert two.memory.weights_bytes == one.memory.weights_bytes
    refused = ended.outcomes["zero3"][0]
    assert (refused["status"], "quantised ones stay whole" in refused["reason"]) == ("failed", True)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_workers_with_the_same_error(others: Others) -> None:
    found = others[2].outcomes["nan"]
    assert [outcome["status"] for outcome in found] == ["failed"] * 2
    assert not any(outcome["lost"] for outcome in found)
    for outcome in found:
        assert "FloatingPointError: " in outcome["reason"]
    assert found[0]["reason"].partition(" (")[0] == found[1]["reason"].partition(" (")[0]
    # Rank 0 leaves the record to the one who hears of all workers.
    assert not record_path(others[0] / "nan", others[1]["nan"].trial_id).exists()


@pytest.mark.slow
def test_a_trial_goes_on_with_another_number_of_workers(others: Others, tmp_path: Path) -> None:
    """Stage 0: what is interrupted with one goes on with two, and the other way round."""
    folder, jobs, ended = others
    spec = TrialSpec.model_validate_json(jobs["whole"].spec)
    expected = run(spec, tmp_path)
    close(ended.record(jobs["from one"]), expected, 1e-5)
    assert "resumed after epoch 1" in ended.log(jobs["from one"])
    close(run(spec, folder / "whole", checkpoint_interval_s=0.0), expected, 1e-5)
    assert "resumed after epoch 1" in ended.log(jobs["whole"])


@pytest.mark.slow
def test_a_checkpoint_that_is_spread_over_others_is_not_loaded(others: Others, tmp_path: Path) -> None:
    folder, jobs, ended = others
    spec = TrialSpec.model_validate_json(jobs["spread"].spec)
    close(run(spec, folder / "spread", zero_stage=2), run(spec, tmp_path), 1e-5)
    log = ended.log(jobs["spread"])
    assert "it is of workers 2 and zero_stage 2, which workers 1 and zero_stage 2 cannot load" in log
    assert "resumed" not in log


@pytest.mark.slow
def test_two_workers_stop_after_the_same_step_and_go_on_inside_the_epoch(others: Others) -> None:
    """Five batches an epoch; the second worker is asked before the seventh, which both still train."""
    folder, jobs, ended = others
    assert ended.outcomes["stopped"][0]["status"] == "finished", ended.outcomes["stopped"]
    whole, stopped = (ended.record(jobs[name]) for name in ("dropout", "stopped"))
    assert_same_result(stopped, folder / "stopped", whole, folder / "dropout")
    assert "resumed after epoch 1, step 7, batch 2 of epoch 2" in ended.log(jobs["stopped"])


def test_a_process_without_others_exchanges_nothing() -> None:
    join_process_group()
    alone = joined()
    assert (alone.rank, alone.count, alone.first) == (0, 1, True)
    assert alone.share([1, 2, 3]) == [1, 2, 3]
    assert alone.total(1, 2.5) == (1, 2.5)
    assert alone.gather("x") == ["x"]
    assert alone.agreed("x") == "x"
