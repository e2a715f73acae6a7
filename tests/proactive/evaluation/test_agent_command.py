"""`evaluate agent` from end to end: recorded traces and endpoints, every judge, the gate, kills and resumes."""

import csv
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.splits import split_by_scene
from models.judging.agents import GENERIC_PROPOSAL
from proactive import evaluate
from proactive.annotation.trace_reader import read_sources
from tests.chat_server import Body, ChatServer, Reply, chat_server
from tests.helpers import start
from tests.patience import HANG
from tests.proactive.conftest import Ended, FinishedRun

KEY = "sk-top-secret-9876"
HOSTILE = "<script>alert(1)</script> [bold red]x[/bold red] \x1b[31m"
QUICK = ["--endpoint.first_delay=0.01", "--endpoint.longest_delay=0.02", f"--endpoint.timeout={HANG}"]


def published_scores(folder: Path, files: list[str]) -> dict[str, float]:
    """The published arithmetic, written anew from its description: each proposal with its judgment is one count."""
    steps = [step for name in files for step in json.loads((folder / name).read_text())]
    pairs = [
        (response is not None, judgment)
        for step in steps
        if step.get("agent_response")
        for response, judgment in zip(step["agent_response"], step["judgement"], strict=False)
    ]
    tp, fp, tn, fn = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False)))
    tiny = 1e-8
    recall, precision = tp / (tp + fn + tiny), tp / (tp + fp + tiny)
    return {
        "Recall": recall,
        "Precision": precision,
        "Accuracy": (tp + tn) / (tp + fp + tn + fn + tiny),
        "False-Alarm": fp / (tp + fp + tiny),
        "F1-Score": 2 * precision * recall / (precision + recall + tiny),
        "Accept Rate": tp / (tp + fp + tiny),
        "Total Events": len(steps),
    }


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def counts(figures: dict[str, float]) -> tuple[int, ...]:
    return tuple(int(figures[name]) for name in ("tp", "fp", "tn", "fn"))


def check_outputs(folder: Path, splits: dict[str, list[str]], suffix: str = "") -> None:
    """figures.csv says what the published scoring finds in the judged traces, and so does metrics.json."""
    with (folder / f"figures{suffix}.csv").open(newline="") as file:
        rows = {row["Category"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(splits)
    for name, files in splits.items():
        expected = published_scores(folder / f"judged{suffix}", files)
        assert list(rows[name]) == ["Category", *expected]
        assert {column: float(rows[name][column]) for column in expected} == pytest.approx(expected, abs=1e-6)
        assert metrics(folder)["splits"][name]["figures"]["f1"] == pytest.approx(expected["F1-Score"], abs=1e-6)


def longest(rows: list[AnnotatedRow]) -> dict[str, AnnotatedRow]:
    """The row with the longest history of each scene."""
    return {row.scene: row for row in sorted(rows, key=lambda row: len(row.history))}


def write_traces(folder: Path, rows: list[AnnotatedRow], proposals: list[Any]) -> list[str]:
    """Recorded traces of these rows' histories, with proposals in turn."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        steps = [
            {
                "observation": event.model_dump(),
                "agent_response": proposals[place % len(proposals)],
                "task_status": False,
                "other_infomation": {"Purpose": f"purpose {place}", "Thoughts": HOSTILE, "Response": "r"},
            }
            for place, event in enumerate(row.history)
        ]
        (folder / f"trace_{number}.json").write_text(json.dumps(steps), encoding="utf-8")
    names = sorted(path.name for path in folder.glob("*.json"))
    splits = {"real": {"theme": "All", "files": names}, "first": {"files": names[:1]}, "gone": {"files": ["x.json"]}}
    (folder / "splits.json").write_text(json.dumps(splits))
    return names


PROPOSALS: list[Any] = [["Explain the error."], [], ["null"], [HOSTILE], [{"name": "open", "arguments": {"a": 1}}]]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded traces that no judge here was trained on: of the embedded data's last scenes."""
    folder = tmp_path_factory.mktemp("fresh") / "traces"
    write_traces(folder, list(longest(load_corpus("embedded").test).values())[:3], PROPOSALS)
    return folder


@pytest.fixture(scope="module")
def other_judge(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's export with other weights."""
    folder = tmp_path_factory.mktemp("other") / "export"
    shutil.copytree(finished_run.folder / "export", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: -weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def evaluated(call: Callable, *arguments: str | Path) -> Ended:
    ended = call(evaluate.main, "agent", *arguments)
    assert (ended.code, ended.err) == (0, ""), ended.err
    return ended


def test_recorded_traces_are_judged_by_a_classifier_and_then_by_its_recorded_judgments(
    fresh: Path, finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    ended = evaluated(call, "--agent.traces", fresh, "--judge.checkpoint", finished_run.folder, "--output=out")
    names = sorted(path.name for path in fresh.glob("trace_*.json"))
    folder, splits = tmp_path / "out", {"real": names, "first": names[:1]}
    check_outputs(folder, splits)
    record = metrics(folder)
    assert record["splits_left_out"] == ["gone"]
    assert "splits with missing traces: gone" in record["notes"]
    assert set(record["per_trace"]) == set(names)
    total = sum(len(json.loads((fresh / name).read_text())) for name in names)
    assert sum(counts(record["figures"])) == record["figures"]["events"] == total

    texts = sum(step["agent_response"] not in ([], ["null"]) for step in steps_of(fresh, names))
    assert counts(record["figures"])[0] + counts(record["figures"])[1] == texts
    always, never = record["baselines"]["always-propose"], record["baselines"]["never-propose"]
    assert counts(always)[2:] == counts(never)[:2] == (0, 0)
    assert counts(always)[0] >= counts(record["figures"])[0]

    for name in names:  # field for field what was recorded, with a judgment for each step
        for before, after in zip(steps_of(fresh, [name]), steps_of(folder / "judged", [name]), strict=True):
            assert list(after) == ["observation", "agent_response", "task_status", "judgement", "other_infomation"]
            for same in ("observation", "task_status", "other_infomation"):
                assert after[same] == before[same]
            assert after["agent_response"] == (
                [None] if before["agent_response"] in ([], ["null"]) else before["agent_response"]
            )
            assert [type(judgment) for judgment in after["judgement"]] == [bool]

    assert "Qwen2-7B-Proactive" not in ended.out, "figures of other traces"
    assert "\x1b" not in ended.out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace(str(fresh), "")  # nothing is loaded

    (source,) = read_sources([folder])  # the trace reader shows the same outcomes, with P(accepted)
    steps = [step for trace in source.traces for step in trace.steps]
    outcomes = Counter(step.outcome for step in steps)
    assert tuple(outcomes[name] for name in ("tp", "fp", "tn", "fn")) == counts(record["figures"])
    assert all(offer.probability is not None for step in steps for offer in step.offers)
    assert list(source.notes) == record["notes"]

    again = evaluated(call, "--agent.traces=out/judged", "--judge.recorded", "--output=again", "--quiet")
    assert again.out == ""
    found = metrics(tmp_path / "again")
    assert found["figures"] == record["figures"]
    assert found["baselines"] == {}
    assert published_scores(tmp_path / "again" / "judged", names) == published_scores(folder / "judged", names)


def steps_of(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    return [step for name in names for step in json.loads((folder / name).read_text())]


def test_a_contaminated_judge_is_refused_or_marked(finished_run: FinishedRun, call: Callable, tmp_path: Path) -> None:
    split = split_by_scene(load_corpus(str(finished_run.root)), 3, 0)
    trained, held_out = list(longest(split.train).values())[:1], list(longest(split.test).values())[:1]
    names = write_traces(tmp_path / "traces", [*trained, *held_out], PROPOSALS)
    judged = ("--agent.traces=traces", "--judge.checkpoint", finished_run.folder)
    ended = call(evaluate.main, "agent", *judged, "--output=out")
    assert ended.code == 2
    assert f"trained on 1 of the 2 traces to judge: {names[0]}" in ended.err
    assert not (tmp_path / "out").exists()

    ended = evaluated(call, *judged, "--output=out", "--contaminated")
    assert "CONTAMINATED: the judge was trained on 1 of the 2 traces" in " ".join(ended.out.split())
    assert metrics(tmp_path / "out")["judge_trained_on"] == names[:1]
    assert "CONTAMINATED: the judge" in (tmp_path / "out" / "report.html").read_text()
    check_outputs(tmp_path / "out", {"real": names, "first": names[:1]}, "-contaminated")


def test_contamination_is_found_by_the_roots_trace_of_the_same_name(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    """A cut whose first event was changed is known by its name."""
    split = split_by_scene(load_corpus(str(finished_run.root)), 3, 0)
    row = next(iter(longest(split.train).values()))
    root = tmp_path / "root"
    shutil.copytree(finished_run.root, root)
    (root / "test_data").mkdir()
    steps = [
        {"observation": event.model_dump(), "agent_response": {"candidate_task": []}, "task_status": False}
        for event in row.history
    ]
    (root / "test_data" / "trace_0.json").write_text(json.dumps(steps))
    write_traces(tmp_path / "traces", [row], PROPOSALS)
    content = json.loads((tmp_path / "traces" / "trace_0.json").read_text())
    content[0]["observation"]["event"] += " (another cut)"
    (tmp_path / "traces" / "trace_0.json").write_text(json.dumps(content))
    old = tmp_path / "old"
    shutil.copytree(finished_run.folder / "export", old)
    state = json.loads((old / "proactive.json").read_text())
    assert row.scene in state["data"].pop("training_scenes")
    (old / "proactive.json").write_text(json.dumps(state))
    said = [
        call(evaluate.main, "agent", "--agent.traces=traces", "--judge.checkpoint", judge, f"--data.root={root}").err
        for judge in (finished_run.folder, old)
    ]
    assert "trained on 1 of the 1 traces" in said[0]
    assert "field data.training_scenes" in said[1], "what does not say what it was trained on is not taken for clean"


def test_results_validated_on_are_marked_and_judges_that_saw_less_are_preferred(
    finished_run: FinishedRun, other_judge: Path, call: Callable, tmp_path: Path
) -> None:
    """Judge and gate; `other` says that it validated on the test rows, and `old` does not say on what."""
    split = split_by_scene(load_corpus(str(finished_run.root)), 3, 0)
    validated, tested = (next(iter(longest(rows).values())) for rows in (split.validation, split.test))
    names = write_traces(tmp_path / "traces", [validated, tested], PROPOSALS)
    other, old = tmp_path / "other", tmp_path / "old"
    for folder in (other, old):
        shutil.copytree(other_judge, folder)
        content = json.loads((folder / "proactive.json").read_text())
        data = {name: value for name, value in content["data"].items() if not name.startswith("validation_")}
        if folder == other:
            data |= {"validation_scenes": [tested.scene], "validation_histories": []}
        (folder / "proactive.json").write_text(json.dumps(content | {"data": data}))
    mine = finished_run.folder / "export"

    ended = evaluated(call, "--agent.traces=traces", "--judge.checkpoint", mine, "--output=alone")
    record = metrics(tmp_path / "alone")
    assert (record["judge_trained_on"], record["judge_validated_on"]) == ([], names[:1])
    assert "VALIDATED ON: 1 of the 2 traces chose the best weights of the judge" in " ".join(ended.out.split())
    assert "VALIDATED ON: 1 of the 2 traces" in (tmp_path / "alone" / "report.html").read_text()
    check_outputs(tmp_path / "alone", {"real": names, "first": names[:1]}, "-validated-on")

    both = ("--judge.checkpoint", mine, other, "--gate", mine, other, "--output=both")
    evaluated(call, "--agent.traces=traces", *both)
    record = metrics(tmp_path / "both")
    assert record["judge"]["weights"] == {names[0]: str(other), names[1]: str(mine)}
    assert record["gate"]["weights"] == {names[0]: str(mine), names[1]: str(other)}
    assert (record["judge_validated_on"], record["gate_validated_on"]) == ([], names)

    evaluated(call, "--agent.traces=traces", "--judge.checkpoint", mine, old, "--output=old-one")
    record = metrics(tmp_path / "old-one")
    assert record["judge"]["weights"] == {names[0]: str(old), names[1]: str(mine)}
    assert (record["judge_validated_on"], record["judge_validation_unknown"]) == ([], names[:1])
    assert (tmp_path / "old-one" / "judged-validation-unknown").is_dir()


def test_each_trace_gets_a_judge_that_did_not_train_on_it(
    finished_run: FinishedRun, other_judge: Path, call: Callable, tmp_path: Path
) -> None:
    """The other one says that it was trained on the held-out scenes."""
    split = split_by_scene(load_corpus(str(finished_run.root)), 3, 0)
    trained, held_out = (next(iter(longest(rows).values())) for rows in (split.train, split.test))
    names = write_traces(tmp_path / "traces", [trained, held_out], PROPOSALS)
    folder = tmp_path / "other"
    shutil.copytree(other_judge, folder)
    state = json.loads((folder / "proactive.json").read_text())
    state["data"] |= {"training_scenes": [held_out.scene], "training_histories": [held_out.history_digest]}
    (folder / "proactive.json").write_text(json.dumps(state))
    mine = finished_run.folder / "export"
    evaluated(call, "--agent.traces=traces", "--judge.checkpoint", mine, folder, "--output=out")
    record = metrics(tmp_path / "out")
    assert record["judge"]["weights"] == {names[0]: str(folder), names[1]: str(mine)}
    assert record["judge_trained_on"] == []


def test_a_higher_cost_ratio_holds_back_more_proposals(
    fresh: Path, finished_run: FinishedRun, other_judge: Path, call: Callable, tmp_path: Path
) -> None:
    judged = ("--agent.traces", fresh, "--judge.checkpoint", finished_run.folder / "export", "--gate", other_judge)
    found = {}
    for ratio in ("0", "1e9"):
        evaluated(call, *judged, "--cost-ratio", ratio, f"--output=out{ratio}")
        found[ratio] = metrics(tmp_path / f"out{ratio}")
        names = sorted(path.name for path in fresh.glob("trace_*.json"))
        check_outputs(tmp_path / f"out{ratio}", {"real": names, "first": names[:1]})
    nothing, everything = found["0"], found["1e9"]
    assert nothing["gate"]["held_back"] == 0
    assert nothing["figures"] == nothing["gate"]["without_gate"] == everything["gate"]["without_gate"]
    assert counts(everything["figures"]) == counts(everything["baselines"]["never-propose"])
    curve = everything["gate"]["curve"]
    assert counts(curve[0]) == counts(nothing["figures"])
    assert counts(curve[-1]) == counts(everything["figures"])
    page = (tmp_path / "out1e9" / "report.html").read_text()
    assert "Trade-off of the gate" in page
    assert "held back; silence" in page


def test_the_gate_must_not_be_the_judge(fresh: Path, finished_run: FinishedRun, call: Callable, tmp_path: Path) -> None:
    """Also where the same weights come from a checkpoint and from an export."""
    judged = (
        *("--agent.traces", fresh, "--judge.checkpoint", finished_run.folder / "export"),
        *("--gate", finished_run.folder / "checkpoints" / "best.ckpt", "--output=out"),
    )
    ended = call(evaluate.main, "agent", *judged)
    assert ended.code == 2
    assert "--gate: the weights that filter the offers of trace_0.json also judge them" in ended.err
    ended = evaluated(call, *judged, "--gate-is-judge")
    assert metrics(tmp_path / "out")["gate_is_judge"] is True
    assert "THE GATE IS THE JUDGE" in " ".join(ended.out.split())
    assert (tmp_path / "out" / "figures-gate-is-judge.csv").exists()


def question(body: Body) -> tuple[str, Any]:
    """Who is asked, and the last event or the proposal."""
    content = json.loads(body["messages"][1]["content"])
    return ("judge", content["proposal"]) if "proposal" in content else ("agent", content["events"][-1]["event"])


def plain_chat(body: Body, before: int) -> Reply:
    """An agent that proposes after every other kind of event, and a judge that likes some proposals."""
    who, what = question(body)
    if who == "agent":
        proposal = None if len(what) % 3 == 0 else f"Help with: {what}"
        return Reply(json.dumps({"thoughts": HOSTILE, "proposal": proposal, "response": "r"}))
    accepted = len(what or "") % 2 == 0
    return Reply(json.dumps({"thought": "because", "judgment": "accepted" if accepted else "rejected"}))


def both(chat: ChatServer, *more: str) -> list[str]:
    """An agent and a judge behind one server, on the embedded traces."""
    return [f"--agent.url={chat.url}", "--agent.model=a", f"--judge.url={chat.url}", "--judge.model=j", *QUICK, *more]


def by_hand() -> tuple[int, ...]:
    """What `plain_chat` comes to on the embedded traces."""
    found = dict.fromkeys(((True, True), (True, False), (False, True), (False, False)), 0)
    for steps in load_corpus("embedded").traces.values():
        for step in steps:
            proposal = None if len(step.observation.event) % 3 == 0 else f"Help with: {step.observation.event}"
            found[proposal is not None, len(proposal or "") % 2 == 0] += 1
    return tuple(found.values())


def test_an_evaluation_can_have_agent_and_judge_behind_endpoints(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def answer(body: Body, before: int) -> Reply:
        return (
            Reply(status=503, body=KEY.encode())
            if len(body["messages"][1]["content"]) % 5 == 0 and not before
            else plain_chat(body, before)
        )

    with chat_server(answer) as chat:
        keys = ("--agent.key_variable=MY_KEY", "--judge.key_variable=MY_KEY")
        ended = evaluated(call, *both(chat, *keys), "--output=out")
        assert set(chat.keys) == {f"Bearer {KEY}"}
        asked = len(chat.bodies)
        evaluated(call, *both(chat, *keys), "--output=out")  # finished: nothing is asked
        assert len(chat.bodies) == asked
        refused = call(evaluate.main, "agent", *both(chat, *keys), "--output=out", "--seed=5")
        assert (refused.code, "was started with seed 0, and now it is 5" in refused.err) == (2, True)
    record = metrics(tmp_path / "out")
    assert counts(record["figures"]) == by_hand()
    assert record["agent"]["url"] == chat.url
    check_outputs(tmp_path / "out", {"all": sorted(record["per_trace"], key=list(record["per_trace"]).index)})
    everything = (
        ended.out
        + ended.err
        + "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*") if path.is_file())
    )
    assert KEY not in everything
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "because" in page


def test_unparsed_and_undecided_answers_are_reported(fresh: Path, call: Callable, tmp_path: Path) -> None:
    """An unreadable answer counts as null; a verdict that stays unreadable is no verdict, one that comes later is."""

    def answer(body: Body, before: int) -> Reply:
        who, what = question(body)
        if who == "agent":
            cut_off = Reply(json.dumps({"proposal": what}), finish_reason="length")
            unread = cut_off if len(what) % 4 == 1 else Reply("I would rather not say.")
            return unread if len(what) % 2 else Reply(json.dumps({"proposal": what}), finish_reason="stop")
        tries = body["seed"]
        if what is None:
            return Reply("rejected" if tries == 1 else "hm")
        return Reply("hm")

    with chat_server(answer) as chat:
        ended = evaluated(call, *both(chat, "--judge.attempts=2"), "--output=out")
        temperatures = {(body["seed"], body["temperature"]) for body in chat.bodies if question(body)[0] == "judge"}
    assert temperatures == {(0, 0.0), (1, 0.5)}
    figures = metrics(tmp_path / "out")["figures"]
    events = [step.observation.event for steps in load_corpus("embedded").traces.values() for step in steps]
    odd = sum(len(event) % 2 for event in events)
    assert figures["parse_failures"] == odd
    assert counts(figures) == (0, 0, 0, odd)
    assert figures["undecided"] == len(events) - odd
    said = " ".join(ended.out.split())
    assert f"{odd} answers could not be parsed and count as null" in said
    cut_off = sum(len(event) % 4 == 1 for event in events)
    assert metrics(tmp_path / "out")["unfinished"] == {"agent": {"length": cut_off}, "judge": {}}
    assert f"incomplete replies of the agent, which were not parsed: {cut_off} length" in said
    assert f"{len(events) - odd} events have no verdict" in said
    check_outputs(tmp_path / "out", {"all": list(metrics(tmp_path / "out")["per_trace"])})


def test_one_accepted_candidate_of_several_is_enough(call: Callable, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        who, what = question(body)
        if who == "agent":
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            return Reply(json.dumps({"proposal": f"candidate {body['seed'] - 3}"}), usage=usage)
        return Reply("accepted" if what == "candidate 1" else "rejected")

    with chat_server(answer) as chat:
        same = call(evaluate.main, "agent", *both(chat, "--candidates=3"))
        assert (same.code, "3 candidates at temperature 0 are equal" in same.err) == (2, True)
        asked = both(chat, "--candidates=3", "--temperature=0.7", "--seed=3", "--agent.price.output=2")
        ended = evaluated(call, *asked, "--output=out")
    record = metrics(tmp_path / "out")
    events = int(record["figures"]["events"])
    usage = record["usage"]["agent"]
    assert (usage["requests"], usage["prompt_tokens"], usage["completion_tokens"]) == (
        3 * events,
        30 * events,
        15 * events,
    )
    assert usage["cost"] == pytest.approx(2 * 15 * events / 1e6)
    assert (record["usage"]["judge"]["unreported"], "cost" in record["usage"]["judge"]) == (events * 3, False)
    assert {k: counts(found) for k, found in record["figures"]["at"].items()} == {
        "1": (0, events, 0, 0),
        "2": (events, 0, 0, 0),
        "3": (events, 0, 0, 0),
    }
    assert "pred@2" in ended.out
    check_outputs(tmp_path / "out", {"all": list(record["per_trace"])})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_evaluation_continues_and_repeats_no_request(number: int, call: Callable, tmp_path: Path) -> None:
    """As a process, stopped in the middle of the agent's answers; what was under way may be asked again."""
    concurrency = 4
    reached: list[Any] = []

    def answer(body: Body, before: int) -> Reply:
        if len(chat.bodies) > 30 and not reached:
            reached.append(True)
            process.send_signal(number)
        reply = plain_chat(body, before)
        reply.delay = 0.0 if before or len(chat.bodies) <= 30 else 0.2
        return reply

    with chat_server(answer) as chat:
        arguments = both(chat, f"--endpoint.concurrency={concurrency}")
        process = start("proactive.evaluate", "agent", *arguments, "--output=out", cwd=tmp_path)
        out, _ = process.communicate(timeout=HANG)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert reached
        first = chat.asked[:]
        kept = len((tmp_path / "out" / "answers.jsonl").read_bytes().splitlines()) - 1
        assert kept > 0
        if number != signal.SIGKILL:
            assert "stopped; to resume:" in out
            assert "--output=out" in out
        chat.answer = plain_chat
        with (tmp_path / "out" / "answers.jsonl").open("ab") as file:
            file.write(b'{"key": "cut sh')  # as a kill in the middle of a line leaves it
        evaluated(call, *arguments, "--output=out", "--quiet")
    again = [body for body in first if chat.asked.count(body) > 1]
    assert len(again) <= concurrency
    assert len(first) - len(again) <= kept
    assert counts(metrics(tmp_path / "out")["figures"]) == by_hand()


def test_a_failing_endpoint_stops_the_evaluation_and_keeps_answers(call: Callable, tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        return Reply(status=500, body=b"no") if len(chat.bodies) > 20 else plain_chat(body, before)

    with chat_server(answer) as chat:
        options = both(chat, "--endpoint.retries=1", "--endpoint.concurrency=1")
        ended = call(evaluate.main, "agent", *options)
        assert ended.code == 2
        assert ", event " in ended.err
        assert "failed 2 times, the last time with: 500" in ended.err
        assert "--output runs/evaluate/0" in ended.err
        asked = len(chat.bodies)
        chat.answer = plain_chat
        evaluated(call, *options, "--output=runs/evaluate/0")
    assert len({*chat.asked}) == len(chat.bodies) - 2  # the one that failed twice came a third time
    assert asked == 22
    assert counts(metrics(tmp_path / "runs" / "evaluate" / "0")["figures"]) == by_hand()


def test_a_refused_evaluation_leaves_no_folder(call: Callable, tmp_path: Path) -> None:
    with chat_server(lambda body, before: Reply(status=401, body=b"who are you?")) as chat:
        for output in ([], ["--output=out"], ["--output=out", "--agent.model=another"]):
            ended = call(evaluate.main, "agent", *both(chat), *output)
            assert (ended.code, "refuses: 401" in ended.err) == (2, True)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("baseline", ["always-propose", "never-propose"])
def test_a_baseline_can_be_the_agent(baseline: str, call: Callable, tmp_path: Path) -> None:
    with chat_server(plain_chat) as chat:
        judge = (f"--judge.url={chat.url}", "--judge.model=j", *QUICK)
        evaluated(call, f"--agent.baseline={baseline}", *judge, "--output=out", "--quiet")
        proposals = {question(body)[1] for body in chat.bodies}
    assert proposals == ({GENERIC_PROPOSAL} if baseline == "always-propose" else {None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "agent: expected one of --agent.checkpoint, --agent.traces, --agent.url, --agent.baseline, got none"),
        (["--agent.traces=t", "--agent.url=http://x"], "got --agent.traces and --agent.url"),
        (["--agent.traces=t"], "judge: expected one of --judge.checkpoint, --judge.url, --judge.recorded, got none"),
        (["--agent.url=http://x", "--judge.recorded"], "only recorded traces have judgments"),
        (["--agent.traces=t", "--judge.recorded", "--gate=g"], "--gate: recorded judgments have no verdict on null"),
        (["--agent.traces=t", "--judge.recorded", "--cost-ratio=1"], "--cost-ratio: there is no gate"),
        (["--agent.traces=t", "--judge.recorded", "--candidates=0"], "candidates: expected 1 or more"),
        (["--agent.traces=t", "--judge.recorded"], "t holds no recorded traces"),
        (["--agent.url=http://x", "--judge.url=http://x"], "--agent.model: an endpoint needs the model's name"),
        (["--agent.baseline=never-propose", "--judge.url=http://x"], "--judge.model: an endpoint needs"),
        (["--agent.baseline=never-propose", "--judge.checkpoint=none"], "--judge.checkpoint: there is no none"),
        (["--agent.baseline=sometimes", "--judge.recorded"], "sometimes"),
    ],
    ids=str,
)
def test_contradictory_options_are_refused(arguments: list[str], message: str, call: Callable, tmp_path: Path) -> None:
    ended = call(evaluate.main, "agent", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not list(tmp_path.iterdir())


def test_traces_without_judgments_and_folders_of_other_things_are_refused(
    fresh: Path, call: Callable, tmp_path: Path
) -> None:
    ended = call(evaluate.main, "agent", "--agent.traces", fresh, "--judge.recorded")
    assert "contains no judgments" in ended.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.json").write_text("{}")
    with chat_server(plain_chat) as chat:
        ended = call(evaluate.main, "agent", *both(chat), "--output=full")
        assert "holds other things than `evaluate` wrote" in ended.err
        assert not chat.bodies
