"""The page of the server in a real browser, against the app under uvicorn in this process."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bundle_world
import httpx
import pytest
import uvicorn
from bundle_world import World, categories_of, language_of, make_world, published
from colours import contrast
from playwright.sync_api import Locator, Page, expect
from replica import Replica

from serve.app import create_app
from serve.live import Asked, Variant
from serve.security import make_key
from serve.settings import Settings
from serve.store import StoreError

TYPES = ["audiobook", "music", "podcast"]
EVIL = "<img src=x onerror=\"document.title='harmed'\"></script><script>document.title='harmed'</script>"
EVIL_ID = "podcast-00007"
NATURES = ("Silver", "Quiet", "Hidden", "Golden", "Restless", "Distant", "Gentle", "Broken", "Crooked", "Solemn")
THINGS = ("River", "Harbour", "Garden", "Market", "Night", "Theory", "Journey", "Letter", "Island", "Winter", "Bridge")


def title_of(item_id: str) -> str:
    """Two words for most; one is an attack."""
    number = re.search(r"(\d+)$", item_id)
    if item_id == EVIL_ID or number is None:
        return EVIL if number else f"Title of {item_id}"
    return f"{NATURES[int(number[1]) % 10]} {THINGS[int(number[1]) % 11]} {item_id[0].upper()}{int(number[1])}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_world, "title_of", title_of)
        made = make_world(tmp_path_factory.mktemp("world"), memory=0.1)
        made.bundle()
        yield made


@contextmanager
def serving(replica: Replica, settings: Settings | None = None) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # who comes before the server is up waits
        server = uvicorn.Server(uvicorn.Config(create_app(replica, settings), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def replica(world, tmp_path_factory) -> Replica:
    """With a store and two variants."""
    variants = (Variant("plain", 0.5), Variant("popular", 0.5, popularity=1.0))
    return Replica(world.root, f"sqlite://{tmp_path_factory.mktemp('store')}/live.db", variants, examples=True)


@pytest.fixture(scope="module")
def url(replica) -> Iterator[str]:
    with serving(replica) as address:
        yield address


@dataclass
class Shown:
    """The page in a window of its own, with what went wrong in it and every address that it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def at(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def ids(self, pane: int = 0) -> list[str]:
        """Items of a pane, in the order in which they stand there."""
        return self.at(".pane").nth(pane).locator("[data-item]").evaluate_all("all => all.map(n => n.dataset.item)")

    def settle(self, change: Callable[[], Any]) -> None:
        """Wait for the answer to the question that ``change`` makes the page ask."""
        with self.page.expect_response(lambda answer: "recommendations" in answer.url):
            change()
        self.rest()

    def rest(self) -> None:
        expect(self.at(".pane[aria-busy=true]")).to_have_count(0)  # the policy forbids a function that is waited for

    def use(self, user: str) -> None:
        """Another user, found by typing."""
        self.at("#find").fill(user)
        self.at("[role=option]").filter(has_text=user).first.wait_for()
        self.settle(lambda: self.at("[role=option]").filter(has_text=user).first.click())
        assert self.at("#who").text_content() == user


@pytest.fixture
def show(chromium, url) -> Iterator[Callable[..., Shown]]:
    contexts = []

    def open_page(address: str = url, ready: bool = True, **options: Any) -> Shown:
        look = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        contexts.append(chromium.new_context(**look))
        shown = Shown(contexts[-1].new_page())
        shown.page.set_default_timeout(20_000)
        shown.page.on("pageerror", lambda error: shown.problems.append(str(error)))
        shown.page.on("console", lambda said: said.type == "error" and shown.problems.append(said.text))
        shown.page.on("request", lambda request: shown.requests.append(request.url))
        shown.page.goto(address)
        if ready:
            shown.at("html[data-ready=true]").wait_for()
            shown.rest()
        return shown

    yield open_page
    for context in contexts:
        context.close()


def test_lists_by_type_history_and_figures(show, url, replica):
    shown = show()
    user = replica.recommender.example_users(8)[0]
    assert shown.at("#who").text_content() == user
    assert shown.at(".lists h3").all_text_contents() == TYPES
    quotas = dict.fromkeys(TYPES, 8)
    told = replica.answers.answers(replica.recommender, [Asked(user_id=user, quotas=quotas)])[0]
    assert sorted(shown.ids()) == sorted(item.item_id for item in told.answer.items)
    first = next(item for item in told.answer.items if item.item_type == "audiobook")
    row = shown.at(f'[data-item="{first.item_id}"]')
    assert row.locator(".link").text_content() == first.title
    assert row.locator(".why").text_content() == first.reason
    assert f"{first.score:.3f}" in row.locator(".score").text_content()
    past = replica.recommender.history(user, 6)
    assert shown.at("#history .link").all_text_contents() == [event.title for event in past]
    assert shown.at("#variants tbody th").all_text_contents() == ["plain", "popular"]
    assert shown.at("#facts tbody td").first.text_content() == "30"
    assert replica.recommender.version in shown.at("#bundle").text_content()
    assert shown.problems == []
    assert {address.removeprefix(url).split("?")[0].split("/")[1] for address in shown.requests} == {"", "v1"}


def test_nothing_but_the_pages_own_script_runs(show, url):
    policy = httpx.get(url).headers["content-security-policy"]
    assert "unsafe" not in policy and policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    shown = show()
    shown.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
    )
    assert shown.page.title() == "recsys-ray: what next?"
    assert any("Content Security Policy" in problem for problem in shown.problems)


def test_finding_by_keyboard(show, replica):
    shown = show()
    for _ in range(2):  # past the link that skips to the lists
        shown.page.keyboard.press("Tab")
    assert shown.page.evaluate("document.activeElement.id") == "find"
    assert not shown.at("#choices").is_visible()
    shown.page.keyboard.press("ArrowDown")
    assert shown.at("#choices [role=option]").count() == len(replica.recommender.example_users(8)) + 1  # some to try
    shown.page.keyboard.type("SILV riv a")
    shown.at("[role=option]").filter(has_text="Silver River A").first.wait_for()
    shown.page.keyboard.press("ArrowDown")
    active = shown.page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))?.textContent"
    )
    found = replica.recommender.search("silv riv a", 8)
    assert active.startswith(f"{found[0].title}audiobook")
    shown.page.keyboard.press("Enter")
    assert shown.at("#item").is_visible() and shown.at("#item-title").text_content() == found[0].title
    shown.page.keyboard.press("Escape")
    assert not shown.at("#item").is_visible()
    assert shown.page.evaluate("document.activeElement.id") == "find"
    shown.page.keyboard.type("üser/001")
    shown.at("[role=option]").filter(has_text="üser/0010").wait_for()
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        shown.page.keyboard.press(key)
    shown.settle(lambda: shown.page.keyboard.press("Enter"))
    assert shown.at("#who").text_content() == "üser/0010"
    shown.page.keyboard.type("nothing is called so")
    shown.at("[role=option]").filter(has_text="as a user id").wait_for()
    shown.settle(lambda: shown.page.keyboard.press("Enter"))
    assert shown.at("#who").text_content() == "nothing is called so"
    assert "Cold user" in shown.at(".note").text_content()
    assert shown.problems == []


def test_titles_are_text(show):
    shown = show()
    shown.at("#find").fill("onerror")
    shown.at("[role=option]").filter(has_text="<img").wait_for()
    shown.page.keyboard.press("Enter")
    shown.at("#item dd").first.wait_for()
    assert shown.at("#item-title").text_content() == EVIL
    shown.settle(lambda: shown.at("#item .button.main").click())
    shown.at("#history .fresh").wait_for()
    assert EVIL in shown.at(".said").text_content()
    assert shown.page.title() == "recsys-ray: what next?" and shown.at("img").count() == 0
    assert shown.problems == []


def test_filters_and_dials_change_the_list(show, world):
    shown = show()
    before = shown.ids()
    shown.settle(lambda: shown.at("#languages").get_by_label("de", exact=True).check())
    german = shown.ids()
    assert german != before and {language_of(item_id) for item_id in german} == {"de"}
    assert "new" in shown.at(".said").text_content() and shown.at(".tag.new").count()
    shown.at("#mode").select_option("none")
    shown.at("#category").fill("b")
    shown.settle(lambda: shown.at("#category").press("Enter"))
    assert shown.ids() and not any("b" in categories_of(item_id) for item_id in shown.ids())
    assert shown.at("#active").text_content() == "2 in use"
    shown.settle(lambda: shown.at("#chips button").click())
    shown.settle(lambda: shown.at("#after").fill("2023-09-01"))
    dates = [published(item_id) for item_id in shown.ids()]
    assert dates and all(date is not None and date >= 1_693_526_400 for date in dates)
    shown.settle(lambda: shown.at("#types").get_by_label("music").uncheck())
    assert "music" not in shown.at(".lists h3").all_text_contents()
    shown.settle(lambda: shown.at("#clear").click())
    assert shown.ids() == before
    shown.at("#k").fill("3")
    shown.settle(lambda: shown.at("#k").press("Tab"))
    assert len(shown.ids()) == 9
    shown.settle(lambda: shown.page.get_by_label("one list").check())
    assert len(shown.ids()) == 3
    popular = shown.page.get_by_label("Popularity")
    shown.settle(lambda: popular.press("End"))
    assert shown.at("output").nth(1).text_content() == "1"
    shown.at("#mode").select_option("all")
    shown.at("#category").fill("nowhere")
    shown.settle(lambda: shown.at("#put").click())
    assert "Nothing is left to recommend" in shown.at(".lists").text_content()
    shown.settle(lambda: shown.page.get_by_role("button", name="Clear all filters").click())
    assert shown.ids()
    assert shown.problems == []


def test_an_event_changes_the_list(show, url, replica, world):
    shown = show()
    user = next(user for user in world.user_ids[10:] if replica.recommender.history(user))
    shown.use(user)
    before = shown.ids()
    button = shown.at(f'[data-item="{before[0]}"] .add')
    button.focus()
    shown.settle(lambda: shown.page.keyboard.press("Enter"))
    shown.at("#history .fresh").wait_for()
    after = shown.ids()
    assert before[0] not in after and after != before
    new = shown.at(".item.fresh").evaluate_all("all => all.map(n => n.dataset.item)")
    assert new == [item_id for item_id in after if item_id not in before] and new
    assert f"{len(new)} new" in shown.at(".said").text_content()
    assert shown.at("#history .link").first.text_content() == title_of(before[0])
    assert shown.page.evaluate("document.activeElement.className") == "add"  # the next one, not the top of the page
    assert "Added" in shown.at("#status").text_content() or "new" in shown.at("#status").text_content()
    kept = replica.answers.store.events_of([user], 0, 10)[user]
    assert [(one.item_id, one.event) for one in kept] == [
        (before[0], replica.recommender.artifact.counts["default_event"])
    ]
    assert sum(one["followed"] for one in httpx.get(f"{url}/v1/variants").json()) >= 1  # it named the answer
    assert shown.problems == []


def test_a_new_user_is_told_nothing_is_kept(show):
    shown = show()
    shown.settle(lambda: shown.at("#nobody").click())
    assert "Cold user" in shown.at(".note").text_content()
    first = shown.ids()[0]
    shown.settle(lambda: shown.at(f'[data-item="{first}"] .add').click())
    assert "on this page only" in shown.at("#history").text_content()
    assert shown.at(".note").count() == 0 and first not in shown.ids()
    shown.settle(lambda: shown.at("#undo").click())
    assert first in shown.ids()
    assert shown.problems == []


def test_similar_items(show, replica):
    shown = show()
    item_id = shown.ids()[0]
    shown.at(f'[data-item="{item_id}"] .link').click()
    shown.at("#item .item").first.wait_for()
    alike = replica.recommender.similar(item_id, 10)
    assert shown.at("#item .item .link").all_text_contents() == [item.title for item in alike]
    assert shown.at("#item dd").nth(3).text_content() == "yes"
    shown.at("#item .item .link").first.click()
    shown.at("#item-title").get_by_text(alike[0].title, exact=True).wait_for()
    shown.at("#back").click()
    shown.at("#item-title").get_by_text(title_of(item_id), exact=True).wait_for()
    shown.at("#close").click()
    assert shown.page.evaluate("document.activeElement.textContent") == title_of(item_id)
    assert shown.problems == []


def test_two_variants_side_by_side(show, url):
    shown = show()
    before = [one["answers"] for one in httpx.get(f"{url}/v1/variants").json()]
    shown.at("#compare").click()
    shown.at(".pane").nth(1).wait_for()
    shown.at(".tag.only").first.wait_for()
    shown.rest()
    assert shown.at(".pane select").evaluate_all("all => all.map(n => n.value)") == ["plain", "popular"]
    assert ["variant plain" in text for text in shown.at(".said").all_text_contents()] == [True, False]
    first, second = shown.ids(0), shown.ids(1)
    only = shown.at("[data-item]:has(.tag.only)").evaluate_all("all => all.map(n => n.dataset.item)")
    assert sorted(only) == sorted(set(first) ^ set(second))
    assert f"{len(set(first) & set(second))} of" in shown.at("#both").text_content()
    assert [one["answers"] for one in httpx.get(f"{url}/v1/variants").json()] == before
    shown.settle(lambda: shown.at("#compare").click())
    assert shown.at(".pane").count() == 1 and shown.at(".tag.only").count() == 0
    assert shown.problems == []


def test_a_server_without_variants_users_or_store(show, world):
    with serving(Replica(world.root)) as bare:
        shown = show(bare)
        assert shown.at("#who").text_content() == "A new user"  # it shows no users
        assert "compares no variants" in shown.at("#variants").text_content()
        shown.use(world.user_ids[5])
        shown.at("#compare").click()
        shown.at(".pane").nth(1).wait_for()
        shown.rest()
        assert shown.at(".pane output").all_text_contents() == ["0", "0", "0.5", "0"]
        shown.at("#compare").click()
        shown.settle(lambda: shown.at(".add").first.click())
        assert "on this page only" in shown.at("#history li").first.text_content()
        assert shown.problems == []


class Broken:
    """A store that is gone."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise StoreError("the store does not answer; try again")

        return fail


def test_errors_are_the_servers_sentences(show, world):
    replica = Replica(world.root, examples=True)
    replica.answers.store = Broken()
    with serving(replica) as broken:
        shown = show(broken)
        assert "Degraded" in shown.at(".pane .note").text_content()
        assert "event store does not answer" in shown.at("#history-note").text_content()
        shown.at(".add").first.click()
        shown.at("#problem").get_by_text("the store does not answer; try again").wait_for()
        assert shown.at("#history .fresh").count() == 0
        shown.at("#k").fill("900")
        shown.at("#k").press("Tab")
        alert = shown.at(".lists [role=alert]")
        alert.wait_for()
        assert "quotas.music: Input should be less than or equal to 500" in alert.text_content()
        shown.at("#k").fill("4")
        shown.settle(lambda: alert.get_by_role("button", name="Try again").click())
        assert len(shown.ids()) == 12
    shown.at("#k").fill("5")
    shown.at("#k").press("Tab")
    shown.at(".lists [role=alert]").get_by_text("The server does not answer.").wait_for()


def test_a_key_is_asked_for_and_not_stored(show, world, tmp_path):
    keys = tmp_path / "keys.jsonl"
    reading = make_key(keys, "reading", ["read"])
    with serving(
        Replica(world.root, f"sqlite://{tmp_path}/live.db", examples=True), Settings(keys=str(keys))
    ) as closed:
        shown = show(closed, ready=False)
        shown.at("#keyed").wait_for()
        assert shown.page.evaluate("document.activeElement.id") == "key"
        shown.page.keyboard.type("wrong")
        shown.page.keyboard.press("Enter")
        shown.at("#problem").get_by_text("unknown key").wait_for()
        shown.at("#key").fill(reading)
        shown.page.keyboard.press("Enter")
        shown.at("html[data-ready=true]").wait_for()
        assert shown.ids() and not shown.at("#problem").is_visible() and not shown.at("#keyed").is_visible()
        shown.at(".add").first.click()
        shown.at("#problem").get_by_text("this key lacks the scope 'events'").wait_for()
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert reading not in shown.page.evaluate(kept)
        shown.page.reload()
        shown.at("#keyed").wait_for()


UNNAMED = """
const controls = 'button, select, input, textarea, a, summary, table, dialog, section, [role]';
const said = node => node && node.textContent.trim();
const named = node => {
    const by = (node.getAttribute('aria-labelledby') || '').split(' ').filter(Boolean);
    if (by.length) return by.every(id => said(document.getElementById(id)));
    if (node.getAttribute('aria-label') || [...(node.labels || [])].some(said)) return true;
    if (node.matches('button, a, summary, [role=option]')) return said(node);
    return node.matches('table') ? said(node.caption) : node.matches('[role=search], [role=status], [role=alert]');
};
return [...document.querySelectorAll(controls)].filter(node => !named(node)).map(node => node.outerHTML.slice(0, 120));
"""
UNSOUND = """
const found = [], all = selector => [...document.querySelectorAll(selector)], ids = all('[id]').map(node => node.id);
found.push(...ids.filter((id, n) => ids.indexOf(id) !== n).map(id => `twice: ${id}`));
for (const name of ['aria-controls', 'aria-labelledby', 'aria-activedescendant', 'for'])
    for (const node of all(`[${name}]`))
        found.push(...node.getAttribute(name).split(' ').filter(id => !ids.includes(id)).map(id => `${name}: ${id}`));
const levels = all('h1, h2, h3').filter(node => node.checkVisibility()).map(node => Number(node.tagName[1]));
found.push(...levels.filter((level, n) => level > (levels[n - 1] || 0) + 1).map(level => `jump to h${level}`));
if (levels.filter(level => level === 1).length !== 1) found.push('not one h1');
found.push(...all('[tabindex]').filter(node => node.tabIndex > 0).map(node => `tabindex of ${node.id}`));
found.push(...all('ol > *, ul > *').filter(node => node.tagName !== 'LI').map(node => node.outerHTML));
found.push(...all('button:not([type])').filter(node => !node.closest('form')).map(node => node.outerHTML));
if (!document.documentElement.lang) found.push('no language');
return found;
"""
STOP = """
const node = document.activeElement, name = node.id || node.dataset.place || node.textContent.slice(0, 20);
const shown = getComputedStyle(node).outlineStyle !== 'none' && node.getBoundingClientRect().width > 0;
return [name, node === document.body || shown];
"""
SPILLED = """
const shown = [...document.querySelectorAll('.card *')].filter(node => node.checkVisibility());
return shown.filter(node => {
    if (node.closest('.scroll, .unseen')) return false;
    const box = node.getBoundingClientRect(), card = node.closest('.card').getBoundingClientRect();
    return box.width && (box.right > card.right + 1 || box.left < card.left - 8);
}).map(node => node.outerHTML.slice(0, 90));
"""


def run(page: Page, script: str) -> Any:
    return page.evaluate(f"() => {{ {script} }}")


def test_every_control_has_a_name(show):
    shown = show()

    def check() -> None:
        assert run(shown.page, UNNAMED) == []
        assert run(shown.page, UNSOUND) == []

    check()
    shown.at("#compare").click()
    shown.at(".tag.only").first.wait_for()
    shown.at("#find").fill("river")
    shown.at("[role=option]").filter(has_text="River").first.wait_for()
    check()
    shown.page.keyboard.press("Enter")
    shown.at("#item .item").first.wait_for()
    check()
    shown.at("#close").click()
    shown.page.keyboard.press("Home")
    seen = set()
    for _ in range(60):  # all the way by Tab, each stop visible and marked
        shown.page.keyboard.press("Tab")
        stop = run(shown.page, STOP)
        assert stop[1], stop
        seen.add(stop[0])
    assert {"nobody", "event", "compare", "k"} <= seen
    assert shown.problems == []


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_fits_the_window(show, width):
    shown = show(viewport={"width": width, "height": 780})
    wide = "document.documentElement.scrollWidth"
    assert shown.page.evaluate(wide) <= width
    shown.at("#asking").evaluate("node => { node.open = true; }")
    shown.at("#compare").click()
    shown.at(".tag.only").first.wait_for()
    assert shown.page.evaluate(wide) <= width
    assert run(shown.page, SPILLED) == []
    shown.at(".pane .link").first.click()
    shown.at("#item .item").first.wait_for()
    assert shown.at("#item").evaluate("node => node.scrollWidth <= node.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(show, scheme):
    page = show(color_scheme=scheme).page
    script = """name => { const probe = document.createElement("i"); probe.style.color = `var(--${name})`;
        document.body.append(probe); const found = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
        probe.remove(); return found; }"""
    colour = {
        name: page.evaluate(script, name)
        for name in ("page", "panel", "sunken", "ink", "soft", "accent", "bad", "edge", "on-accent")
    }
    for ground in ("page", "panel", "sunken"):
        for name in ("ink", "soft", "accent"):
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    assert contrast(colour["on-accent"], colour["accent"]) >= 4.5
    assert contrast(colour["bad"], colour["panel"]) >= 4.5
    assert contrast(colour["edge"], colour["panel"]) >= 3  # of a field
    assert (sum(colour["page"][:3]) < 240) == (scheme == "dark")
