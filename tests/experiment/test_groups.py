# ruff: noqa: E501 - one wrong input per line reads as a table
"""``groups`` of an adapter entry, another method or rank per context, and ``grouping: shared+specific``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.columns import options_of
from harness.core.errors import UserError
from harness.core.record import MetricInfo, Plan
from harness.core.selection import select
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, describe, expand
from harness.experiment.shared import shared_dump
from harness.tracking.log import params_of
from tests.support.refused import check_refused

pytestmark = pytest.mark.quick

Write = Callable[[str], Path]
METRICS = (MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),)
MIXED = "{image: {method: lora, rank: 64}, text: {method: bitfit}}"
EACH = "{image: {method: lora, rank: [4, 8]}, text: {method: lora, rank: [4, 8]}}"


def text_of(*adapters: str, task: str = "scenes", seeds: str = "[0]") -> str:
    entries = "".join(f"  - {adapter}\n" for adapter in adapters)
    return f"task: {task}\nadapters:\n{entries}seeds: {seeds}\noptimizer: {{learning_rate: 1.0e-3}}\n"


@pytest.fixture
def trials(experiment_file: Write) -> Callable[..., list[TrialSpec]]:
    return lambda *adapters, **options: expand(Experiment.from_yaml(experiment_file(text_of(*adapters, **options))))


@pytest.fixture
def plan(experiment_file: Write) -> Callable[..., Plan]:
    def make(*adapters: str) -> Plan:
        experiment = Experiment.from_yaml(experiment_file(text_of(*adapters)))
        return describe(experiment, expand(experiment), METRICS, "")

    return make


Trials = Callable[..., list[TrialSpec]]
MakePlan = Callable[..., Plan]


def named(specs: list[TrialSpec]) -> list[str]:
    return [f"{spec.adapter.label} | {spec.adapter.grouping_name}" for spec in specs]


def test_another_method_per_context(trials: Trials) -> None:
    (spec,) = trials(f"{{groups: {MIXED}, learning_rate: 1.0e-2}}")
    adapter = spec.adapter
    assert named([spec]) == ["LoRA r=64 on image, BitFit on text | specific"]
    assert (adapter.method, adapter.config, spec.optimizer.learning_rate) == ("lora/bitfit", {}, 1e-2)
    assert adapter.grouping == {"image": "image", "text": "text"}
    assert [(name, own.method, own.config.get("rank")) for name, own in adapter.groups.items()] == [
        ("image", "lora", 64), ("text", "bitfit", None),
    ]  # fmt: skip
    assert [plugin.name for plugin in adapter.plugins] == ["lora", "bitfit"]
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec


def test_lists_are_axes_inside_of_groups_and_beside_them(trials: Trials) -> None:
    specs = trials(f"{{groups: {EACH}, learning_rate: [1.0e-3, 2.0e-3]}}", seeds="[0, 1]")
    rows = list(dict.fromkeys(named(specs)))
    assert rows == [
        "LoRA r=4 | specific", "LoRA r=4 on image, LoRA r=8 on text | specific",
        "LoRA r=8 on image, LoRA r=4 on text | specific", "LoRA r=8 | specific",
    ]  # fmt: skip
    assert len(specs) == len({spec.trial_id for spec in specs}) == 4 * 2 * 2
    several = "[{method: bitfit}, {method: [ia3, lora], where: [q, v]}, null]"
    assert named(trials(f"{{groups: {{image: {{method: lora, rank: 2}}, text: {several}}}}}")) == [
        "LoRA r=2 on image, BitFit on text | specific",
        "LoRA r=2 on image, IA3 q,v on text | specific",
        "LoRA r=2 on image, LoRA r=8 q,v on text | specific",
        "LoRA r=2 | image=image text=-",
    ]
    whole = f"{{groups: [{MIXED}, {{image: {{method: ia3}}, text: {{method: bitfit}}}}]}}"
    assert [spec.adapter.method for spec in trials(whole)] == ["lora/bitfit", "ia3/bitfit"]
    search = f"{{groups: {MIXED}, search: {{learning_rate: {{log_uniform: [1.0e-4, 1.0e-2]}}, candidates: 3}}}}"
    assert len({spec.optimizer.learning_rate for spec in trials(search)}) == 3


@pytest.mark.parametrize(
    ("groups", "plain"),
    [
        (
            "{image: {method: lora, rank: 4}, text: {method: lora, rank: 4}}",
            "method: lora, rank: 4, grouping: specific",
        ),
        (
            "{image: null, text: {method: lora+bitfit, rank: 4}}",
            "method: lora+bitfit, rank: 4, grouping: {image: null, text: text}",
        ),
    ],
)
def test_groups_that_do_not_differ_are_the_trial_of_their_grouping(trials: Trials, groups: str, plain: str) -> None:
    (of_groups,), (of_grouping,) = trials(f"{{groups: {groups}}}"), trials(f"{{{plain}}}")
    assert of_groups.adapter == of_grouping.adapter
    assert of_groups.trial_id == of_grouping.trial_id
    with pytest.raises(UserError, match="two entries describe the same trial"):
        trials(f"{{groups: {groups}}}", f"{{{plain}}}")


THREE = "{name: mixture, tasks: [{name: scenes}, {name: trends}]}"  # image, series, text
SEEN = "grouping: {image: seen, series: seen, text: words}"


def test_contexts_may_share_a_group_that_differs_from_others(trials: Trials) -> None:
    specs = trials(f"{{{SEEN}, groups: {{seen: {{method: lora, rank: [4, 8]}}, words: {{method: ia3}}}}}}", task=THREE)
    assert named(specs) == [
        "LoRA r=4 on seen, IA3 on words | image=seen series=seen text=words",
        "LoRA r=8 on seen, IA3 on words | image=seen series=seen text=words",
    ]
    (adapter, _) = (spec.adapter for spec in specs)
    assert adapter.grouping == {"image": "seen", "series": "seen", "text": "words"}
    assert {group: own.method for group, own in adapter.groups.items()} == {"seen": "lora", "words": "ia3"}
    assert adapter.group_names == ("seen", "words")
    assert len({spec.trial_id for spec in specs}) == 2


@pytest.mark.parametrize(
    ("groups", "plain"),
    [
        ("{seen: {method: ia3}, words: {method: ia3}}", f"method: ia3, {SEEN}"),
        ("{seen: {method: ia3}, words: null}", "method: ia3, grouping: {image: seen, series: seen, text: null}"),
    ],
)
def test_shared_groups_that_do_not_differ_are_the_trial_of_their_grouping(
    trials: Trials, groups: str, plain: str
) -> None:
    (of_groups,), (of_grouping,) = (
        trials(f"{{{SEEN}, groups: {groups}}}", task=THREE),
        trials(f"{{{plain}}}", task=THREE),
    )
    assert of_groups.trial_id == of_grouping.trial_id


def test_a_group_of_each_context_is_the_same_with_and_without_a_grouping(trials: Trials) -> None:
    (without,), (written,) = (
        trials(f"{{groups: {MIXED}{more}}}") for more in ("", ", grouping: {image: image, text: text}")
    )
    assert written.adapter == without.adapter


def test_ids_depend_on_what_each_group_has_and_on_nothing_new_elsewhere(trials: Trials) -> None:
    one, again = (
        trials(f"{{groups: {MIXED}}}"),
        trials("{groups: {text: {method: bitfit}, image: {rank: 64, method: lora}}}"),
    )
    assert one[0].trial_id == again[0].trial_id
    different = [
        "{groups: {image: {method: bitfit}, text: {method: lora, rank: 64}}}",
        "{groups: {image: {method: lora, rank: 64, alpha: 8.0}, text: {method: bitfit}}}",
        "{method: lora, rank: 64, grouping: agnostic}", "{method: lora, rank: 64, grouping: specific}",
        "{method: lora, rank: 64, grouping: shared+specific}",
    ]  # fmt: skip
    specs = trials(*different)
    assert len({one[0].trial_id, *(spec.trial_id for spec in specs)}) == 1 + len(different)
    for spec in specs[2:4]:  # as before there were these
        assert not {"groups", "shared_group"} & shared_dump(spec)["adapter"].keys()


def test_a_group_that_all_tokens_share(trials: Trials) -> None:
    (spec,) = trials("{method: lora+bitfit, rank: 2, grouping: shared+specific}")
    assert named([spec]) == ["LoRA r=2 + BitFit | shared+specific"]
    assert spec.adapter.group_names == ("shared", "image", "text")
    assert spec.adapter.grouping == {"image": "image", "text": "text"}
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec


# ── How rows, columns and params are named


def test_rows_that_share_a_label_are_told_apart_by_the_options_of_their_groups(plan: MakePlan) -> None:
    found = plan("{groups: {image: {method: lora, rank: 2, alpha: [2.0, 4.0]}, text: {method: bitfit}}}")
    assert [trial.label for trial in found.trials] == [
        "LoRA r=2 on image, BitFit on text image.alpha=2.0", "LoRA r=2 on image, BitFit on text image.alpha=4.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("only", "labels"),
    [
        ("method=lora/bitfit", ["LoRA r=64 on image, BitFit on text"]),
        ("grouping=shared+specific", ["LoRA r=8"]),
        ("image.rank=64", ["LoRA r=64 on image, BitFit on text"]),
        ("groups.text.method=bitfit", ["LoRA r=64 on image, BitFit on text"]),
        ("shared_group=shared", ["LoRA r=8"]),
        ("rank=4", ["LoRA r=4"]),  # of the whole adapter, though a group has a rank too
        ("grouping=specific", ["LoRA r=4", "LoRA r=64 on image, BitFit on text"]),
    ],
)
def test_trials_are_selected_by_what_a_group_has(plan: MakePlan, only: str, labels: list[str]) -> None:
    found = plan(
        "{method: lora, rank: 4, grouping: specific}", f"{{groups: {MIXED}}}",
        "{method: lora, rank: 8, grouping: shared+specific}",
    )  # fmt: skip
    chosen = select(found, only)
    assert [trial.label for trial in found.trials if trial.trial_id in chosen] == labels


def test_the_columns_of_a_table_and_the_params_of_mlflow(trials: Trials) -> None:
    mixed, stacked = trials(f"{{groups: {MIXED}}}", "{method: lora, rank: 8, grouping: shared+specific}")
    columns, params = (read(mixed.model_dump(mode="json")) for read in (options_of, params_of))
    assert columns["adapter.groups.image.rank"] == 64
    assert columns["adapter.groups.text.method"] == "bitfit"
    assert (params["method"], params["grouping"]) == ("lora/bitfit", "specific")
    assert (params["adapter.groups.image.config.rank"], params["adapter.groups.text.method"]) == ("64", "bitfit")
    assert not [name for name in (*columns, *params) if "plugins" in name]
    assert "rank" not in params
    columns, params = (read(stacked.model_dump(mode="json")) for read in (options_of, params_of))
    assert columns["adapter.shared_group"] == params["adapter.shared_group"] == "shared"
    assert (params["grouping"], params["rank"]) == ("shared+specific", "8")


# ── Wrong input


def groups(text: str, more: str = "") -> str:
    return text_of(f"{{groups: {text}{more}}}")


WRONG: dict[str, tuple[str, str, str]] = {
    "an unknown context": (groups("{imag: {method: lora}, text: {method: bitfit}}"), "groups.imag", "unknown context 'imag'; allowed: image, text; did you mean 'image'?"),
    "a context without an entry": (groups("{image: {method: lora}}"), "groups", "context 'text' is missing; give it a method, or null for no adapter (contexts: image, text)"),
    "no mapping": (groups("lora"), "groups", "found 'lora'; allowed: context → a mapping with 'method', or null"),
    "null for the whole": (groups("null"), "groups", "found None; allowed: context → a mapping"),
    "no axis": (groups("[]"), "groups", "empty axis; give at least one value"),
    "a name alone": (groups("{image: {method: lora}, text: bitfit}"), "groups.text", "found 'bitfit'; allowed: a mapping with 'method', or null for no adapter"),
    "no method": (groups("{image: {rank: 4}, text: {method: bitfit}}"), "groups.image", "'method' is required; allowed: "),
    "an unknown method": (groups("{image: {method: lorra}, text: {method: bitfit}}"), "groups.image.method", "unknown adapter 'lorra'"),
    "an unknown option": (groups("{image: {method: lora, rnk: 4}, text: {method: bitfit}}"), "groups.image.rnk", "did you mean 'rank'?"),
    "an option out of range": (groups("{image: {method: lora, rank: [4, 0]}, text: {method: bitfit}}"), "groups.image.rank", "input should be greater than 0; found 0"),
    "an empty axis": (groups("{image: {method: lora, rank: []}, text: {method: bitfit}}"), "groups.image.rank", "empty axis; give at least one value"),
    "a value twice": (groups("{image: {method: lora, rank: [4, 4]}, text: {method: bitfit}}"), "groups.image.rank", "a value is given twice: [4, 4]"),
    "a learning rate of a group": (groups("{image: {method: lora, learning_rate: 1e-3}, text: {method: bitfit}}"), "groups.image.learning_rate", "one optimizer with one learning rate trains all groups; allowed beside 'groups'"),
    "a search of a group": (groups("{image: {method: lora}, text: {method: bitfit, search: {candidates: 2}}}"), "groups.text.search", "one optimizer with one learning rate trains all groups"),
    "a seed of a group": (groups("{image: {method: lora, seed: 3}, text: {method: bitfit}}"), "groups.image.seed", "a trial has one seed; allowed: seeds, at the top level"),
    "a grouping of a group": (groups("{image: {method: lora, grouping: specific}, text: {method: bitfit}}"), "groups.image.grouping", "a group has no groups of its own"),
    "init_from of a group": (groups("{image: {method: lora, init_from: x}, text: {method: bitfit}}"), "groups.image.init_from", "allowed beside 'groups'"),
    "a grouping by name beside groups": (groups(MIXED, ", grouping: specific"), "grouping", "found 'specific'; allowed beside 'groups': a mapping context → group, or nothing"),
    "several groupings beside groups": (groups(MIXED, ", grouping: [agnostic, {image: a, text: a}]"), "grouping", "found ['agnostic', {'image': 'a', 'text': 'a'}]; allowed beside 'groups': a mapping context → group"),
    "a context without a group": (groups("{a: {method: lora}}", ", grouping: {image: a}"), "grouping", "context 'text' is missing; set it to a group"),
    "a context instead of its group": (groups(MIXED, ", grouping: {image: a, text: b}"), "groups.image", "unknown group 'image'; allowed: a, b"),
    "a group nearly": (groups("{seen: {method: lora}, txt: {method: ia3}}", ", grouping: {image: seen, text: text}"), "groups.txt", "unknown group 'txt'; allowed: seen, text; did you mean 'text'?"),
    "a group without an entry": (groups("{a: {method: lora}}", ", grouping: {image: a, text: b}"), "groups", "group 'b' is missing; give it a method, or null for no adapter (groups of 'grouping': a, b)"),
    "no method of any group": (groups("{a: null}", ", grouping: {image: a, text: null}"), "groups", "no group has a method; to train without adapters, use the method 'none'"),
    "a method beside groups": (groups(MIXED, ", method: lora"), "method", "'groups' gives each group its own method; allowed: one of the two"),
    "an option beside groups": (groups(MIXED, ", rank: 4"), "rank", "unknown key 'rank' beside 'groups'; allowed: grouping, groups, init_from, learning_rate, search, tried_learning_rates; options go into a group"),
    "a method without groups": (groups("{image: {method: full}, text: {method: bitfit}}"), "groups.image.method", "full has no adapter groups, so it is a method alone; null means no adapter"),
    "a method of all tokens": (groups("{image: {method: mmca+lora}, text: {method: lora}}"), "groups.image.method", "mmca has no adapter groups and acts on all tokens, but text does not have it"),
    "no method at all": (groups("{image: null, text: null}"), "groups", "no context has a method; to train without adapters, use the method 'none'"),
    "an unknown grouping": (text_of("{method: lora, grouping: shared+specfic}"), "grouping", "did you mean 'shared+specific'?"),
    "a method that cannot be stacked": (text_of("{method: dora, grouping: shared+specific}"), "grouping", "dora cannot have a shared group beside each token's own: its magnitude is of one direction"),
    "one of two that cannot": (text_of("{method: bitfit+soft_prompt, grouping: shared+specific}"), "grouping", "soft_prompt cannot have a shared group"),
    "stacked without groups": (text_of("{method: full, grouping: shared+specific}"), "grouping", "full has no adapter groups; leave 'grouping' out"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_groups_are_named_with_their_location(case: str, experiment_file: Write) -> None:
    text, key, says = WRONG[case]
    check_refused(experiment_file(text), 3, f"adapters[0].{key}", says)


def test_contexts_are_those_of_the_task(trials: Trials) -> None:
    entry = "{groups: {image: {method: lora}, question: {method: ia3}, answer: {method: ia3}}}"
    with pytest.raises(UserError, match=r"groups.question: unknown context 'question'; allowed: image, text"):
        trials(entry)
    specs = trials(
        entry.replace("question", "series").replace("answer", "text"),
        task="{name: mixture, tasks: [{name: scenes}, {name: trends}]}",
    )
    assert named(specs) == ["LoRA r=8 on image, IA3 on series and text | specific"]


def test_from_python() -> None:
    entry: dict[str, Any] = {"groups": {"image": {"method": "lora", "rank": range(1, 3)}, "text": {"method": "bitfit"}}}
    specs = expand(Experiment(task="scenes", adapters=[entry], optimizer={"learning_rate": 1e-3}))
    assert [spec.adapter.groups["image"].config["rank"] for spec in specs] == [1, 2]
