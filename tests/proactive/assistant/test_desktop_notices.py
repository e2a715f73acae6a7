"""Notifications on a real desktop: dunst on a virtual display with a session bus of its own."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from datamodules.errors import UserError
from proactive.assistant.assistant import SessionParts
from proactive.assistant.clock import SystemClock
from proactive.assistant.deciding import Policy
from tests.patience import HANG
from tests.proactive.assistant.sessions import ListSource, happened, proposing, replies, run

pytest.importorskip("desktop_notifier", reason="the extra live shows notifications: pip install desktop-notifier")
from proactive.assistant.desktop_notices import DesktopNotices

NEEDED = ("Xvfb", "dunst", "dunstctl", "dbus-daemon", "xdotool")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
CONFIG = """
[global]
    geometry = "400x200+0+0"
    origin = top-left
    offset = 0x0
    mouse_left_click = close_current
    mouse_middle_click = do_action, close_current
    dmenu = {chooser}
"""


@dataclass
class Desktop:
    """A display with notifications."""

    def count(self) -> int:
        return int(subprocess.run(["dunstctl", "count", "displayed"], capture_output=True, check=True).stdout)

    def click(self, button: int) -> None:
        """Clicks until the notification is gone. A click can come before it is drawn."""
        end = time.monotonic() + HANG
        while self.count():
            assert time.monotonic() < end, "the notification stays"
            subprocess.run(["xdotool", "mousemove", "40", "20", "click", str(button)], check=True)
            repeat = time.monotonic() + 5.0
            while self.count() and time.monotonic() < repeat:
                time.sleep(0.02)


def _wait(until: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANG
    while not until():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desktop]:
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; apt-get install xvfb dunst dbus xdotool")
    chooser = tmp_path / "chooser"  # what dunst asks for one of the actions
    chooser.write_text("#!/bin/sh\ngrep Reject\n")
    chooser.chmod(0o755)
    config = tmp_path / "dunstrc"
    config.write_text(CONFIG.format(chooser=chooser))
    with contextlib.ExitStack() as stack:

        def started(*command: str, **options: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        read, write = os.pipe()
        started("Xvfb", "-displayfd", str(write), "-screen", "0", "800x600x24", pass_fds=(write,))
        os.close(write)
        with os.fdopen(read) as display:
            monkeypatch.setenv("DISPLAY", f":{display.readline().strip()}")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        bus = started("dbus-daemon", "--session", "--nofork", "--print-address", stdout=subprocess.PIPE)
        assert bus.stdout is not None
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", bus.stdout.readline().strip())
        started("dunst", "-conf", str(config), stdout=subprocess.DEVNULL)
        found = Desktop()
        _wait(
            lambda: subprocess.run(["dunstctl", "count"], capture_output=True).returncode == 0, "dunst has not started"
        )
        yield found


def session(folder: Path, act: Callable[[], None], expires: float = HANG) -> list[tuple[int, str]]:
    """A session with one offer; `act` is what the user does once it is shown. Returns how the offer ended."""

    async def user() -> None:
        await asyncio.to_thread(act)

    source = ListSource([happened(1), user], SystemClock())
    policy = Policy(pause=0, per_hour=9, expires=expires)
    return replies(
        run(folder, SessionParts(source, SystemClock(), proposing("Sum up <b>it</b>."), DesktopNotices(), policy))
    )


@pytest.mark.parametrize(
    ("does", "reply"), [("middle click", "accepted"), ("left click", "rejected"), ("button Reject", "rejected")]
)
def test_a_notification_is_clicked_or_closed(does: str, reply: str, desktop: Desktop, tmp_path: Path) -> None:
    def act() -> None:
        _wait(lambda: desktop.count() == 1, "the notification is not shown")
        if does == "button Reject":
            subprocess.run(["dunstctl", "context"], check=True)
        else:
            desktop.click({"left click": 1, "middle click": 2}[does])

    assert session(tmp_path / "mine", act) == [(1, reply)]


def test_a_click_counts_before_the_session_knows_that_the_notification_is_shown(
    desktop: Desktop, tmp_path: Path
) -> None:
    async def busy_user() -> None:
        """Blocks the event loop, with breaks in which it can send, until the notification was shown and clicked."""
        end = time.monotonic() + HANG
        while desktop.count() == 0:
            assert time.monotonic() < end, "the notification is not shown"
            await asyncio.sleep(0)
            time.sleep(0.3)
        desktop.click(2)

    policy = Policy(pause=0, per_hour=9, expires=HANG)
    source = ListSource([happened(1), busy_user], SystemClock())
    parts = SessionParts(source, SystemClock(), proposing("Sum up <b>it</b>."), DesktopNotices(), policy)
    assert replies(run(tmp_path / "mine", parts)) == [(1, "accepted")]


def test_a_notification_that_expires_is_ignored_and_removed(desktop: Desktop, tmp_path: Path) -> None:
    def act() -> None:
        _wait(lambda: desktop.count() == 1, "the notification is not shown")

    assert session(tmp_path / "mine", act, expires=2.0) == [(1, "ignored")]
    _wait(lambda: desktop.count() == 0, "the notification stays")


def test_a_notification_is_withdrawn_with_its_session(desktop: Desktop, tmp_path: Path) -> None:
    def act() -> None:
        _wait(lambda: desktop.count() == 1, "the notification is not shown")
        raise UserError("the source is gone", "Start it.")

    with pytest.raises(UserError, match="the source is gone"):
        session(tmp_path / "mine", act)
    _wait(lambda: desktop.count() == 0, "the notification stays")


def test_without_a_notification_server_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="--notify desktop: no notifications can be shown"):
        session(tmp_path / "mine", lambda: None)
