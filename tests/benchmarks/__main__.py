"""Benchmarks: each prints what it does in a second and the ratio to something else measured in the same run.

make bench          (or: python -m tests.benchmarks NAME ...)
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DGLBACKEND", "pytorch")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' worlds

_REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Median of a few runs after one to warm up."""
    work()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def line(name: str, ours: float, other: float, unit: str, amount: float, than: str) -> None:
    print(f"{name:<34} {amount / ours:>12,.0f} {unit}/s   {other / ours:>6.2f} times {than}")


def encoder() -> None:
    """Text encoding in order of length against the order in which texts come."""
    from recsys_ray.text.encoder import Encoder, find_model

    draw = np.random.default_rng(0)
    words = ["quiet", "galaxy", "notebook", "mystery", "jazz", "winter", "history", "river", "signal", "garden"]
    texts = [" ".join(draw.choice(words, int(n))) for n in draw.geometric(0.05, 512).clip(2, 120)]
    model = Encoder(find_model("packaged"), max_tokens=128, batch_size=32, precision="fp32")
    by_length = sorted(texts, key=len)

    def in_batches(order: list[str]) -> None:
        for start in range(0, len(order), 32):
            model.encode(order[start : start + 32])

    ordered, unordered = seconds(lambda: in_batches(by_length)), seconds(lambda: in_batches(texts))
    line("encoder, sorted by length", ordered, unordered, "texts", len(texts), "as fast as unsorted")


def sampler() -> None:
    """Our neighbour sampling inside a partition against DGL's, on the same graph."""
    import dgl

    from recsys_ray.graph.dgl.sampling import draw

    nodes, degree, fanout, seeds = 50_000, 30, 5, 10_000
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(nodes, (nodes * degree,), generator=generator)
    dst = torch.arange(nodes).repeat_interleave(degree)
    graph = dgl.graph((src, dst), num_nodes=nodes).formats("csc")
    start, length = torch.arange(nodes) * degree, torch.full((nodes,), degree)
    chosen = torch.randperm(nodes, generator=generator)[:seeds]

    def ours() -> torch.Tensor:
        _, picks = draw(start[chosen], length[chosen], fanout, generator)
        return src[picks]

    theirs = seconds(lambda: dgl.sampling.sample_neighbors(graph, chosen, fanout))
    line("neighbour sampling, one relation", seconds(ours), theirs, "nodes", seeds, "as fast as DGL")


def index() -> None:
    """The search among the items of one type, by the number of items: through codes, against comparing every vector;
    lists of ten and of a hundred, one query and sixteen at once; under filters that allow some of the items, against
    the same search without one. One thread. Vectors as in ``answers``."""
    for size in (30_000, 300_000, 1_000_000):
        _index_of(size)


def large_index() -> None:
    """As ``index``, with ten million items. Needs 12 GB."""
    _index_of(10_000_000)


def _index_of(size: int) -> None:
    import tempfile

    from recsys_ray.config import IndexConfig
    from recsys_ray.scoring.scorer import Pairs
    from recsys_ray.serving.index import TypeIndex

    draw, latent, none = np.random.default_rng(0), 32, Pairs.nothing()
    directions = draw.standard_normal((latent, 128), dtype=np.float32)
    centres = draw.standard_normal((size // 50, latent), dtype=np.float32)

    def points(of: np.ndarray) -> np.ndarray:
        near = centres[of] + 0.5 * draw.standard_normal((len(of), latent), np.float32)
        values = near @ directions + 0.1 * draw.standard_normal((len(of), 128), np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    vectors = np.zeros((size, 129), np.float32)
    for start in range(0, size, 100_000):
        part = vectors[start : start + 100_000]
        part[:, :-1] = points(draw.integers(0, len(centres), len(part)))
    queries = np.concatenate([points(draw.integers(0, len(centres), 256)), np.ones((256, 1), np.float32)], axis=1)
    gids = np.arange(size, dtype=np.int32)
    began = time.perf_counter()
    made = TypeIndex.build("", vectors, gids, IndexConfig(), queries)
    built = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "codes.safetensors"
        made.save(file)
        began = time.perf_counter()
        made = TypeIndex.load(file, "", gids, vectors, made.settings)
        made.search_each(queries[:1], 10, none)
        loaded = time.perf_counter() - began
        print(f"index, {size:>10,} items: built in {built:.0f} s, {file.stat().st_size / 2**20:,.0f} MB, "
              f"loaded in {loaded:.2f} s, recall {made.recall:.3f} of {made.candidates} candidates")  # fmt: skip
    few = queries[:32]
    exact = seconds(lambda: [np.argpartition(-(vectors @ query), 10) for query in few[:4]]) / 4

    def each(k: int, together: int, allowed: np.ndarray | None = None) -> float:
        starts = range(0, len(few) - together + 1, together)
        return seconds(lambda: [made.search_each(few[at : at + together], k, none, allowed) for at in starts]) / (
            len(starts) * together
        )

    alone = each(10, 1)
    for name, taken in (("k=10", alone), ("k=100", each(100, 1)), ("k=10, 16 at once", each(10, 16))):
        line(f"  {name}", taken, exact, "queries", 1, "as fast as comparing all")
    for share in (0.5, 0.1, 0.01, 0.001):
        taken = each(10, 1, draw.random(size) < share)
        line(f"  k=10, {share:.1%} allowed", taken, alone, "queries", 1, "as fast as without a filter")


def memory() -> None:
    """What a full history brings to mind against the exact search beside it; fitting it against EASE's one inverse."""
    from recsys_ray.graph.edges import Edges
    from recsys_ray.scoring.memory import NEIGHBOURS, RIDGES, Memory
    from recsys_ray.scoring.ridge import solve

    draw = np.random.default_rng(0)
    items, near = 50_000, NEIGHBOURS
    vectors = draw.standard_normal((items, 128)).astype(np.float32)
    src, dst = np.repeat(np.arange(items), near), draw.integers(0, items, items * near)
    made = draw.random((items * near, 1), np.float32)
    whole = Memory.of_edges(src, dst, made, np.ones(items, np.int32), np.zeros(items, np.int16))
    history, nobody = draw.choice(items, 50, replace=False), np.zeros(50, np.int64)
    search = seconds(lambda: np.argpartition(-(vectors @ vectors[0]), 10))
    line("memory of 50 items' history", seconds(lambda: whole.recall(nobody, history, 4.0)), search, "users", 1,
         "as fast as exact search of 50,000 items")  # fmt: skip

    few = 2_000
    had = (draw.random((20_000, few)) < 0.005).astype(np.float32)
    shared = had.T @ had
    users = np.diag(shared).astype(np.int64)
    np.fill_diagonal(shared, 0)
    dst, src = np.nonzero(shared)
    pairs = Edges(src, dst, shared[src, dst].astype(np.int64), shared[src, dst])
    dense = shared + np.diag(users + RIDGES[0])
    inverse = seconds(lambda: [np.linalg.inv(dense) for _ in RIDGES])
    ntype = np.zeros(few, int)
    line("memory, fit with all ridges", seconds(lambda: solve(pairs, users, ntype, 0, few)), inverse, "items", few,
         "as fast as EASE's inverses")  # fmt: skip


def answers() -> None:
    """An answer for three item types out of bundles of 10^4, 10^5 and 10^6 items, in process, one thread: as the
    catalogue grows, an answer may take longer by what the index takes, and by nothing else. Builds the bundles, which
    takes minutes; each type has a third of the items, and is searched through codes from 10,000 items on. The
    vectors have the spread of trained ones (32 directions of 128)."""
    import tempfile
    from dataclasses import replace

    from bundle_world import make_world

    from recsys_ray.serving.recommender import Recommender

    taken: dict[int, tuple[float, float]] = {}
    for size in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            third = size // 3
            shape = (third, third, size - 2 * third)
            world = make_world(Path(folder), shape, 300, 128, 384, memory=0.1, history=50, latent=32)
            settings = {**world.config.model_dump(), "index": {"min_recall": 0.0}}
            replace(world, config=world.config.model_validate(settings)).bundle()
            recommender = Recommender.load(folder, verify=False)
            known = [user for user, uid in recommender.users.spread(100) if len(recommender.histories.recent(uid).gids)]

            def with_history(answer: Recommender = recommender, users: list[str] = known) -> None:
                for user in users:
                    answer.recommend(user)

            def without(answer: Recommender = recommender) -> None:
                for _ in range(50):
                    answer.recommend()

            taken[size] = seconds(with_history) / len(known), seconds(without) / 50
        smallest = taken[10_000]
        for name, ours, other in zip(("history", "no history"), taken[size], smallest, strict=True):
            times = f"{ours * 1e3:>8.2f} ms   {ours / other:>6.2f} times as long as with 10,000"
            print(f"answer, {size:>9,} items, {name:<12} {times}")


def batch() -> None:
    """A block of batch-recommend, written to Parquet, against one answer after the other, in one process and thread:
    100,000 items in three types, users with histories of 50. Exact and through codes."""
    import tempfile
    from dataclasses import replace

    from bundle_world import make_world

    from recsys_ray.serving.batch import Answerer, Job
    from recsys_ray.serving.requests import Question
    from recsys_ray.storage.store import Place

    users, few = 2_048, 200
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), (33_333, 33_333, 33_334), users, 128, 384, memory=0.1, history=50, latent=32)
        for name, exact_up_to in (("exact", 100_000), ("codes", 10_000)):
            settings = {**world.config.model_dump(), "index": {"min_recall": 0.0, "exact_up_to": exact_up_to}}
            bundle = replace(world, config=world.config.model_validate(settings)).bundle(name).path
            for what, reasons in (("reasons", True), ("no reasons", False)):
                job = Job(str(bundle), Place(f"{folder}/out"), Question(), reasons, users, users, False)
                answerer = Answerer(job)

                def one_by_one(answerer: Answerer = answerer) -> None:
                    for user_id in answerer.recommender.users.ids(0, few):
                        answerer.recommender.recommend(user_id)

                whole = seconds(lambda answerer=answerer: answerer.answer(0))  # type: ignore[misc]
                line(f"batch, {name}, {what}", whole, seconds(one_by_one) * users / few, "users", users,
                     "as fast as one by one")  # fmt: skip


def store() -> None:
    """A read of a user's 50 latest live events among 200,000: SQLite against the same with 2,000 events, and while a
    thread of the process writes; Redis against an empty round trip to it."""
    import tempfile
    import threading

    from redis_world import redis_server

    from serve.store import LiveEvent, Store, open_store

    def filled(uri: str, count: int) -> Store:
        made = open_store(uri)
        for start in range(0, count, 2_000):
            numbers = range(start, start + 2_000)
            made.add_events([LiveEvent(f"e{n}", f"u{n % (count // 100)}", f"i{n}", "stream", n) for n in numbers])
        return made

    def reading(made: Store) -> Callable[[], None]:
        def work() -> None:
            for number in range(500):
                made.events_of([f"u{number % 20}"], 0, 50)

        return work

    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as (uri, _):
        small, large = (filled(f"sqlite://{folder}/{count}.db", count) for count in (2_000, 200_000))
        few, many = seconds(reading(small)), seconds(reading(large))
        line("store, SQLite, 200,000 events", many, few, "reads", 500, "as fast as with 2,000")
        over = threading.Event()

        def write() -> None:
            number = 0
            while not over.is_set():
                large.add_events([LiveEvent(f"w{number}", f"u{number % 20}", "i", "stream", number)])
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        beside = seconds(reading(large))
        over.set()
        writer.join()
        line("store, SQLite, beside a writer", beside, many, "reads", 500, "as fast as without")
        import redis

        client = redis.Redis.from_url(uri)
        empty = seconds(lambda: [client.ping() for _ in range(500)])
        line("store, Redis, 200,000 events", seconds(reading(filled(uri, 200_000))), empty, "reads", 500,
             "as fast as PING")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    benchmarks = {work.__name__: work for work in (encoder, sampler, index, memory, answers, batch, store)}
    for name in sys.argv[1:] or benchmarks:
        (benchmarks | {"large_index": large_index})[name]()
