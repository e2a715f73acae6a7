"""Data that the tests of models share."""

from pathlib import Path

import pytest

from tests.helpers import small_root


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a few rows of nine simulated scenes."""
    return small_root(tmp_path_factory.mktemp("root"))
