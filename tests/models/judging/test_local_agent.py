"""Trained agents as `evaluate agent` asks them: each trace by weights that do not know it, nothing written twice."""

import asyncio
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.corpus.answers import read_answer
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import Trace, root_traces
from datamodules.errors import UserError
from models.judging.answer_log import AnswerLog
from models.judging.answer_options import AnswerOptions
from models.judging.description import group_traces, joint_settings
from models.judging.local_agent import LocalAgent, answer_key
from models.judging.weights import Exposure, Weights, assign, one_for_each
from models.learning.proactive_agent import ProactiveAgent
from models.networks.building import build_network
from tests.models.small import SMALL_LLAMA

AgentWeights = Weights[ProactiveAgent]


def weights_of(fold: int, scratch: dict[str, Any] = SMALL_LLAMA) -> AgentWeights:
    """Random weights, and what a run on one fold of the embedded data keeps."""
    data = AgentDataModule(fold=fold, vocabulary_size=400, max_length=400, cache=False)
    data.setup("test")
    torch.manual_seed(fold)
    model = ProactiveAgent(scratch=scratch)
    model.network = build_network(model.network_options, data.tokenizer)
    return Weights(model, data.state_dict(), f"fold {fold}")


@pytest.fixture(scope="module")
def folds() -> list[AgentWeights]:
    return [weights_of(fold) for fold in (0, 1)]


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return root_traces(load_corpus("embedded"))


def agents_on(
    weights: list[AgentWeights], traces: list[Trace], **options: Any
) -> tuple[dict[str, LocalAgent], list[Trace]]:
    """An agent for each of some traces that it does not know."""
    held_out = [trace for trace in traces if any(one.exposure(trace, None) == Exposure.NONE for one in weights)][:4]
    assigned, exposures = assign(weights, held_out, {}, "--agent.checkpoint")
    assert set(exposures.values()) == {Exposure.NONE}
    return one_for_each(assigned, partial(LocalAgent, **{"options": AnswerOptions(max_new_tokens=24), **options})), (
        held_out
    )


def answered(agents: dict[str, LocalAgent], traces: list[Trace]) -> dict[str, Any]:
    """What the agent of each trace answers, with progress that reaches its end."""
    found: dict[str, Any] = {}
    for agent, own in group_traces(agents, traces):
        counted: list[None] = []
        found |= asyncio.run(agent.answer(own, lambda counted=counted: counted.append(None)))
        assert len(counted) == agent.candidates * sum(len(trace.events) for trace in own)
    return found


def observed(agents: dict[str, LocalAgent], traces: list[Trace]) -> dict[str, Any]:
    """The same from sessions that are fed event by event, all at the same time."""

    async def observe() -> dict[str, Any]:
        sessions = {trace.name: agents[trace.name].session(trace.name) for trace in traces}
        found: dict[str, Any] = {trace.name: [] for trace in traces}
        for step in range(max(len(trace.events) for trace in traces)):
            for trace in traces:
                if step < len(trace.events):
                    found[trace.name].append(await sessions[trace.name].observe(trace.events[step]))
        return found

    return asyncio.run(observe())


def test_each_trace_is_answered_by_weights_that_have_not_seen_it(
    folds: list[AgentWeights], traces: list[Trace]
) -> None:
    log = AnswerLog()
    agents, held_out = agents_on(folds, traces, log=log)
    answers = answered(agents, held_out)
    assert set(answers) == {trace.name for trace in held_out}
    for trace in held_out:
        assert agents[trace.name].weights.exposure(trace, None) == Exposure.NONE
        assert [len(candidates) for candidates in answers[trace.name]] == [1] * len(trace.events)
        for step, (candidate,) in enumerate(answers[trace.name]):
            key = json.dumps((trace.name, step, 0))
            assert read_answer(log.texts[key]) is not None, "the grammar sees to it"
            assert candidate.parsed is (key not in log.unfinished), "what was cut off is no answer"
    assert set(log.unfinished.values()) == {"length"}, "random weights find no end"


@pytest.mark.parametrize("drawn", [{}, {"candidates": 3, "temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("tokens", [800, 250])  # of the longest row: whole histories, and their last events alone
def test_sessions_event_by_event_give_the_answers_of_whole_traces(
    folds: list[AgentWeights], traces: list[Trace], drawn: dict[str, Any], tokens: int
) -> None:
    short = [replace(one, state=_with_length(one.state, tokens)) for one in folds]
    agents, held_out = agents_on(short, traces, **drawn)
    answers = answered(agents, held_out)
    assert observed(agents, held_out) == answers
    alone = next(iter(agents.values()))
    assert observed({held_out[0].name: alone}, held_out[:1]) == {held_out[0].name: answers[held_out[0].name]}


@pytest.mark.parametrize("tokens", [800, 250])
def test_a_session_that_answers_after_some_events_only_gives_the_same_and_forgets_the_rest(
    folds: list[AgentWeights], traces: list[Trace], tokens: int
) -> None:
    agents, (trace, *_) = agents_on([replace(folds[0], state=_with_length(folds[0].state, tokens))], traces)
    long = replace(trace, events=trace.events * 80, task_status=trace.task_status * 80)
    agent = agents[trace.name]
    session, steps = agent.session(trace.name), range(5, len(long.events), 197)
    found = {}
    for step, event in enumerate(long.events):
        if step in steps:
            found[step] = asyncio.run(session.observe(event))
        else:
            session.note(event)
    log = AnswerLog()
    for step in set(range(len(long.events))) - set(steps):
        log.add(answer_key(trace.name, step, 0), "", "")
    agent.log = log
    answers = asyncio.run(agent.answer([long]))[trace.name]
    assert found == {step: answers[step] for step in steps}
    assert sum(map(bool, session._segments[1:])) <= agent.max_length < len(long.events)


def _with_length(state: dict[str, Any], tokens: int) -> dict[str, Any]:
    return state | {"hyperparameters": state["hyperparameters"] | {"max_length": tokens}}


def test_a_warm_up_changes_no_answer(folds: list[AgentWeights], traces: list[Trace]) -> None:
    drawn: dict[str, Any] = {"candidates": 2, "temperature": 1.0}
    agents, held_out = agents_on(folds[:1], traces, **drawn)
    expected = answered(agents, held_out[:1])
    warm, _ = agents_on(folds[:1], traces, **drawn)
    warm[held_out[0].name].warm_up()
    assert observed(warm, held_out[:1]) == expected


def test_a_session_reads_each_event_once(folds: list[AgentWeights], traces: list[Trace]) -> None:
    """The instructions, each event, and for each answer the generation prompt and its tokens but the last."""
    options = AnswerOptions(max_new_tokens=8, constrained=False)
    whole = replace(folds[0], state=_with_length(folds[0].state, 800))
    agents, (trace, *_) = agents_on([whole], traces, options=options)
    agent = agents[trace.name]
    assert agent.branched, "which is tried once"
    network, read = agent.network(), []
    handle = network.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    try:
        observed({trace.name: agent}, [trace])
    finally:
        handle.remove()
    data = agent.data
    trunk = sum(map(len, data.segments(trace.events)))
    answers = len(trace.events) * (
        len(data.generation_prompt()) + options.max_new_tokens - 1
    )  # random weights find no end
    assert sum(read) == trunk + answers


def test_an_answer_is_generated_after_the_prompt_of_training(folds: list[AgentWeights], traces: list[Trace]) -> None:
    """Greedy, without a grammar, against `generate` on the whole prompt."""
    log = AnswerLog()
    agents, held_out = agents_on(
        folds[:1], traces, options=AnswerOptions(max_new_tokens=12, constrained=False), log=log
    )
    answered(agents, held_out)
    data = AgentDataModule.from_state(folds[0].state)
    network = folds[0].model.network
    assert network is not None
    for step in (0, len(held_out[0].events) - 1):
        prompt = [t for segment in data.segments(held_out[0].history(step)) for t in segment] + data.generation_prompt()
        ids = network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=data.tokenizer.eos_token_id,
        )[0, len(prompt) :].tolist()
        expected = data.tokenizer.decode([i for i in ids if i != data.tokenizer.eos_token_id])
        assert log.texts[json.dumps((held_out[0].name, step, 0))] == expected


def test_logged_answers_are_not_generated_again_and_the_others_are_unchanged(
    folds: list[AgentWeights], traces: list[Trace], tmp_path: Path
) -> None:
    drawn: dict[str, Any] = {"candidates": 2, "temperature": 1.0, "seed": 3}
    whole, part = AnswerLog(), AnswerLog()
    agents, held_out = agents_on(folds, traces, **drawn, log=whole)
    with whole.opened(tmp_path / "whole", joint_settings(agents)):
        expected = answered(agents, held_out)
    lines = (tmp_path / "whole").read_text().splitlines()
    (tmp_path / "part").write_text("\n".join(lines[: len(lines) // 2]) + '\n{"key": "cut o')
    again, _ = agents_on(folds, traces, **drawn, log=part)
    with part.opened(tmp_path / "part", joint_settings(again)):
        before = len(part.texts)
        assert 0 < before < len(whole.texts)
        assert observed(again, held_out[:1]) == {held_out[0].name: expected[held_out[0].name]}
        assert answered(again, held_out) == expected
    assert part.texts == whole.texts
    assert part.unfinished == whole.unfinished
    assert len((tmp_path / "part").read_text().splitlines()) == len(lines), "each answer stands there once"
    texts = list(whole.texts.values())
    assert all(read_answer(text) is not None for text in texts)
    assert len(set(texts)) > len(texts) // 2, "candidates differ"


def test_settings_contain_every_option_that_changes_an_answer(folds: list[AgentWeights], traces: list[Trace]) -> None:
    agents, _ = agents_on(folds[:1], traces)
    for changed in (
        {"candidates": 3, "temperature": 0.5},
        {"temperature": 0.5},
        {"seed": 1},
        {"options": AnswerOptions(7)},
    ):
        other, _ = agents_on(folds[:1], traces, **changed)
        assert joint_settings(other) != joint_settings(agents)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"traces_at_once": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected 1 or more"):
        AnswerOptions(**options)
