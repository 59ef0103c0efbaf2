"""Answers over a world whose stage outputs are written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from bundle_world import DAY, END, EVENTS, FORGOTTEN, LONELY, POPULAR_DAYS, STRANGE_IDS, World, make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.scoring.scorer import TRENDS, UNSEEN
from recsys_ray.serving.reasons import because, fits
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import RequestError, UnknownItem

TYPES = ["audiobook", "music", "podcast"]


@pytest.fixture(
    scope="module",
    params=[(0.0, ()), (0.1, ()), (0.0, (TRENDS, UNSEEN)), (0.1, (TRENDS, UNSEEN))],
    ids=["towers alone", "memory", "item terms", "memory and item terms"],
)
def world(request, tmp_path_factory) -> World:
    memory, terms = request.param
    made = make_world(tmp_path_factory.mktemp("world"), memory=memory, terms=terms)
    made.bundle()
    return made


@pytest.fixture(scope="module")
def recommender(world) -> Recommender:
    return Recommender.load(world.root / "bundles" / "current")


def ids(items) -> list[str]:
    return [item.item_id for item in items]


def test_answer_is_brute_force(world, recommender):
    """The tower's vector against every allowed item, and what the terms add."""
    from recsys_ray.serving.histories import user_inputs

    raised = 0
    for uid in (0, 1, 5, 11):
        profile = recommender.users.traits(uid, recommender.histories.recent(uid))
        query = recommender.tower(user_inputs([profile], recommender.tower.tastes))[0]
        seen = world.seen(world.user_ids[uid])
        allowed = [g for g, i in enumerate(world.item_ids) if world.available[g] and i not in seen]
        scores = {g: float(world.vectors[g] @ query + world.bias[g]) for g in allowed}
        alone = sorted(allowed, key=lambda g: -scores[g])[:10]
        if recommender.score.memory is not None:
            found = recommender.score.memory.recall(np.zeros(len(profile.gids), np.int64), profile.gids, 2.0)
            for gid, value in zip(found.gid.tolist(), found.value[:, 0].tolist(), strict=True):
                if gid in scores:
                    scores[gid] += 0.1 * value
        best = sorted(allowed, key=lambda g: -scores[g])
        raised += best[:10] != alone
        assert ids(recommender.recommend(world.user_ids[uid])) == [world.item_ids[g] for g in best[:10]]
        found = {item.item_id: item.score for item in recommender.recommend(world.user_ids[uid], k=len(best))}
        assert found == pytest.approx({world.item_ids[g]: scores[g] for g in best}, abs=1e-5)
    assert (raised > 0) == (recommender.score.memory is not None)


def test_only_the_touched_rows_matter(recommender):
    """The tower over a few table rows gives what it gives over whole tables."""
    import torch

    from recsys_ray.serving.histories import user_inputs

    profiles = [recommender.users.traits(uid, recommender.histories.recent(uid)) for uid in range(10)]
    inputs = user_inputs(profiles, recommender.tower.tastes)
    whole = recommender.tower.tower(inputs, recommender.tower.tables).detach().numpy()
    np.testing.assert_allclose(recommender.tower(inputs), whole, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(whole).norm(dim=1), torch.ones(10))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_nothing_forbidden_ever_comes(world, recommender, data):
    user = data.draw(st.sampled_from([None, "nobody", *world.user_ids]))
    history = data.draw(st.lists(st.sampled_from(world.item_ids), max_size=80))
    exclude = data.draw(st.lists(st.sampled_from([*world.item_ids, "no such item"]), max_size=80))
    wanted = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(TYPES), min_size=1)))
    k = data.draw(st.integers(1, 500))
    country = data.draw(st.sampled_from([None, "DE", "Atlantis"]))
    entries = [{"item_id": item_id, "event": "stream"} for item_id in history]
    found = recommender.recommend(user, entries, country=country, item_types=wanted, k=k, exclude=exclude)
    seen = world.seen(user) if user in world.user_ids else set()
    allowed = {
        item_id
        for gid, item_id in enumerate(world.item_ids)
        if world.available[gid]
        and item_id not in seen | {*history, *exclude}
        and TYPES[world.ntype[gid]] in (wanted or TYPES)
    }
    assert len(found) == len(set(ids(found))) == min(k, len(allowed))
    assert set(ids(found)) <= allowed
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)
    assert all(item.title and item.reason and item.item_type in TYPES for item in found)


def test_inline_history_is_as_good_as_a_stored_one(world, recommender):
    names = EVENTS
    for uid in (1, 5, 8):
        events = world.events[world.events[:, 0] == uid]
        inline = [
            {"item_id": world.item_ids[gid], "event": names[event], "timestamp": int(moment)}
            for _, gid, event, moment in events.tolist()
        ]
        stored = recommender.users.traits(uid, recommender.histories.recent(uid))
        country = ["DE", "SE"][stored.country] if stored.country >= 0 else None
        age = stored.age if np.isfinite(stored.age) else None
        tastes = {name: vector.tolist() for name, vector in stored.tastes.items()}
        by_id = recommender.answer(world.user_ids[uid])
        by_history = recommender.answer(history=inline, age=age, country=country, tastes=tastes)
        assert by_id.known and not by_history.known
        assert by_id.items == by_history.items


def test_a_fresh_event_changes_the_answer(world, recommender):
    before = recommender.recommend(world.user_ids[1], k=5)
    after = recommender.recommend(world.user_ids[1], [{"item_id": before[0].item_id}], k=5)
    assert before[0].item_id not in ids(after)
    assert [item.score for item in before[1:]] != [item.score for item in after[:4]]
    assert recommender.recommend(world.user_ids[1], k=5) == before


def test_an_old_inline_history_counts(world, recommender):
    """All of it lies before the window; whoever sends it wants it to count."""
    found = recommender.recommend(history=[{"item_id": world.item_ids[0], "timestamp": 1_000_000_000}])
    assert found[0].reason == f'because you streamed "Title of {world.item_ids[0]}"'


def test_cold_users(world, recommender):
    assert not recommender.answer("nobody").known and recommender.answer(LONELY).known
    popular = recommender.recommend(LONELY, k=20)
    assert popular == recommender.recommend() + recommender.recommend(k=20)[10:]
    counts = dict(zip(world.item_ids, recommender.popularity.counted.world, strict=True))
    best = sorted((i for g, i in enumerate(world.item_ids) if world.available[g]), key=lambda i: -counts[i])
    assert [counts[i] for i in ids(popular)] == [counts[i] for i in best[:20]]
    assert popular[0].reason == "popular now"
    assert recommender.recommend(age=30, country="SE")[0].reason == "fits your age and country"
    assert recommender.recommend(FORGOTTEN)[0].reason == "fits your age, country and taste"
    assert recommender.recommend(country="Atlantis") == recommender.recommend()


def test_without_cold_start_a_country_gets_its_own_popularity(world, recommender, monkeypatch):
    counts = {**recommender.artifact.counts, "cold_start": False}
    monkeypatch.setitem(recommender.artifact.manifest, "counts", counts)  # type: ignore[arg-type]
    stream = EVENTS.index("stream")
    recent = world.events[(world.events[:, 3] >= END - POPULAR_DAYS * DAY) & (world.events[:, 2] == stream)]
    for number, country in enumerate(["DE", "SE"]):
        uids = [uid for uid in range(len(world.user_ids)) if uid % 5 != 4 and uid % 2 == number and uid != 3]
        mine = {world.item_ids[gid] for gid in recent[np.isin(recent[:, 0], uids), 1]}
        found = recommender.recommend(country=country, k=500)
        assert {item.item_id for item in found if item.reason == f"popular in {country}"} <= mine
        assert found[0].reason == f"popular in {country}"
        assert found[-1].reason == "little known yet" and len(found) == world.available.sum()


def test_similar(world, recommender):
    for item_id in [*STRANGE_IDS, world.item_ids[-1]]:
        gid = world.item_ids.index(item_id)
        allowed = [g for g in range(len(world.item_ids)) if world.available[g] and g != gid]
        best = sorted(allowed, key=lambda g: -float(world.vectors[g] @ world.vectors[gid]))
        assert ids(recommender.similar(item_id, 7)) == [world.item_ids[g] for g in best[:7]]
        books = [g for g in best if world.ntype[g] == 0]
        assert ids(recommender.similar(item_id, 7, ["audiobook"])) == [world.item_ids[g] for g in books[:7]]
    with pytest.raises(UnknownItem, match="no item 'x'"):
        recommender.similar("x")


GOOD = {"item_id": STRANGE_IDS[0]}


@pytest.mark.parametrize(
    ("request_", "field", "sentence"),
    [
        ({"k": 0}, "k", "1 to 500"),
        ({"k": 501}, "k", "1 to 500"),
        ({"k": True}, "k", "1 to 500"),
        ({"history": [GOOD, {"item_id": "x"}]}, "history.1.item_id", "no item 'x'"),
        ({"history": [{**GOOD, "event": "strem"}]}, "history.0.event", "did you mean 'stream'"),
        ({"history": [{**GOOD, "event": "?"}]}, "history.0.event", "known: follow, preview, stream"),
        ({"history": [{**GOOD, "timestamp": 1.7e12}]}, "history.0.timestamp", "milliseconds"),
        ({"history": [{**GOOD, "timestamp": float("nan")}]}, "history.0.timestamp", "unix seconds"),
        ({"history": [{**GOOD, "when": 1}]}, "history.0", "'when' is not known"),
        ({"history": [{"event": "stream"}]}, "history.0", "item_id is missing"),
        ({"item_types": ["books"]}, "item_types.0", "known: audiobook, music, podcast"),
        ({"item_types": []}, "item_types", "at least one"),
        ({"age": -1}, "age", "0 to 130"),
        ({"age": float("nan")}, "age", "0 to 130"),
        ({"country": 3}, "country", "must be a text"),
        ({"tastes": {"films": [1.0]}}, "tastes.films", "known: music"),
        ({"tastes": {"music": [1.0]}}, "tastes.music", "must hold 4 numbers, not 1"),
        ({"tastes": {"music": [1.0, 2.0, 3.0, float("inf")]}}, "tastes.music", "not finite"),
        ({"tastes": {"music": ["a"] * 4}}, "tastes.music", "list of numbers"),
        ({"exclude": "abc"}, "exclude", "list of item ids"),
    ],
)
def test_bad_requests_name_the_field(recommender, request_, field, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        recommender.recommend(**request_)
    assert caught.value.field == field


def test_history_and_examples(world, recommender):
    users = recommender.example_users(5)
    assert len(set(users)) == 5
    for user_id in users:
        past = recommender.history(user_id, 4)
        assert past and {event.item_id for event in past} <= world.seen(user_id)
        assert [event.timestamp for event in past] == sorted((event.timestamp for event in past), reverse=True)
    assert recommender.history("nobody") == []


def test_reasons_read_well():
    assert because("stream", "Dune") == 'because you streamed "Dune"'
    assert because("intent_to_pay", "Dune") == 'because you wanted to buy "Dune"'
    assert because("like", "Dune") == 'because you liked "Dune"'
    assert because("try", "Dune") == 'because you tried "Dune"'
    assert because("interaction", "Dune") == 'because of "Dune" (interaction)'
    assert because("long_view", "Dune") == 'because of "Dune" (long view)'
    assert fits(["age", "country", "taste"]) == "fits your age, country and taste"
    assert fits(["age"]) == "fits your age"


def test_an_item_without_a_title_is_named_by_its_id(world, recommender, monkeypatch):
    monkeypatch.setattr(recommender.items, "title", lambda gid: "")
    found = recommender.recommend(history=[{"item_id": world.item_ids[0]}])
    assert found[0].reason == f'because you streamed "{world.item_ids[0]}"'


def test_nothing_that_trains_is_imported():
    """A replica has neither dgl nor transformers."""
    import subprocess
    import sys

    code = "import sys, serve.app, recsys_ray.two_tower.towers; assert not {'dgl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
