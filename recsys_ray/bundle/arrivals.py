"""Reads and checks, as ingest does, the items that arrive after a bundle was built and users' events on them.

This runs in one process without Ray, because a day brings few new items. Bad rows go to ``quarantine/`` of the new
bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_ray.config import Config, DataConfig
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.data.reading import Batch, find_source, read_batches
from recsys_ray.data.tables import Events
from recsys_ray.data.validate import (
    Catalogue,
    Checked,
    EventRules,
    Tally,
    check_interactions,
    check_items,
    judge_rows,
    newest_of_each,
)
from recsys_ray.graph.edges import Edges
from recsys_ray.graph.pairs import (
    Counted,
    PairCounter,
    Window,
    allowed_relations,
    keep_best,
    latest_items,
    merge,
    message_weights,
    strengths,
)
from recsys_ray.hgnn.inductive import Surroundings
from recsys_ray.serving.catalogue import read_table
from recsys_ray.serving.histories import Histories, mapped_arrays
from recsys_ray.storage.artifacts import write_parquet

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """The items of a bundle and what it keeps of them for items that come later; row = gid. Arrays may be memory
    maps."""

    ids: pa.Array  # large_string [items]
    ntype: npt.NDArray[np.int16]  # [items]
    types: Sequence[str]
    text: npt.NDArray[np.float16]  # [items, t]
    hidden: npt.NDArray[np.float16]  # [items, h]: states after the HGNN's first layer
    strength: npt.NDArray[np.float32]  # [items]: sums of the weights of the edges
    users: npt.NDArray[np.int32]  # [items]: how many had each item

    @classmethod
    def read(cls, bundle: Path, types: Sequence[str]) -> Known:
        table = read_table(bundle / "items.arrow")
        text = mapped_arrays(bundle / "text.safetensors")["vector"].numpy()
        kept = {name: array.numpy() for name, array in mapped_arrays(bundle / "hidden.safetensors").items()}
        return cls(table["item_id"].combine_chunks(), table["ntype"].to_numpy(), types, text, **kept)

    def __len__(self) -> int:
        return len(self.ids)

    def surround(
        self, ids: Sequence[str], ntype: Longs, text: npt.NDArray[np.float16], gid: Longs, edges: Edges
    ) -> tuple[Surroundings, npt.NDArray[np.float32]]:
        """Arriving items with all that send to them, and the strengths of the arriving ones.

        Args:
            ids, ntype, text, gid: of the arriving items; ``gid`` may be of an item that is replaced.
            edges: into the arriving items.
        """
        around = np.setdiff1d(edges.src, gid)
        gids = np.concatenate([gid, around])
        place = np.argsort(gids)

        def rows(of: npt.NDArray[np.int32]) -> torch.Tensor:
            return torch.from_numpy(place[np.searchsorted(gids, of, sorter=place)])

        size = max(len(self), int(gids.max(initial=-1)) + 1)
        strength = np.concatenate([self.strength, np.zeros(size - len(self), np.float32)])
        strength[gid] = strengths(edges.dst, edges.weight, size)[gid]
        unknown = np.zeros((len(text), self.hidden.shape[1]), np.float16)
        made = Surroundings(
            ids=[*ids, *self.ids.take(pa.array(around)).to_pylist()],
            ntype=torch.from_numpy(np.concatenate([ntype, self.ntype[around]])),
            text=torch.from_numpy(np.concatenate([text, self.text[around]])).float(),
            hidden=torch.from_numpy(np.concatenate([unknown, self.hidden[around]])).float(),
            wanted=torch.arange(len(text)),
            src=rows(edges.src),
            dst=rows(edges.dst),
            weight=torch.from_numpy(message_weights(edges.src, edges.dst, edges.weight, strength)),
        )
        return made, strength[gid]


@dataclass(frozen=True)
class Arrivals:
    """Items to be embedded: checked rows of the items table (one an item, ids ascending), and their numbers."""

    table: pa.Table
    types: list[str]  # of the bundle that is made: those that it has, then those that come with these items
    gid: Longs  # [n]: that of the item that is replaced, or one after the last
    ntype: Longs  # [n]
    replaced: npt.NDArray[np.bool_]  # [n]: the bundle has the item

    @property
    def added(self) -> int:
        """How many are new to the bundle."""
        return int((~self.replaced).sum())


def with_arrivals(known: Known, new: Arrivals) -> npt.NDArray[np.int16]:
    """The item type of every item of the bundle that is made."""
    ntype = np.zeros(len(known) + new.added, np.int16)
    ntype[: len(known)] = known.ntype
    ntype[new.gid] = new.ntype
    return ntype


class Reader:
    """Reads tables, keeps the rows that ingest would keep, and reports the others."""

    def __init__(self, quarantine: Path, rules: DataConfig, progress: Progress) -> None:
        self._folder, self._rules, self._progress = quarantine, rules, progress

    def items(self, path: str) -> pa.Table:
        """Checked rows with distinct ids, ascending by id.

        Raises:
            DataError: the table cannot be read, or too many rows are bad.
        """
        table, tally, bad, files = self._read("items", path, check_items)
        newest = newest_of_each(table, files)
        self._settle("items", tally + newest.tally, [*bad, newest.quarantine])
        return newest.good.sort_by("item_id")

    def interactions(self, path: str, catalogue: Catalogue, rules: EventRules) -> pa.Table:
        """Checked rows: user_id, gid, event, timestamp. Errors as :meth:`items`."""

        def check(batch: Batch, file: str) -> Checked:
            return check_interactions(batch, file, catalogue, rules)

        table, tally, bad, _ = self._read("interactions", path, check)
        self._settle("interactions", tally, bad)
        return table

    def _read(
        self, name: str, path: str, check: Callable[[Batch, str], Checked]
    ) -> tuple[pa.Table, Tally, list[pa.Table], dict[int, str]]:
        source, tally = find_source(name, path), Tally()
        for note in source.notes:
            self._progress.say(f"  {name}: {note}")
        good, bad = [], []
        for fragment in source.fragments:
            for batch in read_batches(fragment):
                checked = check(batch, fragment.file)
                tally += checked.tally
                file = pa.array(np.full(len(checked.good), fragment.file_index, np.int32))
                good.append(checked.good.append_column("file", file))
                bad.append(checked.quarantine)
        files = {fragment.file_index: fragment.file for fragment in source.fragments}
        return pa.concat_tables(good), tally, bad, files

    def _settle(self, name: str, tally: Tally, bad: Sequence[pa.Table]) -> None:
        if tally.quarantined:
            write_parquet(self._folder / f"{name}.parquet", pa.concat_tables(bad))
        for line in judge_rows(name, tally, self._rules, self._folder):
            self._progress.say(line)


def number_arrivals(items: pa.Table, known: Known, replace: bool, new_types: bool) -> Arrivals:
    """Give the items their gids: new ones come after the last, whatever their type. So do new types, if the HGNN can
    embed them (``new_types``).

    Raises:
        DataError: an item is in the bundle already and ``replace`` is false, or it is there with another type; an
            item type is unknown and may not be new.
    """
    ids = items["item_id"].cast(pa.large_string()).combine_chunks()
    types = grown_types(items["item_type"], known.types, new_types)
    ntype = pc.index_in(items["item_type"], value_set=pa.array(types, pa.string())).to_numpy().astype(np.int64)
    gid = pc.index_in(ids, value_set=known.ids).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    replaced = gid >= 0
    if replaced.any() and not replace:
        raise DataError(
            f"{_some(ids.filter(pa.array(replaced)))} already in the bundle; remove these rows, or use --replace to "
            "embed these items again"
        )
    moved = replaced & (known.ntype[np.where(replaced, gid, 0)] != ntype)
    if moved.any():
        raise DataError(
            f"{_some(ids.filter(pa.array(moved)))} in the bundle under another item_type; an item keeps its type, so "
            "give it another item_id"
        )
    gid[~replaced] = len(known) + np.arange(int((~replaced).sum()))
    return Arrivals(items, types, gid, ntype, replaced)


def grown_types(names: pa.ChunkedArray, known: Sequence[str], new_types: bool) -> list[str]:
    """The known types, then the others among ``names``, ascending. Known ones keep their numbers.

    Raises:
        DataError: there are others, and ``new_types`` is false: the HGNN has no weights for them.
    """
    new = sorted(set(pc.unique(names).to_pylist()) - set(known))
    if new and not new_types:
        raise DataError(
            f"item_type {', '.join(map(repr, new))} is not in the bundle, whose HGNN has separate weights for each "
            f"pair of {', '.join(known)} (hgnn.weights_by=relation) and none for another type; include the type in the "
            "next run, or train with hgnn.encoder=propagation, whose weights apply to later types as well"
        )
    return [*known, *new]


def _some(ids: pa.Array) -> str:
    more = f" and {len(ids) - 1:,} more are" if len(ids) > 1 else " is"
    return f'item_id "{ids[0].as_py()}"{more}'


@dataclass(frozen=True)
class Trickle:
    """Users' events since then, with users and items as numbers. Users unknown to the bundle get numbers after its last
    one; they do not enter the new bundle."""

    events: Events  # sorted by (uid, timestamp, gid, event), each once
    users: int  # of the bundle

    @property
    def last(self) -> int | None:
        """Unix seconds."""
        return int(self.events.timestamp.max()) if len(self.events) else None

    @property
    def known(self) -> Events:
        """Events of the bundle's users."""
        return self.events.select(self.events.uid < self.users)


def no_trickle(users: int) -> Trickle:
    none = np.empty(0, np.int64)
    return Trickle(Events(none, none, none, none), users)


def number_trickle(rows: pa.Table, bundle: Path, arrivals: Arrivals, counts: Mapping[str, Any]) -> Trickle:
    """Give users numbers; leave out what the bundle has: events of its users on its items before its end.

    Args:
        rows: of :meth:`Reader.interactions`.
        counts: of the bundle.
    """
    coded = rows["user_id"].combine_chunks().cast(pa.large_string()).dictionary_encode()
    table = read_table(bundle / "user_ids.arrow")
    place = pc.index_in(coded.dictionary, value_set=table["id"].combine_chunks())
    known = place.is_valid().to_numpy(zero_copy_only=False)
    numbers = np.empty(len(known), np.int64)
    numbers[known] = table["uid"].to_numpy()[place.drop_null().to_numpy()]
    numbers[~known] = len(table) + np.arange(int((~known).sum()))
    uid = numbers[coded.indices.to_numpy()]
    gid, event, time = (rows[name].to_numpy().astype(np.int64) for name in ("gid", "event", "timestamp"))
    new = arrivals.gid[~arrivals.replaced]
    there = (uid < len(table)) & ~np.isin(gid, new) & (time < int(counts["end"]))
    distinct = np.unique(np.stack([uid, time, gid, event])[:, ~there], axis=1)
    uid, time, gid, event = distinct
    return Trickle(Events(uid, gid, event, time), len(table))


def arriving_edges(
    known: Known,
    new: Arrivals,
    trickle: Trickle,
    histories: Histories,
    codes: Sequence[int],
    config: Config,
    window: Window,
) -> tuple[Counted, Counted, Longs]:
    """What sends to the arriving items, by the rules of the graph stage; the same pairs in both directions; and users
    of all items, which are whole for the arriving ones. Of the bundle's users the stored latest events count, whatever
    their kind: where these are cut, so are the edges.

    Args:
        histories: of the bundle that is extended.
        codes: of the events that make edges.
    """
    rules, size = config.graph, len(known) + new.added
    touched = trickle.events.uid[np.isin(trickle.events.gid, new.gid)]
    involved = np.union1d(touched, histories.who_touched(new.gid[new.replaced]))
    old = histories.events(involved[involved < trickle.users])
    mine = trickle.events.select(np.isin(trickle.events.uid, involved))
    both = Events.join([old, mine])
    both = both.select(np.isin(both.event, codes))
    both = both.select(np.lexsort((both.timestamp, both.uid)))  # stable: of equal times the stored ones first
    counter, parts = PairCounter(size, window, rules.max_history, rules.pair_half_life), list[Counted]()
    for counted in (*counter.add(both.uid, both.gid, both.timestamp), counter.flush()):
        parts.append(counted.take(np.isin(counted.dst, new.gid) | np.isin(counted.src, new.gid)))
    ntype = with_arrivals(known, new)
    allowed = allowed_relations(rules.relations, new.types)
    whole = merge(parts, size)
    whole = whole.take(allowed[ntype[whole.src], ntype[whole.dst]])
    edges = whole.take(np.isin(whole.dst, new.gid))
    edges = keep_best(edges, ntype, rules.min_support, rules.max_neighbors, config.data_seed)
    there, back = edges.dst.astype(np.int64) * size + edges.src, edges.src.astype(np.int64) * size + edges.dst
    directions = whole.take(np.isin(whole.dst.astype(np.int64) * size + whole.src, np.concatenate([there, back])))
    _, latest, _ = latest_items(both.uid, both.gid, both.timestamp, window, rules.max_history, size)
    return edges, directions, np.bincount(latest, minlength=size)
