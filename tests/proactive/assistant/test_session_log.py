"""Reading sessions: incomplete and foreign lines, and the numbers of a session."""

import json
from pathlib import Path

import pytest

from datamodules.errors import UserError
from proactive.assistant.session_log import SESSION_FILE, read_session
from proactive.assistant.session_summary import summary
from tests.proactive.assistant.sessions import decisions, replay


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    replay(tmp_path, ["x", None, "y"], {(1, "x"): True, (3, "y"): False})
    path = tmp_path / SESSION_FILE
    content = path.read_bytes()
    whole = len(content.splitlines())
    for cut in range(content.rfind(b"\n", 0, -1) + 1, len(content)):
        path.write_bytes(content[:cut])
        assert len(list(read_session(tmp_path)[1])) == whole - 2
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"session.jsonl is not the log of a live session"):
        read_session(tmp_path)


@pytest.mark.parametrize("line", ["{}", '{"kind": "reply"}', "[]", '{"kind": "other", "number": 1}'])
def test_a_line_that_is_no_entry_is_named(line: str, tmp_path: Path) -> None:
    replay(tmp_path, [None])
    with (tmp_path / SESSION_FILE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"session.jsonl, line 3: is not an entry of a live session"):
        list(read_session(tmp_path)[1])


def test_another_file_is_no_session(tmp_path: Path) -> None:
    for first in ("[]", '{"settings": 3}', '{"kind": "event"}'):
        (tmp_path / SESSION_FILE).write_text(f"{first}\n")
        with pytest.raises(UserError, match=r"is not the log of a live session"):
            read_session(tmp_path)


def test_a_session_is_counted_with_its_milliseconds(tmp_path: Path) -> None:
    entries = replay(tmp_path, ["x", None, "y", "x"], {(1, "x"): True, (3, "y"): False})
    assert decisions(entries) == ["shown", "silent", "shown", "repeated"]
    path = tmp_path / SESSION_FILE
    written = [json.loads(line) for line in path.read_text().splitlines()]
    events = [one for one in written if one.get("kind") == "event"]
    for number, one in enumerate(events, 1):
        one["agent_seconds"] = 0.1 * number
        shown = one["decision"] == "shown"
        one |= {"gate_seconds": 0.05, "probability": 0.5} if shown else {"gate_seconds": None}
    path.write_text("".join(json.dumps(one) + "\n" for one in written))
    found = summary(tmp_path)
    assert found["events"] == {"shown": 2, "silent": 1, "repeated": 1}
    assert found["replies"] == {"accepted": 1, "rejected": 1}
    assert found["milliseconds"]["agent"]["p50"] == pytest.approx(250)
    assert found["milliseconds"]["gate"] == pytest.approx({"p50": 50, "p95": 50})
    assert found["milliseconds"]["both"] == pytest.approx({"p50": 275, "p95": 392.5})
