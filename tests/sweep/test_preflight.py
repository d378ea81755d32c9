"""Errors that are found before any trial starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import harness
from harness.core import hub
from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec, expand
from harness.experiment.sections import Resources
from harness.sweep import preflight
from tests.support.trials import spec_of


def test_a_missing_bash_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preflight.check_shell()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"PATH={tmp_path}: bash not found"):
        preflight.check_shell()


def test_a_temporary_folder_that_is_too_long_for_sockets_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    preflight.check_ray()
    for name in ("TMPDIR", "RAY_TMPDIR"):  # Ray reads its own first
        monkeypatch.setenv(name, f"/tmp/{'x' * 90}")
        with pytest.raises(UserError, match=rf"^{name}=/tmp/x+: too long for Ray, .*set RAY_TMPDIR"):
            preflight.check_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nobody")
    with pytest.raises(UserError, match=r"^RAY_TMPDIR=/proc/nobody: not writable"):
        preflight.check_ray()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster that runs has its own
    preflight.check_ray()


def test_a_home_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    with pytest.raises(UserError, match=r"^HOME=/proc/nobody: not writable"):
        preflight.check_ray()
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    preflight.check_ray()


def spec_with_64_positions(folder: Path, questions: int, **sections: object) -> TrialSpec:
    """Conversations of the text task, the last with several turns, for a GPT-2 with 64 learned positions."""
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("builtin/tiny-llama"))
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split in ("train", "validation", "test"):
        rows = []
        for number in range(4):
            turn = ({"role": "user", "content": f"{split} {number}?"}, {"role": "assistant", "content": "a red one."})
            rows.append({"messages": [*turn] * (questions if number == 3 else 1)})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "text", "root": str(folder), "validation": "validation.jsonl", "test": "test.jsonl"}
    given = {"adapters": [{"method": "lora", "rank": 2, "learning_rate": 1e-3}], "eval": {"max_new_tokens": 4}}
    (spec,) = expand(harness.Experiment(**{
        "task": task, "backbone": {"language_model": str(folder / "model")}, **given, **sections,
    }))  # fmt: skip
    return spec


@pytest.mark.parametrize(
    ("questions", "sections"),
    [
        (12, {}),
        (1, {"eval": {"max_new_tokens": 64}}),
        (1, {"adapters": [{"method": "soft_prompt", "num_virtual_tokens": 60, "learning_rate": 1e-3}]}),
    ],
)
def test_an_example_beyond_the_last_position_is_an_error_before_compute(
    tmp_path: Path, questions: int, sections: dict[str, object]
) -> None:
    spec = spec_with_64_positions(tmp_path, questions, **sections)
    with pytest.raises(UserError, match=r"task text: example .* positions, but .*model has 64 .*max_input_length"):
        preflight.check_data([spec], tmp_path / "run", Console(quiet=True))


def test_examples_that_fit_pass(tmp_path: Path) -> None:
    preflight.check_data([spec_with_64_positions(tmp_path, 1)], tmp_path / "run", Console(quiet=True))


def test_a_feature_cache_without_room_or_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path)
    space = preflight.check_data([spec], tmp_path / "run", Console(quiet=True))
    assert space.size_bytes == 56 * 16 * 96 * 4
    place: dict[str, Any] = {"feature_cache": str(tmp_path / "cache")}
    preflight.check_feature_cache(Resources(**place), space)
    small = Resources(**place, feature_cache_gib=0.0001)
    with pytest.raises(UserError, match=r"cache: about 0\.00 GiB are needed, and the cache may take .*_gib"):
        preflight.check_feature_cache(small, space)
    unwritable = Resources(feature_cache="/proc/features")
    with pytest.raises(UserError, match=r"^/proc/features: cannot be written: .*; set HARNESS_CACHE or resources"):
        preflight.check_feature_cache(unwritable, space)
    preflight.check_feature_cache(unwritable, space, address="10.0.0.1:6379")  # its nodes have their own
    preflight.check_feature_cache(Resources(feature_cache="/proc/features", feature_cache_gib=0.0), space)
    monkeypatch.setenv("HARNESS_FEATURE_CACHE_GIB", "0.0001")
    with pytest.raises(UserError, match=r"are needed, and the cache may take"):
        preflight.check_feature_cache(Resources(**place), space)
    monkeypatch.setenv("HARNESS_FEATURE_CACHE_GIB", "much")
    with pytest.raises(UserError, match=r"^HARNESS_FEATURE_CACHE_GIB: found 'much'; allowed: a number of GiB, or 0"):
        preflight.check_feature_cache(Resources(**place), space)
