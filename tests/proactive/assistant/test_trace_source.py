"""A trace that is replayed: times, order, and where it goes on after a restart."""

import asyncio

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Trace
from proactive.assistant.clock import ReplayClock, SystemClock
from proactive.assistant.observations import Cursor, Happened, Observation
from proactive.assistant.trace_source import TraceSource

TIMES = ("1717378000.5", "1717378010", "1717378005", "later", "1717378400")


def trace(times: tuple[str, ...] = TIMES) -> Trace:
    events = tuple(Event(time=time, event=f"The user does step {n}.") for n, time in enumerate(times))
    return Trace("a.json", events, (False,) * len(events))


def replayed(clock: ReplayClock, one: Trace, cursor: Cursor | None = None) -> list[tuple[float, Observation]]:
    """Each observation with the time of the clock at that moment."""

    async def collected() -> list[tuple[float, Observation]]:
        return [(clock.now(), found) async for found in TraceSource(one, clock).observations(cursor)]

    return asyncio.run(collected())


def test_events_come_at_their_times_which_never_decrease() -> None:
    found = replayed(ReplayClock(), trace())
    assert [now for now, _ in found] == [one.at for _, one in found]
    assert [one.at - 1_717_378_000 for _, one in found] == [0.5, 10, 10, 70, 400]
    assert [one.event for _, one in found if isinstance(one, Happened)] == list(trace().events)


def test_a_source_goes_on_after_each_cursor() -> None:
    whole = [one for _, one in replayed(ReplayClock(), trace())]
    for number, one in enumerate(whole, 1):
        assert [after for _, after in replayed(ReplayClock(), trace(), one.cursor)] == whole[number:]


def test_a_faster_clock_waits_for_a_part_of_the_time_only() -> None:
    clock = ReplayClock(speed=1e6)
    found = replayed(clock, trace())
    assert all(now >= one.at - 1e-3 for now, one in found)
    later = clock.seconds_until(found[-1][1].at + 5e6)
    assert later is not None
    assert 0 < later <= 5


def test_without_a_speed_a_time_comes_with_an_observation_only() -> None:
    assert ReplayClock().seconds_until(5.0) is None
    assert SystemClock().seconds_until(5.0) == 0
