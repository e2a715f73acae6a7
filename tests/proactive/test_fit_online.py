"""`python -m proactive.fit --task online`: resumes bit for bit, and ranks change nothing."""

import json
import signal
from pathlib import Path

import pytest

from tests.helpers import SMALL_RUN, command, small_root
from tests.proactive.fitting.test_resume import NO_CALLBACKS, assert_same_tensors, kill_at, last, load
from tests.proactive.test_metrics_page import NO_METRICS, page_metrics
from tests.proactive.test_ranks import NO_DROPOUT, assert_near
from tests.ranks import command_on_ranks

FOLDER = Path("runs", "online", "0")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a short run, with a trained agent and two judges."""
    place = tmp_path_factory.mktemp("trained")
    root = small_root(place / "root", rows_per_scene=20)
    # Long enough that the agent's answers are JSON, so that rewards differ.
    agent = ["--task=agent", "--trainer.max_epochs=24", "--model.learning_rate=0.01", "--model.null_weight=2"]
    agent += ["--run.monitor=validation/json_validity"]
    for arguments in (agent, ["--task=reward"], ["--task=reward", "--seed_everything=1"]):
        ended = command("proactive.fit", *SMALL_RUN, *arguments, NO_DROPOUT, f"--data.root={root}", cwd=place)
        assert (ended.returncode, ended.stderr) == (0, "")
    runs = place / "runs"
    return [
        "--task=online",
        *SMALL_RUN[1:],
        f"--data.root={root}",
        f"--model.backbone={runs / 'agent' / '0' / 'export'}",
        f"--model.judge={runs / 'reward' / '0'}",
        f"--model.held_out_judge={runs / 'reward' / '1'}",
        "--model.max_new_tokens=40",
        "--model.candidates=3",
        "--trainer.max_epochs=-1",
        "--trainer.log_every_n_steps=1",
    ]


def test_a_killed_run_goes_on_bit_for_bit(options: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*options, "--trainer.max_steps=7"]
    for place in (whole, killed):
        place.mkdir()
    ended = command("proactive.fit", *options, cwd=whole)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert command("proactive.fit", *options, kill_at(5), cwd=killed).returncode == -signal.SIGKILL
    ended = command("proactive.fit", "--task=online", "--ckpt_path=last", NO_CALLBACKS, cwd=killed)
    assert (ended.returncode, ended.stderr) == (0, "")
    found, expected = load(last(killed / FOLDER)), load(last(whole / FOLDER))
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "calibration", "judges", "constant_steps"):
        assert_same_tensors(found[part], expected[part], part)
    figures = [json.loads((place / FOLDER / "metrics.json").read_text())["test"] for place in (whole, killed)]
    assert figures[0] == figures[1]
    assert figures[0]["raw"]["reward"] > -1  # some answers are readable
    page = (whole / FOLDER / "report.html").read_text(encoding="utf-8")
    for title in ("held-out judge", "Rewards of answers", "Offers and silence", "Divergence from the reference"):
        assert title in page
    logged = set((whole / FOLDER / "logs" / "metrics.csv").read_text().splitlines()[0].split(","))
    assert page_metrics("Online training") <= logged
    assert logged <= set[str]().union(NO_METRICS, *map(page_metrics, ("All tasks", "Agent", "Online training")))


def test_ranks_write_and_learn_the_same_answers(options: list[str], tmp_path: Path) -> None:
    for ranks, name, more in ((1, "alone", []), (2, "shared", ["--trainer.devices=2", "--trainer.strategy=ddp"])):
        (tmp_path / name).mkdir()
        steps = ["--trainer.max_steps=3", "--trainer.callbacks+=tests.helpers.KeepFirstGradient"]
        ended = command_on_ranks(ranks, "proactive.fit", *options, *steps, *more, "--quiet", cwd=tmp_path / name)
        assert (ended.returncode, ended.stdout) == (0, f"{FOLDER}\n"), ended.stderr
    alone, shared = (tmp_path / name for name in ("alone", "shared"))
    assert_near(load(shared / "first_gradient.pt"), load(alone / "first_gradient.pt"), 1e-5)
    found, expected = (load(last(place / FOLDER))["state_dict"] for place in (shared, alone))
    assert_near(found, expected, 1e-4)
