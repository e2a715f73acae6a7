"""An agent and a reward classifier are trained, one is measured by the other, and the measuring survives a kill."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.answers import read_answer
from datamodules.corpus.sources import load_corpus
from proactive import evaluate
from tests.helpers import SMALL_RUN, command, start
from tests.proactive.conftest import FinishedRun
from tests.proactive.evaluation.test_agent_command import check_outputs, counts, metrics


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of two agents on the embedded data: published split, and one fold."""
    place = tmp_path_factory.mktemp("agents")
    options = ["--task=agent", *SMALL_RUN, "--trainer.max_epochs=1", "--data.batch_size=32", "--quiet"]
    for split in ("published", "by_scene"):
        ended = command("proactive.fit", *options, f"--data.split={split}", f"--run.name={split}", cwd=place)
        assert (ended.returncode, ended.stdout) == (0, f"runs/{split}/0\n"), ended.stderr
    return place / "runs"


def lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def test_a_killed_evaluation_continues_and_its_metrics_equal_a_count_by_hand(
    agents: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    arguments = [
        "agent",
        f"--agent.checkpoint={agents / 'published' / '0'}",
        "--agent.answers.max_new_tokens=32",
        "--agent.answers.traces_at_once=1",
        f"--judge.checkpoint={finished_run.folder}",
        "--output=out",
    ]
    killed = start("proactive.evaluate", *arguments, cwd=tmp_path)
    log = tmp_path / "out" / "answers.jsonl"
    while killed.poll() is None and len(lines(log)) < 20:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = lines(log)[1:]
    assert not (tmp_path / "out" / "metrics.json").exists()

    ended = command("proactive.evaluate", *arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    after = lines(log)[1:]
    assert after[: len(before)] == before
    traces = load_corpus("embedded").traces
    events = sum(map(len, traces.values()))
    assert len(after) == len({entry["key"] for entry in after}) == events, "nothing is lost, nothing written twice"
    assert all(read_answer(entry["text"]) is not None for entry in after)

    record = metrics(tmp_path / "out")
    tally = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for name in traces:
        for step in json.loads((tmp_path / "out" / "judged" / name).read_text()):
            ((proposal,), (accepted,)) = step["agent_response"], step["judgement"]
            tally[{(1, 1): "tp", (1, 0): "fp", (0, 1): "tn", (0, 0): "fn"}[proposal is not None, accepted]] += 1
    assert counts(record["figures"]) == tuple(tally.values())
    assert sum(tally.values()) == record["figures"]["events"] == events
    check_outputs(tmp_path / "out", {"all": list(traces)})
    assert record["agent_trained_on"] == record["traces_left_out"] == []
    assert set(record["baselines"]) == {"always-propose", "never-propose"}
    assert str(events) in ended.stdout or f"{record['figures']['f1']:.4f}" in ended.stdout


def test_an_agent_answers_the_traces_that_it_was_not_trained_on(
    agents: Path, finished_run: FinishedRun, tmp_path: Path, call: Any
) -> None:
    arguments = [
        f"--agent.checkpoint={agents / 'by_scene' / '0'}",
        "--agent.answers.max_new_tokens=1",
        f"--judge.checkpoint={finished_run.folder}",
    ]
    ended = call(evaluate.main, "agent", *arguments, "--output=out")
    assert ended.code == 0, ended.err
    record = metrics(Path("out"))
    traces = load_corpus("embedded").traces
    assert 0 < len(record["per_trace"]) < len(traces)
    assert sorted([*record["per_trace"], *record["traces_left_out"]]) == sorted(traces)
    assert "skipped, because the agent was trained on them" in ended.out
    assert record["splits"] == {}
    assert record["splits_left_out"] == ["all"]
    assert record["unfinished"]["agent"]["length"] > 0

    ended = call(evaluate.main, "agent", *arguments, "--output=stamped", "--contaminated")
    assert ended.code == 0, ended.err
    record = metrics(Path("stamped"))
    assert record["agent_trained_on"]
    assert not record["traces_left_out"]
    assert "CONTAMINATED: the agent was trained on" in " ".join(ended.out.split())
    assert len(list(Path("stamped").glob("figures-contaminated*.csv"))) == 1
    assert "CONTAMINATED" in Path("stamped", "report.html").read_text(encoding="utf-8")


def test_mistakes_give_one_line_errors(agents: Path, finished_run: FinishedRun, call: Any) -> None:
    judge = f"--judge.checkpoint={finished_run.folder}"
    agent = f"--agent.checkpoint={agents / 'published' / '0'}"
    for arguments, message in (
        ([f"--agent.checkpoint={finished_run.folder}", judge], "is of task reward, not agent"),
        ([agent, f"--judge.checkpoint={agents / 'published' / '0'}"], "is of task agent, not reward"),
        ([agent, judge, "--candidates=2"], "at temperature 0"),
        ([agent, judge, "--agent.answers.max_new_tokens=0"], "expected 1 or more"),
        (["--agent.checkpoint=nowhere", judge], "there is no nowhere"),
        ([agent, judge, "--agent.baseline=always-propose"], "expected one of"),
    ):
        ended = call(evaluate.main, "agent", *arguments)
        assert ended.code == 2, arguments
        assert message in ended.err, arguments
        assert len(ended.err.splitlines()) == 2
        assert not Path("runs").exists()
