"""`python -m proactive.annotate`: label offers of help, measure agreement, export annotated rows, read traces."""

if __name__ == "__main__":
    from proactive.commands import start

    start("annotate")

import contextlib
import json
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.corpus.agreement import interval
from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.simulator import simulate
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.units import read_units, units_of_rows
from datamodules.errors import UserError
from datamodules.ranges import Port, Tries
from proactive.annotation.agreement_by_group import agreement_figures, votes_of_project, votes_of_rows
from proactive.annotation.labelled_rows import Rule, export
from proactive.annotation.store import Store
from proactive.commands import program
from proactive.parser import Parser
from proactive.tables import Table, show
from proactive.terminal import say

if TYPE_CHECKING:
    from jsonargparse import Namespace

EXAMPLE_SCENES = 3


def main(arguments: list[str]) -> None:
    """Parse, and carry out one of the subcommands."""
    parser = Parser(prog=program("annotate"), description="Label offers of help, and read traces.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("import", _import_parser(), help="import traces into a project")
    subcommands.add_subcommand("serve", _serve_parser(), help="serve pages to label units and to read traces")
    subcommands.add_subcommand("export", _export_parser(), help="export annotated rows from a project")
    subcommands.add_subcommand("agreement", _agreement_parser(), help="compute the agreement of annotators")
    options = parser.parse_args(arguments)
    carry_out = {"import": _import, "serve": _serve, "export": _export, "agreement": _agreement}[options.subcommand]
    carry_out(options[options.subcommand])


def _import_parser() -> Parser:
    parser = Parser(prog="annotate import", description="Import traces into a project, one unit per event.")
    add = parser.add_argument
    add("traces", type=Path, nargs="+", help="A trace, a folder of traces, or a folder with one such folder per agent. "
        "Offers of several agents after the same events are labelled together.")  # fmt: skip
    add("--project", type=Path, required=True, help="The project file; created if it does not exist.")
    add("--annotators-per-unit", type=Tries, default=3, help="Number of annotators who label each unit.")
    return parser.with_output_options()


def _serve_parser() -> Parser:
    parser = Parser(prog="annotate serve", description="Serve pages to label units and to read traces, until Ctrl-C.")
    add = parser.add_argument
    add("sources", type=Path, nargs="*", help="A project file to label, traces to read, or both. Traces are output "
        "folders of `evaluate agent`, trace files, folders of traces, or folders of such folders, shown side by side. "
        "Without sources, an embedded example is served, and its labels are not kept.")  # fmt: skip
    add("--annotators", type=str, nargs="+", default=[], help="Names of annotators. Each gets a new link, and an older "
        "link of the same name stops working. The overview page can add more.")  # fmt: skip
    add("--host", type=str, default="127.0.0.1", help="The address to listen on; 0.0.0.0 accepts other machines.")
    add("--port", type=Port, default=8765, help="The port; 0 chooses a free port.")
    add("--names", type=str, nargs="+", default=[], help="Other host names of this server. Requests for unknown names "
        "are refused.")  # fmt: skip
    return parser.with_output_options()


def _export_parser() -> Parser:
    parser = Parser(prog="annotate export", description="Export the complete units as annotated rows for training.")
    parser.add_argument("project", type=Path, help="The project file.")
    parser.add_argument("--output", type=Path, required=True, help="A new folder, for --data.root.")
    parser.add_argument("--rule", type=Rule, default="majority", help="majority decides each question by its majority; "
        "published uses the rule of the published rows, which infers the need for help from the offers.")  # fmt: skip
    parser.add_argument("--drop-ties", action="store_true", help="Leave out ties that are not adjudicated.")
    return parser.with_output_options()


def _agreement_parser() -> Parser:
    parser = Parser(prog="annotate agreement", description="Agreement of annotators, with intervals over traces.")
    parser.add_argument("source", type=str, help="A project file, a .jsonl file of annotated rows, or a data root: "
        "embedded, published or a directory.")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    return parser.with_output_options()


def _import(options: "Namespace") -> None:
    units = [unit for path in options.traces for unit in read_units(path)]
    Store.create(options.project, options.annotators_per_unit)
    with contextlib.closing(Store(options.project)) as store:
        added = store.add_units(units)
    if not options.quiet:
        say(f"{options.project}: {added} units added, {len(units) - added} were already there")
        names = " ".join(["NAME"] * options.annotators_per_unit)
        say(f"next: python -m proactive.annotate serve {options.project} --annotators {names}")


def _serve(options: "Namespace") -> None:
    try:
        from proactive.annotation.server import LOOPBACK, application, listen, serve
        from proactive.annotation.trace_reader import read_sources, source_of_rows
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve needs {error.name}, which is not installed", "pip install 'proactive[annotate]'"
        ) from error
    with contextlib.ExitStack() as stack:
        projects = [path for path in options.sources if path.suffix != ".json" and not path.is_dir()]
        names, sources = options.annotators, []
        if len(projects) > 1:
            raise UserError(f"sources: {projects[1]} is a second project", "Serve each project on its own port.")
        if not options.sources:
            rows = _example_rows()
            projects = [_example(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proactive-"))), rows)]
            sources = [source_of_rows("people", rows)]
            names = names or ["you"]
            say("an example with embedded data: its labels are not kept")
        elif names and not projects:
            raise UserError("--annotators: there is no project to label", "Give a project file as well.")
        store = stack.enter_context(contextlib.closing(Store(projects[0]))) if projects else None
        if paths := [path for path in options.sources if path not in projects]:
            sources = read_sources(paths)
        listening = stack.enter_context(listen(options.host, options.port))
        port, owner = listening.getsockname()[1], secrets.token_urlsafe(24)
        host = (options.names or [options.host])[0]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the server
            say(f"{'overview' if store else 'traces'}: {address}/o/{owner}")
            for name, token in ((name, store.invite(name)) for name in names if store):
                say(f"{name}: {address}/a/{token}")
            if options.host not in LOOPBACK:
                say("other machines can reach this server, and its traffic is not encrypted", to_stderr=True)
            sys.stdout.flush()
            serve(application(store, sources, owner, [*LOOPBACK, options.host, *options.names], port), listening)


def _example_rows() -> list[AnnotatedRow]:
    """Return the rows of a few embedded scenes."""
    train, _, _ = simulate()
    scenes = list(dict.fromkeys(row.scene for row in train))[:EXAMPLE_SCENES]
    return [row for row in train if row.scene in scenes]


def _example(folder: Path, rows: Sequence[AnnotatedRow]) -> Path:
    """Create a project with the units of these rows, and return its path."""
    project = folder / "example.sqlite"
    Store.create(project, 1)
    with contextlib.closing(Store(project)) as store:
        store.add_units(units_of_rows(rows))
    return project


def _export(options: "Namespace") -> None:
    with contextlib.closing(Store(options.project)) as store:
        counts = export(store, options.output, options.rule, options.drop_ties)
    if not options.quiet:
        say(f"{options.output}: {counts['rows']} rows of {counts['units']} units")
        for name, what in (
            ("incomplete", "are not complete and were left out"),
            ("ties", "had ties, which have no row"),
        ):
            if counts[name]:
                say(f"{counts[name]} units {what}")


def _agreement(options: "Namespace") -> None:
    path = Path(options.source)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if path.is_file() and path.suffix != ".jsonl":
        with contextlib.closing(Store(path)) as store:
            found[options.source] = agreement_figures(votes_of_project(store))
    else:
        found |= {name: agreement_figures(votes_of_rows(rows), names=False) for name, rows in _rows(path).items()}
    if options.json:
        say(json.dumps(found))
    elif not options.quiet:
        show(*(_agreement_table(name, figures) for name, figures in found.items()))


def _rows(path: Path) -> dict[str, list[AnnotatedRow]]:
    if path.suffix == ".jsonl":
        return {str(path): read_jsonl(path, AnnotatedRow)}
    corpus = load_corpus(str(path))
    files = {f"{path}, train": corpus.train, f"{path}, test": corpus.test}
    return {name: rows for name, rows in files.items() if rows}


def _agreement_table(name: str, figures: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"Agreement: {name}", caption="in brackets: 95% bootstrap intervals over traces")
    table.add_column("")
    for title in ("labelled by 2 or more", "traces", "raw", "Krippendorff's alpha", "Fleiss' kappa"):
        table.add_column(title, justify="right")
    for group, found in figures.items():
        cells = [interval(found, statistic) for statistic in ("raw", "alpha", "kappa")]
        table.add_row(group, str(found["units"]), str(found["traces"]), *cells)
    return table
