"""ChatClient: concurrency, equal requests, the time limit, and the request body."""

import threading
import time
from typing import Any

import pytest

from datamodules.errors import UserError
from models.judging.answer_log import AnswerLog
from models.judging.endpoint import Endpoint, EndpointOptions
from tests.chat_server import Reply, chat_server
from tests.models.judging.chat_helpers import QUICK, ask, asked_of, echo
from tests.patience import HANG, HOUR, Clock


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
