"""A model hub on loopback: as much of its API as downloads need, with branches that move."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMITS = {"one": "1" * 40, "two": "2" * 40}


class Hub:
    """One repository, `organisation/model`: `files` by commit, `branches` to commits. `token`: who
    does not send it is refused. `asked` are the paths of all requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.token: str | None = None
        self.asked: list[str] = []
        self.url = ""

    def push(self, commit: str, files: dict[str, bytes], branch: str = "main") -> None:
        self.files[commit] = files
        self.branches[branch] = commit

    def push_folder(self, commit: str, folder: Path, branch: str = "main") -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.push(commit, files, branch)

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        self.asked.append(path)
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, {"X-Error-Message": f"Invalid credentials: {token}"}, b"{}"
        path = path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/organisation/model/revision/(\S+)", path):
            commit = self._commit(found[1])
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name} for name in self.files[commit]]
            return _json({"id": "organisation/model", "sha": commit, "siblings": siblings})
        if found := re.fullmatch(r"/api/models/organisation/model/tree/(\w+)", path):
            return _json(
                [
                    {"type": "file", "path": name, "oid": _etag(content), "size": len(content)}
                    for name, content in self.files[found[1]].items()
                ]
            )
        if found := re.fullmatch(r"/organisation/model/resolve/(\w+)/(\S+)", path):
            content = self.files[found[1]][found[2]]
            return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": found[1]}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _commit(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.files else None)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
