"""The demo world has the traits that the papers name, is the same for the same seed, and cannot see the future."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.demo import world as demo_world
from recsys_ray.demo.events import EVENTS, STREAM, Events, shard_of
from recsys_ray.demo.oracle import rank
from recsys_ray.demo.texts import ANGLES, LANGUAGES, THEMES, topic_words
from recsys_ray.demo.world import END, START, TYPES, spec_for
from recsys_ray.demo.write import items_table, users_table, write_demo

SPEC = spec_for(20_000, seed=3)


@pytest.fixture(scope="module")
def shards():
    return [shard_of(SPEC, shard) for shard in range(SPEC.shards)]


@pytest.fixture(scope="module")
def events(shards) -> pl.DataFrame:
    """All events with type, publication and arrival beside them."""
    frames = []
    for catalogue, users, events in shards:
        columns = {
            "user": events.user + users.first,
            "item": events.item,
            "event": np.array(EVENTS)[events.event],
            "time": events.time,
            "type": np.array(TYPES)[catalogue.type[events.item]],
            "published": catalogue.published[events.item],
            "withdrawn": catalogue.withdrawn[events.item],
            "arrival": users.arrival[events.user],
        }
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def test_size_follows_the_spec(events):
    assert 0.85 < len(events) / SPEC.events < 1.15
    assert events["user"].n_unique() == SPEC.users, "every user has an event"
    small, large = spec_for(2_000, 0), spec_for(200_000_000, 0)
    assert small.shards > 1 and large.users_per_shard <= 20_000
    assert sum(large.items.values()) / sum(small.items.values()) < 100_000**0.7, "items grow more slowly than events"


def test_taste_noise_changes_the_taste_vectors_and_nothing_else(shards):
    """Catalogue, events and all else about the users stay; what a vector tells of its user's style falls."""
    catalogue, users, events = shards[0]
    other_catalogue, others, other_events = shard_of(spec_for(20_000, seed=3, taste_noise=4.0), 0)
    for mine, theirs in ((catalogue, other_catalogue), (events, other_events), (users, others)):
        same = {name: np.array_equal(value, vars(theirs)[name]) for name, value in vars(mine).items()}
        assert {name for name, equal in same.items() if not equal} == ({"taste"} if mine is users else set())
    told = []
    for taste in (users.taste, others.taste):
        known = np.c_[taste, np.ones(len(taste))]
        left = users.style - known @ np.linalg.lstsq(known, users.style, rcond=None)[0]
        told.append(1 - left.var() / users.style.var())
    assert told[1] < 0.6 < 0.7 < told[0]


@pytest.mark.parametrize("events", [1_000, 2_000])
def test_small_worlds_are_whole(events):
    spec = spec_for(events, 1)
    made = [shard_of(spec, shard) for shard in range(spec.shards)]
    assert {kind for catalogue, _, e in made for kind in catalogue.type[e.item]} == {0, 1, 2}
    assert sum(rank(spec, s, *made[s]).counted[:, 0].sum() for s in range(spec.shards)) > 0


@pytest.mark.parametrize(("events", "seed"), [(999, 0), (10_000, -1)])
def test_impossible_specs_are_refused(events, seed):
    with pytest.raises(ValueError, match=r"must not be negative|at least 1,000"):
        spec_for(events, seed)


def test_same_seed_same_world_other_seed_other_world():
    demo_world._catalogue.cache_clear()
    first = _columns(shard_of(SPEC, 1)[2])
    shard_of(SPEC, 0)  # nothing depends on the order of the shards
    assert all(np.array_equal(a, b) for a, b in zip(first, _columns(shard_of(SPEC, 1)[2]), strict=True))
    assert items_table(SPEC, 0).equals(items_table(SPEC, 0))
    other = replace(SPEC, seed=4)
    assert not items_table(other, 0).equals(items_table(SPEC, 0))
    assert not np.array_equal(first[3], shard_of(other, 1)[2].time)


def test_nothing_happens_before_it_can(events):
    assert events.filter(pl.col("time") < pl.col("published")).is_empty()
    assert events.filter(pl.col("time") < pl.col("arrival")).is_empty()
    assert events.filter(pl.col("time") >= pl.col("withdrawn")).is_empty()
    assert events["time"].min() >= START and events["time"].max() == END - 1


def test_items_and_users_keep_arriving(shards):
    catalogue = shards[0][0]
    arrivals = np.concatenate([users.arrival for _, users, _ in shards])
    assert (catalogue.published >= END - 7 * DAY).any() and (catalogue.published < END).all()
    assert (arrivals >= END - 7 * DAY).any()


def test_audiobooks_are_new_and_sparse(shards, events):
    catalogue = shards[0][0]
    books = catalogue.published[catalogue.span(0)]
    assert (books > START + 182 * DAY).mean() > 0.7 and (books > START).all()
    per_item = events.group_by("type").agg(per_item=pl.len() / pl.col("item").n_unique()).sort("type")["per_item"]
    assert per_item[0] < 0.5 * min(per_item[1], per_item[2])


def test_audiobook_users_came_from_podcasts(events):
    book = events.filter(pl.col("type") == "audiobook").group_by("user").agg(book=pl.col("time").min())
    podcast = events.filter(type="podcast", event="stream").group_by("user").agg(podcast=pl.col("time").min())
    both = book.join(podcast, on="user", how="left")
    assert len(both) > 30
    assert (both["podcast"] < both["book"]).fill_null(False).mean() > 0.8


def test_a_fifth_of_the_titles_has_most_of_the_streams(shards, events):
    catalogue = shards[0][0]
    for kind, name in enumerate(TYPES):
        streams = events.filter(type=name, event="stream")["item"].to_numpy()
        counts = np.sort(np.bincount(streams, minlength=len(catalogue.type))[catalogue.span(kind)])[::-1]
        assert 0.65 < counts[: len(counts) // 5].sum() / counts.sum() < 0.92, name


def test_weak_signals_foretell_streams(events):
    weak = events.filter(pl.col("event") != "stream").group_by("user", "item").agg(weak=pl.col("time").min())
    stream = events.filter(event="stream").group_by("user", "item").agg(stream=pl.col("time").min())
    joined = weak.join(stream, on=["user", "item"], how="left")
    later = (joined["stream"] > joined["weak"] + 3000).fill_null(False).mean()
    assert 0.25 < later < 0.7
    assert joined["stream"].null_count() > 0.2 * len(joined), "and some are never followed by one"
    assert set(events["event"]) == set(EVENTS)


def test_users_rarely_repeat(events):
    streams = events.filter(event="stream")
    assert streams.select("user", "item").n_unique() > 0.55 * len(streams)


def test_country_and_age_carry_signal(shards):
    catalogue = shards[0][0]
    users = [(u, e) for _, u, e in shards]
    language = np.concatenate([u.language[e.user] for u, e in users])
    item_language = np.concatenate([catalogue.language[e.item] for _, e in users])
    german = LANGUAGES.index("de")
    assert (item_language[language == german] == german).mean() > 3 * (
        item_language[language != german] == german
    ).mean()
    age = np.concatenate([u.age[e.user] for u, e in users])
    theme = np.concatenate([catalogue.theme[catalogue.topic[e.item]] for _, e in users])
    assert age[theme == THEMES.index("history")].mean() > age[theme == THEMES.index("fantasy")].mean() + 5


def test_tastes_are_shared_across_types(shards):
    """A user's podcast topics are likelier among their own music than among another user's."""
    own, other = [], []
    for catalogue, _, e in shards:
        topics = [
            {u: set(g) for u, g in _grouped(e.user, catalogue.topic[e.item], catalogue.type[e.item] == kind).items()}
            for kind in (1, 2)
        ]
        names = sorted(set(topics[0]) & set(topics[1]))
        for user, stranger in zip(names, [*names[1:], names[0]], strict=True):
            own.append(len(topics[0][user] & topics[1][user]) / len(topics[1][user]))
            other.append(len(topics[0][stranger] & topics[1][user]) / len(topics[1][user]))
    assert np.mean(own) > 1.5 * np.mean(other)


def test_oracle_beats_popularity_and_knows_only_the_past(shards, events):
    catalogue = shards[0][0]
    past = events.filter(pl.col("time") < SPEC.test_from)
    counts = np.bincount(past.filter(event="stream")["item"].to_numpy(), minlength=len(catalogue.type))
    best, popular, pairs = 0, 0, 0
    for shard, (_, users, e) in enumerate(shards):
        out = rank(SPEC, shard, catalogue, users, e)
        pairs, best = pairs + out.counted[:, 0].sum(), best + out.counted[:, 1].sum()
        hits = 0
        for user, kind, line in zip(out.user, out.kind, out.items, strict=True):
            mine = e.user == user
            touched = set(e.item[mine & (e.time < SPEC.test_from)])
            streamed = set(e.item[mine & (e.time >= SPEC.test_from) & (e.event == STREAM)]) - touched
            assert not touched & set(line) and len(set(line)) == len(line) <= 100
            assert (catalogue.type[line] == kind).all()
            hits += bool(set(line[:10]) & streamed)
            order = np.argsort(-counts[catalogue.span(kind)], kind="stable")[:200].tolist()
            order = [i + catalogue.span(kind).start for i in order if i + catalogue.span(kind).start not in touched]
            popular += bool(set(order[:10]) & streamed)
        assert hits == out.counted[:, 1].sum()
    assert pairs > 100
    assert best > 1.6 * popular
    assert 0.35 < best / pairs < 0.8


def test_texts(shards):
    items = pl.from_arrow(items_table(SPEC, 0))
    assert items["title"].str.len_chars().min() > 0
    assert items["title"].n_unique() > 0.97 * len(items)
    assert 0.01 < items["description"].null_count() / len(items) < 0.12
    assert not any("{" in text for text in [*items["title"], *items["description"].drop_nulls()])
    assert set(items["language"]) == set(LANGUAGES)
    assert items.filter(language="ja")["title"].str.contains("[\u3040-\u30ff\u4e00-\u9fff]").all()
    assert 0.9 < items["available"].mean() < 1.0
    assert items["item_id"].n_unique() == len(items) == sum(SPEC.items.values())


@pytest.mark.parametrize("item_type", TYPES)
def test_every_topic_has_words_of_its_own(item_type):
    words = [topic_words(item_type, topic) for topic in range(len(THEMES) * 8 * len(ANGLES))]
    assert len(set(words)) == len(words)


def test_some_users_hide_age_and_taste(shards):
    users = pl.from_arrow(users_table(SPEC, 0, shards[0][1]))
    more = pl.concat([pl.from_arrow(users_table(SPEC, s, made[1])) for s, made in enumerate(shards)])
    assert users["user_id"].n_unique() == len(users)
    assert 0 < more["age"].null_count() < 0.1 * len(more)
    assert 0.05 < more["music_taste"].null_count() / len(more) < 0.3
    assert set(more["music_taste"].drop_nulls().list.len()) == {16}


def test_write_demo(ray_local, tmp_path):
    spec = spec_for(3_000, seed=5)
    world = write_demo(tmp_path / "world", spec, Progress(quiet=True))
    again = write_demo(tmp_path / "again", spec, Progress(quiet=True))
    assert world == again == json.loads((tmp_path / "world" / "world.json").read_text())
    files = sorted(path.relative_to(tmp_path / "world") for path in (tmp_path / "world").rglob("*.parquet"))
    assert len([f for f in files if f.parts[0] == "interactions"]) == spec.shards > 1
    for file in files:
        assert (tmp_path / "world" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert pq.read_table(tmp_path / "world" / "interactions").num_rows == world["interactions"]
    assert world["oracle_pairs"]["all"] == sum(world["oracle_pairs"][name] for name in TYPES) > 0
    write_demo(tmp_path / "again", spec_for(2_000, seed=5), Progress(quiet=True))  # an old world is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "world"]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than demo data"):
        write_demo(tmp_path, SPEC, Progress(quiet=True))


def _columns(events: Events) -> tuple[np.ndarray, ...]:
    return events.user, events.item, events.event, events.time


def _grouped(users: np.ndarray, values: np.ndarray, mask: np.ndarray) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for user, value in zip(users[mask].tolist(), values[mask].tolist(), strict=True):
        out.setdefault(user, []).append(value)
    return out
