"""Runs one trial: builds, trains, validates every epoch, tests the best epoch, writes the record.

This is the only training loop: differences between methods and tasks are hooks of the adapter or the task. Does not
depend on Ray.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core.origin import during
from harness.core.record import Data, Epoch, Memory
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model import budget
from harness.model.batch import Batch
from harness.model.build import Common, TrialData
from harness.model.inputs import Inputs
from harness.model.kept import Kept
from harness.model.workers import ALONE, Workers
from harness.tracking.tracker import Tracker
from harness.trial import measure
from harness.trial.best import evaluate_best
from harness.trial.checkpoint import BEST, BrokenCheckpointError, Checkpoints, Place, Saved
from harness.trial.engine import PARTITIONED_STAGE, most_memory, prepare_process
from harness.trial.evaluate import Evaluator, Likelihood
from harness.trial.randomness import dropout_seed, random_states, set_random_states
from harness.trial.scores import warm_up
from harness.trial.stages import Stages
from harness.trial.steps import Steps, Taken

REPORT_INTERVAL_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a trial, for display."""

    fraction: float  # of its optimizer steps, 0 to 1
    phase: str  # "build", "encode", "train", "validate", "test"; "encode image 40%, 3.0 s left"
    epoch: int = 0
    train_loss: float | None = None
    validation_perplexity: float | None = None


Report = Callable[[Progress], None]
Stop = Callable[[], bool]


def never() -> bool:
    """A trial that nobody stops."""
    return False


class StoppedError(Exception):
    """The trial was asked to stop, and has saved where it is, if there was something to save."""


@dataclass
class _State:
    """State that is saved in checkpoints and survives a restart."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int | None = None
    step: int = 0
    losses: list[float] = field(default_factory=list)  # of the batches of the current epoch
    random: list[Tensor] = field(default_factory=list)  # of a checkpoint inside an epoch: the generators' states
    phases_s: dict[str, float] = field(default_factory=dict)
    activations_bytes: int = 0
    memory: Memory | None = None  # of the current stage, by an earlier process


class Trial:
    """One trial in this process.

    Args:
        spec: of the trial.
        folder: of the trial.
        resources: for threads, ZeRO stage and checkpoint interval.
        tracker: receives metrics.
        report: called with the progress, at most about once a second and after every epoch.
        workers: this process and the others that run the trial with it.
        rungs: epochs after which it pauses.
        stop: whether this worker is asked to stop the trial; one is enough.
        kept: what earlier trials of this process have left for it, and it for later ones.
        common: gives what the trial has together with others of this process, if there are any.

    Attributes:
        state: saved in checkpoints.
        measured: fields of the record that are known so far.
        cut: kind of text ("target", "input") → keys of the texts that were truncated.
        notes: notes of the metrics on their scores.
        stages: the model and its engine; set when they are built.
        peak: peak memory since before the model was built; set then.
        clock: time of the current stage's training steps.
        paused: whether ``run`` ended at a rung.
        kept: what trials of this process leave for later ones.
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
        stop: Stop = never,
        kept: Kept | None = None,
        common: Callable[[], Common] | None = None,
    ) -> None:
        self.kept, self._common = kept or Kept(0), common
        self.spec, self.folder, self.resources, self.tracker, self.report = spec, folder, resources, tracker, report
        self.workers, self.rungs, self.stop, self.paused = workers, rungs, stop, False
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.state = _State()
        self.measured: dict[str, Any] = {"device": measure.device_name(self.device)}  # fields of the record
        self.total_steps = 0
        self.cut: dict[str, set[int]] = {}
        self.notes: tuple[str, ...] = ()
        self.clock = measure.StepClock(self.device)
        self._validated: Likelihood | None = None  # of the best epoch, if this process validated it
        self._reported, self._in_phase = 0.0, "build"
        layout = {"workers": workers.count, "zero_stage": resources.zero_stage}
        self.checkpoints = Checkpoints(folder, workers, layout, resources.checkpoint_interval_s)

    def steps(self) -> Steps[None]:
        """Build, train and test; after an exception, ``state`` and ``measured`` have what was measured before it.

        Whoever iterates takes the training steps: ``take`` does it for a trial alone.
        """
        self._report_progress("build", force=True)
        if self.workers.count == 1:
            self._obey(save=False, stop=self.stop())
        with self._phase("build"):
            if self.workers.first:
                warm_up(self.spec.task.metrics)
            self.build()
            self.total_steps, batches = self.stages.total_steps, self.stages.built.batches
            self.cut = {"target": batches.cut_targets, "input": batches.cut_inputs}
            self.measured["parameters"] = self.stages.built.parameters  # trainable: parameters that any stage trains
        try:
            with self._phase("build"):
                self._resume()
            with self._phase("encode"):
                self._encode()
            yield from self._train()
            if "memory" not in self.measured:  # what was left to do needs no training
                self._measure()
            if self.workers.first:
                self.measured["data"] = self._data()
            if self.paused:
                return
            with self._phase("test"):
                self.measured["metrics"] = self._test()
        finally:
            self.stages.close()
        if self.workers.first:
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)

    def build(self, data: TrialData | None = None) -> None:
        """Prepare the process and build the model, without an engine.

        Args:
            data: of a trial that differs at most in its adapter and learning rate; None: it is read.
        """
        torch.set_num_threads(self.resources.cpus_per_worker)
        prepare_process()
        self.kept.begin()
        self.peak = measure.PeakMemory(self.device)
        common = self._common() if self._common else None
        self.stages = Stages(self.spec, self.device, self.resources, self.folder, data, self.kept, common)

    def _begin_measuring(self) -> None:
        """Restart the measurement of speed and activations: stages differ, so only the last one is recorded."""
        self.clock = measure.StepClock(self.device)
        self.state.activations_bytes, self.state.memory = 0, None

    def _measure(self) -> None:
        """Measure memory and speed of the current stage so far, also by earlier processes of the trial."""
        now = self.stages.engine.memory(self.state.activations_bytes, self.peak)
        if self._common:  # the process is that of all
            now = now.model_copy(update={"process_peak_bytes": None, "process_before_bytes": None})
        self.measured["memory"] = most_memory([now, self.state.memory]) if self.state.memory else now
        self.measured["throughput"] = self.clock.throughput(self.workers)

    def _encode(self) -> None:
        """Run the frozen encoders before training, so that they are not part of the measured training speed."""
        splits, found = self.stages.built.splits, self.stages.built.batches.features
        evaluation = [*splits.validation, *splits.test]
        found.precompute(splits.train, evaluation, lambda: self._tick(found.progress), self.workers)
        if (lengths := self.stages.built.order.length_of) is not None:
            lengths.count(self._tick)
        self.peak.shift(self.kept.shift_bytes(self.device))

    def _train(self) -> Steps[None]:
        """Train until the last epoch, until validation improves no more, or until the next rung."""
        self._obey(save=False, stop=self._asked()[1])
        while (done := len(self.state.history)) < self.spec.budget.epochs:
            if self.stages.stops_after(done, self.state.best_epoch):
                logger.info("stopped: no better validation perplexity for %d epochs", self.spec.budget.patience)
                self.total_steps = self.state.step
                return
            if done in self.rungs:
                if self.stages.engine.accumulating:
                    raise RuntimeError(f"epoch {done} ends within a gradient accumulation, which no checkpoint has")
                self._save()
                self.paused = True
                return
            yield from self._epoch(done + 1)

    def _epoch(self, epoch: int) -> Steps[None]:
        train_loss = yield from self._train_epoch(epoch)
        self.stages.built.batches.features.flush()
        with self._phase("validate"):
            self._report_progress("validate", epoch)
            validated = self._evaluator().likelihood(self.stages.built.splits.validation)
        result = Epoch(
            epoch=epoch,
            step=self.state.step,
            train_loss=train_loss,
            validation_perplexity=validated.perplexity,
            learning_rate=self.stages.engine.learning_rate,
        )
        if result.validation_perplexity < min((e.validation_perplexity for e in self.state.history), default=math.inf):
            self.state.best_epoch, self._validated = epoch, validated
            self.stages.engine.save_weights(self.folder / BEST)
        self.state.history.append(result)
        self.state.losses = []
        logger.info(
            "epoch %d of %d, step %d: train loss %.6g, validation perplexity %.6g, learning rate %.6g",
            *(epoch, self.spec.budget.epochs, result.step, train_loss, validated.perplexity, result.learning_rate),
        )
        self.tracker.metrics(result.model_dump(exclude={"epoch", "step"}), step=result.step)
        self._report_progress("validate", epoch, train_loss, force=True)
        if not self.stages.engine.accumulating:
            save, stop = self._asked()
            self._obey(save and epoch not in self.rungs, stop)

    def _train_epoch(self, epoch: int) -> Steps[float]:
        """Train for one epoch, or what is left of it; returns the unweighted mean of the batch losses."""
        losses = self.state.losses
        # Dropout uses the global generator; seeding it per epoch makes a resumed trial repeat lost epochs exactly.
        if losses and self.state.random:
            set_random_states(self.state.random)
        else:
            torch.manual_seed(dropout_seed(self.spec.seed, epoch, self.workers.rank))
        self.stages.built.model.train()
        batches = self.stages.built.order.batches(epoch, self.spec.optimizer.per_device_train_batch_size)
        for draws in batches[len(losses) :]:
            if self.stages.stage_ended:
                with self._phase("build"):
                    self.stages.advance()
                self._begin_measuring()
                self.stages.built.model.train()
            engine = self.stages.engine
            engine.asks = self._asks()
            taken = yield draws
            losses.append(taken.loss)
            self._spent("train", taken.duration_s)
            self._report_progress("train", epoch, losses[-1])
            if not engine.accumulating:
                self._obey(*map(bool, engine.asked))
        self._measure()
        return sum(losses) / len(losses)

    def _asks(self) -> tuple[float, float]:
        """What this worker wants of all: a checkpoint, by the clock of the first, and the end of the trial."""
        return float(self.workers.first and self.checkpoints.due(self.clock.last_s)), float(self.stop())

    def _asked(self) -> tuple[bool, bool]:
        """What any worker wants of all."""
        save, stop = self.workers.total(*self._asks())
        return bool(save), bool(stop)

    def _obey(self, save: bool, stop: bool) -> None:
        """Do what all workers have agreed on. During the test, the weights that are saved are those tested: unused.

        Raises:
            StoppedError: the trial was asked to stop.
        """
        if save or (stop and self.state.step):
            self._save()
        if stop:
            raise StoppedError

    def take(self, draws: list[budget.Draw]) -> Taken:
        """Take a training step."""
        started = time.monotonic()
        loss = self.train_step(draws)
        return Taken(loss, time.monotonic() - started)

    def train_step(self, draws: list[budget.Draw]) -> float:
        """Make this worker's share of a batch and train on it; returns the loss of the batch."""
        own = self.stages.built.order.share(draws, self.workers)
        with self.training_on(own):
            return self.step_on(self.batch(own) if own else self.batch(draws[:1]).as_stand_in())

    def training_on(self, draws: Sequence[budget.Draw]) -> AbstractContextManager[None]:
        """Errors tell of these examples."""
        return during("", dict.fromkeys(self.stages.built.splits.train[draw.example].id for draw in draws))

    def batch(self, draws: Sequence[budget.Draw], share: bool = True) -> Batch:
        """The batch of training items, on the device; ``share``: they may share rows, if the model allows it."""
        built = self.stages.built
        return built.batches.train(built.splits.train, draws, share and self.stages.shares_rows).to(self.device)

    def took_step(self, duration_s: float) -> None:
        """Note that the trial's engine has taken a step, without ``step_on``."""
        self.clock.last_s = duration_s
        self.state.step = self.stages.step

    def step_on(self, batch: Batch) -> float:
        """Train on a batch, and measure the time; returns its loss."""
        # Activations are measured only in warm-up steps, because measuring them takes time.
        measuring = self.clock.warming_up
        model = self.stages.built.model
        with measure.saved_for_backward(model) if measuring else nullcontext([0]) as saved, self.clock:
            loss = self.stages.engine.train_step(batch)
        self.clock.count(batch.size, batch.positions, compiled=(compiling_s := self.stages.compiling_s()) > 0)
        if compiling_s:  # of the time that the step takes in all
            self._spent("compile", compiling_s)
            self._spent("train", -compiling_s)
        self.state.activations_bytes = max(self.state.activations_bytes, saved[0])
        self.state.step = self.stages.step
        return loss

    def _evaluator(self) -> Evaluator:
        built = self.stages.built
        built.model.eval()
        synced = self.workers.count > 1 and self.resources.zero_stage == PARTITIONED_STAGE
        shared = self.resources.shared_prefix
        made = built.model, built.batches, self.spec.eval, self.device, self._tick, self.workers
        return Evaluator(*made, shared_prefix=shared, synced=synced)

    def _test(self) -> dict[str, dict[str, float]]:
        """Evaluate the best epoch; returns the metrics, on rank 0."""
        self._report_progress("test", force=True)
        self.stages.engine.load_weights(self.folder / BEST)
        examples = self.stages.built.splits
        tested = evaluate_best(self.spec, self._evaluator(), examples, self.folder, self._validated)
        for texts in self.cut.values():
            texts.update(*self.workers.gather(texts))
        self.measured["answers"], self.notes = tested.answers, tested.notes
        return tested.metrics

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
        return (*cut, *self.notes, *(self.stages.warnings if hasattr(self, "stages") else ()))

    def _save(self) -> None:
        """Make a checkpoint of the trial as it is, unless there is one."""
        state, epochs = self.state, len(self.state.history)
        tag = f"epoch-{epochs + 1}-step-{state.step}" if state.losses else f"epoch-{epochs}"
        if self.checkpoints.tag == tag:
            return
        with self._phase("save"):
            self._measure()
            saved = Saved(
                tag=tag,
                history=tuple(state.history),
                best_epoch=state.best_epoch,
                step=state.step,
                phases_s=state.phases_s,
                activations_bytes=state.activations_bytes,
                memory=self.measured["memory"],
            )
            place = Place(state.losses, random_states(), self.cut, self.clock.counts, self.measured["device"])
            self.checkpoints.save(self.stages.engine, saved, place)

    def _resume(self) -> None:
        """Start the engine, from the trial's last checkpoint if there is one that it can load.

        Raises:
            BrokenCheckpointError: a worker of several cannot read it; the next attempt starts from the beginning.
        """
        self._begin_measuring()
        saved = self.checkpoints.read()
        if saved is not None and not self._can_load(saved.layout or self.checkpoints.layout):
            saved = None
        if saved is None:
            self.stages.start()
            return
        self.stages.start(saved.step)
        try:
            place = self.checkpoints.load(self.stages.engine, saved)
        except BrokenCheckpointError as error:
            self.checkpoints.discard(error)
            if self.workers.count > 1:
                raise
            self._start_again()
            return
        self._continue(saved, place)

    def _start_again(self) -> None:
        """Build the model anew, because a checkpoint that could not be read may have changed it."""
        self.stages.close()
        self.build()
        self.stages.start()

    def _continue(self, saved: Saved, place: Place) -> None:
        """Go on where a checkpoint was made."""
        self.state = _State(
            list(saved.history), saved.best_epoch, saved.step, place.losses, place.random, dict(saved.phases_s)
        )
        for kind, keys in place.cut.items():
            self.cut[kind].update(keys)
        if saved.layout == self.checkpoints.layout:
            self.state.activations_bytes, self.state.memory = saved.activations_bytes, saved.memory
            if place.device == self.measured["device"]:
                self.clock = measure.StepClock(self.device, place.counts)
        batches = f", batch {len(place.losses)} of epoch {len(saved.history) + 1}" if place.losses else ""
        logger.info("resumed after epoch %d, step %d%s", len(saved.history), saved.step, batches)

    def _can_load(self, found: dict[str, int]) -> bool:
        """Whether DeepSpeed loads a checkpoint of another number of workers: where every worker has all of it."""
        own = self.checkpoints.layout
        if found == own or not (found["zero_stage"] or own["zero_stage"] or self.spec.optimizer.bf16):
            return True
        there, now = (" and ".join(f"{key} {value}" for key, value in x.items()) for x in (found, own))
        if self.workers.first:
            self.checkpoints.discard(f"it is of {there}, which {now} cannot load")
        self.workers.wait()
        return False

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started, self._in_phase = time.monotonic(), name
        try:
            yield
        finally:
            self._spent(name, time.monotonic() - started)

    def _spent(self, phase: str, duration_s: float) -> None:
        self.state.phases_s[phase] = self.state.phases_s.get(phase, 0.0) + duration_s

    def _tick(self, detail: str = "") -> None:
        """Report while inputs are encoded and during evaluation that the trial is still running.

        Raises:
            StoppedError: the trial was asked to stop. Several workers agree on that after training steps and epochs
                only, because here they have different numbers of batches.
        """
        self._report_progress(f"{self._in_phase} {detail}".strip(), len(self.state.history))
        if self.workers.count == 1 and self.stop():
            self._obey(save=False, stop=True)

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
