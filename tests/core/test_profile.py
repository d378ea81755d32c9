"""The profile of a run: read back as written, found by trial, and never skipped silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.core.profile import Measured, Profile, ProfileEntry, profile_path, read_profile, write_profile
from harness.core.record import Plan, read_run
from tests.support.runs import fake_plan, write_run

pytestmark = pytest.mark.quick

RATIO = Measured(median=1.13, low=1.1, high=1.17, n=15)
LORA = ProfileEntry(
    key="a", name="LoRA r=4 specific", setting="", trial_ids=("l0", "l1"), reference="LoRA r=4 agnostic",
    reference_trial_ids=("r0",), device="cpu x86_64", examples_per_step=16, step_time_ratio=RATIO,
)  # fmt: skip
REFERENCE = LORA.model_copy(update={"key": "b", "name": "LoRA r=4 agnostic", "trial_ids": ("r0",)})
PROFILE = Profile(entries=(LORA, REFERENCE))


def planned(folder: Path) -> Plan:
    plan = fake_plan()
    write_run(folder, plan)
    return plan


def test_it_is_read_back_as_written_and_found_by_trial(tmp_path: Path) -> None:
    planned(tmp_path)
    assert read_run(tmp_path).profile is None
    write_profile(tmp_path, PROFILE)
    assert read_profile(tmp_path) == read_run(tmp_path).profile == PROFILE
    assert PROFILE.entry_of("l1") == LORA
    assert PROFILE.entry_of("r0") == REFERENCE
    assert PROFILE.entry_of("other") is None
    assert [entry.is_reference for entry in PROFILE.entries] == [False, True]


def test_a_broken_one_is_named_and_the_rest_of_the_run_is_read(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    profile_path(tmp_path).write_text('{"entries": [{"key": 1}]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"profile\.json: not the profile of a run: entries\.0\."):
        read_profile(tmp_path)
    run = read_run(tmp_path)
    assert run.profile is None
    assert len(run.records) == len(plan.trials)
    assert [message.partition(": not")[0] for message in run.broken] == [str(profile_path(tmp_path))]


def test_a_median_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Measured(median=float("nan"), n=1)
