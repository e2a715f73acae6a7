"""How long the annotation server takes to save a label and to show the next unit, in a project of 10,000 units.

    python benchmarks/annotation.py

Measured as a client sees it, over loopback, with the server in its own process. The project is in three states: nothing
is labelled; three others have completed half of the units; the annotator alone has labelled all but a few units. The
last is the hardest, because all of those units still need labels, but none from this annotator.
"""

import argparse
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from datamodules.corpus.records import Event
from datamodules.corpus.units import Unit
from proactive.annotation.store import Store

EVENTS_PER_TRACE = 50
OTHERS = ("Ada", "Bo", "Cy")
REQUESTS = 200
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=10_000)
    units = parser.parse_args().units
    states = {
        "nothing is labelled": ((), 0),
        "half is complete": (OTHERS, units // 2),
        "labelled by the annotator alone, but for a few": (("me",), units - 2 * REQUESTS),
    }
    found = {}
    for state, (names, count) in states.items():
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder, "p.sqlite")
            Store.create(project, len(OTHERS))
            with contextlib.closing(Store(project)) as store:
                store.add_units(make_units(units))
                label(store, names, count)
            found[state] = measure(project)
    print(json.dumps({"units": units, "requests": REQUESTS, "milliseconds": found}, indent=2))


def make_units(count: int) -> list[Unit]:
    """Units of traces of 50 events, with five offers each."""
    made: list[Unit] = []
    while len(made) < count:
        trace = f"{len(made)}.json"
        events = tuple(Event(time=str(n), event=f"The user does {n} of {trace}.") for n in range(EVENTS_PER_TRACE))
        offers = {f"Help with thing {n}, at some length, as offers are.": ("x",) for n in range(5)}
        made += [Unit(trace, events[: n + 1], offers) for n in range(EVENTS_PER_TRACE)]
    return made[:count]


def label(store: Store, names: Sequence[str], count: int) -> None:
    """Let people label the first units, in one transaction, for 30,000 of them take minutes."""
    people = [store.annotator(store.invite(name)) for name in names]
    with store._transaction() as db:
        for person in people:
            assert person is not None
            values = (person.id, count)
            db.execute("INSERT INTO assignments SELECT id, ?, 0, 0, NULL, 1 FROM items WHERE id <= ?", values)
            db.execute(
                "INSERT INTO labels (item, annotator, accepted, help_needed, seconds, at) SELECT id, ?, "
                "'[true, false, false, false, false]', 1, 5, 0 FROM items WHERE id <= ?",
                values,
            )
        db.execute("UPDATE items SET labelled = ? WHERE id <= ?", (len(people), count))


def measure(project: Path) -> dict[str, dict[str, float]]:
    """Times of saving a label, and of the next unit's page."""
    command = [sys.executable, "-m", "proactive.annotate", "serve", str(project), "--port", "0", "--annotators", "me"]
    times: dict[str, list[float]] = {"save": [], "next unit": []}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        link = urlsplit(next(line.partition(": ")[2].strip() for line in server.stdout if line.startswith("me: ")))
        headers = {"Origin": f"http://{link.netloc}", "Content-Type": "application/x-www-form-urlencoded"}

        def ask(name: str, method: str, path: str, body: str | None = None) -> str:
            with contextlib.closing(http.client.HTTPConnection(link.netloc)) as connection:
                begin = time.perf_counter()
                connection.request(method, path, body, headers)
                answered = connection.getresponse()
                text = answered.read().decode()
                times[name].append(1000 * (time.perf_counter() - begin))
            assert answered.status in (200, 303), text
            return text

        try:
            for _ in range(WARM_UP + REQUESTS):
                page = ask("next unit", "GET", link.path)
                action, post = (re.search(f'{name}="([^"]+)"', page) for name in ("action", 'name="post" value'))
                assert action is not None, "more units are needed"
                assert post is not None
                ask("save", "POST", action[1], urlencode({"post": post[1], "none": 1, "help": "no", "action": "save"}))
        finally:
            server.terminate()
    return {name: summary(values[WARM_UP:]) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    centiles = statistics.quantiles(values, n=100)
    return {"median": round(centiles[49], 1), "99th percentile": round(centiles[98], 1)}


if __name__ == "__main__":
    main()
