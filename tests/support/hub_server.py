"""A stand-in for the Hugging Face hub over HTTP: one repository, whose weights are headers with nothing behind."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

__all__ = ["HubServer", "safetensors_header"]

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_SIZES = {"BF16": 2, "F32": 4, "F16": 2}


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """First bytes of a file with these tensors, and the whole file's size."""
    described: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _SIZES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


class HubServer:
    """Serves ``owner/name`` at ``url`` while the context lasts.

    Attributes:
        files: contents; of weights only the beginning.
        sizes: of files that are longer than their contents.
        requests: (method, path, Range header or "", token or "") of all that came.
        token: needed for everything, if given.
    """

    def __init__(self, model: str, files: dict[str, bytes], sizes: dict[str, int], token: str = "") -> None:
        self.model, self.files, self.sizes, self.token = model, files, sizes, token
        self.requests: list[tuple[str, str, str, str]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def weight_reads(self) -> list[tuple[str, str]]:
        """(path, Range) of reads of weights that go beyond what lies here: a download."""
        found = []
        for method, path, wanted, _ in self.requests:
            name = path.rpartition("/")[2]
            if method == "GET" and name.endswith(".safetensors"):
                last = wanted.partition("-")[2]
                if not last or int(last) > max(len(self.files[name]), 100_000):
                    found.append((path, wanted))
        return found


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.server_hub
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        path = self.path.partition("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range", ""), token))
        if hub.token and token != hub.token:
            self._send(401, b'{"error": "Invalid credentials"}', {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith(f"/api/models/{hub.model}/tree/"):
            listed = [{"type": "file", "path": n, "size": self._size(n), "oid": "0" * 40} for n in hub.files]
            self._send(200, json.dumps(listed).encode(), {}, body)
        elif path.startswith(f"/api/models/{hub.model}"):
            siblings = [{"rfilename": name} for name in hub.files]
            info = {"id": hub.model, "modelId": hub.model, "sha": _COMMIT, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {}, body)
        elif path.startswith(f"/{hub.model}/resolve/") and path.rpartition("/")[2] in hub.files:
            self._file(path.rpartition("/")[2], body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def _size(self, name: str) -> int:
        return self.server_hub.sizes.get(name, len(self.server_hub.files[name]))

    def _file(self, name: str, body: bool) -> None:
        content, size = self.server_hub.files[name], self._size(name)
        headers = {"X-Repo-Commit": _COMMIT, "ETag": f'"{name}-{size}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted:
            first, _, last = wanted.partition("-")
            end = min(int(last or size - 1), len(content) - 1)
            part = content[int(first) : end + 1]
            self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{end}/{size}"}, body)
        else:
            self._send(200, content, headers, body, size=size)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool, size: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.end_headers()
        if body:
            self.wfile.write(content)
