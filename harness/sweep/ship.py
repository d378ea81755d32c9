"""Puts our packages and the plugins of a sweep into one folder, which Ray sends to its workers as ``working_dir``.

Plugins that are packages come whole, with their data. Plugin files are in ``shipped_plugins/``, in a folder named by
the path they have here, by which ``harness.core.registry`` finds them; modules and data files beside them come too.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.core.beside import modules_beside
from harness.core.errors import UserError
from harness.core.registry import Plugin, import_target, plugins_in, shipped_place
from harness.experiment.plan import TrialSpec
from harness.sweep.nodes import PACKAGES

_ROOT = Path(__file__).parents[2]
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", "runs")


def plugins_of(specs: Iterable[TrialSpec]) -> list[Plugin]:
    """All plugins of trials, each once."""
    sections = {spec.model_dump_json(include={"task", "backbone", "adapter"}): spec for spec in specs}.values()
    found = [plugin for spec in sections for plugin in plugins_in(spec.model_dump(mode="json"))]
    return list({plugin.target: plugin for plugin in found}.values())


def packages_of(plugins: Sequence[Plugin]) -> list[str]:
    """Our packages, and the top-level ones of the plugins, without plugin files."""
    modules = [module for plugin in plugins if not (module := plugin.target.rpartition(":")[0]).endswith(".py")]
    return list(dict.fromkeys([*PACKAGES, *(module.partition(".")[0] for module in modules)]))


def files_of(plugins: Sequence[Plugin]) -> list[Path]:
    """The plugin files."""
    modules = (plugin.target.rpartition(":")[0] for plugin in plugins)
    return [Path(module) for module in dict.fromkeys(modules) if module.endswith(".py")]


def collect(plugins: Sequence[Plugin], folder: Path) -> None:
    """Copy the code that workers need into a folder.

    Args:
        plugins: of the trials.
        folder: empty.

    Raises:
        UserError: the package of a plugin is not found here.
    """
    for package in packages_of(plugins):
        source = _ROOT / package if package in PACKAGES else _source(package)
        if source.is_dir():
            shutil.copytree(source, folder / package, ignore=_LEFT_OUT)
        else:
            shutil.copy2(source, folder / source.name)
    for path in files_of(plugins):
        place = folder / shipped_place(path)
        place.parent.mkdir(parents=True)
        shutil.copy2(path, place)
        for beside in modules_beside(path):
            to = place.parent / beside.relative_to(path.parent)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(beside, to)
    for plugin in plugins:
        module = plugin.target.rpartition(":")[0]
        if module.endswith(".py"):
            _copy_data(Path(module), plugin, folder)


def _source(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"package {package}: not found, so it cannot be sent to the nodes of the cluster")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(str(spec.origin))


def _copy_data(path: Path, plugin: Plugin, folder: Path) -> None:
    """Copy the data files of a plugin file that lie below its folder; others must be where all nodes see them."""
    beside = folder / shipped_place(path).parent
    for file in map(Path, import_target(plugin.target, "plugin").files()):
        if file.resolve().is_relative_to(path.parent.resolve()):
            to = beside / file.resolve().relative_to(path.parent.resolve())
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to)
