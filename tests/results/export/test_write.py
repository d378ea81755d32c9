"""The leaderboard as files: what each has, what is marked in all of them, and that they can be read back."""

from __future__ import annotations

import csv
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from harness.core.profile import Measured, Profile, ProfileEntry
from harness.core.record import PlannedTrial, TrialRecord, read_run
from results.export.latex import escape
from results.leaderboard import published
from results.leaderboard.format import verdict
from results.leaderboard.published import PublishedLeaderboard, read_published
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.report import write_exports
from tests.support.runs import fake_plan, write_run

PAGE = (Path(__file__).parents[3] / "docs" / "leaderboard.md").read_text(encoding="utf-8")
EVIL = r"100% _x_ {a} $b$ & #1 ^ ~ \cmd <|>"


def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
    """BitFit was trained for fewer steps; a seed of IA3 failed; one of ``none`` has not run."""
    if trial.method == "bitfit":
        assert record.data is not None
        return record.model_copy(update={"data": record.data.model_copy(update={"steps": 99})})
    if trial.method == "ia3" and trial.seed == 2:
        gone = {"metrics": {}, "parameters": None, "memory": None, "throughput": None, "data": None}
        return record.model_copy(update={"status": "failed", "reason": "loss is NaN", **gone})
    return None if trial.method == "none" and trial.seed == 1 else record


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    plan = fake_plan(seeds=(0, 1, 2), settings=("examples=64", "examples=128"))
    trials = tuple(
        trial.model_copy(update={"label": EVIL if trial.method == "none" else trial.label, "learning_rate": 1e-3})
        for trial in plan.trials
    )
    plan = plan.model_copy(update={"trials": trials})
    return build_leaderboard(read_run(write_run(tmp_path_factory.mktemp("synthetic"), plan, change)))


@pytest.fixture(scope="module")
def files(board: Leaderboard, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.name: path for path in write_exports(board, tmp_path_factory.mktemp("report") / "new")}


def test_all_files_are_written_whole_and_the_same_each_time(
    board: Leaderboard, files: dict[str, Path], tmp_path: Path
) -> None:
    names = ["leaderboard.md", "leaderboard.csv", "leaderboard.tex", "leaderboard.json", "trials.parquet"]
    assert list(files) == names
    assert sorted(path.name for path in files[names[0]].parent.iterdir()) == sorted(names)  # nothing partial
    again = write_exports(board, tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files.values()]


def test_csv_has_every_number_unrounded(board: Leaderboard, files: dict[str, Path]) -> None:
    lines = list(csv.DictReader(files["leaderboard.csv"].open(newline="")))
    assert [(line["setting"], line["label"], line["grouping"]) for line in lines] == [
        (row.setting, row.label, row.grouping) for row in board.rows
    ]
    for line, row in zip(lines, board.rows, strict=True):
        mean = statistics.fmean(record.metrics["test"]["cider"] for record in row.finished)
        assert float(line["cider"]) == pytest.approx(mean, rel=1e-12)
        assert float(line["cider_low"]) < float(line["cider"]) < float(line["cider_high"])
        assert line["cider_covers"] == "seeds"
        assert (line["learning_rate"], line["learning_rates_tried"]) == ("0.001", str(row.effort))
        assert (line["apart"] != "") == (row.method == "bitfit")
        assert (line["rank_first"] == "") == (row.method == "bitfit")
        compared = row.method not in {"full", "bitfit"}
        assert (line["cider_difference_p_value"] != "") == (line["cider_difference_p_adjusted"] != "") == compared
        if compared:
            assert float(line["cider_difference_p_value"]) <= float(line["cider_difference_p_adjusted"])


def test_csv_has_verdicts_and_the_profile(board: Leaderboard, tmp_path: Path) -> None:
    lora = [row for row in board.rows if row.method == "lora"]
    entries = tuple(
        ProfileEntry(
            key=row.trials[0].trial_id, name=row.name, setting="", device="CPU", reference="Full fine-tuning",
            trial_ids=tuple(trial.trial_id for trial in row.trials), reference_trial_ids=(),
            step_time_ratio=Measured(median=1.125, low=1.0, high=1.25, n=9),
            peak_memory_bytes=Measured(median=7.0, n=1),
        )
        for row in lora
    )  # fmt: skip
    profiled = replace(board, run=replace(board.run, profile=Profile(entries=entries)))
    paths = {path.name: path for path in write_exports(profiled, tmp_path)}
    for line in csv.DictReader(paths["leaderboard.csv"].open(newline="")):
        measured = ("1.125", "1.0", "1.25") if line["method"] == "lora" else ("", "", "")
        names = ("profile_step_time_ratio", "profile_step_time_ratio_low", "profile_step_time_ratio_high")
        assert tuple(line[name] for name in names) == measured
        assert line["profile_energy_ratio"] == ""
        row = next(row for row in board.rows if (row.setting, row.name) == (line["setting"], name_of(line)))
        assert line["cider_difference_verdict"] == verdict(row.differences.get("cider"))
    trials = pq.read_table(paths["trials.parquet"]).to_pylist()
    assert {(row["method"] == "lora", row["profile.step_time_ratio"], row["profile.step_time_ratio_high"],
             row["profile.peak_memory_bytes"], row["profile.peak_memory_bytes_low"]) for row in trials} == {
        (True, 1.125, 1.25, 7.0, None), (False, None, None, None, None)}  # fmt: skip
    text = paths["leaderboard.md"].read_text(encoding="utf-8")
    assert re.search(r"\| LoRA r=4 specific \| .* \| 1\.12× \[1\.000×, 1\.25×\] \| 7 B \| ", text)


def name_of(line: dict[str, str]) -> str:
    return f"{line['label']} {line['grouping']}".rstrip()


def test_markdown_keeps_rows_apart_out_of_the_ranking(files: dict[str, Path]) -> None:
    text = files["leaderboard.md"].read_text(encoding="utf-8")
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    tables = [table for table in tables if table]
    assert [len(table) for table in tables] == [2 + 6, 2 + 2] * 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert tables[0][0].startswith(
        "| Rank | Method | CIDEr | Δ CIDEr from Full fine-tuning | Verdict | Trainable | Perple"
    )
    assert "Δ CIDEr" not in tables[1][0]  # rows excluded from ranking are compared with nothing
    for table in tables[1::2]:
        assert all(line.startswith("| BitFit ") for line in table[2:])
    assert "0.001 (of 1)" in text
    assert len(re.findall(r"^- BitFit \w+: .*number of optimizer steps differs \(99, 256\)", text, re.MULTILINE)) == 4
    assert "loss is NaN" in text
    assert re.search(r"\| 100% _x_ .* &lt;\\\|&gt; ", text)


def latex_rows(text: str) -> list[list[list[str]]]:
    """By table the cells of each line between \\midrule and \\bottomrule."""
    bodies = re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL)
    return [
        [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in body.splitlines() if "rule" not in line]
        for body in bodies
    ]


def test_latex_is_balanced_and_escaped(files: dict[str, Path]) -> None:
    text = files["leaderboard.tex"].read_text(encoding="utf-8")
    assert text.startswith("% synthetic: written by `harness report`")
    assert "booktabs" in text
    bare = re.sub(r"\\[\\{}]", "", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    depth = 0
    for letter in bare:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0
    for environment in ("table", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 2
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    assert escape(EVIL) in text
    assert EVIL not in text
    for table, columns in zip(latex_rows(text), re.findall(r"\\begin\{tabular\}\{(\w+)\}", text), strict=True):
        assert {len(row) for row in table} == {len(columns)}
    body = "".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.isascii()


def test_what_latex_would_take_for_a_command_is_printed() -> None:
    assert escape(EVIL) == (
        r"100\% \_x\_ \{a\} \$b\$ \& \#1 \textasciicircum{} \textasciitilde{} \textbackslash{}cmd "
        r"\textless{}\textbar{}\textgreater{}"
    )
    assert escape("two\nlines − 1–2 † Δ") == r"two lines $-$ 1--2 $\dagger$ $\Delta$"


def test_latex_has_the_best_mean_of_the_ranked_rows_in_bold(board: Leaderboard, files: dict[str, Path]) -> None:
    tables = latex_rows(files["leaderboard.tex"].read_text(encoding="utf-8"))
    for table, setting in zip(tables, board.settings, strict=True):
        heads, rows = table[0], table[1:]
        assert [row[0] for row in rows[-2:]] == ["--", "--"]
        assert all(re.fullmatch(r"\d+(--\d+)?", row[0]) for row in rows[:-2])
        for metric, best in (("CIDEr", max), ("Perplexity", min)):
            column = heads.index(metric)
            bold = [row[1] for row in rows if r"\textbf" in row[column]]
            name = "cider" if metric == "CIDEr" else "perplexity"
            expected = best(board.of(setting), key=lambda row, name=name: row.metrics[name].mean)
            assert bold == [escape(expected.name)]


def test_json_is_read_back_and_agrees_with_the_records(board: Leaderboard, files: dict[str, Path]) -> None:
    found = read_published(files["leaderboard.json"])
    records = board.run.records
    assert (found.schema_version, found.primary_metric, found.reference_method) == (3, "cider", "full")
    assert found.created_from.experiments == ("synthetic",)
    assert found.created_from.run_folders == (board.run.folder.name,)
    assert found.created_from.git_revisions == ("0123456789abcdef",)
    assert [one.status for one in found.unfinished] == ["failed"] * 4 + ["not run"] * 2
    assert len(found.deltas) == 6
    for row in found.rows:
        assert row.seeds_finished == len(row.trial_ids) == len(row.data)
        scores = {seed: records[trial_id].metrics["test"]["cider"] for seed, trial_id in row.trial_ids.items()}
        assert row.metrics["cider"].by_seed == scores
        assert row.metrics["cider"].mean == pytest.approx(statistics.fmean(scores.values()))
        alone = statistics.stdev(scores.values()) / len(scores) ** 0.5  # the other rows' seeds may say that it is more
        assert row.apart or (row.metrics["cider"].seed_se or 0) >= alone * (1 - 1e-9)
        assert {seed: records[trial_id].data for seed, trial_id in row.trial_ids.items()} == row.data
        assert (row.rank is None) == bool(row.apart) == (row.method == "bitfit")
        assert (row.learning_rate, row.effort, len(row.candidates)) == (1e-3, 1, 1)
    assert not re.search(r"\d{4}-\d\d-\d\dT", files["leaderboard.json"].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("update", "place"),
    [({"schema_version": 1}, "schema_version"), ({"colour": "red"}, "colour"), ({"rows": [{}]}, r"rows\.0\.setting")],
)
def test_another_schema_is_refused(
    files: dict[str, Path], tmp_path: Path, update: dict[str, object], place: str
) -> None:
    content = json.loads(files["leaderboard.json"].read_text(encoding="utf-8"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content | update), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"other\.json: not a leaderboard\.json of schema version 2: {place}"):
        read_published(path)


def schemas() -> list[type[BaseModel]]:
    """Every schema in the file."""
    found: list[type[BaseModel]] = [PublishedLeaderboard]
    for schema in found:
        for field in schema.model_fields.values():
            names = re.findall(r"[\w.]+", str(field.annotation))
            kinds = [getattr(published, name.rpartition(".")[2], None) for name in names]
            found += [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel) and k not in found]
    return found


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_the_page_explains_every_field_and_no_other(schema: type[BaseModel]) -> None:
    (section,) = re.findall(rf"^### {schema.__name__}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    inherited = [name for name in published.PublishedEstimate.model_fields if "`PublishedEstimate`" in section]
    assert sorted(named + inherited) == sorted(schema.model_fields)


def test_parquet_has_a_typed_row_for_every_record(board: Leaderboard, files: dict[str, Path]) -> None:
    table = pq.read_table(files["trials.parquet"])
    rows = {row["trial_id"]: row for row in table.to_pylist()}
    assert list(rows) == [trial.trial_id for trial in board.run.plan.trials if trial.trial_id in board.run.records]
    types = {
        "seed": pa.int64(),
        "learning_rate": pa.float64(),
        "test.cider": pa.float64(),
        "parameters.trainable": pa.int64(),
        "memory.process_peak_bytes": pa.int64(),
        "throughput.tokens_per_s": pa.float64(),
        "data.order_fingerprint": pa.string(),
        "data.steps": pa.int64(),
        "wall_time_s": pa.float64(),
    }
    assert {name: table.schema.field(name).type for name in types} == types
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert len(failed) == 4
    for row in failed:
        assert row["reason"] == "loss is NaN"
        assert {row[name] for name in types} == {None, 2, 1e-3, row["wall_time_s"]}
    for trial_id, row in rows.items():
        record = board.run.records[trial_id]
        assert row["test.cider"] == record.metrics.get("test", {}).get("cider")
        assert json.loads(row["versions"]) == record.versions
        assert row["started_at"] == record.started_at
        assert Path(row["folder"]) == board.run.folder / "trials" / trial_id
