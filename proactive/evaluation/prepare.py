"""Prepares the `Evaluation` that the options of `evaluate agent` describe: loads models and data, and checks them."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.corpus.records import AnnotatedRow, scene_of
from datamodules.corpus.sources import SPLITS_FILE, Corpus
from datamodules.corpus.traces import Recorded, Trace, read_recorded, read_splits, root_traces
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import ChatPrompt
from models.judging.agents import Agent
from models.judging.answer_log import AnswerLog
from models.judging.budget import Budget
from models.judging.chat_client import ChatClient
from models.judging.judges import EndpointJudge, Judge, RecordedJudge, RewardJudge
from models.judging.weights import Exposure, Model, Weights, assign, load_weights, one_for_each
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.online.agent_classes import AGENTS
from proactive.agent_options import root_corpus, trained_agent, untrained_agent
from proactive.endpoints import endpoint_of
from proactive.evaluation.specification import Evaluation, Stamps

if TYPE_CHECKING:
    from jsonargparse import Namespace


def prepare(options: "Namespace") -> Evaluation:
    """Load models and data.

    Args:
        options: Checked by `refuse_mistakes`.

    Raises:
        UserError: A file is not valid, or a judge or gate trained on the traces.
    """
    recorded = read_recorded(options.agent.traces) if options.agent.traces else None
    agents = [load_weights(AGENTS, path, "--agent.checkpoint") for path in options.agent.checkpoint]
    judges = [load_weights((RewardClassifier,), path, "--judge.checkpoint") for path in options.judge.checkpoint]
    gates = [load_weights((RewardClassifier,), path, "--gate") for path in options.gate]
    states = [one.state for one in agents] + [one.state for one in (*judges, *gates)]
    corpus = root_corpus(options.data.root, states, needed=recorded is None)
    root_traces_by_name = {trace.name: trace for trace in root_traces(corpus)} if corpus else {}
    traces = recorded.traces if recorded else list(root_traces_by_name.values())
    _refuse_empty(traces, corpus)
    splits = read_splits(_splits_file(options.agent.traces, corpus), traces)
    answered = _answerable(agents, traces, options.contaminated) if agents else traces
    part = _Parts(options, answered, root_traces_by_name)
    agent_by_trace = part.trained_agents(agents) if agents else part.other_agents(recorded)
    judge_by_trace = part.classifiers(judges) if judges else part.other_judges(recorded)
    gate_by_trace = part.gates(gates, judge_by_trace) if gates else None
    left_out = [trace.name for trace in traces if trace not in answered]
    return Evaluation(
        traces=answered,
        splits=splits,
        agents=agent_by_trace,
        judges=judge_by_trace,
        gates=gate_by_trace,
        cost_ratio=1.0 if options.cost_ratio is None else options.cost_ratio,
        stamps=Stamps(part.exposures, left_out, part.gate_is_judge),
        people=_rows_of(answered, root_traces_by_name, corpus) if corpus else None,
        answers=part.answers,
        verdicts=part.verdicts,
        clients=part.clients,
    )


class _Parts:
    """Creates agents, judges and gates, and notes which traces they trained or validated on."""

    def __init__(self, options: "Namespace", traces: Sequence[Trace], root_traces_by_name: Mapping[str, Trace]) -> None:
        self.options = options
        self.traces = traces
        self.root_traces_by_name = root_traces_by_name
        self.deadline = time.monotonic() + options.endpoint.time_limit if options.endpoint.time_limit else None
        self.answers, self.verdicts = AnswerLog(), AnswerLog()
        self.budget = Budget(options.endpoint.token_limit, options.endpoint.cost_limit)
        self.clients: list[ChatClient] = []
        self.exposures: dict[str, dict[str, Exposure]] = {}
        self.gate_is_judge = False

    def trained_agents(self, weights: Sequence[Weights[ProactiveAgent]]) -> dict[str, Agent]:
        """A trained agent for each trace."""
        options = self.options
        assigned = self._assign("agent", weights, "--agent.checkpoint")

        def make(own: Weights[ProactiveAgent]) -> Agent:
            return trained_agent(own, options, options.candidates or 1, self.answers)

        return one_for_each(assigned, make)

    def other_agents(self, recorded: Recorded | None) -> dict[str, Agent]:
        """One agent for all traces."""
        options = self.options
        agent = untrained_agent(
            options, recorded, lambda: self._client("agent", options.temperature), options.candidates
        )
        return {trace.name: agent for trace in self.traces}

    def classifiers(self, weights: Sequence[Weights[RewardClassifier]]) -> dict[str, Judge]:
        """A reward classifier as judge for each trace."""
        return one_for_each(self._assign("judge", weights, "--judge.checkpoint"), RewardJudge)

    def gates(self, weights: Sequence[Weights[RewardClassifier]], judges: Mapping[str, Judge]) -> dict[str, Judge]:
        """A gate for each trace. Its weights differ from the judge's, unless --gate-is-judge allows the same."""
        judging = {name: one.weights.digest for name, one in judges.items() if isinstance(one, RewardJudge)}
        assigned = self._assign("gate", weights, "--gate", None if self.options.gate_is_judge else judging)
        self.gate_is_judge = any(judging.get(name) == one.digest for name, one in assigned.items())
        return one_for_each(assigned, partial(RewardJudge, progress_label="gating"))

    def other_judges(self, recorded: Recorded | None) -> dict[str, Judge]:
        """The recorded judgments of each trace, or one model at an endpoint for all."""
        options = self.options
        if recorded and options.judge.recorded:
            if not recorded.judgments:
                raise UserError(
                    f"--judge.recorded: {options.agent.traces} contains no judgments", "Give another judge."
                )
            by_trace: dict[str, dict[tuple[int, str | None], bool]] = {trace.name: {} for trace in self.traces}
            for (name, step, proposal), accepted in recorded.judgments.items():
                by_trace[name][step + 1, proposal] = accepted
            return {name: RecordedJudge(judgments) for name, judgments in by_trace.items()}
        prompt = ChatPrompt.read(options.judge.prompt, with_proposal=True)
        judge = EndpointJudge(self._client("judge", 0.0), prompt, options.judge.attempts)
        return {trace.name: judge for trace in self.traces}

    def _assign(
        self,
        role: str,
        weights: Sequence[Weights[Model]],
        option: str,
        but_not: Mapping[str, str] | None = None,
    ) -> dict[str, Weights[Model]]:
        assigned, self.exposures[role] = assign(
            weights, self.traces, self.root_traces_by_name, option, self.options.contaminated, but_not
        )
        return assigned

    def _client(self, role: str, temperature: float) -> ChatClient:
        """The client of an agent's or a judge's endpoint. `carry_out` opens it."""
        endpoint = endpoint_of(role, self.options, temperature, self.deadline)
        client = ChatClient(endpoint, self.answers if role == "agent" else self.verdicts, self.budget)
        self.clients.append(client)
        return client


def _answerable(weights: Sequence[Weights[ProactiveAgent]], traces: list[Trace], contaminated: bool) -> list[Trace]:
    """The traces without those that all weights trained on."""
    if contaminated:
        return traces
    answered = [trace for trace in traces if any(one.exposure(trace, None) != Exposure.TRAINED for one in weights)]
    if not answered:
        raise UserError(
            f"--agent.checkpoint: trained on all of the {len(traces)} traces of this evaluation",
            "Train it with --data.split published or on folds, or give --contaminated, which marks the result.",
        )
    return answered


def _rows_of(traces: Sequence[Trace], root_traces_by_name: Mapping[str, Trace], corpus: Corpus) -> list[AnnotatedRow]:
    """The annotated rows of the traces' scenes; all rows if these have none."""
    known = [*traces, *(root_traces_by_name[trace.name] for trace in traces if trace.name in root_traces_by_name)]
    scenes = {scene_of(trace.events) for trace in known}
    return [row for row in corpus.rows if row.scenes & scenes] or corpus.rows


def _splits_file(recorded: Path | None, corpus: Corpus | None) -> Path | None:
    beside = recorded / Path(SPLITS_FILE).name if recorded else None
    if beside and beside.exists():
        return beside
    return corpus.splits_file if corpus else None


def _refuse_empty(traces: Sequence[Trace], corpus: Corpus | None) -> None:
    if not traces:
        raise UserError(
            f"data.root: {corpus.root if corpus else None} has no test traces",
            "Give a folder with test_data/; docs/how-to/own-data.md shows the files of traces.",
        )
    if empty := [trace.name for trace in traces if not trace.events]:
        raise UserError(f"{empty[0]} contains no event", "Remove it from the folder, or add events.")
