"""The modality and task of examples/plugin_task: held to the contract as a file, and run as an installed package."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from adapters.registry import ADAPTERS
from harness.check.plugins import check_plugins
from harness.core.errors import UserError
from harness.core.record import read_run
from tasks.registry import METRICS, MODALITIES, TASKS

pytestmark = pytest.mark.timeout(1200)  # a whole run with Ray, on a busy machine too

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin_task"
FILE = EXAMPLE / "point_clouds.py"
HARNESS = Path(sys.executable).with_name("harness")
# The metric is a plugin too, in a file: both ways of naming one reach the worker.
EXPERIMENT = """
plugins: [length.py]
task: {{name: clouds, root: {root}}}
adapters: [{{method: bitfit, learning_rate: 1e-2}}]
budget: {{examples: 8}}
optimizer: {{per_device_train_batch_size: 8}}
eval: {{max_new_tokens: 4, metrics: [length]}}
"""
METRIC = """
from harness import Metric, Scores

class Length(Metric):
    labels = {"words": "Words"}

    def score(self, predictions, references):
        rows = {key: {"words": float(len(text.split()))} for key, text in predictions.items()}
        return Scores({"words": sum(row["words"] for row in rows.values()) / len(rows)}, rows)
"""
THINGS = list(enumerate(("ball", "box", "plate", "pencil")))


@pytest.fixture(autouse=True)
def no_plugins_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (TASKS, MODALITIES, METRICS, ADAPTERS):
        monkeypatch.setattr(registry, "added", [])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the package was installed into; without a network, and the checkout is left as it is."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "plugin_task")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", folder, source], check=True, timeout=120)
    return folder


def call(installed: Path, *command: str | Path, cwd: Path) -> str:
    """What a command prints in an environment where the package is installed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COLUMNS"))}
    env |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, capture_output=True, timeout=900, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_imports_the_harness_by_its_front_door() -> None:
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {str(module) for module in modules if str(module).partition(".")[0] in ("harness", "tasks", "adapters")}
    assert ours == {"harness"}


def test_as_a_file_it_passes_the_check() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert check_plugins(str(FILE), console), console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"at least one point"),
        ("1 2\n", r"line 1: found '1 2'; allowed: three numbers"),
        ("1 2 3\na b c\n", r"line 2: found 'a b c'"),
        ("1 2 nan\n", r"of finite numbers"),
    ],
)
def test_a_file_that_is_no_cloud_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "cloud.xyz").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"cloud\.xyz: .*{words}"):
        MODALITIES.load(f"{FILE}:PointCloud")().load(tmp_path / "cloud.xyz")


def test_features_are_those_of_the_shape_however_it_is_turned() -> None:
    encoder = MODALITIES.load(f"{FILE}:PointCloud")().encoder("builtin/distances")
    points_P3 = np.random.default_rng(0).normal(size=(70, 3))
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    plain_ND, turned_ND = encoder.encode([points_P3, 3.0 * points_P3 @ turn + 5.0])
    assert plain_ND.shape == (3, 24)  # 32 + 32 + 6 points
    assert plain_ND.square().sum(1).tolist() == pytest.approx([2.0] * 3)  # two histograms of length 1
    assert np.abs(plain_ND.numpy() - turned_ND.numpy()).max() < 1e-6
    other_ND, _ = encoder.encode([points_P3**3, points_P3])
    assert np.abs(plain_ND.numpy() - other_ND.numpy()).max() > 0.1


@pytest.mark.e2e
def test_installed_it_is_checked_and_trained_in_a_worker(installed: Path, tmp_path: Path) -> None:
    checked = call(installed, HARNESS, "check", "point-clouds", cwd=tmp_path)
    assert "task clouds  point-clouds 0.1.0, point_clouds:Clouds" in checked.replace("\n", "")
    assert "modality point_cloud  point-clouds 0.1.0, point_clouds:PointCloud" in checked.replace("\n", "")
    assert "27 checks passed, 0 failed" in checked

    clouds = tmp_path / "clouds"
    TASKS.load(f"{FILE}:Clouds").sample(clouds)
    (tmp_path / "length.py").write_text(METRIC, encoding="utf-8")
    (tmp_path / "clouds.yaml").write_text(EXPERIMENT.format(root=clouds), encoding="utf-8")
    call(installed, HARNESS, "run", "clouds.yaml", cwd=tmp_path)
    run = read_run(tmp_path / "runs" / "clouds")
    (record,) = run.records.values()
    assert record.status == "finished"
    assert {"perplexity", "perplexity_wrong_input", "exact_match", "words"} <= set(record.metrics["test"])
    assert (record.answers[""].texts, record.answers[""].distinct_references) == (4, 4)
    previews = list((tmp_path / "runs" / "clouds" / "previews").iterdir())
    assert [path.suffix for path in previews] == [".png"] * 4
    rows = pd.read_parquet(tmp_path / "runs" / "clouds" / "trials" / record.trial_id / "examples.parquet")
    assert sorted(rows["example_id"]) == sorted(
        f"{s}/{thing}-{i:03}" for s in ("validation", "test") for i, thing in THINGS
    )
