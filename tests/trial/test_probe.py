"""What a probe measures of a trial, for every stage of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.experiment.sections import Resources
from harness.trial import probe as module
from tests.support.trials import spec_of

STAGES = {"lora": 1, "llava": 2}


@pytest.mark.parametrize(("method", "stages"), STAGES.items())
def test_everything_that_takes_time_is_measured_once(
    method: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    blocks: list[float] = []
    block = module.Lane.block

    def counted(lane: Any, first: int, steps: int) -> Any:
        done = block(lane, first, steps)
        blocks.extend([lane.share * done.seconds] if done.seconds else [])  # the warm-up is not measured
        return done

    monkeypatch.setattr(module.Lane, "block", counted)
    encoded: list[float] = []
    encoding = module._encoding

    def kept(lane: Any) -> float:
        encoded.append(encoding(lane))
        return encoded[-1]

    monkeypatch.setattr(module, "_encoding", kept)
    grouping = {"grouping": "specific"} if method == "lora" else {}
    spec = spec_of(tmp_path, {"method": method, "learning_rate": 1e-3, **grouping})
    found = module.probe(spec, Resources())
    assert len(blocks) == 2 * stages
    assert found.step_s == pytest.approx([sum(blocks[0::2]), sum(blocks[1::2])])  # of both stages, by their shares
    assert min(found.reference_s, found.text_s, found.build_s) > 0
    assert [found.file_s] == encoded, "of the first stage: a later one has its features"
    assert found.file_s > 0
    assert found.memory.optimizer_bytes > 0
