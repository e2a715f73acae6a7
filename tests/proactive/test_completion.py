"""Completion in real shells: what a person types, with Tab, and what the shell then gives the command."""

import os
import pty
import select
import shutil
import signal
import time
from pathlib import Path

import pytest

from proactive.commands import COMMANDS
from proactive.recipes import recipe_names
from tests.helpers import python_m
from tests.patience import HANG

SETUP = {  # a shell without the person's own settings, and how it is told of the script
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source {folder}/_proactive"),
    "zsh": (["zsh", "-f", "-i"], "fpath=({folder} $fpath); autoload -U compinit; compinit -u -D"),
}
TYPED = {  # what is typed, and what the command is given; in the working folder lie mine.yaml and runs/
    "eva\tag\t--judge.che\tru\t": "evaluate agent --judge.checkpoint runs/",
    "fit --data.spl\tby\t": "fit --data.split by_scene",
    "fit --model.samp\t": "fit --model.sampled_answers",  # of one task alone
    "fit --model.pool\tme\t": "fit --model.pooling mean",  # of the other
    "fit --task ag\t": "fit --task agent",
    "fit --run.monitor validation/json\t": "fit --run.monitor validation/json_validity",
    "fit --config reward/ti\t": "fit --config reward/tiny",
    "plan -c mi\t": "plan -c mine.yaml",
    "exp\t--checkpoint ru\t": "export --checkpoint runs/",
    "compl\tz\t": "completion zsh",
    "ann\texp\t": "annotate export",
}


@pytest.fixture(scope="module", params=SETUP)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """A shell's command line, and what it is told first."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    ended = python_m("proactive", "completion", request.param, cwd=folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    (folder / "_proactive").write_text(ended.stdout)
    arguments, setup = SETUP[request.param]
    return arguments, setup.format(folder=folder)


def given(shell: tuple[list[str], str], typed: str, cwd: Path) -> str:
    """What a shell in a terminal gives the command after a line is typed."""
    arguments, setup = shell
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(cwd)
        os.execvpe(arguments[0], arguments, {**os.environ, "TERM": "dumb", "PS1": "$ "})
    end = time.monotonic() + HANG

    def shown(line: str, mark: str) -> str:
        """Type a line, and wait for a mark and the end of its line."""
        os.write(terminal, line.encode())
        found = ""
        while mark not in found or "\n" not in found.partition(mark)[2]:
            assert time.monotonic() < end, found
            if select.select([terminal], [], [], 1)[0]:
                found += os.read(terminal, 65536).decode(errors="replace")
        return found.partition(mark)[2].splitlines()[0]

    try:
        # Without PATH nothing can be started: the script alone knows what there is.
        shown(f'{setup}; proactive() {{ echo "given"": $*"; }}; PATH=; echo rea\'\'dy\n', "ready")
        return shown(f"proactive {typed}\n", "given: ")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.parametrize("typed", TYPED, ids=repr)
def test_commands_options_and_values_are_completed(typed: str, shell: tuple[list[str], str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.yaml").touch()
    assert given(shell, typed, tmp_path).rstrip("/") == TYPED[typed].rstrip("/")


def test_the_script_knows_all_commands_and_recipes(shell: tuple[list[str], str], tmp_path: Path) -> None:
    assert given(shell, "no such thi\t", tmp_path) == "no such thi"
    for name in COMMANDS:
        assert given(shell, f"{name[:-1]}\t", tmp_path).split() == [name]
    for name in recipe_names():
        if sum(other.startswith(name) for other in recipe_names()) == 1:
            assert given(shell, f"fit --config {name[:-1]}\t", tmp_path).split() == ["fit", "--config", name]
