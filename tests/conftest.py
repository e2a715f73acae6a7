"""What holds for every test."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers import small_root

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read once, when `datasets` is imported; commands set it first
settings.register_profile("untimed", deadline=None)  # tests never assert time
settings.load_profile("untimed")
torch.set_num_threads(1)  # two workers share two cores


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a few rows of nine simulated scenes; tests only read it."""
    return small_root(tmp_path_factory.mktemp("root"))
