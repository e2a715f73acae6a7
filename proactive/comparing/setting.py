"""Groups runs that differ in seed and fold only: together they test one setting."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from models.learning.pooling import DecidedRows, joined
from proactive.comparing.runs import ComparedRun, LeftOut


@dataclass
class Setting:
    """Runs with equal options, apart from seed and fold.

    Attributes:
        name: A letter, by which tables and plots name it.
        kind: What its runs test.
        runs: Its runs.
    """

    name: str
    kind: str
    runs: list[ComparedRun] = field(default_factory=list)

    @cached_property
    def seeds(self) -> dict[int | None, DecidedRows]:
        """The rows of each seed, of all its folds, as far as all seeds have tested them."""
        by_seed: dict[int | None, list[DecidedRows]] = {}
        for run in self.runs:
            by_seed.setdefault(run.seed, []).append(run.rows)
        return self._common({seed: joined(parts) for seed, parts in by_seed.items()})

    def baseline(self, name: str) -> list[DecidedRows] | None:
        """What a baseline decides on the rows of `seeds`, for each seed; None if a run lacks it."""
        by_seed: dict[int | None, list[DecidedRows]] = {}
        for run in self.runs:
            if name not in run.baselines:
                return None
            by_seed.setdefault(run.seed, []).append(run.baselines[name])
        return list(self._common({seed: joined(parts) for seed, parts in by_seed.items()}).values())

    @staticmethod
    def _common(seeds: dict[int | None, DecidedRows]) -> dict[int | None, DecidedRows]:
        common = frozenset.intersection(*(frozenset(rows.names) for rows in seeds.values()))
        return {seed: rows.only(common) for seed, rows in seeds.items()}

    @property
    def names(self) -> frozenset[str]:
        """The names of its rows."""
        return frozenset(next(iter(self.seeds.values())).names)

    @property
    def rows_of_some_seeds(self) -> int:
        """How many rows only some of its seeds have tested, because these have more folds."""
        return len(frozenset(name for run in self.runs for name in run.rows.names) - self.names)

    @property
    def groups(self) -> int:
        """The number of its scenes or traces."""
        return len(set(next(iter(self.seeds.values())).groups))

    @property
    def folds(self) -> list[int]:
        """The folds that its runs test."""
        return sorted({run.fold for run in self.runs if run.fold is not None})

    @property
    def where(self) -> str:
        """The folder that holds its runs and no other: of the only run, else the longest common part of the paths."""
        folders = [str(run.folder) for run in self.runs]
        if len(folders) == 1:
            return folders[0]
        common = os.path.commonpath(folders)
        return f"{common}: {', '.join(str(Path(folder).relative_to(common)) for folder in folders)}"


def group_runs(runs: Sequence[ComparedRun]) -> tuple[list[Setting], dict[Path, str]]:
    """Make settings of runs.

    A second run with the options, the seed and the fold of another one begins a setting of its own.

    Args:
        runs: Runs of one kind, in the order in which the settings are to be named.

    Returns:
        The settings, and the folders that are left out, with the reason.
    """
    found: dict[tuple[str, int], Setting] = {}
    left_out: dict[Path, str] = {}
    for run in runs:
        repeat = 0
        while (run.group, repeat) in found and _taken(found[run.group, repeat], run):
            repeat += 1
        setting = found.get((run.group, repeat))
        try:
            if setting is not None:
                _refuse_rows_twice(setting, run)
        except LeftOut as reason:
            left_out[run.folder] = str(reason)
            continue
        if setting is None:
            setting = found[run.group, repeat] = Setting(letters(len(found)), run.kind)
        setting.runs.append(run)
    return list(found.values()), left_out


def _taken(setting: Setting, run: ComparedRun) -> bool:
    return any((other.seed, other.fold) == (run.seed, run.fold) for other in setting.runs)


def _refuse_rows_twice(setting: Setting, run: ComparedRun) -> None:
    names = frozenset(run.rows.names)
    for other in setting.runs:
        if other.seed == run.seed and not names.isdisjoint(other.rows.names):
            raise LeftOut(f"it tests rows of {other.folder}, which has the same options and seed but another fold")


def letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ... for 0, 1, ..."""
    return (letters(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def differing_options(settings: Sequence[Setting]) -> dict[str, list[Any]]:
    """The options that are not equal in all settings, by full name: a value for each, None where a setting lacks it."""
    options: list[Mapping[str, Any]] = [setting.runs[0].options for setting in settings]
    names = dict.fromkeys(name for one in options for name in one)
    values = {name: [one.get(name) for one in options] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
