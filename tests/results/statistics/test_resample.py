"""Intervals and permutations of real per-example files against scoring the drawn examples from scratch.

Axes: B resamples or permutations, S seeds, E examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocoevalcap.cider.cider import Cider
from scipy.stats import gmean

from harness.core.formulas import Floats
from harness.core.record import MetricInfo, Run, read_run
from results.statistics.intervals import resample_weights
from results.statistics.resample import Resampled, examples_of
from tests.support.runs import METHODS, METRICS, fake_plan, write_run

E = 30
WER = MetricInfo(name="wer", label="WER", higher_is_better=False, corpus="ratio")
INFOS = (*METRICS, WER)
WORDS = ["a", "red", "blue", "circle", "square", "left", "right", "of", "the"]


class Texts:
    """The answers of one trial to the same references, and what an examples.parquet keeps of them."""

    def __init__(self, rng: np.random.Generator, references: Sequence[str], level: float) -> None:
        self.references = references
        self.answers = [
            " ".join(word if rng.random() < level else str(rng.choice(WORDS)) for word in reference.split())
            for reference in references
        ]
        self.tokens = np.array([len(reference.split()) for reference in references])
        self.nll = self.tokens * rng.gamma(4, 0.5 / level, len(references))
        self.cider = Cider().compute_score(
            {index: [text] for index, text in enumerate(references)},
            {index: [text] for index, text in enumerate(self.answers)},
        )[1]

    def scores(self, drawn: Sequence[int]) -> dict[str, float]:
        """Scores of a split of those examples, from scratch; CIDEr with the document frequencies of the whole split."""
        return {
            "perplexity": float(np.exp(np.mean(np.repeat((self.nll / self.tokens)[drawn], self.tokens[drawn])))),
            "cider": float(np.mean([self.cider[index] for index in drawn])),
            "wer": jiwer.wer([self.references[i] for i in drawn], [self.answers[i] for i in drawn]),
        }

    def columns(self) -> dict[str, Any]:
        outputs = [jiwer.process_words(*pair) for pair in zip(self.references, self.answers, strict=True)]
        counts = [
            [found.substitutions + found.deletions + found.insertions, len(reference.split())]
            for found, reference in zip(outputs, self.references, strict=True)
        ]
        return {"nll": self.nll, "tokens": self.tokens, "cider": self.cider, "wer.counts": counts}


def write_columns(run: Path, trial_id: str, columns: Mapping[str, Any], order: Sequence[int]) -> None:
    """A file of one validation and E test examples, in some order."""
    table: dict[str, Any] = {
        "split": ["validation", *["test"] * len(order)],
        "example_id": ["validation-0", *(f"test-{index}" for index in order)],
    }
    for name, values in columns.items():
        table[name] = [None if name != "tokens" else 1, *(values[index] for index in order)]
    path = run / "trials" / trial_id / "examples.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


Change = Callable[[str, dict[str, float]], None]


class Grid:
    """Two methods with three seeds, on disk, and the texts that their files were made of."""

    def __init__(self, folder: Path, change: Change = lambda _, scores: None) -> None:
        rng = np.random.default_rng(0)
        references = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(E)]
        plan = fake_plan(seeds=(0, 1, 2), methods=[METHODS[5], METHODS[7]], metrics=INFOS)
        self.texts = {
            trial.trial_id: Texts(rng, references, 0.6 + 0.02 * trial.seed + 0.2 * (trial.method == "full"))
            for trial in plan.trials
        }
        measured = {}
        for trial_id, texts in self.texts.items():
            measured[trial_id] = texts.scores(range(E))
            change(trial_id, measured[trial_id])
            write_columns(folder, trial_id, texts.columns(), rng.permutation(E).tolist())
        write_run(
            folder,
            plan,
            lambda trial, record: record.model_copy(
                update={"metrics": record.metrics | {"test": measured[trial.trial_id]}}
            ),
        )
        self.folder = folder
        self.ids = sorted(f"test-{index}" for index in range(E))  # the order of the columns of weights
        self.index = [int(name.removeprefix("test-")) for name in self.ids]
        self.one = [trial.trial_id for trial in plan.trials if trial.method == "lora"]
        self.other = [trial.trial_id for trial in plan.trials if trial.method == "full"]

    def read(self) -> tuple[Run, Resampled]:
        run = read_run(self.folder)
        records = list(run.records.values())
        return run, Resampled(records, run.plan.metrics, examples_of(run, records, run.plan.metrics))

    def drawn(self, weights_E: Floats) -> list[int]:
        """The examples of a resample, each as often as it was drawn."""
        return np.repeat(self.index, weights_E.astype(int)).tolist()


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


def test_resampled_scores_are_those_of_the_drawn_examples(grid: Grid) -> None:
    run, resampled = grid.read()
    assert resampled.unreadable == []
    records = [run.records[trial_id] for trial_id in grid.one]
    by_draw = [
        [grid.texts[trial_id].scores(grid.drawn(weights_E)) for trial_id in grid.one]
        for weights_E in resample_weights(E)[:60]
    ]
    for metric in ("perplexity", "cider", "wer"):
        found = resampled.replicates(records, metric)
        assert found is not None
        assert found[1] == E
        mean = gmean if metric == "perplexity" else np.mean
        expected_B = [mean([scores[metric] for scores in by_seed]) for by_seed in by_draw]
        assert found[0][:60] == pytest.approx(expected_B, rel=1e-5)


def test_standard_error_over_examples_is_that_of_an_independent_bootstrap(grid: Grid) -> None:
    run, resampled = grid.read()
    records = [run.records[trial_id] for trial_id in grid.one]
    rng = np.random.default_rng(9)
    draws = [rng.integers(0, E, E).tolist() for _ in range(400)]
    by_draw = [[grid.texts[trial_id].scores(draw) for trial_id in grid.one] for draw in draws]
    for metric in ("perplexity", "cider", "wer"):
        found = resampled.estimate(records, metric)
        assert found is not None
        assert (found.n, found.examples, found.covers) == (3, E, "seeds and test examples")
        again = [np.mean([scores[metric] for scores in by_seed]) for by_seed in by_draw]
        assert found.example_se == pytest.approx(np.std(again) * np.sqrt(E / (E - 1)), rel=0.15)
        whole_S = [grid.texts[trial_id].scores(range(E))[metric] for trial_id in grid.one]
        assert found.mean == pytest.approx(np.mean(whole_S))
        assert found.seed_se == pytest.approx(np.std(whole_S, ddof=1) / np.sqrt(3))


def test_clusters_are_drawn_whole(tmp_path: Path) -> None:
    """Of trials with the same examples, one file that names the clusters is enough: the others may be older."""
    other = Grid(tmp_path)
    rng = np.random.default_rng(3)
    of_index = rng.integers(0, 9, E)  # clusters of unequal sizes, scattered over the file
    path = tmp_path / "trials" / other.one[1] / "examples.parquet"
    table = pq.read_table(path)
    names = [f"c{of_index[int(key.rpartition('-')[2])]}" for key in table["example_id"].to_pylist()]
    pq.write_table(table.append_column("cluster", pa.array(names)), path)
    run, resampled = other.read()
    records = [run.records[trial_id] for trial_id in other.one]
    order = list(dict.fromkeys(of_index[index] for index in other.index))
    members = [[index for index in other.index if of_index[index] == cluster] for cluster in order]

    def drawn(weights_G: Floats) -> list[int]:
        return [index for own, times in zip(members, weights_G, strict=True) for index in own * int(times)]

    for metric in ("perplexity", "cider", "wer"):
        found = resampled.replicates(records, metric)
        assert found is not None
        assert found[1] == len(order)
        for weights_G, value in zip(resample_weights(len(order))[:8], found[0], strict=False):
            by_seed = [other.texts[trial_id].scores(drawn(weights_G))[metric] for trial_id in other.one]
            mean = np.exp(np.mean(np.log(by_seed))) if metric == "perplexity" else np.mean(by_seed)
            assert value == pytest.approx(mean, rel=1e-5)


def test_examples_of_one_cluster_have_no_variance(tmp_path: Path) -> None:
    grid = Grid(tmp_path)
    for trial_id in grid.texts:
        path = tmp_path / "trials" / trial_id / "examples.parquet"
        table = pq.read_table(path)
        pq.write_table(table.append_column("cluster", pa.array(["all"] * len(table))), path)
    run, resampled = grid.read()
    found = resampled.estimate([run.records[trial_id] for trial_id in grid.one], "wer")
    assert found is not None
    assert (found.covers, found.examples) == ("seeds", None)


def test_a_score_that_its_columns_do_not_give_again_covers_seeds_alone(tmp_path: Path) -> None:
    def change(trial_id: str, scores: dict[str, float]) -> None:
        scores["wer"] += 0.01
        scores["bleu_4"] = 0.3  # without counts in the file

    grid = Grid(tmp_path, change)
    run, resampled = grid.read()
    records = [run.records[trial_id] for trial_id in grid.one]
    covers = {}
    for info in INFOS:
        found = resampled.estimate(records, info.name)
        covers[info.name] = found and found.covers
    assert covers == {
        "perplexity": "seeds and test examples",
        "cider": "seeds and test examples",
        "wer": "seeds",
        "bleu_4": "seeds",
        "perplexity_wrong_input": None,  # not measured
    }
    assert resampled.replicates(records, "wer") is None
    assert resampled.replicates_of_rows([records], "wer") is None


def test_a_seed_without_the_score_is_left_out(tmp_path: Path) -> None:
    def change(trial_id: str, scores: dict[str, float]) -> None:
        if trial_id.startswith("lora") and "-s0-" in trial_id:
            del scores["cider"]

    grid = Grid(tmp_path, change)
    run, resampled = grid.read()
    records = [run.records[trial_id] for trial_id in grid.one]
    found = resampled.estimate(records, "cider")
    assert found is not None
    assert (found.n, found.covers) == (2, "seeds and test examples")
    assert found == resampled.estimate(records[1:], "cider")
    rows = resampled.replicates_of_rows([records, []], "cider")
    own = resampled.replicates(records[1:], "cider")
    assert rows is not None
    assert own is not None
    assert (rows[0][0] == own[0]).all()
    assert np.isnan(rows[0][1]).all()
    assert rows[1] == E


def test_other_examples_are_not_paired(grid: Grid, tmp_path: Path) -> None:
    other = Grid(tmp_path)
    for trial_id in other.other:
        path = tmp_path / "trials" / trial_id / "examples.parquet"
        table = pq.read_table(path)
        renamed = [name.replace("test-", "late-") for name in table["example_id"].to_pylist()]
        pq.write_table(table.set_column(1, "example_id", pa.array(renamed)), path)
    run, resampled = other.read()
    one, full = ([run.records[trial_id] for trial_id in ids] for ids in (other.one, other.other))
    for records in (one, full):
        found = resampled.estimate(records, "wer")
        assert found is not None
        assert found.covers == "seeds and test examples"
    mixed = resampled.estimate([*one, full[0]], "wer")
    assert mixed is not None
    assert mixed.covers == "seeds"
    rows = resampled.replicates_of_rows([one, full], "wer")
    assert rows is not None
    assert np.isfinite(rows[0]).all(axis=1).tolist() == [True, False]


def test_an_unreadable_file_is_named_and_its_rows_cover_seeds_alone(tmp_path: Path) -> None:
    grid = Grid(tmp_path)
    (tmp_path / "trials" / grid.one[0] / "examples.parquet").write_bytes(b"PAR1 cut")
    (tmp_path / "trials" / grid.other[2] / "examples.parquet").unlink()
    run, resampled = grid.read()
    assert {message.partition(": ")[0] for message in resampled.unreadable} == {grid.one[0], grid.other[2]}
    assert all(len(message.splitlines()) == 1 for message in resampled.unreadable)
    found = resampled.estimate([run.records[trial_id] for trial_id in grid.one], "wer")
    assert found is not None
    assert (found.n, found.covers) == (3, "seeds")


def test_one_example_says_nothing_of_examples(tmp_path: Path) -> None:
    grid = Grid(tmp_path, lambda _, scores: scores.update(cider=0.5))
    for trial_id in (*grid.one, *grid.other):
        write_columns(tmp_path, trial_id, {"cider": [0.5]}, [0])
    run, resampled = grid.read()
    found = resampled.estimate([run.records[trial_id] for trial_id in grid.one], "cider")
    assert found is not None
    assert found.covers == "seeds"
    assert resampled.replicates([run.records[grid.one[0]]], "cider") is None
