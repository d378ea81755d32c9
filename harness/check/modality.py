"""The contract of modalities: checks on the files of a task's sample, in the form of ``harness.check.task``."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.check.task import same
from harness.core.errors import UserError
from tasks.base import Modality, Preview

if TYPE_CHECKING:
    from tasks.encoder import Encoder

TOLERANCE = 1e-4
_GARBAGE = bytes(range(256)) * 4


class ModalitySubject:
    """A modality class, and files that it reads.

    Args:
        modality_class: the modality.
        files: at least one file that it reads.
        folder: an empty folder for corrupt files.
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

    @cached_property
    def empty(self) -> Encoder:
        """The same without weights."""
        return self.modality.empty_encoder(self.plugin.default_encoder)


def files_are_read(subject: ModalitySubject) -> Iterator[str]:
    """It decodes the files of a task's sample."""
    if not subject.files:
        yield "no registered task has such a file in its sample, so nothing could be checked; register such a task too"
    for path, item in zip(subject.files, subject.items, strict=True):
        if item is None:
            yield f"{path.name}: load returned None"


def default_encoder_loads(subject: ModalitySubject) -> Iterator[str]:
    """Its default encoder loads, in evaluation mode and with float32 weights."""
    import torch

    from tasks.encoder import Encoder

    encoder: Any = subject.encoder
    if not isinstance(encoder, Encoder):
        yield f"encoder() returned a {type(encoder).__name__}; it must be a harness.Encoder"
        return
    if encoder.training:
        yield "encoder() returned it in training mode, where features may be random; call .eval()"
    kinds = {w.dtype for w in encoder.parameters()} - {torch.float32}
    if kinds:
        yield f"its weights are {', '.join(map(str, kinds))}; allowed: float32"


def loading_is_repeatable(subject: ModalitySubject) -> Iterator[str]:
    """Decoding a file twice gives equal items and equal features."""
    for path, item in zip(subject.files, subject.items, strict=True):
        again = subject.modality.load(path)
        if not same(item, again):
            yield f"{path.name}: decoding it twice gave different items"
        (one,), (other,) = subject.encoder.encode([item]), subject.encoder.encode([again])
        if not one.equal(other):
            yield f"{path.name}: encoding it twice gave different features"


def broken_files_are_named(subject: ModalitySubject) -> Iterator[str]:
    """A missing, empty or corrupt file raises a `UserError` that names the file."""
    suffix = subject.files[0].suffix
    for kind, content in (("missing", None), ("empty", b""), ("corrupt", _GARBAGE)):
        path = subject.folder / f"{kind}{suffix}"
        if content is not None:
            path.write_bytes(content)
        try:
            subject.modality.load(path)
        except UserError as error:
            if path.name not in str(error):
                yield f"the message about a {kind} file does not name it: {error}"
        except Exception as error:  # third-party code
            yield f"a {kind} file raised {type(error).__name__}: {error}; it must raise a UserError that names the file"
        else:
            yield f"a {kind} file was silently decoded; it must raise a UserError that names the file"


def features_have_their_shape(subject: ModalitySubject) -> Iterator[str]:
    """The features of an item are a finite float32 tensor of shape (N, width) with N ≥ 1."""
    import torch

    features = subject.encoder.encode(subject.items)
    if len(features) != len(subject.items):
        yield f"{len(subject.items)} items gave {len(features)} features; required: one tensor for each item"
        return
    for path, x_ND in zip(subject.files, features, strict=True):
        if x_ND.ndim != 2 or x_ND.shape[1] != subject.encoder.width or not len(x_ND):
            wanted = f"(N, {subject.encoder.width}) with N ≥ 1, from the width of the encoder"
            yield f"{path.name}: features have shape {tuple(x_ND.shape)}; allowed: {wanted}"
        elif x_ND.device != subject.encoder.device:
            yield f"{path.name}: features are on {x_ND.device}, the encoder on {subject.encoder.device}"
        elif x_ND.dtype != torch.float32 or not x_ND.isfinite().all():
            yield f"{path.name}: features are {x_ND.dtype}, or not finite; allowed: finite float32"


def features_do_not_depend_on_the_batch(subject: ModalitySubject) -> Iterator[str]:
    """The features of an item do not depend on the other items in its batch."""
    together = subject.encoder.encode(subject.items)
    for path, item, x_ND in zip(subject.files, subject.items, together, strict=True):
        (alone_ND,) = subject.encoder.encode([item])
        if alone_ND.shape != x_ND.shape:
            found = f"{tuple(alone_ND.shape)} alone, {tuple(x_ND.shape)} with others"
        elif not alone_ND.allclose(x_ND, rtol=TOLERANCE, atol=TOLERANCE):
            found = f"up to {(alone_ND - x_ND).abs().max():.2g} different from those alone"
        else:
            continue
        yield f"{path.name}: features are {found}; they are cached, so they must be the same in every batch"


def empty_encoder_agrees(subject: ModalitySubject) -> Iterator[str]:
    """Without weights it has the same width and number of parameters, and knows the shapes of features."""
    empty = subject.empty
    if empty.width != subject.encoder.width:
        yield f"the width is {empty.width} without weights and {subject.encoder.width} with them"
    counts = [sum(weight.numel() for weight in e.parameters()) for e in (empty, subject.encoder)]
    if counts[0] != counts[1]:
        yield f"{counts[0]:,} parameters without weights and {counts[1]:,} with them"
    for path, item in zip(subject.files, subject.items, strict=True):
        if (why := empty.check(item)) is not None:
            yield f"{path.name}: the encoder rejects it: {why}"
    wanted = [tuple(x_ND.shape) for x_ND in subject.encoder.encode(subject.items)]
    try:
        found = [tuple(x_ND.shape) for x_ND in empty.encode(subject.items)]
    except Exception as error:  # third-party code
        yield f"without weights, encode raised {type(error).__name__}: {error}; costs cannot be predicted"
        return
    for path, without, with_weights in zip(subject.files, found, wanted, strict=True):
        if without != with_weights:
            yield f"{path.name}: features of shape {without} without weights, {with_weights} with them"


def unknown_encoders_are_refused(subject: ModalitySubject) -> Iterator[str]:
    """An unknown encoder raises a `UserError` that names it."""
    name = "builtin/no-such-encoder"
    for method in (subject.modality.encoder, subject.modality.empty_encoder):
        try:
            method(name)
        except UserError as error:
            if name not in str(error):
                yield f"{method.__name__}: the message does not contain the name: {error}"
        except Exception as error:  # third-party code
            yield f"{method.__name__} raised {type(error).__name__}: {error}; it must raise a UserError"
        else:
            yield f"{method.__name__} silently accepted {name!r}; it must raise a UserError"


def previews_can_be_shown(subject: ModalitySubject) -> Iterator[str]:
    """`preview` returns None or a `Preview` that can be opened, the same every time, and does not modify the item."""
    for path, item in zip(subject.files, subject.items, strict=True):
        try:
            one, other = (subject.modality.preview(item) for _ in range(2))
        except Exception as error:  # third-party code
            yield f"{path.name}: preview raised {type(error).__name__}: {error}"
            return
        found: Any = one
        if found is not None and not isinstance(found, Preview):
            yield f"{path.name}: preview returned a {type(found).__name__}; it must be a harness.Preview, or None"
            return
        if one != other:
            yield f"{path.name}: its preview was different the second time"
        if not same(item, subject.modality.load(path)):
            yield f"{path.name}: preview modified the item in place"
        if one is not None and (why := _broken_preview(one)):
            yield f"{path.name}: its preview cannot be opened as {one.kind}: {why}"


def _broken_preview(preview: Preview) -> str:
    """Why it cannot be shown; empty if it can."""
    from PIL import Image

    try:
        if preview.kind == "png":
            with Image.open(io.BytesIO(preview.content), formats=["PNG"]) as picture:
                picture.load()
        elif preview.kind == "wav":
            with wave.open(io.BytesIO(preview.content)) as recording:
                return "" if recording.readframes(recording.getnframes()) else "it has no samples"
    except Exception as error:  # each decoder has its own
        return str(error)
    return ""


FIRST: tuple[Callable[[ModalitySubject], Iterator[str]], ...] = (files_are_read, default_encoder_loads)
THEN: tuple[Callable[[ModalitySubject], Iterator[str]], ...] = (
    loading_is_repeatable, broken_files_are_named, features_have_their_shape, features_do_not_depend_on_the_batch,
    empty_encoder_agrees, unknown_encoders_are_refused, previews_can_be_shown,
)  # fmt: skip
