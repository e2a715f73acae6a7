"""The state machine of offers: what holds for any order of events, absences, answers and failures."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proactive.assistant.deciding import HOUR, Decision, Phase, Policy, Reply, Watch

SECONDS = st.one_of(st.floats(0, 30), st.floats(0, 2000))
PROPOSALS = st.one_of(st.none(), st.sampled_from([f"Offer {n}" for n in range(30)]))
VERDICTS = st.sampled_from([Decision.SHOWN, Decision.SHOWN, Decision.HELD_BACK, Decision.GATE_FAILED])


class Offers(RuleBasedStateMachine):
    """Drives a `Watch`, and keeps a record of its own of what was shown and how it ended."""

    @initialize(
        pause=st.floats(0, 300),
        per_hour=st.integers(1, 5),
        expires=st.floats(1, 120),
        moved_on=st.integers(1, 4),
    )
    def begin(self, pause: float, per_hour: int, expires: float, moved_on: int) -> None:
        self.policy = Policy(pause, 1000.0, per_hour, expires, moved_on)
        self.watch = Watch(self.policy)
        self.now = 1_717_000_000.0
        self.shown: list[tuple[float, str]] = []
        self.ends: list[tuple[float, Reply]] = []
        self.away = False

    def pass_time(self, seconds: float, moved: bool = False) -> None:
        self.now += seconds
        while (reply := self.watch.lapse(self.now, moved)) is not None:
            due = self.watch.due
            assert due is not None
            self.end(due if reply == Reply.IGNORED else self.now, reply)

    def end(self, at: float, reply: Reply) -> None:
        self.watch = self.watch.ended(at, reply)
        self.ends.append((at, reply))
        assert len(self.ends) == len(self.shown), "one end for each offer"

    @rule(seconds=SECONDS, proposal=PROPOSALS, verdict=VERDICTS, fails=st.booleans(), outdated=st.booleans())
    def event(self, seconds: float, proposal: str | None, verdict: Decision, fails: bool, outdated: bool) -> None:
        self.pass_time(seconds, moved=True)
        self.watch, decision = self.watch.happened(self.now)
        if decision is not None:
            self.check_reason_to_stay(decision)
            return
        self.check_may_offer()
        if fails and outdated:
            self.watch, decision = self.watch.failed(self.now)
            assert decision == Decision.AGENT_FAILED
            return
        self.watch, decision = self.watch.proposed(proposal, outdated)
        if decision is not None:
            assert decision == (Decision.SILENT if proposal is None else Decision.OUTDATED)
            return
        assert proposal is not None
        self.watch, decision = self.watch.gated(self.now, verdict)
        if decision == Decision.SHOWN:
            assert verdict == Decision.SHOWN
            assert proposal not in [text for _, text in self.shown], "an offer is not repeated"
            self.shown.append((self.now, proposal))
        elif verdict == Decision.SHOWN:
            assert decision == Decision.REPEATED
            assert proposal in [text for _, text in self.shown]
        else:
            assert decision == verdict

    def pause(self) -> float:
        """The pause after the latest end."""
        rejections = 0
        for _, reply in self.ends:
            rejections = 0 if reply == Reply.ACCEPTED else rejections + (reply == Reply.REJECTED)
        return min(self.policy.pause * 2**rejections, max(1000.0, self.policy.pause))

    def check_may_offer(self) -> None:
        assert not self.away
        assert len(self.shown) == len(self.ends), "never two open offers"
        if self.ends:
            assert self.now >= self.ends[-1][0] + self.pause(), "never while cooling down"
        recent = [at for at, _ in self.shown if at > self.now - HOUR]
        assert len(recent) < self.policy.per_hour

    def check_reason_to_stay(self, decision: Decision) -> None:
        if decision == Decision.OFFER_OPEN:
            assert len(self.shown) == len(self.ends) + 1
        elif decision == Decision.AWAY:
            assert self.away
        else:
            assert decision in (Decision.COOLING_DOWN, Decision.BUDGET_USED)
            assert self.ends or decision == Decision.COOLING_DOWN, "only an offer uses the budget"

    @rule(seconds=SECONDS, reply=st.sampled_from([Reply.ACCEPTED, Reply.REJECTED]))
    def answer(self, seconds: float, reply: Reply) -> None:
        self.pass_time(seconds)
        if self.watch.open is not None:
            self.end(self.now, reply)

    @rule(seconds=SECONDS, away=st.booleans())
    def presence(self, seconds: float, away: bool) -> None:
        self.pass_time(seconds)
        if away and self.watch.open is not None:
            self.end(self.now, Reply.WITHDRAWN)
        self.watch, self.away = self.watch.present(away), away

    @precondition(lambda self: self.watch.open is not None)
    @rule()
    def no_second_offer_can_be_made(self) -> None:
        for step in (lambda: self.watch.proposed("x"), lambda: self.watch.gated(self.now, Decision.SHOWN)):
            with pytest.raises(ValueError, match="this cannot happen while shown"):
                step()

    @invariant()
    def the_hourly_budget_is_never_exceeded(self) -> None:
        times = [at for at, _ in getattr(self, "shown", [])]
        for at in times:
            assert len([time for time in times if at - HOUR < time <= at]) <= self.policy.per_hour

    @invariant()
    def phase_and_fields_agree(self) -> None:
        if hasattr(self, "watch"):
            assert (self.watch.open is not None) == (self.watch.phase == Phase.SHOWN)
            assert self.watch.phase in (Phase.WATCHING, Phase.SHOWN)
            assert len(self.watch.shown) <= self.policy.per_hour


TestOffers = Offers.TestCase
TestOffers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def after_offers(policy: Policy, *replies: Reply) -> Watch:
    """The state after offers that ended like this, an hour apart, the last one at 0."""
    watch = Watch(policy)
    for place, reply in enumerate(replies, 1 - len(replies)):
        watch, _ = watch.happened(place * 2 * HOUR)
        watch, _ = watch.proposed(f"offer {place}")
        watch, decision = watch.gated(place * 2 * HOUR, Decision.SHOWN)
        assert decision == Decision.SHOWN
        watch = watch.ended(place * 2 * HOUR, reply)
    return watch


@pytest.mark.parametrize(
    ("replies", "pause"),
    [
        ([Reply.ACCEPTED], 100),
        ([Reply.IGNORED], 100),
        ([Reply.REJECTED], 200),
        ([Reply.REJECTED, Reply.REJECTED], 400),
        ([Reply.REJECTED] * 5, 1000),
        ([Reply.REJECTED, Reply.ACCEPTED], 100),
    ],
)
def test_a_rejection_lengthens_the_pause(replies: list[Reply], pause: float) -> None:
    watch = after_offers(Policy(pause=100, longest_pause=1000), *replies)
    assert watch.happened(pause - 0.1)[1] == Decision.COOLING_DOWN
    assert watch.happened(pause)[1] is None


@pytest.mark.parametrize(
    ("replies", "most"),
    [
        ([Reply.ACCEPTED], 8),
        ([Reply.IGNORED], 4),
        ([Reply.IGNORED] * 2, 2),
        ([Reply.IGNORED] * 9, 1),
        ([Reply.IGNORED, Reply.REJECTED], 8),
        ([Reply.IGNORED, Reply.WITHDRAWN], 4),
    ],
)
def test_being_ignored_lowers_the_rate(replies: list[Reply], most: int) -> None:
    watch = replace(after_offers(Policy(pause=0, per_hour=8), *replies), shown=())
    for number in range(most):
        watch, decision = watch.happened(10.0 + number)
        assert decision is None
        watch, _ = watch.proposed(f"another {number}")
        watch, _ = watch.gated(10.0 + number, Decision.SHOWN)
        watch = watch.ended(10.0 + number, Reply.WITHDRAWN)
    assert watch.happened(20.0)[1] == Decision.BUDGET_USED
    assert watch.happened(20.0 + HOUR)[1] is None


def test_an_offer_expires_or_is_withdrawn_when_the_user_moves_on() -> None:
    watch, _ = Watch(Policy(expires=60, moved_on=2)).happened(0.0)
    watch, _ = watch.proposed("x")
    watch, _ = watch.gated(1.0, Decision.SHOWN)
    assert (watch.lapse(60.9), watch.lapse(61.0), watch.due) == (None, Reply.IGNORED, 61.0)
    assert watch.lapse(10.0, moved=True) is None
    watch, decision = watch.happened(10.0)
    assert decision == Decision.OFFER_OPEN
    assert (watch.lapse(20.0, moved=True), watch.lapse(20.0)) == (Reply.WITHDRAWN, None)


def test_a_failing_agent_is_not_asked_again_at_once() -> None:
    watch, _ = Watch(Policy(pause=30)).happened(0.0)
    watch, _ = watch.failed(5.0)
    assert watch.happened(34.0)[1] == Decision.COOLING_DOWN
    assert watch.happened(35.0)[1] is None


def test_differences_of_case_and_blanks_do_not_make_another_offer() -> None:
    watch = after_offers(Policy(pause=0), Reply.ACCEPTED)
    watch, _ = watch.happened(1.0)
    watch, _ = watch.proposed("OFFER  0 ")
    assert watch.gated(1.0, Decision.SHOWN)[1] == Decision.REPEATED
