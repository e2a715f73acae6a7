"""The project file: an SQLite database of the units, the annotators, their assignments and their labels.

Each change is one transaction, which is on disk before the method returns. Several servers may use one file.
"""

import contextlib
import hashlib
import json
import secrets
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from datamodules.corpus.records import Event, running_digests
from datamodules.corpus.units import Unit, UnitLabel, decide
from datamodules.errors import UserError
from datamodules.files.reading import require_regular

APPLICATION = 0x50524F41  # SQLite's application_id of a project file: "PROA"
VERSION = 1
CLAIM_SECONDS = 30 * 60.0  # how long a unit is reserved for an annotator who was shown it
BUSY_SECONDS = 60.0  # how long a server waits for the transaction of another one
RECENT = 20  # number of latest labels that the pace is computed from
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
# The number of other annotators who have a current label of an item, or for whom it is reserved.
SEATS = """(SELECT count(*) FROM assignments AS seat WHERE seat.item = items.id AND seat.annotator <> :annotator
    AND (seat.labelled OR (seat.skipped_at IS NULL AND seat.expires_at > :now)))"""


class RefusedError(Exception):
    """A label is refused. The message is shown to the annotator."""


@dataclass(frozen=True)
class Item:
    """A unit of a project."""

    id: int
    step: int
    unit: Unit

    def order(self, annotator: int) -> list[int]:
        """Return the indices of the offers, in the shuffled order that an annotator sees."""
        places = list(range(len(self.unit.offers)))
        Random(f"{self.id} {annotator}").shuffle(places)
        return places


@dataclass(frozen=True)
class Annotator:
    """A person who labels."""

    id: int
    name: str


@dataclass(frozen=True)
class StoredLabel:
    """A current label. `annotator` is None for the adjudicator's."""

    item: int
    trace: str
    annotator: str | None
    said: UnitLabel
    seconds: float | None
    at: float


@dataclass(frozen=True)
class Progress:
    """Numbers of units that an annotator has labelled, can still label, and skipped.

    `pace` is the median number of seconds per label, over the latest labels.
    """

    done: int
    left: int
    skipped: int
    pace: float | None


class Store:
    """A project file.

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
        """Return a new token for an annotator. Add the annotator if the name is new; otherwise void their old token.

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

    def claim(self, annotator: int) -> int | None:
        """Reserve the next unit for an annotator, and return its id; None if nothing is left to label.

        First comes the unit that is already reserved for them, then units with the fewest missing labels, and last
        those that they skipped.
        """
        now = self._clock()
        values = {"annotator": annotator, "now": now, "n": self.annotators_per_unit}
        open_one = f"items.labelled < :n AND NOT items.adjudicated AND {SEATS} < :n"
        mine = "SELECT 1 FROM assignments AS mine WHERE mine.item = items.id AND mine.annotator = :annotator"
        tries = (
            "SELECT item FROM assignments JOIN items ON items.id = item WHERE annotator = :annotator AND NOT "
            "assignments.labelled AND skipped_at IS NULL AND expires_at > :now AND NOT items.adjudicated "
            "ORDER BY shown_at LIMIT 1",
            f"SELECT id FROM items WHERE {open_one} AND NOT EXISTS ({mine} AND (mine.labelled OR mine.skipped_at "
            "IS NOT NULL)) ORDER BY labelled DESC, id LIMIT 1",
            f"SELECT items.id FROM assignments JOIN items ON items.id = item WHERE annotator = :annotator AND NOT "
            f"assignments.labelled AND skipped_at IS NOT NULL AND {open_one} ORDER BY skipped_at LIMIT 1",
        )
        with self._transaction() as db:
            for query in tries:
                if found := db.execute(query, values).fetchone():
                    self._keep(db, found[0], annotator, now)
                    return int(found[0])
        return None

    def save(self, annotator: int, item: int, label: UnitLabel, post: str) -> None:
        """Store a label. It replaces the annotator's previous label of the unit. It is on disk when this returns.

        Args:
            annotator: Id of the annotator.
            item: Id of the unit, which was assigned to the annotator.
            label: The label.
            post: Id of the submitted form. A form that is sent twice is stored once.

        Raises:
            RefusedError: The unit was not assigned to the annotator, is adjudicated, or others have completed it.
        """
        now = self._clock()
        values = {"annotator": annotator, "now": now, "item": item}
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM labels WHERE post = ?", (post,)).fetchone():
                return
            mine = db.execute(
                f"SELECT mine.labelled, shown_at, adjudicated, {SEATS} FROM assignments AS mine JOIN items "
                "ON items.id = item WHERE item = :item AND annotator = :annotator",
                values,
            ).fetchone()
            if mine is None:
                raise RefusedError("This unit was not given to you.")
            labelled, shown_at, adjudicated, others = mine
            if adjudicated:
                raise RefusedError("This unit was adjudicated; labels of it are final.")
            if not labelled and others >= self.annotators_per_unit:
                raise RefusedError("You were away for long, and others have labelled this unit meanwhile.")
            _add_label(db, item, annotator, label, max(now - shown_at, 0.0), now, post)
            db.execute(
                "UPDATE assignments SET labelled = 1, skipped_at = NULL WHERE item = :item AND annotator = :annotator",
                values,
            )
            _count(db, item)

    def skip(self, annotator: int, item: int) -> None:
        """Skip a unit. `claim` returns it again when no other unit is left."""
        with self._transaction() as db:
            db.execute(
                "UPDATE assignments SET skipped_at = ? WHERE item = ? AND annotator = ? AND NOT labelled",
                (self._clock(), item, annotator),
            )

    def take_back(self, annotator: int) -> int | None:
        """Withdraw an annotator's latest label and reserve its unit for them; return the unit's id, or None."""
        now = self._clock()
        with self._transaction() as db:
            found = db.execute(
                "SELECT item FROM current_labels JOIN items ON items.id = item WHERE annotator = ? AND NOT adjudicated "
                "ORDER BY current_labels.id DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if found is None:
                return None
            item = int(found[0])
            _add_label(db, item, annotator, None, None, now, None)
            self._keep(db, item, annotator, now)
            db.execute("UPDATE assignments SET labelled = 0 WHERE item = ? AND annotator = ?", (item, annotator))
            _count(db, item)
        return item

    def adjudicate(self, item: int, label: UnitLabel, post: str) -> None:
        """Decide a unit finally, which overrides its labels. The decision is on disk when this returns."""
        with self._transaction() as db:
            if not db.execute("SELECT 1 FROM labels WHERE post = ?", (post,)).fetchone():
                _add_label(db, item, None, label, None, self._clock(), post)
                db.execute("UPDATE items SET adjudicated = 1 WHERE id = ?", (item,))

    def item(self, item: int) -> Item | None:
        """Return a unit with its history; None if there is no such id."""
        with self._reading() as db:
            found = db.execute("SELECT id, step, trace, offers, digest FROM items WHERE id = ?", (item,)).fetchone()
            return self._item(db, *found) if found else None

    def items(self) -> Iterator[Item]:
        """Yield all units, in the order in which they were added."""
        with self._reading() as db:
            numbers = [int(row[0]) for row in db.execute("SELECT id FROM items ORDER BY id")]
        for number in numbers:
            item = self.item(number)
            assert item is not None, "units are never removed"
            yield item

    def show_again(self, annotator: int, item: int) -> bool:
        """Restart the clock of an annotator who opens a unit again; return False if it was never assigned to them."""
        with self._transaction() as db:
            query = "UPDATE assignments SET shown_at = ? WHERE annotator = ? AND item = ?"
            return db.execute(query, (self._clock(), annotator, item)).rowcount > 0

    def label(self, annotator: int, item: int) -> UnitLabel | None:
        """Return an annotator's current label of a unit, or None."""
        with self._reading() as db:
            query = "SELECT accepted, help_needed FROM current_labels WHERE annotator = ? AND item = ?"
            found = db.execute(query, (annotator, item)).fetchone()
        return _label(*found) if found else None

    def neighbours(self, annotator: int, item: int) -> tuple[int | None, int | None]:
        """Return the ids of the units that an annotator labelled before and after this one.

        For a unit without a label, the first is the unit that they labelled last, and the second is None.
        """
        values = {"annotator": annotator, "item": item}
        found = []
        with self._reading() as db:
            for side, order in (("<", "DESC"), (">", "ASC")):
                row = db.execute(
                    f"SELECT item FROM current_labels WHERE annotator = :annotator AND id {side} coalesce("
                    "(SELECT id FROM current_labels WHERE annotator = :annotator AND item = :item), 9e18) "
                    f"ORDER BY id {order} LIMIT 1",
                    values,
                ).fetchone()
                found.append(None if row is None else int(row[0]))
        return found[0], found[1]

    def labels(self, item: int | None = None) -> list[StoredLabel]:
        """Return the current labels, of one unit or of all, sorted by unit."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT item, trace, name, accepted, help_needed, seconds, at FROM current_labels "
                "JOIN items ON items.id = item LEFT JOIN annotators ON annotators.id = annotator "
                "WHERE :item IS NULL OR item = :item ORDER BY item, current_labels.id",
                {"item": item},
            ).fetchall()
        return [
            StoredLabel(number, trace, name, _label(accepted, needed), seconds, at)
            for number, trace, name, accepted, needed, seconds, at in rows
        ]

    def progress(self, annotator: int) -> Progress:
        """Return the progress of an annotator."""
        values = {"annotator": annotator, "now": self._clock(), "n": self.annotators_per_unit}
        with self._reading() as db:
            done, skipped = db.execute(
                "SELECT count(*) FILTER (WHERE labelled), count(*) FILTER (WHERE skipped_at IS NOT NULL AND NOT "
                "labelled) FROM assignments WHERE annotator = :annotator",
                values,
            ).fetchone()
            (left,) = db.execute(
                "SELECT count(*) FROM items WHERE labelled < :n AND NOT adjudicated AND NOT EXISTS (SELECT 1 FROM "
                "assignments WHERE item = items.id AND annotator = :annotator AND assignments.labelled)",
                values,
            ).fetchone()
            recent = db.execute(
                "SELECT seconds FROM labels WHERE annotator = ? AND seconds IS NOT NULL ORDER BY id DESC LIMIT ?",
                (annotator, RECENT),
            ).fetchall()
        return Progress(done, left, skipped, statistics.median(row[0] for row in recent) if recent else None)

    def states(self) -> dict[str, int]:
        """Return the number of units in each state: open, claimed, labelled, complete, adjudicated."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT CASE WHEN adjudicated THEN 'adjudicated' WHEN labelled >= :n THEN 'complete' "
                "WHEN labelled THEN 'labelled' WHEN EXISTS (SELECT 1 FROM assignments WHERE item = items.id AND "
                "skipped_at IS NULL AND expires_at > :now) THEN 'claimed' ELSE 'open' END, count(*) "
                "FROM items GROUP BY 1",
                {"n": self.annotators_per_unit, "now": self._clock()},
            ).fetchall()
        return dict.fromkeys(("open", "claimed", "labelled", "complete", "adjudicated"), 0) | dict(rows)

    def ties(self) -> list[int]:
        """Return the ids of the complete units with a tie that is not adjudicated."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT item, accepted, help_needed FROM current_labels JOIN items ON items.id = item "
                "WHERE labelled >= ? AND NOT adjudicated AND annotator IS NOT NULL",
                (self.annotators_per_unit,),
            ).fetchall()
        labels: dict[int, list[UnitLabel]] = {}
        for item, *said in rows:
            labels.setdefault(item, []).append(_label(*said))
        return sorted(item for item, said in labels.items() if None in decide(said))

    def _keep(self, db: sqlite3.Connection, item: int, annotator: int, now: float) -> None:
        db.execute(
            "INSERT INTO assignments (item, annotator, shown_at, expires_at) VALUES (?, ?, ?, ?) ON CONFLICT DO "
            "UPDATE SET shown_at = excluded.shown_at, expires_at = excluded.expires_at, skipped_at = NULL",
            (item, annotator, now, now + CLAIM_SECONDS),
        )

    def _item(self, db: sqlite3.Connection, item: int, step: int, trace: str, offers: str, digest: int) -> Item:
        events = db.execute(
            "WITH RECURSIVE history AS (SELECT *, 0 AS back FROM events WHERE digest = ? UNION ALL SELECT events.*, "
            "back + 1 FROM events JOIN history ON events.digest = history.before) "
            "SELECT time, event FROM history ORDER BY back DESC",
            (digest,),
        ).fetchall()
        history = tuple(Event(time=when, event=what) for when, what in events)
        return Item(item, step, Unit(trace, history, {k: tuple(v) for k, v in json.loads(offers).items()}))

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
    """Return the SHA-256 of a token, which is stored in its place. Tokens are random, so it needs no salt."""
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


def _add_label(
    db: sqlite3.Connection,
    item: int,
    annotator: int | None,
    label: UnitLabel | None,
    seconds: float | None,
    at: float,
    post: str | None,
) -> None:
    accepted = None if label is None else json.dumps(label.accepted)
    db.execute(
        "INSERT INTO labels (item, annotator, accepted, help_needed, seconds, at, post) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (item, annotator, accepted, label and label.help_needed, seconds, at, post),
    )


def _count(db: sqlite3.Connection, item: int) -> None:
    db.execute(
        "UPDATE items SET labelled = (SELECT count(*) FROM assignments WHERE item = items.id AND "
        "assignments.labelled) WHERE id = ?",
        (item,),
    )


def _label(accepted: str, help_needed: int) -> UnitLabel:
    return UnitLabel(tuple(json.loads(accepted)), bool(help_needed))
