"""Servers as real processes, and clients that speak to them as browsers do."""

import contextlib
import http.client
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from datamodules.corpus.records import Event
from datamodules.corpus.units import Unit
from proactive.annotation.store import Store
from tests.forking import Forked
from tests.helpers import start
from tests.patience import HANG

SAID = (("accepted", "1"), ("help", "yes"))


@dataclass
class Served:
    """A server process and the links that it printed, by name."""

    process: Forked
    links: dict[str, str]


@contextlib.contextmanager
def served(*arguments: str | Path, annotators: Sequence[str] = (), port: int = 0, cwd: Path) -> Iterator[Served]:
    """A server, on a free port if it is 0; it is ended in the end."""
    names = ["--annotators", *annotators] if annotators else []
    process = start("proactive.annotate", "serve", *arguments, *names, "--port", str(port), cwd=cwd)
    try:
        yield Served(process, _links(process, 1 + len(annotators)))
    finally:
        process.terminate()
        process.communicate(timeout=HANG)


def _links(process: Forked, count: int) -> dict[str, str]:
    assert process.stdout is not None
    links: dict[str, str] = {}
    while len(links) < count:
        line = process.stdout.readline()
        assert line, "the server ended"
        name, _, link = line.strip().partition(": http")
        if link:
            links[name] = f"http{link}"
    return links


def project(file: Path, count: int, annotators_per_unit: int, proposals: Sequence[str] = ("Sum up.", "Wait.")) -> Path:
    """A project of one trace's events."""
    events = tuple(Event(time=str(1_717_377_997 + 60 * n), event=f"The user does step {n}.") for n in range(count))
    Store.create(file, annotators_per_unit)
    with contextlib.closing(Store(file)) as store:
        store.add_units(
            [Unit("a.json", events[: n + 1], dict.fromkeys(proposals, ("secret-agent",))) for n in range(count)]
        )
    return file


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    text: str
    headers: dict[str, str]


@dataclass
class Client:
    """Somebody with a link."""

    link: str
    acknowledged: list[int] = field(default_factory=list)

    def ask(
        self,
        path: str,
        form: Sequence[tuple[str, str]] | None = None,
        headers: dict[str, str] | None = None,
        method: str = "",
    ) -> Answer:
        """Send a request; headers that are given take the place of a browser's."""
        place = urlsplit(self.link)
        body = None if form is None else urlencode(form)
        sent = {"Host": place.netloc}
        if body is not None:
            sent |= {"Origin": f"http://{place.netloc}", "Content-Type": "application/x-www-form-urlencoded"}
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=HANG)
        with contextlib.closing(connection):
            sent = {name: value for name, value in (sent | (headers or {})).items() if value}
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
            answered = connection.getresponse()
            return Answer(answered.status, answered.read().decode(), {k.lower(): v for k, v in answered.getheaders()})

    @property
    def path(self) -> str:
        return urlsplit(self.link).path

    def label_next(self, said: Callable[[int], Sequence[tuple[str, str]]] = lambda _: SAID) -> bool:
        """Label the next unit, as a function of its number says; False if there is none."""
        page = self.ask(self.path)
        assert page.status == 200, page.text
        action = re.search(r'<form id="answer" method="post" action="([^"]*)"', page.text)
        if action is None:
            return False
        post = re.search(r'name="post" value="([^"]*)"', page.text)
        assert post is not None
        number = int(action[1].rpartition("/")[2])
        answer = self.ask(unescape(action[1]), [("post", unescape(post[1])), ("action", "save"), *said(number)])
        assert answer.status == 303, answer.text
        self.acknowledged.append(number)
        return True
