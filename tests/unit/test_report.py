"""The page and the tables that people read."""

from __future__ import annotations

import html
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from recsys_ray.config import Config
from recsys_ray.evaluation import report

EVIL = "<script>alert('x')</script>$m$"


def rows() -> list[dict]:
    found = []
    for number, model in enumerate(["popularity", "item_knn", "2t_hgnn", EVIL, "oracle"]):
        for item_type in ("all", "book", "podcast [new]"):
            for place, segment in enumerate(report.SEGMENT_NAMES):
                hit = 0.0123 * (number + 1) + 0.001 * place
                found.append(
                    {
                        "model": model,
                        "item_type": item_type,
                        "segment": segment,
                        "users": 1234,
                        "queries": 2345,
                        "hr_at_10": hit,
                        "hr_at_10_low": hit - 0.002,
                        "hr_at_10_high": hit + 0.002,
                        "ndcg_at_10": hit / 2,
                        "mrr_at_100": hit / 3,
                        "mrr_at_100_hits": 0.2,
                        "coverage_at_100": 0.1 * (number + 1),
                        "share_of_oracle": 0.2 * (number + 1),
                    }
                )
    return found


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    tmp_path = tmp_path_factory.mktemp("report")
    run = tmp_path / "run"
    (run / "ingest").mkdir(parents=True)
    manifest = {
        "counts": {"users": 98765, "item_types": ["book"], "test_from": 0},
        "seconds": 75,
        "peak_memory_mb": 1500,
    }
    (run / "ingest" / "manifest.json").write_text(json.dumps(manifest))
    (run / "hgnn").mkdir()
    (run / "hgnn" / "metrics.json").write_text(json.dumps([{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0}]))
    (run / "two_tower" / "hgnn").mkdir(parents=True)
    (run / "two_tower" / "hgnn" / "metrics.json").write_text("damaged")
    report.write_report(tmp_path / "report.html", rows(), Config(), run)
    return (tmp_path / "report.html").read_text()


def test_page_holds_every_models_numbers(page):
    for row in rows():
        assert f"{row['hr_at_10']:.4f}" in page
        assert html.escape(row["model"]).replace("&#x27;", "&#39;") in page
    assert "98,765" in page and "1:15 min" in page and "1,500 MB" in page and "HGNN: loss" in page
    assert "hidden_dim: 128" in page


def test_page_is_self_contained_and_harmless(page):
    assert not re.findall(r"https?:|//\w", page)
    parsed = Elements()
    parsed.feed(page)
    tags = {tag for tag, _ in parsed.tags}
    assert "script" not in tags and "link" not in tags and "img" not in tags
    pointers = [a for _, attrs in parsed.tags for n, a in attrs.items() if n in ("href", "xlink:href", "src")]
    assert all(pointer.startswith("#") for pointer in pointers)


def test_plots_are_named_and_follow_the_theme(page):
    svgs = re.findall(r"<svg[^>]*>", page)
    assert len(svgs) == 5
    assert all('role="img"' in svg and "aria-label=" in svg for svg in svgs)
    assert "currentColor" in page and "#010203" not in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_page_and_tables_without_any_row(tmp_path):
    report.write_report(tmp_path / "report.html", [], Config(), tmp_path)
    assert "nothing to compare" in (tmp_path / "report.html").read_text()
    out = io.StringIO()
    report.print_table([], Console(file=out))
    assert "no figures" in out.getvalue()


def test_printed_tables():
    out = io.StringIO()
    report.print_table(rows(), Console(file=out, width=200))
    text = out.getvalue()
    assert "podcast [new]" in text and "1,234 users" in text and EVIL in text
    warm = 0.0123 + 0.001
    assert f"{warm:.4f}" in text and f"{warm - 0.002:.4f}-{warm + 0.002:.4f}" in text and "20.0%" in text
