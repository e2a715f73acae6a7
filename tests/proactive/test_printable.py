"""Whatever a file, split, model or server is named or says: no terminal obeys it, and no output holds a key."""

import base64
import csv
import html
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from torch import OutOfMemoryError

from proactive import evaluate, export, inspect
from proactive.tables import Table, show
from proactive.terminal import as_user_error
from tests.chat_server import Body, Reply, chat_server
from tests.helpers import small_root
from tests.patience import HANG
from tests.proactive.conftest import Ended, FinishedRun

HOSTILE = "\x1b]0;owned\x07\x1b[2J [bold red]x[/bold red] :smile:\r\u202e"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J [bold red]x[/bold red] :smile:\\r\\u202e"
KEY = "sk-very/secret+0123456789"


def assert_obeyed_by_no_terminal(ended: Ended) -> None:
    for line in f"{ended.out}{ended.err}".split("\n"):
        assert line.isprintable(), ascii(line)


def write_recorded(folder: Path, splits: dict[str, list[str]]) -> None:
    folder.mkdir()
    event = {"time": "1", "event": f"The user opens {HOSTILE}"}
    step = {"observation": event, "agent_response": [HOSTILE], "task_status": True, "judgement": [True]}
    for name in {name for names in splits.values() for name in names if "gone" not in name}:
        (folder / name).write_text(json.dumps([step, step]))
    (folder / "splits.json").write_text(json.dumps({name: {"files": files} for name, files in splits.items()}))


def test_names_of_splits_and_traces_are_escaped_and_are_never_formulas(call: Callable, tmp_path: Path) -> None:
    trace = f"{HOSTILE}\n.json".replace("/", "")
    names = [HOSTILE, "=HYPERLINK(1)", "two\nlines", "@a", "\t=a"]
    write_recorded(tmp_path / "t", {**{name: [trace] for name in names}, f"left out {HOSTILE}": ["gone.json"]})
    ended = call(evaluate.main, "agent", "--agent.traces=t", "--judge.recorded", f"--output=out {HOSTILE}\n")
    assert (ended.code, ended.err) == (0, "")
    assert_obeyed_by_no_terminal(ended)
    shown = re.sub(r"[│\s]+", "", ended.out)
    for text in (SHOWN, "=HYPERLINK(1)", "two\\nlines", f"left out {SHOWN}", f"out {SHOWN}\\n"):
        assert re.sub(r"\s", "", text) in shown
    (figures,) = tmp_path.rglob("figures.csv")
    with figures.open(newline="") as file:
        found = [row["Category"] for row in csv.DictReader(file)]
    assert found == [HOSTILE, "'=HYPERLINK(1)", "two\nlines", "'@a", "'\t=a"]


def test_names_of_roots_and_outputs_are_escaped(call: Callable, finished_run: FinishedRun, tmp_path: Path) -> None:
    root = small_root(tmp_path / f"root {HOSTILE}\n", scenes=5, rows_per_scene=4)
    ended = call(inspect.main, f"--root={root}")
    assert (ended.code, ended.err) == (0, "")
    assert_obeyed_by_no_terminal(ended)
    assert "owned" in ended.out
    for quiet in ([], ["--quiet"]):
        output = f"--output=export {HOSTILE}\n"
        ended = call(export.main, f"--checkpoint={finished_run.folder}", output, *quiet)
        assert ended.code == 0
        assert_obeyed_by_no_terminal(ended)
        assert f"export {SHOWN}\\n" in ended.out


def test_log_lines_and_tables_are_printable(call: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str]) -> None:
        logging.getLogger("proactive").info(f"read {HOSTILE}\n")
        logging.getLogger("proactive").warning("read %s", HOSTILE)
        table = Table(HOSTILE, HOSTILE)
        table.add_column(HOSTILE)
        table.add_row(HOSTILE)
        show(table)

    ended = call(main)
    assert_obeyed_by_no_terminal(ended)
    assert ended.out.startswith(f"read {SHOWN}\\n\nread {SHOWN}\n")
    assert ended.out.count("[bold red]x[/bold red] :smile:") == 6
    assert isinstance(Table("title").title, Text)


@pytest.mark.parametrize(
    ("error", "hint"),
    [(MemoryError(), "less data"), (OutOfMemoryError("CUDA out of memory"), "data.token_budget")],
)
def test_the_hint_depends_on_whether_memory_of_gpu_or_cpu_is_full(error: Exception, hint: str) -> None:
    mistake = as_user_error(error)
    assert mistake is not None
    assert hint in mistake.hint
    assert ("token_budget" in mistake.hint) == isinstance(error, OutOfMemoryError)


WAYS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": lambda key: "".join(f"\\u{ord(character):04x}" for character in key),
    "JSON in JSON": lambda key: "".join(f"\\\\u{ord(character):04X}" for character in key),
    "slashes": lambda key: key.replace("/", "\\/"),
    "HTML": lambda key: "".join(f"&#{ord(character)};" for character in key),
    "base64": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "hexadecimal": lambda key: key.encode().hex(),
}


def readings(content: str) -> list[str]:
    """A text, and what it says to who unpacks it, again and again."""
    found = [content]
    for unpack in (html.unescape, lambda text: text.replace("\\/", "/"), unescaped, unescaped, html.unescape):
        found.append(unpack(found[-1]))
    return found


def unescaped(text: str) -> str:
    return re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)


@pytest.mark.parametrize("way", WAYS)
def test_a_key_that_a_server_returns_is_in_no_file(
    way: str, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    write_recorded(tmp_path / "t", {"all": ["a.json"]})
    (tmp_path / "r" / "reward_data").mkdir(parents=True)
    (tmp_path / "r" / "test_data").mkdir()
    event = {"time": "1", "event": "The user opens a file."}
    step = {"observation": event, "agent_response": {"candidate_task": []}, "task_status": True}
    (tmp_path / "r" / "test_data" / "a.json").write_text(json.dumps([step, step]))
    row = {"obs": [event], "pred_task": None, "valid": True}
    (tmp_path / "r" / "reward_data" / "train_data.jsonl").write_text(json.dumps(row))
    written = WAYS[way](KEY)

    def answer(body: Body, before: int) -> Reply:
        if body["model"] == "agent":
            content = f'{{"proposal": "Use {written}", "thoughts": "{written}", "purpose": "{written}"}}'
        else:
            content = f'{{"thought": "{written}", "judgment": "accepted"}}'
        first = json.dumps(body["messages"]).count("opens a file") == 1
        return Reply(content, "stop" if first else f"stopped {written}")

    ways: Any = [f"--endpoint.timeout={HANG}", "--endpoint.retries=0", "--data.root=r", "--output=out"]
    with chat_server(answer) as chat:
        for who in ("agent", "judge"):
            ways += [f"--{who}.url={chat.url}", f"--{who}.model={who}", f"--{who}.key_variable=MY_KEY"]
        ended = call(evaluate.main, "agent", *ways)
    assert (ended.code, ended.err) == (0, "")
    assert chat.keys.count(f"Bearer {KEY}") == len(chat.keys) > 1
    left = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.html", "metrics.json", "answers.jsonl", "verdicts.jsonl", "a.json", "figures.csv"} <= set(left)
    assert "[key]" in left["a.json"]
    for content in (*left.values(), ended.out):
        assert not any(KEY in reading or written in reading for reading in readings(content))
