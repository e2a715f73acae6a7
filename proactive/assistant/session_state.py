"""The state of a running session. It can be computed from the entries of the log, so a session can continue."""

from collections import deque

from datamodules.corpus.records import Event
from models.judging.agents import Agent, AgentSession
from proactive.assistant.deciding import Decision, Policy, Watch
from proactive.assistant.notices import Offer
from proactive.assistant.observations import Cursor
from proactive.assistant.session_log import ActionEntry, Entry, EventEntry, GapEntry, PresenceEntry, ReplyEntry
from proactive.assistant.tools import call_of

LONG_ABSENCE = 1800.0  # seconds without the user after which a new trace begins


class Absences:
    """Finds long absences among presences and gaps."""

    def __init__(self) -> None:
        self._left: float | None = None  # when the user went away

    def ends_trace(self, entry: PresenceEntry | GapEntry) -> bool:
        """Note an entry, and return whether a long absence ended with it."""
        if isinstance(entry, GapEntry):
            since: float | None = entry.since
        elif entry.away:
            self._left = entry.at if self._left is None else self._left
            return False
        else:
            since, self._left = self._left, None
        return since is not None and entry.at - since >= LONG_ABSENCE


class SessionState:
    """The state of a session. It keeps a bounded number of events and offers, besides what the agent keeps.

    Args:
        agent: Makes proposals.
        name: The name of the session.
        policy: When offers may be made.
        window: Number of latest events to keep for the gate.

    Attributes:
        watch: The state machine.
        agent_session: The agent's session for the current trace.
        history: The latest events of the current trace.
        number: The number of the latest event.
        cursor: The cursor of the source after the latest observation.
        offer: The open offer.
        latest: The latest time so far. Times in the log never decrease.
    """

    def __init__(self, agent: Agent, name: str, policy: Policy, window: int) -> None:
        self.agent = agent
        self.name = name
        self.watch = Watch(policy)
        self.history: deque[Event] = deque(maxlen=window)
        self.number = 0
        self.cursor: Cursor | None = None
        self.offer: Offer | None = None
        self.latest = float("-inf")
        self._absences = Absences()
        self._traces = 0
        self.agent_session = self._begin_trace()

    def resume(self, entry: Entry) -> None:
        """Apply an entry of the log.

        Raises:
            ValueError: It does not follow from the earlier entries.
        """
        self.latest = max(self.latest, entry.now)
        if isinstance(entry, EventEntry):
            self.watch = _after(self.watch, entry)
            self.agent_session.note(entry.event)
            self.event(entry)
        elif isinstance(entry, ReplyEntry):
            self.watch, self.offer = self.watch.ended(entry.now, entry.reply), None
        elif not isinstance(entry, ActionEntry):  # an action changes nothing, and is not repeated
            self.absence(entry)

    def event(self, entry: EventEntry) -> None:
        """Note an event. The watch and the agent must have been told before."""
        self.latest = max(self.latest, entry.decided)
        self.number, self.cursor = entry.number, entry.cursor
        self.history.append(entry.event)
        if entry.decision == Decision.SHOWN and entry.proposal is not None:
            call = call_of(entry.response)
            self.offer = Offer(entry.number, entry.proposal, "" if call else entry.response, call)

    def absence(self, entry: PresenceEntry | GapEntry) -> None:
        """Note that the user went away or came back, or a gap. After a long absence a new trace begins."""
        self.cursor = entry.cursor
        if isinstance(entry, PresenceEntry):
            self.watch = self.watch.present(entry.away)
        if self._absences.ends_trace(entry):
            self.history.clear()
            self.agent_session = self._begin_trace()

    def _begin_trace(self) -> AgentSession:
        self._traces += 1
        return self.agent.session(self.name if self._traces == 1 else f"{self.name}.{self._traces}")


def _after(watch: Watch, entry: EventEntry) -> Watch:
    """Return the watch after an event whose decision is known: the same transitions as when it was made."""
    outdated = entry.decision == Decision.OUTDATED
    watch, decision = watch.happened(entry.now, outdated and entry.proposal is None)
    if decision is None and entry.decision == Decision.AGENT_FAILED:
        watch, decision = watch.failed(entry.decided)
    if decision is None:
        watch, decision = watch.proposed(entry.proposal, outdated)
    if decision is None:
        repeated = entry.decision == Decision.REPEATED
        watch, decision = watch.gated(entry.decided, Decision.SHOWN if repeated else entry.decision)
    if decision != entry.decision:
        raise ValueError(f"event {entry.number} was {entry.decision.value}, and {decision.value} follows")
    return watch
