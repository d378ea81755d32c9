"""Which trials may be compared: those trained on the same examples in the same order for as many steps, scored on the
same examples in the same way, under the same conditions, with learning rates that were searched for as hard.

Within a setting every row must match the reference's; a row that does not is set apart with the reason, and enters no
rank, no difference and no correction of the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.naming import conditions, flatten
from harness.record import TrialRecord
from results.rows import Row, unended

# What must agree, and how a refusal is worded.
_REASONS = {
    "examples_fingerprint": "training examples differ",
    "order_fingerprint": "order of the examples differs",
    "evaluation_fingerprint": "evaluation examples differ",
    "steps": "number of optimizer steps differs",
    "started_from": "adapter groups trained before, on other data",
}
_NAMED = 3  # keys of the spec; of more the count is given
_MISSING = "not recorded"
Pairs = list[tuple[TrialRecord, TrialRecord]]


def mismatch(one: TrialRecord, other: TrialRecord) -> str | None:
    """Why two trials of one setting may not be compared, in words; None when they match."""
    if one.seed != other.seed:
        return f"seed differs ({one.seed}, {other.seed})"
    if one.data is None or other.data is None:
        return "what was trained on is not recorded"
    steps = f" ({one.data.steps}, {other.data.steps})"
    differing = [
        reason + (steps if field == "steps" else "")
        for field, reason in _REASONS.items()
        if getattr(one.data, field) != getattr(other.data, field)
    ]
    return "; ".join(differing + _other_conditions(one.spec, other.spec)) or None


def _other_conditions(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys of task, backbone, budget, optimizer and evaluation that two specs differ in, with both values."""
    differing = [section for section in {**one, **other} if one.get(section) != other.get(section)]
    mine, theirs = (conditions({key: spec[key] for key in differing if key in spec}) for spec in (one, other))
    a, b = dict(flatten(mine)), dict(flatten(theirs))
    pairs = {key: (a.get(key, _MISSING), b.get(key, _MISSING)) for key in {**a, **b}}
    words = [f"{key} differs ({x}, {y})" for key, (x, y) in pairs.items() if x != y]
    return words[:_NAMED] + ([f"{len(words) - _NAMED} more keys differ"] if len(words) > _NAMED else [])


def effort_mismatch(one: Row, other: Row) -> str | None:
    """Why the searches of two rows may not be compared, in words; None when they were as hard."""
    if one.effort == other.effort:
        return None
    words = [f"learning-rate search effort differs ({one.effort} tried, {other.name} {other.effort})"]
    words += [unended(one.candidates)] if unended(one.candidates) else []
    words += [f"{other.name}: {unended(other.candidates)}"] if unended(other.candidates) else []
    return "; ".join(words)


def set_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows of one setting; those that were not trained, scored or searched for as the others were are marked.

    Each trial must match its seed's anchor: the reference's trial, or without one the first of the kind that most
    trials of that seed are of. A trial without a record of its data is nobody's anchor, and matches none.
    """
    ended = sorted((row for row in rows if row.finished), key=lambda row: not row.is_reference)
    if not ended:
        return list(rows)
    anchors = _anchors(ended)
    usual = Counter(row.effort for row in ended).most_common(1)[0][0]
    searched = ended[0] if ended[0].is_reference else next(row for row in ended if row.effort == usual)
    marked = []
    for row in rows:
        seeds: dict[str, list[int]] = {}
        for seed, record in _by_planned_seed(row):
            name, anchor = anchors.get(seed, (row.name, record))
            if reason := mismatch(record, anchor):
                seeds.setdefault(f"{name}: {reason}", []).append(seed)
        reasons = [f"{_seeds(own, 'does', 'do')} not match {reason}" for reason, own in seeds.items()]
        if row.finished and (reason := effort_mismatch(row, searched)):
            reasons.append(reason)
        marked.append(replace(row, apart=tuple(reasons)))
    return marked


def _by_planned_seed(row: Row) -> list[tuple[int, TrialRecord]]:
    """Seed in the plan and record: a record that names another seed is found by this."""
    seeds = {trial.trial_id: trial.seed for trial in row.trials}
    return [(seeds[record.trial_id], record) for record in row.finished]


def _anchors(ended: Sequence[Row]) -> dict[int, tuple[str, TrialRecord]]:
    """By seed the trial that all others must match, and its row's name."""
    able: dict[int, list[tuple[Row, TrialRecord]]] = {}
    for row in ended:
        for seed, record in _by_planned_seed(row):
            if record.data is not None and record.seed == seed:
                able.setdefault(seed, []).append((row, record))
    anchors = {}
    for seed, found in able.items():
        row, record = found[0]
        if not row.is_reference:
            kinds = [_kind(record) for _, record in found]
            row, record = found[kinds.index(Counter(kinds).most_common(1)[0][0])]
        anchors[seed] = row.name, record
    return anchors


def _kind(record: TrialRecord) -> str:
    """The same for two trials of one seed that match."""
    data = [getattr(record.data, field) for field in _REASONS]
    return json.dumps([data, conditions(record.spec)], sort_keys=True)


def pairs(row: Row, other: Row) -> tuple[Pairs, tuple[str, ...]]:
    """Trials of two rows with the same seed, and notes in words on seeds that only one of them finished.

    There is no pair at all where one of the seeds does not match: what is wrong with it may be wrong with the others.
    """
    if not row.finished:
        return [], ()
    if not other.finished:
        return [], (f"not compared with {other.name}: {other.name} has not finished",)
    if reason := effort_mismatch(row, other):
        return [], (f"not compared with {other.name}: {reason}",)
    partners = dict(_by_planned_seed(other))
    found: Pairs = []
    refused: dict[str, list[int]] = {}
    alone = []
    for seed, record in _by_planned_seed(row):
        partner = partners.get(seed)
        if partner is None:
            alone.append(seed)
        elif reason := mismatch(record, partner):
            refused.setdefault(reason, []).append(seed)
        else:
            found.append((record, partner))
    start = f"not compared with {other.name}"
    notes = [f"{start}: {_seeds(seeds, 'does', 'do')} not match: {reason}" for reason, seeds in refused.items()]
    if alone:
        notes.append(f"{_seeds(alone)} {start}: {other.name} has not finished {'it' if len(alone) == 1 else 'them'}")
    return ([] if refused else found), tuple(notes)


def _seeds(seeds: Sequence[int], one: str = "", several: str = "") -> str:
    """``seed 3 does``, ``seeds 0, 1 do``."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} {one if len(seeds) == 1 else several}".rstrip()
