"""Trials that take their training steps together give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from harness.core.record import TrialRecord, record_path
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.joint import JointModel
from harness.trial import pack, trial
from harness.trial.checkpoint import BEST
from harness.trial.engine import Engine
from harness.trial.log import LOG
from harness.trial.pack import Together, Wanted, run_pack
from harness.trial.trial import Progress, never
from tests.support.parity import assert_same_result
from tests.support.trials import BITFIT, LORA, Recorder, examples_of, run, spec_of

pytestmark = pytest.mark.e2e  # each has several whole trials

BUDGET = {"examples": 32, "epochs": 2}  # eight steps, of which three are alone
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "other rate": {**LORA, "learning_rate": 2e-3},
    "rank and dropout": {"method": "lora", "rank": 4, "dropout": 0.2, "grouping": "agnostic", "learning_rate": 6e-3},
    "some tokens": BITFIT,
    "inputs": {"method": "ia3", "where": "F", "learning_rate": 0.2},
    "nothing": {"method": "none", "learning_rate": 3e-3},
}
Lone = Mapping[str, tuple[TrialRecord, Path]]


def specs_of(folder: Path, methods: Collection[str] = METHODS, **sections: Any) -> list[TrialSpec]:
    return [spec_of(folder, METHODS[name], **{"budget": BUDGET} | sections) for name in methods]


def run_packed(
    specs: Sequence[TrialSpec],
    folder: Path,
    report: Callable[[TrialSpec, Progress], None] = lambda spec, progress: None,
    rungs: Collection[int] = (),
    stop: Callable[[], bool] = never,
    **resources: Any,
) -> list[TrialRecord]:
    def wanted(spec: TrialSpec) -> Wanted:
        return Wanted(spec, Recorder(), lambda progress: report(spec, progress), rungs)

    return run_pack([wanted(spec) for spec in specs], "unit", folder, Resources(**{"pack": 8} | resources), stop)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Lone:
    """The record of each trial, alone."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: (run(spec, folder), folder) for name, spec in zip(METHODS, specs_of(folder), strict=True)}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of trials of each step that several have taken together."""
    counts: list[int] = []
    plain = Together._step

    def step(self: Together, members: Sequence[Any], *rest: Any) -> Any:
        counts.append(len(members))
        return plain(self, members, *rest)

    monkeypatch.setattr(Together, "_step", step)
    return counts


def assert_close(packed: TrialRecord, folder: Path, lone: tuple[TrialRecord, Path]) -> None:
    """All that depends on training, up to the rounding of a product of more rows."""
    one, other_folder = lone
    assert (packed.trial_id, packed.status, packed.reason) == (one.trial_id, "finished", None)
    exact = {"data", "parameters", "best_epoch", "warnings", "workers"}
    assert packed.model_dump(include=exact) == one.model_dump(include=exact)
    assert packed.memory is not None
    assert one.memory is not None
    process = {"process_peak_bytes", "process_before_bytes"}
    assert packed.memory.model_dump(exclude=process) == one.memory.model_dump(exclude=process)
    for mine, its in zip(packed.history, one.history, strict=True):
        assert mine.model_dump() == pytest.approx(its.model_dump(), rel=1e-5)
    for split, metrics in one.metrics.items():
        likelihoods = {name: value for name, value in metrics.items() if name.startswith("perplexity")}
        assert {name: packed.metrics[split][name] for name in likelihoods} == pytest.approx(likelihoods, rel=1e-5)
        assert packed.metrics[split].keys() == metrics.keys()
    assert list(examples_of(folder, packed).columns) == list(examples_of(other_folder, one).columns)
    weights, its_weights = (
        safetensors.torch.load_file(run / "trials" / one.trial_id / BEST) for run in (folder, other_folder)
    )
    assert weights.keys() == its_weights.keys()
    for name, x in weights.items():
        torch.testing.assert_close(x, its_weights[name], rtol=1e-3, atol=1e-5)


def log_of(folder: Path, record: TrialRecord) -> str:
    return (folder / "trials" / record.trial_id / LOG).read_text(encoding="utf-8")


@pytest.mark.quick
def test_records_are_those_of_each_trial_alone(alone: Lone, tmp_path: Path, together: list[int]) -> None:
    records = run_packed(specs_of(tmp_path), tmp_path)
    assert together == [6] * 5
    for record, lone in zip(records, alone.values(), strict=True):
        assert_close(record, tmp_path, lone)
        assert record.pack is not None
        assert record.pack.model_dump() == {"members": 6, "alone": None}
        assert record.throughput is None  # it was not measured
        assert lone[0].pack is None
        assert '"pack"' not in record_path(lone[1], record.trial_id).read_text(encoding="utf-8")
        assert not (tmp_path / "trials" / record.trial_id / "checkpoint").exists()


def test_one_that_diverges_leaves_the_others_as_they_are(alone: Lone, tmp_path: Path, together: list[int]) -> None:
    """Its loss is not a number from the fifth step on; alone, it fails at the same step for the same reason."""
    wild = spec_of(tmp_path, {**LORA, "rank": 3, "learning_rate": 1e28}, budget=BUDGET)
    first, *others = specs_of(tmp_path, ("lora", "some tokens", "nothing"))
    records = run_packed([first, wild, *others], tmp_path)
    (tmp_path / "alone").mkdir()
    lone = run(wild, tmp_path / "alone")
    failed = records.pop(1)
    assert (failed.status, lone.status) == ("failed", "failed")
    assert str(failed.reason).partition("; log")[0] == str(lone.reason).partition("; log")[0]
    assert "FloatingPointError: the training loss became" in str(failed.reason)
    for record, name in zip(records, ("lora", "some tokens", "nothing"), strict=True):
        assert_close(record, tmp_path, alone[name])
    assert together[-1] == 3


def test_gradients_that_are_no_numbers_reach_no_other_trial(
    alone: Lone, tmp_path: Path, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole block of NaN, from its embeddings on, in the sixth step."""
    specs = specs_of(tmp_path, ("lora", "other rate", "inputs"))
    plain, calls = JointModel.embed, []

    def embed(self: JointModel, batch: Any) -> Tensor:
        embeds_BTD = plain(self, batch)
        calls.append(len(self.models))
        if self.training and together and len(together) == 2:
            rows = len(embeds_BTD) // 3
            embeds_BTD = torch.cat([embeds_BTD[:rows], embeds_BTD[rows : 2 * rows] * torch.nan, embeds_BTD[2 * rows :]])
        return embeds_BTD

    monkeypatch.setattr(JointModel, "embed", embed)
    records = run_packed(specs, tmp_path)
    assert "the training loss became nan" in str(records[1].reason)
    assert together == [3, 3, 3, 2, 2]
    assert_close(records[0], tmp_path, alone["lora"])
    assert_close(records[2], tmp_path, alone["inputs"])


def test_one_that_stops_early_leaves_the_others(tmp_path: Path, together: list[int]) -> None:
    """With so small a learning rate no epoch is better than the first."""
    budget = {"examples": 16, "epochs": 4, "patience": 1}
    tired = spec_of(tmp_path, {**LORA, "rank": 3, "learning_rate": 1e-30}, budget=budget)
    others = [spec_of(tmp_path, METHODS[name], budget=budget) for name in ("lora", "inputs")]
    records = run_packed([tired, *others], tmp_path)
    assert (records[0].status, len(records[0].history), records[0].best_epoch) == ("finished", 2, 1)
    assert [len(record.history) for record in records[1:]] == [4, 4]
    assert together == [3, *[2] * 4]
    assert run(tired, tmp_path / "alone").history == records[0].history


def test_an_error_in_the_scoring_of_one_is_its_own(
    alone: Lone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = specs_of(tmp_path, ("lora", "inputs"))
    plain = trial.evaluate_best

    def broken(spec: TrialSpec, *rest: Any) -> Any:
        if spec == specs[0]:
            raise ZeroDivisionError("no text at all")
        return plain(spec, *rest)

    monkeypatch.setattr(trial, "evaluate_best", broken)
    records = run_packed(specs, tmp_path)
    assert records[0].status == "failed"
    assert str(records[0].reason).startswith("ZeroDivisionError: no text at all")
    assert_close(records[1], tmp_path, alone["inputs"])


class Kill:
    """Ends the process after so many training steps of all trials together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)
        self.left = steps

    def __call__(self, spec: TrialSpec, progress: Progress) -> None:
        self.left -= progress.phase == "train"
        if self.left < 0:
            raise KeyboardInterrupt("killed")


def test_a_killed_pack_goes_on_where_all_have_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("lora", "rank and dropout", "some tokens")
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole = run_packed(specs_of(folders[0], names), folders[0])
    killed = specs_of(folders[1], names)
    with pytest.raises(KeyboardInterrupt, match="killed"):  # before the first trial reports its sixth step
        run_packed(killed, folders[1], Kill(monkeypatch, 15), checkpoint_interval_s=0.0)
    for one, record in zip(whole, run_packed(killed, folders[1]), strict=True):
        assert "resumed after epoch 1, step 5, batch 1 of epoch 2" in log_of(folders[1], record)
        assert_same_result(one, folders[0], record, folders[1])


def test_one_that_saved_later_waits_for_the_others(
    alone: Lone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: list[int]
) -> None:
    """Killed after the checkpoint of one and before that of the other; then one of them goes on alone."""
    specs = specs_of(tmp_path, ("lora", "some tokens"))
    with pytest.raises(KeyboardInterrupt, match="killed"):
        run_packed(specs, tmp_path, Kill(monkeypatch, 11), checkpoint_interval_s=0.0)
    together.clear()
    records = run_packed(specs, tmp_path)
    assert together == [2, 2]
    assert "resumed after epoch 1, step 6" in log_of(tmp_path, records[0])
    assert "resumed after epoch 1, step 5" in log_of(tmp_path, records[1])
    for record, name in zip(records, ("lora", "some tokens"), strict=True):
        assert_close(record, tmp_path, alone[name])


def test_trials_that_are_asked_to_stop_save_and_can_go_on_alone(
    alone: Lone, tmp_path: Path, together: list[int]
) -> None:
    specs = specs_of(tmp_path, ("lora", "inputs"))
    records = run_packed(specs, tmp_path, stop=lambda: len(together) >= 2)
    assert [(record.status, record.reason) for record in records] == [("cancelled", "asked to stop at step 6 of 8")] * 2
    for spec, name in zip(specs, ("lora", "inputs"), strict=True):
        record = run(spec, tmp_path)
        assert "resumed after epoch 1, step 6" in log_of(tmp_path, record)
        assert_close(record.model_copy(update={"pack": None}), tmp_path, alone[name])


def test_trials_pause_at_their_rung_and_go_on_with_those_that_are_left(alone: Lone, tmp_path: Path) -> None:
    specs = specs_of(tmp_path, ("lora", "other rate", "inputs"))
    paused = run_packed(specs, tmp_path, rungs=(1,))
    assert [record.status for record in paused] == ["paused"] * 3
    for record, name in zip(run_packed(specs[:2], tmp_path), ("lora", "other rate"), strict=True):
        assert_close(record, tmp_path, alone[name])


@pytest.mark.parametrize(
    ("error", "said"),
    [(torch.OutOfMemoryError("too large"), "memory does not suffice"), (ValueError("odd shape"), "that failed")],
)
def test_where_steps_together_fail_each_takes_its_own(
    alone: Lone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(JointModel, "score", fails)
    names = ("lora", "rank and dropout")
    for record, name in zip(run_packed(specs_of(tmp_path, names), tmp_path), names, strict=True):
        one, folder = alone[name]
        assert record.pack is not None
        assert record.pack.alone == f"{said}: {type(error).__name__}: {error}"
        assert record.throughput is not None
        assert f"takes its training steps alone: {said}" in log_of(tmp_path, record)
        assert_same_result(record, tmp_path, one, folder)


def test_random_numbers_of_the_language_model_are_drawn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout between its layers, which no trial draws for itself where rows are together."""
    plain = pack.common_of

    def with_dropout(*given: Any) -> Any:
        made = plain(*given)
        layer = made.language_model.model.model.layers[0].mlp
        layer.act_fn = torch.nn.Sequential(layer.act_fn, torch.nn.Dropout(0.1))
        return made

    said = "the language model draws random numbers, such as those of dropout"
    monkeypatch.setattr(pack, "common_of", with_dropout)
    records = run_packed(specs_of(tmp_path, ("lora", "other rate")), tmp_path)
    for record in records:
        assert (record.status, record.reason) == ("finished", None)
        assert record.pack is not None
        assert record.pack.alone == f"that failed: ValueError: {said}"


@pytest.mark.parametrize(("share", "kept"), [(0.4, True), (1.02, False)])
def test_steps_are_taken_together_only_if_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, kept: bool
) -> None:
    """By the durations that the pack sees: a step alone takes a second, by this clock."""
    now = [0.0]
    monkeypatch.setattr(pack.time, "monotonic", lambda: now[0])
    alone_step, together_step = trial.Trial.step_on, Engine.step_with

    def step_on(self: trial.Trial, batch: Any) -> float:
        now[0] += 1.0
        return alone_step(self, batch)

    def step_with(self: Engine, gradients: Any) -> None:
        now[0] += share
        together_step(self, gradients)

    monkeypatch.setattr(trial.Trial, "step_on", step_on)
    monkeypatch.setattr(Engine, "step_with", step_with)
    budget = {"examples": 64, "epochs": 1}  # eight steps: three alone, four together, one more
    specs = specs_of(tmp_path, ("other rate", "nothing"), budget=budget)
    for record in run_packed(specs, tmp_path, pack="auto"):
        assert record.pack is not None
        assert record.pack.alone == (None if kept else "a step of 2 trials takes 1.02 of the time of 2 steps alone")
        assert record.phases_s["train"] == pytest.approx(3 + (share * 5 if kept else share * 4 + 1))


def test_trials_on_packed_weights_share_them_too(tmp_path: Path, together: list[int]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    backbone, methods = {"quantization": "nf4"}, ("lora", "inputs")
    (tmp_path / "alone").mkdir()
    lone = [
        (run(spec, tmp_path / "alone"), tmp_path / "alone") for spec in specs_of(tmp_path, methods, backbone=backbone)
    ]
    records = run_packed(specs_of(tmp_path, methods, backbone=backbone), tmp_path)
    assert together == [2] * 5
    for record, one in zip(records, lone, strict=True):
        assert_close(record, tmp_path, one)
