"""The agent, the gate, the weights and the data root that options describe, in every command that has such options."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.corpus.columns import Columns
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.traces import Recorded
from datamodules.errors import UserError
from datamodules.files.run_folders import runs_in
from datamodules.prompting.chat_prompts import AGENT_PROMPT, ChatPrompt
from datamodules.ranges import NonNegativeFloat, Seed, Temperature
from models.judging.agents import Agent, AlwaysPropose, NeverPropose, RecordedAgent
from models.judging.answer_log import AnswerLog
from models.judging.answer_options import AnswerOptions
from models.judging.chat_client import ChatClient
from models.judging.endpoint_agent import EndpointAgent
from models.learning.checkpoint_paths import weights_path
from proactive.endpoints import add_endpoint_options
from proactive.parser import Parser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from models.judging.local_agent import LocalAgent
    from models.judging.weights import Weights
    from models.learning.proactive_agent import ProactiveAgent

KINDS = ("checkpoint", "traces", "url", "baseline")


def add_agent_options(parser: Parser) -> None:
    """Add the options that describe an agent."""
    add = parser.add_argument
    add("--agent.checkpoint", type=Path, nargs="+", help="Agent: a run, checkpoint or export, or the folder of a "
        "cross-validation. Of several, each trace uses one that neither trained nor validated on it, if there is one, "
        "and none that trained on it. A trace that all trained on is skipped.")  # fmt: skip
    parser.add_class_arguments(AnswerOptions, "agent.answers")
    add("--agent.traces", type=Path, help="Agent: the answers recorded in this folder, in the published layout.")
    add_endpoint_options(
        parser, "agent", "Agent: a model at this endpoint, for example http://localhost:8000/v1.", AGENT_PROMPT
    )
    add("--agent.baseline", type=Literal["always-propose", "never-propose"], help="Agent: a baseline.")
    add("--temperature", type=Temperature, default=0.0, help="Sampling temperature of the agent.")
    add("--seed", type=Seed, default=0, help="Seed of sampling; each request adds the index of its candidate.")


def add_gate_options(parser: Parser, choice: str) -> None:
    """Add the options of a gate; `choice` says which of several checkpoints is used."""
    add = parser.add_argument
    add("--gate", type=Path, nargs="+", help="A reward classifier that holds back offers below a threshold: a run, "
        f"checkpoint or export, or the folder of a cross-validation. {choice}")  # fmt: skip
    add("--cost-ratio", type=NonNegativeFloat | None, help="For the gate: cost of a false alarm relative to a missed "
        "need; default 1.")  # fmt: skip


def trained_agent(
    weights: "Weights[ProactiveAgent]", options: "Namespace", candidates: int = 1, log: AnswerLog | None = None
) -> "LocalAgent":
    """Return the agent of a checkpoint.

    Args:
        weights: The checkpoint.
        options: All options of the command.
        candidates: Number of answers per event.
        log: Keeps the answers.
    """
    from models.judging.local_agent import LocalAgent  # with torch, which the other agents do not need

    how = AnswerOptions(**options.agent.answers.as_dict())
    return LocalAgent(weights, how, candidates, options.temperature, options.seed, log=log)


def untrained_agent(
    options: "Namespace",
    recorded: Recorded | None,
    client: Callable[[], ChatClient],
    candidates: int | None,
    latest_tokens: int | None = None,
) -> Agent:
    """Return the agent of recorded traces, a baseline, or a model at an endpoint.

    A new kind of agent is a new branch here.

    Args:
        options: All options of the command.
        recorded: What `--agent.traces` contains.
        client: Makes the client of the endpoint.
        candidates: Number of answers per event; all recorded ones, or one, if None.
        latest_tokens: Estimated tokens of the latest events that a session sends to an endpoint; all events if None.
    """
    if recorded is not None:
        return RecordedAgent(recorded.answers, str(options.agent.traces), candidates)
    if options.agent.baseline:
        return AlwaysPropose() if options.agent.baseline == "always-propose" else NeverPropose()
    prompt = ChatPrompt.read(options.agent.prompt, with_proposal=False)
    return EndpointAgent(client(), prompt, candidates or 1, latest_tokens)


def given_weights(option: str, given: Sequence[Path] | None) -> list[Path]:
    """Return the paths that an option names, of a cross-validation those of its folds.

    Raises:
        UserError: A path contains no weights; see `weights_path`.
    """
    paths = [run for path in given or () for run in runs_in(path)]
    for path in paths:
        weights_path(path, option)
    return paths


def one_of(group: "Namespace", name: str, choices: Sequence[str]) -> str:
    """Return which of some options of a group is given.

    Raises:
        UserError: It is not exactly one.
    """
    given = [choice for choice in choices if group[choice]]
    if len(given) != 1:
        got = " and ".join(f"--{name}.{choice}" for choice in given) or "none"
        options = ", ".join(f"--{name}.{choice}" for choice in choices)
        raise UserError(f"{name}: expected one of {options}, got {got}", "Give exactly one of them.")
    return given[0]


def root_corpus(root: str | None, states: Sequence[Mapping[str, Any]], needed: bool) -> Corpus | None:
    """Return the data root: as given, else that of the first weights, else the embedded one if `needed`.

    Args:
        root: What `--data.root` says.
        states: The states of the weights' data modules.
        needed: Whether there must be one.
    """
    seed, columns = 0, None
    if root is None and states:
        trained = states[0]["hyperparameters"]
        root, seed, columns = trained["root"], trained["seed"], trained.get("columns")
    if root is None and not needed:
        return None
    return load_corpus(root or "embedded", seed, columns and Columns(**columns))
