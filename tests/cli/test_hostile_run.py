"""Run folders made by an attacker: nothing of them runs, is followed out of the folder, or takes the terminal over."""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusters.launch.job import FOLDER
from harness.core.errors import UserError
from harness.core.inside import check_no_links
from harness.core.record import read_run
from harness.core.storage import Copy, Folder
from results.report import write_report
from tests.support.cli import Harness, assert_refused, caller
from tests.support.runs import draw_pictures, fake_plan, write_examples, write_run

OUTSIDE = ("../../escaped", "/tmp/escaped", "..", ".", "a/b", "a\\b", "a\u0000b", "")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Harness:
    monkeypatch.chdir(tmp_path)
    return caller(monkeypatch, capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", fake_plan())


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_trial_id_that_leads_elsewhere_is_refused(name: str, run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    decision = {"row": "r", "name": "n", "epoch": 1, "candidates": [], "out": [name]}
    (run / "halving.json").write_text(json.dumps({"decisions": [decision]}), encoding="utf-8")
    assert "halving.json: not the decisions of halving: decisions.0.out.0: String should match" in str(
        read_run(run).broken
    )
    plan["trials"][0]["trial_id"] = name
    (run / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(ValueError, match=r"not the plan of a run: trials\.0\.trial_id: String should match"):
        read_run(run)


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    trials = sorted(path.name for path in (run / "trials").iterdir())
    (run / "trials" / trials[0]).rename(elsewhere)
    (run / "trials" / trials[0]).symlink_to(elsewhere)
    record = run / "trials" / trials[1] / "record.json"
    record.rename(tmp_path / "secret.json")
    record.symlink_to(tmp_path / "secret.json")
    found = read_run(run)
    assert sorted(found.records) == trials[2:]
    assert [message.partition(": ")[2] for message in found.broken] == [
        "a link, which is not followed", "not a trial record: a link, which is not followed"
    ]  # fmt: skip
    with pytest.raises(UserError, match=rf"{trials[0]}: a link, so files would be written elsewhere; remove it"):
        check_no_links(run)


@pytest.mark.parametrize("name", ["report", "trials", "previews", "launch", "ray"])
def test_nothing_is_written_through_a_link(name: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    if (run / name).exists():
        (run / name).rename(tmp_path / "old")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name}: a link, so files would be written elsewhere"):
        write_report([run])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_without_an_end_is_not_read(run: Path) -> None:
    os.mkfifo(run / "profile.json")
    assert f"{run}/profile.json: not the profile of a run: not a file" in read_run(run).broken


def test_a_file_that_is_too_large_or_too_deep_is_one_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.core.schema.MOST_BYTES", 10**6)
    deep, large = sorted(run.glob("trials/*/record.json"))[:2]
    deep.write_text("[" * 500_000, encoding="utf-8")
    large.write_text(large.read_text(encoding="utf-8") + " " * 10**6, encoding="utf-8")
    first, second = read_run(run).broken
    assert "not a trial record: Invalid JSON: recursion limit exceeded" in first
    assert "bytes; allowed: at most 1,000,000" in second


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(number: str, run: Path) -> None:
    path = sorted(run.glob("trials/*/record.json"))[0]
    content = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(content | {"wall_time_s": "HERE"}).replace('"HERE"', number)
    path.write_text(text, encoding="utf-8")
    (message,) = read_run(run).broken
    assert "not a trial record: wall_time_s: Input should be a finite number" in message


RECORDS = (
    {"kind": "kuberay", "job_id": "--kubeconfig=evil", "address": "default"},
    {"kind": "ray_up", "job_id": "x", "address": "cluster.yaml"},
    {"kind": "slurm", "job_id": "1", "log": "/etc/passwd"},
    {"kind": "ray", "job_id": "x", "address": "http://attacker"},
    {"kind": "local", "job_id": "1", "log": "/etc/passwd"},
)


@pytest.mark.parametrize("record", RECORDS, ids=[record["kind"] for record in RECORDS])
def test_nothing_is_called_that_a_foreign_launch_names(
    record: dict[str, str], run: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(command: object, **_: object) -> None:
        raise AssertionError(f"called {command}")

    monkeypatch.setattr(subprocess, "run", called)
    (run / FOLDER).mkdir()
    content = {"profile": "p", "host": os.uname().nodename, "submitted_at": "2026-01-01T00:00:00+00:00"} | record
    (run / FOLDER / "launch.json").write_text(json.dumps(content), encoding="utf-8")
    assert f"{record['kind']} job {record['job_id']}, state unknown here" in harness("status", run).out
    assert "the driver is asked to end" in harness("stop", run).out
    refused = harness("logs", run)
    assert (refused.code, "root:" in refused.out) == (2, False)
    assert "launched by somebody else, or with another HARNESS_CACHE" in refused.err


def test_a_run_folder_cannot_say_that_it_is_the_copy_of_a_url(run: Path, harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine", encoding="utf-8")
    there = f"file://{tmp_path}/there/run"
    known = {"../victim": ["", 4, 0]}
    (run / ".storage.json").write_text(json.dumps({"url": there, "files": known}), encoding="utf-8")
    assert harness("report", run).code == 0
    assert not (tmp_path / "there").exists(), "nothing was pushed"
    Copy(Folder(there), run).pull()
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "mine"


def test_a_refusal_has_one_message(run: Path, harness: Harness, tmp_path: Path) -> None:
    (run / "plan.json").write_text("[" * 10**6, encoding="utf-8")
    outcome = harness("status", run)
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err


def test_what_is_printed_does_not_command_the_terminal(harness: Harness, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\x9b1m"
    plan = fake_plan(methods=[(f"LoRA {evil}", "lora", "agnostic", 45_000, 0.8), ("full", "full", "", 561_312, 1.0)])
    run = write_run(tmp_path / "run", plan, lambda _, r: r.model_copy(update={"status": "failed", "reason": evil}))
    log = run / "trials" / plan.trials[0].trial_id / "log.txt"
    log.write_text(f"epoch 1 {evil}\r\nepoch 2\n", encoding="utf-8")
    commands = (("status", run), ("logs", run, plan.trials[0].trial_id), ("status", "no\x1b[2J"), ("report", run))
    said = [harness(*command) for command in commands]
    for outcome in said:
        assert not set("\x1b\x07\x9b\u202e") & set(outcome.out + outcome.err)
    assert "epoch 1 \\x1b]0;owned" in said[1].out
    assert "\\x1b[2J" in said[2].err


HUGE = {
    "integers": {"best_epoch": 10**30, "workers": 10**40, "seed": 10**25, "parameters": 10**40, "memory": 10**40},
    "numbers": {"wall_time_s": 1.7e308, "throughput": 1.7e308, "metrics": {"test": {"cider": 1.7e308}}},
}


@pytest.mark.parametrize("kind", HUGE)
def test_numbers_as_large_as_they_can_be(kind: str, harness: Harness, run: Path) -> None:
    for path in run.glob("trials/*/record.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, value in HUGE[kind].items():
            nested = isinstance(content[key], dict) and not isinstance(value, dict)
            content[key] = dict.fromkeys(content[key], value) if nested else value
        path.write_text(json.dumps(content), encoding="utf-8")
    for command in ("status", "report"):
        assert harness(command, run).code in (0, 2)


def test_a_small_file_that_would_fill_the_memory_is_named(
    harness: Harness, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows with the same text of 10 kB each, 10 GB, in a file of some kB."""
    monkeypatch.setattr("harness.core.parquet.MOST_BYTES", 2**28)
    trial = read_run(run).plan.trials[-1].trial_id
    rows, text = 10**6, "x" * 10_000
    texts = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), [text])
    test = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), ["test"])
    path = run / "trials" / trial / "examples.parquet"
    columns = {"split": test} | dict.fromkeys(("example_id", "prediction", "references"), texts)
    pq.write_table(pa.table(columns | {"cider": pa.repeat(pa.scalar(1.0), rows)}), path)
    assert path.stat().st_size < 10**5
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert harness("report", run).code == 0
    assert "reading it takes more than 0.25 GiB" in (run / "report/index.html").read_text(encoding="utf-8")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_an_experiment_whose_aliases_multiply_is_refused(harness: Harness, tmp_path: Path) -> None:
    lines = ["name: x", "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert_refused(harness("plan", "bomb.yaml"), "bomb.yaml: more than 100,000 values, each alias")


def test_texts_of_a_run_are_texts_in_its_report(harness: Harness, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"</td></script>"
    plan = fake_plan(
        methods=[(f"LoRA {evil}", "lora", evil.replace("/", "|"), 45_000, 0.8), ("full", "full", "", 561_312, 1.0)],
        settings=(f"examples={evil}".replace("/", "|"),), experiment=evil, experiment_file=evil,
    )  # fmt: skip
    run = write_run(tmp_path / "run", plan, lambda t, r: r.model_copy(update={"warnings": (evil,), "device": evil}))
    for trial in plan.trials:
        write_examples(run, trial.trial_id, [evil] * 3, draw_pictures(tmp_path / "pictures", 3))
    assert harness("report", run).code == 0
    page = (run / "report/index.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    for harmful in ("<script>alert", "<img src=x", "<\\/script>alert"):
        assert harmful not in page


@pytest.mark.parametrize(
    "inputs",
    [
        "[" * 10**5,
        "{}",
        "[1]",
        '[["image", "file", "a\\u0000b.wav"]]',
        '[["image", "file", 7]]',
        '[["a", "file", "x"], 3]',
    ],
)
def test_inputs_that_no_trial_writes_are_a_note(inputs: str, harness: Harness, run: Path) -> None:
    for trial in read_run(run).plan.trials:
        write_examples(run, trial.trial_id, ["a"] * 2, run, inputs=[None, inputs, inputs])
    assert harness("report", run).code == 0


def test_a_report_has_no_other_files_of_this_machine(harness: Harness, run: Path, tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text("PRIVATE-KEY", encoding="utf-8")
    (tmp_path / "key.wav").write_text("PRIVATE-KEY", encoding="utf-8")
    (run / "previews").mkdir()
    (run / "previews" / "link.txt").symlink_to(tmp_path / "key.txt")
    inputs = json.dumps([["image", "file", str(tmp_path / "key.wav")], *[["image", "file", "none.bin"]] * 3])
    previews = json.dumps([None, "../../key.txt", str(tmp_path / "key.txt"), "link.txt"])
    for trial in read_run(run).plan.trials:
        columns = {"inputs": [None, inputs, inputs], "previews": [None, previews, previews]}
        write_examples(run, trial.trial_id, ["a"] * 2, run, **columns)
    assert harness("report", run).code == 0
    page = (run / "report/index.html").read_text(encoding="utf-8")
    assert "key.wav: not the sound that its name says" in page
    for secret in ("PRIVATE-KEY", base64.b64encode(b"PRIVATE-KEY").decode()[:14]):
        assert secret not in page
