"""A hub on this machine that speaks as much of the Hugging Face protocol as a download needs, and
fails as it is told.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest

MAIN, OTHER = "a" * 40, "b" * 40
Files = dict[str, bytes]


@dataclass
class Hub:
    """A hub on this machine: what it has, what it was asked, and how it fails.

    Attributes:
        repositories: Files by path, by "owner/name" and commit.
        refused: The status, the error code and nothing more for some repositories.
        cut: How many bytes of a file go out before the connection breaks, one number for each
            request of it.
    """

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "other": OTHER})
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def got(self, path: str) -> list[str]:
        """The requests for the content of one file, with the range asked for."""
        return [line for line in self.asked if line.startswith("GET") and f"/{path}" in line]


class Answer(BaseHTTPRequestHandler):
    """One request to the hub: /api/models/R/revision/V, /api/models/R/tree/V, or
    /R/resolve/V/path.
    """

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/?]+)/?([^?]*)(?:\?.*)?",
            self.path,
        )
        if found is None:  # the library also asks for what no download needs
            return self.refuse(404, "")
        repository, what, revision, path = found.groups()
        commit = self.hub.branches.get(revision, revision)
        if repository in self.hub.refused:
            return self.refuse(*self.hub.refused[repository])
        if repository not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        files = self.hub.repositories[repository].get(commit)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if what == "revision":
            about = {
                "id": repository,
                "sha": commit,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            return self.send_json({**about, "siblings": [{"rfilename": name} for name in files]})
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in files.items()
            ]
            return self.send_json(rows)
        return self.send_file(path, files[path], commit)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value: Any) -> None:
        self.respond(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, path: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked.group(1)) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cut.get(path)
        limit = cuts.pop(0) if cuts and self.command == "GET" else None
        self.respond(206 if asked else 200, data[start:], headers, limit)

    def respond(
        self, status: int, body: bytes, headers: dict[str, str], limit: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:limit])
        if limit is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves nothing yet; the library's endpoint is its address, and its cache is
    tmp_path/hub.
    """
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("AnswerHere", (Answer,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    use_endpoint(hub.address, tmp_path, monkeypatch)
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()


def use_endpoint(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME set when the library is imported, and no waiting between its
    attempts.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
