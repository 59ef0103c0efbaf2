"""Answers over a world whose stage outputs are written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bundle_world import (
    DAY,
    END,
    EVENTS,
    FORGOTTEN,
    LONELY,
    POPULAR_DAYS,
    STRANGE_IDS,
    World,
    categories_of,
    language_of,
    make_world,
    published,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.scoring.memory import NO_RAISERS, SMALL, Raisers, latest
from recsys_ray.scoring.scorer import TRENDS, UNSEEN
from recsys_ray.serving.filters import Filters
from recsys_ray.serving.live import LiveVectors
from recsys_ray.serving.reasons import because, fits
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question, RequestError, UnknownItem

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
    found = recommender.recommend(user, history=entries, country=country, item_types=wanted, k=k, exclude=exclude)
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


@pytest.fixture(scope="module")
def through_codes(world, tmp_path_factory) -> Recommender:
    settings = {
        **world.config.model_dump(),
        "index": {"exact_up_to": 10, "popular_days": POPULAR_DAYS, "recall": 0.5},
    }
    replace(world, config=world.config.model_validate(settings)).bundle("codes")
    return Recommender.load(world.root / "codes")


def questions_of(world: World) -> st.SearchStrategy[Question]:
    items = st.lists(st.sampled_from(world.item_ids), max_size=60)
    return st.builds(
        Question,
        user_id=st.sampled_from([None, "nobody", *world.user_ids]),
        history=st.lists(st.sampled_from(world.item_ids).map(lambda name: {"item_id": name}), max_size=20),
        country=st.sampled_from([None, "DE"]),
        item_types=st.sampled_from([None, ["music"], ["audiobook", "podcast"]]),
        k=st.sampled_from([1, 10, 45]),
        quotas=st.sampled_from([None, None, {"music": 3, "podcast": 20}]),
        exclude=items,
        allow=st.one_of(st.none(), items),
        filters=st.sampled_from([Filters(), Filters(languages=("de",)), Filters(categories_none=("b",))]),
        include_seen=st.booleans(),
        diversity=st.sampled_from([0.0, 0.5]),
        popularity=st.sampled_from([0.0, 0.3]),
    ).map(lambda drawn: replace(drawn, item_types=None) if drawn.quotas else drawn)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_many_answers_are_what_each_is_alone(world, recommender, through_codes, data):
    """Alike questions are ranked together; a question that is like no other stays alone."""
    one = data.draw(questions_of(world))
    few = [replace(one, user_id=user) for user in world.user_ids[: data.draw(st.sampled_from([3, 40]))]]
    few += [*data.draw(st.lists(questions_of(world), max_size=5)), Question(k=0)]
    for some in (recommender, through_codes):
        for question, together in zip(few, some.answers(few), strict=True):
            if question.k == 0:
                assert isinstance(together, RequestError)
                continue
            alone = some.answer(question)
            assert (together.known, together.cold, together.ignored) == (alone.known, alone.cold, alone.ignored)
            scores = [item.score for item in alone.items]
            assert [item.score for item in together.items] == pytest.approx(scores, abs=1e-5)
            if question.diversity or question.popularity:  # the smallest difference moves all that come after
                continue
            if len(scores) < 2 or np.abs(np.diff(scores)).min() > 1e-5:  # nearer ones may stand in either order
                assert (
                    together.items[:-1]
                    == [
                        replace(item, score=other.score)
                        for item, other in zip(alone.items, together.items, strict=True)
                    ][:-1]
                )


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
        by_id = recommender.answer(Question(world.user_ids[uid]))
        by_history = recommender.answer(Question(history=inline, age=age, country=country, tastes=tastes))
        assert by_id.known and not by_history.known
        assert by_id.items == by_history.items


def test_a_fresh_event_changes_the_answer(world, recommender):
    before = recommender.recommend(world.user_ids[1], k=5)
    after = recommender.recommend(world.user_ids[1], history=[{"item_id": before[0].item_id}], k=5)
    assert before[0].item_id not in ids(after)
    assert [item.score for item in before[1:]] != [item.score for item in after[:4]]
    assert recommender.recommend(world.user_ids[1], k=5) == before


def test_an_old_inline_history_counts(world, recommender):
    """All of it lies before the window; whoever sends it wants it to count."""
    found = recommender.recommend(history=[{"item_id": world.item_ids[0], "timestamp": 1_000_000_000}])
    assert found[0].reason == f'because you streamed "Title of {world.item_ids[0]}"'


def test_cold_users(world, recommender):
    nobody, lonely = recommender.answer(Question("nobody")), recommender.answer(Question(LONELY))
    assert not nobody.known and lonely.known and nobody.cold and lonely.cold
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
        ({"history": [GOOD, {"item_id": True}]}, "history.1.item_id", "a string or a whole number"),
        ({"history": [{**GOOD, "timestamp": "yesterday"}]}, "history.0.timestamp", "a time like 2024-05-01"),
        ({"history": [{**GOOD, "timestamp": False}]}, "history.0.timestamp", "unix seconds"),
        ({"user_id": 1.5}, "user_id", "a string or a whole number"),
        ({"age": False}, "age", "0 to 130"),
        ({"quotas": {"films": 3}}, "quotas.films", "known: audiobook, music, podcast"),
        ({"quotas": {"music": 0}}, "quotas.music", "1 to 500"),
        ({"quotas": {}}, "quotas", "at least one"),
        ({"diversity": 2}, "diversity", "from 0 to 1"),
        ({"popularity": -1.5}, "popularity", "from -1 to 1"),
        ({"allow": "abc"}, "allow", "list of item ids"),
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
        ({"country": 3}, "country", "must be a string"),
        ({"tastes": {"films": [1.0]}}, "tastes.films", "known: music"),
        ({"tastes": {"music": [1.0]}}, "tastes.music", "must contain 4 numbers, not 1"),
        ({"tastes": {"music": [1.0, 2.0, 3.0, float("inf")]}}, "tastes.music", "not finite"),
        ({"tastes": {"music": ["a"] * 4}}, "tastes.music", "list of numbers"),
        ({"exclude": "abc"}, "exclude", "list of item ids"),
        ({"exclude": 5}, "exclude", "list of item ids"),
        ({"allow": {"abc": 1}}, "allow", "list of item ids"),
        ({"history": 5}, "history", "list of events"),
        ({"history": [5]}, "history.0", "item_id, event and timestamp"),
        ({"item_types": 5}, "item_types", "list of item types"),
        ({"item_types": "music"}, "item_types", "list of item types"),
        ({"item_types": ["music"], "quotas": {"podcast": 2}}, "item_types", "omit one of the two"),
        ({"quotas": 5}, "quotas", "at least one"),
        ({"tastes": [1.0]}, "tastes", "map names"),
        ({"tastes": {"music": 1.0}}, "tastes.music", "list of numbers"),
        ({"tastes": {"music": [1.0, True, 2.0, 3.0]}}, "tastes.music", "list of numbers"),
        ({"include_seen": 1}, "include_seen", "true or false"),
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


def test_what_a_bundle_does_not_know_of_a_history_is_ignored_and_told(world, recommender):
    day = {"item_id": world.item_ids[3], "timestamp": "2023-10-05T10:00:00+02:00"}
    told = recommender.answer(Question(history=[{"item_id": "gone"}, day, {"item_id": 77}], k=3))
    assert told.ignored == ["gone", "77"] and not told.cold
    alike = {"item_id": world.item_ids[3], "timestamp": 1_696_492_800}
    assert told.items == recommender.recommend(history=[alike], k=3)
    assert recommender.answer(Question(history=[{"item_id": "gone"}])).cold


def test_many_questions_at_once_are_answered_as_one_by_one(world, recommender):
    questions = [
        Question(world.user_ids[1]),
        Question("nobody", k=5),
        Question(k=0),
        Question(world.user_ids[5], item_types=["music"], k=4, exclude=[world.item_ids[50]]),
        Question(history=[{"item_id": STRANGE_IDS[0]}], filters=Filters(languages=("de",))),
        Question(age=30, country="SE"),
    ]
    together = recommender.answers(questions)
    for question, answer in zip(questions, together, strict=True):
        if question.k == 0:
            assert isinstance(answer, RequestError) and answer.field == "k"
            continue
        alone = recommender.answer(question)
        assert [(i.item_id, i.reason) for i in answer.items] == [(i.item_id, i.reason) for i in alone.items]
        assert [i.score for i in answer.items] == pytest.approx([i.score for i in alone.items], abs=1e-5)
    assert recommender.answers([]) == []


def keeps(item_id: str, filters: Filters) -> bool:
    mine, date = set(categories_of(item_id)), published(item_id)
    return (
        (not filters.languages or language_of(item_id) in filters.languages)
        and (not filters.categories_any or bool(mine & set(filters.categories_any)))
        and mine >= set(filters.categories_all)
        and not mine & set(filters.categories_none)
        and (filters.published_after is None or (date is not None and date >= filters.published_after))
        and (filters.published_before is None or (date is not None and date < filters.published_before))
    )


FILTERS = st.builds(
    Filters,
    languages=st.sampled_from([(), ("de",), ("de", "en"), ("fr",)]),
    categories_any=st.sampled_from([(), ("b",), ("b", "c"), ("nothing",)]),
    categories_all=st.sampled_from([(), ("a",), ("a", "c")]),
    categories_none=st.sampled_from([(), ("b",), ("nothing",)]),
    published_after=st.sampled_from([None, END - 100 * DAY]),
    published_before=st.sampled_from([None, END - 30 * DAY]),
)


@settings(max_examples=60, deadline=None)
@given(filters=FILTERS, data=st.data())
def test_a_filter_leaves_the_best_of_what_it_allows(world, recommender, filters, data):
    """On both paths, with or without an allow-list: what is left of the whole list, in its order."""
    user = data.draw(st.sampled_from([LONELY, *world.user_ids[:12]]))
    allow = data.draw(st.one_of(st.none(), st.lists(st.sampled_from([*world.item_ids, "no such"]), max_size=60)))
    k = data.draw(st.integers(1, 40))
    everything = recommender.recommend(user, k=500)
    left = [i for i in everything if keeps(i.item_id, filters) and (allow is None or i.item_id in allow)]
    found = recommender.recommend(user, filters=filters, allow=allow, k=k)
    assert ids(found) == ids(left[:k])
    assert [i.score for i in found] == pytest.approx([i.score for i in left[:k]], abs=1e-5)


def test_seen_items_come_back_only_where_they_are_asked_for(world, recommender):
    user = world.user_ids[5]
    again = recommender.recommend(user, k=500, include_seen=True)
    assert {i.item_id for i in again} & world.seen(user)
    assert len(again) == world.available.sum(), "what cannot be had never comes"


def test_quotas_give_each_type_its_places(world, recommender):
    for user in (world.user_ids[1], LONELY):
        found = recommender.recommend(user, quotas={"music": 3, "podcast": 2})
        assert sorted(i.item_type for i in found) == ["music"] * 3 + ["podcast"] * 2
        assert [i.score for i in found] == sorted((i.score for i in found), reverse=True)
        for name, count in (("music", 3), ("podcast", 2)):
            alone = recommender.recommend(user, item_types=[name], k=count)
            assert ids(i for i in found if i.item_type == name) == ids(alone)


def test_diversity_takes_items_that_differ(world, recommender):
    def likeness(items: list) -> float:
        vectors = world.vectors[[world.item_ids.index(i.item_id) for i in items]]
        return float((vectors @ vectors.T)[np.triu_indices(len(items), 1)].mean())

    user = world.user_ids[1]
    plain, diverse = recommender.recommend(user, k=8), recommender.recommend(user, k=8, diversity=0.7)
    assert likeness(diverse) < likeness(plain) - 0.05
    assert diverse[0] == plain[0], "the first one is the best one"
    assert ids(recommender.recommend(user, k=8, diversity=1e-9)) == ids(plain)


def test_popularity_raises_and_lowers_what_is_popular(world, recommender):
    def users(items: list) -> float:
        return float(recommender.popularity.counted.world[[world.item_ids.index(i.item_id) for i in items]].mean())

    user = world.user_ids[1]
    lowered, plain, raised = (users(recommender.recommend(user, k=10, popularity=dial)) for dial in (-1, 0, 1))
    assert lowered < plain < raised


def test_each_item_names_what_speaks_for_it(world, recommender):
    user = world.user_ids[1]
    found = recommender.recommend(user, k=5)
    past = {event.item_id for event in recommender.history(user, 100)}
    for item in found:
        assert item.because in past and f'"Title of {item.because}"' in item.reason
    assert all(item.because is None for item in recommender.recommend(LONELY))


def test_popular_with_filters(world, recommender):
    filters = Filters(categories_all=("b",))
    found = recommender.popular(k=7, item_types=["music"], filters=filters)
    assert found == [i for i in recommender.popular(k=500) if i.item_type == "music" and keeps(i.item_id, filters)][:7]


def fresh(recommender, world, like: str, **record) -> tuple[str, dict, LiveVectors]:
    """A new item with the vector of another one."""
    gid = world.item_ids.index(like)
    told = {"item_type": TYPES[world.ntype[gid]], "title": f"Fresh {like}", **record}
    wide = np.append(world.vectors[gid], 5.0).astype(np.float32)  # it is given so much that it comes first
    return f"new {like}", told, LiveVectors(recommender.version, wide, recommender.hgnn[gid], NO_RAISERS)


@pytest.fixture
def alive(world) -> Recommender:
    return Recommender.load(world.root)


def test_new_items_come_on_every_path_and_deleted_ones_on_none(world, alive):
    user, like = world.user_ids[1], next(i for g, i in enumerate(world.item_ids) if world.available[g] and g > 80)
    new = fresh(alive, world, like, language="de", categories=["x"], published_at=END)
    gone = [item_id for item_id in ids(alive.recommend(user, k=500)) if item_id != like][:2]
    alive.apply(3, [*gone, "never was"], [new])
    assert alive.live.change == 3
    cases: list[dict] = [
        {},
        {"item_types": ["podcast"]},
        {"filters": Filters(languages=("de",), categories_all=("x",))},
        {"allow": ["new " + like, like]},
        {"diversity": 0.2, "popularity": 0.5},
        {"quotas": {"podcast": 2}},
        {"history": [{"item_id": like}]},
    ]
    for fields in cases:
        found = alive.recommend(user, k=500, **fields)
        assert found[0].item_id == "new " + like and found[0].title == f"Fresh {like}"
        assert not set(gone) & set(ids(found))
    assert ids(alive.recommend("nobody", allow=["new " + like, like])) == [like]
    assert "new " + like not in ids(alive.recommend(user, k=500, exclude=["new " + like]))
    assert "new " + like not in ids(alive.recommend(user, k=500, filters=Filters(languages=("en",))))
    told = alive.answer(Question(user, history=[{"item_id": "new " + like}], k=500))
    assert told.ignored == [] and "new " + like not in ids(told.items), "it is seen"
    assert "new " + like in ids(alive.similar(like, k=3)) and ids(alive.similar("new " + like, k=1)) == [like]
    assert gone[0] not in ids(alive.popular(k=500)) + ids(alive.similar(like, k=500))
    with pytest.raises(UnknownItem):
        alive.similar(gone[0])


def test_a_changed_item_keeps_what_its_users_tell_of_it(world, alive):
    """Its vector, its popularity and what the memory knows are the bundle's; words, facts and availability are new."""
    user = world.user_ids[9]
    before, popular = alive.recommend(user, k=500), alive.popular(k=500)
    like = before[2].item_id
    near = alive.similar(like, k=20)
    _, record, vectors = fresh(alive, world, like, language="xx", categories=["rare"])
    alive.apply(1, [], [(like, record, replace(vectors, version="of any bundle"))])

    def untitled(items) -> list:
        return [(item.item_id, item.score) for item in items]

    assert untitled(alive.recommend(user, k=500)) == untitled(before) and like in ids(before)
    assert untitled(alive.popular(k=500)) == untitled(popular) and untitled(alive.similar(like, k=20)) == untitled(near)
    assert [i.title for i in alive.recommend(user, k=500) if i.item_id == like] == [f"Fresh {like}"]
    rare, old = Filters(languages=("xx",), categories_all=("rare",)), Filters(languages=(language_of(like),))
    assert ids(alive.recommend(user, filters=rare)) == ids(alive.popular(filters=rare)) == [like]
    assert like not in ids(alive.recommend(user, k=500, filters=old)) + ids(alive.popular(k=500, filters=old))
    assert [one.title for one in alive.search(f"Fresh {like}")] == [f"Fresh {like}"]
    assert alive.name(alive.find(like)) == f"Fresh {like}"
    assert like not in [one.item_id for one in alive.search(like)][1:]


def test_a_changed_item_can_go_and_come_back(world, alive):
    user = world.user_ids[9]
    before = alive.recommend(user, k=500)
    like = before[2].item_id
    _, record, vectors = fresh(alive, world, like)
    alive.apply(1, [], [(like, {**record, "hidden": True}, vectors)])
    for found in (alive.recommend(user, k=500), alive.popular(k=500), alive.similar(ids(before)[1], k=500)):
        assert like not in ids(found)
    assert alive.find(like) is not None
    alive.apply(2, [like], [])
    assert like not in ids(alive.recommend(user, k=500)) and alive.find(like) is None and not alive.live.changed
    alive.apply(3, [], [(like, record, vectors)])
    assert ids(alive.recommend(user, k=500)) == ids(before)


def test_an_item_that_was_not_available_comes_with_its_own_vector(world, alive):
    gid, user = next(g for g in range(len(world.item_ids)) if not world.available[g]), world.user_ids[9]
    name, (_, record, vectors) = world.item_ids[gid], fresh(alive, world, world.item_ids[gid])
    alive.apply(1, [], [(name, record, vectors)])
    (place,) = alive.live.items
    assert place.item_id == name and np.array_equal(alive.live.wide[0], alive.score.wide[gid])
    assert name in ids(alive.recommend(user, k=500))


def test_an_item_that_was_not_available_keeps_its_place_in_the_memory(world, alive):
    memory, hidden = alive.score.memory, [g for g, there in enumerate(world.available) if not there]
    gid = hidden[0] if memory is None else next(g for g in hidden if (memory.gid == g).any())
    name, (_, record, vectors) = world.item_ids[gid], fresh(alive, world, world.item_ids[gid])
    alive.apply(1, [], [(name, record, vectors)])
    pasts = [alive.histories.recent(uid).gids for _, uid in alive.users.spread(60)]
    owner, gids = np.repeat(np.arange(len(pasts)), list(map(len, pasts))), np.concatenate(pasts)
    found = alive.score.raised_new(owner, gids, alive.live.memory)
    want = alive.score.raised(owner, gids)
    mine = want.gid == gid
    assert found.user.tolist() == want.user[mine].tolist() and not found.gid.any()
    np.testing.assert_allclose(found.value, want.value[mine], rtol=1e-6)
    assert (len(found.user) > 0) == (memory is not None)


def test_an_item_that_changes_its_type_is_a_new_one(world, alive):
    gid, user = next(g for g in range(len(world.item_ids)) if world.available[g]), world.user_ids[9]
    name, (_, record, vectors) = world.item_ids[gid], fresh(alive, world, world.item_ids[gid])
    other = next(kind for kind in TYPES if kind != record["item_type"])
    alive.apply(1, [], [(name, {**record, "item_type": other}, vectors)])
    assert [item.item_type for item in alive.recommend(user, k=500) if item.item_id == name] == [other]
    assert not alive.live.changed and len(alive.live.items) == 1


def test_what_another_bundle_made_of_an_item_is_passed_over(world, alive):
    name, record, vectors = fresh(alive, world, world.item_ids[0])
    other = [(name, record, replace(vectors, version="another")), (name, {**record, "item_type": "film"}, vectors)]
    alive.apply(1, [], other)
    assert not alive.live.items and alive.live.change == 1
    packed = LiveVectors.unpack(vectors.pack())
    assert packed.version == vectors.version and np.array_equal(packed.wide, vectors.wide)


def test_the_memory_raises_a_new_item_for_those_who_had_items_with_such_a_text(world, alive):
    name, record, vectors = fresh(alive, world, world.item_ids[0])
    pasts = {user: alive.histories.recent(uid).gids for user, uid in alive.users.spread(60)}
    mine = next(user for user, past in pasts.items() if len(past) > 5)
    last = pasts[mine][-1]
    others = [user for user, past in pasts.items() if len(past) and last not in past]

    def scores(raisers: Raisers) -> list[float]:
        made = LiveVectors.unpack(replace(vectors, raisers=raisers).pack())
        alive.apply(alive.live.change + 1, [], [(name, record, made)])
        answers = alive.answers([Question(user, k=500) for user in (others[0], mine, others[1])])
        return [next(item.score for item in one.items if item.item_id == name) for one in answers]

    plain = scores(NO_RAISERS)
    told = Raisers(np.array([last, len(world.item_ids) + 9], np.int32), np.array([0.2, 0.2], np.float32))
    score, past = alive.score, pasts[mine]
    weight = latest(np.zeros(len(past), int), past, len(world.item_ids), score.half_life)[2][-1]
    more = score.weight * np.log1p(0.2 * weight / SMALL) if score.memory is not None else 0.0
    assert np.subtract(scores(told), plain).tolist() == pytest.approx([0.0, more, 0.0], abs=1e-5)


def test_what_is_popular_obeys_the_dials(recommender):
    """A user of whom nothing is known gets other lists with the dials than without, of the same items that may come."""
    plain = [item.item_id for item in recommender.recommend(k=10)]
    mixed = recommender.recommend(k=10, diversity=0.9)
    assert {item.item_id for item in mixed} - set(plain)
    scores = [item.score for item in mixed]
    assert scores != sorted(scores, reverse=True)  # the dial's order, not that of the shares of users
    rare = [item.item_id for item in recommender.recommend(k=10, popularity=-1.0, exclude=plain[:2])]
    assert len(rare) == 10 and set(rare).isdisjoint(plain[:2]) and rare != plain
    quotas = recommender.recommend(quotas={"music": 2, "podcast": 3}, diversity=0.5)
    assert sorted(item.item_type for item in quotas) == ["music"] * 2 + ["podcast"] * 3
