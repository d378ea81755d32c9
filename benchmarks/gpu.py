"""Speed and memory on a GPU: ``python benchmarks/gpu.py [--minutes 6] [--json FILE] [--write docs/performance.md]``.

Needs a CUDA build of torch, transformers and peft, no network and no data: the language models are made at random from
their configurations, in bf16. Measured: training steps (forward, backward, AdamW) of every method, with and without
gradient checkpointing, on rows of which the first half is a picture's embeddings, and of ``peft``'s LoRA in the same
loop; full fine-tuning has its optimizer's state in bf16 too. Tokens/s, the most memory allocated, and MFU: the base
model's FLOPs (without adapters, and without what checkpointing computes again) ÷ time ÷ the FLOP/s that a large product
of bf16 matrices reaches on this GPU in the same run. Then a small trial through DeepSpeed with NCCL. What does not fit
the time or the memory is told.

``--device cpu --tiny`` runs all of it with tiny models, to test it. Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts this folder first on the path, where adapters.py shadows the package `adapters`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

RANK = 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj"]
LORA = f"LoRA r={RANK}"
AGNOSTIC, SPECIFIC, PEFT = f"{LORA} agnostic", f"{LORA} specific", f"peft {LORA}"
# Name → method and grouping of harness.adapt; None: peft's LoRA.
ARMS: dict[str, tuple[dict[str, Any], str] | None] = {
    "none": ({"method": "none"}, "agnostic"),
    "IA3 specific": ({"method": "ia3"}, "specific"),
    "BitFit specific": ({"method": "bitfit"}, "specific"),
    AGNOSTIC: ({"method": "lora", "rank": RANK}, "agnostic"),
    SPECIFIC: ({"method": "lora", "rank": RANK}, "specific"),
    PEFT: None,
    "full": ({"method": "full"}, "agnostic"),
}
ROUNDS, STEPS, WARM_UP = 2, 4, 2
TRIAL_STEPS = 10
BEGIN, END = "<!-- gpu: begin (python benchmarks/gpu.py --write FILE) -->", "<!-- gpu: end -->"


@dataclass(frozen=True)
class Model:
    """A language model's shapes, and the batch that it is measured with."""

    name: str
    family: str  # glm, llama, qwen2
    width: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    rows: int
    length: int
    quantised: bool = False  # also measured on a base in nf4

    @property
    def tiny(self) -> Model:
        """The same family in a size for tests."""
        small = {"width": RANK, "feed_forward": RANK, "layers": 2, "heads": 4, "key_value_heads": 4, "vocabulary": 96}
        return replace(self, name=f"{self.family}, tiny", **small, rows=2, length=16)

    def config(self) -> Any:
        """For transformers."""
        from transformers import GlmConfig, LlamaConfig, Qwen2Config

        given = {
            "vocab_size": self.vocabulary, "hidden_size": self.width, "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads, "tie_word_embeddings": self.tied, "pad_token_id": 0,
            "max_position_embeddings": max(2048, self.length),
        }  # fmt: skip
        if self.family == "glm":
            return GlmConfig(**given, head_dim=self.width // self.heads, eos_token_id=1)
        return (LlamaConfig if self.family == "llama" else Qwen2Config)(**given)

    def flops(self, weights: int, trains_base: bool) -> float:
        """Of a step: 2 per weight and token forward, as many for gradients of inputs, and of weights if they train.

        Args:
            weights: of all matrices that tokens are multiplied with.
            trains_base: whether the base's weights have gradients.
        """
        passes = 3 if trains_base else 2
        tokens = self.rows * self.length
        attention = 2 * 2 * self.layers * self.rows * self.length**2 * self.width / 2  # causal: half of each product
        return 2 * weights * tokens * passes + 3 * attention  # backward of attention: twice its forward


MODELS = (
    Model("GLM-style, 150M, 50,272 tokens", "glm", 768, 2048, 12, 12, 12, 50_272, False, 64, 128),
    Model("Llama, 1.5B", "llama", 2048, 8192, 20, 32, 8, 128_256, True, 8, 512, quantised=True),
    Model("language model of Qwen2.5-VL-3B", "qwen2", 2048, 11_008, 36, 16, 2, 151_936, True, 4, 512),
)


@dataclass
class Result:
    """What one arm took on one model."""

    model: str
    arm: str
    base: str  # bf16 or nf4
    checkpointing: bool
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    mfu: float | None = None
    trained: int | None = None
    step_s: float | None = None
    reason: str | None = None  # why there are no numbers


class Meter:
    """Time and memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_gpu = device, device.type == "cuda"

    def wait(self) -> None:
        """Until all is computed."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def begin(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Since ``begin``; None on a CPU."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.is_gpu else None

    def seconds(self, function: Callable[[], Any]) -> float:
        """Of a call."""
        self.wait()
        began = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - began

    def product_flops_per_s(self, size: int, dtype: torch.dtype) -> float:
        """Of the fastest of some matrix products."""
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / min(self.seconds(lambda: torch.mm(a, b)) for _ in range(20))


class Steps:
    """Training steps of a base model with one arm attached.

    Args:
        model: the shapes.
        base: a frozen language model of them.
        arm: of ``ARMS``.
        device: of both.
    """

    def __init__(self, model: Model, base: Any, arm: str, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = base.get_input_embeddings().weight.dtype
        shape = (model.rows, model.length)
        # As the output of a trained projector, the embeddings need a gradient.
        self.embeds_BTD = torch.randn(*shape, model.width, generator=generator, device=device, dtype=dtype)
        self.embeds_BTD.requires_grad_()
        self.labels_BT = torch.randint(model.vocabulary, shape, generator=generator, device=device)
        self.contexts_BT = (torch.arange(model.length, device=device) >= model.length // 2).long().expand(shape)
        self.options: dict[str, Any] = {}
        self.model = self._attached(base, arm)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, 1e-5, fused=fused) if self.trained else None

    def _attached(self, base: Any, arm: str) -> Any:
        import peft

        import harness

        chosen = ARMS[arm]
        if chosen is None:
            layers = [name for name in PROJECTIONS if any(path.endswith(name) for path, _ in base.named_modules())]
            return peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
        spec, grouping = chosen
        self.options = {"context_ids": self.contexts_BT}
        return harness.adapt(base, spec, contexts=("image", "text"), grouping=grouping)

    def __call__(self) -> None:
        """Forward, backward, optimizer."""
        out = self.model(inputs_embeds=self.embeds_BTD, labels=self.labels_BT, use_cache=False, **self.options)
        loss: Tensor = out.loss
        loss.backward()
        self.embeds_BTD.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def detach(self) -> None:
        """Leave the base as it was."""
        if hasattr(self.model, "detach"):
            self.model.detach()
        else:
            self.model.unload()
        self.optimizer = None


def matrices(base: nn.Module) -> int:
    """Weights that tokens are multiplied with: of linear layers, and the output layer also where it is tied."""
    from transformers.pytorch_utils import Conv1D

    return sum(module.weight.numel() for module in base.modules() if isinstance(module, nn.Linear | Conv1D))


def measure_arm(
    model: Model, base: Any, arm: str, checkpointing: bool, meter: Meter, peak: float, weights: int, kind: str
) -> Result:
    """Steps of one arm; what does not fit the memory is told.

    Args:
        model: the shapes.
        base: the language model.
        arm: of ``ARMS``.
        checkpointing: whether layers are computed again in backward.
        meter: of the device.
        peak: FLOP/s of a matrix product.
        weights: of ``matrices``.
        kind: bf16 or nf4.
    """
    result, steps = Result(model.name, arm, kind, checkpointing), None
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        meter.begin()
        steps = Steps(model, base, arm, meter.device)
        steps.model.train()
        for _ in range(WARM_UP):
            steps()
        result.step_s = statistics.median(meter.seconds(steps) for _ in range(STEPS))
        result.tokens_per_s = model.rows * model.length / result.step_s
        result.mfu = model.flops(weights, arm == "full") / result.step_s / peak
        result.peak_bytes, result.trained = meter.peak_bytes(), sum(p.numel() for p in steps.trained)
    except torch.OutOfMemoryError:
        result.reason = "out of memory"
    except Exception as error:  # one arm must not end the others
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        if checkpointing:
            base.gradient_checkpointing_disable()
        if steps is not None:
            steps.detach()
        base.requires_grad_(False)
    return result


def measure_model(model: Model, meter: Meter, peak: float, out_of_time: Callable[[], bool]) -> Iterator[Result]:
    """All arms in turn, ``ROUNDS`` times, without and with checkpointing; then LoRA on nf4."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with meter.device:
            base = AutoModelForCausalLM.from_config(model.config())
    finally:
        torch.set_default_dtype(torch.float32)
    base.requires_grad_(False)
    weights = matrices(base)
    for number in range(ROUNDS):
        for checkpointing in (False, True):
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                if out_of_time():
                    yield Result(model.name, arm, "bf16", checkpointing, reason="no time was left")
                else:
                    yield measure_arm(model, base, arm, checkpointing, meter, peak, weights, "bf16")
    if model.quantised:
        with _in_nf4(base, meter) as quantised:
            for arm in (AGNOSTIC, SPECIFIC, PEFT):
                if isinstance(quantised, str):
                    yield Result(model.name, arm, "nf4", False, reason=quantised)
                else:
                    yield measure_arm(model, quantised, arm, False, meter, peak, weights, "nf4")


@contextmanager
def _in_nf4(base: Any, meter: Meter) -> Iterator[Any]:
    """The model with its linear layers in nf4, or the reason why not."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        yield "bitsandbytes is not installed"
        return
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        base.to("cpu")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=options, dtype=torch.bfloat16, device_map={"": meter.device}
            )
        except Exception as error:
            model = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    yield model if isinstance(model, str) else model.requires_grad_(False)


def engine_trial(device: torch.device, meter: Meter) -> dict[str, Any]:
    """Steps of a small trial of the task scenes through DeepSpeed, in a group of one process, and its backend."""
    try:
        from benchmarks.speed import jobs, steps

        content = jobs.grid(6, {}, {"examples": 64, "epochs": 1})
        content["adapters"] = [{"method": "lora", "rank": 4, "grouping": "specific", "learning_rate": 1e-2}]
        content["eval"] |= {"validation_examples": 8, "test_examples": 2}
        with tempfile.TemporaryDirectory() as folder:
            (spec,) = jobs.planned(content, Path(folder))
            trial = steps.built_trial(spec, Path(folder) / "trial")
            if trial.device.type != device.type:
                return {"reason": f"the trial would run on {trial.device.type}"}
            batches = steps.batches_of(trial)
            trial.stages.start()
            step = trial.stages.engine.train_step
            losses = [step(batches[number % len(batches)]) for number in range(3)]
            took = meter.seconds(lambda: losses.extend(step(batches[n % len(batches)]) for n in range(TRIAL_STEPS)))
            backend = torch.distributed.get_backend()
            trial.stages.close()
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"backend": backend, "losses": losses, "step_s": took / TRIAL_STEPS}


def merged(results: Sequence[Result]) -> list[Result]:
    """One result of each arm: the medians of its rounds."""
    rounds: dict[tuple[str, str, str, bool], list[Result]] = {}
    for one in results:
        rounds.setdefault((one.model, one.base, one.arm, one.checkpointing), []).append(one)
    found = []
    for several in rounds.values():
        measured = [one for one in several if one.step_s is not None]
        if not measured:
            found.append(several[0])
            continue
        medians = {name: statistics.median(getattr(one, name) for one in measured)
                   for name in ("tokens_per_s", "mfu", "step_s")}  # fmt: skip
        found.append(replace(measured[0], **medians))
    models, arms = list(dict.fromkeys(one.model for one in results)), list(ARMS)
    return sorted(found, key=lambda one: (models.index(one.model), one.base, one.checkpointing, arms.index(one.arm)))


def markdown(report: Mapping[str, Any]) -> str:
    """The table for docs/performance.md."""
    results = [Result(**one) for one in report["results"]]
    lines = [
        f"{report['device']}, torch {report['torch']}, {report['date']}, {report['commit']}; a product of bf16 "
        f"matrices reaches {report['peak_flops_per_s'] / 1e12:.3g} TFLOP/s. `python benchmarks/gpu.py`.",
        "",
        "| model | base | checkpointing | method | tokens/s | × peft | peak GiB | MFU | trained |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        place = f"| {one.model} | {one.base} | {'yes' if one.checkpointing else 'no'} | {one.arm} |"
        if one.tokens_per_s is None or one.mfu is None:
            lines.append(f"{place} {one.reason} | | | | |")
            continue
        like = (one.model, one.base, one.checkpointing)
        peft = next((r.tokens_per_s for r in results
                     if r.arm == PEFT and (r.model, r.base, r.checkpointing) == like), None)  # fmt: skip
        ratio = f"{one.tokens_per_s / peft:.2f}" if peft else "–"
        peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f}"
        lines.append(f"{place} {one.tokens_per_s:,.0f} | {ratio} | {peak} | {100 * one.mfu:.1f} % | {one.trained:,} |")
    trial = report["engine"]
    told = trial.get("reason") or (
        f"backend {trial['backend']}, {1e3 * trial['step_s']:.1f} ms a step, loss {trial['losses'][0]:.3f} → "
        f"{trial['losses'][-1]:.3f}"
    )
    return "\n".join([*lines, "", f"A LoRA trial of the task scenes through the engine: {told}."])


def main() -> None:
    """Measure and print the table."""
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} finds none (torch.cuda.is_available() is false); a CUDA build of torch "
            "and a GPU are needed, or --device cpu --tiny for a test without numbers",
            file=sys.stderr,
        )
        sys.exit(2)
    from benchmarks.speed.measure import machine

    began = time.monotonic()
    device = torch.device(options.device)
    meter = Meter(device)
    peak = meter.product_flops_per_s(128 if options.tiny else 8192, torch.bfloat16)
    engine = engine_trial(device, meter)
    results: list[Result] = []
    chosen = [model.tiny if options.tiny else model for model in MODELS]
    for number, model in enumerate(chosen, start=1):
        # A model may use its share of what is left, so that the last one is measured too.
        until = began + 60 * options.minutes * number / len(chosen)
        for one in measure_model(model, meter, peak, lambda until=until: time.monotonic() > until):
            results.append(one)
            took, speed = time.monotonic() - began, one.reason or f"{one.tokens_per_s:,.0f} tokens/s"
            print(f"[{took:.0f} s of {60 * options.minutes:.0f}] {one.model}, {one.base}, {one.arm}"
                  f"{', checkpointing' if one.checkpointing else ''}: {speed}", flush=True)  # fmt: skip
    found = machine()
    report = {
        "device": torch.cuda.get_device_name(device) if meter.is_gpu else f"cpu {found['processor']}",
        "torch": found["torch"], "date": found["date"], "commit": found["commit"], "peak_flops_per_s": peak,
        "results": [asdict(one) for one in merged(results)], "engine": engine,
    }  # fmt: skip
    text = markdown(report)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.write:
        from benchmarks.speed import table

        table.write(options.write, text, BEGIN, END)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a test of this file, no measurement")
    parser.add_argument("--minutes", type=float, default=5.5, help="what no longer fits is told")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
