"""The loop of a live session: it takes observations and the user's answers one by one, and logs what came of each."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Candidate
from datamodules.errors import UserError
from models.judging.agents import Agent
from proactive.assistant.clock import Clock
from proactive.assistant.deciding import Decision, Policy, Reply
from proactive.assistant.live_gate import GateVerdict, no_gate
from proactive.assistant.model_thread import run_in_event_loop
from proactive.assistant.notices import Notices
from proactive.assistant.observations import Gap, Happened, Observation, Presence, Source
from proactive.assistant.session_log import (
    ActionEntry,
    Entry,
    EventEntry,
    GapEntry,
    PresenceEntry,
    ReplyEntry,
    SessionLog,
)
from proactive.assistant.session_state import SessionState
from proactive.assistant.tools import act

OnEntry = Callable[[Entry], None]
RunAgent = Callable[[Callable[[], Coroutine[Any, Any, list[Candidate]]]], Awaitable[list[Candidate]]]
AskGate = Callable[[Sequence[Event], str, int], Awaitable[GateVerdict]]


@dataclass(frozen=True)
class SessionParts:
    """The parts of a session.

    Attributes:
        source: Yields observations.
        clock: Tells the time.
        agent: Makes proposals.
        notices: Shows offers, and returns the user's answers.
        policy: Limits when offers may be made.
        ask_gate: Returns the gate's verdict on an offer: `Gate.verdict`, or `no_gate`.
        threshold: The gate's threshold; None without a gate.
        window: Number of latest events that the gate gets.
        on_entry: Called with each new entry of the log.
        tools: Names of the tools that may run after an offer was accepted.
        run_agent: Runs the agent's coroutines: `ModelThread.run` for a local model, else `run_in_event_loop`.
    """

    source: Source
    clock: Clock
    agent: Agent
    notices: Notices
    policy: Policy
    ask_gate: AskGate = no_gate
    threshold: float | None = None
    window: int = 1
    on_entry: OnEntry = lambda entry: None
    tools: tuple[str, ...] = ()
    run_agent: RunAgent = run_in_event_loop


@dataclass(frozen=True)
class _Answered:
    """The user's answer to the offer after the event `number`."""

    number: int
    accepted: bool
    at: float


class Assistant:
    """Runs one session: a new one, or one that continues from the end of its log."""

    def __init__(self, parts: SessionParts) -> None:
        self.parts = parts
        self.state = SessionState(parts.agent, parts.source.name, parts.policy, parts.window)
        self.log = SessionLog(self.state.resume)
        self._inbox: deque[Observation | _Answered] = deque()
        self._arrived = asyncio.Event()  # something was put into the inbox
        self._wanted = asyncio.Event()  # with a stepwise clock: the next observation may be read
        self._folder = Path()  # of the session

    async def run(self, path: Path, settings: dict[str, Any]) -> None:
        """Watch until the source ends or this task is cancelled.

        Args:
            path: The log. If it exists, the session continues.
            settings: Everything that determines the decisions.

        Raises:
            UserError: The log has other settings, or the source cannot be read.
        """
        self._folder = path.parent
        with self.log.opened(path, settings):
            async with self.parts.notices.running(self._answer):
                await self._withdraw()  # an offer from before a kill: its notice ended with the killed process
                reading = asyncio.create_task(self._read_source())
                try:
                    while (item := await self._next(reading)) is not None:
                        await self._take(item)
                finally:
                    reading.cancel()
                    await asyncio.wait({reading})  # `_next` raises its error
                    await self._withdraw()

    def _answer(self, number: int, accepted: bool) -> None:
        self._inbox.append(_Answered(number, accepted, self._now()))
        self._arrived.set()

    async def _read_source(self) -> None:
        """Put observations into the inbox. With a stepwise clock, wait until the previous one has been dealt with."""
        async with contextlib.aclosing(self.parts.source.observations(self.state.cursor)) as observations:
            while True:
                if self.parts.clock.stepwise:
                    await self._wanted.wait()
                    self._wanted.clear()
                observation = await anext(observations, None)
                if observation is None:
                    return
                self._inbox.append(observation)
                self._arrived.set()

    async def _next(self, reading: "asyncio.Task[None]") -> Observation | _Answered | None:
        """Wait for the next item of the inbox, and end the open offer if it expires meanwhile.

        Returns:
            The item; None if the source has ended and no offer is open.
        """
        clock = self.parts.clock
        while not self._inbox:
            due = self.state.watch.due
            if reading.done():
                reading.result()  # raises its error
                if due is None:
                    return None
                if clock.stepwise:
                    await clock.reach(due)
            if await self._lapse(self._now()):
                continue
            self._arrived.clear()
            self._wanted.set()
            arrival = asyncio.create_task(self._arrived.wait())
            await asyncio.wait(
                {arrival} if reading.done() else {arrival, reading},
                timeout=None if due is None else clock.seconds_until(due),
                return_when=asyncio.FIRST_COMPLETED,
            )
            arrival.cancel()
        return self._inbox.popleft()

    async def _take(self, item: Observation | _Answered) -> None:
        now = item.at if isinstance(item, _Answered) else self._now()
        await self._lapse(now, moved=isinstance(item, Happened))
        match item:
            case _Answered(number, accepted):
                if self.state.offer is not None and self.state.offer.number == number:
                    await self._end(now, Reply.ACCEPTED if accepted else Reply.REJECTED)
            case Happened():
                await self._event(item, now)
            case Presence(away, at, cursor):
                if away:
                    await self._withdraw()
                self._absence(PresenceEntry(away=away, at=at, now=now, cursor=dict(cursor)))
            case Gap(since, at, reason, cursor):
                await self._withdraw()
                self._absence(GapEntry(since=since, at=at, now=now, reason=reason, cursor=dict(cursor)))

    async def _event(self, item: Happened, now: float) -> None:
        """Decide what comes of an event, log it, and show the offer."""
        state, number, begin = self.state, self.state.number + 1, time.perf_counter()
        watch, decision = state.watch.happened(now, self._outdated())
        proposed: Candidate | None = None
        verdict: GateVerdict | None = None
        error, agent_seconds, gate_seconds = "", None, None
        if decision is not None:
            state.agent_session.note(item.event)
        else:
            try:
                observe = state.agent_session.observe
                (proposed, *_) = await self.parts.run_agent(lambda: observe(item.event))
                watch, decision = watch.proposed(proposed.proposal, self._outdated())
            except UserError as failure:
                error = failure.what
                watch, decision = watch.failed(self._now())
            agent_seconds = time.perf_counter() - begin
        if decision is None and proposed is not None and proposed.proposal is not None:
            verdict = await self.parts.ask_gate([*state.history, item.event], proposed.proposal, number)
            gate_seconds = time.perf_counter() - begin - (agent_seconds or 0.0)
            error = verdict.error
        decided = self._now()
        if verdict is not None:
            watch, decision = watch.gated(decided, verdict.decision)
        assert decision is not None, "each of these steps makes a decision, or lets the next one decide"
        notes = {name: str(text) for name, text in (proposed.notes if proposed else {}).items()}
        entry = EventEntry(
            number=number,
            at=item.at,
            now=now,
            decided=decided,
            event=item.event,
            cursor=dict(item.cursor),
            decision=decision,
            proposal=proposed.proposal if proposed else None,
            purpose=notes.get("Purpose", ""),
            thoughts=notes.get("Thoughts", ""),
            response=notes.get("Response", ""),
            probability=verdict.probability if verdict else None,
            threshold=self.parts.threshold if verdict else None,
            propensity=verdict.propensity if verdict else None,
            agent_seconds=agent_seconds,
            gate_seconds=gate_seconds,
            error=error,
        )
        state.watch = watch
        state.event(entry)
        self._log(entry)  # before the user can see the offer
        if state.offer is not None and decision == Decision.SHOWN:
            await self.parts.notices.show(state.offer)

    def _absence(self, entry: PresenceEntry | GapEntry) -> None:
        self._log(entry)
        self.state.absence(entry)

    def _outdated(self) -> bool:
        """Whether the observations that wait in the inbox show that the user has moved on or gone away."""
        events = sum(isinstance(one, Happened) for one in self._inbox)
        left = any(isinstance(one, Gap) or (isinstance(one, Presence) and one.away) for one in self._inbox)
        return left or events >= self.parts.policy.moved_on

    async def _lapse(self, now: float, moved: bool = False) -> bool:
        """End the open offer if it has expired, or if the user has moved on with one more event."""
        watch = self.state.watch
        reply = watch.lapse(now, moved)
        if reply is None or watch.due is None:
            return False
        await self._end(min(watch.due, now), reply)
        return True

    async def _withdraw(self) -> None:
        if self.state.offer is not None:
            await self._end(self._now(), Reply.WITHDRAWN)

    async def _end(self, now: float, reply: Reply) -> None:
        """Note how the open offer ended."""
        offer = self.state.offer
        assert offer is not None, "an offer is open"
        self.state.watch, self.state.offer = self.state.watch.ended(now, reply), None
        self._log(ReplyEntry(number=offer.number, now=now, reply=reply))
        await self.parts.notices.end(offer, reply)
        if reply == Reply.ACCEPTED and offer.call is not None:
            outcome, what = act(offer.call, self.parts.tools, self._folder)
            tool = offer.call.tool
            self._log(ActionEntry(number=offer.number, now=now, tool=tool, outcome=outcome, what=what))

    def _log(self, entry: Entry) -> None:
        self.log.add(entry)
        self.parts.on_entry(entry)

    def _now(self) -> float:
        """The time, which never decreases."""
        self.state.latest = max(self.state.latest, self.parts.clock.now())
        return self.state.latest
