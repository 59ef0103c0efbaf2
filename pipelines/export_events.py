"""``recsys-ray export-events``: writes a server's stored events and items as tables for the next run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.core.progress import Progress
from serve.store import open_store

_AT_ONCE = 50_000
EVENTS = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "event": pa.string(), "timestamp": pa.int64()})
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("item_type", pa.string()),
        ("title", pa.string()),
        ("description", pa.string()),
        ("language", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("published_at", pa.int64()),
        ("available", pa.bool_()),
    ]
)


def export_events(uri: str, out: Path, progress: Progress) -> None:
    """Write ``out``/interactions/*.parquet and ``out``/items.parquet, which take the place of earlier ones."""
    store = open_store(uri, make=False)
    folder = out / "interactions"
    folder.mkdir(parents=True, exist_ok=True)
    place, number, count = "", 0, 0
    while True:
        events, place = store.events_after(place, _AT_ONCE)
        if not events:
            break
        rows = [{name: getattr(event, name) for name in EVENTS.names} for event in events]
        pq.write_table(pa.Table.from_pylist(rows, EVENTS), folder / f"part-{number:05d}.parquet")
        number, count = number + 1, count + len(events)
    for stale in sorted(folder.glob("part-*.parquet"))[number:]:
        stale.unlink()
    items = [
        {**item.record, "item_id": item.item_id, "available": _offered(item.record)}
        for item in store.items_after(0)
        if item.record is not None
    ]
    pq.write_table(pa.Table.from_pylist(items, ITEMS), out / "items.parquet")
    store.close()
    progress.say(f"{count:,} events, {len(items):,} items -> {out}")


def _offered(record: object) -> bool:
    assert isinstance(record, dict)
    return bool(record.get("available", True)) and not record.get("hidden")
