"""The page in a real browser, over listings that change."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import pytest

pytest.importorskip("vllm")

from tools.browser import PROGRAMS, Browser, Page, browser_program
from vllm_multilora.gateway.status.page import page as page_text

from .stub import StubServer, listing, row

pytestmark = pytest.mark.slow

Tab = Callable[..., Page]
REQUIRED = "MULTILORA_REQUIRE_BROWSER"
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>document.title='taken'</script>",
    '"><svg onload=alert(2)>',
    "javascript:alert(3)",
    "{{7*7}}${alert(4)}",
    "\u202egnp.live\u2066\x1b[31m\n",
    "x" * 3000,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = browser_program()
    if program is None:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1 asks for a browser, and none of {PROGRAMS} is on the path")
        pytest.skip(f"none of {', '.join(PROGRAMS)} is on the path")
    with Browser(program) as running:
        yield running


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """Opens pages, and closes them after the test: they would go on asking."""
    opened = []

    def open_tab(url: str, **options: Any) -> Page:
        opened.append(browser.page(**options))
        opened[-1].open(url)
        return opened[-1]

    yield open_tab
    for page in opened:
        page.close()


def cells(page: Page, column: int) -> list[str]:
    """What a column of the table shows."""
    rows = "[...document.querySelectorAll('#rows tr:not(.more)')]"
    return page.evaluate(f"{rows}.map(row => row.cells[{column}].innerText.trim())")


def states(page: Page) -> dict[str, str]:
    return dict(zip(cells(page, 0), cells(page, 1), strict=True))


def click(page: Page, selector: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).click()")


def drawn(page: Page, count: int) -> None:
    page.until(f"document.querySelectorAll('#rows tr:not(.more)').length === {count}")


@contextmanager
def showing(tab: Tab, answer: dict[str, Any], count: int) -> Iterator[tuple[StubServer, Page]]:
    """A server with a listing, and a page that shows so many adapters of it."""
    with StubServer(answer) as server:
        page = tab(server.url)
        drawn(page, count)
        yield server, page


def test_rows_follow_the_adapters_from_tier_to_tier(tab: Tab) -> None:
    def rows(*there: str) -> list[dict]:
        return [
            row(name, number, state, slot=0 if state == "slot" else None)
            for number, (name, state) in enumerate(zip("abc", there, strict=True), start=1)
        ]

    with showing(tab, listing(rows("absent", "host", "slot")), 3) as (server, page):
        assert states(page) == {"a": "absent", "b": "host", "c": "slot"}
        assert cells(page, 0) == ["c", "b", "a"], "those that are nearest to serving come first"
        page.evaluate("window.before = document.querySelector('#rows tr')")  # the row of c
        for there in (("queued", "host", "slot"), ("reading", "slot", "host")):
            server.answer = listing(rows(*there))
            page.until(f"document.querySelector('#rows').innerText.includes({there[0]!r})")
            assert states(page) == dict(zip("abc", there, strict=True))
        assert cells(page, 0) == ["b", "c", "a"]
        assert page.evaluate("before.isConnected && before.innerText.startsWith('c')"), (
            "it flickers"
        )
        server.answer = listing([])
        drawn(page, 0)
        assert page.complaints() == []


def test_names_and_reasons_are_text_whatever_they_are(tab: Tab) -> None:
    rows = [
        row(name, number, "failed", path=name, last_error=f"{name}\nreason")
        for number, name in enumerate(HOSTILE, start=1)
    ]
    tenants = [
        {"id": name, "running": 1, "waiting": 0, "adapters": 1, "weight": 1} for name in HOSTILE
    ]
    for tenant in tenants:
        tenant["limits"] = dict.fromkeys(("running", "waiting", "adapters", "tokens_per_minute"))
    rows[0] = {**rows[0], "state": "slot", "slot": 0}
    with showing(tab, listing(rows, tenants=tenants), len(HOSTILE)) as (server, page):
        page.evaluate("document.querySelectorAll('#rows .open').forEach(b => b.click())")
        server.wait_for_call()
        server.wait_for_call()
        assert page.evaluate("document.title") == "LoRA adapters"
        assert (
            page.evaluate(
                "document.querySelectorAll('main script, main img, main [onload]').length"
            )
            == 0
        )
        assert page.evaluate("document.querySelectorAll('svg').length") == 1
        shown = page.evaluate("document.body.textContent")
        for name in HOSTILE[:5]:
            assert name in shown
        for unseen in "\u202e\u2066\x1b":
            assert unseen not in shown
        assert "\\u202egnp.live\\u2066\\u001b[31m\\u000a" in shown
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it overflows"
        assert page.complaints() == []


def test_the_policy_holds_where_the_page_would_forget(tab: Tab) -> None:
    with showing(tab, listing([row("a", 1)]), 1) as (_, page):
        assert (
            page.evaluate("try { document.body.innerHTML = '<b>'; 'made' } catch (e) { e.name }")
            == "TypeError"
        )
        page.evaluate(
            "{ const s = document.createElement('style'); s.textContent = 'h1 { color: #010203 }';"
            " document.head.append(s); }"
        )
        assert (
            page.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(1, 2, 3)"
        )
        away = "fetch('http://127.0.0.1:1/').then(() => 'sent', () => 'refused')"
        assert page.evaluate(away) == "refused"
        assert any("Content Security Policy" in complaint for complaint in page.complaints())


def test_a_key_is_asked_for_used_and_forgotten(tab: Tab) -> None:
    with StubServer(listing([row("a", 1)]), key="sk-right") as server:
        page = tab(server.url)
        page.until("!$('access').hidden")
        assert page.evaluate("document.activeElement.id") == "key"
        time.sleep(2.5)
        assert server.keys == [None], "without a key it does not ask again"

        def enter(key: str) -> None:
            page.evaluate(f"$('key').value = {key!r}")
            click(page, "#key-use")

        enter("schlüssel")
        page.until("$('notice').innerText.includes('ASCII')")
        enter("sk-wrong")
        page.until("$('notice').innerText.includes('does not know this key')")
        enter("sk-right")
        drawn(page, 1)
        assert server.keys[1:3] == ["sk-wrong", "sk-right"]
        assert page.evaluate("$('access').hidden")
        assert page.evaluate("$('key').value") == ""
        assert (
            page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length")
            == 0
        )
        page.open(server.url)
        page.until("!$('access').hidden")


def test_a_server_that_has_gone_is_reported_and_so_is_its_return(tab: Tab) -> None:
    with showing(tab, listing([row("a", 1)]), 1) as (server, page):
        server.status = HTTPStatus.SERVICE_UNAVAILABLE
        page.until("$('notice').innerText.includes('answers 503: no answer')")
        assert page.evaluate("document.body.classList.contains('stale')")
        server.status = HTTPStatus.OK
        page.until("$('notice').hidden")
        assert not page.evaluate("document.body.classList.contains('stale')")
    page.until("$('notice').innerText.includes('cannot be reached')")
    assert cells(page, 0) == ["a"], "what was shown stays"


def test_hundreds_of_adapters_are_drawn_in_parts_and_found(tab: Tab) -> None:
    rows = [
        row(f"customer-{number:04}", number, "host" if number % 10 else "failed", requests=number)
        for number in range(1000)
    ]
    with showing(tab, listing(rows), 200) as (_, page):
        click(page, "#further")
        drawn(page, 400)
        click(page, "button.state.failed")
        drawn(page, 100)
        page.evaluate(
            "{ const f = $('filter'); f.value = '0990'; f.dispatchEvent(new Event('input')); }"
        )
        drawn(page, 1)
        assert cells(page, 0) == ["customer-0990"]
        page.evaluate(
            "{ const f = $('filter'); f.value = ''; f.dispatchEvent(new Event('input')); }"
        )
        click(page, "button.state.failed")
        drawn(page, 200)
        requests = (
            "[...document.querySelectorAll('#heads button')].find(b => b.innerText === 'Requests')"
        )
        for direction, first in (("descending", "customer-0999"), ("ascending", "customer-0000")):
            page.evaluate(f"{requests}.click()")
            assert page.evaluate(f"{requests}.closest('th').getAttribute('aria-sort')") == direction
            assert cells(page, 0)[0] == first
        assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
        assert page.complaints() == []


def test_traffic_is_what_has_come_between_two_looks(tab: Tab) -> None:
    with showing(tab, listing([row("a", 1, requests=100), row("b", 2)]), 2) as (server, page):
        assert cells(page, 5) == ["", ""], "there is nothing to compare with yet"
        server.answer = listing([row("a", 1, requests=160), row("b", 2)])
        page.until("document.querySelector('#rows').rows[0].cells[5].innerText > '0'")
        a, b = cells(page, 5)
        assert 200 < float(a.replace(",", "")) <= 60 * 60 / 2
        assert b == "0"
        server.answer = listing([row("a", 1, requests=3), row("b", 2)])  # it was unloaded meanwhile
        server.wait_for_call()
        server.wait_for_call()
        assert float(cells(page, 5)[0].replace(",", "")) >= 0


def test_details_of_engines_and_versions(tab: Tab) -> None:
    engines = [
        {"engine": 0, "state": "slot", "slot": 1, "digest": "d"},
        {"engine": 1, "state": "host", "slot": None, "digest": "d"},
    ]
    answer = listing([row("a", 1, "slot", slot=1, engines=engines, pinned=True)], slots=4)
    answer["slots"]["free"] = 2  # a version that requests still end on has the other
    answer["routes"] = [{"id": "house", "leads_to": ["a", "b"]}]
    limits = dict.fromkeys(("running", "waiting", "adapters")) | {"tokens_per_minute": 6000}
    used = dict.fromkeys(("running", "waiting", "adapters"), 0) | {"tokens": 1500}
    answer["tenants"] = [{"id": "acme", "weight": 1, "limits": limits, **used}]
    with showing(tab, answer, 1) as (_, page):
        assert row("a", 1)["digest"][:16] in page.evaluate("$('rows').innerText")
        assert page.evaluate("$('routes').innerText").split() == ["house", "a,", "b"]
        assert "1,500 of 6,000" in page.evaluate("$('tenants').innerText")
        taken = "[...document.querySelectorAll('#slots li.taken')].map(one => one.innerText)"
        assert [text.split() for text in page.evaluate(taken)] == [["0/1", "a", "pin"]]
        assert "1 by versions" in page.evaluate("$('slots-note').innerText")
        click(page, "#rows .open")
        assert (
            page.evaluate("document.querySelector('#rows .open').getAttribute('aria-expanded')")
            == "true"
        )
        details = page.evaluate("document.querySelector('.more').innerText")
        assert "engine 0: 1, engine 1: host" in details
        assert "/adapters/1" in details


def test_a_tenant_sees_its_own_adapters_and_nothing_else(tab: Tab) -> None:
    keys = ("id", "object", "state", "kind", "rank", "last_error")
    rows = [{key: value for key, value in row("a", 1, "host").items() if key in keys}]
    with showing(tab, {"object": "list", "data": rows}, 1) as (_, page):
        heads = "[...document.querySelectorAll('#heads th')].map(h => h.innerText.trim())"
        assert page.evaluate(heads) == ["Adapter", "State", "Rank"]
        assert page.evaluate("$('figures').hidden")
        assert page.complaints() == []


def test_the_page_says_without_scripts_what_else_there_is() -> None:
    assert "vllm-multilora status --url" in page_text().split("<noscript>")[1]


def test_the_same_answer_again_is_no_time_without_requests(tab: Tab) -> None:
    def answers(number: int) -> None:
        server.answer = listing([row("a", 1, "host", requests=100 * number)])
        server.tag = f'"{number}"'

    with StubServer(listing([])) as server:
        answers(1)
        page = tab(server.url)
        drawn(page, 1)
        answers(2)
        page.until("points.length === 1")
        for _ in range(2):
            server.wait_for_call()
        assert page.evaluate("points.length") == 1
        assert page.evaluate("points[0].rate") > 0
        answers(3)
        page.until("points.length === 2")
        assert page.complaints() == []
