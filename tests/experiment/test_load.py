# ruff: noqa: E501 - one wrong input per line reads as a table
"""Experiment files: axes expand, and errors name the file, line and key path."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.source import read_value, read_yaml, write_yaml
from harness.experiment.load import Experiment
from harness.experiment.plan import expand
from tests.support.refused import check_refused

pytestmark = pytest.mark.quick

Write = Callable[[str], Path]
RATE = "optimizer: {learning_rate: 1e-3}\n"
ONE = "task: scenes\nadapters: [{method: none}]\n" + RATE


def adapters(entries: str, contexts_of: str = "scenes") -> str:
    """An experiment whose second line is the list of adapters."""
    return f"task: {contexts_of}\nadapters: [{entries}]\n{RATE}"


def groupings(experiment: Experiment) -> list[tuple[str, dict[str, str | None]]]:
    return [(choice.grouping_name, choice.grouping) for choice in experiment.adapters[0]]


def test_lists_are_axes_and_the_first_key_varies_slowest(experiment_file: Write) -> None:
    text = adapters("{method: lora, rank: [4, 8], grouping: [agnostic, specific]}, {method: none}")
    chosen = Experiment.from_yaml(experiment_file(text)).adapters[0]
    assert [(c.label, c.grouping_name) for c in chosen] == [
        ("LoRA r=4", "agnostic"), ("LoRA r=4", "specific"), ("LoRA r=8", "agnostic"), ("LoRA r=8", "specific"),
        ("none", ""),
    ]  # fmt: skip


def test_a_list_of_roles_is_one_place_and_a_list_of_places_is_an_axis(experiment_file: Write) -> None:
    text = adapters("{method: lora, where: [q, v]}, {method: lora, where: [A, F]}, {method: ia3, where: [[k], [v]]}")
    chosen = Experiment.from_yaml(experiment_file(text)).adapters[0]
    assert [c.label for c in chosen] == ["LoRA r=8 q,v", "LoRA r=8 A", "LoRA r=8 F", "IA3 k", "IA3 v"]


def test_the_rates_tried_before_are_one_value_of_all_variants(experiment_file: Write) -> None:
    text = adapters("{method: [none, full], learning_rate: [1e-3, 2e-3], tried_learning_rates: [6e-3, 1.2e-2]}")
    chosen = Experiment.from_yaml(experiment_file(text)).adapters[0]
    assert [c.learning_rate for c in chosen] == [1e-3, 2e-3] * 2
    assert {c.tried_learning_rates for c in chosen} == {(6e-3, 1.2e-2)}


def test_every_section_has_axes(experiment_file: Write) -> None:
    experiment = Experiment.from_yaml(
        experiment_file(
            "task: {name: scenes, data_seed: [0, 1]}\n"
            "backbone: {encoders: {image: [builtin/tiny-vision, ./swin]}, projector_dropout: [0.0, 0.1]}\n"
            "adapters: [{method: [none, full]}]\n"
            "budget: {examples: [128, all], epochs: [1, 2]}\n"
            "optimizer: {learning_rate: [1e-3, 1e-4]}\n"
            "seeds: [3, 1]\n"
        )
    )
    assert [task.config["data_seed"] for task in experiment.tasks] == [0, 1]
    assert [(b.encoders["image"], b.projector_dropout) for b in experiment.backbones] == [
        ("builtin/tiny-vision", 0.0), ("builtin/tiny-vision", 0.1), ("./swin", 0.0), ("./swin", 0.1),
    ]  # fmt: skip
    assert [[choice.method for choice in choices] for choices in experiment.adapters] == [["none", "full"]] * 2
    assert [(b.examples, b.epochs) for b in experiment.budgets] == [(128, 1), (128, 2), ("all", 1), ("all", 2)]
    assert [optimizer.learning_rate for optimizer in experiment.optimizers] == [1e-3, 1e-4]
    assert experiment.seeds == (3, 1)


def test_a_mapping_under_grouping_is_one_grouping(experiment_file: Write) -> None:
    experiment = Experiment.from_yaml(
        experiment_file(adapters("{method: lora, grouping: {image: vision, text: null}}"))
    )
    assert groupings(experiment) == [("image=vision text=-", {"image": "vision", "text": None})]


def test_a_list_of_groupings_may_mix_names_and_mappings(experiment_file: Write) -> None:
    text = adapters("{method: lora, grouping: [specific, {image: a, text: a}]}")
    assert groupings(Experiment.from_yaml(experiment_file(text))) == [
        ("specific", {"image": "image", "text": "text"}),
        ("image=a text=a", {"image": "a", "text": "a"}),
    ]


def test_agnostic_is_the_default_and_methods_without_groups_have_none(experiment_file: Write) -> None:
    experiment = Experiment.from_yaml(experiment_file(adapters("{method: ia3}, {method: full}")))
    assert groupings(experiment) == [
        ("agnostic", {"image": "all", "text": "all"}),
        ("", {"image": None, "text": None}),
    ]


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", "0.001", ".1e-2", "+1e-3"])
def test_numbers_with_an_exponent_are_numbers(experiment_file: Write, written: str) -> None:
    text = f"task: scenes\nadapters: [{{method: none}}]\noptimizer: {{learning_rate: {written}}}\n"
    assert Experiment.from_yaml(experiment_file(text)).optimizers[0].learning_rate == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("010", 10), ("-7", -7), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("08", 8), ("1:30", "1:30"), ("190:20:30", "190:20:30"),
        ("0b11", "0b11"), ("1_000", "1_000"), ("1.", 1.0), (".5", 0.5), ("1e3", 1000.0), ("0.1_5", "0.1_5"), ("-.inf", float("-inf")),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("y", "y"), ("true", True), ("False", False), ("tRue", "tRue"),
        ("null", None), ("~", None), ("", None), ("2020-01-01", "2020-01-01"), ("2001-12-14 21:59:43.10", "2001-12-14 21:59:43.10"),
        ("=", "="), ("'010'", "010"), ('"true"', "true"), ("1e", "1e"), (".", "."), ("e3", "e3"), ("!!str 010", "010"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema_of_yaml_1_2(experiment_file: Write, written: str, value: Any) -> None:
    for text in (f"key: {written}\n", f"- {written}\n"):
        (found,) = content.values() if isinstance(content := read_yaml(experiment_file(text))[0], dict) else content
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_lines_are_broken_as_in_yaml_1_2(experiment_file: Write, character: str) -> None:
    """In YAML 1.1 these characters break lines: the rest of a comment would be a key, the one of a text too."""
    text = (
        f"a: x{character}y\nb: 'x{character} y'\nc: 1 # see{character}d: 2\n{character}e: |\n"
        f"  x{character}y\nf: \ue000{character}\ng: [z]\n"
    )
    content, top = read_yaml(experiment_file(text))
    assert content == {
        "a": f"x{character}y", "b": f"x{character} y", "c": 1, f"{character}e": f"x{character}y\n",
        "f": f"\ue000{character}", "g": ["z"],
    }  # fmt: skip
    assert str(top / "g") == f"{top.origin}, line 7, g"
    assert read_value(write_yaml(content)) == content
    with pytest.raises(UserError, match="mapping values are not allowed here"):
        read_yaml(experiment_file(f"a: x{character}b: 2\n"))


@pytest.mark.parametrize(
    ("first", "second"), [("1", "0x1"), ("1", "1.0"), ("true", "True"), ("null", "~"), ("1", "true"), ("010", "0o12")]
)
def test_keys_that_are_one_key_once_read_are_duplicates(experiment_file: Write, first: str, second: str) -> None:
    text = f"{{{first}: x, {second}: y}}"
    message = rf"key\.{second}: duplicate key: it is that of '{first}'"
    with pytest.raises(UserError, match=message):
        read_yaml(experiment_file(f"key: {text}\n"))
    with pytest.raises(UserError, match=message):
        read_value(f"{{key: {text}}}")


def test_a_merged_key_may_be_given_again(experiment_file: Write) -> None:
    content, _ = read_yaml(experiment_file("base: &base {1: x, a: 1}\nkey: {<<: *base, 0x1: y}\n"))
    assert content["key"] == {1: "y", "a": 1}


def test_a_value_of_the_command_line_has_each_key_once() -> None:
    with pytest.raises(UserError, match="the value, line 1, a: duplicate key"):
        read_value("{a: 1, a: 2}")


@pytest.mark.parametrize(
    "written", ["!!timestamp 2020-01-01", "!!timestamp x", "!!set {a}", "!!binary YQ==", "!!omap [a: 1]"]
)
def test_types_that_are_not_in_the_core_schema_are_refused(experiment_file: Write, written: str) -> None:
    with pytest.raises(UserError, match=r"(?s)not valid YAML: could not determine a constructor for the tag"):
        read_yaml(experiment_file(f"key: {written}\n"))
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor"):
        read_value(written)


@pytest.mark.parametrize(
    "value",
    [
        10,
        "010",
        "1:30",
        "yes",
        "0o17",
        "1e-3",
        1e-05,
        1e22,
        "1_0",
        "2020-01-01",
        True,
        "true",
        None,
        "null",
        "=",
        float("inf"),
        "<<",
        "",
        "~",
        "é ☃",
    ],
)
def test_what_is_written_is_read_again_with_its_type(experiment_file: Write, value: Any) -> None:
    (found,) = read_yaml(experiment_file(write_yaml({"key": [value]})))[0]["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", ["010", "1:30", "off", "1e-3", "true", "/a/b", "0x10", "null", "-5"])
def test_an_environment_value_is_read_as_if_it_were_written_there(
    experiment_file: Write, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("VALUE", value)
    monkeypatch.delenv("UNSET", raising=False)
    text = f"a: ${{VALUE}}\nb: {{c: '${{VALUE}}', d: [\"${{UNSET:-{value}}}\"]}}\ne: {value}\nf: |-\n  ${{VALUE}}\ng: ' ${{VALUE}}'\n"
    content = read_yaml(experiment_file(text))[0]
    expected = content["e"]
    for found in (content["a"], content["b"]["c"], content["b"]["d"][0]):
        assert (found, type(found)) == (expected, type(expected))
    assert (content["f"], content["g"]) == (value, f" {value}")  # blocks, and text around it, stay text


def test_environment_numbers_reach_options_of_every_type(
    experiment_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number for a number; for a text option (a name, a folder) the text as it is in the environment."""
    for name, value in {"N": "64", "LR": "1e-3", "JOB": "0123", "YEAR": "2017"}.items():
        monkeypatch.setenv(name, value)
    text = (
        "name: ${JOB}\ntask: {name: speech, root: '${YEAR}', train: ['${YEAR}']}\n"
        "adapters:\n  - {method: lora, rank: ['${N}', 8], learning_rate: '${LR}'}\nbudget:\n  examples: ${N}\nseeds: ['${N}']\n"
    )
    experiment = Experiment.from_yaml(experiment_file(text))
    assert experiment.name == "0123"
    assert experiment.tasks[0].config["root"] == "2017"
    assert experiment.tasks[0].config["train"] == ["2017"]
    assert [choice.config["rank"] for choice in experiment.adapters[0]] == [64, 8]
    assert experiment.adapters[0][0].learning_rate == 1e-3
    assert (experiment.budgets[0].examples, experiment.seeds) == (64, (64,))


def test_an_environment_value_out_of_range_is_named_as_the_number_it_is(
    experiment_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("N", "-3")
    path = experiment_file(ONE + "name: ${N}\nbudget: {examples: '${N}'}\n")
    with pytest.raises(UserError, match=r"line 4, name: string should match pattern.*found '-3'"):
        Experiment.from_yaml(path)
    path = experiment_file(ONE + "budget: {examples: '${N}'}\n")
    with pytest.raises(UserError, match=r"line 4, budget\.examples: .*greater than 0.*found -3"):
        Experiment.from_yaml(path)


def test_the_name_is_the_file_name_unless_given(experiment_file: Write) -> None:
    assert Experiment.from_yaml(experiment_file(ONE)).name == "experiment"
    assert Experiment.from_yaml(experiment_file(ONE + "name: grid.v2\n")).name == "grid.v2"


@pytest.mark.parametrize(
    ("variable", "expected"), [("/data/set", "/data/set"), (None, "here"), ("", "here")], ids=["set", "unset", "empty"]
)
def test_environment_variables_and_their_defaults(
    experiment_file: Write, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: str
) -> None:
    if variable is None:
        monkeypatch.delenv("SOME_ROOT", raising=False)
    else:
        monkeypatch.setenv("SOME_ROOT", variable)
    text = "task: {name: coco_captions, root: '${SOME_ROOT:-here}/mini'}\nadapters: [{method: none}]\n" + RATE
    assert Experiment.from_yaml(experiment_file(text)).tasks[0].config["root"] == f"{expected}/mini"


def test_an_unset_variable_is_named(experiment_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_ROOT", raising=False)
    path = experiment_file("task:\n  name: coco_captions\n  root: ${SOME_ROOT}\nadapters: [{method: none}]\n")
    message = f"{path}, line 3, task.root: environment variable SOME_ROOT is not set"
    with pytest.raises(UserError, match=re.escape(message)):
        Experiment.from_yaml(path)


# For each: the file, the line and key path the message must name, and what else it must say.
METHODS_LINE = "bitfit, bottleneck, dora, full, ia3, llava, ln_tuning, lora, mmca, moka, none, peft, soft_prompt, vera"
TASKS_LINE = "audio_captions, coco_captions, mixture, scenes, speech, text, trends, vqa"
WRONG = {
    "unknown key at top level": (ONE + "budgte: {examples: 3}\n", 4, "budgte", "unknown key 'budgte'; allowed: adapters, backbone, budget, eval, name, optimizer, plugins, resources, search, seeds, task, tracking; did you mean 'budget'?"),
    "unknown key in a section": (ONE + "budget:\n  epochs: 1\n  exampels: 3\n", 6, "budget.exampels", "unknown key 'exampels'; allowed: epochs, examples, gpu_hours, max_input_length, max_target_length, patience, references; did you mean 'examples'?"),
    "unknown key in an adapter": ("task: scenes\nadapters:\n  - {method: none}\n  - method: lora\n    rnak: 4\n" + RATE, 5, "adapters[1].rnak", "unknown key 'rnak'; allowed: alpha, dropout, grouping, groups, init_from, init_lora_weights, learning_rate, method, rank, search, tried_learning_rates, use_rslora, where; did you mean 'rank'?"),
    "unknown key in the task": ("task:\n  name: scenes\n  data_sed: 1\nadapters: [{method: none}]\n", 3, "task.data_sed", "unknown key 'data_sed'; allowed: data_seed, test_examples, train_examples, validation_examples; did you mean 'data_seed'?"),
    "option of another method": (adapters("{method: bitfit, rank: 4}"), 2, "adapters[0].rank", "unknown key 'rank'; allowed: grouping, groups, init_from, learning_rate, method, search, tried_learning_rates, where"),
    "key given twice": (ONE + "seeds: [0]\nseeds: [1]\n", 5, "seeds", "duplicate key"),
    "key given twice in an adapter": (adapters("{method: lora, rank: 4, rank: 8}"), 2, "adapters[0].rank", "duplicate key"),
    "unknown adapter": (adapters("{method: none}, {method: lroa}"), 2, "adapters[1].method", "unknown adapter 'lroa'; allowed: " + METHODS_LINE + "; did you mean 'lora'?"),
    "unknown task": ("task: scens\nadapters: [{method: none}]\n", 1, "task", "unknown task 'scens'; allowed: " + TASKS_LINE + "; did you mean 'scenes'?"),
    "unknown task by name": ("adapters: [{method: none}]\ntask:\n  name: cocoa_captions\n", 3, "task.name", "unknown task 'cocoa_captions'; allowed: " + TASKS_LINE + "; did you mean 'coco_captions'?"),
    "no task": ("adapters: [{method: none}]\n", 1, "task", "this key is required"),
    "no task name": ("task: {data_seed: 0}\nadapters: [{method: none}]\n", 1, "task", "'name' is required; allowed: " + TASKS_LINE),
    "no method": (adapters("{rank: 4}"), 2, "adapters[0]", "'method' is required; allowed: " + METHODS_LINE),
    "missing task option": ("task: coco_captions\nadapters: [{method: none}]\n", 1, "task", "exactly one of root (a folder) and dataset (a hub id or shards) is needed"),
    "wrong type": (ONE + "budget: {examples: many}\n", 4, "budget.examples", "input should be a valid integer or input should be 'all'; found 'many'"),
    "a fraction for an integer": (ONE + "budget: {epochs: 1.5}\n", 4, "budget.epochs", "input should be a valid integer; found 1.5"),
    "true for an integer": (ONE + "budget: {epochs: true}\n", 4, "budget.epochs", "valid integer; found True"),
    "text for a number": (adapters("{method: none, learning_rate: fast}"), 2, "adapters[0].learning_rate", "input should be a valid number; found 'fast'"),
    "a word that is not offered": (ONE + "resources: {zero_stage: 4}\n", 4, "resources.zero_stage", "input should be 0, 1, 2 or 3; found 4"),
    "an old key": (ONE + "resources: {cpus_per_trial: 4}\n", 4, "resources.cpus_per_trial", "unknown key 'cpus_per_trial'; allowed: attn_implementation, checkpoint_interval_s, chunked_loss, cpus_per_worker, feature_cache, feature_cache_gib, fused_step, gpus_per_worker, grace_s, gradient_checkpointing, max_concurrent_trials, max_failures, offload, pack, profile, shared_prefix, torch_compile, trial_timeout_s, workers, zero_stage; did you mean 'cpus_per_worker'?"),
    "two workers on a GPU": (ONE + "resources: {workers: 2, gpus_per_worker: 0.5}\n", 4, "resources.gpus_per_worker", "two workers of a trial cannot share a GPU, because NCCL refuses it; allowed: auto, 0 or 1, or a part of a GPU with workers: 1; found 0.5"),
    "one and a half GPUs": (ONE + "resources: {gpus_per_worker: 1.5}\n", 4, "resources.gpus_per_worker", "above 1 it must be a whole number; found 1.5"),
    "offload without a stage": (ONE + "resources: {offload: optimizer}\n", 4, "resources.offload", "with zero_stage 0 DeepSpeed offloads no optimizer; allowed: zero_stage 1 or 2 or 3; found 'optimizer'"),
    "offload of parameters": (ONE + "resources:\n  zero_stage: 2\n  offload: parameters\n", 6, "resources.offload", "with zero_stage 2 DeepSpeed offloads no parameters; allowed: zero_stage 3; found 'parameters'"),
    "a compiled pack": (ONE + "resources: {torch_compile: true, pack: 4}\n", 4, "resources.torch_compile", "found beside pack: 4; trials that take their steps together are not compiled; allowed: auto, off or 1"),
    "compiled workers": (ONE + "resources: {torch_compile: true, workers: 2}\n", 4, "resources.torch_compile", "found beside workers: 2, which exchange layer by layer; allowed: workers: 1; found True"),
    "compiled and partitioned": (ONE + "resources: {torch_compile: true, zero_stage: 3}\n", 4, "resources.torch_compile", "found beside zero_stage: 3, with which it was never compared; allowed: zero_stage: 0; found True"),
    "a section that is a number": (ONE + "budget: 3\n", 4, "budget", "input should be a mapping (key: value), such as {examples: 3}; found 3"),
    "a section that is a list": (ONE + "eval: [3]\n", 4, "eval", "input should be a mapping (key: value), such as {test_examples: 1000}; found [3]; only task, backbone"),
    "a section that is a word": (ONE + "backbone: builtin/tiny-opt\n", 4, "backbone", "input should be a mapping (key: value), such as {language_model: builtin/tiny-opt}; found 'builtin/tiny-opt'"),
    "seeds that are a number": (ONE + "seeds: 2\n", 4, "seeds", "input should be a list, such as [2] or [0, 1]; found 2"),
    "one seed": (ONE + "seeds: 1\n", 4, "seeds", "input should be a list, such as [1] or [0]; found 1"),
    "seeds that are many": (ONE + "seeds: 77\n", 4, "seeds", "input should be a list, such as [77] or [0, 1]; found 77"),
    "seeds that are a word": (ONE + "seeds: two\n", 4, "seeds", "input should be a list, such as [0, 1]; found 'two'"),
    "seeds that are nothing": (ONE + "seeds:\n", 4, "seeds", "input should be a list, such as [0, 1]; found null"),
    "metrics that are a word": (ONE + "eval: {metrics: bleu}\n", 4, "eval.metrics", "input should be a list, such as [bleu]; found 'bleu'"),
    "metrics that are a mapping": (ONE + "eval: {metrics: {bleu: 4}}\n", 4, "eval.metrics", "input should be a list, such as [bleu]; found {'bleu': 4}"),
    "encoders that are a word": (ONE + "backbone: {encoders: builtin/tiny-vit}\n", 4, "backbone.encoders", "input should be a mapping (key: value), such as {image: builtin/tiny-vit}; found 'builtin/tiny-vit'"),
    "adapters that are a mapping": ("task: scenes\nadapters: {method: none}\n", 2, "adapters", "input should be a list, such as [{method: none}]; found {'method': 'none'}"),
    "adapters that are a word": ("task: scenes\nadapters: none\n", 2, "adapters", "input should be a list, such as [{method: none}]; found 'none'"),
    "a task that is a number": ("task: 3\nadapters: [{method: none}]\n", 1, "task", "input should be a valid string or input should be a mapping (key: value), such as {name: scenes}; found 3"),
    "an adapter that is a word": (adapters("lora"), 2, "adapters[0]", "input should be a mapping (key: value), such as {method: lora}; found 'lora'"),
    "no adapters": (adapters(""), 2, "adapters", "at least 1 item"),
    "wrong value within an axis": (adapters("{method: lora, rank: [4, four]}"), 2, "adapters[0].rank", "valid integer; found 'four'"),
    "a list where no axis is": (ONE + "eval: {max_new_tokens: [1, 2]}\n", 4, "eval.max_new_tokens", "valid integer"),
    "empty axis": (ONE + "budget: {examples: []}\n", 4, "budget.examples", "empty axis; give at least one value"),
    "empty axis in an adapter": (adapters("{method: lora, rank: []}"), 2, "adapters[0].rank", "empty axis"),
    "repeated value": (adapters("{method: lora, rank: [4, 8, 4]}"), 2, "adapters[0].rank", "a value is given twice: [4, 8, 4]"),
    "seeds repeated": (ONE + "seeds: [0, 1, 0]\n", 4, "seeds", "a seed is given twice: [0, 1, 0]"),
    "no seed": (ONE + "seeds: []\n", 4, "seeds", "at least 1 item"),
    "negative seed": (ONE + "seeds: [0, -1]\n", 4, "seeds[1]", "greater than or equal to 0; found -1"),
    "seed beyond the generators": (ONE + "seeds: [99999999999999999999999]\n", 4, "seeds[0]", "found 9999"),
    "rank 0": (adapters("{method: lora, rank: 0}"), 2, "adapters[0].rank", "input should be greater than 0; found 0"),
    "no examples": (ONE + "budget: {examples: 0}\n", 4, "budget.examples", "input should be greater than 0"),
    "learning rate 0": (adapters("{method: none, learning_rate: 0}"), 2, "adapters[0].learning_rate", "greater than 0; found 0"),
    "learning rate nan": (adapters("{method: none, learning_rate: .nan}"), 2, "adapters[0].learning_rate", "found nan"),
    # JSON has no infinity: it would reach the worker as null.
    "learning rate inf": (adapters("{method: none, learning_rate: .inf}"), 2, "adapters[0].learning_rate", "found inf"),
    "tried rates that are no list": (adapters("{method: none, tried_learning_rates: 1e-3}"), 2, "adapters[0].tried_learning_rates", "input should be a list, such as [0.001]; found 0.001"),
    "a tried rate of 0": (adapters("{method: none, tried_learning_rates: [1e-3, 0]}"), 2, "adapters[0].tried_learning_rates[1]", "greater than 0; found 0"),
    "a tried rate that is a list": (adapters("{method: none, tried_learning_rates: [[1e-3]]}"), 2, "adapters[0].tried_learning_rates[0]", "input should be a valid number; found [0.001]"),
    "a tried rate that is a word": (adapters("{method: none, tried_learning_rates: [low]}"), 2, "adapters[0].tried_learning_rates[0]", "input should be a valid number; found 'low'"),
    "a key nearly of tried rates": (adapters("{method: none, tried_learning_rate: [1e-3]}"), 2, "adapters[0].tried_learning_rate", "unknown key 'tried_learning_rate'; allowed: grouping, groups, init_from, learning_rate, method, search, tried_learning_rates; did you mean 'tried_learning_rates'?"),
    "alpha inf": (adapters("{method: lora, alpha: .inf}"), 2, "adapters[0].alpha", "found inf"),
    "missing learning rate": ("task: scenes\nadapters: [{method: none, learning_rate: 1e-3}, {method: lora}, {method: full}]\n", 1, "optimizer.learning_rate", "no learning rate for LoRA r=8, full fine-tuning; set optimizer.learning_rate, or learning_rate in the adapter"),
    "unknown grouping": (adapters("{method: lora, grouping: specfic}"), 2, "adapters[0].grouping", "found 'specfic'; allowed: agnostic, shared+specific, specific; did you mean 'specific'?"),
    "unknown context": (adapters("{method: lora, grouping: {imag: a, text: b}}"), 2, "adapters[0].grouping", "unknown context 'imag'; allowed: image, text; did you mean 'image'?"),
    "context left out": (adapters("{method: lora, grouping: {image: a}}"), 2, "adapters[0].grouping", "context 'text' is missing"),
    "group that is no name": (adapters("{method: lora, grouping: {image: a-b, text: b}}"), 2, "adapters[0].grouping", "group of context 'image' must be a name (letters, digits, _) or null; found 'a-b'"),
    "empty grouping": (adapters("{method: lora, grouping: {}}"), 2, "adapters[0].grouping", "context 'image' is missing"),
    "grouping false": (adapters("{method: lora, grouping: false}"), 2, "adapters[0].grouping", "found False"),
    "grouping without groups": (adapters("{method: none, grouping: specific}"), 2, "adapters[0].grouping", "none has no adapter groups; leave 'grouping' out"),
    "name with a slash": (ONE + "name: a/b\n", 4, "name", "string should match pattern"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_is_named_with_its_location(experiment_file: Write, case: str) -> None:
    text, line, key, says = WRONG[case]
    check_refused(experiment_file(text), line, key, says)


@pytest.mark.parametrize(
    "text",
    [
        "task: [scenes\n",
        "\ttask: scenes\n",
        "task: scenes\n---\ntask: scenes\n",
        "task: !python/name:os.system scenes\n",
        "? [a, b]\n: 3\n",
        ONE + "name: !!int many\n",
        ONE + "name: !!bool many\n",
        "task: &task [*task]\n",
    ],
    ids=[
        "open bracket",
        "tab",
        "two documents",
        "a tag",
        "a list as key",
        "no integer",
        "no boolean",
        "contains itself",
    ],
)
def test_what_is_not_plain_yaml_is_refused(experiment_file: Write, text: str) -> None:
    path = experiment_file(text)
    with pytest.raises(UserError, match=re.escape(str(path))):
        Experiment.from_yaml(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- task: scenes\n", "scenes\n"])
def test_an_experiment_is_a_mapping(experiment_file: Write, text: str) -> None:
    with pytest.raises(UserError, match="not a mapping; allowed keys: name, task, adapters"):
        Experiment.from_yaml(experiment_file(text))


def test_a_missing_file_lists_other_experiments_in_the_folder(experiment_file: Write) -> None:
    path = experiment_file(ONE)
    with pytest.raises(UserError, match=f"no such file; this folder has: {re.escape(str(path))}"):
        Experiment.from_yaml(path.with_name("experimnet.yaml"))


def test_a_folder_or_a_picture_is_no_experiment(tmp_path: Path) -> None:
    picture = tmp_path / "picture.yaml"
    picture.write_bytes(b"\x89PNG\xff\xfe")
    for path in (tmp_path, picture):
        with pytest.raises(UserError, match=re.escape(f"{path}: cannot be read")):
            Experiment.from_yaml(path)


def test_keys_from_a_yaml_merge_are_accepted(experiment_file: Write) -> None:
    text = "task: scenes\nadapters:\n  - &base {method: lora, rank: 4}\n  - {<<: *base, rank: 8}\n" + RATE
    assert [c.config["rank"] for c in Experiment.from_yaml(experiment_file(text)).adapters[0]] == [4, 8]


def test_a_context_of_the_paper_setting_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCO_ROOT", raising=False)
    coco = Experiment.from_yaml(Path(__file__).parents[2] / "experiments" / "coco.yaml")
    assert len(coco.adapters[0]) * len(coco.seeds) == 36
    assert coco.budgets[0].examples == "all"


def test_a_list_that_an_option_takes_is_one_value_and_a_list_of_lists_an_axis(experiment_file: Write) -> None:
    def scales(text: str) -> list[object]:
        tasks = Experiment.from_yaml(experiment_file(text)).tasks
        return [
            (task.config["augmentation"]["crop_scale"], task.config["augmentation"]["brightness"]) for task in tasks
        ]

    head = "adapters: [{method: none}]\noptimizer: {learning_rate: 1}\ntask:\n  name: coco_captions\n  root: /x\n"
    one = "  augmentation: {crop_scale: [0.5, 1.0], brightness: [0.1, 0.2]}\n"
    assert scales(head + one) == [([0.5, 1.0], 0.1), ([0.5, 1.0], 0.2)]
    several = "  augmentation: {crop_scale: [[0.5, 1.0], [0.8, 1.0]]}\n"
    assert scales(head + several) == [([0.5, 1.0], 0.0), ([0.8, 1.0], 0.0)]
    text = "adapters: [{method: none}]\noptimizer: {learning_rate: 1}\ntask: {name: speech, root: /x, train: [a, b]}\n"
    assert [task.config["train"] for task in Experiment.from_yaml(experiment_file(text)).tasks] == [["a", "b"]]


# ── From Python: the same names and the same checks


def test_sections_from_python_are_the_same_experiment(experiment_file: Write) -> None:
    sections: dict[str, Any] = {
        "name": "grid",
        "task": {"name": "scenes", "data_seed": 3},
        "adapters": (
            {"method": "none", "learning_rate": 1e-2},
            {"method": "lora", "rank": [4, 8], "grouping": ["agnostic", {"image": "a", "text": None}]},
        ),
        "budget": {"examples": [64, 128]},
        "optimizer": {"learning_rate": 1e-3},
        "seeds": range(2),
    }
    built = Experiment(**sections)
    read = Experiment.from_yaml(experiment_file(built.text))
    assert [s.trial_id for s in expand(built)] == [s.trial_id for s in expand(read)]
    assert (built.name, built.file) == ("grid", None)
    assert Experiment(task="scenes", adapters=[{"method": "none", "learning_rate": 1}]).name == "experiment"


PYTHON_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown section": ({"budgte": {}}, "budgte: unknown key 'budgte'; allowed: .*did you mean 'budget'"),
    "an unknown option": ({"adapters": [{"method": "lora", "rnak": 4}]}, r"adapters\[0\]\.rnak: unknown key 'rnak'"),
    "text for a number": ({"budget": {"epochs": "4"}}, r"budget\.epochs: input should be a valid integer; found '4'"),
    "an object": ({"budget": {"epochs": object()}}, "numbers, strings, lists and mappings; found <object"),
    "no adapters": ({"adapters": []}, "adapters: .*at least 1 item"),
    "an unknown task": ({"task": "scens"}, "task: unknown task 'scens'; allowed: .*did you mean 'scenes'"),
}


@pytest.mark.parametrize("case", PYTHON_WRONG)
def test_wrong_sections_from_python_are_named_with_their_key(case: str) -> None:
    change, message = PYTHON_WRONG[case]
    sections: dict[str, Any] = {"task": "scenes", "adapters": [{"method": "none", "learning_rate": 1}]}
    with pytest.raises(UserError, match=f"^{message}|^experiment: options must be {message}"):
        Experiment(**(sections | change))
