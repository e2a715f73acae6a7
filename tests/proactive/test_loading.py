"""Judges and agents in a notebook: what they say is what the commands say, and mistakes are named."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import proactive
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from models.judging.judges import RewardJudge
from models.learning.saved_models import export_weights
from proactive.loading import LoadedAgent, events_of
from tests.helpers import ROOT, environment_of_commands
from tests.models.judging.test_local_agent import weights_of
from tests.proactive.conftest import FinishedRun

TEXTS = ["The user opens editor.py", "The user runs the tests", "Two tests fail"]


def test_events_may_be_texts_mappings_pairs_or_events() -> None:
    expected = tuple(Event(time=str(n), event=text) for n, text in enumerate(TEXTS))
    for form in (
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        [{"time": n, "event": text} for n, text in enumerate(TEXTS)],
        [(str(n), text) for n, text in enumerate(TEXTS)],
        [[n, text] for n, text in enumerate(TEXTS)],
        expected,
    ):
        assert events_of(form) == expected
    assert events_of([]) == ()
    assert events_of([(1717377997.5, "x")])[0].time == "1717377997.5"


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ("The user types", "events: expected several, got one str"),
        ({"time": "0", "event": "x"}, "events: expected several, got one dict"),
        (["x", 5], r"events, index 1: .* got 5"),
        (["x", ("0", "y", "z")], r"events, index 1"),
        ([{"time": "0"}], "events, index 0, field event: Field required"),
        ([{"time": "0", "event": "x", "app": "y"}], "events, index 0, field app"),
        (["  "], "events, index 0, field event: expected text, got a blank"),
        ([(True, "x")], "events, index 0, field time"),
        (5, "events: expected several, got one int"),
    ],
)
def test_what_is_no_event_is_named_by_its_index(events: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        events_of(events)
    assert "{'time': ..., 'event': ...}" in caught.value.hint


@pytest.mark.parametrize("place", ["", "checkpoints/best.ckpt", "export"])
def test_a_judge_scores_as_a_judge_of_an_evaluation_does(place: str, finished_run: FinishedRun) -> None:
    judge = proactive.load_judge(finished_run.folder / place)
    proposals = ["Offer to show the failing tests", None, "Offer to make coffee"]
    scores = judge.score(TEXTS, proposals)
    pairs = [Pair(events_of(TEXTS), proposal) for proposal in proposals]
    verdicts = asyncio.run(RewardJudge(judge._scorer.weights).judge(pairs))
    assert scores == pytest.approx([verdict.probability for verdict in verdicts], abs=1e-6)
    assert len(set(scores)) == 3
    assert all(0 < score < 1 for score in scores)
    assert judge.score(TEXTS, None) == pytest.approx(scores[1], abs=1e-6)
    assert judge.score(TEXTS[:1], "Offer to make coffee") == pytest.approx(
        judge.score(iter(TEXTS[:1]), ["Offer to make coffee"])[0], abs=1e-6
    )


@pytest.fixture(scope="module")
def agent_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights, folder = weights_of(0), tmp_path_factory.mktemp("agent") / "export"
    export_weights(weights.model, folder, weights.state)
    return folder


def test_an_agent_answers_and_says_nothing_where_it_was_cut_off(agent_export: Path) -> None:
    agent = proactive.load_agent(agent_export, candidates=2, temperature=1.0, seed=4, max_new_tokens=300)
    first = agent.answers(TEXTS)
    assert len(first) == 2
    assert agent.answers(TEXTS[:2]) != first or first == [None, None]
    assert agent.answers(TEXTS) == first, "the same again, whatever came between"
    cut = proactive.load_agent(agent_export, max_new_tokens=2)
    assert isinstance(cut, LoadedAgent)
    assert cut.answer(TEXTS) is None


def test_a_path_without_such_a_model_is_refused(finished_run: FinishedRun, agent_export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load_judge: there is no"):
        proactive.load_judge(tmp_path / "nowhere")
    with pytest.raises(UserError, match="task agent, not reward"):
        proactive.load_judge(agent_export)
    with pytest.raises(UserError, match="reward"):
        proactive.load_agent(finished_run.folder)
    with pytest.raises(UserError, match="2 candidates at temperature 0"):
        proactive.load_agent(agent_export, candidates=2)


def test_importing_alone_loads_no_heavy_library() -> None:
    code = "import sys, proactive; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "lightning", "transformers", "numpy", "pydantic", "datasets", "torchmetrics", "jsonargparse"}
    assert not heavy & set(loaded.stdout.split())


def test_the_examples_of_the_page_run_as_written(finished_run: FinishedRun, agent_export: Path, tmp_path: Path) -> None:
    """In one program, with the paths of a run and an export put in their places."""
    page = (ROOT / "docs" / "how-to" / "notebook.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    code = "\n".join(blocks).replace('"runs/reward/0"', repr(str(finished_run.folder)))
    code = code.replace('"runs/agent/0"', repr(str(agent_export)))
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "notebook.py"], capture_output=True, text=True, cwd=tmp_path, env=environment_of_commands()
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(r"^0\.\d+$", ended.stdout, re.MULTILINE)


def test_the_python_examples_of_the_readme_run(finished_run: FinishedRun, tmp_path: Path) -> None:
    """In one program, with the path of a run put in its place, and one training step instead of an epoch."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    code = "\n".join(blocks).replace('"runs/reward/0"', repr(str(finished_run.folder)))
    assert "max_epochs=1" in code
    (tmp_path / "readme.py").write_text(
        code.replace("max_epochs=1", "max_steps=1, limit_val_batches=1"), encoding="utf-8"
    )
    command = [sys.executable, "readme.py"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment_of_commands())
    assert ended.returncode == 0, ended.stderr
    assert 0 < float(ended.stdout.splitlines()[0]) < 1
