"""What all tests share: caches in a temporary folder, no network, and a way to write experiment files."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read once, when huggingface_hub is imported: a test that asks the hub would pass or fail by the weather.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# By default Ray gives its workers the niceness 15: beside a busy process on the same core they get 3 % of it.
os.environ.setdefault("RAY_worker_niceness", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker: with more, workers wait for one another's threads. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Collecting imports torch, transformers and all tests: a million objects, none of which becomes garbage. The collector
# looks at them again and again while they are made, for a quarter of the time, and in each trial's full collection.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def harness_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the whole test session, the workers of pytest-xdist included, instead of ``~/.cache/harness``."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "harness-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the tables of MLflow, to be copied as ``mlflow.db``: to make them takes a second each time."""
    from harness.tracking.store import check_uri, default_uri

    folder = tmp_path_factory.mktemp("database")
    check_uri(default_uri(folder))
    return folder / "mlflow.db"


@pytest.fixture
def experiment_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the text as ``tmp_path/experiment.yaml``."""

    def write(text: str) -> Path:
        path = tmp_path / "experiment.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
