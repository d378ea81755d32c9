"""Training steps of several trials together and alone: ``python benchmarks/packs.py [--rows 16] [--trials 8]``.

Training steps of LoRA (rank 4, as in the quickstart), of IA3 and of the projector alone, on the built-in backbones: in
turn those of each trial alone, and those of all together (harness/trial/pack.py), in one process, by CPU time where
there is no GPU. Ratios are medians of ratios. The memory of a pack is measured by ``make bench``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts this folder first on the path, where adapters.py shadows the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import yaml

from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.experiment.sections import Resources
from harness.model.build import Common, common_of
from harness.tracking.tracker import NoTracker
from harness.trial.attempt import steps_to_record
from harness.trial.pack import Member, Together
from harness.trial.steps import Taken
from harness.trial.trial import Trial

KINDS: dict[str, dict[str, Any]] = {
    "LoRA r=4 agnostic": {"method": "lora", "rank": 4, "grouping": "agnostic"},
    "LoRA r=4 specific": {"method": "lora", "rank": 4, "grouping": "specific"},
    "IA3 agnostic": {"method": "ia3"},
    "none": {"method": "none"},
}
STEPS, WARMUP = 16, 3
EXAMPLES = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--trials", type=int, default=8, help="of a pack")
    given = parser.parse_args()
    for name, adapter in KINDS.items():
        alone_s, ratio = _in_process(_steps, given.rows, given.trials, adapter)
        print(f"{name}: {1000 * alone_s:.1f} ms a step alone, together {ratio:.2f} of that")


def _in_process(work: Any, *given: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


def _specs(folder: Path, rows: int, trials: int, adapter: dict[str, Any]) -> list[TrialSpec]:
    content = {
        "task": {"name": "scenes"},
        "adapters": [{**adapter, "learning_rate": [1e-3 * (number + 1) for number in range(trials)]}],
        "budget": {"examples": EXAMPLES},
        "optimizer": {"per_device_train_batch_size": rows},
        "eval": {"test_examples": 16, "max_new_tokens": 8},
    }
    path = folder / "packs.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return expand(Experiment.from_yaml(path))


def _steps(rows: int, trials: int, adapter: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a step alone, and the share of that which a step of all takes for each."""
    torch.set_num_threads(1)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        specs = _specs(Path(folder), rows, trials, adapter)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

        @cache
        def common() -> Common:
            return common_of(specs[0], device)

        members = []
        for spec in specs:
            own = Path(folder) / spec.trial_id
            own.mkdir()
            trial = Trial(spec, own, Resources(), NoTracker(), lambda _: None, common=common)
            trial.build()
            trial.stages.start()
            trial.stages.built.model.train()
            members.append(Member(trial, steps_to_record(trial, "packs")))
        together, order = Together(common, measured=False), members[0].trial.stages.built.order.epoch(1)
        alone_s, shares = [], []
        for number in range(STEPS):
            start = number * rows % EXAMPLES
            for member in members:
                member.draws = order[start : start + rows]
            batch = members[0].trial.batch(order[start : start + rows])
            times = [clock()]
            taken = [member.take(batch) for member in members]
            times.append(clock())
            joint = together.take(members, batch)
            times.append(clock())
            if joint is None or not all(isinstance(one, Taken) for one in (*taken, *joint)):
                raise RuntimeError(together.why_alone or "a step failed")
            if number >= WARMUP:
                alone_s.append((times[1] - times[0]) / trials)
                shares.append((times[2] - times[1]) / (times[1] - times[0]))
        return statistics.median(alone_s), statistics.median(shares)


if __name__ == "__main__":
    main()
