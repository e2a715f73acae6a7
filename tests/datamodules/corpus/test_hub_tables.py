"""Datasets of the Hugging Face hub: from a real server on loopback, from the cache, and without a network.

Each case is a process of its own, because the libraries read the hub's address when they are imported.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.sources import load_corpus, rows_digest
from tests.datamodules.corpus.test_tables import COLUMNS, ROW, written
from tests.helpers import environment_of_commands
from tests.hub_server import REVISION, HubServer, served
from tests.patience import HANG

SCRIPT = """
import json, sys
from datamodules.corpus.columns import Columns
from datamodules.corpus.sources import load_corpus, rows_digest
from datamodules.errors import UserError

for name in sys.argv[1:]:
    try:
        corpus = load_corpus(name, columns=Columns("events", "offer", "ok", "votes", scene="session"))
        print(json.dumps([rows_digest(corpus.train), rows_digest(corpus.test), corpus.notes]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
ROWS = [{**ROW, "offer": offer, "session": f"s{offer}"} for offer in ("a", None, "c")]


def loaded(home: Path, *names: str, url: str = "", offline: bool = False) -> list[Any]:
    """What a process loads, or the message of its error, for each name."""
    places = {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets"), "HF_HUB_CACHE": str(home / "hub")}
    settings = {"HF_ENDPOINT": url or "http://127.0.0.1:9", "HF_HUB_OFFLINE": str(int(offline))}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env={**environment_of_commands(), **places, **settings},
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=home,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_dataset_gives_the_rows_of_its_files_also_from_the_cache(tmp_path: Path, suffix: str) -> None:
    files = {
        f"{name}.{suffix}": written(tmp_path, suffix, ROWS[:number], name)
        for name, number in (("train", 3), ("test", 2))
    }
    local = load_corpus(str(tmp_path), columns=COLUMNS)
    home = tmp_path / "home"
    home.mkdir()
    server: HubServer
    with served("org/name", {name: Path(path).read_bytes() for name, path in files.items()}) as server:
        pinned = f"org/name@{REVISION}"
        first, again, unknown = loaded(home, "org/name", pinned, "org/nothing", url=server.url)
    assert first[:2] == [rows_digest(local.train), rows_digest(local.test)]
    assert first[2][:2] == [f"org/name: revision {REVISION}", "org/name, split train: 3 rows"]
    assert again == [*first[:2], [note.replace("org/name", pinned) for note in first[2]]]
    assert unknown.startswith("data.root: org/nothing is no folder, and it cannot be loaded as a dataset")
    assert "Check the name and the network" in unknown
    cached, missing = loaded(home, "org/name", "org/other", offline=True)
    assert cached == first
    assert missing.startswith("data.root: org/other is no folder, and it cannot be loaded as a dataset")
    assert "offline" in missing.lower()


def test_one_of_several_configurations_is_named(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: a\n  data_files: a/train.csv\n- config_name: b\n  data_files: b/train.csv\n---\n"
    )
    files = {"README.md": card.encode()}
    for name, rows in (("a", ROWS), ("b", ROWS[:1])):
        (tmp_path / name).mkdir()
        files[f"{name}/train.csv"] = Path(written(tmp_path / name, "csv", rows, "train")).read_bytes()
    with served("org/name", files) as server:
        neither, one, unknown = loaded(tmp_path, "org/name", "org/name:b", "org/name:c", url=server.url)
    assert "it has several configurations: ['a', 'b']\nName one: org/name:CONFIGURATION." in neither
    assert one[2][1] == "org/name:b, split train: 1 rows"
    assert unknown.startswith("data.root: org/name:c is no folder, and it cannot be loaded as a dataset")


def test_nothing_is_asked_for_a_path_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    with served("org/name", {}) as server:
        [said] = loaded(tmp_path, "org/name", url=server.url)
    assert said.startswith("data.root: org/name is not a directory")
    assert server.requests == []
