"""A model whose weights alone are larger than a device is refused before compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters.profiles import Device, Profile
from harness.core.cursor import Cursor
from harness.core.errors import UserError
from harness.experiment.sections import Resources
from harness.sweep.fits import check_weights, device_bytes
from tests.support.trials import spec_of

MIB = 1 << 20


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)  # 2.2 MiB of weights
    check_weights([spec], Resources(), 3 * MIB, Cursor())
    check_weights([spec], Resources(), None, Cursor())
    with pytest.raises(UserError, match=r"^backbone.language_model: .*its weights alone take 0.00209 GiB"):
        check_weights([spec], Resources(), 2 * MIB, Cursor())
    check_weights([spec], Resources(zero_stage=3, offload="parameters"), 2 * MIB, Cursor())
    check_weights([spec], Resources(zero_stage=3, workers=2), 2 * MIB, Cursor())
    half = spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"bf16": True})})
    check_weights([half], Resources(), 2 * MIB, Cursor())
    with pytest.raises(UserError, match="weights alone"):
        check_weights([half, spec], Resources(), 2 * MIB, Cursor())


def test_the_profile_says_what_a_device_holds() -> None:
    slurm = Profile(name="ray", kind="ray", device=Device(memory_gib=80))
    assert device_bytes(slurm) == 80 << 30
    assert device_bytes(Profile(name="ray", kind="ray")) is None
