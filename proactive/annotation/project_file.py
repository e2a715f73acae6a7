"""The project file: an SQLite database of the units, the annotators, their assignments and their labels.

Each change is one transaction, which is on disk before the method returns. Several servers may use one file. In tables
and method names a unit is called an item, because `unit` is the name of its content.
"""

import contextlib
import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from datamodules.corpus.records import Event, running_digests
from datamodules.corpus.units import Unit
from datamodules.errors import UserError
from datamodules.files.reading import require_regular

APPLICATION = 0x50524F41  # SQLite's application_id of a project file: "PROA"
VERSION = 1
BUSY_SECONDS = 60.0  # longest wait for the transaction of another server
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE events (
    digest INTEGER PRIMARY KEY,  -- of the history that ends with the event
    before INTEGER REFERENCES events,  -- the previous event; null for the first
    time TEXT NOT NULL, event TEXT NOT NULL
) STRICT;
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    digest INTEGER NOT NULL UNIQUE REFERENCES events,
    trace TEXT NOT NULL, step INTEGER NOT NULL,
    offers TEXT NOT NULL,              -- JSON: for each offer, the agents that made it
    labelled INTEGER NOT NULL DEFAULT 0,  -- number of annotators with a current label
    adjudicated INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX items_to_do ON items (labelled DESC, id);
CREATE TABLE annotators (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token_digest BLOB NOT NULL UNIQUE
) STRICT;
CREATE TABLE assignments (
    item INTEGER NOT NULL REFERENCES items, annotator INTEGER NOT NULL REFERENCES annotators,
    shown_at REAL NOT NULL, expires_at REAL NOT NULL,
    skipped_at REAL,                      -- when the annotator skipped it; null if not
    labelled INTEGER NOT NULL DEFAULT 0,  -- whether the annotator has a current label
    PRIMARY KEY (item, annotator)
) STRICT, WITHOUT ROWID;
CREATE INDEX assignments_of ON assignments (annotator, labelled);
CREATE TABLE labels (                     -- rows are only added; the latest of an annotator and item is current
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL REFERENCES items,
    annotator INTEGER REFERENCES annotators,  -- null: the adjudicator
    accepted TEXT,                        -- JSON: whether each offer is accepted; null withdraws the previous label
    help_needed INTEGER,
    seconds REAL, at REAL NOT NULL,
    post TEXT UNIQUE                      -- id of the submitted form, so that a form sent twice is stored once
) STRICT;
CREATE INDEX labels_of ON labels (annotator, item, id);
CREATE INDEX labels_by_item ON labels (item);
CREATE INDEX labels_in_order ON labels (annotator, id);
CREATE VIEW current_labels AS SELECT * FROM labels AS latest WHERE accepted IS NOT NULL AND id =
    (SELECT max(id) FROM labels WHERE annotator IS latest.annotator AND item = latest.item);
"""


@dataclass(frozen=True)
class ProjectUnit:
    """A unit of a project."""

    id: int
    step: int
    unit: Unit

    def order(self, annotator: int) -> list[int]:
        """Return the indices of the offers, in the shuffled order that an annotator sees."""
        indices = list(range(len(self.unit.offers)))
        Random(f"{self.id} {annotator}").shuffle(indices)
        return indices


@dataclass(frozen=True)
class Annotator:
    """A person who labels."""

    id: int
    name: str


class ProjectFile:
    """The units and annotators of a project.

    Args:
        path: The project file.
        clock: Returns the time in epoch seconds.

    Raises:
        UserError: The file is not a project, or cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        require_regular(path, hint="Make a project: python -m proactive.annotate import TRACES --project FILE")
        self.path, self._clock, self._lock = path, clock, threading.RLock()
        self._db = _connect(path)
        try:
            found = tuple(
                self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if found != (APPLICATION, VERSION):
                raise UserError(f"{path} is no annotation project of this version", "Give a file that `import` made.")
            settings = dict(self._db.execute("SELECT name, value FROM settings"))
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: {error}", "Give a file that `import` made.") from error
        self.annotators_per_unit = int(settings["annotators_per_unit"])

    @classmethod
    def create(cls, path: Path, annotators_per_unit: int) -> None:
        """Create an empty project if the file does not exist.

        Raises:
            UserError: The file is not a project or has another number of annotators per unit, or cannot be created.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: {error.strerror}", "Choose another place.") from error
        if path.exists() and path.stat().st_size:
            with contextlib.closing(cls(path)) as store:
                if store.annotators_per_unit != annotators_per_unit:
                    raise UserError(
                        f"--annotators-per-unit: {annotators_per_unit}, but {path} has {store.annotators_per_unit}",
                        "Import into a new project.",
                    )
            return
        with contextlib.closing(_connect(path)) as db:
            try:
                db.executescript(
                    f"BEGIN EXCLUSIVE;{SCHEMA}"
                    f"INSERT INTO settings VALUES ('annotators_per_unit', {int(annotators_per_unit)});"
                    f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
                )
            except sqlite3.Error as error:
                raise UserError(f"{path}: {error}", "Choose another place.") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add_units(self, units: Sequence[Unit]) -> int:
        """Add units, all or none. Units that the project already has are not changed.

        Returns:
            The number of new units.

        Raises:
            UserError: The project has a unit with the same history and other offers.
        """
        added = 0
        with self._transaction() as db:
            for unit in units:
                digests = list(running_digests(unit.history))
                known = db.execute("SELECT offers FROM items WHERE digest = ?", digests[-1:]).fetchone()
                if known:
                    if set(json.loads(known[0])) != set(unit.offers):
                        raise UserError(
                            f"{unit.trace}, event {len(digests)}: the project has this history with other offers",
                            "Import into a new project, with all sources in one folder.",
                        )
                    continue
                for before, digest, event in zip([None, *digests], digests, unit.history, strict=False):
                    db.execute(
                        "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?)", (digest, before, event.time, event.event)
                    )
                db.execute(
                    "INSERT INTO items (digest, trace, step, offers) VALUES (?, ?, ?, ?)",
                    (digests[-1], unit.trace, len(digests) - 1, json.dumps(dict(unit.offers))),
                )
                added += 1
        return added

    def invite(self, name: str) -> str:
        """Return a new token for an annotator, who is added if the name is new. An old token no longer works.

        Raises:
            UserError: The name is empty or has more than 80 characters.
        """
        if not (name := " ".join(name.split())) or len(name) > 80:
            raise UserError("a name of 1 to 80 characters is needed", "Give each annotator a name.")
        token = secrets.token_urlsafe(24)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO annotators (name, token_digest) VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET token_digest = excluded.token_digest",
                (name, token_digest(token)),
            )
        return token

    def annotator(self, token: str) -> Annotator | None:
        """Return the annotator with this token, or None."""
        with self._reading() as db:
            found = db.execute(
                "SELECT id, name FROM annotators WHERE token_digest = ?", (token_digest(token),)
            ).fetchone()
        return Annotator(*found) if found else None

    def annotators(self) -> list[Annotator]:
        with self._reading() as db:
            return [Annotator(*row) for row in db.execute("SELECT id, name FROM annotators ORDER BY name")]

    def item(self, item: int) -> ProjectUnit | None:
        """Return a unit with its history; None if there is no such id."""
        with self._reading() as db:
            found = db.execute("SELECT id, step, trace, offers, digest FROM items WHERE id = ?", (item,)).fetchone()
            return self._item(db, *found) if found else None

    def items(self) -> Iterator[ProjectUnit]:
        """Yield all units, in the order in which they were added."""
        with self._reading() as db:
            numbers = [int(row[0]) for row in db.execute("SELECT id FROM items ORDER BY id")]
        for number in numbers:
            item = self.item(number)
            assert item is not None, "units are never removed"
            yield item

    def _item(self, db: sqlite3.Connection, item: int, step: int, trace: str, offers: str, digest: int) -> ProjectUnit:
        events = db.execute(
            "WITH RECURSIVE history AS (SELECT *, 0 AS back FROM events WHERE digest = ? UNION ALL SELECT events.*, "
            "back + 1 FROM events JOIN history ON events.digest = history.before) "
            "SELECT time, event FROM history ORDER BY back DESC",
            (digest,),
        ).fetchall()
        history = tuple(Event(time=when, event=what) for when, what in events)
        return ProjectUnit(item, step, Unit(trace, history, {k: tuple(v) for k, v in json.loads(offers).items()}))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def token_digest(token: str) -> bytes:
    """Return the SHA-256 of a token, which is stored instead of the token. Tokens are random, so it needs no salt."""
    return hashlib.sha256(token.encode()).digest()


def _connect(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # a commit returns when it is on disk
        db.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}", "Give a project file on a local disk that can be written.") from error
    return db
