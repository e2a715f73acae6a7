"""`python -m proactive.evaluate reward|agent`: measure a trained model and set it beside published rows."""

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
from callbacks.saving import Interrupted, LastCheckpoint
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.rows import LayoutName
from datamodules.corpus.splits import SplitName
from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from datamodules.ranges import Count, CountOrNone, Folds, Workers
from models.learning.checkpoint_files import load_trained
from models.learning.reward_classifier import RewardClassifier
from models.reporting.run_record import tested_record
from proactive.commands import program
from proactive.evaluation.agent_command import agent_parser, evaluate_agent_command
from proactive.parser import Parser
from proactive.terminal import reward_tables, show

if TYPE_CHECKING:
    from jsonargparse import Namespace


def evaluate_reward(
    checkpoint: Path,
    root: str | None = None,
    split: SplitName | None = None,
    folds: Folds | None = None,
    fold: CountOrNone | None = None,
    prompt: str | None = None,
    layout: LayoutName | None = None,
    token_budget: Count | None = None,
    micro_batch_size: Count | None = None,
    num_workers: Workers | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Test a reward classifier; options left out are as they were in training.

    Args:
        checkpoint: A run folder (its best weights), a .ckpt file, or an export folder.
        root: Where the data is: embedded, published, or a directory in the published layout.
        split: Which rows test: published or by_scene.
        folds: For by_scene: into how many parts the scenes are divided.
        fold: For by_scene: which part tests.
        prompt: A prompt file, for a model that was trained with another prompt than the one it carries.
        layout: Score the rows as prefix trees or row by row: tree, rows, or auto.
        token_budget: For layout tree: tokens computed at once, at most.
        micro_batch_size: For layout rows: rows computed at once.
        num_workers: Processes that prepare batches.
        quiet: Without a progress bar.

    Returns:
        The record of the test, as in a run's metrics.json.
    """
    classifier, state, source = load_trained(RewardClassifier, checkpoint, "--checkpoint")
    data = RewardDataModule.from_state(
        state,
        root=root,
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
        callbacks=[LastCheckpoint(source.parent), *([progress] if progress else [])],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=isinstance(progress, ProgressBar),
        enable_checkpointing=True,
        devices=1,
    )
    with torch.random.fork_rng():
        trainer.test(classifier, data, verbose=False)
    return tested_record(trainer, classifier) | {"weights": str(source)}


def main(arguments: list[str]) -> None:
    """Parse, and carry out one of the subcommands."""
    parser = Parser(prog=program("evaluate"), description="Measure a trained model.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("reward", _reward_parser(), help="a reward classifier")
    subcommands.add_subcommand("agent", agent_parser(), help="an agent, by what a judge makes of its proposals")
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
    reward.add_argument("--output", type=Path, default=None, help="Write the figures to this JSON file.")
    reward.add_argument("--quiet", action="store_true", help="Print nothing but errors.")
    reward.add_argument("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")
    return reward


def _evaluate_reward_command(options: "Namespace") -> None:
    """Evaluate, print the tables, write the figures."""
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
