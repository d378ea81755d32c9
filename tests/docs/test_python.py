"""docs/python.md: its code runs as a script and has the documented results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import harness

pytestmark = pytest.mark.timeout(1200)  # a whole run with Ray, on a busy machine too

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
(RECOMMEND,) = (block for block in BLOCKS if ".recommend(" in block)
CHECKS = """
results.trials.to_csv("trials.csv")
results.leaderboard.to_csv("leaderboard.csv")
again = harness.run_experiment(experiment)
assert again.folder == results.folder
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The document's blocks on an experiment and its results as one script: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("python")
    body = "\n".join((*BLOCKS[:2], RECOMMEND, CHECKS)).replace("import harness\n", "", 1).replace("\n", "\n    ")
    (folder / "script.py").write_text(f"import harness\n\nif __name__ == '__main__':\n    {body}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.e2e
def test_the_script_runs_the_experiment_once_and_prints_its_results(script: tuple[Path, str]) -> None:
    folder, printed = script
    assert "[3/3]" in printed
    assert "\nTrue\n" in printed
    assert "No row can be recommended" in printed  # so short a training ignores the pictures
    assert "runs/first/report/index.html" in printed
    assert printed.rstrip().endswith("all 3 trials have already finished; nothing to compute")
    assert (folder / "runs" / "first" / "report" / "index.html").is_file()
    experiment = harness.Experiment.from_yaml(folder / "runs" / "first" / "experiment.yaml")  # kept as YAML
    assert (experiment.name, experiment.seeds) == ("first", (0,))


@pytest.mark.e2e
def test_trials_and_leaderboard_are_tables(script: tuple[Path, str]) -> None:
    records, leaderboard = (pd.read_csv(script[0] / f"{name}.csv") for name in ("trials", "leaderboard"))
    assert list(records["label"]) == ["none", "LoRA r=2", "LoRA r=4"]
    assert set(records["status"]) == {"finished"}
    assert sorted(leaderboard["label"]) == sorted(records["label"])
    for label, perplexity in zip(leaderboard["label"], leaderboard["perplexity"], strict=True):
        assert perplexity == pytest.approx(records.set_index("label")["test.perplexity"][label])


def test_the_error_of_the_document_is_the_error() -> None:
    (quoted,) = re.findall(r"`(adapters\[1\]\.rnak: [^`]*)`", TEXT)
    start, _, end = quoted.partition("…")
    adapters = [{"method": "none"}, {"method": "lora", "rnak": 4}]
    with pytest.raises(harness.UserError, match=re.escape(start)) as caught:
        harness.Experiment(task="scenes", adapters=adapters)
    assert str(caught.value).endswith(end)


def test_the_public_names_are_typed_and_loaded_alike() -> None:
    assert sorted(harness._PUBLIC) == harness.__all__
    assert all(getattr(harness, name).__name__ for name in harness.__all__ if name != "Split")
