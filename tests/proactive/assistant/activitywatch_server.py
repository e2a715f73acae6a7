"""A real ActivityWatch server, and a watcher that plays a scripted session to it."""

import asyncio
import heapq
import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from httpx2 import Client, HTTPError

from proactive.assistant.clock import Clock
from tests.patience import HANG

PYTHON = "PROACTIVE_AW_SERVER"  # names the interpreter of an environment with aw-server, which has pins of its own


class ActivityWatchServer:
    """A server with a database in a folder. It can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = Client(base_url=f"{self.url}/api/0", trust_env=False, timeout=HANG)
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        places = {f"XDG_{kind}_HOME": str(self.folder / kind) for kind in ("DATA", "CONFIG", "CACHE", "STATE")}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [os.environ[PYTHON], "-m", "aw_server", "--host", "127.0.0.1", "--port", str(self.port)],
                env={**os.environ, **places, "HOME": str(self.folder), "PYTHONPATH": ""},
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + HANG
        while True:
            try:
                self.http.get("/info").raise_for_status()
                return
            except HTTPError:
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < until, self.log()
                time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(HANG)
            self.process = None

    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def create(self, bucket: str, kind: str) -> None:
        body = {"client": "watcher", "type": kind, "hostname": "laptop"}
        self.http.post(f"/buckets/{bucket}", json=body).raise_for_status()

    def heartbeat(self, bucket: str, at: float, data: dict[str, Any], pulse: float, duration: float = 0.0) -> None:
        body = {"timestamp": datetime.fromtimestamp(at, UTC).isoformat(), "duration": duration, "data": data}
        self.http.post(f"/buckets/{bucket}/heartbeat", params={"pulsetime": pulse}, json=body).raise_for_status()

    def export(self, path: Path) -> Path:
        path.write_bytes(self.http.get("/export").raise_for_status().content)
        return path


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[str]:
    """The address of a server that answers each request with a status and a body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def recorded_requests(server: ActivityWatchServer) -> Iterator[tuple[str, list[str]]]:
    """A proxy before a server: its address, and all text that it was sent."""
    requests: list[str] = []

    def forward(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        requests.append(f"{request.requestline}\n{request.headers}")
        answer = server.http.get(f"{server.url}{request.path}")
        return answer.status_code, answer.content

    with answering(forward) as url:
        yield url, requests


class Over(Exception):  # noqa: N818 - the end of a script
    """The script is played to its end."""


class Script(Clock):
    """The time of a script. Whoever waits lets the watchers act until then.

    Args:
        start: The first moment.
    """

    stepwise = True

    def __init__(self, start: float) -> None:
        self.time = start
        self.end = start
        self._count = itertools.count()
        self._acts: list[tuple[float, int, Callable[[], object]]] = []

    def at(self, moment: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._acts, (moment, next(self._count), act))

    def now(self) -> float:
        return self.time

    async def reach(self, at: float) -> None:
        while self._acts and self._acts[0][0] <= min(at, self.end):
            moment, _, act = heapq.heappop(self._acts)
            self.time = max(self.time, moment)
            act()
        if at > self.end:
            raise Over
        self.time = max(self.time, at)
        await asyncio.sleep(0)

    def seconds_until(self, at: float) -> float:
        return 0.0


class Watchers:
    """Send heartbeats of a scripted session, as ActivityWatch's own watchers do.

    Args:
        server: The server. Heartbeats are kept while it is away, and come in order when it is back.
        script: The time.
    """

    KINDS = {  # noqa: RUF012 - type of a bucket, seconds between heartbeats, seconds of a pulse
        "windows": ("currentwindow", 4.0, 5.0),
        "presence": ("afkstatus", 5.0, 185.0),
        "tabs": ("web.tab.current", 20.0, 80.0),
        "code": ("app.editor.activity", 5.0, 20.0),
    }

    def __init__(self, server: ActivityWatchServer, script: Script) -> None:
        self.server = server
        self.script = script
        self.kept: list[tuple[str, float, dict[str, Any], float]] = []
        for bucket, (kind, _, _) in self.KINDS.items():
            server.create(bucket, kind)

    def during(self, bucket: str, start: float, end: float, delay: float = 0.0, **data: Any) -> None:
        """Let something go on from `start` to `end`. Each heartbeat takes `delay` seconds to the server."""
        _, step, pulse = self.KINDS[bucket]
        moments = [start + number * step for number in range(int((end - start) // step) + 1)]
        if moments[-1] < end:
            moments.append(end)
        for moment in moments:
            self.script.at(moment + delay, lambda moment=moment: self._send(bucket, moment, data, pulse))

    def _send(self, bucket: str, moment: float, data: dict[str, Any], pulse: float) -> None:
        self.kept.append((bucket, moment, data, pulse))
        if self.server.process is not None:
            for kept in self.kept:
                self.server.heartbeat(*kept)
            self.kept = []
