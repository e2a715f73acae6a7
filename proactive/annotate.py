"""`python -m proactive.annotate`: let people label offers, and read what an agent did."""

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
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from datamodules.corpus.agreement import interval
from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.simulator import simulate
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.units import read_units, units_of_rows
from datamodules.errors import UserError
from datamodules.ranges import FINITE, Tries
from proactive.annotation.export import Rule, export
from proactive.annotation.figures import agreement_figures, votes_of_project, votes_of_rows
from proactive.annotation.store import Store
from proactive.commands import program
from proactive.parser import Parser
from proactive.tables import Table, show
from proactive.terminal import say

if TYPE_CHECKING:
    from jsonargparse import Namespace

EXAMPLE_SCENES = 3
Port = Annotated[int, Ge(0), Le(65535), FINITE]


def main(arguments: list[str]) -> None:
    """Parse, and carry out one of the subcommands."""
    parser = Parser(prog=program("annotate"), description="Label offers, and read what an agent did.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("import", _import_parser(), help="traces into a project to label")
    subcommands.add_subcommand("serve", _serve_parser(), help="pages to label on, and to read traces")
    subcommands.add_subcommand("export", _export_parser(), help="annotated rows out of a project")
    subcommands.add_subcommand("agreement", _agreement_parser(), help="how far the annotators agree")
    options = parser.parse_args(arguments)
    carry_out = {"import": _import, "serve": _serve, "export": _export, "agreement": _agreement}[options.subcommand]
    carry_out(options[options.subcommand])


def _import_parser() -> Parser:
    parser = Parser(prog="annotate import", description="Take traces into a project, a unit to label for each event.")
    add = parser.add_argument
    add("traces", type=Path, nargs="+", help="A trace, a folder of traces, or one with such a folder for each agent: "
        "what several agents offered after the same events is labelled together.")  # fmt: skip
    add("--project", type=Path, required=True, help="The project's file, which is made if it is not there.")
    add("--annotators-per-unit", type=Tries, default=3, help="How many label each unit; never more do.")
    return parser.with_output_options()


def _serve_parser() -> Parser:
    parser = Parser(prog="annotate serve", description="Serve pages to label on, and to read traces, until Ctrl-C.")
    add = parser.add_argument
    add("sources", type=Path, nargs="*", help="A project's file to label; traces to read; or both. Traces are folders "
        "that `evaluate agent` wrote, traces, folders of traces, or folders of such folders, and stand side by side. "
        "Without any, an embedded example to try it, whose labels are not kept.")  # fmt: skip
    add("--annotators", type=str, nargs="+", default=[], help="Make a link for each of these names; a former link of a "
        "name is void. More can be added on the overview page.")  # fmt: skip
    add("--host", type=str, default="127.0.0.1", help="The address to listen on; 0.0.0.0 lets other machines in.")
    add("--port", type=Port, default=8765, help="The port; 0 is any that is free.")
    add("--names", type=str, nargs="+", default=[], help="By which other names people reach this server; requests for "
        "others are refused.")  # fmt: skip
    return parser.with_output_options()


def _export_parser() -> Parser:
    parser = Parser(prog="annotate export", description="Write the complete units as annotated rows to train on.")
    parser.add_argument("project", type=Path, help="The project's file.")
    parser.add_argument("--output", type=Path, required=True, help="The folder to make, which --data.root takes.")
    parser.add_argument("--rule", type=Rule, default="majority", help="Majority of each question; or as the published "
        "rows came about, where the need for help is inferred from the offers.")  # fmt: skip
    parser.add_argument("--drop-ties", action="store_true", help="Leave out what is tied and not adjudicated.")
    return parser.with_output_options()


def _agreement_parser() -> Parser:
    parser = Parser(prog="annotate agreement", description="Agreement of annotators, with intervals over traces.")
    parser.add_argument("source", type=str, help="A project's file, a .jsonl file of annotated rows, or a data root: "
        "embedded, published or a directory.")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON in place of tables.")
    return parser.with_output_options()


def _import(options: "Namespace") -> None:
    units = [unit for path in options.traces for unit in read_units(path)]
    Store.create(options.project, options.annotators_per_unit)
    with contextlib.closing(Store(options.project)) as store:
        added = store.add_units(units)
    if not options.quiet:
        say(f"{options.project}: {added} units added, {len(units) - added} were there")
        say(f"next: python -m proactive.annotate serve {options.project} --annotators NAME NAME NAME")


def _serve(options: "Namespace") -> None:
    try:
        from proactive.annotation.reader import read_sources, source_of_rows
        from proactive.annotation.server import LOOPBACK, application, listen, serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve needs {error.name}, which is not installed", "pip install 'proactive[annotate]'"
        ) from error
    with contextlib.ExitStack() as stack:
        projects = [path for path in options.sources if path.suffix != ".json" and not path.is_dir()]
        names, sources = options.annotators, []
        if len(projects) > 1:
            raise UserError(f"sources: {projects[1]} is a second project", "Serve each project on a port of its own.")
        if not options.sources:
            rows = _example_rows()
            projects = [_example(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proactive-"))), rows)]
            sources = [source_of_rows("people", rows)]
            names = names or ["you"]
            say("an example of embedded data: what is labelled is not kept")
        elif names and not projects:
            raise UserError("--annotators: there is no project to label", "Give a project's file as well.")
        store = stack.enter_context(contextlib.closing(Store(projects[0]))) if projects else None
        if paths := [path for path in options.sources if path not in projects]:
            sources = read_sources(paths)
        listening = stack.enter_context(listen(options.host, options.port))
        port, owner = listening.getsockname()[1], secrets.token_urlsafe(24)
        host = (options.names or [options.host])[0]
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
            say(f"{'overview' if store else 'traces'}: {place}/o/{owner}")
            for name, token in ((name, store.invite(name)) for name in names if store):
                say(f"{name}: {place}/a/{token}")
            if options.host not in LOOPBACK:
                say("others can reach this server, and what they send is not encrypted", to_stderr=True)
            sys.stdout.flush()
            serve(application(store, sources, owner, [*LOOPBACK, options.host, *options.names], port), listening)


def _example_rows() -> list[AnnotatedRow]:
    """The rows of a few embedded scenes."""
    train, _, _ = simulate()
    scenes = list(dict.fromkeys(row.scene for row in train))[:EXAMPLE_SCENES]
    return [row for row in train if row.scene in scenes]


def _example(folder: Path, rows: Sequence[AnnotatedRow]) -> Path:
    """A project of the units of these rows."""
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
    table = Table(title=f"Agreement: {name}", caption="with 95% intervals over traces drawn with replacement")
    table.add_column("")
    for title in ("labelled by 2 or more", "traces", "raw", "Krippendorff's alpha", "Fleiss' kappa"):
        table.add_column(title, justify="right")
    for group, found in figures.items():
        cells = [interval(found, statistic) for statistic in ("raw", "alpha", "kappa")]
        table.add_row(group, str(found["units"]), str(found["traces"]), *cells)
    return table
