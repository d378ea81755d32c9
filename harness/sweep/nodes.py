"""Asks every node of a Ray cluster what it has: versions, code, plugins, and the files that the trials read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.errors import ProblemList
from harness.sweep.ray_library import NodeAffinitySchedulingStrategy, ray

_ANSWER_S = 120.0  # for a node's answer; a worker process starts in seconds
PACKAGES = ("harness", "adapters", "tasks", "results", "clusters")
# Of two nodes with different versions of these, trials may give different results.
_DISTRIBUTIONS = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What the nodes are asked.

    Attributes:
        token: a file in the run folder, and its content.
        files: files and folders that the trials read.
        packages: top-level packages and modules that the trials import.
        stored: the URL of the run folder, and the name of a file in it whose content is its name.
        variables: environment variables that a node needs to read the URL.
    """

    token: tuple[str, str] | None
    files: Sequence[str] = ()
    packages: Sequence[str] = PACKAGES
    stored: tuple[str, str] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A node that is alive, and its answer.

    Attributes:
        name: its IP address, and its name where that is another one.
        answer: ``python``, ``versions``, ``code`` (of our packages; None: one is missing), ``missing`` (packages),
            ``unreadable`` (path → reason), ``problem`` (why it did not answer).
    """

    name: str
    answer: Answer


def ask_nodes(question: Question) -> list[Node]:
    """Ask every node that is alive; the first one is the driver's."""
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)
    look = ray.remote(num_cpus=0, max_retries=0)(_looker())
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            question.token,
            tuple(question.files),
            tuple(question.packages),
            PACKAGES,
            _DISTRIBUTIONS,
            question.stored,
            dict(question.variables),
        )
        for node in alive
    ]
    ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S)
    return [Node(node_name(node), _answer(one)) for node, one in zip(alive, asked, strict=True)]


def node_name(node: Mapping[str, Any]) -> str:
    """The IP address of a node of ``ray.nodes()``, and its name where that is another one."""
    address, name = str(node["NodeManagerAddress"]), str(node.get("NodeName") or "")
    return f"{address} ({name})" if name not in {"", address} else address


def _answer(asked: Any) -> Answer:
    try:
        return dict(ray.get(asked, timeout=0.1))
    except ray.exceptions.GetTimeoutError:
        return {"problem": f"no answer in {_ANSWER_S:g} s"}
    except ray.exceptions.RayError as error:  # the node died, or its runtime environment could not be made
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"problem": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}


def _looker() -> Callable[..., Answer]:
    """The function that a node runs. It is pickled as code, because a node may lack this module."""

    def look(
        token: tuple[str, str] | None,
        files: Sequence[str],
        packages: Sequence[str],
        own: Sequence[str],
        distributions: Sequence[str],
        stored: tuple[str, str] | None,
        variables: Mapping[str, str],
    ) -> dict[str, Any]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import os
        import platform
        from pathlib import Path

        def problem_of(name: str) -> str | None:
            path = Path(name)
            try:
                if path.is_dir():
                    next(iter(os.scandir(path)), None)
                    return None
                with path.open("rb") as file:
                    found = file.read(64)
            except OSError as error:
                return error.strerror or str(error)
            return (
                "another file than the driver's" if token and name == token[0] and found != token[1].encode() else None
            )

        def problem_of_url(url: str, name: str) -> str | None:
            os.environ.update(variables)
            from harness.core.storage import Folder, StorageError

            try:
                return None if Folder(url).read(name) == name.encode() else "not what the driver sees there"
            except StorageError as error:
                return str(error)

        unreadable = {name: problem_of(name) for name in [*([token[0]] if token else []), *files]}
        folders: list[Path] = []
        missing: list[str] = []
        for package in packages:
            spec = importlib.util.find_spec(package)
            if spec is None:
                missing.append(package)
            elif package in own and spec.origin:
                folders.append(Path(spec.origin).parent)
        if stored and not missing:
            unreadable[stored[0]] = problem_of_url(*stored)
        digest = hashlib.sha256()
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                digest.update(str(path.relative_to(folder.parent)).encode() + path.read_bytes())
        versions: dict[str, str | None] = {}
        for name in distributions:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        return {
            "python": platform.python_version(),
            "versions": versions,
            "code": None if set(missing) & set(own) else digest.hexdigest(),
            "missing": missing,
            "unreadable": {name: reason for name, reason in unreadable.items() if reason},
        }

    return look


def own_code() -> str:
    """The digest of the driver's own packages, as nodes answer it in ``code``."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def lacks_code(nodes: Sequence[Node]) -> bool:
    """Whether a node that answered has not our code and all plugins."""
    own = own_code()
    return any(node.answer.get("missing") or node.answer.get("code", own) != own for node in nodes)


def check_nodes(nodes: Sequence[Node], run: str | Path, shipped: bool) -> list[str]:
    """Check the answers.

    Args:
        nodes: asked with ``ask_nodes``.
        run: the run folder or its URL, for the message.
        shipped: whether the workers get our code.

    Returns:
        Differences that do not stop a sweep: a line for each version that is not the driver's.

    Raises:
        UserError: a node did not answer, lacks a package, or cannot read the run folder or a file.
    """
    problems, notes, own = ProblemList(), [], own_code()
    here = nodes[0].answer
    for node in nodes:
        answer = node.answer
        if "problem" in answer:
            problems.add(f"node {node.name}: {answer['problem']}")
            continue
        if answer["missing"]:
            problems.add(
                f"node {node.name}: Python packages not found: {', '.join(answer['missing'])}; install them there, or "
                "set ship_code: true in the profile"
            )
        for path, reason in answer["unreadable"].items():
            in_run = Path(path).parent == run
            what = f"the run folder {run}" if in_run else path
            hint = "; put the run folder on a file system that all nodes share, or at a URL (--output s3://…)"
            problems.add(f"node {node.name}: cannot read {what}: {reason}{hint if in_run else ''}")
        for name, found in {"python": answer["python"], **answer["versions"]}.items():
            expected = {"python": here.get("python"), **here.get("versions", {})}.get(name)
            if found is None:
                problems.add(f"node {node.name}: {name} is not installed")
            elif found != expected:
                notes.append(f"node {node.name}: {name} {found}, but {expected} on {nodes[0].name}")
        if not shipped and not answer["missing"] and answer["code"] != own:
            notes.append(f"node {node.name}: another version of the harness than here")
    problems.raise_any()
    return notes
