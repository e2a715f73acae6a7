"""The code of docs/how-to/serve.md for a served judge, against a server with the format of vLLM's /classify."""

import contextlib
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from proactive import load_judge
from tests.helpers import ROOT
from tests.models.reporting.test_model_card import run_card
from tests.proactive.conftest import FinishedRun

HISTORY = [{"time": "Day 1, 8:00 PM", "event": "The user reads an error message in the terminal."}]


@pytest.fixture
def classify(finished_run: FinishedRun) -> Iterator[str]:
    """The address of an exported judge that answers with the probabilities of its classes."""
    network = AutoModelForSequenceClassification.from_pretrained(finished_run.folder / "export")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with torch.no_grad():
                probs = network(input_ids=torch.tensor([asked["input"]])).logits[0].double().softmax(-1).tolist()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"index": 0, "probs": probs, "num_classes": 2}]}).encode())

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_pages_code_computes_the_calibrated_probability_of_a_served_judge(
    classify: str, finished_run: FinishedRun
) -> None:
    export: Path = finished_run.folder / "export"
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {**run_card(export), "history": HISTORY}
    assert names["temperature"] != 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("http://127.0.0.1:8001", classify), "serve.md", "exec"), names)
    expected = load_judge(export).score(HISTORY, "Explain the error message")
    assert float(printed.getvalue()) == pytest.approx(expected, abs=1e-6)
