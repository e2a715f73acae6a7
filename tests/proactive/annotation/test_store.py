"""The project file: who gets which unit, what is kept of answers, and that no unit gets too many."""

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.corpus.records import Event
from datamodules.corpus.units import Unit, UnitLabel
from datamodules.errors import UserError
from proactive.annotation.store import CLAIM_SECONDS, RefusedError, Store

YES = UnitLabel((True, False), True)
NO = UnitLabel((False, False), False)


def units(count: int, trace: str = "a.json") -> list[Unit]:
    events = tuple(Event(time=str(n), event=f"The user does {trace} {n}.") for n in range(count))
    return [Unit(trace, events[: n + 1], {f"Help {n}.": ("x",), f"Other {n}.": ("x", "y")}) for n in range(count)]


class Clock:
    """A clock that a test turns."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    Store.create(tmp_path / "p.sqlite", 2)
    with contextlib.closing(Store(tmp_path / "p.sqlite", clock)) as opened:
        opened.add_units(units(3))
        yield opened


def people(store: Store, count: int) -> list[int]:
    found = []
    for number in range(count):
        annotator = store.annotator(store.invite(f"person {number}"))
        assert annotator is not None
        found.append(annotator.id)
    return found


def test_units_are_read_back_unchanged(store: Store) -> None:
    assert [item.unit for item in store.items()] == units(3)
    assert store.add_units(units(4)) == 1
    assert [item.step for item in store.items()] == [0, 1, 2, 3]


def test_a_unit_with_other_proposals_is_refused_and_nothing_is_added(store: Store) -> None:
    other = [*units(2, "new"), Unit("a.json", units(1)[0].history, {"Another.": ()})]
    with pytest.raises(UserError, match=r"a\.json, event 1: the project has this history with other offers"):
        store.add_units(other)
    assert len(list(store.items())) == 3


def test_a_unit_gets_at_most_the_wanted_number_of_annotators(store: Store) -> None:
    one, two, three = people(store, 3)
    assert (store.claim(one), store.claim(two), store.claim(three)) == (1, 1, 2)
    assert store.claim(one) == 1  # the same until it is answered
    store.save(one, 1, YES, "a")
    assert store.claim(one) == 2
    with pytest.raises(RefusedError, match="not given to you"):
        store.save(three, 1, YES, "b")


def test_units_with_the_fewest_missing_labels_come_first(store: Store, clock: Clock) -> None:
    one, two = people(store, 2)
    store.claim(one)
    store.skip(one, 1)
    assert store.claim(one) == 2
    store.save(one, 2, YES, "a")
    assert store.claim(two) == 2


def test_a_label_after_an_expired_claim_is_saved_if_the_unit_still_needs_one(store: Store, clock: Clock) -> None:
    one, two, three = people(store, 3)
    store.claim(one)
    clock.now += CLAIM_SECONDS + 1
    assert (store.claim(two), store.claim(three)) == (1, 1)
    with pytest.raises(RefusedError, match="others have labelled"):
        store.save(one, 1, YES, "late")
    clock.now += CLAIM_SECONDS + 1
    store.save(one, 1, YES, "seat is free again")
    store.save(two, 1, YES, "and so is this")
    with pytest.raises(RefusedError, match="others have labelled"):
        store.save(three, 1, YES, "none is left")


def test_the_latest_label_counts_and_no_label_is_overwritten(store: Store, clock: Clock) -> None:
    (one,) = people(store, 1)
    store.claim(one)
    clock.now += 7
    store.save(one, 1, YES, "a")
    store.save(one, 1, NO, "b")
    store.save(one, 1, YES, "b")  # the same form sent twice
    assert store.label(one, 1) == NO
    (label,) = store.labels()
    assert (label.annotator, label.label, label.seconds, label.at) == ("person 0", NO, 7.0, clock.now)
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        assert db.execute("SELECT accepted, help_needed FROM labels ORDER BY id").fetchall() == [
            ("[true, false]", 1),
            ("[false, false]", 0),
        ]


def test_a_withdrawn_label_does_not_count_and_its_unit_stays_reserved(store: Store) -> None:
    one, two, three = people(store, 3)
    assert store.withdraw_latest(one) is None
    for person in (one, two):
        store.claim(person)
        store.save(person, 1, YES, f"{person}")
    assert store.states()["complete"] == 1
    assert store.withdraw_latest(one) == 1
    assert (store.label(one, 1), store.states()["complete"], store.states()["labelled"]) == (None, 0, 1)
    assert store.claim(three) == 2
    assert store.claim(one) == 1
    store.save(one, 1, NO, "again")
    assert store.states()["complete"] == 1


def test_skipped_units_come_last(store: Store, clock: Clock) -> None:
    (one,) = people(store, 1)
    for expected in (1, 2, 3):
        assert store.claim(one) == expected
        clock.now += 1
        store.skip(one, expected) if expected < 3 else store.save(one, expected, YES, "c")
    assert store.progress(one).skipped == 2
    assert store.claim(one) == 1
    clock.now += 1
    store.skip(one, 1)
    assert store.claim(one) == 2


def test_states_progress_and_pace_are_counted(store: Store, clock: Clock) -> None:
    one, two = people(store, 2)
    assert store.states() == {"open": 3, "claimed": 0, "labelled": 0, "complete": 0, "adjudicated": 0}
    store.claim(one)
    assert store.states()["claimed"] == 1
    assert (store.progress(one).left, store.progress(one).pace) == (3, None)
    for seconds in (4, 8, 30):
        item = store.claim(one)
        assert item is not None
        clock.now += seconds
        store.save(one, item, YES, f"{item}")
    assert store.claim(one) is None
    assert store.progress(one).__dict__ == {"done": 3, "left": 0, "skipped": 0, "pace": 8.0}
    assert store.states()["labelled"] == 3
    store.claim(two)
    store.save(two, 1, NO, "x")
    assert store.ties() == [1]
    store.adjudicate(1, NO, "y")
    assert (store.ties(), store.states()["adjudicated"]) == ([], 1)
    with pytest.raises(RefusedError, match="adjudicated"):
        store.save(one, 1, NO, "z")


def test_arrows_go_through_the_labelled_units(store: Store) -> None:
    one, two = people(store, 2)
    for person in (two, one):
        for item in (1, 2):
            store.claim(person)
            store.save(person, item, YES, f"{person} {item}")
    assert store.neighbours(one, 3) == (2, None)
    assert store.neighbours(one, 2) == (1, None)
    assert store.neighbours(one, 1) == (None, 2)
    store.save(one, 1, NO, "changed")  # now the latest
    assert store.neighbours(one, 1) == (2, None)


def test_offers_are_shuffled_once_per_annotator(store: Store) -> None:
    item = store.item(1)
    assert item is not None
    orders = Counter(tuple(item.order(annotator)) for annotator in range(100))
    assert set(orders) == {(0, 1), (1, 0)}
    assert min(orders.values()) > 25
    assert item.order(5) == item.order(5)


def test_only_a_digest_of_a_token_is_kept_and_a_new_one_voids_the_old(store: Store) -> None:
    old = store.invite("  Ada \n Lovelace ")
    new = store.invite("Ada Lovelace")
    assert store.annotator(old) is None
    assert [one.name for one in store.annotators()] == ["Ada Lovelace"]
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        kept = "\n".join(db.iterdump())
    assert new not in kept
    for blank in ("", " ", "x" * 81):
        with pytest.raises(UserError, match="1 to 80 characters"):
            store.invite(blank)


def test_two_stores_give_a_unit_to_at_most_the_wanted_number(tmp_path: Path) -> None:
    """As two servers on one project, with six annotators in threads; every answer stands in the end."""
    path = tmp_path / "p.sqlite"
    Store.create(path, 2)
    stores = [Store(path), Store(path)]
    stores[0].add_units(units(12))
    annotators = people(stores[0], 6)

    def work(person: int) -> None:
        store = stores[person % 2]
        while (item := store.claim(person)) is not None:
            store.save(person, item, YES, f"{person} {item}")
            done.append((person, item))

    done: list[tuple[int, int]] = []
    threads = [threading.Thread(target=work, args=(person,)) for person in annotators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for _, item in done) == sorted([*range(1, 13)] * 2)
    assert len({(label.annotator, label.item) for label in stores[1].labels()}) == 24
    assert stores[1].states()["complete"] == 12
    for store in stores:
        store.close()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, None])
def test_files_that_are_not_projects_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.sqlite"
    if content is None:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE mine (a)")
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.sqlite"):
        Store(path)


def test_the_number_of_annotators_of_a_project_is_fixed(store: Store) -> None:
    Store.create(store.path, 2)
    with pytest.raises(UserError, match=r"--annotators-per-unit: 3, but .* has 2"):
        Store.create(store.path, 3)
