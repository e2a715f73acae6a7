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
from tests.helpers import conversations_of, environment_of_commands
from tests.hub_server import REVISION, HubServer, served
from tests.patience import HANG

SCRIPT = """
import json, sys
from datamodules.corpus.columns import Columns
from datamodules.corpus.conversations import open_conversations, read_conversations, reading_notes
from datamodules.corpus.sources import load_corpus, rows_digest
from datamodules.errors import UserError

for name in sys.argv[1:]:
    try:
        if name.startswith("talks/"):
            tables = open_conversations(name)
            talks = [one.model_dump(mode="json") for one in read_conversations(tables)]
            print(json.dumps([talks, tables.digests, reading_notes(tables)]))
            continue
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
    told = "it has the configurations ['a', 'b']\nName one: org/name:CONFIGURATION."
    assert told in neither
    assert one[2][1] == "org/name:b, split train: 1 rows"
    assert unknown.startswith("data.root: org/name:c is no folder, and it cannot be loaded as a dataset")
    assert told in unknown


def test_nothing_is_asked_for_a_path_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    with served("org/name", {}) as server:
        [said] = loaded(tmp_path, "org/name", url=server.url)
    assert said.startswith("data.root: org/name: no such file or folder")
    assert server.requests == []


def test_conversations_of_a_dataset_are_those_of_its_files_also_from_the_cache(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "It fails."},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    records = [
        {"id": 1, "messages": turns},
        {"id": 2, "messages": [*turns, {"role": "assistant", "content": None, "tool_calls": [call]}]},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "train.jsonl").write_bytes(lines)
    local = [one.model_dump(mode="json") for one in conversations_of(tmp_path / "train.jsonl")]
    assert len(local) == 2
    home = tmp_path / "home"
    home.mkdir()
    with served("talks/name", {"train.jsonl": lines, "test.jsonl": lines}) as server:
        [first] = loaded(home, "talks/name", url=server.url)
    assert first == [
        local,
        [REVISION],
        [
            f"talks/name: revision {REVISION}",
            "talks/name, split train: columns not read: id",
            "talks/name, split test: not read, because conversations only train",
        ],
    ]
    again, missing = loaded(home, "talks/name", "talks/other", offline=True)
    assert again == first
    assert missing.startswith("data.conversations: talks/other is no folder, and it cannot be loaded as a dataset")


def test_the_name_of_a_split_begins_with_what_it_is_for(tmp_path: Path) -> None:
    names = {"train_sft": ROWS, "test_sft": ROWS[:1], "train_gen": ROWS[:2]}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in names) + "---\n"
    files = {"README.md": card.encode()}
    for name, rows in names.items():
        files[f"{name}.parquet"] = Path(written(tmp_path, "parquet", rows, name)).read_bytes()
    files["odd.parquet"] = files["train_gen.parquet"]
    odd = {**files, "README.md": card.replace("train_gen", "odd").encode()}
    with served("org/name", files) as server:
        [found] = loaded(tmp_path, "org/name", url=server.url)
    assert [note.partition(":")[0] for note in found[2][1:4]] == [
        f"org/name, split {name}" for name in ("train_sft", "train_gen", "test_sft")
    ]
    with served("org/odd", odd) as server:
        names = ["org/odd", "org/odd#odd", "org/odd#odd,test_sft", "org/odd#test_sft,train"]
        refused, one, two, missing = loaded(tmp_path, *names, url=server.url)
    assert refused.startswith("data.root: org/odd has the splits train_sft, test_sft, odd; odd is not known\n")
    assert refused.endswith("To read odd alone, give org/odd#odd.")
    local = load_corpus(str(tmp_path / "train_gen.parquet"), columns=COLUMNS)  # as odd, and one row more than test_sft
    assert one[:2] == [rows_digest(local.train), rows_digest([])]
    assert one[2][0].endswith("#odd")  # so the conversations of two splits have different digests
    assert two[:2] == [rows_digest(local.train), rows_digest(local.train[:1])]
    assert missing == "data.root: org/odd#test_sft,train has no split train\nIt has these: train_sft, test_sft, odd."
