"""Configurations: files, recipes, and the config.yaml of a run that is resumed."""

from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from datamodules.errors import UserError, did_you_mean
from datamodules.files.run_folders import CONFIG_FILE, FOLDS_FILE
from datamodules.files.safe_yaml import parse_yaml
from proactive.fitting.arguments import DEFAULT_TASK, FOLDS, named_task, read_config, scan
from proactive.fitting.foreign import GROUPS, refuse_foreign
from proactive.fitting.resume import resumed_folder
from proactive.recipes import config_file
from proactive.tasks import TASKS

NOT_IN_CONFIG = (FOLDS, "config", "ckpt_path", "quiet", "debug")  # options of one call, not of the run


class MergedConfigs(ActionConfigFile):
    """The --config option. A later configuration changes single fields of a mapping, as the command line does."""

    @staticmethod
    def apply_config(parser: LightningArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        before = cfg.clone()
        ActionConfigFile.apply_config(parser, cfg, dest, config_file(value))
        for name, mapping in cfg.items():
            if isinstance(mapping, dict) and isinstance(before.get(name), dict):
                cfg[name] = _merged(before[name], mapping)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings. Fields of the second override those of the first."""
    both = {
        name: _merged(first[name], value)
        for name, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(name), dict)
    }
    return {**first, **second, **both}


def task_of(arguments: list[str]) -> str:
    """The task to train: from --task, else from the last configuration that names one, else the default.

    Raises:
        UserError: There is no such task, or a configuration cannot be read.
    """
    task = named_task(arguments)
    if task not in list(TASKS):  # a list, because a configuration may give an unhashable value
        raise UserError(f"task: there is no task {task}{did_you_mean(str(task), TASKS)}", f"Use {' or '.join(TASKS)}.")
    return str(task)


def with_config_of_resumed_run(arguments: list[str]) -> list[str]:
    """Put the configuration of the run to resume first, unless the arguments give a configuration.

    Raises:
        UserError: There is no such run, or its configuration could run code; see `refuse_foreign`.
    """
    found = scan(arguments)
    if found.ckpt_path is None or found.config:
        return arguments
    folder = resumed_folder(found.root, found.name or found.task or DEFAULT_TASK, found.ckpt_path)
    files = [folder / name for name in (CONFIG_FILE, FOLDS_FILE)] if folder else []
    config = next((path for path in files if path.is_file()), None)
    if config is None:
        return arguments
    content = refuse_foreign(config, read_config(str(config)), arguments)
    return ["--config", yaml.safe_dump(content, sort_keys=False), *arguments]


def all_options(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """All options of a run as plain values, with their defaults."""
    content = parse_yaml(parser.dump(config, skip_unset=False, skip_validation=True))
    return {key: value for key, value in content.items() if key not in NOT_IN_CONFIG}


def changed_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults, by full name, such as model.dropout. Groups are mappings."""
    changed: dict[str, Any] = {}
    for name, value in options.items():
        default = defaults.get(name)
        if name in GROUPS:
            inner = changed_options(value, default or {})
            changed |= {f"{name}.{one}": given for one, given in inner.items()}
        elif value != default:
            changed[name] = value
    return changed
