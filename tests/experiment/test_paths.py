"""Paths of an experiment start from its file, and no folder of the machine is in trial ids or in what must match."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import harness
from adapters.registry import ADAPTERS
from harness.core.errors import UserError
from harness.core.naming import conditions
from harness.core.paths import ExperimentPath, locate_model, relative_to
from harness.core.weights import fingerprint
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model.components import make_task, method_of
from harness.sweep.run import prepare
from tasks.speech import Speech

pytestmark = pytest.mark.quick

Place = Callable[[str], Path]
REST = "adapters: [{method: none, learning_rate: 1e-3}]\n"
DATA = "task: {name: speech, root: data}\n" + REST


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is not that of the experiment."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, elsewhere: Path) -> Place:
    """Writes ``tmp_path/here/experiment.yaml`` beside ``data``, the sample of the task ``speech``."""
    (tmp_path / "here/data").mkdir(parents=True)
    Speech.sample(tmp_path / "here/data")

    def write(text: str) -> Path:
        path = tmp_path / "here/experiment.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def only(path: Path | str) -> TrialSpec:
    (spec,) = expand(Experiment.from_yaml(path))
    return spec


def test_the_root_of_a_task_starts_from_the_file(place: Place) -> None:
    spec = only(place(DATA))
    assert spec.task.config["root"] == "data"
    task = make_task(spec)
    assert task.config.root == place(DATA).parent / "data"
    assert len(task.examples("train")) > 0
    assert len(make_task(TrialSpec.model_validate_json(spec.model_dump_json())).examples("train")) > 0


def test_the_id_is_that_of_the_path_as_written(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every current folder, and after the folder has moved; a record keeps what was matched."""
    first = only(place(DATA))
    monkeypatch.chdir(place(DATA).parent)
    assert only("experiment.yaml") == first
    shutil.move(tmp_path / "here", tmp_path / "moved")
    moved = only(tmp_path / "moved/experiment.yaml")
    assert (moved.trial_id, conditions(moved.model_dump())) == (first.trial_id, conditions(first.model_dump()))
    assert moved.relative_to == str(tmp_path / "moved")
    assert str(tmp_path) not in str(conditions(first.model_dump()))
    assert only("../moved/experiment.yaml").trial_id == first.trial_id


def test_another_spelling_is_another_trial(place: Place) -> None:
    assert only(place(DATA)).trial_id != only(place(DATA.replace("data", "../here/data"))).trial_id


def test_a_path_that_is_in_the_current_folder_only_is_explained(place: Place, elsewhere: Path) -> None:
    (elsewhere / "mine").mkdir()
    path = place(DATA.replace("data", "mine"))
    says = (
        f"{path}, line 1, task.root: 'mine' is in the current folder ({elsewhere}), but not in the folder of the "
        f"experiment file ({path.parent}), from which its relative paths start; write '../elsewhere/mine', or an "
    )
    with pytest.raises(UserError, match=re.escape(says)):
        Experiment.from_yaml(path)
    Experiment.from_yaml(place(DATA.replace("data", "../elsewhere/mine")))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("task: {name: coco_captions, root: mine}", "task.root: 'mine'"),
        ("task: {name: coco_captions, root: ., karpathy: mine}", "task.karpathy: 'mine'"),
        ("task: {name: coco_captions, root: ., test: x, test_root: mine}", "task.test_root: 'mine'"),
        ("task: {name: coco_captions, dataset: {path: mine}}", "task.dataset.path: 'mine'"),
        ("task: {name: coco_captions, dataset: {path: parquet, data_files: {train: mi*}}}", "task.dataset: 'mi*'"),
        ("task: {name: mixture, tasks: [{name: text, root: mine}, scenes]}", "task.tasks[0].root: 'mine'"),
        ("task: scenes\nbackbone: {language_model: mine}", "backbone.language_model: 'mine'"),
        ("task: scenes\nbackbone: {encoders: {image: mine}}", "backbone.encoders.image: 'mine'"),
        ("task: scenes\nplugins: [mine]", "plugins[0]: 'mine'"),
        (
            "task: scenes\nadapters: [{method: lora, grouping: specific, init_from: {image: mine}}]",
            "adapters[0].init_from.image: 'mine'",
        ),
    ],
)
def test_every_path_of_an_experiment_starts_from_the_file(
    place: Place, elsewhere: Path, section: str, key: str
) -> None:
    (elsewhere / "mine").mkdir()
    adapters = "" if "adapters" in section else REST
    with pytest.raises(UserError, match=re.escape(key) + " is in the current folder"):
        Experiment.from_yaml(place(f"{section}\n{adapters}"))


def test_a_model_beside_the_file_is_a_folder_with_and_without_a_dot(place: Place, elsewhere: Path) -> None:
    path = place("task: scenes\nbackbone: {language_model: [model, ./model], encoders: {image: ./model}}\n" + REST)
    model = path.parent / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    specs = expand(Experiment.from_yaml(path))
    assert [spec.backbone.language_model for spec in specs] == ["model", "./model"]
    expected = fingerprint(str(model))
    assert expected is not None
    for spec in specs:
        backbone = spec.pinned_backbone
        assert {Path(backbone.language_model), Path(backbone.encoders["image"])} == {model}
        assert spec.fingerprints == {"language_model": expected, "encoders.image": expected}


def test_names_of_the_hub_stay_names(tmp_path: Path) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    assert locate_model("owner/name", tmp_path) == str(tmp_path / "owner/name")
    for name in ("owner/name@main", "owner/other", "gpt2", "builtin/tiny-llama"):
        assert locate_model(name, tmp_path) == name
    assert locate_model("~/model", tmp_path) == str(Path("~/model").expanduser())
    assert locate_model("/model", tmp_path) == "/model"


def test_a_hub_id_that_is_also_a_folder_here_must_be_made_clear(place: Place, elsewhere: Path) -> None:
    (elsewhere / "gpt2").mkdir()
    text = "task: scenes\nbackbone: {language_model: gpt2}\n" + REST
    with pytest.raises(UserError, match=r"write '../elsewhere/gpt2', or an absolute path; for the hub's model of this"):
        Experiment.from_yaml(place(text))
    with pytest.raises(
        UserError, match=r"language_model: the current folder \(.*elsewhere\) has a folder 'gpt2', which"
    ):
        Experiment.from_yaml(place(text.replace("gpt2", "gpt2@main")))
    (elsewhere / "gpt2").rmdir()
    assert Experiment.from_yaml(place(text.replace("gpt2", "gpt2@main"))).backbones[0].language_model == "gpt2@main"


def test_python_experiments_start_from_the_current_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place(DATA).parent
    monkeypatch.chdir(folder)
    experiment = harness.Experiment(
        task={"name": "speech", "root": Path("data")}, adapters=[{"method": "none", "learning_rate": 1e-3}]
    )
    monkeypatch.chdir("/")
    (spec,) = expand(experiment)
    assert spec.trial_id == only(folder / "experiment.yaml").trial_id
    assert len(make_task(spec).examples("train")) > 0


def test_home_and_environment_are_expanded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place(DATA).parent
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("RECORDINGS", "data")
    for root in ("~/data", '"${RECORDINGS}"', str(folder / "data")):
        assert len(make_task(only(place(DATA.replace("data", root)))).examples("train")) > 0, root


def test_tasks_of_a_mixture_start_from_the_file(place: Place) -> None:
    text = "task: {name: mixture, tasks: [{name: text, root: data}, {name: text, as: again, root: ../here/data}]}\n"
    spec = only(place(text + REST))
    task = make_task(TrialSpec.model_validate_json(spec.model_dump_json()))
    root = place(DATA).parent
    assert [member.config.root for member in task.members().values()] == [root / "data", root / "../here/data"]
    assert [member["options"]["root"] for member in spec.task.config["tasks"]] == ["data", "../here/data"]


def test_shards_and_folders_of_pictures_start_from_the_file(place: Place) -> None:
    shards = "{path: parquet, data_files: {train: 'shards/t*', validation: 'shards/v*'}}"
    path = place(f"task: {{name: coco_captions, dataset: {shards}}}\n{REST}")
    task = make_task(only(path))
    with pytest.raises(UserError, match=re.escape(f"no file matches {str(path.parent / 'shards/t*')!r}")):
        task.prepare()
    for split in ("train", "validation"):
        (path.parent / "pictures" / split).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number * 40, 9, 9)).save(path.parent / f"pictures/{split}/{number}.png")
        rows = [f'{{"file_name": "{number}.png", "text": "picture {number}"}}\n' for number in range(4)]
        (path.parent / f"pictures/{split}/metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    task = make_task(
        only(place(f"task: {{name: coco_captions, dataset: {{path: pictures, caption_column: text}}}}\n{REST}"))
    )
    task.prepare()
    assert [example.references[0] for example in task.examples("train")] == [f"picture {n}" for n in range(4)]


def test_a_local_tracking_store_starts_from_the_file(place: Place, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for uri, expected in (
        ("sqlite:///mlflow.db", f"sqlite:///{here}/mlflow.db"),
        ("sqlite:///a%23b/m.db?timeout=60", f"sqlite:///{here}/a%23b/m.db?timeout=60"),
        ("sqlite:////x/mlflow.db", "sqlite:////x/mlflow.db"),
        ("mlruns", f"{here}/mlruns"),
        ("http://localhost:5000", "http://localhost:5000"),
        ("databricks", "databricks"),
    ):
        experiment = Experiment.from_yaml(place(f"{DATA}tracking: {{mlflow_uri: '{uri}'}}\n"))
        assert prepare(experiment, tmp_path / "runs").mlflow_uri == expected
    Path("mine.db").touch()
    with pytest.raises(UserError, match=r"line 3, tracking.mlflow_uri: 'mine.db' is in the current folder"):
        prepare(Experiment.from_yaml(place(f"{DATA}tracking: {{mlflow_uri: 'sqlite:///mine.db'}}\n")), tmp_path)


PLUGIN = """
from harness import AdapterConfig, AdapterMethod, ExperimentPath

class Tabled(AdapterMethod):
    class Config(AdapterConfig):
        table: ExperimentPath

    def label(self):
        return "tabled"

    def roles(self):
        return ()

    def delta(self, *_):
        raise NotImplementedError
"""


def test_options_of_adapter_methods_start_from_the_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ADAPTERS, "added", [])
    path = place("plugins: [p.py]\ntask: scenes\nadapters: [{method: tabled, table: t.bin, learning_rate: 1e-3}]\n")
    (path.parent / "p.py").write_text(PLUGIN, encoding="utf-8")
    spec = only(path)
    assert spec.adapter.config == {"table": "t.bin"}
    config: Any = method_of(spec.adapter, spec.relative_to).config
    assert config.table == path.parent / "t.bin"


class Options(harness.TaskConfig):
    root: ExperimentPath


def test_options_give_paths_back_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    options = Options.model_validate({"root": "~/data"}, context=relative_to(tmp_path))
    assert options.root == Path("/home/ann/data")
    for copy in (options, options.model_copy(deep=True), pickle.loads(pickle.dumps(options))):
        assert copy.model_dump(mode="json") == {"root": "~/data"}
    assert Options(root=Path("a/b")).root == Path("a/b"), "without an experiment, from the current folder"
    assert str(Options.model_validate({"root": "a"}, context=relative_to(tmp_path)).root / "b") == f"{tmp_path}/a/b"
