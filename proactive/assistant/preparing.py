"""Turns the options of `proactive.live` into a session: checks everything and loads models."""

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import Recorded, Trace, read_recorded, root_traces
from datamodules.errors import UserError
from models.judging.agents import Agent, RecordedAgent
from models.judging.answer_log import AnswerLog
from models.judging.budget import Budget
from models.judging.chat_client import ChatClient
from models.judging.description import joint_settings
from models.judging.gate import gate_threshold
from models.judging.judges import RewardJudge
from models.judging.weights import Model, Tie, Weights, assign
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from proactive.agents import KINDS, load_weights, one_of, root_corpus, trained_agent, untrained_agent
from proactive.assistant.assistant import Parts
from proactive.assistant.clock import Clock, ReplayClock
from proactive.assistant.deciding import Policy
from proactive.assistant.gating import Gate, GateOptions
from proactive.assistant.notices import Notices, RecordedNotices
from proactive.assistant.observations import Source
from proactive.assistant.replayed import embedded_replay, read_replay, recorded_judgments
from proactive.assistant.terminal_notices import TerminalNotices
from proactive.assistant.trace_source import TraceSource
from proactive.endpoints import endpoint_of
from proactive.evaluation.judged_events import TRAINING_NOTES
from proactive.evaluation.specification import Stamps

if TYPE_CHECKING:
    from jsonargparse import Namespace

MOST_ANSWERS = 100  # of an endpoint, that are kept in memory
EMBEDDED = "embedded"


@dataclass
class Session:
    """A session, ready to run.

    Attributes:
        parts: What it consists of.
        settings: Everything that determines its decisions, as JSON.
        notes: What decides, and how much of the trace the models have seen; for the terminal.
        clients: Clients of endpoints.
    """

    parts: Parts
    settings: dict[str, Any]
    notes: list[str]
    clients: list[ChatClient] = field(default_factory=list)


class LatestAnswers(AnswerLog):
    """Keeps the latest answers only, so that a long session needs no more memory."""

    def _note(self, key: str, text: str, finish_reason: str | None) -> None:
        super()._note(key, text, finish_reason)
        while len(self.texts) > MOST_ANSWERS:
            oldest = next(iter(self.texts))
            del self.texts[oldest]
            self.unfinished.pop(oldest, None)


def prepare(options: "Namespace", default_gate: Callable[[], Path]) -> Session:
    """Check the options, and load the models.

    Args:
        options: All options of the command.
        default_gate: Returns the run of the gate if neither a source nor a gate is given.

    Raises:
        UserError: Options contradict each other, a file is not valid, a model is remote, or it trained on the trace.
    """
    own = not any(options.agent[kind] for kind in KINDS)
    _refuse_contradictions(options, own)
    paths = options.gate or ([default_gate()] if options.source is None else [])
    gates = [load_weights(RewardClassifier, path, "--gate") for path in paths]
    agents = [load_weights(ProactiveAgent, path, "--agent.checkpoint") for path in options.agent.checkpoint or ()]
    weights: list[Weights[Any]] = [*gates, *agents]
    recorded = _replay(options, weights)
    trace = recorded.traces[0]
    namesakes = _namesakes(options, weights, trace)
    ties: dict[str, dict[str, Tie]] = {}
    chosen = partial(_chosen, trace=trace, namesakes=namesakes, contaminated=options.contaminated, ties=ties)
    clients: list[ChatClient] = []
    if agents:
        agent: Agent = trained_agent(chosen("agent", agents, "--agent.checkpoint"), options)
    elif own:
        agent = RecordedAgent(recorded.answers, str(options.source or EMBEDDED), 1)
    else:
        others = _recorded_answers(options.agent.traces, trace) if options.agent.traces else None
        agent = untrained_agent(options, others, lambda: _client(options, clients), 1, options.latest_events)
    threshold = gate_threshold(1.0 if options.cost_ratio is None else options.cost_ratio)
    how = GateOptions(options.shadow, options.gate_fails_open, options.epsilon, options.seed)
    gate = Gate(RewardJudge(chosen("gate", gates, "--gate")), threshold, how, trace.name) if gates else None
    clock: Clock = ReplayClock(options.speed)
    source: Source = TraceSource(trace, clock)
    policy = Policy(**{one.name: options.policy[one.name] for one in fields(Policy)})
    parts = Parts(source, clock, agent, _notices(options, recorded), policy)
    if gate:
        gate.warm_up()
        parts = replace(parts, gating=gate.verdict, threshold=threshold, window=gate.window)
    stamps = Stamps(ties).record()
    settings = {
        **source.describe(),
        "name": source.name,
        **joint_settings({source.name: agent}),
        "gate": gate.describe() if gate else None,
        "policy": {one.name: getattr(policy, one.name) for one in fields(Policy)},
        "stamps": {name: bool(found) for name, found in stamps.items() if found},
    }
    return Session(parts, settings, [_decides(agent, gate, own), *_stamp_notes(stamps)], clients)


def _refuse_contradictions(options: "Namespace", own: bool) -> None:
    if not own:
        one_of(options.agent, "agent", KINDS)
    gated = bool(options.gate) or options.source is None
    for option, given in {
        "cost-ratio": options.cost_ratio is not None,
        "shadow": options.shadow,
        "gate-fails-open": options.gate_fails_open,
        "epsilon": options.epsilon > 0,
    }.items():
        if given and not gated:
            raise UserError(f"--{option}: there is no gate", "Give a reward classifier with --gate.")
    if options.agent.url and not options.allow_remote and not is_loopback(options.agent.url):
        raise UserError(
            f"--agent.url: {urlsplit(options.agent.url).hostname} is another machine, which would get all events",
            "Give --allow-remote to allow it, or a model on this machine.",
        )


def is_loopback(url: str) -> bool:
    """Return whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _replay(options: "Namespace", weights: list[Weights[Any]]) -> Recorded:
    """The trace of `--source`; without one, the embedded trace that the weights know least."""
    if options.source is not None:
        return read_replay(Path(options.source))
    corpus = load_corpus(EMBEDDED)
    traces = root_traces(corpus)
    least = min(traces, key=lambda trace: max((one.tie(trace, None) for one in weights), default=Tie.NONE))
    return embedded_replay(corpus, least)


def _namesakes(options: "Namespace", weights: list[Weights[Any]], trace: Trace) -> dict[str, Trace]:
    """The trace of the data root that has the same name, as in `evaluate agent`."""
    states = [one.state for one in weights]
    corpus = root_corpus(options.data.root, states, needed=False)
    return {one.name: one for one in root_traces(corpus)} if corpus else {}


def _chosen(
    role: str,
    weights: list[Weights[Model]],
    option: str,
    trace: Trace,
    namesakes: Mapping[str, Trace],
    contaminated: bool,
    ties: dict[str, dict[str, Tie]],
) -> Weights[Model]:
    """The weights with the weakest tie to the trace, by the rule of `evaluate agent`."""
    assigned, ties[role] = assign(weights, [trace], namesakes, option, contaminated)
    return assigned[trace.name]


def _recorded_answers(folder: Path, trace: Trace) -> Recorded:
    recorded = read_recorded(folder)
    same = [one for one in recorded.traces if one.name == trace.name]
    if not same or same[0].events != trace.events:
        raise UserError(
            f"--agent.traces: {folder} has no answers to {trace.name}", "Give a folder with a trace of the same events."
        )
    return recorded


def _client(options: "Namespace", clients: list[ChatClient]) -> ChatClient:
    budget = Budget(options.endpoint.token_limit, options.endpoint.cost_limit)
    client = ChatClient(endpoint_of("agent", options, options.temperature), LatestAnswers(), budget)
    clients.append(client)
    return client


def _notices(options: "Namespace", recorded: Recorded) -> Notices:
    match options.notify or "recorded":
        case "terminal":
            return TerminalNotices()
        case _:
            return RecordedNotices(recorded_judgments(recorded))


def _decides(agent: Agent, gate: Gate | None, own: bool) -> str:
    """One line: what makes offers, and what holds them back."""
    described = agent.describe()
    who = described.source or described.settings.get("source") or described.settings["agent"]
    offers = f"offers: recorded in the trace ({who})" if own else f"offers: {who}"
    if gate is None:
        return f"{offers}; no gate, so every offer may be shown"
    does = "is logged only" if gate.options.shadow else f"holds back below P(accepted) {gate.threshold:.2f}"
    return f"{offers}; gate: {gate.judge.weights.source} {does}"


def _stamp_notes(stamps: Mapping[str, Any]) -> list[str]:
    return [
        sentence.format(who=who, traces="this trace")
        for stamp, sentence in TRAINING_NOTES.items()
        for who in ("agent", "gate")
        if stamps[f"{who}_{stamp}"]
    ]
