"""Trained agents as `evaluate agent` asks them: each trace by weights that do not know it, nothing written twice."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.agent import AgentDataModule
from datamodules.answers import read_answer
from datamodules.errors import UserError
from datamodules.sources import load_corpus
from datamodules.traces import Trace, root_traces
from models.agent import ProactiveAgent
from models.agents import AnswerOptions, LocalAgent
from models.backbone import build_network
from models.endpoint import AnswerLog
from models.weights import Tie, Weights, assign
from tests.models.small import SMALL_LLAMA

AgentWeights = Weights[ProactiveAgent]


def weights_of(fold: int) -> AgentWeights:
    """Random weights, and what a run on one fold of the embedded data keeps."""
    data = AgentDataModule(fold=fold, vocabulary_size=400, max_length=400, cache=False)
    data.setup("test")
    torch.manual_seed(fold)
    model = ProactiveAgent(scratch=SMALL_LLAMA)
    model.network = build_network("language model", "scratch", data.tokenizer, SMALL_LLAMA)
    return Weights.of(model, data.state_dict(), f"fold {fold}")


@pytest.fixture(scope="module")
def folds() -> list[AgentWeights]:
    return [weights_of(fold) for fold in (0, 1)]


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return root_traces(load_corpus("embedded"))


@contextmanager
def count(label: str, total: int) -> Iterator[Callable[[], None]]:
    seen: list[None] = []
    yield lambda: seen.append(None)
    assert len(seen) == total, "progress reaches its end"


def agent_on(weights: list[AgentWeights], traces: list[Trace], **options: Any) -> tuple[LocalAgent, list[Trace]]:
    held_out = [trace for trace in traces if any(one.tie(trace, None) == Tie.NONE for one in weights)][:4]
    assigned, ties = assign(weights, held_out, {}, "--agent.checkpoint")
    assert set(ties.values()) == {Tie.NONE}
    return LocalAgent(assigned, AnswerOptions(max_new_tokens=24), **options), held_out


def test_each_trace_is_answered_by_weights_that_do_not_know_it(
    folds: list[AgentWeights], traces: list[Trace], tmp_path: Path
) -> None:
    agent, held_out = agent_on(folds, traces)
    log = AnswerLog(tmp_path / "log", agent.settings)
    answers = agent.answer(held_out, log, count)
    assert list(answers) == [trace.name for trace in held_out]
    for trace in held_out:
        assert agent.assigned[trace.name].tie(trace, None) == Tie.NONE
        assert [len(candidates) for candidates in answers[trace.name]] == [1] * len(trace.events)
        for step, (candidate,) in enumerate(answers[trace.name]):
            key = json.dumps((trace.name, step, 0))
            assert read_answer(log.texts[key]) is not None, "the grammar sees to it"
            assert candidate.parsed is (key not in log.unfinished), "what was cut off is no answer"
    assert set(log.unfinished.values()) == {"length"}, "random weights find no end"


def test_an_answer_is_the_networks_own_after_the_prompt_of_training(
    folds: list[AgentWeights], traces: list[Trace], tmp_path: Path
) -> None:
    """Greedy, without a grammar, against `generate` on the whole prompt."""
    agent, held_out = agent_on(folds[:1], traces)
    agent.options = AnswerOptions(max_new_tokens=12, constrained=False)
    log = AnswerLog(tmp_path / "log", agent.settings)
    agent.answer(held_out, log, count)
    data = AgentDataModule.from_state(folds[0].state)
    network = folds[0].model.network
    assert network is not None
    for step in (0, len(held_out[0].events) - 1):
        prompt = [t for segment in data.segments(held_out[0].history(step)) for t in segment] + data.opening()
        ids = network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=data.tokenizer.eos_token_id,
        )[0, len(prompt) :].tolist()
        expected = data.tokenizer.decode([i for i in ids if i != data.tokenizer.eos_token_id])
        assert log.texts[json.dumps((held_out[0].name, step, 0))] == expected


def test_what_is_in_the_log_is_not_written_again_and_the_rest_comes_out_the_same(
    folds: list[AgentWeights], traces: list[Trace], tmp_path: Path
) -> None:
    agent, held_out = agent_on(folds, traces, candidates=2, temperature=1.0, seed=3)
    whole = AnswerLog(tmp_path / "whole", agent.settings)
    expected = agent.answer(held_out, whole, count)
    whole.close()
    lines = (tmp_path / "whole").read_text().splitlines()
    (tmp_path / "part").write_text("\n".join(lines[: len(lines) // 2]) + '\n{"key": "cut o')
    part = AnswerLog(tmp_path / "part", agent.settings)
    before = len(part.texts)
    assert 0 < before < len(whole.texts)
    assert agent.answer(held_out, part, count) == expected
    assert part.texts == whole.texts
    assert part.unfinished == whole.unfinished
    part.close()
    assert len((tmp_path / "part").read_text().splitlines()) == len(lines), "each answer stands there once"
    texts = list(whole.texts.values())
    assert all(read_answer(text) is not None for text in texts)
    assert len(set(texts)) > len(texts) // 2, "candidates differ"


def test_settings_tell_every_option_that_changes_an_answer(folds: list[AgentWeights], traces: list[Trace]) -> None:
    agent, _ = agent_on(folds[:1], traces)
    for option, value in {"candidates": 3, "temperature": 0.5, "seed": 1, "options": AnswerOptions(7)}.items():
        other, _ = agent_on(folds[:1], traces)
        setattr(other, option, value)
        assert other.settings != agent.settings


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"traces_at_once": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected 1 or more"):
        AnswerOptions(**options)
