"""Sets up the session that the checked options of `proactive.live` describe: loads models, and chooses among them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.corpus.traces import Recorded, Trace, read_recorded, root_traces
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import ChatPrompt
from models.judging.agents import Agent, RecordedAgent
from models.judging.answer_log import AnswerLog
from models.judging.budget import Budget
from models.judging.chat_client import ChatClient
from models.judging.description import joint_settings
from models.judging.gate_curve import gate_threshold
from models.judging.judges import RewardJudge
from models.judging.weights import Exposure, Model, Weights, assign, load_weights
from models.learning.reward_classifier import RewardClassifier
from models.online.agent_classes import AGENTS
from proactive.agent_options import KINDS, root_corpus, trained_agent, untrained_agent
from proactive.assistant.assistant import SessionParts
from proactive.assistant.deciding import Policy
from proactive.assistant.live_gate import Gate, GateOptions
from proactive.assistant.model_thread import ModelThread, run_in_event_loop
from proactive.assistant.notices import Notices, RecordedNotices
from proactive.assistant.rewriting import RewrittenSource
from proactive.assistant.source_choice import EMBEDDED, ChosenSource, embedded_source, recorded_judgments
from proactive.assistant.terminal_notices import TerminalNotices
from proactive.endpoints import endpoint_of
from proactive.evaluation.evaluation_notes import TRAINING_NOTES
from proactive.evaluation.specification import Stamps

if TYPE_CHECKING:
    from jsonargparse import Namespace

MAX_ANSWERS = 100  # answers of an endpoint that are kept in memory


@dataclass
class Session:
    """A session, ready to run.

    Attributes:
        parts: Its parts.
        settings: Everything that determines its decisions, as JSON.
        notes: Lines for the terminal: what makes offers, what holds them back, and what trained on the trace.
        clients: Clients of endpoints.
    """

    parts: SessionParts
    settings: dict[str, Any]
    notes: list[str]
    clients: list[ChatClient] = field(default_factory=list)


class LatestAnswers(AnswerLog):
    """Keeps the latest answers only, so that a long session needs no more memory."""

    def _note(self, key: str, text: str, finish_reason: str | None) -> None:
        super()._note(key, text, finish_reason)
        while len(self.texts) > MAX_ANSWERS:
            oldest = next(iter(self.texts))
            del self.texts[oldest]
            self.unfinished.pop(oldest, None)


def prepare(options: "Namespace", given: ChosenSource | None, gate_paths: Sequence[Path]) -> Session:
    """Load the models.

    Args:
        options: All options of the command.
        given: The result of `checked_source` with these options.
        gate_paths: The weights that may be the gate; at least one if no source is given.

    Raises:
        UserError: A file is not valid, or a model trained on the trace.
    """
    own = not any(options.agent[kind] for kind in KINDS)
    gates = [load_weights((RewardClassifier,), path, "--gate") for path in gate_paths]
    agents = [load_weights(AGENTS, path, "--agent.checkpoint") for path in options.agent.checkpoint]
    weights: list[Weights[Any]] = [*gates, *agents]
    source, clock, recorded = given or embedded_source(weights, options.speed)
    trace = recorded.traces[0] if recorded else None
    choose = _Choice(trace, _root_traces_by_name(options, weights) if trace else {}, options.contaminated)
    clients: list[ChatClient] = []
    if options.rewrite.url:
        prompt = ChatPrompt.read(options.rewrite.prompt, with_proposal=False)
        source = RewrittenSource(source, _client("rewrite", 0.0, options, clients), prompt)
    if agents:
        trained = trained_agent(choose.one("agent", agents, "--agent.checkpoint"), options)
        trained.warm_up()
        agent: Agent = trained
    elif own:
        assert recorded is not None, "without an agent the source is a trace"
        agent = RecordedAgent(recorded.answers, str(options.source or EMBEDDED), 1)
    else:
        others = _recorded_answers(options.agent.traces, trace) if trace and options.agent.traces else None
        client = partial(_client, "agent", options.temperature, options, clients)
        agent = untrained_agent(options, others, client, 1, options.latest_tokens)
    policy, tools = Policy(**options.policy.as_dict()), tuple(options.tools)
    thread = ModelThread()
    run_agent = thread.run if agents else run_in_event_loop
    parts = SessionParts(source, clock, agent, _notices(options, recorded), policy, tools=tools, run_agent=run_agent)
    gate: Gate | None = None
    if gates:
        how = GateOptions(options.shadow, options.gate_fails_open, options.epsilon, options.seed)
        threshold = gate_threshold(1.0 if options.cost_ratio is None else options.cost_ratio)
        gate = Gate(RewardJudge(choose.one("gate", gates, "--gate")), threshold, how, source.name, thread)
        gate.warm_up()
        parts = replace(parts, ask_gate=gate.verdict, threshold=threshold, window=gate.window)
    stamps = Stamps(choose.exposures).record()
    settings = {
        "name": source.name,
        "source": source.describe(),
        "agent": joint_settings({source.name: agent}),
        "gate": gate.describe() if gate else None,
        "policy": asdict(parts.policy),
        "tools": sorted(parts.tools),
        "stamps": {name: bool(found) for name, found in stamps.items() if found},
    }
    return Session(parts, settings, [_decides(agent, gate, own), *_stamp_notes(stamps)], clients)


def _root_traces_by_name(options: "Namespace", weights: list[Weights[Any]]) -> dict[str, Trace]:
    """The traces of the data root by name, as in `evaluate agent`."""
    corpus = root_corpus(options.data.root, [one.state for one in weights], needed=False)
    return {one.name: one for one in root_traces(corpus)} if corpus else {}


@dataclass
class _Choice:
    """Chooses the weights that are exposed to a trace least, as `evaluate agent` does, and notes the exposure."""

    trace: Trace | None
    root_traces_by_name: Mapping[str, Trace]
    contaminated: bool
    exposures: dict[str, dict[str, Exposure]] = field(default_factory=dict)

    def one(self, role: str, weights: list[Weights[Model]], option: str) -> Weights[Model]:
        if self.trace is None:
            return weights[0]
        assigned, self.exposures[role] = assign(
            weights, [self.trace], self.root_traces_by_name, option, self.contaminated
        )
        return assigned[self.trace.name]


def _recorded_answers(folder: Path, trace: Trace) -> Recorded:
    recorded = read_recorded(folder)
    same = [one for one in recorded.traces if one.name == trace.name]
    if not same or same[0].events != trace.events:
        raise UserError(
            f"--agent.traces: {folder} has no answers to {trace.name}", "Give a folder with a trace of the same events."
        )
    return recorded


def _client(role: str, temperature: float, options: "Namespace", clients: list[ChatClient]) -> ChatClient:
    """Make a client of a role's endpoint; all clients have one budget."""
    limits = options.endpoint
    budget = clients[0].budget if clients else Budget(limits.token_limit, limits.cost_limit)
    client = ChatClient(endpoint_of(role, options, temperature), LatestAnswers(), budget)
    clients.append(client)
    return client


def _notices(options: "Namespace", recorded: Recorded | None) -> Notices:
    kind = options.notify or ("recorded" if recorded else "terminal")
    if kind == "terminal":
        return TerminalNotices()
    try:
        if kind == "page":
            from proactive.assistant.page_notices import PageNotices

            return PageNotices(options.port)
        if kind == "desktop":
            from proactive.assistant.desktop_notices import DesktopNotices

            return DesktopNotices()
    except ModuleNotFoundError as error:
        extra = {"page": "annotate", "desktop": "live"}[kind]
        raise UserError(
            f"--notify {kind} needs {error.name}, which is not installed", f"pip install 'proactive[{extra}]'"
        ) from error
    assert recorded is not None, "without a trace this kind is refused"
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
