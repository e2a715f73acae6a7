"""The options of the four roles, and the roles that they describe."""

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from datamodules.errors import UserError
from datamodules.ranges import Count, Positive
from models.judging.agents import AlwaysPropose, NeverPropose
from models.judging.answer_options import AnswerOptions
from models.judging.budget import Budget
from models.judging.chat_client import ChatClient
from models.learning.checkpoint_paths import weights_path
from proactive.endpoints import endpoint_of
from proactive.simulation.endpoint_roles import EndpointRole, RoleOptions, RolePrompt
from proactive.simulation.questions import Role, Roles
from proactive.simulation.scenes import SimulatedSession
from proactive.simulation.scripted_roles import ScriptedRole
from proactive.simulation.simulation_log import SimulationLog
from proactive.simulation.work_items import ROLE_NAMES, RoleName
from proactive.terminal import quiet_imports

if TYPE_CHECKING:
    from jsonargparse import Namespace

KINDS = ("url", "checkpoint", "baseline")  # the options that select an implementation of a role
ENDPOINT_ONLY = ("model", "key_variable", "prompt", "extra", "token_limit", "cost_limit")  # options


@dataclass(frozen=True)
class SessionRoleOptions(RoleOptions):
    """A role of a session: a model behind an endpoint, or scripted.

    Args:
        token_limit: Stop the simulation when this role has used this number of tokens.
        cost_limit: Stop the simulation when this role has cost this much, in the currency of the price.
    """

    token_limit: Count | None = None
    cost_limit: Positive | None = None


@dataclass(frozen=True)
class JudgeOptions(SessionRoleOptions):
    """The judge: a model behind an endpoint, a reward classifier, or scripted.

    Args:
        checkpoint: A reward classifier as the judge: a run, checkpoint or export.
    """

    checkpoint: Path | None = None


@dataclass(frozen=True)
class AssistantOptions(SessionRoleOptions):
    """The assistant: a model behind an endpoint, a trained agent, a baseline, or scripted.

    Args:
        checkpoint: A trained agent as the assistant: a run, checkpoint or export.
        baseline: A baseline as the assistant.
        max_new_tokens: Maximum number of tokens per answer of a trained agent. A longer answer counts as silence.
    """

    checkpoint: Path | None = None
    baseline: Literal["always-propose", "never-propose"] | None = None
    max_new_tokens: Count = 256


OPTIONS: dict[RoleName, type[SessionRoleOptions]] = {
    "environment": SessionRoleOptions,
    "user": SessionRoleOptions,
    "assistant": AssistantOptions,
    "judge": JudgeOptions,
}


def roles_of(options: "Namespace", log: SimulationLog) -> tuple[Roles, list[ChatClient]]:
    """Return all roles, and the clients of those that are endpoints.

    Args:
        options: All options of `simulate traces`.
        log: The log of the simulation.

    Raises:
        UserError: Options contradict each other, or a prompt or a checkpoint is invalid.
    """
    kinds = {role: kind_of(role, options[role]) for role in ROLE_NAMES}
    _refuse_equal_proposals(options, kinds["assistant"])
    total = Budget(options.budget_tokens, options.budget_cost, ("budget-tokens", "budget-cost"))
    thread = ThreadPoolExecutor(1, "trained-models")
    roles: Roles = {}
    clients = []
    for role, kind in kinds.items():
        if kind == "url":
            limits = (options[role].token_limit, options[role].cost_limit)
            budget = Budget(*limits, (f"{role}.token_limit", f"{role}.cost_limit"), total)
            roles[role], client = endpoint_role(role, options, log, budget)
            clients.append(client)
        else:
            roles[role] = _local_role(role, kind, options, log, thread)
    return roles, clients


def endpoint_role(
    role: RoleName, options: "Namespace", log: SimulationLog, budget: Budget
) -> tuple[EndpointRole, ChatClient]:
    """Return a role that is a model behind an endpoint, and its client.

    Args:
        role: The role.
        options: All options of the command, with a group for the role.
        log: The log that the client writes to.
        budget: The limits of tokens and cost.

    Raises:
        UserError: An option of the endpoint or the prompt is invalid.
    """
    group = options[role]
    client = ChatClient(endpoint_of(role, options, group.temperature), log, budget, role)
    return EndpointRole(client, RolePrompt.read(role, group.prompt)), client


def kind_of(role: RoleName, group: "Namespace") -> str | None:
    """Return the option of `KINDS` that is given; None if the role is scripted.

    Args:
        role: The role.
        group: Its options.

    Raises:
        UserError: Two of them are given, an option that a role of this kind does not use, or a checkpoint that is none.
    """
    given = [name for name in KINDS if group.get(name)]
    if len(given) > 1:
        raise UserError(f"--{role}.{given[0]} and --{role}.{given[1]} exclude each other", "Give one of them.")
    if "url" not in given and (unused := [name for name in ENDPOINT_ONLY if group.get(name)]):
        raise UserError(f"--{role}.{unused[0]}: only an endpoint uses it", f"Give its address with --{role}.url.")
    if "checkpoint" in given:
        weights_path(group.checkpoint, f"--{role}.checkpoint")
    return given[0] if given else None


def _refuse_equal_proposals(options: "Namespace", kind: str | None) -> None:
    """Refuse new proposals of an assistant that would repeat the rejected one."""
    if not options.new_proposals:
        return
    if kind == "baseline":
        raise UserError("--assistant.baseline: a new proposal would equal the rejected one", "Add --new_proposals 0.")
    if kind == "checkpoint" and not options.assistant.temperature:
        raise UserError(
            "--assistant.temperature: a trained agent does not read the reason of a rejection, so at 0 a new proposal "
            "would equal the rejected one",
            "Give a temperature above 0, or --new_proposals 0.",
        )


def _local_role(
    role: RoleName, kind: str | None, options: "Namespace", log: SimulationLog, thread: Executor
) -> Role[SimulatedSession]:
    if kind is None:
        return ScriptedRole(log)
    group = options[role]
    with quiet_imports():  # of torch, which endpoints and scripts do not need
        from models.judging.judges import RewardJudge
        from models.judging.local_agent import LocalAgent
        from models.judging.weights import load_weights
        from models.learning.reward_classifier import RewardClassifier
        from models.online.agent_classes import AGENTS
        from proactive.simulation.local_roles import BaselineAssistant, TrainedAssistant, TrainedJudge

    if kind == "baseline":
        return BaselineAssistant(AlwaysPropose() if group.baseline == "always-propose" else NeverPropose(), log)
    if role == "judge":
        weights = load_weights((RewardClassifier,), group.checkpoint, "--judge.checkpoint")
        return TrainedJudge(RewardJudge(weights), log, thread)
    answers = AnswerOptions(group.max_new_tokens)
    trained = load_weights(AGENTS, group.checkpoint, "--assistant.checkpoint")
    agent = LocalAgent(trained, answers, temperature=group.temperature, seed=options.seed)
    return TrainedAssistant(agent, log, thread)
