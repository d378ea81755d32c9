"""The contracts of the plugins that bring data: Task, Modality, Metric.

A plugin subclasses one of these and registers the class under an entry point (``harness.tasks``,
``harness.modalities``, ``harness.metrics``), or an experiment names its file under ``plugins:``. The engine knows
nothing else about it. Imports no torch: an experiment is planned without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from harness.core import hub
from harness.core.errors import UserError, did_you_mean
from harness.core.record import Formula

if TYPE_CHECKING:
    from tasks.encoder import Encoder

Split = Literal["train", "validation", "test"]


class Config(BaseModel):
    """Base of every plugin's options: typed, frozen, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(NamedTuple):
    """One stretch of an example's input: a file, which a modality reads, or text."""

    context: str
    value: Path | str


@dataclass(frozen=True)
class Example:
    """One item of a split: the input before the answer, and one or more reference answers.

    ``inputs`` are in sequence order; a context may occur more than once (the turns of a conversation). A
    mapping context → value is accepted too.
    """

    id: str  # stable: the key of budgets, fingerprints and per-example scores
    inputs: tuple[Part, ...]
    references: tuple[str, ...]
    target: str | None = None  # context of the answer; None: the last one of the task
    member: str = ""  # in a mixture: the task that this example comes from
    # What it shares with others that have the same: the picture of several questions, a conversation, a speaker. Such
    # examples are resampled together. None: none, except examples with the same input file (tasks/clusters.py).
    cluster: str | None = None

    def __post_init__(self) -> None:
        pairs = self.inputs.items() if isinstance(self.inputs, Mapping) else self.inputs
        object.__setattr__(self, "inputs", tuple(Part(*pair) for pair in pairs))

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """The inputs that are files, each with its context."""
        return tuple((part.context, part.value) for part in self.inputs if isinstance(part.value, Path))


class Task(ABC):
    """Where examples come from and how answers to them are scored.

    ``contexts`` are the token domains; the last one is the answer's. A context that ``modalities`` names is read from
    files by that modality, any other one is text. Tasks whose contexts depend on their options set them in
    ``__init__``.
    """

    contexts: tuple[str, ...]
    modalities: Mapping[str, str]  # context → modality's registry name
    metrics: tuple[str, ...]  # registry names of what scores generated text
    Config: ClassVar[type[Config]]
    result_version: ClassVar[int] = 1  # raise it when examples or their order change: trials get new ids
    # Contexts whose items `augment` changes: they are encoded again for every training draw.
    augmented: frozenset[str] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Write a tiny data set of the real format into an empty folder, without a download.

        Returns:
            Options with which the task reads it. The contract tests run on it, and ``harness check``.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Make the data available on this machine (idempotent, safe to call from several processes).

        Raises:
            UserError: the data could not be loaded; the message names the file or folder.
        """

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """All examples of a split in a fixed order; ids are unique over the task.

        ``harness plan`` calls it without ``prepare``, to count: where data are missing it must raise, not download.

        Raises:
            UserError: annotations are broken, or their inputs are missing; all problems at once.
        """

    @classmethod
    def files(cls) -> Sequence[Path]:
        """Files that the examples depend on, besides code and the data themselves; their content is part of trial ids.

        What differs between machines is listed only where it is used. By default there are none.
        """
        return ()

    def augment(self, context: str, item: Any, rng: np.random.Generator) -> Any:
        """Change a decoded item for one training draw; never called for evaluation. By default unchanged."""
        return item

    def members(self) -> Mapping[str, Task]:
        """The tasks this one is made of, by the ``member`` of their examples; a plain task is its only member."""
        return {"": self}

    def shares(self, sizes: Mapping[str, int]) -> Mapping[str, float]:
        """Each member's share of the training draws; they sum to 1. By default in proportion to its training examples.

        Args:
            sizes: member → training examples.
        """
        total = sum(sizes.values())
        return {member: size / total for member, size in sizes.items()}


PreviewKind = Literal["png", "wav", "text"]
_MOST_PREVIEW_BYTES = 1 << 20  # of one, which a page embeds whole


@dataclass(frozen=True)
class Preview:
    """What people see or hear of an item: a PNG picture, a WAV recording, or text in UTF-8."""

    kind: PreviewKind
    content: bytes

    def __post_init__(self) -> None:
        starts = {"png": self.content.startswith(b"\x89PNG\r\n\x1a\n"), "wav": self.content[8:12] == b"WAVE"}
        if self.kind == "text":
            self.content.decode("utf-8")
        elif not starts.get(self.kind, False):
            raise ValueError(
                f"a preview of kind {self.kind!r} begins with {self.content[:12]!r}; allowed: png, wav, text"
            )
        if not 0 < len(self.content) <= _MOST_PREVIEW_BYTES:
            raise ValueError(f"a preview of {len(self.content):,} bytes; allowed: 1 to {_MOST_PREVIEW_BYTES:,}")

    @classmethod
    def text(cls, text: str) -> Preview:
        """A text to read."""
        return cls("text", text.encode("utf-8"))


class Modality(ABC):
    """One kind of input file: how it is read, and which frozen encoders turn it into tokens."""

    default_encoder: ClassVar[str]  # of an experiment that names none
    result_version: ClassVar[int] = 1  # raise it when decoded items or features change: trials get new ids
    # The modality's own encoders: a name that begins with "builtin/" → what makes the encoder, with its weights (True)
    # or without them, by its configuration alone (False).
    built_in: ClassVar[Mapping[str, Callable[[bool], Encoder]]] = {}
    # What an experiment may say of an encoder of ``pretrained`` beside its name. By default nothing.
    EncoderConfig: ClassVar[type[Config]] = Config

    @classmethod
    def files(cls) -> Sequence[Path]:
        """Files that features depend on, besides code and the encoders; their content is part of trial ids.

        What differs between machines is listed only where it is used. By default there are none.
        """
        return ()

    @abstractmethod
    def load(self, path: Path) -> Any:
        """Decode the whole file.

        Raises:
            UserError: it cannot be decoded; the message names it.
        """

    def pretrained(self, name: str, weights: bool, trust_remote_code: bool) -> Encoder:
        """An encoder from a local folder or the hub; by default there are none.

        A modality with an ``EncoderConfig`` of its own has one more argument: such options, if some are given.

        Raises:
            UserError: it could not be loaded, or is not an encoder of this modality.
        """
        kind = type(self).__name__
        raise UserError(f"backbone.encoders: {name!r} is not an encoder of {kind}; {did_you_mean(name, self.built_in)}")

    def encoder(
        self, name: str, trust_remote_code: bool = False, options: Mapping[str, Any] = MappingProxyType({})
    ) -> Encoder:
        """Load a frozen encoder (one of the modality's own, a local folder, or a hub id), in evaluation mode.

        Args:
            name: of the encoder.
            trust_remote_code: whether code of its repository may run.
            options: the fields of ``EncoderConfig`` that differ from their defaults.

        Raises:
            UserError: it could not be loaded, or is not an encoder of this modality.
        """
        return self._encoder(name, True, trust_remote_code, options)

    def empty_encoder(
        self, name: str, trust_remote_code: bool = False, options: Mapping[str, Any] = MappingProxyType({})
    ) -> Encoder:
        """The same without weights: to count its parameters, to ``check`` items and for the shapes of features.

        Raises:
            UserError: as ``encoder`` does.
        """
        return self._encoder(name, False, trust_remote_code, options)

    def _encoder(self, name: str, weights: bool, trust_remote_code: bool, options: Mapping[str, Any]) -> Encoder:
        if name in self.built_in:
            return self.built_in[name](weights).eval()
        if hub.is_builtin(name):
            return Modality.pretrained(self, name, weights, trust_remote_code)  # which rejects it
        given = [self.EncoderConfig.model_validate(options)] if options else []
        return self.pretrained(name, weights, trust_remote_code, *given).eval()

    def preview(self, item: Any) -> Preview | None:
        """What the report shows of a decoded item, in at most 1 MiB; None, by default: only the file's name."""
        return None

    def remark(self, item: Any) -> str | None:
        """What ``load`` had to convert, the same text for all such files ("grey-scale, read as RGB"); None: nothing."""
        return None


@dataclass(frozen=True)
class Scores:
    """Scores of one split: over the corpus and per example id, with notes that a reader needs."""

    corpus: dict[str, float]
    per_example: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # "SPICE was not computed: …"
    # For corpus scores that are not a mean: example id → the counts whose sums give the score, {"wer": (edits, words)}.
    # See Metric.corpus.
    counts: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)


class Metric(ABC):
    """Scores generated texts against references."""

    # What the leaderboard shows: metric name → label, as in {"bleu_4": "BLEU-4"}; only the first one where space
    # is short. Other scores are kept in the records only. Higher is better, except for those in lower_is_better.
    labels: ClassVar[Mapping[str, str]]
    result_version: ClassVar[int] = 1  # raise it when scores change: trials get new ids
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    # How a corpus score is computed from the examples, if it is not the mean of theirs: {"wer": "ratio"}, with
    # (numerator, denominator) of every example in Scores.counts. harness/core/formulas.py lists the other formulas and
    # what they need. Intervals over test examples are computed with it; a score that it does not reproduce has
    # intervals over seeds only.
    corpus: ClassVar[Mapping[str, Formula]] = {}
    # The lowest and the highest possible value of a score, None where there is none: {"wer": (0.0, None)}. Scores that
    # have both are compared on the logit scale; no interval leaves the bounds.
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = {}
    # Whether it scores short answers that repeat: then one answer to everything, and chance, are scored too, to compare
    # with. Costs up to 50,000 more scored answers in every trial.
    of_answers: ClassVar[bool] = False

    @classmethod
    def files(cls) -> Sequence[Path]:
        """Files that the scores depend on, besides code (dictionaries, jars); their content is part of trial ids.

        What differs between machines is listed only where it is used. By default there are none.
        """
        return ()

    def warm_up(self) -> None:  # noqa: B027 - optional
        """Start what takes seconds to start, such as a process, without waiting for it; by default nothing.

        Called when a trial begins, long before ``score``, and for each trial.
        """

    @abstractmethod
    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id.

        Raises:
            ValueError: the ids of predictions and references differ, or an example has no reference.
        """
