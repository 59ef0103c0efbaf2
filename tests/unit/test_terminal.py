"""What ``recsys-ray run`` prints: readable at 80 columns, one screen."""

from __future__ import annotations

import io

import typer
from bundle_world import make_world
from report_world import rows
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.show import print_user
from recsys_ray.report.labels import MODELS
from recsys_ray.report.terminal import print_results
from recsys_ray.serving.recommender import Recommender

COLUMNS, LINES = 80, 24


def figures(model: str, hit: float) -> dict:
    return {
        "model": model, "item_type": "all", "segment": "warm", "users": 31_234_567, "queries": 62_345_678,
        "hr_at_10": hit, "hr_at_10_low": hit - 0.01, "hr_at_10_high": hit + 0.01, "ndcg_at_10": hit / 2,
        "ndcg_at_10_low": hit / 2 - 0.005, "ndcg_at_10_high": hit / 2 + 0.005, "coverage_at_100": 1.0,
        "seeds": [0, 1, 2],
    }  # fmt: skip


def paired(model: str, apart: float) -> dict:
    place = {"model": "2t_hgnn", "against": model, "item_type": "all", "segment": "warm"}
    return place | {"difference": apart, "low": apart - 0.01, "high": apart + 0.01, "relative": None}


def printed(metrics: list[dict], differences: list[dict], width: int = COLUMNS) -> list[str]:
    out = io.StringIO()
    print_results(metrics, differences, Console(file=out, width=width))
    return out.getvalue().splitlines()


def test_every_model_fits_one_screen_of_80_columns():
    metrics = [figures(model, 0.3 - 0.01 * k) for k, model in enumerate(MODELS)]
    differences = [paired(model, -0.05 + 0.01 * k) for k, model in enumerate(MODELS) if model != "2t_hgnn"]
    lines = printed(metrics, differences)
    assert len(lines) <= LINES - 3  # a blank line, where the report is, how to serve
    assert max(map(len, lines)) <= COLUMNS
    text = "\n".join(lines)
    assert "…" not in text and "31,234,567 users" in text and "mean of 3 seeds" in text
    for row in metrics:  # each model's whole row, every figure uncut
        hit = f"{row['hr_at_10']:.3f}".removeprefix("0")
        interval = f"{row['hr_at_10_low']:.3f}-0{row['hr_at_10_high']:.3f}".replace("0.", ".").replace("-0", "-")
        assert any(f" {hit} {interval} " in line for line in lines)
    for row in differences:
        assert any(line.rstrip().endswith(f"to {row['high']:+.3f}".replace("0.", ".")) for line in lines)


def test_one_line_says_where_the_hgnn_pays():
    rows = [paired("two_tower_text_only", 0.004), *(paired("two_tower_text_only", x) for x in (-0.02, 0.008, 0.03))]
    for row, segment in zip(rows, ("warm", "new_to_type", "cold_items", "tier5"), strict=True):
        row["segment"] = segment
    (line,) = (line for line in printed([figures("2t_hgnn", 0.3)], rows) if line.startswith("HGNN adds"))
    assert line.strip() == "HGNN adds: all +.004, new type -.020*, unseen items +.008, tail +.030*"


def test_order_is_ours_then_the_baselines_from_best_to_worst():
    metrics = [figures(m, hit) for m, hit in (("oracle", 0.9), ("popularity", 0.1), ("item_knn", 0.2), ("hgnn", 0.3))]
    lines = printed([*metrics, figures("2t_hgnn", 0.25), figures("2t_hgnn_without_memory", 0.24)], [])
    models = ["2T-HGNN", "HGNN alone", "without memory", "Item-kNN", "Popularity", "Oracle"]
    assert [line.strip().startswith(model) for line, model in zip(lines[2:], models, strict=False)] == [True] * 6


def test_names_are_text_not_markup_and_figures_may_lack_an_interval():
    metrics = rows()
    for row in metrics:
        row["model"] = row["model"].replace("item_knn", "[bold]x")
        del row["ndcg_at_10_low"], row["ndcg_at_10_high"]
    text = "\n".join(printed(metrics, []))
    assert "[bold]x" in text and "1,234 users" in text and "ahead by" not in text
    assert "no user that can be evaluated" in "".join(printed([], []))


def test_example_user_is_one_line_an_item(tmp_path):
    out = io.StringIO()
    recommender = Recommender.load(make_world(tmp_path).bundle().path)
    user = recommender.example_users(1)[0]
    print_user(recommender, user, Console(file=out, width=30), k=4)
    lines = out.getvalue().splitlines()
    past = recommender.history(user, 8)
    assert max(map(len, lines)) <= 30 and len(lines) == 2 + len(past) + 4
    print_user(recommender, user, Console(file=(wide := io.StringIO()), width=300), k=4)
    first = recommender.recommend(user_id=user, k=1)[0]
    assert f"1. {first.item_type}: {first.title}" in wide.getvalue()


def test_every_verb_explains_itself_with_an_example():
    verbs = typer.main.get_command(app).commands
    assert {"run", "serve", "results", "two-tower"} <= set(verbs)
    for name in verbs:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": str(COLUMNS)})
        assert shown.exit_code == 0 and f"Example: recsys-ray {name}" in shown.output
        assert max(map(len, shown.output.splitlines())) <= COLUMNS
