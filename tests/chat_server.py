"""A chat endpoint on loopback that answers as it is told, and misbehaves as it is told."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Reply:
    """One HTTP answer: of a model's text, or of anything else."""

    text: Any = None
    finish_reason: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    cut: bool = False  # the connection ends in the middle of the body
    usage: dict[str, Any] | None = None
    thoughts: str | None = None
    endless: bool = False  # the body comes again and again, until the client goes away

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        if self.thoughts is not None:
            message["reasoning_content"] = self.thoughts
        content: Body = {"choices": [{"message": message, "finish_reason": self.finish_reason}]}
        return json.dumps(content | ({} if self.usage is None else {"usage": self.usage})).encode()


class ChatServer:
    """Requests as they came, and how each is answered.

    `answer` is called with the request's body and with how often the same one came before.
    """

    def __init__(self, answer: Callable[[Body, int], Reply]) -> None:
        self.answer = answer
        self.bodies: list[Body] = []
        self.asked: list[str] = []  # each body as text
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms

            def do_POST(self) -> None:
                chat._serve(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away, as killed ones do

        self.server = Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        text = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
        body = json.loads(text)
        with self._lock:
            before = self.asked.count(text)
            self.bodies.append(body)
            self.asked.append(text)
            self.keys.append(handler.headers.get("Authorization"))
            self.paths.append(handler.path)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            assert handler.path.partition("?")[0] == "/v1/chat/completions"
            reply = self.answer(body, before)
            time.sleep(reply.delay)
            content = reply.content()
            handler.send_response(reply.status)
            for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2] if reply.cut else content)
            while reply.endless:  # ends with an error when nobody reads any more
                handler.wfile.write(content)
            if reply.cut:
                handler.wfile.flush()
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
        finally:
            with self._lock:
                self.under_way -= 1


@contextmanager
def chat_server(answer: Callable[[Body, int], Reply]) -> Iterator[ChatServer]:
    """A server in a thread, until the block ends."""
    chat = ChatServer(answer)
    thread = threading.Thread(target=chat.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()
