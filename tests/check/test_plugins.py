"""``harness check``: every check of the contracts can fail with a message; correct plugins pass all of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters.registry import ADAPTERS
from harness.check import adapter as adapter_checks
from harness.check import encoder as encoder_checks
from harness.check import metric as metric_checks
from harness.check import modality as modality_checks
from harness.check import task as task_checks
from harness.check.adapter import AdapterSubject
from harness.check.encoder import EncoderSubject
from harness.check.metric import REFERENCES, MetricSubject
from harness.check.modality import ModalitySubject
from harness.check.plugins import check_plugins, problems_of, promise, run_checks
from harness.check.process import elsewhere
from harness.check.task import TaskSubject
from harness.core.errors import UserError
from harness.core.registry import Entry
from tasks.modalities.series import Series
from tasks.registry import ENCODERS, METRICS, MODALITIES, TASKS
from tests.support.broken_adapters import ADAPTER_CASES, GoodAdapter, StackedAdapter
from tests.support.broken_plugins import (
    ENCODER_CASES,
    METRIC_CASES,
    MODALITY_CASES,
    TASK_CASES,
    GoodEncoder,
    GoodMetric,
    GoodTask,
)

ROOT = Path(__file__).parents[2]
CASES = TASK_CASES | MODALITY_CASES | ENCODER_CASES | METRIC_CASES | ADAPTER_CASES
CHECKS = {
    task_checks: (*task_checks.FIRST, *task_checks.THEN),
    modality_checks: (*modality_checks.FIRST, *modality_checks.THEN),
    encoder_checks: (*encoder_checks.FIRST, *encoder_checks.THEN),
    metric_checks: (*metric_checks.FIRST, *metric_checks.THEN),
    adapter_checks: (*adapter_checks.FIRST, *adapter_checks.THEN),
}
FILE = """
from collections.abc import Mapping
from pathlib import Path

from harness import Example, Metric, Part, Scores, Task, TaskConfig


class EchoConfig(TaskConfig):
    words: tuple[str, ...] = ("one", "two")


class Echo(Task):
    contexts = ("question", "answer")
    modalities: Mapping[str, str] = {}
    metrics = ("same_words",)
    Config = EchoConfig

    @classmethod
    def sample(cls, folder):
        return {}

    def prepare(self):
        pass

    def examples(self, split):
        return [Example(f"{split} {w}", (Part("question", f"say {w}"),), (w,)) for w in self.config.words]


class SameWords(Metric):
    labels = {"same_words": "Same words"}

    def score(self, predictions, references):
        if predictions.keys() != references.keys() or not all(references.values()):
            raise ValueError("ids differ, or there is no reference")
        right = {key: float(predictions[key] in texts) for key, texts in references.items()}
        rows = {key: {"same_words": value} for key, value in right.items()}
        return Scores({"same_words": sum(right.values()) / len(right)}, rows)
"""


@pytest.fixture(autouse=True)
def no_plugins_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (TASKS, MODALITIES, ENCODERS, METRICS, ADAPTERS):
        monkeypatch.setattr(registry, "added", [])


def subject_of(plugin: type, folder: Path) -> Any:
    """The subject that the checks of a plugin take."""
    if issubclass(plugin, GoodTask):
        return TaskSubject(plugin, f"{plugin.__module__}:{plugin.__name__}", folder)
    if issubclass(plugin, Series | GoodEncoder):
        files = [folder / "train1.csv", folder / "train2.csv"]
        for number, path in enumerate(files, 1):
            path.write_text("1\n" * 9 * number + "2\n", encoding="utf-8")
        kind: type[ModalitySubject] = EncoderSubject if issubclass(plugin, GoodEncoder) else ModalitySubject
        return kind(plugin, files, folder)
    if issubclass(plugin, GoodAdapter):
        # Registered by the class itself: most are made without a name in a module.
        target = f"{__name__}:{plugin.__name__}"
        ADAPTERS.added = [Entry("under_test", target, "tests", "1.0")]
        globals()[plugin.__name__] = plugin
        return AdapterSubject(plugin, "under_test", folder)
    return MetricSubject(plugin, REFERENCES)


def checked(target: Path | str) -> tuple[bool, str]:
    """Whether ``harness check`` passes, and what it prints."""
    console = Console(file=io.StringIO(), width=80)
    passed = check_plugins(str(target), console)
    return passed, console.file.getvalue()  # type: ignore[attr-defined]


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    """The file of plugins, with changes."""
    text = FILE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "echo.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_check_has_a_plugin_that_fails_it() -> None:
    assert set(CASES) == {check for checks in CHECKS.values() for check in checks}


@pytest.mark.parametrize(
    ("check", "plugin", "words"),
    [
        pytest.param(check, *case, id=f"{check.__name__}-{number}")
        for check, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_a_broken_contract_is_reported(
    check: Callable[[Any], Iterator[str]], plugin: type, words: str, tmp_path: Path
) -> None:
    problems = problems_of(check, subject_of(plugin, tmp_path))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(problems))
    assert all("\n" not in problem for problem in problems)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("module", "plugin"),
    [
        (task_checks, GoodTask),
        (modality_checks, Series),
        (encoder_checks, GoodEncoder),
        (metric_checks, GoodMetric),
        (adapter_checks, GoodAdapter),
        (adapter_checks, StackedAdapter),
    ],
    ids=["task", "modality", "encoder", "metric", "adapter", "adapter that can be stacked"],
)
def test_a_correct_plugin_passes_every_check(module: Any, plugin: type, tmp_path: Path) -> None:
    results = list(run_checks(module.FIRST, module.THEN, subject_of(plugin, tmp_path)))
    assert {result.promise: result.problems for result in results} == {promise(c): () for c in CHECKS[module]}


def test_checks_that_depend_on_a_failed_one_are_not_run(tmp_path: Path) -> None:
    ((broken, _), *_) = TASK_CASES[task_checks.sample_gives_options]
    results = list(run_checks(task_checks.FIRST, task_checks.THEN, subject_of(broken, tmp_path)))
    assert all(result.problems for result in results[: len(task_checks.FIRST)])
    assert [result.problems for result in results[len(task_checks.FIRST) :]] == [None] * len(task_checks.THEN)


def test_a_file_of_a_task_and_a_metric_is_checked(tmp_path: Path) -> None:
    passed, printed = checked(written(tmp_path))
    assert passed, printed
    lines = printed.splitlines()
    assert lines[0].startswith("task echo  ")
    assert "metric same_words  " in printed
    count = len(CHECKS[task_checks]) + 1 + len(CHECKS[metric_checks])
    assert lines[-1] == f"{count} checks passed, 0 failed"
    assert sum(line.startswith("  ✓ ") for line in lines) == count
    assert [entry.name for entry in TASKS.added] == ["echo"]


def test_a_file_of_an_encoder_is_checked_on_files_of_its_modality(tmp_path: Path) -> None:
    path = tmp_path / "lengths.py"
    path.write_text(
        "import torch\nfrom harness import Encoder\nclass Lengths(Encoder):\n    modality, width = 'series', 1\n"
        "    def encode(self, items):\n        return [torch.tensor([[float(len(item))]]) for item in items]\n"
    )
    passed, printed = checked(path)
    assert passed, printed
    assert printed.startswith("encoder lengths  ")
    assert printed.splitlines()[-1] == f"{len(CHECKS[encoder_checks])} checks passed, 0 failed"


def test_what_fails_is_printed_in_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    path = written(tmp_path, ("right = {key:", "right = {1 / 0:"), ('"question", f"say', '"query", f"say'))
    passed, printed = checked(path)
    assert not passed
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "1 / 0" in text)
    assert f"      ZeroDivisionError: division by zero ({path}:{line})\n" in printed
    assert "train example 'train one': an input of context 'query'; allowed: answer, question" in printed
    assert "✗ Every input belongs to a known context" in printed
    assert "… and 1 more" in printed
    assert "not run, a check before it failed" in printed
    assert "Traceback" not in printed


def test_another_process_tells_of_torch_and_of_the_order_of_a_set(tmp_path: Path) -> None:
    path = written(
        tmp_path, ("self.config.words]", "set(map(str, range(9)))]"), ("from pathlib", "import torch\nfrom pathlib")
    )
    subjects = [
        TaskSubject(TASKS.load(f"{path}:Echo"), f"{path}:Echo", tmp_path),
        TaskSubject(TASKS.load("tasks.trends:Trends"), "tasks.trends:Trends", tmp_path),
    ]
    for subject in subjects:
        subject.task.prepare()
    found = elsewhere(subjects, tmp_path / "cache")
    assert [words.partition(" ")[0] for words in found[f"{path}:Echo"]] == ["importing", "another"]
    assert found["tasks.trends:Trends"] == []


def test_a_process_that_fails_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "gone.py").write_text("", encoding="utf-8")
    subject = TaskSubject(GoodTask, f"{tmp_path / 'gone.py'}:Gone", tmp_path)
    assert (
        "another process failed: harness.core.errors.UserError: " in elsewhere([subject], tmp_path)[subject.target][0]
    )


def test_a_package_is_found_by_its_distribution_or_its_module() -> None:
    with pytest.raises(UserError, match=r"no installed package 'no-such' registers plugins; allowed: .*context-peft-h"):
        checked("no-such")
    with pytest.raises(UserError, match=r"gone\.py'; allowed: a Python file"):
        checked("gone.py")


def test_a_file_with_an_adapter_method_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "ssf_adapter.py"
    source = (ROOT / "examples" / "adapter_plugin" / "ssf_adapter.py").read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    passed, printed = checked(path)
    assert passed, printed
    assert printed.startswith("adapter ssf  ")
    assert printed.splitlines()[-1] == f"{len(CHECKS[adapter_checks])} checks passed, 0 failed"
    path.write_text(source.replace("else value_BTD + self.beta", "else value_BTD - self.beta"), encoding="utf-8")
    passed, printed = checked(path)
    assert not passed
    assert "✗ Where it can be merged into the weights, the merged model computes the same" in printed


def test_a_plugin_that_cannot_be_imported_is_a_failed_check() -> None:
    TASKS.added = [Entry("gone", "tasks.trends:Gone", "gone-tasks", "1.0")]
    passed, printed = checked("gone_tasks")
    assert not passed
    assert "✗ It can be imported and has the right base class" in printed
    assert "module 'tasks.trends' has no attribute 'Gone'" in printed
