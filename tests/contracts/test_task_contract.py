"""The contract of every registered plugin: a new one is checked as soon as it is registered.

The checks are those of ``harness check``: ``harness/check/task.py``, ``harness/check/modality.py``,
``harness/check/metric.py``, ``harness/check/adapter.py``.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.registry import ADAPTERS
from harness.check import adapter as adapter_checks
from harness.check import metric as metric_checks
from harness.check import modality as modality_checks
from harness.check import task as task_checks
from harness.check.adapter import AdapterSubject
from harness.check.metric import MetricSubject
from harness.check.modality import ModalitySubject
from harness.check.plugins import Samples, problems_of
from harness.check.process import elsewhere
from harness.core.registry import Entry, Registry
from tasks.metrics.coco import meteor
from tasks.registry import METRICS, MODALITIES, TASKS

CHECKS = {
    TASKS: (*task_checks.FIRST, *task_checks.THEN),
    MODALITIES: (*modality_checks.FIRST, *modality_checks.THEN),
    METRICS: (*metric_checks.FIRST, *metric_checks.THEN),
    ADAPTERS: (*adapter_checks.FIRST, *adapter_checks.THEN),
}
CASES = [
    pytest.param(registry, entry, id=f"{registry.kind}-{entry.name}")
    for registry in CHECKS
    for entry in registry.entries().values()
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    """The samples of all registered tasks, with their own cache, and METEOR with a table of two paraphrases.

    No check asks for a paraphrase, and Java takes 8 s to read all of them; test_caption_metrics.py does with all.
    """
    folder = tmp_path_factory.mktemp("contract")
    with gzip.open(folder / "paraphrases.gz", "wt") as table:
        table.write("0.5\ncat\ntom\n0.5\ndog\nhound\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(folder / "cache"))
        patch.setattr(meteor, "PARAPHRASES", str(folder / "paraphrases.gz"))
        yield Samples(folder / "samples")
        meteor._end()


@pytest.fixture(scope="module")
def subject_of(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Registry, Entry], Any]:
    """Creates the subject of each plugin once: METEOR takes seconds to start."""
    made: dict[str, Any] = {}

    def subject(registry: Registry, entry: Entry) -> Any:
        if entry.target not in made:
            if registry is TASKS:
                made[entry.target] = samples.of(entry)
            elif registry is MODALITIES:
                folder = tmp_path_factory.mktemp(entry.name)
                plugin = registry.load(entry.target)
                made[entry.target] = ModalitySubject(plugin, samples.files(entry.name), folder)
            elif registry is ADAPTERS:
                folder = tmp_path_factory.mktemp(entry.name)
                made[entry.target] = AdapterSubject(registry.load(entry.target), entry.name, folder)
            else:
                made[entry.target] = MetricSubject(registry.load(entry.target), samples.references(entry.name))
        return made[entry.target]

    return subject


@pytest.mark.parametrize(("registry", "entry"), CASES)
def test_it_passes_every_check(registry: Registry, entry: Entry, subject_of: Callable[..., Any]) -> None:
    subject = subject_of(registry, entry)
    assert {check.__name__: problems_of(check, subject) for check in CHECKS[registry]} == {
        check.__name__: () for check in CHECKS[registry]
    }


def test_another_process_reads_the_same_and_no_task_imports_torch(samples: Samples, tmp_path: Path) -> None:
    subjects = [samples.of(entry) for entry in TASKS.entries().values()]
    assert elsewhere(subjects, tmp_path / "cache") == {subject.target: [] for subject in subjects}
