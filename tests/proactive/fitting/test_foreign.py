"""A run folder from somebody else, with a harmless payload in each place of its configuration: none of them runs."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.errors import UserError
from proactive import fit
from proactive.fitting.cli import FitParser
from proactive.fitting.foreign import ALLOWED_CLASSES, refuse_foreign
from proactive.parser import takes_code
from tests.proactive.bad_inputs.case import PAYLOAD, TWO_LINES, files
from tests.proactive.conftest import Ended, FinishedRun

FUNCTION = {"class_path": "os.system", "init_args": {"command": f"touch {PAYLOAD}"}}
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
MODULE = "planted.Thing"  # a module of the working folder, whose import leaves the payload


def of_class(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


PAYLOADS: dict[str, tuple[str, Any]] = {  # what is changed, and to what
    "a command in a callback": ("trainer.callbacks", [of_class(LAMBDA, on_train_start=FUNCTION)]),
    "the name of one": ("trainer.callbacks", [of_class(LAMBDA, setup="os.system")]),
    "a callback of its own": ("trainer.callbacks", [{"class_path": MODULE}]),
    "one without a list": ("trainer.callbacks", {"class_path": MODULE}),
    "by its name alone": ("trainer.callbacks", [MODULE]),
    "by a file": ("trainer.callbacks", ["planted.yaml"]),
    "an allowed one with a class inside": (
        "trainer.callbacks",
        [of_class("lightning.pytorch.callbacks.RichProgressBar", theme={"class_path": MODULE})],
    ),
    "an allowed one with a name inside": (
        "trainer.callbacks",
        [of_class("lightning.pytorch.callbacks.RichProgressBar", theme=MODULE)],
    ),
    "a logger": ("trainer.logger", {"class_path": MODULE}),
    "a logger that sends": ("trainer.logger", {"class_path": "lightning.pytorch.loggers.WandbLogger"}),
    "a list of loggers": ("trainer.logger", [True, MODULE]),
    "a strategy": ("trainer.strategy", {"class_path": MODULE}),
    "a strategy by name": ("trainer.strategy", MODULE),
    "an accelerator": ("trainer.accelerator", {"class_path": MODULE}),
    "a profiler": ("trainer.profiler", MODULE),
    "a profiler by class": ("trainer.profiler", {"class_path": MODULE}),
    "a plugin": ("trainer.plugins", [MODULE]),
    "a plugin by class": ("trainer.plugins", {"class_path": MODULE}),
    "another way to write it": ("trainer.callbacks+", [{"class_path": MODULE}]),
    "another file of options": ("trainer", "planted.yaml"),
    "another file for the model": ("model", "planted.yaml"),
    "another configuration": ("config", "planted.yaml"),
    "a class as an adapter": ("model.adapter", {"class_path": MODULE}),
    "its name as an adapter": ("model.adapter", MODULE),
    "a class as data": ("data", {"class_path": MODULE}),
    "a class as a model": ("model", of_class(MODULE)),
    "a class among the run's options": ("run", {"class_path": MODULE}),
    "code of the backbone": ("model.trust_remote_code", True),
    "code of the tokenizer": ("data.trust_remote_code", True),
    "code of the backbone, as a text": ("model.trust_remote_code", "true"),
}


@pytest.fixture
def foreign_run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of a run folder, as somebody has sent it, and what the payloads name."""
    folder = tmp_path / "runs" / "reward" / "0"
    shutil.copytree(finished_run.folder, folder)
    (tmp_path / "planted.py").write_text(f"open({PAYLOAD!r}, 'w').close()\nclass Thing: pass\n")
    planted = yaml.safe_dump({"callbacks": [{"class_path": MODULE}]})
    for place in (tmp_path, folder):
        (place / "planted.yaml").write_text(planted)
    return folder


def changed(content: dict[str, Any], option: str, value: Any) -> dict[str, Any]:
    group, _, name = option.partition(".")
    return content | {group: {**content[group], name: value} if name else value}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_the_configuration_of_a_resumed_run_is_refused(
    payload: str, call: Callable[..., Ended], foreign_run: Path, tmp_path: Path
) -> None:
    option, value = PAYLOADS[payload]
    config = foreign_run / "config.yaml"
    config.write_text(yaml.safe_dump(changed(yaml.safe_load(config.read_text()), option, value)))
    before = files(tmp_path)
    for resumed in ("last", str(foreign_run / "checkpoints" / "last.ckpt")):
        ended = call(fit.main, f"--ckpt_path={resumed}")
        assert ended.code == 2
        assert TWO_LINES.fullmatch(ended.err), ended.err
        assert str(config.relative_to(tmp_path)) in ended.err.splitlines()[0]
        assert option.rpartition(".")[2] in ended.err.splitlines()[0]
        assert files(tmp_path) == before


def test_the_payload_would_run_if_it_were_imported(
    call: Callable[..., Ended], foreign_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that a person names is imported: so the test above could fail."""
    monkeypatch.syspath_prepend(str(tmp_path))
    assert call(fit.main, f"--trainer.callbacks={json.dumps([{'class_path': MODULE}])}").code == 2
    assert (tmp_path / PAYLOAD).exists()


def test_options_on_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    content = {"trainer": {"callbacks": [{"class_path": MODULE}]}, "model": {"trust_remote_code": True}}
    given = ["--trainer.callbacks=null", "--model.trust_remote_code=true"]
    assert refuse_foreign(tmp_path, content, given) == {"trainer": {}, "model": {"trust_remote_code": True}}
    for missing in range(2):
        with pytest.raises(UserError, match=r"callbacks|trust_remote_code"):
            refuse_foreign(tmp_path, content, given[missing : missing + 1])


def test_a_configuration_that_a_run_wrote_is_accepted(finished_run: FinishedRun) -> None:
    content = yaml.safe_load((finished_run.folder / "config.yaml").read_text())
    strategy = {"class_path": "callbacks.fully_sharded.FullySharded", "init_args": {"replicas": 2}}
    logger = of_class("lightning.pytorch.loggers.TensorBoardLogger", save_dir="a/b.c", name="", default_hp_metric=True)
    for option, value in (
        ("trainer.strategy", strategy),
        ("trainer.strategy", "ddp_find_unused_parameters_true"),
        ("trainer.logger", [logger]),
        ("trainer.logger", False),
        ("trainer.profiler", "simple"),
        ("model.scratch", {"model_type": "llama", "a.b": 1}),
        ("model.adapter", {"rank": 2, "targets": ["q_proj"]}),
        ("model.backbone", "organisation/model-1.5"),
    ):
        whole = changed(content, option, value)
        assert refuse_foreign(finished_run.folder, whole, []) == whole


@pytest.mark.parametrize("path", sorted(ALLOWED_CLASSES))
def test_allowed_classes_take_no_code(path: str) -> None:
    module, _, name = path.rpartition(".")
    kind = getattr(__import__(module, fromlist=[name]), name)
    parser = FitParser()
    parser.add_class_arguments(kind, "it", fail_untyped=False)
    kinds: Mapping[str, Any] = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    assert not [name for name, annotation in kinds.items() if takes_code(annotation)]
