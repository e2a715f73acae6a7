"""The pages in a real browser: by keyboard, by mouse, without scripts, small, dark, and after a kill of the server."""

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from datamodules.corpus.units import UnitLabel
from proactive.annotation.store import Store
from tests.patience import HANG
from tests.proactive.annotation.conftest import chromium, page_of
from tests.proactive.annotation.serving import Served, project, served

SCRIPT = "<script>document.title = 'obeyed'</script><img src=x onerror=alert(1)>"
PROPOSALS = ["Sum up.", "Translate.", "Wait."]
UNIT = "h1"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return project(tmp_path / "p.sqlite", 6, 1, PROPOSALS)


@pytest.fixture
def server(file: Path, tmp_path: Path, browser: Any) -> Iterator[Served]:
    with served(file, annotators=["Ada"], cwd=tmp_path) as running:
        yield running


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    with page_of(browser, server.links["Ada"]) as opened:
        yield opened


def unit(page: Any) -> int:
    return int(page.text_content(UNIT).split(",")[0].removeprefix("Unit "))


def press(page: Any, *keys: str) -> None:
    """Press keys, the last of which leads to another page."""
    for key in keys[:-1]:
        page.keyboard.press(key)
    with page.expect_navigation():
        page.keyboard.press(keys[-1])


def key_of(page: Any, text: str) -> str:
    return next(label.text_content()[0] for label in page.locator("label.choice").all() if text in label.text_content())


def answers(file: Path) -> dict[int, tuple[tuple[bool, ...], bool | None]]:
    with contextlib.closing(Store(file)) as store:
        return {label.item: (label.label.accepted, label.label.help_needed) for label in store.labels()}


def test_three_annotators_at_once_by_keyboard_alone(tmp_path: Path, browser: Any) -> None:
    """30 units for two of three people: 60 answers, each as it was typed, and never more than two for a unit."""
    file = project(tmp_path / "p.sqlite", 30, 2, PROPOSALS)
    names = ["Ada", "Bo", "Cy"]
    typed: dict[tuple[str, int], UnitLabel] = {}
    failed: list[str] = []

    def work(name: str, link: str) -> None:
        try:
            with chromium() as own, page_of(own, link) as page:
                while page.locator("#answer").count():
                    number = unit(page)
                    wanted = (number + len(name)) % 4
                    keys = [key_of(page, text) for text in PROPOSALS[:wanted]] or ["0"]
                    needed = (number + names.index(name)) % 2 == 0
                    press(page, *keys, "h" if needed else "n")
                    accepted = tuple(place < wanted for place in range(3))
                    typed[name, number] = UnitLabel(accepted, needed)
        except BaseException as error:
            failed.append(f"{name}: {error!r}")
            raise

    with served(file, annotators=names, cwd=tmp_path) as running:
        threads = [threading.Thread(target=work, args=(name, running.links[name])) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
    assert failed == []
    with contextlib.closing(Store(file)) as store:
        assert {(str(label.annotator), label.item): label.label for label in store.labels()} == typed
        assert store.states()["complete"] == 30
    assert len(typed) == 60
    assert set(Counter(number for _, number in typed).values()) == {2}
    assert set(Counter(name for name, _ in typed)) == set(names)


def test_a_unit_takes_two_keystrokes(page: Any, file: Path) -> None:
    press(page, "0", "n")
    press(page, "n", "0")
    press(page, "1", "h")
    first = key_of(page, PROPOSALS[0])
    press(page, first, "h")
    found = answers(file)
    assert found[1] == found[2] == ((False,) * 3, False)
    assert (sum(found[3][0]), found[3][1]) == (1, True)
    assert found[4] == ((True, False, False), True)
    assert page.text_content("[role=status]") == "Saved."


def test_keys_choose_offers_and_zero_chooses_none(page: Any, file: Path) -> None:
    one, two = (key_of(page, text) for text in PROPOSALS[:2])
    press(page, "h", one, two, one, "Enter")
    press(page, "1", "0", "n")
    press(page, "0", "2", "n")
    found = answers(file)
    assert found[1] == ((False, True, False), True)
    assert found[2] == ((False,) * 3, False)
    assert sum(found[3][0]) == 1


def test_a_label_is_taken_back_a_unit_is_skipped_and_arrows_go_back(page: Any, file: Path) -> None:
    press(page, "0", "n")
    press(page, "1", "h")
    assert unit(page) == 3
    press(page, "u")
    assert (unit(page), answers(file).keys()) == (2, {1})
    press(page, "0", "h")
    press(page, "s")
    assert unit(page) == 4
    press(page, "ArrowLeft")
    assert page.text_content(UNIT) == "Unit 2, as you labelled it"
    assert page.locator("input[name=none]").is_checked()
    press(page, "ArrowLeft")
    assert unit(page) == 1
    press(page, "ArrowRight")
    press(page, "ArrowRight")
    assert unit(page) == 4
    press(page, "ArrowLeft")
    press(page, "1", "n")  # another answer to unit 2
    assert answers(file)[2][1] is False
    for _ in range(3):
        press(page, "0", "n")
    assert unit(page) == 3  # what was skipped comes last
    press(page, "0", "n")
    assert page.text_content("h1") == "Done for now"
    assert answers(file).keys() == set(range(1, 7))


def test_arrows_up_and_down_go_from_offer_to_offer(page: Any) -> None:
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert page.locator("input[name=accepted]").nth(1).is_checked()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert page.locator("input[name=none]").is_checked()
    assert not page.locator("input[name=accepted]").nth(1).is_checked()


def test_an_incomplete_form_is_shown_again_with_its_values(browser: Any, server: Served, file: Path) -> None:
    with page_of(browser, server.links["Ada"], "status of 422") as page:
        press(page, "2", "Enter")
        assert page.text_content("[role=alert]") == "Say whether help was needed."
        assert page.locator("input[name=accepted]").nth(1).is_checked()
        press(page, "h")
    assert len(answers(file)) == 1


def test_single_keys_can_be_turned_off(page: Any, file: Path) -> None:
    page.click("summary:has-text('Keys')")
    page.uncheck("#use-keys")
    page.reload()
    for key in "0n1hsu":
        page.keyboard.press(key)
    assert (unit(page), answers(file)) == (1, {})
    assert page.locator("input:checked").count() == 0


@pytest.mark.parametrize("scripts", [True, False])
def test_labelling_works_by_mouse_and_without_scripts(browser: Any, server: Served, file: Path, scripts: bool) -> None:
    with page_of(browser, server.links["Ada"], java_script_enabled=scripts) as page:
        page.get_by_label("Translate.").check()
        page.get_by_label("Help needed").check()
        page.click("text=Save and go on")
        assert page.text_content("[role=status]") == "Saved."
        page.click("text=Skip")
        page.get_by_label("None of these").check()
        page.get_by_label("Not needed").check()
        page.click("text=Save and go on")
        page.click("text=Take the last label back")
        assert unit(page) == 3
    assert answers(file) == {1: ((False, True, False), True)}


def test_each_annotator_has_their_own_order_and_later_events_are_hidden(tmp_path: Path, browser: Any) -> None:
    file = project(tmp_path / "p.sqlite", 12, 2, [f"Offer {letter}." for letter in "abcdefgh"])
    orders = []
    with served(file, annotators=["Ada", "Bo"], cwd=tmp_path) as running:
        for name in ("Ada", "Bo"):
            with page_of(browser, running.links[name]) as page:
                orders.append([label.text_content() for label in page.locator("label.choice .what").all()])
                assert "step 0" in page.text_content("main")
                assert "step 1." not in page.content()
                assert "Ada" not in page.text_content("main")
                for _ in range(8):
                    press(page, "0", "n")
                assert page.text_content("details summary") == "3 earlier events"
                assert page.locator("ol.events .now").text_content().endswith("The user does step 8.")
                page.reload()
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_a_script_in_an_event_stays_text(tmp_path: Path, browser: Any) -> None:
    from datamodules.corpus.records import Event
    from datamodules.corpus.units import Unit

    file = project(tmp_path / "p.sqlite", 0, 1)
    with contextlib.closing(Store(file)) as store:
        store.add_units([Unit(SCRIPT, (Event(time=SCRIPT, event=SCRIPT),), {SCRIPT: (SCRIPT,)})])
    with served(file, annotators=[SCRIPT], cwd=tmp_path) as running:
        for link in running.links.values():
            with page_of(browser, link) as page:
                assert page.title() != "obeyed"
                assert SCRIPT in page.text_content("body")
                assert page.locator("body img, body script").count() == 0


def test_labelling_continues_after_a_server_was_killed(tmp_path: Path, browser: Any, file: Path) -> None:
    """The same link, once it runs again: what was acknowledged is there, and what was not is asked again."""
    with served(file, annotators=["Ada"], cwd=tmp_path) as running:
        port = urlsplit(running.links["Ada"]).port or 0
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.links["Ada"])
        press(page, "0", "n")
        press(page, "1", "h")
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(HANG)
        page.keyboard.press("0")
        with page.expect_event("requestfailed"):
            page.keyboard.press("n")
    assert answers(file).keys() == {1, 2}
    with served(file, port=port, cwd=tmp_path):
        page.goto(running.links["Ada"])
        assert unit(page) == 3
        press(page, "0", "n")
        context.close()
    assert answers(file).keys() == {1, 2, 3}


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit(
    browser: Any, tmp_path: Path, faults: Callable[[Any], list[str]], width: int, scheme: str
) -> None:
    long = "A proposal with averyveryverylongwordthatcannotbebrokenanywhere" * 3
    file = project(tmp_path / "p.sqlite", 9, 2, [long, *PROPOSALS])
    with contextlib.closing(Store(file)) as store:
        for name, accepted in (("Cy", True), ("Di", False)):
            one = store.annotator(store.invite(name))
            assert one is not None
            store.claim(one.id)
            store.save(one.id, 1, UnitLabel((accepted,) * 4, accepted), name)
        for item in range(2, 9):
            for other in store.annotators():
                store.save(other.id, store.claim(other.id) or 0, UnitLabel((False,) * 4, False), f"{other} {item}")
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with served(file, annotators=["Ada"], cwd=tmp_path) as running:
        owner = running.links["overview"]
        for link in (running.links["Ada"], owner, f"{owner}/agreement", f"{owner}/adjudicate/1", f"{owner}/nothing"):
            with page_of(browser, link, "status of 404" if link.endswith("nothing") else "", **options) as page:
                for folded in page.locator("summary").all():
                    folded.click()
                assert faults(page) == []
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), link
                small = (
                    "[...document.querySelectorAll('button, .button, label.choice')].filter(e => e.offsetHeight < 24)"
                )
                assert page.evaluate(f"{small}.length") == 0
                back = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
