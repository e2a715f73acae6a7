"""A real server: an export served by `transformers serve`, which ignores response_format, is the assistant.

Both are started as docs/how-to/serve.md says.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proactive import simulate
from tests.helpers import ROOT, environment_of_commands
from tests.patience import HANG
from tests.proactive.conftest import Ended
from tests.proactive.simulation.trained import CHAT_ANSWER, export_chat_agent

MISSING = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of the server, and the export."""
    export = export_chat_agent(tmp_path_factory.mktemp("served") / "export")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = [*page_options("transformers serve", export, port), "--device=cpu"]
    environment = environment_of_commands() | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (export.parent / "server.log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *options], env=environment, stdout=log, stderr=log
        )
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health", export.parent / "server.log")
            yield port, export
        finally:
            server.terminate()
            server.wait(HANG)


def page_options(command: str, export: Path, port: int) -> list[str]:
    """What the page gives a command, with another export and port."""
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    (options,) = re.findall(rf"^{re.escape(command)} (.*)$", page, re.MULTILINE)
    return options.replace("8000", str(port)).replace("runs/agent/0/export", str(export)).split()


def _wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + HANG
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=HANG):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_an_export_behind_transformers_serve_is_the_assistant_of_whole_sessions(
    served: tuple[int, Path], call: Callable[..., Ended]
) -> None:
    port, export = served
    given = page_options("python -m proactive.simulate", export, port)
    bounds = ["--max_acts=1", "--new_proposals=0", f"--endpoint.timeout={HANG}"]
    limit = "--assistant.extra={max_tokens: 120}"
    ended = call(simulate.main, *given, "--output=out", "--assistant.temperature=0", limit, *bounds)
    assert (ended.code, ended.err) == (0, "")
    record = json.loads(Path("out/summary.json").read_text())
    assert set(record["sessions"]["ends"]) <= {"act limit", "goal reached"}
    traces = [json.loads(path.read_text()) for path in Path("out/traces").iterdir()]
    assert len(traces) == 12
    attempts = [one for trace in traces for step in trace for one in step["other_infomation"]["attempts"]]
    assert {one["proposal"] for one in attempts} == {json.loads(CHAT_ANSWER)["proposal"]}
    found = record["roles"]["assistant"]
    assert (found["asked_again"], found["cut_off"], found["without_usage"]) == (0, 0, 0)
    assert found["prompt_tokens"] > found["completion_tokens"] > 0
