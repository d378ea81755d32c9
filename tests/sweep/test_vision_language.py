"""What is checked of experiments on vision-language models before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.experiment.sections import Resources
from harness.sweep.preflight import check_models
from tests.support.trials import LORA, spec_of
from tests.support.vision_language import save


def test_generation_without_the_positions_of_a_grid_is_refused_before_compute(tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path / "model")
    beams = spec_of(tmp_path, LORA, backbone={"model": "model"}, eval={"num_beams": 2})
    plain = spec_of(tmp_path, LORA, backbone={"model": "model"})
    with pytest.raises(UserError, match=r"eval\.num_beams: texts of .* allowed: num_beams: 1"):
        check_models([beams])
    with pytest.raises(UserError, match=r"resources\.zero_stage: texts of .* allowed: num_beams: 1, zero_stage: 0"):
        check_models([plain], Resources(zero_stage=3))
    check_models([plain])
