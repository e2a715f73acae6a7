"""How recorded events are read, by type of bucket, without private content."""

from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.spans import (
    EDITOR,
    INPUT,
    PRESENCE,
    TAB,
    TYPES,
    WINDOW,
    Edited,
    RecordedEvent,
    Span,
    Status,
    Tab,
    Window,
    clipped,
    spans,
)

BEGIN = datetime(2025, 1, 1, tzinfo=UTC).timestamp()


def event(start: float, duration: float, **data: Any) -> RecordedEvent:
    return RecordedEvent(timestamp=datetime.fromtimestamp(BEGIN + start, UTC), duration=duration, data=data)


def contents(kind: str, *events: RecordedEvent) -> list[Any]:
    return [span.content for span in spans(kind, events, PrivacyOptions())]


def test_each_type_is_read_into_its_content() -> None:
    assert contents(WINDOW, event(0, 1, app="Code", title="a"), event(1, 1, app="", title="b"), event(2, 1)) == [
        Window("Code", "a"),
        None,
        None,
    ]
    assert contents(EDITOR, event(0, 1, file=r"C:\work\shop\a.py", project="/home/ada/shop/"), event(1, 1, file=7)) == [
        Edited("shop", "a.py"),
        None,
    ]
    assert contents(EDITOR, event(0, 1, file="a.py", project="unknown")) == [Edited("", "a.py")]
    assert contents(PRESENCE, event(0, 1, status="afk"), event(1, 1, status="not-afk")) == [Status(True), Status(False)]
    assert contents(TAB, event(0, 1, url="https://a.example/b?c", title="A", incognito=False)) == [
        Tab("A", "a.example/b", False)
    ]


def test_private_tabs_have_no_address_and_an_unclear_mark_counts_as_private() -> None:
    for mark in (True, "true", 1, "no"):
        assert contents(TAB, event(0, 1, url="https://a.example", title="A", incognito=mark)) == [Tab("A", None, True)]
    assert contents(TAB, event(0, 1, url="https://a.example/netbanking", title="A")) == [Tab("A", None, True)]
    title = "Sign in - My Bank"
    assert contents(TAB, event(0, 1, url="https://a.example", title=title)) == [Tab(title, None, True)]


def test_spans_are_sorted_by_start_and_the_longest_of_one_start_counts() -> None:
    found = spans(
        WINDOW,
        [event(5, 1, app="Late"), event(0, 2, app="Short"), event(0, 4, app="Long"), event(0, 3, app="Middle")],
        PrivacyOptions(),
    )
    assert found == [
        Span(BEGIN, BEGIN + 4, Window("Long", "")),
        Span(BEGIN + 5, BEGIN + 6, Window("Late", "")),
    ]


def test_input_only_tells_presence() -> None:
    keys = {"presses": 3, "clicks": 0, "deltaX": 0}
    quiet = dict.fromkeys(keys, 0)
    found = spans(
        INPUT,
        [
            event(0, 1, **keys),
            event(1, 99, **quiet),
            event(100, 1, **keys),
            event(101, 299, **quiet),
            event(400, 1, **keys),
        ],
        PrivacyOptions(),
    )
    assert [(span.start - BEGIN, span.end - BEGIN, span.content) for span in found] == [
        (0, 1, Status(False)),
        (100, 101, Status(False)),
        (101, 400, Status(True)),
        (400, 401, Status(False)),
    ]
    still_away = spans(INPUT, [event(0, 1, **keys), event(1, 200, **quiet)], PrivacyOptions())
    assert [span.content for span in still_away] == [Status(False), Status(True)]


def test_a_negative_duration_is_none() -> None:
    assert [span.end - span.start for span in spans(WINDOW, [event(0, -0.001, app="Code")], PrivacyOptions())] == [0]


def test_spans_are_cut_to_a_range() -> None:
    whole = [Span(0, 5, None), Span(5, 20, None), Span(20, 30, None)]
    assert clipped(whole, 10) == [Span(10, 20, None), Span(20, 30, None)]


SECRET = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"


@given(st.sampled_from(sorted(TYPES)), st.text(max_size=20), st.text(max_size=20))
def test_no_span_of_any_type_holds_a_secret_in_any_field(kind: str, before: str, after: str) -> None:
    text = f"{before} {SECRET} {after}"
    data = dict.fromkeys(("app", "title", "file", "project", "language", "status", "presses", "key", "clip"), text)
    data["url"] = f"https://a.example/{SECRET}/x?{SECRET}"
    assert SECRET not in repr(spans(kind, [event(0, 5, **data)], PrivacyOptions()))
