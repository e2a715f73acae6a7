"""`python -m proactive.evaluate agent`: let an agent answer the events of traces, and a judge judge its answers."""

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from callbacks.checkpoints import load_trained
from callbacks.evaluation import ANSWERS_FILE, VERDICTS_FILE, Evaluation, carry_out
from callbacks.files import METRICS_FILE, REPORT_FILE, missing_folders, new_run_folder, remove_empty
from callbacks.progress import counted
from datamodules.chat import AGENT_PROMPT, JUDGE_PROMPT, ChatPrompt
from datamodules.errors import UserError
from datamodules.ranges import NotNegative, Seed, Temperature, Tries
from datamodules.records import AnnotatedRow, scene_of
from datamodules.sources import SPLITS_FILE, Corpus, load_corpus
from datamodules.traces import Recorded, Trace, read_recorded, read_splits, root_traces
from models.agent import ProactiveAgent
from models.agents import (
    Agent,
    AlwaysPropose,
    AnswerOptions,
    EndpointAgent,
    LocalAgent,
    NeverPropose,
    RecordedAgent,
)
from models.endpoint import Endpoint, EndpointOptions
from models.gate import gate_threshold
from models.judges import EndpointJudge, Judge, RecordedJudge, RewardJudge
from models.reward import RewardClassifier
from models.weights import Model, Tie, Weights, assign
from proactive.parser import Parser
from proactive.terminal import agent_tables, say, show

if TYPE_CHECKING:
    from jsonargparse import Namespace


# Which traces are stamped as what, for agent, judge and gate.
STAMPS = {Tie.TRAINED: "trained_on", Tie.VALIDATED: "validated_on", Tie.UNKNOWN: "validation_unknown"}


def agent_parser() -> Parser:
    """The options of `evaluate agent`."""
    parser = Parser(prog="evaluate agent", description="Measure an agent by what a judge makes of its proposals.")
    add = parser.add_argument
    add("--agent.checkpoint", type=Path, nargs="+", help="Agent: a run, checkpoint or export of one; of several, each "
        "trace takes one that was neither trained nor validated on it, if there is one, and never one that was trained "
        "on it: a trace that all were trained on is left out.")  # fmt: skip
    parser.add_class_arguments(AnswerOptions, "agent.answers")
    add("--agent.traces", type=Path, help="Agent: what is recorded in this folder, in the published layout.")
    add("--agent.url", type=str, help="Agent: a model behind this address, for example http://localhost:8000/v1.")
    add("--agent.model", type=str, help="The model's name there.")
    add("--agent.key_variable", type=str, help="The environment variable that holds the endpoint's key, if it has one.")
    add("--agent.prompt", type=Path, default=AGENT_PROMPT, help="What the model is told; the file explains itself.")
    add("--agent.extra", type=dict, default={}, help="More fields of each request, such as {max_tokens: 512}.")
    add("--agent.baseline", type=Literal["always-propose", "never-propose"], help="Agent: a baseline.")
    add("--judge.checkpoint", type=Path, nargs="+", help="Judge: a reward classifier's run, checkpoint or export; "
        "of several, each trace takes one that was neither trained nor validated on it, if there is one.")  # fmt: skip
    add("--judge.url", type=str, help="Judge: a generative reward model behind this address.")
    add("--judge.model", type=str, help="The model's name there.")
    add("--judge.key_variable", type=str, help="The environment variable that holds the endpoint's key, if it has one.")
    add("--judge.prompt", type=Path, default=JUDGE_PROMPT, help="What the model is told; the file explains itself.")
    add("--judge.extra", type=dict, default={}, help="More fields of each request.")
    add(
        "--judge.attempts", type=Tries, default=3, help="How often it is asked, at most, until its verdict can be read."
    )
    add("--judge.recorded", action="store_true", help="Judge: the judgments that stand in the recorded traces.")
    add("--data.root", type=str, help="Whose test traces are answered, and whose splits.json divides them: embedded, "
        "published or a folder. If left out, the root that agent or judge was trained on, else embedded.")  # fmt: skip
    add(
        "--candidates",
        type=Tries | None,
        help="Answers to each event; it counts as accepted if any is. One, or all recorded.",
    )
    add("--temperature", type=Temperature, default=0.0, help="Of the agent's sampling.")
    add("--seed", type=Seed, default=0, help="Sent with each request, plus the candidate's number.")
    add("--gate", type=Path, nargs="+", help="A reward classifier that holds back what is likelier to annoy than to "
        "help; several are chosen from as for the judge.")  # fmt: skip
    add(
        "--cost-ratio",
        type=NotNegative | None,
        help="For the gate: what a false alarm costs, in missed needs; 1 if left out.",
    )
    add("--gate-is-judge", action="store_true", help="Allow the judge's weights as gate, and stamp the result.")
    add(
        "--contaminated",
        action="store_true",
        help="Allow an agent, judge or gate trained on the traces, and stamp the result.",
    )
    parser.add_class_arguments(EndpointOptions, "endpoint")
    add("--output", type=Path, help="The folder to write; the same one goes on where an evaluation stopped. "
        "A new one in runs/evaluate if left out.")  # fmt: skip
    add("--quiet", action="store_true", help="Print nothing but errors.")
    add("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")
    return parser


def evaluate_agent_command(options: "Namespace", arguments: Sequence[str]) -> None:
    """Evaluate, write the folder, print the tables; say how to go on where that is cut short."""
    evaluation = prepare(options)
    around = missing_folders(options.output or Path("runs", "evaluate"))
    folder = _output_folder(options.output)
    with _stoppable() as signals:
        try:
            record = carry_out(evaluation, folder, partial(counted, quiet=options.quiet))
        except UserError as error:
            if not _forget_empty(folder, around):
                raise UserError(error.what, f"{error.hint} To go on: {_same_command(arguments, folder)}") from error
            raise
        except (KeyboardInterrupt, SystemExit):
            if not signals:
                raise
            _forget_empty(folder, around)
            say("stopped; to go on:", to_stderr=True)
            say(f"  {_same_command(arguments, folder)}", to_stderr=True)
            raise SystemExit(128 + signals[0]) from None
    if not options.quiet:
        show(*agent_tables(record))
        say(f"figures, judged traces and {REPORT_FILE} are in {folder}")


def prepare(options: "Namespace") -> Evaluation:
    """Check the options and load what they name.

    Raises:
        UserError: Options contradict each other, a file does not fit, or a judge or gate may not be used.
    """
    _refuse_contradictions(options)
    deadline = time.monotonic() + options.endpoint.time_limit if options.endpoint.time_limit else None
    recorded = read_recorded(options.agent.traces) if options.agent.traces else None
    agents = [_weights(ProactiveAgent, path, "--agent.checkpoint") for path in options.agent.checkpoint or ()]
    judges = [_weights(RewardClassifier, path, "--judge.checkpoint") for path in options.judge.checkpoint or ()]
    gates = [_weights(RewardClassifier, path, "--gate") for path in options.gate or ()]
    corpus = _corpus(
        options.data.root,
        [*(one.state for one in agents), *(one.state for one in (*judges, *gates))],
        needed=recorded is None,
    )
    namesakes = {trace.name: trace for trace in root_traces(corpus)} if corpus else {}
    traces = recorded.traces if recorded else list(namesakes.values())
    _refuse_empty(traces, corpus)
    splits = read_splits(_splits_file(options.agent.traces, corpus), traces)
    stamps: dict[str, Any] = {"traces_left_out": [], "gate_is_judge": False}
    for who in ("agent", "judge", "gate"):
        stamps |= _stamps(who, {})
    if agents:
        agent: Agent
        agent, answered, ties = _trained_agent(options, agents, traces)
        stamps |= _stamps("agent", ties) | {"traces_left_out": [t.name for t in traces if t not in answered]}
        traces = answered
    else:
        agent = _other_agent(options, recorded, deadline)
    if judges:
        judge: Judge
        judge, ties = _classifier_judge(options, judges, traces, namesakes)
        stamps |= _stamps("judge", ties)
    else:
        judge = _other_judge(options, recorded, traces, deadline)
    gate = None
    if gates:
        judging = {name: one.digest for name, one in judge.assigned.items()} if isinstance(judge, RewardJudge) else {}
        gate, ties = _gate(options, gates, traces, namesakes, judging)
        stamps |= _stamps("gate", ties)
        stamps["gate_is_judge"] = any(judging.get(name) == one.digest for name, one in gate.assigned.items())
    people = _rows_of(traces, namesakes, corpus) if corpus else None
    return Evaluation(traces, splits, agent, judge, gate, _cost_ratio(options), stamps, people)


def _refuse_contradictions(options: "Namespace") -> None:
    who = _one_of(options.agent, "agent", ("checkpoint", "traces", "url", "baseline"))
    _one_of(options.judge, "judge", ("checkpoint", "url", "recorded"))
    if options.judge.recorded and who != "traces":
        raise UserError("--judge.recorded: only recorded traces have judgments", "Give them with --agent.traces.")
    if options.gate and options.judge.recorded:
        raise UserError("--gate: nobody recorded what is thought of null in place of a proposal", "Give another judge.")
    if options.cost_ratio is not None and not options.gate:
        raise UserError("--cost-ratio: there is no gate", "Give a reward classifier with --gate.")
    gate_threshold(_cost_ratio(options))


def _cost_ratio(options: "Namespace") -> float:
    return 1.0 if options.cost_ratio is None else options.cost_ratio


def _stamps(who: str, ties: Mapping[str, Tie]) -> dict[str, list[str]]:
    """The names of the traces that `who` has something to do with, by what."""
    return {f"{who}_{word}": [name for name, tie in ties.items() if tie == kind] for kind, word in STAMPS.items()}


def _trained_agent(
    options: "Namespace", weights: Sequence[Weights[ProactiveAgent]], traces: list[Trace]
) -> tuple[Agent, list[Trace], dict[str, Tie]]:
    """The agent, the traces that it answers, and what it has to do with them."""
    namesakes = {trace.name: trace for trace in traces}
    all_know = [trace for trace in traces if all(one.tie(trace, None) == Tie.TRAINED for one in weights)]
    answered = traces if options.contaminated else [trace for trace in traces if trace not in all_know]
    if not answered:
        raise UserError(
            f"--agent.checkpoint: trained on all of the {len(traces)} traces that it is to answer",
            "Train it with --data.split published or on folds, or give --contaminated to have it stamped.",
        )
    assigned, ties = assign(weights, answered, namesakes, "--agent.checkpoint", options.contaminated)
    how = AnswerOptions(**options.agent.answers.as_dict())
    agent = LocalAgent(assigned, how, options.candidates or 1, options.temperature, options.seed)
    return agent, answered, ties


def _other_agent(options: "Namespace", recorded: Recorded | None, deadline: float | None) -> Agent:
    """The agent that the options name. One more kind of agent is one more branch here."""
    if recorded is not None:
        return RecordedAgent(recorded, str(options.agent.traces), options.candidates)
    if options.agent.baseline:
        return AlwaysPropose() if options.agent.baseline == "always-propose" else NeverPropose()
    prompt = ChatPrompt.read(options.agent.prompt, with_proposal=False)
    endpoint = _endpoint(options.agent, "agent", options.temperature, options.seed, options.endpoint, deadline)
    return EndpointAgent(endpoint, prompt, options.candidates or 1)


def _classifier_judge(
    options: "Namespace",
    weights: Sequence[Weights[RewardClassifier]],
    traces: Sequence[Trace],
    namesakes: Mapping[str, Trace],
) -> tuple[RewardJudge, dict[str, Tie]]:
    assigned, ties = assign(weights, traces, namesakes, "--judge.checkpoint", options.contaminated)
    return RewardJudge(assigned, {trace.name: trace for trace in traces}), ties


def _gate(
    options: "Namespace",
    weights: Sequence[Weights[RewardClassifier]],
    traces: Sequence[Trace],
    namesakes: Mapping[str, Trace],
    judging: Mapping[str, str],
) -> tuple[RewardJudge, dict[str, Tie]]:
    """`judging` gives, by trace name, the digest of the weights that judge it."""
    but_not = None if options.gate_is_judge else judging
    assigned, ties = assign(weights, traces, namesakes, "--gate", options.contaminated, but_not)
    return RewardJudge(assigned, {trace.name: trace for trace in traces}, "gating"), ties


def _other_judge(
    options: "Namespace", recorded: Recorded | None, traces: Sequence[Trace], deadline: float | None
) -> Judge:
    if recorded and options.judge.recorded:
        if not recorded.judgments:
            raise UserError(f"--judge.recorded: {options.agent.traces} holds no judgment", "Give another judge.")
        return RecordedJudge(recorded.judgments)
    endpoint = _endpoint(options.judge, "judge", 0.0, options.seed, options.endpoint, deadline)
    prompt = ChatPrompt.read(options.judge.prompt, with_proposal=True)
    return EndpointJudge(endpoint, prompt, {trace.name: trace for trace in traces}, options.judge.attempts)


def _endpoint(
    group: "Namespace", name: str, temperature: float, seed: int, how: "Namespace", deadline: float | None
) -> Endpoint:
    if not group.model:
        raise UserError(f"--{name}.model: an endpoint needs the model's name", f"Give it with --{name}.model.")
    return Endpoint(
        group.url,
        group.model,
        group.key_variable,
        temperature,
        seed,
        dict(group.extra),
        EndpointOptions(**how.as_dict()),
        deadline,
    )


def _one_of(group: "Namespace", name: str, choices: Sequence[str]) -> str:
    given = [choice for choice in choices if group[choice]]
    if len(given) != 1:
        options = ", ".join(f"--{name}.{choice}" for choice in choices)
        raise UserError(f"{name}: expected one of {options}, got {len(given)}", "Give exactly one of them.")
    return given[0]


def _weights(kind: type[Model], path: Path, option: str) -> Weights[Model]:
    model, state, source = load_trained(kind, path, option)
    return Weights.of(model, state, str(source))


def _corpus(root: str | None, states: Sequence[Mapping[str, Any]], needed: bool) -> Corpus | None:
    """The data root: the one given, else that of the first weights, else the embedded one where one is needed."""
    seed = 0
    if root is None and states:
        trained = states[0]["hyperparameters"]
        root, seed = trained["root"], trained["seed"]
    if root is None and not needed:
        return None
    return load_corpus(root or "embedded", seed)


def _rows_of(traces: Sequence[Trace], namesakes: Mapping[str, Trace], corpus: Corpus) -> list[AnnotatedRow]:
    """The annotated rows of the traces' scenes; all rows where there are none."""
    known = [*traces, *(namesakes[trace.name] for trace in traces if trace.name in namesakes)]
    scenes = {scene_of(trace.events) for trace in known}
    return [row for row in corpus.rows if row.scene in scenes] or corpus.rows


def _splits_file(recorded: Path | None, corpus: Corpus | None) -> Path | None:
    beside = recorded / Path(SPLITS_FILE).name if recorded else None
    if beside and beside.exists():
        return beside
    return corpus.splits_file if corpus else None


def _refuse_empty(traces: Sequence[Trace], corpus: Corpus | None) -> None:
    if not traces:
        raise UserError(f"data.root: {corpus.root if corpus else None} has no test traces", "Give another --data.root.")
    if empty := [trace.name for trace in traces if not trace.events]:
        raise UserError(f"{empty[0]} holds no event", "Take it out of the folder, or fill it.")


def _output_folder(output: Path | None) -> Path:
    """A new folder, or the given one if it is new, empty, or an evaluation's."""
    if output is None:
        return new_run_folder(Path("runs"), "evaluate")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file", "Give the path of a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / ANSWERS_FILE).exists():
        raise UserError(f"--output: {output} holds other things than an evaluation", "Give the path of a new folder.")
    return output


def _forget_empty(folder: Path, around: Sequence[Path]) -> bool:
    """Whether nothing was asked and nothing written; if so, no trace of the attempt stays, for options may change.

    Args:
        folder: The evaluation's folder.
        around: The folders that were not there before it, the innermost first.
    """
    logs = [folder / name for name in (ANSWERS_FILE, VERDICTS_FILE) if (folder / name).is_file()]
    if any(path.read_bytes().count(b"\n") > 1 for path in logs) or (folder / METRICS_FILE).exists():
        return False
    for path in logs:
        path.unlink()
    remove_empty(dict.fromkeys([folder, *around]))
    return True


def _same_command(arguments: Sequence[str], folder: Path) -> str:
    given = any(argument == "--output" or argument.startswith("--output=") for argument in arguments)
    return shlex.join(["python", "-m", "proactive.evaluate", *arguments, *([] if given else ["--output", str(folder)])])


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end what is going on, wherever it is; yields the signals that came."""
    signals: list[int] = []

    def stop(number: int, frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
