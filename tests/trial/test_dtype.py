"""A frozen base in bf16 with adapters in fp32, and the memory that loading takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model.build import build, count_parameters, load_language_model
from harness.model.kept import Kept
from tests.support.trials import FULL, LORA, run, spec_of

CPU = torch.device("cpu")
BF16: dict[str, Any] = {"backbone": {"dtype": "bf16"}}


@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "bitfit", "ia3", "bottleneck"))],
)
def test_a_base_in_bf16_trains_its_adapters_in_fp32(method: str, tmp_path: Path) -> None:
    adapter = {"method": method, "learning_rate": 6e-3}
    found = {}
    for name, sections in (("fp32", {}), ("bf16", BF16)):
        (tmp_path / name).mkdir()
        record = run(spec_of(tmp_path / name, adapter, **sections), tmp_path / name)
        assert record.status == "finished", record.reason
        found[name] = record
    one, other = found["fp32"], found["bf16"]
    assert one.trial_id != other.trial_id
    assert other.metrics["test"]["perplexity"] == pytest.approx(one.metrics["test"]["perplexity"], rel=0.03)
    assert one.parameters is not None
    assert one.memory is not None
    assert other.memory is not None
    frozen = one.parameters.language_model
    assert other.memory.weights_bytes == one.memory.weights_bytes - 2 * frozen
    assert other.memory.optimizer_bytes == one.memory.optimizer_bytes


def test_what_is_trained_is_in_fp32(tmp_path: Path) -> None:
    model = build(spec_of(tmp_path, LORA, **BF16), CPU).model
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("language_model.")} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("language_model.")} == {torch.float32}


def test_full_fine_tuning_of_a_bf16_model_needs_copies_in_fp32(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone.dtype: .*rounds most updates away; allowed: fp32, or optimizer:"):
        count_parameters(spec_of(tmp_path, FULL, **BF16))
    bf16 = {"optimizer": {"per_device_train_batch_size": 8, "bf16": True}}
    assert run(spec_of(tmp_path, FULL, **BF16, **bf16), tmp_path).status == "finished"


def test_trials_share_the_frozen_weights(tmp_path: Path) -> None:
    kept, spec = Kept(), spec_of(tmp_path, LORA)
    one, other = (load_language_model(spec, kept).model for _ in range(2))
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert all(p is not q and p.data_ptr() == q.data_ptr() for p, q in pairs[1:])
    own = load_language_model(spec_of(tmp_path, FULL), kept).model
    assert {p.data_ptr() for p in own.parameters()}.isdisjoint(p.data_ptr() for p in other.parameters())


LOADED = """
import resource, sys
from harness.experiment.sections import Backbone
from harness.model.backbones import load_language_model
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

def peak_bytes():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

AutoTokenizer.from_pretrained(sys.argv[1])
before = peak_bytes()
model = load_language_model(Backbone(language_model=sys.argv[1], dtype=sys.argv[2])).model
weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
for p in model.parameters():
    p.sum()  # whatever is mapped is read
print((peak_bytes() - before) / weights, {str(p.dtype) for p in model.parameters()})
"""


@pytest.mark.real_data
@pytest.mark.parametrize(("stored", "dtype"), [("fp32", "fp32"), ("bf16", "auto"), ("bf16", "bf16")])
def test_loading_holds_the_weights_once(stored: str, dtype: str) -> None:
    if not (models := os.environ.get("REAL_MODELS")):
        pytest.skip("REAL_MODELS is not set")
    command = [sys.executable, "-c", LOADED, f"{models}/smollm2/{stored}", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    ratio, dtypes = done.stdout.split(maxsplit=1)
    assert dtypes.strip() == ("{'torch.float32'}" if dtype == "fp32" else "{'torch.bfloat16'}")
    assert 0.8 < float(ratio) < 1.15


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="Input should be 'fp32', 'bf16' or 'auto'"):
        Backbone(dtype="fp8")  # type: ignore[arg-type]
