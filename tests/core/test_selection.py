"""Selecting trials by what they are."""

from __future__ import annotations

import re

import pytest

from harness.core.errors import UserError
from harness.core.record import Plan, PlannedTrial
from harness.core.selection import select
from tests.support.runs import fake_plan

RANKS, SEEDS = (1, 2, 8), (0, 1, 2, 3)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """LoRA of three ranks and full fine-tuning, each with four seeds."""
    lora = [
        PlannedTrial(
            trial_id=f"{rank}0000000000{seed}", label=f"LoRA r={rank}", method="lora", grouping="specific", setting="",
            seed=seed, learning_rate=1e-3, options={"adapter.rank": rank, "adapter.grouping.image": "vision"},
        )
        for rank in RANKS for seed in SEEDS
    ]  # fmt: skip
    full = [
        PlannedTrial(trial_id=f"full{seed}", label="Full", method="full", grouping="", setting="", seed=seed)
        for seed in SEEDS
    ]
    common = {"budget.examples": "all", "budget.epochs": 3, "optimizer.bf16": False, "adapter.where": "AF"}
    return fake_plan(trials=(*lora, *full), options={**common, "task.where": "here"})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("rank=8 and seed<3", 3),
        ("adapter.rank == 8", 4),
        ("rank != 8", 12),  # also those without a rank
        ("rank <= 2 and not seed in [0, 1]", 4),
        ("method=full or rank=1 and seed=0", 5),
        ("(method=full or rank=1) and seed=0", 2),
        ("seed >= 1 and seed > 2", 4),
        ("label='LoRA r=8'", 4),
        ('grouping = "specific"', 12),
        ("learning_rate=0.001", 12),
        ("learning_rate=1e-3", 12),
        ("examples=all and bf16=false", 16),
        ("epochs=3", 16),
        ("image=vision", 12),
        ("trial_id=100000000001", 1),  # digits alone
        ("adapter.where=AF", 16),
        ("not (rank=8 or rank=1)", 8),
        ("(" * 20 + "rank=8" + ")" * 20, 4),
    ],
)
def test_a_test_selects_trials(text: str, count: int, plan: Plan) -> None:
    assert len(select(plan, text)) == count


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rnk=8", "--only: unknown name 'rnk'; allowed:"),
        ("rnk=8", "did you mean 'rank'?"),
        ("where=AF", "--only: 'where' is the end of several names; allowed: adapter.where, task.where"),
        ("method=ful", "'method=ful' selects none of 16 trials; method: allowed: full, lora; did you mean 'full'"),
        ("rank=4", "selects none of 16 trials; adapter.rank: allowed: 1, 2, 8"),
        ("rank=8 and method=full", "--only: 'rank=8 and method=full' selects none of 16 trials"),
        ("rank=", "--only: 'rank=' cannot be read at character 6; allowed: NAME=VALUE"),
        ("rank=8 seed=1", "cannot be read at character 8"),
        ("", "--only: '' cannot be read"),
        ("seed<many", "--only: seed<many: found a word; allowed: a number"),
        ("__import__('os').system('true')", "cannot be read"),
        ("x" * 3000, "--only: found 3,000 characters; allowed: 2,000"),
        ("(" * 900 + "rank=8" + ")" * 900, "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_what_can(text: str, says: str, plan: Plan) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        select(plan, text)
