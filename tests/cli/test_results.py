"""The commands that read results: what they print and write; wrong input gives one message and exit code 2."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from harness.cli import app, results
from harness.core.record import PlannedTrial, TrialRecord, read_run
from harness.core.revisions import git_revision
from harness.sweep.lock import exclusive
from results.leaderboard.table import build_leaderboard
from results.report import write_exports
from tests.support.cli import Harness, Outcome, caller
from tests.support.runs import fake_plan, write_run

COMMANDS = [
    "run",
    "plan",
    "launch",
    "status",
    "logs",
    "stop",
    "prune",
    "profile",
    "doctor",
    "sync",
    "recommend",
    "report",
    "compare",
    "attention",
    "export",
    "predict",
    "leaderboard",
    "tasks",
    "adapters",
    "prepare",
]


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Harness:
    """Runs ``harness …`` in this process, in an empty folder, 80 characters wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "console", Console(width=80))

    return caller(monkeypatch, capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished synthetic run, ``runs/grid``, where the commands look for it; the path is relative."""
    write_run(tmp_path / "runs" / "grid", fake_plan(seeds=(0, 1, 2), settings=("",)))
    return Path("runs/grid")


def assert_refused(outcome: Outcome, says: str) -> None:
    assert outcome.code == 2
    assert re.search(says, outcome.err)
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err


def test_help_lists_every_command_without_loading_what_computes() -> None:
    code = (
        "import sys; sys.argv = ['harness', '--help']\nfrom harness.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'scipy', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == "[]\n"
    listed = re.findall(r"^│ (\w+) ", done.stdout, re.MULTILINE)
    assert listed == [*COMMANDS, "check", "score", "backbones"]


def test_the_version_is_told_without_slow_imports(harness: Harness) -> None:
    script = (
        "import sys; sys.argv = ['harness', '--version']\n"
        "from harness.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    revision = git_revision(Path(app.__file__).parent)
    assert done.stdout == f"harness {version('context-peft-harness')} ({revision})\n"
    assert harness("--version").out == done.stdout


def test_a_version_without_a_checkout_has_no_commit(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.core.revisions.git_revision", lambda _: None)
    assert harness("--version").out == f"harness {version('context-peft-harness')}\n"


def test_report_of_one_run_and_of_several(harness: Harness, run: Path, tmp_path: Path) -> None:
    outcome = harness("report", run)
    assert (outcome.code, outcome.err) == (0, "")
    written = [Path(line) for line in outcome.out.splitlines()]
    assert {path.name for path in written} >= {"index.html", "leaderboard.json", "trials.parquet"}
    assert all(path.is_file() and path.parent == run / "report" for path in written)
    other = write_run(tmp_path / "other", fake_plan(seeds=(3, 4), settings=("",)))
    assert_refused(harness("report", run, other), "--output")
    outcome = harness("report", run, other, "--output", "joined")
    assert outcome.code == 0
    assert Path("joined/index.html").is_file()


def test_reports_that_cannot_be_made(harness: Harness, run: Path) -> None:
    assert_refused(harness("report", "runs/gird"), r"runs/gird: no such folder; .* did you mean '.*runs/grid'")
    assert_refused(harness("report", run, run, "-o", "joined"), r"runs/grid: this run folder is given twice")
    assert_refused(harness("report", run, "-o", run / "plan.json"), r"--output: runs/grid/plan\.json is a file")
    assert_refused(
        harness("report", "grid", "--from", "http://x"), r"--from: found 'http://x'; allowed: mlflow: followed by"
    )
    assert_refused(
        harness("report", "grid", "--from", "mlflow:"), r"--from: found 'mlflow:'; allowed: mlflow: followed by"
    )
    assert_refused(harness("report", "grid", "--from", "mlflow:http://x"), r"--from: name a folder .* --output")
    assert harness("report").code == 2


@pytest.mark.parametrize("content", [None, "{", '{"trials": []}'], ids=["no folder", "broken plan", "another schema"])
def test_a_report_of_another_folder_is_refused(harness: Harness, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        (folder / "plan.json").write_text(content, encoding="utf-8")
    assert_refused(harness("report", folder), re.escape(str(folder)))


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(f"harness.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, f"harness.{name}", module)


def test_report_from_a_tracking_server(harness: Harness, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch_run(uri: str, name: str, into: Path) -> Path:
        asked.append((uri, name, into))
        return run

    replace_module(monkeypatch, "tracking.fetch", fetch_run=fetch_run)
    outcome = harness("report", "grid", "--from", "mlflow:http://host:5000", "--output", "fetched")
    assert (outcome.code, outcome.err) == (0, "")
    assert asked == [("http://host:5000", "grid", Path("fetched/runs"))]
    assert Path("fetched/leaderboard.json").is_file()


def test_attention_is_recorded_before_the_report(harness: Harness, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record_attention(folder: Path, trials: Any, examples: int, console: Console) -> None:
        assert not (run / "report").exists()
        console.print(f"recorded {folder} {list(trials)} {examples}")

    replace_module(monkeypatch, "cli.attention", record_attention=record_attention)
    outcome = harness("attention", run, "--trial", "a", "--trial", "b", "--examples", "3")
    assert outcome.out.splitlines() == ["recorded runs/grid ['a', 'b'] 3", "runs/grid/report/index.html"]


def test_compare_names_the_run_and_says_what_is_shown(harness: Harness, run: Path, tmp_path: Path) -> None:
    old = write_run(tmp_path / "runs" / "older", fake_plan(settings=("",)))
    os.utime(old / "plan.json", (0, 0))
    outcome = harness("compare", "ia3 agn", "lora r=4 spec")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("runs/grid\nA = IA3 agnostic\nB = LoRA r=4 specific\n")
    assert re.search(r"CIDEr +0\.\d+ +1\.\d+ +−0\.\d+ \[−0\.\d+, −0\.\d+\] +seeds +< 0\.001 +3", outcome.out)
    assert "CIDEr: IA3 agnostic is worse than LoRA r=4 specific by 0.6" in outcome.out
    assert "Holm-corrected over the 28 pairs of rows, for each metric" in " ".join(outcome.out.split())
    assert max(map(len, outcome.out.splitlines())) <= 80
    several = harness("compare", "ia3 agn", "full", "--run", old, "--run", run, "--metric", "cider")
    assert several.code == 0
    assert several.out.startswith(f"{old}, runs/grid\n")


def test_comparisons_that_cannot_be_made(harness: Harness, run: Path) -> None:
    assert_refused(harness("compare", "lora", "full"), "'lora' is ambiguous: 'LoRA r=4 agnostic', 'LoRA r=4 specific'")
    assert_refused(harness("compare", "IA3 agnostik", "full"), "did you mean 'IA3 agnostic'")
    assert_refused(harness("compare", "none", "full", "--metric", "cidre"), "did you mean 'cider'")
    assert_refused(harness("compare", "none", "full", "--run", "nowhere"), "nowhere: no such folder")
    assert_refused(harness("compare", "none", "full", "--setting", "examples=7"), "unknown setting 'examples=7'")


@pytest.mark.parametrize("command", [("compare", "none", "full"), ("status",)])
def test_without_a_run_one_is_asked_for(harness: Harness, command: tuple[str, ...]) -> None:
    assert_refused(harness(*command), r"runs: no run folder here; name one, such as runs/quickstart")


def leaderboard_json(run: Path) -> Path:
    return write_exports(build_leaderboard(read_run(run)), Path("old"))[3]


def test_leaderboard_diff(harness: Harness, run: Path) -> None:
    path = leaderboard_json(run)
    content = json.loads(path.read_text(encoding="utf-8"))
    row = next(row for row in content["rows"] if row["label"] == "IA3" and row["grouping"] == "agnostic")
    scores = row["metrics"]["cider"]["by_seed"]
    row["metrics"]["cider"]["by_seed"] = {seed: score + 0.5 + 0.001 * int(seed) for seed, score in scores.items()}
    row["rank"] = [1, 2]
    content["rows"] = [row for row in content["rows"] if row["method"] != "bitfit"]
    Path("new.json").write_text(json.dumps(content), encoding="utf-8")
    outcome = harness("leaderboard", "diff", path, "new.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("unchanged") == 5
    assert re.search(r"IA3 agnostic .*\+0\.501 \[\+0\.\d+, \+0\.\d+\] +better", outcome.out)
    assert re.search(r"IA3 agnostic .*→ 1–2", outcome.out)
    assert re.search(r"BitFit +0\.\d+ +– +removed +\S+ → –\s+specific", outcome.out)
    back = harness("leaderboard", "diff", "new.json", path)
    assert re.search(r"BitFit +– +0\.\d+ +new +– → \S+\s+specific", back.out)
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_leaderboards_that_cannot_be_compared(harness: Harness, run: Path, tmp_path: Path) -> None:
    path = leaderboard_json(run)
    content = json.loads(path.read_text(encoding="utf-8"))
    wrong = {
        "missing.json": (None, r"missing\.json: no such file"),
        "text.json": ("no json", r"text\.json: not a leaderboard\.json of schema version 2"),
        "version.json": (json.dumps(content | {"schema_version": 1}), r"version\.json: .*schema_version"),
        "primary.json": (json.dumps(content | {"primary_metric": "bleu_4"}), r"different primary metrics"),
    }
    for name, (text, says) in wrong.items():
        if text is not None:
            Path(name).write_text(text, encoding="utf-8")
        assert_refused(harness("leaderboard", "diff", path, name), says)
    assert_refused(harness("leaderboard", "diff", tmp_path, path), re.escape(str(tmp_path)))
    assert_refused(harness("leaderboard", "diff", path, path, "--metric", "cidre"), "did you mean 'cider'")


def test_leaderboard_show_prints_the_columns_of_choice(harness: Harness, run: Path) -> None:
    outcome = harness("leaderboard", "show", run, "--columns", "rank, method,bleu_4,trainable")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[1].split() == ["rank", "method", "BLEU-4", "trainable"]
    written = harness("leaderboard", "show", "--format", "latex", "--columns", "method,cider,difference,verdict").out
    assert re.search(
        r"^Method & CIDEr & \$\\Delta\$ CIDEr from Full fine-tuning & Verdict \\\\$", written, re.MULTILINE
    )
    assert re.search(
        r"^Full fine-tuning & \\textbf\{1\.\d+\} \[\S+, \S+\] & reference & reference ", written, re.MULTILINE
    )
    assert "Ranks are" not in written  # in the caption: there is no such column
    table = harness("leaderboard", "show", "--format", "markdown", "--columns", "method,total").out
    assert "| Method | Total parameters |\n| --- | ---: |\n| Full fine-tuning | " in table
    everything = list(csv.DictReader(io.StringIO(harness("leaderboard", "show", run, "-f", "csv").out)))
    assert [line["label"] for line in everything][:2] == ["Full fine-tuning", "LoRA r=4"]


def test_columns_that_do_not_exist(harness: Harness, run: Path) -> None:
    show = ("leaderboard", "show", run, "--columns")
    assert_refused(harness(*show, "rank,metod"), r"--columns: no column 'metod'; allowed: .*did you mean 'method'")
    assert_refused(harness(*show, "cider,rank,cider"), r"--columns: 'cider' is given twice")
    assert_refused(harness(*show, ","), r"--columns: no column is named; allowed: adapter, badges")
    assert_refused(harness(*show, "rank", "--format", "csv"), r"--columns: not for csv, which has every column")
    assert_refused(harness("leaderboard", "show", "nowhere"), "nowhere: no such folder")


def unfinished(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
    """Of 24 trials: 12 failed, 3 without a record, 9 finished in 20 s each."""
    if trial.method in {"ia3", "bitfit"}:
        return record.model_copy(update={"status": "out_of_memory", "reason": "[cuda] too large", "metrics": {}})
    return None if trial.method == "none" else record.model_copy(update={"wall_time_s": 20.0})


def test_status_of_a_run_in_progress(harness: Harness, run: Path) -> None:
    write_run(run, fake_plan(seeds=(0, 1, 2), settings=("",)), unfinished)
    for record in run.glob("trials/none-*/record.json"):
        record.unlink()
        (record.parent / "log.txt").write_text("", encoding="utf-8")
    old = run / "trials" / "none-all-00-s0-0" / "log.txt"
    os.utime(old, (0, 0))  # of an earlier call
    with exclusive(run):
        out = harness("status").out
    assert out.startswith(
        "runs/grid: synthetic\n9 of 24 trials finished, 12 out of memory, 2 running, 1 waiting\n"
        "20.0 s a trial, 2 at a time: roughly 30.0 s left\nrunning: none seed 1\nrunning: none seed 2\n"
    )
    assert len(re.findall(r"^out of memory: \w+ \w+ seed \d: \[cuda\] too large$", out, re.MULTILINE)) == 10
    assert "… and 2 more that did not finish" in out
    assert re.search(r"1(–\d)? +Full fine-tuning +1\.\d+ ", out)
    idle = harness("status", run).out
    assert "0 running, 3 waiting\nno harness is running in this folder" in idle
    with exclusive(run):  # released
        pass


def test_status_of_a_large_run_says_the_same_without_the_leaderboard(
    harness: Harness, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(run, fake_plan(seeds=(0, 1, 2), settings=("",)), unfinished)
    next(run.glob("trials/none-*/record.json")).write_text("{", encoding="utf-8")
    whole = harness("status").out
    monkeypatch.setattr(results, "LARGE", 23)
    monkeypatch.setattr("harness.core.record.read_record", lambda _: pytest.fail("a whole record was read"))
    brief = harness("status").out
    head, _, rest = brief.partition("leaderboard: harness leaderboard show runs/grid\n")
    assert whole.startswith(head)
    assert "11 of 24 trials finished, 12 out of memory, 0 running, 1 waiting" in head
    assert "could not be read: " in head
    assert rest == ""


def test_status_names_what_cannot_be_read_and_writes_nothing(harness: Harness, run: Path) -> None:
    broken = next(run.glob("trials/*/record.json"))
    broken.write_text("{", encoding="utf-8")
    before = sorted(run.rglob("*"))
    outcome = harness("status")
    assert outcome.code == 0
    assert f"could not be read: {broken}: not a trial record" in outcome.out
    assert sorted(run.rglob("*")) == before
    assert_refused(harness("status", "nowhere"), "nowhere: no such folder")
