"""The page and the tables that people read."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import pytest
from report_world import EVIL, MODELS, differences, output, rows, write_run

from recsys_ray.config import Config
from recsys_ray.report import run_facts
from recsys_ray.report import write as report
from recsys_ray.report.data import headline, safe_json
from recsys_ray.report.labels import contest, name_of

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr", "base", "source"}


def escaped(text: str) -> str:
    return html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


class Elements(HTMLParser):
    """Tags, attributes, and whether every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.faults.append(f"<{tag}> has an attribute twice")
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")


def parse(page: str) -> Elements:
    parsed = Elements()
    parsed.feed(page)
    parsed.close()
    return parsed


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    run = write_run(tmp_path_factory.mktemp("report") / "run")
    report.write_report(run / "report.html", rows(), Config(), run)
    return (run / "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_page_holds_every_models_numbers(page):
    for row in rows():
        assert f"{row['hr_at_10']:.4f}" in page
        assert escaped(row["model"]) in page
        assert escaped(name_of(row["model"]).full) in page
    assert "98,765" in page and "1:15 min" in page and "1,500 MB" in page
    assert (
        "neighbours 200" in page
        and "2 trials, 1 of them stopped at evaluate.trial_seconds" in page
        and "1:00 min" in page
    )
    assert "hidden_dim: 128" in page and "book 2.13%, podcast [new] from its own events" in page


def test_page_draws_from_the_same_numbers(page):
    data = data_of(page)
    found = [dict(zip(data["columns"], values, strict=True)) for values in data["rows"]]
    for mine, theirs in zip(rows(), found, strict=True):
        for name, value in mine.items():
            if name in ("ndcg_at_10_low", "ndcg_at_10_high"):
                continue  # the page shows the interval of HR@10 alone
            assert theirs[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)
    assert data["served"] == "2t_hgnn" and data["rival"] == EVIL
    assert data["map"]["title"][3] == EVIL
    curves = {(curve["model"], curve["title"]): curve["series"] for curve in data["curves"]}
    assert curves["HGNN", "loss"]["valid_loss"][1] == [2, 2.0]  # epochs count from one
    of_towers = {title for model, title in curves if model == "Two-tower without HGNN"}
    assert of_towers == {"loss", "validation HR@10", "validation NDCG@100"} and len(curves) == 4


def test_page_is_well_formed(page):
    parsed = parse(page)
    assert not parsed.faults and not parsed.open
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"] for tag, attrs in parsed.tags if tag == "a"]
    assert targets and all(target[1:] in ids for target in targets)
    labels = [attrs["aria-labelledby"] for _, attrs in parsed.tags if "aria-labelledby" in attrs]
    assert labels and set(labels) <= set(ids)
    assert [tag for tag, _ in parsed.tags if tag in ("html", "head", "body", "main", "h1")] == [
        "html", "head", "body", "main", "h1",
    ]  # fmt: skip


def test_page_is_self_contained_and_harmless(page):
    assert re.findall(r"https?:|//\w", page.replace("http://www.w3.org/2000/svg", "")) == []
    parsed = parse(page)
    tags = [tag for tag, _ in parsed.tags]
    assert "link" not in tags and "img" not in tags and "iframe" not in tags
    assert tags.count("script") == 3  # ours
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    pointers = [a for _, attrs in parsed.tags for n, a in attrs.items() if n in ("href", "xlink:href", "src")]
    assert all(pointer.startswith("#") for pointer in pointers)
    assert "document.title='harmed'" not in re.sub(r"<script type=.*?</script>", "", page, flags=re.DOTALL)


def test_json_cannot_end_its_element():
    assert "<" not in safe_json({"title": EVIL}) and json.loads(safe_json({"title": EVIL})) == {"title": EVIL}


def test_hits_are_marked(page):
    hits = re.findall(r'<li class="is-hit"><span>(\d+)</span><span>([^<]*)<', page)
    assert ("3", "Title 18 ") in hits
    assert page.count('class="user"') == 4 and "no-js" in page


def test_page_of_several_seeds(tmp_path):
    output(tmp_path, "evaluation").mkdir()
    (output(tmp_path, "evaluation") / "differences.json").write_text(json.dumps(differences()))
    report.write_report(tmp_path / "report.html", rows(seeds=3), Config(), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0, 1, 2" in page and "intervals over users and seeds" in page
    assert len(data_of(page)["rows"][0][-1]) == 3
    assert not parse(page).faults
    assert 'id="differences"' in page and len(data_of(page)["differences"]) == len(MODELS) - 1
    by_number = [{**row, "seeds": 3} for row in rows(seeds=3)]
    report.write_report(tmp_path / "report.html", by_number, Config(), tmp_path)
    assert "3 seeds" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_headline_says_no_more_than_the_intervals():
    def told(served: float, rival: float, paired: tuple[float, float] | None = None) -> str:
        two = [
            {"model": model, "item_type": "all", "segment": "warm", "hr_at_10": hit, "hr_at_10_low": hit - 0.01,
             "hr_at_10_high": hit + 0.01}
            for model, hit in (("2t_hgnn", served), ("item_knn", rival))
        ]  # fmt: skip
        apart = {"model": "2t_hgnn", "against": "item_knn", "item_type": "all", "segment": "warm"}
        found = [{**apart, "difference": sum(paired) / 2, "low": paired[0], "high": paired[1]}] if paired else []
        line = headline(two, found)
        assert line is not None
        return f"{line.verdict} {line.detail}"

    assert "leads" in told(0.30, 0.20) and "do not overlap" in told(0.30, 0.20)
    assert "behind" in told(0.20, 0.30)
    assert "do not differ clearly" in told(0.305, 0.30) and "Their intervals overlap" in told(0.305, 0.30)
    assert "leads" in told(0.305, 0.30, (0.001, 0.009)) and "+0.0050 (+0.0010 to +0.0090)" in told(
        0.305, 0.3, (0.001, 0.009)
    )
    assert "do not differ clearly" in told(0.30, 0.20, (-0.1, 0.3))


def test_contest_leaves_out_parts_controls_and_the_oracle():
    def row(model: str, hit: float) -> dict:
        return {"model": model, "item_type": "all", "segment": "warm", "hr_at_10": hit}

    table = [row("oracle", 0.9), row("two_tower_text_only", 0.6), row("2t_hgnn", 0.5), row("item_knn", 0.4)]
    table.append(row("2t_hgnn_for_a_stranger", 0.45))
    assert contest(table) == ("2t_hgnn", "item_knn")
    assert contest(table[:2]) == ("two_tower_text_only", None)
    assert contest([]) == (None, None)
    assert name_of("2t_hgnn_for_a_stranger").full == "2T-HGNN, another user's history"


def test_page_and_tables_without_any_row(tmp_path):
    report.write_report(tmp_path / "report.html", [], Config(), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nothing to compare" in page and not parse(page).faults


def test_what_the_data_told_is_shown(tmp_path):
    run = write_run(tmp_path)
    told = dict(run_facts.told_by_data(run))
    assert told["Co-interaction memory"] == "weight 0.5, ridge 30, half-life 4 places, a text stands for 10 users"
    assert told["Weight of trends"] == "book 0.75, podcast [new] 0"
    assert told["Share of choices given to unseen items in the test"] == "book 2.13%, podcast [new] from its own events"
    assert told["and means over the latest events, half-lives in places"] == "4"
    assert "Share of learned item vectors hidden in training" in told
    (output(run, "two_tower") / "hgnn" / "spec.json").write_text('{"item_types": ["book"]}', encoding="utf-8")
    (output(run, "two_tower") / "hgnn" / "score.json").unlink()
    told = dict(run_facts.told_by_data(run))
    assert (
        told["Co-interaction memory"] == told["Weight of trends"] == "none"
        and told["User tower reads the last item"] == "no"
    )
    (output(run, "two_tower") / "hgnn" / "spec.json").unlink()
    assert not run_facts.told_by_data(run)


def test_leave_one_out_has_no_dates(tmp_path):
    run = write_run(tmp_path)
    manifest = json.loads((output(run, "ingest") / "manifest.json").read_text())
    manifest["counts"] |= {"protocol": "leave_one_out", "valid_from": 1, "test_from": 2, "end": 3}
    (output(run, "ingest") / "manifest.json").write_text(json.dumps(manifest))
    report.write_report(tmp_path / "report.html", rows(), Config(), run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1970-01-01" not in page and data_of(page)["dated"] is False
    assert "test_from" not in data_of(page)["timeline"]


def test_timeline_keeps_every_event():
    days = [[day, 1 + day % 3] for day in range(1000, 2000)]
    found = run_facts.timeline({"days": days, "valid_from": 1, "test_from": 2, "end": 3})
    assert found is not None and found["days"] == 6 and len(found["events"]) <= 180
    assert sum(found["events"]) == sum(events for _, events in days)
    assert found["from"] == 1000 * 86_400


def test_durations():
    assert [run_facts.duration(s) for s in (None, 3.4, 75, 3723)] == ["-", "3 s", "1:15 min", "1:02:03 h"]
