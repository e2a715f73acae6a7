"""Scripted roles, which follow the rules of the embedded simulator and need no model.

The first two entities of a scene are its topic, the others its apps. The theme of a scene selects the domain of the
simulator. If there is no such domain, one is drawn at random.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from datamodules.corpus.simulator import (
    ANY_STATE_EVENTS,
    DOMAINS,
    Domain,
    Topic,
    annotate,
    draw_event,
    draw_proposal,
    draw_state,
    majority,
    next_state,
)
from proactive.simulation.questions import InvalidAnswer, Question, Role
from proactive.simulation.scenes import SimulatedSession
from proactive.simulation.simulation_log import SimulationLog
from proactive.simulation.work_items import WorkItem

REACHES_GOAL = 0.15  # probability that an act of a flowing user reaches the goal
SECOND_EVENT = 0.3  # probability that an act leads to two events
IGNORES = 0.5  # probability that a user who is away ignores an offer
Facts = dict[str, Any]


class ScriptedRole(Role[SimulatedSession]):
    """Any of the four roles of a session."""

    def __init__(self, log: SimulationLog) -> None:
        self.log = log

    def describe(self) -> dict[str, Any]:
        return {"role": "scripted"}

    async def reply(self, question: Question[Any], item: SimulatedSession, invalid: Sequence[InvalidAnswer]) -> str:
        def answer() -> Facts:
            domain, topic = _vocabulary(item)
            return _ANSWERS[question.kind](item, domain, topic, question.facts)

        return logged_answer(self.log, question, item, invalid, answer)


def logged_answer(
    log: SimulationLog,
    question: Question[Any],
    item: WorkItem,
    invalid: Sequence[InvalidAnswer],
    answer: Callable[[], Facts],
) -> str:
    """Return an answer from the log. If the log lacks it, make it with `answer` and add it."""
    key = log.key(item, question, len(invalid))
    if key not in log.texts:
        log.keep(item, question, len(invalid), json.dumps(answer(), ensure_ascii=False))
    return log.texts[key]


def _vocabulary(session: SimulatedSession) -> tuple[Domain, Topic]:
    environment = session.scene.environment
    themes = list(DOMAINS)
    theme = environment.theme if environment.theme in DOMAINS else session.random("domain").choice(themes)
    thing, *others = environment.entities
    place = others[0] if others else thing
    return replace(DOMAINS[theme], apps=others[1:] or [place]), (thing, place)


def _setup(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    return {
        "entities": [{"entity": name, "state": "as usual", "new": False} for name in session.scene.environment.entities]
    }


def _ask(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    return {"question": f"Where is {topic[0]}?"}


def _tell(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    return {"answer": f"In {topic[1]}."}


def _act(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = session.random("act", facts["acts"])
    before = facts["state"]
    state = draw_state(random) if before is None else next_state(random, "flowing" if facts["helped"] else before)
    done = state == "flowing" and random.random() < REACHES_GOAL
    return {"state": state, "act": draw_event(random, domain, topic, state), "goal_reached": done}


def _events(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = session.random("events", len(facts["history"]))
    events = [{"seconds": _gap(random), "event": facts["act"]}]
    if random.random() < SECOND_EVENT:
        text = random.choice(ANY_STATE_EVENTS).format(place=topic[1], app=random.choice(domain.apps))
        events.append({"seconds": _gap(random), "event": text})
    return {"events": events, "entities": []}


def _gap(random: Random) -> float:
    return round(random.uniform(5, 400), 3)


def _propose(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = session.random("propose", len(facts["history"]), len(facts["rejected"]))
    return {"purpose": "", "thoughts": "", "proposal": draw_proposal(random, domain, topic), "response": ""}


def _judge(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    state, proposal = facts["state"], facts["proposal"]
    random = session.random("judge", len(facts["history"]), proposal)
    if state == "away" and proposal is not None and random.random() < IGNORES:
        return {"judgment": "ignored", "reason": "The user is away."}
    accepted = majority(annotate(random, domain, topic, state, proposal))
    return {"judgment": "accepted" if accepted else "rejected", "reason": f"The user is {state}."}


def _execute(session: SimulatedSession, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = session.random("execute", len(facts["history"]))
    done = {
        "seconds": round(random.uniform(1, 20), 3),
        "event": f"The assistant carries out its offer: {facts['proposal']}",
    }
    return {"events": [done], "entities": [{"entity": topic[1], "state": "worked on by the assistant", "new": False}]}


_ANSWERS: dict[str, Callable[[SimulatedSession, Domain, Topic, Facts], Facts]] = {
    "setup": _setup,
    "ask": _ask,
    "tell": _tell,
    "act": _act,
    "events": _events,
    "propose": _propose,
    "judge": _judge,
    "execute": _execute,
}
