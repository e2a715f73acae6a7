"""Files of a data root that do not hold what they should."""

import json
import os
from collections.abc import Callable
from typing import Any

from datamodules.files.reading import MAX_RECORDS_BYTES, MAX_TEXT_BYTES
from tests.proactive.bad_inputs.case import Case, Place, write

TRAIN, TEST, TRACE, SPLITS = (
    "r/reward_data/train_data.jsonl",
    "r/reward_data/test_data.jsonl",
    "r/test_data/a.json",
    "r/test_data/splits.json",
)
EVENT = {"time": "1", "event": "The user opens a file."}
ROW: dict[str, Any] = {"obs": [EVENT], "pred_task": "Explain it.", "valid": True}
STEP: dict[str, Any] = {"observation": EVENT, "agent_response": {"candidate_task": ["Go."]}, "task_status": True}
GONE = ...  # a field that is left out
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n\u202e\u2028"


def changed(record: dict[str, Any], **fields: Any) -> str:
    return json.dumps({name: value for name, value in {**record, **fields}.items() if value is not GONE})


def root(**files: str | bytes) -> Callable[[Place], None]:
    """Prepares a root with some files changed."""

    def prepare(place: Place) -> None:
        contents = {TRAIN: changed(ROW), TRACE: f"[{changed(STEP)}]"} | files
        for name, content in contents.items():
            write(name, content)(place)

    return prepare


def sparse(name: str, size: int) -> Callable[[Place], None]:
    """Prepares a root of which one file is large, and takes no room on the disk."""

    def prepare(place: Place) -> None:
        root()(place)
        write(name, "[")(place)
        os.truncate(place.folder / name, size)

    return prepare


ROWS = {  # of train_data.jsonl: what is named
    "blank": ("\n\n", "expected JSON"),
    "an object cut off": ('{"obs": [', "line 1: expected JSON"),
    "two objects on a line": (changed(ROW) * 2, "line 1: expected JSON"),
    "a comma at the end": (changed(ROW) + ",", "line 1: expected JSON"),
    "single quotes": (repr(ROW), "line 1: expected JSON"),
    "a list around it": (f"[{changed(ROW)}]", "line 1"),
    "a number": ("5", "line 1"),
    "a text": ('"text"', "line 1"),
    "null": ("null", "line 1"),
    "NaN": (changed(ROW, help_needed=float("nan")), "NaN"),
    "infinity in annotations": (changed(ROW, annotation=[float("inf")]), "Infinity"),
    "the second line": (f"{changed(ROW)}\n{{}}", "line 2"),
    "a blank line between": (f"{changed(ROW)}\n\n{changed(ROW)}", "line 2"),
    "no history": (changed(ROW, obs=GONE), "field obs"),
    "a history of text": (changed(ROW, obs="text"), "field obs"),
    "a history of texts": (changed(ROW, obs=["text"]), "field obs[0]"),
    "an event without time": (changed(ROW, obs=[{"event": "x"}]), "field obs[0].time"),
    "a time as a number": (changed(ROW, obs=[{"time": 5, "event": "x"}]), "field obs[0].time"),
    "a blank event": (changed(ROW, obs=[{"time": "1", "event": " "}]), "field obs[0].event"),
    "an invisible event": (changed(ROW, obs=[{"time": "1", "event": "\u200b"}]), "field obs[0].event"),
    "half a surrogate": (changed(ROW, obs=[{"time": "1", "event": "\ud83d"}]), "half a surrogate"),
    "one field more in an event": (changed(ROW, obs=[{**EVENT, "x": 1}]), "field obs[0].x"),
    "no proposal": (changed(ROW, pred_task=GONE), "field pred_task"),
    "a proposal in a list": (changed(ROW, pred_task=["x"]), "field pred_task"),
    "a blank proposal": (changed(ROW, pred_task=""), "field pred_task"),
    "no judgment": (changed(ROW, valid=GONE), "valid"),
    "a judgment of 1": (changed(ROW, valid=1), "valid"),
    "a judgment in other words": (changed(ROW, valid="maybe"), "valid"),
    "two judgments": (changed(ROW, judgment=True), "judgment"),
    "annotations of text": (changed(ROW, annotation=["yes"]), "field annotation[0]"),
    "a category of no name": (changed(ROW, category="other"), "field category"),
    "a category that contradicts": (changed(ROW, category="missed_need"), "field category"),
    "help that contradicts": (changed(ROW, pred_task=None, help_needed=True), "help_needed"),
    "a field of another name": (changed(ROW, comment="x"), "field comment"),
    "a field name of control characters": (changed(ROW, **{ESCAPES: 1}), "\\x1b]0;owned"),
    "control characters in a value": (changed(ROW, valid=ESCAPES), "accepted"),
    "a field twice": (changed(ROW)[:-1] + ', "valid": true}', "twice the field valid"),
    "latin-1": (changed(ROW, pred_task="caf\u00e9").replace("\\u00e9", "\u00e9").encode("latin-1"), "is not UTF-8"),
    "UTF-16": (changed(ROW).encode("utf-16"), "is not UTF-8"),
    "zeros": (b"\0" * 100, "expected JSON"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8"),
    "CSV": ("obs,pred_task\na,b\n", "expected JSON"),
    "one MB of brackets": ("[" * 1_000_000, "at most 100 lists"),
    "one MB of braces": ('{"a":' * 200_000, "at most 100 lists"),
    "deep and closed": (changed(ROW, obs=GONE)[:-1] + ', "obs": ' + "[" * 150 + "]" * 150 + "}", "at most 100 lists"),
    "a number of many digits": (changed(ROW, valid=GONE)[:-1] + ', "valid": ' + "1" * 10_000 + "}", "expected JSON"),
    "a line beyond the limit": (changed(ROW, pred_task="x" * MAX_TEXT_BYTES), f"limit is {MAX_TEXT_BYTES:,} bytes"),
    "ten thousand empty events": (changed(ROW, obs=[{}] * 10_000), "field obs[0].time"),
}
TRACES = {
    "empty": ("", "expected JSON"),
    "an object": ("{}", "expected a JSON list"),
    "a null": ("null", "expected a JSON list"),
    "a list cut off": (f"[{changed(STEP)}", "expected JSON"),
    "lines": (f"{changed(STEP)}\n{changed(STEP)}", "expected JSON"),
    "a step of text": ('["x"]', "index 0"),
    "the second step": (f"[{changed(STEP)}, {{}}]", "index 1"),
    "no observation": (f"[{changed(STEP, observation=GONE)}]", "field observation"),
    "an observation of null": (f"[{changed(STEP, observation=None)}]", "field observation"),
    "a response of text": (f"[{changed(STEP, agent_response='x')}]", "field agent_response"),
    "candidates of numbers": (f"[{changed(STEP, agent_response={'candidate_task': [5]})}]", "candidate_task"),
    "a status of text": (f"[{changed(STEP, task_status='yes')}]", "field task_status"),
    "NaN": (f"[{changed(STEP, task_status=float('nan'))}]", "NaN"),
    "a field more": (f"[{changed(STEP, **{ESCAPES: 1})}]", "\\x1b]0;owned"),
    "brackets": ("[" * 1_000_000, "at most 100 lists"),
    "latin-1": (b"[\xe9]", "is not UTF-8"),
}
SPLIT_FILES = {
    "empty": ("", "expected JSON"),
    "a list": ("[]", "expected a JSON object"),
    "a split of text": ('{"a": "x"}', "splits.json, a"),
    "files of text": ('{"a": {"files": "x"}}', "field files"),
    "files of numbers": ('{"a": {"files": [1]}}', "field files[0]"),
    "no files": ('{"a": {}}', "field files"),
    "a file twice": ('{"a": {"files": ["a.json", "a.json"]}}', "expected each name once"),
    "a field more": ('{"a": {"files": [], "x": 1}}', "field x"),
    "half a surrogate": ('{"\\ud800": {"files": []}}', "half a surrogate"),
    "a name of control characters": (json.dumps({ESCAPES: {}}), "\\x1b]0;owned"),
    "a long name": (json.dumps({"x" * 1_000_000: {}}), "splits.json, xxx"),
    "deep": ('{"a": ' + "[" * 1000 + "]" * 1000 + "}", "at most 100 lists"),
}
COLUMNS = json.dumps({"history": "events", "proposal": "offer", "accepted": "ok"})
TABLE = write("t.csv", 'events,offer,ok\n"[""opens""]",Help.,1\n')
TABLES = {
    "a bad history": (write("t.csv", "events,offer,ok\nopens,Help.,1\n"), "t.csv, line 2, field events"),
    "a bad judgment": (write("t.csv", 'events,offer,ok\n"[""opens""]",Help.,maybe\n'), "t.csv, line 2, field ok"),
    "control characters": (write("t.csv", f'events,offer,ok\n"[""opens""]",Help.,"{ESCAPES}"\n'), "line 2, field ok"),
    "no row": (write("t.csv", "events,offer,ok\n"), "t.csv holds no training row"),
}
BASELINE = ["agent", "--agent.baseline=never-propose", "--judge.url=http://127.0.0.1:9/v1", "--judge.model=m"]
CASES = [
    *(Case(f"rows: {n}", "inspect", ["--root=r"], named, root(**{TRAIN: c})) for n, (c, named) in ROWS.items()),
    *(
        Case(f"test rows: {name}", "inspect", ["--root=r"], "test_data.jsonl", root(**{TEST: ROWS[name][0]}))
        for name in ("a number", "no judgment", "UTF-16", "one MB of brackets", "a field twice")
    ),
    *(Case(f"a trace: {n}", "inspect", ["--root=r"], named, root(**{TRACE: c})) for n, (c, named) in TRACES.items()),
    *(
        Case(f"splits: {n}", "evaluate", [*BASELINE, "--data.root=r"], named, root(**{SPLITS: c}))
        for n, (c, named) in SPLIT_FILES.items()
    ),
    Case("no row", "inspect", ["--root=r"], "holds no row", root(**{TRAIN: ""})),
    Case("no row to train on", "fit", ["--data.root=r"], "holds no row", root(**{TRAIN: ""})),
    Case("no row to train an agent on", "fit", ["--task=agent", "--data.root=r"], "holds no row", root(**{TRAIN: ""})),
    Case(
        "a published split whose traces have no rows",
        "fit",
        ["--task=agent", "--data.split=published", "--data.root=r"],
        "published would test nothing",
        root(**{TRACE: f"[{changed(STEP, observation={'time': '1', 'event': 'Another session.'})}]"}),
    ),
    Case("a trace without an event", "evaluate", [*BASELINE, "--data.root=r"], "a.json", root(**{TRACE: "[]"})),
    Case("no trace", "evaluate", [*BASELINE, "--data.root={root}"], "no test traces"),
    Case("a root that is not there", "inspect", ["--root=nowhere"], "nowhere"),
    Case("a root of control characters", "inspect", [f"--root={ESCAPES}"], "\\x1b]0;owned"),
    Case(
        "a root that is a file",
        "inspect",
        ["--root=file"],
        "file: expected a folder, or a name that ends in .csv",
        write("file", ""),
    ),
    Case("a root without rows", "inspect", ["--root=r"], "r has no reward_data", write(TRACE, "[]")),
    Case("too many folds", "inspect", ["--root=r", "--folds=2"], "folds", root()),
    Case("a trace beyond the limit", "inspect", ["--root=r"], "a.json: holds", sparse(TRACE, MAX_TEXT_BYTES + 1)),
    Case(
        "rows beyond the limit",
        "inspect",
        ["--root=r"],
        "train_data.jsonl: holds",
        sparse(TRAIN, MAX_RECORDS_BYTES + 1),
    ),
    Case("a line without end", "inspect", ["--root=r"], "line 1: holds more", sparse(TRAIN, MAX_RECORDS_BYTES)),
    Case("splits beyond the limit", "evaluate", [*BASELINE, "--data.root=r"], "limit", sparse(SPLITS, 2**30)),
    *(
        Case(
            f"a table for {command}: {name}",
            command,
            [f"--{prefix}root=t.csv", f"--{prefix}columns={COLUMNS}"],
            named,
            table,
        )
        for name, (table, named) in TABLES.items()
        for command, prefix in (("inspect", ""), ("fit", "data."))
    ),
    Case("a table without columns", "fit", ["--data.root=t.csv"], "t.csv has no column history", TABLE),
    Case(
        "a table without conversations",
        "fit",
        ["--task=agent", "--data.conversations=[t.csv]"],
        't.csv, line 2: expected the field "conversations" or "messages"',
        TABLE,
    ),
    Case(
        "conversations without a network", "fit", ["--task=agent", "--data.conversations=[no/thing]"], "no/thing is no"
    ),
    Case("a column of another field", "fit", ["--data.columns.row=x"], "data.columns: Option 'row' is not accepted"),
    Case("columns of the published layout", "fit", [f"--data.columns={COLUMNS}"], "data.columns: "),
    Case("a dataset without a network", "inspect", ["--root=nobody/nothing"], "nobody/nothing is no folder, and it"),
    Case("a small root", "inspect", ["--root={root}"], "", accepted=True),
]
