"""Plugin registries: one for each kind, filled from entry points; built-in plugins are registered the same way.

A plugin's identity is its registered name, its distribution and its result version, not the location of its class: a
class that moves to another module is the same plugin, with the same trial ids and saved adapters. How to load it
(``target``) is stored beside the identity, because workers may have the code without its entry points.

An experiment can also list Python files (``plugins:``), whose classes are registered for the process. Their
distribution is the file's name and their result version a digest of its content, and of the modules that it imports
from its folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from harness.core.beside import modules_beside
from harness.core.errors import UserError, did_you_mean
from harness.core.files import digests_of
from harness.core.revisions import distribution_revision

T = TypeVar("T")


class Plugin(BaseModel):
    """A plugin in a spec: its identity (``id``), the version of its code, and how to load it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # registered name
    distribution: str  # that registers it; for a plugin file, the file's name
    # Raised by the author when results change; for a plugin file, a digest of its content. With a digest of its data
    # files behind a plus sign, if it declares any.
    result_version: int | str
    target: str  # "package.module:Class", or "/folder/file.py:Class"
    version: str | None = None  # of the distribution
    git_revision: str | None = None  # of the distribution, if known

    @property
    def key(self) -> str:
        """``context-peft-harness:lora``."""
        return f"{self.distribution}:{self.name}"

    @property
    def id(self) -> str:
        """``context-peft-harness:lora@1``."""
        return f"{self.key}@{self.result_version}"


def identity(content: Any) -> Any:
    """Replace every ``Plugin`` in JSON by its id, so that the result does not depend on where a class is.

    A mapping is a plugin if its keys are exactly the fields of ``Plugin``.
    """
    if isinstance(content, Mapping):
        if content.keys() == Plugin.model_fields.keys():
            return Plugin.model_validate(content).id
        return {key: identity(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [identity(value) for value in content]
    return content


def plugins_in(content: Any) -> list[Plugin]:
    """All plugins in JSON, in order."""
    if isinstance(content, Mapping):
        if content.keys() == Plugin.model_fields.keys():
            return [Plugin.model_validate(content)]
        content = list(content.values())
    return [plugin for value in content for plugin in plugins_in(value)] if isinstance(content, list | tuple) else []


@dataclass(frozen=True)
class Entry:
    """A registered plugin that is not imported yet."""

    name: str
    target: str  # "package.module:Class", or "/folder/file.py:Class"
    distribution: str  # its name, or the path of a plugin file
    version: str | None = None

    @property
    def origin(self) -> str:
        """``distribution 1.2``, or the path of a plugin file."""
        return f"{self.distribution} {self.version}" if self.version else self.distribution


@cache
def installed(group: str, _path: tuple[str, ...]) -> tuple[Entry, ...]:
    """The entry points of the distributions on the path, read once: with 300 distributions each look takes 15 ms."""
    return tuple(
        Entry(point.name, point.value, point.dist.name, point.dist.version)
        if point.dist
        else Entry(point.name, point.value, "unknown distribution")
        for point in entry_points(group=group)
    )


class Registry(Generic[T]):
    """The plugins of one kind.

    Args:
        kind: the kind in error messages ("adapter").
        group: entry point group ("harness.adapters").
        contract: returns the base class of the plugins; a function, so that listing plugins imports nothing.
        combine: combines several classes, whose names are joined by "+", into one; None: they cannot be combined.
        accepts: which subclasses that a file defines are plugins; by default all.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        contract: Callable[[], type[T]],
        combine: Callable[[tuple[type[T], ...]], type[T]] | None = None,
        accepts: Callable[[type[T]], bool] = lambda _: True,
    ) -> None:
        self.kind, self.group, self.contract, self.combine, self.accepts = kind, group, contract, combine, accepts
        self.added: list[Entry] = []  # from files

    def entries(self) -> dict[str, Entry]:
        """All entries by name.

        Raises:
            UserError: two distributions register different classes under one name.
        """
        found: dict[str, Entry] = {}
        for entry in (*installed(self.group, tuple(sys.path)), *self.added):
            other = found.get(entry.name)
            if other and other.target != entry.target:
                raise UserError(
                    f"{self.kind} {entry.name!r} is registered twice: {other.target} by {other.origin} and "
                    f"{entry.target} by {entry.origin}; uninstall one or rename it"
                )
            found[entry.name] = entry
        return dict(sorted(found.items()))

    def find(self, name: str, where: str = "") -> Entry:
        """The entry with this name.

        Raises:
            UserError: the name is unknown; the message starts with ``where`` and suggests the nearest name.
        """
        entries = self.entries()
        if name not in entries:
            prefix = f"{where}: " if where else ""
            raise UserError(f"{prefix}unknown {self.kind} {name!r}; {did_you_mean(name, entries)}")
        return entries[name]

    def find_all(self, name: str, where: str = "") -> tuple[Entry, ...]:
        """The entries of a name, several if they are joined by "+"; errors as in ``find``."""
        names = name.split("+") if self.combine else [name]
        return tuple(self.find(one, where) for one in names)

    def plugins(self, name: str, where: str = "") -> tuple[Plugin, ...]:
        """The plugins of a name, several if they are joined by "+". Imports them to get their result versions.

        Raises:
            UserError: as in ``find`` and ``load``.
        """
        return tuple(self._plugin(entry) for entry in self.find_all(name, where))

    def plugin(self, name: str, where: str = "") -> Plugin:
        """The plugin with this name; errors as in ``plugins``."""
        return self._plugin(self.find(name, where))

    def _plugin(self, entry: Entry) -> Plugin:
        if entry.target.rpartition(":")[0].endswith(".py"):
            path = Path(entry.target.rpartition(":")[0])
            digest = _with_files(_digest(path), self.load(entry.target), f"{self.kind} {entry.target}")
            return Plugin(name=entry.name, distribution=path.name, result_version=digest, target=entry.target)
        plugin = self.load(entry.target)
        version = getattr(plugin, "result_version", None)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise UserError(
                f"{self.kind} {entry.target}: result_version: found {version!r}; allowed: an integer of 1 or more"
            )
        return Plugin(
            name=entry.name,
            distribution=entry.distribution,
            result_version=_with_files(version, plugin, f"{self.kind} {entry.target}"),
            target=entry.target,
            version=entry.version,
            git_revision=_git_revision(entry.distribution),
        )

    def load(self, *targets: str) -> Any:
        """Import the class of each target, ``package.module:Class``; combine them if there are several.

        Raises:
            UserError: one cannot be imported or is not a subclass of the contract, or they cannot be combined.
        """
        classes = tuple(self._load(target) for target in targets)
        if len(classes) == 1:
            return classes[0]
        if self.combine is None:
            raise UserError(f"{self.kind} {' + '.join(targets)}: cannot be combined")
        return self.combine(classes)

    def check_files(self, plugin: Plugin) -> None:
        """Check that a plugin's data files are still those that its trial was planned with.

        Raises:
            UserError: one has changed, or cannot be read.
        """
        planned = str(plugin.result_version).partition(_FILES)[2]
        where = f"{self.kind} {plugin.name}"
        found = str(_with_files("", self.load(plugin.target), where)).partition(_FILES)[2]
        if found != planned:
            raise UserError(
                f"{where}: its data files have changed since this trial was planned ({planned or 'none'}, now "
                f"{found or 'none'}); run the experiment again"
            )

    def _load(self, target: str) -> type[T]:
        contract, plugin = self.contract(), import_target(target, self.kind)
        if not (isinstance(plugin, type) and issubclass(plugin, contract)):
            raise UserError(
                f"{self.kind} {target}: must be a subclass of {contract.__module__}.{contract.__qualname__}"
            )
        return plugin

    def add(self, entry: Entry) -> None:
        """Register a plugin for this process; replaces an earlier one with the same target."""
        self.added = [other for other in self.added if other.target != entry.target] + [entry]


_FILES = "+"  # between a plugin's own result version and the digest of its data files


def _with_files(version: int | str, plugin: Any, where: str) -> int | str:
    """The result version, with a digest of the plugin's data files if it has any: ``1+3f2a…``.

    Raises:
        UserError: a file does not exist or cannot be read.
    """
    files = [Path(file) for file in plugin.files()]
    if not files:
        return version
    try:
        # By name, not by path: folders differ between machines.
        lines = sorted(f"{path.name} {digest}\n" for path, digest in zip(files, digests_of(files), strict=True))
    except OSError as error:
        raise UserError(f"{where}: its data file {error.filename} cannot be read: {error.strerror or error}") from error
    return f"{version}{_FILES}{hashlib.sha256(''.join(lines).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


@cache
def _git_revision(name: str) -> str | None:
    try:
        return distribution_revision(distribution(name))
    except PackageNotFoundError:
        return None


def import_target(target: str, kind: str) -> Any:
    """Import ``package.module:Class`` or ``/folder/file.py:Class``.

    Args:
        target: of a plugin.
        kind: of plugin, for the message.

    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, attribute = target.rpartition(":")
    try:
        if module_name.endswith(".py"):
            return getattr(_load_file(Path(module_name)), attribute)
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # importing a plugin's module runs arbitrary code
        raise UserError(f"{kind} {target}: cannot be imported: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """An error of an import, with the line that raised it: the innermost one that is no library's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen ")
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    place = "" if isinstance(error, SyntaxError) or not own else f" ({own[-1].filename}:{own[-1].lineno})"
    return f"{type(error).__name__}: {error}{place}"


def _place(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def shipped_place(path: Path) -> Path:
    """Where a copy of a plugin file is that a sweep has sent to its workers, relative to the folder of our packages."""
    return Path("shipped_plugins", _place(path), path.name)


def plugin_file(path: Path) -> Path:
    """A plugin file, or the copy of it that was sent to this machine if it is not here."""
    shipped = Path(__file__).parents[2] / shipped_place(path)
    return shipped if not path.is_file() and shipped.is_file() else path


def _load_file(path: Path) -> ModuleType:
    """Import a Python file as a module, once per process, path and content."""
    place, path = _place(path), plugin_file(path)  # a copy in another folder has its own data files
    name = f"harness_plugin_{_digest(path)}_{place}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # noqa: S101 - true of every file called *.py
        module = importlib.util.module_from_spec(spec)
        _forget_changed(modules_beside(path))
        sys.modules[name] = module  # before it runs, because dataclasses and pydantic look up their module
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


_loaded: dict[str, bytes] = {}  # by path of a module beside a plugin file: its digest when it was last imported


def _forget_changed(modules: Iterable[Path]) -> None:
    """Let modules whose files have changed be imported anew."""
    for path in modules:
        place, digest = os.path.realpath(path), hashlib.sha256(path.read_bytes()).digest()
        if _loaded.setdefault(place, digest) != digest:
            _loaded[place] = digest
            for name, module in list(sys.modules.items()):
                if os.path.realpath(getattr(module, "__file__", None) or "") == place:
                    del sys.modules[name]


def _digest(path: Path) -> str:
    """Of a plugin file's content, with that of the modules that it imports from its folder."""
    found = hashlib.sha256(path.read_bytes())
    for module in modules_beside(path):
        content = hashlib.sha256(module.read_bytes()).hexdigest()
        found.update(f"\n{module.relative_to(path.parent).as_posix()} {content}".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:12]


def add_file(path: Path, where: str, registries: Iterable[Registry[Any]]) -> None:
    """Register the plugins that a Python file defines, by their attribute ``name`` or the class name in snake_case.

    Args:
        path: the file, which is executed.
        where: location of its path in the experiment, for messages.
        registries: of the kinds of plugins that it may define.

    Raises:
        UserError: the file does not exist, fails, or defines no plugin.
    """
    path, registries = path.resolve(), tuple(registries)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{where}: found {str(path)!r}; allowed: a Python file")
    try:
        module = _load_file(path)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {path}: cannot be imported: {_told(error)}") from error
    found = False
    for registry in registries:
        for plugin in filter(registry.accepts, _defined_in(module, registry.contract())):
            found = True
            given = getattr(plugin, "name", None)  # of adapter methods: a property
            snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plugin.__name__).lower()
            name = given if isinstance(given, str) and given else snake_case
            registry.add(Entry(name, f"{path}:{plugin.__name__}", str(path)))
    if not found:
        kinds = ", ".join(registry.contract().__name__ for registry in registries)
        raise UserError(f"{where}: {path}: defines no plugin; allowed: subclasses of {kinds}")


def _defined_in(module: ModuleType, contract: type) -> Sequence[type]:
    """The concrete subclasses of a contract that a module defines itself, without imported ones."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, contract)]
    return [plugin for plugin in classes if plugin.__module__ == module.__name__ and not inspect.isabstract(plugin)]
