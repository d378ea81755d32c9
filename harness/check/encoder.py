"""The contract of encoders that are plugins: checks on files of a task that has their modality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.check.modality import (
    ModalitySubject,
    default_encoder_loads,
    empty_encoder_agrees,
    features_do_not_depend_on_the_batch,
    features_have_their_shape,
)
from harness.core.errors import UserError
from tasks.base import Modality
from tasks.encoder import Encoder
from tasks.registry import MODALITIES


class EncoderSubject(ModalitySubject):
    """An encoder class, and files of its modality.

    Args:
        encoder_class: the encoder.
        files: at least one file.
        folder: an empty folder.
    """

    def __init__(self, encoder_class: type[Encoder], files: Sequence[Path], folder: Path) -> None:
        self.plugin: Any = encoder_class
        self.files, self.folder = files, folder

    @cached_property
    def modality(self) -> Modality:
        """Reads the files."""
        made: Modality = MODALITIES.load(MODALITIES.find(self.plugin.modality).target)()
        return made

    @cached_property
    def encoder(self) -> Encoder:
        """With weights."""
        made: Encoder = self.plugin.make(True)
        return made

    @cached_property
    def empty(self) -> Encoder:
        """Without weights."""
        made: Encoder = self.plugin.make(False)
        return made


def modality_is_known(subject: ModalitySubject) -> Iterator[str]:
    """`modality` is the name of a registered one, of which a task has files."""
    try:
        MODALITIES.find(subject.plugin.modality)  # type: ignore[attr-defined]  # of an encoder
    except UserError as error:
        yield str(error)
        return
    if not subject.files:
        yield "no registered task has such a file in its sample, so nothing could be checked; register such a task too"


def it_loads(subject: ModalitySubject) -> Iterator[str]:
    """`make(weights=True)` gives it in evaluation mode and with float32 weights."""
    yield from (problem.replace("encoder()", "make(weights=True)") for problem in default_encoder_loads(subject))


FIRST: tuple[Callable[[ModalitySubject], Iterator[str]], ...] = (modality_is_known, it_loads)
THEN: tuple[Callable[[ModalitySubject], Iterator[str]], ...] = (
    features_have_their_shape, features_do_not_depend_on_the_batch, empty_encoder_agrees,
)  # fmt: skip
