"""The examples of the inspect command: whole rows, with exactly their learned tokens marked, and nothing unescaped."""

import contextlib
import csv
import json
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.corpus.answers import Answer, write_answer
from datamodules.corpus.sources import load_corpus
from datamodules.prompting.segments import plain_text
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, render
from proactive import inspect

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e⟦fake⟧"
SMALL = ["--folds=3"]


def rows_of(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The title, the whole text and the marked text of each example."""
    for row in found["examples"]["rows"]:
        texts = [part["text"] for part in row["parts"]]
        marked = [part["text"] for part in row["parts"] if part["marked"]]
        assert marked
        yield row["title"], "".join(texts), "".join(marked)


def inspected(call: Callable, *arguments: str | Path) -> dict[str, Any]:
    ended = call(inspect.main, *SMALL, "--json", *arguments)
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)


def test_a_reward_example_is_the_whole_row_with_its_last_token_marked(root: Path, call: Callable) -> None:
    template = RewardTemplate.read(DEFAULT_PROMPT)
    texts = {"<bos>" + "".join(map(plain_text, render(template, row))) for row in load_corpus(str(root)).rows}
    examples = list(rows_of(inspected(call, "--root", root, "--examples=4")))
    assert {title.partition(",")[0] for title, _, _ in examples} == {
        "missed need",
        "non response",
        "correct detection",
        "false alarm",
    }
    for _, whole, marked in examples:
        assert whole in texts
        assert marked == "\n"


def test_an_agents_examples_mark_its_answers(root: Path, call: Callable) -> None:
    data = AgentDataModule(root=str(root), folds=3)
    data.setup("fit")
    trained = {data.tokenizer.decode([int(token) for token in row]) for row in data.encoded["train"].input_ids}
    answers = {write_answer(Answer(proposal=row.proposal)) + "<eos>" for row in data.split.train if row.accepted}
    examples = list(rows_of(inspected(call, "--root", root, "--task=agent")))
    assert {title.partition(",")[0] for title, _, _ in examples} == {"offer", "silence"}
    for _, whole, marked in examples:
        assert whole in trained
        assert whole.endswith(marked)
        assert marked in answers


def test_conversations_are_converted_and_their_answers_marked(call: Callable, root: Path, tmp_path: Path) -> None:
    turns = [("user", "It fails."), ("assistant", "Shall\nI look?"), ("user", "Yes."), ("assistant", "Done.")]
    told = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "told.jsonl").write_text(json.dumps(told) + "\n")
    options = ["--task=agent", "--conversations=[told.jsonl]", "--annotated=false"]
    found = inspected(call, "--root", root, *options)
    [(title, whole, marked)] = rows_of(found)
    assert title == "conversation, row 0"
    assert whole == "<bos>user: It fails.\nassistant: Shall\\nI look?<eos>\nuser: Yes.\nassistant: Done.<eos>"
    assert marked == "Shall\\nI look?<eos>Done.<eos>"
    assert found["examples"]["notes"] == [
        "data.conversations: 1 conversations converted from OpenAI; 4 of 4 turns kept"
    ]
    shown = call(inspect.main, *SMALL, "--root", root, *options).out
    assert "assistant: ⟦Shall\\nI look?<eos>⟧\nuser: Yes.\nassistant: ⟦Done.<eos>⟧\n" in shown
    assert "4 of 4 turns kept" in shown


def test_preferences_are_shown_in_pairs(call: Callable, root: Path, tmp_path: Path) -> None:
    event = {"time": "1", "event": "A session of its own."}
    line = {"history": [event], "chosen": "Help.", "rejected": None}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    options = ["--task=preference", "--preferences=[p.jsonl]", "--annotated=false"]
    examples = list(rows_of(inspected(call, "--root", root, *options)))
    assert [(title, marked) for title, _, marked in examples] == [
        ("pair 0, accepted", write_answer(Answer(proposal="Help.")) + "<eos>"),
        ("pair 0, rejected", write_answer(Answer(proposal=None)) + "<eos>"),
    ]
    assert len({whole.removesuffix(marked) for _, whole, marked in examples}) == 1


def table(path: Path, event: str = "opens a file", rows: int = 3) -> list[str]:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["events", "offer", "accepted"])
        writer.writerows([json.dumps([event]), f"Offer {number}.", number % 2] for number in range(rows))
    return ["--root", str(path), '--columns={"history": "events", "proposal": "offer"}']


def test_data_that_cannot_be_divided_are_shown_with_the_reason(call: Callable, tmp_path: Path) -> None:
    options = table(tmp_path / "rows.csv")
    found = inspected(call, *options)
    assert len(list(rows_of(found))) == 3
    assert found["examples"]["notes"] == ["no split: data.folds: 3 folds of 1 scenes"]
    assert found["read"][1].startswith("1 scenes (rows whose histories begin with the same event are one scene)")
    shown = call(inspect.main, *SMALL, *options).out
    assert "1 scenes (rows whose" in shown
    assert "no split: data.folds: 3 folds of 1 scenes" in shown


def in_a_terminal(arguments: list[str], patch: pytest.MonkeyPatch, **environment: str) -> str:
    """What the command prints into a terminal."""
    leader, follower = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while chunk := os.read(leader, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with patch.context() as changed, os.fdopen(follower, "w") as terminal:
        changed.setattr(sys, "stdout", terminal)
        for name, value in {"TERM": "xterm-256color", **environment}.items():
            changed.setenv(name, value)
        inspect.main(arguments)
    reader.join()
    os.close(leader)
    return b"".join(chunks).decode()


def test_control_characters_never_reach_the_terminal(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": ESCAPES}, {"role": "assistant", "content": f"{ESCAPES} yes"}]
    (tmp_path / "told.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    options = [*table(tmp_path / "rows.csv", ESCAPES), "--task=agent", "--conversations=[told.jsonl]"]
    plain = call(inspect.main, *SMALL, *options).out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", plain)
    assert "\\u27e6fake\\u27e7 yes<eos>⟧" in plain
    assert plain.count("⟦") == plain.count("⟧") > 1
    coloured = in_a_terminal([*SMALL, *options], monkeypatch)
    own = re.sub(r"\x1b\[[\d;]*m", "", coloured)  # without the colours
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", own)
    assert re.search(r"\x1b\[1;32m[^\x1b]*⟦fake⟧ yes<eos>\x1b\[0m", coloured)
    assert "⟦ ⟧" not in own
    without = in_a_terminal([*SMALL, *options], monkeypatch, NO_COLOR="1")
    assert "⟦ ⟧" in without


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--conversations=[told.jsonl]"], "conversations: task reward does not learn from them"),
        (["--task=agent", "--preferences=[p.jsonl]"], "preferences: task agent does not learn from them"),
        (["--task=agent", "--conversations=[gone.jsonl]"], "gone.jsonl: No such file"),
        (["--task=agent", "--annotated=false"], "data.annotated: false leaves no training data"),
        (["--prompt=gone.yaml"], "gone.yaml: No such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], named: str, root: Path, call: Callable) -> None:
    ended = call(inspect.main, *SMALL, "--root", root, *options)
    assert ended.code == 2
    assert named in ended.err.splitlines()[0]


def test_no_examples_on_request(root: Path, call: Callable) -> None:
    assert inspected(call, "--root", root, "--examples=0")["examples"] is None
    assert "Examples" not in call(inspect.main, *SMALL, "--root", root, "--examples=0").out
