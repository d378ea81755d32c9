"""A training step waits for its device at most once, for the loss: counted on a CPU, where reading a number is the same
operation, and with a stand-in for the events of a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.experiment.sections import Resources
from harness.tracking.tracker import NoTracker
from harness.trial import measure
from harness.trial.trial import Trial
from tests.support.trials import FULL, LORA, spec_of

GPU = torch.device("cuda")
BATCHES = {"per_device_train_batch_size": 8}


class Reads(TorchDispatchMode):
    """Counts what reads a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("adapter", "sections"),
    [
        (LORA, {}),
        (LORA, {"optimizer": BATCHES | {"train_sampling_strategy": "group_by_length"}}),
        (LORA | {"dropout": 0.1}, {"budget": {"examples": 32, "references": "grouped"}}),
        ({"method": "ia3", "learning_rate": 0.2, "grouping": "specific"}, {}),
        ({"method": "bitfit", "learning_rate": 0.1, "grouping": "agnostic"}, {}),
        ({"method": "moka", "learning_rate": 1e-3}, {}),
        (FULL, {"optimizer": BATCHES | {"gradient_accumulation_steps": 2, "weight_decay": 0.1}}),
    ],
    ids=["lora", "by length", "dropout, grouped", "ia3", "bitfit", "moka", "full, accumulated"],
)
def test_a_step_reads_the_loss_and_nothing_else(tmp_path: Path, adapter: dict[str, Any], sections: Any) -> None:
    spec = spec_of(tmp_path, adapter, **({"optimizer": BATCHES} | sections))
    trial = Trial(spec, tmp_path, Resources(), NoTracker(), lambda _: None)
    trial.build()
    trial.stages.start()
    trial.stages.built.model.train()
    batches = trial.stages.built.order.batches(1, 8)
    made = [trial.batch(draws) for draws in batches[:4]]
    found = []
    for batch in made:
        with Reads() as reads:
            trial.step_on(batch)
        found.append(reads.count)
    trial.stages.close()
    assert found == [1] * 4


class Device:
    """Executes what it is told when somebody looks at it, or waits for it."""

    def __init__(self) -> None:
        self.now_s, self.waits = 0.0, 0
        self.told: list[Any] = []

    def work(self, seconds: float) -> None:
        self.told.append(seconds)

    def reach(self, event: Any) -> None:
        while event.at_s is None:
            self.do()

    def do(self) -> None:
        task = self.told.pop(0)
        if isinstance(task, float):
            self.now_s += task
        else:
            task.at_s = self.now_s


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at_s: float | None = None

        def record(self) -> None:
            made.told.append(self)

        def query(self) -> bool:
            return self.at_s is not None

        def synchronize(self) -> None:
            made.waits += self.at_s is None
            made.reach(self)

        def elapsed_time(self, other: Event) -> float:
            assert self.at_s is not None
            assert other.at_s is not None
            return (other.at_s - self.at_s) * 1000

    def refuse(*_: Any) -> None:
        raise AssertionError("a step waits for its whole device")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    return made


def test_the_times_of_a_gpu_are_read_when_it_has_passed_them(device: Device) -> None:
    clock = measure.StepClock(GPU)
    known = []
    for duration in (50.0, 40.0, 30.0, 2.0, 3.0, 5.0):
        with clock:
            device.work(duration)
            while len(device.told) > 2:  # as the loss is read: what was told before has ended, but not this step
                device.do()
        known.append(clock.last_s)
        clock.count(examples=10, tokens=100)
        device.work(1000.0)  # batches are made, and evaluation
    assert device.waits == 0
    assert known == [0.0, 50.0, 40.0, 30.0, 2.0, 3.0]
    throughput = clock.throughput()
    assert throughput is not None
    assert (throughput.examples_per_s, throughput.tokens_per_s, throughput.measured_steps) == (3.0, 30.0, 3)
    assert device.waits == 1
    assert clock.counts == measure.Counts(3, 30, 300, 10.0)
    again = measure.StepClock(GPU, clock.counts)
    assert again.counts == clock.counts


def failing_step(clock: measure.StepClock, device: Device) -> None:
    with clock:
        device.work(100.0)
        raise FloatingPointError("loss")


def test_a_step_that_fails_is_not_counted(device: Device) -> None:
    clock = measure.StepClock(GPU)
    for _ in range(measure.WARMUP_STEPS):
        with clock:
            device.work(7.0)
        clock.count(1, 1)
    with pytest.raises(FloatingPointError, match="loss"):
        failing_step(clock, device)
    with clock:
        device.work(2.0)
    clock.count(10, 10)
    assert clock.seconds == 2.0
    assert clock.steps == 1
