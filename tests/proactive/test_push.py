"""Pushing an export to a hub on loopback: what arrives there, and what does not."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datamodules.corpus.sources import load_corpus
from models.reporting.hub import push
from proactive import export
from tests.proactive.conftest import FinishedRun
from tests.push_server import PushServer, push_server

TOKEN = "hf_of_this_test"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushServer]:
    with push_server(TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the server speaks LFS
        yield server


def test_a_pushed_export_has_its_files_and_no_row_path_or_token(
    hub: PushServer, finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.folder / "export", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("of the user")
    arguments = ["--checkpoint", finished_run.folder, "--output", "out", "--push=org/judge"]
    for _ in range(2):  # the repository exists the second time
        ended = call(export.main, *arguments)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.splitlines()[0] == f"pushed to {hub.address}/org/judge"
    assert hub.repositories["org/judge"]["visibility"] == "private"
    assert len(hub.commits) == 2
    own = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "notes.txt"}
    assert hub.files.keys() == own.keys()
    assert {name for name in own if hub.files[name] != own[name]} == {"proactive.json"}
    here, there = (json.loads(files["proactive.json"]) for files in (own, hub.files))
    assert here["data"]["hyperparameters"].pop("root") == str(finished_run.root)
    assert there["data"]["hyperparameters"].pop("root") == finished_run.root.name
    assert there == here
    rows = load_corpus(str(finished_run.root), 0).train
    private = {str(tmp_path), str(finished_run.place), TOKEN, *(event.event for row in rows for event in row.history)}
    for name, content in hub.files.items():
        assert [text for text in private if len(text) > 30 and text.encode() in content] == [], name


def test_the_base_of_a_pushed_adapter_is_named_without_its_path(
    hub: PushServer, finished_run: FinishedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(finished_run.folder / "export", folder)
    state = json.loads((folder / "proactive.json").read_text())
    base = str(finished_run.folder / "export")
    state |= {"base": {"backbone": base, "digest": "0"}, "files": ["adapter_config.json"]}
    (folder / "proactive.json").write_text(json.dumps(state))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "target": ["a/b"]}))
    push(folder, "org/adapter", public=True)
    assert hub.repositories["org/adapter"]["visibility"] == "public"
    assert json.loads(hub.files["adapter_config.json"]) == {"base_model_name_or_path": "export", "target": ["a/b"]}
    assert json.loads(hub.files["proactive.json"])["base"]["backbone"] == "export"


@pytest.mark.parametrize(
    ("name", "token", "reason"),
    [
        ("judge", TOKEN, "judge is not the name of a repository"),
        ("org/../judge", TOKEN, "org/../judge is not the name of a repository"),
        ("org/judge", "", "the environment variable HF_TOKEN is not set"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    name: str, token: str, reason: str, hub: PushServer, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    (tmp_path / "no.ckpt").touch()
    ended = call(export.main, "--checkpoint=no.ckpt", "--output=out", f"--push={name}")
    assert (ended.code, ended.err.splitlines()[0]) == (2, f"error: --push: {reason}")
    assert not hub.repositories
    assert [path.name for path in tmp_path.iterdir()] == ["no.ckpt"]


def test_a_refused_push_leaves_the_export_and_says_why(
    hub: PushServer, finished_run: FinishedRun, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    ended = call(export.main, "--checkpoint", finished_run.folder, "--output", "out", "--push=org/judge")
    what, hint = ended.err.splitlines()
    assert ended.code == 2
    assert what.startswith("error: --push: org/judge was not pushed: ")
    assert "this token may not write" in what
    assert hint.endswith("the export is in out.")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not hub.files
