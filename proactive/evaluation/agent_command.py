"""`python -m proactive.evaluate agent`: an agent answers the events of traces, and a judge accepts or rejects."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from callbacks.progress import counted
from datamodules.errors import UserError
from datamodules.files.append_log import OtherSettingsError
from datamodules.files.run_folders import (
    ANSWERS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    VERDICTS_FILE,
    missing_folders,
    output_folder,
    remove_empty,
)
from proactive.evaluation.carry_out import carry_out
from proactive.evaluation.prepare import prepare
from proactive.event_loop import SignalReceivedError, run_until_signal
from proactive.tables import agent_tables, show
from proactive.terminal import same_command, say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def evaluate_agent_command(options: "Namespace", arguments: Sequence[str]) -> None:
    """Evaluate, write the folder, print the tables. An interrupted evaluation prints how to resume."""
    evaluation = prepare(options)
    around = missing_folders(options.output or Path("runs", "evaluate"))
    folder = output_folder(options.output, "evaluate", ANSWERS_FILE)
    try:
        record = run_until_signal(carry_out(evaluation, folder, partial(counted, quiet=options.quiet)))
    except OtherSettingsError:
        raise  # the same command would end in the same way
    except UserError as error:
        if not _remove_without_answers(folder, around):
            raise UserError(
                error.what, f"{error.hint} To resume: {same_command('evaluate', arguments, folder)}"
            ) from error
        raise
    except SignalReceivedError:
        _remove_without_answers(folder, around)
        say("stopped; to resume:", to_stderr=True)
        say(f"  {same_command('evaluate', arguments, folder)}", to_stderr=True)
        raise
    if not options.quiet:
        show(*agent_tables(record))
        say(f"metrics, judged traces and {REPORT_FILE} are in {folder}")


def _remove_without_answers(folder: Path, around: Sequence[Path]) -> bool:
    """Remove the folder of an evaluation without answers, so that the next attempt may use other options.

    Args:
        folder: Folder of the evaluation.
        around: Folders that this evaluation created around it, innermost first.

    Returns:
        Whether it was removed.
    """
    logs = [folder / name for name in (ANSWERS_FILE, VERDICTS_FILE) if (folder / name).is_file()]
    if any(path.read_bytes().count(b"\n") > 1 for path in logs) or (folder / METRICS_FILE).exists():
        return False
    for path in logs:
        path.unlink()
    remove_empty(dict.fromkeys([folder, *around]))
    return True
