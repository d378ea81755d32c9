"""The tracking store: its URI, and a connection that fails fast."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness.core.errors import UserError
from harness.core.paths import locate
from harness.tracking.schema import HALF_MADE, advice, make_database

HIDDEN = "***"  # in place of a password


class UnreachableError(UserError):
    """A store does not answer, or cannot be used."""


def default_uri(runs: Path) -> str:
    """``MLFLOW_TRACKING_URI`` of MLflow, otherwise SQLite next to the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(runs.resolve() / "mlflow.db")


def is_database(uri: str) -> bool:
    """Whether the store is a database that every process uses by itself, not a server or a folder."""
    return uri.partition(":")[0].partition("+")[0] in {"sqlite", "postgresql", "mysql", "mssql"}


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite database in a file; ``%``, ``?`` and ``#`` in its path have a meaning in a URI."""
    if not _means_something(path):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path)).render_as_string()


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, without its options (``?timeout=60``); None for other URIs."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database else None


def located(uri: str, folder: Path) -> str:
    """The URI from an experiment, its SQLite file or folder relative to the folder of the experiment's file.

    Raises:
        ValueError: there is one in the current folder only; the message says what to write.
    """
    if (database := sqlite_path(uri)) is not None:
        if database.is_absolute() or str(database) == ":memory:":
            return uri
        from sqlalchemy.engine import make_url

        path = str(locate(database, folder, explain=True))
        return make_url(uri).set(database=path).render_as_string(hide_password=False)
    return uri if ":" in uri or uri.startswith("databricks") else str(locate(uri, folder, explain=True))


def artifact_uri(folder: Path) -> str:
    """The URI of a folder for artifacts."""
    return folder.as_uri() if _means_something(folder) else str(folder)


def _means_something(path: Path) -> bool:
    return bool(set("%?#") & set(str(path)))


def redacted(uri: str) -> str:
    """The URI without the password of its database or server, for display and storage."""
    return without_password(uri, uri)


def without_password(text: str, uri: str) -> str:
    """A text without the password of a URI."""
    password = urlsplit(uri).password
    return text.replace(f":{password}@", f":{HIDDEN}@") if password else text


def reason_of(error: Exception, uri: str) -> str:
    """An error of the store on one line, without the password of its URI."""
    return " ".join(without_password(str(error), uri).split())[:300]


def connect(uri: str) -> Any:
    """A client that fails fast: with the defaults of MLflow, a server that is down blocks every call for minutes."""
    _import_mlflow()
    from mlflow import MlflowClient

    def client(of: str) -> Any:
        with _no_folder_named_like(of):
            return MlflowClient(tracking_uri=of)

    database = sqlite_path(uri)
    if database is not None and str(database) != ":memory:" and not database.exists():
        make_database(database, lambda new: client(sqlite_uri(new)).search_experiments(max_results=1))
    return client(uri)


def repository_of(run: Any, uri: str) -> Any:
    """Where the artifacts of a run are: the client would ask the store for the run once more to know it."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

    return get_artifact_repository(add_databricks_profile_info_to_artifact_uri(run.info.artifact_uri, uri), uri)


def _import_mlflow() -> None:
    """Import MLflow with the settings that it reads when it is imported, and before a call."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # of what is called, sent to MLflow's makers
    # MLflow prints the address of every run that ends, with the password of its URI.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of errors that it raises too
    importlib.import_module("mlflow")


def import_libraries(uri: str) -> None:
    """Import what a connection needs, in the main thread: two threads that import can wait for one another."""
    _import_mlflow()
    if is_database(uri):
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")


@contextmanager
def _no_folder_named_like(uri: str) -> Iterator[None]:
    """Remove the empty folder that MLflow makes for a database whose path is escaped: ``a%23b`` next to ``a#b``."""
    database = sqlite_path(uri)
    written = Path(uri.removeprefix("sqlite:///")).parent
    new = [] if database is None else [path for path in (written, *written.parents) if not path.exists()]
    try:
        yield
    finally:
        for folder in new:
            if database is not None and folder not in database.parents:
                with suppress(OSError):  # not empty, or not made
                    folder.rmdir()


def check_uri(uri: str, where: str = "tracking.mlflow_uri", experiment: str | None = None) -> None:
    """Check that the store answers, and that nobody has deleted the MLflow experiment that a grid will log to.

    Args:
        uri: of the store.
        where: the option or key that holds the URI.
        experiment: name of the experiment, if a grid will log to it.

    Raises:
        UnreachableError: the store does not answer.
        UserError: the experiment is deleted.
    """
    try:
        client = connect(uri)
        client.search_experiments(max_results=1)
        found = client.get_experiment_by_name(experiment) if experiment else None
    except Exception as error:  # database drivers and HTTP clients raise many types
        raise unusable(uri, error, where) from error
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(
            f"{where}: the MLflow experiment {experiment!r} at {redacted(uri)!r} is deleted; restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}) or give the experiment another name"
        )


def unusable(uri: str, error: Exception, where: str = "tracking.mlflow_uri") -> UnreachableError:
    """The error that says that a store cannot be used."""
    database, reason = sqlite_path(uri), reason_of(error, uri)
    hint = f"; {text}" if database and HALF_MADE.search(reason) and (text := advice(database)) else ""
    return UnreachableError(f"{where}: {redacted(uri)!r} could not be used: {reason}{hint}")
