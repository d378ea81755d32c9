"""Runs one trial: builds, trains, validates every epoch, tests the best epoch, writes the record.

This is the only training loop: differences between methods and tasks are hooks of the adapter or the task. Does not
depend on Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from harness.core.files import write_atomically
from harness.core.origin import describe, during
from harness.core.record import Data, Epoch, Status, TrialRecord
from harness.core.registry import plugins_in
from harness.core.revisions import git_revision
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model import budget
from harness.model.build import TrialData
from harness.model.context_model import Batch
from harness.model.inputs import Inputs
from harness.model.workers import ALONE, Workers
from harness.tracking.grid import Tracker
from harness.trial import measure
from harness.trial.answers import answers_of
from harness.trial.engine import PARTITIONED_STAGE, prepare_process
from harness.trial.evaluate import Evaluator, mismatched
from harness.trial.log import LOG, log_to
from harness.trial.outcome import conclude
from harness.trial.previews import write_previews
from harness.trial.scores import perplexities, score_members, write_examples
from harness.trial.stages import Stages

REPORT_INTERVAL_S = 1.0
BEST = "best.safetensors"  # trained parameters of the epoch with the lowest validation perplexity
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a trial, for display."""

    fraction: float  # of its optimizer steps, 0 to 1
    phase: str  # "build", "encode", "train", "validate", "test"
    epoch: int = 0
    train_loss: float | None = None
    validation_perplexity: float | None = None


Report = Callable[[Progress], None]


def run_trial(
    spec: TrialSpec,
    experiment: str,
    run: Path,
    resources: Resources,
    tracker: Tracker,
    report: Report,
    rungs: Collection[int] = (),
) -> TrialRecord:
    """Run one trial and write its record, also if it fails; only the death of the process leaves no record.

    Args:
        spec: of the trial.
        experiment: name of the experiment, for the record.
        run: the run folder.
        resources: for threads, ZeRO stage and checkpoint interval.
        tracker: receives metrics and the record.
        report: called with the progress, at most about once a second and after every epoch.
        rungs: epochs after which it pauses.

    Returns:
        The record, with status finished, failed or out_of_memory, and the reason; or with status paused, which is
        written as ``paused.json`` and not as the record.
    """
    with log_to(run / "trials" / spec.trial_id / LOG):
        attempt = make_attempt(spec, experiment, run, resources, tracker, report, rungs=rungs)
        conclude(attempt.record, run, tracker)
    return attempt.record


@dataclass(frozen=True)
class Attempt:
    """A trial that has ended: its record, which is not written yet, and the error that ended it."""

    record: TrialRecord
    error: Exception | None = None


def make_attempt(
    spec: TrialSpec,
    experiment: str,
    run: Path,
    resources: Resources,
    tracker: Tracker,
    report: Report,
    workers: Workers = ALONE,
    rungs: Collection[int] = (),
) -> Attempt:
    """Run a trial; its errors are in the result.

    Args:
        spec: of the trial, and the others as for ``run_trial``.
        experiment: name of the experiment.
        run: the run folder.
        resources: of the trial.
        tracker: receives metrics.
        report: called with the progress.
        workers: this process and the others that run the trial with it.
        rungs: epochs after which it pauses.
    """
    folder = run / "trials" / spec.trial_id
    started, clock = datetime.now(UTC), time.monotonic()
    plugins = plugins_in(spec.model_dump(mode="json"))
    status: Status = "finished"
    reason = None
    problem: Exception | None = None
    trial = Trial(spec, folder, resources, tracker, report, workers, rungs)
    try:
        trial.run()
        if trial.paused:
            status, reason = "paused", f"waits at epoch {len(trial.state.history)} for the others of its row"
    except (torch.OutOfMemoryError, MemoryError) as error:
        status, reason, problem = "out_of_memory", describe(error, plugins, folder / LOG), error
        logger.exception("out of memory")
    except Exception as error:  # a failed trial must not stop the others
        status, reason, problem = "failed", describe(error, plugins, folder / LOG), error
        logger.exception("the trial failed")
    record = TrialRecord(
        trial_id=spec.trial_id,
        experiment=experiment,
        status=status,
        reason=reason,
        spec=spec.model_dump(mode="json"),
        seed=spec.seed,
        wall_time_s=sum(trial.state.phases_s.values()) or time.monotonic() - clock,
        phases_s=trial.state.phases_s,
        history=tuple(trial.state.history),
        best_epoch=trial.state.best_epoch,
        started_at=started.isoformat(timespec="seconds"),
        versions=measure.versions(),
        git_revision=git_revision(Path(__file__).parent.parent),
        mlflow_run_id=tracker.run_id,
        warnings=(*trial.warnings, *tracker.warnings),
        workers=workers.count,
        **trial.measured,
    )
    return Attempt(record, problem)


@dataclass
class _State:
    """State that is saved in checkpoints and survives a restart."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int | None = None
    step: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)
    activations_bytes: int = 0


class Trial:
    """One trial in this process; see ``make_attempt`` for the arguments.

    Attributes:
        state: saved in checkpoints.
        measured: fields of the record that are known so far.
        cut: kind of text ("target", "input") → the texts that were truncated.
        notes: notes of the metrics on their scores.
        stages: the model and its engine; set when they are built.
        peak: peak memory since before the model was built; set then.
        clock: time of the current stage's training steps.
        paused: whether ``run`` ended at a rung.
    """

    stages: Stages
    peak: measure.PeakMemory

    def __init__(
        self,
        spec: TrialSpec,
        folder: Path,
        resources: Resources,
        tracker: Tracker,
        report: Report,
        workers: Workers = ALONE,
        rungs: Collection[int] = (),
    ) -> None:
        self.spec, self.folder, self.resources, self.tracker, self.report = spec, folder, resources, tracker, report
        self.workers, self.rungs, self.paused = workers, rungs, False
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.state = _State()
        self.measured: dict[str, Any] = {"device": measure.device_name(self.device)}  # fields of the record
        self.total_steps = 0
        self.cut: dict[str, set[str]] = {}
        self.notes: tuple[str, ...] = ()
        self.clock = measure.StepClock(self.device)
        self._reported = 0.0
        self._checkpointed = time.monotonic()
        self._saved = 0  # epoch of the last checkpoint

    def run(self) -> None:
        """Build, train and test; after an exception, ``state`` and ``measured`` have what was measured before it."""
        self._report_progress("build", force=True)
        with self._phase("build"):
            self.build()
            self.total_steps, batches = self.stages.total_steps, self.stages.built.batches
            self.cut = {"target": batches.cut_targets, "input": batches.cut_inputs}
            self.measured["parameters"] = self.stages.built.parameters  # trainable: parameters that any stage trains
        try:
            with self._phase("build"):
                self._resume()
            with self._phase("encode"):
                self._encode()
            self._train()
            if self.workers.first:
                self.measured["data"] = self._data()
            if self.paused:
                return
            with self._phase("test"):
                self.measured["metrics"] = self._test()
        finally:
            self.stages.close()
        if self.workers.first:
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)

    def build(self, data: TrialData | None = None) -> None:
        """Prepare the process and build the model, without an engine.

        Args:
            data: of a trial that differs at most in its adapter and learning rate; None: it is read.
        """
        torch.set_num_threads(self.resources.cpus_per_worker)
        prepare_process()
        self.peak = measure.PeakMemory(self.device)
        self.stages = Stages(self.spec, self.device, self.resources, self.folder, data)

    def _begin_measuring(self) -> None:
        """Restart the measurement of speed and activations: stages differ, so only the last one is recorded."""
        self.clock = measure.StepClock(self.device)
        self.state.activations_bytes = 0

    def _encode(self) -> None:
        """Run the frozen encoders before training, so that they are not part of the measured training speed."""
        splits = self.stages.built.splits
        evaluation = [*splits.validation, *splits.test]
        features = self.stages.built.batches.features
        features.precompute(splits.train, evaluation, lambda: self._report_progress("encode"), self.workers)

    def _train(self) -> None:
        """Train until the last epoch, until validation improves no more, or until the next rung."""
        while (done := len(self.state.history)) < self.spec.budget.epochs:
            if self.stages.stops_after(done, self.state.best_epoch):
                logger.info("stopped: no better validation perplexity for %d epochs", self.spec.budget.patience)
                self.total_steps = self.state.step
                return
            if done in self.rungs:
                if self.stages.engine.accumulating:
                    raise RuntimeError(f"epoch {done} ends within a gradient accumulation, which no checkpoint has")
                if self._saved != done:
                    self._checkpoint(done)
                self.paused = True
                return
            self._epoch(done + 1)

    def _epoch(self, epoch: int) -> None:
        train_loss = self._train_epoch(epoch)
        with self._phase("validate"):
            self._report_progress("validate", epoch)
            perplexity = self._evaluator().likelihood(self.stages.built.splits.validation).perplexity
        result = Epoch(
            epoch=epoch,
            step=self.state.step,
            train_loss=train_loss,
            validation_perplexity=perplexity,
            learning_rate=self.stages.engine.learning_rate,
        )
        if perplexity < min((e.validation_perplexity for e in self.state.history), default=math.inf):
            self.state.best_epoch = epoch
            self.stages.engine.save_weights(self.folder / BEST)
        self.state.history.append(result)
        logger.info(
            "epoch %d of %d, step %d: train loss %.6g, validation perplexity %.6g, learning rate %.6g",
            *(epoch, self.spec.budget.epochs, result.step, train_loss, perplexity, result.learning_rate),
        )
        self.tracker.metrics(result.model_dump(exclude={"epoch", "step"}), step=result.step)
        self._report_progress("validate", epoch, train_loss, force=True)
        due = time.monotonic() - self._checkpointed >= self.resources.checkpoint_interval_s and epoch not in self.rungs
        if epoch < self.spec.budget.epochs and not self.stages.engine.accumulating and self.workers.agreed(due):
            self._checkpoint(epoch)

    def _train_epoch(self, epoch: int) -> float:
        """Train for one epoch; returns the unweighted mean of the batch losses."""
        # Dropout uses the global generator; seeding it per epoch makes a resumed trial repeat lost epochs exactly.
        torch.manual_seed(dropout_seed(self.spec.seed, epoch, self.workers.rank))
        self.stages.built.model.train()
        draws = self.stages.built.order.epoch(epoch)
        size = self.spec.optimizer.per_device_train_batch_size
        losses: list[float] = []
        for start in range(0, len(draws), size):
            if self.stages.stage_ended:
                with self._phase("build"):
                    self.stages.advance()
                self._begin_measuring()
                self.stages.built.model.train()
            with self._phase("train"):
                losses.append(self.train_step(draws[start : start + size]))
            self._report_progress("train", epoch, losses[-1])
        self.measured["memory"] = self.stages.engine.memory(self.state.activations_bytes, self.peak)
        self.measured["throughput"] = self.clock.throughput(self.workers)
        return sum(losses) / len(losses)

    def train_step(self, draws: list[budget.Draw]) -> float:
        """Make this worker's share of a batch and train on it; returns the loss of the batch."""
        own = self.workers.share(draws)
        with during("", dict.fromkeys(self.stages.built.splits.train[draw.example].id for draw in own)):
            return self.step_on(self.batch(own) if own else self.batch(draws[:1]).as_stand_in())

    def batch(self, draws: Sequence[budget.Draw]) -> Batch:
        """The batch of training items, on the device."""
        examples = [self.stages.built.splits.train[draw.example] for draw in draws]
        texts = [e.references[draw.reference] for e, draw in zip(examples, draws, strict=True)]
        made = self.stages.built.batches.make(examples, texts, [draw.view for draw in draws])
        return made.to(self.device)

    def step_on(self, batch: Batch) -> float:
        """Train on a batch, and measure the time; returns its loss."""
        # Activations are measured only in warm-up steps, because measuring them takes time.
        measuring = self.clock.warming_up
        model = self.stages.built.model
        with measure.saved_for_backward(model) if measuring else nullcontext([0]) as saved, self.clock:
            loss = self.stages.engine.train_step(batch)
        self.clock.count(batch.size, batch.positions)
        self.state.activations_bytes = max(self.state.activations_bytes, saved[0])
        self.state.step = self.stages.step
        return loss

    def _evaluator(self) -> Evaluator:
        built = self.stages.built
        built.model.eval()
        synced = self.workers.count > 1 and self.resources.zero_stage == PARTITIONED_STAGE
        return Evaluator(built.model, built.batches, self.spec.eval, self.device, self._tick, self.workers, synced)

    def _test(self) -> dict[str, dict[str, float]]:
        """Evaluate the best epoch; rank 0 scores the texts and writes per-example scores, and returns the metrics."""
        self._report_progress("test", force=True)
        splits = self.stages.built.splits
        self.stages.engine.load_weights(self.folder / BEST)
        evaluator = self._evaluator()
        validation, test = evaluator.likelihood(splits.validation), evaluator.likelihood(splits.test)
        others = mismatched(splits.test, seed=0)
        wrong = evaluator.likelihood(splits.test, others) if others else None
        predictions = evaluator.generate(splits.test)
        for texts in self.cut.values():
            texts.update(*self.workers.gather(texts))
        if not self.workers.first:
            return {}
        scores = score_members(self.spec.task.metrics, splits.test, predictions)
        self.measured["answers"] = answers_of(self.spec.task.metrics, splits.train, splits.test, predictions)
        self.notes = scores.notes
        features = self.stages.built.batches.features
        shown = write_previews(self.folder.parent.parent, splits.test, features, self.spec.task.modalities)
        write_examples(self.folder / "examples.parquet", splits, validation, test, wrong, predictions, scores, shown)
        wrong_input = {"perplexity_wrong_input": wrong.perplexity} if wrong else {}
        return {
            "validation": perplexities(splits.validation, validation),
            "test": {**perplexities(splits.test, test), **wrong_input, **scores.corpus},
        }

    def _data(self) -> Data:
        splits, spec = self.stages.built.splits, self.spec
        digest = Inputs(self.folder.parent.parent).digest
        return Data(
            examples=len(splits.train),
            examples_fingerprint=budget.content_fingerprint(splits.train, digest),
            order_fingerprint=self.stages.built.order.fingerprint(
                spec.budget.epochs, spec.optimizer.per_device_train_batch_size
            ),
            evaluation_fingerprint=budget.content_fingerprint([*splits.validation, *splits.test], digest),
            steps=self.state.step,
            started_from=tuple(sorted({source.weights_sha256 for source in spec.adapter.init_from.values()})),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the record: truncated texts, and notes of the metrics."""
        limits = self.spec.budget.model_dump()
        cut = [
            f"{len(texts)} {kind} texts were longer than max_{kind}_length={limits[f'max_{kind}_length']} tokens "
            "and were truncated"
            for kind, texts in self.cut.items()
            if texts
        ]
        return (*cut, *self.notes)

    def _checkpoint(self, epoch: int) -> None:
        """Save a checkpoint. The state file, written last, names the valid one, so a crash leaves a complete one."""
        folder = self.folder / "checkpoint"
        self.stages.engine.save(folder, f"epoch-{epoch}")
        if self.workers.first:
            # A copy, because a later epoch may replace the best weights before a crash.
            shutil.copy2(self.folder / BEST, folder / f"epoch-{epoch}" / BEST)
            history = [e.model_dump() for e in self.state.history]
            content = {**vars(self.state), "history": history, "tag": f"epoch-{epoch}", "layout": self._layout}
            write_atomically(folder / "state.json", json.dumps(content))
            for old in folder.glob("epoch-*"):
                if old.name != f"epoch-{epoch}":
                    shutil.rmtree(old)
        self.workers.wait()
        self._checkpointed, self._saved = time.monotonic(), epoch

    def _resume(self) -> None:
        """Start the engine, from the trial's last checkpoint if there is one that it can load."""
        folder = self.folder / "checkpoint"
        self._begin_measuring()
        content = self.workers.agreed(_read_state(folder) if self.workers.first else None)
        if content is None:
            self.stages.start()
            return
        tag, layout = content.pop("tag"), content.pop("layout", self._layout)
        if not self._can_load(layout):
            found, now = (" and ".join(f"{key} {value}" for key, value in x.items()) for x in (layout, self._layout))
            logger.warning("the checkpoint is of %s, which %s cannot load: the trial starts again", found, now)
            if self.workers.first:
                shutil.rmtree(folder)
            self.workers.wait()
            self.stages.start()
            return
        history = [Epoch.model_validate(epoch) for epoch in content.pop("history")]
        self.state = _State(history=history, **content)
        self.stages.start(self.state.step)
        self.stages.engine.load(folder, tag)
        if self.workers.first:
            shutil.copy2(folder / tag / BEST, self.folder / BEST)
        self.workers.wait()
        self._saved = len(history)
        logger.info("resumed after epoch %d, step %d", len(history), self.state.step)

    @property
    def _layout(self) -> dict[str, int]:
        """Over what a checkpoint is spread."""
        return {"workers": self.workers.count, "zero_stage": self.resources.zero_stage}

    def _can_load(self, layout: Mapping[str, int]) -> bool:
        """Whether DeepSpeed loads a checkpoint of another number of workers: where every worker has all of it."""
        spread = layout["zero_stage"] or self.resources.zero_stage or self.spec.optimizer.bf16
        return layout == self._layout or not spread

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.state.phases_s[name] = self.state.phases_s.get(name, 0.0) + time.monotonic() - started

    def _tick(self) -> None:
        """Report during evaluation that the trial is still running."""
        self._report_progress("validate" if self.state.step < self.total_steps else "test", len(self.state.history))

    def _report_progress(
        self, phase: str, epoch: int = 0, train_loss: float | None = None, force: bool = False
    ) -> None:
        now = time.monotonic()
        if not force and now - self._reported < REPORT_INTERVAL_S:
            return
        self._reported = now
        history = self.state.history
        fraction = self.state.step / self.total_steps if self.total_steps else 0.0
        latest = history[-1].validation_perplexity if history else None
        self.report(Progress(fraction, phase, epoch or len(history), train_loss, latest))


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """The seed of a worker's dropout in an epoch; torch's CPU generator uses the lowest 32 bits of a seed alone."""
    whole = seed * 100_003 + epoch
    return whole if rank == 0 else int.from_bytes(hashlib.sha256(f"{whole}:{rank}".encode()).digest()[:4])


def _read_state(folder: Path) -> dict[str, Any] | None:
    """What the valid checkpoint in a folder says of the trial; None: there is none."""
    path = folder / "state.json"
    content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return content
