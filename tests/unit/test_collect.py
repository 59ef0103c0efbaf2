"""The page of results that ``recsys-ray results`` writes from finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_world import differences, rows

from pipelines.cli import main
from recsys_ray.core.errors import ArtifactError
from recsys_ray.report.collect import END, START, read_results, write_page
from recsys_ray.storage.artifacts import made_by, publish
from recsys_ray.storage.outputs import set_current, work_folder

DAY = 86_400


def finished_run(run: Path, seeds: int = 0) -> Path:
    """A run's folder with the two outputs that the page is made of."""
    run.mkdir()
    counts = {
        "item_types": ["book", "song"], "items_per_type": [1200, 300], "users": 98_765, "protocol": "time",
        "valid_from": 80 * DAY, "test_from": 90 * DAY, "end": 100 * DAY, "rows": {"interactions": {"kept": 54_321}},
    }  # fmt: skip
    for name, files in {
        "ingest": {},
        "evaluation": {"metrics.json": rows(seeds), "differences.json": differences()},
    }.items():
        work = work_folder(run / name, "made")
        for file, content in files.items():
            (work / file).write_text(json.dumps(content), encoding="utf-8")
        publish(work, name, "0" * 64, counts=counts)
        set_current(work.parent, work)
    return run


def test_every_run_and_model_has_a_row_with_how_it_was_made(tmp_path):
    page = tmp_path / "results.md"
    first, second = finished_run(tmp_path / "one"), finished_run(tmp_path / "two", seeds=3)
    write_page(page, [read_results(first), read_results(second)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Results\n") and text.index("### one") < text.index("### two")
    assert "1,500 items (book, song), 98,765 users, 54,321 interactions" in text
    assert "validation from 1970-03-22" in text and "mean of 3 training seeds" in text and "one training seed" in text
    assert f"recsys-ray {made_by()['version']}" in text and f"`{made_by()['command']}`" in text
    row = next(row for row in rows() if (row["model"], row["item_type"], row["segment"]) == ("item_knn", "all", "warm"))
    hit, low, high = (f"{row[name]:.4f}" for name in ("hr_at_10", "hr_at_10_low", "hr_at_10_high"))
    assert text.count(f"| Item-kNN | {hit} ({low} to {high}) |") == 2
    assert f"| **2T-HGNN** | {0.0123 * 5 + 0.001:.4f} " in text


def test_a_page_keeps_what_is_outside_its_marks(tmp_path):
    page, run = tmp_path / "docs" / "results.md", finished_run(tmp_path / "one")
    write_page(page, [read_results(run)])
    page.write_text(f"# Mine\n\n{START}\nold\n{END}\n\n## Earlier\ntext\n", encoding="utf-8")
    main_returns(["results", str(run), "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Mine\n\n") and text.endswith(f"{END}\n\n## Earlier\ntext\n")
    assert "old" not in text and text.count("### one") == 1
    page.write_text("# Mine\n", encoding="utf-8")  # no marks yet: they come at the end
    write_page(page, [read_results(run)])
    assert page.read_text(encoding="utf-8").startswith("# Mine\n") and START in page.read_text(encoding="utf-8")


def test_an_unfinished_run_is_named(tmp_path, capsys):
    with pytest.raises(ArtifactError, match="contains no finished output"):
        read_results(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert ended.value.code == 2 and "no finished output" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def main_returns(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
