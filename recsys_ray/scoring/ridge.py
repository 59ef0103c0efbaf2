"""Fits the co-interaction memory: for each item, a ridge regression on its neighbours in the graph.

    b_.j = (G + ridge I)^-1 g,    G_ik = users of i and k,  g_i = weight of the edge i -> j,  i and k in N_j

N_j are j's neighbours in a snapshot. If g_i were the users of i and j, b_.j would be the ridge regression of having j
on having its neighbours: EASE^R (Steck, WWW 2019) restricted to the graph, with a system of a few dozen unknowns per
item instead of one for the whole catalogue; or SLIM with the neighbours as selected features (Ning and Karypis, ICDM
2011), without its L1 term. The edge weight counts a user less the further i lies before j, and less still if j came
first (recsys_ray/graph/pairs.py), so this is a regression on choosing j soon.

A pair i, k that the graph dropped counts as 0 users. G may then have negative eigenvalues, and coefficients that would
grow without bound under a small ridge are clipped to -1 and 1.

One task per range of items solves the systems; users are counted per shard, with the other counts (choices.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.core.offsets import spread
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events
from recsys_ray.graph.edges import Edges, read_edges
from recsys_ray.graph.pairs import Window, latest_items
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.scoring.memory import RIDGES, Memory, memory_file

_RANGES = 8  # of items, whose systems are solved by one task each


def fit_memories(
    ntype: Int[np.ndarray, "items"],
    graph: Path,
    users_of: Mapping[str, Int[np.ndarray, "items"]],
    out: Path,
    progress: Progress,
) -> None:
    """Write the memory of each snapshot of ``users_of`` (:func:`memory_file`).

    Args:
        users_of: snapshot -> users of each item (:func:`count_users`).
    """
    import ray

    with progress.task("memory", len(users_of) * _RANGES, "ranges of items") as task:
        for snapshot, users in users_of.items():
            edges = read_edges(graph / "edges" / f"{snapshot}.parquet")
            shared, parts = (ray.put(edges), ray.put(users)), []
            solving = [(solve, *shared, begin, end) for begin, end in _ranges(edges.dst)]
            for part in in_parallel(solving, ordered=True):
                parts.append(part)
                task.advance()
            memory = Memory.of_edges(edges.src, edges.dst, np.concatenate(parts), users, ntype)
            memory.save(memory_file(out, snapshot))


def _ranges(dst: Int[np.ndarray, "n"]) -> list[tuple[int, int]]:
    """Ranges of edges, about as long, that part no item's; ``dst`` ascends."""
    bounds = [len(dst) * k // _RANGES for k in range(_RANGES)]
    bounds = [int(np.searchsorted(dst, dst[bound])) if len(dst) else 0 for bound in bounds]
    return list(zip(bounds, [*bounds[1:], len(dst)], strict=True))


def count_users(
    events: Events, snapshot: Snapshot, codes: Sequence[int], max_history: int, items: int
) -> Int[np.ndarray, "items"]:
    """How many users had each item, by the events that make the snapshot's edges (``codes``)."""
    made = events.of(codes)
    window = Window(snapshot.start, snapshot.time, snapshot.without)
    _, latest, _ = latest_items(made.uid, made.gid, made.timestamp, window, max_history, items)
    return np.bincount(latest, minlength=items)


def solve(edges: Edges, users: Int[np.ndarray, "items"], begin: int, end: int) -> Float[np.ndarray, "edges ridges"]:
    """b of the edges ``begin <= edge < end`` with each of ``RIDGES``; the range holds all edges of its items.

    Args:
        edges: all of them.
        users: of each item.
    """
    (src, dst, support, weight), items = edges, len(users)
    start = np.searchsorted(dst, np.arange(items + 1))
    solved = np.zeros((end - begin, len(RIDGES)), np.float32)
    place = np.full(items, -1)
    for item in np.unique(dst[begin:end]).tolist():
        mine = slice(start[item], start[item + 1])
        near = src[mine]
        place[near] = np.arange(len(near))
        gram = np.zeros((len(near), len(near)))
        lengths = start[near + 1] - start[near]  # the neighbours' own neighbours: which of them are mine, too?
        edge = spread(start[near], lengths)
        row, column = place[src[edge]], np.repeat(np.arange(len(near)), lengths)
        row, column, shared = row[row >= 0], column[row >= 0], support[edge[row >= 0]]
        gram[row, column] = gram[column, row] = shared
        systems = np.repeat(gram[None], len(RIDGES), axis=0)
        np.einsum("rnn->rn", systems)[:] = users[near] + np.array(RIDGES)[:, None]
        right = np.broadcast_to(weight[mine].astype(np.float64)[:, None], (len(RIDGES), len(near), 1))
        solved[mine.start - begin : mine.stop - begin] = _solutions(systems, right)[:, :, 0].T
        place[near] = -1
    return solved


def _solutions(systems: Float[np.ndarray, "r n n"], right: Float[np.ndarray, "r n 1"]) -> Float[np.ndarray, "r n 1"]:
    try:
        found = np.linalg.solve(systems, right)
    except np.linalg.LinAlgError:  # singular: see above
        found = np.linalg.pinv(systems) @ right
    return np.clip(found, -1, 1)
