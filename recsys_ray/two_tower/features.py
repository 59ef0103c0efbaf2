"""The user tower's inputs: the same tensors in training and in serving."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class UserInputs:
    """Features of B users, nothing looked up yet.

    A history holds the user's latest events inside the window, oldest first; the caller has filtered and cut it.
    """

    gids: Tensor  # Long[n]: items of all histories, one after the other
    events: Tensor  # Long[n]: index into the list of event names
    offsets: Tensor  # Long[B + 1]: history of user b is gids[offsets[b]:offsets[b + 1]]
    age: Tensor  # Float[B]: years, NaN where absent
    country: Tensor  # Long[B]: index into the list of countries, -1 where absent
    tastes: dict[str, Tensor] = field(default_factory=dict)  # name -> Float[B, d], a row of NaN where absent


@dataclass
class ItemTables:
    """Features of some items, or of every item (row = gid)."""

    text: Tensor | None  # Float16[items, t]
    hgnn: Tensor | None  # Float32[items, h]
    ntype: Tensor  # Long[items]: number of the item's type
    ids: Tensor | None = None  # Float32[items, d]: the items' learned vectors
    owners: Tensor | None = None  # Long[items]: gids of which ``ids`` are still to be made, -1: no interactions


@dataclass(frozen=True)
class ItemRows:
    """What the item tower sees of N items."""

    owners: Tensor  # Long[N], as above
    text: Tensor  # Float[N, t]
    hgnn: Tensor | None  # Float[N, h]
    activity: Tensor  # Float[N, a]: recsys_ray/graph/activity.py
    ntype: Tensor  # Long[N]
    language: Tensor  # Long[N], 0: unknown
    categories: Tensor  # Long[c], flat
    category_offsets: Tensor  # Long[N]
    ids: Tensor | None = None  # Float[N, d], as above
