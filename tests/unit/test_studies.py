"""Studies without running one: tables are changed as they say, comparisons are of the same questions, verdicts follow
from the numbers, and every variant of every study is a configuration that exists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import polars.testing
import pytest

from pipelines.study import _LEAN
from recsys_ray.config import changed, load_config
from recsys_ray.data.reading import find_source
from recsys_ray.evaluation.results import Hits
from recsys_ray.evaluation.segments import SEGMENTS, Queries
from recsys_ray.storage.artifacts import Artifact
from recsys_ray.studies import EMBEDDING, NAMES
from recsys_ray.studies.changed_tables import WEEK, Log, NewType, OnlyType, ShuffledLabels, Thinned, write_changed
from recsys_ray.studies.compare import compare, conclusions, judge, sign
from recsys_ray.studies.page import write_page
from recsys_ray.studies.registry import STUDIES
from recsys_ray.studies.study import Comparison, Facts, Outcome, Result, Side, Study, Variant

DAY = 86_400
TEST = 10 * WEEK
TYPES = ["book", "song"]
COUNTS = {"item_types": TYPES, "events": ["stream", "preview"], "valid_from": TEST - 14 * DAY, "test_from": TEST,
          "end": TEST + 14 * DAY}  # fmt: skip
PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FITTING = [  # a study that needs dates refuses another protocol
    (name, preset)
    for name in STUDIES
    for preset in PRESETS
    if not STUDIES[name].needs_dates or load_config(preset).split.protocol == "time"
]


@pytest.fixture
def ingest(tmp_path) -> Artifact:
    """Two shards: every user touches items of their own colour, in two types, over twelve weeks."""
    folder = tmp_path / "ingest"
    (folder / "interactions").mkdir(parents=True)
    items = [f"{name}-{k}" for name in TYPES for k in range(20)]
    pl.DataFrame({"item_id": items, "ntype": np.repeat(np.arange(2, dtype=np.int16), 20)}).write_parquet(
        folder / "items.parquet"
    )
    users = 40
    pl.DataFrame({"user_id": [f"u{k}" for k in range(users)]}).write_parquet(folder / "users.parquet")
    rng = np.random.default_rng(0)
    for shard in range(2):
        uid = np.repeat(np.arange(shard * 20, shard * 20 + 20), 60)
        gid = 20 * rng.integers(0, 2, len(uid)) + 2 * rng.integers(0, 10, len(uid)) + uid % 2
        time = rng.integers(0, TEST + 14 * DAY, len(uid))
        frame = pl.DataFrame(
            {"uid": uid, "gid": gid.astype(np.int32), "event": rng.integers(0, 2, len(uid)).astype(np.int8),
             "timestamp": time}
        ).sort("uid", "timestamp")  # fmt: skip
        frame.write_parquet(folder / "interactions" / f"shard-{shard:05d}.parquet")
    return Artifact(folder, {"fingerprint": "f", "counts": COUNTS})


def events_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "*.parquet").with_columns(
        colour=pl.col("item_id").str.extract(r"(\d+)$").cast(pl.Int64) % 2,
        type=pl.col("item_id").str.extract(r"^(\w+)-"),
        week=(pl.col("timestamp") - TEST) // WEEK,
        test=pl.col("timestamp") >= TEST,
    )


def same(ingest: Artifact, out: Path) -> pl.DataFrame:
    """The interactions as they are."""

    class Unchanged(OnlyType):
        def apply(self, log, seed):
            return np.ones(len(log.gid), bool), log.gid

    return events_of(write_changed(Unchanged("book"), ingest, out, 0))


def test_shuffled_labels_keep_popularity_activity_and_types_and_lose_taste(ingest, tmp_path):
    before = same(ingest, tmp_path / "same")
    folder = write_changed(ShuffledLabels(), ingest, tmp_path / "shuffled", 0)
    after = events_of(folder)
    for kept in (["test", "item_id"], ["user_id", "type", "week"], ["user_id", "timestamp", "event"]):
        pl.testing.assert_frame_equal(before.group_by(kept).len().sort(kept), after.group_by(kept).len().sort(kept))

    def loyalty(events: pl.DataFrame) -> float:
        own = events["user_id"].str.slice(1).cast(pl.Int64) % 2
        return float((events["colour"] == own).mean())

    assert loyalty(before) == 1
    assert loyalty(after) == pytest.approx(0.5, abs=0.05)
    source = find_source("interactions", str(folder))
    assert not source.other_files and source.rows == len(before)  # ingest reads it
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    write_changed(ShuffledLabels(), ingest, folder, 0)  # a study that goes on finds the table as it was
    assert stamps == [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    write_changed(ShuffledLabels(), ingest, folder, 1)
    assert not events_of(folder)["item_id"].equals(after["item_id"])


def test_labels_stay_in_their_week_their_type_and_their_side_of_the_test():
    rng = np.random.default_rng(0)
    sizes = {
        (0, 7): 900,
        (0, 8): 900,
        (1, 7): 30,
        (1, 8): 900,
        (1, 9): 5,
        (0, 10): 4,
        (1, 10): 3,
    }  # (type, week) -> rows
    time = np.concatenate([w * WEEK + rng.integers(0, WEEK, n) for (_, w), n in sizes.items()])
    ntype = np.concatenate([np.full(n, t, np.int16) for (t, _), n in sizes.items()])
    order = rng.permutation(len(time))
    rows = np.arange(len(time))
    log = Log(rows, rows.astype(np.int32), time[order], ntype[order], TYPES, TEST)
    kept, gid = ShuffledLabels().apply(log, 0)
    assert kept.all() and np.array_equal(np.sort(gid), log.gid) and (gid != log.gid).mean() > 0.9
    week, came_from = log.timestamp // WEEK, log.timestamp[gid] // WEEK
    assert np.array_equal(log.ntype[gid], log.ntype)
    assert np.array_equal(came_from >= 10, week >= 10)
    many = log.ntype == 0
    assert np.array_equal(came_from[many], week[many])
    assert (came_from != week)[~many].any()  # thirty rows of week 7 move with those of week 8


def test_one_type_alone_and_a_new_type(ingest, tmp_path):
    before = same(ingest, tmp_path / "same")
    alone = events_of(write_changed(OnlyType("song"), ingest, tmp_path / "alone", 0))
    assert alone["type"].unique().to_list() == ["song"] and len(alone) == (before["type"] == "song").sum()
    fresh = events_of(write_changed(NewType("song", 25), ingest, tmp_path / "fresh", 0))
    test = pl.col("timestamp") >= TEST
    assert fresh.filter(test).height == before.filter(test).height
    assert fresh.filter(pl.col("type") == "book").height == before.filter(pl.col("type") == "book").height
    kept = fresh.filter(~test & (pl.col("type") == "song"))["timestamp"].sort()
    old = before.filter(~test & (pl.col("type") == "song"))["timestamp"].sort()
    assert kept.to_list() == old.tail(25).to_list()
    with pytest.raises(Exception, match="no item type 'film'"):
        write_changed(OnlyType("film"), ingest, tmp_path / "none", 0)


def test_thinned_samples_are_nested_and_leave_the_truths(ingest, tmp_path):
    row = ["user_id", "item_id", "event", "timestamp"]
    before = same(ingest, tmp_path / "same").with_row_index()
    past, test = before.filter(~pl.col("test")), before.filter(pl.col("test"))
    new = test.join(past, on=["user_id", "item_id"], how="anti")
    larger = past
    for one_in in (2, 4, 8):
        thin = events_of(write_changed(Thinned(one_in), ingest, tmp_path / f"one-in-{one_in}", 0))
        kept = thin.filter(~pl.col("test"))
        assert len(kept) == pytest.approx(len(past) / one_in, rel=0.2)
        assert kept.join(larger, on=row, how="anti").is_empty()
        # what a user had before and has again is no truth with all events, and must not become one with fewer
        after = thin.filter(pl.col("test"))
        assert 0 < len(after) == len(new) < len(test)
        assert after.select(row).sort(row).equals(new.select(row).sort(row))
        larger = kept
    assert set(larger["type"]) == set(TYPES) and len(larger["week"].unique()) == 10  # of everything, not of a part
    other = events_of(write_changed(Thinned(8), ingest, tmp_path / "other", 1)).filter(~pl.col("test"))
    assert not other.select(row).equals(larger.select(row))


def result_of(
    users: list[str], truths: list[int], types: tuple[str, ...] = ("book", "song"), **models: list[bool]
) -> Result:
    """One query a user, all of them warm and of the first type."""
    nobody = np.zeros(len(users), bool)
    order = np.arange(len(users))
    queries = Queries(order, np.zeros(len(users), np.int16), ~nobody, nobody, order, np.array(truths))
    member = np.zeros((len(SEGMENTS), len(users)), bool)
    member[:2] = True
    hits = Hits.of(queries, types, member)
    hits.hit.update({name: member & np.array(hit) for name, hit in models.items()})
    rows = [
        {"model": name, "item_type": "all", "segment": "warm", "hr_at_10": float(np.mean(hit)), "coverage_at_100": 0.5,
         "queries": len(users)}
        for name, hit in models.items()
    ]  # fmt: skip
    return Result([hits], [rows], pl.Series(users), {"hgnn": [60.0], "two-tower": [30.0]}, {"hgnn": [{"epochs": 2}]})


def test_variants_are_compared_on_the_same_questions():
    """Another ingest numbers users otherwise, and may ask other things of them."""
    users = [f"u{k}" for k in range(6)]
    full = result_of(users, [1, 2, 3, 4, 5, 6], **{"2t_hgnn": [True, True, True, False, False, True]})
    # u5 is gone, u4's truths are others, the rest come in another order
    other = result_of(users[4::-1], [9, 4, 3, 2, 1], **{"2t_hgnn": [True, False, False, False, True]})
    comparison = Comparison("less", Side("other"), Side("full"))
    found = compare(comparison, {"full": full, "other": other}, 100, 0)
    assert found is not None
    assert found["queries"] == 4 and found["asked_of_the_other"] == 6
    assert (found["hr_at_10"], found["hr_at_10_against"]) == (0.25, 0.75)
    nothing = Comparison("nobody", Side("other"), Side("full"), segments=("cold",))
    assert compare(nothing, {"full": full, "other": other}, 100, 0) is None


@pytest.mark.parametrize(
    ("expected", "ours", "verdict"),
    [
        ("below", 0.2, "lower: as the papers report"),
        ("below", 0.8, "higher: contrary to the papers"),
        ("below", 0.5, "no significant difference, where the papers report one"),
        ("not above", 0.8, "higher: must not happen"),
        ("not above", 0.2, "lower: as required"),
        (None, 0.8, "higher"),
    ],
)
def test_verdicts_follow_from_the_numbers(expected, ours, verdict):
    users = [f"u{k}" for k in range(200)]
    truths = list(range(200))

    def some(share: float, seed: int) -> list[bool]:
        return (np.random.default_rng(seed).permutation(200) < share * 200).tolist()

    results = {name: result_of(users, truths, **{"2t_hgnn": hit}) for name, hit in
               (("a", some(ours, 1)), ("b", some(0.5, 2)))}  # fmt: skip
    (outcome,) = judge([Comparison("c", Side("a"), Side("b"), expected=expected)], results, 300, 0)
    assert outcome.verdict == verdict


@pytest.mark.parametrize(("wanted", "verdict"), [(None, "50% of it"), (0.7, "missed"), (0.4, "50% of it: target met")])
def test_a_share_of_the_other(wanted, verdict):
    hit = {"b": [True] * 4 + [False] * 2, "a": [True] * 2 + [False] * 4}
    results = {n: result_of([f"u{k}" for k in range(6)], list(range(6)), **{"2t_hgnn": h}) for n, h in hit.items()}
    comparison = Comparison("c", Side("a"), Side("b"), as_share=True, at_least=wanted)
    (outcome,) = judge([comparison], results, 100, 0)
    assert verdict in outcome.verdict


@pytest.mark.parametrize(
    "settings", [[], ["hgnn.encoder=graphsage"], ["hgnn.encoder=graphsage", "hgnn.weights_by=kinship"]]
)
def test_a_new_type_gets_an_hgnn_that_was_trained_where_it_is_not(settings):
    config = load_config(None, settings)
    variants = {v.name: v for v in STUDIES["foundation-type"].variants(Facts(config, COUNTS))}
    of_type = ("without-{}", "new-{}-0", "new-{}-100", "new-{}-1000", "new-{}-all")
    assert list(variants) == ["full", *(name.format(k) for k in range(2) for name in of_type)]
    for k, (own, other) in enumerate((("book", "song"), ("song", "book"))):
        trained = variants[f"without-{k}"]
        made = changed(config, trained.overrides)
        assert made.data.item_types == [other] and trained.until == "hgnn" and trained.weights_of is None
        # the last event may be of the type: the periods are those of everything
        assert made.split.valid_from and made.split.valid_from.timestamp() == COUNTS["valid_from"]
        assert made.split.test_from and made.split.test_from.timestamp() == COUNTS["test_from"]
        for kept in (0, 100, 1000, None):
            new = variants[f"new-{k}-{'all' if kept is None else kept}"]
            assert new.weights_of == trained.name and new.until == "evaluate"
            assert new.table == (None if kept is None else NewType(own, kept))
            made = changed(config, new.overrides)
            assert made.data.item_types is None and made.hgnn.knows_later_types  # the whole catalogue


def test_the_best_popularity_is_the_opponent():
    hit = {"2t_hgnn": [True, False], "popularity": [False, False], "popularity_7": [True, True]}
    result = {"shuffled": result_of(["a", "b"], [1, 2], **hit)}
    found = compare(Comparison("c", Side("shuffled"), Side("shuffled", "popularity*")), result, 100, 0)
    assert found is not None and found["against"] == "popularity_7" and found["difference"] == -0.5


def test_a_model_that_a_variant_does_not_have_is_not_compared():
    result = {"shuffled": result_of(["a", "b"], [1, 2], **{"2t_hgnn": [True, False], "popularity_7": [True, True]})}
    sides = [Side("shuffled", model) for model in ("2t_hgnn_without_memory", "hgnn*", "popularity*")]
    found = judge([Comparison("c", Side("shuffled"), side) for side in sides], result, 100, 0)
    assert [outcome.comparison.theirs.model for outcome in found] == ["popularity*"]


@pytest.mark.parametrize(("own", "fails"), [(0.7, True), (0.3, False)])
def test_the_permutation_fails_only_what_is_personal(own, fails):
    """Above popularity, with a stranger's history as good or not."""
    rng = np.random.default_rng(4)
    hit = {
        "2t_hgnn": (rng.random(400) < own).tolist(),
        "2t_hgnn_for_a_stranger": (rng.random(400) < 0.3).tolist(),
        "popularity": (rng.random(400) < 0.1).tolist(),
    }
    results = {"shuffled": result_of([f"u{k}" for k in range(400)], list(range(400)), **hit)}
    study, facts = STUDIES["permutation"], Facts(load_config(), COUNTS)
    outcomes = judge(study.comparisons(facts, list(hit)), results, 300, 0)
    first, *_ = conclusions(study, outcomes, results)
    assert first.startswith("FAILED" if fails else "Passed")


def test_the_papers_experiment_has_both_types_of_paper_a_and_says_which_signs_are_the_same():
    config, study = load_config(PRESETS[[path.stem for path in PRESETS].index("paper")]), STUDIES["paper"]
    facts = Facts(config, {**COUNTS, "item_types": ["audiobook", "podcast"]})
    variants = {v.name: changed(config, v.overrides) for v in study.variants(facts)}
    assert variants["no-old-old"].graph.relations == [("audiobook", "audiobook"), ("audiobook", "podcast")]
    assert variants["old-old"].graph.relations == [("podcast", "podcast")]
    assert all(made.two_tower.inputs == "paper" for made in variants.values()) and not study.note(facts)
    assert "item types" in study.note(Facts(config, COUNTS)) and "settings" in study.note(Facts(load_config(), COUNTS))

    users, truths = [f"u{k}" for k in range(100)], list(range(100))
    shares = {"popularity": 20, "hgnn": 40, "2t_hgnn": 60, "two_tower_text_only": 61}
    hit = {name: [k < share for k in range(100)] for name, share in shares.items()}
    full = result_of(users, truths, ("audiobook", "podcast"), **hit)
    weak = result_of(users, truths, ("audiobook", "podcast"), **{"2t_hgnn": [k < 30 for k in range(100)]})
    outcomes = judge(study.comparisons(facts, list(hit)), {"full": full, "no-weak": weak}, 200, 0)
    signs = {o.comparison.label: sign(o) for o in outcomes if "all types" in o.comparison.label}
    assert signs["Table 2, all types: HGNN alone against Popularity"] == "yes"
    assert signs["Table 2, all types: 2T-HGNN against 2T without HGNN"] == "no, n.s."
    assert signs["Table 2, all types: HGNN alone against 2T without HGNN"] == "no"
    assert signs["Table 1, all types: without weak signals"] == "yes"
    lines = [line for line in conclusions(study, outcomes, {"full": full}) if line.startswith("Table 2, all types")]
    (line,) = lines
    assert "3 of 5 signs" in line and "2T-HGNN against 2T without HGNN (no, n.s.)" in line


def amounts(gains: dict[str, float], users: int = 200) -> tuple[Study, list[Outcome], dict[str, Result]]:
    """Results of the study amount on all variants, where the two-tower hits half of the lists of warm users and 2T-HGNN
    as many more as ``gains`` say; all other variants gain nothing."""
    study, facts = STUDIES["amount"], Facts(load_config(), COUNTS)
    names, truths = [f"u{k}" for k in range(users)], list(range(users))
    results = {}
    for variant in study.variants(facts):
        hit = {
            "2t_hgnn": [k < (0.5 + gains.get(variant.name, 0.0)) * users for k in range(users)],
            "two_tower_text_only": [k < 0.5 * users for k in range(users)],
        }
        results[variant.name] = result_of(names, truths, **hit)
    ingest = {"rows": {"interactions": {"kept": 100}}, "items_per_type": [30, 10]}
    results["all"].counts["ingest"] = [ingest]
    return study, judge(study.comparisons(facts, list(hit)), results, 200, 0), results


@pytest.mark.parametrize(
    ("gains", "events", "epochs"),
    [
        (
            {"one-in-4": 0.1, "one-in-8": 0.3},
            ["rises for warm users (+0.3000, ", "It is above zero for warm users with 1/4 of the events and 1/8 of"],
            ["does not change significantly for warm users (+0.0000, +0.0000 to +0.0000)", "zero everywhere"],
        ),
        (
            {"one-in-8": 0.005, "until-best": 0.1, "epochs-1": -0.1},
            ["does not change significantly for warm users (+0.0050, ", "Its interval includes zero everywhere."],
            ["falls for warm users (-0.2000, ", "above zero for warm users with all epochs; it is below zero for warm",
             "users with 1 epoch."],
        ),
    ],
)  # fmt: skip
def test_the_study_of_amounts_says_only_what_intervals_show(gains, events, epochs, tmp_path):
    study, outcomes, results = amounts(gains)
    of_events, of_epochs = conclusions(study, outcomes, results)
    assert of_events.startswith("From all events to 1/8 of the events the gain ")
    assert of_epochs.startswith("From all epochs to 1 epoch the gain ")
    assert all(said in of_events for said in events) and all(said in of_epochs for said in epochs)
    assert study.draw is not None
    study.draw(tmp_path / "amount.png", outcomes, results)
    assert (tmp_path / "amount.png").read_bytes().startswith(b"\x89PNG")


def test_each_amount_is_what_it_says_and_nothing_else_differs():
    config = load_config(None, ["split.test_days=14"])
    variants = {v.name: v for v in STUDIES["amount"].variants(Facts(config, COUNTS))}
    made = {name: changed(config, variant.overrides) for name, variant in variants.items()}
    assert all(variant.ablation for variant in variants.values())
    for one_in in (2, 4, 8):
        name = f"one-in-{one_in}"
        assert variants[name].table == Thinned(one_in) and made[name].two_tower == config.two_tower
        # as many rows in the periods, however few before them
        assert made[name].split.valid_from and made[name].split.valid_from.timestamp() == COUNTS["valid_from"]
        assert made[name].split.test_from and made[name].split.test_from.timestamp() == COUNTS["test_from"]
    for epochs in (1, 2, 4):
        towers = made[f"epochs-{epochs}"].two_tower
        assert towers.epochs == towers.patience == epochs  # none is left out
        whole = made["until-best"].model_dump()
        limits = {"epochs": epochs, "patience": epochs}
        assert made[f"epochs-{epochs}"].model_dump() == whole | {"two_tower": whole["two_tower"] | limits}
    assert not made["until-best"].two_tower.refit


def test_the_command_line_knows_every_study():
    assert (*STUDIES, EMBEDDING) == NAMES


@pytest.mark.parametrize(("name", "preset"), FITTING, ids=lambda value: getattr(value, "stem", value))
def test_every_variant_is_a_configuration_and_every_comparison_has_both_sides(name, preset):
    config = load_config(preset)
    facts, study = Facts(config, COUNTS), STUDIES[name]
    variants = {variant.name: variant for variant in study.variants(facts)}
    for variant in variants.values():
        assert changed(config, [*_LEAN, *variant.overrides]) is not None
        # what gives its weights has been run before
        assert variant.weights_of is None or list(variants).index(variant.weights_of) < list(variants).index(
            variant.name
        )
    models = ["2t_hgnn", "2t_hgnn_for_a_stranger", "popularity"]
    comparisons = study.comparisons(facts, models)
    assert comparisons
    for comparison in comparisons:
        assert {comparison.ours.variant, comparison.theirs.variant} <= variants.keys()
        assert set(comparison.segments) <= set(SEGMENTS)
        assert comparison.item_type in ("all", *TYPES)


def test_the_page_holds_figures_plot_and_command(tmp_path):
    rng = np.random.default_rng(5)
    users, truths = [f"u{k}" for k in range(300)], list(range(300))
    variants = [Variant("full", "everything"), Variant("less", "without", ("hgnn.balanced=false",))]
    results = {
        v.name: result_of(users, truths, **{"2t_hgnn": (rng.random(300) < share).tolist()})
        for v, share in zip(variants, (0.6, 0.3), strict=True)
    }
    for result in results.values():  # rows that nobody asked for
        result.rows[0].append({**result.rows[0][0], "segment": "tier1"})
    comparisons = [Comparison("without", Side("less"), Side("full"), expected="below", reported="-6 %")]
    study = Study("small", "Title", "Question?", "Reported.", lambda facts: variants, lambda facts, models: comparisons)
    outcomes = judge(comparisons, results, 200, 0)
    facts = Facts(load_config(), COUNTS)
    verdict = write_page(tmp_path, study, facts, variants, results, outcomes, [0], "recsys-ray study small", "data")
    page = (tmp_path / "small.md").read_text()
    assert "as the papers report" in verdict[0] and verdict[0] in page
    for promised in ("Question?", "Reported.", "recsys-ray study small", "`hgnn.balanced=false`", "-6 %", "small.png"):
        assert promised in page
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "small.json").read_text())
    assert figures["verdict"] == verdict
    assert [[row["segment"] for row in variant["rows"][0]] for variant in figures["variants"]] == [["warm"], ["warm"]]
