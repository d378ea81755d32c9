"""Plans: the trials of an experiment, their labels, and ids that depend only on what affects the result."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.record import MetricInfo, Plan
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, describe, expand

pytestmark = pytest.mark.quick

Write = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
METRICS = (
    MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),
    MetricInfo(name="cider", label="CIDEr", higher_is_better=True),
)
BASE = """\
task: {name: scenes, data_seed: 0}
backbone: {language_model: builtin/tiny-llama}
adapters:
  - {method: lora, rank: 4, grouping: specific, learning_rate: 6e-3}
budget: {examples: 128, epochs: 2}
seeds: [0]
optimizer: {per_device_train_batch_size: 32}
eval: {test_examples: 64, primary_metric: perplexity}
"""


@pytest.fixture
def trials(experiment_file: Write) -> Callable[[str], list[TrialSpec]]:
    return lambda text: expand(Experiment.from_yaml(experiment_file(text)))


@pytest.fixture
def plan(experiment_file: Write) -> Callable[[str], Plan]:
    def make(text: str) -> Plan:
        experiment = Experiment.from_yaml(experiment_file(text))
        return describe(experiment, expand(experiment), METRICS, "sqlite:///runs/mlflow.db")

    return make


Trials = Callable[[str], list[TrialSpec]]
MakePlan = Callable[[str], Plan]


def ids(specs: list[TrialSpec]) -> list[str]:
    return [spec.trial_id for spec in specs]


def test_the_quickstart_is_twenty_four_trials() -> None:
    experiment = Experiment.from_yaml(ROOT / "experiments" / "quickstart.yaml")
    specs = expand(experiment)
    planned = describe(experiment, specs, METRICS, "").trials
    names = [f"{trial.label} {trial.grouping}".rstrip() for trial in planned]
    assert names == [
        name
        for name in (
            "none", "IA3 agnostic", "IA3 specific", "BitFit agnostic", "BitFit specific", "LoRA r=4 agnostic",
            "LoRA r=4 specific", "full fine-tuning",
        )
        for _ in experiment.seeds
    ]  # fmt: skip
    assert [trial.seed for trial in planned] == [0, 1, 2] * 8
    assert {trial.setting for trial in planned} == {""}
    assert len({trial.trial_id for trial in planned}) == 24
    assert {spec.budget.examples for spec in specs} == {1024}


def test_seeds_vary_fastest_and_budgets_slower_than_adapters(trials: Trials) -> None:
    text = (
        BASE.replace("examples: 128", "examples: [64, 128]").replace("[0]", "[0, 1]").replace("rank: 4", "rank: [4, 8]")
    )
    assert [(s.budget.examples, s.adapter.label, s.seed) for s in trials(text)] == [
        (examples, label, seed) for examples in (64, 128) for label in ("LoRA r=4", "LoRA r=8") for seed in (0, 1)
    ]


def test_the_learning_rate_of_an_adapter_takes_precedence_over_the_optimizers(trials: Trials) -> None:
    text = BASE.replace("seeds", "  - {method: none}\nseeds").replace("budget: {examples: 128, epochs: 2}\n  -", "  -")
    text = text.replace("optimizer: {", "optimizer: {learning_rate: 1e-4, ")
    assert [(s.adapter.method, s.optimizer.learning_rate) for s in trials(text)] == [("lora", 6e-3), ("none", 1e-4)]


SAME = {
    "sections in another order": """\
seeds: [0]
eval: {primary_metric: perplexity, test_examples: 64}
budget: {epochs: 2, examples: 128}
adapters: [{learning_rate: 0.006, grouping: specific, rank: 4, method: lora}]
optimizer: {per_device_train_batch_size: 32}
task: scenes
""",
    "comments": "# a comment\n" + BASE,
    "resources": BASE + "resources: {cpus_per_worker: 2, zero_stage: 2, max_failures: 3}\n",
    "tracking": BASE + "tracking: {mlflow_uri: 'http://localhost:5000'}\n",
    "name": BASE + "name: other\n",
    "equivalence margin": BASE.replace("{test", "{equivalence_margin: 0.03, test"),
    "primary metric": BASE.replace("primary_metric: perplexity", "primary_metric: cider"),
    "defaults written out": BASE.replace("rank: 4", "rank: 4, dropout: 0.0, where: AF").replace(
        "size: 32", "size: 32, train_sampling_strategy: random"
    ),
    "the grouping written out": BASE.replace("specific", "{text: text, image: image}"),
    "rates that were tried before": BASE.replace("6e-3", "6e-3, tried_learning_rates: [6e-3, 1.2e-2]"),
    "the learning rate in the optimizer": BASE.replace(", learning_rate: 6e-3", "").replace(
        "optimizer: {", "optimizer: {learning_rate: 6e-3, "
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_an_id_does_not_change_when_the_result_does_not(trials: Trials, case: str) -> None:
    assert ids(trials(SAME[case])) == ids(trials(BASE))


OTHER = {
    "seed": ("seeds: [0]", "seeds: [1]"),
    "rank": ("rank: 4", "rank: 8"),
    "dropout": ("rank: 4", "rank: 4, dropout: 0.1"),
    "grouping": ("specific", "agnostic"),
    "method": ("lora, rank: 4", "bitfit"),
    "learning rate": ("6e-3", "5e-3"),
    "examples": ("examples: 128", "examples: 256"),
    "epochs": ("epochs: 2", "epochs: 3"),
    "length": ("epochs: 2", "epochs: 2, max_target_length: 31"),
    "batch": ("size: 32", "size: 16"),
    "schedule": ("size: 32", "size: 32, lr_scheduler_type: cosine"),
    "bf16": ("size: 32", "size: 32, bf16: true"),
    "batches by length": ("size: 32", "size: 32, train_sampling_strategy: group_by_length"),
    "test examples": ("test_examples: 64", "test_examples: 32"),
    "validation examples": ("test_examples: 64", "test_examples: 64, validation_examples: 8"),
    "generated length": ("test_examples: 64", "test_examples: 64, max_new_tokens: 8"),
    "backbone": ("builtin/tiny-llama", "facebook/opt-125m"),
    "projector dropout": ("builtin/tiny-llama", "builtin/tiny-llama, projector_dropout: 0.0"),
    "task option": ("data_seed: 0", "data_seed: 1"),
}


def test_an_id_changes_with_whatever_affects_the_result(trials: Trials) -> None:
    found = {"as it is": ids(trials(BASE))[0]}
    for case, (old, new) in OTHER.items():
        assert old in BASE
        found[case] = ids(trials(BASE.replace(old, new)))[0]
    same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
    assert not same


def test_a_grown_grid_keeps_its_old_ids(trials: Trials) -> None:
    grown = BASE.replace("rank: 4", "rank: [2, 4]").replace("seeds: [0]", "seeds: [1, 0]")
    grown = grown.replace("examples: 128", "examples: [64, 128]")
    old, new = ids(trials(BASE)), ids(trials(grown))
    assert len(set(new)) == len(new) == 8
    assert set(old) < set(new)


def test_a_spec_is_unchanged_after_transfer_to_a_worker(trials: Trials) -> None:
    (spec,) = trials(BASE.replace("specific", "{image: vision, text: null}"))
    again = TrialSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert again.trial_id == spec.trial_id


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ("{method: lora, rank: 4}, {method: none}, {rank: 4, method: lora}", "LoRA r=4 agnostic"),
        (
            "{method: lora, grouping: specific}, {method: lora, grouping: {image: image, text: text}}",
            "LoRA r=8",
        ),
        ("{method: full}, {method: full}", "full fine-tuning"),
        ("{method: none}, {method: none, learning_rate: 1e-3}", "none"),
    ],
    ids=["same options", "grouping written out", "no options", "same learning rate from two places"],
)
def test_the_same_trial_twice_is_an_error(trials: Trials, entries: str, name: str) -> None:
    text = f"task: scenes\nadapters: [{entries}]\noptimizer: {{learning_rate: 1e-3}}\n"
    with pytest.raises(UserError, match=rf"line 2, adapters: two entries describe the same trial: {re.escape(name)}"):
        trials(text)


def labels(plan: Plan) -> list[str]:
    return [trial.label for trial in plan.trials]


def test_labels_contain_the_option_in_which_trials_differ(plan: MakePlan) -> None:
    text = BASE.replace("rank: 4", "rank: 4, dropout: [0.0, 0.1]")
    assert labels(plan(text)) == ["LoRA r=4 dropout=0.0", "LoRA r=4 dropout=0.1"]


SEARCHES = {
    "an axis": BASE.replace("6e-3", "[6e-3, 1e-3]"),
    "two entries": BASE.replace(
        "budget", "  - {method: lora, rank: 4, grouping: specific, learning_rate: 1e-3}\nbudget"
    ),
    "an axis of the optimizer": BASE.replace(", learning_rate: 6e-3", "").replace(
        "optimizer: {", "optimizer: {learning_rate: [6e-3, 1e-3], "
    ),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_trials_that_differ_only_in_learning_rate_are_candidates_of_one_row(plan: MakePlan, case: str) -> None:
    planned = plan(SEARCHES[case]).trials
    assert [(t.label, t.grouping, t.setting) for t in planned] == [("LoRA r=4", "specific", "")] * 2
    assert [t.learning_rate for t in planned] == [0.006, 0.001]
    assert len({t.trial_id for t in planned}) == 2


def test_rates_tried_before_are_in_the_plan_and_in_no_id(plan: MakePlan) -> None:
    text = BASE.replace("rank: 4", "rank: [4, 8]")
    without = plan(text)
    tried = plan(text.replace("6e-3", "6e-3, tried_learning_rates: [6e-3, 1.2e-2]"))
    assert [t.trial_id for t in tried.trials] == [t.trial_id for t in without.trials]
    assert [t.tried_learning_rates for t in tried.trials] == [(0.006, 0.012)] * 2
    assert [t.tried_learning_rates for t in without.trials] == [()] * 2
    assert [t.model_copy(update={"tried_learning_rates": ()}) for t in tried.trials] == list(without.trials)


def test_labels_add_nothing_where_rank_or_grouping_suffices(plan: MakePlan) -> None:
    text = BASE.replace("rank: 4, grouping: specific", "rank: [4, 8], grouping: [agnostic, specific], alpha: 8.0")
    assert labels(plan(text)) == ["LoRA r=4", "LoRA r=4", "LoRA r=8", "LoRA r=8"]


def test_the_places_of_a_model_s_parts_are_one_value(plan: MakePlan) -> None:
    text = BASE.replace("rank: 4, grouping: specific", "rank: 4, where: {language: AF, vision: [q, v]}")
    assert labels(plan(text)) == ["LoRA r=4 language AF, vision q,v"]


def test_no_two_rows_of_the_leaderboard_have_one_name(plan: MakePlan) -> None:
    text = BASE.replace(
        "rank: 4, grouping: specific, learning_rate: 6e-3",
        "where: [A, AF], grouping: [agnostic, specific], learning_rate: [6e-3, 1e-3], dropout: [0.0, 0.1]",
    ).replace("examples: 128", "examples: [64, 128]")
    planned = plan(text).trials
    assert len(planned) == 32
    assert len({(t.label, t.grouping, t.setting, t.seed, t.learning_rate) for t in planned}) == 32
    assert len({(t.label, t.grouping, t.setting) for t in planned}) == 16


def settings(plan: Plan) -> list[str]:
    return [trial.setting for trial in plan.trials]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("examples: 128", "examples: [64, 128]", ["examples=64", "examples=128"]),
        ("epochs: 2", "epochs: [1, 2]", ["epochs=1", "epochs=2"]),
        ("size: 32", "size: [16, 32]", ["per_device_train_batch_size=16", "per_device_train_batch_size=32"]),
        ("data_seed: 0", "data_seed: [0, 1]", ["data_seed=0", "data_seed=1"]),
        ("rank: 4", "rank: [4, 8]", ["", ""]),
        ("seeds: [0]", "seeds: [0, 1]", ["", ""]),
    ],
)
def test_settings_name_what_varies_besides_adapter_and_seed(
    plan: MakePlan, old: str, new: str, expected: list[str]
) -> None:
    assert settings(plan(BASE.replace(old, new))) == expected


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("tiny-llama}", "tiny-llama, quantization: [null, nf4]}", "quantization=nf4"),
        ("tiny-llama}", "tiny-llama, dtype: [null, bf16]}", "dtype=bf16"),
        ("tiny-llama}", "tiny-llama, chat_template: [false, true]}", "chat_template=True"),
        ("epochs: 2}", "epochs: 2, patience: [null, 1]}", "patience=1"),
        (
            "size: 32",
            "size: 32, train_sampling_strategy: [random, group_by_length]",
            "train_sampling_strategy=group_by_length",
        ),
    ],
)
def test_a_key_that_is_left_out_where_it_is_unset_tells_rows_apart(
    plan: MakePlan, old: str, new: str, name: str
) -> None:
    assert settings(plan(BASE.replace(old, new))) == ["", name]


def test_settings_join_what_varies_and_leave_the_learning_rate_out(plan: MakePlan) -> None:
    text = BASE.replace(", learning_rate: 6e-3", "").replace(
        "optimizer: {", "optimizer: {learning_rate: [1e-3, 1e-4], weight_decay: [0.0, 0.1], "
    )
    text = text.replace("epochs: 2", "epochs: [1, 2]")
    assert settings(plan(text)) == [
        f"epochs={epochs} weight_decay={decay}" for epochs in (1, 2) for _ in range(2) for decay in (0.0, 0.1)
    ]


def test_an_unknown_primary_metric_is_named(plan: MakePlan, tmp_path: Path) -> None:
    message = (
        f"{tmp_path}/experiment.yaml, line 8, eval.primary_metric: unknown metric 'cidr'; "
        "allowed: cider, perplexity; did you mean 'cider'?"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        plan(BASE.replace("primary_metric: perplexity", "primary_metric: cidr"))


def test_the_cost_of_expanding_is_linear_in_the_number_of_trials(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    trial_id = TrialSpec.trial_id.fget
    assert trial_id is not None
    monkeypatch.setattr(TrialSpec, "trial_id", property(lambda spec: hashed.append(spec) or trial_id(spec)))
    assert len(trials(BASE.replace("[0]", str(list(range(40)))))) == 40
    # Pairwise comparison would make a plan of a thousand trials take half a minute.
    assert 40 <= len(hashed) <= 4 * 40


def test_in_another_process_ids_are_the_same_and_plans_and_results_need_neither_torch_nor_ray(
    trials: Trials, experiment_file: Write
) -> None:
    here = ids(trials(BASE))
    code = (
        "import sys, harness, harness.experiment.plan, harness.core.record, results.leaderboard.table, results.report\n"
        "print({'torch', 'ray', 'deepspeed', 'mlflow', 'transformers'} & set(sys.modules))\n"
        "experiment = harness.experiment.load.Experiment.from_yaml(harness.experiment.load.Path(sys.argv[1]))\n"
        "print([spec.trial_id for spec in harness.experiment.plan.expand(experiment)])\n"
        "print({'ray', 'deepspeed', 'mlflow', 'transformers', 'torch._dynamo'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(experiment_file(BASE))]
    there = subprocess.run(command, env={"PYTHONHASHSEED": "7"}, cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout.splitlines() == ["set()", str(here), "set()"]
