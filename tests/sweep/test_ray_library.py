"""What is changed of Ray when it is imported."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

from ray.tune.analysis import ExperimentAnalysis
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.utils.serialization import _loads_with_cloudpickle

from harness.sweep import ray_library


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.made),))


def test_snapshots_of_tune_in_a_run_folder_are_not_read(tmp_path: Path) -> None:
    state = {
        "trial_data": [],
        "evil": {"_type": "CLOUDPICKLE_FALLBACK", "value": pickle.dumps(Hostile(tmp_path / "made")).hex()},
    }
    (tmp_path / "experiment_state-2099-01-01_00-00-00.json").write_text(json.dumps(state), encoding="utf-8")
    assert ExperimentAnalysis(str(tmp_path)).trials == []
    assert not (tmp_path / "made").exists()
    _loads_with_cloudpickle(json.dumps(state))
    assert (tmp_path / "made").exists(), "Tune would have run it"


def test_no_credential_is_in_the_environment_that_ray_logs() -> None:
    assert not [name for name in ENV_VARS_TO_PROPAGATE if "KEY" in name or "TOKEN" in name]


def test_the_token_of_a_ray_of_its_own_is_gone_afterwards() -> None:
    before = dict(os.environ)
    with ray_library.own_token():
        first = os.environ["RAY_AUTH_TOKEN"]
        with ray_library.own_token():
            assert os.environ["RAY_AUTH_TOKEN"] == first, "one that was given is used"
    assert os.environ == before
    with ray_library.own_token():
        assert os.environ["RAY_AUTH_TOKEN"] != first
