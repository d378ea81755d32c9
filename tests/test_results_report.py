"""The written report: one self-contained page, the Markdown and the CSV (synthetic records)."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from run_fixture import draw_pictures, fake_plan, write_examples, write_run

from harness.errors import UserError
from harness.record import PlannedTrial, TrialRecord, read_run
from results.gallery import build_gallery
from results.report import write_report
from results.table import build_leaderboard

EVIL = '<script>alert("caption")</script>'


class Page(HTMLParser):
    """Collects what the tests ask of the page: tags, ids, addresses, and unclosed elements."""

    VOID = frozenset({"meta", "img", "br", "path", "use", "rect", "circle", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in {"href", "src", "xlink:href"} and value:
                self.addresses.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole synthetic run with pictures, whose captions of the first method are hostile."""
    plan = fake_plan()
    write_run(tmp_path, plan)
    pictures = draw_pictures(tmp_path / "pictures", 12)
    for trial in plan.trials:
        caption = EVIL if trial.method == "none" else f"{trial.label} sees a circle"
        write_examples(tmp_path, trial.trial_id, [f"{caption} {index}" for index in range(12)], pictures)
    return tmp_path


def test_the_page_is_one_file_without_network(run: Path) -> None:
    paths = write_report(run)
    text = paths.html.read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert paths.html.stat().st_size < 1_000_000


def test_ids_are_unique_and_every_inner_link_has_its_target(run: Path) -> None:
    page = Page(write_report(run).html.read_text())
    assert len(page.ids) == len(set(page.ids))
    inner = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inner <= set(page.ids)
    assert {"leaderboard", "contexts", "parameters", "curves", "input", "cost", "samples", "provenance"} <= inner


def test_captions_and_labels_are_data(run: Path) -> None:
    plan = fake_plan()
    labels = {"IA3": "<b>IA3</b> $x$ a|b"}
    trials = tuple(trial.model_copy(update={"label": labels.get(trial.label, trial.label)}) for trial in plan.trials)
    (run / "plan.json").write_text(plan.model_copy(update={"trials": trials}).model_dump_json())
    paths = write_report(run)
    text = paths.html.read_text()
    assert Page(text).tags.count("script") == 1
    assert "&lt;script&gt;alert(&#34;caption&#34;)&lt;/script&gt;" in text
    assert "<b>" not in text
    assert "&lt;b&gt;IA3&lt;/b&gt; $x$ a|b" in text
    assert "&lt;b&gt;IA3&lt;/b&gt; $x$ a\\|b specific" in paths.markdown.read_text()


def test_the_same_records_give_the_same_bytes(run: Path) -> None:
    first = [path.read_bytes() for path in vars(write_report(run)).values()]
    assert first == [path.read_bytes() for path in vars(write_report(run)).values()]


def test_csv_has_a_line_per_row_with_unrounded_numbers(run: Path) -> None:
    lines = list(csv.DictReader(write_report(run).csv.open(newline="")))
    rows = build_leaderboard(read_run(run)).rows
    assert [(line["label"], line["grouping"]) for line in lines] == [(row.label, row.grouping) for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert float(line["cider"]) == row.metrics["cider"].mean
        assert float(line["cider_low"]) == row.metrics["cider"].low
        assert int(line["cider_seeds"]) == 2
        assert row.parameters is not None
        assert int(line["trainable_parameters"]) == row.parameters.trainable
        assert (line["cider_difference"] == "") == row.is_reference


def test_one_seed_leaves_the_interval_columns_empty(tmp_path: Path) -> None:
    write_run(tmp_path, fake_plan(seeds=(0,)))
    for line in csv.DictReader(write_report(tmp_path).csv.open(newline="")):
        assert line["cider"]
        assert line["cider_low"] == line["cider_high"] == ""


def test_markdown_tables_are_whole(run: Path) -> None:
    text = write_report(run).markdown.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 8
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert "| reference |" in text


def test_failures_broken_and_foreign_records_are_named(run: Path) -> None:
    plan = fake_plan()
    record = read_run(run).records[plan.trials[0].trial_id]
    failed = record.model_copy(update={"status": "failed", "reason": "loss is NaN <at> step 7", "metrics": {}})
    (run / "trials" / record.trial_id / "record.json").write_text(failed.model_dump_json())
    foreign = run / "trials" / "older" / "record.json"
    foreign.parent.mkdir()
    foreign.write_text(record.model_copy(update={"trial_id": "older"}).model_dump_json())
    (run / "trials" / plan.trials[1].trial_id / "record.json").write_text("{")
    paths = write_report(run)
    text = paths.html.read_text()
    assert "loss is NaN &lt;at&gt; step 7" in text
    assert "1 record file(s) could not be read" in text
    assert f"{plan.trials[1].trial_id}/record.json: not a trial record" in text
    assert "1 record(s) that the plan does not name" in text
    assert "loss is NaN" in paths.markdown.read_text()


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
    text = write_report(run).html.read_text()
    assert f"Could not be read: {trial.trial_id}: " in text
    assert "no picture that can be read" in text


def test_runs_without_generated_text_have_no_gallery(run: Path) -> None:
    for path in run.glob("trials/*/examples.parquet"):
        pq.write_table(pq.read_table(path).select(["split", "example_id", "nll", "tokens"]), path)
    assert 'id="samples"' not in write_report(run).html.read_text()


@pytest.mark.parametrize("kept", ["nothing", "all failed", "one method", "no reference"])
def test_partial_runs_give_a_report(tmp_path: Path, kept: str) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if kept == "all failed":
            return record.model_copy(update={"status": "failed", "reason": "no", "metrics": {}, "parameters": None})
        wanted = {"nothing": False, "one method": trial.method == "ia3", "no reference": trial.method != "full"}
        return record if wanted[kept] else None

    write_run(tmp_path, fake_plan(primary_metric="perplexity", mlflow_uri="sqlite:///x.db"), change)
    paths = write_report(tmp_path)
    page = Page(paths.html.read_text())
    assert page.open == []
    assert "unfinished" in page.ids
    assert len(list(csv.DictReader(paths.csv.open(newline="")))) == 8


def test_a_folder_without_a_run_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no plan\.json here"):
        write_report(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: not the plan of a run"):
        write_report(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"experiment": 3}))
    with pytest.raises(UserError, match=r"plan\.json: not the plan of a run"):
        write_report(tmp_path)
