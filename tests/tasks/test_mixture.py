"""Mixtures: shares and budgets, what a trial records of each task, batches that lack one, and wrong input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from harness.core.errors import UserError
from harness.core.record import TrialRecord
from harness.core.registry import Registry
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec
from harness.model.build import build, choose_splits, order_of
from harness.model.components import make_task
from harness.model.features import Features
from harness.sweep.declared import metrics_of
from harness.trial.engine import Engine
from tasks.base import Config, Example, Part, Split, Task
from tasks.mixture import Mixture, MixtureConfig
from tasks.registry import TASKS
from tests.support.trials import examples_of, run, scored_by, spec_of

SMALL = {"validation_examples": 6, "test_examples": 6}
SCENES = {"name": "scenes", "train_examples": 12, **SMALL}
TRENDS = {"name": "trends", "train_examples": 48, **SMALL}


def config_of(*tasks: Any, **options: Any) -> MixtureConfig:
    return MixtureConfig.model_validate_json(json.dumps({"tasks": tasks, **options}), strict=True)


def mixture_spec(folder: Path, *tasks: Any, options: Mapping[str, Any] = {}, **sections: Any) -> TrialSpec:
    """Every task with the stand-in metric."""
    task = {"name": "mixture", "tasks": list(tasks or (SCENES, TRENDS)), **options}
    spec = spec_of(folder, **{"metric": "", "task": task, "budget": {"examples": "all"}, **sections})
    return scored_by(spec)


# ── Shares, budgets and the order


@pytest.mark.parametrize(
    ("tasks", "options", "expected"),
    [
        (("scenes", "trends"), {}, (0.8, 0.2)),
        (("scenes", "trends"), {"temperature": 2}, (2 / 3, 1 / 3)),  # √64 : √16
        (("scenes", "trends"), {"temperature": 1000}, (0.5, 0.5)),
        (({"name": "scenes", "weight": 0.5}, {"name": "trends", "weight": 1.5}), {}, (0.25, 0.75)),
        (({"name": "scenes", "weight": 3}, "trends"), {}, (0.75, 0.25)),  # without one: 1
    ],
)
def test_shares_are_as_the_temperature_or_the_weights_say(tasks: Any, options: Any, expected: Any) -> None:
    shares = Mixture(config_of(*tasks, **options)).shares({"scenes": 64, "trends": 16})
    assert tuple(shares.values()) == pytest.approx(expected, abs=1e-3)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)


def test_budgets_are_divided_by_share_and_nested(tmp_path: Path) -> None:
    weights = ({**SCENES, "weight": 1}, {**TRENDS, "weight": 3})
    before: set[str] = set()
    for count, expected in ((8, (2, 6)), (9, (2, 7)), (20, (5, 15)), (48, (12, 36))):
        spec = mixture_spec(tmp_path, *weights, budget={"examples": count})
        task = make_task(spec)
        task.prepare()
        train = choose_splits(spec, task).train
        members = Counter(example.member for example in train)
        assert (members["scenes"], members["trends"]) == expected
        assert before < {example.id for example in train}
        before = {example.id for example in train}
    with pytest.raises(UserError, match=r"budget.examples: task mixture: 15 of 60 .* from 'scenes', which has 12"):
        choose_splits(mixture_spec(tmp_path, *weights, budget={"examples": 60}), task)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (
            {"budget": {"examples": 1}},
            "budget.examples: task mixture: the 1 selected examples contain none of 'scenes'",
        ),
        ({"eval": {"test_examples": 1}}, "eval.test_examples: task mixture: the 1 selected examples contain none of '"),
    ],
)
def test_a_task_without_an_example_is_an_error(sections: Any, reason: str, tmp_path: Path) -> None:
    spec = mixture_spec(tmp_path, **sections)
    task = make_task(spec)
    task.prepare()
    with pytest.raises(UserError, match=reason):
        choose_splits(spec, task)


def test_every_epoch_repeats_the_small_task_and_thins_out_the_large_one(tmp_path: Path) -> None:
    spec = mixture_spec(tmp_path, {**SCENES, "weight": 1}, {**TRENDS, "weight": 1})
    task = make_task(spec)
    task.prepare()
    train = choose_splits(spec, task).train
    order = order_of(spec, task, train)
    assert order.draws == len(train) == 60
    epochs = [Counter(train[draw.example].id for draw in order.epoch(epoch)) for epoch in (1, 2)]
    for drawn in epochs:
        times = [drawn[example.id] for example in train if example.member == "scenes"]
        assert (sum(times), set(times)) == (30, {2, 3})  # 12 examples
        times = [drawn[example.id] for example in train if example.member == "trends"]
        assert (sum(times), set(times)) == (30, {0, 1})  # 48 examples
    assert epochs[0] != epochs[1]


def test_weights_change_the_order_fingerprint_and_the_trial(tmp_path: Path) -> None:
    seen, ids = set(), set()
    variants: list[tuple[Any, dict[str, Any]]] = [
        ((SCENES, TRENDS), {}),
        ((SCENES, TRENDS), {"temperature": 3}),
        (({**SCENES, "weight": 3}, TRENDS), {}),
    ]
    for tasks, options in variants:
        spec = mixture_spec(tmp_path, *tasks, options=options)
        task = make_task(spec)
        task.prepare()
        seen.add(order_of(spec, task, choose_splits(spec, task).train).fingerprint(2, 8))
        ids.add(spec.trial_id)
    assert len(seen) == len(ids) == 3
    said = mixture_spec(tmp_path, options={"temperature": 1}).trial_id
    assert said == mixture_spec(tmp_path).trial_id  # 1 is the default


# ── What a mixture is made of


def test_contexts_are_those_of_all_tasks_files_first_and_answers_last() -> None:
    task = Mixture(config_of("scenes", {"name": "vqa", "root": "x"}, "trends"))
    assert task.contexts == ("image", "series", "question", "text", "answer")
    assert task.modalities == {"image": "image", "series": "series"}


def test_examples_say_whose_they_are_and_what_context_is_answered_in(tmp_path: Path) -> None:
    task = make_task(mixture_spec(tmp_path, SCENES, TRENDS))
    task.prepare()
    for split in ("train", "validation", "test"):
        own = {key: list(member.examples(split)) for key, member in task.members().items()}
        found = task.examples(split)
        assert [e.id for e in found] == [f"{key}/{e.id}" for key, examples in own.items() for e in examples]
        assert {(e.member, e.target) for e in found} == {("scenes", "text"), ("trends", "text")}
        assert [e.inputs for e in found] == [e.inputs for examples in own.values() for e in examples]


def test_one_task_may_be_there_twice_under_two_names(tmp_path: Path) -> None:
    tasks = [{**SCENES, "as": f"seed{n}", "data_seed": n} for n in (0, 1)]
    spec = mixture_spec(tmp_path, *tasks)
    assert list(spec.task.metrics) == ["seed0", "seed1"]
    assert spec.task.contexts == ("image", "text")
    task = make_task(spec)
    task.prepare()
    ids = [example.id for example in task.examples("train")]
    assert len(set(ids)) == len(ids) == 24
    assert {i.partition("/")[0] for i in ids} == {"seed0", "seed1"}


def test_it_travels_to_a_worker_that_knows_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mixture_spec(tmp_path, {**SCENES, "as": "pictures"}, TRENDS)
    text = spec.model_dump_json()
    monkeypatch.setattr(Registry, "entries", lambda _: {})
    assert list(make_task(TrialSpec.model_validate_json(text)).members()) == ["pictures", "trends"]
    assert spec.task.config["tasks"][0]["options"]["data_seed"] == 0  # defaults are in it


def test_a_task_from_a_file_goes_by_its_content(tmp_path: Path, experiment_file: Callable[[str], Path]) -> None:
    ids = []
    for line in ("", "# more"):
        (tmp_path / "mine.py").write_text(
            f"from tasks.trends import Trends\nclass Mine(Trends):\n    '''.'''\n{line}\n"
        )
        before = list(TASKS.added)
        spec = mixture_spec(tmp_path, SCENES, {**TRENDS, "name": "mine"}, plugins=["mine.py"])
        TASKS.added = before
        assert spec.task.config["tasks"][1]["plugin"]["target"] == f"{tmp_path / 'mine.py'}:Mine"
        assert make_task(spec).contexts == ("image", "series", "text")
        ids.append(spec.trial_id)
    assert ids[0] != ids[1]


# ── Trials


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, TrialSpec, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    spec = mixture_spec(folder)
    return run(spec, folder), spec, folder


def test_the_record_has_every_tasks_metrics_and_perplexity(trained: Any) -> None:
    record, spec, folder = trained
    assert record.status == "finished", record.reason
    expected = {"perplexity", "scenes/perplexity", "trends/perplexity", "perplexity_one_reference"}
    assert set(record.metrics["validation"]) == expected
    test = record.metrics["test"]
    assert set(test) == {*expected, "perplexity_wrong_input", "scenes/first_word", "trends/first_word"}
    assert {info.name for info in metrics_of([spec])} == set(test) - {"perplexity_one_reference"}
    assert set(record.parameters.by_group) == {"image", "series", "text"}
    table = examples_of(folder, record)
    rows = table[table["split"] == "test"]
    for member in ("scenes", "trends"):
        own = rows[rows["example_id"].str.startswith(f"{member}/")]
        assert len(own) == 6
        assert math.exp(own["nll"].sum() / own["tokens"].sum()) == pytest.approx(test[f"{member}/perplexity"])
        assert own[f"{member}/first_word"].mean() == pytest.approx(test[f"{member}/first_word"])
    assert rows[rows["example_id"].str.startswith("scenes/")]["trends/first_word"].isna().all()
    # Wrong inputs are inputs of another example of the same task.
    assert math.exp(rows["nll_wrong_input"].sum() / rows["tokens"].sum()) == pytest.approx(
        test["perplexity_wrong_input"]
    )


def test_a_batch_without_a_tasks_contexts_trains_the_others_alone(tmp_path: Path) -> None:
    """Such as the last one of an epoch; the absent groups and projectors get a gradient of zero."""
    spec = mixture_spec(tmp_path)
    built = build(spec, torch.device("cpu"))
    model = built.model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    engine = Engine(model, spec.optimizer, 2, 0, units=model.adapters.changes())
    scenes = [example for example in built.splits.train if example.member == "scenes"][:4]
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        engine.train_step(built.batches.make(scenes, [e.references[0] for e in scenes]))
    engine.close()
    moved = {name: bool((p != before[name]).any()) for name, p in model.named_parameters() if name in before}
    series = {name for name in moved if "group_series" in name or "projectors.series" in name}
    assert len(series) > 2
    assert not any(moved[name] for name in series)
    assert all(moved[name] for name in moved.keys() - series)


# ── Wrong input

WRONG = {
    "tasks: [scenes]": r"task\.tasks: a mixture needs at least two tasks",
    "tasks: [scenes, scenes]": r"task\.tasks: two tasks are named 'scenes'; .* 'as'",
    "tasks: [scenes, {name: trend}]": r"tasks\[1\]\S* unknown task 'trend'; .*did you mean 'trends'",
    "tasks: [scenes, {train_examples: 3}]": r"tasks\[1\]\S*: a task needs its name; allowed: ",
    "tasks: [{name: scenes, train_exmples: 3}, trends]": r"tasks\[0\]\S* unknown key 'train_exmples'; allowed: as, ",
    "tasks: [{name: scenes, train_examples: x}, trends]": r"tasks\[0\]\S* input should be a valid integer; found 'x'",
    "tasks: [trends, {name: text}]": r"tasks\[1\]\.root: this key is required",
    "tasks: [scenes, {name: trends, as: a/b}]": r"tasks\[1\]\S* allowed: a name of letters.*; found 'a/b'",
    "tasks: [scenes, {name: trends, weight: 0}]": r"tasks\[1\]\S* input should be greater than 0; found 0",
    "temperature: 2, tasks: [scenes, {name: trends, weight: 2}]": r"temperature: either a temperature or weights",
    "temperature: 0.5, tasks: [scenes, trends]": r"temperature: .*greater than or equal to 1; found 0.5",
    "tasks: [scenes, {name: mixture, as: inner, tasks: [scenes, trends]}]": r"tasks\[1\]: 'inner' is itself a mixture",
    "{}": r"task\.tasks: this key is required",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_named(options: str, experiment_file: Callable[[str], Path]) -> None:
    task = "{name: mixture}" if options == "{}" else f"{{name: mixture, {options}}}"
    path = experiment_file(f"task: {task}\nadapters: [{{method: none, learning_rate: 1}}]\n")
    with pytest.raises(UserError, match=rf"experiment.yaml, line 1, task.*{WRONG[options]}|line 1, {WRONG[options]}"):
        Experiment.from_yaml(path)


def test_an_inner_option_is_named_by_its_whole_path() -> None:
    with pytest.raises(ValidationError, match="should be a valid integer") as caught:
        config_of({"name": "scenes", "train_examples": "x"}, "trends")
    assert [error["loc"] for error in caught.value.errors()] == [("tasks", 0, "train_examples")]


class Fake(Task):
    """Reads the files named in its options."""

    contexts = ("image", "text")
    modalities: Mapping[str, str] = {"image": "image"}
    metrics = ()

    class Config(Config):
        """Options."""

        files: dict[Split, str]

    config: Any

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self) -> None:
        pass

    def examples(self, split: Split) -> Sequence[Example]:
        return (Example(split, (Part("image", Path(self.config.files[split])),), ("a",)),)


class TextImage(Fake):
    """Its images are text."""

    modalities: Mapping[str, str] = {}


class Flipping(Fake):
    """Augments."""

    augmented = frozenset({"image"})

    def augment(self, context: str, item: Any, rng: np.random.Generator) -> Any:
        return (context, item)


def fake(name: str, key: str, train: str = "/a", test: str = "/c") -> dict[str, Any]:
    options = {"files": {"train": train, "validation": "/b", "test": test}}
    plugin = {"name": key, "distribution": "tests", "result_version": 1, "target": f"{__name__}:{name}"}
    return {"key": key, "weight": None, "plugin": plugin, "options": options}


def test_a_context_has_one_modality() -> None:
    with pytest.raises(UserError, match="context 'image': image in 'a' and text in 'b'; allowed: one modality"):
        Mixture(config_of(fake("Fake", "a"), fake("TextImage", "b")))


def test_augmentation_is_the_tasks_own() -> None:
    mixture = Mixture(config_of(fake("Fake", "a"), fake("Flipping", "b")))
    reader = Features(mixture, {}, {}, torch.device("cpu"))
    augmented = [reader._augments(Example("1", (), ("x",), member=member), "image") for member in ("a", "b")]
    assert augmented == [False, True]


def test_what_one_task_trains_on_another_may_not_test_on() -> None:
    Mixture(config_of(fake("Fake", "a"), fake("Fake", "b"))).prepare()
    with pytest.raises(
        UserError, match=r"task\.tasks: .*/c is in train \('b/.*'\) and in test \('a/.*'\); splits may not overlap"
    ):
        Mixture(config_of(fake("Fake", "a"), fake("Fake", "b", train="/c", test="/d"))).prepare()
