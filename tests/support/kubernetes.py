"""The part of Kubernetes' API that ``kubectl`` asks to take, show and delete RayJobs, on this machine.

The real ``kubectl`` talks to it. What it answers is what Kubernetes does (the words of its errors too, as kubectl
prints them), for two kinds of objects in one namespace; nothing is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]
NAMESPACE = "peft"
_JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
_VERBS = ["get", "list", "create", "patch", "delete"]
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


@dataclass
class Api:
    """What the server has, and how it judges.

    Attributes:
        objects: by path.
        judge: what is wrong with a RayJob, in one line; None: nothing.
        operator: whether the KubeRay operator is installed: without it nobody knows RayJobs.
        log: of the one pod.
        asked: the method, path and query of every request that is about an object.
    """

    judge: Callable[[Json], str | None] = lambda _: None
    objects: dict[str, Json] = field(default_factory=dict)
    operator: bool = True
    log: str = ""
    asked: list[tuple[str, str, dict[str, list[str]]]] = field(default_factory=list)

    def set_state(self, name: str, state: str) -> None:
        """Set the deployment status of a RayJob, as the operator does."""
        self.objects[f"{_JOBS}/{name}"]["status"] = {"jobDeploymentStatus": state}

    def groups(self) -> dict[str, Json]:
        """What kubectl asks first: which kinds there are, and that they can be judged without being created."""
        resources = {"/api/v1": [("configmaps", "ConfigMap"), ("pods", "Pod")]}
        resources |= {"/apis/ray.io/v1": [("rayjobs", "RayJob")]} if self.operator else {}
        version = {"groupVersion": "ray.io/v1", "version": "v1"}
        group = {"name": "ray.io", "versions": [version], "preferredVersion": version}
        found: dict[str, Json] = {
            "/api": {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group] if self.operator else []},
            f"/api/v1/namespaces/{NAMESPACE}": {
                "kind": "Namespace",
                "apiVersion": "v1",
                "metadata": {"name": NAMESPACE},
            },
            "/openapi/v3": {"paths": {p[1:]: {"serverRelativeURL": f"/openapi/v3{p}"} for p in resources}},
        }
        for path, kinds in resources.items():
            name_and_version = path.removeprefix("/apis/").removeprefix("/api/")
            found[path] = {
                "kind": "APIResourceList",
                "groupVersion": name_and_version,
                "resources": [
                    {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": _VERBS}
                    for name, kind in kinds
                ],
            }
            found[f"/openapi/v3{path}"] = {
                "openapi": "3.0.0",
                "info": {"title": "Kubernetes", "version": "v1"},
                "paths": {f"{path}/{kind}": {"patch": _patch(name_and_version, kind)} for _, kind in kinds},
            }
        return found

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Json) -> tuple[int, Json | str]:
        """The status and the object that a request is answered with."""
        if path in (groups := self.groups()):
            return 200, groups[path]
        self.asked.append((method, path, query))
        _, _, rest = path.partition("/namespaces/")
        namespace, kind, *name = rest.split("/")
        if namespace != NAMESPACE:
            return _failure(404, "NotFound", f'namespaces "{namespace}" not found')
        if kind == "pods":
            return self._pods(path, query)
        if method == "POST":
            return self._created(path, query, body)
        if path not in self.objects:
            return _failure(404, "NotFound", f'{kind}{".ray.io" if kind == "rayjobs" else ""} "{name[0]}" not found')
        return 200, self._existing(method, path, query, body)

    def _created(self, path: str, query: dict[str, list[str]], body: Json) -> tuple[int, Json]:
        name = body["metadata"]["name"]
        if body["kind"] == "RayJob" and (wrong := self.judge(body)):
            return _failure(422, "Invalid", f'RayJob.ray.io "{name}" is invalid: {wrong}')
        if query.get("dryRun") != ["All"]:
            self.objects[f"{path}/{name}"] = body
        return 201, body

    def _existing(self, method: str, path: str, query: dict[str, list[str]], body: Json) -> Json:
        found = self.objects[path]
        if method == "DELETE":
            return self.objects.pop(path)
        if method == "PATCH":
            found = {**found, **{key: value for key, value in body.items() if key != "metadata"}}
            if query.get("dryRun") != ["All"]:
                self.objects[path] = found
        return found

    def _pods(self, path: str, query: dict[str, list[str]]) -> tuple[int, Json | str]:
        """One pod: that of the submitter of the RayJob ``grid``."""
        metadata = {"name": "grid-abcde", "namespace": NAMESPACE}
        pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": {"containers": [{"name": "submitter"}]}}
        if path == _PODS:
            items = [pod] if query["labelSelector"] == ["job-name=grid"] else []
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}
        return (200, self.log) if path.endswith("/log") else (200, pod)


def _patch(version: str, kind: str) -> Json:
    group, _, name = version.rpartition("/")
    names = ("dryRun", "fieldManager", "fieldValidation")
    return {
        "x-kubernetes-group-version-kind": {"group": group, "version": name, "kind": kind},
        "parameters": [{"name": each, "in": "query", "schema": {"type": "string"}} for each in names],
        "responses": {},
    }


def _failure(code: int, reason: str, message: str) -> tuple[int, Json]:
    return code, {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": code,
        "message": message,
    }


@contextmanager
def api_server(api: Api, folder: Path) -> Iterator[Path]:
    """Serve an API on this machine.

    Yields:
        The configuration file for ``KUBECONFIG``.
    """

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            address = urlsplit(self.path)
            given = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = parse_qs(address.query)
            code, answer = api.answer(self.command, address.path, query, json.loads(given or b"{}"))
            content = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(content.encode())))
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_POST = do_PATCH = do_DELETE = _do

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    config = folder / "kubeconfig.yaml"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: here\ncontexts: [{name: here, context: {cluster: here}}]\n"
        f"clusters: [{{name: here, cluster: {{server: 'http://127.0.0.1:{server.server_port}'}}}}]\n",
        encoding="utf-8",
    )
    try:
        yield config
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
