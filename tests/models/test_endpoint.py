"""The endpoint client against a real server that misbehaves, and its log against whatever a kill leaves behind."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import AsyncRetrying, RetryCallState

from datamodules.errors import UserError
from models.endpoint import AnswerLog, Endpoint, EndpointOptions, Session, _Failed, _retry_after
from tests.chat_server import ChatServer, Reply, chat_server
from tests.datamodules.conftest import few_examples
from tests.patience import HANG, HOUR, Clock, turnable_clock

QUICK: dict[str, Any] = {"first_delay": 0.01, "longest_delay": 0.02, "timeout": HOUR}
KEY = "sk-very-secret-123"
SETTINGS = {"model": "m"}


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def ask(
    chat: ChatServer, log: AnswerLog, questions: list[str], key_variable: str | None = None, **options: Any
) -> list[str]:
    """The answers to some questions, asked side by side."""

    def task(question: str) -> Callable[[Session], Any]:
        return lambda session: session.ask([{"role": "user", "content": question}], f"about {question}")

    endpoint = Endpoint(chat.url, "m", key_variable, options=EndpointOptions(**{**QUICK, **options}))
    return endpoint.run(log, [task(question) for question in questions], "asking", silent)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AnswerLog]:
    log = AnswerLog(tmp_path / "log.jsonl", SETTINGS)
    yield log
    log.close()


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
def test_a_server_that_misbehaves_is_asked_again(name: str, log: AnswerLog, misbehave: Callable[[str], Reply]) -> None:
    with chat_server(lambda body, before: misbehave(name) if before < 2 else echo(body, before)) as chat:
        alone = {"concurrency": 1} if name == "too slow" else {}  # the clock is everybody's
        assert ask(chat, log, ["a", "b"], **alone) == ["answer to a", "answer to b"]
    assert sorted(body["messages"][-1]["content"] for body in chat.bodies) == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_when_the_retries_are_used_up_the_error_names_the_place_and_the_rest_is_kept(
    name: str, log: AnswerLog, misbehave: Callable[[str], Reply]
) -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        return misbehave(name) if body["messages"][-1]["content"] == "c" else echo(body, before)

    options = {"retries": 1, "concurrency": 1}
    with chat_server(answer) as chat, pytest.raises(UserError, match=r"^about c: http.* failed 2 times") as caught:
        ask(chat, log, ["a", "b", "c", "d"], **options)
    assert "\n" not in caught.value.what
    assert sorted(log.texts.values()) == ["answer to a", "answer to b"]
    with chat_server(echo) as chat:
        assert len(ask(chat, log, ["a", "b", "c", "d"], **options)) == 4
    assert sorted(body["messages"][-1]["content"] for body in chat.bodies) == ["c", "d"]


def test_a_server_that_is_not_there(log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        pass
    with pytest.raises(UserError, match="failed 2 times, at last with: ConnectError"):
        ask(chat, log, ["a"], retries=1)


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_is_not_asked_again(status: int, log: AnswerLog) -> None:
    refusal = Reply(status=status, body=b"no such\nmodel \x1b[31m[bold]m[/bold]", headers={"Location": "http://x/"})
    with chat_server(lambda body, before: refusal) as chat, pytest.raises(UserError) as caught:
        ask(chat, log, ["a"])
    assert len(chat.bodies) == 1
    assert f"refuses: {status} " in caught.value.what
    assert "no such model \\x1b[31m[bold]m" in caught.value.what


def test_no_more_requests_are_under_way_than_allowed_and_answers_keep_their_order(log: AnswerLog) -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        reply = echo(body, before)
        reply.delay = 0.02 * (int(body["messages"][-1]["content"]) % 3)
        return reply

    with chat_server(answer) as chat:
        questions = [str(number) for number in range(20)]
        assert ask(chat, log, questions, concurrency=3) == [f"answer to {question}" for question in questions]
    assert chat.most_under_way <= 3


def test_the_same_question_is_asked_once(log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        assert ask(chat, log, ["a"] * 5) == ["answer to a"] * 5
        assert len(chat.bodies) == 1


def test_the_time_limit_ends_it_and_keeps_what_was_answered(log: AnswerLog, clock: Clock) -> None:
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
        tasks = [
            lambda session, text=text: session.ask([{"role": "user", "content": text}], text) for text in ("a", "b")
        ]
        with pytest.raises(UserError, match=r"the time limit of 3600\.0 seconds is over"):
            endpoint.run(log, tasks, "asking", silent)
        ended.set()
    assert list(log.texts.values()) == ["answer to a"]


def test_what_is_sent(log: AnswerLog) -> None:
    with chat_server(echo) as chat:
        endpoint = Endpoint(chat.url + "/", "m", None, 0.5, 7, {"max_tokens": 9, "temperature": None})
        endpoint.run(
            log, [lambda session: session.ask([{"role": "user", "content": "a"}], "here", 2)], "asking", silent
        )
    (body,) = chat.bodies
    assert body == {"model": "m", "messages": [{"role": "user", "content": "a"}], "seed": 9, "max_tokens": 9}
    assert chat.keys == [None]


@pytest.mark.parametrize("case", ["answers", "refuses", "fails"])
def test_the_key_is_sent_and_stands_nowhere_even_if_the_server_sends_it_back(
    case: str, log: AnswerLog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
            said = ask(chat, log, ["a"], "MY_KEY", retries=0)[0]
        except UserError as error:
            said = str(error)
    assert chat.keys == [f"Bearer {KEY}"]
    assert "[key]" in said
    assert KEY not in said + log.path.read_text() + "".join(capfd.readouterr())
    assert KEY not in repr(Endpoint(chat.url, "m", "MY_KEY")) + json.dumps(Endpoint(chat.url, "m", "MY_KEY").settings)


@pytest.mark.parametrize(
    ("url", "key_variable", "message"),
    [
        ("localhost:8000", None, "is no address"),
        ("ftp://x/v1", None, "is no address"),
        ("http://user:pw@x/v1", None, "more than a host and a path"),
        ("http://x/v1?key=pw", None, "more than a host and a path"),
        ("http://x/v1", "NOT_SET_ANYWHERE", "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(url: str, key_variable: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(url, "m", key_variable)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"retries": -1}, {"first_delay": -1}, {"timeout": 0}, {"time_limit": -1}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"endpoint.{next(iter(options))}: expected"):
        EndpointOptions(**options)


def test_retry_after_as_seconds_as_a_date_and_as_neither() -> None:
    assert _retry_after("7") == 7
    assert _retry_after(formatdate(0, usegmt=True)) == 0
    assert 50 < (_retry_after(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    assert [_retry_after(value) for value in (None, "", "soon", "-1", "1.5")] == [None] * 5


@few_examples
@given(st.none() | st.floats(0, 1000), st.integers(1, 20))
def test_a_retry_waits_as_long_as_the_server_says_else_within_bounds(retry_after: float | None, attempt: int) -> None:
    options = EndpointOptions(first_delay=0.5, longest_delay=8.0)
    session = Session(Endpoint("http://x/v1", "m", options=options), None, None)  # type: ignore[arg-type]
    state = RetryCallState(AsyncRetrying(), None, (), {})
    state.attempt_number = attempt
    state.set_exception((_Failed, _Failed("busy", retry_after), None))
    delay = session._delay(state)
    if retry_after is None:
        assert 0 <= delay <= min(0.5 * 2 ** (attempt - 1), 8.0)
    else:
        assert delay == retry_after


ENTRIES = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=8)), max_size=6)


@few_examples
@given(ENTRIES, st.data())
def test_a_log_cut_anywhere_gives_whole_entries_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log = AnswerLog(path, SETTINGS)
    sizes = [(path.stat().st_size, {})]
    for key, text in entries:
        log.add(key, text, "here")
        sizes.append((path.stat().st_size, dict(log.texts)))
    log.close()
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = [texts for size, texts in sizes if size <= cut]
    log = AnswerLog(path, SETTINGS)
    assert log.texts == (whole[-1] if whole else {})
    log.add("new", "one", "here")
    log.close()
    log = AnswerLog(path, SETTINGS)
    assert log.texts == (whole[-1] if whole else {}) | {"new": "one"}
    log.close()


def test_a_log_of_other_settings_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    AnswerLog(path, {"model": "m", "temperature": 0.0}).close()
    AnswerLog(path, {"temperature": 0.0, "model": "m"}).close()  # the same in another order
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"log.jsonl was begun with temperature 0.0, and this is 0.7"):
        AnswerLog(path, {"model": "m", "temperature": 0.7})
    with pytest.raises(UserError, match=r"was begun with seed null, and this is 1"):
        AnswerLog(path, {"model": "m", "temperature": 0.0, "seed": 1})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello\n", b"[]\n", b'{"settings": {"model": "m"}}\n{"no": 1}\n', b"5\n"])
def test_a_file_that_is_no_log_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is no log of an evaluation"):
        AnswerLog(tmp_path / "log.jsonl", SETTINGS)
    assert (tmp_path / "log.jsonl").read_bytes() == content


def test_a_log_has_one_writer(log: AnswerLog) -> None:
    with pytest.raises(UserError, match="being written by another evaluation"):
        AnswerLog(log.path, SETTINGS)
