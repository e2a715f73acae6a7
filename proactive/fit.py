"""`python -m proactive.fit`: train a reward classifier or an agent, test its best weights, write a run folder."""

if __name__ == "__main__":
    from proactive.commands import start

    start("fit")

import contextlib
import os
import shlex

from callbacks.stopping import Interrupted
from callbacks.watch_ranks import PARENT_VARIABLE, following
from datamodules.files.run_folders import CHECKPOINTS, EXPORT, METRICS_FILE, REPORT_FILE
from models.learning.checkpoint_paths import BEST, LAST
from models.reporting.run_record import tested_record
from proactive.fitting.arguments import trains_folds
from proactive.fitting.cli import FitCLI
from proactive.fitting.configs import task_of, with_config_of_resumed_run
from proactive.fitting.job import folder_for_children, folder_from_rank_0
from proactive.fitting.resume import nothing_left
from proactive.tables import show
from proactive.terminal import say


def main(arguments: list[str]) -> None:
    """Parse, fit, test, and print the run folder."""
    with _following_parent():
        arguments = with_config_of_resumed_run(arguments)
        if trains_folds(arguments):
            from proactive.fitting.folds import cross_validate

            cross_validate(arguments)
            return
        cli = FitCLI(task_of(arguments), arguments)
        with cli.without_empty_folder(), folder_for_children(cli.folder):
            _fit_and_test(cli)


def _following_parent() -> contextlib.AbstractContextManager[None]:
    """End with the process that started this one, if that is rank 0 or the process of all folds."""
    if folder_from_rank_0():
        return following(os.getppid(), "rank 0")
    parent = os.environ.get(PARENT_VARIABLE, "")
    return following(int(parent), "the process of all folds") if parent.isdecimal() else contextlib.nullcontext()


def _fit_and_test(cli: FitCLI) -> None:
    folder, trainer = cli.folder, cli.trainer
    last, best = folder / CHECKPOINTS / LAST, folder / CHECKPOINTS / BEST
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint, weights_only=True)
        if cli.checkpoint and trainer.is_global_zero and (message := nothing_left(trainer, cli.resumed_after)):
            say(message, to_stderr=cli.config.quiet)
        trainer.test(
            cli.model,
            cli.datamodule,
            ckpt_path=str(best) if best.exists() else None,  # without a validation, the last weights
            weights_only=True,
            verbose=False,
        )
    except Interrupted as stop:
        if trainer.is_global_zero:
            where = "while loading" if stop.step is None else f"at step {stop.step}"
            resume = f"resume with: python -m proactive.fit --ckpt_path {shlex.quote(str(last))}"
            say(f"stopped {where}; {resume if last.exists() else 'no step was trained yet'}")
        raise SystemExit(128 + stop.signal_number if trainer.is_global_zero else 0) from None
    if not trainer.is_global_zero:
        return
    if not cli.config.quiet:
        show(*cli.task.tables(tested_record(trainer, cli.model)))
        say(f"metrics {METRICS_FILE}, report {REPORT_FILE} and weights {EXPORT}/ are in the run folder:")
    say(folder)
