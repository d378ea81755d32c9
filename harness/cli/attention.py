"""``harness attention``: what the tokens of a caption attend to, computed from the weights of a finished trial.

The paper's Figure 6 (Context-PEFT, arXiv 2312.08900). The trial's generated caption is appended to its input, and the
forward pass that scores it returns its attention weights. The query of a caption token is its own position; the keys
that are recorded are the tokens of the example's first encoded input, without boundary tokens.

Shapes: L layers, H heads, C caption tokens, N tokens of the input, Q queries, K keys.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import ArrowException
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adapters.methods import mmca
from harness.core.errors import UserError
from harness.core.files import atomic
from harness.core.record import PlannedTrial, Run, TrialRecord
from harness.core.samples import draw_ids
from harness.experiment.init_sources import WEIGHTS, finished_record, read_section
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.build import Built, build
from harness.model.on_disk import disk_of
from harness.sweep.profile import resources_of
from harness.trial.engine import load_weights
from results.leaderboard.join import read_runs
from results.leaderboard.table import build_leaderboard
from results.page.attention import FILE_NAME, HEADER, MOST_METHODS, RecordedAttention, RecordedExample
from results.page.gallery import members_of, predicted_ids, predictions_of
from tasks.base import Example
from tasks.modalities.patches import Grid, grid_of

_SUM_TOLERANCE = 1e-3  # on the sum of the weights of one query
_SUM_TOLERANCE_BF16 = 2e-2
_WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class _Job:
    """A finished trial whose attention is to be recorded; its weights and captions exist."""

    planned: PlannedTrial
    folder: Path
    record: TrialRecord
    spec: TrialSpec
    captions: Mapping[str, str]  # by example id, in display order

    @property
    def name(self) -> str:
        return f"{self.planned.label} {self.planned.grouping}".rstrip() + f", seed {self.planned.seed}"


def record_attention(run_folder: Path, trials: Sequence[str], examples: int, console: Console) -> None:
    """Write ``attention.safetensors`` next to the records of some trials, for the report.

    Args:
        run_folder: a run folder of ``harness run``.
        trials: ids of finished trials. Empty: the first finished seeds of the reference and the best other rows, four
            in all, in the last setting of the plan that has finished trials.
        examples: number of test examples, starting with those of the report's gallery.
        console: shows progress, and a line per file.

    Raises:
        UserError: an argument is invalid; a trial has not finished or lacks its weights or captions; or its attention
            cannot be shown, because the input is only text or the weights of a query do not sum to 1.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # it would add one for every model to ours
    if examples < 1:
        raise UserError(f"--examples: found {examples}; allowed: 1 or more")
    run = read_runs([run_folder])
    jobs = [_job(run, trial_id, examples) for trial_id in trials or default_trials(run)]
    with console.status("") as status:
        for number, job in enumerate(jobs, start=1):
            what = f"{escape(job.name)} ({number} of {len(jobs)})"
            status.update(f"{what}: loading")
            count, without = _record(job, what, status)
            note = f", skipped {without} without an encoded input" if without else ""
            path = escape(str(job.folder / FILE_NAME))
            console.print(f"{escape(job.name)}: {count} examples{note} → {path}", highlight=False, soft_wrap=True)


def default_trials(run: Run) -> list[str]:
    """Ids of the first finished seeds of the reference and the best other rows, in the last setting that has any.

    Raises:
        UserError: no trial has finished.
    """
    board = build_leaderboard(run)
    for setting in reversed(board.settings):
        rows = [row for row in (*board.of(setting), *board.apart(setting)) if row.finished]
        rows = sorted(rows, key=lambda row: not row.is_reference)
        if rows:
            return [row.finished[0].trial_id for row in rows[:MOST_METHODS]]
    raise UserError(f"{run.folder}: no trial has finished yet")


def _job(run: Run, trial_id: str, examples: int) -> _Job:
    planned = {trial.trial_id: trial for trial in run.plan.trials}
    if trial_id not in planned:
        near = difflib.get_close_matches(trial_id, planned, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f", such as {next(iter(planned))!r}" if planned else ""
        raise UserError(f"{run.folder / 'plan.json'}: no trial {trial_id!r} among its {len(planned)}{hint}")
    folder = run.trial_folder(trial_id)
    record = finished_record(folder)
    spec: TrialSpec = read_section(TrialSpec, folder, record.spec)
    if not spec.task.modalities:
        contexts = ", ".join(spec.task.contexts)
        raise UserError(f"{folder}: task {spec.task.name} has only text ({contexts}); attention needs an encoded input")
    path = folder / "examples.parquet"
    try:
        drawn = draw_ids(predicted_ids(path), members_of(run.plan.metrics), examples)[:examples]
        found = predictions_of(path, drawn, ())
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: could not be read: {str(error).splitlines()[0]}") from None
    if not drawn:
        raise UserError(f"{path}: no generated captions to record attention for")
    return _Job(planned[trial_id], folder, record, spec, {one: found[one]["prediction"] for one in drawn})


def _record(job: _Job, what: str, status: Status) -> tuple[int, int]:
    """Write the file of one trial; return the numbers of examples in it and of those without an encoded input."""
    built = restore(job.spec, job.folder)
    by_id = {example.id: example for example in built.splits.test}
    recorded: list[RecordedExample] = []
    tensors: dict[str, Tensor] = {}
    for number, (example_id, caption) in enumerate(job.captions.items(), start=1):
        status.update(f"{what}: example {number}")
        if example_id not in by_id:
            raise UserError(
                f"{job.folder / 'examples.parquet'}: example {example_id!r} is no longer in the data of the task"
            )
        if by_id[example_id].files:
            one, weights_LHCN = attention_of(built, by_id[example_id], caption)
            recorded.append(one)
            tensors[example_id] = weights_LHCN.half().contiguous()
    built.batches.features.flush()
    if not recorded:
        raise UserError(f"{job.folder}: none of its {len(job.captions)} drawn examples has an encoded input")
    header = RecordedAttention(trial_id=job.record.trial_id, started_at=job.record.started_at, examples=tuple(recorded))
    path = job.folder / FILE_NAME
    with atomic(path) as partial:
        save_file(tensors, partial, {HEADER: json.dumps(header.model_dump(mode="json"))})
    return len(recorded), len(job.captions) - len(recorded)


def restore(spec: TrialSpec, folder: Path) -> Built:
    """The model and data of a finished trial, with an attention implementation that returns its weights.

    Args:
        spec: spec of the trial.
        folder: folder of the trial, with its weights.

    Raises:
        UserError: the model or the data could not be loaded, or the weights do not fit the model.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    # The initial weights of its groups no longer matter: everything that was trained is in the weights of the trial.
    adapter = spec.adapter.model_copy(update={"init_from": {}})
    run = folder.parents[1]
    resources = resources_of(run) if (run / "experiment.yaml").is_file() else Resources()
    built = build(spec.model_copy(update={"adapter": adapter}), device, disk=disk_of(resources, run))
    trained = {name: p for name, p in built.model.named_parameters() if p.requires_grad}
    try:
        load_weights(folder / WEIGHTS, trained)
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: not the weights of this trial: {error}") from None
    if spec.optimizer.bf16:
        built.model.bfloat16()
    built.model.eval()
    give_weights(built)
    return built


def give_weights(built: Built) -> None:
    """Switch the language model to eager attention, which returns its weights; results stay equal up to rounding.

    The generated caption is scored as a whole: ``max_target_length`` is a limit for training only.
    """
    language_model = built.model.language_model
    if language_model.config._attn_implementation != mmca.NAME:  # returns its weights itself
        language_model.set_attn_implementation("eager")
    built.batches.budget = built.batches.budget.model_copy(update={"max_target_length": sys.maxsize})


@torch.inference_mode()
def attention_of(built: Built, example: Example, caption: str) -> tuple[RecordedExample, Tensor]:
    """The attention (L, H, C, N) of a caption's tokens to the example's first encoded input, as shares of 1.

    Args:
        built: from ``restore``.
        example: an example with at least one file.
        caption: the text after its inputs.

    Raises:
        UserError: the model does not return its weights, or they do not sum to 1.
    """
    batch = built.batches.make([example], [caption]).to(next(built.model.parameters()).device)
    with _attentions(built.model.language_model) as layers:
        built.model(batch)
    model_type = built.model.language_model.config.model_type
    if not layers or any(weights is None for weights in layers):
        raise UserError(f"a {model_type} model does not return the attention weights of all its layers")
    places_C = batch.targets.source_N[1:]  # without EOS, which is predicted but never an input
    context, path = example.files[0]
    boundary = int(built.batches.backbone.projector_boundary_tokens)
    tokens = batch.items[context].lengths[0]
    places_N = batch.items[context].positions_P[boundary : boundary + tokens]
    added = layers[0].shape[-1] - (batch.token_ids_BT.shape[1] - 1)  # soft prompts, at the very beginning
    weights_LHCK = torch.stack([weights[0, :, places_C + added] for weights in layers]).float()
    whole = _softmaxes(weights_LHCK, built.model.language_model)
    grid = _grid(built, example, tokens)
    recorded = RecordedExample(
        example_id=example.id,
        context=context,
        path=str(path),
        tokens=_pieces(built, caption, batch.targets.label_N[:-1].tolist()),
        softmaxes=whole,
        **grid._asdict(),
    )
    return recorded, (weights_LHCK[..., places_N + added] / whole).cpu()


@contextmanager
def _attentions(language_model: Any) -> Iterator[list[Any]]:
    """Collect the attention weights (1, H, Q, K) of all layers in every forward pass."""
    found: list[Any] = []

    def ask(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_attentions": True}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        found.extend(getattr(output, "attentions", None) or ())

    handles = (
        language_model.register_forward_pre_hook(ask, with_kwargs=True),
        language_model.register_forward_hook(keep),
    )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _softmaxes(weights_LHCK: Tensor, language_model: Any) -> int:
    """The sum of the weights of a query: 1, or with multi-modal causal attention its number of softmaxes.

    Raises:
        UserError: the sum is not an integer, or not the same everywhere (attention with sinks).
    """
    sums_LHC = weights_LHCK.double().sum(dim=-1)
    if not sums_LHC.numel():
        return 1
    whole = round(float(sums_LHC.mean()))
    half = next(language_model.parameters()).dtype != torch.float32
    worst = float((sums_LHC - whole).abs().max())
    if whole < 1 or worst > (_SUM_TOLERANCE_BF16 if half else _SUM_TOLERANCE):
        name = language_model.config.model_type
        raise UserError(
            f"the attention weights of a {name} model sum to {whole} ± {worst:.2g} instead of a whole number"
        )
    return whole


def _grid(built: Built, example: Example, tokens: int) -> Grid:
    """The patch grid of the example's first encoded input; a single row if its tokens are not patches of a picture."""
    features = built.batches.features
    context, path = example.files[0]
    modality = features.task.modalities[context]
    item = features.modalities[modality].load(path)
    return grid_of(features.encoders[modality], item, tokens) or Grid(0, 1, tokens, _WHOLE)


def _pieces(built: Built, caption: str, ids: Sequence[int]) -> tuple[str, ...]:
    """The caption split at the ends of its tokens; if several tokens share a character, the later ones are empty.

    Raises:
        UserError: the tokenizer does not return token offsets.
    """
    tokenizer, spaced = built.batches.language_model.tokenizer, built.batches.spaced(caption)
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not return the offsets of its tokens; a fast tokenizer is needed"
        )
    encoded = tokenizer(spaced, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == list(ids)  # noqa: S101 - BatchMaker tokenises the same text
    if not ids:
        return ()
    ends = [max(end for _, end in encoded["offset_mapping"][: n + 1]) for n in range(len(ids))]
    ends[-1] = len(spaced)
    starts = [len(spaced) - len(caption), *ends[:-1]]
    return tuple(spaced[start:end] for start, end in zip(starts, ends, strict=True))
