"""Does a row answer at all: badges from what its trials wrote, whatever its rank.

A model can score well and answer nothing: one sentence for every picture, or the answer that is most frequent. A badge
``doubts_answer`` where the measured values themselves say so (one text, a ratio of 1, a score at or below that of one
constant answer). Where only an interval is too wide to show the opposite, the badge says "not shown".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, Protocol

from harness.core.record import Answers, MetricInfo, TrialRecord
from results.statistics.intervals import Estimate

Kind = Literal["one_text", "few_texts", "ignores_input", "input_unproven", "at_constant", "constant_unproven"]
LABELS: Mapping[Kind, str] = {
    "one_text": "one text for all",
    "few_texts": "few texts",
    "ignores_input": "ignores its input",
    "input_unproven": "use of the input not shown",
    "at_constant": "no better than one answer",
    "constant_unproven": "not shown to beat one answer",
}
# A ratio of the perplexities with the wrong and the right input below this: the input makes no difference.
IGNORED_BELOW = 1.01
_FEW = 20  # times as many references as texts: "few texts"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Badge:
    """One finding about a row. ``text`` continues "it": ``writes the same text for all 512 test examples``."""

    kind: Kind
    text: str
    doubts_answer: bool  # whether the row may not be called the best without it

    @property
    def label(self) -> str:
        """Two to five words, for a table."""
        return LABELS[self.kind]


class Badged(Protocol):
    """What has badges: a row of the leaderboard."""

    @property
    def badges(self) -> tuple[Badge, ...]:
        """All of them."""


def doubts(row: Badged) -> str:
    """What speaks against a row answering at all, to continue "although it …"; empty if nothing does."""
    return " and ".join(badge.text for badge in row.badges if badge.doubts_answer)


def badges_of(
    finished: Sequence[TrialRecord],
    metrics: Mapping[str, Estimate],
    input_use: Estimate | None,
    infos: Sequence[MetricInfo],
) -> tuple[Badge, ...]:
    """The badges of a row.

    Args:
        finished: its trials.
        metrics: its scores on the test split.
        input_use: perplexity with the wrong input / with the right one.
        infos: the metrics of the plan.
    """
    members = dict.fromkeys(member for record in finished for member in record.answers)
    of_member = {member: [r.answers[member] for r in finished if member in r.answers] for member in members}
    return (
        *(badge for member, answers in of_member.items() for badge in _texts(member, answers)),
        *_input(input_use),
        *(badge for member, answers in of_member.items() for badge in _constant(member, answers, metrics, infos)),
    )


def _texts(member: str, answers: Sequence[Answers]) -> Iterator[Badge]:
    """Whether the generated texts differ, where the references do."""
    varied = [one for one in answers if one.texts > 1 and one.distinct_references > 1]
    same = [one for one in varied if one.distinct == 1]
    few = [one for one in varied if one.distinct * _FEW <= one.distinct_references]
    found, kind = (same, "one_text") if same else (few, "few_texts")
    if not found:
        return
    examples = f"{found[0].texts:,} test examples{f' of {member}' if member else ''}"
    seeds = "" if len(found) == len(answers) else f" with {len(found)} of {len(answers)} seeds"
    if kind == "few_texts":
        most = max(one.distinct for one in found)
        yield Badge("few_texts", f"writes at most {most:,} different texts for {examples}{seeds}", False)
    elif not found[0].commonest:
        yield Badge("one_text", f"writes nothing for any of the {examples}{seeds}", True)
    else:
        yield Badge("one_text", f"writes the same text for all {examples}{seeds} ({_quoted(found[0].commonest)})", True)


def _input(use: Estimate | None) -> Iterator[Badge]:
    if use is None:
        return
    ratio = f"with another example's input the perplexity is {use.mean:.3g}×"
    if use.mean < IGNORED_BELOW:
        yield Badge("ignores_input", f"ignores its input ({ratio})", True)
    elif use.low is not None and not use.excludes(1):
        yield Badge("input_unproven", f"is not shown to use its input ({ratio})", False)


def _constant(
    member: str, answers: Sequence[Answers], metrics: Mapping[str, Estimate], infos: Sequence[MetricInfo]
) -> Iterator[Badge]:
    """Whether the first score that has baselines is better than that of one answer to everything, and than chance."""
    for info in infos:
        name = info.name.removeprefix(f"{member}/") if member else info.name
        known = [one for one in answers if name in one.majority_scores]
        score = metrics.get(info.name)
        if score is None or not known or (member and name == info.name):
            continue
        sign = 1 if info.higher_is_better else -1
        majority = fmean(one.majority_scores[name] for one in known)
        by_chance = [one.chance_scores[name] for one in known if name in one.chance_scores]
        chance = fmean(by_chance) if by_chance else majority
        said = f"always answering {_quoted(known[0].majority)} ({majority:.3g})"
        bar = majority
        if sign * chance > sign * majority:
            said, bar = f"answering by chance ({chance:.3g})", chance
        values = f"{info.label} {score.mean:.3g}"
        if sign * (score.mean - bar) <= 0:
            yield Badge("at_constant", f"is no better than {said}: {values}", True)
        elif score.low is not None and not score.excludes(bar):
            yield Badge("constant_unproven", f"is not shown to be better than {said}: {values}", False)
        return


def _quoted(text: str) -> str:
    whole = text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 2].rstrip()} …"
    return f"“{whole}”"
