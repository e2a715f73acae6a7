"""Events that a model behind an endpoint rewrites."""

import asyncio
import json

import pytest

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Trace
from datamodules.prompting.chat_prompts import ChatPrompt
from models.judging.chat_client import ChatClient
from models.judging.endpoint import Endpoint, EndpointOptions
from proactive.assistant.clock import ReplayClock
from proactive.assistant.observations import Happened, Observation
from proactive.assistant.rewriting import CONTEXT, REWRITING_PROMPT, RewrittenSource
from proactive.assistant.trace_source import TraceSource
from tests.chat_server import Body, Reply, chat_server

SENTENCES = [f"The user works in 'Code' with 'file {number}'." for number in range(8)]
TRACE = Trace("a.json", tuple(Event(time=str(n), event=text) for n, text in enumerate(SENTENCES)), (False,) * 8)


def rewritten(url: str) -> list[Observation]:
    async def collected() -> list[Observation]:
        client = ChatClient(Endpoint(url, "small", options=EndpointOptions(retries=0)))
        source = RewrittenSource(
            TraceSource(TRACE, ReplayClock()), client, ChatPrompt.read(REWRITING_PROMPT, with_proposal=False)
        )
        assert source.describe()["rewriting"]["model"] == "small"
        async with client:
            return [found async for found in source.observations()]

    return asyncio.run(collected())


def events_of(body: Body) -> list[str]:
    return [event["event"] for event in json.loads(body["messages"][1]["content"])]


def test_each_event_is_rewritten_with_the_latest_ones_as_context() -> None:
    def answer(body: Body, before: int) -> Reply:
        name = events_of(body)[-1].split("'")[3]
        return Reply(f"<think>They edit.</think>\n\"The user edits '{name}' again.\"")

    with chat_server(answer) as chat:
        found = rewritten(chat.url)
    assert [one.event.event for one in found if isinstance(one, Happened)] == [
        f"The user edits 'file {number}' again." for number in range(8)
    ]
    assert [(one.at, one.cursor) for one in found] == [(float(n), {"next": n + 1}) for n in range(8)]
    assert [events_of(body) for body in chat.bodies] == [SENTENCES[max(n + 1 - CONTEXT, 0) : n + 1] for n in range(8)]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("I cannot do that."), "no sentence on the user"),
        (Reply(""), "no sentence on the user"),
        (Reply("The user edits", finish_reason="length"), "no sentence on the user"),
        (Reply(status=500), "failed 1 times"),
    ],
)
def test_an_event_without_a_fitting_reply_stays_as_it_is(
    reply: Reply, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with chat_server(lambda body, before: reply) as chat:
        found = rewritten(chat.url)
    assert [one.event for one in found if isinstance(one, Happened)] == list(TRACE.events)
    assert caplog.text.count("an event stays as it is") == 8
    assert reason in caplog.text


def test_secrets_that_a_model_makes_up_are_replaced_too() -> None:
    with chat_server(lambda body, before: Reply("The user writes to ada@example.org.")) as chat:
        found = rewritten(chat.url)
    assert {one.event.event for one in found if isinstance(one, Happened)} == {"The user writes to [e-mail address]."}
