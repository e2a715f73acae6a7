"""One trial from its setup to its end: a strict sequence of questions. Trials run side by side, see `simulation`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datamodules.corpus.json_records import parse_json, validate
from datamodules.corpus.records import Event
from datamodules.errors import UserError
from datamodules.ranges import CountOrNone, Tries
from proactive.simulation.log import SimulationLog
from proactive.simulation.questions import (
    Act,
    Answer,
    Asked,
    EntityState,
    Events,
    Judged,
    NewEvent,
    Players,
    Proposed,
    Question,
    Refused,
    RoleName,
    Setup,
    Told,
)
from proactive.simulation.scenes import Trial
from proactive.simulation.traces import Attempt, Step

TRIES = 3  # of one question: an answer that does not fit is sent back twice
FIRST_START = 1_704_067_200  # 2024-01-01, UTC
DAYS = 366  # in which sessions begin


@dataclass(frozen=True)
class LoopOptions:
    """The bounds of a trial.

    Args:
        max_acts: Acts of the user at most.
        adaptations: Questions that the user asks about the surroundings before the first act.
        new_proposals: How often the assistant may propose anew after one event, told why its proposal was rejected.
    """

    max_acts: Tries = 12
    adaptations: CountOrNone = 1
    new_proposals: CountOrNone = 1


class TrialFailedError(Exception):
    """A role gave no answer that fits."""

    def __init__(self, role: RoleName, kind: str, objection: str) -> None:
        super().__init__(f"{role}, {kind}: {objection}")
        self.cause = f"{role}, {kind}"


@dataclass
class TrialLoop:
    """A trial under way.

    Attributes:
        trial: What is simulated.
        players: Who plays the roles.
        log: Keeps questions and answers.
        options: The bounds.
        steps: The events so far, each with what was proposed after it.
        entities: The state of each entity.
    """

    trial: Trial
    players: Players
    log: SimulationLog
    options: LoopOptions
    steps: list[Step] = field(default_factory=list)
    entities: dict[str, str] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    told: list[dict[str, str]] = field(default_factory=list)
    state: str | None = None
    helped: bool = False
    milliseconds: int = 0  # since 1970: the clock, which only goes forward

    async def run(self) -> str:
        """Simulate, and return how it ended: with the goal reached, or with the limit of acts.

        Raises:
            TrialFailedError: An answer did not fit, and two more did not either.
        """
        await self._set_up()
        for acts in range(self.options.max_acts):
            act = await self._act(acts)
            await self._add_events("events", {"act": act.act}, "user")
            if act.goal_reached:
                self.steps[-1] = self.steps[-1].done()
                return "goal reached"
        return "act limit"

    async def _set_up(self) -> None:
        start = self.trial.random("start")
        self.milliseconds = (FIRST_START + start.randrange(DAYS * 86_400)) * 1000
        self.entities = dict.fromkeys(self.trial.scene.environment.entities, "")
        setup = await self._ask("environment", "setup", Setup, {}, lambda found: self._updated(found.entities))
        self.entities = self._updated(setup.entities)
        for _ in range(self.options.adaptations):
            asked = await self._ask("user", "ask", Asked, {"told": self.told})
            answer = await self._ask("environment", "tell", Told, {"told": self.told, "question": asked.question})
            self.told = [*self.told, {"question": asked.question, "answer": answer.answer}]

    async def _act(self, acts: int) -> Act:
        facts = {"acts": acts, "state": self.state, "helped": self.helped, "told": self.told, "history": self.history()}
        act = await self._ask("user", "act", Act, facts)
        self.state, self.helped = act.state, False
        return act

    async def _add_events(self, kind: str, facts: dict[str, Any], source: str) -> None:
        """Ask the environment for events, and let the assistant propose after each of the user's."""
        facts = {**facts, "entities": self.entities, "told": self.told, "history": self.history()}
        found = await self._ask("environment", kind, Events, facts, lambda answer: self._updated(answer.entities))
        self.entities = self._updated(found.entities)
        for new in found.events:
            self.steps.append(Step(self._timed(new), source, self.state or ""))
            if source == "user":
                await self._offer(len(self.steps) - 1)

    async def _offer(self, step: int) -> None:
        """Propose and judge after an event; carry out what is accepted, and propose anew after a rejection."""
        for _ in range(1 + self.options.new_proposals):
            history = self.history()
            proposed = await self._ask(
                "assistant", "propose", Proposed, {"rejected": self.rejected, "history": history}
            )
            facts = {"proposal": proposed.proposal, "state": self.state, "told": self.told, "history": history}
            judged = await self._ask("judge", "judge", Judged, facts)
            attempt = Attempt(**proposed.model_dump(), **judged.model_dump())
            self.steps[step] = self.steps[step].with_attempt(attempt)
            if judged.judgment != "rejected":
                break
            self.rejected = [
                *self.rejected,
                {"events": len(history), "proposal": proposed.proposal, "reason": judged.reason},
            ]
        if proposed.proposal is not None and judged.judgment == "accepted":
            self.helped = True
            offer: dict[str, Any] = {
                "proposal": proposed.proposal,
                "operations": self.trial.scene.environment.agent_ops,
            }
            await self._add_events("execute", offer, "assistant")

    async def _ask(
        self,
        role: RoleName,
        kind: str,
        answer: type[Answer],
        facts: dict[str, Any],
        check: Callable[[Answer], Any] = lambda answer: None,
    ) -> Answer:
        """Ask until an answer fits its record and passes `check`, which raises a UserError for one that does not."""
        question = Question(role, kind, facts, answer)
        refused: list[Refused] = []
        while len(refused) < TRIES:
            text = await self.players[role].reply(question, self.trial, refused)
            await self.log.synced()
            try:
                found = validate(parse_json(text, "answer"), answer, "answer")
                check(found)
            except UserError as error:
                refused.append(Refused(text, error.what))
            else:
                return found
        raise TrialFailedError(role, kind, refused[-1].objection)

    def _updated(self, changes: list[EntityState]) -> dict[str, str]:
        """The states of all entities after some changes.

        Raises:
            UserError: A change names an unknown entity without creating it.
        """
        states = dict(self.entities)
        for change in changes:
            if change.entity not in states and not change.new:
                raise UserError(f"unknown entity {change.entity}", "Create it with new: true.")
            states[change.entity] = change.state
        return states

    def _timed(self, new: NewEvent) -> Event:
        self.milliseconds += max(round(new.seconds * 1000), 1)
        seconds, rest = divmod(self.milliseconds, 1000)
        return Event(time=f"{seconds}.{rest:03}", event=new.event)

    def history(self) -> list[dict[str, str]]:
        """The events so far, as questions have them."""
        return [step.event.model_dump() for step in self.steps]
