"""What an error of the command line says of names that are spelled almost right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proactive import annotate, evaluate, export, fit, inspect, live, plan
from tests.proactive.conftest import Ended

MISSPELLED: list[tuple[Any, list[str], str]] = [  # a command, its arguments, what was meant
    (fit, ["--model.lerning_rate=1e-3"], "--model.learning_rate"),
    (fit, ["--data.rooot", "x"], "--data.root"),
    (fit, ["data.root=x"], "--data.root"),
    (fit, ["--learning_rate=1"], "--model.learning_rate"),
    (fit, ["--model.adapter.rnk=3"], "rank"),
    (fit, ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.montor=x"], "monitor"),
    (fit, ["--model.optimizer=adamww"], "adamw"),
    (fit, ["--data.split=by_scenes"], "by_scene"),
    (fit, ["--trainer.precision=bf16-mxed"], "bf16-mixed"),
    (fit, ["--trainer.strategy=fully_shard"], "fully_sharded"),
    (fit, ["--trainer.accelerator=cpuu"], "cpu"),
    (fit, ["--run.monitor=validation/aurok"], "validation/auroc"),
    (fit, ["--task=rewrd"], "reward"),
    (fit, ["--config=reward/tinny"], "reward/tiny"),
    (fit, ["--config=configs/agent/qlora.yaml"], "agent/qlora"),
    (fit, ["--config={data: {roott: x}}"], "data.root"),
    (fit, ["--config={dat: {root: x}}"], "data.root"),
    (fit, ["--config={model: {adapter: {rnk: 3}}}"], "rank"),
    (fit, ["--config={model: {optimizer: adamww}}"], "adamw"),
    (plan, ["--memry=4GiB"], "--memory"),
    (plan, ["--config=agent/tinny"], "agent/tiny"),
    (plan, ["--device=h10"], "h100"),
    (evaluate, ["agnt"], "agent"),
    (evaluate, ["reward", "--data.roott=x", "--checkpoint=x"], "--data.root"),
    (evaluate, ["agent", "--judge.chekpoint=x"], "--judge.checkpoint"),
    (inspect, ["--jsn"], "--json"),
    (export, ["--chekpoint=x"], "--checkpoint"),
    (annotate, ["exprt"], "export"),
]


@pytest.mark.parametrize(("module", "arguments", "meant"), MISSPELLED, ids=[" ".join(case[1]) for case in MISSPELLED])
def test_a_misspelled_name_gets_a_suggestion(
    module: Any, arguments: list[str], meant: str, call: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = call(module.main, *arguments)
    assert (ended.code, ended.out) == (2, "")
    error, help_line = ended.err.splitlines()
    assert error.endswith(f"; did you mean {meant}?")
    assert help_line.startswith("  help: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--zzz=1"], ["--trainer.foo=1"], ["--data.split=tomorrow"], ["--config={nothing: 1}"], ["--config=zzz"]],
    ids=str,
)
def test_a_name_unlike_any_other_gets_no_suggestion(arguments: list[str], call: Callable[..., Ended]) -> None:
    ended = call(fit.main, *arguments)
    assert ended.code == 2
    assert "did you mean" not in ended.err


@pytest.mark.parametrize(
    ("module", "arguments", "error", "help_line"),
    [
        (fit, ["--data.split=all"], "data.split: expected one of published, by_scene, got all", "fit"),
        (
            evaluate,
            ["reward", "--checkpoint=x", "--data.split=tomorrow"],
            "data.split: expected one of published, by_scene, all, got tomorrow",
            "evaluate reward",
        ),
        (
            fit,
            ["--model.adapter.targets=3"],
            "model.adapter.targets: expected one of all-linear, or a list, got 3",
            "fit",
        ),
        (live, ["--tools", "rm"], "tools: expected one of save_draft, got rm", "live"),
        (live, ["--privacy.exclude_apps=["], "privacy.exclude_apps: expected list, got [", "live"),
        (
            live,  # not: invalid choice: 'x' (choose from 'export')
            ["--agnt.baseline", "x"],
            "unrecognized arguments: --agnt.baseline; did you mean --agent.baseline?",
            "live",
        ),
    ],
)
def test_a_value_that_is_none_of_an_options_values_is_told_which_are(
    module: Any, arguments: list[str], error: str, help_line: str, call: Callable[..., Ended]
) -> None:
    assert call(module.main, *arguments).err.splitlines() == [
        f"error: {error}",
        f"  help: See proactive {help_line} --help.",
    ]
