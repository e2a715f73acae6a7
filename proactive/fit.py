"""`python -m proactive.fit`: train a reward classifier or an agent, test its best weights, leave a run folder."""

if __name__ == "__main__":
    from proactive.commands import start

    start("fit")

import argparse
import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Le
from jsonargparse import ActionConfigFile, Namespace
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
from callbacks.saving import BestCheckpoint, Interrupted, LastCheckpoint
from callbacks.seeding import SeedEachStep
from callbacks.throughput import ThroughputLog
from callbacks.watch_ranks import WatchRanks, following_parent
from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.run_folders import (
    CHECKPOINTS,
    CONFIG_FILE,
    EXPORT,
    LOGS,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FOLDER_VARIABLE,
    EmptyFolderGuard,
    RunLock,
    agreed_folder,
    latest_run_folder,
    missing_folders,
    new_run_folder,
    remove_empty,
)
from datamodules.files.safe_yaml import NotYamlError, parse_yaml, read_yaml
from datamodules.files.writing import write_atomically
from datamodules.ranges import (
    FINITE,
    Count,
    CountOrNone,
    FolderName,
    PositiveShare,
    Seed,
    Share,
    refuse_unsound,
)
from models.learning.checkpoint_files import BEST, LAST
from models.learning.sharded_files import is_sharded, recover
from models.reporting.run_record import tested_record
from proactive.commands import program
from proactive.foreign import GROUPS, refuse_foreign
from proactive.parser import Parser, best_reason, did_you_mean
from proactive.recipes import config_file, recipe_names
from proactive.resume import KeepOptions, nothing_left, refuse_other_options
from proactive.tasks import DEFAULT_TASK, TASKS
from proactive.terminal import say, show

TRAINER_DEFAULTS = {
    "max_epochs": 5,
    "log_every_n_steps": 5,
    "use_distributed_sampler": False,  # the data module's own sampler knows ranks and weights
    "enable_model_summary": False,
}
# Lightning's options that do nothing where the module steps by hand, with their defaults.
NOT_OURS = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None}
ENDS = Annotated[int, Ge(-1), Le(2**31 - 1), FINITE]  # -1 for none
# What Lightning's own parameters leave open; a run ends with its test, and so needs rows for it.
TRAINER_RANGES = {
    "max_epochs": ENDS | None,
    "min_epochs": CountOrNone | None,
    "max_steps": ENDS,
    "min_steps": CountOrNone | None,
    "num_nodes": Count,
    "limit_train_batches": Count | PositiveShare | None,
    "limit_val_batches": CountOrNone | Share | None,
    "limit_test_batches": Count | PositiveShare | None,
    "limit_predict_batches": CountOrNone | Share | None,
    "overfit_batches": CountOrNone | Share,
    "check_val_every_n_epoch": Count | None,
    "num_sanity_val_steps": ENDS | None,
    "log_every_n_steps": CountOrNone | None,
    "fast_dev_run": bool | CountOrNone,
    "reload_dataloaders_every_n_epochs": CountOrNone,
}
NOT_IN_CONFIG = ("config", "ckpt_path", "quiet", "debug")  # what belongs to one call, not to the run


class FitParser(Parser, LightningArgumentParser):
    """LightningCLI's parser, as those of all commands are."""


class MergedConfigs(ActionConfigFile):
    """Configurations of which a later one changes single fields of a mapping, as the command line does."""

    @staticmethod
    def apply_config(parser: LightningArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        before = cfg.clone()
        ActionConfigFile.apply_config(parser, cfg, dest, config_file(value))
        for name, mapping in cfg.items():
            if isinstance(mapping, dict) and isinstance(before.get(name), dict):
                cfg[name] = _merged(before[name], mapping)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a field, the second's counts."""
    both = {
        name: _merged(first[name], value)
        for name, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(name), dict)
    }
    return {**first, **second, **both}


class FitCLI(LightningCLI):
    """The options of a run, and the trainer that writes its folder."""

    command = "fit"

    def __init__(self, task: str, arguments: list[str]) -> None:
        self.task = TASKS[task]
        self.kept_options = KeepOptions()
        super().__init__(
            self.task.module,
            self.task.data,
            run=False,
            # The task last, whatever several configurations say; and what prints options after what sets them.
            args=sorted([*arguments, f"--task={task}"], key=lambda argument: argument.startswith("--print_config")),
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": program(self.command)},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FitParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=MergedConfigs,
            help="A YAML file of options, or a recipe by its name, such as reward/tiny; later ones count.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        figures = self.task.module.monitored_metrics
        parser.add_argument("--task", choices=list(TASKS), default=DEFAULT_TASK, help="Which model to train.")
        parser.add_argument("--run.root", type=str, default="runs", help="Where run folders are made.")
        parser.add_argument(
            "--run.name", type=FolderName, default=self.task.module.task, help="Runs of one name are numbered."
        )
        parser.add_argument(
            "--run.checkpoint_every_n_steps",
            type=Count,
            default=50,
            help="Optimizer steps between saves of last.ckpt.",
        )
        parser.add_argument(
            "--run.monitor",
            choices=figures,
            default=figures[0],
            help="The figure that the best weights have the most of; of a loss, the least.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str,
            default=None,
            help='Resume: a checkpoint, or "last" for that of the newest run.',
        )
        parser.add_argument("--quiet", action="store_true", help="Print the run folder alone.")
        parser.add_argument("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")
        parser.link_arguments("model.backbone", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.refuse_impossible_options()

    def before_instantiate_classes(self) -> None:
        run_folder = _resumed_folder(self.config.run.root, self.config.run.name, self.config.ckpt_path)
        self.checkpoint = _resume_from(self.config.ckpt_path, run_folder)
        self.resumed_after = 0  # steps
        if self.checkpoint is not None:
            options = _options(self.parser, self.config)
            path = recover(Path(self.checkpoint))
            self.resumed_after = refuse_other_options(path, options, self.task.module, run_folder)
        leads = RUN_FOLDER_VARIABLE not in os.environ and _rank() == "0"  # the others of a job share its lock
        around = missing_folders(Path(self.config.run.root, self.config.run.name))
        self.folder, self.folder_is_new = _run_folder(self.config.run, self.config.ckpt_path)
        self.new_folders = [self.folder, *around] if self.folder_is_new else []  # the innermost first
        self.guard = EmptyFolderGuard(self.new_folders) if self.folder_is_new else None
        self.lock = RunLock(self.folder) if leads else None

    def refuse_impossible_options(self) -> None:
        """Raise a UserError for options that no part of the run could use as they are."""
        for name, value in self.config.trainer.as_dict().items():
            # Where a number of batches and a share of them both serve, the parser may read 3 as 3.0.
            if name in TRAINER_RANGES and isinstance(value, float) and value > 1 and value.is_integer():
                self.config.trainer[name] = int(value)
        refuse_unsound(TRAINER_RANGES, self.config.trainer.as_dict(), "trainer")
        refuse_unsound({"seed_everything": Seed | bool}, self.config.as_dict(), "")
        if self.config.run.monitor == "validation/json_validity" and not self.config.model.sampled_answers:
            raise UserError(
                "run.monitor: no answers are sampled that validation/json_validity could be the valid share of",
                "Give model.sampled_answers, or monitor another figure.",
            )
        for name, default in NOT_OURS.items():
            if (value := self.config.trainer[name]) != default:
                raise UserError(
                    f"trainer.{name}: {value} would have no effect, for the model makes its steps itself",
                    "Use data.batch_size for the rows of a step, data.token_budget for the tokens that are computed at "
                    "once, and model.gradient_clip_norm for the greatest norm of a step's gradient.",
                )

    def instantiate_classes(self) -> None:
        with self.without_empty_folder(), _clear_class_errors():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        with self.without_empty_folder():
            self.datamodule.order_seed = self.run_seed
            self.config.model.learning_rate = self.model.hparams["learning_rate"]  # its default follows from the others
            self.kept_options.options = _options(self.parser, self.config)

    @contextlib.contextmanager
    def without_empty_folder(self) -> Iterator[None]:
        """A new run that fails before its first checkpoint leaves no folder: `--ckpt_path last` would find it."""
        try:
            yield
        except BaseException:
            if self.folder_is_new and not (self.folder / CHECKPOINTS).exists():
                if self.guard is not None:
                    self.guard.end()  # first: later it could remove the folder of a run that takes the number next
                shutil.rmtree(self.folder, ignore_errors=True)
                remove_empty(self.new_folders[1:])
            raise

    @property
    def run_seed(self) -> int:
        """What LightningCLI called seed_everything with; 0 if seed_everything is false."""
        return int(self.config.seed_everything)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init["trainer"]
        settings, folder = self.config_init["run"], self.folder
        callbacks = [
            FirstFiles(self),
            *(options.callbacks or []),
            WatchRanks(folder),
            self.kept_options,
            SeedEachStep(self.run_seed),
            ThroughputLog(),  # before the others: what they do at a step's end counts as the next step's
            BestCheckpoint(folder / CHECKPOINTS, settings.monitor),
            LastCheckpoint(folder / CHECKPOINTS, settings.checkpoint_every_n_steps),
            MetricsFile(folder),
            ExportModel(folder),
            HtmlReport(folder, self.task.page),
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
            given["inference_mode"] = False  # what is gathered for a validation is trained with afterwards
        self.loggers = [CSVLogger(folder, "", LOGS), *self._other_loggers(options.logger)]  # the report reads CSV
        given["logger"] = False  # Lightning lets loggers write before weights are loaded; see `FirstFiles`
        if options.enable_progress_bar is None:
            given["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
        try:
            return super().instantiate_trainer(**given, **kwargs)
        except (ValueError, TypeError) as error:
            reason = error_text(error, 300)
            raise UserError(
                f"trainer: {reason}{_meant(reason)}", "Change the trainer's options; see --help."
            ) from error

    def _other_loggers(self, given: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
        """TensorBoard's, or those that the user gives in its place."""
        if isinstance(given, Logger):
            return [given]
        if given is None or given is True:
            return [TensorBoardLogger(self.folder, "", LOGS)]
        return list(given or [])


def _meant(reason: str) -> str:
    """Which strategy or accelerator may have been meant, where Lightning says that it has none by a name."""
    found = re.search(r"invalid (?:strategy|accelerator) name: `\w+='(?P<name>[^']*)'", reason)
    known = [*StrategyRegistry.available_strategies(), *AcceleratorRegistry.available_accelerators()]
    return did_you_mean(found["name"], known) if found else ""


class FirstFiles(Callback):
    """Writes the run's configuration and starts its loggers once its weights are loaded.

    A run that is stopped before leaves nothing, and one that was to be resumed is as it was.
    """

    def __init__(self, cli: FitCLI) -> None:
        self.cli = cli

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cli = self.cli
        if trainer.is_global_zero:
            write_atomically(cli.folder / CONFIG_FILE, _dump_config(cli.parser, cli.config))
            _keep_earlier_curves(cli.folder / LOGS / "metrics.csv")
            if cli.guard is not None:
                cli.guard.end()
        trainer.loggers = cli.loggers


def main(arguments: list[str]) -> None:
    """Parse, fit, test, and print where the run folder is."""
    # Where rank 0 has named the folder, it has then started this process.
    with following_parent() if RUN_FOLDER_VARIABLE in os.environ else contextlib.nullcontext():
        arguments = _with_config_of_resumed_run(arguments)
        cli = FitCLI(task_of(arguments), arguments)
        with cli.without_empty_folder():
            _fit_and_test(cli)


@contextlib.contextmanager
def _clear_class_errors() -> Iterator[None]:
    """What a logger, callback or the like that is given by its class says, in one line."""
    try:
        yield
    except ValueError as error:
        reason = best_reason(str(error)).removeprefix("Problem with given class_path ")
        missing = re.search(r"(?:pip install (?:-U )?'?|No module named ')([\w-]+)", reason)
        hint = f"Install it: pip install {missing[1]}" if missing else "Change its options, its init_args; see --help."
        raise UserError(f"trainer: {reason.partition('. HINT')[0]}", hint) from error


def _fit_and_test(cli: FitCLI) -> None:
    folder, trainer = cli.folder, cli.trainer
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint, weights_only=True)
        if cli.checkpoint and trainer.is_global_zero and (said := nothing_left(trainer, cli.resumed_after)):
            say(said, to_stderr=cli.config.quiet)
        trainer.test(
            cli.model,
            cli.datamodule,
            ckpt_path=_weights_to_test(trainer, folder),
            weights_only=True,
            verbose=False,
        )
    except Interrupted as stop:
        if trainer.is_global_zero:
            saved = folder / CHECKPOINTS / LAST
            how = f"resume with: python -m proactive.fit --ckpt_path {shlex.quote(str(saved))}"
            where = "while loading" if stop.step is None else f"at step {stop.step}"
            say(f"stopped {where}; {how if saved.exists() else 'nothing was trained yet'}")
        raise SystemExit(128 + stop.signal_number if trainer.is_global_zero else 0) from None
    if not trainer.is_global_zero:
        return
    if not cli.config.quiet:
        show(*cli.task.tables(tested_record(trainer, cli.model)))
        say(f"figures {METRICS_FILE}, report {REPORT_FILE} and weights {EXPORT}/ are in the run folder:")
    say(folder)


def _run_folder(settings: "Namespace", ckpt_path: str | None) -> tuple[Path, bool]:
    """A new folder, or that of the run to resume, and whether it is new; rank 0 names it for the other processes."""
    if RUN_FOLDER_VARIABLE in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE]), False
    resumed = _resumed_folder(settings.root, settings.name, ckpt_path)
    root = Path(settings.root)
    folder = resumed or agreed_folder(root / settings.name, lambda: new_run_folder(root, settings.name))
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    return folder, resumed is None and _rank() == "0"


def _rank() -> str:
    """This process's rank, where torchrun or SLURM has started it."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _resumed_folder(root: str, name: str, ckpt_path: str | None) -> Path | None:
    """The run folder that `ckpt_path` belongs to; None if there is nothing to resume, or no run folder around it."""
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return latest_run_folder(Path(root), name)
    path = recover(Path(ckpt_path))
    if not path.is_file() and not is_sharded(path):
        raise UserError(f"--ckpt_path: there is no checkpoint {path}", "Give a .ckpt file or folder, or last.")
    folder = path.parent.parent
    return folder if (folder / CONFIG_FILE).is_file() else None


def _resume_from(ckpt_path: str | None, folder: Path | None) -> str | None:
    if ckpt_path != "last" or folder is None:
        return ckpt_path
    path = recover(folder / CHECKPOINTS / LAST)
    if not path.exists():
        say(f"{folder} was stopped before its first checkpoint; it begins anew")
        return None
    return str(path)


def task_of(arguments: list[str]) -> str:
    """Which model the arguments, or the last configuration that says so, want trained; it settles the other options."""
    found = _scan(arguments)
    named = [_read_config(config).get("task") for config in found.config]
    task = found.task or next((task for task in reversed(named) if task), DEFAULT_TASK)
    if task not in list(TASKS):  # a list, where a configuration gives one, is in no dict
        raise UserError(f"task: there is no task {task}{did_you_mean(str(task), TASKS)}", f"Use {' or '.join(TASKS)}.")
    return task


def _scan(arguments: list[str]) -> argparse.Namespace:
    """What has to be known before the options are."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--task")
    scan.add_argument("--ckpt_path")
    scan.add_argument("--config", "-c", action="append", default=[])
    scan.add_argument("--run.root", dest="root", default="runs")
    scan.add_argument("--run.name", dest="name")
    try:
        found, _ = scan.parse_known_args(arguments)
    except argparse.ArgumentError:  # the real parser says what is wrong
        found = scan.parse_args([])
    return found


def _with_config_of_resumed_run(arguments: list[str]) -> list[str]:
    """Put the configuration of the run to resume first, unless the arguments name one."""
    found = _scan(arguments)
    if found.ckpt_path is None or found.config:
        return arguments
    folder = _resumed_folder(found.root, found.name or found.task or DEFAULT_TASK, found.ckpt_path)
    config = folder / CONFIG_FILE if folder else None
    if config is None or not config.is_file():
        return arguments
    content = refuse_foreign(config, _read_config(str(config)), arguments)
    return ["--config", yaml.safe_dump(content, sort_keys=False), *arguments]


def _read_config(given: str) -> dict[str, Any]:
    """The options of a configuration: a file or a recipe, or YAML itself.

    Raises:
        UserError: It is no YAML mapping, or there is no such file or recipe.
    """
    path = config_file(given)
    try:
        content = read_yaml(Path(path)) if os.path.lexists(path) else parse_yaml(path)
    except NotYamlError as error:
        raise UserError(
            f"--config: {given} is not YAML: {error}", f"Mend it, or start from a recipe: {', '.join(recipe_names())}."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {given} holds no options", f"Start from a recipe: {', '.join(recipe_names())}.")
    for group in GROUPS:
        if not isinstance(content.get(group, {}), dict):
            raise UserError(
                f"--config: {given}: {group}: expected options, got {content[group]!r}", "Leave it out, or give some."
            )
    return content


def _options(parser: LightningArgumentParser, config: "Namespace") -> dict[str, Any]:
    """The complete configuration in plain types."""
    content = parse_yaml(parser.dump(config, skip_unset=False, skip_validation=True))
    return {key: value for key, value in content.items() if key not in NOT_IN_CONFIG}


def _dump_config(parser: LightningArgumentParser, config: "Namespace") -> str:
    """The complete configuration as YAML that --config takes."""
    return yaml.safe_dump(_options(parser, config), sort_keys=False)


def _keep_earlier_curves(path: Path) -> None:
    """Lightning's CSV logger starts its file anew; what a resumed run logged before stays beside it."""
    if path.exists():
        path.rename(path.with_name(f"metrics-{len(list(path.parent.glob('metrics-*.csv')))}.csv"))


def _weights_to_test(trainer: Trainer, folder: Path) -> str | None:
    """The best weights; the last ones if no validation has picked any."""
    best = folder / CHECKPOINTS / BEST
    return str(best) if best.exists() else None
