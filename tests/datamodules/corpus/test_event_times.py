"""Clock times and gaps of events."""

from datamodules.corpus.event_times import moments, seconds_of
from datamodules.corpus.records import Event


def test_epoch_seconds_are_clock_times_with_gaps() -> None:
    times = ("1717377997.0", "1717378000.744", "1717378021.037", "1717381627", "1717468027", "1717468026")
    found = moments([Event(time=time, event="x") for time in times])
    assert [moment.clock for moment in found][:2] == ["01:26:37", "01:26:40"]
    assert found[0].time == "2024-06-03 01:26:37 UTC"
    assert [moment.gap for moment in found] == ["", "+3.7 s", "+20 s", "+1 h", "+1 d", "−1 s"]


def test_times_in_words_are_shown_unchanged() -> None:
    words = ("Day 1, 11:22 PM", "Day 1, 11:30 PM", "Day 2, 12:05 AM", "later", "nan", "1e300")
    times = (*words, "1717377997", "1717377997")
    found = moments([Event(time=time, event="x") for time in times])
    assert [moment.clock for moment in found][:6] == list(words)
    assert [moment.gap for moment in found] == ["", "+8 min", "+35 min", "", "", "", "", "+0 s"]


def test_seconds_of_times_in_either_form() -> None:
    times = ("1717378000.744", "Day 1, 12:30 AM", "Day 2, 1:00 PM", "later", "nan")
    assert [seconds_of(time) for time in times] == [1_717_378_000.744, 88_200.0, 219_600.0, None, None]
