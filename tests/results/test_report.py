"""The written report: one self-contained page, and the files next to it (synthetic records)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harness.core.errors import UserError
from harness.core.record import PlannedTrial, TrialRecord, read_run, write_record
from results.leaderboard.table import build_leaderboard
from results.page.gallery import build_gallery
from results.page.page import library
from results.page.provenance import build_provenance
from results.page.search import search_lines
from results.report import write_report
from tests.support.pages import Page
from tests.support.runs import METHODS, draw_pictures, fake_plan, write_examples, write_run

pytestmark = pytest.mark.quick

EVIL = '<script>alert("caption")</script>'


def without_libraries(page: str) -> str:
    """What the harness wrote: the code of the plotting libraries has tags and addresses of its own."""
    for name in ("d3", "plot"):
        page = page.replace(library(name), "")
    return page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete synthetic run with pictures; the captions of the first method contain HTML."""
    plan = fake_plan()
    write_run(tmp_path, plan)
    pictures = draw_pictures(tmp_path / "pictures", 12)
    for trial in plan.trials:
        caption = EVIL if trial.method == "none" else f"{trial.label} sees a circle"
        write_examples(tmp_path, trial.trial_id, [f"{caption} {index}" for index in range(12)], pictures)
    return tmp_path


def test_the_page_is_one_file_without_network(run: Path) -> None:
    paths = write_report([run])
    text = paths.html.read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    loaded = [address for address in page.addresses if not address.startswith("#")]
    files = {path.name for path in paths.exports}
    assert files <= set(loaded)
    assert all(address.startswith("data:image/") for address in loaded if address not in files)
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", without_libraries(text))
    assert "default-src 'none'" in text
    assert paths.html.stat().st_size < 1_000_000


def test_ids_are_unique_and_every_inner_link_has_its_target(run: Path) -> None:
    page = Page(write_report([run]).html.read_text())
    assert len(page.ids) == len(set(page.ids))
    inner = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inner <= set(page.ids)
    sections = {"rules", "contexts", "efficiency", "curves", "input", "search", "samples"}
    assert sections | {"provenance"} <= inner
    assert {f"trial-{trial.trial_id}" for trial in fake_plan(seeds=(0,)).trials} <= inner


def test_captions_and_labels_are_data(run: Path) -> None:
    plan = fake_plan()
    labels = {"IA3": "<b>IA3</b> $x$ a|b"}
    trials = tuple(trial.model_copy(update={"label": labels.get(trial.label, trial.label)}) for trial in plan.trials)
    (run / "plan.json").write_text(plan.model_copy(update={"trials": trials}).model_dump_json())
    text = write_report([run]).html.read_text()
    assert Page(text).tags.count("script") == 5  # theme, data, two libraries, the page's own
    assert "&lt;script&gt;alert(&#34;caption&#34;)&lt;/script&gt;" in text
    assert "<b>" not in without_libraries(text)
    assert "&lt;b&gt;IA3&lt;/b&gt; $x$ a|b" in text


def test_the_same_records_give_the_same_bytes_wherever_they_are_written(run: Path, tmp_path: Path) -> None:
    """Only the page's links to the files of trials depend on where it is."""
    paths = write_report([run]).all
    assert {path.parent for path in paths} == {run / "report"}
    first = {path.name: path.read_bytes() for path in paths}
    assert set(first) == {
        "index.html",
        "trials.parquet",
        *(f"leaderboard.{kind}" for kind in ("md", "csv", "tex", "json")),
    }
    assert first == {path.name: path.read_bytes() for path in write_report([run]).all}
    elsewhere = {path.name: path.read_bytes() for path in write_report([run], tmp_path / "a" / "b" / "c").all}
    page = elsewhere["index.html"].replace(b"../../../trials/", b"../trials/")
    assert elsewhere | {"index.html": page} == first


def test_trials_link_to_the_files_that_they_have(run: Path) -> None:
    page = write_report([run]).html
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[0])
    trials = [trial for row in data["rows"] for trial in row["trials"]]
    assert {trial["id"] for trial in trials} == {trial.trial_id for trial in fake_plan().trials}
    for trial in trials:
        folder = (page.parent / trial["folder"]).resolve()
        assert folder == run / "trials" / trial["id"]
        linked = {data["files"][number][0] for number in trial["files"]}
        assert linked == {path.name for path in folder.iterdir()} == {"record.json", "examples.parquet"}


def test_several_runs_need_a_folder_and_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("report", "other"))
    for record in other.glob("trials/*/record.json"):
        trial_id = f"other-{record.parent.name}"
        record.write_text(record.read_text().replace(record.parent.name, trial_id))
        record.parent.rename(record.parent.with_name(trial_id))
    plan = (other / "plan.json").read_text()
    (other / "plan.json").write_text(re.sub(r'"trial_id":"', '"trial_id":"other-', plan))
    with pytest.raises(UserError, match=r"2 run folders .* \(--output\)"):
        write_report([run, other])
    text = write_report([run, other], tmp_path / "both").html.read_text()
    assert Page(text).open == []
    assert f"<dt>Run folders</dt><dd>{run}</dd>" in text
    assert f"<dt></dt><dd>{other}</dd>" in text


def test_failures_broken_and_foreign_records_are_named(run: Path) -> None:
    plan = fake_plan()
    record = read_run(run).records[plan.trials[0].trial_id]
    failed = record.model_copy(update={"status": "failed", "reason": "loss is NaN <at> step 7", "metrics": {}})
    (run / "trials" / record.trial_id / "record.json").write_text(failed.model_dump_json())
    foreign = run / "trials" / "older" / "record.json"
    foreign.parent.mkdir()
    foreign.write_text(record.model_copy(update={"trial_id": "older"}).model_dump_json())
    (run / "trials" / plan.trials[1].trial_id / "record.json").write_text("{")
    (run / "trials" / plan.trials[2].trial_id / "examples.parquet").write_bytes(b"not parquet")
    text = write_report([run]).html.read_text()
    assert "loss is NaN &lt;at&gt; step 7" in text
    assert "Record files that could not be read: 1" in text
    assert f"{plan.trials[1].trial_id}/record.json: not a trial record" in text
    assert "Records that the plan does not name: 1" in text
    assert (
        f'Per-example scores that could not be read: 1</h3>\n<ul class="small"><li>{plan.trials[2].trial_id}: ' in text
    )
    assert "Failed, cancelled or unreadable: 2" in text
    assert "Not run" not in text


def test_what_trials_share_is_said_once(run: Path) -> None:
    plan = fake_plan()
    note = "SPICE was not computed: no Java"
    for number, trial in enumerate(plan.trials):
        record = read_run(run).records[trial.trial_id]
        changes = {"warnings": (note, "cut") if number == 3 else (note,), "device": "GPU" if number == 5 else "CPU"}
        write_record(run, record.model_copy(update=changes))
    board = build_leaderboard(read_run(run))
    provenance = build_provenance(board)
    assert [(one.words, one.trials) for one in provenance.notes] == [(note, 16), ("cut", 1)]
    assert [(one.device, one.trials) for one in provenance.environments] == [("CPU", 15), ("GPU", 1)]
    assert [line.notes for line in provenance.trials] == ["1, 2" if number == 3 else "1" for number in range(16)]
    assert [line.environment for line in provenance.trials].index("2") == 5
    text = write_report([run]).html.read_text()
    assert text.count(note) == 1
    assert "(16 of 16 trials)" in text


def test_every_learning_rate_is_shown_with_its_outcome(tmp_path: Path) -> None:
    plan = fake_plan(methods=METHODS[-3:])
    trials = []
    for trial in plan.trials:
        tried = () if trial.method == "lora" else (0.01,)
        for rate in (0.001, 0.01) if trial.method == "lora" else (0.001,):
            changes = {"trial_id": f"{trial.trial_id}-{rate}", "learning_rate": rate, "tried_learning_rates": tried}
            trials.append(trial.model_copy(update=changes))
    failed = next(trial.trial_id for trial in trials if trial.grouping == "specific")

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.trial_id == failed:
            return record.model_copy(update={"status": "failed", "reason": "no", "metrics": {}})
        worse = {"validation": {"perplexity": 5.0 if trial.learning_rate == 0.01 else 4.0}}
        return record.model_copy(update={"metrics": record.metrics | worse})

    write_run(tmp_path, plan.model_copy(update={"trials": tuple(trials)}), change)
    lines = search_lines(build_leaderboard(read_run(tmp_path)))
    found = {(line.row.name, line.rate): (line.seeds, line.chosen, line.outcome) for line in lines}
    assert found == {
        ("LoRA r=4 agnostic", 0.001): ("2/2", True, ""),
        ("LoRA r=4 agnostic", 0.01): ("2/2", False, ""),
        ("LoRA r=4 specific", 0.001): ("1/2", False, "1 failed"),
        ("LoRA r=4 specific", 0.01): ("2/2", True, ""),
        ("Full fine-tuning", 0.001): ("2/2", False, "only candidate"),
        ("Full fine-tuning", 0.01): ("–", False, "declared as tried before"),
    }
    assert '<span class="badge">chosen</span>' in write_report([tmp_path]).html.read_text()


def test_without_a_search_one_sentence_says_so(run: Path) -> None:
    assert search_lines(build_leaderboard(read_run(run))) == []
    assert "The plan has no learning rates." in write_report([run]).html.read_text()


def test_gallery_is_the_same_examples_for_all_and_blind_to_scores(run: Path) -> None:
    gallery = build_gallery(build_leaderboard(read_run(run)))
    assert len(gallery.samples) == 8
    assert {len(sample.outputs) for sample in gallery.samples} == {8}
    assert all(part.kind == "picture" and part.pixelated for sample in gallery.samples for part in sample.inputs)
    first = gallery.samples[0]
    index = int(first.example_id.removeprefix("test-"))
    assert {output.score for output in first.outputs} == {0.1 * index}
    assert {output.seed for output in first.outputs} == {0}

    for trial in fake_plan().trials:
        path = run / "trials" / trial.trial_id / "examples.parquet"
        table = pq.read_table(path)
        scores = [None if score is None else 5 - score for score in table.column("cider").to_pylist()]
        pq.write_table(table.set_column(table.column_names.index("cider"), "cider", [scores]), path)
    again = build_gallery(build_leaderboard(read_run(run)))
    assert [sample.example_id for sample in again.samples] == [sample.example_id for sample in gallery.samples]


def test_unreadable_scores_and_pictures_are_named(run: Path) -> None:
    trial = fake_plan().trials[0]
    (run / "trials" / trial.trial_id / "examples.parquet").write_bytes(b"not parquet")
    for picture in (run / "pictures").iterdir():
        picture.write_bytes(b"not a picture")
    text = write_report([run]).html.read_text()
    assert f"Could not be read: {trial.trial_id}: " in text
    assert "the picture could not be read" in text


def test_runs_without_generated_text_have_no_gallery(run: Path) -> None:
    for path in run.glob("trials/*/examples.parquet"):
        pq.write_table(pq.read_table(path).select(["split", "example_id", "nll", "tokens"]), path)
    assert 'id="samples"' not in write_report([run]).html.read_text()


@pytest.mark.parametrize("kept", ["nothing", "all failed", "one method", "no reference"])
def test_partial_runs_give_a_report(tmp_path: Path, kept: str) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if kept == "all failed":
            return record.model_copy(update={"status": "failed", "reason": "no", "metrics": {}, "parameters": None})
        wanted = {"nothing": False, "one method": trial.method == "ia3", "no reference": trial.method != "full"}
        return record if wanted[kept] else None

    write_run(tmp_path, fake_plan(primary_metric="perplexity", mlflow_uri="sqlite:///x.db"), change)
    page = Page(write_report([tmp_path]).html.read_text())
    assert page.open == []
    assert "unfinished" in page.ids


def test_a_folder_without_a_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no plan\.json here"):
        write_report([tmp_path])
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: not the plan of a run"):
        write_report([tmp_path])
    (tmp_path / "plan.json").write_text(json.dumps({"experiment": 3}))
    with pytest.raises(UserError, match=r"plan\.json: not the plan of a run"):
        write_report([tmp_path])
