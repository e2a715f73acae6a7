"""A wheel and an editable installation in fresh virtual environments, used from folders that are in the way."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

import proactive
from proactive.commands import COMMANDS
from tests.helpers import ROOT, SMALL_BACKBONE
from tests.patience import HANG

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "hatchling")),
    reason="pip and hatchling, which build the wheel without network, are not installed",
)
PACKAGES = ("proactive", "callbacks", "models", "datamodules")
QUICK = [
    f"--model.scratch={json.dumps(SMALL_BACKBONE)}",
    "--data.vocabulary_size=400",
    "--data.folds=3",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.limit_test_batches=2",
    "--quiet",
]
# Runs modules with their arguments, each in a process that has imported the libraries, and nothing of ours. Prints how
# they ended.
FORKED = """
import json, os, runpy, sys, tempfile
import lightning, transformers
ended = []
for line in sys.argv[1:]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            module, *sys.argv[1:] = line.split()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            raise SystemExit("the command did not exit")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended.append([code, *((file.seek(0), file.read())[1] for file in (out, err))])
print(json.dumps(ended))
"""
Helps = dict[str, tuple[int, str, str]]


@dataclass(frozen=True)
class Installation:
    """A virtual environment with this project in it; the libraries are those that the tests run with."""

    kind: str
    venv: Path

    def started(self, command: str) -> list[str]:
        """How a command is started here, with the working folder first on the path: one way for each kind."""
        return ["python", "-m", *(["proactive", command] if self.kind == "wheel" else [f"proactive.{command}"])]

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "PL_"))}
        environment = {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        program = self.venv / "bin" / arguments[0]
        return subprocess.run(
            [program, *arguments[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG
        )


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    place = tmp_path_factory.mktemp(request.param)
    found = Installation(request.param, place / "venv")
    made = subprocess.run([sys.executable, "-m", "venv", "--without-pip", found.venv], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    inner = Path(sysconfig.get_path("purelib", vars={"base": str(found.venv)}))
    # The path alone: files like the .pth of this project's own installation there are not read.
    (inner / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    # Processes are started as on macOS: a worker imports anew what it is given.
    (inner / "spawn.pth").write_text("import multiprocessing; multiprocessing.set_start_method('spawn', force=True)\n")
    pip = [sys.executable, "-m", "pip", "--python", str(found.venv / "bin" / "python")]
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--quiet"]
    if request.param == "wheel":
        subprocess.run([*pip, "wheel", *offline, f"--wheel-dir={place}", str(ROOT)], check=True, timeout=HANG)
        subprocess.run([*pip, "install", *offline, *place.glob("*.whl")], check=True, timeout=HANG)
    else:
        subprocess.run([*pip, "install", *offline, "--editable", str(ROOT)], check=True, timeout=HANG)
    where = found.run("python", "-c", "import proactive; print(proactive.__file__)", cwd=place).stdout.strip()
    assert Path(where).is_relative_to(found.venv if request.param == "wheel" else ROOT), where
    return found


@pytest.fixture(params=["packages", "folders", "files"])
def in_the_way(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    put_in_the_way(request.param, tmp_path)
    return tmp_path


def put_in_the_way(kind: str, folder: Path) -> None:
    """Make a working folder have other things by the names of our packages, which raise when they are imported."""
    for name in ("callbacks", "models", "datamodules", "configs"):
        if kind == "files":
            (folder / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
            continue
        for path in (ROOT / name).glob("*.py"):
            (folder / name).mkdir(exist_ok=True)
            if path.name != "__init__.py" or kind == "packages":
                (folder / name / path.name).write_text("raise SystemExit('the wrong one')\n")


def test_folders_named_like_our_packages_break_no_command(installation: Installation, in_the_way: Path) -> None:
    ended = installation.run("python", "-m", "proactive.inspect", "--quiet", cwd=in_the_way)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def helps(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Helps:
    """Exit code, output and errors of each command's help, in a folder with other packages by our names."""
    folder = tmp_path_factory.mktemp("in the way")
    put_in_the_way("packages", folder)
    started = [" ".join([*installation.started(name)[2:], "--help"]) for name in COMMANDS]
    ended = installation.run("python", "-c", FORKED, *started, cwd=folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    return dict(zip(COMMANDS, json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_finds_our_packages(name: str, helps: Helps) -> None:
    code, out, err = helps[name]
    assert (code, err) == (0, "")
    assert out.startswith("usage: ")


@pytest.mark.parametrize("in_the_way", ["packages"], indirect=True)
def test_ranks_and_workers_of_a_run_find_our_packages(installation: Installation, in_the_way: Path) -> None:
    more = ["--trainer.devices=2", *["--data.num_workers=1"] * (installation.kind == "wheel")]
    ended = installation.run(*installation.started("fit"), *QUICK, *more, cwd=in_the_way)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "runs/reward/0\n"
    assert (in_the_way / "runs/reward/0/export/model.safetensors").is_file()


def test_the_command_works_from_an_empty_folder(installation: Installation, tmp_path: Path) -> None:
    ended = installation.run("proactive", "fit", *QUICK, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "runs/reward/0\n"), ended.stderr
    small = [option for option in QUICK if not option.startswith("--data.")]
    ended = installation.run("proactive", "fit", "--config", "reward/tiny", *small, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "runs/reward-tiny/0\n"), ended.stderr
    ended = installation.run("proactive", "--version", cwd=tmp_path)
    assert (ended.stdout, ended.stderr) == (f"proactive {proactive.__version__}\n", "")


def test_a_consumer_sees_the_types(installation: Installation, tmp_path: Path) -> None:
    consumer = tmp_path / "consumer.py"
    consumer.write_text(
        f"import {', '.join(PACKAGES)}\n"
        "from datamodules.errors import UserError\n"
        "reveal_type(proactive.__version__)\n"
        "UserError(5, str())\n"
    )
    ours = "mypy-" + ",".join(f"{name}.*" for name in PACKAGES)
    # To read torch and transformers, too, takes a minute.
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = skip\n[{ours}]\nfollow_imports = normal\n")
    checked = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installation.venv / "bin" / "python"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    ended = subprocess.run(
        [*checked, consumer.name], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=HANG
    )
    assert ended.stdout.splitlines() == [
        'consumer.py:3: note: Revealed type is "str"',
        'consumer.py:4: error: Argument 1 to "UserError" has incompatible type "int"; expected "str"  [arg-type]',
        "Found 1 error in 1 file (checked 1 source file)",
    ]
