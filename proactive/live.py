"""`python -m proactive.live`: watch, decide, offer help, and learn from the answers."""

if __name__ == "__main__":
    from proactive.commands import start

    start("live")

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from datamodules.files.run_folders import latest_run_folder, missing_folders, output_folder, remove_empty
from proactive.agent_options import given_weights
from proactive.assistant.assistant import Assistant
from proactive.assistant.session_checks import checked_source
from proactive.assistant.session_export import export_sessions
from proactive.assistant.session_folders import make_private, private_files, remove_older
from proactive.assistant.session_log import SESSION_FILE, Entry
from proactive.assistant.session_options import session_parser
from proactive.assistant.session_summary import summary, summary_table
from proactive.assistant.terminal_lines import lines_of
from proactive.commands import program
from proactive.event_loop import SignalReceivedError, run_until_signal
from proactive.parser import Parser
from proactive.tables import show
from proactive.terminal import quiet_imports, same_command, say

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from proactive.assistant.session_setup import Session

NAME = "live"
DEFAULT_RUN = "reward"  # the name of the runs of `python -m proactive.fit`
FIT = (sys.executable, "-m", "proactive.fit")


def main(arguments: list[str]) -> None:
    """Parse, and run a session or export some."""
    parser = session_parser(program(NAME))
    subcommands = parser.add_subcommands(required=False)
    subcommands.add_subcommand("export", _export_parser(), help="write sessions as training data")
    options = parser.parse_args(arguments)
    if options.subcommand == "export":
        _export(options.export)
    else:
        _run(options, arguments)


def _export_parser() -> Parser:
    parser = Parser(prog="live export", description="Write the answers of sessions as training data.")
    parser.add_argument("sessions", type=Path, nargs="+", help="Folders of sessions.")
    parser.add_argument("--output", type=Path, required=True, help="The folder to make, which --data.root takes.")
    return parser.with_output_options()


def _export(options: "Namespace") -> None:
    with private_files():
        counts = export_sessions(options.sessions, options.output)
    if not options.quiet:
        said = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        say(f"{options.output}: {said}")
        say(f"to read: python -m proactive.annotate serve {options.output}")


def _run(options: "Namespace", arguments: Sequence[str]) -> None:
    source = checked_source(options)
    gates = options.gate or (given_weights("--gate", [_default_gate()]) if source is None else [])
    with quiet_imports():
        from proactive.assistant.session_setup import prepare

    session = prepare(options, source, gates)
    if options.keep is not None:
        for removed in remove_older(Path("runs", NAME), options.keep, options.output):
            say(f"removed {removed}: it was kept for {options.keep} days")
    around = missing_folders(options.output or Path("runs", NAME))
    tell: Callable[[str], None] = (lambda text: None) if options.quiet else say
    for note in session.notes:
        tell(note)
    with private_files():
        folder = output_folder(options.output, NAME, SESSION_FILE)
        make_private(folder)
        try:
            run_until_signal(_watch(session, folder, tell))
        except UserError:
            _remove_without_entries(folder, around)
            raise
        except SignalReceivedError as stop:
            say(f"stopped; to continue: {same_command('live', arguments, folder)}", to_stderr=True)
            if stop.number != signal.SIGINT:  # Ctrl-C is how a session ends; what follows needs no time
                raise
    if not options.quiet:
        show(summary_table(summary(folder)))
        say(f"{folder / SESSION_FILE} is the log; next: python -m proactive.live export {folder} --output DIR")


def _remove_without_entries(folder: Path, around: Sequence[Path]) -> None:
    """Remove the folder of a session that failed before its first entry, and the folders made for it."""
    log = folder / SESSION_FILE
    if log.is_file() and log.read_bytes().count(b"\n") <= 1:
        log.unlink()
        remove_empty(dict.fromkeys([folder, *around]))


async def _watch(session: "Session", folder: Path, tell: Callable[[str], None]) -> None:
    def told(entry: Entry) -> None:
        for line in lines_of(entry):
            tell(line)
        sys.stdout.flush()

    async with contextlib.AsyncExitStack() as stack:
        for client in session.clients:
            await stack.enter_async_context(client)
        await Assistant(replace(session.parts, on_entry=told)).run(folder / SESSION_FILE, session.settings)


def _default_gate() -> Path:
    """The newest run of the default classifier; it is trained if there is none."""
    with contextlib.suppress(UserError):
        return latest_run_folder(Path("runs"), DEFAULT_RUN)
    say(f"no run in runs/{DEFAULT_RUN}: the default classifier is trained first, as python -m proactive.fit does")
    sys.stdout.flush()
    if subprocess.run(FIT, check=False).returncode:  # noqa: S603 - the command is ours
        raise UserError("the default classifier could not be trained", "Give a reward classifier with --gate.")
    return latest_run_folder(Path("runs"), DEFAULT_RUN)
