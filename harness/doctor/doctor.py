"""All checks, in order: ``diagnose`` is called by ``harness doctor`` and by scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clusters.profiles import load_profile
from harness.core.storage import is_url
from harness.doctor import machine, services
from harness.doctor.finding import Finding


def diagnose(profile: str | Path = "local", output: str | Path | None = None) -> Iterator[Finding]:
    """Check whether this machine, and the cluster of a profile, can run trials; findings come as they are made.

    Nothing is left behind. A cluster that runs is asked; one that a job would start is not started.

    Args:
        profile: where trials would run: the name of a profile, or the path of its YAML file.
        output: parent of the run folders, a folder or a URL; default: the profile's ``storage``, else ``runs``.

    Raises:
        UserError: the profile is invalid.
    """
    where = load_profile(profile)
    output = str(output or where.storage or "runs")
    local = Path("runs" if is_url(output) else output)
    yield from machine.versions()
    yield from machine.gpu()
    yield from machine.java()
    yield from machine.cpus()
    yield from machine.memory()
    yield from machine.disk(local)
    yield from machine.feature_cache()
    yield from machine.sockets()
    yield from services.stored(output) if is_url(output) else machine.output_folder(local)
    yield from services.mlflow(local)
    yield from services.launcher(where)
    if services.is_cluster(where):
        yield from services.nodes(where, local)
