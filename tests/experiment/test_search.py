# ruff: noqa: E501 - one wrong input per line reads as a table
"""``search`` of an experiment: which learning rates the trials have, and that all methods are searched alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.search import Halving, Range, Search
from harness.experiment.load import Experiment
from harness.experiment.plan import Earlier, describe, expand
from harness.sweep.declared import metrics_of
from tests.support.refused import check_refused

pytestmark = pytest.mark.quick

Write = Callable[[str], Path]


def rates(experiment: Experiment) -> list[tuple[str, float | None]]:
    return [(spec.adapter.label, spec.optimizer.learning_rate) for spec in expand(experiment)]


def test_a_search_is_a_list_of_rates_with_the_ids_of_that_list(experiment_file: Write) -> None:
    text = "task: scenes\nseeds: [0, 1]\nadapters: [{{method: lora, {}, rank: [4, 8]}}]\n"
    listed = expand(Experiment.from_yaml(experiment_file(text.format("learning_rate: [1e-3, 1e-2]"))))
    for same in ("[1e-3, 1e-2]", "{log_uniform: [1e-3, 1e-2]}, candidates: 2, sampler: grid"):
        found = Experiment.from_yaml(experiment_file(text.format(f"search: {{learning_rate: {same}}}")))
        assert [spec.trial_id for spec in expand(found)] == [spec.trial_id for spec in listed]
        assert all("search" not in spec.model_dump()["adapter"] for spec in expand(found))


def test_the_experiments_search_holds_where_an_entry_has_none_of_its_own(experiment_file: Write) -> None:
    experiment = Experiment.from_yaml(
        experiment_file(
            "task: scenes\n"
            "search: {learning_rate: {log_uniform: [1e-4, 1e-2]}, candidates: 3, sampler: grid, halving: {rungs: [1]}}\n"
            "adapters:\n"
            "  - {method: none}\n"
            "  - {method: full, search: {learning_rate: {log_uniform: [1e-5, 1e-3]}}}\n"
            "  - {method: lora, rank: 4, learning_rate: [5e-3, 6e-3, 7e-3]}\n"
            "budget: {epochs: 2}\n"
        )
    )
    assert rates(experiment) == [
        ("none", 1e-4), ("none", 1e-3), ("none", 1e-2), ("full fine-tuning", 1e-5), ("full fine-tuning", 1e-4),
        ("full fine-tuning", 1e-3), ("LoRA r=4", 5e-3), ("LoRA r=4", 6e-3), ("LoRA r=4", 7e-3),
    ]  # fmt: skip
    specs = expand(experiment)
    planned = describe(experiment, specs, metrics_of(specs), "").trials
    assert planned[0].search == Search(
        learning_rate=Range(log_uniform=(1e-4, 1e-2)), candidates=3, sampler="grid", seed=0
    )
    assert planned[-1].search is None
    assert {trial.halving for trial in planned} == {Halving(rungs=(1,))}


def test_a_sampler_that_learns_proposes_when_all_seeds_of_a_row_have_ended(experiment_file: Write) -> None:
    text = "task: scenes\nseeds: [0, 1]\nsearch: {learning_rate: {log_uniform: [1e-4, 1e-2]}, candidates: 4, sampler: tpe}\n"
    experiment = Experiment.from_yaml(experiment_file(text + "adapters: [{method: none}, {method: full}]\n"))
    first = expand(experiment)
    assert len(first) == 2 * 2 * 2, "two rates, two seeds, two methods"
    none = [spec for spec in first if spec.adapter.method == "none"]
    planned = {trial.trial_id: trial for trial in describe(experiment, first, metrics_of(first), "").trials}
    scores: dict[str, float | None] = {spec.trial_id: 3.0 + n for n, spec in enumerate(none[:-1])}
    assert expand(experiment, Earlier(planned, scores)) == first, "one seed has not ended"
    scores[none[-1].trial_id] = 5.0
    second = expand(experiment, Earlier(planned, scores))
    assert len(second) == len(first) + 2
    assert [spec for spec in second if spec.adapter.method == "full"] == first[4:], "a row depends on itself alone"
    planned |= {trial.trial_id: trial for trial in describe(experiment, second, metrics_of(first), "").trials}
    del scores[none[0].trial_id]
    assert expand(experiment, Earlier(planned, scores)) == second, "what was proposed stays"


TWO = "task: scenes\nbudget: {epochs: 3}\nadapters:\n  - {method: none, learning_rate: [1e-3, 2e-3]}\n"
RANGE = "task: scenes\nadapters:\n  - {method: none, search: {learning_rate: {log_uniform: [1e-4, 1e-2]}, %s}}\n"
# text, line, key path, and what the message says
WRONG = {
    "unknown sampler": (RANGE % "candidates: 4, sampler: tpee", 3, "adapters[0].search.sampler", "input should be 'grid', 'random', 'qmc', 'tpe' or 'gp'; found 'tpee'"),
    "no candidates": (RANGE % "candidates: 0", 3, "adapters[0].search.candidates", "input should be greater than 0; found 0"),
    "candidates missing": (RANGE % "seed: 1", 3, "adapters[0].search.candidates", "this key is required"),
    "unknown key": (RANGE % "candidate: 4", 3, "adapters[0].search.candidate", "did you mean 'candidates'?"),
    "range reversed": ("task: scenes\nadapters: [{method: none, search: {learning_rate: {log_uniform: [1e-2, 1e-4]}}}]\n", 2, "adapters[0].search.learning_rate", "the lower end comes first, such as [0.0001, 0.01]"),
    "range from zero": ("task: scenes\nadapters: [{method: none, search: {learning_rate: {log_uniform: [0, 1e-4]}}}]\n", 2, "adapters[0].search.learning_rate.log_uniform[0]", "input should be greater than 0"),
    "no range": ("task: scenes\nadapters: [{method: none, search: {learning_rate: {}}}]\n", 2, "adapters[0].search.learning_rate", "give one of log_uniform and uniform"),
    "a number": ("task: scenes\nadapters: [{method: none, search: {learning_rate: 1e-3}}]\n", 2, "adapters[0].search.learning_rate", "found 0.001"),
    "no rate at all": ("task: scenes\nadapters: [{method: none, search: {candidates: 4}}]\n", 2, "adapters[0].search.learning_rate", "this key is required"),
    "rate beside a search": ("task: scenes\nadapters: [{method: none, learning_rate: 1e-3, search: {candidates: 4}}]\n", 2, "adapters[0].search", "the entry has a learning_rate"),
    "values with a sampler": ("task: scenes\nadapters: [{method: none, search: {learning_rate: [1e-3], sampler: tpe}}]\n", 2, "adapters[0].search.sampler", "allowed with a list of 1 values: grid"),
    "a value twice": ("task: scenes\nadapters: [{method: none, search: {learning_rate: [1e-3, 1e-3]}}]\n", 2, "adapters[0].search.learning_rate", "a value is given twice"),
    "too narrow": ("task: scenes\nadapters: [{method: none, search: {learning_rate: {uniform: [1e-3, 1.0001e-3]}, candidates: 9}}]\n", 2, "adapters[0].search.learning_rate", "too narrow for 9 learning rates"),
    "unequal numbers": (TWO + "  - {method: full, search: {learning_rate: [1e-3, 2e-3, 3e-3]}}\n", 5, "adapters[1]", "full fine-tuning is chosen from 3 learning rates, but none (adapters[0]) from 2; a search must be equal for all methods"),
    "unequal numbers with halving": (TWO + "  - {method: full, learning_rate: 1e-3}\nsearch: {halving: {rungs: [1]}}\n", 5, "adapters[1]", "is chosen from 1 learning rate, but none (adapters[0]) from 2"),
    "halving in an entry": (RANGE % "halving: {rungs: [1]}", 3, "adapters[0].search.halving", "halving is the same for all methods; allowed in the section search of the experiment"),
    "rungs beyond the epochs": (TWO + "search: {halving: {rungs: [1, 3]}}\n", 5, "search.halving.rungs", "found 3, but budget.epochs is 3; allowed: epochs before the last one"),
    "rungs not ascending": (TWO + "search: {halving: {rungs: [2, 1]}}\n", 5, "search.halving", "epochs in ascending order"),
    "no rungs": (TWO + "search: {halving: {rungs: []}}\n", 5, "search.halving.rungs", "at least 1 item"),
    "a factor of one": (TWO + "search: {halving: {rungs: [1], reduction_factor: 1}}\n", 5, "search.halving.reduction_factor", "greater than or equal to 2"),
    "halving with a sampler that learns": (RANGE % "candidates: 4, sampler: tpe" + "budget: {epochs: 2}\nsearch: {halving: {rungs: [1]}}\n", 5, "search.halving", "allowed with halving: grid, random, qmc"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_search_is_named_with_its_location(experiment_file: Write, case: str) -> None:
    text, line, key, says = WRONG[case]
    check_refused(experiment_file(text), line, key, says)


def test_rates_tried_before_count(experiment_file: Write) -> None:
    text = (
        TWO + "  - {method: full, learning_rate: 1e-3, tried_learning_rates: [5e-3]}\nsearch: {halving: {rungs: [1]}}\n"
    )
    assert len(expand(Experiment.from_yaml(experiment_file(text)))) == 3
