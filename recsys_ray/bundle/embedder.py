"""Embeds one new item at a time into a bundle's vector space, with the models kept in memory.

It gives the same result as :func:`recsys_ray.bundle.extend.extend_bundle` for an item without events, but fast enough
to answer a request: for items that are added while the bundle is served. The process needs transformers; a
replica does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from recsys_ray.bundle.arrivals import Known
from recsys_ray.bundle.build import TERMS_FILE
from recsys_ray.config import GraphConfig, HgnnConfig, TextConfig
from recsys_ray.core.clock import NEVER, is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.data.schema import nearest
from recsys_ray.graph.activity import describe
from recsys_ray.graph.edges import Edges, with_texts
from recsys_ray.graph.pairs import allowed_relations
from recsys_ray.graph.texts import TextPairs, nearest_texts, text_pairs
from recsys_ray.hgnn.inductive import Surroundings, embed_inductively
from recsys_ray.scoring.memory import Raisers
from recsys_ray.scoring.scorer import UNSEEN, ScoreSpec
from recsys_ray.storage.artifacts import Artifact, load_arrays, read_json
from recsys_ray.text.encoder import Encoder
from recsys_ray.text.featurize import find_same_model, text_of
from recsys_ray.two_tower.batches import ArrayFeatures
from recsys_ray.two_tower.stage import catalogue_of
from recsys_ray.two_tower.towers import load_towers
from recsys_ray.two_tower.training import item_vectors, learned_vectors


class Models:
    """The HGNN and the towers of a bundle, ready to embed items that they were not trained on."""

    def __init__(self, bundle: Path) -> None:
        self.hgnn = HgnnConfig.model_validate_json((bundle / "hgnn_model" / "config.json").read_text("utf-8"))
        self._weights = bundle / "hgnn_model" / "model.safetensors"
        self._vocabularies = read_json(bundle / "vocabularies.json")
        self._towers = load_towers(bundle / "user_tower")

    def embed(self, types: int, around: Surroundings) -> tuple[torch.Tensor, torch.Tensor]:
        """State and embedding of the wanted items, among ``types`` item types."""
        return embed_inductively(self._weights, self.hgnn, types, around)

    def item_vectors(
        self,
        items: pl.DataFrame,
        text: npt.NDArray[np.float16],
        embedding: torch.Tensor,
        activity: npt.NDArray[np.float16],
        gids: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """What the item tower makes of items [n, d], and their learned vectors [n, id_dim]; None where the towers read
        none.

        Args:
            items: ntype, language, categories.
            gids: those that came after training have nothing of their own in their learned vectors.
        """
        catalogue = catalogue_of(items, {"serve": activity}, **self._vocabularies)
        catalogue = replace(catalogue, gids=torch.from_numpy(gids))
        features = ArrayFeatures(text=text, hgnn_serve=embedding)
        learned = learned_vectors(self._towers, features, catalogue, "serve")
        made = item_vectors(self._towers, features, catalogue, "serve").numpy()
        return made, None if learned is None else learned.numpy()


def given_to_unseen(terms: Mapping[str, npt.NDArray[Any]], ntype: npt.NDArray[np.integer], kind: int) -> float:
    """The unseen-item term of a type in a bundle; 0 if there is none."""
    alike = np.flatnonzero((ntype == kind) & (terms["had"] == 0))[:1]
    return float(terms[UNSEEN][alike[0]]) if len(alike) else 0.0


@dataclass(frozen=True)
class EmbeddedItem:
    """What serving needs of an item."""

    ntype: int  # number of the item type
    wide: npt.NDArray[np.float32]  # [d + 1]: [v_j, b_j]
    text: npt.NDArray[np.float16]  # [text_dim]
    hgnn: npt.NDArray[np.float32]  # [hgnn_dim]
    raisers: Raisers  # the bundle's items with the nearest texts


class Embedder:
    """Embeds items from their texts, dates and categories, and from the items with the nearest texts, as unseen items.

    Args:
        bundle: an opened one.

    Raises:
        ConfigError: the text encoder of the bundle is not available here.
    """

    def __init__(self, bundle: Artifact) -> None:
        counts, folder = bundle.counts, bundle.path
        made = counts["text"]
        self._text = TextConfig.model_validate(made["config"])
        source = find_same_model(self._text, made["precision"], made["encoder"])
        self._encoder = Encoder(source, self._text.max_tokens, self._text.batch_size, made["precision"])
        self._bundle, self._types = bundle, list(counts["item_types"])
        self._models = Models(folder)
        self._known = Known.read(folder, self._types)
        self._score = ScoreSpec.load(folder / "user_tower")
        self._graph = GraphConfig.model_validate(bundle.manifest["config"]["graph"])
        terms = load_arrays(folder / TERMS_FILE)
        unseen = [given_to_unseen(terms, self._known.ntype, k) for k in range(len(self._types))]
        self._unseen = np.array(unseen, np.float32)

    def embed(self, records: Sequence[Mapping[str, Any]]) -> list[EmbeddedItem]:
        """Embed items.

        Args:
            records: ``item_id``, ``item_type``, ``title``; optional ``description``, ``language``, ``categories`` (list
                of texts) and ``published_at`` (unix seconds).

        Raises:
            DataError: an item type that the bundle does not know.
        """
        for record in records:
            if record["item_type"] not in self._types:
                near = nearest(record["item_type"], self._types)
                raise DataError(f"item_type: the bundle has no type {record['item_type']!r}{near}")
        ntype = np.array([self._types.index(record["item_type"]) for record in records], np.int64)
        rows = [dict.fromkeys(("description", "language", "categories")) | dict(record) for record in records]
        text = self._encoder.encode([text_of(row, self._text.fields) for row in rows])
        names, gids = [str(record["item_id"]) for record in records], len(self._known) + np.arange(len(rows))
        users = np.concatenate([self._known.users, np.zeros(len(rows), np.int32)])
        found = nearest_texts(self._known.text, np.flatnonzero(self._known.users), text, gids, threads=1)
        pairs = text_pairs(found, users, gids)
        around, _ = self._known.surround(names, ntype, text, gids, self._edges(pairs, ntype))
        _, embedding = self._models.embed(len(self._types), around)
        frame = pl.DataFrame(
            {
                "ntype": ntype,
                "language": pl.Series([row["language"] for row in rows], dtype=pl.String),
                "categories": pl.Series([row["categories"] or [] for row in rows], dtype=pl.List(pl.String)),
            }
        )
        made, _ = self._models.item_vectors(frame, text, embedding, self._activity(rows, ntype), gids)
        wide = np.column_stack([made, self._unseen[ntype]]).astype(np.float32)
        told = [Raisers.of(pairs, gid, users, self._score.ridge, self._score.text_users) for gid in gids.tolist()]
        parts = zip(ntype.tolist(), wide, text, embedding.numpy(), told, strict=True)
        return [EmbeddedItem(*part) for part in parts]

    def _edges(self, pairs: TextPairs, ntype: npt.NDArray[np.int64]) -> Edges:
        """What sends to new items: those with the nearest texts."""
        types = np.concatenate([self._known.ntype, ntype])
        allowed = allowed_relations(self._graph.relations, self._types)
        return with_texts(Edges.none(), pairs, self._graph.text_users, types, allowed)

    def _activity(self, rows: Sequence[Mapping[str, Any]], ntype: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """No events; the date of publication is known, where there is a calendar."""
        counts = self._bundle.counts
        dates = [None if is_leave_one_out(counts) else row.get("published_at") for row in rows]
        published = np.array([NEVER if date is None else date for date in dates], np.int64)
        known = published[published != NEVER]
        moment = max(int(counts["end"]), int(known.max(initial=0)))
        nothing = np.zeros((5, len(rows)), np.int64)
        return describe(nothing, np.full(len(rows), NEVER), published, ntype, moment).astype(np.float16)
