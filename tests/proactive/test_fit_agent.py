"""`python -m proactive.fit --task agent`: what a run leaves behind, resumes, and says of itself."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proactive import fit
from tests.helpers import SMALL_RUN, command, small_root
from tests.proactive.fitting.test_resume import NO_CALLBACKS, assert_same_tensors, kill_at, last, load

SMALL_AGENT = ["--task=agent", *SMALL_RUN, "--model.sampled_answers=2"]
FOLDER = Path("runs", "agent", "0")
LEARN_FROM_JUDGMENTS = (["--task=preference"], ["--task=preference", "--model.objective=kto"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"), rows_per_scene=20)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_a_killed_agent_resumes_bit_identically_and_completes_its_run_folder(root: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    options = [*SMALL_AGENT, f"--data.root={root}"]
    ended = command("proactive.fit", *options, cwd=whole)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "answers to learn: " in ended.stdout
    assert command("proactive.fit", *options, kill_at(5), cwd=killed).returncode == -signal.SIGKILL
    ended = command("proactive.fit", "--task=agent", "--ckpt_path=last", NO_CALLBACKS, cwd=killed)
    assert (ended.returncode, ended.stderr) == (0, "")
    found, expected = load(last(killed / FOLDER)), load(last(whole / FOLDER))
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "calibration", "task"):
        assert_same_tensors(found[part], expected[part], part)
    assert metrics(killed / FOLDER)["test"] == metrics(whole / FOLDER)["test"]

    files = {path.name for path in (whole / FOLDER).iterdir()}
    assert {"config.yaml", "metrics.json", "report.html", "export", "checkpoints", "logs"} <= files
    assert yaml.safe_load((whole / FOLDER / "config.yaml").read_text())["task"] == "agent"
    page = (whole / FOLDER / "report.html").read_text(encoding="utf-8")
    assert "Sampled answers" in page
    assert page.count("<tr><td>6</td>") <= page.count("<tr><td>")
    assert "CONTAMINATED" not in page
    samples = (whole / FOLDER / "logs" / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert samples[0] == "epoch,step,history,event,help_needed,answer,valid"
    assert len(load(last(whole / FOLDER))["AgentDataModule"]["training_scenes"]) > 0


@pytest.mark.parametrize("options", LEARN_FROM_JUDGMENTS, ids=["dpo", "kto"])
def test_killed_preference_training_resumes_bit_identically(root: Path, tmp_path: Path, options: list[str]) -> None:
    whole, killed, folder = tmp_path / "whole", tmp_path / "killed", Path("runs", "preference", "0")
    for place in (whole, killed):
        place.mkdir()
    options = [*options, *SMALL_AGENT[1:], f"--data.root={root}"]
    ended = command("proactive.fit", *options, cwd=whole)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("reference: log-probabilities of the train rows") == 1
    assert command("proactive.fit", *options, kill_at(5), cwd=killed).returncode == -signal.SIGKILL
    ended = command("proactive.fit", "--task=preference", "--ckpt_path=last", NO_CALLBACKS, cwd=killed)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "reference: log-probabilities" not in ended.stdout  # the checkpoint has them
    found, expected = load(last(killed / folder)), load(last(whole / folder))
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "calibration", "task", "reference"):
        assert_same_tensors(found[part], expected[part], part)
    assert metrics(killed / folder)["test"] == metrics(whole / folder)["test"]
    assert "Implicit rewards of" in ended.stdout
    assert "before preference training" in ended.stdout
    page = (whole / folder / "report.html").read_text(encoding="utf-8")
    assert "Preferences" in page
    assert page.count("<th>before preference training") == 3
    assert "Rewards of held-out pairs" in page
    assert "test pairs" in (whole / folder / "export" / "README.md").read_text(encoding="utf-8")


def test_transformers_reads_the_export_and_the_conversation_format_is_accepted(
    root: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    turns = [
        {"role": "user", "content": "The user opens a file."},
        {"role": "assistant", "content": '{"proposal": "A"}'},
    ]
    told = tmp_path / "told.jsonl"
    told.write_text(json.dumps({"conversations": turns}) + "\n")
    options = [f"--data.root={root}", "--trainer.max_epochs=1", f"--data.conversations=[{told}]", "--quiet"]
    ended = call(fit.main, *SMALL_AGENT, *options)
    assert (ended.code, ended.out) == (0, "runs/agent/0\n")
    network = AutoModelForCausalLM.from_pretrained(FOLDER / "export")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "export")
    weights = load(FOLDER / "checkpoints" / "best.ckpt")["state_dict"]
    assert torch.equal(network.lm_head.weight, weights["network.lm_head.weight"])
    assert tokenizer.decode(tokenizer("a", add_special_tokens=False).input_ids) == "a"


def test_a_contaminated_run_is_marked_everywhere(root: Path, call: Callable[..., Any]) -> None:
    options = [f"--data.root={root}", "--trainer.max_epochs=1", "--data.allow_contamination=true"]
    ended = call(fit.main, *SMALL_AGENT, *options)
    assert ended.code == 0
    assert "contaminated: data.allow_contamination" in ended.out
    assert "CONTAMINATED" in ended.out
    assert metrics(FOLDER)["contamination"]["allowed"] is True
    assert metrics(FOLDER)["contamination"]["fraction"] == 1.0
    for file in ("report.html", "export/README.md"):
        assert "CONTAMINATED" in (FOLDER / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=judge"], "there is no task judge"),
        (["--task=agent", "--run.monitor=validation/accuracy"], "validation/accuracy"),
        (["--task=agent", "--data.conversations=[nothing.json]"], "nothing.json: No such file"),
        (["--task=agent", "--data.annotated=false"], "leaves no training data"),
        (["--task=agent", "--model.null_weight=-1"], "null_weight"),
        (
            ["--task=agent", "--model.scratch={model_type: bert}", "--data.max_length=512"],
            "it attends to the tokens that it predicts",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_end_in_two_lines_and_code_2(arguments: list[str], message: str, call: Callable[..., Any]) -> None:
    ended = call(fit.main, *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.splitlines()) == 2
    assert not FOLDER.exists()
