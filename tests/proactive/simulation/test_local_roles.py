"""Trained agents, reward classifiers and baselines as roles: what they say, kills, other weights, mistakes."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.answers import read_answer
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from models.judging.agents import GENERIC_PROPOSAL
from models.judging.answer_options import AnswerOptions
from models.judging.judges import RewardJudge
from models.judging.local_agent import LocalAgent
from models.judging.weights import load_weights
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from proactive import simulate
from proactive.simulation.asking import TRIES
from proactive.simulation.local_roles import TrainedAssistant, TrainedJudge, TrainedRole
from proactive.simulation.scenes import embedded_scenes, scenes_text, sessions_of
from tests.chat_server import Body, Reply, chat_server
from tests.patience import HANG
from tests.proactive.conftest import Ended
from tests.proactive.simulation.killed import killed, lines_of
from tests.proactive.simulation.test_endpoint_roles import asked, without_seconds
from tests.proactive.simulation.trained import export_agent, export_judge

SCENES = embedded_scenes()[:2]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an agent, a judge, and a judge with other weights."""
    place = tmp_path_factory.mktemp("exports")
    export_agent(place / "agent")
    for seed, name in enumerate(("judge", "other")):
        export_judge(place / name, seed)
    return place


def arguments(exports: Path, *more: str) -> list[str]:
    """The options of a simulation of two scenes with a trained assistant and a trained judge."""
    Path("scenes.yaml").write_text(scenes_text(SCENES), encoding="utf-8")
    trained = [f"--assistant.checkpoint={exports / 'agent'}", f"--judge.checkpoint={exports / 'judge'}"]
    drawn = ["--assistant.temperature=1", "--assistant.max_new_tokens=24", "--max_acts=3", "--new_proposals=2"]
    return ["traces", "--scenes=scenes.yaml", "--output=out", *trained, *drawn, *more]


def attempts_of(step: dict[str, Any]) -> list[dict[str, Any]]:
    return step["other_infomation"]["attempts"]


def test_each_attempt_is_the_next_candidate_and_its_verdict(exports: Path, call: Callable[..., Ended]) -> None:
    ended = call(simulate.main, *arguments(exports))
    assert (ended.code, ended.err) == (0, "")
    agent = LocalAgent(load_weights((ProactiveAgent,), exports / "agent", "x"), AnswerOptions(24), 1, 1.0, seed=0)
    judge = RewardJudge(load_weights((RewardClassifier,), exports / "judge", "x"))
    found = []
    for session in sessions_of(SCENES, 1, 0):
        steps = json.loads(Path(f"out/traces/{session.name}.json").read_text())
        events = [Event(**step["observation"]) for step in steps]
        for number, step in enumerate(steps, 1):
            attempts = attempts_of(step)
            assert all(attempt["judgment"] == "rejected" for attempt in attempts[:-1])
            assert len(attempts) <= 3
            assert len(attempts) == 3 or not attempts or attempts[-1]["judgment"] == "accepted"
            for candidate, attempt in enumerate(attempts):
                stream = agent.stream(session.seed)  # reads the history from its beginning
                (answer,) = stream.answer(agent.data.segments(events[:number]), [candidate * TRIES])
                text = agent.data.tokenizer.decode(answer.token_ids) if answer.finished else ""
                written = read_answer(text)
                assert attempt["proposal"] == (written.proposal if written else None)
                (verdict,) = asyncio.run(judge.judge([Pair(tuple(events[:number]), attempt["proposal"])]))
                assert attempt["probability"] == pytest.approx(verdict.probability, abs=1e-4)
                assert attempt["judgment"] == ("accepted" if verdict.accepted else "rejected")
                found.append((attempt["proposal"] is None, attempt["judgment"]))
    assert set(found) == {(True, "accepted"), (True, "rejected"), (False, "accepted"), (False, "rejected")}
    record = json.loads(Path("out/summary.json").read_text())
    assert record["settings"]["roles"]["judge"]["weights"] == judge.weights.digest
    assert record["roles"]["assistant"]["source"] == str(exports / "agent")
    assert record["roles"]["environment"]["source"] == "scripted"
    texts = [entry for entry in lines_of(Path("out/log.jsonl"))[1:] if entry.get("role") == "assistant"]
    assert record["roles"]["assistant"]["cut_off"] == sum(entry["finish_reason"] == "length" for entry in texts)
    assert f", P {attempt['probability']:.3f}" in Path("out/report.html").read_text()


def test_killed_it_computes_only_what_the_log_lacks_and_gives_the_same_files(
    exports: Path, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = arguments(exports)
    assert call(simulate.main, *options, "--scenes-at-once=1").code == 0
    undisturbed = without_seconds(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    killed("line", 30, *options, cwd=tmp_path)
    held = [entry for entry in whole_lines(Path("out/log.jsonl")) if entry.get("role") in ("assistant", "judge")]
    computed: list[str] = []
    timed = TrainedRole._timed

    def counted(self: TrainedRole, question: Any, session: Any, attempt: int) -> Any:
        computed.append(self.log.key(session, question, attempt))
        return timed(self, question, session, attempt)

    monkeypatch.setattr(TrainedRole, "_timed", counted)
    assert call(simulate.main, *options).code == 0
    assert without_seconds(tmp_path / "out") == undisturbed
    answers = [one for one in undisturbed["log"] if one.get("role") in ("assistant", "judge")]
    assert sorted([*computed, *(entry["key"] for entry in held)]) == sorted(one["key"] for one in answers)
    computed.clear()
    assert call(simulate.main, *options).code == 0
    assert computed == []


def whole_lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def test_other_weights_do_not_continue_a_simulation(exports: Path, call: Callable[..., Ended]) -> None:
    options = arguments(exports)
    assert call(simulate.main, *options).code == 0
    before = Path("out/summary.json").read_bytes()
    ended = call(simulate.main, *options, f"--judge.checkpoint={exports / 'other'}")
    assert ended.code == 2
    assert "out/log.jsonl was started with roles.judge.weights" in ended.err
    assert Path("out/summary.json").read_bytes() == before


def test_an_endpoint_gets_the_rejections_of_a_reward_classifier(exports: Path, call: Callable[..., Ended]) -> None:
    def proposes(body: Body, before: int) -> Reply:
        _, facts = asked(body)
        number = len(facts["history"]), len(facts["rejected"])
        proposal = f"Help with event {number[0]} after {number[1]} rejections"
        return Reply(json.dumps({"purpose": "", "thoughts": "", "proposal": proposal, "response": ""}), "stop")

    with chat_server(proposes) as server:
        options = [f"--assistant.url={server.url}", "--assistant.model=m", "--max_acts=3", "--new_proposals=2"]
        ended = call(
            simulate.main, "traces", "--output=out", *options, f"--judge.checkpoint={exports / 'judge'}", "--trials=2"
        )
        assert (ended.code, ended.err) == (0, "")
        given = [asked(body)[1]["rejected"] for body in server.bodies]
    reasons = {rejection["reason"] for rejections in given for rejection in rejections}
    assert len(reasons) > 1
    assert all(reason.startswith("The user accepts with a probability of 0.") for reason in reasons)
    traces = [json.loads(path.read_text()) for path in Path("out/traces").iterdir()]
    kept = [attempts_of(step) for trace in traces for step in trace if attempts_of(step)]
    assert {len(attempts) for attempts in kept} == {1, 2, 3}, "at most two new proposals"
    assert sum(map(len, kept)) == len(server.bodies), "every attempt is kept"
    assert all("probability" in attempt for attempts in kept for attempt in attempts)


def test_a_computation_does_not_delay_the_requests_of_other_sessions(
    exports: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first computation only ends when the server has received a request of each session."""
    arrived: set[str] = set()
    both = threading.Event()
    compute = TrainedAssistant.compute

    def waits(self: TrainedAssistant, *arguments: Any) -> Any:
        assert both.wait(HANG)
        return compute(self, *arguments)

    monkeypatch.setattr(TrainedAssistant, "compute", waits)

    def acts(body: Body, before: int) -> Reply:
        kind, facts = asked(body)
        if kind == "act":
            arrived.add(facts["user"]["goal"])
            if len(arrived) == 2:
                both.set()
        answer = {"ask": {"question": "Why?"}, "act": {"state": "stuck", "act": "Types.", "goal_reached": True}}[kind]
        return Reply(json.dumps(answer), "stop")

    with chat_server(acts) as server:
        ended = call(simulate.main, *arguments(exports, f"--user.url={server.url}", "--user.model=m"))
    assert (ended.code, ended.err) == (0, "")
    assert both.is_set()


def test_a_session_that_has_ended_leaves_no_cache_behind(
    exports: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    release = TrainedJudge.release

    def released(self: TrainedJudge, session: Any) -> None:
        before = len(self.judge.scorer._caches)
        release(self, session)
        kept.append(before - len(self.judge.scorer._caches))

    monkeypatch.setattr(TrainedJudge, "release", released)
    assert call(simulate.main, *arguments(exports)).code == 0
    assert kept == [1, 1]


@pytest.mark.parametrize(("name", "proposal"), [("always-propose", GENERIC_PROPOSAL), ("never-propose", None)])
def test_a_baseline_does_the_same_after_every_event(
    name: str, proposal: str | None, exports: Path, call: Callable[..., Ended]
) -> None:
    judge = f"--judge.checkpoint={exports / 'judge'}"
    options = ["traces", "--output=out", "--max_acts=3", "--new_proposals=0", f"--assistant.baseline={name}", judge]
    assert call(simulate.main, *options).code == 0
    traces = [json.loads(path.read_text()) for path in Path("out/traces").iterdir()]
    attempts = [attempt for trace in traces for step in trace for attempt in attempts_of(step)]
    assert {attempt["proposal"] for attempt in attempts} == {proposal}
    assert len(Counter(attempt["judgment"] for attempt in attempts)) == 2
    assert json.loads(Path("out/summary.json").read_text())["roles"]["assistant"]["source"] == name


AGENT, JUDGE = "--assistant.checkpoint={0}/agent", "--judge.checkpoint={0}/judge"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--judge.checkpoint={0}/agent"], "task agent, not reward"),
        (["--assistant.checkpoint={0}/judge"], "task reward, not agent"),
        (["--judge.checkpoint={0}/nowhere"], "--judge.checkpoint: there is no {0}/nowhere"),
        (["--user.checkpoint={0}/agent"], "unrecognized arguments: --user.checkpoint"),
        (["--environment.checkpoint={0}/agent"], "unrecognized arguments: --environment.checkpoint"),
        ([JUDGE, "--judge.url=http://localhost:1/v1"], "--judge.url and --judge.checkpoint exclude each other"),
        ([AGENT, "--assistant.baseline=never-propose"], "--assistant.checkpoint and --assistant.baseline exclude"),
        ([JUDGE, "--judge.model=m"], "--judge.model: only an endpoint uses it"),
        (["--user.token_limit=5"], "--user.token_limit: only an endpoint uses it"),
        (["--assistant.baseline=never-propose"], "--assistant.baseline: a new proposal would equal the rejected one"),
        (["--assistant.baseline=often"], "assistant.baseline: expected one of always-propose, never-propose"),
        ([AGENT, "--assistant.temperature=0"], "--assistant.temperature: a trained agent does not read the reason"),
        (["--judge.url=http://localhost:1/v1"], "--judge.model: an endpoint needs the model's name"),
    ],
)
def test_mistakes_are_named_before_a_folder_is_made(
    options: list[str], said: str, exports: Path, call: Callable[..., Ended]
) -> None:
    ended = call(simulate.main, "traces", "--output=out", *(option.format(exports) for option in options))
    assert ended.code == 2
    assert said.format(exports) in ended.err
    assert len(ended.err.splitlines()) == 2
    assert not Path("out").exists()
