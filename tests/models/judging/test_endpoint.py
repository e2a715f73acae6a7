"""The endpoint client against a real server that misbehaves, and its log against whatever a kill leaves behind."""

import asyncio
import base64
import gzip
import html
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import AsyncRetrying, RetryCallState

from datamodules.errors import UserError
from datamodules.files.reading import MAX_TEXT_BYTES
from models.judging.answer_log import AnswerLog
from models.judging.chat_client import ChatClient
from models.judging.chat_connection import ChatConnection, RequestFailed
from models.judging.endpoint import Endpoint, EndpointOptions
from tests.chat_server import ChatServer, Reply, chat_server
from tests.datamodules.conftest import few_examples
from tests.helpers import no_more_memory_than
from tests.patience import HANG, HOUR, Clock, turnable_clock

QUICK: dict[str, Any] = {"first_delay": 0.01, "longest_delay": 0.02, "timeout": HOUR}
KEY = "sk-very-secret-123"
SETTINGS = {"model": "m"}


def asked_of(endpoint: Endpoint, log: AnswerLog, *tasks: Callable[[ChatClient], Any]) -> list[str | None]:
    """What comes of some tasks, carried out side by side."""

    async def carry_out() -> list[str | None]:
        async with ChatClient(endpoint, log) as client:
            return await client.gather(task(client) for task in tasks)

    return asyncio.run(carry_out())


def ask(
    chat: ChatServer, log: AnswerLog, questions: list[str], key_variable: str | None = None, **options: Any
) -> list[str | None]:
    """The answers to some questions, asked side by side."""

    def task(question: str) -> Callable[[ChatClient], Any]:
        return lambda client: client.ask([{"role": "user", "content": question}], f"about {question}")

    endpoint = Endpoint(chat.url, "m", key_variable, options=EndpointOptions(**{**QUICK, **options}))
    return asked_of(endpoint, log, *map(task, questions))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AnswerLog]:
    with AnswerLog().opened(tmp_path / "log.jsonl", SETTINGS) as log:
        yield log


def echo(body: dict[str, Any], before: int) -> Reply:
    return Reply(f"answer to {body['messages'][-1]['content']}")


LATE = Reply("late")
MISBEHAVIOURS = {
    "429 that names seconds": Reply(status=429, headers={"Retry-After": "0"}, body=b"slow down"),
    "429 that names a date": Reply(status=429, headers={"Retry-After": formatdate(0, usegmt=True)}, body=b"{}"),
    "429 that names nothing": Reply(status=429, body=b""),
    "429 that names nonsense": Reply(status=429, headers={"Retry-After": "soon"}, body=b""),
    "500": Reply(status=500, body=b"<html>oops</html>"),
    "503": Reply(status=503, body=b""),
    "cut in the middle of the body": Reply("half of this", cut=True),
    "too slow": LATE,
    "garbage": Reply(body=b"\xff\xfe{{{"),
    "a page": Reply(body=b"<html>welcome</html>"),
    "wrong schema": Reply(body=b'{"result": "text"}'),
    "choices of the wrong kind": Reply(body=b'{"choices": [{"message": {"content": 5}}]}'),
    "no choices": Reply(body=b'{"choices": []}'),
    "null": Reply(body=b"null"),
    "nothing": Reply(body=b""),
    "an error in place of an answer": Reply(body=b'{"error": {"message": "model is overloaded", "code": 502}}'),
    "an error in the choice": Reply(body=b'{"choices": [{"error": {"message": "overloaded"}, "message": {}}]}'),
}


@pytest.fixture
def clock() -> Iterator[Clock]:
    with turnable_clock() as clock:
        yield clock


@pytest.fixture
def misbehave(clock: Clock) -> Iterator[Callable[[str], Reply]]:
    """The misbehaviour of a name; one that is late turns the clock past the time limit, and is held to the end."""
    ended = threading.Event()

    def reply(name: str) -> Reply:
        if MISBEHAVIOURS[name] is LATE:
            clock.advance(2 * HOUR)
            ended.wait(HANG)
        return MISBEHAVIOURS[name]

    yield reply
    ended.set()


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_temporary_failures_are_retried(name: str, log: AnswerLog, misbehave: Callable[[str], Reply]) -> None:
    with chat_server(lambda body, before: misbehave(name) if before < 2 else echo(body, before)) as chat:
        alone = {"concurrency": 1} if name == "too slow" else {}  # the clock is everybody's
        assert ask(chat, log, ["a", "b"], **alone) == ["answer to a", "answer to b"]
    assert sorted(body["messages"][-1]["content"] for body in chat.bodies) == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_after_the_last_retry_the_error_names_the_request_and_other_answers_are_kept(
    name: str, log: AnswerLog, misbehave: Callable[[str], Reply]
) -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        return misbehave(name) if body["messages"][-1]["content"] == "c" else echo(body, before)

    options = {"retries": 1, "concurrency": 1}
    with chat_server(answer) as chat, pytest.raises(UserError, match=r"^about c: http.* failed 2 times") as caught:
        ask(chat, log, ["a", "b", "c", "d"], **options)
    assert "\n" not in caught.value.what
    assert "overloaded" in caught.value.what or "error in" not in name, "the server's sentence"
    assert sorted(log.texts.values()) == ["answer to a", "answer to b"]
    with chat_server(echo) as chat:
        assert len(ask(chat, log, ["a", "b", "c", "d"], **options)) == 4
    assert sorted(body["messages"][-1]["content"] for body in chat.bodies) == ["c", "d"]


@pytest.mark.parametrize(
    "error", [{"message": "no such model", "code": 404}, {"message": "no such model", "code": "404"}]
)
def test_the_code_of_an_error_with_status_200_decides_whether_it_is_retried(
    error: dict[str, Any], log: AnswerLog
) -> None:
    reply = Reply(body=json.dumps({"error": error}).encode())
    with chat_server(lambda body, before: reply) as chat, pytest.raises(UserError, match=r"refuses: .*no such model"):
        ask(chat, log, ["a"])
    assert len(chat.bodies) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b'data: {"choices":[{"delta":{"content":"{"}}]}\n\ndata: [DONE]\n\n'),
        Reply(body=b': busy\n\ndata: {"choices":[]}\n\n'),
        Reply(body=b"event: done", headers={"Content-Type": "text/event-stream; charset=utf-8"}),
        Reply(body=b'{"message": {"content": "a"}}\n{"message": {"content": "b"}, "done": true}\n'),
    ],
)
def test_a_streamed_response_is_refused_without_a_retry(reply: Reply, log: AnswerLog) -> None:
    with (
        chat_server(lambda body, before: reply) as chat,
        pytest.raises(UserError, match="the server sent a stream") as caught,
    ):
        ask(chat, log, ["a"])
    assert len(chat.bodies) == 1
    assert "stream: false" in caught.value.hint


@pytest.mark.parametrize(
    ("reason", "final"),
    [
        *((reason, True) for reason in (None, "stop", "STOP", "end_turn", "eos_token", "stop_sequence", "")),
        *((reason, False) for reason in ("length", "max_tokens", "MAX_TOKENS", "content_filter", "SAFETY")),
        *((reason, False) for reason in ("tool_calls", "function_call", "error", "abort", "model_length", "?")),
    ],
)
def test_an_incomplete_reply_is_kept_and_not_parsed(reason: str | None, final: bool, log: AnswerLog) -> None:
    with chat_server(lambda body, before: Reply('{"proposal": null}', finish_reason=reason)) as chat:
        expected = ['{"proposal": null}' if final else None]
        assert ask(chat, log, ["a"]) == expected
        assert ask(chat, log, ["a"]) == expected
        assert len(chat.bodies) == 1
    assert list(log.texts.values()) == ['{"proposal": null}']
    assert list(log.unfinished.values()) == ([] if final else [reason])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}], "yes"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "text", "text": "hm", "thought": True}, {"text": "yes"}], "yes"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "yes"}], "yes"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, "yes"], "yes"),
        ({"type": "text", "text": "yes"}, "yes"),
        ([{"type": "text", "text": None}], ""),
        ([], ""),
        (None, ""),
    ],
)
def test_content_parts_are_joined_without_reasoning(content: Any, text: str, log: AnswerLog) -> None:
    with chat_server(lambda body, before: Reply(content)) as chat:
        assert ask(chat, log, ["a"]) == [text]


def test_text_in_a_reasoning_field_is_not_an_answer(log: AnswerLog) -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": '{"proposal": null}', "refusal": "no"}
    reply = Reply(body=json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())
    with chat_server(lambda body, before: reply) as chat:
        assert ask(chat, log, ["a"]) == [""]


@pytest.mark.parametrize(
    ("wait", "said"),
    [("86400", "24 hours"), ("9" * 400, "inf"), (formatdate(4e9, usegmt=True), "days"), ("601", "10 minutes")],
)
def test_a_retry_after_above_the_limit_ends_the_evaluation_with_the_servers_message(
    wait: str, said: str, log: AnswerLog
) -> None:
    reply = Reply(status=429, headers={"Retry-After": wait}, body=b'{"error": "quota"}')
    with chat_server(lambda body, before: reply) as chat, pytest.raises(UserError, match="asks to wait") as caught:
        ask(chat, log, ["a"])
    assert len(chat.bodies) == 1
    assert said in caught.value.what
    assert "429 Too Many Requests: quota" in caught.value.what
    assert "--endpoint.longest_wait" in caught.value.hint


def test_a_retry_after_beyond_the_time_limit_ends_the_evaluation(log: AnswerLog) -> None:
    reply = Reply(status=503, headers={"Retry-After": "500"}, body=b"")
    options = EndpointOptions(**QUICK, time_limit=100)
    with chat_server(lambda body, before: reply) as chat:
        endpoint = Endpoint(chat.url, "m", options=options, deadline=time.monotonic() + 100)
        with pytest.raises(UserError, match=r"asks to wait 8\.33 minutes, longer than the remaining time"):
            asked_of(endpoint, log, lambda client: client.ask([], "a"))
    assert len(chat.bodies) == 1


def test_a_wait_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("proactive"), "propagate", True)
    connection = ChatConnection(Endpoint("http://x/v1", "m"))
    state = RetryCallState(AsyncRetrying(), None, (), {})
    for wait in (1.0, 30.0, 30.0, 300.0):
        state.set_exception((RequestFailed, RequestFailed("429 Too Many Requests: busy", wait), None))
        with caplog.at_level(logging.INFO):
            assert connection._delay(state) == wait
    assert [record.getMessage() for record in caplog.records] == [
        "http://x/v1 asks to wait 30 seconds: 429 Too Many Requests: busy",
        "http://x/v1 asks to wait 5 minutes: 429 Too Many Requests: busy",
    ]


@pytest.mark.parametrize(
    ("reply", "hint"),
    [
        (Reply(status=404, body=b"404 page not found"), "Check the address"),
        (Reply(status=401, body=b'{"detail": "who are you?"}'), "--agent.key_variable"),
        (
            Reply(status=400, body=b'{"error": {"message": "Unsupported value", "param": "temperature"}}'),
            "Remove it with temperature: null",
        ),
    ],
)
def test_a_refusal_has_a_hint(reply: Reply, hint: str, log: AnswerLog) -> None:
    with chat_server(lambda body, before: reply) as chat, pytest.raises(UserError) as caught:
        ask(chat, log, ["a"])
    assert hint in caught.value.hint


@pytest.mark.parametrize("suffix", ["", "/", "/chat/completions", "/chat/completions/"])
@pytest.mark.parametrize("query", ["", "?api-version=2024-10-21", "?a=1&b="])
def test_the_query_of_an_address_is_kept_and_the_path_is_completed(suffix: str, query: str, log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        endpoint = Endpoint(chat.url + suffix + query, "m", options=EndpointOptions(**QUICK))
        message = {"role": "user", "content": "a"}
        assert asked_of(endpoint, log, lambda client: client.ask([message], "a")) == ["answer to a"]
    assert chat.paths == [f"/v1/chat/completions{query}"]


def test_an_unreachable_server_gives_a_user_error(log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        pass
    with pytest.raises(UserError, match="failed 2 times, the last time with: ConnectError"):
        ask(chat, log, ["a"], retries=1)


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refused_request_is_not_retried(status: int, log: AnswerLog) -> None:
    refusal = Reply(status=status, body=b"no such\nmodel \x1b[31m[bold]m[/bold]", headers={"Location": "http://x/"})
    with chat_server(lambda body, before: refusal) as chat, pytest.raises(UserError) as caught:
        ask(chat, log, ["a"])
    assert len(chat.bodies) == 1
    assert f"refuses: {status} " in caught.value.what
    assert "no such model \\x1b[31m[bold]m" in caught.value.what


def test_requests_stay_within_the_concurrency_and_answers_keep_their_order(log: AnswerLog) -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        reply = echo(body, before)
        reply.delay = 0.02 * (int(body["messages"][-1]["content"]) % 3)
        return reply

    with chat_server(answer) as chat:
        questions = [str(number) for number in range(20)]
        assert ask(chat, log, questions, concurrency=3) == [f"answer to {question}" for question in questions]
    assert chat.most_under_way <= 3


def test_equal_requests_are_sent_once(log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        assert ask(chat, log, ["a"] * 5) == ["answer to a"] * 5
        assert len(chat.bodies) == 1


def test_the_time_limit_ends_the_evaluation_and_keeps_answers(log: AnswerLog, clock: Clock) -> None:
    ended = threading.Event()

    def answer(body: dict[str, Any], before: int) -> Reply:
        if body["messages"][-1]["content"] == "b":
            while not log.texts and not ended.wait(0.01):  # until "a" is answered
                pass
            clock.advance(2 * HOUR)
            ended.wait(HANG)
        return echo(body, before)

    with chat_server(answer) as chat:
        options = EndpointOptions(**QUICK | {"timeout": 10 * HOUR}, time_limit=HOUR)
        endpoint = Endpoint(chat.url, "m", options=options, deadline=time.monotonic() + HOUR)
        tasks = [lambda client, text=text: client.ask([{"role": "user", "content": text}], text) for text in ("a", "b")]
        with pytest.raises(UserError, match=r"the time limit of 3600\.0 seconds is over"):
            asked_of(endpoint, log, *tasks)
        ended.set()
    assert list(log.texts.values()) == ["answer to a"]


def test_the_request_body_has_the_documented_fields(log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        endpoint = Endpoint(chat.url + "/", "m", None, 0.5, 7, {"max_tokens": 9, "temperature": None})
        asked_of(endpoint, log, lambda client: client.ask([{"role": "user", "content": "a"}], "here", 2))
    (body,) = chat.bodies
    assert body == {"model": "m", "messages": [{"role": "user", "content": "a"}], "seed": 9, "max_tokens": 9}
    assert chat.keys == [None]


@pytest.mark.parametrize("case", ["answers", "refuses", "fails"])
def test_the_key_is_sent_and_appears_nowhere_even_if_the_server_returns_it(
    case: str, log: AnswerLog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    replies = {
        "answers": Reply(f"you said Bearer {KEY}"),
        "refuses": Reply(status=401, body=f"bad key {KEY}".encode()),
        "fails": Reply(status=500, body=f"bad key {KEY}".encode()),
    }
    said = ""
    with chat_server(lambda body, before: replies[case]) as chat:
        try:
            said = str(ask(chat, log, ["a"], "MY_KEY", retries=0)[0])
        except UserError as error:
            said = str(error)
    assert chat.keys == [f"Bearer {KEY}"]
    assert "[key]" in said
    assert KEY not in said + (tmp_path / "log.jsonl").read_text() + "".join(capfd.readouterr())
    assert KEY not in repr(Endpoint(chat.url, "m", "MY_KEY")) + json.dumps(Endpoint(chat.url, "m", "MY_KEY").settings)


# A beginning of gzip, of which each part that follows is empty.
NOTHING_PACKED = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\x00\x00\x00\xff\xff" * (MAX_TEXT_BYTES // 5)


def bomb(size: int) -> bytes:
    """Zeros, packed."""
    return gzip.compress(b"0" * size, 9)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"0" * 65_536, headers={"Content-Length": str(10**12)}, endless=True),
        Reply(body=b"0" * 65_536, status=500, headers={"Content-Length": str(10**12)}, endless=True),
        Reply(body=NOTHING_PACKED, headers={"Content-Encoding": "gzip"}),
        Reply(body=bomb(200_000_000), headers={"Content-Encoding": "gzip"}),
        Reply(body=b'"' + b"0" * MAX_TEXT_BYTES),
    ],
    ids=["endless", "endless error", "nothing, packed", "a bomb", "one byte too long"],
)
def test_a_response_is_read_up_to_the_limit_only(reply: Reply, log: AnswerLog) -> None:
    with chat_server(lambda body, before: reply) as chat, no_more_memory_than(5 * MAX_TEXT_BYTES):
        with pytest.raises(UserError, match=f"the response is longer than the limit of {MAX_TEXT_BYTES:,} bytes"):
            ask(chat, log, ["a"], retries=3)
        assert len(chat.bodies) == 1, "to ask again is of no use"


def test_a_gzip_response_is_read(log: AnswerLog) -> None:
    content = Reply("hello").content()
    with chat_server(
        lambda body, before: Reply(body=gzip.compress(content), headers={"Content-Encoding": "gzip"})
    ) as chat:
        assert ask(chat, log, ["a"]) == ["hello"]


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "deflate"])
def test_other_and_repeated_encodings_are_not_decoded(coding: str, log: AnswerLog) -> None:
    reply = Reply(body=bomb(1000), headers={"Content-Encoding": coding})
    with chat_server(lambda body, before: reply) as chat, pytest.raises(UserError, match=f"a body in {coding}, but"):
        ask(chat, log, ["a"], retries=0)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"hello", headers={"Content-Encoding": "gzip"}),
        Reply(body=bomb(10), headers={"Content-Length": str(10**12), "Content-Encoding": "gzip"}, endless=True),
        Reply(body=b"[" * 1_000_000),
        Reply(body=b'{"choices": ' + b"[" * 101 + b"]" * 101 + b"}"),
        Reply(body=b'{"error": ' * 100_000),
    ],
    ids=["no gzip", "more behind gzip", "brackets", "deep", "deep error"],
)
def test_an_unreadable_body_is_not_an_answer(reply: Reply, log: AnswerLog) -> None:
    with chat_server(lambda body, before: reply) as chat, pytest.raises(UserError) as caught:
        ask(chat, log, ["a"], retries=0)
    assert re.search("a body that is not gzip|not a chat completion", caught.value.what)
    assert len(str(caught.value).splitlines()) == 2


def test_the_finish_reason_is_shortened_and_without_the_key(log: AnswerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with chat_server(lambda body, before: Reply("hello", f"\x1b[2J{KEY}\n" + "x" * 10_000)) as chat:
        ask(chat, log, ["a"], "MY_KEY")
    (reason,) = log.unfinished.values()
    assert reason.startswith("\\x1b[2J[key] x")
    assert len(reason) == 200


ESCAPED = {
    "JSON": lambda key: json.dumps(key)[1:-1],
    "JSON in JSON": lambda key: json.dumps(json.dumps(key))[1:-1],
    "JSON of a careful server": lambda key: "".join(f"\\u{ord(character):04X}" for character in key),
    "JSON with slashes escaped": lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    "repr": lambda key: repr(f"Bearer {key}'\n"),
    "bytes": lambda key: repr(key.encode()),
    "bytes in hexadecimal": lambda key: "".join(f"\\x{ord(character):02x}" for character in key),
    "a URL": lambda key: quote(key, safe=""),
    "a form": quote_plus,
    "a URL in a URL": lambda key: quote(quote(key, safe=""), safe=""),
    "hexadecimal": lambda key: key.encode().hex().upper(),
    "HTML": html.escape,
    "HTML by number": lambda key: "".join(f"&#{ord(character)};" for character in key),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of the header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 of a pair": lambda key: base64.urlsafe_b64encode(f"me:{key} ".encode()).decode(),
}


@pytest.mark.parametrize("escaping", ESCAPED)
@pytest.mark.parametrize("key", [KEY, "sk/very+secret=&<123>%"])
def test_a_key_is_removed_in_any_escaping(escaping: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    written = ESCAPED[escaping](key)
    said = Endpoint("http://x/v1", "m", "MY_KEY").without_key(f"<{written}> is a bad key")
    assert "[key]" in said
    assert said.endswith("> is a bad key")
    left = said.replace("[key]", "").removesuffix("> is a bad key")
    assert len(left) <= len("<QmVhcmVyIHw=="), "but for what stands around it, and the rest of base64"


@pytest.mark.parametrize("key", ["EMPTY", "x", "token"])
def test_a_placeholder_key_is_not_removed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    assert Endpoint("http://x/v1", "m", "MY_KEY").without_key("EMPTY x token") == "EMPTY x token"


@pytest.mark.parametrize("around", [("", "\n"), (" ", "\r\n"), ("\t", " "), ("\n\n", "\n")])
def test_blanks_around_a_key_are_removed(
    around: tuple[str, str], log: AnswerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY.join(around))
    with chat_server(echo) as chat:
        ask(chat, log, ["a"], "MY_KEY")
    assert chat.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    "key",
    [f"Bearer {KEY}", f'"{KEY}"', f"{KEY}\n{KEY}", f"{KEY}\u200b", f"\ufeff{KEY}", f"{KEY}\x01", "ключ", f"{KEY}\\n"],
)
def test_text_that_cannot_be_a_key_is_refused_before_use(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="MY_KEY is not a key") as caught:
        Endpoint("http://x/v1", "m", "MY_KEY")
    assert KEY not in str(caught.value)
    monkeypatch.setenv("MY_KEY", " \n")
    with pytest.raises(UserError, match="MY_KEY is not set"):
        Endpoint("http://x/v1", "m", "MY_KEY")


def test_azure_gets_the_key_in_its_own_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    url = "https://mine.openai.azure.com/openai/deployments/m?api-version=2024-10-21"
    endpoint = Endpoint(url, "m", "MY_KEY")
    assert endpoint.headers() == {"api-key": KEY}
    assert endpoint.address == (
        "https://mine.openai.azure.com/openai/deployments/m/chat/completions?api-version=2024-10-21"
    )


SECRETS = ("key", "api_key", "subscription-key", "access_token", "sig", "code", "password", "client_secret")


@pytest.mark.parametrize(
    ("url", "key_variable", "message"),
    [
        ("localhost:8000", None, "is not an address"),
        ("ftp://x/v1", None, "is not an address"),
        ("http://user:pw@x/v1", None, "more than a host, a path"),
        *((f"http://x/v1?a=1&{name}=pw", None, "more than a host, a path") for name in SECRETS),
        ("http://x/v1#pw", None, "more than a host, a path"),
        ("http://x:pw/v1", None, "is not an address"),
        ("http://[x/v1", None, "is not an address"),
        ("http://x/v1", "NOT_SET_ANYWHERE", "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_an_invalid_endpoint_is_refused(url: str, key_variable: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(url, "m", key_variable)
    assert "pw" not in str(caught.value) or "x:pw" in url


def test_streamed_answers_are_refused_as_an_option() -> None:
    with pytest.raises(UserError, match="extra: stream"):
        Endpoint("http://x/v1", "m", extra={"stream": True})


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"retries": -1}, {"first_delay": -1}, {"timeout": 0}, {"time_limit": -1}]
)
def test_impossible_endpoint_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"endpoint.{next(iter(options))}: expected"):
        EndpointOptions(**options)


@few_examples
@given(st.none() | st.floats(0, 1000), st.integers(1, 20))
def test_a_retry_waits_for_retry_after_or_within_bounds(retry_after: float | None, attempt: int) -> None:
    options = EndpointOptions(first_delay=0.5, longest_delay=8.0)
    connection = ChatConnection(Endpoint("http://x/v1", "m", options=options))
    state = RetryCallState(AsyncRetrying(), None, (), {})
    state.attempt_number = attempt
    state.set_exception((RequestFailed, RequestFailed("busy", retry_after), None))
    delay = connection._delay(state)
    if retry_after is None:
        assert 0 <= delay <= min(0.5 * 2 ** (attempt - 1), 8.0)
    else:
        assert delay == retry_after
