"""`python -m proactive.simulate`: sessions of simulated users and assistants, and training data of them."""

if __name__ == "__main__":
    from proactive.commands import start

    start("simulate")

import asyncio
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.files.run_folders import REPORT_FILE, output_folder
from datamodules.ranges import Count, CountOrNone, Positive, Seed, Tries
from models.judging.budget import Budget
from models.judging.chat_client import ChatClient
from models.judging.endpoint import EndpointOptions
from proactive.commands import program
from proactive.endpoints import endpoint_of
from proactive.parser import Parser
from proactive.simulation.endpoints import EndpointRole, RoleOptions, RolePrompt
from proactive.simulation.log import LOG_FILE, SimulationLog
from proactive.simulation.loop import LoopOptions
from proactive.simulation.questions import ROLES, Players
from proactive.simulation.scenes import embedded_scenes, read_scenes
from proactive.simulation.scripted import ScriptedRole
from proactive.simulation.simulation import Simulation, StoppedError, derive, prepared, simulate
from proactive.simulation.summary import ESTIMATED, estimate
from proactive.tables import Table, show
from proactive.terminal import say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def main(arguments: list[str]) -> None:
    """Parse, and carry out one of the subcommands."""
    parser = Parser(prog=program("simulate"), description="Simulate sessions, and make training data of them.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("traces", _traces_parser(), help="simulate sessions, and derive their training data")
    subcommands.add_subcommand("rows", _rows_parser(), help="derive the training data of simulated sessions again")
    options = parser.parse_args(arguments)
    {"traces": _traces, "rows": _rows}[options.subcommand](options[options.subcommand])


def _traces_parser() -> Parser:
    parser = Parser(prog="simulate traces", description="Let roles play sessions: environment, user, assistant and "
        "judge. Each is scripted, or a model behind an endpoint.")  # fmt: skip
    add = parser.add_argument
    add("--config", action="config", help="A file of these options.")
    add("--scenes", type=Path, help="A file of scenes as the published scenes.yaml, or a folder that has one. If left "
        "out, a scene for each topic of the embedded simulator.")  # fmt: skip
    add("--output", type=Path, help="The folder to write; the same one goes on where a simulation stopped. A new one "
        "in runs/simulate if left out.")  # fmt: skip
    add("--trials", type=Tries, default=1, help="Sessions of each scene.")
    add("--scenes-at-once", type=Tries, default=32, help="Sessions that run side by side; it changes no result.")
    parser.add_class_arguments(LoopOptions, as_group=False)
    add("--seed", type=Seed, default=0, help="Another seed, other sessions.")
    for role in ROLES:
        parser.add_class_arguments(RoleOptions, role)
    parser.add_class_arguments(EndpointOptions, "endpoint", skip={"token_limit", "cost_limit", "time_limit"})
    add("--budget-tokens", type=Count | None, help="Tokens in and out of all endpoints, after which no more is asked.")
    add("--budget-cost", type=Positive | None, help="The same as cost, in the currency of the prices.")
    add("--failures", type=CountOrNone, default=10, help="Sessions that may fail before the others are stopped too.")
    add("--data.root", type=str, default="embedded", help="Example events of this root's test traces are kept from the "
        "roles, and simulated events are compared with them.")  # fmt: skip
    add("--contaminated", action="store_true", help="Show such example events to the roles, and mark the result.")
    return parser.with_output_options()


def _rows_parser() -> Parser:
    parser = Parser(prog="simulate rows", description="Write training data, summary and report of log and traces.")
    parser.add_argument("folder", type=Path, help="A folder that `simulate traces` wrote.")
    parser.add_argument("--estimate", type=Count | None, help="Also estimate what this many events would take, for "
        "example 6790 as in the paper.")  # fmt: skip
    return parser.with_output_options()


def _traces(options: "Namespace") -> None:
    given = embedded_scenes() if options.scenes is None else read_scenes(options.scenes)
    scenes, examples = prepared(given, options.data.root, options.contaminated)
    bounds = LoopOptions(**{one.name: options[one.name] for one in fields(LoopOptions)})
    at_once, failures = options.scenes_at_once, options.failures
    config = _traces_parser().dump(options)
    simulation = Simulation(scenes, examples, options.trials, options.seed, bounds, at_once, failures, config)
    log = SimulationLog()
    budget = Budget(options.budget_tokens, options.budget_cost, ("budget-tokens", "budget-cost"))
    asked = [role for role in ROLES if options[role].url]
    endpoints = {role: endpoint_of(role, options, options[role].temperature) for role in asked}
    clients = {role: ChatClient(endpoint, log, budget, role) for role, endpoint in endpoints.items()}
    players: Players = dict.fromkeys(ROLES, ScriptedRole(log))
    for role, client in clients.items():
        players[role] = EndpointRole(client, RolePrompt.read(role, options[role].prompt))
    folder = output_folder(options.output, "simulate", LOG_FILE)
    progress = (lambda text: None) if options.quiet else say
    try:
        asyncio.run(simulate(simulation, players, list(clients.values()), log, folder, progress))
    except StoppedError as error:
        _finish(folder, options.quiet)
        raise UserError(error.what, f"{error.hint} To go on, give the same options with --output {folder}.") from error
    _finish(folder, options.quiet)


def _rows(options: "Namespace") -> None:
    record = _finish(options.folder, options.quiet)
    if options.estimate is not None:
        show(_estimate_table(estimate(record, options.estimate), options.estimate))


def _finish(folder: Path, quiet: bool) -> dict[str, Any]:
    """Derive everything, print it, and return the summary."""
    record = derive(folder)
    if not quiet:
        show(_table(record))
        say(f"traces, training data and {REPORT_FILE} are in {folder}")
    return record


def _estimate_table(found: dict[str, dict[str, float]], events: int) -> Table:
    table = Table(
        title=f"Estimate for {events:,} events", caption="in proportion to the answers and events of this log"
    )
    for title in ("role", *ESTIMATED):
        table.add_column(title.replace("_", " "), justify="left" if title == "role" else "right")
    for role, figures in found.items():
        table.add_row(role, *(f"{figures[name]:,.{2 if name == 'cost' else 0}f}" for name in ESTIMATED))
    return table


def _table(record: dict[str, Any]) -> Table:
    table = Table(title="Simulation")
    table.add_column("")
    table.add_column("number", justify="right")
    contamination = record["contamination"]
    lines = {
        **{f"trials: {end}": count for end, count in record["trials"]["ends"].items()},
        **{f"failures: {cause}": count for cause, count in record["trials"]["failures"].items()},
        **{f"events: {source}": count for source, count in record["events"].items()},
        **{f"rows: {category.replace('_', ' ')}": count for category, count in record["rows"].items()},
        "conversations": record["conversations"],
        "preferences": record["preferences"],
        "near-duplicate events": record["near_duplicates"]["events"],
        f"events in the test traces of {contamination['root']}": contamination["events_of_test_traces"],
        f"example events in the test traces of {contamination['root']}": contamination["examples_of_test_traces"],
    }
    for name, value in lines.items():
        table.add_row(name, f"{value:,}")
    return table
