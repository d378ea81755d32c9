"""``load_trained``: an exported model, ready to caption, answer or transcribe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from harness.core.errors import UserError, did_you_mean
from harness.core.weights import check_unchanged
from harness.experiment.plan import TrialSpec
from harness.model.backbones import load_language_model
from harness.model.batches import BatchMaker
from harness.model.build import assemble, encoder_key
from harness.model.components import make_encoder, make_modalities, make_task, tower_in_step
from harness.model.context_model import ContextModel
from harness.model.features import Features
from harness.model.on_disk import disk_of_process
from harness.model.own_encoder import connector_of
from harness.trained.folder import WEIGHTS, Description, read_description, spec_of
from harness.trial.engine import load_weights
from harness.trial.evaluate import Evaluator
from tasks.base import Example, Part, Task

# Context → a file, or a text; or pairs of them, in their order.
Inputs = Mapping[str, str | Path] | Sequence[tuple[str, str | Path]]


@dataclass(frozen=True)
class Trained:
    """A model that a trial has trained.

    Attributes:
        description: what it is, and the scores that the trial measured.
        spec: of the trial.
        task: for its contexts; its data is not read.
        model: the language model with its adapters and projectors, in evaluation mode.
        batches: makes the model's inputs.
    """

    description: Description
    spec: TrialSpec
    task: Task
    model: ContextModel
    batches: BatchMaker

    @property
    def files(self) -> tuple[str, ...]:
        """The contexts whose inputs are files; those of others are texts."""
        return tuple(context for context in self.task.contexts if context in self.task.modalities)

    def predict(
        self,
        inputs: Sequence[Inputs],
        *,
        member: str = "",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
    ) -> list[str]:
        """Generate a text for each input, as the test of the trial did.

        Args:
            inputs: for each text its inputs: context → a file, or a text; several of one context as pairs, in order.
            member: for a mixture, the task that the texts are of.
            max_new_tokens: of each text; None: as in the trial.
            num_beams: 1 is greedy; None: as in the trial.

        Raises:
            UserError: an input is of an unknown context, a file cannot be read, or a mixture's member is not named.
        """
        options = self.spec.eval
        given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        for name, value in given.items():
            if value is not None and value < 1:
                raise UserError(f"{name}: found {value}; allowed: 1 or more")
        options = options.model_copy(update={name: value for name, value in given.items() if value is not None})
        examples = [self._example(str(number), one, member) for number, one in enumerate(inputs)]
        device = next(self.model.parameters()).device
        self.batches.features.forget()  # a file may have changed since the last call
        texts = Evaluator(self.model, self.batches, options, device).generate(examples)
        self.batches.features.flush()
        return [texts[example.id] for example in examples]

    def _example(self, name: str, given: Inputs, member: str) -> Example:
        members = self.task.members()
        if member not in members:
            raise UserError(f"member: found {member!r}; {did_you_mean(member, members)}")
        contexts = members[member].contexts
        if isinstance(given, Mapping):  # in the order in which the task has them
            given = [(context, given[context]) for context in sorted(given, key=lambda c: [*contexts, c].index(c))]
        if not given:
            raise UserError(f"inputs: none is given; allowed: {', '.join(contexts)}")
        parts = []
        for context, value in given:
            if context not in contexts:
                raise UserError(f"inputs: no context {context!r}; {did_you_mean(context, contexts)}")
            if context in self.files and not Path(value).is_file():
                raise UserError(f"{value}: no such file (context {context!r})")
            parts.append(Part(context, Path(value) if context in self.files else str(value)))
        return Example(name, tuple(parts), ("",), target=contexts[-1], member=member)


def load_trained(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    plugins: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
) -> Trained:
    """Load a model that ``harness.export_trial`` wrote.

    Args:
        folder: that was written.
        device: of the model; None: the first GPU, or the CPU.
        plugins: Python files with the plugins that the trial used, if it used such; they are executed.
        trust_remote_code: whether code of the language model's repository may run, if it needs some.

    Raises:
        UserError: it is no such folder, a plugin or a model is missing or another one, or the weights do not fit.
    """
    folder = Path(folder)
    found = read_description(folder)
    spec = spec_of(found, folder, plugins)
    if spec.backbone.trust_remote_code and not trust_remote_code:
        raise UserError(f"{folder}: its models run code of their repositories; allow it with trust_remote_code")
    backbone = spec.pinned_backbone
    check_unchanged(backbone.model_dump(), spec.fingerprints)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task, modalities = make_task(spec), make_modalities(spec)
    in_step = tower_in_step(spec)
    encoders = {name: make_encoder(backbone, name, one, in_step=in_step) for name, one in modalities.items()}
    keys = {name: encoder_key(spec, name, where) for name in modalities}
    features = Features(task, modalities, encoders, where, keys=keys, disk=disk_of_process())
    language_model = load_language_model(backbone)
    widths = {context: features.width(context) for context in task.modalities}
    model = assemble(spec, language_model.model, widths, connector_of(encoders))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        load_weights(folder / WEIGHTS, trained)
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: not the weights of this model: {error}") from None
    if spec.optimizer.bf16:
        model.bfloat16()
    model.to(where).eval().requires_grad_(False)
    return Trained(found, spec, task, model, BatchMaker(features, language_model, spec.budget, spec.pinned_backbone))
