"""The options of `fit`, and the trainer that they describe."""

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import SUPPRESS
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from callbacks.checkpoint_io import SafeCheckpointIO
from callbacks.export_model import ExportModel
from callbacks.fully_sharded import FullySharded
from callbacks.html_report import HtmlReport
from callbacks.metrics_file import MetricsFile
from callbacks.progress import progress_callback
from callbacks.run_facts import RunFacts
from callbacks.saving import BestCheckpoint, LastCheckpoint
from callbacks.seeding import SeedEachStep
from callbacks.stopping import StopOnSignal
from callbacks.throughput import ThroughputLog
from callbacks.watch_ranks import WatchRanks
from datamodules.errors import UserError, did_you_mean
from datamodules.escaping import error_text
from datamodules.files.run_folders import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOGS,
    METRICS_FILE,
    EmptyFolderGuard,
    RunLock,
    holds_folds,
    missing_folders,
    remove_empty,
)
from datamodules.files.writing import recover, write_atomically
from datamodules.ranges import Count, FolderName
from models.networks.network_options import ExportDtype
from proactive.commands import program
from proactive.fitting.arguments import DEFAULT_TASK, FOLDS
from proactive.fitting.configs import MergedConfigs, all_options, changed_options
from proactive.fitting.help import ALL, HelpAction
from proactive.fitting.job import choose_folder, leads_job
from proactive.fitting.resume import KeepOptions, checkpoint_to_resume, refuse_other_options, resumed_folder
from proactive.fitting.trackers import TrackerName, tracker_of
from proactive.fitting.trainer_options import REFUSED, TRAINER_DEFAULTS, refuse_impossible_options
from proactive.parser import Parser, best_reason
from proactive.tasks import TASKS


class FitParser(Parser, LightningArgumentParser):
    """LightningCLI's parser, with the errors and limits of our other parsers."""


class FitCLI(LightningCLI):
    """Parses the options of a run, and creates its model, data, trainer and run folder.

    Args:
        task: Name of the task, one of `TASKS`.
        arguments: The command line.

    Raises:
        UserError: Options are wrong, or differ from those of the run to resume.
    """

    command = "fit"

    def __init__(self, task: str, arguments: list[str]) -> None:
        self.task = TASKS[task]
        self.kept_options = KeepOptions()
        self.facts: RunFacts | None = None
        super().__init__(
            self.task.module,
            self.task.data,
            run=False,
            # --task last, so that no configuration overrides it; --print_config after the options that it prints.
            args=sorted([*arguments, f"--task={task}"], key=lambda argument: argument.startswith("--print_config")),
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": program(self.command)},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FitParser(**kwargs, add_help=False)
        parser.add_argument(
            "-h",
            "--help",
            action=HelpAction,
            command=self.command,
            task=self.task.module.task,
            help=f"Show the common options and those of this project, and exit. --help={ALL} shows all options.",
        )
        parser.add_argument(
            "-c",
            "--config",
            action=MergedConfigs,
            help="A YAML file of options, or the name of a recipe, such as reward/tiny. Later ones override.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        monitors = self.task.module.monitored_metrics
        parser.add_argument("--task", choices=list(TASKS), default=DEFAULT_TASK, help="Which model to train.")
        parser.add_argument("--run.root", type=str, default="runs", help="Folder of all run folders.")
        parser.add_argument(
            "--run.name",
            type=FolderName,
            default=self.task.module.task,
            help="Name of the run. Runs with the same name are numbered.",
        )
        parser.add_argument(
            "--run.checkpoint_every_n_steps",
            type=Count,
            default=50,
            help="Optimizer steps between saves of last.ckpt.",
        )
        parser.add_argument(
            "--run.monitor",
            choices=monitors,
            default=monitors[0],
            help="The metric that selects the best weights: highest, or lowest for a loss.",
        )
        parser.add_argument(
            "--run.resumable_best",
            type=bool,
            default=False,
            help="Whether best.ckpt contains the optimizer's state too, so that a run can resume from it.",
        )
        parser.add_argument(
            "--run.export_dtype",
            type=ExportDtype | None,
            default=None,
            help="Dtype of the export's weights. If null, the dtype in which the run stores them.",
        )
        parser.add_argument(
            "--run.tracker",
            type=TrackerName,
            default="none",
            help="Where to log besides the run folder's own files. wandb works offline unless WANDB_MODE is set, "
            "mlflow writes to mlflow.db in run.root unless MLFLOW_TRACKING_URI is set.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str,
            default=None,
            help='Resume from a checkpoint, or from "last", that of the newest run.',
        )
        parser.add_argument(
            f"--{FOLDS}",
            type=str,
            default=None,
            help="Cross-validate: a run for each fold, all or some such as 0,2,4, and their comparison.",
        )
        parser.add_argument("--quiet", action="store_true", help="Print only the run folder.")
        parser.add_argument("--debug", action="store_true", help="Show tracebacks and messages of libraries.")
        for action in parser._actions:
            if action.dest.removeprefix("trainer.") in REFUSED:
                action.help = SUPPRESS  # not in the help, and not completed
        for name, of_data in self.task.module.linked_options.items():
            parser.link_arguments(f"model.{name}", f"data.{of_data}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        refuse_impossible_options(self.config)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to resume, and take the run folder."""
        settings = self.config.run
        resumed = resumed_folder(settings.root, settings.name, self.config.ckpt_path)
        if resumed is not None and holds_folds(resumed):
            raise UserError(
                f"--ckpt_path: {resumed} holds the runs of several folds",
                "Go on with all of them: leave --config out, or give --folds all.",
            )
        self.checkpoint = checkpoint_to_resume(self.config.ckpt_path, resumed)
        self.resumed_after = 0  # optimizer steps
        if self.checkpoint is not None:
            options = all_options(self.parser, self.config)
            self.resumed_after = refuse_other_options(
                recover(Path(self.checkpoint)), options, self.task.module, resumed
            )
        leads = leads_job()  # only this process locks the run folder
        missing = missing_folders(Path(settings.root, settings.name))
        self.folder = choose_folder(Path(settings.root), settings.name, resumed)
        self.folder_is_new = leads and resumed is None
        self.new_folders = [self.folder, *missing] if self.folder_is_new else []  # innermost first
        self.guard = EmptyFolderGuard(self.new_folders) if self.folder_is_new else None
        self.lock = RunLock(self.folder) if leads else None

    def instantiate_classes(self) -> None:
        with self.without_empty_folder(), _clear_class_errors():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        with self.without_empty_folder():
            self.datamodule.order_seed = self.run_seed
            self.config.model.learning_rate = self.model.hparams["learning_rate"]  # its default depends on others
            self.kept_options.options = all_options(self.parser, self.config)
            if self.facts is not None:
                defaults = all_options(self.parser, self.parser.get_defaults())
                self.facts.options = changed_options(self.kept_options.options, defaults)

    @contextlib.contextmanager
    def without_empty_folder(self) -> Iterator[None]:
        """Remove the folder of a new run that fails before its first checkpoint, so that no resume finds it."""
        try:
            yield
        except BaseException:
            if self.folder_is_new and not (self.folder / CHECKPOINTS).exists():
                if self.guard is not None:
                    self.guard.end()  # first, because another run may take the number as soon as the folder is gone
                shutil.rmtree(self.folder, ignore_errors=True)
                remove_empty(self.new_folders[1:])
            raise

    @property
    def run_seed(self) -> int:
        """The seed of the run. `seed_everything: true` has become a number; false is 0."""
        return int(self.config.seed_everything)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init["trainer"]
        settings, folder = self.config_init["run"], self.folder
        stop = StopOnSignal()
        self.facts = RunFacts(folder)
        callbacks = [
            FirstFiles(self),
            *(options.callbacks or []),
            WatchRanks(folder),
            self.kept_options,
            self.facts,
            SeedEachStep(self.run_seed),
            stop,
            ThroughputLog(),  # before the callbacks that save: their time counts as part of the next step
            BestCheckpoint(folder / CHECKPOINTS, settings.monitor, settings.resumable_best),
            LastCheckpoint(folder / CHECKPOINTS, settings.checkpoint_every_n_steps, stop),
            ExportModel(folder, settings.export_dtype),
            HtmlReport(folder, self.task.page, self.facts),
            MetricsFile(folder, self.facts),  # last, because a run with metrics.json counts as finished
            *self.task.callbacks(folder),
        ]
        if progress := progress_callback(self.config.quiet):
            callbacks.append(progress)
        given: dict[str, Any] = {
            "callbacks": callbacks,
            "plugins": [*(options.plugins or []), SafeCheckpointIO(self.task.module)],
        }
        if isinstance(options.strategy, ModelParallelStrategy) and not isinstance(options.strategy, FullySharded):
            raise UserError(
                "trainer.strategy: checkpoints of Lightning's own ModelParallelStrategy cannot be loaded safely",
                "Use --trainer.strategy fully_sharded.",
            )
        if isinstance(options.strategy, FullySharded) or options.strategy == "fully_sharded":
            given["inference_mode"] = False  # training continues with parameters that validation gathered
        self.trackers = tracker_of(settings.tracker, folder)
        own = CSVLogger(folder, "", LOGS)  # the report reads it
        self.loggers = [own, *self._given_loggers(options.logger), *self.trackers]
        given["logger"] = False  # `FirstFiles` sets the loggers, because Lightning lets them write before that
        if options.enable_progress_bar is None:
            given["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
        try:
            return super().instantiate_trainer(**given, **kwargs)
        except (ValueError, TypeError) as error:
            reason = error_text(error, 300)
            raise UserError(
                f"trainer: {reason}{_suggestion(reason)}", "Change the trainer's options; see --help."
            ) from error

    def _given_loggers(self, given: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
        """The loggers of --trainer.logger. True is TensorBoard's."""
        if isinstance(given, Logger):
            return [given]
        if given is True:
            return [TensorBoardLogger(self.folder, "", LOGS)]
        return list(given or [])


class FirstFiles(Callback):
    """Writes config.yaml and starts the loggers after the weights are loaded.

    A run that stops earlier writes nothing, and leaves the folder of a resumed run unchanged.
    """

    def __init__(self, cli: FitCLI) -> None:
        self.cli = cli

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cli = self.cli
        if trainer.is_global_zero:
            options = all_options(cli.parser, cli.config)
            write_atomically(cli.folder / CONFIG_FILE, yaml.safe_dump(options, sort_keys=False))
            (cli.folder / METRICS_FILE).unlink(missing_ok=True)  # a run that goes on is unfinished
            _keep_earlier_curves(cli.folder / LOGS / "metrics.csv")
            if cli.guard is not None:
                cli.guard.end()
        trainer.loggers = cli.loggers
        for tracker in cli.trackers:  # Lightning logs the options of model and data
            tracker.log_hyperparams({name: all_options(cli.parser, cli.config)[name] for name in ("trainer", "run")})


def _suggestion(reason: str) -> str:
    """A similar name, for Lightning's error about an unknown strategy or accelerator."""
    found = re.search(r"invalid (?:strategy|accelerator) name: `\w+='(?P<name>[^']*)'", reason)
    known = [*StrategyRegistry.available_strategies(), *AcceleratorRegistry.available_accelerators()]
    return did_you_mean(found["name"], known) if found else ""


@contextlib.contextmanager
def _clear_class_errors() -> Iterator[None]:
    """Turn an error of a logger, callback or other class in the options into one line."""
    try:
        yield
    except ValueError as error:
        reason = best_reason(str(error)).removeprefix("Problem with given class_path ")
        missing = re.search(r"(?:pip install (?:-U )?'?|No module named ')([\w-]+)", reason)
        hint = f"Install it: pip install {missing[1]}" if missing else "Change its init_args; see --help."
        raise UserError(f"trainer: {reason.partition('. HINT')[0]}", hint) from error


def _keep_earlier_curves(path: Path) -> None:
    """Rename the log of the run so far, because Lightning's CSV logger overwrites it."""
    if path.exists():
        path.rename(path.with_name(f"metrics-{len(list(path.parent.glob('metrics-*.csv')))}.csv"))
