"""The graph stage and its partition servers on a real local Ray."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from graph_world import shared_pairs, small_config, true_edges, write_world

from recsys_ray.config import Config
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.graph.activity import ACTIVITY
from recsys_ray.graph.dgl.client import GraphClient
from recsys_ray.graph.dgl.partition import write_partitions
from recsys_ray.graph.dgl.sampling import draw
from recsys_ray.graph.dgl.servers import PartitionServers, count_partitions
from recsys_ray.graph.edges import PAIRED, read_edges
from recsys_ray.graph.stage import build_graph
from recsys_ray.graph.texts import TEXTS
from recsys_ray.storage.artifacts import load_arrays, save_arrays

QUIET = Progress(quiet=True)


def brute_force_edges(ingest: Path, start: int, time: int, config: Config) -> set[tuple[int, int]]:
    """Every pair of items that a user shares; for worlds in which no cap bites."""
    histories: dict[int, set[int]] = defaultdict(set)
    for shard in (ingest / "interactions").glob("*.parquet"):
        for row in pq.read_table(shard).to_pylist():
            if row["event"] == 0 and start <= row["timestamp"] < time:
                histories[row["uid"]].add(row["gid"])
    return {pair for items in histories.values() for pair in permutations(items, 2)}


@pytest.fixture(scope="module")
def world(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("world")
    ingest, featurize = write_world(root)
    config = small_config(max_neighbors=1000)
    out = root / ".graph.work"
    counts = build_graph(config, ingest, featurize, out, QUIET, cpus=2, num_hosts=1)
    out.rename(root / "graph")  # a run may be moved
    return {"root": root, "ingest": ingest, "graph": root / "graph", "counts": counts, "config": config}


def with_client(graph: Path, function: Callable[[GraphClient], Any], features: dict[str, Path] | None = None) -> Any:
    """Run a function with a client, in a process of its own."""

    @ray.remote(num_cpus=1, max_calls=1)
    def run(address: str) -> Any:
        client = GraphClient.connect(address, graph)
        try:
            return function(client)
        finally:
            client.close()

    with PartitionServers(graph, clients=1, features=features) as servers:
        return ray.get(run.remote(servers.address), timeout=120)


def test_edges_are_those_of_each_window(world: dict[str, Any]) -> None:
    for snapshot in world["counts"]["snapshots"]:
        expected = brute_force_edges(world["ingest"], snapshot["start"], snapshot["time"], world["config"])
        assert shared_pairs(world["graph"], snapshot["name"]) == expected
        assert true_edges(world["graph"], snapshot["name"]).keys() > expected  # texts tell of more
        assert sum(world["counts"]["edges"][snapshot["name"]].values()) == len(expected)
    assert count_partitions(world["graph"]) == world["counts"]["partitions"] == 1


def test_activity_is_that_of_all_shards_together(world: dict[str, Any]) -> None:
    events = pq.read_table(sorted((world["ingest"] / "interactions").glob("*.parquet")))
    gid, event, time = (events[name].to_numpy() for name in ("gid", "event", "timestamp"))
    tables, ntype = load_arrays(world["graph"] / ACTIVITY), np.repeat(np.arange(3), (40, 25, 3))
    assert set(tables) == {s["name"] for s in world["counts"]["snapshots"]}
    for snapshot in world["counts"]["snapshots"]:
        known = time < snapshot["time"]
        chosen = np.bincount(gid[known & (event == 0)], minlength=68)
        touched = np.bincount(gid[known], minlength=68) > 0
        mean = np.bincount(ntype, chosen) / np.bincount(ntype)  # no date is known: all items are on their type's shelf
        wanted = np.log1p(chosen / np.maximum(mean, 1e-9)[ntype])
        assert np.allclose(tables[snapshot["name"]][:, 3], wanted, atol=2e-3)  # stored as float16
        assert np.array_equal(tables[snapshot["name"]][:, 6], ~touched)


def test_nodes_file_maps_every_item_once(world: dict[str, Any]) -> None:
    original = load_arrays(world["graph"] / "nodes.safetensors")
    assert {name: len(ids) for name, ids in original.items()} == {"t0": 40, "t1": 25, "t2": 3}
    assert all(sorted(ids.tolist()) == list(range(len(ids))) for ids in original.values())


def test_caps_hold_and_interrupted_work_is_kept(world: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(max_neighbors=3, max_history=5)
    featurize = world["root"] / "featurize"
    build_graph(config, world["ingest"], featurize, tmp_path / "g", QUIET, cpus=2, num_hosts=1)
    ntype = pq.read_table(world["ingest"] / "items.parquet")["ntype"].to_numpy()
    src, dst, support, _ = read_edges(tmp_path / "g" / "edges" / "serve.parquet")
    src, dst = src[support > 0], dst[support > 0]
    assert np.bincount(dst.astype(int) * 3 + ntype[src]).max() == 3
    pairs = pq.read_table(tmp_path / "g" / "pairs" / "serve.parquet", columns=["src", "dst"]).columns
    keys, all_keys = dst * 68 + src, np.asarray(pairs[1]) * 68 + np.asarray(pairs[0])
    assert len(all_keys) > 1.5 * len(keys) and np.isin(keys, all_keys).all()  # without the cap, for the memory
    assert sorted(all_keys.tolist()) == sorted((all_keys % 68 * 68 + all_keys // 68).tolist())

    def written() -> dict[str, bytes]:
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in (tmp_path / "g").glob("*/*.parquet")}

    before = written()
    assert {name for name in before if name.startswith("pairs")} == {f"pairs/{s}.parquet" for s in PAIRED}
    stamp = (tmp_path / "g" / "edges" / "cut0.parquet").stat().st_mtime_ns
    (tmp_path / "g" / "edges" / "serve.parquet").unlink()
    (tmp_path / "g" / "pairs" / "test.parquet").unlink()
    texts = (tmp_path / "g" / TEXTS).stat().st_mtime_ns
    build_graph(config, world["ingest"], featurize, tmp_path / "g", QUIET, cpus=2, num_hosts=1)
    assert written() == before
    assert (tmp_path / "g" / "edges" / "cut0.parquet").stat().st_mtime_ns == stamp
    assert (tmp_path / "g" / TEXTS).stat().st_mtime_ns == texts


def test_client_sees_exactly_the_graph(world: dict[str, Any]) -> None:
    graph, items = world["graph"], 68
    text = torch.from_numpy(load_arrays(world["root"] / "featurize" / "text.safetensors")["vector"]).float()
    extra = {"hgnn_cut0": world["root"] / "embeddings"}
    embedding = torch.randn(items, 4)
    shuffled = torch.randperm(items)
    for part, rows in enumerate((shuffled[:30], shuffled[30:])):
        save_arrays(extra["hgnn_cut0"] / f"part-{part:05d}.safetensors",
                    {"gid": rows.numpy(), "embedding": embedding[rows].numpy()})  # fmt: skip
    snapshots = world["counts"]["snapshots"]

    def look(client: GraphClient) -> dict[str, Any]:
        gids = torch.tensor([67, 3, 3, 50, 41, 0, 66, *range(20, 40)])  # of every type, in no order, one twice
        seen: dict[str, Any] = {"local": client.local_gids(), "types": client.table.types_of(gids), "gids": gids}
        seen["all"] = [client.sample(gids, s["index"], -1) for s in snapshots]
        seen["edges"] = [client.edges(s["index"]) for s in snapshots]
        seen["text"], seen["hgnn"] = client.features("text", gids), client.features("hgnn_cut0", gids)
        seen["sorted"] = client.features("text", gids.sort().values)
        seen["drawn"] = [client.sample(gids, 2, 2, torch.Generator().manual_seed(7)) for _ in range(2)]
        seen["fresh"] = [client.sample(torch.tensor([3]), 2, 2) for _ in range(300)]
        seen["none"] = client.sample(torch.empty(0, dtype=torch.int64), 2, 2)
        return seen

    seen = with_client(graph, look, extra)
    gids, types = seen["gids"], seen["types"]
    assert sorted(seen["local"].tolist()) == list(range(items))
    assert types.tolist() == [0 if g < 40 else 1 if g < 65 else 2 for g in gids.tolist()]
    assert torch.equal(seen["text"], text[gids])
    assert torch.equal(seen["sorted"], text[gids.sort().values])
    assert torch.equal(seen["hgnn"], embedding[gids])
    for snapshot, sampled, edges in zip(snapshots, seen["all"], seen["edges"], strict=True):
        truth = true_edges(graph, snapshot["name"])
        found: dict[tuple[int, int], float] = {}
        for (i, j), (src, dst, weight) in edges.items():
            assert all(_type(g) == i for g in src.tolist())
            assert all(_type(g) == j for g in dst.tolist())
            pairs = list(zip(src.tolist(), dst.tolist(), strict=True))
            assert len(pairs) == len(set(pairs))
            found |= dict(zip(pairs, weight.tolist(), strict=True))
        assert found == pytest.approx(truth, abs=1e-6)
        expected = sorted((s, n) for n, g in enumerate(gids.tolist()) for s, d in truth if d == g)
        answer = [e for n in sampled.values() for e in zip(*(column.tolist() for column in n), strict=True)]
        assert sorted((src, place) for place, src, _ in answer) == expected
        assert all(abs(weight - truth[src, int(gids[place])]) < 1e-6 for place, src, weight in answer)
    _check_draws(seen, true_edges(graph, snapshots[2]["name"]))
    assert all(len(n.src_gid) == 0 for n in seen["none"].values())


def _type(gid: int) -> int:
    return 0 if gid < 40 else 1 if gid < 65 else 2


def _check_draws(seen: dict[str, Any], truth: dict[tuple[int, int], float]) -> None:
    first, second = seen["drawn"]
    gids = seen["gids"].tolist()
    for relation, sampled in first.items():
        assert torch.equal(sampled.src_gid, second[relation].src_gid)
        assert torch.equal(sampled.dst_pos, sampled.dst_pos.sort().values)
        pairs = list(zip(sampled.src_gid.tolist(), sampled.dst_pos.tolist(), strict=True))
        for src, place, weight in zip(*zip(*pairs, strict=True), sampled.weight.tolist(), strict=True):
            assert abs(weight - truth[src, gids[place]]) < 1e-6
        assert len(pairs) == len(set(pairs))  # without replacement
        for position, gid in enumerate(gids):
            possible = [s for s, d in truth if d == gid and (_type(s), _type(d)) == relation]
            drawn = [s for s, p in pairs if p == position]
            assert len(drawn) == min(2, len(possible))
            assert set(drawn) <= set(possible)
    possible = sorted(s for s, d in truth if d == 3 and _type(s) == 0)
    times = torch.bincount(torch.cat([s[0, 0].src_gid for s in seen["fresh"]]), minlength=68)[possible].double()
    expected = 300 * 2 / len(possible)
    assert times.min() > 0  # fresh every time: nothing is left out for long
    chi_square = float(((times - expected) ** 2 / expected).sum())
    assert chi_square < 2 * len(possible) + 20


@pytest.mark.parametrize("snapshots", [0, 1])
def test_a_graph_with_hardly_anything_in_it(ray_local: None, tmp_path: Path, snapshots: int) -> None:
    """One item type and no edge at all; and one with a single edge."""
    save_arrays(tmp_path / "text.safetensors", {"vector": np.eye(4, dtype=np.float16)})
    (tmp_path / "edges").mkdir()
    import pyarrow as pa

    edges = []
    if snapshots:
        ends = {"src": np.array([1], np.int32), "dst": np.array([2], np.int32)}
        pq.write_table(pa.table(ends | {"weight": np.array([3], np.float32)}), tmp_path / "e")
        edges = [(3, tmp_path / "e")]
    write_partitions(edges, np.zeros(4, np.int16), tmp_path / "text.safetensors", tmp_path, 1, 0)
    sampled, edge, text = with_client(
        tmp_path, lambda c: (c.sample(torch.arange(4), 3, 5), c.edges(3), c.features("text", torch.arange(4)))
    )
    assert torch.equal(text, torch.eye(4))
    if snapshots:
        (found,) = sampled.values()
        assert [column.tolist() for column in found] == [[2], [1], [3.0]]  # nothing ends in 1: its strength is none
        assert edge[0, 0][0].tolist() == [1]
    else:
        assert sampled == edge == {}


@pytest.mark.parametrize("parts", [2, 3])
def test_partitions_together_are_the_graph(world: dict[str, Any], tmp_path: Path, parts: int) -> None:
    """Read back without servers: every edge and node once, also of the type with three items and of empty corners."""
    import json

    import dgl

    from recsys_ray.graph.dgl.sampling import LocalGraph, NodeTable

    snapshots = world["counts"]["snapshots"]
    files = [(s["index"], world["graph"] / "edges" / f"{s['name']}.parquet") for s in snapshots]
    ntype = np.repeat([0, 1, 2], [40, 25, 3]).astype(np.int16)
    text = world["root"] / "featurize" / "text.safetensors"
    write_partitions(files, ntype, text, tmp_path, parts, 0)
    config = tmp_path / "partitions" / "graph.json"
    table = NodeTable.load(tmp_path, json.loads(config.read_text()))
    assert sorted(torch.cat([table.gids_in(p) for p in range(parts)]).tolist()) == list(range(68))
    found: dict[int, list[tuple[tuple[int, int], float]]] = defaultdict(list)
    for p in range(parts):
        graph, _, _, book, _, ntypes, _ = dgl.distributed.load_partition(str(config), p)
        assert ntypes == ["t0", "t1", "t2"]
        assert book.partid == p
        client = GraphClient.__new__(GraphClient)  # its edges() needs no server
        client.table, client.part, client._local = table, p, LocalGraph(graph, tmp_path, table, p)
        for s in snapshots:
            for src, dst, weight in client.edges(s["index"]).values():
                pairs = zip(src.tolist(), dst.tolist(), strict=True)
                found[s["index"]] += zip(pairs, weight.tolist(), strict=True)
    for s in snapshots:
        truth = true_edges(world["graph"], s["name"])
        assert len(found[s["index"]]) == len(truth)
        assert dict(found[s["index"]]) == pytest.approx(truth, abs=1e-6)


def test_a_killed_server_is_reported_and_leaves_nothing(world: dict[str, Any]) -> None:
    errors: list[Exception] = []
    servers = PartitionServers(world["graph"], clients=1, on_failure=errors.append)
    ray.kill(servers._actors[0])
    end = time.monotonic() + 30
    while not errors and time.monotonic() < end:
        time.sleep(0.1)
    servers.stop()
    assert isinstance(errors[0], ray.exceptions.RayActorError)
    assert not list(Path("/dev/shm").glob(f"*{servers._name}*"))
    assert len(with_client(world["graph"], lambda client: client.local_gids())) == 68  # and the next attempt works


def test_only_this_host_reaches_the_server_of_a_whole_graph(world: dict[str, Any]) -> None:
    with PartitionServers(world["graph"], clients=1) as servers:
        ((_, port),) = json.loads(servers.address)["servers"]

        def listening() -> list[str]:
            sockets = psutil.net_connections("tcp")
            return [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN and one.laddr.port == port]

        deadline = time.monotonic() + 30
        while not listening():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert listening() == ["127.0.0.1"]


def test_draws_are_uniform_subsets() -> None:
    start, degree = torch.tensor([0, 5, 5, 8]).repeat(3000), torch.tensor([5, 0, 3, 4]).repeat(3000)
    counts, picks = draw(start, degree, 3, torch.Generator().manual_seed(0))
    assert counts[:4].tolist() == [3, 0, 3, 3]
    rows = picks.view(3000, 9)
    assert rows[:, 3:6].sort().values.unique(dim=0).tolist() == [[5, 6, 7]]  # a short segment is taken whole
    subsets, times = rows[:, :3].sort().values.unique(dim=0, return_counts=True)
    assert len(subsets) == 10  # every way to choose 3 of 5, and never one twice
    assert (times - 300).abs().max() < 80
    assert draw(start, degree, -1)[0].tolist() == degree.tolist()


def test_errors_say_what_to_do(world: dict[str, Any], tmp_path: Path) -> None:
    of_others = set(Path("/dev/shm").glob("*recsysray*"))  # runs that go on beside, or that somebody killed
    with pytest.raises(ArtifactError, match="run graph again"):
        PartitionServers(tmp_path, clients=1)
    with pytest.raises(ArtifactError, match="run hgnn again"):
        PartitionServers(world["graph"], clients=1, features={"x": tmp_path})
    text = world["root"] / "featurize" / "text.safetensors"
    ntype = np.repeat([0, 1, 2], [40, 25, 3]).astype(np.int16)
    write_partitions([], ntype, text, tmp_path, 2, 0)
    with pytest.raises(UserError, match="each host serves one"):
        PartitionServers(tmp_path, clients=1)
    assert set(Path("/dev/shm").glob("*recsysray*")) <= of_others
