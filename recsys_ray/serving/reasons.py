"""The short reason for a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

_PAST = {  # where the rule below would be wrong, or another word reads better
    "buy": "bought",
    "read": "read",
    "see": "saw",
    "watch": "watched",
    "listen": "listened to",
    "intent_to_pay": "wanted to buy",
    "add_to_cart": "put in the cart",
    "rating": "rated",
    "review": "reviewed",
}
_VOWELS = "aeiou"


@cache
def past_tense(event: str) -> str | None:
    """What a user did, for an event's name: "stream" -> "streamed"; None where the name is no single verb."""
    name = event.strip().lower()
    if name in _PAST:
        return _PAST[name]
    if not name.isalpha() or not name.isascii() or name.endswith("ion"):  # interaction, subscription
        return None
    if name.endswith("ed"):
        return name
    if name.endswith("e"):
        return f"{name}d"
    if name.endswith("y") and name[-2:-1] not in _VOWELS:
        return f"{name[:-1]}ied"
    return f"{name}ed"


def because(event: str, title: str) -> str:
    """Why an item comes: an event of the user with another item."""
    verb = past_tense(event)
    return f'because you {verb} "{title}"' if verb else f'because of "{title}" ({event.replace("_", " ")})'


def fits(traits: Sequence[str]) -> str:
    """The reason given to a user of whom only traits are known."""
    *first, last = traits
    return f"fits your {', '.join(first)} and {last}" if first else f"fits your {last}"
