"""The simulate command: its output folder, kills at any moment, and the counts in its summary."""

import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import read_recorded
from proactive import inspect, simulate
from proactive.annotation.trace_reader import read_sources
from proactive.simulation.contamination import events_of_test_traces
from proactive.simulation.scenes import embedded_scenes, scenes_text
from proactive.simulation.simulation_summary import burstiness, near_duplicates
from tests.helpers import conversations_of
from tests.proactive.conftest import Ended
from tests.proactive.simulation.killed import contents, killed, lines_of

ARGUMENTS = ["traces", "--trials=2", "--max_acts=4", "--output=out"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation that was not stopped."""
    place = tmp_path_factory.mktemp("simulated")
    before = Path.cwd()
    os.chdir(place)
    try:
        simulate.main([*ARGUMENTS, "--quiet"])
    finally:
        os.chdir(before)
    return place / "out"


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("line", 1), ("line", 2), ("line", 25), ("line", 101), ("line", 333), ("line", 500),
        ("before", 1), ("after", 1), ("before", 9), ("after", 20), ("before", 28), ("after", 30),
    ],
)  # fmt: skip
def test_a_simulation_killed_anywhere_writes_the_same_files_when_continued(
    kind: str, number: int, simulated: Path, tmp_path: Path, call: Callable[..., Ended]
) -> None:
    killed(kind, number, *ARGUMENTS, cwd=tmp_path)
    kept = {entry.get("key") for entry in map(_parsed, (tmp_path / "out/log.jsonl").read_bytes().splitlines()) if entry}
    ended = call(simulate.main, *ARGUMENTS)
    assert (ended.code, ended.err) == (0, "")
    assert contents(tmp_path / "out") == contents(simulated)
    keys = Counter(entry.get("key") for entry in lines_of(tmp_path / "out/log.jsonl"))
    assert kept <= keys.keys()
    assert set(keys.values()) == {1}  # no question is asked twice


def _parsed(line: bytes) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def test_the_number_of_concurrent_sessions_changes_no_file(
    simulated: Path, call: Callable[..., Ended], tmp_path: Path
) -> None:
    assert call(simulate.main, *ARGUMENTS, "--scenes-at-once=1").code == 0
    assert contents(tmp_path / "out") == contents(simulated)


def test_without_options_the_embedded_scenes_are_simulated_in_a_new_folder(
    call: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = call(simulate.main, "traces")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == "traces, training data and report.html are in runs/simulate/0"
    folder = tmp_path / "runs/simulate/0"
    assert len(list((folder / "traces").iterdir())) == len(embedded_scenes())
    assert call(simulate.main, "traces", "--quiet").out == ""
    assert contents(tmp_path / "runs/simulate/1") == contents(folder)


def test_the_folder_is_a_data_root(simulated: Path, call: Callable[..., Ended]) -> None:
    ended = call(inspect.main, "--root", simulated, "--json")
    assert (ended.code, ended.err) == (0, "")
    figures = json.loads(ended.out)
    assert figures["all"]["scenes"] == 24
    record = json.loads((simulated / "summary.json").read_text())
    assert figures["rows"]["train"]["categories"] == record["rows"]
    assert all(record["rows"].values())


def test_training_data_agree_with_the_traces(simulated: Path) -> None:
    rows = read_jsonl(simulated / "reward_data/train_data.jsonl", AnnotatedRow)
    preferences = lines_of(simulated / "preferences.jsonl")
    said: dict[tuple[int, str | None], set[bool]] = {}
    accepted_answers = right_sessions = 0
    for path in sorted((simulated / "traces").iterdir()):
        steps = json.loads(path.read_text())
        events = [step["observation"] for step in steps]
        assert all(float(a["time"]) < float(b["time"]) for a, b in pairwise(events))
        right = 0
        for number, step in enumerate(steps):
            attempts = step["other_infomation"]["attempts"]
            history = AnnotatedRow.model_validate({"obs": events[: number + 1], "pred_task": "x", "valid": True})
            for attempt in attempts:
                if attempt["judgment"] != "ignored":
                    key = history.history_digest, attempt["proposal"]
                    said.setdefault(key, set()).add(attempt["judgment"] == "accepted")
            right += any(attempt["judgment"] == "accepted" for attempt in attempts)
        accepted_answers += right
        right_sessions += right > 0
    assert {(row.history_digest, row.proposal) for row in rows} == set(said)
    assert all(row.accepted in said[row.history_digest, row.proposal] for row in rows)
    assert all(row.annotation == (row.accepted,) for row in rows)
    provenance = lines_of(simulated / "provenance.jsonl")
    assert len(provenance) == len(rows)
    assert {entry["annotator"] for entry in provenance} == {'{"role": "scripted"}'}

    verdicts = {(row.history_digest, row.proposal): row.accepted for row in rows}
    for pair in preferences:
        digest = AnnotatedRow.model_validate({"obs": pair["history"], "pred_task": "x", "valid": True}).history_digest
        assert verdicts[digest, pair["chosen"]]
        assert not verdicts[digest, pair["rejected"]]
        assert set(pair) == {"history", "chosen", "rejected", "source", "weight"}
    assert preferences

    conversations = list(conversations_of(simulated / "conversations.jsonl"))
    turns = [turn for one in conversations for turn in one.conversations if turn.role == "assistant"]
    assert (len(conversations), len(turns)) == (right_sessions, accepted_answers)
    assert any(json.loads(turn.content)["proposal"] is None for turn in turns)
    assert any(json.loads(turn.content)["proposal"] for turn in turns)


def test_traces_are_read_as_recorded_traces_and_by_the_trace_reader(simulated: Path) -> None:
    recorded = read_recorded(simulated / "traces")
    assert len(recorded.traces) == 24
    assert {True, False} == set(recorded.judgments.values())
    assert len(read_sources([simulated / "traces"])[0].traces) == 24


def test_the_log_contains_every_question_with_role_kind_and_attempt(simulated: Path) -> None:
    _, *entries = lines_of(simulated / "log.jsonl")
    asked = [entry for entry in entries if entry["kind"] != "outcome"]
    assert len(entries) - len(asked) == 24
    assert {entry["role"] for entry in asked} == {"environment", "user", "assistant", "judge"}
    assert {entry["attempt"] for entry in asked} == {0}
    counts = Counter(entry["kind"] for entry in asked)
    assert counts["setup"] == counts["ask"] == counts["tell"] == 24
    assert counts["act"] == counts["events"]
    record = json.loads((simulated / "summary.json").read_text())
    assert sum(role["answers"] for role in record["roles"].values()) == len(asked)


def test_rows_are_written_again_from_log_and_traces(
    simulated: Path, call: Callable[..., Ended], tmp_path: Path
) -> None:
    simulated.parent.joinpath("copy").mkdir()
    copy = simulated.parent / "copy"
    for name in ("traces", "log.jsonl", "scenes.yaml", "config.yaml"):
        (copy / name).symlink_to(simulated / name)
    ended = call(simulate.main, "rows", copy)
    assert (ended.code, ended.err) == (0, "")
    assert "preferences" in ended.out
    for name in ("summary.json", "report.html", "preferences.jsonl", "conversations.jsonl", "provenance.jsonl"):
        assert (copy / name).read_bytes() == (simulated / name).read_bytes()


def test_a_folder_of_other_options_or_other_content_is_refused(call: Callable[..., Ended], tmp_path: Path) -> None:
    assert call(simulate.main, *ARGUMENTS).code == 0
    before = contents(tmp_path / "out")
    ended = call(simulate.main, *ARGUMENTS, "--seed=1")
    assert (ended.code, ended.out) == (2, "")
    assert "was started with seed 0, and now it is 1" in ended.err
    assert contents(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").touch()
    ended = call(simulate.main, "traces", "--output=other")
    assert "other holds other things than `simulate` wrote" in ended.err
    for folder in ("other", "nowhere"):
        assert call(simulate.main, "rows", folder).err.startswith(f"error: {folder}/log.jsonl")


def test_hostile_text_in_scenes_is_shown_as_text(call: Callable[..., Ended], tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    scene = embedded_scenes()[0]
    environment = scene.environment.model_copy(update={"entities": [hostile, "\x1b[31m"], "theme": hostile})
    (tmp_path / "s.yaml").write_text(scenes_text([scene.model_copy(update={"environment": environment})]))
    ended = call(simulate.main, "traces", "--scenes=s.yaml", "--output=out", "--trials=3")
    assert (ended.code, ended.err) == (0, "")
    assert hostile in (tmp_path / "out/reward_data/train_data.jsonl").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert hostile not in page
    assert "&lt;script&gt;alert(1)" in page


def test_simulated_events_of_test_traces_are_counted(simulated: Path) -> None:
    texts = [event.event for trace in read_recorded(simulated / "traces").traces for event in trace.events]
    tested = {step.observation.event for steps in load_corpus("embedded").traces.values() for step in steps}
    assert events_of_test_traces("embedded") == tested
    record = json.loads((simulated / "summary.json").read_text())["contamination"]
    assert record["events"] == len(texts)
    assert record["events_of_test_traces"] == sum(text in tested for text in texts) > 0


def test_example_events_of_the_roots_test_traces_are_removed_unless_contaminated(
    call: Callable[..., Ended], tmp_path: Path
) -> None:
    tested = sorted(events_of_test_traces("embedded"))[0]
    scene = embedded_scenes()[0]
    environment = scene.environment.model_copy(update={"events_example": [tested, "The user waves."]})
    (tmp_path / "s.yaml").write_text(scenes_text([scene.model_copy(update={"environment": environment})]))
    assert call(simulate.main, "traces", "--scenes=s.yaml", "--output=out").code == 0
    assert tested not in (tmp_path / "out/scenes.yaml").read_text()
    assert "CONTAMINATED" not in (tmp_path / "out/report.html").read_text()
    record = json.loads((tmp_path / "out/summary.json").read_text())["contamination"]
    assert (record["examples"], record["examples_of_test_traces"], record["contaminated"]) == (2, 1, False)
    assert call(simulate.main, "traces", "--scenes=s.yaml", "--output=bad", "--contaminated").code == 0
    assert tested in (tmp_path / "bad/scenes.yaml").read_text().replace("\n   ", "")
    assert "CONTAMINATED" in (tmp_path / "bad/report.html").read_text()
    assert json.loads((tmp_path / "bad/summary.json").read_text())["contamination"]["contaminated"]


def test_near_duplicates_and_burstiness() -> None:
    assert near_duplicates(["The user opens a.txt (2).", "the user OPENS a.txt 31", "The user closes a.txt"]) == {1: 0}
    assert burstiness([5.0, 5.0, 5.0]) == -1
    assert burstiness([1.0] * 99 + [1000.0]) == pytest.approx(0.8, abs=0.05)
    assert burstiness([1.0]) is None
