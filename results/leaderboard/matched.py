"""Which trials are comparable: those trained on the same examples in the same order for as many steps, scored on the
same examples in the same way, under the same conditions, with the same learning-rate search effort.

Within a setting every row must match the reference. A row that does not is excluded from ranking with the reason, and
enters no rank, no difference and no multiplicity correction of the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.core.naming import FINGERPRINTS, conditions, flatten
from harness.core.record import TrialRecord
from harness.core.weights import short
from results.leaderboard.rows import Row, unended

# What must agree, and the wording of a mismatch.
_REASONS = {
    "examples_fingerprint": "training examples differ",
    "order_fingerprint": "order of the examples differs",
    "evaluation_fingerprint": "evaluation examples differ",
    "steps": "number of optimizer steps differs",
    "started_from": "adapter groups trained before, on other data",
}
_OF_ALL_SEEDS = ("examples_fingerprint", "evaluation_fingerprint")  # the first where a budget is all examples
_NAMED = 3  # keys of the spec; of further keys only the number is given
_MISSING = "not recorded"
Pairs = list[tuple[TrialRecord, TrialRecord]]


def mismatch(one: TrialRecord, other: TrialRecord) -> str | None:
    """Why two trials of one setting are not comparable; None if they match."""
    if one.seed != other.seed:
        return f"seed differs ({one.seed}, {other.seed})"
    if one.data is None or other.data is None:
        return "the training data are not recorded"
    steps = f" ({one.data.steps}, {other.data.steps})"
    differing = [
        reason + (steps if field == "steps" else "")
        for field, reason in _REASONS.items()
        if getattr(one.data, field) != getattr(other.data, field) and field in _compared(one)
    ]
    return "; ".join(differing + _other_conditions(one.spec, other.spec)) or None


def _compared(record: TrialRecord) -> list[str]:
    """The fields of its data that must agree.

    With patience trials stop at different steps by one rule, which is among the other conditions: what must agree is
    the rule, the data and their order.
    """
    stops_early = (record.spec.get("budget") or {}).get("patience") is not None
    return [field for field in _REASONS if field != "steps" or not stops_early]


def _other_conditions(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys of task, backbone, budget, optimizer and evaluation in which two specs differ, with both values."""
    differing = [section for section in {**one, **other} if one.get(section) != other.get(section)]
    mine, theirs = (conditions({key: spec[key] for key in differing if key in spec}) for spec in (one, other))
    a, b = dict(flatten(mine)), dict(flatten(theirs))
    pairs = {key: (a.get(key, _MISSING), b.get(key, _MISSING)) for key in {**a, **b}}
    words = [_difference(key, x, y) for key, (x, y) in pairs.items() if x != y]
    return words[:_NAMED] + ([f"{len(words) - _NAMED} more keys differ"] if len(words) > _NAMED else [])


def _difference(key: str, mine: Any, theirs: Any) -> str:
    if key.startswith(FINGERPRINTS):
        digests = [value if value == _MISSING else short(value) for value in (mine, theirs)]
        return f"backbone.{key.removeprefix(FINGERPRINTS)} weights differ ({', '.join(digests)})"
    return f"{key} differs ({mine}, {theirs})"


def effort_mismatch(one: Row, other: Row) -> str | None:
    """Why the searches of two rows are not comparable; None if they tried equally many rates, halved alike."""
    if one.effort == other.effort and one.halving == other.halving:
        return None
    if one.effort == other.effort:
        halvings = f"{one.halving or 'none'}; {other.name}: {other.halving or 'none'}"
        return f"halving of the learning rates differs ({halvings})"
    words = [f"learning-rate search effort differs ({one.effort} tried, {other.name} {other.effort})"]
    words += [unended(one.candidates)] if unended(one.candidates) else []
    words += [f"{other.name}: {unended(other.candidates)}"] if unended(other.candidates) else []
    return "; ".join(words)


def exclude_unmatched(rows: Sequence[Row]) -> list[Row]:
    """The rows of one setting; those not trained, scored or searched for like the others carry the reason (``apart``).

    Each trial must match the anchor of its seed: the reference's trial, or without one the first trial of the most
    common kind. A trial whose data are not recorded is never an anchor, and matches none. What all seeds have in common
    must be that of most trials: a mean over seeds is of one evaluation set.
    """
    ended = sorted((row for row in rows if row.finished), key=lambda row: not row.is_reference)
    if not ended:
        return list(rows)
    anchors = _anchors(ended)
    usual = Counter((row.effort, row.halving) for row in ended).most_common(1)[0][0]
    searched = ended[0] if ended[0].is_reference else next(r for r in ended if (r.effort, r.halving) == usual)
    usual_data = {field: _usual(ended, field) for field in _OF_ALL_SEEDS}
    marked = []
    for row in rows:
        seeds: dict[str, list[int]] = {}
        for seed, record in _by_planned_seed(row):
            name, anchor = anchors.get(seed, (row.name, record))
            if reason := mismatch(record, anchor):
                seeds.setdefault(f"{name}: {reason}", []).append(seed)
            elif reason := _changed(record, usual_data):
                seeds.setdefault(f"other seeds: {reason}", []).append(seed)
        reasons = [f"{_seeds(own, 'does', 'do')} not match {reason}" for reason, own in seeds.items()]
        if row.finished and (reason := effort_mismatch(row, searched)):
            reasons.append(reason)
        marked.append(replace(row, apart=tuple(reasons)))
    return marked


def _of_all_seeds(record: TrialRecord, field: str) -> str | None:
    """A fingerprint that is the same for all seeds; None: it is not recorded, or each seed has its own examples."""
    own = field == "examples_fingerprint" and (record.spec.get("budget") or {}).get("examples") != "all"
    return None if own or record.data is None else str(getattr(record.data, field))


def _usual(ended: Sequence[Row], field: str) -> str | None:
    found = [print_ for row in ended for record in row.finished if (print_ := _of_all_seeds(record, field))]
    return Counter(found).most_common(1)[0][0] if found else None


def _changed(record: TrialRecord, usual: Mapping[str, str | None]) -> str | None:
    """Why a trial's data are not those that other seeds have under the same name; None: they are."""
    differing = [_REASONS[field] for field, value in usual.items() if _of_all_seeds(record, field) not in (None, value)]
    return f"{'; '.join(differing)} (data that changed under their name)" if differing else None


def _by_planned_seed(row: Row) -> list[tuple[int, TrialRecord]]:
    """Pairs of planned seed and record: this exposes a record that has another seed than planned."""
    seeds = {trial.trial_id: trial.seed for trial in row.trials}
    return [(seeds[record.trial_id], record) for record in row.finished]


def _anchors(ended: Sequence[Row]) -> dict[int, tuple[str, TrialRecord]]:
    """By seed: the name of a row, and its trial that all others must match."""
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
    """A key that is equal for two trials of one seed if they match."""
    data = [getattr(record.data, field) for field in _compared(record)]
    return json.dumps([data, conditions(record.spec)], sort_keys=True)


def pairs(row: Row, other: Row) -> tuple[Pairs, tuple[str, ...]]:
    """Trials of two rows paired by seed, and notes on seeds that only one of the rows finished.

    If the trials of any seed do not match, no pair is returned: the other seeds may have the same problem.
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
