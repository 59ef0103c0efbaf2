"""Answers "what next?" from a bundle: the user tower, then the index, never an item that must not come.

Runs without Ray; ``serve`` puts it behind HTTP and ``recsys-ray recommend`` asks it directly. One thread: on granted
CPUs the thread pools of torch and FAISS only fight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from recsys_ray.bundle.build import MEMORY, find_bundle
from recsys_ray.core.clock import DAY
from recsys_ray.scoring.memory import Memory
from recsys_ray.scoring.scorer import Scorer, ScoreSpec, among
from recsys_ray.serving.catalogue import Items, Users
from recsys_ray.serving.histories import Histories, Profile, mapped_arrays, user_inputs
from recsys_ray.serving.index import TypeIndex, check_metric, merge_best, search_types
from recsys_ray.serving.popularity import Popularity, PopularLists
from recsys_ray.serving.reasons import because, fits
from recsys_ray.serving.requests import (
    RequestError,
    UnknownItem,
    check_age,
    check_history,
    check_k,
    check_tastes,
    check_types,
    forbidden,
)
from recsys_ray.serving.tower import LoadTower, TowerRunner, load_user_tower
from recsys_ray.storage.artifacts import Artifact, open_artifact

HistoryEntry = Mapping[str, Any]  # item_id, event (optional), timestamp (optional, unix seconds)


@dataclass(frozen=True)
class Recommendation:
    """``score`` as in recsys_ray/scoring/scorer.py; for an answer by popularity the share of users."""

    item_id: str
    item_type: str
    title: str
    score: float
    reason: str


@dataclass(frozen=True)
class Answer:
    version: str
    known: bool  # the user is in the bundle
    items: list[Recommendation]


@dataclass(frozen=True)
class PastEvent:
    item_id: str
    item_type: str
    title: str
    event: str
    timestamp: int


@dataclass(frozen=True)
class _User:
    """The one who asks: what they saw (never to come back) and what makes their features."""

    profile: Profile
    seen: npt.NDArray[np.int64]
    known: bool = False


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
    _country_of: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(
        cls, path: str | Path, verify: bool = True, load_tower: LoadTower = load_user_tower, warm: bool = True
    ) -> Recommender:
        """Open the bundle that ``path`` means (see :func:`find_bundle`).

        Args:
            verify: compare every file with its checksum, not only its size.
            warm: answer once before the first user asks.

        Raises:
            ArtifactError: there is no bundle, a file is damaged, or tower and index rank by different metrics.
        """
        folder = find_bundle(path)
        artifact = open_artifact(folder, verify)
        counts = artifact.counts
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        items = Items(folder, counts["item_types"])
        vectors = mapped_arrays(folder / "vectors.safetensors")["vector"].numpy()
        tower = TowerRunner.open(folder, load_tower, torch.from_numpy(items.ntype.astype(np.int64)))
        check_metric(tower.spec.get("metric"), folder / "user_tower")
        check_metric(counts["metric"], folder)
        indexes = []
        for number, name in enumerate(counts["item_types"]):
            file = folder / "index" / f"t{number}.faiss"
            indexes.append(TypeIndex.load(file, name, items.offered(number), vectors, counts["ef_search"]))
        popular = PopularLists(Popularity.load(folder / "popularity.safetensors"), items.ntype, items.available != 0)
        spec, memory = ScoreSpec.load(folder / "user_tower"), None
        if (folder / MEMORY).exists():
            memory = Memory(**{name: table.numpy() for name, table in mapped_arrays(folder / MEMORY).items()})
        score = Scorer(vectors, memory, spec.memory, spec.half_life)
        histories = Histories(folder / "histories.safetensors")
        numbers = {name: number for number, name in enumerate(counts["countries"])}
        made = cls(artifact, items, Users(folder), histories, popular, indexes, tower, score, _country_of=numbers)
        if warm:
            made._warm_up()
        return made

    @property
    def version(self) -> str:
        return self.artifact.counts["version"]

    @property
    def item_types(self) -> list[str]:
        return self.items.types

    def recommend(
        self,
        user_id: str | None = None,
        history: Sequence[HistoryEntry] | None = None,
        age: float | None = None,
        country: str | None = None,
        tastes: Mapping[str, Sequence[float]] | None = None,
        item_types: Sequence[str] | None = None,
        k: int = 10,
        exclude: Sequence[str] = (),
    ) -> list[Recommendation]:
        """The best ``k`` items for a user; arguments and errors as :meth:`answer`."""
        return self.answer(user_id, history, age, country, tastes, item_types, k, exclude).items

    def answer(
        self,
        user_id: str | None = None,
        history: Sequence[HistoryEntry] | None = None,
        age: float | None = None,
        country: str | None = None,
        tastes: Mapping[str, Sequence[float]] | None = None,
        item_types: Sequence[str] | None = None,
        k: int = 10,
        exclude: Sequence[str] = (),
    ) -> Answer:
        """What this user should get next.

        Args:
            user_id: a user of the bundle; one that it does not know is a new user.
            history: events on top of those that the bundle has of the user.
            age, country, tastes: override what the bundle has; an unknown country counts as absent.
            item_types: what to recommend, None for every type.
            k: how many, 1 to 500; fewer come only where nothing else is allowed.
            exclude: item ids that must not come.

        Raises:
            RequestError: a value that cannot be used; names the field.
        """
        check_k(k)
        types = check_types(item_types, self.items.types)
        user = self._user(user_id, history, age, country, tastes)
        barred = forbidden(self.items, user.seen, exclude)
        if self._has_features(user.profile):
            found = self._by_taste(user.profile, types, k, barred)
        else:
            found = self._by_popularity(user.profile, types, k, barred)
        return Answer(self.version, user.known, found)

    def similar(self, item_id: str, k: int = 10, item_types: Sequence[str] | None = None) -> list[Recommendation]:
        """The items whose vectors are nearest to that of ``item_id``, which is not among them.

        Raises:
            UnknownItem: there is no such item.
            RequestError: another value that cannot be used.
        """
        check_k(k)
        types = check_types(item_types, self.items.types)
        gid = self.items.find(item_id)
        if gid is None:
            raise UnknownItem("item_id", f"there is no item {item_id!r}")
        query = np.array(self.score.wide[gid], np.float32)
        query[-1] = 0  # likeness has nothing to do with what every user is given
        scores, gids = search_types([self.indexes[t] for t in types], query, k, np.array([gid], np.int64))
        reason = f'similar to "{self.items.name(gid)}"'
        return [self._item(int(g), float(s), reason) for s, g in zip(scores, gids, strict=True)]

    def history(self, user_id: str, limit: int = 10) -> list[PastEvent]:
        """The user's latest events inside the window, newest first; empty for an unknown user."""
        uid = self.users.find(user_id)
        if uid is None:
            return []
        recent, names = self.histories.recent(uid), self.artifact.counts["events"]
        rows = list(zip(recent.gids, recent.events, recent.timestamps, strict=True))[::-1][:limit]
        return [
            PastEvent(self.items.id(gid), self.items.type(gid), self.items.title(gid), names[event], int(moment))
            for gid, event, moment in ((int(g), int(e), t) for g, e, t in rows)
        ]

    def example_users(self, count: int = 5) -> list[str]:
        """Ids of users with recent events, spread over the table; fewer where there are not so many."""
        offered = (pair for pair in self.users.spread(40 * count))
        busy = [user_id for user_id, uid in offered if len(self.histories.recent(uid).gids) >= 3]
        if not busy:
            return [user_id for user_id, _ in self.users.spread(count)]
        return [busy[place] for place in np.unique(np.linspace(0, len(busy) - 1, min(count, len(busy))).astype(int))]

    def _user(
        self,
        user_id: str | None,
        history: Sequence[HistoryEntry] | None,
        age: float | None,
        country: str | None,
        tastes: Mapping[str, Sequence[float]] | None,
    ) -> _User:
        counts, none = self.artifact.counts, np.empty(0, np.int64)
        uid = None if user_id is None else self.users.find(user_id)
        stored = Profile(none, none, none)
        if uid is not None:
            stored = self.users.traits(uid, self.histories.recent(uid))
        new = check_history(history, self.items, counts["events"], counts["default_event"], counts["end"])
        age, fresh = check_age(age), check_tastes(tastes, self.tower.tastes)
        if country is not None and not isinstance(country, str):
            raise RequestError("country", f"must be a text, not {country!r}")
        profile = self._with_events(stored, new)
        profile = replace(
            profile,
            age=profile.age if age is None else age,
            country=profile.country if country is None else self._country_of.get(country, -1),
            tastes=profile.tastes | fresh,
        )
        seen = none if uid is None else self.histories.seen(uid)
        seen = np.concatenate([seen, np.array([gid for _, gid, _ in new], np.int64)])
        return _User(profile, seen, uid is not None)

    def _with_events(self, stored: Profile, new: list[tuple[int, int, int]]) -> Profile:
        """The latest events inside the window, as in training. Events that a request names are used even if all of
        them are older: whoever sends them wants them to count."""
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

    def _by_taste(
        self, profile: Profile, types: list[int], k: int, barred: npt.NDArray[np.int64]
    ) -> list[Recommendation]:
        user = self.tower(user_inputs([profile], self.tower.tastes))[0]
        raised = self.score.raised(np.zeros(len(profile.gids), np.int64), profile.gids)
        allowed = (self.items.available[raised.gid] != 0) & ~among(raised.gid, barred)
        gid, value, kind = raised.gid[allowed], raised.value[allowed, 0], self.items.ntype[raised.gid[allowed]]
        found = [
            self.score.candidates(self.indexes[number], user, gid[kind == number], value[kind == number], k, barred)
            for number in types
        ]
        scores, gids = merge_best(found, k)
        return [
            self._item(gid, score, reason)
            for gid, score, reason in zip(gids.tolist(), scores.tolist(), self._reasons(profile, gids), strict=True)
        ]

    def _by_popularity(
        self, profile: Profile, types: list[int], k: int, barred: npt.NDArray[np.int64]
    ) -> list[Recommendation]:
        scores, gids, local = self.popularity.top(k, types, barred, profile.country)
        here = f"popular in {self.artifact.counts['countries'][profile.country]}" if profile.country >= 0 else ""
        found = []
        for gid, score, by_country in zip(gids.tolist(), scores.tolist(), local.tolist(), strict=True):
            reason = here if by_country else "popular now" if score > 0 else "little known yet"
            found.append(self._item(gid, score, reason))
        return found

    def _reasons(self, profile: Profile, gids: npt.NDArray[np.int64]) -> list[str]:
        """For each item the event that explains it best: the one whose item's embedding is nearest."""
        if not len(profile.gids):
            return [fits(profile.known_traits)] * len(gids)
        table = self.tower.tables.hgnn
        assert table is not None
        found, past = table[torch.from_numpy(gids)], table[torch.from_numpy(profile.gids)]
        # of equally near ones the latest: stable over the reversed history
        nearest = len(profile.gids) - 1 - (found @ past.flip(0).T).argmax(1).numpy()
        names = self.artifact.counts["events"]
        return [because(names[profile.events[place]], self.items.name(int(profile.gids[place]))) for place in nearest]

    def _item(self, gid: int, score: float, reason: str) -> Recommendation:
        return Recommendation(self.items.id(gid), self.items.type(gid), self.items.title(gid), score, reason)

    def _warm_up(self) -> None:
        """The first query reads the maps from disk and lets torch set itself up; no user should wait for that."""
        for user_id in self.example_users(3):
            self.recommend(user_id, k=10)
        self.recommend(k=10)
        self.similar(self.items.id(0), k=10)
