"""The report in a real browser: it draws, asks for nothing, obeys mouse and keyboard, and fits the window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from report_world import EVIL, MODELS, TYPES, differences, rows, write_run

from recsys_ray.config import Config
from recsys_ray.report.write import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs Chromium or Chrome (Debian: apt-get install chromium)"),
]

CHARTS = ("differences", "by-type", "by-segment", "scatter", "tiers", "shares", "timeline")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run")
    (run / "evaluation" / "differences.json").write_text(json.dumps(differences()))
    write_report(run / "report.html", rows(seeds=2), Config(), run)
    return run / "report.html"


@pytest.fixture(scope="module")
def chromium():
    with Browser(find_chromium() or "") as found:
        yield found


@pytest.fixture
def browser(chromium):
    """The one browser, with nothing left of the test before."""
    chromium.theme("light")
    chromium.problems.clear()
    chromium.requests.clear()
    return chromium


def shown(browser: Browser, page: Path, width: int = 1280) -> Browser:
    browser.resize(width)
    browser.open(page)
    browser.settle()
    assert browser.run("document.documentElement.dataset.ready") == "true"
    return browser


def words(browser: Browser, chart: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('#{chart} text')].map(node => node.textContent)")


def models(browser: Browser) -> list[list[str]]:
    """Name and HR@10 of the table's visible rows."""
    return browser.run(
        "[...document.querySelectorAll('#models tbody tr')].filter(tr => !tr.hidden)"
        ".map(tr => [tr.dataset.model, tr.querySelector('td.value').textContent])"
    )


def test_everything_is_drawn_without_a_fault_or_a_request(browser, page):
    shown(browser, page)
    for chart in CHARTS:
        assert words(browser, chart), chart
    drawn = "[...document.querySelectorAll('#curves figure')].filter(f => f.querySelector('svg path')).length"
    assert browser.run(drawn) == 4  # the HGNN's loss; the two-tower's loss, validation HR@10 and NDCG@100
    assert "2T-HGNN" in words(browser, "by-type") and "podcast [new]" in words(browser, "by-type")
    assert any(word.startswith("</script>") for word in words(browser, "scatter"))  # a name, not markup
    painted = "document.querySelector('#map-canvas').getContext('2d').getImageData(0, 0, 900, 600).data.some(v => v)"
    assert browser.run(painted)
    assert browser.run("document.title") != "harmed"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.problems == []
    assert {address.split("#")[0] for address in browser.requests} == {page.resolve().as_uri()}


def test_choosing_a_type_and_users_shows_their_figures(browser, page):
    shown(browser, page)
    value = {(r["model"], r["item_type"], r["segment"]): f"{r['hr_at_10']:.4f}" for r in rows()}
    best_first = sorted(MODELS, key=lambda model: -float(value[model, "all", "warm"]))
    assert models(browser) == [[model, value[model, "all", "warm"]] for model in best_first]
    browser.run("[...document.querySelectorAll('#pick-type button')].find(b => b.textContent === 'book').click()")
    browser.run(
        "{ const pick = document.querySelector('#pick-segment'); pick.value = 'cold';"
        " pick.dispatchEvent(new Event('change')); }"
    )
    assert models(browser) == [[model, value[model, "book", "cold"]] for model in best_first]
    assert browser.run("document.querySelector('#pick-type [aria-pressed=true]').textContent") == "book"
    assert "cold users, book" in browser.run("document.querySelector('#models-caption').textContent")
    assert browser.problems == []


def test_tables_sort_and_filter(browser, page):
    shown(browser, page)
    heads = "[...document.querySelectorAll('#models thead th')]"
    head = f"{heads}.find(th => th.textContent.includes('coverage')).querySelector('button').click()"
    browser.run(head)
    assert [model for model, _ in models(browser)] == list(reversed(MODELS))
    browser.run(head)
    assert [model for model, _ in models(browser)] == list(MODELS)
    browser.run(
        "{ const field = document.querySelector('#filter'); field.value = '2t_hgnn book tier';"
        " field.dispatchEvent(new Event('input')); }"
    )
    left = browser.run("[...document.querySelectorAll('#all tbody tr')].filter(tr => !tr.hidden).length")
    assert left == 5 and browser.run("document.querySelector('#filter-count').textContent") == "5 rows"


def test_keyboard_reads_charts_and_map(browser, page):
    shown(browser, page)
    press = "node.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    browser.run(
        f"{{ const node = document.querySelector('#scatter svg'); node.focus({{preventScroll: true}}); {press}; }}"
    )
    assert "HR@10 0." in browser.run("document.querySelector('#tip').textContent")
    assert browser.run("!document.querySelector('#tip').hidden")
    browser.run(f"{{ const node = document.querySelector('#map-canvas'); {press}; {press}; }}")
    told = browser.run("document.querySelector('#map-item').textContent")
    assert "Title" in told and "popularity tier" in told and "Nearest" in told
    unnamed = (
        "[...document.querySelectorAll('button, select, input, canvas, nav')].filter(node => !node.textContent.trim()"
        " && !node.getAttribute('aria-label') && !node.closest('label')).map(node => node.outerHTML)"
    )
    assert browser.run(unnamed) == []


def test_finding_an_item_and_changing_the_space(browser, page):
    shown(browser, page)
    browser.run(
        "{ const field = document.querySelector('#find-item'); field.value = 'title 42';"
        " field.dispatchEvent(new Event('input')); }"
    )
    assert browser.run("document.querySelector('#map-item strong').textContent") == "Title 42"
    assert browser.run("document.querySelectorAll('#map-item li').length") == 6
    browser.run("[...document.querySelectorAll('#pick-space button')].find(b => b.textContent === 'two-tower').click()")
    assert "two-tower" in browser.run("document.querySelector('#map-item').textContent")
    assert browser.run("document.querySelectorAll('#map-keys button').length") == len(TYPES) - 1


def test_other_models_lists(browser, page):
    shown(browser, page)
    browser.run(
        "{ const pick = document.querySelector('#pick-right'); pick.value = 'popularity';"
        " pick.dispatchEvent(new Event('change')); }"
    )
    first = "document.querySelector('.user [data-list=\"1\"] %s').textContent"
    assert browser.run(first % "h4") == "Popularity" and browser.run(first % "li") == "1Title 0"
    shown_users = "[...document.querySelectorAll('.user')].filter(user => !user.hidden).map(user => user.dataset.kind)"
    assert browser.run(shown_users) == ["ours"]
    browser.run("[...document.querySelectorAll('[data-shows]')].at(-1).click()")
    assert browser.run(shown_users) == ["cold"]
    browser.run("document.querySelector('#every-user').click()")
    assert browser.run(shown_users) == ["ours", "rival", "neither", "cold"]
    browser.run("{ const pick = document.querySelector('#pick-left'); pick.value = " + json.dumps(EVIL) + ";"
                " pick.dispatchEvent(new Event('change')); }")  # fmt: skip
    assert browser.run("document.title") != "harmed" and browser.problems == []


@pytest.mark.parametrize("width", [360, 400, 768, 1600])
def test_fits_the_window(browser, page, width):
    shown(browser, page, width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    spilled = (
        "[...document.querySelectorAll('.chart svg')].filter(svg => [...svg.querySelectorAll('text')].some(text => {"
        " const [a, b] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];"
        " return a.width && (a.left < b.left - 12 || a.right > b.right + 12); })).map(svg => svg.parentNode.id)"
    )
    assert browser.run(spilled) == []


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2: of two sRGB colours."""

    def light(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([light(first), light(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_theme(browser, page, scheme):
    browser.theme(scheme)
    shown(browser, page)
    script = """(name => { const probe = document.createElement("i"); probe.style.color = `var(--${name})`;
        document.body.append(probe); const found = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
        probe.remove(); return found; })("%s")"""
    colour = {name: browser.run(script % name) for name in ("page", "panel", "ink", "soft", "served", "rival", "part")}
    colour |= {f"type{k}": browser.run(script % f"type{k}") for k in range(8)}
    for ground in ("page", "panel"):
        for name in ("ink", "soft", "served", "rival", "part"):  # text
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
        for name in (f"type{k}" for k in range(8)):  # marks
            assert contrast(colour[name], colour[ground]) >= 3, (name, ground)
    assert (colour["page"][0] < 80) == (scheme == "dark")
    browser.run("document.querySelector('#theme').click()")
    assert (browser.run(script % "page")[0] < 80) == (scheme == "light")
    browser.run("localStorage.clear()")


def test_readable_without_scripts(browser, page):
    browser.resize(1280)
    browser.scripts(allowed=False)
    browser.open(page)
    browser.scripts(allowed=True)  # for the questions below; the page's own did not run
    assert browser.run("document.documentElement.dataset.ready") is None
    text = browser.run("document.body.innerText")
    for row in rows():
        if row["item_type"] == "all" and row["segment"] == "warm":
            assert f"{row['hr_at_10']:.4f}" in text
    assert "Title 18" in text and "HR@10 by item type" in text
    assert browser.run("document.querySelector('#theme').offsetParent") is None
