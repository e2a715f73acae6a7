"""A model hub on loopback: repositories, and commits with files of both kinds, plain and LFS."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class PushServer:
    """The part of the hub's API that a push uses.

    Attributes:
        repositories: What was asked for when each repository was created, by its name.
        files: The content of each committed file, by its path.
        commits: The messages of the commits.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self._objects: dict[str, bytes] = {}  # of LFS, by digest
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Authorization"] != f"Bearer {hub.token}":
                    self._answer(403, {"error": "this token may not write"})
                else:
                    self._answer(*hub._post(self.path.partition("?")[0], body))

            def do_PUT(self) -> None:
                length = int(self.headers["Content-Length"])
                hub._objects[self.path.removeprefix("/lfs/")] = self.rfile.read(length)
                self._answer(200, {})

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def _post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, asked)
            return status, {"url": f"{self.address}/{name}"}
        if re.fullmatch(r"/api/models/[\w-]+/[\w-]+/preupload/main", path):
            asked = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked}
            return 200, {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.address}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return 200, {"objects": objects, "transfer": "basic"}
        if found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            number = f"{len(self.commits):040x}"
            return 200, {
                "commitUrl": f"{self.address}/{found[1]}/commit/{number}",
                "commitOid": number,
                "success": True,
            }
        return 404, {"error": f"there is no {path}"}

    def _commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.commits.append(value["summary"])
        elif key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self._objects[value["oid"]]


@contextmanager
def push_server(token: str) -> Iterator[PushServer]:
    """A hub that lets one token write."""
    hub = PushServer(token)
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
