"""The report in a real browser: it draws, asks for nothing, obeys mouse and keyboard, and fits the window."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from colours import contrast
from playwright.sync_api import Page
from report_world import EVIL, MODELS, TYPES, differences, output, rows, write_run

from recsys_ray.config import Config
from recsys_ray.report.write import write_report

CHARTS = ("differences", "by-type", "by-segment", "scatter", "tiers", "shares", "timeline")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run")
    (output(run, "evaluation") / "differences.json").write_text(json.dumps(differences()))
    write_report(run / "report.html", rows(seeds=2), Config(), run)
    return run / "report.html"


@dataclass
class Shown:
    """The report in a window of its own, with what went wrong in it and every address that it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def words(self, chart: str) -> list[str]:
        return self.page.locator(f"#{chart} text").all_text_contents()

    def models(self) -> list[list[str]]:
        """Name and HR@10 of the table's visible rows."""
        return self.page.evaluate(
            "[...document.querySelectorAll('#models tbody tr')].filter(tr => !tr.hidden)"
            ".map(tr => [tr.dataset.model, tr.querySelector('td.value').textContent])"
        )


@pytest.fixture
def show(chromium, report) -> Iterator[Callable[..., Shown]]:
    """Opens the report; everything of it is closed after the test."""
    contexts = []

    def open_report(width: int = 1280, **options: Any) -> Shown:
        look = {"viewport": {"width": width, "height": 900}, "reduced_motion": "reduce", **options}
        contexts.append(chromium.new_context(**look))
        shown = Shown(contexts[-1].new_page())
        shown.page.on("pageerror", lambda error: shown.problems.append(str(error)))
        shown.page.on("console", lambda said: said.type == "error" and shown.problems.append(said.text))
        shown.page.on("request", lambda request: shown.requests.append(request.url))
        shown.page.goto(report.resolve().as_uri())
        if options.get("java_script_enabled", True):
            shown.page.locator("html[data-ready=true]").wait_for()
        return shown

    yield open_report
    for context in contexts:
        context.close()


def test_everything_is_drawn_without_a_fault_or_a_request(show, report):
    shown = show()
    for chart in CHARTS:
        assert shown.words(chart), chart
    # the HGNN's loss; the two-tower's loss, validation HR@10 and NDCG@100
    assert shown.page.locator("#curves figure").filter(has=shown.page.locator("svg path")).count() == 4
    assert "2T-HGNN" in shown.words("by-type") and "podcast [new]" in shown.words("by-type")
    assert any(word.startswith("</script>") for word in shown.words("scatter"))  # a name, not markup
    painted = "document.querySelector('#map-canvas').getContext('2d').getImageData(0, 0, 900, 600).data.some(v => v)"
    assert shown.page.evaluate(painted)
    assert shown.page.title() != "harmed"
    assert shown.page.locator("img").count() == 0
    assert shown.problems == []
    assert {address.split("#")[0] for address in shown.requests} == {report.resolve().as_uri()}


def test_choosing_a_type_and_users_shows_their_figures(show):
    shown = show()
    value = {(r["model"], r["item_type"], r["segment"]): f"{r['hr_at_10']:.4f}" for r in rows()}
    best_first = sorted(MODELS, key=lambda model: -float(value[model, "all", "warm"]))
    assert shown.models() == [[model, value[model, "all", "warm"]] for model in best_first]
    shown.page.locator("#pick-type").get_by_role("button", name="book", exact=True).click()
    shown.page.locator("#pick-segment").select_option("cold")
    assert shown.models() == [[model, value[model, "book", "cold"]] for model in best_first]
    assert shown.page.locator("#pick-type [aria-pressed=true]").text_content() == "book"
    assert "cold users, book" in shown.page.locator("#models-caption").text_content()
    assert shown.problems == []


def test_tables_sort_and_filter(show):
    shown = show()
    head = shown.page.locator("#models thead th").filter(has_text="coverage").locator("button")
    head.click()
    assert [model for model, _ in shown.models()] == list(reversed(MODELS))
    head.click()
    assert [model for model, _ in shown.models()] == list(MODELS)
    shown.page.locator("#filter").evaluate("node => { for (let n = node; n; n = n.parentElement) if (n.open === false)"
                                           " n.open = true; }")  # fmt: skip
    shown.page.locator("#filter").fill("2t_hgnn book tier")
    assert shown.page.locator("#all tbody tr:not([hidden])").count() == 5
    assert shown.page.locator("#filter-count").text_content() == "5 rows"


def test_keyboard_reads_charts_and_map(show):
    shown = show()
    shown.page.locator("#scatter svg").focus()  # the page scrolls there, and scrolling hides what is shown
    shown.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    shown.page.keyboard.press("ArrowRight")
    assert "HR@10 0." in shown.page.locator("#tip").text_content()
    assert shown.page.locator("#tip").is_visible()
    for _ in range(2):
        shown.page.locator("#map-canvas").press("ArrowRight")
    told = shown.page.locator("#map-item").text_content()
    assert "Title" in told and "popularity tier" in told and "Nearest" in told
    unnamed = (
        "[...document.querySelectorAll('button, select, input, canvas, nav')].filter(node => !node.textContent.trim()"
        " && !node.getAttribute('aria-label') && !node.closest('label')).map(node => node.outerHTML)"
    )
    assert shown.page.evaluate(unnamed) == []


def test_finding_an_item_and_changing_the_space(show):
    shown = show()
    shown.page.locator("#find-item").fill("title 42")
    assert shown.page.locator("#map-item strong").text_content() == "Title 42"
    assert shown.page.locator("#map-item li").count() == 6
    shown.page.locator("#pick-space").get_by_role("button", name="two-tower", exact=True).click()
    assert "two-tower" in shown.page.locator("#map-item").text_content()
    assert shown.page.locator("#map-keys button").count() == len(TYPES) - 1


def test_other_models_lists(show):
    shown = show()
    shown.page.locator("#pick-right").select_option("popularity")
    second = shown.page.locator('.user [data-list="1"]').first
    assert second.locator("h4").first.text_content() == "Popularity"
    assert second.locator("li").first.text_content() == "1Title 0"
    kinds = "[...document.querySelectorAll('.user')].filter(user => !user.hidden).map(user => user.dataset.kind)"
    assert shown.page.evaluate(kinds) == ["ours"]
    shown.page.locator("[data-shows]").last.click()
    assert shown.page.evaluate(kinds) == ["cold"]
    shown.page.locator("#every-user").click()
    assert shown.page.evaluate(kinds) == ["ours", "rival", "neither", "cold"]
    shown.page.locator("#pick-left").select_option(EVIL)
    assert shown.page.title() != "harmed" and shown.problems == []


@pytest.mark.parametrize("width", [360, 400, 768, 1600])
def test_fits_the_window(show, width):
    page = show(width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    spilled = (
        "[...document.querySelectorAll('.chart svg')].filter(svg => [...svg.querySelectorAll('text')].some(text => {"
        " const [a, b] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];"
        " return a.width && (a.left < b.left - 12 || a.right > b.right + 12); })).map(svg => svg.parentNode.id)"
    )
    assert page.evaluate(spilled) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_theme(show, scheme):
    page = show(color_scheme=scheme).page
    script = """name => { const probe = document.createElement("i"); probe.style.color = `var(--${name})`;
        document.body.append(probe); const found = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
        probe.remove(); return found; }"""
    names = ("page", "panel", "ink", "soft", "served", "rival", "part", *(f"type{k}" for k in range(8)))
    colour = {name: page.evaluate(script, name) for name in names}
    for ground in ("page", "panel"):
        for name in ("ink", "soft", "served", "rival", "part"):  # text
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
        for name in (f"type{k}" for k in range(8)):  # marks
            assert contrast(colour[name], colour[ground]) >= 3, (name, ground)
    assert (colour["page"][0] < 80) == (scheme == "dark")
    page.locator("#theme").click()
    assert (page.evaluate(script, "page")[0] < 80) == (scheme == "light")


def test_readable_without_scripts(show):
    page = show(java_script_enabled=False).page
    assert page.locator("html").get_attribute("data-ready") is None
    text = page.locator("body").inner_text()
    for row in rows():
        if row["item_type"] == "all" and row["segment"] == "warm":
            assert f"{row['hr_at_10']:.4f}" in text
    assert "Title 18" in text and "HR@10 by item type" in text
    assert not page.locator("#theme").is_visible()
