"""Disk space of a trial in its run folder, and of encoders' features in the cache that trials share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from harness.experiment.plan import TrialSpec
from harness.model.build import Splits
from harness.model.components import empty_encoders, make_modalities, make_task
from harness.price.duration import Amounts
from harness.price.flops import FORMULAS
from harness.price.trace import Traced

_FILES = 40_000  # bytes of a record, its log and MLflow's rows
_EXAMPLE = 400  # bytes of an evaluated example in Parquet: its texts and scores
_LOOKED_AT = 8  # files whose features are measured
_STATE = 12  # bytes of a trained parameter's optimizer state in a checkpoint, at most


def kept_bytes(traced: Traced, amounts: Amounts) -> int:
    """What a finished trial keeps: the trained weights of its best epoch, its scores, record and log."""
    return traced.trained_bytes + _FILES + _EXAMPLE * (amounts.validation + amounts.test)


def checkpoint_bytes(traced: Traced) -> int:
    """What a running trial has in addition: one checkpoint, and a new one before the old one goes."""
    return 2 * (2 * traced.trained_bytes + _STATE * traced.trained)


class FeatureSpace:
    """What the features of all trials of a plan take in the cache on disk, without augmented views.

    An encoder that takes one item at a time encodes a file once for all; of others a file has features for each seed
    and budget, because they are those of the same call (``tasks.encoder.Encoder.items_per_call``).
    """

    def __init__(self) -> None:
        self._files: dict[tuple[str, ...], set[Path]] = {}
        self._each: dict[tuple[str, ...], float | None] = {}  # bytes of a file's features
        self._file_s: dict[tuple[str, ...], float] = {}  # measured seconds of encoding a file
        self._file_flops: dict[tuple[str, ...], float] = {}

    @property
    def size_bytes(self) -> int | None:
        """Of all; None: not known, because an encoder needs its weights to say."""
        sizes = [self._each[key[:3]] for key in self._files]
        if None in sizes:
            return None
        return round(sum(len(own) * (each or 0) for own, each in zip(self._files.values(), sizes, strict=True)))

    @property
    def encoding_s(self) -> float:
        """Seconds of encoding all files once, where an encoder's time was measured."""
        return sum(len(own) * self._file_s.get(key[:3], 0.0) for key, own in self._files.items())

    @property
    def encoding_flops(self) -> float:
        """Of encoding all files once; an encoder that needs its weights to compute counts as none."""
        return sum(len(own) * self._file_flops.get(key[:3], 0.0) for key, own in self._files.items())

    def measured(self, spec: TrialSpec, file_s: float) -> None:
        """The encoders of a trial take so many seconds for a file."""
        self._file_s |= {_encoder_of(spec, name): file_s for name in spec.task.modalities}

    def add(self, spec: TrialSpec, splits: Splits) -> None:
        """Add the files of a trial; those that others have too count once."""
        task, encoders = make_task(spec), empty_encoders(spec)
        members = task.members()
        files: dict[str, set[Path]] = {name: set() for name in encoders}
        for part in (splits.train, splits.validation, splits.test):
            for example in part:
                augmented = members[example.member].augmented if part is splits.train else frozenset[str]()
                for context, path in example.files:
                    if context not in augmented:
                        files[task.modalities[context]].add(path)
        for name, own in files.items():
            if not own:
                continue
            key = _encoder_of(spec, name)
            if key not in self._each:
                self._each[key], self._file_flops[key] = _features_of(spec, name, sorted(own))
            if encoders[name].items_per_call > 1:
                key = (*key, spec.model_dump_json(include={"task", "seed", "budget", "eval"}))
            self._files.setdefault(key, set()).update(own)


def _encoder_of(spec: TrialSpec, modality: str) -> tuple[str, ...]:
    options = json.dumps(spec.backbone.encoder_options.get(modality, {}), sort_keys=True)
    return modality, spec.backbone.encoders[modality], options


def _features_of(spec: TrialSpec, modality: str, files: Sequence[Path]) -> tuple[float | None, float]:
    """Bytes of a file's features, and FLOPs of encoding it: means of a few, as an encoder without weights says."""
    own = files[:: -(-len(files) // _LOOKED_AT)]
    reader, encoder = make_modalities(spec)[modality], empty_encoders(spec)[modality]
    counted = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with suppress(Exception), counted:  # an estimate is never in the way
        found = encoder.encode([reader.load(path) for path in own])
        return sum(features.nbytes for features in found) / len(own), counted.get_total_flops() / len(own)
    return None, 0.0
