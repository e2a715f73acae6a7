"""The rules of a live session, as a state machine: when the agent is asked, when an offer is shown, and how it ends.

It is immutable and does no input or output: each transition of `Watch` returns a new `Watch`. Times are epoch seconds.

    phase      what happens           next phase
    WATCHING   an event               PROPOSING; WATCHING if away, cooling down, budget used or outdated
    PROPOSING  the agent's proposal   GATED; WATCHING if silent, outdated or failed
    GATED      the gate's verdict     SHOWN; WATCHING if held back, repeated or failed
    SHOWN      a reply                WATCHING
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from datamodules.ranges import Count, NonNegativeFloat, Positive, Tries

HOUR = 3600.0
MAX_REMEMBERED = 1000  # an offer is not repeated if it is one of the latest that were shown
MAX_DOUBLINGS = 30  # of a pause; enough to exceed any longest pause


class Phase(StrEnum):
    """What the assistant is doing."""

    WATCHING = "watching"
    PROPOSING = "proposing"  # the agent is being asked
    GATED = "gated"  # the agent's offer is with the gate
    SHOWN = "shown"  # an offer is open


class Decision(StrEnum):
    """What came of an event."""

    # The agent was not asked.
    AWAY = "away"
    COOLING_DOWN = "cooling down"
    BUDGET_USED = "hourly budget used"
    OFFER_OPEN = "an offer is open"
    # The agent was asked, except if the context had already changed.
    AGENT_FAILED = "agent failed"
    SILENT = "silent"  # the agent proposed null
    OUTDATED = "outdated"  # the user had moved on before the agent was asked, or before it had answered
    REPEATED = "repeated"
    HELD_BACK = "held back"
    GATE_FAILED = "gate failed"
    SHOWN = "shown"


class Reply(StrEnum):
    """How an offer ended."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    IGNORED = "ignored"  # not answered in time
    WITHDRAWN = "withdrawn"  # the context changed


@dataclass(frozen=True)
class Policy:
    """When offers may be made.

    Args:
        pause: Seconds without offers after an offer has ended. Each rejection in a row doubles them.
        longest_pause: Maximum length of a pause after rejections, in seconds.
        per_hour: Maximum number of offers within an hour. Each ignored offer in a row halves it, down to one.
        expires: Seconds until an offer without an answer counts as ignored.
        moved_on: Number of further events that withdraw an open offer.
    """

    pause: NonNegativeFloat = 120.0
    longest_pause: NonNegativeFloat = 3600.0
    per_hour: Tries = 6
    expires: Positive = 60.0
    moved_on: Count = 5

    def pause_after(self, rejections: int) -> float:
        """Return the seconds of the pause after this many rejections in a row."""
        longest = max(self.longest_pause, self.pause)
        return min(self.pause * 2 ** min(rejections, MAX_DOUBLINGS), longest)

    def budget_after(self, ignored: int) -> int:
        """Return the number of offers within an hour after this many ignored ones in a row."""
        return max(self.per_hour >> ignored, 1)


@dataclass(frozen=True)
class OpenOffer:
    """The open offer, the time when it was shown, and the number of events since."""

    proposal: str
    at: float
    events: int = 0


@dataclass(frozen=True)
class Watch:
    """The state of the assistant.

    Attributes:
        policy: When offers may be made.
        phase: What it is doing.
        away: Whether the user is away.
        paused_until: Before this time there is no offer.
        rejections: Number of rejected offers in a row.
        ignored: Number of ignored offers in a row.
        shown: Times of the offers within the last hour.
        made: The latest offers that were shown, in lower case and with single blanks, for comparison.
        pending: The offer that the gate is asked about.
        open: The open offer.
    """

    policy: Policy
    phase: Phase = Phase.WATCHING
    away: bool = False
    paused_until: float = float("-inf")
    rejections: int = 0
    ignored: int = 0
    shown: tuple[float, ...] = ()
    made: tuple[str, ...] = ()
    pending: str | None = None
    open: OpenOffer | None = None

    @property
    def due(self) -> float | None:
        """When the open offer expires."""
        return None if self.open is None else self.open.at + self.policy.expires

    def lapse(self, at: float, moved: bool = False) -> Reply | None:
        """Return how the open offer ends without an answer; None if it stays open.

        Args:
            at: The time.
            moved: Whether one more event has happened. An offer is withdrawn after `policy.moved_on` events.
        """
        if self.open is None:
            return None
        if self.open.at + self.policy.expires <= at:
            return Reply.IGNORED
        moves_on = moved and self.open.events + 1 >= self.policy.moved_on
        return Reply.WITHDRAWN if moves_on else None

    def happened(self, at: float, outdated: bool = False) -> tuple["Watch", Decision | None]:
        """Note an event. The agent is asked if the decision is None.

        Args:
            at: The time.
            outdated: Whether the context has changed since the event.
        """
        if self.phase == Phase.SHOWN and self.open is not None:
            return replace(self, open=replace(self.open, events=self.open.events + 1)), Decision.OFFER_OPEN
        self._require(Phase.WATCHING)
        recent = tuple(time for time in self.shown if time > at - HOUR)
        kept = replace(self, shown=recent)
        if self.away:
            return kept, Decision.AWAY
        if at < self.paused_until:
            return kept, Decision.COOLING_DOWN
        if len(recent) >= self.policy.budget_after(self.ignored):
            return kept, Decision.BUDGET_USED
        if outdated:
            return kept, Decision.OUTDATED
        return replace(kept, phase=Phase.PROPOSING), None

    def present(self, away: bool) -> "Watch":
        """Note that the user went away or came back. If the user goes away, no offer may be open."""
        self._require(Phase.WATCHING, *(() if away else (Phase.SHOWN,)))
        return replace(self, away=away)

    def failed(self, at: float) -> tuple["Watch", Decision]:
        """Note that the agent failed. It is not asked again during a pause."""
        self._require(Phase.PROPOSING)
        paused = max(self.paused_until, at + self.policy.pause)
        return replace(self, phase=Phase.WATCHING, paused_until=paused), Decision.AGENT_FAILED

    def proposed(self, proposal: str | None, outdated: bool = False) -> tuple["Watch", Decision | None]:
        """Note the agent's proposal. The gate is asked if the decision is None.

        Args:
            proposal: The proposal; None for silence.
            outdated: Whether the context changed while the agent was asked.
        """
        self._require(Phase.PROPOSING)
        if proposal is None:
            return replace(self, phase=Phase.WATCHING), Decision.SILENT
        if outdated:
            return replace(self, phase=Phase.WATCHING), Decision.OUTDATED
        return replace(self, phase=Phase.GATED, pending=proposal), None

    def gated(self, at: float, verdict: Decision) -> tuple["Watch", Decision]:
        """Note the gate's verdict on the offer. An offer that was shown before is not shown again.

        Args:
            at: The time.
            verdict: Shown, held back, or gate failed.
        """
        self._require(Phase.GATED)
        proposal = self.pending
        assert proposal is not None, "the gate has an offer"
        key = " ".join(proposal.casefold().split())
        if verdict == Decision.SHOWN and key in self.made:
            verdict = Decision.REPEATED
        if verdict != Decision.SHOWN:
            return replace(self, phase=Phase.WATCHING, pending=None), verdict
        return replace(
            self,
            phase=Phase.SHOWN,
            pending=None,
            open=OpenOffer(proposal, at),
            shown=(*self.shown, at),
            made=(*self.made, key)[-MAX_REMEMBERED:],
        ), verdict

    def ended(self, at: float, reply: Reply) -> "Watch":
        """Note how the open offer ended."""
        self._require(Phase.SHOWN)
        rejections = self.rejections + 1 if reply == Reply.REJECTED else self.rejections
        ignored = self.ignored + 1 if reply == Reply.IGNORED else self.ignored
        if reply == Reply.ACCEPTED:
            rejections = ignored = 0
        if reply == Reply.REJECTED:  # the user reads offers
            ignored = 0
        return replace(
            self,
            phase=Phase.WATCHING,
            open=None,
            rejections=rejections,
            ignored=ignored,
            paused_until=max(self.paused_until, at + self.policy.pause_after(rejections)),
        )

    def _require(self, *phases: Phase) -> None:
        if self.phase not in phases:
            raise ValueError(f"this cannot happen while {self.phase.value}")
