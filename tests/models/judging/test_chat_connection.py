"""ChatConnection against a real server that misbehaves: retries, refusals, and responses of any kind."""

import gzip
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import AsyncRetrying, RetryCallState

from datamodules.errors import UserError
from datamodules.files.reading import MAX_TEXT_BYTES
from models.judging.answer_log import AnswerLog
from models.judging.chat_connection import ChatConnection, RequestFailed
from models.judging.endpoint import Endpoint, EndpointOptions
from tests.chat_server import Reply, chat_server
from tests.datamodules.conftest import few_examples
from tests.helpers import no_more_memory_than
from tests.models.judging.chat_helpers import QUICK, ask, asked_of, echo
from tests.patience import HANG, HOUR, Clock

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
