"""Sources: the embedded data, a directory, and a download that is checked and cached."""

import functools
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus import sources
from datamodules.corpus.simulator import simulate
from datamodules.corpus.sources import (
    PUBLISHED_COMMIT,
    PUBLISHED_SHA256,
    PUBLISHED_URL,
    download_published,
    load_corpus,
)
from datamodules.errors import UserError
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

STEP = {"observation": {"time": "1", "event": "x"}, "agent_response": {"candidate_task": ["y"]}, "task_status": True}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Embedded and local


def test_embedded_is_the_simulator_with_the_given_seed() -> None:
    corpus = load_corpus("embedded", seed=3)
    assert (corpus.train, corpus.test, corpus.traces) == simulate(3)
    assert corpus.rows == corpus.train + corpus.test


@pytest.fixture
def local(root: Path, tmp_path: Path) -> Path:
    """A whole root in the published layout that a test may change."""
    folder = Path(shutil.copytree(root, tmp_path / "local"))
    (folder / "test_data").mkdir()
    (folder / "test_data" / "code_1.json").write_text(json.dumps([STEP, STEP]))
    (folder / "test_data" / "splits.json").write_text('{"code": ["code_1.json"]}')
    return folder


def test_all_files_of_a_directory_are_read(local: Path) -> None:
    corpus = load_corpus(str(local))
    lines = {
        name: (local / "reward_data" / f"{name}_data.jsonl").read_text().splitlines() for name in ("train", "test")
    }
    assert [row.proposal for row in corpus.train] == [json.loads(line)["pred_task"] for line in lines["train"]]
    assert [row.proposal for row in corpus.test] == [json.loads(line)["pred_task"] for line in lines["test"]]
    assert {name: len(steps) for name, steps in corpus.traces.items()} == {"code_1.json": 2}


def test_a_directory_needs_only_training_rows(local: Path) -> None:
    shutil.rmtree(local / "test_data")
    (local / "reward_data" / "test_data.jsonl").unlink()
    corpus = load_corpus(str(local))
    assert (corpus.test, corpus.traces) == ([], {})
    assert corpus.rows == corpus.train != []


@pytest.mark.parametrize(
    "name", ["reward_data/train_data.jsonl", "reward_data/test_data.jsonl", "test_data/code_1.json"]
)
def test_bad_record_in_a_directory_names_its_file(local: Path, name: str) -> None:
    (local / name).write_text('[{"obs": 3}]')
    with pytest.raises(UserError, match=name):
        load_corpus(str(local))


def test_missing_directory_and_missing_file_are_named(local: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: /no/such/place: no such file or folder"):
        load_corpus("/no/such/place")
    (local / "reward_data" / "train_data.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"data\.root: .*local has no reward_data/train_data\.jsonl, and no table that trains"
    ):
        load_corpus(str(local))


def test_a_training_file_without_rows_is_refused(local: Path) -> None:
    (local / "reward_data" / "train_data.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"train_data.jsonl: holds no row"):
        load_corpus(str(local))


# Published


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback, remembers what was asked, and misbehaves on demand."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.status = 200
        self.missing_bytes = 0
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def _answer(self, serve: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.missing_bytes:
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.missing_bytes))
            self.end_headers()  # and not a byte follows
        elif self.server.status != 200:
            self.send_error(self.server.status)
        else:
            serve()

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def server(local: Path) -> Iterator[Server]:
    with Server(local) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def digests(local: Path) -> dict[str, str]:
    return {path.relative_to(local).as_posix(): digest(path) for path in sorted(local.glob("*/*"))}


def test_download_gives_every_file_once(server: Server, local: Path, digests: dict[str, str], tmp_path: Path) -> None:
    paths = download_published(server.url, digests, tmp_path / "cache")
    assert paths.keys() == digests.keys()
    assert all(paths[name].read_bytes() == (local / name).read_bytes() for name in digests)
    assert sorted(ask for ask in server.requests if ask.startswith("GET")) == [f"GET /{name}" for name in digests]


def test_second_download_comes_from_the_cache(server: Server, digests: dict[str, str], tmp_path: Path) -> None:
    first = download_published(server.url, digests, tmp_path / "cache")
    server.requests.clear()
    assert download_published(server.url, digests, tmp_path / "cache") == first
    assert server.requests == []


def test_cached_files_serve_without_a_network(local: Path, digests: dict[str, str], tmp_path: Path) -> None:
    with Server(local) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        first = download_published(server.url, digests, tmp_path / "cache")
        server.shutdown()
        thread.join()
    assert download_published(server.url, digests, tmp_path / "cache") == first


@pytest.mark.parametrize("when", ["at once", "from the cache"])
def test_wrong_digest_is_refused_and_says_what_to_do(
    server: Server, digests: dict[str, str], tmp_path: Path, when: str
) -> None:
    name = "test_data/code_1.json"
    if when == "from the cache":
        download_published(server.url, digests, tmp_path / "cache")[name].write_text("changed on disk")
    else:
        digests[name] = "0" * 64
    with pytest.raises(UserError) as caught:
        download_published(server.url, digests, tmp_path / "cache")
    assert f"{server.url}/{name} has SHA-256 " in caught.value.what
    assert digests[name] in caught.value.what
    named = Path(caught.value.hint.split("Delete ")[1].split(" and try again")[0])
    assert named.is_relative_to(tmp_path / "cache")
    assert named.exists()


@pytest.mark.parametrize("trouble", ["refused", "404", "403", "500", "cut off"])
def test_failed_download_is_a_clear_error(
    server: Server, digests: dict[str, str], tmp_path: Path, trouble: str
) -> None:
    url = server.url
    if trouble == "refused":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
    elif trouble == "cut off":
        server.missing_bytes = 1_000
    else:
        server.status = int(trouble)
    with pytest.raises(UserError) as caught:
        download_published(url, digests, tmp_path / "cache")
    assert caught.value.what.startswith(f"cannot fetch the published data from {url}: ")
    assert "Check the network" in caught.value.hint
    assert "--data.root" in caught.value.hint


def test_failed_download_is_tried_again_the_next_time(server: Server, digests: dict[str, str], tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(UserError):
        download_published(server.url, digests, tmp_path / "cache")
    server.status = 200
    assert download_published(server.url, digests, tmp_path / "cache").keys() == digests.keys()


def test_published_root_reads_the_downloaded_files(
    server: Server, local: Path, digests: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the address is replaced: the real one cannot be had here."""
    monkeypatch.setattr(
        sources, "download_published", lambda: download_published(server.url, digests, tmp_path / "cache")
    )
    corpus, expected = load_corpus("published"), load_corpus(str(local))
    assert (corpus.root, corpus.train, corpus.test, corpus.traces) == (
        "published",
        expected.train,
        expected.test,
        expected.traces,
    )


def test_published_address_is_the_pinned_commit() -> None:
    assert PUBLISHED_COMMIT == "86383616ee530e9bcd1e9fe2269703ef3e3d8478"
    assert PUBLISHED_URL.startswith("https://raw.githubusercontent.com/thunlp/ProactiveAgent/")
    assert PUBLISHED_URL.endswith(f"/{PUBLISHED_COMMIT}/dataset")


@needs_proactivebench
def test_pinned_digests_are_those_of_the_published_files() -> None:
    files = [path for folder in ("reward_data", "test_data") for path in (PROACTIVEBENCH / folder).iterdir()]
    assert {path.relative_to(PROACTIVEBENCH).as_posix(): digest(path) for path in files} == PUBLISHED_SHA256


@needs_proactivebench
def test_published_directory_has_the_known_size() -> None:
    corpus = load_corpus(str(PROACTIVEBENCH))
    assert (len(corpus.train), len(corpus.test), len(corpus.traces)) == (1629, 120, 12)
    assert sum(map(len, corpus.traces.values())) == 233
