"""The contracts of the plugins that bring data: Task, Modality, Metric.

A plugin subclasses one of these and registers the class under an entry point (``harness.tasks``,
``harness.modalities``, ``harness.metrics``). The engine knows nothing else about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Split = Literal["train", "validation", "test"]


class Config(BaseModel):
    """Base of every plugin's options: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Example:
    """One item of a split: a file for every context that is not text, and one or more reference texts."""

    id: str  # stable: budgets, fingerprints and per-example scores go by it
    inputs: Mapping[str, Path]  # context → file, read by that context's modality
    references: tuple[str, ...]


class Task(ABC):
    """Where examples come from and how answers to them are scored.

    ``contexts`` are the token domains in sequence order; the last one is the target text, the others are read by the
    modality that ``modalities`` names for them.
    """

    contexts: ClassVar[tuple[str, ...]]
    modalities: ClassVar[Mapping[str, str]]  # context → modality's registry name
    metric: ClassVar[str]  # registry name of the metric that scores generated text
    Config: ClassVar[type[Config]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def prepare(self) -> None:
        """Bring the data to this machine (idempotent, safe for several processes at once).

        Raises:
            UserError: it cannot be had; the message names the file or folder.
        """

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """All examples of a split in a fixed order; ids are unique over the task.

        Raises:
            UserError: an annotation is broken, or its input is missing.
        """


class Modality(ABC):
    """How one kind of input file is read. What it becomes afterwards is the encoder's business."""

    @abstractmethod
    def load(self, path: Path) -> Any:
        """Decode the whole file.

        Raises:
            UserError: it cannot be decoded; the message names it.
        """


@dataclass(frozen=True)
class Scores:
    """Scores of one split: over the corpus, and per example id."""

    corpus: dict[str, float]
    per_example: dict[str, dict[str, float]] = field(default_factory=dict)


class Metric(ABC):
    """Scores generated texts against references."""

    # What the leaderboard shows: metric name → label, as in {"bleu_4": "BLEU-4"}; higher is better. Other scores are
    # kept in the records only.
    labels: ClassVar[Mapping[str, str]]

    @abstractmethod
    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id.

        Raises:
            ValueError: the ids of predictions and references differ, or an example has no reference.
        """
