"""`python -m proactive.simulate`: simulated sessions, and training data from them."""

if __name__ == "__main__":
    from proactive.commands import start

    start("simulate")

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.files.run_folders import REPORT_FILE, output_folder
from datamodules.ranges import Count, NonNegativeInt, Positive, Seed, Tries
from models.judging.endpoint import EndpointOptions
from proactive.commands import program
from proactive.event_loop import run_until_signal
from proactive.parser import Parser
from proactive.simulation.concurrent_work import Limits, StoppedError
from proactive.simulation.contamination import without_test_events
from proactive.simulation.role_options import OPTIONS, roles_of
from proactive.simulation.scenes import embedded_scenes, read_scenes
from proactive.simulation.scenes_command import scenes, scenes_parser
from proactive.simulation.session_loop import LoopOptions
from proactive.simulation.simulation_log import LOG_FILE, SimulationLog
from proactive.simulation.simulation_summary import ESTIMATED, estimate
from proactive.simulation.trace_simulation import TraceSimulation, derive, simulate
from proactive.tables import Table, show
from proactive.terminal import say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def main(arguments: list[str]) -> None:
    """Parse the arguments, and run a subcommand."""
    parser = Parser(prog=program("simulate"), description="Write scenes, simulate sessions, and write training data.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("scenes", scenes_parser(), help="write scenes from seed tasks")
    subcommands.add_subcommand("traces", _traces_parser(), help="simulate sessions, and write their training data")
    subcommands.add_subcommand("rows", _rows_parser(), help="write the training data of simulated sessions again")
    options = parser.parse_args(arguments)
    {"scenes": scenes, "traces": _traces, "rows": _rows}[options.subcommand](options[options.subcommand])


def _traces_parser() -> Parser:
    parser = Parser(prog="simulate traces", description="Simulate sessions with four roles: environment, user, "
        "assistant and judge. Each is scripted, or a model behind an endpoint. The assistant can be a trained agent or "
        "a baseline, the judge a reward classifier.")  # fmt: skip
    add = parser.add_argument
    add("--config", action="config", help="A file of these options.")
    add("--scenes", type=Path, help="A file of scenes in the format of the published scenes.yaml, or a folder that "
        "contains a scenes.yaml. Default: a scene for each topic of the embedded simulator.")  # fmt: skip
    add("--output", type=Path, help="The output folder. A folder of a stopped simulation is continued. Default: a new "
        "folder in runs/simulate.")  # fmt: skip
    add("--trials", type=Tries, default=1, help="Sessions per scene.")
    add("--scenes-at-once", type=Tries, default=32, help="Maximum number of concurrent sessions. It changes no result.")
    parser.add_class_arguments(LoopOptions, as_group=False)
    add("--seed", type=Seed, default=0, help="The seed of all random numbers.")
    for role, kind in OPTIONS.items():
        parser.add_class_arguments(kind, role)
    parser.add_class_arguments(EndpointOptions, "endpoint", skip={"token_limit", "cost_limit", "time_limit"})
    add("--budget-tokens", type=Count | None, help="Stop when all endpoints together have used this number of tokens.")
    add(
        "--budget-cost", type=Positive | None, help="Stop when they have cost this much, in the currency of the prices."
    )
    add(
        "--failures",
        type=NonNegativeInt,
        default=10,
        help="Number of sessions that may fail before the simulation stops.",
    )
    add("--data.root", type=str, default="embedded", help="Example events that are in this root's test traces are "
        "removed, and simulated events are compared with these traces.")  # fmt: skip
    add("--contaminated", action="store_true", help="Keep such example events, and mark the result.")
    return parser.with_output_options()


def _rows_parser() -> Parser:
    parser = Parser(prog="simulate rows", description="Write training data, summary and report from log and traces.")
    parser.add_argument("folder", type=Path, help="A folder that `simulate traces` wrote.")
    parser.add_argument("--estimate", type=Count | None, help="Also estimate tokens and cost of this number of events, "
        "for example 6790 as in the paper.")  # fmt: skip
    return parser.with_output_options()


def _traces(options: "Namespace") -> None:
    given = embedded_scenes() if options.scenes is None else read_scenes(options.scenes)
    described, examples = without_test_events(given, options.data.root, options.contaminated)
    bounds = LoopOptions(**{one.name: options[one.name] for one in fields(LoopOptions)})
    limits = Limits(options.scenes_at_once, options.failures)
    config = _traces_parser().dump(options)
    simulation = TraceSimulation(described, examples, options.trials, options.seed, bounds, limits, config)
    log = SimulationLog()
    roles, clients = roles_of(options, log)
    folder = output_folder(options.output, "simulate", LOG_FILE)
    progress = (lambda text: None) if options.quiet else say
    try:
        run_until_signal(simulate(simulation, roles, clients, log, folder, progress))
    except StoppedError as error:
        _finish(folder, options.quiet)
        raise UserError(
            error.what, f"{error.hint} To continue, give the same options with --output {folder}."
        ) from error
    _finish(folder, options.quiet)


def _rows(options: "Namespace") -> None:
    record = _finish(options.folder, options.quiet)
    if options.estimate is not None:
        show(_estimate_table(estimate(record, options.estimate), options.estimate))


def _finish(folder: Path, quiet: bool) -> dict[str, Any]:
    """Write everything that is derived, print the counts, and return the summary."""
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
    contamination = record["contamination"]
    table = Table(title="Simulation, CONTAMINATED" if contamination["contaminated"] else "Simulation")
    table.add_column("")
    table.add_column("number", justify="right")
    lines = {
        **{f"sessions: {end}": count for end, count in record["sessions"]["ends"].items()},
        **{f"failures: {cause}": count for cause, count in record["sessions"]["failures"].items()},
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
