"""`python -m proactive.evaluate agent`: let an agent answer the events of traces, and a judge judge its answers."""

import asyncio
import contextlib
import shlex
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from callbacks.progress import counted
from datamodules.errors import UserError
from datamodules.files.run_folders import METRICS_FILE, REPORT_FILE, missing_folders, output_folder, remove_empty
from datamodules.prompting.chat_prompts import AGENT_PROMPT, JUDGE_PROMPT
from datamodules.ranges import NotNegative, Seed, Temperature, Tries
from models.judging.agents import AnswerOptions
from models.judging.budget import Price
from models.judging.endpoint import EndpointOptions
from proactive.evaluation.carry_out import ANSWERS_FILE, VERDICTS_FILE, carry_out
from proactive.evaluation.prepare import prepare
from proactive.parser import Parser
from proactive.terminal import agent_tables, say, show

if TYPE_CHECKING:
    from jsonargparse import Namespace


def agent_parser() -> Parser:
    """The options of `evaluate agent`."""
    parser = Parser(prog="evaluate agent", description="Measure an agent by what a judge makes of its proposals.")
    add = parser.add_argument
    add("--agent.checkpoint", type=Path, nargs="+", help="Agent: a run, checkpoint or export of one; of several, each "
        "trace takes one that was neither trained nor validated on it, if there is one, and never one that was trained "
        "on it: a trace that all were trained on is left out.")  # fmt: skip
    parser.add_class_arguments(AnswerOptions, "agent.answers")
    add("--agent.traces", type=Path, help="Agent: what is recorded in this folder, in the published layout.")
    add("--agent.url", type=str, help="Agent: a model behind this address, for example http://localhost:8000/v1.")
    add("--agent.model", type=str, help="The model's name there.")
    add("--agent.key_variable", type=str, help="The environment variable that holds the endpoint's key, if it has one.")
    add("--agent.prompt", type=Path, default=AGENT_PROMPT, help="What the model is told; the file explains itself.")
    add("--agent.extra", type=dict, default={}, help="More fields of each request, such as {max_tokens: 512}.")
    add("--agent.structured", type=bool, default=True, help="Ask the endpoint for JSON by response_format as well.")
    parser.add_class_arguments(Price, "agent.price")
    add("--agent.baseline", type=Literal["always-propose", "never-propose"], help="Agent: a baseline.")
    add("--judge.checkpoint", type=Path, nargs="+", help="Judge: a reward classifier's run, checkpoint or export; "
        "of several, each trace takes one that was neither trained nor validated on it, if there is one.")  # fmt: skip
    add("--judge.url", type=str, help="Judge: a generative reward model behind this address.")
    add("--judge.model", type=str, help="The model's name there.")
    add("--judge.key_variable", type=str, help="The environment variable that holds the endpoint's key, if it has one.")
    add("--judge.prompt", type=Path, default=JUDGE_PROMPT, help="What the model is told; the file explains itself.")
    add("--judge.extra", type=dict, default={}, help="More fields of each request.")
    add("--judge.structured", type=bool, default=True, help="Ask the endpoint for JSON by response_format as well.")
    parser.add_class_arguments(Price, "judge.price")
    add(
        "--judge.attempts", type=Tries, default=3, help="How often it is asked, at most, until its verdict can be read."
    )
    add("--judge.recorded", action="store_true", help="Judge: the judgments that stand in the recorded traces.")
    add("--data.root", type=str, help="Whose test traces are answered, and whose splits.json divides them: embedded, "
        "published or a folder. If left out, the root that agent or judge was trained on, else embedded.")  # fmt: skip
    add(
        "--candidates",
        type=Tries | None,
        help="Answers to each event; it counts as accepted if any is. One, or all recorded.",
    )
    add("--temperature", type=Temperature, default=0.0, help="Of the agent's sampling.")
    add("--seed", type=Seed, default=0, help="Sent with each request, plus the candidate's number.")
    add("--gate", type=Path, nargs="+", help="A reward classifier that holds back what is likelier to annoy than to "
        "help; several are chosen from as for the judge.")  # fmt: skip
    add(
        "--cost-ratio",
        type=NotNegative | None,
        help="For the gate: what a false alarm costs, in missed needs; 1 if left out.",
    )
    add("--gate-is-judge", action="store_true", help="Allow the judge's weights as gate, and stamp the result.")
    add(
        "--contaminated",
        action="store_true",
        help="Allow an agent, judge or gate trained on the traces, and stamp the result.",
    )
    parser.add_class_arguments(EndpointOptions, "endpoint")
    add("--output", type=Path, help="The folder to write; the same one goes on where an evaluation stopped. "
        "A new one in runs/evaluate if left out.")  # fmt: skip
    add("--quiet", action="store_true", help="Print nothing but errors.")
    add("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")
    return parser


def evaluate_agent_command(options: "Namespace", arguments: Sequence[str]) -> None:
    """Evaluate, write the folder, print the tables; say how to go on where that is cut short."""
    evaluation = prepare(options)
    around = missing_folders(options.output or Path("runs", "evaluate"))
    folder = output_folder(options.output, "evaluate", ANSWERS_FILE)
    with _stoppable() as signals:
        try:
            record = asyncio.run(carry_out(evaluation, folder, partial(counted, quiet=options.quiet)))
        except UserError as error:
            if not _forget_empty(folder, around):
                raise UserError(error.what, f"{error.hint} To go on: {_same_command(arguments, folder)}") from error
            raise
        except (KeyboardInterrupt, SystemExit):
            if not signals:
                raise
            _forget_empty(folder, around)
            say("stopped; to go on:", to_stderr=True)
            say(f"  {_same_command(arguments, folder)}", to_stderr=True)
            raise SystemExit(128 + signals[0]) from None
    if not options.quiet:
        show(*agent_tables(record))
        say(f"figures, judged traces and {REPORT_FILE} are in {folder}")


def _forget_empty(folder: Path, around: Sequence[Path]) -> bool:
    """Whether nothing was asked and nothing written; if so, no trace of the attempt stays, for options may change.

    Args:
        folder: The evaluation's folder.
        around: The folders that were not there before it, the innermost first.
    """
    logs = [folder / name for name in (ANSWERS_FILE, VERDICTS_FILE) if (folder / name).is_file()]
    if any(path.read_bytes().count(b"\n") > 1 for path in logs) or (folder / METRICS_FILE).exists():
        return False
    for path in logs:
        path.unlink()
    remove_empty(dict.fromkeys([folder, *around]))
    return True


def _same_command(arguments: Sequence[str], folder: Path) -> str:
    given = any(argument == "--output" or argument.startswith("--output=") for argument in arguments)
    return shlex.join(["python", "-m", "proactive.evaluate", *arguments, *([] if given else ["--output", str(folder)])])


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end what is going on, wherever it is; yields the signals that came."""
    signals: list[int] = []

    def stop(number: int, frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
