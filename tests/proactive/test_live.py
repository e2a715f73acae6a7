"""`proactive.live` as people start it: replays, gates, terminals, kills, and what is refused."""

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import root_traces
from proactive import evaluate, fit, live
from proactive.assistant.session_log import SESSION_FILE
from tests.chat_server import Reply, chat_server
from tests.helpers import ROOT, SMALL_RUN, environment_of_commands
from tests.patience import HANG
from tests.proactive.conftest import Ended, FinishedRun

FREE = ["--policy.pause=0", "--policy.per_hour=1000", "--speed=0"]
Call = Callable[..., Ended]


def entries(folder: Path, kind: str = "event") -> list[dict[str, Any]]:
    lines = (folder / SESSION_FILE).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines[1:]) if entry["kind"] == kind]


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SESSION_FILE).read_text(encoding="utf-8").splitlines()[0])["settings"]


def write_trace(folder: Path, events: int = 8, number: int = 0) -> Path:
    """A recorded trace of embedded events, with another offer after each, and judgments in turn."""
    folder.mkdir(exist_ok=True)
    steps = [
        {
            "observation": event.model_dump(),
            "agent_response": [f"Offer number {place} for {event.event}"],
            "task_status": False,
            "judgement": [place % 2 == 0],
        }
        for place, event in enumerate(root_traces(load_corpus("embedded"))[number].events[:events])
    ]
    path = folder / f"trace_{number}.json"
    path.write_text(json.dumps(steps), encoding="utf-8")
    return path


def test_without_options_it_replays_an_embedded_session_with_the_newest_gate(
    call: Call, finished_run: FinishedRun, tmp_path: Path
) -> None:
    (tmp_path / "runs").symlink_to(finished_run.folder.parents[1])
    ended = call(live.main, "--speed=0", "--output=mine")
    assert (ended.code, ended.err) == (0, "")
    assert "offers: recorded in the trace (embedded); gate: runs/reward/0/" in ended.out.splitlines()[0]
    found = entries(tmp_path / "mine")
    assert len(found) == 8
    for entry in found:
        assert entry["event"]["event"] in ended.out
        assert (entry["proposal"] is None) == (entry["decision"] in ("silent", "cooling down", "hourly budget used"))
    assert "milliseconds: gate" in ended.out
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700


def test_without_a_run_the_default_classifier_is_trained_first(
    call: Call, finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = [*SMALL_RUN, f"--data.root={finished_run.root}", "--trainer.max_steps=1", "--quiet"]
    monkeypatch.setattr(live, "FIT", (*live.FIT, *small))
    ended = call(live.main, "--speed=0", "--quiet", "--cost-ratio=0")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "no run in runs/reward: the default classifier is trained first, as python -m proactive.fit does"
    ]
    assert (tmp_path / "runs" / "reward" / "0").is_dir()
    assert len(entries(tmp_path / "runs" / "live" / "0")) == 8
    monkeypatch.setattr(live, "FIT", (sys.executable, "-c", "raise SystemExit(3)"))
    (tmp_path / "runs").rename(tmp_path / "before")
    ended = call(live.main, "--speed=0")
    assert (ended.code, ended.err.splitlines()[0]) == (2, "error: the default classifier could not be trained")


def test_decisions_equal_those_of_an_evaluation_with_the_same_gate(
    call: Call, finished_run: FinishedRun, tmp_path: Path
) -> None:
    trace = write_trace(tmp_path / "traces")
    gate = str(finished_run.folder)
    judged = [f"--agent.traces={trace.parent}", f"--judge.checkpoint={gate}", "--gate-is-judge", f"--gate={gate}"]

    def evaluated(cost_ratio: float) -> list[dict[str, Any]]:
        assert call(evaluate.main, "agent", *judged, f"--cost-ratio={cost_ratio}", "--output=e", "--quiet").code == 0
        (shown,) = json.loads((tmp_path / "e" / "timeline.json").read_text())["traces"]
        return [step["offers"][0] for step in shown["steps"]]

    probabilities = sorted(offer["gate"] for offer in evaluated(1.0))
    assert probabilities[3] < probabilities[4], "some offers on either side"
    threshold = (probabilities[3] + probabilities[4]) / 2
    for cost_ratio in (threshold / (1 - threshold), 0.0):
        expected = evaluated(cost_ratio)
        output = f"live {cost_ratio}"
        ended = call(
            live.main, f"--source={trace}", f"--agent.traces={trace.parent}", f"--gate={gate}", *FREE,
            f"--cost-ratio={cost_ratio}", f"--output={output}", "--quiet",
        )  # fmt: skip
        assert (ended.code, ended.err) == (0, "")
        found = entries(tmp_path / output)
        assert [one["probability"] for one in found] == pytest.approx([one["gate"] for one in expected], abs=1e-5)
        assert [one["decision"] == "held back" for one in found] == [one["held_back"] for one in expected]
        assert {one["decision"] for one in found} == ({"shown", "held back"} if cost_ratio else {"shown"})
        replies = [(one["number"], one["reply"]) for one in entries(tmp_path / output, "reply")]
        shown = [one["number"] for one in found if one["decision"] == "shown"]
        assert replies == [(number, "accepted" if number % 2 else "rejected") for number in shown]


def test_a_trace_that_the_gate_was_trained_on_is_refused_or_stamped(
    call: Call, finished_run: FinishedRun, tmp_path: Path
) -> None:
    scenes = {}
    for line in (finished_run.root / "reward_data" / "train_data.jsonl").open():
        row = json.loads(line)
        scenes.setdefault(json.dumps(row["obs"][0]), row["obs"])
    refused = []
    for number, events in enumerate(scenes.values()):
        path = tmp_path / f"{number}.json"
        path.write_text(
            json.dumps([{"observation": one, "agent_response": ["x"], "task_status": False} for one in events])
        )
        gate = [f"--source={path}", f"--gate={finished_run.folder}", "--speed=0", "--quiet"]
        ended = call(live.main, *gate, f"--output=o{number}")
        if ended.code == 2:
            assert ended.err.startswith("error: --gate: trained on 1 of the 1 traces to judge")
            assert not (tmp_path / f"o{number}").exists()
            refused.append(gate)
    assert 0 < len(refused) < len(scenes)
    ended = call(live.main, *refused[0][:-1], "--contaminated", "--output=marked")
    assert ended.code == 0
    assert "CONTAMINATED: the gate was trained on this trace" in ended.out
    assert settings(tmp_path / "marked")["stamps"] == {"gate_trained_on": True}


def test_a_shadow_holds_nothing_back(call: Call, finished_run: FinishedRun, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "traces")
    options = [f"--source={trace}", f"--gate={finished_run.folder}", *FREE, "--cost-ratio=1e6"]
    for extra, decision in ([], "held back"), (["--shadow"], "shown"), (["--epsilon=1"], "shown"):
        ended = call(live.main, *options, *extra, f"--output={decision}{len(extra)}{''.join(extra)}")
        assert ended.code == 0
        assert ("is logged only" in ended.out) == (extra == ["--shadow"])
    for folder, decision in (("held back0", "held back"), ("shown1--shadow", "shown"), ("shown1--epsilon=1", "shown")):
        found = entries(tmp_path / folder)
        assert {one["decision"] for one in found} == {decision}
        assert all(one["probability"] < one["threshold"] for one in found)


def test_an_agent_behind_an_endpoint_gets_the_events_and_rests_when_it_fails(call: Call, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "traces", events=4)
    text = json.dumps({"purpose": "p", "proposal": "Help.", "response": "a draft"})
    with chat_server(lambda body, before: Reply(text)) as chat:
        agent = [f"--agent.url={chat.url}", "--agent.model=m", f"--source={trace}", *FREE, "--quiet"]
        assert call(live.main, *agent, "--output=first").code == 0
        assert len(chat.bodies) == 4
    found = entries(tmp_path / "first")
    assert [one["decision"] for one in found] == ["shown", "repeated", "repeated", "repeated"]
    assert found[0]["response"] == "a draft"
    ended = call(live.main, *agent, "--output=second", "--endpoint.retries=0")
    assert ended.code == 0
    assert {one["decision"] for one in entries(tmp_path / "second")} == {"agent failed"}
    assert all(one["error"] for one in entries(tmp_path / "second"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--agent.url=http://10.1.2.3/v1", "--agent.model=m"], "--agent.url: 10.1.2.3 is another machine"),
        (["--agent.url=https://models.example.org/v1", "--agent.model=m"], "models.example.org is another machine"),
        (["--agent.url=http://localhost:1/v1"], "--agent.model: an endpoint needs the model's name"),
        (["--agent.baseline=always-propose", "--agent.traces=x"], "agent: expected one of"),
        (["--epsilon=0.1"], "--epsilon: there is no gate"),
        (["--cost-ratio=2"], "--cost-ratio: there is no gate"),
        (["--shadow"], "--shadow: there is no gate"),
        (["--gate-fails-open"], "--gate-fails-open: there is no gate"),
        (["--epsilon=1.5"], "epsilon: expected 1 or less"),
        (["--policy.expires=0"], "policy.expires: expected more than 0"),
        (["--agent.traces=other"], "other has no answers to trace_0.json"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    options: list[str], said: str, call: Call, tmp_path: Path
) -> None:
    write_trace(tmp_path / "other", number=1)
    ended = call(live.main, f"--source={write_trace(tmp_path / 'traces')}", *options)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_no_trace_is_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "object.json").write_text("{}")
    for source, said in (("list.json", "contains no event"), ("object.json", "object.json"), (".", "folder")):
        ended = call(live.main, f"--source={source}")
        assert (ended.code, said in ended.err) == (2, True), ended.err


def test_a_page_is_served_while_a_session_runs(call: Call, tmp_path: Path) -> None:
    options = [f"--source={write_trace(tmp_path / 'traces')}", *FREE, "--notify=page", "--output=mine"]
    ended = call(live.main, *options)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^offers: http://127.0.0.1:\d+/offers/\S{20,}$", ended.out, re.M)
    assert {one["reply"] for one in entries(tmp_path / "mine", "reply")} <= {"ignored", "withdrawn"}


def test_an_export_is_watched_with_an_agent_of_its_own(call: Call, tmp_path: Path) -> None:
    window = {"app": "Code", "title": "parser.py - shop"}
    events = [
        {
            "id": n,
            "timestamp": f"2024-06-03T10:{n:02}:00+00:00",
            "duration": 50.0,
            "data": {**window, "title": f"{n}.py"},
        }
        for n in range(4)
    ]
    bucket = {
        "id": "w",
        "type": "currentwindow",
        "client": "c",
        "hostname": "h",
        "created": "2024-06-03T09:00:00+00:00",
    }
    export = tmp_path / "export.json"
    export.write_text(json.dumps({"buckets": {"w": {**bucket, "events": events}}}))
    baseline = "--agent.baseline=never-propose"
    for options, said in (
        ([], "agent: there is none"),
        (["--gate=nothing"], "agent: there is none"),
        (["--agent.traces=traces"], "--agent.traces: the source is not a trace"),
        ([baseline, "--notify=recorded", "--gate=nothing"], "--notify recorded: the source is not a trace"),
        ([baseline, "--gate", "a", "b"], "--gate: there is no trace to choose one of 2 for"),
    ):
        ended = call(live.main, f"--source={export}", *options, "--output=mine")
        assert (ended.code, said in ended.err) == (2, True), ended.err
    ended = call(live.main, f"--source={export}", "--agent.baseline=always-propose", *FREE, "--output=mine")
    assert (ended.code, ended.err) == (0, "")
    assert settings(tmp_path / "mine")["source"]["source"] == "export"
    found = entries(tmp_path / "mine")
    assert "Code" in found[0]["event"]["event"]
    assert found[0]["decision"] == "shown"


def test_a_server_that_is_not_there_is_named(call: Call, tmp_path: Path) -> None:
    ended = call(live.main, "--source=http://127.0.0.1:9", "--agent.baseline=never-propose", "--quiet")
    assert ended.code == 2
    assert "http://127.0.0.1:9" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_answers_become_training_data_that_fit_takes_and_the_reader_opens(call: Call, tmp_path: Path) -> None:
    folders = []
    for number in range(6):
        trace = write_trace(tmp_path / "traces", number=number)
        folders.append(f"session {number}")
        assert call(live.main, f"--source={trace}", *FREE, "--quiet", f"--output={folders[-1]}").code == 0
    ended = call(live.main, "export", *folders, "--output=mine")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "mine: 6 traces, 48 events, 48 rows, 48 preferences",
        "to read: python -m proactive.annotate serve mine",
    ]
    for path in (tmp_path / "mine").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    fitted = call(fit.main, *SMALL_RUN, "--data.root=mine", "--trainer.max_steps=2")
    assert (fitted.code, fitted.err) == (0, "")
    assert "0 of 16 test rows have a history that was trained on" in fitted.out
    ended = call(live.main, "export", *folders, "--output=mine")
    assert (ended.code, ended.err.splitlines()[0]) == (2, "error: --output: mine exists")
    ended = call(live.main, "export", "traces", "--output=other")
    assert (ended.code, "traces/session.jsonl" in ended.err) == (2, True)


def test_sessions_are_kept_for_some_days(call: Call, tmp_path: Path) -> None:
    options = [f"--source={write_trace(tmp_path / 'traces')}", *FREE, "--quiet"]
    for _ in range(3):
        assert call(live.main, *options).code == 0
    other = tmp_path / "runs" / "live" / "notes"
    other.mkdir()
    for name in ("0", "2"):
        os.utime(tmp_path / "runs" / "live" / name / SESSION_FILE, (time.time() - 8 * 86_400,) * 2)
    ended = call(live.main, *options, "--keep=7", "--output=runs/live/2")
    assert ended.code == 0
    assert "removed runs/live/0: it was kept for 7 days" in ended.out
    assert sorted(path.name for path in other.parent.iterdir()) == ["1", "2", "notes"]


def started(*arguments: str, cwd: Path, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "proactive.live", *arguments]
    environment = environment_of_commands() | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **streams)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_leaves_a_log_that_continues(number: signal.Signals, call: Call, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "traces")
    options = [f"--source={trace}", *FREE[:2], "--output=mine"]
    process = started(*options, "--speed=30", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while "Offer number 1" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode in {-9, 0}
    if number == signal.SIGINT:
        assert "stopped; to continue: python -m proactive.live --source=" in err
    assert 2 <= len(entries(tmp_path / "mine")) < 8
    ended = call(live.main, *options, "--speed=0", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert [one["number"] for one in entries(tmp_path / "mine")] == list(range(1, 9))


def test_answers_are_typed_while_the_assistant_goes_on(tmp_path: Path) -> None:
    """On a real terminal: y, n, nonsense, and nothing."""
    trace = write_trace(tmp_path / "traces", events=4)
    ours, theirs = pty.openpty()
    options = [f"--source={trace}", *FREE[:2], "--speed=50", "--notify=terminal", "--output=mine"]
    process = started(*options, "--policy.expires=100", cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, typed = "", {1: b"what\ny\n", 2: b"n\n"}
    while process.poll() is None:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                said += os.read(ours, 4096).decode()
            except OSError:  # the process has closed the terminal
                break
            asked = len(re.findall("accept it: y or n", said))
            if asked in typed:
                os.write(ours, typed.pop(asked))
    assert process.wait(timeout=HANG) == 0, said
    os.close(ours)
    replies = {one["number"]: one["reply"] for one in entries(tmp_path / "mine", "reply")}
    assert (replies[1], list(replies.values())[1]) == ("accepted", "rejected"), said
    assert set(list(replies.values())[2:]) <= {"ignored", "withdrawn"}


def test_without_a_terminal_nobody_answers(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [f"--source={write_trace(tmp_path / 'traces')}", *FREE, "--notify=terminal", "--output=mine"]
    with (tmp_path / "empty").open("w+") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        ended = call(live.main, *options)
    assert ended.code == 0
    assert "(no terminal to answer in)" in ended.out
    assert {one["reply"] for one in entries(tmp_path / "mine", "reply")} <= {"ignored", "withdrawn"}
