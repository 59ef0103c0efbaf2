"""Brings the store's contents into answers: the user's latest events, new and deleted items, variants."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recsys_ray.core.errors import UserError
from recsys_ray.serving.answers import Answer
from recsys_ray.serving.laps import Laps
from recsys_ray.serving.live import LiveVectors
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question, RequestError
from serve.store import GivenAnswer, LiveItem, Store, StoreError


@dataclass(frozen=True)
class Variant:
    """Settings that a share of the users gets, to be compared."""

    name: str
    share: float
    diversity: float = 0.0
    popularity: float = 0.0


def variants_of(told: Sequence[Mapping[str, Any]]) -> tuple[Variant, ...]:
    """From a configuration. Raises UserError where the shares do not add up to 1."""
    try:
        found = tuple(Variant(**one) for one in told)
    except TypeError as error:
        raise UserError(f"variants: {error}; a variant has the fields name, share, diversity and popularity") from None
    if found and (abs(sum(one.share for one in found) - 1) > 1e-9 or min(one.share for one in found) < 0):
        raise UserError("variants: the shares must add up to 1")
    if len({one.name for one in found}) < len(found):
        raise UserError("variants: two have the same name")
    return found


def assign(variants: Sequence[Variant], user_id: str) -> Variant:
    """The variant of a user, the same at every request and on every replica."""
    place = int.from_bytes(hashlib.blake2b(user_id.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64
    for variant in variants[:-1]:
        if place < variant.share:
            return variant
        place -= variant.share
    return variants[-1]


@dataclass(frozen=True)
class Asked(Question):
    """A question that may name its variant: the answer is then not counted for it, for nobody was assigned."""

    variant: str | None = None


@dataclass(frozen=True)
class Told:
    """An answer with what belongs to the request."""

    answer: Answer
    request_id: str
    variant: str | None
    degraded: bool


class LiveAnswers:
    """Answers that know what the store knows. Without a store they are the recommender's.

    With the store gone the bundle answers alone, and says so.
    """

    def __init__(self, store: Store | None, variants: Sequence[Variant] = ()) -> None:
        self.store, self.variants = store, tuple(variants)

    def answers(
        self, recommender: Recommender, questions: Sequence[Question], laps: Laps | None = None
    ) -> list[Told | RequestError]:
        """As :meth:`Recommender.answers`. Two reads of the store for all questions together, the stage "store"."""
        laps = laps or Laps()
        degraded, events = False, {}
        if self.store is not None:
            degraded = not self.take_changes(recommender)
            try:
                users = {str(one.user_id) for one in questions if one.user_id is not None}
                counts = recommender.artifact.counts
                events = self.store.events_of(sorted(users), counts["end"], counts["history"])
            except StoreError:
                degraded = True
            laps.lap("store")
        chosen = [self._variant(question) for question in questions]
        asked = [
            self._asked(recommender, question, variant, events.get(str(question.user_id), ()))
            for question, variant in zip(questions, chosen, strict=True)
        ]
        told: list[Told | RequestError] = []
        for answer, variant in zip(recommender.answers(asked, laps), chosen, strict=True):
            if isinstance(variant, RequestError):
                told.append(variant)
            elif isinstance(answer, Answer):
                told.append(Told(answer, secrets.token_hex(16), variant.name if variant else None, degraded))
            else:
                told.append(answer)
        if self.variants and self.store is not None and not degraded:
            self._remember(self.store, [one for one, asked in zip(told, questions, strict=True) if not _named(asked)])
            laps.lap("store")
        return told

    def _variant(self, question: Question) -> Variant | RequestError | None:
        if name := _named(question):
            known = {one.name: one for one in self.variants}
            text = f"known: {', '.join(known)}" if known else "this server has none"
            return known.get(name) or RequestError("variant", f"there is no variant {name!r}; {text}")
        if not self.variants:
            return None
        return assign(self.variants, secrets.token_hex(16) if question.user_id is None else str(question.user_id))

    def _asked(
        self,
        recommender: Recommender,
        question: Question,
        variant: Variant | RequestError | None,
        events: Sequence[Any],
    ) -> Question:
        known = recommender.artifact.counts["events"]
        # Without their times: they are the newest of all, however old the bundle's data are.
        fresh = [
            {"item_id": one.item_id, "event": one.event}
            for one in events
            if one.event in known and recommender.find(one.item_id) is not None
        ]
        if fresh:
            question = replace(question, history=[*fresh, *(question.history or ())])
        if isinstance(variant, Variant):
            question = replace(
                question,
                diversity=question.diversity or variant.diversity,
                popularity=question.popularity or variant.popularity,
            )
        return question

    def take_changes(self, recommender: Recommender) -> bool:
        """Tell the recommender what changed of items since it looked last; False where the store does not answer."""
        if self.store is None:
            return True
        try:
            last = self.store.last_change()
            if last <= recommender.live.change:
                return True
            changed = self.store.items_after(recommender.live.change)
        except StoreError:
            return False
        gone = [item.item_id for item in changed if not _offered(item)]
        new = [
            (item.item_id, item.record, LiveVectors.unpack(item.vectors))
            for item in changed
            if item.record is not None and item.vectors is not None and _offered(item)
        ]
        # The last row may be damaged, and further ones may have come since its number was read.
        recommender.apply(max([last, *(item.change for item in changed)]), gone, new)
        return True

    def outdated(self, recommender: Recommender) -> list[LiveItem]:
        """New items that another bundle's models embedded, and that this bundle could recommend but does not have.
        Raises StoreError."""
        changed = self.store.items_after(0) if self.store is not None else []
        return [
            item
            for item in changed
            if item.record is not None
            and item.vectors is not None
            and _offered(item)
            and item.record["item_type"] in recommender.item_types
            and not recommender.made(LiveVectors.unpack(item.vectors))
            and recommender.items.find(item.item_id) is None
        ]

    def _remember(self, store: Store, told: Sequence[Told | RequestError]) -> None:
        now = int(time.time())
        given = [
            GivenAnswer(one.request_id, one.variant, one.answer.version, now)
            for one in told
            if isinstance(one, Told) and one.variant
        ]
        try:
            store.add_answers(given)
        except StoreError:  # the next answer says that it is degraded
            return


def _named(question: Question) -> str | None:
    return question.variant if isinstance(question, Asked) else None


def _offered(item: LiveItem) -> bool:
    """Whether it may be recommended. If not, its state in the bundle may not be either."""
    record = item.record
    return record is not None and record.get("available", True) is not False and not record.get("hidden")
