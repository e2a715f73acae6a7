"""What holds for every test."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers import ROOT, small_root

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read once, when `datasets` is imported; commands set it first
settings.register_profile("untimed", deadline=None)  # tests never assert time
settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with it ignored
torch.set_num_threads(1)  # two workers share two cores

# The files that take longest. They start first, so that none runs alone while a worker has nothing to do.
SLOWEST = (
    "test_installation.py",
    "proactive/fitting/test_resume.py",
    "proactive/test_fit_online.py",
    "proactive/test_terminal.py",
    "proactive/test_sharded_fit.py",
    "benchmarks/test_gpu_check.py",
    "proactive/test_fit_agent.py",
    "proactive/test_ranks.py",
    "callbacks/test_sharded_checkpoints.py",
    "models/reporting/test_model_card.py",
    "models/networks/test_tree_reading.py",
    "models/decoding/test_generation.py",
    "models/planning/test_memory.py",
    "proactive/test_agent_end_to_end.py",
    "proactive/test_live.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(SLOWEST)))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with a few rows of nine simulated scenes; tests only read it."""
    folder = small_root(tmp_path_factory.mktemp("root"))
    before = _contents(folder)
    yield folder
    assert _contents(folder) == before, "a test has changed the data of all tests"


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
