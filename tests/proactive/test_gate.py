"""`proactive.gate recalibrate`: from the answers in sessions to a gate that every command takes."""

import math
from pathlib import Path

import pytest

import proactive
from proactive import evaluate, gate, live
from proactive.assistant.session_log import SESSION_FILE
from tests.proactive.conftest import FinishedRun
from tests.proactive.test_live import FREE, Call, entries, settings, write_trace


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_gate_gets_the_calibration_of_its_users_answers(
    call: Call, finished_run: FinishedRun, tmp_path: Path
) -> None:
    folders = []
    for number in range(7):
        trace = write_trace(tmp_path / "traces", number=number)
        folders.append(f"session {number}")
        options = [f"--source={trace}", f"--gate={finished_run.folder}", *FREE, "--cost-ratio=0", "--quiet"]
        assert call(live.main, *options, f"--output={folders[-1]}").code == 0
    known = f"--gate={finished_run.folder}"
    ended = call(gate.main, "recalibrate", *folders[:2], known, "--output=new")
    assert (ended.code, "8 offers with a P(accepted) were accepted and 8 rejected" in ended.err) == (2, True)
    assert not (tmp_path / "new").exists()
    ended = call(gate.main, "recalibrate", *folders, known, "--output=new")
    assert (ended.code, ended.err) == (0, "")
    assert "fitted on 56 answers" in ended.out
    again = [f"--source={trace}", "--gate=new", *FREE, "--quiet", "--output=again"]
    assert call(live.main, *again).code == 0
    before, after = settings(tmp_path / folders[-1])["gate"], settings(tmp_path / "again")["gate"]
    assert before["weights"] == after["weights"]
    assert before["temperature"] != after["temperature"]
    for old, new in zip(entries(tmp_path / folders[-1]), entries(tmp_path / "again"), strict=True):
        raw = logit(old["probability"]) * before["temperature"]
        assert logit(new["probability"]) * after["temperature"] == pytest.approx(raw, abs=1e-4)
    assert proactive.load_judge(tmp_path / "new").score(["x"], "y") > 0
    tested = call(evaluate.main, "reward", "--checkpoint=new", f"--data.root={finished_run.root}")
    said = " ".join(tested.out.split())  # a caption breaks its lines
    assert (tested.code, "calibrated on 56 of 56 answers of the user" in said) == (0, True), tested.err
    assert "greatest F1 on the answers of the user" in (tmp_path / "new" / "README.md").read_text()
    log = tmp_path / folders[0] / SESSION_FILE
    log.write_text(log.read_text().replace(before["weights"], "0" * 64))
    ended = call(gate.main, "recalibrate", *folders, known, "--output=other")
    assert (ended.code, "had another gate than" in ended.err) == (2, True)
