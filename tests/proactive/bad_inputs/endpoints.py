"""Endpoints that cannot be, that are not there, or that send what nobody can use."""

import gzip
import threading
from collections.abc import Sequence
from typing import Any

from datamodules.files.reading import MAX_TEXT_BYTES
from tests.chat_server import ChatServer, Reply
from tests.proactive.bad_inputs.case import Case, Place
from tests.proactive.bad_inputs.data import ESCAPES, root

PACKED = {"Content-Encoding": "gzip"}
ENDLESS = {"Content-Length": str(10**12)}


def said(text: str, status: int = 200, **headers: str) -> Reply:
    return Reply(body=text.encode(), status=status, headers=headers)


FAILED, REFUSED, LONG = "failed 1 times", "refuses", "longer than the limit"
REPLIES: dict[str, tuple[Reply, str]] = {  # by the model's name: what the server sends, and what is named
    "400": (said('{"error": {"message": "no such field"}}', 400), "no such field"),
    "401": (said("{}", 401), "401"),
    "403": (said("", 403), "403"),
    "404": (said("<html>not found</html>", 404), "404"),
    "405": (said("", 405), REFUSED),
    "413": (said("{}", 413), REFUSED),
    "422": (said('{"detail": [{"msg": "model: field required"}]}', 422), "field required"),
    "301": (said("", 301, Location="/elsewhere"), "301"),
    "408": (said("", 408), FAILED),
    "429": (said("{}", 429), FAILED),
    "500": (said('{"error": "broken"}', 500), "broken"),
    "502": (said("<html>bad gateway</html>", 502), "bad gateway"),
    "503": (said("", 503), FAILED),
    "a-day": (said("{}", 429, **{"Retry-After": "86400"}), "24 hours"),
    "a-year": (said("{}", 503, **{"Retry-After": "Fri, 31 Dec 2199 23:59:59 GMT"}), "asks to wait"),
    "a-wait-without-end": (said("{}", 503, **{"Retry-After": "9" * 400}), "asks to wait"),
    "empty": (said(""), FAILED),
    "text": (said("hello"), FAILED),
    "html": (said("<html></html>"), FAILED),
    "null": (said("null"), FAILED),
    "list": (said("[]"), FAILED),
    "number": (said("5"), FAILED),
    "no-choices": (said("{}"), "choices"),
    "choices-empty": (said('{"choices": []}'), "choices"),
    "choices-null": (said('{"choices": null}'), "choices"),
    "choices-text": (said('{"choices": ["x"]}'), "choices.0"),
    "no-message": (said('{"choices": [{}]}'), "message"),
    "content-number": (said('{"choices": [{"message": {"content": 5}}]}'), "content"),
    "reason-list": (said('{"choices": [{"message": {"content": "x"}, "finish_reason": []}]}'), "finish_reason"),
    "cut-json": (said('{"choices": [{"message": {"content": "x'), FAILED),
    "latin-1": (Reply(body=b'{"choices": "\xe9"}'), FAILED),
    "zeros": (Reply(body=b"\0" * 100), FAILED),
    "error-in-200": (said('{"error": {"message": "overloaded", "code": 503}}'), "overloaded"),
    "refusal-in-200": (said('{"error": {"message": "no such model", "code": 404}}'), "no such model"),
    "error-in-choice": (said('{"choices": [{"error": {"message": "filtered"}}]}'), "filtered"),
    "stream": (said("data: {}\n\n", **{"Content-Type": "text/event-stream"}), "sent a stream"),
    "lines": (said('{"a": 1}\n{"a": 2}\n'), "sent a stream"),
    "escapes": (said(f'{{"error": "{ESCAPES}"}}', 400), "\\x1b"),
    "escapes-in-json": (said('{"error": "\\u001b[2J\\u202e"}', 400), "\\x1b[2J"),
    "long-error": (said("x" * 1_000_000, 500), "xxx"),
    "brackets": (said("[" * 1_000_000), FAILED),
    "deep-choices": (said('{"choices": ' + "[" * 200 + "]" * 200 + "}"), FAILED),
    "cut": (Reply("hello", cut=True), FAILED),
    "no-gzip": (said("hello", **PACKED), "not gzip"),
    "br": (said("hello", **{"Content-Encoding": "br"}), "body in br"),
    "gzip-twice": (said("hello", **{"Content-Encoding": "gzip, gzip"}), "body in gzip, gzip"),
    "too-long": (Reply(body=b"0" * (MAX_TEXT_BYTES + 1)), LONG),
    "endless": (Reply(body=b"0" * 65_536, headers=ENDLESS, endless=True), LONG),
    "endless-error": (Reply(body=b"0" * 65_536, status=500, headers=ENDLESS, endless=True), LONG),
    "bomb": (Reply(body=gzip.compress(b"0" * 2 * MAX_TEXT_BYTES), headers=PACKED), LONG),
}
SERVER = ChatServer(lambda body, before: REPLIES[body["model"]][0])  # each process of the tests has its own
_THREAD = threading.Thread(target=SERVER.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)


def serving(place: Place) -> None:
    """Prepares a root with one event, and the server."""
    root()(place)
    if not _THREAD.is_alive():
        _THREAD.start()


def asked(url: str, *more: str) -> Sequence[str]:
    judge = ["--judge.url=http://127.0.0.1:9/v1", "--judge.model=judge", "--data.root=r", "--endpoint.retries=0"]
    return ["agent", f"--agent.url={url}", *judge, *more]


def refused(name: str, named: str, url: str = "http://127.0.0.1:9/v1", **options: Any) -> Case:
    given = [f"--agent.{option}={value}" for option, value in {"model": "m", **options}.items() if value is not None]
    return Case(name, "evaluate", asked(url, *given), named, root())


CASES = [
    *(
        Case(f"sends {model}", "evaluate", asked(SERVER.url, f"--agent.model={model}"), named, serving)
        for model, (_, named) in REPLIES.items()
    ),
    refused("nobody listens", FAILED),
    refused("no name server knows it", FAILED, "http://nowhere.invalid/v1"),
    *(
        refused(f"the address {url!r}", "address", url)
        for url in (
            *("localhost:8000", "ftp://host/v1", "http://", "http:///v1", "http://[::1/v1", "http://h:99999/v1"),
            *("http://h:0/v1", "http://u:p@h/v1", "http://h/v1#part", "http://h/v1?api_key=x", "http://h/v1?token=x"),
            *("file:///etc/passwd", "javascript:1", f"http//{ESCAPES}"),
        )
    ),
    refused("no model's name", "model", model=None),
    refused("a blank model's name", "model", model=""),
    refused("a key that is not there", "NO_SUCH_KEY", key_variable="NO_SUCH_KEY"),
    refused("to stream", "stream", extra="{stream: true}"),
    refused("more fields as a list", "extra", extra="[1]"),
    refused("more fields as text", "extra", extra="text"),
    refused("a prompt that is not there", "nowhere", prompt="nowhere.yaml"),
]
