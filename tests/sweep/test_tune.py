"""What one trial reserves of a Ray cluster. The sweep itself is tested end to end in tests/e2e."""

from __future__ import annotations

import pytest

from harness.core.errors import UserError
from harness.experiment.sections import Resources
from harness.sweep.tune import per_trial


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert per_trial(Resources(), {"CPU": 2.0}) == {"cpu": 1, "gpu": 0.0}
    assert per_trial(Resources(), {"CPU": 8.0, "GPU": 4.0}) == {"cpu": 1, "gpu": 1.0}
    assert per_trial(Resources(gpus_per_trial=0.25, cpus_per_trial=2), {"CPU": 8.0, "GPU": 1.0}) == {
        "cpu": 2,
        "gpu": 0.25,
    }


def test_more_than_there_is_is_refused_rather_than_waited_for() -> None:
    with pytest.raises(UserError, match=r"resources\.gpus_per_trial: asks for 1, this machine or Ray cluster has 0"):
        per_trial(Resources(gpus_per_trial=1.0), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"resources\.cpus_per_trial: asks for 4, this machine or Ray cluster has 2"):
        per_trial(Resources(cpus_per_trial=4), {"CPU": 2.0})
