"""Roles that are models behind endpoints: a real server on loopback, also with invalid answers and errors."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proactive import simulate
from proactive.simulation.endpoint_roles import PROMPTS
from proactive.simulation.scenes import embedded_scenes, scenes_text
from proactive.simulation.simulation_summary import estimate
from tests.chat_server import Body, ChatServer, Reply, chat_server
from tests.patience import HANG
from tests.proactive.conftest import Ended
from tests.proactive.simulation.killed import contents, killed

ROLE_NAMES = ("environment", "user", "assistant", "judge")
USAGE = {"prompt_tokens": 100, "completion_tokens": 10}
PRICE = "{input: 1.0, output: 20.0}"


def asked(body: Body) -> tuple[str, dict[str, Any]]:
    """The kind of a question, and its facts."""
    kind = body["response_format"]["json_schema"]["name"]
    return kind, json.loads(body["messages"][1]["content"].splitlines()[-1])


def valid_answer(kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """A valid answer that depends on the question only."""
    number = len(facts.get("history", ()))
    return {
        "setup": lambda: {"entities": [{"entity": "a lamp", "state": "on", "new": True}]},
        "ask": lambda: {"question": "Is the lamp on?"},
        "tell": lambda: {"answer": "Yes."},
        "act": lambda: {"state": "stuck", "act": f"Act {facts['acts']}", "goal_reached": facts["acts"] == 2},
        "events": lambda: {"events": [{"seconds": 5.5, "event": f"The user does {facts['act']}."}] * 2, "entities": []},
        "propose": lambda: {
            "purpose": "",
            "thoughts": "",
            "proposal": None if number % 3 == 0 else f"Help {number} {len(facts['rejected'])}",
            "response": "",
        },
        "judge": lambda: {"judgment": ("accepted", "rejected", "accepted", "ignored")[number % 4], "reason": "So."},
        "execute": lambda: {
            "events": [{"seconds": 1, "event": "The assistant helps."}],
            "entities": [{"entity": "a lamp", "state": "off", "new": False}],
        },
    }[kind]()


def answers(body: Body, before: int) -> Reply:
    return Reply(json.dumps(valid_answer(*asked(body))), "stop", usage=USAGE)


def arguments(server: ChatServer, *more: str, scenes: int = 2) -> list[str]:
    """The options of a simulation of two scenes in which the server is all roles."""
    Path("scenes.yaml").write_text(scenes_text(embedded_scenes()[:scenes]), encoding="utf-8")
    roles = [
        option
        for role in ROLE_NAMES
        for option in (f"--{role}.url={server.url}", f"--{role}.model=m", f"--{role}.price={PRICE}")
    ]
    quick = ["--endpoint.first_delay=0.01", "--endpoint.longest_delay=0.02", f"--endpoint.timeout={HANG}"]
    return ["traces", "--scenes=scenes.yaml", "--output=out", *roles, *quick, *more]


def without_seconds(folder: Path) -> dict[str, Any]:
    """The content of all files, without the seconds of requests."""
    found: dict[str, Any] = contents(folder)
    entries = [json.loads(line) for line in found.pop("log.jsonl").splitlines()]
    summary = json.loads(found.pop("summary.json"))
    found.pop("report.html")
    for entry in [*entries, *summary["roles"].values()]:
        entry.pop("seconds", None)
    return {**found, "log": entries, "summary": summary}


def test_one_server_is_all_roles(call: Callable[..., Ended]) -> None:
    with chat_server(answers) as server:
        ended = call(simulate.main, *arguments(server, "--trials=2"))
    assert (ended.code, ended.err) == (0, "")
    out = Path("out")
    assert max(Counter(server.asked).values()) == 1
    assert len({body["seed"] for body in server.bodies}) == 4  # one for each session
    record = json.loads((out / "summary.json").read_text())
    assert record["sessions"]["ends"] == {"goal reached": 4}
    roles = record["roles"]
    assert sum(role["answers"] for role in roles.values()) == len(server.bodies)
    for role in roles.values():
        assert (role["prompt_tokens"], role["completion_tokens"]) == (100 * role["answers"], 10 * role["answers"])
        assert role["cost"] == pytest.approx(role["answers"] * 300 / 1e6)
        assert role["seconds"] > 0
    steps = json.loads((out / "traces/scene_001_trial_1.json").read_text())
    assert any(step["other_infomation"]["source"] == "assistant" for step in steps)
    assert all(record["rows"][kind] for kind in ("correct_detection", "false_alarm", "non_response"))
    for body in server.bodies:
        kind, facts = asked(body)
        if kind == "propose":  # the assistant knows neither goal nor hidden state
            assert set(facts) == {"operations", "rejected", "history"}
        assert "additionalProperties" in body["response_format"]["json_schema"]["schema"]


@pytest.mark.parametrize("lines", [2, 3, 4, 5, 8, 13, 21, 30, 34, 40, 47, 52])
def test_a_simulation_killed_at_any_answer_repeats_no_request_and_writes_the_same_files(
    lines: int, call: Callable[..., Ended], tmp_path: Path
) -> None:
    def misbehaves(body: Body, before: int) -> Reply:
        kind, _ = asked(body)
        if kind == "events" and len(body["messages"]) == 2:
            return Reply('{"events": [{"seconds": -1, "event": "x"}], "entities": []}', "stop", usage=USAGE)
        return answers(body, before)

    with chat_server(misbehaves) as server:
        options = arguments(server, "--scenes-at-once=1")
        assert call(simulate.main, *options).code == 0
        undisturbed, expected = without_seconds(tmp_path / "out"), sorted(server.asked)
        (tmp_path / "out").rename(tmp_path / "first")
        server.asked.clear()
        killed("line", lines, *options, cwd=tmp_path)
        between = len(server.asked)
        assert 0 < between < len(expected)
        assert call(simulate.main, *options).code == 0
    assert sorted(server.asked) == expected
    assert without_seconds(tmp_path / "out") == undisturbed
    assert undisturbed["summary"]["roles"]["environment"]["asked_again"] == 6


def test_an_invalid_answer_is_sent_back_twice_and_fails_one_session(call: Callable[..., Ended]) -> None:
    first = embedded_scenes()[0].user.goal

    def garbage(body: Body, before: int) -> Reply:
        kind, facts = asked(body)
        return (
            Reply("I would rather not.", "stop")
            if kind == "act" and facts["user"]["goal"] == first
            else answers(body, 0)
        )

    with chat_server(garbage) as server:
        ended = call(simulate.main, *arguments(server))
        assert (ended.code, ended.err) == (0, "")
        repeated = [body for body in server.bodies if asked(body)[0] == "act" and first in str(body)]
        assert [len(body["messages"]) for body in repeated] == [2, 4, 6]
        assert "This answer is invalid: answer: expected JSON" in repeated[1]["messages"][-1]["content"]
        assert repeated[1]["messages"][2] == {"role": "assistant", "content": "I would rather not."}
        number = len(server.bodies)
        assert call(simulate.main, *arguments(server)).code == 0
        assert len(server.bodies) == number  # a failed session is not repeated
    record = json.loads(Path("out/summary.json").read_text())
    assert record["sessions"]["ends"] == {"failed": 1, "goal reached": 1}
    assert record["sessions"]["failures"] == {"user, act": 1}
    assert [path.name for path in Path("out/traces").iterdir()] == ["scene_002_trial_1.json"]
    assert "user, act" in Path("out/report.html").read_text()
    assert record["roles"]["user"]["without_usage"] == 3


def test_thoughts_and_code_fences_around_an_answer_are_skipped(call: Callable[..., Ended]) -> None:
    def thinks(body: Body, before: int) -> Reply:
        return Reply(f"<think>Let me see.</think>\n```json\n{json.dumps(valid_answer(*asked(body)))}\n```", "stop")

    with chat_server(thinks) as server:
        assert call(simulate.main, *arguments(server)).code == 0
    record = json.loads(Path("out/summary.json").read_text())
    assert record["sessions"]["ends"] == {"goal reached": 2}
    assert all(role["asked_again"] == 0 for role in record["roles"].values())


def test_each_role_has_its_own_server_and_servers_differ(call: Callable[..., Ended]) -> None:
    """One server refuses response_format and sends its first answer as thoughts only; the other reports no usage."""

    def thinks(body: Body, before: int) -> Reply:
        if "response_format" in body:
            return Reply(status=400, body=b'{"error": {"message": "not here", "param": "response_format"}}')
        if len(body["messages"]) == 2:
            return Reply(None, "stop", thoughts="Let me see.", usage=USAGE)
        facts = json.loads(body["messages"][1]["content"].splitlines()[-1])
        return Reply(json.dumps(valid_answer("propose", facts)), "stop", usage=USAGE)

    def judges(body: Body, before: int) -> Reply:
        return Reply(json.dumps(valid_answer(*asked(body))), "stop")

    with chat_server(thinks) as assistant, chat_server(judges) as judge:
        options = [f"--assistant.url={assistant.url}", f"--judge.url={judge.url}", "--max_acts=2"]
        ended = call(simulate.main, "traces", "--output=out", *options, "--assistant.model=a", "--judge.model=j")
        assert ended.code == 0
        assert {body["model"] for body in assistant.bodies} == {"a"}
        assert {asked(body)[0] for body in judge.bodies} == {"judge"}
    record = json.loads(Path("out/summary.json").read_text())
    assert "failed" not in record["sessions"]["ends"]
    found = record["roles"]
    assert found["assistant"]["answers"] == 2 * found["assistant"]["asked_again"] > 0
    assert found["assistant"]["prompt_tokens"] == 100 * found["assistant"]["answers"]
    assert found["judge"]["without_usage"] == found["judge"]["answers"] == len(judge.bodies)
    sources = {role: one["source"] for role, one in found.items()}
    scripted = {"environment": "scripted", "user": "scripted"}
    assert sources == {**scripted, "assistant": assistant.url, "judge": judge.url}


def test_a_refused_request_stops_one_session_and_the_same_command_continues_it(
    call: Callable[..., Ended], tmp_path: Path
) -> None:
    first = embedded_scenes()[0].user.goal
    broken = True

    def refuses(body: Body, before: int) -> Reply:
        kind, facts = asked(body)
        if broken and kind == "act" and facts["user"]["goal"] == first:
            return Reply(status=400, body=b'{"error": {"message": "too long for this model"}}')
        return answers(body, before)

    with chat_server(refuses) as server:
        options = arguments(server)
        ended = call(simulate.main, *options)
        assert ended.code == 2
        assert "too long for this model" in ended.err
        assert ended.err.rstrip().endswith("To continue, give the same options with --output out.")
        record = json.loads(Path("out/summary.json").read_text())
        assert record["sessions"]["ends"] == {"goal reached": 1}
        broken = False
        assert call(simulate.main, *options).code == 0
        Path("out").rename("first")
        assert call(simulate.main, *options).code == 0
    assert without_seconds(tmp_path / "out")["summary"] == without_seconds(tmp_path / "first")["summary"]


@pytest.mark.parametrize("limit", [("--budget-tokens", "2000", "9000000"), ("--budget-cost", "0.005", "9")], ids=str)
def test_a_limit_stops_all_sessions_and_a_greater_one_continues_them(
    limit: tuple[str, str, str], call: Callable[..., Ended]
) -> None:
    option, low, high = limit
    with chat_server(answers) as server:
        options = arguments(server)
        ended = call(simulate.main, *options, f"{option}={low}")
        assert ended.code == 2
        assert f"the limit of {option[2:]} is reached" in ended.err
        assert 17 <= len(server.bodies) <= 20
        assert call(simulate.main, *options, f"{option}={low}").code == 2
        assert len(server.bodies) <= 20
        assert call(simulate.main, *options, f"{option}={high}").code == 0
        assert max(Counter(server.asked).values()) == 1
    assert json.loads(Path("out/summary.json").read_text())["sessions"]["ends"] == {"goal reached": 2}


@pytest.mark.parametrize("limit", [("token_limit", "330", "9000000"), ("cost_limit", "0.0009", "9")], ids=str)
def test_a_limit_of_one_role_counts_only_its_own_usage_also_after_a_restart(
    limit: tuple[str, str, str], call: Callable[..., Ended]
) -> None:
    option, low, high = limit
    with chat_server(answers) as server:
        options = arguments(server, "--scenes-at-once=1")
        for _ in range(2):  # the second call counts the usage in the log, and sends nothing
            ended = call(simulate.main, *options, f"--judge.{option}={low}")
            assert ended.code == 2
            assert f"the limit of judge.{option} is reached" in ended.err
            kinds = Counter(asked(body)[0] for body in server.bodies)
            assert kinds["judge"] == 3
            assert sum(kinds.values()) > 9
        assert call(simulate.main, *options, f"--judge.{option}={high}", "--budget-tokens=2000").code == 2
        assert 17 <= len(server.bodies) <= 20, "the common limit counts all roles"
        assert call(simulate.main, *options, f"--judge.{option}={high}").code == 0
        assert max(Counter(server.asked).values()) == 1


def test_too_many_failed_sessions_stop_the_simulation(call: Callable[..., Ended]) -> None:
    with chat_server(lambda body, before: Reply("no", "stop")) as server:
        options = arguments(server, "--scenes-at-once=1", "--failures=1", scenes=5)
        ended = call(simulate.main, *options)
        assert ended.code == 2
        assert "more than 1 sessions failed, the last one: failed: environment, setup: answer" in ended.err
        assert len(server.bodies) == 6
    assert json.loads(Path("out/summary.json").read_text())["sessions"]["ends"] == {"failed": 2}


def test_a_prompt_file_is_sent_and_one_without_a_kind_is_refused(call: Callable[..., Ended]) -> None:
    mine = (PROMPTS / "judge.yaml").read_text().replace("You stand in for", "You are")
    Path("mine.yaml").write_text(mine)
    Path("bad.yaml").write_text("system: A\nquestions: {judged: B}\n")
    with chat_server(answers) as server:
        assert call(simulate.main, *arguments(server, "--judge.prompt=mine.yaml")).code == 0
        judged = [body for body in server.bodies if asked(body)[0] == "judge"]
        assert all(body["messages"][0]["content"].startswith("You are the person") for body in judged)
        ended = call(simulate.main, *arguments(server, "--judge.prompt=bad.yaml"))
        assert ended.code == 2
        assert "--judge.prompt: bad.yaml: expected the questions judge" in ended.err
        ended = call(simulate.main, "traces", f"--judge.url={server.url}")
        assert "--judge.model: an endpoint needs the model's name" in ended.err


def test_a_config_file_describes_a_simulation_and_is_stored_with_it(call: Callable[..., Ended]) -> None:
    with chat_server(answers) as server:
        arguments(server)
        more = "temperature: 0, extra: {max_tokens: 512}, price: {input: 2.5, output: 10}"
        role = f"{{url: {server.url}, model: m, {more}}}"
        lines = ["scenes: scenes.yaml", "trials: 2", *(f"{name}: {role}" for name in ROLE_NAMES)]
        Path("simulation.yaml").write_text("\n".join(lines))
        ended = call(simulate.main, "traces", "--config=simulation.yaml", "--output=out")
        assert (ended.code, ended.err) == (0, "")
        assert {(body["max_tokens"], body["temperature"]) for body in server.bodies} == {(512, 0.0)}
        number = len(server.bodies)
        assert call(simulate.main, "traces", "--config=out/config.yaml").code == 0
        assert len(server.bodies) == number
    assert len(list(Path("out/traces").iterdir())) == 4


def test_tokens_and_cost_of_more_events_are_estimated_from_the_log(call: Callable[..., Ended]) -> None:
    with chat_server(answers) as server:
        assert call(simulate.main, *arguments(server)).code == 0
    record = json.loads(Path("out/summary.json").read_text())
    events = sum(record["events"].values())
    found = estimate(record, 10 * events)
    assert found["total"]["prompt_tokens"] == pytest.approx(1000 * len(server.bodies))
    assert found["judge"]["cost"] == pytest.approx(10 * record["roles"]["judge"]["cost"])
    assert found["total"]["cost"] == pytest.approx(sum(found[role]["cost"] for role in ROLE_NAMES))
    ended = call(simulate.main, "rows", "out", f"--estimate={10 * events}")
    assert f"Estimate for {10 * events:,} events" in ended.out
    assert f"{1000 * len(server.bodies):,}" in ended.out
    assert call(simulate.main, "traces", "--output=scripted", "--quiet").code == 0
    assert "no tokens" in call(simulate.main, "rows", "scripted", "--estimate=6790").err
