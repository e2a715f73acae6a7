"""A model hub on loopback that has one dataset: the part of the hub's interface that `datasets` reads."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = hashlib.sha1(b"revision").hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves the files of the dataset `name`, and remembers what was asked."""

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        self.name = name
        self.files = files
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path, files = unquote(urlsplit(self.path).path), self.server.files
        api, resolve = f"/api/datasets/{self.server.name}", f"/datasets/{self.server.name}/resolve/"
        name = path.removeprefix(resolve).partition("/")[2]
        if path.startswith(resolve) and name in files:
            digest = hashlib.sha1(files[name]).hexdigest()
            self._send(files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": REVISION})
        elif path.startswith(f"{api}/tree/"):
            sizes = [{"type": "file", "path": name, "size": len(content)} for name, content in files.items()]
            self._send_json([{**one, "oid": hashlib.sha1(files[str(one["path"])]).hexdigest()} for one in sizes])
        elif path == api or path.startswith(f"{api}/revision/"):
            listed = [{"rfilename": name} for name in files]
            self._send_json({"id": self.server.name, "sha": REVISION, "siblings": listed})
        else:
            known = path.startswith((api, resolve))
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@contextmanager
def served(name: str, files: Mapping[str, bytes]) -> Iterator[HubServer]:
    """Serve a dataset while the block runs."""
    with HubServer(name, files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
