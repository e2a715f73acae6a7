"""What the tests of the assistant share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proactive.annotation.conftest import browser, faults  # noqa: F401 - fixtures
from tests.proactive.assistant.activitywatch_server import PYTHON, ActivityWatchServer


@pytest.fixture
def activitywatch(tmp_path: Path) -> Iterator[ActivityWatchServer]:
    """A running ActivityWatch server without buckets."""
    if PYTHON not in os.environ:
        pytest.skip(f"{PYTHON} does not name the python of an environment with aw-server; .ci/run makes one")
    folder = tmp_path / "activitywatch"
    folder.mkdir()
    server = ActivityWatchServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
