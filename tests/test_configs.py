"""Every shipped configuration, found by its place: a new file in configs/ is covered without a change here."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proactive.fitting.cli import FitCLI
from proactive.fitting.configs import task_of
from proactive.tasks import TASKS
from tests.helpers import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def clean_environment() -> Iterator[None]:
    """The command line sets the seed in the environment; here it is removed again."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


def instantiate(arguments: list[str], root: Path) -> FitCLI:
    """All that `python -m proactive.fit` makes before it reads data or makes weights."""
    arguments = [*arguments, f"--run.root={root}"]
    return FitCLI(task_of(arguments), arguments)


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each option of a configuration by its full name."""
    for name, value in content.items():
        if isinstance(value, dict) and f"{prefix}{name}" != "model.scratch":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recipe(name: str) -> dict[str, Any]:
    """The options of a recipe by full name."""
    return dict(leaves(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))))


def test_all_recipes_exist() -> None:
    names = {path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS}
    sizes = ("paper", "paper_fsdp", "tiny", "qlora", "full_1x80gb")
    assert {f"{task}/{size}.yaml" for task in ("reward", "agent") for size in sizes} <= names


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_config_is_instantiated_without_weights(path: Path, tmp_path: Path) -> None:
    given = dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
    arguments = ["--config", str(path), *(["--model.judge=a run"] if path.parent.name == "online" else [])]
    if isinstance(
        given.get("trainer.devices"), int
    ):  # of a CPU there are as many as one asks for, of GPUs there are not
        arguments.append("--trainer.accelerator=cpu")
        del given["trainer.accelerator"]
    cli = instantiate(arguments, tmp_path)
    task = TASKS[path.parent.name]
    assert isinstance(cli.model, task.module)
    assert cli.model.network is None
    assert not list(cli.model.parameters())
    assert isinstance(cli.datamodule, task.data)
    with pytest.raises(RuntimeError, match="setup"):  # no row has been read
        _ = cli.datamodule.split
    assert given
    for name, value in given.items():  # what the file says has arrived, with its type
        assert cli.config[name] == value, name
        if name.startswith("model."):
            option, *field = name.removeprefix("model.").split(".")
            found = cli.model.hparams[option]
            assert (found[field[0]] if field else found) == value, name
    assert cli.trainer.max_epochs == given["trainer.max_epochs"]
    assert cli.datamodule.batch_size == given["data.batch_size"]


def test_the_paper_recipe_has_the_papers_options() -> None:
    paper = recipe("reward/paper")
    assert paper["model.backbone"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert (paper["data.root"], paper["data.split"], paper["data.batch_size"]) == ("published", "published", 32)
    assert (paper["model.learning_rate"], paper["model.warmup_ratio"]) == (1e-5, 0.1)
    assert (paper["model.optimizer"], paper["model.weight_decay"]) == ("adamw", 0.0)  # that is Adam
    assert paper["trainer.max_epochs"] == 5


def test_the_agents_paper_recipe_has_the_papers_options() -> None:
    paper = recipe("agent/paper")
    assert paper["model.backbone"] == "Qwen/Qwen2-7B-Instruct"
    assert (paper["data.batch_size"], paper["model.learning_rate"], paper["trainer.max_epochs"]) == (32, 1e-5, 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_recipes_hold_out_scenes_except_the_papers_which_say_that_they_are_contaminated(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    of_the_papers_row = path.parent.name == "reward" and path.stem in ("paper", "paper_fsdp")
    assert yaml.safe_load(text)["data"]["split"] == ("published" if of_the_papers_row else "by_scene")
    said = " ".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    assert ("contaminated" in said) == of_the_papers_row
    assert ("--data.split by_scene" in said) == of_the_papers_row


@pytest.mark.parametrize("task", ["reward", "agent"])
def test_the_sharded_recipes_are_the_papers_on_eight_devices(task: str) -> None:
    plain, spread = (recipe(f"{task}/{name}") for name in ("paper", "paper_fsdp"))
    assert {name for name in spread if spread[name] != plain.get(name)} == {
        "trainer.devices",
        "trainer.strategy.class_path",
        "trainer.strategy.init_args.replicas",
        "run.name",
    }
    assert spread["trainer.devices"] == 8


@pytest.mark.parametrize("task", ["reward", "agent"])
def test_the_recipes_with_adapters_differ_from_the_plain_ones_in_what_is_trained(task: str) -> None:
    plain, adapters = (recipe(f"{task}/{name}") for name in ("smollm2", "smollm2_lora"))
    assert plain.keys() - adapters.keys() == {"model.freeze_layers"}
    assert {name for name in adapters if adapters[name] != plain.get(name)} == {
        *(f"model.adapter.{field}" for field in ("rank", "alpha", "dropout", "targets")),
        "model.learning_rate",
        "run.name",
    }


@pytest.mark.usefixtures("clean_environment")
def test_without_arguments_embedded_data_and_a_backbone_from_scratch_are_used(tmp_path: Path) -> None:
    cli = instantiate([], tmp_path)
    assert cli.datamodule.root == "embedded"
    assert cli.datamodule.tokenizer_name == cli.model.hparams["backbone"] == "scratch"
    assert not list(cli.model.parameters())
    assert cli.folder == tmp_path / "reward" / "0"
