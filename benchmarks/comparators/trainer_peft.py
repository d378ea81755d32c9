"""What the harness is compared with: a captioning run with ``transformers.Trainer`` and ``peft`` in its own process.

``python -m benchmarks.comparators.trainer_peft JOB.json`` reads a job (``Job``) and writes its result beside it. The
script is written from the documentation of the two libraries: a module that puts the tokens of a picture before those
of its caption, a ``Dataset`` that opens files, a collator that tokenises, ``get_peft_model`` for the adapter,
``evaluate`` after every epoch, ``generate`` with a KV cache at the end. What it is given, so that it does the same:

- the pictures and captions of the harness in the harness's order (``train_sampling_strategy="sequential"``);
- its AdamW, schedule, warm-up, clipping, batch sizes, dropout before the projector and number of threads;
- its classes of caption metrics, whose Java starts while the model trains, as in the harness;
- the best epoch's weights are kept in memory; nothing is logged to a tracker and no report is written, which the
  harness does in its time.

``peft`` has no BitFit: here a zero bias is put on every projection and trained. With ``features`` the pictures are read
from a file that one process makes for all runs (``JOB.json --features FILE``), otherwise the encoder runs for every
row. ``padding`` is that of the tokenizer: ``max_length`` or ``longest``.

Shapes: B rows, T text tokens, N tokens of a picture, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

STARTED = time.monotonic()
if __name__ == "__main__":
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # whoever has no harness has none, and it takes seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import IA3Config, LoraConfig, get_peft_model  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
Row = tuple[str, str]  # a picture's file, a caption


@dataclass(frozen=True)
class Job:
    """One run.

    ``train`` has the rows of all epochs in order. ``where``: A, F or AF, as in the harness.
    """

    language_model: str
    encoder: str
    train: Sequence[Row]
    steps_per_epoch: int
    validation: Sequence[tuple[str, Sequence[str]]]  # picture, its captions
    test: Sequence[tuple[str, Sequence[str]]]
    wrong: Sequence[str]  # for every test example, another one's picture
    metrics: Sequence[str]  # module:Class
    method: Literal["lora", "ia3", "bitfit"]
    rank: int
    where: str
    learning_rate: float
    optimizer: dict[str, Any]  # the harness's section of that name
    eval_batch_size: int
    max_new_tokens: int
    max_target_length: int
    dropout: float  # before the projector
    seed: int
    padding: Literal["max_length", "longest"]
    features: str | None = None  # file of ``--features``
    threads: int = 1


@dataclass
class Result:
    """Scores of the best epoch, seconds of each phase, and memory."""

    scores: dict[str, float] = field(default_factory=dict)
    validation_perplexities: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    trainable: int = 0
    peak_bytes: int = 0


def encoder_of(folder: str) -> Any:
    """The built-in image encoder, which has no class in transformers."""
    from tasks.modalities.encoders.tiny_vision import TinyVision

    return TinyVision.load(Path(folder)).requires_grad_(False)


class Captioner(nn.Module):
    """``[BOS] picture caption [EOS]``, with the loss on the caption and EOS."""

    def __init__(self, language_model: Any, encoder: Any, dropout: float) -> None:
        super().__init__()
        width = language_model.get_input_embeddings().embedding_dim
        self.language_model, self.encoder = language_model, encoder
        self.projector = nn.Sequential(nn.Dropout(dropout), nn.Linear(encoder.width, width))

    def prefix(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
        """BOS, the first of the ids, and the projected picture (B, 1 + N, D)."""
        with torch.no_grad():
            features_BND = self.encoder(pictures) if pictures.dim() == 4 else pictures
        first_B1D = self.language_model.get_input_embeddings()(input_ids[:, :1])
        return torch.cat([first_B1D, self.projector(features_BND)], dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss; in evaluation also the sum of every row and its number of tokens."""
        prefix_BND = self.prefix(input_ids, pictures)
        text_BTD = self.language_model.get_input_embeddings()(input_ids[:, 1:])
        seen = attention_mask.new_ones(prefix_BND.shape[:2])
        labels = torch.cat([labels.new_full(prefix_BND.shape[:2], -100), labels[:, 1:]], dim=1)
        out = self.language_model(
            inputs_embeds=torch.cat([prefix_BND, text_BTD], dim=1),
            attention_mask=torch.cat([seen, attention_mask[:, 1:]], dim=1),
            labels=labels if self.training else None,
            use_cache=False,
        )
        if self.training:
            return {"loss": out.loss}
        nll_BT = nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        counts = labels[:, 1:] != -100
        return {"loss": nll_BT.sum() / counts.sum(), "nll": nll_BT.sum(dim=1), "tokens": counts.sum(dim=1)}


class Captions(Dataset):  # type: ignore[type-arg]
    """Rows of a picture and a caption; pictures are opened when they are asked for, or read from the features."""

    def __init__(self, rows: Sequence[Row], features: dict[str, Tensor] | None) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, caption = self.rows[index]
        picture = Image.open(file).convert("RGB") if self.features is None else self.features[file]
        return {"picture": picture, "caption": caption}


class Collator:
    """Tokenises captions, with EOS, behind BOS, and prepares pictures."""

    def __init__(self, tokenizer: Any, encoder: Any, job: Job) -> None:
        self.tokenizer, self.encoder, self.job = tokenizer, encoder, job
        tokenizer.padding_side = "right"

    def pictures(self, found: Sequence[Any]) -> Tensor:
        """Pixels or features of a batch."""
        return torch.stack(list(found)) if isinstance(found[0], Tensor) else self.encoder.preprocess(found)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch."""
        limit, own = self.job.max_target_length, self.tokenizer
        texts = own([item["caption"] for item in items], add_special_tokens=False, truncation=True, max_length=limit)
        rows = [[own.bos_token_id, *ids, own.eos_token_id] for ids in texts["input_ids"]]
        padded = own.pad(
            {"input_ids": rows}, padding=self.job.padding, max_length=limit + 2, return_tensors="pt"
        )  # with BOS and EOS
        return {
            **padded,
            "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100),
            "pictures": self.pictures([item["picture"] for item in items]),
        }


class KeepBest(TrainerCallback):
    """Keeps the trained weights of the epoch with the best validation perplexity, in memory."""

    def __init__(self, model: nn.Module, seconds: dict[str, float]) -> None:
        self.model, self.seconds = model, seconds
        self.perplexities: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Compare with the epochs before."""
        found = given["metrics"]
        if "eval_perplexity" not in found:
            return
        self.seconds["validate"] = self.seconds.get("validate", 0.0) + found["eval_runtime"]
        self.perplexities.append(found["eval_perplexity"])
        if found["eval_perplexity"] == min(self.perplexities):
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            self.weights = {name: p.detach().clone() for name, p in trained}

    def restore(self) -> None:
        """Put the best weights back."""
        self.model.load_state_dict(self.weights, strict=False)


def adapted(language_model: Any, job: Job) -> Any:
    """The language model with the adapter, everything else frozen."""
    layers = [*(ATTENTION if "A" in job.where else ()), *(FEED_FORWARD if "F" in job.where else ())]
    if job.method == "lora":
        return get_peft_model(language_model, LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=layers))
    if job.method == "ia3":
        scaled = [name for name in layers if name in {"k_proj", "v_proj", "down_proj"}]
        inputs = [name for name in scaled if name == "down_proj"]
        return get_peft_model(language_model, IA3Config(target_modules=scaled, feedforward_modules=inputs))
    language_model.requires_grad_(False)
    for name, module in language_model.named_modules():
        if name.rpartition(".")[2] in layers:
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    return language_model


def perplexity(prediction: Any) -> dict[str, float]:
    """Of all tokens of all rows."""
    nll, tokens = prediction.predictions
    return {"perplexity": math.exp(float(nll.sum() / tokens.sum()))}


def run(job: Job) -> Result:
    """Train, validate after every epoch, test the best one."""
    result = Result()
    clock = Clock(result.seconds)
    torch.set_num_threads(job.threads)
    metrics = [_named(target)() for target in job.metrics]
    for metric in metrics:
        metric.warm_up()
    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.language_model)
    encoder = encoder_of(job.encoder)
    language_model = adapted(AutoModelForCausalLM.from_pretrained(job.language_model, dtype=torch.float32), job)
    model = Captioner(language_model, encoder, job.dropout)
    features = torch.load(job.features) if job.features else None
    collator = Collator(tokenizer, encoder, job)
    keep = KeepBest(model, result.seconds)
    trainer = Trainer(
        model=model,
        args=arguments(job),
        data_collator=collator,
        train_dataset=Captions(job.train, features),
        eval_dataset=Captions(_flat(job.validation), features),
        compute_metrics=perplexity,
        callbacks=[keep],
    )
    result.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    clock("load")
    trainer.train()
    clock("train")
    result.seconds["train"] -= result.seconds["validate"]
    keep.restore()
    result.validation_perplexities = keep.perplexities
    best = min(keep.perplexities)
    test = Captions(_flat(job.test), features)
    right = trainer.predict(test, metric_key_prefix="test").metrics["test_perplexity"]
    shown = [(file, captions) for file, (_, captions) in zip(job.wrong, job.test, strict=True)]
    wrong = trainer.predict(Captions(_flat(shown), features), metric_key_prefix="wrong").metrics["wrong_perplexity"]
    clock("likelihoods")
    texts = generate(model, collator, tokenizer, [file for file, _ in job.test], features, job)
    clock("generate")
    predictions = {str(number): text for number, text in enumerate(texts)}
    references = {str(number): captions for number, (_, captions) in enumerate(job.test)}
    for metric in metrics:
        result.scores |= metric.score(predictions, references).corpus
    clock("metrics")
    result.scores |= {"perplexity": right, "perplexity_wrong_input": wrong, "validation_perplexity": best}
    return result


def arguments(job: Job) -> TrainingArguments:
    """The harness's optimizer in the words of Trainer."""
    given, steps = job.optimizer, len(job.train) // job.optimizer["per_device_train_batch_size"]
    return TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=given["per_device_train_batch_size"],
        per_device_eval_batch_size=job.eval_batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type=given["lr_scheduler_type"],
        warmup_steps=round(given["warmup_ratio"] * steps),
        adam_beta1=given["adam_beta1"],
        adam_beta2=given["adam_beta2"],
        adam_epsilon=given["adam_epsilon"],
        weight_decay=given["weight_decay"],
        max_grad_norm=given["max_grad_norm"],
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=job.steps_per_epoch,
        logging_steps=job.steps_per_epoch,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=job.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


@torch.no_grad()
def generate(
    model: Captioner, collator: Collator, tokenizer: Any, files: Sequence[str], features: Any, job: Job
) -> list[str]:
    """Greedy captions, batch by batch, with a KV cache."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(files), job.eval_batch_size):
        part = [Captions([(file, "")], features)[0]["picture"] for file in files[start : start + job.eval_batch_size]]
        first_B1 = torch.full((len(part), 1), tokenizer.bos_token_id)
        prefix_BND = model.prefix(first_B1, collator.pictures(part))
        ids_BT = model.language_model.generate(
            inputs_embeds=prefix_BND,
            attention_mask=torch.ones(prefix_BND.shape[:2], dtype=torch.long),
            max_new_tokens=job.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts += [text.strip() for text in tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]
    return texts


def make_features(job: Job, path: Path) -> None:
    """Encode every picture of the job that the file does not have."""
    torch.set_num_threads(job.threads)
    encoder = encoder_of(job.encoder)
    found: dict[str, Tensor] = torch.load(path) if path.exists() else {}
    needed = dict.fromkeys(file for file, _ in (*job.train, *job.validation, *job.test))
    files = [file for file in needed if file not in found]
    with torch.no_grad():
        for start in range(0, len(files), 64):
            part = files[start : start + 64]
            pixels = encoder.preprocess([Image.open(file).convert("RGB") for file in part])
            found |= {file: x_ND.clone() for file, x_ND in zip(part, encoder(pixels), strict=True)}
    torch.save(found, path)


class Clock:
    """Seconds between calls; the first is since the process began to import."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.monotonic()
        seconds["import"] = self.last - STARTED

    def __call__(self, phase: str) -> None:
        """End a phase."""
        now = time.monotonic()
        self.seconds[phase], self.last = now - self.last, now


def _flat(examples: Sequence[tuple[str, Sequence[str]]]) -> list[Row]:
    return [(file, caption) for file, captions in examples for caption in captions]


def _named(target: str) -> Callable[[], Any]:
    module, _, name = target.partition(":")
    found: Callable[[], Any] = getattr(import_module(module), name)
    return found


def main() -> None:
    """Run the job of a file, or make the features of its pictures."""
    path = Path(sys.argv[1])
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    if "--features" in sys.argv:
        make_features(job, Path(sys.argv[3]))
        return
    np.random.seed(job.seed)
    result = run(job)
    result.seconds["all"] = time.monotonic() - STARTED
    path.with_suffix(".result.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
