"""The dashboard in a real browser, headless. Skipped where there is no Chromium."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.happenings import Said
from coordinator.store.schema import IS_OPEN, federations, rounds, sightings
from coordinator.store.sightings import DeviceState, Sighting, write_sightings
from coordinator.store.sql import SqlStore
from protocol.messages import Joined
from tests.coordinator.admin_port import AdminPort, admin_port
from tests.coordinator.browser import Page, browser, needs_chromium
from tests.coordinator.busy_store import busy_settings, fill_store

pytestmark = needs_chromium
LOADED_CPU_S_MAX = 0.5
OVER_FOR_NOTHING = {"outcome": "abandoned", "closed_at": time.time(), "reports": 2}


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(tab: Page, admin: AdminPort) -> Iterator[Page]:
    """The tab, empty; it lets go of the admin port before that closes."""
    tab.problems.clear()
    yield tab
    tab.call("Page.navigate", url="about:blank")
    tab.until("location.href === 'about:blank'")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = fill_store(tmp_path / "s.sqlite", devices=1000, rounds_done=500)
    yield store
    store.close()


@pytest.fixture
def admin(store: SqlStore, tmp_path: Path) -> Iterator[AdminPort]:
    with admin_port(f"sqlite:///{tmp_path}/s.sqlite") as port:
        yield port


def test_a_thousand_devices_and_500_rounds_load_with_little_cpu_and_stay_live(
    page: Page, admin: AdminPort, store: SqlStore
) -> None:
    page.look(width=1280, height=1500, dark=False)
    page.call("Network.setCacheDisabled", cacheDisabled=True)
    page.call("Performance.enable", timeDomain="threadTicks")
    page.open(admin.address)
    cpu_s = page.metric("TaskDuration")
    print(f"loaded with {cpu_s:.2f} s of the page's CPU")
    assert cpu_s < LOADED_CPU_S_MAX
    assert page.ask("document.querySelectorAll('#rows tr').length") == 50
    assert page.ask("document.querySelectorAll('.plot .curve').length") == 6
    drawn = page.ask("document.querySelector('#chart-loss .curve').getAttribute('d')")
    assert drawn.count("L") == 499

    # A device joins and round 501 ends: the page follows by itself.
    page.until("document.querySelector('.link').classList.contains('live')")
    with store.database.begin() as db:
        db.execute(federations.update().values(rounds_done=501))
        over = {"outcome": "aggregated", "closed_at": time.time(), "reports": 20}
        db.execute(rounds.update().where(rounds.c.number == 501).values(**over))
    settings = busy_settings(500)
    admin.tell(Said("reviews", "new-device", Joined(settings), 10))
    page.until("document.getElementById('all-text').textContent.startsWith('501 of 600')")
    page.until("document.getElementById('rows').textContent.includes('new-device')")
    page.until(
        "document.getElementById('chart-time').querySelector('.curve')"
        ".getAttribute('d').split('L').length === 501"
    )
    assert page.problems == []


def test_a_buffer_is_shown_by_the_reports_that_it_wants(
    page: Page, admin: AdminPort, store: SqlStore
) -> None:
    with store.database.begin() as db:
        db.execute(rounds.update().where(IS_OPEN).values(deadline_at=None))
    page.open(admin.address)
    page.until("document.getElementById('round-text').textContent === '13 of 20 reports'")
    assert page.problems == []


def test_devices_are_sorted_filtered_and_turned_over(page: Page, admin: AdminPort) -> None:
    page.open(admin.address)
    first = "document.querySelector('#rows td').textContent"
    page.ask("document.querySelector('#columns th button').click()")
    page.until("document.querySelector('#columns th').ariaSort === 'ascending'")
    lowest = page.until(f"{first}[0] === '0' && {first}")
    page.ask("document.getElementById('later').click()")
    page.until("document.getElementById('page').textContent === '51 to 100'")
    assert page.ask(first) > lowest
    page.ask("document.querySelector('#states button').click()")
    page.until("document.getElementById('page').textContent.startsWith('1 to')")
    wanted = page.ask("document.querySelector('#states [aria-pressed=true]').textContent")
    page.until(
        "[...document.querySelectorAll('#rows .state')]"
        f".every((state) => {wanted!r}.startsWith(state.textContent))"
    )
    page.ask(
        "const field = document.getElementById('contains'); field.value = 'no such';"
        "field.dispatchEvent(new Event('input'))"
    )
    page.until("!document.getElementById('nobody').hidden")
    assert page.problems == []


def test_reports_that_came_late_are_counted_beside_those_that_are_kept(
    page: Page, admin: AdminPort, store: SqlStore
) -> None:
    with store.database.begin() as db:
        db.execute(sightings.update().values(kept=9, late=0))
        name = db.scalar(sa.select(sightings.c.device).limit(1))
        one = sightings.c.device == name
        db.execute(sightings.update().where(one).values(late=12))
    page.open(admin.address)
    page.until("document.getElementById('tiles').textContent.includes('9,000 12 late')")
    page.ask(
        "[...document.querySelectorAll('#columns th button')]"
        ".find((button) => button.textContent === 'Late').click()"
    )
    page.until(f"document.querySelector('#rows td').textContent === {name!r}")
    assert page.ask("document.querySelector('#rows td[data-label=Late]').textContent") == "12"
    assert page.problems == []


def test_what_devices_send_is_text_and_never_markup(
    page: Page, admin: AdminPort, store: SqlStore
) -> None:
    evil = "<img src=x onerror=window.owned=1>"
    with store.database.begin() as db:
        seen = Sighting(DeviceState.WAITING, time.time() + 60)
        write_sightings(db, {("reviews", evil): seen})
    page.open(admin.address)
    page.until(f"document.getElementById('rows').textContent.includes({evil!r})")
    assert page.ask("document.querySelectorAll('img').length") == 0
    assert page.ask("window.owned === undefined")
    assert page.problems == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_a_phone_and_can_be_read_light_and_dark(
    page: Page, admin: AdminPort, dark: bool, width: int
) -> None:
    page.look(width=width, height=800, dark=dark, phone=width < 500)
    page.open(admin.address)
    assert page.ask("document.documentElement.scrollWidth") <= width
    # The contrast of quiet text on its ground, by WCAG's formula.
    contrast = page.ask("""(() => {
      const light = (color) => {
        const [r, g, b] = color.match(/[0-9.]+/g).map((c) => c / 255)
          .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const of = (element) => getComputedStyle(element);
      const pairs = [
        [of(document.getElementById('what')).color, of(document.body).backgroundColor],
        [of(document.querySelector('.tiles dt')).color,
         of(document.querySelector('.tiles div')).backgroundColor],
        [of(document.querySelector('.up')).color,
         of(document.querySelector('.devices')).backgroundColor],
      ];
      return Math.min(...pairs.map(([a, b]) => {
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
      }));
    })()""")
    assert contrast >= 4.5
    assert page.problems == []


def test_it_says_so_when_the_coordinator_is_gone(
    page: Page, store: SqlStore, tmp_path: Path
) -> None:
    with admin_port(f"sqlite:///{tmp_path}/s.sqlite") as other:
        page.open(other.address)
        page.until("document.querySelector('.link').classList.contains('live')")
    page.until("document.querySelector('.link').classList.contains('lost')")
    page.until("document.getElementById('notice').textContent.includes('all is as it was at ')")
    assert page.ask("document.getElementById('notice').hidden") is False


def test_rounds_that_fail_are_counted_and_shown_also_after_the_last_good_one(
    page: Page, admin: AdminPort, store: SqlStore
) -> None:
    with store.database.begin() as db:
        db.execute(rounds.update().where(rounds.c.number >= 499).values(OVER_FOR_NOTHING))
    page.look(width=1280, height=1500, dark=False)
    page.open(admin.address)
    marks = "document.querySelectorAll('#chart-reports path.fault').length"
    assert page.ask(marks) == 3
    assert page.ask("document.querySelector('#chart-reports .key.fault').textContent") == (
        "abandoned 3"
    )
    # At the right edge, the last of them; the word is beside the pointer and not over the title.
    x, y = page.ask("""(() => {
      const box = document.querySelector('#chart-reports .plot').getBoundingClientRect();
      return [box.right - 7, box.top + 90];
    })()""")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = "document.querySelector('#chart-reports .tip')"
    page.until(f"{tip}.textContent === 'Round 501abandoned'")
    left, right = page.ask(
        f"(() => {{ const box = {tip}.getBoundingClientRect(); return [box.left, box.right]; }})()"
    )
    assert x - 150 < left < right < x
    assert page.problems == []


def test_an_address_with_a_password_or_a_broken_hash_is_shown_all_the_same(
    page: Page, store: SqlStore, tmp_path: Path
) -> None:
    token = "0123456789abcdef"
    with admin_port(f"sqlite:///{tmp_path}/s.sqlite", token=token) as port:
        page.open(port.address.replace("//", f"//any:{token}@") + "#%E0%A4%A")
        assert page.ask("document.querySelectorAll('#rows tr').length") == 50
        assert page.ask("document.getElementById('notice').hidden")
        page.call("Page.navigate", url="about:blank")
        page.until("location.href === 'about:blank'")
    assert page.problems == []
