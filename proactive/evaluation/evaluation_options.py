"""The options of `proactive.evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.batching.layout_name import LayoutName
from datamodules.corpus.columns import Columns
from datamodules.corpus.splits import TestedSplit
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import JUDGE_PROMPT
from datamodules.ranges import Count, Folds, NonNegativeInt, Tries, Workers
from models.judging.endpoint import EndpointOptions
from proactive.agent_options import KINDS, add_agent_options, add_gate_options, given_weights, one_of
from proactive.endpoints import add_endpoint_options
from proactive.parser import Parser

if TYPE_CHECKING:
    from jsonargparse import Namespace


@dataclass(frozen=True)
class DataOptions:
    """The data that test a reward classifier. The defaults are those of its training.

    Args:
        root: Source of the data: embedded, published, a folder in the published layout, or a table.
        columns: Which columns of the table hold the fields of a row.
        split: Which rows test: those of published or by_scene, as in training, or all.
        folds: For by_scene: number of parts that the scenes are divided into.
        fold: For by_scene: index of the part that tests.
        prompt: A prompt file, if the model was trained with another prompt than its checkpoint contains.
        layout: How rows are batched: tree, rows, or auto.
        token_budget: For layout tree: maximum number of tokens in a micro-batch.
        micro_batch_size: For layout rows: number of rows in a micro-batch.
        num_workers: Number of processes that load data.
    """

    root: str | None = None
    columns: Columns | None = None
    split: TestedSplit | None = None
    folds: Folds | None = None
    fold: NonNegativeInt | None = None
    prompt: str | None = None
    layout: LayoutName | None = None
    token_budget: Count | None = None
    micro_batch_size: Count | None = None
    num_workers: Workers | None = None


def reward_parser() -> Parser:
    """Return the options of `evaluate reward`."""
    parser = Parser(prog="evaluate reward", description="Test a reward classifier.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="A run folder (its best weights), a .ckpt file, or an export "
        "folder.")  # fmt: skip
    parser.add_class_arguments(DataOptions, "data")
    add("--output", type=Path, default=None, help="Write the metrics to this JSON file.")
    return parser.with_output_options()


def agent_parser() -> Parser:
    """Return the options of `evaluate agent`."""
    parser = Parser(prog="evaluate agent", description="Measure an agent by the verdicts of a judge.")
    add = parser.add_argument
    add_agent_options(parser)
    add("--judge.checkpoint", type=Path, nargs="+", help="Judge: a run, checkpoint or export of a reward classifier, "
        "or the folder of a cross-validation. Of several, each trace uses one that neither trained nor validated on "
        "it, if there is one.")  # fmt: skip
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


def refuse_mistakes(options: "Namespace") -> None:
    """Refuse options of `evaluate agent` before anything is loaded, and name the folds of cross-validations.

    Raises:
        UserError: Options contradict each other, or there are no weights where they say.
    """
    who = one_of(options.agent, "agent", KINDS)
    one_of(options.judge, "judge", ("checkpoint", "url", "recorded"))
    if options.judge.recorded and who != "traces":
        raise UserError("--judge.recorded: only recorded traces have judgments", "Give them with --agent.traces.")
    if options.gate and options.judge.recorded:
        raise UserError(
            "--gate: recorded judgments have no verdict on null instead of a proposal", "Give another judge."
        )
    if options.cost_ratio is not None and not options.gate:
        raise UserError("--cost-ratio: there is no gate", "Give a reward classifier with --gate.")
    options.agent.checkpoint = given_weights("--agent.checkpoint", options.agent.checkpoint)
    options.judge.checkpoint = given_weights("--judge.checkpoint", options.judge.checkpoint)
    options.gate = given_weights("--gate", options.gate)
