"""The data files of plugins enter identities: another jar or table under the same name makes other trials."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.naming import conditions
from harness.core.record import TrialRecord, read_run, write_record
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, describe, expand
from harness.model.components import check_files
from harness.sweep.declared import metrics_of
from results.leaderboard.matched import mismatch
from tasks.metrics.captions import CaptionMetrics
from tasks.metrics.coco import meteor, ptb, spice
from tasks.registry import METRICS

pytestmark = pytest.mark.quick

METRIC = """
from pathlib import Path
from harness import Metric, Scores

class Listed(Metric):
    labels = {"listed": "Listed"}

    @classmethod
    def files(cls):
        return [Path(__file__).with_name("words.txt")]

    def score(self, predictions, references):
        return Scores({"listed": 1.0}, {key: {"listed": 1.0} for key in predictions})
"""
TEXT = (
    "plugins: [listed.py]\ntask: trends\neval: {metrics: [listed]}\nadapters: [{method: none, learning_rate: 1e-3}]\n"
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(METRICS, "added", [])
    (tmp_path / "listed.py").write_text(METRIC, encoding="utf-8")
    (tmp_path / "words.txt").write_text("a\n", encoding="utf-8")
    path = tmp_path / "e.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def only(path: Path) -> TrialSpec:
    (spec,) = expand(Experiment.from_yaml(path))
    return spec


def test_another_table_makes_another_trial_which_does_not_match(file: Path) -> None:
    before, words = only(file), file.with_name("words.txt")
    stat = words.stat()
    assert only(file) == before
    words.write_text("b\n", encoding="utf-8")
    os.utime(words, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a copy can keep size and time
    after = only(file)
    assert after.trial_id != before.trial_id
    assert conditions(after.model_dump()) != conditions(before.model_dump())
    words.write_text("a\n", encoding="utf-8")
    assert only(file).trial_id == before.trial_id


def test_a_worker_refuses_a_table_that_changed_after_planning(file: Path) -> None:
    spec = only(file)
    check_files(spec)
    file.with_name("words.txt").write_text("b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^metric listed: its data files have changed since this trial was planned \("):
        check_files(spec)


def test_a_missing_table_is_named(file: Path) -> None:
    file.with_name("words.txt").unlink()
    with pytest.raises(UserError, match=r"metric .*Listed: its data file .*words\.txt cannot be read: No such file"):
        only(file)


def test_a_run_folder_says_which_plugin_changed(file: Path, tmp_path: Path) -> None:
    run, old = tmp_path / "run", only(file)
    record = TrialRecord(
        trial_id=old.trial_id, experiment="e", status="finished", spec=old.model_dump(mode="json"), seed=0,
        wall_time_s=1.0, started_at="",
    )  # fmt: skip
    write_record(run, record)

    def lines() -> str:
        experiment = Experiment.from_yaml(file)
        specs = expand(experiment)
        plan = describe(experiment, specs, metrics_of(specs), "")
        (run / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
        return "\n".join(read_run(run).foreign_lines)

    assert lines() == ""
    file.with_name("words.txt").write_text("b\n", encoding="utf-8")
    start = "1 record belongs to a trial not in the plan: "
    assert re.fullmatch(start + r"data files of listed changed \(\w{12}\+\w{12}, now \w{12}\+\w{12}\)", lines())
    file.with_name("words.txt").write_text("a\n", encoding="utf-8")
    file.with_name("listed.py").write_text(METRIC + "# changed\n", encoding="utf-8")
    assert lines().startswith(f"{start}code of listed changed (")


def test_trials_scored_by_other_files_do_not_match(file: Path) -> None:
    def record() -> TrialRecord:
        spec = only(file)
        data = {"examples": 1, "examples_fingerprint": "", "order_fingerprint": "", "evaluation_fingerprint": "",
                "steps": 1}  # fmt: skip
        return TrialRecord.model_validate(
            {"trial_id": "a", "experiment": "e", "status": "finished", "spec": spec.model_dump(mode="json"), "seed": 0,
             "wall_time_s": 1.0, "started_at": "", "data": data}
        )  # fmt: skip

    one = record()
    assert mismatch(one, record()) is None
    file.with_name("words.txt").write_text("b\n", encoding="utf-8")
    assert re.match(r"task\.metrics\.\.listed differs \(listed\.py:listed@", str(mismatch(one, record())))


def test_caption_metrics_declare_every_file_that_java_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {path.name for path in CaptionMetrics.files()}
    assert {"stanford-corenlp-3.4.1.jar", "meteor-1.5.jar", "paraphrase-en.gz"} <= names
    assert ptb.JAR in CaptionMetrics.files()
    assert all(path.is_file() for path in CaptionMetrics.files())
    assert str(METRICS.plugin("captions").result_version).startswith(f"{CaptionMetrics.result_version}+")
    for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / jar).write_bytes(b"x")
    monkeypatch.setenv(spice.MODELS, str(tmp_path))
    monkeypatch.setenv(spice.JAVA, "")
    assert spice.files() == ()
    monkeypatch.setenv(spice.JAVA, str(shutil.which("true")))
    with_spice = {path.name for path in CaptionMetrics.files()}
    assert with_spice - names >= {"stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar", "spice-1.0.jar"}
    first = METRICS.plugin("captions").id
    (tmp_path / "stanford-corenlp-3.6.0-models.jar").write_bytes(b"y")
    assert METRICS.plugin("captions").id != first


def test_meteor_runs_with_the_files_that_it_declares() -> None:
    jar, paraphrases = meteor.files()
    assert (jar, paraphrases) == (meteor.FOLDER / meteor.JAR, meteor.FOLDER / meteor.PARAPHRASES)
