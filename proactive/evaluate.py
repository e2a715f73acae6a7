"""`python -m proactive.evaluate reward|agent`: test a trained model, and compare it with published metrics."""

if __name__ == "__main__":
    from proactive.commands import start

    start("evaluate")

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar

from callbacks.progress import progress_callback
from callbacks.stopping import Interrupted, StopOnSignal
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.rows import LayoutName
from datamodules.corpus.columns import Columns
from datamodules.corpus.splits import SplitName
from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from datamodules.ranges import Count, Folds, NonNegativeInt, Workers
from models.learning.checkpoint_files import load_trained
from models.learning.reward_classifier import RewardClassifier
from models.reporting.run_record import tested_record
from proactive.commands import program
from proactive.evaluation.agent_command import agent_parser, evaluate_agent_command
from proactive.parser import Parser
from proactive.tables import reward_tables, show

if TYPE_CHECKING:
    from jsonargparse import Namespace


def evaluate_reward(
    checkpoint: Path,
    root: str | None = None,
    columns: Columns | None = None,
    split: SplitName | None = None,
    folds: Folds | None = None,
    fold: NonNegativeInt | None = None,
    prompt: str | None = None,
    layout: LayoutName | None = None,
    token_budget: Count | None = None,
    micro_batch_size: Count | None = None,
    num_workers: Workers | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Test a reward classifier. The defaults of data options are those of its training.

    Args:
        checkpoint: A run folder (its best weights), a .ckpt file, or an export folder.
        root: Source of the data: embedded, published, a folder in the published layout, or a table.
        columns: Which columns of the table hold the fields of a row.
        split: Which rows test: published or by_scene.
        folds: For by_scene: number of parts that the scenes are divided into.
        fold: For by_scene: index of the part that tests.
        prompt: A prompt file, if the model was trained with another prompt than its checkpoint contains.
        layout: How rows are batched: tree, rows, or auto.
        token_budget: For layout tree: maximum number of tokens in a micro-batch.
        micro_batch_size: For layout rows: number of rows in a micro-batch.
        num_workers: Number of processes that load data.
        quiet: Whether to show no progress bar.

    Returns:
        The record of the test, as in a run's metrics.json.

    Raises:
        UserError: The checkpoint or the data cannot be read, or an option is not valid.
    """
    classifier, state, source = load_trained((RewardClassifier,), checkpoint, "--checkpoint")
    data = RewardDataModule.from_state(
        state,
        root=root,
        columns=columns,
        split=split,
        folds=folds,
        fold=fold,
        prompt=prompt,
        layout=layout,
        token_budget=token_budget,
        micro_batch_size=micro_batch_size,
        num_workers=num_workers,
    )
    progress = progress_callback(quiet)
    trainer = Trainer(
        logger=False,
        callbacks=[StopOnSignal(), *([progress] if progress else [])],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=isinstance(progress, ProgressBar),
        enable_checkpointing=False,
        devices=1,
    )
    with torch.random.fork_rng():
        trainer.test(classifier, data, verbose=False)
    return tested_record(trainer, classifier) | {"weights": str(source)}


def main(arguments: list[str]) -> None:
    """Parse, and run a subcommand."""
    parser = Parser(prog=program("evaluate"), description="Test a trained model.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("reward", _reward_parser(), help="a reward classifier")
    subcommands.add_subcommand("agent", agent_parser(), help="an agent, by the verdicts of a judge")
    options = parser.parse_args(arguments)
    if options.subcommand == "agent":
        evaluate_agent_command(options.agent, arguments)
    else:
        _evaluate_reward_command(options.reward)


def _reward_parser() -> Parser:
    parameters = inspect.signature(evaluate_reward).parameters
    reward = Parser(prog="evaluate reward", description=evaluate_reward.__doc__.splitlines()[0])  # type: ignore[union-attr]
    reward.add_function_arguments(
        evaluate_reward, as_group=False, skip={name for name in parameters if name != "checkpoint"}
    )
    reward.add_function_arguments(evaluate_reward, "data", skip={"checkpoint", "quiet"})
    reward.add_argument("--output", type=Path, default=None, help="Write the metrics to this JSON file.")
    return reward.with_output_options()


def _evaluate_reward_command(options: "Namespace") -> None:
    """Evaluate, write the metrics, print the tables."""
    if options.output and options.output.is_dir():
        raise UserError(f"--output: {options.output} is a folder", "Give the path of a file.")
    try:
        record = evaluate_reward(options.checkpoint, **options.data.as_dict(), quiet=options.quiet)
    except Interrupted as stop:
        raise SystemExit(128 + stop.signal_number) from None
    if options.output:
        write_atomically(options.output, json.dumps(record, indent=2) + "\n")
    if not options.quiet:
        show(*reward_tables(record))
