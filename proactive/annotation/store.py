"""The labels of a project: assignments of units to annotators, current labels, and adjudications."""

import json
import sqlite3
import statistics
from dataclasses import dataclass

from datamodules.corpus.units import UnitLabel, decide
from proactive.annotation.project_file import ProjectFile

CLAIM_SECONDS = 30 * 60.0  # a unit that an annotator was shown is reserved for so long
RECENT = 20  # the pace is computed from so many latest labels
# The number of other annotators who have a current label of an item, or for whom it is reserved.
OTHER_ANNOTATORS = """(SELECT count(*) FROM assignments AS other WHERE other.item = items.id
    AND other.annotator <> :annotator
    AND (other.labelled OR (other.skipped_at IS NULL AND other.expires_at > :now)))"""


class RefusedError(Exception):
    """A label is refused. The message is shown to the annotator."""


@dataclass(frozen=True)
class StoredLabel:
    """A current label. `annotator` is None for the adjudicator's."""

    item: int
    trace: str
    annotator: str | None
    label: UnitLabel
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


class Store(ProjectFile):
    """A project file with its labels."""

    def claim(self, annotator: int) -> int | None:
        """Reserve the next unit for an annotator, and return its id; None if nothing is left to label.

        The order is: the unit that is already reserved for the annotator, units with the fewest missing labels, units
        that the annotator skipped.
        """
        now = self._clock()
        values = {"annotator": annotator, "now": now, "n": self.annotators_per_unit}
        needs_labels = f"items.labelled < :n AND NOT items.adjudicated AND {OTHER_ANNOTATORS} < :n"
        mine = "SELECT 1 FROM assignments AS mine WHERE mine.item = items.id AND mine.annotator = :annotator"
        queries = (
            "SELECT item FROM assignments JOIN items ON items.id = item WHERE annotator = :annotator AND NOT "
            "assignments.labelled AND skipped_at IS NULL AND expires_at > :now AND NOT items.adjudicated "
            "ORDER BY shown_at LIMIT 1",
            f"SELECT id FROM items WHERE {needs_labels} AND NOT EXISTS ({mine} AND (mine.labelled OR mine.skipped_at "
            "IS NOT NULL)) ORDER BY labelled DESC, id LIMIT 1",
            f"SELECT items.id FROM assignments JOIN items ON items.id = item WHERE annotator = :annotator AND NOT "
            f"assignments.labelled AND skipped_at IS NOT NULL AND {needs_labels} ORDER BY skipped_at LIMIT 1",
        )
        with self._transaction() as db:
            for query in queries:
                if found := db.execute(query, values).fetchone():
                    self._assign(db, found[0], annotator, now)
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
                f"SELECT mine.labelled, shown_at, adjudicated, {OTHER_ANNOTATORS} FROM assignments AS mine JOIN items "
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
            _update_label_count(db, item)

    def skip(self, annotator: int, item: int) -> None:
        """Skip a unit. `claim` returns it again when no other unit is left."""
        with self._transaction() as db:
            db.execute(
                "UPDATE assignments SET skipped_at = ? WHERE item = ? AND annotator = ? AND NOT labelled",
                (self._clock(), item, annotator),
            )

    def withdraw_latest(self, annotator: int) -> int | None:
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
            self._assign(db, item, annotator, now)
            db.execute("UPDATE assignments SET labelled = 0 WHERE item = ? AND annotator = ?", (item, annotator))
            _update_label_count(db, item)
        return item

    def adjudicate(self, item: int, label: UnitLabel, post: str) -> None:
        """Decide a unit finally, which overrides its labels. The decision is on disk when this returns."""
        with self._transaction() as db:
            if not db.execute("SELECT 1 FROM labels WHERE post = ?", (post,)).fetchone():
                _add_label(db, item, None, label, None, self._clock(), post)
                db.execute("UPDATE items SET adjudicated = 1 WHERE id = ?", (item,))

    def show_again(self, annotator: int, item: int) -> bool:
        """Note that an annotator opens a unit again, from when the time of the label counts.

        Returns:
            False if the unit was never assigned to the annotator.
        """
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

    def _assign(self, db: sqlite3.Connection, item: int, annotator: int, now: float) -> None:
        db.execute(
            "INSERT INTO assignments (item, annotator, shown_at, expires_at) VALUES (?, ?, ?, ?) ON CONFLICT DO "
            "UPDATE SET shown_at = excluded.shown_at, expires_at = excluded.expires_at, skipped_at = NULL",
            (item, annotator, now, now + CLAIM_SECONDS),
        )


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


def _update_label_count(db: sqlite3.Connection, item: int) -> None:
    db.execute(
        "UPDATE items SET labelled = (SELECT count(*) FROM assignments WHERE item = items.id AND "
        "assignments.labelled) WHERE id = ?",
        (item,),
    )


def _label(accepted: str, help_needed: int) -> UnitLabel:
    return UnitLabel(tuple(json.loads(accepted)), bool(help_needed))
