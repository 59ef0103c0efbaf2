"""A bundle that lacks two items, beside what the stages made of these when they knew them: real models throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import bundle_world
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bundle_world import DAY, END, EVENTS, World, make_world, publish_arrays, published, write_ingest
from safetensors.torch import save_file
from toy_graph import ToyGraph

from recsys_ray.bundle.extend import extend_bundle
from recsys_ray.config import GraphConfig, HgnnConfig, TextConfig, load_config
from recsys_ray.core.progress import Progress
from recsys_ray.graph.activity import COLUMNS, NEVER, count_events, describe
from recsys_ray.graph.edges import Edges, with_texts
from recsys_ray.graph.pairs import ONE, PairCounter, Window, keep_best, message_weights, strengths
from recsys_ray.graph.texts import TextPairs, nearest_texts, text_pairs
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.encoder import make_hgnn
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.signature import SignedSource, item_signatures
from recsys_ray.scoring.choices import choices_file
from recsys_ray.scoring.memory import RIDGES, TEXT_USERS, memory_file
from recsys_ray.scoring.ridge import memory_of, solve
from recsys_ray.scoring.scorer import LEARNED, TRENDS, UNSEEN, VECTOR, ScoreSpec
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import publish, save_arrays
from recsys_ray.text.encoder import encoder_fingerprint, find_model
from recsys_ray.text.featurize import encode_alike
from recsys_ray.two_tower.batches import ArrayFeatures
from recsys_ray.two_tower.stage import catalogue_of
from recsys_ray.two_tower.towers import TowerSpec, TwoTower
from recsys_ray.two_tower.training import item_vectors, learned_vectors

SIZES = (9, 10, 11)
TYPES = ["audiobook", "music", "podcast"]
HGNN_CONFIG = HgnnConfig(out_dim=16, signature_dim=64)
HISTORY = 200  # longer than any: the bundle's histories then hold all that makes edges
GIVEN = np.array([0.3, -0.2, 0.1], np.float32)  # to items that nobody had, by type
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Late:
    """A bundle without two items, and what the stages made of these when they knew them."""

    whole: World  # with them
    world: World  # without them
    bundle: Path
    linked: str  # id of one with edges
    lonely: str  # and of one without events
    embedding: dict[str, np.ndarray]
    vector: dict[str, np.ndarray]
    trickle: pa.Table  # what users did with the linked one

    def items(self, *ids: str, **changes: list) -> pa.Table:
        """Their rows as an items table."""
        rows = {
            "item_id": list(ids),
            "item_type": [name.split("-")[0] for name in ids],
            "title": [f"Title of {name}" for name in ids],
            "categories": ["a"] * len(ids),
            "published_at": pa.array([published(name) for name in ids], pa.int64()),
        }
        return pa.table({**rows, **changes})


def true_edges(world: World, size: int) -> Edges:
    """Of the serve snapshot, by the graph stage's rules."""
    events = world.events[world.events[:, 2] == EVENTS.index("stream")]
    counter = PairCounter(size, Window(END - 90 * DAY, END), 100, load_config().graph.pair_half_life)
    parts = list(counter.add(*(np.ascontiguousarray(events[:, column]) for column in (0, 1, 3))))
    assert not parts
    kept = keep_best(counter.flush(), world.ntype.astype(np.int16), 1, 30, 0)
    return Edges(kept.src.astype(np.int64), kept.dst.astype(np.int64), kept.support, kept.weight / ONE)


def users_at(world: World, size: int) -> np.ndarray:
    """int64 [items]: how many users had each at the serve snapshot."""
    events = world.events[(world.events[:, 2] == EVENTS.index("stream")) & (world.events[:, 3] >= END - 90 * DAY)]
    return np.bincount(np.unique(events[:, :2], axis=0)[:, 1], minlength=size)


def completed(edges: Edges, world: World, text: np.ndarray, gone: np.ndarray) -> Edges:
    """With what texts tell; to the items that are ``gone`` from the bundle each other's texts tell nothing."""
    size, users = len(text), users_at(world, len(text))
    had, parts = np.flatnonzero(users), []
    for own, known in ((np.setdiff1d(np.arange(size), gone), had), (gone, np.setdiff1d(had, gone))):
        parts.append(text_pairs(nearest_texts(text, known, text[own], own, threads=1), users, own))
    texts = TextPairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    types = len(np.unique(world.ntype))
    found = with_texts(edges, texts, GraphConfig().text_users, world.ntype, np.ones((types, types), bool))
    return found._replace(src=found.src.astype(np.int64), dst=found.dst.astype(np.int64))


def messages(edges: Edges, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """src, dst and weight of the messages over these edges, and the strength of all items."""
    strength = strengths(edges.dst, edges.weight, size)
    return edges.src, edges.dst, message_weights(edges.src, edges.dst, edges.weight, strength), strength


def make_late(root: Path) -> Late:
    """A world that the stages knew whole, and its bundle without a linked and a lonely item."""
    whole = make_world(root / "whole", per_type=SIZES, users=30)
    whole = replace(whole, events=whole.events[whole.events[:, 1] != 12])  # nobody touches item 12
    size = len(whole.item_ids)
    encoder = encoder_fingerprint(find_model("packaged"), 128, "fp32")
    titles = pa.array([f"Title of {name}. a" for name in whole.item_ids], pa.large_string())
    text = encode_alike(titles, TextConfig(), "fp32", encoder, root / "texts", QUIET, 1)

    gid, event, moment = (whole.events[:, column] for column in (1, 2, 3))
    counts, first = count_events(gid, event, moment, END, [EVENTS.index("stream")], size)
    dates = np.array([published(name) or NEVER for name in whole.item_ids])
    activity = describe(counts, first, dates, whole.ntype, END).astype(np.float16)

    torch.manual_seed(1)
    linked = int(np.bincount(whole.events[whole.ntype[whole.events[:, 1]] == 2, 1], minlength=size).argmax())
    gone = np.array([12, linked])  # the other one is a podcast with many users
    edges = completed(true_edges(whole, size), whole, text, gone)
    src, dst, weight, strength = messages(edges, size)
    types = ItemTypes(torch.from_numpy(np.cumsum([0, *SIZES])))
    model = make_hgnn(384, HGNN_CONFIG, types)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # away from identities: every weight counts
    store = LocalStore(size, HGNN_CONFIG.state_dim)
    packed = torch.from_numpy(item_signatures(whole.item_ids, 64).copy())
    graph = ToyGraph(src, dst, types.starts, torch.from_numpy(text).float(), weight)
    embedding = embed_items(model, SignedSource(graph, packed, 64), 0, torch.arange(size), store)

    kept = np.setdiff1d(np.arange(size), gone)
    spec = TowerSpec(
        num_types=3, events=EVENTS, text_dim=384, hgnn_dim=16, activity_dim=COLUMNS, num_countries=2, num_languages=0,
        num_categories=1, tastes={"music": 4}, layers=[16, 8], id_dim=4, id_rows=size, num_items=size, item_types=TYPES,
        countries=["DE", "SE"], history=HISTORY, window_days=90,
    )  # fmt: skip
    towers = TwoTower(spec).eval()
    towers.ids.assign(torch.from_numpy(np.isin(np.arange(size), kept).astype(float)))  # new items have no own vector
    frame = pl.DataFrame({"ntype": whole.ntype, "language": [None] * size, "categories": [["a"]] * size})
    frame = frame.with_columns(pl.col("language").cast(pl.String))
    catalogue = catalogue_of(frame, {"serve": activity}, [], ["a"])
    with torch.no_grad():
        features = ArrayFeatures(text=text, hgnn_serve=embedding)
        vectors = item_vectors(towers, features, catalogue, "serve").numpy()
        learned = learned_vectors(towers, features, catalogue, "serve").numpy()

    trend = 0.1 * np.random.default_rng(4).standard_normal(size, dtype=np.float32)
    trend[gone] = 0  # nothing is known of arrivals
    unseen = np.where(users_of_items(whole) == 0, GIVEN[whole.ntype], 0)
    assert np.delete(unseen, gone)[np.delete(whole.ntype, gone) == whole.ntype[12]].any()  # others like the lonely one
    terms = {TRENDS: trend, UNSEEN: unseen}
    place = np.full(size, -1)
    place[kept] = np.arange(len(kept))
    known = whole.events[~np.isin(whole.events[:, 1], gone)].copy()
    known[:, 1] = place[known[:, 1]]
    part = replace(
        whole, root=root / "part", item_ids=[whole.item_ids[g] for g in kept], ntype=whole.ntype[kept],
        available=whole.available[kept], vectors=vectors[kept], events=known,
        terms={name: term[kept] for name, term in terms.items()},
    )  # fmt: skip
    everything = replace(whole, root=root / "everything", vectors=vectors, terms=terms)
    hidden, users = store.table.numpy(), users_at(whole, size)
    write_stages(everything, text, embedding.numpy(), (hidden, strength, users), model, towers, learned, spec, encoder)
    everything.bundle()
    fewer = replace(spec, num_items=len(kept))
    known_towers = TwoTower(fewer)
    state = towers.state_dict()
    known_towers.load_state_dict({**state, "ids.row": state["ids.row"][torch.from_numpy(kept)]})
    sent = hidden[kept], strength[kept], users[kept]
    write_stages(part, text[kept], embedding.numpy()[kept], sent, model, known_towers, learned[kept], fewer, encoder)
    mine = whole.events[whole.events[:, 1] == linked]
    trickle = pa.table(
        {
            "user_id": [whole.user_ids[uid] for uid in mine[:, 0]],
            "item_id": [whole.item_ids[linked]] * len(mine),
            "event": [EVENTS[code] for code in mine[:, 2]],
            "timestamp": mine[:, 3],
        }
    )
    names = {12: whole.item_ids[12], linked: whole.item_ids[linked]}
    return Late(
        everything, part, part.bundle().path, names[linked], names[12], {names[g]: embedding[g].numpy() for g in gone},
        {names[g]: np.append(vectors[g], unseen[g]) for g in gone}, trickle,
    )  # fmt: skip


def users_of_items(world: World) -> np.ndarray:
    """int32 [items]: how many users streamed each; of the second item of each type it is said that nobody did."""
    streams = np.unique(world.events[world.events[:, 2] == EVENTS.index("stream"), :2], axis=0)
    had = np.bincount(streams[:, 1], minlength=len(world.item_ids)).astype(np.int32)
    return np.where([name.endswith("-00001") for name in world.item_ids], 0, had).astype(np.int32)


def write_stages(world, text, embedding, sent, model, towers, learned, spec, encoder) -> None:
    """The four stages' folders of a world, from what real models made."""
    root, size = world.root, len(world.item_ids)
    root.mkdir()
    write_ingest(world, TYPES, np.bincount(world.ntype).tolist(), np.random.default_rng(0))
    facts = {"config": bundle_world.FEATURIZE["config"], "counts": {"precision": "fp32", "encoder": encoder}}
    publish_arrays(root / "featurize", {"text.safetensors": {"vector": text}}, **facts)
    work = root / "hgnn"
    hidden, strength, users = sent
    part = {"gid": np.arange(size), "embedding": embedding, "hidden": hidden.astype(np.float16), "strength": strength}
    part["users"] = users.astype(np.int32)
    save_arrays(work / "embeddings" / "serve" / "part-00000.safetensors", part)
    save_file(model.state_dict(), work / "model.safetensors")
    publish(work, "hgnn", "hgnn", config={"hgnn": HGNN_CONFIG.model_dump(mode="json")})
    work = root / "two_tower"
    save_arrays(work / "hgnn" / "items" / "serve.safetensors", {VECTOR: world.vectors, LEARNED: learned, **world.terms})
    had = users_of_items(world)
    save_arrays(choices_file(work), {"serve": np.stack([had, np.zeros_like(had), np.zeros_like(had)])})
    ScoreSpec(
        memory=0.1, ridge=RIDGES[0], text_users=TEXT_USERS[1], trends=[0.5, 0.0, 0.5], unseen_share=[0.1, 0.1, 0.1]
    ).save(work / "hgnn")
    save_file(towers.state_dict(), work / "hgnn" / "model.safetensors")
    spec.save(work / "hgnn" / "spec.json")
    (work / "hgnn" / "metrics.json").write_text("[]")
    edges = true_edges(world, size)
    near = nearest_texts(text, np.flatnonzero(users), text, np.arange(size), threads=1)
    memory = memory_of([solve(edges, users, world.ntype, 0, len(world.ntype))], near, users, world.ntype)
    memory.save(memory_file(work, "serve"))
    publish(work, "two_tower", "two_tower")


def extend(late: Late, out: Path, items: pa.Table, trickle: pa.Table | None = None, **options) -> Path:
    """The new bundle's folder, below ``out``."""
    out.mkdir(exist_ok=True)
    pq.write_table(items, out / "new.parquet")
    if trickle is not None:
        pq.write_table(trickle, out / "trickle.parquet")
    path = out / "trickle.parquet" if trickle is not None else None
    return extend_bundle(late.bundle, out / "new.parquet", path, QUIET, out=out / "bundles", **options).path


def rows_of(bundle: Path, *ids: str) -> dict[str, np.ndarray]:
    """Embedding, and vector with the sum of the item terms after it, of items of a bundle."""
    items = Recommender.load(bundle).items
    gids = [items.find(name) for name in ids]
    files = {"embedding": "hgnn.safetensors", "vector": "vectors.safetensors"}
    return {name: mapped_arrays(bundle / file)[name].numpy()[gids] for name, file in files.items()}
