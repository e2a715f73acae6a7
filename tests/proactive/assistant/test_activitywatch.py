"""A scripted session at a real ActivityWatch server: live, with restarts, and replayed from its export."""

import asyncio
import json
import re
import socket
from pathlib import Path

import pytest

from datamodules.errors import UserError
from models.judging.agents import AlwaysPropose
from proactive.assistant.activitywatch import ActivityWatchSource, ExportSource
from proactive.assistant.assistant import Assistant, SessionParts
from proactive.assistant.clock import ReplayClock
from proactive.assistant.deciding import Decision, Policy
from proactive.assistant.notices import RecordedNotices
from proactive.assistant.observations import Cursor, Gap, Happened, Observation, Presence, Source
from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.session_log import SESSION_FILE, EventEntry, PresenceEntry, ReplyEntry, read_session
from tests.proactive.assistant.activitywatch_server import (
    ActivityWatchServer,
    Over,
    Script,
    Watchers,
    answering,
    recorded_requests,
)

BEGIN = 1_750_000_000.0
SECRETS = {
    "key": "sk-proj-4Fz8Qw2Lk9Xp7Rt3",
    "query": "Zb7QmR4tYx",
    "user": "ada:hunter2",
    "mail": "ada.lovelace@example.org",
    "card": "4111 1111 1111 1111",
    "private page": "Ring for Bob",
    "vault": "Bank of Ada",
}


def play(watchers: Watchers, script: Script) -> None:
    """Schedule the session: eleven minutes of work."""

    def during(bucket: str, start: float, end: float, delay: float = 0.0, **data: object) -> None:
        watchers.during(bucket, BEGIN + start, BEGIN + end, delay, **data)

    during("presence", 0, 170, status="not-afk")
    during("windows", 0, 40, app="Code", title="parser.py - shop")
    during("code", 5, 35, delay=4, file="/home/ada/shop/parser.py", project="/home/ada/shop", language="python")
    during("windows", 40, 41.9, app="Slack", title="general")
    during("windows", 42, 70, app="Code", title="test_parser.py - shop")
    during("windows", 70, 110, app="firefox", title="re - Python documentation - Mozilla Firefox")
    url = f"https://{SECRETS['user']}@docs.python.org/3/library/re.html?key={SECRETS['query']}#{SECRETS['query']}"
    during("tabs", 70, 109, delay=3, url=url, title="re - Python documentation", incognito=False)
    during("windows", 110, 130, app="firefox", title=f"{SECRETS['private page']} - Mozilla Firefox")
    during("tabs", 110, 130, url="https://rings.example.com", title=SECRETS["private page"], incognito=True)
    during("windows", 130, 150, app="KeePassXC", title=SECRETS["vault"])
    during("windows", 150, 500, app="Terminal", title=f"export API_KEY={SECRETS['key']}")
    for moment in range(350, 500, 5):  # the watcher notices late, and then tells the whole time
        script.at(
            BEGIN + moment,
            lambda moment=moment: watchers.server.heartbeat(
                "presence", BEGIN + 170.001, {"status": "afk"}, 185.0, moment - 170.0
            ),
        )
    during("presence", 500, 700, status="not-afk")
    during("windows", 500, 530, app="Mail", title=f"To {SECRETS['mail']}: my card {SECRETS['card']}")
    during("windows", 530, 600, app="Writer", title="Invoice.odt")
    during("windows", 600, 700, app="Calendar", title="")


@pytest.fixture(autouse=True)
def fewer_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proactive.assistant.activitywatch.POLL_INTERVAL", 7.0)


async def watched(source: Source, cursor: Cursor | None = None) -> list[Observation]:
    """Everything until the script is over, or the source ends."""
    found: list[Observation] = []
    observations = source.observations(cursor)
    try:
        async for one in observations:
            found.append(one)
    except Over:
        pass
    finally:
        await observations.aclose()
    return found


def sentences(found: list[Observation]) -> list[tuple[float, str]]:
    return [(round(one.at - BEGIN, 3), one.event.event) for one in found if isinstance(one, Happened)]


SENTENCES = [
    (63.0, "The user works in 'Code' with 'parser.py - shop' and 'test_parser.py - shop'."),
    (65.0, "The user works on the file 'parser.py' in the project 'shop'."),
    (133.0, "The user reads 're - Python documentation' in 'firefox' at docs.python.org/3/library/re.html."),
    (213.0, "The user works in 'Terminal' with 'export [secret]'."),
    (500.0, "The user returns after 5 minutes."),
    (533.0, "The user works in 'Mail' with 'To [e-mail address]: my card [card number]'."),
    (593.0, "The user works in 'Writer' with 'Invoice.odt'."),
    (663.0, "The user works in 'Calendar'."),
]


def test_a_session_with_restarts_is_reported_once_and_as_its_export_without_secrets(
    activitywatch: ActivityWatchServer, tmp_path: Path
) -> None:
    script = Script(BEGIN)
    play(Watchers(activitywatch, script), script)
    found: list[Observation] = []
    for end in (100.0, 360.0, 510.0):  # the assistant ends there, and starts again
        script.end = BEGIN + end
        cursor = json.loads(json.dumps(found[-1].cursor)) if found else None
        found += asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions()), cursor))
    script.at(BEGIN + 520, activitywatch.stop)
    script.at(BEGIN + 620, activitywatch.start)
    script.end = BEGIN + 800
    found += asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions()), found[-1].cursor))
    assert sentences(found) == SENTENCES
    assert [(one.away, round(one.at - BEGIN)) for one in found if isinstance(one, Presence)] == [
        (True, 350),
        (False, 500),
    ]
    assert not [one for one in found if isinstance(one, Gap)]  # the watchers kept what happened in the meantime

    export = activitywatch.export(tmp_path / "export.json")
    assert all(secret in export.read_text(encoding="utf-8") for secret in SECRETS.values())
    replayed = asyncio.run(watched(ExportSource(export, ReplayClock(), PrivacyOptions())))
    assert [(type(one), one.at) for one in replayed] == [(type(one), one.at) for one in found]
    assert sentences(replayed) == SENTENCES
    for number, one in enumerate(replayed, 1):
        after = asyncio.run(watched(ExportSource(export, ReplayClock(), PrivacyOptions()), one.cursor))
        assert sentences(after) == sentences(replayed[number:])
    seen = repr(found) + repr(replayed) + activitywatch.log()
    assert not [secret for secret in SECRETS.values() if secret in seen]


def test_a_live_session_that_is_killed_logs_each_sentence_once_and_no_secret(
    activitywatch: ActivityWatchServer, tmp_path: Path
) -> None:
    script = Script(BEGIN)
    play(Watchers(activitywatch, script), script)
    path = tmp_path / SESSION_FILE
    for end in (100.0, 360.0, 510.0, 800.0):  # the assistant is killed there, in the middle of a line
        script.end = BEGIN + end
        source = ActivityWatchSource(activitywatch.url, script, PrivacyOptions())
        parts = SessionParts(source, script, AlwaysPropose(), RecordedNotices({}), Policy(pause=0, per_hour=99))
        with pytest.raises(Over):
            asyncio.run(Assistant(parts).run(path, source.describe()))
        with path.open("ab") as file:
            file.write(b'{"kind": "event", "num')
    entries = list(read_session(tmp_path)[1])
    events = [one for one in entries if isinstance(one, EventEntry)]
    assert [(round(one.at - BEGIN, 3), one.event.event) for one in events] == SENTENCES
    assert [one.away for one in entries if isinstance(one, PresenceEntry)] == [True, False]
    shown = [one.number for one in events if one.decision == Decision.SHOWN]
    assert shown == [one.number for one in entries if isinstance(one, ReplyEntry)]
    assert not [secret for secret in SECRETS.values() if secret in path.read_text(encoding="utf-8")]


def test_requests_only_read_and_only_buckets_of_known_types(activitywatch: ActivityWatchServer) -> None:
    script = Script(BEGIN)
    play(Watchers(activitywatch, script), script)
    for bucket, kind in (("keys", "os.hid.input"), ("clips", "clipboard"), ("meetings", "app.meeting")):
        activitywatch.create(bucket, kind)
    script.end = BEGIN + 200
    with recorded_requests(activitywatch) as (url, requests):
        found = asyncio.run(watched(ActivityWatchSource(url, script, PrivacyOptions())))
    assert sentences(found) == SENTENCES[:3]
    asked = [re.match(r"GET /api/0/buckets/((\w+)/events\?start=[\dTZ:.%A-F-]+)? HTTP/1.1\n", one) for one in requests]
    assert {one and one[2] for one in asked} == {None, "windows", "presence", "tabs", "code"}
    assert not [secret for secret in SECRETS.values() if secret in "".join(requests)]


def test_what_began_before_the_first_start_is_cut_and_what_ended_before_is_left_out(
    activitywatch: ActivityWatchServer,
) -> None:
    script = Script(BEGIN)
    watchers = Watchers(activitywatch, script)
    watchers.during("windows", BEGIN, BEGIN + 100, app="Mail", title="Inbox")
    watchers.during("windows", BEGIN + 100, BEGIN + 200, app="Code", title="a.py")
    script.end = BEGIN + 150
    asyncio.run(script.reach(BEGIN + 150))
    script.end = BEGIN + 230
    found = asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions())))
    assert sentences(found) == [(213.0, "The user works in 'Code' with 'a.py'.")]


def test_a_time_in_which_nothing_was_recorded_is_a_gap_in_its_place(activitywatch: ActivityWatchServer) -> None:
    script = Script(BEGIN)
    watchers = Watchers(activitywatch, script)
    watchers.during("windows", BEGIN, BEGIN + 100, app="Mail", title="Inbox")
    watchers.during("windows", BEGIN + 400, BEGIN + 500, app="Code", title="a.py")
    script.at(BEGIN + 110, activitywatch.stop)
    script.at(BEGIN + 390, activitywatch.start)
    script.end = BEGIN + 600
    found = asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions())))
    assert sentences(found) == [
        (63.0, "The user works in 'Mail' with 'Inbox'."),
        (463.0, "The user works in 'Code' with 'a.py'."),
    ]
    [gap] = [one for one in found if isinstance(one, Gap)]
    assert found.index(gap) == 1
    assert BEGIN + 95 <= gap.since <= BEGIN + 110
    assert gap.at == BEGIN + 400


def test_a_long_time_without_the_assistant_is_a_gap(activitywatch: ActivityWatchServer) -> None:
    script = Script(BEGIN)
    watchers = Watchers(activitywatch, script)
    watchers.during("windows", BEGIN, BEGIN + 70, app="Mail", title="Inbox")
    script.end = BEGIN + 90
    first = asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions())))
    script.time = BEGIN + 20_000
    watchers.during("windows", BEGIN + 19_000, BEGIN + 19_010, app="Code", title="a.py")
    script.end = BEGIN + 20_010
    source = ActivityWatchSource(activitywatch.url, script, PrivacyOptions())
    second = asyncio.run(watched(source, first[-1].cursor))
    assert [type(one) for one in second] == [Gap, Happened]
    assert (second[0].since - BEGIN, second[0].at - BEGIN) == (63.0, 16_400.0)
    assert sentences(second) == [(19_043.0, "The user works in 'Code' with 'a.py'.")]


def test_late_heartbeats_that_overwrite_others_are_reported_once_and_too_late_ones_are_noted(
    activitywatch: ActivityWatchServer, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script(BEGIN)
    watchers = Watchers(activitywatch, script)
    watchers.during("windows", BEGIN, BEGIN + 10, app="Mail", title="Inbox")
    watchers.during("windows", BEGIN + 20, BEGIN + 25, app="Code", title="a.py")
    watchers.during("windows", BEGIN + 12, BEGIN + 18, delay=14, app="Files", title="Home")
    watchers.during("windows", BEGIN + 30, BEGIN + 100, app="Writer", title="Letter")
    watchers.during("windows", BEGIN + 5, BEGIN + 9, delay=100, app="Late", title="Late")
    script.end = BEGIN + 200
    found = asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions())))
    # The server itself puts the late Files in the place of its newest event, so Code and the first seconds of Writer
    # are gone, and Files is there twice.
    assert [sentence for _, sentence in sentences(found)] == [
        "The user works in 'Mail' with 'Inbox'.",
        "The user works in 'Files' with 'Home'.",
        "The user works in 'Writer' with 'Letter'.",
    ]
    assert caplog.text.count("windows: 1 event came too late") == 1


@pytest.mark.parametrize(
    "url",
    [
        "localhost:5600",
        "ftp://localhost",
        "http://",
        "http://ada:pw@localhost:5600",
        "http://localhost:5600?key=x",
        "http://localhost:99999",
    ],
)
def test_an_address_that_is_not_a_plain_one_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="the source's address"):
        ActivityWatchSource(url, Script(BEGIN), PrivacyOptions())


def test_a_server_that_is_not_there_at_the_first_start_is_an_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        source = ActivityWatchSource(f"http://127.0.0.1:{closed.getsockname()[1]}", Script(BEGIN), PrivacyOptions())
        with pytest.raises(UserError, match="ConnectError"):
            asyncio.run(watched(source))


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, b"{}", "it answers 404"),
        (302, b"", "it answers 302"),
        (200, b"Ring for Bob", "not ActivityWatch's: Invalid JSON"),
        (200, b'{"a": {"type": 1, "title": "Ring for Bob"}}', "not ActivityWatch's, field a.type"),
        (200, b" " * 2_001, "longer than 2,000 bytes"),
    ],
)
def test_a_server_that_is_another_is_an_error_without_its_text(
    status: int, body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proactive.assistant.activitywatch_client.MAX_TEXT_BYTES", 2_000)
    with answering(lambda _: (status, body)) as url:
        source = ActivityWatchSource(url, Script(BEGIN), PrivacyOptions())
        with pytest.raises(UserError, match=reason) as refused:
            asyncio.run(watched(source))
    assert "Bob" not in str(refused.value)


def test_types_without_a_bucket_are_a_notice(
    activitywatch: ActivityWatchServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "proactive")
    activitywatch.create("only windows", "currentwindow")
    activitywatch.create("input", "os.hid.input")
    script = Script(BEGIN)
    script.end = BEGIN + 50
    asyncio.run(watched(ActivityWatchSource(activitywatch.url, script, PrivacyOptions())))
    missing = re.findall(r"has no bucket of type ([\w.]+)", caplog.text)
    assert missing == ["app.editor.activity", "afkstatus", "web.tab.current"], "each once"


def test_an_export_with_input_only_tells_presence(tmp_path: Path) -> None:
    moments = {0: 3, 30: 1, 31: 0, 600: 5}  # seconds, and how many keys were pressed then
    events = [
        {"timestamp": f"2025-06-15T15:{at // 60:02}:{at % 60:02}Z", "duration": 1, "data": {"presses": presses}}
        for at, presses in moments.items()
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps({"buckets": {"keys": {"type": "os.hid.input", "events": events}}}), encoding="utf-8")
    found = asyncio.run(watched(ExportSource(path, ReplayClock(), PrivacyOptions())))
    assert [one.away for one in found if isinstance(one, Presence)] == [True, False]
    assert [sentence for _, sentence in sentences(found)] == ["The user returns after 9 minutes."]


@pytest.mark.parametrize("cursor", [{}, {"next": 3}, {"since": 0.0, "at": 0.0, "buckets": {"windows": {"start": "x"}}}])
def test_a_cursor_of_another_source_is_refused(cursor: Cursor) -> None:
    with pytest.raises(UserError, match="cursor"):
        asyncio.run(watched(ActivityWatchSource("http://localhost:1", Script(BEGIN), PrivacyOptions()), cursor))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no", "expected"),
        ('{"buckets": {"a": {"type": "currentwindow", "events": [{"timestamp": "Ring for Bob"}]}}}', "timestamp"),
        (
            '{"buckets": {"a": {"type": "currentwindow", "events": [{"timestamp": "2024-01-01T00:00:00", '
            '"duration": 1, "data": {"title": "Ring for Bob"}}]}}}',
            "timezone",
        ),
        ('{"buckets": {"a": {"type": "stopwatch", "events": []}}}', "no bucket of a known type"),
    ],
)
def test_a_file_that_is_no_export_is_refused_without_showing_its_text(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "export.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"export.json.*{reason}") as refused:
        ExportSource(path, ReplayClock(), PrivacyOptions())
    assert "Bob" not in str(refused.value)
