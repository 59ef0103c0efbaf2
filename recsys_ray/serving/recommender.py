"""Answers "what next?" from a bundle: the user tower, then the index, without items that are not allowed.

Runs without Ray; ``serve`` puts it behind HTTP and ``recsys-ray recommend`` calls it directly. Single-threaded: with
few granted CPUs, thread pools only compete.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recsys_ray.core.clock import DAY
from recsys_ray.core.offsets import check_offsets, spread
from recsys_ray.scoring.memory import MEMORY_FILE, NO_RAISERS, Memory, Recalled
from recsys_ray.scoring.scorer import Pairs, Ranked, Scorer, ScoreSpec, among, as_queries
from recsys_ray.serving.answers import Answer, Asked, FoundItem, Listed, PastEvent, Recommendation
from recsys_ray.serving.catalogue import Items, Users
from recsys_ray.serving.filters import FACTS, Facts, Filters
from recsys_ray.serving.histories import Histories, Profile, mapped_arrays, user_inputs
from recsys_ray.serving.index import TypeIndex, check_metric, index_file
from recsys_ray.serving.laps import Laps
from recsys_ray.serving.live import LiveItem, LiveItems, LiveVectors
from recsys_ray.serving.popularity import Popularity, PopularLists
from recsys_ray.serving.reasons import because, fits
from recsys_ray.serving.requests import (
    MAX_K,
    Question,
    RequestError,
    UnknownItem,
    check_age,
    check_flag,
    check_history,
    check_id,
    check_items,
    check_k,
    check_quotas,
    check_share,
    check_tastes,
    check_types,
)
from recsys_ray.serving.rerank import diverse, pool_size, with_popularity
from recsys_ray.serving.search import ItemSearch
from recsys_ray.serving.tower import TowerRunner
from recsys_ray.storage.artifacts import MANIFEST, Artifact, open_artifact, understood
from recsys_ray.storage.outputs import find_bundle

_FILTERED = 64  # filters and types of which a byte for each item is remembered; they go when items change
_MASKS = 16  # filters of which a byte for each item is remembered beside them
_NO_FILTERS = Filters()
_NOTHING = np.empty(0, np.float32)


@dataclass
class Recommender:
    """Everything of one bundle, read-only and memory-mapped. Use :meth:`load`."""

    artifact: Artifact
    items: Items
    users: Users
    histories: Histories
    popularity: PopularLists
    indexes: list[TypeIndex]
    tower: TowerRunner
    score: Scorer
    hgnn: npt.NDArray[np.float32]  # [items, h]: finds the reasons of an answer
    facts: Facts
    live: LiveItems
    _country_of: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mask = lru_cache(maxsize=_MASKS)(lambda filters, live: live.allowed(self.facts.allowed(filters), filters))
        self._filtered = lru_cache(maxsize=_FILTERED)(
            lambda filters, kind, live: self._mask(filters, live)[self.indexes[kind].gids]
        )

    @classmethod
    def load(cls, path: str | Path, verify: bool = True, warm: bool = True) -> Recommender:
        """Open the bundle that ``path`` means (see :func:`find_bundle`).

        Args:
            verify: compare every file with its checksum, not only its size.
            warm: answer a few users before the first one asks, so that a damaged file is found here.

        Raises:
            ArtifactError: there is no bundle, a file is damaged, or tower and index rank by different metrics.
        """
        folder = find_bundle(path)
        artifact = open_artifact(folder, verify)
        counts = artifact.counts
        torch.set_num_threads(1)
        with understood(folder / MANIFEST):
            types, metric, countries = list(counts["item_types"]), counts["metric"], list(counts["countries"])
            settings = [counts["indexes"][name] for name in types]
            check_metric(metric, folder)
        with understood(folder / "items.arrow"):
            items = Items(folder, types)
        with understood(folder / "vectors.safetensors"):
            vectors = mapped_arrays(folder / "vectors.safetensors")["vector"].numpy()
            if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(items):
                raise ValueError(f"not one float32 vector for each of {len(items)} items")
        with understood(folder / "user_tower"):
            tower = TowerRunner.open(folder, torch.from_numpy(items.ntype.astype(np.int64)))
            check_metric(tower.tower.spec.metric, folder / "user_tower")
            spec = ScoreSpec.load(folder / "user_tower")
        with understood(folder / "hgnn.safetensors"):
            hgnn = mapped_arrays(folder / "hgnn.safetensors")["embedding"].numpy()
        indexes = []
        for number, name in enumerate(types):
            file = folder / index_file(number)
            with understood(file):
                indexes.append(TypeIndex.load(file, name, items.offered(number), vectors, settings[number]))
        with understood(folder / "popularity.safetensors"):
            popular = PopularLists(
                Popularity.load(folder / "popularity.safetensors"), items.ntype, items.available != 0
            )
        memory = None
        with understood(folder / MEMORY_FILE):
            if (folder / MEMORY_FILE).exists():
                memory = Memory(**{name: table.numpy() for name, table in mapped_arrays(folder / MEMORY_FILE).items()})
                check_offsets(memory.begin, len(memory.gid))
            score = Scorer(vectors, memory, spec.memory, spec.half_life)
        with understood(folder / FACTS):
            facts = Facts(folder)
        with understood(folder / "users.safetensors"):
            users, histories = Users(folder), Histories(folder / "histories.safetensors")
        numbers = {name: number for number, name in enumerate(countries)}
        live = LiveItems(len(items))
        with understood(folder):
            made = cls(artifact, items, users, histories, popular, indexes, tower, score, hgnn, facts, live, numbers)
        if warm:
            made.warm_up(3)
        return made

    def warm_up(self, count: int) -> None:
        """Answer ``count`` users before the first one asks: the first queries read the maps from disk and let torch set
        itself up.

        Raises:
            ArtifactError: a file is damaged.
        """
        with understood(self.artifact.path):
            users = self.example_users(count)
            self.answers([Question(user_id) for user_id in users])
            for user_id in users[:3]:
                self.recommend(user_id, k=10)
            self.recommend(k=10)
            self.similar(self.items.id(0), k=10)

    @property
    def version(self) -> str:
        return self.artifact.counts["version"]

    @property
    def item_types(self) -> list[str]:
        return self.items.types

    def made(self, vectors: LiveVectors) -> bool:
        """Whether these are vectors of this bundle's models, or of the same run's."""
        widths = self.score.wide.shape[1], self.hgnn.shape[1]
        return vectors.version == self.artifact.counts["base"] and (len(vectors.wide), len(vectors.hgnn)) == widths

    def apply(
        self, change: int, gone: Sequence[str], new: Sequence[tuple[str, Mapping[str, Any], LiveVectors]]
    ) -> None:
        """Take changes of items into the answers that begin after this: ids that must not come any more, and new or
        changed items (id, columns of the items table, vectors). New items with vectors that another bundle's models
        made, and types that this one does not know, are passed over. ``change``: number of the last change."""
        changed, fresh = list[tuple[LiveItem, int]](), list[tuple[LiveItem, LiveVectors, int | None]]()
        for name, record, vectors in new:
            if record["item_type"] not in self.items.types:
                continue
            item, gid = LiveItem.of(name, self.items.types.index(record["item_type"]), record), self.items.find(name)
            if gid is None or self.items.ntype[gid] != item.ntype:
                fresh += [(item, vectors, gid)] if self.made(vectors) else []
            elif self.items.available[gid]:
                changed.append((item, gid))
            else:  # no index has it, but its vectors are there, and its place in the memory
                wide, hgnn = np.array(self.score.wide[gid]), np.array(self.hgnn[gid])
                raisers = NO_RAISERS if self.score.memory is None else self.score.memory.raisers(gid)
                own = LiveVectors(vectors.version, wide, hgnn, raisers)
                fresh.append((item, own, gid))
        self.live = self.live.after(change, [(name, self.items.find(name)) for name in gone], changed, fresh)

    def recommend(self, user_id: str | None = None, **fields: Any) -> list[Recommendation]:
        """The best items for a user; ``fields`` are those of :class:`Question`, as are the errors of :meth:`answer`."""
        return self.answer(Question(user_id, **fields)).items

    def answer(self, question: Question) -> Answer:
        """What one user should get next.

        Raises:
            RequestError: a value that cannot be used; names the field.
        """
        (answer,) = self.answers([question])
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def answers(self, questions: Sequence[Question], laps: Laps | None = None) -> list[Answer | RequestError]:
        """An answer or an error for each question. Together they take less time than one after the other, because one
        matrix product computes all users' vectors. ``laps`` records the time of features, tower, search and rules."""
        laps = laps or Laps()
        answers: list[Answer | RequestError] = []
        for found in self.lists(questions, laps):
            if isinstance(found, RequestError):
                answers.append(found)
            else:
                told = self._told(found)
                answers.append(Answer(self.version, found.known, told, found.asked.ignored, found.cold))
        laps.lap("rules")
        return answers

    def lists(self, questions: Sequence[Question], laps: Laps | None = None) -> list[Listed | RequestError]:
        """As :meth:`answers`, without the words."""
        laps = laps or Laps()
        asked: list[Asked | RequestError] = []
        for question in questions:
            try:
                asked.append(self._ask(question))
            except RequestError as error:
                asked.append(error)
        known = [one for one in asked if isinstance(one, Asked) and self._has_features(one.profile)]
        laps.lap("features")
        by_taste = dict(zip(map(id, known), self._by_taste(known, laps), strict=True)) if known else {}
        lists: list[Listed | RequestError] = []
        for one in asked:
            if isinstance(one, Asked):
                lists.append(by_taste[id(one)] if id(one) in by_taste else self._by_popularity(one))
            else:
                lists.append(one)
        return lists

    def popular(
        self,
        k: int = 10,
        item_types: Sequence[str] | None = None,
        country: str | None = None,
        filters: Filters = _NO_FILTERS,
    ) -> list[Recommendation]:
        """What is popular, for everyone or in a country; errors as :meth:`answer`."""
        asked = self._ask(Question(country=country, item_types=item_types, k=k, filters=filters))
        return self._told(self._by_popularity(asked))

    def similar(self, item_id: str, k: int = 10, item_types: Sequence[str] | None = None) -> list[Recommendation]:
        """The items whose vectors are nearest to that of ``item_id``, which is not among them.

        Raises:
            UnknownItem: there is no such item.
            RequestError: another value that cannot be used.
        """
        check_k(k)
        types = check_types(item_types, self.items.types)
        live = self.live
        gid = self.find(item_id)
        if gid is None:
            raise UnknownItem("item_id", f"there is no item {item_id!r}")
        query = self._rows(live, np.array([gid]), "wide")[0]
        query[-1] = 0  # likeness has nothing to do with what every user is given
        barred = np.unique(np.append(live.barred, gid))
        asked = replace(self._ask(Question(item_types=item_types, k=k)), barred=barred, live=live)
        forbidden = Pairs(np.zeros(len(barred), np.int64), barred)
        found = [self.indexes[kind].search_each(query[None], k, forbidden) for kind in types]
        alike = live.wide @ query if len(live.ntype) else _NOTHING
        best = Ranked.best([*found, *(self._live_candidates([asked], kind, alike[None]) for kind in types)], k)
        reason = f'similar to "{self.name(gid)}"'
        return [self._item(live, g, s, reason) for g, s in zip(best.gid.tolist(), best.score.tolist(), strict=True)]

    def search(self, text: str, limit: int = 10) -> list[FoundItem]:
        """Items that have the words of ``text`` in title or id: new ones, then the bundle's, the most popular first."""
        live, types = self.live, self.item_types
        found = [FoundItem(one.item_id, types[one.ntype], one.title, one.available) for one in live.search(text, limit)]
        for gid in self._search.find(text, limit - len(found), live.stale):
            available = bool(self.items.available[gid])
            found.append(FoundItem(self.items.id(gid), self.items.type(gid), self.items.title(gid), available))
        return found

    @cached_property
    def _search(self) -> ItemSearch:
        """Made when somebody searches: it takes seconds for a million items."""
        return self.items.search(np.argsort(self.popularity.counted.rank, kind="stable"))

    def find(self, item_id: str) -> int | None:
        """The gid of an item of the bundle, or of one added since; None for a removed one."""
        gid = self.live.find(item_id)
        if gid is None and (known := self.items.find(item_id)) is not None:
            gid = None if among(np.array([known]), self.live.removed)[0] else known
        return gid

    def name(self, gid: int) -> str:
        """In sentences: the title, or the id of an item without one."""
        state = self.live.get(gid)
        return self.items.name(gid) if state is None else state.title or state.item_id

    def _title(self, gid: int) -> str:
        state = self.live.get(gid)
        return self.items.title(gid) if state is None else state.title

    def history(self, user_id: str, limit: int = 10) -> list[PastEvent]:
        """The user's latest events inside the window, newest first; empty for an unknown user."""
        uid = self.users.find(user_id)
        if uid is None:
            return []
        recent, names = self.histories.recent(uid), self.artifact.counts["events"]
        rows = list(zip(recent.gids, recent.events, recent.timestamps, strict=True))[::-1][:limit]
        return [
            PastEvent(self.items.id(gid), self.items.type(gid), self._title(gid), names[event], int(moment))
            for gid, event, moment in ((int(g), int(e), t) for g, e, t in rows)
        ]

    def example_users(self, count: int = 5) -> list[str]:
        """Ids of up to this many users with recent events, spread over the table."""
        offered = (pair for pair in self.users.spread(40 * count))
        busy = [user_id for user_id, uid in offered if len(self.histories.recent(uid).gids) >= 3]
        if not busy:
            return [user_id for user_id, _ in self.users.spread(count)]
        return [busy[place] for place in np.unique(np.linspace(0, len(busy) - 1, min(count, len(busy))).astype(int))]

    def _ask(self, question: Question) -> Asked:
        """Check a question. Raises RequestError."""
        counts, none = self.artifact.counts, np.empty(0, np.int64)
        quotas = check_quotas(question.quotas, self.items.types)
        types = check_types(question.item_types, self.items.types)
        if quotas is not None:
            if question.item_types is not None and types != sorted(quotas):
                raise RequestError("item_types", "quotas already name the item types; omit one of the two fields")
            types = sorted(quotas)
        check_k(question.k)
        check_share("diversity", question.diversity, 0)
        check_share("popularity", question.popularity, -1)
        check_flag("include_seen", question.include_seen)
        user_id = None if question.user_id is None else check_id("user_id", question.user_id)
        uid = None if user_id is None else self.users.find(user_id)
        stored = Profile(none, none, none)
        if uid is not None:
            stored = self.users.traits(uid, self.histories.recent(uid))
        events = counts["events"], counts["default_event"], counts["end"]
        new, ignored = check_history(question.history, self.items, *events)
        age, fresh = check_age(question.age), check_tastes(question.tastes, self.tower.tastes)
        if question.country is not None and not isinstance(question.country, str):
            raise RequestError("country", f"must be a string, not {question.country!r}")
        profile = self._with_events(stored, new)
        profile = replace(
            profile,
            age=profile.age if age is None else age,
            country=profile.country if question.country is None else self._country_of.get(question.country, -1),
            tastes=profile.tastes | fresh,
        )
        live = self.live
        ignored = [item_id for item_id in ignored if live.find(item_id) is None]
        barred = [check_items("exclude", self.items, question.exclude, live), live.barred]
        if not question.include_seen:
            barred.append(none if uid is None else self.histories.seen(uid))
            named = [entry["item_id"] for entry in question.history or ()]
            barred.append(check_items("history", self.items, named, live))
        allow = None if question.allow is None else check_items("allow", self.items, question.allow, live)
        return Asked(question, profile, uid is not None, types, quotas, _union(barred), allow, ignored, live)

    def _with_events(self, stored: Profile, new: list[tuple[int, int, int]]) -> Profile:
        """The latest events inside the window, as in training. Events in a request are used even if all of them are
        older, because the caller wants them to count."""
        if not new:
            return stored
        added = np.array(new, np.int64)
        moments = np.concatenate([stored.timestamps, added[:, 0]])
        order = np.argsort(moments, kind="stable")
        days = self.artifact.counts["window_days"]
        if days is not None:
            last = max(int(self.artifact.counts["end"]), new[-1][0])
            inside = order[moments[order] >= last - days * DAY]
            order = inside if len(inside) else order
        order = order[-self.artifact.counts["history"] :]
        gids, events = np.concatenate([stored.gids, added[:, 1]]), np.concatenate([stored.events, added[:, 2]])
        return replace(stored, gids=gids[order], events=events[order], timestamps=moments[order])

    def _has_features(self, profile: Profile) -> bool:
        """The tower answers for a user with events, and for one with traits only if it was trained on such users."""
        return bool(len(profile.gids)) or (self.artifact.counts["cold_start"] and bool(profile.known_traits))

    def _by_taste(self, asked: Sequence[Asked], laps: Laps) -> list[Listed]:
        """Answers by tower and index, for users about whom something is known."""
        profiles = [one.profile for one in asked]
        users = self.tower(user_inputs(profiles, self.tower.tastes))
        laps.lap("tower")
        owner = np.repeat(np.arange(len(asked)), [len(profile.gids) for profile in profiles])
        raised = self.score.raised(owner, np.concatenate([profile.gids for profile in profiles]))
        begin = np.searchsorted(raised.user, np.arange(len(asked) + 1))
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for number, one in enumerate(asked):
            alike[one.likeness].append(number)
        found: dict[int, Listed] = {}
        for numbers in alike.values():
            group, count = [asked[number] for number in numbers], np.diff(begin)[numbers]
            places = spread(begin[numbers], count)
            mine = Recalled(np.repeat(np.arange(len(group)), count), raised.gid[places], raised.value[places])
            found |= zip(numbers, self._rank(group, users[numbers], mine, laps), strict=True)
        return [found[number] for number in range(len(asked))]

    def _rank(
        self, group: Sequence[Asked], users: npt.NDArray[np.float32], raised: Recalled, laps: Laps
    ) -> list[Listed]:
        """The answers to questions that are alike. ``raised``: what the users' histories raise."""
        one, found = group[0], []
        row = np.repeat(np.arange(len(group)), [len(each.barred) for each in group])
        barred = Pairs(row, np.concatenate([each.barred for each in group]))
        plain = not one.quotas and not one.reranked
        new = self._live_scores(group, users) if len(one.live.ntype) else None
        for types in [one.types] if plain else [[kind] for kind in one.types]:
            wanted = one.wanted(types[0])
            pool, indexes = self._pool(one, wanted), [self.indexes[kind] for kind in types]
            allowed = [self._allowed_in(one, kind) for kind in types]
            laps.lap("rules")
            best = self.score.candidates(indexes, users, raised, pool, barred, allowed)
            laps.lap("search")
            if new is not None:
                best = Ranked.best([best, *(self._live_candidates(group, kind, new) for kind in types)], pool)
            if one.quotas and one.reranked:
                best = self._reranked(group, best, wanted)
            found.append(best)
        best = found[0] if plain else Ranked.best(found, MAX_K * len(found))
        if one.reranked and not one.quotas:
            best = self._reranked(group, best, one.question.k)
        begin = np.searchsorted(best.row, np.arange(len(group) + 1))
        return [
            Listed(each, best.gid[a:b], best.score[a:b]) for each, a, b in zip(group, begin, begin[1:], strict=False)
        ]

    def _reranked(self, group: Sequence[Asked], pool: Ranked, k: int) -> Ranked:
        begin, parts = np.searchsorted(pool.row, np.arange(len(group) + 1)), []
        for number, (a, b) in enumerate(itertools.pairwise(begin)):
            scores, gids = self._rerank(group[number], pool.score[a:b], pool.gid[a:b], k)
            parts.append(Ranked(np.full(len(gids), number), gids, scores))
        return Ranked(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _live_scores(self, group: Sequence[Asked], users: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of all new items [group, new], by their places; ``users``: vectors [group, d]."""
        live, histories = group[0].live, [one.profile.gids for one in group]
        owner = np.repeat(np.arange(len(group)), [len(gids) for gids in histories])
        raised = self.score.raised_new(owner, np.concatenate(histories), live.memory)
        scores = as_queries(users) @ live.wide.T
        scores[raised.user, raised.gid] += raised.value[:, 0]
        return scores

    def _live_candidates(self, group: Sequence[Asked], kind: int, scores: npt.NDArray[np.float32]) -> Ranked:
        """New items of a type that may come; ``scores``: of all new items [group, new]."""
        live, filters, parts = group[0].live, group[0].question.filters, []
        places = [
            place
            for place in np.flatnonzero(live.ntype == kind).tolist()
            if live.items[place].available and (not filters or live.items[place].fits(filters))
        ]
        gids = live.base + np.array(places, np.int64)
        for number, asked in enumerate(group):
            may = ~among(gids, asked.barred)
            if asked.allow is not None:
                may &= among(gids, asked.allow)
            mine = gids[may]
            parts.append((np.full(len(mine), number), mine, scores[number, mine - live.base]))
        return Ranked.best(parts, len(gids))

    def _rows(self, live: LiveItems, gids: npt.NDArray[np.int64], of: str) -> npt.NDArray[np.float32]:
        """Rows of ``wide`` or ``hgnn`` of items of the bundle and of new ones."""
        table = self.score.wide if of == "wide" else self.hgnn
        old = np.minimum(gids, len(table) - 1)
        rows = np.array(table[old], np.float32)
        new = gids >= live.base
        if new.any():
            rows[new] = getattr(live, of)[gids[new] - live.base]
        return rows

    def _allowed_in(self, asked: Asked, kind: int) -> npt.NDArray[np.bool_] | None:
        """By position in a type's index: what filters and allow-list leave; None: all."""
        filters = asked.question.filters
        filtered = self._filtered(filters, kind, asked.live) if filters else None
        if asked.allow is None:
            return filtered
        listed = self.indexes[kind].mask(asked.allow)
        return listed if filtered is None else listed & filtered

    def _rerank(
        self, asked: Asked, scores: npt.NDArray[np.float32], gids: npt.NDArray[np.int64], k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The best ``k`` of a pool by the question's two dials. The scores stay what they are."""
        if len(gids) <= 1:
            return scores, gids
        values, question = scores.astype(np.float64), asked.question
        if question.popularity:
            world = self.popularity.counted.world
            users = np.where(gids < len(world), world[np.minimum(gids, len(world) - 1)], 0)
            values = with_popularity(values, users, question.popularity)
        if question.diversity:
            order = diverse(values, self._rows(asked.live, gids, "wide")[:, :-1], question.diversity, k)
        else:
            order = np.lexsort((gids, -values))[:k]
        return scores[order], gids[order]

    def _by_popularity(self, asked: Asked) -> Listed:
        mask = None
        if asked.question.filters:
            mask = self._mask(asked.question.filters, asked.live)
        if asked.allow is not None:
            listed = np.zeros(len(self.items), bool)
            listed[asked.allow[asked.allow < len(listed)]] = True  # not of items added since, which are unseen
            mask = listed if mask is None else mask & listed
        groups = [(asked.types, asked.question.k)]
        if asked.quotas:
            groups = [([kind], count) for kind, count in asked.quotas.items()]
        country = asked.profile.country
        parts = [self._popular_group(asked, types, count, country, mask) for types, count in groups]
        scores, gids, local = (np.concatenate(part) for part in zip(*parts, strict=True))
        # the dials have their own order; without them the lists of several types are merged by score
        order = np.arange(len(scores)) if asked.reranked else np.argsort(-scores, kind="stable")
        return Listed(asked, gids[order], scores[order], local[order])

    def _popular_group(
        self, asked: Asked, types: list[int], count: int, country: int, mask: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Scores, gids, and whether the country decided, of the most popular items of these types."""
        found = self.popularity.top(self._pool(asked, count), types, asked.barred, country, mask)
        if not asked.reranked:
            return found
        of_country = dict(zip(found[1].tolist(), found[2].tolist(), strict=True))
        scores, gids = self._rerank(asked, found[0].astype(np.float32), found[1], count)
        return scores, gids, np.array([of_country[gid] for gid in gids.tolist()], bool)

    @staticmethod
    def _pool(asked: Asked, wanted: int) -> int:
        """How many candidates are needed for so many places."""
        return pool_size(wanted) if asked.reranked else wanted

    def reasons(self, found: Listed) -> list[tuple[str, str | None]]:
        """Why each item of an answer comes, and the id of the item of the history that speaks most for it: the one
        whose embedding is nearest."""
        asked, profile, names = found.asked, found.asked.profile, self.artifact.counts["events"]
        if found.by_country is not None:
            here = f"popular in {self.artifact.counts['countries'][profile.country]}" if profile.country >= 0 else ""
            scored = zip(found.scores.tolist(), found.by_country.tolist(), strict=True)
            return [
                (here if local else "popular now" if score > 0 else "little known yet", None) for score, local in scored
            ]
        if not len(profile.gids):
            return [(fits(profile.known_traits), None)] * len(found.gids)
        near, past = self._rows(asked.live, found.gids, "hgnn"), self.hgnn[profile.gids]
        # of equally near ones the latest: stable over the reversed history
        nearest = (len(profile.gids) - 1 - (near @ past[::-1].T).argmax(1)).tolist()
        told = {
            place: (because(names[profile.events[place]], self.name(gid)), self.items.id(gid))
            for place, gid in ((place, int(profile.gids[place])) for place in set(nearest))
        }
        return [told[place] for place in nearest]

    def _told(self, found: Listed) -> list[Recommendation]:
        """The items of an answer, with their reasons."""
        parts = zip(found.gids.tolist(), found.scores.tolist(), self.reasons(found), strict=True)
        return [self._item(found.asked.live, gid, score, *why) for gid, score, why in parts]

    def _item(self, live: LiveItems, gid: int, score: float, reason: str, because: str | None = None) -> Recommendation:
        state = live.get(gid)
        if state is not None:
            return Recommendation(state.item_id, self.items.types[state.ntype], state.title, score, reason, because)
        return Recommendation(self.items.id(gid), self.items.type(gid), self.items.title(gid), score, reason, because)


def _union(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The gids of all parts, ascending. Each part is, and has none twice."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else np.unique(np.concatenate([np.empty(0, np.int64), *filled]))
