"""`python -m proactive.evaluate agent`: an agent answers the events of traces, and a judge accepts or rejects."""

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
from models.judging.budget import Price
from models.judging.endpoint import EndpointOptions
from models.judging.local_agent import AnswerOptions
from proactive.evaluation.carry_out import ANSWERS_FILE, VERDICTS_FILE, carry_out
from proactive.evaluation.prepare import prepare
from proactive.parser import Parser
from proactive.tables import agent_tables, show
from proactive.terminal import say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def _add_endpoint(parser: Parser, role: str, what: str, prompt: Path) -> None:
    """Add the options of a role's endpoint."""
    add = parser.add_argument
    add(f"--{role}.url", type=str, help=what)
    add(f"--{role}.model", type=str, help="Name of the model at the endpoint.")
    add(f"--{role}.key_variable", type=str, help="Environment variable with the endpoint's key, if it needs one.")
    add(f"--{role}.prompt", type=Path, default=prompt, help="Prompt file of the model; its comments explain it.")
    add(f"--{role}.extra", type=dict, default={}, help="More fields for each request, such as {max_tokens: 512}.")
    add(f"--{role}.structured", type=bool, default=True, help="Also request JSON from the endpoint by response_format.")
    parser.add_class_arguments(Price, f"{role}.price")


def agent_parser() -> Parser:
    """The options of `evaluate agent`."""
    parser = Parser(prog="evaluate agent", description="Measure an agent by the verdicts of a judge.")
    add = parser.add_argument
    add("--agent.checkpoint", type=Path, nargs="+", help="Agent: a run, checkpoint or export. Of several, each trace "
        "uses one that neither trained nor validated on it, if there is one, and none that trained on it. A trace that "
        "all trained on is skipped.")  # fmt: skip
    parser.add_class_arguments(AnswerOptions, "agent.answers")
    add("--agent.traces", type=Path, help="Agent: the answers recorded in this folder, in the published layout.")
    _add_endpoint(
        parser, "agent", "Agent: a model at this endpoint, for example http://localhost:8000/v1.", AGENT_PROMPT
    )
    add("--agent.baseline", type=Literal["always-propose", "never-propose"], help="Agent: a baseline.")
    add("--judge.checkpoint", type=Path, nargs="+", help="Judge: a run, checkpoint or export of a reward classifier. "
        "Of several, each trace uses one that neither trained nor validated on it, if there is one.")  # fmt: skip
    _add_endpoint(parser, "judge", "Judge: a generative reward model at this endpoint.", JUDGE_PROMPT)
    add("--judge.attempts", type=Tries, default=3, help="Maximum number of requests until a verdict can be parsed.")
    add("--judge.recorded", action="store_true", help="Judge: the judgments in the recorded traces.")
    add("--data.root", type=str, help="Root of the test traces and of splits.json: embedded, published or a folder. "
        "Default: the root that agent or judge trained on, else embedded.")  # fmt: skip
    add(
        "--candidates",
        type=Tries | None,
        help="Answers after each event. An event is accepted if any candidate is. Default: one, or all recorded.",
    )
    add("--temperature", type=Temperature, default=0.0, help="Sampling temperature of the agent.")
    add("--seed", type=Seed, default=0, help="Seed of sampling; each request adds the index of its candidate.")
    add("--gate", type=Path, nargs="+", help="A reward classifier that holds back offers below a threshold. "
        "Of several, each trace uses one as for the judge.")  # fmt: skip
    add(
        "--cost-ratio",
        type=NotNegative | None,
        help="For the gate: cost of a false alarm relative to a missed need; default 1.",
    )
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
    with _stoppable() as signals:
        try:
            record = asyncio.run(carry_out(evaluation, folder, partial(counted, quiet=options.quiet)))
        except UserError as error:
            if not _remove_without_answers(folder, around):
                raise UserError(error.what, f"{error.hint} To resume: {_same_command(arguments, folder)}") from error
            raise
        except (KeyboardInterrupt, SystemExit):
            if not signals:
                raise
            _remove_without_answers(folder, around)
            say("stopped; to resume:", to_stderr=True)
            say(f"  {_same_command(arguments, folder)}", to_stderr=True)
            raise SystemExit(128 + signals[0]) from None
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


def _same_command(arguments: Sequence[str], folder: Path) -> str:
    given = any(argument == "--output" or argument.startswith("--output=") for argument in arguments)
    return shlex.join(["python", "-m", "proactive.evaluate", *arguments, *([] if given else ["--output", str(folder)])])


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Within this context, Ctrl-C and SIGTERM raise KeyboardInterrupt. Yields the list of received signals."""
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
