"""The ingest stage against a brute-force reading of the same tables, on a real local Ray."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from recsys_ray.config import Config, DataConfig, EventsConfig, GraphConfig, SplitConfig
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.data import ingest as stage
from recsys_ray.data.ingest import ingest

pytestmark = pytest.mark.usefixtures("ray_local")
NOW = 1_700_000_000
DAY = 86_400
TYPES = ["audio book", "música/🎧:live"]  # spaces, slashes, colons and emoji are a type's own business


def world(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Items (three of the second type), interactions with every fault, users with one of each."""
    draw = random.Random(seed)
    items = [
        {"item_id": f"i{n}", "item_type": TYPES[0], "title": f"本 {n} &amp; co", "categories": ["x", f"c{n % 3}"]}
        for n in range(40)
    ] + [{"item_id": f"m{n}", "item_type": TYPES[1], "title": None, "categories": None} for n in range(3)]
    items.insert(5, {"item_id": "i0", "item_type": TYPES[0], "title": "again", "categories": []})
    ids = [item["item_id"] for item in items]
    events = []
    for n in range(3000):
        user = "heavy" if n % 3 == 0 else f"ü{draw.randrange(60)}"
        moment = NOW - draw.randrange(100 * DAY)
        event = draw.choice(["stream", "stream", "follow", "noise"])
        events.append({"user_id": user, "item_id": draw.choice(ids), "event": event, "timestamp": moment})
    for n, change in enumerate(
        [{"user_id": None}, {"item_id": "gone"}, {"event": "strem"}, {"timestamp": NOW + 9}, {"timestamp": NOW * 1000}]
    ):
        events[100 + n] |= change
    events += [dict(events[n]) for n in range(50, 60)]
    people = [{"user_id": f"ü{n}", "age": 20.0 + n, "country": "SE", "music": [1.0, n]} for n in range(70)]
    people += [dict(people[0], age=99.0), dict(people[1], user_id="w", music=[1.0])]
    return items, events, people


def write_world(folder: Path, kind: str = "parquet") -> Config:
    tables = dict(zip(("items", "interactions", "users"), map(pa.Table.from_pylist, world()), strict=True))
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        half = len(table) // 2
        for number, part in enumerate((table.slice(0, half), table.slice(half))):
            if kind == "parquet":
                pq.write_table(part, folder / name / f"{number}.parquet", row_group_size=700)
                continue
            texts = [_csv_cells(name, part[name].to_pylist()) for name in part.column_names]
            pa.csv.write_csv(pa.table(texts, part.column_names), folder / name / f"{number}.csv")
    return Config(
        data=DataConfig(
            **{name: str(folder / name) for name in tables},
            now=datetime.fromtimestamp(NOW, UTC),
            shards=3,
            max_bad_share=0.06,
        ),
        events=EventsConfig(weak=["follow"], ignore=["noise"]),
    )


def _csv_cells(name: str, cells: list[Any]) -> pa.Array:
    if name == "categories":
        return pa.array(["|".join(cell) if cell else None for cell in cells])
    if name == "music":
        return pa.array([json.dumps(cell) for cell in cells])
    return pa.array([None if cell is None else str(cell) for cell in cells])


def run(config: Config, out: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return ingest(config, out, Progress(quiet=True))


def files_of(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and "_scratch" not in p.parts)
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> tuple[Config, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ingest")
    config = write_world(folder / "data")
    return config, folder / "out", run(config, folder / "out")


def expected_events() -> set[tuple[str, str, str, int]]:
    items, events, _ = world()
    known = {item["item_id"] for item in items}
    moments = [e["timestamp"] // 1000 if e["timestamp"] > 10**11 else e["timestamp"] for e in events]
    return {
        (e["user_id"], e["item_id"], e["event"], moment)
        for e, moment in zip(events, moments, strict=True)
        if e["user_id"] and e["item_id"] in known and e["event"] in ("stream", "follow") and moment <= NOW
    }


def test_tables_hold_what_brute_force_finds(undisturbed: tuple[Config, Path, dict[str, Any]]) -> None:
    _, out, counts = undisturbed
    items, users = (pq.read_table(out / name).to_pylist() for name in ("items.parquet", "users.parquet"))
    assert [(i["item_type"], i["item_id"]) for i in items] == sorted(
        {(i["item_type"], i["item_id"]) for i in world()[0]}
    )
    assert [i["index"] for i in items] == [*range(40), *range(3)]
    assert items[0]["title"] == "again"  # the later row of i0
    assert items[1]["title"] == "本 1 & co" and items[40]["title"] == "" and items[40]["ntype"] == 1
    assert counts["item_types"] == TYPES and counts["items_per_type"] == [40, 3]
    assert counts["untitled"] == 3 and counts["categories"] == ["c0", "c1", "c2", "x"]

    found, per_day, active = [], defaultdict(int), set()
    for shard in range(3):
        rows = pq.read_table(out / f"interactions/shard-{shard:05d}.parquet").to_pylist()
        keys = [(r["uid"], r["timestamp"], r["gid"], r["event"]) for r in rows]
        assert keys == sorted(keys)
        assert {users[r["uid"]]["shard"] for r in rows} <= {shard}
        for r in rows:
            event = counts["events"][r["event"]]
            found.append((users[r["uid"]]["user_id"], items[r["gid"]]["item_id"], event, r["timestamp"]))
            per_day[r["timestamp"] // DAY] += event == "stream"
            if event == "stream":
                active.add((r["uid"], r["timestamp"] // DAY))
    assert len(found) == len(set(found)) and set(found) == expected_events()
    assert counts["days"] == [[day, n] for day, n in sorted(per_day.items()) if n]
    assert sum(counts["user_days"].values()) == len(active)
    assert counts["user_days"]["test"] == sum(day * DAY >= counts["test_from"] for _, day in active)
    assert counts["end"] == max(moment for *_, moment in found) + 1
    assert counts["valid_from"] % DAY == counts["test_from"] % DAY == 0
    assert counts["user_days"]["test"] <= 0.1 * len(active)  # 14 days would hold more

    shards = [user["shard"] for user in users]
    assert shards == sorted(shards) and counts["users"] == len(users)
    by_id = {user["user_id"]: user for user in users}
    assert set(by_id) == {user for user, *_ in found} | {f"ü{n}" for n in range(70)} | {"w"}
    assert by_id["w"]["music"] is None and by_id["w"]["age"] == 21.0
    assert by_id["ü0"]["age"] == 99.0 and by_id["ü5"]["music"] == [1.0, 5.0] and by_id["heavy"]["music"] is None
    assert counts["taste"] == {"music": 2} and counts["countries"] == ["SE"]


def test_quarantine_accounts_for_every_row(undisturbed: tuple[Config, Path, dict[str, Any]]) -> None:
    _, out, counts = undisturbed
    bad = [row for file in sorted((out / "quarantine").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    for table, rows in counts["rows"].items():
        assert rows["read"] == rows["kept"] + rows["quarantined"] + rows["ignored"] + rows["repeated"]
        assert rows["quarantined"] == sum(counts["quarantined"][table].values())
        assert rows["quarantined"] == sum(row["table"] == table for row in bad)
    assert counts["quarantined"]["items"] == counts["quarantined"]["users"] == {}
    assert {table: rows["repeated"] > 0 for table, rows in counts["rows"].items()} == dict.fromkeys(
        counts["rows"], True
    )
    interactions = counts["quarantined"]["interactions"]
    assert interactions["missing user_id"] == interactions["unknown item"] == interactions["unknown event"] == 1
    # Row by row: each names the place that holds its record.
    for row in bad:
        if row["table"] == "interactions":
            source = pq.read_table(row["file"]).to_pylist()[row["row"] - 1]
            record = json.loads(row["record"])
            assert {name: record[name] for name in source} == source


def test_an_interrupted_run_ends_in_the_same_bytes(
    undisturbed: tuple[Config, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, counts = undisturbed

    def killed(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage._Run, "_write_users", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "out")
    kept = tmp_path / "out/_scratch/interactions/00000-00000.arrow"
    before = kept.stat().st_mtime_ns
    (tmp_path / "out/_scratch/done/interactions/00001.json").unlink()  # as if killed before this part was done
    assert run(config, tmp_path / "out") == counts
    assert kept.stat().st_mtime_ns == before  # finished parts are not made again
    assert files_of(tmp_path / "out") == files_of(out)


def test_csv_gives_what_parquet_gives(undisturbed: tuple[Config, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, out, counts = undisturbed
    from_csv = run(write_world(tmp_path / "data", "csv"), tmp_path / "out")
    assert from_csv == counts
    for name in ("items.parquet", "users.parquet", "interactions/shard-00001.parquet"):
        assert pq.read_table(tmp_path / "out" / name).equals(pq.read_table(out / name))


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    config = write_world(tmp_path / "data")
    config = config.model_copy(update={"events": EventsConfig(positives=["listen"], edges=["listen"])})
    with pytest.raises(
        DataError, match=r"interactions table are bad.*max_bad_share.*unknown event: 2,259.*noise"
    ) as caught:
        run(config, tmp_path / "out")
    folder = Path(str(caught.value).rpartition(" in ")[2])
    assert any(folder.glob("interactions-*.parquet"))


def test_one_type_and_no_users_table(tmp_path: Path) -> None:
    rows = [{"user_id": n % 2, "item_id": n % 3, "event": "stream", "timestamp": NOW - n * DAY} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    pq.write_table(pa.table({"item_id": [0, 1, 2], "item_type": ["x"] * 3, "title": ["a"] * 3}), tmp_path / "i.parquet")
    data = DataConfig(items=str(tmp_path / "i.parquet"), interactions=str(tmp_path / "e.parquet"), shards=4)
    counts = run(Config(data=data), tmp_path / "out")
    assert counts["users"] == 2 and counts["item_types"] == ["x"] and counts["taste"] == {}
    assert sum(pq.read_metadata(f).num_rows for f in (tmp_path / "out/interactions").glob("*")) == 60
    late = Config(data=data, split=SplitConfig(test_from=datetime(2030, 1, 1)))
    with pytest.raises(DataError, match=r"(validation|test) period has no positive event"):
        run(late, tmp_path / "late")


def test_leave_one_out_keeps_the_order_of_the_source_where_times_are_equal(tmp_path: Path) -> None:
    """Two files; the last items of each user fall on one day, in an order that is not that of the ids."""
    (tmp_path / "events").mkdir()
    sequences = {"ann": ["i3", "i1", "i2", "i0"], "ben": ["i2", "i3", "i1"], "cy": ["i1", "i0"]}
    rows = [(user, item, NOW - DAY) for user, items in sequences.items() for item in items]
    rows.insert(0, ("ben", "i0", NOW - 9 * DAY))
    rows[5], rows[6] = rows[6], rows[5]  # users take turns in the file
    sequences["ben"] = ["i0", *(item for user, item, _ in rows[1:] if user == "ben")]
    for number, part in enumerate((rows[:6], [*rows[6:], rows[1]])):  # the last row is a duplicate
        table = [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True), event="stream") for row in part]
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "events" / f"{number}.parquet")
    items = pa.table({"item_id": [f"i{n}" for n in range(4)], "item_type": ["x"] * 4, "title": ["t"] * 4})
    pq.write_table(items, tmp_path / "i.parquet")
    data = DataConfig(items=str(tmp_path / "i.parquet"), interactions=str(tmp_path / "events"), shards=2,
                      max_bad_share=0.2)  # fmt: skip
    graph = GraphConfig(window_days=None)
    config = Config(data=data, split=SplitConfig(protocol="leave_one_out"), graph=graph)
    counts = run(config, tmp_path / "out")
    assert counts["quarantined"]["interactions"] == {} and counts["rows"]["interactions"]["repeated"] == 1
    assert [counts[name] for name in ("protocol", "valid_from", "test_from", "end", "held_out")] == [
        "leave_one_out", 0, 1, 2, 2,
    ]  # fmt: skip
    assert counts["last_event"] == NOW - DAY
    users, found = pq.read_table(tmp_path / "out/users.parquet")["user_id"].to_pylist(), defaultdict(list)
    for shard in sorted((tmp_path / "out/interactions").iterdir()):
        for row in pq.read_table(shard).to_pylist():
            found[users[row["uid"]]].append((f"i{row['gid']}", row["timestamp"], row["happened_at"]))
    days = {"ben": [NOW - 9 * DAY, *[NOW - DAY] * 3]}
    times = {"ann": [-2, -1, 0, 1], "ben": [-2, -1, 0, 1], "cy": [-2, -1]}
    for user, sequence in sequences.items():
        wanted = zip(sequence, times[user], days.get(user, [NOW - DAY] * 4), strict=False)
        assert found[user] == list(wanted), user
    alone = config.model_copy(update={"data": data.model_copy(update={"interactions": str(tmp_path / "e.parquet")})})
    pq.write_table(pa.Table.from_pylist(table[-2:]), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="positive events on three items"):
        run(alone, tmp_path / "alone")


def test_only_wanted_item_types_are_read(undisturbed: tuple[Config, Path, dict[str, Any]], tmp_path: Path) -> None:
    config, _, all_counts = undisturbed

    def of_types(*names: str) -> Config:
        return config.model_copy(update={"data": config.data.model_copy(update={"item_types": list(names)})})

    counts = run(of_types(TYPES[0]), tmp_path / "out")
    assert counts["item_types"] == TYPES[:1] and counts["items_per_type"] == [40]
    rows, all_rows = counts["rows"], all_counts["rows"]
    assert rows["items"]["ignored"] == 3 and rows["items"]["kept"] == 40
    assert rows["interactions"]["read"] == all_rows["interactions"]["read"]
    wanted = [row for row in expected_events() if row[1].startswith("i")]
    files = (tmp_path / "out/interactions").glob("*.parquet")
    assert rows["interactions"]["kept"] == len(wanted) == sum(pq.read_metadata(file).num_rows for file in files)
    assert counts["quarantined"]["interactions"]["unknown item"] == 1  # the one that no item of any type has
    with pytest.raises(DataError, match=r'no item is of type "audio bok".*did you mean "audio book"'):
        run(of_types("audio bok"), tmp_path / "none")
