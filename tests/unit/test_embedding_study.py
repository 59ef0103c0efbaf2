"""The embedding study: simple vectors find what there is to find, the style is read off where it is, and a check holds
exactly where its target is reached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from rich.console import Console

from recsys_ray.checks.factors import FACTORS
from recsys_ray.checks.probe import LaterPairs
from recsys_ray.checks.style import explained, read_style
from recsys_ray.config import load_config
from recsys_ray.core.errors import UserError
from recsys_ray.data.files import table_fingerprint
from recsys_ray.data.tables import Catalogue
from recsys_ray.demo.world import catalogue_of, spec_for
from recsys_ray.evaluation.results import Hits
from recsys_ray.evaluation.segments import SEGMENTS, Queries
from recsys_ray.storage.artifacts import Artifact, write_json
from recsys_ray.studies.embedding import (
    Check,
    check_labels,
    check_rankings,
    check_similar,
    check_style,
)
from recsys_ray.studies.embedding_page import Findings, print_checks, write_study

CATALOGUE = Catalogue(("book",), np.array([0, 6]), np.ones(6, bool))


@pytest.mark.parametrize("name", FACTORS)
def test_simple_vectors_bring_items_of_the_same_users_together(name):
    """Four groups of users, each with items of its own; a tenth of what they have is anything."""
    random = np.random.default_rng(0)
    users, items, group = 150, 60, 4
    had = random.random((users, items)) < np.where(
        np.arange(users)[:, None] % group == np.arange(items) % group, 0.3, 0.03
    )
    had[:, -1] = False  # nobody has it
    vectors = FACTORS[name](sp.csr_matrix(had.astype(np.float32)), 0)
    assert vectors.shape[0] == items and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    unit = vectors[:-1] / np.linalg.norm(vectors[:-1], axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    near = np.argsort(-scores, axis=1)[:, :5]
    assert (near % group == np.arange(items - 1)[:, None] % group).mean() > 0.8  # by chance .24
    assert np.allclose(vectors, FACTORS[name](sp.csr_matrix(had.astype(np.float32)), 0), atol=1e-5)


def test_style_is_read_off_in_each_band_where_it_is():
    random = np.random.default_rng(0)
    style = random.standard_normal((300, 4))
    users = np.repeat([3, 20, 80], 100)
    turned = style @ random.standard_normal((4, 16)) + 0.01 * random.standard_normal((300, 16))
    turned[users == 20] = random.standard_normal((100, 16))  # here the vectors know nothing
    few, some, many = explained(turned.astype(np.float32), style, users)
    assert few is not None and few > 0.95
    assert some is not None and some < 0.2
    assert many is not None and many > 0.95
    assert explained(turned, style, np.repeat([3, 80], [270, 30]))[1:] == [None, None]  # no item, and thirty


def ingest_of(folder: Path, item_ids: list[str], items: Path) -> Artifact:
    folder.mkdir()
    pq.write_table(pa.table({"item_id": item_ids}), folder / "items.parquet")
    return Artifact(folder, {"inputs": {"items": table_fingerprint("items", str(items))}})


def test_the_style_is_that_of_the_world_beside_the_table(tmp_path):
    spec = spec_for(1000, 5)
    catalogue = catalogue_of(spec)
    known = catalogue.item_ids().tolist()
    data, table = tmp_path / "data", tmp_path / "data" / "items.parquet"
    data.mkdir()
    pq.write_table(pa.table({"item_id": known}), table)
    config = load_config(None, [f"data.items={table}"])
    ingest = ingest_of(tmp_path / "ingest", [known[7], known[2]], table)
    assert read_style(config, ingest) == (None, "only demo data have a known style")
    write_json(data / "world.json", {"spec": vars(spec)})
    style, absent = read_style(config, ingest)
    assert style is not None and not absent
    assert np.array_equal(style, catalogue.style[[7, 2]])
    pq.write_table(pa.table({"item_id": known[:9]}), table)  # the run is of what was there before
    style, absent = read_style(config, ingest)
    assert style is None and "other items" in absent


def test_a_style_check_is_against_the_best_factorisation():
    known = {"hgnn": [0.3, 0.4, None], "text": [0.9, 0.9, None], "svd": [0.2, 0.5, None], "pmi_svd": [0.3, 0.4, None]}
    few, some, many = check_style(known)
    assert (few.target, few.of, few.holds) == (0.3, "PMI-SVD", True)  # as good is enough; text does not count
    assert (some.target, some.of, some.holds) == (0.5, "SVD", False)
    assert many.holds is None and many.absent
    (only,) = check_style({}, "no demo")
    assert only.holds is None and only.absent == "no demo"


def test_similar_items_must_be_found_more_often_than_by_any_rival():
    pairs = LaterPairs(np.arange(6), np.arange(6)[::-1], np.ones(6, bool), CATALOGUE)
    near, far = np.array([0.0, 1, 2, 3, 50, 500]), np.array([0.0, 1, 2, 200, 20, 500])
    ranks = {"hgnn": near, "item2vec": far, "svd": far, "pmi_svd": far, "text": near, "ials": near * 0}
    first, second = check_similar(pairs, ranks, 200, 0)
    assert (first.target, first.reached, first.of, first.holds) == (4 / 6, 4 / 6, "text", False)  # must be above
    assert first.interval == (0, 0)
    ranks["text"] = far
    first, second = check_similar(pairs, ranks, 200, 0)
    assert (first.target, first.reached, first.holds) == (3 / 6, 4 / 6, True)
    assert (second.target, second.reached, second.holds) == (4 / 6, 5 / 6, True)
    assert first.interval is not None and first.interval[0] == 0 < first.interval[1]
    nothing = LaterPairs(pairs.query[:0], pairs.answer[:0], pairs.trained, CATALOGUE)
    assert [check.holds for check in check_similar(nothing, ranks, 200, 0)] == [None, None]


def test_labels_may_be_a_little_harder_to_read_than_from_the_text():
    def rows(hgnn: float) -> list[dict]:
        return [{"target": "category", "vectors": name, "accuracy": a} for name, a in (("text", 0.9), ("hgnn", hgnn))]

    found = check_labels(rows(0.885), {"language": "one language"})
    assert [check.holds for check in found] == [True, None] and found[1].absent == "one language"
    assert check_labels(rows(0.875), {})[0].holds is False


def hits_of(**models: np.ndarray) -> Hits:
    """Lists of forty warm users, half of them for songs; every fourth asks for an unseen item."""
    order, nobody = np.arange(40), np.zeros(40, bool)
    queries = Queries(order, (order % 2).astype(np.int16), ~nobody, nobody, order, order)
    member = np.zeros((len(SEGMENTS), 40), bool)
    member[[SEGMENTS.index(name) for name in ("all", "warm")]] = True
    member[SEGMENTS.index("cold_items")] = order % 4 == 0
    hits = Hits.of(queries, ("book", "song"), member)
    hits.hit.update({name: member & found for name, found in models.items()})
    return hits


def test_the_hgnn_alone_is_compared_in_each_type_and_on_unseen_items():
    order = np.arange(40)
    models = {"hgnn": order % 2 == 0, "llm_knn": order % 4 == 0, "cosine_item_knn": order % 2 == 1}
    found = {(c.where, c.of): c for c in check_rankings([hits_of(**models)], ("book", "song"), 200, 0)}
    unseen = found.pop(("all types", "LLM-kNN"))
    assert (unseen.reached, unseen.target, unseen.holds) == (1, 1, True)  # as often is enough
    assert {place: (c.reached, c.target, c.holds) for place, c in found.items()} == {
        ("book", "LLM-kNN"): (1, 0.5, True), ("book", "cosine kNN"): (1, 0, True),
        ("song", "LLM-kNN"): (0, 0, False), ("song", "cosine kNN"): (0, 1, False),
    }  # fmt: skip
    assert {c.absent for c in check_rankings([], ("book",), 200, 0)} == {"the run has no evaluation"}
    del models["llm_knn"]
    absent = [c.absent for c in check_rankings([hits_of(**models)], ("book", "song"), 200, 0)]
    assert absent == ["the evaluation is without LLM-kNN"] * 2 + [""] + ["the evaluation is without LLM-kNN"] + [""]


def test_the_page_says_what_holds_and_what_could_not_be_checked(tmp_path):
    checks = [
        Check("style R2", "1 to 9 users", 0.5, "SVD", 0.4),
        Check("unseen items, HR@10", "all types", 0.1, "LLM-kNN", 0.2, True, (0.05, 0.15)),
        Check("language, accuracy", "all items", absent="one language"),
    ]
    similar = [
        {"vectors": name, "item_type": "all", "segment": "all", "recall_at_10": r, "recall_at_100": 2 * r}
        for name, r in (("hgnn", 0.125), ("text", 0.25))
    ]
    found = Findings(checks, {"hgnn": [0.4, None, 0.25]}, similar, [])
    write_study(tmp_path, found, {"run": {}}, "data", "the command")
    page = (tmp_path / "embedding.md").read_text()
    for promised in (
        "1 of 2 targets are reached", "the command",
        "| style R2 | 1 to 9 users | at least 0.500 (SVD) | 0.400 | -0.100 | no |",
        "| unseen items, HR@10 | all types | above 0.100 (LLM-kNN) | 0.200 | +0.100 (+0.050 to +0.150) | yes |",
        "not checked: one language", "| HGNN | 0.400 |  | 0.250 |", "| text | 0.250 | 0.500 |",
    ):  # fmt: skip
        assert promised in page
    assert (tmp_path / "embedding.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "embedding.json").read_text())
    assert [check["holds"] for check in figures["checks"]] == [False, True, None]
    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    print_checks(checks, console)
    lines = console.export_text().splitlines()
    assert len(lines) == 6 and "0.400" in lines[2] and lines[2].rstrip().endswith("no")
    assert lines[5] == "language, accuracy: not checked, one language"


def test_seeds_are_refused():
    from pipelines.cli import study

    with pytest.raises(UserError, match="leave out --seeds"):
        study("embedding", seeds=2)
