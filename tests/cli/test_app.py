# ruff: noqa: E501 - one wrong input per line reads as a table
"""The command line: lists, plans, and wrong input, which gives one message and exit code 2 before any compute."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from harness.cli import app
from harness.cli.leaderboard import print_last_screen
from harness.core.errors import UserError
from harness.core.record import PlannedTrial, TrialRecord
from harness.experiment.options import REGISTRIES
from harness.sweep import run
from harness.tracking import store
from harness.tracking.grid import open_grid
from results.loaded import Results
from tasks.drawing.task import DrawnConfig
from tasks.scenes import Scenes
from tests.support import screens
from tests.support.cli import Harness, Outcome, assert_refused, caller
from tests.support.runs import fake_plan, write_run

ROOT = Path(__file__).parents[2]
Write = Callable[[str], Path]
SCENES = "task: {name: scenes, train_examples: 4, validation_examples: 2, test_examples: 2}\n"
LORA = "adapters: [{method: lora, rank: 4, learning_rate: 6e-3}]\n"
ONE = SCENES + LORA


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of an MLflow database that already has its schema: creating one takes seconds."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "first").mkdir()
    return open_grid(store.default_uri(runs), "first", runs / "first").uri


@pytest.fixture
def harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database: str
) -> Harness:
    """Runs ``harness …`` in this process, in an empty folder, on a wide console; training fails."""

    def compute(*_: object) -> None:
        raise AssertionError("training was started")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(run, "_run_unfinished", compute)
    monkeypatch.setattr(app, "console", Console(width=200))
    monkeypatch.setattr(store, "default_uri", lambda runs: database)

    return caller(monkeypatch, capsys)


def coco_folder(root: Path) -> Path:
    """Two training and four validation pictures with their captions, in COCO's layout."""
    for split, ids in (("train2017", (1, 2)), ("val2017", (13, 14, 15, 18))):
        (root / split).mkdir(parents=True)
        for number in ids:
            Image.effect_noise((32, 32), 40).convert("RGB").save(root / split / f"{number:012d}.png")
        content = {
            "images": [{"id": n, "file_name": f"{n:012d}.png", "height": 32, "width": 32} for n in ids],
            "annotations": [{"id": 100 + n, "image_id": n, "caption": f"picture number {n}."} for n in ids],
        }
        path = root / "annotations" / f"captions_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return root


def coco(root: Path) -> str:
    return f"task: {{name: coco_captions, root: {root}}}\n{LORA}"


# Each: the experiment, and a part of the message.
WRONG = {
    "unknown key": (ONE + "bugdet: {examples: 3}\n", "experiment.yaml, line 3, bugdet: unknown key 'bugdet'; allowed: adapters, backbone, budget"),
    "unknown adapter": (ONE.replace("lora", "loar"), "line 2, adapters[0].method: unknown adapter 'loar'; allowed: bitfit, "),
    "unknown task": (ONE.replace("scenes", "scens"), "line 1, task.name: unknown task 'scens'; allowed: audio_captions, coco_captions, mixture, scenes, speech, text, trends, vqa; did you mean 'scenes'?"),
    "unknown built-in language model": (ONE + "backbone: {language_model: builtin/tiny-lama}\n", "'builtin/tiny-lama' is not a built-in language model; allowed: builtin/tiny-llama; did you mean 'builtin/tiny-llama'?"),
    "unknown built-in encoder": (ONE + "backbone: {encoders: {image: builtin/tiny-vison}}\n", "did you mean 'builtin/tiny-vision'?"),
    "backbone folder missing": (ONE + "backbone: {language_model: /no/such/folder}\n", "'/no/such/folder': no such folder"),
    "unknown hub id": (ONE + "backbone: {language_model: facebok/opt-125m}\n", "backbone.language_model: 'facebok/opt-125m' could not be loaded from a folder or from the hub"),
    "a part that the model lacks": (ONE.replace("rank: 4", "rank: 4, where: {language: AF, vision: [q, v]}"), "where: vision: the llama model has no such part that is known"),
    "encoder of an unknown modality": (ONE + "backbone: {encoders: {imag: builtin/tiny-vision}}\n", "image"),
    "encoder as language model": (ONE + "backbone: {language_model: builtin/tiny-vision}\n", "builtin/tiny-vision"),
    "language model as encoder": (ONE + "backbone: {encoders: {image: builtin/tiny-llama}}\n", "builtin/tiny-llama"),
    "wrong type": (ONE + "budget: {epochs: two}\n", "line 3, budget.epochs: input should be a valid integer"),
    "empty axis": (ONE.replace("rank: 4", "rank: []"), "line 2, adapters[0].rank: empty axis"),
    "more examples than there are": (ONE + "budget: {examples: 5}\n", "budget.examples: task scenes: requests 5 examples, but there are 4; allowed: at most 4"),
    "more test examples than there are": (ONE + "eval: {test_examples: 3}\n", "eval.test_examples: task scenes: requests 3 examples, but there are 2"),
    "unknown metric": (ONE + "eval: {primary_metric: cidre}\n", "line 3, eval.primary_metric: unknown metric 'cidre'; allowed: bleu_"),
    "rank larger than a layer": ("task: scenes\nadapters: [{method: lora, rank: 4000}]\noptimizer: {learning_rate: 1e-3}\n", "adapters: LoRA r=4000 on builtin/tiny-llama: rank 4000 is larger than layer model.layers.0.self_attn.q_proj"),
    "more projector epochs than epochs": ("task: scenes\nadapters: [{method: llava, projector_epochs: 2}]\nbudget: {epochs: 2}\noptimizer: {learning_rate: 1e-3}\n", "line 2, adapters: LLaVA"),
    "not yaml": ("task: [\n", "not valid YAML"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", WRONG)
def test_wrong_experiments_end_before_any_compute(harness: Harness, experiment_file: Write, case: str) -> None:
    text, says = WRONG[case]
    assert_refused(harness("run", experiment_file(text)), says)


@pytest.mark.parametrize(
    "case",
    [
        "unknown key",
        "unknown built-in language model",
        "encoder of an unknown modality",
        "more examples than there are",
        "more test examples than there are",
    ],
)
def test_a_plan_of_a_wrong_experiment_is_refused_too(harness: Harness, experiment_file: Write, case: str) -> None:
    text, says = WRONG[case]
    assert_refused(harness("plan", experiment_file(text)), says)


def test_a_missing_experiment_file(harness: Harness, experiment_file: Write) -> None:
    path = experiment_file(ONE)
    assert_refused(harness("run", path.with_name("expriment.yaml")), f"no such file; this folder has: {path}")


def test_a_missing_data_folder_is_named(harness: Harness, experiment_file: Write, tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "coco")
    shutil.rmtree(root / "train2017")
    assert_refused(
        harness("run", experiment_file(coco(root))),
        f"{root / 'train2017'}: the folder of images does not exist; in {root} allowed: annotations, val2017",
    )
    says = f"{root}-mini/annotations: the folder of annotations does not exist; in {tmp_path} allowed: coco, here"
    assert_refused(harness("run", experiment_file(coco(tmp_path / "coco-mini"))), says)


def test_broken_json_is_shown_with_its_line(harness: Harness, experiment_file: Write, tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "coco")
    path = root / "annotations" / "captions_val2017.json"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[3] = lines[3].replace(":", "")
    path.write_text("\n".join(lines), encoding="utf-8")
    outcome = harness("run", experiment_file(coco(root)))
    assert_refused(outcome, f"{path}: line 4, column ")
    assert lines[3].strip() in outcome.err


def test_a_picture_that_cannot_be_decoded_stops_before_training(
    harness: Harness, experiment_file: Write, tmp_path: Path
) -> None:
    root = coco_folder(tmp_path / "coco")
    path = root / "val2017" / "000000000013.png"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused(harness("run", experiment_file(coco(root))), f"{path}: cannot be decoded as a picture: ")


def test_a_picture_changed_since_it_was_read_is_read_again(
    harness: Harness, experiment_file: Write, tmp_path: Path
) -> None:
    root = coco_folder(tmp_path / "coco")
    with pytest.raises(AssertionError, match="training was started"):
        harness("run", experiment_file(coco(root)))
    path = root / "train2017" / "000000000002.png"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused(harness("run", experiment_file(coco(root))), f"{path}: cannot be decoded as a picture: ")


def test_no_permission_to_write(harness: Harness, experiment_file: Write, tmp_path: Path) -> None:
    # A path below a file: not writable, even for root.
    (tmp_path / "file").write_text("", encoding="utf-8")
    output = tmp_path / "file" / "runs"
    says = f"{output / 'experiment'}: not writable: Not a directory; choose another folder with --output"
    assert_refused(harness("run", experiment_file(ONE), "--output", output), says)


def test_a_cache_that_cannot_be_written(
    harness: Harness, experiment_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", "/dev/null/cache")
    assert_refused(harness("run", experiment_file(ONE)), "/dev/null/cache/scenes/")


def test_an_unreachable_mlflow_server_is_reported_within_seconds(harness: Harness, experiment_file: Write) -> None:
    began = time.monotonic()
    outcome = harness("run", experiment_file(ONE + "tracking: {mlflow_uri: 'http://127.0.0.1:9'}\n"))
    assert time.monotonic() - began < 20
    assert_refused(outcome, "tracking.mlflow_uri: 'http://127.0.0.1:9' could not be used: ")


def test_markup_in_a_message_is_shown_as_it_is(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("adapters[2].rank: found [bold] and [/etc]")

    monkeypatch.setattr(app, "app", fail)
    assert harness().err == "error: adapters[2].rank: found [bold] and [/etc]\n"


def row(text: str, name: str) -> list[str]:
    """The cells behind a name in the printed table of trials; that of their cost follows it."""
    (line,) = [line for line in text.partition("predicted: ")[0].splitlines() if line.strip().startswith(name)]
    return re.split(r"  +", line.strip())[1:]


@pytest.mark.parametrize("drawn", [False, True])
def test_a_plan_counts_drawn_examples_but_draws_none(
    harness: Harness, experiment_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: bool
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    if drawn:
        Scenes(DrawnConfig(train_examples=4, validation_examples=2, test_examples=2)).prepare()
    before = sorted(tmp_path.rglob("*"))
    says = "budget.examples: task scenes: requests 5 examples, but there are 4"
    assert_refused(harness("plan", experiment_file(ONE + "budget: {examples: 5}\n")), says)
    assert harness("plan", experiment_file(ONE + "budget: {examples: 4}\n")).code == 0
    digests = {tmp_path / "cache", tmp_path / "cache" / "fingerprints.json"}  # of the backbones' files
    new = {path for path in tmp_path.rglob("*") if "traced" not in path.parts}  # the cache of the forecast
    assert new - set(before) - digests == {tmp_path / "experiment.yaml"}


def test_a_plan_counts_the_examples_of_a_folder_that_is_there(
    harness: Harness, experiment_file: Write, tmp_path: Path
) -> None:
    text = coco(coco_folder(tmp_path / "coco"))
    found = harness("plan", experiment_file(text + "budget: {examples: 3}\n"))
    assert_refused(found, "budget.examples: task coco_captions: requests 3 examples, but there are 2")
    small = "eval: {validation_examples: 1, test_examples: 1}\n"
    outcome = harness("plan", experiment_file(text + "budget: {examples: 2}\n" + small))
    assert outcome.code == 0
    assert "not checked" not in outcome.out
    away = harness("plan", experiment_file(coco(tmp_path / "absent") + "budget: {examples: 3}\n"))
    assert away.code == 0
    assert f"number of examples not checked: task coco_captions: {tmp_path}/absent" in away.out
    hub = f"task: {{name: coco_captions, dataset: {{path: some/thing}}}}\n{LORA}"
    online = harness("plan", experiment_file(hub))
    assert online.code == 0, online.err
    assert "number of examples not checked: task coco_captions: its data may have to be downloaded" in online.out


def test_the_last_screen_counts_the_trials_that_did_not_run(tmp_path: Path) -> None:
    plan = fake_plan(seeds=tuple(range(30)), settings=("",))
    kept = {trial.trial_id: number for number, trial in enumerate(plan.trials[:40])}

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.trial_id not in kept:
            return None
        failed = kept[trial.trial_id] < 12
        return record.model_copy(update={"status": "failed", "reason": "no [room]"}) if failed else record

    results = Results((write_run(tmp_path, plan, change),), tmp_path / "report.html")
    screen = screens.console(width=200)
    print_last_screen(results, 5.0, screen)
    text = screens.output(screen)
    assert text.count("no [room]") == 10
    assert f"failed {plan.trials[0].trial_id} none seed 0: no [room]\n… and 2 more that failed" not in text
    assert "… and 2 more that failed: see the report\n" in text
    missing = len(plan.trials) - 40
    says = f"28 of {len(plan.trials)} trials finished, 12 failed, {missing} not run; this run took 5.0 s; run the same"
    assert says in text
    assert text.count("not run") == 1


def test_in_a_file_a_row_of_a_plan_is_one_line(
    harness: Harness, experiment_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "console", Console(width=80))
    experiment = ONE + "backbone: {projector_dropout: [0, 0.125], add_prefix_space: [false, true]}\n"
    lines = [line.split() for line in harness("plan", experiment_file(experiment)).out.splitlines()]
    rows = [line for line in lines if line[:2] == ["LoRA", "r=4"]]
    assert len([row for row in rows if row[-2:] == ["to", "run"]]) == 4
    assert all(any("projector_dropout=0" in cell for cell in row) for row in rows)


@pytest.mark.quick
def test_the_plan_of_the_quickstart(harness: Harness) -> None:
    outcome = harness("plan", ROOT / "experiments" / "quickstart.yaml")
    assert (outcome.code, outcome.err) == (0, "")
    assert "quickstart: 24 trials" in outcome.out
    projector = 96 * 96 + 96
    # LoRA-4: 4 layers, each q, k, v, o at 96 → 96, gate and up 96 → 256, down 256 → 96.
    lora = 4 * 4 * (4 * (96 + 96) + 3 * (96 + 256))
    assert row(outcome.out, "none") == ["0–2", f"{projector:,}", "0", f"{projector:,}", "879,648", "3 to run"]
    for grouping, groups in (("agnostic", 1), ("specific", 2)):
        cells = row(outcome.out, f"LoRA r=4 {grouping}")
        assert cells[1:3] == [f"{groups * lora + projector:,}", f"{groups * lora:,}"]
    full = row(outcome.out, "full fine-tuning")
    assert full[2] == "0"
    assert int(full[1].replace(",", "")) > 500_000
    assert "run folder: runs/quickstart" in outcome.out
    assert list(Path.cwd().iterdir()) == []  # a plan writes nothing


def test_the_plan_of_the_paper_setting_needs_no_network(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCO_ROOT", raising=False)
    outcome = harness("plan", ROOT / "experiments" / "coco.yaml")
    assert outcome.code == 0
    assert "coco: 36 trials" in outcome.out
    assert "unknown" not in outcome.out
    assert "weights without fingerprint: language_model facebook/opt-125m, encoders.image" in outcome.out
    # OPT-125m: 12 layers, rank 64 on q, k, v, out at 768 and fc1, fc2 between 768 and 3,072, in two groups.
    lora = 2 * 12 * 64 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert row(outcome.out, "LoRA r=64 specific")[2] == f"{lora:,}"


def grouping_of(image: str) -> str:
    return f"{SCENES}adapters: [{{method: lora, learning_rate: 1e-3, grouping: {{image: {image}, text: keys}}}}]\n"


@pytest.mark.parametrize("name", ["train", "keys", "none"])
def test_a_group_may_have_any_name_even_that_of_a_modules_method(
    harness: Harness, experiment_file: Write, name: str
) -> None:
    outcome = harness("plan", experiment_file(grouping_of(name)))
    assert (outcome.code, outcome.err) == (0, "")
    assert f"LoRA r=8 image={name} text=keys" in outcome.out


@pytest.mark.parametrize("name", ["a.b", "image text", "'1'", "''"])
def test_an_invalid_group_name_is_refused(harness: Harness, experiment_file: Write, name: str) -> None:
    outcome = harness("plan", experiment_file(grouping_of(name)))
    assert_refused(outcome, "experiment.yaml, line 2, adapters[0].grouping: group of context 'image'")
    assert name.strip("'") in outcome.err


def run_folder(outcome: Outcome) -> str:
    (folder,) = re.findall(r"^run folder: (.*)$", outcome.out, re.MULTILINE)
    return str(folder)


def plan_json(harness: Harness, text: str, path: Path, runs: Path) -> None:
    """Create the run folder of an experiment, stopped before training."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match="training was started"):
        harness("run", path, "-o", runs)


def test_fresh_takes_the_next_folder_and_a_plain_run_the_latest(harness: Harness, tmp_path: Path) -> None:
    path, runs = tmp_path / "grid.yaml", tmp_path / "runs"
    path.write_text(ONE, encoding="utf-8")
    assert run_folder(harness("plan", path, "-o", runs, "--fresh")) == str(runs / "grid")
    plan_json(harness, ONE, path, runs)
    assert run_folder(harness("plan", path, "-o", runs)) == str(runs / "grid")
    assert run_folder(harness("plan", path, "-o", runs, "--fresh")) == str(runs / "grid@2")
    with pytest.raises(AssertionError, match="training was started"):
        harness("run", path, "-o", runs, "--fresh")
    assert (runs / "grid@2" / "plan.json").is_file()
    assert run_folder(harness("plan", path, "-o", runs)) == str(runs / "grid@2")


def test_an_experiment_never_takes_the_folder_of_another(harness: Harness, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    plan_json(harness, ONE, tmp_path / "grid.yaml", runs)
    plan_json(harness, ONE, tmp_path / "grid-2.yaml", runs)
    assert run_folder(harness("plan", tmp_path / "grid.yaml", "-o", runs)) == str(runs / "grid")


@pytest.mark.quick
def test_tasks_are_listed(harness: Harness) -> None:
    outcome = harness("tasks")
    assert outcome.code == 0
    for name, target in (("coco_captions", "tasks.captioning:CocoCaptions"), ("scenes", "tasks.scenes:Scenes")):
        assert re.search(rf"^{name}  \S", outcome.out, re.MULTILINE)
        assert re.search(rf"from: context-peft-harness \S+, {target}", outcome.out)
    assert outcome.out.count("contexts: image, text") >= 2
    assert "    train_examples: integer ≥ 1, ≤ 10,000,000 (default 2048)\n" in outcome.out


def test_built_in_backbones_are_listed(harness: Harness) -> None:
    assert harness("backbones", "list").out.split() == [
        "builtin/tiny-audio",
        "builtin/tiny-llama",
        "builtin/tiny-vision",
    ]


def test_a_command_that_does_not_exist(harness: Harness) -> None:
    outcome = harness("rnu")
    assert outcome.code == 2
    assert "No such command 'rnu'" in outcome.err


BROKEN_TASK = """
from harness import Example, Part, Task, TaskConfig


class BrokenConfig(TaskConfig):
    where: str


class Broken(Task):
    contexts = ("question", "answer")
    modalities = {}
    metrics = ("exact_match",)
    Config = BrokenConfig

    def __init__(self, config):
        super().__init__(config)
        self.at("making")

    @classmethod
    def sample(cls, folder):
        return {}

    def prepare(self):
        self.at("prepare")

    def examples(self, split):
        self.at("examples")
        return [Example(f"{split} 1", (Part("question", "a"),), ("b",))]

    def at(self, place):
        if self.config.where == place:
            raise KeyError("[/red] no such word")
"""


@pytest.mark.parametrize(
    ("where", "step"),
    [
        ("making", ""),
        ("prepare", "preparation of task broken; "),
        ("examples", "task broken, split train; "),
    ],
)
def test_an_error_of_a_plugin_before_any_trial_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, step: str
) -> None:
    """Through the entry point itself, which makes a message of it."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "added", [])
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text(BROKEN_TASK, encoding="utf-8")
    task = f"plugins: [broken.py]\ntask: {{name: broken, where: {where}}}\n"
    Path("e.yaml").write_text(task + "adapters: [{method: lora, learning_rate: 1e-3}]\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["harness", "run", "e.yaml"])
    with pytest.raises(SystemExit, match=r"^2$"):
        app.main()
    line = BROKEN_TASK.splitlines().index('            raise KeyError("[/red] no such word")') + 1
    place = f"plugin broken (broken.py), {tmp_path}/broken.py:{line} in at)"
    assert capsys.readouterr().err.endswith(f"error: KeyError: '[/red] no such word' ({step}{place}\n")
