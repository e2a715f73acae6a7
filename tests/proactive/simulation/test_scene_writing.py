"""`simulate scenes`: scenes by the scripted writer and by a model behind a real server, and the files of both."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proactive import simulate
from proactive.simulation.contamination import events_of_test_traces
from proactive.simulation.endpoint_roles import PROMPTS
from proactive.simulation.scenes import read_scenes
from proactive.simulation.seed_tasks import embedded_seeds
from tests.chat_server import Body, ChatServer, Reply, chat_server
from tests.patience import HANG
from tests.proactive.conftest import Ended
from tests.proactive.simulation.killed import contents, killed, lines_of

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}
QUICK = ["--endpoint.first_delay=0.01", "--endpoint.longest_delay=0.02", f"--endpoint.timeout={HANG}"]


def facts_of(body: Body) -> dict[str, Any]:
    return json.loads(body["messages"][1]["content"].splitlines()[-1])


def scene_of(body: Body) -> dict[str, Any]:
    """A valid answer that depends on the question only."""
    facts = facts_of(body)
    return {
        "environment": {
            "description": f"A room for {facts['kind']}.",
            "entities": ["a lamp", "a desk"],
            "agent_ops": ["light(lamp)"],
            "events_example": ["The user lights the lamp."],
            "theme": facts["kind"],
        },
        "user": {"description": "Ada, 30, an engineer.", "goal": facts["task"]},
    }


def answers(body: Body, before: int) -> Reply:
    return Reply(json.dumps(scene_of(body)), "stop", usage=USAGE)


def arguments(server: ChatServer, *more: str) -> list[str]:
    writer = [f"--writer.url={server.url}", "--writer.model=m", "--writer.price={input: 1.0, output: 20.0}"]
    return ["scenes", "--output=out", *writer, *QUICK, *more]


def record() -> dict[str, Any]:
    return json.loads(Path("out/summary.json").read_text())


def without_seconds(folder: Path) -> dict[str, Any]:
    """The content of all files, without the seconds of requests."""
    found: dict[str, Any] = contents(folder)
    entries = [json.loads(line) for line in found.pop("log.jsonl").splitlines()]
    summary = json.loads(found.pop("summary.json"))
    found.pop("report.html")
    for entry in [*entries, summary["roles"]["writer"]]:
        entry.pop("seconds", None)
    return {**found, "log": entries, "summary": summary}


def test_without_options_scripted_scenes_are_written_that_scripted_roles_can_simulate(
    call: Callable[..., Ended],
) -> None:
    ended = call(simulate.main, "scenes")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == "scenes.yaml and report.html are in runs/scenes/0"
    scenes = read_scenes(Path("runs/scenes/0"))
    assert len({scene.user.goal for scene in scenes}) == len(scenes) == 12
    tested = events_of_test_traces("embedded")
    found = json.loads(Path("runs/scenes/0/summary.json").read_text())
    samples = [event for seed in embedded_seeds().values() for event in seed.sample_events]
    counts = found["contamination"]["sample_events_of_test_traces"]
    assert sum(counts.values()) == sum(event in tested for event in samples) > 0
    assert not any(event in tested for scene in scenes for event in scene.environment.events_example)
    ended = call(simulate.main, "traces", "--scenes=runs/scenes/0", "--output=traces", "--max_acts=4")
    assert (ended.code, ended.err) == (0, "")
    text = Path("traces/reward_data/train_data.jsonl").read_text()
    assert "parse_rows.py" in text
    assert len(list(Path("traces/traces").iterdir())) == 12
    assert call(simulate.main, "scenes", "--quiet").out == ""
    assert contents(Path("runs/scenes/1")) == contents(Path("runs/scenes/0"))


def test_a_scripted_scene_of_any_task_names_the_task_and_a_file(call: Callable[..., Ended]) -> None:
    seeds = {"coding things": {"tasks": ["Sort a list."]}, "gardening": {"tasks": ["Water " + "all plants " * 50, "!"]}}
    Path("seeds.yaml").write_text(yaml.safe_dump(seeds))
    ended = call(simulate.main, "scenes", "--seeds=seeds.yaml", "--output=out")
    assert (ended.code, ended.err) == (0, "")
    scenes = read_scenes(Path("out"))
    assert [scene.environment.entities[:2] for scene in scenes[:1]] == [["the task “Sort a list”", "sort_a_list.txt"]]
    assert scenes[0].environment.theme == "coding"
    assert scenes[1].environment.entities[1] == "water_all_plants.txt"
    assert len(scenes[1].environment.entities[0]) < 100
    assert scenes[2].environment.entities[1] == "task.txt"
    assert call(simulate.main, "traces", "--scenes=out", "--output=traces").code == 0


def test_a_scene_depends_neither_on_the_number_of_scenes_nor_on_concurrency(call: Callable[..., Ended]) -> None:
    assert call(simulate.main, "scenes", "--output=all").code == 0
    assert call(simulate.main, "scenes", "--output=one", "--scenes-at-once=1").code == 0
    assert contents(Path("all")) == contents(Path("one"))
    assert call(simulate.main, "scenes", "--output=few", "--count=5").code == 0
    assert read_scenes(Path("few")) == read_scenes(Path("all"))[:5]
    assert call(simulate.main, "scenes", "--output=other", "--count=5", "--seed=1").code == 0
    assert read_scenes(Path("other")) != read_scenes(Path("few"))


def test_a_task_that_is_used_again_gives_a_near_duplicate_which_is_counted_and_named(
    call: Callable[..., Ended],
) -> None:
    Path("seeds.yaml").write_text("coding: {tasks: [Sort a list.]}")
    ended = call(simulate.main, "scenes", "--seeds=seeds.yaml", "--output=out", "--count=7")
    assert ended.code == 0
    scenes = read_scenes(Path("out"))
    distinct = {frozenset(scene.environment.entities) for scene in scenes}
    duplicates = record()["near_duplicates"]
    assert len(duplicates) == 7 - len(distinct) >= 4
    assert all(earlier < later for later, earlier in duplicates.items())
    assert re.search(rf"near-duplicate scenes +│ +{len(duplicates)} │", ended.out)
    assert all(f"<td>{name}</td>" in Path("out/report.html").read_text() for name in duplicates)


def test_a_model_writes_scenes(call: Callable[..., Ended]) -> None:
    with chat_server(answers) as server:
        ended = call(simulate.main, *arguments(server, "--count=13"))
    assert (ended.code, ended.err) == (0, "")
    assert max(Counter(server.asked).values()) == 1
    assert len({body["seed"] for body in server.bodies}) == 13
    scenes = read_scenes(Path("out"))
    tasks = [task for seed in embedded_seeds().values() for task in seed.tasks]
    assert Counter(scene.user.goal for scene in scenes) == Counter([*tasks, tasks[0]])
    tested = events_of_test_traces("embedded")
    for body in server.bodies:
        facts = facts_of(body)
        assert len(set(facts["sample_events"])) == 10
        assert not tested & set(facts["sample_events"])
        schema = body["response_format"]["json_schema"]
        assert schema["name"] == "scene"
        assert set(schema["schema"]["properties"]) == {"environment", "user"}
        for part in schema["schema"]["$defs"].values():
            assert set(part["required"]) == set(part["properties"])
            assert part["additionalProperties"] is False
    writer = record()["roles"]["writer"]
    assert (writer["answers"], writer["prompt_tokens"], writer["completion_tokens"]) == (13, 1300, 130)
    assert writer["cost"] == pytest.approx(13 * 300 / 1e6)
    questions = [entry["question"] for entry in lines_of(Path("out/log.jsonl"))[1:] if entry["kind"] == "scene"]
    assert sorted(map(str, questions)) == sorted(str(facts_of(body)) for body in server.bodies)


@pytest.mark.parametrize(
    ("kind", "number"),
    [("line", 1), ("line", 2), ("line", 3), ("line", 9), ("line", 14), ("line", 28),
     ("before", 1), ("after", 2), ("before", 3), ("after", 4)],
)  # fmt: skip
def test_writing_that_is_killed_anywhere_repeats_no_request_and_writes_the_same_files(
    kind: str, number: int, call: Callable[..., Ended], tmp_path: Path
) -> None:
    def sometimes_invalid(body: Body, before: int) -> Reply:
        if facts_of(body)["kind"] == "daily" and len(body["messages"]) == 2:
            return Reply('{"environment": {}}', "stop", usage=USAGE)
        return answers(body, before)

    with chat_server(sometimes_invalid) as server:
        options = arguments(server, "--scenes-at-once=1")
        assert call(simulate.main, *options).code == 0
        undisturbed, expected = without_seconds(tmp_path / "out"), sorted(server.asked)
        (tmp_path / "out").rename(tmp_path / "first")
        server.asked.clear()
        killed(kind, number, *options, cwd=tmp_path)
        assert call(simulate.main, *options).code == 0
    assert sorted(server.asked) == expected
    assert without_seconds(tmp_path / "out") == undisturbed
    assert undisturbed["summary"]["roles"]["writer"]["asked_again"] == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scene: "I cannot.", "writer, scene: answer: expected JSON"),
        (lambda scene: {**scene, "user": {"goal": "x"}}, "answer, field user.description: Field required"),
        (lambda scene: {**scene, "more": 1}, "answer, field more"),
        (
            lambda scene: {**scene, "environment": {**scene["environment"], "entities": []}},
            "answer, field environment.entities: List should have at least 1 item",
        ),
        (
            lambda scene: {**scene, "environment": {**scene["environment"], "events_example": ["x" * 100_000]}},
            "answer, field environment.events_example[0]: expected at most 2000 characters, got 100000",
        ),
        (
            lambda scene: {**scene, "environment": {**scene["environment"], "events_example": ["A.", "B.", "A."]}},
            "answer, field environment.events_example: expected different texts, got A. twice",
        ),
        (
            lambda scene: {**scene, "environment": {**scene["environment"], "agent_ops": list(map(str, range(51)))}},
            "answer, field environment.agent_ops: List should have at most 50 items",
        ),
        (
            lambda scene: {**scene, "environment": {**scene["environment"], "agent_ops": [{"action": "x"}]}},
            "answer, field environment.agent_ops[0]",
        ),
    ],
)
def test_an_invalid_scene_is_sent_back_twice_and_then_fails_alone(
    change: Callable[[dict[str, Any]], Any], said: str, call: Callable[..., Ended]
) -> None:
    task = "Finish the login form."

    def invalid(body: Body, before: int) -> Reply:
        if facts_of(body)["task"] != task:
            return answers(body, before)
        changed = change(scene_of(body))
        return Reply(changed if isinstance(changed, str) else json.dumps(changed), "stop")

    with chat_server(invalid) as server:
        ended = call(simulate.main, *arguments(server))
        assert (ended.code, ended.err) == (0, "")
        repeated = [body for body in server.bodies if facts_of(body)["task"] == task]
        assert [len(body["messages"]) for body in repeated] == [2, 4, 6]
        number = len(server.bodies)
        assert call(simulate.main, *arguments(server)).code == 0
        assert len(server.bodies) == number  # a failed scene is not repeated
    found = record()["scenes"]
    assert found["ends"] == {"failed": 1, "written": 11}
    assert found["failures"] == {"writer, scene": 1}
    assert said in found["failed"]["scene_004"]
    assert "writer, scene" in Path("out/report.html").read_text()
    assert task not in {scene.user.goal for scene in read_scenes(Path("out"))}


def test_too_many_failed_scenes_stop_the_others_and_no_scene_leaves_no_scenes_file(call: Callable[..., Ended]) -> None:
    with chat_server(lambda body, before: Reply("no", "stop")) as server:
        ended = call(simulate.main, *arguments(server, "--scenes-at-once=1", "--failures=1"))
        assert ended.code == 2
        assert "more than 1 scenes failed, the last one: failed: writer, scene: answer" in ended.err
        assert len(server.bodies) == 6
    assert record()["scenes"]["ends"] == {"failed": 2}
    assert not Path("out/scenes.yaml").exists()
    ended = call(simulate.main, "traces", "--scenes=out")
    assert ended.code == 2
    assert ended.err.startswith("error: --scenes: out/scenes.yaml: No such file or directory\n")


def test_a_refused_request_stops_one_scene_and_a_limit_stops_all_and_the_same_command_continues(
    call: Callable[..., Ended], tmp_path: Path
) -> None:
    broken = True

    def refuses(body: Body, before: int) -> Reply:
        if broken and facts_of(body)["task"] == "Finish the login form.":
            return Reply(status=400, body=b'{"error": {"message": "too long for this model"}}')
        return answers(body, before)

    with chat_server(refuses) as server:
        ended = call(simulate.main, *arguments(server, "--scenes-at-once=1", "--budget-tokens=1000"))
        assert ended.code == 2
        assert "the limit of budget-tokens is reached" in ended.err or "too long for this model" in ended.err
        assert len(read_scenes(Path("out"))) == 10  # of 110 tokens each
        ended = call(simulate.main, *arguments(server))
        assert (ended.code, len(read_scenes(Path("out")))) == (2, 11)
        assert "too long for this model" in ended.err
        assert ended.err.rstrip().endswith("To continue, give the same options with --output out.")
        broken = False
        assert call(simulate.main, *arguments(server)).code == 0
        Path("out").rename("first")
        assert call(simulate.main, *arguments(server)).code == 0
    found, expected = without_seconds(tmp_path / "first"), without_seconds(tmp_path / "out")
    assert found["scenes.yaml"] == expected["scenes.yaml"]
    assert found["summary"] == expected["summary"]


def test_a_prompt_file_is_sent_and_a_config_file_describes_the_writer(call: Callable[..., Ended]) -> None:
    Path("mine.yaml").write_text((PROMPTS / "writer.yaml").read_text().replace("You write", "You invent"))
    with chat_server(answers) as server:
        writer = f"{{url: {server.url}, model: m, temperature: 1, extra: {{max_tokens: 900}}, prompt: mine.yaml}}"
        Path("scenes.config.yaml").write_text(f"count: 3\nwriter: {writer}\n")
        ended = call(simulate.main, "scenes", "--config=scenes.config.yaml", "--output=out")
        assert (ended.code, ended.err) == (0, "")
        assert {(body["max_tokens"], body["temperature"]) for body in server.bodies} == {(900, 1.0)}
        assert all(body["messages"][0]["content"].startswith("You invent") for body in server.bodies)
        number = len(server.bodies)
        assert call(simulate.main, "scenes", "--config=out/config.yaml").code == 0
        assert len(server.bodies) == number
        Path("bad.yaml").write_text("system: A\nquestions: {scenes: B}\n")
        ended = call(simulate.main, *arguments(server, "--writer.prompt=bad.yaml"))
        assert "--writer.prompt: bad.yaml: expected the questions scene" in ended.err


def test_contaminated_scenes_are_marked_and_traces_carry_the_mark_on(call: Callable[..., Ended]) -> None:
    tested = sorted(events_of_test_traces("embedded"))[:2]
    seeds = {
        "coding": {"tasks": ["Sort a list."], "sample_events": [tested[0], "The user waves."]},
        "daily": {"tasks": ["Cook."], "sample_events": ["The user yawns."]},
    }
    Path("seeds.yaml").write_text(yaml.safe_dump(seeds))

    def copies(body: Body, before: int) -> Reply:
        scene = scene_of(body)
        scene["environment"]["events_example"] = [tested[1], "The user nods."]
        return Reply(json.dumps(scene), "stop")

    with chat_server(copies) as server:
        assert call(simulate.main, *arguments(server, "--seeds=seeds.yaml")).code == 0
        assert tested[0] not in str([facts_of(body) for body in server.bodies])
        assert record()["contamination"] == {
            "root": "embedded",
            "sample_events": {"coding": 2, "daily": 1},
            "sample_events_of_test_traces": {"coding": 1, "daily": 0},
            "contaminated": False,
            "examples": 4,
            "examples_of_test_traces": 2,
        }
        assert "CONTAMINATED" not in Path("out/report.html").read_text()
        Path("out").rename("clean")
        ended = call(simulate.main, *arguments(server, "--seeds=seeds.yaml", "--contaminated"))
        assert "Scenes, CONTAMINATED" in ended.out
        assert tested[0] in str([facts_of(body) for body in server.bodies])
    assert record()["contamination"]["contaminated"]
    assert "CONTAMINATED" in Path("out/report.html").read_text()
    assert [scene.contaminated for scene in read_scenes(Path("out"))] == [True, False]

    Path("copied.yaml").write_bytes(Path("out/scenes.yaml").read_bytes())
    ended = call(simulate.main, "traces", "--scenes=copied.yaml", "--output=traces")
    assert "Simulation, CONTAMINATED" in ended.out
    assert "CONTAMINATED" in Path("traces/report.html").read_text()
    found = json.loads(Path("traces/summary.json").read_text())["contamination"]
    assert (found["contaminated"], found["contaminated_scenes"]) == (True, 1)
    assert [scene.contaminated for scene in read_scenes(Path("traces"))] == [True, False]
    assert call(simulate.main, "rows", "traces").code == 0
    assert "CONTAMINATED" in Path("traces/report.html").read_text()
    ended = call(simulate.main, "traces", "--scenes=clean", "--output=clean_traces")
    assert "CONTAMINATED" not in ended.out + Path("clean_traces/report.html").read_text()


def test_hostile_text_of_a_model_is_shown_as_text(call: Callable[..., Ended]) -> None:
    hostile = "<script>alert(1)</script>\x1b[31m"

    def attacks(body: Body, before: int) -> Reply:
        scene = scene_of(body)
        scene["environment"] |= {"theme": hostile, "entities": [hostile], "events_example": [hostile]}
        return Reply(json.dumps(scene), "stop")

    with chat_server(attacks) as server:
        ended = call(simulate.main, *arguments(server, "--count=1"))
    assert (ended.code, ended.err) == (0, "")
    page = Path("out/report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert read_scenes(Path("out"))[0].environment.theme == hostile


def test_a_folder_of_other_options_or_of_traces_is_refused(call: Callable[..., Ended], tmp_path: Path) -> None:
    assert call(simulate.main, "scenes", "--output=out").code == 0
    before = contents(tmp_path / "out")
    ended = call(simulate.main, "scenes", "--output=out", "--seed=1")
    assert (ended.code, ended.out) == (2, "")
    assert "was started with seed 0, and now it is 1" in ended.err
    ended = call(simulate.main, "traces", "--output=out")
    assert (ended.code, ended.out) == (2, "")
    assert "out/log.jsonl was started with command scenes, and now it is traces" in ended.err
    assert contents(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").touch()
    ended = call(simulate.main, "scenes", "--output=other")
    assert "other holds other things than `scenes` wrote" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds=nowhere.yaml"], "--seeds: nowhere.yaml: No such file or directory"),
        (["--seeds=."], "--seeds: .: is a folder"),
        (["--seeds=empty.yaml"], "--seeds: empty.yaml: expected a mapping of kinds to tasks"),
        (["--data.root=nowhere"], "nowhere"),
        (["--count=0"], "count"),
        (["--writer.url=http://127.0.0.1:1/v1"], "--writer.model: an endpoint needs the model's name"),
        (["--writer.model=m"], "--writer.model: only an endpoint uses it"),
        (["--judge.url=http://127.0.0.1:1/v1"], "judge.url"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, call: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "empty.yaml").touch()
    ended = call(simulate.main, "scenes", "--output=out", *arguments)
    assert (ended.code, ended.out) == (2, "")
    first, *rest = ended.err.splitlines()
    assert said in first
    assert len(rest) == 1
    assert not (tmp_path / "out").exists()
