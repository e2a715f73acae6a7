"""The server as a process: who is let in, what it refuses, and that nothing which it acknowledged is lost."""

import contextlib
import http.client
import signal
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from proactive.annotation.store import Store
from tests.helpers import command
from tests.patience import HANG
from tests.proactive.annotation.serving import Client, Served, project, served

SCRIPT = "<script>document.title = 'obeyed'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server")
    project(folder / "p.sqlite", 4, 2, [SCRIPT, "Wait."])
    with served("p.sqlite", annotators=[SCRIPT, "Bo"], cwd=folder) as running:
        yield running


@pytest.fixture
def bo(server: Served) -> Client:
    return Client(server.links["Bo"])


def test_every_response_has_a_strict_content_security_policy(bo: Client) -> None:
    for path in (bo.path, "/static/label.js", "/nothing"):
        headers = bo.ask(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert "server" not in headers


def test_text_in_data_and_names_is_escaped(server: Served) -> None:
    other = Client(server.links[SCRIPT])
    for client, path in ((other, other.path), (other, Client(server.links["overview"]).path)):
        page = client.ask(path)
        assert page.status == 200
        assert "&lt;script&gt;" in page.text
        assert "<script>" not in page.text
        assert "<img" not in page.text


def test_annotators_do_not_see_where_offers_come_from(bo: Client) -> None:
    page = bo.ask(bo.path).text
    assert "Wait." in page
    assert "secret-agent" not in page
    assert "a.json" not in page
    assert "step 1" not in page  # the event after


def test_a_label_that_cannot_be_written_is_not_acknowledged(tmp_path: Path) -> None:
    file = project(tmp_path / "p.sqlite", 1, 1)
    with served(file, annotators=["me"], cwd=tmp_path) as running:
        me = Client(running.links["me"])
        assert me.ask(me.path).status == 200
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.execute("CREATE TRIGGER full BEFORE INSERT ON labels BEGIN SELECT RAISE(FAIL, 'disk full'); END")
        form = [("post", "x"), ("none", "1"), ("help", "no"), ("action", "save")]
        answer = me.ask(f"{me.path}/unit/1", form)
        assert (answer.status, "Nothing was saved" in answer.text, "disk full" in answer.text) == (503, True, True)
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.execute("DROP TRIGGER full")
        assert me.ask(f"{me.path}/unit/1", form).status == 303


@pytest.mark.parametrize("path", ["/", "/a/", "/a/wrong", "/a/wrong/unit/1", "/o/wrong", "/o/wrong/adjudicate/1"])
def test_every_page_needs_its_token(bo: Client, path: str) -> None:
    assert bo.ask(path).status == 404


def test_an_annotator_sees_only_their_own_units_and_no_owner_page(server: Served, bo: Client) -> None:
    token = bo.path.rpartition("/")[2]
    owner = Client(server.links["overview"]).path.rpartition("/")[2]
    for path in (f"/o/{token}", f"/a/{owner}", f"{bo.path}/unit/4", f"{bo.path}/unit/99", f"{bo.path}/unit/{'9' * 30}"):
        assert bo.ask(path).status == 404, path


@pytest.mark.parametrize(
    "path",
    [
        "/static/../store.py",
        "/static/..%2fstore.py",
        "/static/%2e%2e/store.py",
        "/static//etc/passwd",
        "/static/label.js%00.css",
    ],
)
def test_no_path_of_a_request_is_opened(bo: Client, path: str) -> None:
    answer = bo.ask(path)
    assert answer.status == 404
    assert "import" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}"]
)
def test_other_names_for_this_server_are_refused(bo: Client, host: str) -> None:
    port = str(urlsplit(bo.link).port)
    assert bo.ask(bo.path, headers={"Host": host.format(port=port)}).status == 421
    assert bo.ask(bo.path, headers={"Host": f"LOCALHOST:{port}"}).status == 200


@pytest.mark.parametrize(
    "origin", ["", "null", "http://evil.example", "http://127.0.0.1:1", "file://{host}", "http://{host}.evil"]
)
def test_forms_of_other_sites_are_refused(bo: Client, origin: str) -> None:
    host = urlsplit(bo.link).netloc
    answer = bo.ask(f"{bo.path}/back", [], headers={"Origin": origin.format(host=host)})
    assert answer.status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Length": "99999999"}, 413),
    ],
)
def test_files_and_long_forms_are_refused(bo: Client, headers: dict[str, str], status: int) -> None:
    assert bo.ask(f"{bo.path}/back", [], headers=headers).status == status


def test_other_methods_and_bodies_without_length_are_refused(bo: Client) -> None:
    assert bo.ask(bo.path, method="DELETE").status == 405
    assert bo.ask(bo.path, method="PUT").status == 405
    place = urlsplit(bo.link)
    with contextlib.closing(http.client.HTTPConnection(place.hostname or "", place.port, timeout=HANG)) as connection:
        headers = {"Host": place.netloc, "Origin": f"http://{place.netloc}", "Transfer-Encoding": "chunked"}
        connection.request("POST", f"{bo.path}/back", iter([b"x"]), headers, encode_chunked=True)
        assert connection.getresponse().status == 411


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ([], "Say which offers"),
        ([("accepted", "0")], "Say whether help was needed"),
        ([("accepted", "0"), ("help", "maybe")], "Say whether help was needed"),
        ([("accepted", "0"), ("none", "1"), ("help", "yes")], "Choose offers, or none of them"),
        ([("accepted", "2"), ("help", "yes")], "Choose offers"),
        ([("accepted", "-1"), ("help", "yes")], "Choose offers"),
    ],
)
def test_an_incomplete_label_is_refused_with_a_hint(bo: Client, form: list[tuple[str, str]], says: str) -> None:
    assert bo.ask(bo.path).status == 200
    answer = bo.ask(f"{bo.path}/unit/1", [("post", "x"), ("action", "save"), *form])
    assert answer.status == 422
    assert says in answer.text


def test_a_unit_that_others_completed_is_refused_with_a_message(bo: Client, server: Served) -> None:
    answer = bo.ask(f"{bo.path}/unit/3", [("post", "x"), ("none", "1"), ("help", "no"), ("action", "save")])
    assert (answer.status, "not given to you" in answer.text) == (409, True)


def test_the_owner_adds_annotators_and_adjudicates(tmp_path: Path) -> None:
    file = project(tmp_path / "p.sqlite", 2, 2)
    with served(file, annotators=["Ada", "Bo"], cwd=tmp_path) as running:
        owner = Client(running.links["overview"])
        for name, form in (("Ada", ("none", "1")), ("Bo", ("accepted", "1"))):
            one = Client(running.links[name])
            assert one.ask(one.path).status == 200
            one.ask(f"{one.path}/unit/1", [("post", name), form, ("help", "yes"), ("action", "save")])
        assert "Adjudicate 1 unit with ties" in owner.ask(owner.path).text
        unit = owner.ask(f"{owner.path}/adjudicate/1")
        assert "Accepted by Bo" in unit.text
        assert "Needed, according to Ada, Bo" in unit.text
        assert owner.ask(f"{owner.path}/adjudicate/1", [("post", "x")]).status == 422
        assert "Ada and Bo" in owner.ask(f"{owner.path}/agreement").text
        done = owner.ask(f"{owner.path}/adjudicate/1", [("post", "x"), ("accepted", "1"), ("help", "yes")])
        assert (done.status, done.headers["location"]) == (303, owner.path)
        made = owner.ask(f"{owner.path}/invite", [("name", "Cy")])
        token = made.text.partition("/a/")[2].partition("<")[0]
        assert Client(owner.link).ask(f"/a/{token}").status == 200
        assert owner.ask(f"{owner.path}/invite", [("name", " ")]).status == 422
    with contextlib.closing(Store(file)) as store:
        assert (store.states()["adjudicated"], store.ties()) == (1, [])


def test_a_kill_during_posts_loses_no_acknowledged_label(tmp_path: Path) -> None:
    """SIGKILL while six people post; started again, they go on to the end."""
    file = project(tmp_path / "p.sqlite", 60, 3)
    names = [f"person {n}" for n in range(6)]
    clients: dict[str, Client] = {}
    enough = threading.Event()

    def work(client: Client) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # what a killed server leaves
            while client.label_next():
                if sum(len(one.acknowledged) for one in clients.values()) >= 40:
                    enough.set()

    with served(file, annotators=[*names], cwd=tmp_path) as running:
        clients |= {name: Client(running.links[name]) for name in names}
        threads = [threading.Thread(target=work, args=(client,)) for client in clients.values()]
        for thread in threads:
            thread.start()
        assert enough.wait(HANG)
        running.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(HANG)
        assert running.process.wait(HANG) == -signal.SIGKILL
    with contextlib.closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with contextlib.closing(Store(file)) as store:
        kept = {(label.annotator, label.item) for label in store.labels()}
    acknowledged = {(name, item) for name, client in clients.items() for item in client.acknowledged}
    assert 40 <= len(acknowledged) < 180
    assert acknowledged <= kept

    with served(file, annotators=[*names], cwd=tmp_path) as running:
        threads = [threading.Thread(target=work, args=(Client(running.links[name]),)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
    with contextlib.closing(Store(file)) as store:
        again = {(label.annotator, label.item) for label in store.labels()}
        assert kept <= again
        assert set(Counter(item for _, item in again).values()) == {3}
        assert store.states()["complete"] == 60


def test_thirty_clients_of_two_servers_on_one_project_lose_nothing(tmp_path: Path) -> None:
    file = project(tmp_path / "p.sqlite", 60, 3)
    names = [f"person {n}" for n in range(30)]
    with (
        served(file, annotators=[*names[:15]], cwd=tmp_path) as one,
        served(file, annotators=[*names[15:]], cwd=tmp_path) as two,
    ):
        clients = {name: Client((one if n < 15 else two).links[name]) for n, name in enumerate(names)}
        failed: list[str] = []

        def work(name: str) -> None:
            try:
                while clients[name].label_next():
                    pass
            except BaseException as error:
                failed.append(f"{name}: {error!r}")
                raise

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
    assert failed == []
    acknowledged = Counter((name, item) for name, client in clients.items() for item in client.acknowledged)
    with contextlib.closing(Store(file)) as store:
        assert acknowledged == Counter((label.annotator, label.item) for label in store.labels())
        assert store.states()["complete"] == 60
    assert set(Counter(item for _, item in acknowledged).values()) == {3}


def test_without_a_project_there_is_an_example(tmp_path: Path) -> None:
    with served(annotators=["me"], cwd=tmp_path) as running:
        me, owner = Client(running.links["me"]), Client(running.links["overview"])
        assert "The user" in me.ask(me.path).text
        assert owner.ask(f"{owner.path}/read").text.count("<tr><td><a") == 3
        assert running.process.poll() is None
    assert list(tmp_path.iterdir()) == []


def test_the_server_listens_on_loopback_and_ends_cleanly(tmp_path: Path) -> None:
    file = project(tmp_path / "p.sqlite", 1, 1)
    with served(file, annotators=["me"], cwd=tmp_path) as running:
        port = urlsplit(running.links["me"]).port
        with socket.socket() as other, pytest.raises(OSError, match="refused"):
            other.connect(("127.0.0.2", port))
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(HANG) == 0


def test_an_impossible_serve_gives_a_one_line_error(tmp_path: Path) -> None:
    file = project(tmp_path / "p.sqlite", 1, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, says in (
            ((file, "--port", str(taken.getsockname()[1])), "cannot listen on 127.0.0.1"),
            ((file, "--host", "no such host"), "cannot listen on no such host"),
            ((file, "--port", "70000"), "port: expected 65535 or less"),
            (("missing.sqlite",), "missing.sqlite: No such file"),
        ):
            ended = command("proactive.annotate", "serve", *arguments, cwd=tmp_path)
            assert ended.returncode == 2
            assert says in ended.stderr
            assert len(ended.stderr.splitlines()) == 2
