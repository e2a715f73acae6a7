"""Sessions of agents without weights give what whole traces give."""

import asyncio
import json
from typing import Any

import pytest

from datamodules.corpus.answers import AGENT_PROMPT
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Candidate, Trace
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import ChatPrompt
from models.judging.agents import GENERIC_PROPOSAL, Agent, AlwaysPropose, NeverPropose, RecordedAgent
from models.judging.chat_client import ChatClient
from models.judging.description import joint_record, joint_settings
from models.judging.endpoint import Endpoint
from models.judging.endpoint_agent import EndpointAgent, estimated_tokens
from tests.chat_server import Body, Reply, chat_server

TRACES = [
    Trace(name, tuple(Event(time=str(n), event=f"{name} does {n}") for n in range(events)), (False,) * events)
    for name, events in (("a.json", 3), ("b.json", 1), ("c.json", 2))
]
RECORDED = {
    "a.json": [[Candidate("x", "x"), Candidate("y", "y")], [Candidate(None)], [Candidate(None), Candidate("z", "z")]],
    "b.json": [[Candidate(None)]],
    "c.json": [[Candidate("u", "u")], [Candidate("v", "v")]],
}


async def observed(agent: Agent) -> dict[str, Any]:
    sessions = {trace.name: agent.session(trace.name) for trace in TRACES}
    return {trace.name: [await sessions[trace.name].observe(event) for event in trace.events] for trace in TRACES}


def plain(answers: Any) -> dict[str, Any]:
    return {name: [list(step) for step in steps] for name, steps in answers.items()}


@pytest.mark.parametrize(
    "agent",
    [
        RecordedAgent(RECORDED, "here"),
        RecordedAgent(RECORDED, "here", 1),
        NeverPropose(),
        AlwaysPropose(),
        AlwaysPropose(RECORDED),
    ],
)
def test_sessions_and_whole_traces_give_the_same_candidates(agent: Agent) -> None:
    answers = plain(asyncio.run(agent.answer(TRACES)))
    assert [len(answers[trace.name]) for trace in TRACES] == [3, 1, 2]
    assert asyncio.run(observed(agent)) == answers


@pytest.mark.parametrize("agent", [RecordedAgent(RECORDED, "here"), AlwaysPropose(RECORDED)])
def test_a_noted_event_is_part_of_later_histories(agent: Agent) -> None:
    session, answers = agent.session("a.json"), plain(asyncio.run(agent.answer(TRACES)))
    for event in TRACES[0].events[:2]:
        session.note(event)
    assert asyncio.run(session.observe(TRACES[0].events[2])) == answers["a.json"][2]


def test_always_propose_uses_another_agents_first_offer_or_a_generic_one() -> None:
    answers = asyncio.run(AlwaysPropose(RECORDED).answer(TRACES))
    assert [[c.proposal for c in step] for step in answers["a.json"]] == [["x"], [GENERIC_PROPOSAL], ["z"]]
    assert asyncio.run(AlwaysPropose().session("live").observe(TRACES[0].events[0]))[0].proposal == GENERIC_PROPOSAL


def test_sessions_and_whole_traces_send_equal_requests() -> None:
    def answer(body: Body, before: int) -> Reply:
        return Reply(json.dumps({"proposal": f"{body['seed']} {hash(body['messages'][-1]['content'])}"}))

    prompt = ChatPrompt.read(AGENT_PROMPT, with_proposal=False)

    async def both() -> None:
        with chat_server(answer) as chat:
            async with ChatClient(Endpoint(chat.url, "m", temperature=0.5)) as client:
                agent = EndpointAgent(client, prompt, candidates=2)
                counted: list[None] = []
                answers = await agent.answer(TRACES, lambda: counted.append(None))
                assert len(counted) == len(chat.bodies) == 12
                assert await observed(agent) == plain(answers)
                assert len(chat.bodies) == 12, "nothing is asked twice"
                described = agent.describe()
                assert (described.source, described.progress_label) == (chat.url, "asking m")
                assert "url" not in joint_settings({"a.json": agent}), "a server may come back under another address"
                assert joint_record({"a.json": agent})["url"] == chat.url

    asyncio.run(both())


def test_an_endpoint_gets_the_latest_events_and_the_client_keeps_nothing_of_answered_questions() -> None:
    prompt = ChatPrompt.read(AGENT_PROMPT, with_proposal=False)
    events = [Event(time=str(n), event=f"event number {n}.") for n in range(6)]

    async def observed() -> None:
        with chat_server(lambda body, before: Reply(json.dumps({"proposal": "x"}))) as chat:
            async with ChatClient(Endpoint(chat.url, "m")) as client:
                session = EndpointAgent(client, prompt, latest_tokens=3 * estimated_tokens(events[0])).session("live")
                for event in events[:4]:
                    session.note(event)
                for event in events[4:]:
                    await session.observe(event)
                assert client._locks == {}
            sent = [body["messages"][-1]["content"] for body in chat.bodies]
            assert [[n for n in range(6) if f"event number {n}." in text] for text in sent] == [[2, 3, 4], [3, 4, 5]]
            async with ChatClient(Endpoint(chat.url, "m")) as client:
                session = EndpointAgent(client, prompt, latest_tokens=1).session("live")
                session.note(events[0])
                await session.observe(Event(time="9", event="long " * 50))
            last = chat.bodies[-1]["messages"][-1]["content"]
            assert ("long long" in last, "event number" in last) == (True, False), "the latest event is always sent"

    asyncio.run(observed())


def test_requests_end_at_the_clients_deadline() -> None:
    client = ChatClient(Endpoint("http://127.0.0.1:1/v1", "m"))
    with pytest.raises(RuntimeError, match="ask within"):
        asyncio.run(client.ask([], "here"))


def test_several_candidates_at_temperature_0_are_refused() -> None:
    client = ChatClient(Endpoint("http://127.0.0.1:1/v1", "m"))
    with pytest.raises(UserError, match="2 candidates at temperature 0"):
        EndpointAgent(client, ChatPrompt.read(AGENT_PROMPT, with_proposal=False), candidates=2)
