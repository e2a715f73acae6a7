"""What is reported of spans, in which order, and that it does not depend on when they are asked for."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from proactive.assistant.span_sequence import BucketCursor, BucketStep, Recording, emit
from proactive.assistant.spans import EDITOR, PRESENCE, TAB, WINDOW, Edited, Span, Status, Tab, Window

KINDS = {"edits": EDITOR, "here": PRESENCE, "web": TAB, "web2": TAB, "windows": WINDOW}
ALWAYS = float("inf")


def window(start: float, end: float, app: str, title: str = "") -> Span:
    return Span(start, end, Window(app, title))


def tab(start: float, end: float, title: str, address: str | None = None, private: bool = False) -> Span:
    return Span(start, end, Tab(title, address, private))


def recording(**spans: list[Span]) -> Recording:
    return Recording({bucket: spans.get(bucket, []) for bucket in KINDS}, KINDS)


def lines(found: Recording, until: float = ALWAYS, cursors: Mapping[str, BucketCursor] | None = None) -> list[tuple]:
    return [(step.at, step.output) for step in emit(found, cursors or {}, until) if step.output is not None]


def test_titles_of_one_application_are_joined_and_short_windows_are_not_seen() -> None:
    found = recording(
        windows=[
            window(100, 110, "Code", "a"),
            window(110, 112, "Mail", "Inbox"),
            window(112, 120, "Code", "b"),
            window(120, 125, "Code", "a"),
            window(125, 140, "Writer"),
        ]
    )
    assert lines(found) == [
        (128.0, "The user works in 'Code' with 'a' and 'b'."),
        (173.0, "The user works in 'Writer'."),
    ]
    assert lines(found, until=127.9) == []


def test_an_application_that_stays_is_reported_after_a_minute_and_then_only_what_is_new() -> None:
    found = recording(windows=[window(100, 700, "Code", "a"), window(700, 800, "Code", "b")])
    assert lines(found) == [
        (163.0, "The user works in 'Code' with 'a'."),
        (763.0, "The user works in 'Code' with 'b'."),
    ]


def test_a_pause_ends_a_sentence() -> None:
    edits = [Span(at, at + 1, Edited("shop", file)) for at, file in ((100, "a.py"), (120, "b.py"), (152, "a.py"))]
    assert lines(recording(edits=edits)) == [
        (151.0, "The user works on the files 'a.py' and 'b.py' in the project 'shop'."),
        (183.0, "The user works on the file 'a.py' in the project 'shop'."),
    ]


def test_a_browser_shows_the_newest_tab_of_its_title_over_all_browsers() -> None:
    found = recording(
        windows=[window(100, 150, "Firefox", "News - Firefox"), window(150, 170, "Firefox", "Maps - Firefox")],
        web=[
            tab(0, 90, "News", "old.example"),
            tab(100, 149, "News", "news.example"),
            tab(150, 160, "Maps", "maps.example"),
        ],
        web2=[tab(160, 165, "Other", "other.example")],
    )
    assert lines(found) == [(163.0, "The user reads 'News' and 'Maps' in 'Firefox', last at maps.example.")]


def test_a_browser_shows_nothing_that_no_open_tab_confirms_and_nothing_private() -> None:
    for tabs in (
        [],
        [tab(0, 10, "News", "news.example")],
        [tab(100, 110, "News", "a.example"), tab(120, 130, "News", private=True)],
    ):
        found = recording(windows=[window(100, 170, "Firefox", "News - Firefox")], web=tabs)
        assert lines(found) == [(163.0, "The user browses the web in 'Firefox'.")]


def test_a_private_title_is_not_reported_of_a_browser_that_is_not_known_as_one() -> None:
    found = recording(
        windows=[window(100, 120, "Unknown", "Rings - Unknown"), window(120, 170, "Unknown", "News - Unknown")],
        web=[tab(100, 119, "Rings", private=True), tab(120, 160, "News", "news.example")],
    )
    assert lines(found) == [(163.0, "The user works in 'Unknown' with 'News - Unknown'.")]


def test_going_away_and_coming_back_are_reported() -> None:
    here = [Span(0, 100, Status(False)), Span(100, 1000, Status(True)), Span(1000, 1010, Status(False))]
    whole = [(280.0, True), (1000, False), (1000, "The user returns after 15 minutes.")]
    assert lines(recording(here=here)) == whole
    assert lines(recording(here=here[:2]), until=279.0) == []
    steps = [step for step in emit(recording(here=here), {}, ALWAYS) if step.output is not None]
    for number, step in enumerate(steps, 1):
        assert lines(recording(here=here), cursors={"here": step.cursor}) == whole[number:]


CONTENTS = {
    "windows": st.sampled_from([Window("Code", "a"), Window("Code", "b"), Window("Firefox", "News - Firefox"), None]),
    "edits": st.sampled_from([Edited("shop", "a.py"), Edited("shop", "b.py"), Edited("", "notes.txt")]),
    "here": st.sampled_from([Status(True), Status(False)]),
    "web": st.sampled_from([Tab("News", "news.example", False), Tab("News", None, True), Tab("Maps", None, False)]),
    "web2": st.just(Tab("News", "second.example", False)),
}


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Buckets as heartbeats fill them: spans one after the other, sometimes with pauses."""
    found = {}
    for bucket, contents in CONTENTS.items():
        spans, at = [], draw(st.floats(1, 100))
        for content in draw(st.lists(contents, max_size=12)):
            end = at + draw(st.sampled_from([0.0, 1.5, 4.0, 25.0, 90.0, 400.0]))
            spans.append(Span(at, end, content))
            at = end + draw(st.sampled_from([0.001, 2.0, 40.0]))
        found[bucket] = spans
    return Recording(found, KINDS)


def known(found: Recording, until: float) -> Recording:
    """What a server has at a time: spans that still go on end at their latest heartbeat."""
    return Recording(
        {
            bucket: [Span(one.start, min(one.end, until), one.content) for one in spans if one.start <= until]
            for bucket, spans in found.spans.items()
        },
        KINDS,
    )


@given(recordings(), st.lists(st.floats(0.1, 300), max_size=30))
def test_a_live_session_reports_what_its_recording_holds_each_once_and_in_order(
    found: Recording, pauses: list[float]
) -> None:
    cursors: dict[str, BucketCursor] = {}
    live: list[BucketStep] = []
    until = 0.0
    for pause in [*pauses, 1e9]:
        until += pause
        for step in list(emit(known(found, until), cursors, until)):
            assert step.at <= until
            cursors[step.bucket] = step.cursor
            live.append(step)
    whole = [step for step in emit(found, {}, ALWAYS) if step.output is not None]
    assert [step for step in live if step.output is not None] == whole
    assert [step.at for step in whole] == sorted(step.at for step in whole)
