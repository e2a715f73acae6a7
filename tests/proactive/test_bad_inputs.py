"""Bad inputs by group: none gives a traceback, hangs, is accepted, leaves files behind, or runs what it holds."""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from proactive import evaluate, export, fit, inspect, plan
from tests.helpers import SMALL_RUN, command, python_m
from tests.proactive import bad_inputs
from tests.proactive.bad_inputs.case import Case, Outcome, Place, arguments_of, carried_out, files, outcome
from tests.proactive.conftest import Ended, FinishedRun

MAINS: dict[str, Any] = {
    module.__name__.rpartition(".")[2]: module.main for module in (evaluate, export, fit, inspect, plan)
}
GROUPS: dict[str, list[Case]] = {
    name: importlib.import_module(f"{bad_inputs.__name__}.{name}").CASES
    for name in sorted(module.name for module in pkgutil.iter_modules(bad_inputs.__path__))
    if name != "case"
}
IN_A_PROCESS = 2  # of each group


@pytest.fixture
def places(finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Place]:
    """Gives a new empty working directory with each call."""
    numbers = iter(range(10_000))

    def new() -> Place:
        folder = tmp_path / str(next(numbers)) / "here"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        return Place(folder, finished_run.root, finished_run.folder, SMALL_RUN)

    return new


@pytest.mark.parametrize("group", GROUPS)
def test_each_bad_input_is_refused_in_two_lines(
    group: str, call: Callable[..., Ended], places: Callable[[], Place]
) -> None:
    found = [(case, *carried_out(case, places(), call, MAINS[case.command])) for case in GROUPS[group]]
    counts = Counter(result for _, result, _ in found)
    wrong = [f"{case.name}: {result}: {said.strip()[:300]}" for case, result, said in found if result != Outcome.RIGHT]
    assert not wrong, "\n".join([str(dict(counts)), *wrong])


def assert_refused_by_process(run: Callable[..., CompletedProcess[str]], case: Case, place: Place) -> None:
    if case.prepare:
        case.prepare(place)
    before = files(place.folder)
    ended = run(f"proactive.{case.command}", *arguments_of(case, place), cwd=place.folder)
    found = outcome(case, Ended(ended.returncode, ended.stdout, ended.stderr), before, files(place.folder))
    assert found == Outcome.RIGHT, f"{case.name}: {ended.stderr}"


@pytest.mark.parametrize("group", GROUPS)
def test_some_bad_inputs_of_each_group_as_processes(group: str, places: Callable[[], Place]) -> None:
    """With all that libraries add to standard error while a process ends."""
    cases = GROUPS[group]
    for case in cases[:: -(-len(cases) // IN_A_PROCESS)]:
        assert_refused_by_process(command, case, places())


@pytest.mark.parametrize("name", MAINS)
def test_a_bad_input_of_each_command_as_a_new_process(name: str, places: Callable[[], Place]) -> None:
    """With all that libraries add to standard error while a process starts, too."""
    case = next(case for cases in GROUPS.values() for case in cases if case.command == name)
    assert_refused_by_process(python_m, case, places())


def test_bad_inputs_have_unique_names() -> None:
    assert sum(map(len, GROUPS.values())) >= 300
    assert all(len({case.name for case in cases}) == len(cases) for cases in GROUPS.values())
