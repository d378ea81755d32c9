"""SmolLM2-135M on photographs, LoRA-8 on all captions: ours beside ``peft`` in a bare loop on trimmed rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed import jobs, models, steps
from benchmarks.speed.measure import Row, Say, by_key, ratios, row, seconds, skipped

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec
    from harness.trial.trial import Trial

MINUTES = 6.0
REPEATS = 3  # in a round
PICTURES = 4  # of a step, with five captions each
RANK = 8
TARGET, SAME_ROWS_TARGET = 2.0, 1.05
SAME_ROWS = "a row per caption"  # the arm in which ours has peft's rows
WHAT = (
    "examples/s of SmolLM2-135M, LoRA r=8 specific, all five captions of a picture; `peft` LoRA r=8, bare loop, "
    "trimmed rows"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--references", choices=("all", "grouped"), default=None, help="default: grouped, where it is")


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Train on the same captions in turn, in this process with one thread.

    Args:
        options: of ``add_options``, and ``rounds``.
        folder: for files.
        say: tells progress.
    """
    places = {name: os.environ.get(name) for name in ("REAL_MODELS", "FLICKR_ROOT")}
    if missing := [name for name, value in places.items() if not value]:
        return {"skipped": f"not measured: {' and '.join(missing)} not set"}
    found = {}
    for number, encoder in enumerate(("builtin/tiny-vision", "64 tokens")):
        here = folder / str(number)
        here.mkdir()
        arms = {
            name: _spec(Path(str(places["REAL_MODELS"])), Path(str(places["FLICKR_ROOT"])), encoder, references, here)
            for name, references in _references(options.references).items()
        }
        found[encoder] = _compare(arms, here, options.rounds * REPEATS)
        say(f"real models, {encoder}", (number + 1) / 2)
    return {"encoders": found, "captions": 5 * PICTURES}


def _references(asked: str | None) -> dict[str, str]:
    """Arms of ours: the asked one, else every way to train on all references that this version has."""
    from typing import get_args

    from harness.experiment.sections import Budget

    known = [name for name in get_args(Budget.model_fields["references"].annotation) if name != "one"]
    return {name: name for name in ([asked] if asked else known)}


def _spec(root: Path, data: Path, encoder: str, references: str, folder: Path) -> TrialSpec:
    if encoder == "64 tokens":
        encoder = str(folder / "vision")
        if not Path(encoder).exists():
            models.vision_64(Path(encoder), 768)
    content = {
        "name": f"real-{references}",
        "task": {"name": "coco_captions", "root": str(data)},
        "backbone": {"language_model": str(root / "smollm2" / "fp32"), "encoders": {"image": encoder}},
        "adapters": [{"method": "lora", "rank": RANK, "grouping": "specific", "learning_rate": 1e-3}],
        "budget": {"examples": 4 * PICTURES, "epochs": 1, "references": references},
        "seeds": [0],
        "optimizer": {"per_device_train_batch_size": 5 * PICTURES},
        "eval": {"validation_examples": 2, "test_examples": 2},
    }
    (spec,) = jobs.planned(content, folder)
    return spec


def _compare(specs: Mapping[str, TrialSpec], folder: Path, repeats: int) -> dict[str, Any]:
    cases: dict[str, Callable[[int], None]] = {}
    for name, spec in specs.items():
        trial = steps.built_trial(spec, folder / "trial")
        cases[name] = steps.engine_step(trial)
    plain = steps.built_trial(spec, folder / "trial", trial.stages.built.data, shared_prefix=False)
    cases[SAME_ROWS] = steps.engine_step(plain)
    cases["peft"] = _peft_step(plain)
    times = steps.in_turn(cases, repeats, warm_up=1)
    return {"rounds": [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]}


def _peft_step(trial: Trial) -> Callable[[int], None]:
    """A training loop around ``get_peft_model``, on rows as long as the longest of the batch, with cached features."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.core.hub import resolve

    built = trial.stages.built
    place = resolve(trial.spec.backbone.language_model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)).train()
    features = [rows[0] for rows in built.batches.features.of(built.splits.train)]
    projector = nn.Sequential(nn.Dropout(0.1), nn.Linear(features[0].shape[1], base.config.hidden_size))
    trained = [*(p for p in model.parameters() if p.requires_grad), *projector.parameters()]
    optimizer = torch.optim.AdamW(trained, 1e-3, (0.9, 0.95), weight_decay=0.0)
    embed = model.get_input_embeddings()

    draws, size = built.order.epoch(1), trial.spec.optimizer.per_device_train_batch_size
    batches = [draws[start : start + size] for start in range(0, len(draws), size)]

    def step(number: int) -> None:
        drawn = batches[number % len(batches)]
        pairs = [(draw.example, built.splits.train[draw.example].references[draw.reference]) for draw in drawn]
        ids = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for _, text in pairs]
        padded = tokenizer.pad({"input_ids": ids}, padding=True, padding_side="right", return_tensors="pt")
        prefix_BND = projector(torch.stack([features[n] for n, _ in pairs]))
        text_BTD = embed(padded["input_ids"])
        embeds_BTD = torch.cat([text_BTD[:, :1], prefix_BND, text_BTD[:, 1:]], dim=1)
        mask_BT, count = padded["attention_mask"], prefix_BND.shape[1]
        labels_BT = padded["input_ids"].masked_fill(mask_BT == 0, -100)
        unlabelled = labels_BT.new_full((len(pairs), count + 1), -100)
        out = model(
            inputs_embeds=embeds_BTD,
            attention_mask=torch.cat([mask_BT[:, :1].expand(-1, count + 1), mask_BT[:, 1:]], dim=1),
            labels=torch.cat([unlabelled, labels_BT[:, 1:]], dim=1),
            use_cache=False,
        )
        out.loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table."""
    if "skipped" in found:
        return [skipped(WHAT, found["skipped"], f"at least {TARGET:g}×")]
    lines = []
    for encoder, one in found["encoders"].items():
        peft = by_key(one["rounds"], "peft")
        for arm in [name for name in one["rounds"][0] if name not in ("peft", SAME_ROWS)]:
            ours, name = by_key(one["rounds"], arm), {"builtin/tiny-vision": "16 picture tokens"}.get(encoder, encoder)
            rate = [f"{found['captions'] / sorted(times)[len(times) // 2]:.2f}/s" for times in (ours, peft)]
            what = f"{WHAT}; {name}, `references: {arm}`"
            lines.append(row(what, *rate, ratios(ours, peft), at_least=TARGET))
        own = by_key(one["rounds"], SAME_ROWS)
        what = f"a step of SmolLM2-135M, LoRA r=8 specific; `peft` LoRA r=8, bare loop, the same rows; {name}"
        lines.append(row(what, seconds(own), seconds(peft), ratios(peft, own), at_most=SAME_ROWS_TARGET))
    return lines


def notes(found: Mapping[str, Any]) -> str:
    """Markdown."""
    if "skipped" in found:
        return f"{found['skipped']}."
    count = found["captions"]
    steps_s = ", ".join(
        f"{encoder}: " + ", ".join(f"{arm} {seconds(by_key(one['rounds'], arm))}" for arm in one["rounds"][0])
        for encoder, one in found["encoders"].items()
    )
    return (
        f"Flickr8k's photographs, features encoded before; {count} captions a step. 16 tokens are the built-in "
        "encoder's, 64 those of an encoder of random weights, with Swin V2's number and width of tokens. peft's LoRA "
        f"has one adapter for all tokens, ours one for each context. CPU time of a step: {steps_s}."
    )
