"""`proactive.live` at a real ActivityWatch server: processes that are killed and go on, and secrets that stay there."""

import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proactive import live
from proactive.assistant.session_log import SESSION_FILE
from tests.chat_server import Body, Reply, chat_server
from tests.helpers import environment_of_commands
from tests.patience import HANG
from tests.proactive.assistant.activitywatch_server import ActivityWatchServer, recorded_requests
from tests.proactive.conftest import Ended

SECRETS = ("sk-proj-4Fz8Qw2Lk9Xp7Rt3", "Zb7QmR4tYx", "ada@example.org", "Ring for Bob", "Bank of Ada")
KEY, TOKEN, MAIL, PRIVATE, VAULT = SECRETS
WINDOWS = (  # each is in front for `SECONDS`
    ("Code", "parser.py - shop"),
    ("Terminal", f"export API_KEY={KEY} # of {MAIL}"),
    ("firefox", "re - Python documentation - Mozilla Firefox"),
    ("KeePassXC", VAULT),
    ("firefox", f"{PRIVATE} - Mozilla Firefox"),
    ("Files", ""),
)
SENTENCES = [
    "The user works in 'Code' with 'parser.py - shop'.",
    "The user works in 'Terminal' with 'export [secret] # of [e-mail address]'.",
    "The user reads 're - Python documentation' in 'firefox' at docs.python.org/3/library/re.html.",
]
SECONDS = 3.1
PROPOSAL = json.dumps({"purpose": "p", "proposal": "Write a test.", "response": "a draft"})


def play(server: ActivityWatchServer, begin: float) -> None:
    """Send the whole session at once; its moments are about now."""
    for bucket, kind in (("windows", "currentwindow"), ("tabs", "web.tab.current")):
        server.create(bucket, kind)
    for number, (app, title) in enumerate(WINDOWS):
        start = begin + number * SECONDS
        for moment in (start, start + SECONDS - 0.01):
            server.heartbeat("windows", moment, {"app": app, "title": title}, pulse=SECONDS)
    page = {"url": f"https://docs.python.org/3/library/re.html?key={TOKEN}", "title": "re - Python documentation"}
    server.heartbeat("tabs", begin + 2 * SECONDS, {**page, "incognito": False}, 60.0, SECONDS - 0.1)
    hidden = {"url": f"https://rings.example.com/?key={TOKEN}", "title": PRIVATE, "incognito": True}
    server.heartbeat("tabs", begin + 4 * SECONDS, hidden, 60.0, SECONDS - 0.1)


def started(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "proactive.live", *options],
        env=environment_of_commands(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + HANG
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.1)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / SESSION_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
    return [entry for entry in entries if entry["kind"] == "event"]


def answer(body: Body, before: int) -> Reply:
    """As the agent, offer something; as the one that rewrites, say the same again."""
    if "Rewrite" in body["messages"][0]["content"]:
        return Reply(json.loads(body["messages"][1]["content"])[-1]["event"])
    return Reply(PROPOSAL)


def test_a_session_is_reported_once_over_restarts_and_its_secrets_reach_no_file_and_no_request(
    activitywatch: ActivityWatchServer, tmp_path: Path
) -> None:
    output = tmp_path / "session"
    with recorded_requests(activitywatch) as (url, requests), chat_server(answer) as chat:
        options = [f"--source={url}", f"--agent.url={chat.url}", "--agent.model=m", f"--output={output}"]
        options += [f"--rewrite.url={chat.url}", "--rewrite.model=m", "--policy.pause=0", "--policy.per_hour=1000"]
        first = started(*options)
        wait_until(lambda: bool(requests), first)
        play(activitywatch, time.time())
        wait_until(lambda: bool(events(output)), first)
        first.kill()
        said = [*first.communicate()]
        activitywatch.stop()
        activitywatch.start()
        second = started(*options)
        wait_until(lambda: len(events(output)) >= len(SENTENCES), second)
        second.send_signal(signal.SIGINT)
        said += [*second.communicate(timeout=HANG)]
    assert [entry["event"]["event"] for entry in events(output)] == SENTENCES
    assert events(output)[0]["decision"] == "shown"
    assert SENTENCES[-1] in said[2]
    for path in output.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    files = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
    seen = "".join([*said, *requests, *chat.asked, *files])
    assert SENTENCES[1] in seen
    assert not [secret for secret in SECRETS if secret in seen]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--source=http://10.1.2.3:5600", "--agent.baseline=never-propose"], "--source: 10.1.2.3 is another machine"),
        (
            ["--source=http://localhost:1", "--rewrite.url=http://10.1.2.3/v1", "--rewrite.model=m"],
            "--rewrite.url: 10.1.2.3 is another machine",
        ),
        (["--rewrite.url=http://localhost:1", "--rewrite.model=m"], "--rewrite.url: the source is a trace"),
        (["--source=http://localhost:1?key=a", "--agent.baseline=never-propose"], "not the plain address"),
        (["--privacy.exclude_apps=[(]", "--agent.baseline=never-propose"], "privacy.exclude_apps"),
    ],
)
def test_contradictions_are_refused(options: list[str], said: str, call: Callable[..., Ended], tmp_path: Path) -> None:
    ended = call(live.main, *options)
    assert (ended.code, said in ended.err) == (2, True), ended.err
    assert list(tmp_path.iterdir()) == []
