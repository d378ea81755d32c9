"""What every modality promises: checks on the files of a task's sample, as in ``harness.check.task``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.check.task import same
from harness.core.errors import UserError
from tasks.base import Modality

if TYPE_CHECKING:
    from tasks.encoder import Encoder

TOLERANCE = 1e-4
_GARBAGE = bytes(range(256)) * 4


class ModalitySubject:
    """A modality class and files of it.

    Args:
        modality_class: the modality.
        files: one or more that it reads.
        folder: an empty one for broken files.
    """

    def __init__(self, modality_class: type[Modality], files: Sequence[Path], folder: Path) -> None:
        self.plugin, self.files, self.folder = modality_class, files, folder

    @cached_property
    def modality(self) -> Modality:
        """The modality."""
        return self.plugin()

    @cached_property
    def items(self) -> list[Any]:
        """The decoded files."""
        return [self.modality.load(path) for path in self.files]

    @cached_property
    def encoder(self) -> Encoder:
        """The default encoder."""
        return self.modality.encoder(self.plugin.default_encoder)


def files_are_read(subject: ModalitySubject) -> Iterator[str]:
    """It decodes the files of a task's sample."""
    if not subject.files:
        yield "the sample of no registered task has a file of it, so nothing could be tried; register such a task too"
    for path, item in zip(subject.files, subject.items, strict=True):
        if item is None:
            yield f"{path.name} was decoded to nothing"


def default_encoder_is_there(subject: ModalitySubject) -> Iterator[str]:
    """Its default encoder loads, in evaluation mode and fp32."""
    import torch

    from tasks.encoder import Encoder

    encoder: Any = subject.encoder
    if not isinstance(encoder, Encoder):
        yield f"encoder() gave a {type(encoder).__name__}; it must be a harness.Encoder"
        return
    if encoder.training:
        yield "encoder() gave it in training mode: what it makes of an item would be random; call .eval()"
    kinds = {w.dtype for w in encoder.parameters()} - {torch.float32}
    if kinds:
        yield f"its weights are {', '.join(map(str, kinds))}; allowed: float32"


def loading_is_repeatable(subject: ModalitySubject) -> Iterator[str]:
    """A file that is decoded twice gives equal items and equal features."""
    for path, item in zip(subject.files, subject.items, strict=True):
        again = subject.modality.load(path)
        if not same(item, again):
            yield f"{path.name} was decoded to different items"
        (one,), (other,) = subject.encoder.encode([item]), subject.encoder.encode([again])
        if not one.equal(other):
            yield f"{path.name} has other features when it is encoded again"


def broken_files_are_named(subject: ModalitySubject) -> Iterator[str]:
    """A file that is missing, empty or garbage is a UserError that names it."""
    suffix = subject.files[0].suffix
    for kind, content in (("missing", None), ("empty", b""), ("garbage", _GARBAGE)):
        path = subject.folder / f"{kind}{suffix}"
        if content is not None:
            path.write_bytes(content)
        try:
            subject.modality.load(path)
        except UserError as error:
            if path.name not in str(error):
                yield f"the message about a {kind} file does not name it: {error}"
        except Exception as error:  # a plugin's code is anybody's
            yield f"a {kind} file raised {type(error).__name__}: {error}; a UserError that names the file is needed"
        else:
            yield f"a {kind} file was decoded without a word; a UserError that names the file is needed"


def features_have_their_shape(subject: ModalitySubject) -> Iterator[str]:
    """Each item's features are a finite float32 tensor (N, width), N at least 1."""
    import torch

    features = subject.encoder.encode(subject.items)
    if len(features) != len(subject.items):
        yield f"{len(subject.items)} items gave {len(features)} features; one tensor for each is needed"
        return
    for path, x_ND in zip(subject.files, features, strict=True):
        if x_ND.ndim != 2 or x_ND.shape[1] != subject.encoder.width or not len(x_ND):
            wanted = f"(1 or more, {subject.encoder.width}), as its width says"
            yield f"{path.name}: features have the shape {tuple(x_ND.shape)}; allowed: {wanted}"
        elif x_ND.device != subject.encoder.device:
            yield f"{path.name}: features are on {x_ND.device}, the encoder on {subject.encoder.device}"
        elif x_ND.dtype != torch.float32 or not x_ND.isfinite().all():
            yield f"{path.name}: features are {x_ND.dtype}, or not finite; allowed: finite float32"


def features_know_no_batch(subject: ModalitySubject) -> Iterator[str]:
    """Features of an item do not depend on the others in its batch."""
    together = subject.encoder.encode(subject.items)
    for path, item, x_ND in zip(subject.files, subject.items, together, strict=True):
        (alone_ND,) = subject.encoder.encode([item])
        if alone_ND.shape != x_ND.shape:
            found = f"{tuple(alone_ND.shape)} alone, {tuple(x_ND.shape)} with others"
        elif not alone_ND.allclose(x_ND, rtol=TOLERANCE, atol=TOLERANCE):
            found = f"off by up to {(alone_ND - x_ND).abs().max():.2g} from those alone"
        else:
            continue
        yield f"{path.name}: features are {found}; they are kept, so they must be the same in every batch"


def empty_encoder_agrees(subject: ModalitySubject) -> Iterator[str]:
    """Its encoder without weights has the same width and number of parameters, and takes the sample's items."""
    empty = subject.modality.empty_encoder(subject.plugin.default_encoder)
    if empty.width != subject.encoder.width:
        yield f"the width is {empty.width} without weights and {subject.encoder.width} with them"
    counts = [sum(weight.numel() for weight in e.parameters()) for e in (empty, subject.encoder)]
    if counts[0] != counts[1]:
        yield f"{counts[0]:,} parameters without weights and {counts[1]:,} with them"
    for path, item in zip(subject.files, subject.items, strict=True):
        if (why := empty.check(item)) is not None:
            yield f"{path.name}: check says that it cannot be encoded: {why}"


def unknown_encoders_are_refused(subject: ModalitySubject) -> Iterator[str]:
    """An encoder that does not exist is a UserError that names it."""
    name = "builtin/no-such-encoder"
    for method in (subject.modality.encoder, subject.modality.empty_encoder):
        try:
            method(name)
        except UserError as error:
            if name not in str(error):
                yield f"{method.__name__}: the message does not name it: {error}"
        except Exception as error:  # a plugin's code is anybody's
            yield f"{method.__name__} raised {type(error).__name__}: {error}; a UserError is needed"
        else:
            yield f"{method.__name__} took {name!r} without a word; a UserError is needed"


FIRST: tuple[Callable[[ModalitySubject], Iterator[str]], ...] = (files_are_read, default_encoder_is_there)
THEN: tuple[Callable[[ModalitySubject], Iterator[str]], ...] = (
    loading_is_repeatable, broken_files_are_named, features_have_their_shape, features_know_no_batch,
    empty_encoder_agrees, unknown_encoders_are_refused,
)  # fmt: skip
