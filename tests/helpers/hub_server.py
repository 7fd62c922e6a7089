"""A small Hugging Face Hub on this machine, for the real `huggingface_hub` client.

It speaks the endpoints that the client calls to publish and to download (the large files by
git-lfs, not by Xet), keeps everything in memory, and can drop connections on request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER, ORGANISATION = "me", "us"
TOKEN, READ_TOKEN = "hf_write", "hf_read"
LARGE = (".safetensors", ".bin", ".gguf")  # what goes by git-lfs


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)  # the hash of the newest commit

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        text = f"{len(self.commits)} {branch} {message}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
        self.commits.append(commit)
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision, revision)
        return next((one for one in self.commits if one.sha == sha), None)

    @property
    def head(self) -> Commit:
        found = self.at("main")
        assert found is not None
        return found


class Hub:
    """State of the server.

    blobs: large files by hash.
    sent: number of complete uploads of each.
    drops: number of further connections to drop in the middle of a file, by its hash or name.
    race: somebody else commits while files are uploaded.
    down: no request is answered.
    calls: "METHOD path" of each request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        self.race = self.down = False
        self.calls: list[str] = []
        self.url = ""

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Create a repository, or a commit in it, as somebody else."""
        repo = self.repos.setdefault(name, Repo(private))
        repo.add("main", "by hand", files)
        return repo


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


NO_REPO = _Refused(404, "RepoNotFound", "Repository not found")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        address = urlsplit(self.path)
        self.query, path = parse_qs(address.query), address.path
        self.hub.calls.append(f"{self.command} {path}")
        if self.hub.down:
            return self._hang_up()
        try:
            for method, pattern, handler in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return handler(self, *map(unquote, found.groups()))
            raise _Refused(404, "", f"no such address: {path}")
        except _Refused as no:
            # The client must not reuse the connection, since the body may be unread.
            self._send(
                json.dumps({"error": no.message, "url": self.hub.url}).encode(),
                no.status,
                {"X-Error-Code": no.code, "X-Error-Message": no.message, "Connection": "close"},
            )

    # What requests are made of

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, READ_TOKEN):
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return token

    def _may_write(self, name: str) -> None:
        if self._token() != TOKEN or name.split("/")[0] not in (USER, ORGANISATION):
            raise _Refused(403, "", "You don't have the rights")

    def _repo(self, name: str) -> Repo:
        token, repo = self._token(), self.hub.repos.get(name)
        if repo is None or (repo.private and token is None):
            raise NO_REPO
        return repo

    def _commit_at(self, name: str, revision: str) -> Commit:
        commit = self._repo(name).at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _hang_up(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)  # a reset, as of a line that breaks
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def _dropped(self, key: str) -> bool:
        self.hub.drops[key] -= 1
        return self.hub.drops[key] >= 0

    # Responses

    def whoami(self) -> None:
        if self._token() is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        self._json({"name": USER, "type": "user", "orgs": [{"name": ORGANISATION}]})

    def create(self) -> None:
        wanted = json.loads(self._body())
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self._may_write(name)
        if name in self.hub.repos:
            raise _Refused(409, "", "You already created this model repo")
        repo = self.hub.repos[name] = Repo(wanted.get("visibility") == "private")
        repo.add("main", "initial commit", {".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        self._body()
        self._may_write(name)
        repo = self._repo(name)
        if branch in repo.branches:
            raise _Refused(409, "", "Reference already exists")
        repo.branches[branch] = repo.head.sha
        self._json({})

    def info(self, name: str, revision: str = "main") -> None:
        commit = self._commit_at(name, revision)
        card = commit.files.get("README.md", b"").decode()
        licence = re.search(r"^license: (\S+)$", card, re.M)
        self._json(
            {
                "id": name,
                "sha": commit.sha,
                "private": self.hub.repos[name].private,
                "siblings": [{"rfilename": path} for path in commit.files],
                "cardData": {"license": licence[1]} if licence else None,
            }
        )

    def tree(self, name: str, revision: str) -> None:
        files = self._commit_at(name, revision).files
        self._json([_entry(path, content) for path, content in files.items()])

    def validate(self) -> None:
        self._body()
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        self._may_write(name)
        there = self._commit_at(name, revision).files
        if self.hub.race:
            self._repo(name).add(revision, "meanwhile", there)
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(file["path"], there.get(file["path"])),
                    }
                    for file in files
                ]
            }
        )

    def batch(self, name: str) -> None:
        self._may_write(name)
        objects = json.loads(self._body())["objects"]
        for one in objects:
            if one["oid"] not in self.hub.blobs:
                one["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
        self._json({"transfer": "basic", "objects": objects})

    def lfs(self, oid: str) -> None:
        if self._dropped(oid):
            self.rfile.read(1000)
            return self._hang_up()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "", "another content")
        self.hub.blobs[oid] = content
        self.hub.sent[oid] += 1
        self._send(b"")

    def verify(self) -> None:
        wanted = json.loads(self._body())
        if len(self.hub.blobs[wanted["oid"]]) != wanted["size"]:
            raise _Refused(400, "", "another size")
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        self._may_write(name)
        before, header = self._commit_at(name, revision), lines[0]["value"]
        if header.get("parentCommit", before.sha) != before.sha:
            raise _Refused(412, "", "A commit has happened since")
        files = dict(before.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                assert line["key"] == "file", line["key"]
                files[value["path"]] = base64.b64decode(value["content"])
        done = self._repo(name).add(revision, header["summary"], files)
        url = f"{self.hub.url}/{name}/commit/{done.sha}"
        self._json({"success": True, "commitOid": done.sha, "commitUrl": url})

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_at(name, revision)
        if path not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{_oid(path, content)}"'}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if self.command == "GET" and self._dropped(path):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True  # too early
            return
        if start:
            first, last = int(start[1]), len(content) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(content[first:], 206, headers)
        self._send(content, 200, headers)


def _oid(path: str, content: bytes | None) -> str | None:
    """As git names a file's content, or git-lfs a large one's."""
    if content is None:
        return None
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 1}
    return entry


NAME = r"([\w.-]+/[\w.-]+)"
MODEL = rf"/api/models/{NAME}"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"{MODEL}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"{MODEL}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"{MODEL}/commit/([^/]+)", _Handler.commit),
    ("GET", rf"{MODEL}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"{MODEL}/revision/([^/]+)", _Handler.info),
    ("GET", MODEL, _Handler.info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs),
    ("POST", "/verify", _Handler.verify),
    (("GET", "HEAD"), rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
