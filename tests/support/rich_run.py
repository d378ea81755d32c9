"""A run folder with everything the page can show: synthetic scores, consistent with those per example."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean

from harness.core.files import write_atomically
from harness.core.record import Plan, PlannedTrial, TrialRecord, record_path
from harness.core.search import DECISIONS, Decision, Decisions
from tests.support.runs import METHODS, draw_pictures, fake_plan, write_examples, write_run

SETTINGS = ("examples=256 epochs=8", "examples=1024 epochs=8")
SEEDS = (0, 1, 2)
COUNT = 24
RATES = (0.0003, 0.001)
NOTE = "SPICE was not computed: no Java here"
EVIL = "<script>document.title = 'captions are data'</script>"


def rich_plan() -> Plan:
    """Three seeds in two settings; LoRA has two learning rates, IA3 declares one, BitFit one more than the others."""
    plan = fake_plan(seeds=SEEDS, settings=SETTINGS)
    trials: list[PlannedTrial] = []
    for trial in plan.trials:
        tried = {"lora": (), "bitfit": (1e-4, 1e-2)}.get(trial.method, (1e-4,))
        rates = RATES if trial.method == "lora" else RATES[1:]
        trials += [
            trial.model_copy(
                update={
                    "trial_id": f"{trial.trial_id}-{rate:g}",
                    "learning_rate": rate,
                    "tried_learning_rates": tried,
                }
            )
            for rate in rates
        ]
    return plan.model_copy(update={"trials": tuple(trials)})


def write_rich_run(folder: Path) -> Path:
    """Write the run, with a failed, a pruned and a missing trial, a broken and a foreign record."""
    plan = rich_plan()
    pictures = draw_pictures(folder / "pictures", COUNT)
    qualities = {(label, grouping): quality for label, _, grouping, _, quality in METHODS}

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        number = plan.trials.index(trial)
        if number == 4:
            return record.model_copy(update={"status": "failed", "reason": "loss is NaN at step 7", "metrics": {}})
        if number == 9:
            return record.model_copy(update={"status": "pruned", "reason": "worse than half", "metrics": {}})
        if number == 11:
            return None
        quality = qualities[(trial.label, trial.grouping)] - (0.3 if trial.learning_rate == RATES[0] else 0)
        rng = random.Random(trial.trial_id)
        shared = random.Random(7)
        bias = rng.gauss(0, 0.01)
        scores = [max(0.0, 0.2 + 0.9 * quality + bias + shared.gauss(0, 0.2)) for _ in range(COUNT)]
        captions = [f"{trial.label} sees a circle left of a square {index}" for index in range(COUNT)]
        if trial.method == "none":
            captions[:] = [f"{EVIL} {index}" for index in range(COUNT)]
        write_examples(folder, trial.trial_id, captions, pictures, cider=[None, *scores])
        metrics = {
            "validation": {"perplexity": record.metrics["validation"]["perplexity"] + 0.5 * (1 - quality)},
            "test": record.metrics["test"] | {"cider": fmean(scores)},
        }
        return record.model_copy(update={"metrics": metrics, "warnings": (NOTE,)})

    write_run(folder, plan, change)
    decision = Decision(row="digest", name="row", epoch=1, candidates=(), out=(plan.trials[9].trial_id,))
    write_atomically(folder / DECISIONS, Decisions(decisions=(decision,)).model_dump_json())
    broken = record_path(folder, "broken")
    broken.parent.mkdir()
    broken.write_text("{", encoding="utf-8")
    return folder
