"""The subcommand `simulate scenes`: options, and what it prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.files.run_folders import REPORT_FILE, output_folder
from datamodules.ranges import Count, NonNegativeInt, Positive, Seed, Tries
from models.judging.budget import Budget, Price
from models.judging.endpoint import EndpointOptions
from proactive.event_loop import run_until_signal
from proactive.parser import Parser
from proactive.simulation.concurrent_work import Limits, StoppedError
from proactive.simulation.contamination import events_of_test_traces
from proactive.simulation.endpoint_roles import RoleOptions
from proactive.simulation.questions import Role
from proactive.simulation.role_options import endpoint_role, kind_of
from proactive.simulation.scene_writing import SceneDraft, SceneWriting, derive_scenes, write_scenes
from proactive.simulation.scenes import SCENES_FILE
from proactive.simulation.scripted_writer import ScriptedWriter
from proactive.simulation.seed_tasks import embedded_seeds, read_seeds, without_test_samples
from proactive.simulation.simulation_log import LOG_FILE, SimulationLog
from proactive.tables import Table, show
from proactive.terminal import say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def scenes_parser() -> Parser:
    """Return the parser of the subcommand."""
    parser = Parser(prog="simulate scenes", description="Write scenes for `simulate traces` from seed tasks. The "
        "writer is scripted, or a model behind an endpoint.")  # fmt: skip
    add = parser.add_argument
    add("--config", action="config", help="A file of these options.")
    add("--seeds", type=Path, help="A file of seed tasks in the format of the published seedtask.yaml. Default: tasks "
        "of the embedded simulator.")  # fmt: skip
    add("--output", type=Path, help="The output folder. A folder of a stopped call is continued. Default: a new "
        "folder in runs/scenes.")  # fmt: skip
    add("--count", type=Count | None, help="Number of scenes. Tasks are used in turn, one of each kind. Default: one "
        "scene per task.")  # fmt: skip
    add("--scenes-at-once", type=Tries, default=32, help="Maximum number of concurrent scenes. It changes no result.")
    add("--seed", type=Seed, default=0, help="The seed of all random numbers.")
    parser.add_class_arguments(RoleOptions, "writer")
    parser.add_class_arguments(EndpointOptions, "endpoint", skip={"token_limit", "cost_limit", "time_limit"})
    add("--budget-tokens", type=Count | None, help="Stop when the endpoint has used this number of tokens.")
    add("--budget-cost", type=Positive | None, help="Stop when it has cost this much, in the currency of the price.")
    add("--failures", type=NonNegativeInt, default=10, help="Number of scenes that may fail before the others stop.")
    add("--data.root", type=str, default="embedded", help="Sample events that are in this root's test traces are "
        "removed, and example events of the scenes are compared with these traces.")  # fmt: skip
    add("--contaminated", action="store_true", help="Keep such sample events, and mark the scenes.")
    return parser.with_output_options()


def scenes(options: "Namespace") -> None:
    """Write scenes, summary and report."""
    seeds = embedded_seeds() if options.seeds is None else read_seeds(options.seeds)
    tested = events_of_test_traces(options.data.root)
    seeds, samples = without_test_samples(seeds, tested, options.contaminated)
    samples = {"root": options.data.root, **samples}
    limits = Limits(options.scenes_at_once, options.failures)
    config = scenes_parser().dump(options)
    writing = SceneWriting(seeds, samples, tested, options.count, options.seed, limits, config)
    log = SimulationLog()
    writer: Role[SceneDraft] = ScriptedWriter(log)
    clients = []
    if kind_of("writer", options.writer) == "url":
        budget = Budget(options.budget_tokens, options.budget_cost, ("budget-tokens", "budget-cost"))
        writer, client = endpoint_role("writer", options, log, budget)
        clients.append(client)
    folder = output_folder(options.output, "scenes", LOG_FILE)
    progress = (lambda text: None) if options.quiet else say
    stopped: StoppedError | None = None
    try:
        run_until_signal(write_scenes(writing, writer, clients, log, folder, progress))
    except StoppedError as error:
        stopped = error
    record = derive_scenes(writing, writer, Price(**options.writer.price.as_dict()), log, folder)
    if not options.quiet:
        show(_table(record))
        say(f"{SCENES_FILE} and {REPORT_FILE} are in {folder}")
    if stopped:
        hint = f"{stopped.hint} To continue, give the same options with --output {folder}."
        raise UserError(stopped.what, hint) from stopped


def _table(record: dict[str, Any]) -> Table:
    contamination = record["contamination"]
    table = Table(title="Scenes, CONTAMINATED" if contamination["contaminated"] else "Scenes")
    table.add_column("")
    table.add_column("number", justify="right")
    found = contamination["sample_events_of_test_traces"]
    lines = {
        **{f"scenes: {end}": count for end, count in record["scenes"]["ends"].items()},
        **{f"failures: {cause}": count for cause, count in record["scenes"]["failures"].items()},
        "near-duplicate scenes": len(record["near_duplicates"]),
        **{f"sample events: {kind}": count for kind, count in contamination["sample_events"].items()},
        **{f"in the test traces of {contamination['root']}: {kind}": count for kind, count in found.items()},
        "example events of the scenes": contamination["examples"],
        f"in the test traces of {contamination['root']}": contamination["examples_of_test_traces"],
    }
    for name, value in lines.items():
        table.add_row(name, f"{value:,}")
    return table
