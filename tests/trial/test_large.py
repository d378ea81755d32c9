"""A language model of 1.5 billion parameters trains its adapters in the memory of a laptop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.hub import resolve

# Each in a process of its own: making the model takes more memory than training on it.
MAKE = """
import shutil, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
config = LlamaConfig(
    vocab_size=1024, hidden_size=2048, intermediate_size=5632, num_hidden_layers=32, num_attention_heads=16,
    num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
)
torch.manual_seed(0)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
model = model.to(torch.bfloat16).to_empty(device="cpu")
for name, p in model.named_parameters():
    p.data.fill_(1.0) if p.dim() == 1 else p.data.normal_(std=0.02)
model.save_pretrained(folder)
for path in tokenizer.glob("tokenizer*"):
    shutil.copy(path, folder)
print(sum(p.numel() for p in model.parameters()))
"""
TRAIN = """
import json, sys
from pathlib import Path
from tests.support.trials import LORA, run, spec_of

folder = Path(sys.argv[2])
spec = spec_of(
    folder,
    LORA | {"rank": 8, "learning_rate": 1e-3},
    backbone={"language_model": sys.argv[1], "dtype": "bf16"},
    budget={"examples": 12, "epochs": 1},
    optimizer={"per_device_train_batch_size": 4},
    eval={"validation_examples": 2, "test_examples": 2, "max_new_tokens": 2},
)
record = run(spec, folder, gradient_checkpointing=True)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "status": record.status, "reason": record.reason, "steps": record.history[-1].step if record.history else 0,
    "loss": record.history[-1].train_loss if record.history else None, "peak_gib": peak / (1 << 20),
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lora_on_a_bf16_llama_of_1_5_billion_parameters_takes_less_than_8_gib(tmp_path: Path) -> None:
    model, trial = tmp_path / "model", tmp_path / "trial"
    trial.mkdir()
    made = subprocess.run(
        [sys.executable, "-c", MAKE, model, resolve("builtin/tiny-llama")],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert 1.45e9 < int(made.stdout.splitlines()[-1]) < 1.55e9
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, model, trial],
        check=True, capture_output=True, text=True, timeout=1200, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["status"], found["steps"]) == ("finished", 3), found["reason"]
    assert found["peak_gib"] < 8, found
