"""A small Hub on this machine: the part of its API that `huggingface_hub` uses for model repositories.

It keeps repositories in memory, in branches of commits, with access by token. Large files go the way of Git LFS, to an
address of their own that gets no token, as a CDN's does. The Hub's other way for large files, Xet, is missing: its
client is told to do without by `HF_HUB_DISABLE_XET`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


LARGE = (".safetensors", ".bin", ".png")


@dataclass
class Repository:
    """A repository: what each branch points to, and the files of each commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def resolve(self, revision: str) -> str | None:
        """Returns the commit that a branch or the start of a commit's id names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Adds files to a branch, and returns the new commit."""
        content = {**self.commits[self.branches[branch]], **files}
        oid = hashlib.sha1(repr((self.branches, sorted(content.items()))).encode()).hexdigest()
        self.commits[oid] = content
        self.branches[branch] = oid
        return oid


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        users: the user of each token.
        repositories: by their ids.
        uploads: what came by LFS, by SHA-256.
        requests: method, path and `Range` of every request.
        cuts: for how many more downloads of a large file the connection breaks, and after which part of what is left.
        lost: a pattern of paths on which the connection breaks in the middle of each request, before anything is done.
    """

    users: dict[str, str] = field(default_factory=lambda: {"my-token": "me", "your-token": "you"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cuts: int = 0
    cut_after: float = 0.5
    lost: str | None = None
    url: str = ""

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the files at a revision."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[revision]]

    def card(self, repo_id: str, revision: str = "main") -> str:
        """Returns a repository's card."""
        return self.files(repo_id, revision)["README.md"].decode()


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub in a thread for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.lost is not None and re.search(self.hub.lost, path):
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        for methods, pattern, respond in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                try:
                    respond(self, body, **match.groupdict())
                except Refusal as refusal:
                    self._send(refusal.status, b"{}", refusal.headers)
                return
        self._send(404, b"{}", {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _user(self) -> str | None:
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        user = self.hub.users.get(sent.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return user

    def _readable(self, repo_id: str) -> Repository:
        user, repository = self._user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        repository = self._readable(repo_id)
        if self._user() != repo_id.split("/")[0]:
            raise Refusal(403 if self._user() else 401, message="You need write access to this repository")
        return repository

    def create(self, body: bytes) -> None:
        """Makes a repository."""
        wish, user = json.loads(body), self._user()
        if user is None:
            raise Refusal(401, message="Sign in first")
        owner = wish.get("organization") or user
        if owner != user:
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        repo_id = f"{owner}/{wish['name']}"
        is_new = repo_id not in self.hub.repositories
        if is_new:
            private = wish.get("visibility") == "private" or bool(wish.get("private"))
            self.hub.repositories[repo_id] = Repository(private)
        self._send_json({"url": f"{self.hub.url}/{repo_id}"}, 200 if is_new else 409)

    def branch(self, body: bytes, repo_id: str, revision: str) -> None:
        """Makes a branch."""
        repository = self._writable(repo_id)
        if revision in repository.branches:
            raise Refusal(409)
        repository.branches[revision] = repository.branches["main"]
        self._send_json({})

    def validate_card(self, body: bytes) -> None:
        """Checks a card's metadata, where a base model has to be an id."""
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1]) or {}
        base = metadata.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            self._send_json({"errors": [{"message": f"base_model {base!r} is not valid"}]}, 400)
        else:
            self._send_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        """Returns for each file whether it is uploaded as a large file."""
        self._writable(repo_id)
        names = [file["path"] for file in json.loads(body)["files"]]
        self._send_json(
            {
                "files": [
                    {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
                    for name in names
                ]
            }
        )

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        """Says where each large file is to be sent."""
        self._writable(repo_id)
        answer = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/upload/{wanted['oid']}", "header": {}}
            is_there = wanted["oid"] in self.hub.uploads
            answer.append({**wanted, **({} if is_there else {"actions": {"upload": upload}})})
        self._send_json({"transfer": "basic", "objects": answer})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        """Takes a large file."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400)
        self.hub.uploads[oid] = body
        self._send(200, b"", {})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        """Adds files to a branch."""
        repository = self._writable(repo_id)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound")
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        oid = repository.commit(revision, files)
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        """Tells the commit and the files of a revision."""
        repository = self._readable(repo_id)
        oid = repository.resolve(revision)
        if oid is None:
            raise Refusal(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in repository.commits[oid]]
        self._send_json({"id": repo_id, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings})

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        """Gives a file, or where to get it if it is large."""
        repository = self._readable(repo_id)
        oid = repository.resolve(revision)
        if oid is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in repository.commits[oid]:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            refusal.headers["X-Repo-Commit"] = oid
            raise refusal
        content = repository.commits[oid][name]
        sha = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not name.endswith(LARGE):
            self._send(200, content, headers)
            return
        self.hub.uploads[sha] = content
        elsewhere = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha}"
        linked = {"Location": elsewhere, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked})

    def cdn(self, body: bytes, oid: str) -> None:
        """Gives a large file, or the rest of it; the connection may break on the way."""
        if "Authorization" in self.headers:
            raise Refusal(400, message="A token was sent to the CDN")
        content = self.hub.uploads[oid]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts:
            self.hub.cuts -= 1
            self.wfile.write(rest[: int(len(rest) * self.hub.cut_after)])
            self.close_connection = True
        else:
            self.wfile.write(rest)


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_card),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<revision>.+)", _Handler.branch),
    (("POST",), f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (("GET",), f"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), f"/api/models/{_REPO}", _Handler.info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/upload/(?P<oid>[0-9a-f]+)", _Handler.lfs_upload),
    (("GET", "HEAD"), f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    (("GET", "HEAD"), "/cdn/(?P<oid>[0-9a-f]+)", _Handler.cdn),
]
