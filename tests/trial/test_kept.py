"""A trial in a worker that has run other trials gives what it gives in a process of its own, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from harness.core.record import TrialRecord
from harness.model.kept import Kept
from tests.support.trials import BITFIT, FULL, LORA, outcome, run, spec_of

BUDGET = {"examples": 16, "epochs": 1}


def trial(folder: Path, kept: Kept | None, adapter: Mapping[str, Any] = LORA, **sections: Any) -> TrialRecord:
    folder.mkdir(exist_ok=True)
    return run(spec_of(folder, adapter, **{"budget": BUDGET, **sections}), folder, kept=kept)


def kept_model(kept: Kept) -> nn.Module:
    """The language model that is kept."""
    ((_, entry),) = [item for item in kept._entries.items() if item[0][0] == "language model"]
    model: nn.Module = entry.value.model
    return model


def state_of(model: nn.Module) -> str:
    """A digest of all that a trial could leave in a model."""
    digest = hashlib.sha256()
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {x.dtype} {x.device} {x.requires_grad} {x.grad}".encode())
        digest.update(x.detach().numpy().tobytes())
    for name, module in model.named_modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        digest.update(
            f"{name} {type(module)} {module.training} {sorted(vars(module))} {list(map(len, hooks))}".encode()
        )
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "tied"
    digest.update(repr(model.generation_config).encode())
    return digest.hexdigest()


@pytest.mark.e2e
def test_a_trial_after_others_is_that_trial_alone(tmp_path: Path) -> None:
    # Paths of examples are in the records, so all trials have one folder's data.
    run_folder, kept = tmp_path / "run", Kept()
    alone = outcome(run_folder, trial(run_folder, None))
    trial(run_folder, kept, FULL)
    state = state_of(kept_model(kept))
    others: list[Any] = [
        (BITFIT, {"optimizer": {"per_device_train_batch_size": 8, "bf16": True}}),
        ({"method": "none", "learning_rate": 3e-3}, {"seeds": [1], "eval": {"max_new_tokens": 6, "num_beams": 2}}),
    ]
    for adapter, sections in others:
        assert trial(run_folder, kept, adapter, **sections).status == "finished"
        assert state_of(kept_model(kept)) == state
    assert outcome(run_folder, trial(run_folder, kept)) == alone
    assert state_of(kept_model(kept)) == state
    assert outcome(run_folder, trial(run_folder, kept)) == alone, "nor does it change itself"


def test_a_trial_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    alone = outcome(tmp_path, trial(tmp_path, kept))
    first = kept_model(kept)
    with monkeypatch.context() as patch:
        patch.setattr("harness.trial.trial.Trial.step_on", lambda *_: 1 / 0)
        assert trial(tmp_path, kept, FULL).status == "failed"
    assert not kept._entries
    assert outcome(tmp_path, trial(tmp_path, kept)) == alone
    assert kept_model(kept) is not first
