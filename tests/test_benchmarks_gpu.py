"""The benchmark of GPUs runs on a CPU with tiny models; without a GPU it says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu


@pytest.mark.slow
def test_every_arm_is_measured_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "MODELS", gpu.MODELS[:2])
    path, page = tmp_path / "gpu.json", tmp_path / "page.md"
    page.write_text(f"{gpu.BEGIN}\n{gpu.END}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--json", str(path), "--write", str(page)])
    gpu.main()
    found = json.loads(path.read_text(encoding="utf-8"))
    results = [gpu.Result(**one) for one in found["results"]]
    plain = {(one.model, one.arm, one.checkpointing): one for one in results if one.base == "bf16"}
    assert len(plain) == 2 * len(gpu.ARMS) * 2
    assert {one.reason for one in plain.values()} == {None}
    for model in ("glm, tiny", "llama, tiny"):
        counts = {arm: plain[model, arm, False].trained or 0 for arm in gpu.ARMS}
        assert counts["none"] == 0
        assert counts[gpu.SPECIFIC] == 2 * counts[gpu.AGNOSTIC]
        assert counts["full"] > counts["BitFit specific"] > counts["IA3 specific"] > 0
    assert plain["llama, tiny", gpu.AGNOSTIC, False].trained == plain["llama, tiny", gpu.PEFT, False].trained
    assert [one.base for one in results if one.model == "llama, tiny"].count("nf4") == 3
    assert found["engine"]["backend"] == "gloo"
    assert found["engine"]["losses"][-1] < found["engine"]["losses"][0]
    assert "| llama, tiny | bf16 | yes | IA3 specific |" in page.read_text(encoding="utf-8")
    assert "[" in capsys.readouterr().out


@pytest.mark.slow
def test_a_base_is_left_as_it_was() -> None:
    model = gpu.MODELS[1].tiny
    base = AutoModelForCausalLM.from_config(model.config()).requires_grad_(False)
    ids = torch.arange(8)[None]
    before = base(input_ids=ids).logits
    meter = gpu.Meter(torch.device("cpu"))
    for arm in gpu.ARMS:
        if arm != "full":
            found = gpu.measure_arm(model, base, arm, False, meter, 1e9, gpu.matrices(base), "bf16")
            assert found.reason is None
    assert torch.equal(base(input_ids=ids).logits, before)
    assert not any(p.requires_grad for p in base.parameters())


def test_flops_are_those_of_the_shapes() -> None:
    model = gpu.MODELS[1].tiny
    tokens = model.rows * model.length
    frozen, full = model.flops(1000, False), model.flops(1000, True)
    assert full - frozen == 2 * 1000 * tokens
    causal = 2 * model.layers * model.rows * model.length**2 * model.width
    assert frozen == 4 * 1000 * tokens + 3 * causal


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("no GPU: torch")
