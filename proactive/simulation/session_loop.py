"""Simulates one session: a fixed sequence of questions to the roles, from the setup to the end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datamodules.corpus.records import Event
from datamodules.errors import UserError
from datamodules.ranges import NonNegativeInt, Tries
from proactive.simulation.asking import ask
from proactive.simulation.questions import (
    ActAnswer,
    Answer,
    AssistantAnswer,
    EntityState,
    EnvironmentAnswer,
    EventsAnswer,
    JudgeAnswer,
    NewEvent,
    Question,
    Roles,
    SetupAnswer,
    UserQuestion,
)
from proactive.simulation.scenes import SimulatedSession
from proactive.simulation.simulated_traces import Attempt, Step
from proactive.simulation.simulation_log import SimulationLog
from proactive.simulation.work_items import RoleName

FIRST_START = 1_704_067_200  # 2024-01-01 in UTC, the earliest start of a session
DAYS = 366  # sessions start within so many days
SHOWN_ENTITIES = 20  # entities that an error lists


@dataclass(frozen=True)
class LoopOptions:
    """Limits of a session.

    Args:
        max_acts: Maximum number of the user's acts.
        adaptations: Number of questions that the user asks about the surroundings before the first act.
        new_proposals: Maximum number of new proposals after one event. The assistant gets the reason of each rejection.
    """

    max_acts: Tries = 12
    adaptations: NonNegativeInt = 1
    new_proposals: NonNegativeInt = 1


@dataclass
class SessionLoop:
    """A session that is being simulated.

    Attributes:
        session: The session.
        roles: The four roles.
        log: The log that the roles add their answers to.
        options: The limits.
        steps: The events so far, each with the proposals after it.
        entities: The current state of each entity, by name.
        rejected: The rejected proposals so far, with reasons.
        adaptation: The user's questions about the surroundings before the first act, with answers.
        state: The user's hidden state; None before the first act.
        helped: Whether an offer was accepted since the last act.
        milliseconds: The time of the latest event, in milliseconds since 1970.
    """

    session: SimulatedSession
    roles: Roles
    log: SimulationLog
    options: LoopOptions
    steps: list[Step] = field(default_factory=list)
    entities: dict[str, str] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    adaptation: list[dict[str, str]] = field(default_factory=list)
    state: str | None = None
    helped: bool = False
    milliseconds: int = 0

    async def run(self) -> str:
        """Simulate the session, and return how it ended: "goal reached" or "act limit".

        Raises:
            NoValidAnswerError: A role gave only invalid answers to a question.
        """
        await self._set_up()
        for acts in range(self.options.max_acts):
            act = await self._act(acts)
            await self._add_events("events", {"act": act.act}, "user")
            if act.goal_reached:
                self.steps[-1] = self.steps[-1].with_goal_reached()
                return "goal reached"
        return "act limit"

    async def _set_up(self) -> None:
        start = self.session.random("start")
        self.milliseconds = (FIRST_START + start.randrange(DAYS * 86_400)) * 1000
        self.entities = dict.fromkeys(self.session.scene.environment.entities, "")
        setup = await self._ask(
            "environment",
            "setup",
            SetupAnswer,
            {"entities": self.entities},
            lambda found: self._updated(found.entities),
        )
        self.entities = self._updated(setup.entities)
        for _ in range(self.options.adaptations):
            earlier = {"adaptation": self.adaptation}
            asked = await self._ask("user", "ask", UserQuestion, earlier)
            facts = {**earlier, "question": asked.question}
            answer = await self._ask("environment", "tell", EnvironmentAnswer, facts)
            self.adaptation = [*self.adaptation, {"question": asked.question, "answer": answer.answer}]

    async def _act(self, acts: int) -> ActAnswer:
        facts = {
            "acts": acts,
            "state": self.state,
            "helped": self.helped,
            "adaptation": self.adaptation,
            "history": self.history(),
        }
        act = await self._ask("user", "act", ActAnswer, facts)
        self.state, self.helped = act.state, False
        return act

    async def _add_events(self, kind: str, facts: dict[str, Any], source: str) -> None:
        """Ask the environment for events. After each event of the user, ask for a proposal."""
        facts = {**facts, "entities": self.entities, "adaptation": self.adaptation, "history": self.history()}
        found = await self._ask("environment", kind, EventsAnswer, facts, lambda answer: self._updated(answer.entities))
        self.entities = self._updated(found.entities)
        for new in found.events:
            self.steps.append(Step(self._timed(new), source, self.state or ""))
            if source == "user":
                await self._propose(len(self.steps) - 1)

    async def _propose(self, step: int) -> None:
        """Ask for a proposal after an event, and for its judgment. Execute an accepted offer."""
        for _ in range(1 + self.options.new_proposals):
            history = self.history()
            proposed = await self._ask(
                "assistant", "propose", AssistantAnswer, {"rejected": self.rejected, "history": history}
            )
            facts = {
                "proposal": proposed.proposal,
                "state": self.state,
                "adaptation": self.adaptation,
                "history": history,
            }
            judged = await self._ask("judge", "judge", JudgeAnswer, facts)
            attempt = Attempt(**proposed.model_dump(), **judged.model_dump())
            self.steps[step] = self.steps[step].with_attempt(attempt)
            if judged.judgment != "rejected":
                break
            rejection = {"events": len(history), "proposal": proposed.proposal, "reason": judged.reason}
            self.rejected = [*self.rejected, rejection]
        if proposed.proposal is not None and judged.judgment == "accepted":
            self.helped = True
            offer = {"proposal": proposed.proposal, "operations": self.session.scene.environment.agent_ops}
            await self._add_events("execute", offer, "assistant")

    async def _ask(
        self,
        role: RoleName,
        kind: str,
        answer: type[Answer],
        facts: dict[str, Any],
        check: Callable[[Answer], Any] = lambda answer: None,
    ) -> Answer:
        return await ask(self.roles[role], Question(role, kind, facts, answer), self.session, self.log, check)

    def _updated(self, changes: list[EntityState]) -> dict[str, str]:
        """Return the states of all entities after some changes.

        Raises:
            UserError: A change names an unknown entity without creating it.
        """
        states = dict(self.entities)
        for change in changes:
            if change.entity not in states and not change.new:
                known = ", ".join(list(states)[:SHOWN_ENTITIES])
                raise UserError(
                    f"unknown entity {change.entity}: new is false, and the known ones are {known}",
                    "Create it with new: true.",
                )
            states[change.entity] = change.state
        return states

    def _timed(self, new: NewEvent) -> Event:
        self.milliseconds += max(round(new.seconds * 1000), 1)
        seconds, rest = divmod(self.milliseconds, 1000)
        return Event(time=f"{seconds}.{rest:03}", event=new.event)

    def history(self) -> list[dict[str, str]]:
        """Return the events so far, as questions contain them."""
        return [step.event.model_dump() for step in self.steps]
