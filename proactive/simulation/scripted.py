"""Roles that play by the rules of the embedded simulator, without any model.

They know the topic of a scene by its first two entities, and its apps by the others; the kind of session by its theme.
A scene of an unknown theme is played with the sentences of one of the simulator's domains.
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
from proactive.simulation.log import SimulationLog
from proactive.simulation.questions import Question, Refused, Role
from proactive.simulation.scenes import Trial

REACHES_GOAL = 0.15  # the chance of an act of a user who makes headway
SECOND_EVENT = 0.3  # the chance that an act leads to two events
IGNORES = 0.5  # the chance that a user who is away sees no offer
Facts = dict[str, Any]


class ScriptedRole(Role):
    """Any of the four roles."""

    def __init__(self, log: SimulationLog) -> None:
        self.log = log

    def describe(self) -> dict[str, Any]:
        return {"role": "scripted"}

    async def reply(self, question: Question[Any], trial: Trial, refused: Sequence[Refused]) -> str:
        key = self.log.key(trial, question, len(refused))
        if key not in self.log.texts:
            domain, topic = _vocabulary(trial)
            answer = _ANSWERS[question.kind](trial, domain, topic, question.facts)
            self.log.keep(trial, question, len(refused), json.dumps(answer, ensure_ascii=False))
        return self.log.texts[key]


def _vocabulary(trial: Trial) -> tuple[Domain, Topic]:
    environment = trial.scene.environment
    themes = list(DOMAINS)
    theme = environment.theme if environment.theme in DOMAINS else trial.random("domain").choice(themes)
    thing, *others = environment.entities
    place = others[0] if others else thing
    return replace(DOMAINS[theme], apps=others[1:] or [place]), (thing, place)


def _setup(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    return {
        "entities": [{"entity": name, "state": "as usual", "new": False} for name in trial.scene.environment.entities]
    }


def _ask(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    return {"question": f"Where is {topic[0]}?"}


def _tell(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    return {"answer": f"In {topic[1]}."}


def _act(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = trial.random("act", facts["acts"])
    before = facts["state"]
    state = draw_state(random) if before is None else next_state(random, "flowing" if facts["helped"] else before)
    done = state == "flowing" and random.random() < REACHES_GOAL
    return {"state": state, "act": draw_event(random, domain, topic, state), "goal_reached": done}


def _events(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = trial.random("events", len(facts["history"]))
    events = [{"seconds": _gap(random), "event": facts["act"]}]
    if random.random() < SECOND_EVENT:
        text = random.choice(ANY_STATE_EVENTS).format(place=topic[1], app=random.choice(domain.apps))
        events.append({"seconds": _gap(random), "event": text})
    return {"events": events, "entities": []}


def _gap(random: Random) -> float:
    return round(random.uniform(5, 400), 3)


def _propose(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = trial.random("propose", len(facts["history"]), len(facts["rejected"]))
    return {"purpose": "", "thoughts": "", "proposal": draw_proposal(random, domain, topic), "response": ""}


def _judge(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    state, proposal = facts["state"], facts["proposal"]
    random = trial.random("judge", len(facts["history"]), proposal)
    if state == "away" and proposal is not None and random.random() < IGNORES:
        return {"judgment": "ignored", "reason": "The user is away."}
    accepted = majority(annotate(random, domain, topic, state, proposal))
    return {"judgment": "accepted" if accepted else "rejected", "reason": f"The user is {state}."}


def _execute(trial: Trial, domain: Domain, topic: Topic, facts: Facts) -> Facts:
    random = trial.random("execute", len(facts["history"]))
    done = {
        "seconds": round(random.uniform(1, 20), 3),
        "event": f"The assistant carries out its offer: {facts['proposal']}",
    }
    return {"events": [done], "entities": [{"entity": topic[1], "state": "worked on by the assistant", "new": False}]}


_ANSWERS: dict[str, Callable[[Trial, Domain, Topic, Facts], Facts]] = {
    "setup": _setup,
    "ask": _ask,
    "tell": _tell,
    "act": _act,
    "events": _events,
    "propose": _propose,
    "judge": _judge,
    "execute": _execute,
}
