"""`python -m proactive.evaluate agent`: an agent answers the events of traces, and a judge accepts or rejects."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from callbacks.progress import counted
from datamodules.errors import UserError
from datamodules.files.run_folders import METRICS_FILE, REPORT_FILE, missing_folders, output_folder, remove_empty
from datamodules.prompting.chat_prompts import JUDGE_PROMPT
from datamodules.ranges import Tries
from models.judging.endpoint import EndpointOptions
from proactive.agent_options import add_agent_options, add_gate_options
from proactive.endpoints import add_endpoint_options
from proactive.evaluation.carry_out import ANSWERS_FILE, VERDICTS_FILE, carry_out
from proactive.evaluation.prepare import prepare
from proactive.event_loop import SignalReceivedError, run_until_signal
from proactive.parser import Parser
from proactive.tables import agent_tables, show
from proactive.terminal import same_command, say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def agent_parser() -> Parser:
    """The options of `evaluate agent`."""
    parser = Parser(prog="evaluate agent", description="Measure an agent by the verdicts of a judge.")
    add = parser.add_argument
    add_agent_options(parser)
    add("--judge.checkpoint", type=Path, nargs="+", help="Judge: a run, checkpoint or export of a reward classifier. "
        "Of several, each trace uses one that neither trained nor validated on it, if there is one.")  # fmt: skip
    add_endpoint_options(parser, "judge", "Judge: a generative reward model at this endpoint.", JUDGE_PROMPT)
    add("--judge.attempts", type=Tries, default=3, help="Maximum number of requests until a verdict can be parsed.")
    add("--judge.recorded", action="store_true", help="Judge: the judgments in the recorded traces.")
    add("--data.root", type=str, help="Root of the test traces and of splits.json: embedded, published or a folder. "
        "Default: the root that agent or judge trained on, else embedded.")  # fmt: skip
    add(
        "--candidates",
        type=Tries | None,
        help="Answers after each event. An event is accepted if any candidate is. Default: one, or all recorded.",
    )
    add_gate_options(parser, "Of several, each trace uses one as for the judge.")
    add("--gate-is-judge", action="store_true", help="Allow the judge's weights as gate, and mark the result.")
    add(
        "--contaminated",
        action="store_true",
        help="Allow an agent, judge or gate that trained on the traces, and mark the result.",
    )
    parser.add_class_arguments(EndpointOptions, "endpoint")
    add("--output", type=Path, help="Folder to write. The folder of a stopped evaluation resumes it. "
        "Default: a new one in runs/evaluate.")  # fmt: skip
    return parser.with_output_options()


def evaluate_agent_command(options: "Namespace", arguments: Sequence[str]) -> None:
    """Evaluate, write the folder, print the tables. An interrupted evaluation prints how to resume."""
    evaluation = prepare(options)
    around = missing_folders(options.output or Path("runs", "evaluate"))
    folder = output_folder(options.output, "evaluate", ANSWERS_FILE)
    try:
        record = run_until_signal(carry_out(evaluation, folder, partial(counted, quiet=options.quiet)))
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
