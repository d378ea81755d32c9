"""Several run folders as one: consistent names, every trial counted once, incompatible runs rejected."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.core import naming
from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.record import PlannedTrial, TrialRecord, read_run, write_record
from results.leaderboard.join import read_runs
from results.leaderboard.table import build_leaderboard
from tests.support.runs import METRICS, fake_plan, fake_record, write_run

METHOD_LABELS = {"lora": "LoRA r=4", "full": "Full fine-tuning", "none": "none"}


def spec(method: str, examples: int = 64, seed: int = 0, rate: float = 0.01, **changes: Any) -> dict[str, Any]:
    """A trial's spec, as far as names are made of it; ``option`` is the adapter's, ``beams`` the evaluation's."""
    return {
        "task": {"name": "scenes", "config": {}},
        "backbone": {"language_model": "tiny"},
        "adapter": {
            "method": method,
            "label": METHOD_LABELS[method],
            "grouping_name": "agnostic" if method == "lora" else "",
            "config": {"dropout": changes.get("dropout", 0.0)} if method == "lora" else {},
        },
        "budget": {"examples": examples},
        "optimizer": {"learning_rate": rate},
        "eval": {"num_beams": changes.get("beams", 1), "per_device_eval_batch_size": changes.get("batch", 8)},
        "seed": seed,
    }


def identity(content: dict[str, Any]) -> str:
    flat = "-".join(str(value) for _, value in naming.flatten(content))
    return re.sub(r"\W+", "_", flat)


def write_grid(
    folder: Path,
    specs: Sequence[dict[str, Any]],
    change: Callable[[TrialRecord], TrialRecord | None] = lambda record: record,
    **plan: Any,
) -> Path:
    """A run folder whose plan names its trials by the specs, and a record of each."""
    by_id = {identity(content): content for content in specs}
    labels, settings = naming.labels(by_id), naming.settings(by_id)
    trials = tuple(
        PlannedTrial(
            trial_id=trial_id,
            label=labels[trial_id],
            method=content["adapter"]["method"],
            grouping=content["adapter"]["grouping_name"],
            setting=settings[trial_id],
            seed=content["seed"],
            learning_rate=content["optimizer"]["learning_rate"],
        )
        for trial_id, content in by_id.items()
    )

    def specified(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return change(record.model_copy(update={"spec": by_id[trial.trial_id]}))

    return write_run(folder, fake_plan(**{"trials": trials, "experiment": folder.name} | plan), specified)


def only(*methods: str) -> Callable[[TrialRecord], TrialRecord | None]:
    return lambda record: record if record.spec["adapter"]["method"] in methods else None


def names(trials: Sequence[PlannedTrial]) -> list[tuple[str, str, int]]:
    return [(trial.label, trial.setting, trial.seed) for trial in trials]


def test_one_folder_is_read_as_it_is(tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "a", [spec("lora"), spec("full")])
    assert read_runs([folder]) == read_run(folder)


def test_methods_of_two_folders_meet_in_one_table(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora", seed=seed) for seed in (0, 1)])
    b = write_grid(tmp_path / "b", [spec("full", seed=seed) for seed in (0, 1)])
    run = read_runs([a, b])
    assert names(run.plan.trials) == [
        (label, "", seed) for label in ("LoRA r=4", "Full fine-tuning") for seed in (0, 1)
    ]
    assert run.plan.experiment == "a + b"
    board = build_leaderboard(run)
    lora = next(row for row in board.rows if row.method == "lora")
    assert (lora.apart, lora.differences["cider"].n) == ((), 2)
    assert run.notes == ("Joined from 2 run folders (trials with a record): a (2 of 2), b (2 of 2).",)
    assert {run.trial_folder(trial.trial_id).parents[1] for trial in run.plan.trials} == {a, b}
    assert all((run.trial_folder(trial.trial_id) / "record.json").is_file() for trial in run.plan.trials)


def test_what_differs_between_the_folders_is_named(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora", 64), spec("full", 64)])
    b = write_grid(tmp_path / "b", [spec("lora", 128, dropout=0.1), spec("full", 128)])
    assert {trial.setting for trial in (*read_run(a).plan.trials, *read_run(b).plan.trials)} == {""}
    run = read_runs([a, b])
    assert names(run.plan.trials) == [
        ("LoRA r=4 dropout=0.0", "examples=64", 0),
        ("Full fine-tuning", "examples=64", 0),
        ("LoRA r=4 dropout=0.1", "examples=128", 0),
        ("Full fine-tuning", "examples=128", 0),
    ]


def test_a_search_in_one_folder_and_more_seeds_in_another(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora", rate=rate) for rate in (0.01, 0.1, 0.001)])
    b = write_grid(tmp_path / "b", [spec("lora", seed=seed, rate=0.1) for seed in (1, 2)])
    (row,) = build_leaderboard(read_runs([a, b])).rows
    assert [(c.learning_rate, len(c.finished)) for c in row.candidates] == [(0.01, 1), (0.1, 3), (0.001, 1)]
    assert (row.chosen.learning_rate, row.effort) == (0.1, 3)


def test_trials_without_a_record_follow_their_row_mates(tmp_path: Path) -> None:
    def first_seed(record: TrialRecord) -> TrialRecord | None:
        return record if record.seed == 0 else None

    a = write_grid(tmp_path / "a", [spec("lora", 64, seed=seed) for seed in (0, 1)], first_seed)
    b = write_grid(tmp_path / "b", [spec("lora", 128, seed=seed, dropout=0.1) for seed in (0, 1)], first_seed)
    assert names(read_runs([a, b]).plan.trials) == [
        (f"LoRA r=4 dropout={dropout}", f"examples={examples}", seed)
        for dropout, examples in ((0.0, 64), (0.1, 128))
        for seed in (0, 1)
    ]


def test_what_is_unknown_is_not_mixed_with_what_is_known(tmp_path: Path) -> None:
    """No record tells how the trials of b were configured: their names do not rule out other data or dropout."""
    a = write_grid(tmp_path / "a", [spec("lora"), spec("full")])
    b = write_grid(tmp_path / "b", [spec("lora", 128), spec("full", 128)], lambda record: None)
    assert names(read_runs([a, b]).plan.trials) == [
        ("LoRA r=4", "", 0),
        ("Full fine-tuning", "", 0),
        ("LoRA r=4", "run=b", 0),
        ("Full fine-tuning", "run=b", 0),
    ]
    # Here the setting is known from the full trial; LoRA may differ from a's; "none" is only in c.
    c = write_grid(tmp_path / "c", [spec("lora", dropout=0.5), spec("full"), spec("none")], only("full"))
    assert names(read_runs([a, c]).plan.trials)[2:] == [("LoRA r=4", "run=c", 0), ("none", "", 0)]


def test_trials_that_names_cannot_tell_apart_are_kept_apart(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora", batch=8), spec("full", batch=8)])
    b = write_grid(tmp_path / "b", [spec("lora", batch=16), spec("none", batch=16)])
    assert names(read_runs([a, b]).plan.trials) == [
        ("LoRA r=4", "", 0),
        ("Full fine-tuning", "", 0),
        ("LoRA r=4", "run=b", 0),
        ("none", "run=b", 0),
    ]
    # The evaluation batch size does not count as a difference unless a trial would occur twice.
    c = write_grid(tmp_path / "c", [spec("none", batch=16)])
    assert {trial.setting for trial in read_runs([a, c]).plan.trials} == {""}


def test_another_evaluation_is_another_setting(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora", beams=1)])
    b = write_grid(tmp_path / "b", [spec("full", beams=4)])
    assert [trial.setting for trial in read_runs([a, b]).plan.trials] == ["num_beams=1", "num_beams=4"]


def test_a_trial_in_two_folders_is_counted_once(tmp_path: Path) -> None:
    def other_score(record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"metrics": {"test": record.metrics["test"] | {"cider": 0.5}}})

    specs = [spec("lora", seed=seed) for seed in (0, 1)]
    a, b = write_grid(tmp_path / "a", specs), write_grid(tmp_path / "b", specs)
    run = read_runs([a, b])
    assert (len(run.records), len(run.plan.trials)) == (2, 2)
    assert set(run.folders.values()) == {a}
    assert run.notes[1:] == (
        "2 trials are both in a and in b, counted once (from a); where both finished, their test scores agree.",
    )
    c = write_grid(tmp_path / "c", specs, other_score)
    run = read_runs([a, c])
    one = identity(specs[0])
    assert run.records[one].metrics["test"]["cider"] != 0.5
    assert run.notes[1].startswith(
        "2 trials are both in a and in c, counted once (from a); the test scores of 2 differ"
    )
    assert f"{one}: cider is {run.records[one].metrics['test']['cider']:.6g} and 0.5." in run.notes[1]


def test_the_finished_record_of_a_trial_wins(tmp_path: Path) -> None:
    def failed(record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"status": "failed", "reason": "no memory", "metrics": {}})

    a = write_grid(tmp_path / "a", [spec("lora")], failed)
    b = write_grid(tmp_path / "b", [spec("lora")])
    for order in ([a, b], [b, a]):
        run = read_runs(order)
        assert [record.status for record in run.records.values()] == ["finished"]
        assert run.trial_folder(identity(spec("lora"))) == b / "trials" / identity(spec("lora"))
        assert run.notes[1] == (
            "1 trial is both in b and in a, counted once (from b); where both finished, their test scores agree."
        )


def test_the_metrics_of_all_folders_are_joined_in_order(tmp_path: Path) -> None:
    wer = METRICS[0].model_copy(update={"name": "wer", "corpus": "ratio"})
    a = write_grid(tmp_path / "a", [spec("lora")])
    b = write_grid(tmp_path / "b", [spec("full")], metrics=(wer, *METRICS[:3]))
    assert read_runs([a, b]).plan.metrics == (*METRICS, wer)


def test_broken_and_foreign_files_of_all_folders_are_named(tmp_path: Path) -> None:
    a, b = write_grid(tmp_path / "a", [spec("lora")]), write_grid(tmp_path / "b", [spec("full")])
    write_atomically(a / "trials" / "x" / "record.json", "{")
    write_record(b, fake_record(fake_plan().trials[0], 1, 0.5))
    run = read_runs([a, b])
    assert [message.partition(":")[0] for message in run.broken] == [str(a / "trials" / "x" / "record.json")]
    assert run.foreign == (fake_plan().trials[0].trial_id,)


def refused(folders: Sequence[Path], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read_runs(folders)


def test_what_is_no_run_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write_grid(tmp_path / "quickstart", [spec("lora")])
    hint = "a run folder is what `harness run` writes"
    near = f"{hint}; did you mean '{a}'?"
    refused([], f"no run folder given; {hint}")
    refused([a, tmp_path / "quickstrt"], f"{tmp_path / 'quickstrt'}: no such folder; {near}")
    (tmp_path / "quickstart-old").mkdir()
    refused([tmp_path / "quickstart-old"], f"{tmp_path / 'quickstart-old'}: no plan.json here; {near}")
    (tmp_path / "far").mkdir()
    refused([tmp_path / "far"], f"{tmp_path / 'far'}: no plan.json here; {hint}")
    refused([a / "plan.json"], f"{a / 'plan.json'}: not a folder; {hint}")
    monkeypatch.chdir(tmp_path)
    refused([a, Path("quickstart")], "quickstart: this run folder is given twice")


def test_a_broken_plan_is_refused(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora")])
    (a / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{a / 'plan.json'}: not the plan of a run: Invalid JSON")):
        read_runs([a])


def test_runs_that_cannot_be_one_table_are_refused_with_both_files(tmp_path: Path) -> None:
    a = write_grid(tmp_path / "a", [spec("lora")])
    b = write_grid(tmp_path / "b", [spec("full")], primary_metric="perplexity")
    c = write_grid(tmp_path / "c", [spec("full")], reference_method="none")
    turned = METRICS[0].model_copy(update={"higher_is_better": True})
    d = write_grid(tmp_path / "d", [spec("full")], metrics=(turned, *METRICS[1:]))
    same = "runs that are joined must have the same"
    first = a / "plan.json"
    refused([a, b], f"{b / 'plan.json'}: primary_metric: found 'perplexity', but {first} has 'cider'; {same}")
    refused([a, c], f"{c / 'plan.json'}: reference_method: found 'none', but {first} has 'full'; {same}")
    refused([a, d], f"{first} and {d / 'plan.json'}: metrics: perplexity: higher is better in only one of them")
