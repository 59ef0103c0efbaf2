"""A checkerboard of users and items: even users like even items of two types, odd users odd ones, and nothing else.

A user touches 31 of the 40 items per type that they like before the validation period and the other 9 in it, so that
whoever has learned the board finds every one among the first ten, and whoever has not finds a fifth of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from recsys_ray.config import TwoTowerConfig
from recsys_ray.core.clock import DAY
from recsys_ray.core.seeds import seed_from
from recsys_ray.data.tables import Events
from recsys_ray.graph.activity import COLUMNS
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.scoring.choose import Moment
from recsys_ray.two_tower.batches import ArrayFeatures, ItemFeatures
from recsys_ray.two_tower.examples import HistoryRules, build_examples, build_queries, validation_examples
from recsys_ray.two_tower.rows import take
from recsys_ray.two_tower.towers import TowerSpec, TwoTower
from recsys_ray.two_tower.training import TowerTask, TowerTrainer

USERS, LIKED, HELD_OUT, TYPES = 30, 40, 9, 2
ITEMS = 2 * LIKED * TYPES
CHANCE = 10 / (2 * LIKED - (LIKED - HELD_OUT))
VALID, TEST = 70 * DAY, 85 * DAY
TEXT = HGNN = 16
ACTIVITY = COLUMNS
SNAPSHOTS = [
    Snapshot("cut0", 0, 5 * DAY, 0, (5 * DAY, 40 * DAY)),
    Snapshot("cut1", 1, 40 * DAY, 0, (40 * DAY, VALID)),
    Snapshot("valid", 2, VALID, 0, (VALID, TEST)),
]
RULES = HistoryRules(length=80, window_days=None)
CONFIG = TwoTowerConfig(layers=(32, 16), batch_size=64, epochs=6, patience=9, learning_rate=0.01, history=80)


def board_events() -> Events:
    """Every user's events; event 0 is a stream, 1 a weak signal that comes an hour before some streams."""
    random = np.random.default_rng(0)
    rows = []
    for uid in range(USERS):
        for kind in range(TYPES):
            liked = kind * 2 * LIKED + uid % 2 + 2 * random.permutation(LIKED)
            before = random.integers(DAY, VALID, LIKED - HELD_OUT)
            moments = np.concatenate([before, random.integers(VALID, TEST, HELD_OUT)])
            rows += [(uid, t, g, 0) for g, t in zip(liked, moments, strict=True)]
            rows += [(uid, t - 3600, g, 1) for g, t in zip(liked[:5], moments[:5], strict=True)]
    uid, moment, gid, event = np.array(sorted(rows), np.int64).T
    return Events(uid, gid.astype(np.int32), event.astype(np.int8), moment)


def board_features(telling: str) -> ArrayFeatures:
    """``telling`` is where the board shows: in the 'text', in the 'hgnn' embeddings, or 'nowhere'."""
    random = torch.Generator().manual_seed(1)

    def vectors(told: bool) -> torch.Tensor:
        noise = torch.randn(ITEMS, TEXT, generator=random)
        side = torch.where(torch.arange(ITEMS) % 2 == 0, 1.0, -1.0)[:, None]
        return torch.nn.functional.normalize(noise + 2 * side if told else torch.ones(ITEMS, TEXT), dim=-1)

    tables = {f"hgnn_{s.name}": vectors(telling == "hgnn") for s in SNAPSHOTS}
    return ArrayFeatures(text=vectors(telling == "text"), **tables)


def board_catalogue() -> ItemFeatures:
    """No language or category tells the board; item 0 has two categories, the others none."""
    offsets = torch.full((ITEMS + 1,), 2)
    offsets[0] = 0
    kinds = torch.arange(ITEMS) // (2 * LIKED)
    quiet = {s.name: torch.zeros(ITEMS, ACTIVITY) for s in SNAPSHOTS}
    return ItemFeatures(kinds, torch.zeros(ITEMS, dtype=torch.int64), torch.tensor([1, 2]), offsets, quiet)


def board_task(telling: str = "hgnn", with_hgnn: bool = True, rows: slice = slice(None), id_dim: int = 8) -> TowerTask:
    """Training and validation as the job would make them, with nothing known of any user."""
    events, unknown = board_events(), {}
    known = events.timestamp < VALID
    before = Events(*(column[known] for column in vars(events).values()))
    examples = build_examples(before, [0], SNAPSHOTS[:2], RULES)
    queries = build_queries(events, [0], VALID, TEST, RULES)
    later = validation_examples(events, [0], SNAPSHOTS, TEST, RULES)
    for table in (examples, queries, later):
        count = len(table["target"])
        unknown = {"age": np.full(count, np.nan, np.float32), "country_index": np.full(count, -1)}
        table.update(unknown, taste_music=np.full((count, 3), np.nan, np.float32))
    examples = take(examples, np.arange(len(examples["target"]))[rows])
    spec = TowerSpec(
        num_types=TYPES, events=["stream", "preview"], text_dim=TEXT, hgnn_dim=HGNN, activity_dim=ACTIVITY,
        num_countries=2, num_languages=1, num_categories=2, tastes={"music": 3}, layers=list(CONFIG.layers), history=80,
        id_dim=id_dim, id_rows=ITEMS, num_items=ITEMS, id_dropout=0.2, last_item=True,
    )  # fmt: skip
    names = {s.index: s.name for s in SNAPSHOTS}
    spec = spec if with_hgnn else replace(spec, hgnn_dim=0)
    catalogue = board_catalogue()
    moment = Moment(catalogue.ntype.numpy(), None)
    return TowerTask(spec, board_features(telling), catalogue, examples, queries, later, names, moment)


def board_trainer(task: TowerTask, config: TwoTowerConfig = CONFIG) -> tuple[TowerTrainer, torch.optim.Optimizer]:
    """A trainer with fresh weights, and its optimizer."""
    torch.manual_seed(seed_from("weights"))
    model = TwoTower(task.spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    return TowerTrainer(model, model, task, config, seed=3), optimizer
