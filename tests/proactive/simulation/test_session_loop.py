"""One session: the order of questions, the times, and invalid answers."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from datamodules.corpus.event_times import moments
from proactive.simulation.asking import TRIES, NoValidAnswerError
from proactive.simulation.questions import InvalidAnswer, NewEvent, Question
from proactive.simulation.scenes import SimulatedSession, embedded_scenes, sessions_of
from proactive.simulation.scripted_roles import ScriptedRole
from proactive.simulation.session_loop import LoopOptions, SessionLoop
from proactive.simulation.simulation_log import SimulationLog
from proactive.simulation.work_items import ROLE_NAMES

SESSIONS = sessions_of(embedded_scenes(), 2, seed=3)
Change = Callable[[dict[str, Any], int], Any]  # maps a scripted answer and the attempt to another answer


class ChangedRole(ScriptedRole):
    """A scripted role whose answers to some kinds of questions are changed. It records its questions."""

    def __init__(self, log: SimulationLog, changes: dict[str, Change] | None = None) -> None:
        super().__init__(log)
        self.changes = changes or {}
        self.asked: list[tuple[Question[Any], int, str]] = []

    async def reply(self, question: Question[Any], session: SimulatedSession, invalid: Sequence[InvalidAnswer]) -> str:
        attempt = len(invalid)
        self.asked.append((question, attempt, invalid[-1].error if invalid else ""))
        text = await super().reply(question, session, invalid)
        if question.kind not in self.changes:
            return text
        changed = self.changes[question.kind](json.loads(text), attempt)
        return changed if isinstance(changed, str) else json.dumps(changed)


def loop_of(
    session: SimulatedSession = SESSIONS[0], options: LoopOptions | None = None, **changes: Change
) -> tuple[SessionLoop, ChangedRole]:
    log = SimulationLog()
    role = ChangedRole(log, changes)
    return SessionLoop(session, dict.fromkeys(ROLE_NAMES, role), log, options or LoopOptions()), role


def failure(**changes: Change) -> tuple[str, ChangedRole]:
    loop, role = loop_of(**changes)
    with pytest.raises(NoValidAnswerError) as failed:
        asyncio.run(loop.run())
    return str(failed.value), role


def test_questions_have_the_documented_order() -> None:
    loop, role = loop_of(options=LoopOptions(max_acts=30))
    end = asyncio.run(loop.run())
    kinds = [question.kind for question, _, _ in role.asked]
    assert kinds[:5] == ["setup", "ask", "tell", "act", "events"]
    allowed = {
        ("act", "events"), ("events", "propose"), ("propose", "judge"), ("judge", "propose"), ("judge", "act"),
        ("judge", "execute"), ("execute", "act"), ("execute", "propose"),
    }  # fmt: skip
    assert set(pairwise(kinds[3:])) <= allowed
    assert end == ("goal reached" if loop.steps[-1].task_status else "act limit")
    for step in loop.steps:
        assert bool(step.attempts) == (step.source == "user")
    carried_out = [
        one for one in loop.steps if one.attempts and one.attempts[-1].proposal and one.attempts[-1].accepted
    ]
    assert len(carried_out) == sum(step.source == "assistant" for step in loop.steps) > 0


def test_the_assistant_gets_each_rejection_with_its_reason() -> None:
    loop, role = loop_of(judge=lambda answer, _: {"judgment": "rejected", "reason": "Not now."})
    asyncio.run(loop.run())
    proposed = [question for question, _, _ in role.asked if question.kind == "propose"]
    assert [len(question.facts["rejected"]) for question in proposed] == list(range(len(proposed)))
    assert proposed[1].facts["rejected"][0]["reason"] == "Not now."


def test_a_session_in_which_everything_is_rejected_ends_at_the_limits() -> None:
    options = LoopOptions(max_acts=4, new_proposals=2)
    loop, role = loop_of(
        options=options,
        judge=lambda answer, _: {"judgment": "rejected", "reason": ""},
        act=lambda answer, _: answer | {"goal_reached": False},
    )
    assert asyncio.run(loop.run()) == "act limit"
    counts = Counter(question.kind for question, _, _ in role.asked)
    assert counts["act"] == 4
    assert counts["propose"] == 3 * len(loop.steps) == counts["judge"]
    assert all(len(step.attempts) == 3 for step in loop.steps)


def test_an_ignored_offer_is_not_executed() -> None:
    loop, role = loop_of(judge=lambda answer, _: {"judgment": "ignored", "reason": ""})
    asyncio.run(loop.run())
    assert {question.kind for question, _, _ in role.asked} >= {"propose", "judge"}
    assert {step.source for step in loop.steps} == {"user"}
    assert loop.rejected == []
    assert all(step.published()["judgement"] == [] for step in loop.steps)


def test_a_user_that_never_reaches_the_goal_ends_at_the_act_limit() -> None:
    loop, role = loop_of(options=LoopOptions(max_acts=5), act=lambda answer, _: answer | {"goal_reached": False})
    assert asyncio.run(loop.run()) == "act limit"
    assert sum(question.kind == "act" for question, _, _ in role.asked) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"events": lambda answer, _: "{"}, "environment, events: answer: expected JSON"),
        ({"propose": lambda answer, _: "I cannot help with that."}, "assistant, propose: answer: expected JSON"),
        (
            {"events": lambda answer, _: answer | {"events": [{"seconds": -3.0, "event": "x"}]}},
            "environment, events: answer, field events[0].seconds: Input should be greater than or equal to 0.001",
        ),
        (
            {"setup": lambda answer, _: {"entities": [{"entity": " ", "state": "", "new": True}]}},
            "environment, setup: answer, field entities[0].entity: expected text, got a blank",
        ),
        (
            {"execute": lambda answer, _: answer | {"entities": [{"entity": "a ghost", "state": "x", "new": False}]}},
            "environment, execute: unknown entity a ghost: new is false, and the known ones are ",
        ),
        (
            {"events": lambda answer, _: answer | {"entities": [{"entity": "a", "state": "b", "new": True}] * 11}},
            "environment, events: answer, field entities: List should have at most 10 items",
        ),
        ({"act": lambda answer, _: answer | {"state": "bored"}}, "user, act: answer, field state"),
        ({"judge": lambda answer, _: answer | {"judgment": "maybe"}}, "judge, judge: answer, field judgment"),
        (
            {"events": lambda answer, _: answer | {"events": [{"seconds": 1.0, "event": "x" * 100_000}]}},
            "environment, events: answer, field events[0].event: expected at most 2000 characters, got 100000",
        ),
        (
            {"propose": lambda answer, _: answer | {"proposal": "x" * 100_000}},
            "assistant, propose: answer, field proposal: expected at most 2000 characters, got 100000",
        ),
        ({"events": lambda answer, _: answer | {"events": answer["events"] * 9}}, "environment, events: answer, field"),
    ],
)
def test_an_invalid_answer_is_sent_back_twice_and_then_the_session_fails(changes: dict[str, Change], said: str) -> None:
    message, role = failure(**changes)
    assert message.startswith(said)
    assert len(message) < 1100
    (kind,) = changes
    last = [(attempt, error) for question, attempt, error in role.asked if question.kind == kind][-TRIES:]
    assert [attempt for attempt, _ in last] == list(range(TRIES))
    assert last[0][1] == ""
    assert message.endswith(last[1][1])
    assert last[1][1] == last[2][1]


def test_a_third_answer_that_is_valid_continues_the_session() -> None:
    loop, _ = loop_of(act=lambda answer, attempt: answer if attempt == TRIES - 1 else "nonsense")
    undisturbed, _ = loop_of()
    asyncio.run(loop.run())
    asyncio.run(undisturbed.run())
    assert loop.steps == undisturbed.steps


def test_a_created_entity_is_known_in_later_questions() -> None:
    created = {"entity": "a new file", "state": "empty", "new": True}
    loop, role = loop_of(events=lambda answer, _: answer | {"entities": [created]})
    asyncio.run(loop.run())
    assert loop.entities["a new file"] == "empty"
    asked = [question for question, _, _ in role.asked if question.kind == "events"]
    assert "a new file" not in asked[0].facts["entities"]
    assert asked[1].facts["entities"]["a new file"] == "empty"


def test_times_are_increasing_epoch_seconds_also_on_29_february() -> None:
    loop, _ = loop_of()
    loop.milliseconds = int(datetime(2024, 2, 28, 23, 59, 59, tzinfo=UTC).timestamp()) * 1000
    times = [loop._timed(NewEvent(seconds=seconds, event="x")) for seconds in (0.5, 1.0, 86_400.0, 0.001)]
    assert [moment.time for moment in moments(times)] == [
        "2024-02-28 23:59:59 UTC", "2024-02-29 00:00:00 UTC", "2024-03-01 00:00:00 UTC", "2024-03-01 00:00:00 UTC",
    ]  # fmt: skip
    assert times[0].time == "1709164799.500"
    assert all(float(a.time) < float(b.time) for a, b in pairwise(times))


def test_sessions_differ_and_depend_only_on_their_name_seed_and_scene() -> None:
    loops = [loop_of(session)[0] for session in SESSIONS[:4]]
    for loop in loops:
        asyncio.run(loop.run())
    assert len({loop.steps[0].event.time for loop in loops}) == 4
    again, _ = loop_of(sessions_of(embedded_scenes(), 7, seed=3)[0])
    asyncio.run(again.run())
    assert again.steps == loops[0].steps
    other, _ = loop_of(replace(SESSIONS[0], seed="other"))
    asyncio.run(other.run())
    assert other.steps != loops[0].steps


def test_the_schema_of_a_change_names_the_known_entities() -> None:
    created = {"entity": "b", "state": "", "new": True}
    loop, role = loop_of(events=lambda answer, _: answer | {"entities": [created]})
    asyncio.run(loop.run())
    asked = [question for question, _, _ in role.asked if question.kind in ("setup", "events", "execute")]
    for question in asked:
        schema = question.schema.response_format["json_schema"]["schema"]
        old, new = (one["properties"] for one in schema["$defs"]["EntityState"]["anyOf"])
        assert old["entity"]["enum"] == list(question.facts["entities"])
        assert (old["new"]["enum"], new["new"]["enum"]) == ([False], [True])
        assert "enum" not in new["entity"]
    assert "b" not in asked[0].facts["entities"]
    assert "b" in asked[-1].facts["entities"]
