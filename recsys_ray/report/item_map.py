"""The report's item map: vectors of a sample, laid out in two dimensions by t-SNE.

Distances on such a map are only a hint, so each item also keeps its nearest neighbours in the full space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import orthogonal_procrustes

from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.queries import Setting
from recsys_ray.evaluation.segments import ItemFacts
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.storage.artifacts import load_arrays, write_json

MAP = "map.json"
NEIGHBOURS = 6
_COMPONENTS = 50  # t-SNE works on so many principal components, as its authors do
_FEWEST = 12  # items that make a map
_START = 1e-4  # spread of the layout that t-SNE starts from, as in scikit-learn's own start


def sample_items(catalogue: Catalogue, size: int, seed: int) -> Int[np.ndarray, " n"]:
    """gids of a sample of available items, ascending: shares as in the catalogue, but no type below a quarter of an
    equal share, so that a small type can be seen."""
    pools = [
        np.arange(*catalogue.range_of(k))[catalogue.available[slice(*catalogue.range_of(k))]]
        for k in range(len(catalogue.types))
    ]
    sizes = np.array([len(pool) for pool in pools], dtype=np.int64)
    if sizes.sum() <= size:
        return np.concatenate(pools)
    least = np.minimum(sizes, size // (4 * len(pools)))
    spare = sizes - least
    quota = least + (size - least.sum()) * spare // max(int(spare.sum()), 1)
    rng = np.random.default_rng(seed)
    return np.concatenate([np.sort(rng.choice(p, n, replace=False)) for p, n in zip(pools, quota, strict=True)])


def item_spaces(
    gids: np.ndarray, items: int, featurize: Path, hgnn: Path, towers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """float [n, d] of some items in the spaces that are drawn: the graph's, the towers', the text's.

    Args:
        towers: name -> vectors of all items.

    Raises:
        ArtifactError: text vectors or embeddings are missing.
    """
    spaces = {"hgnn": load_embeddings(hgnn, "test", items)[gids].numpy()}
    spaces |= {name: vectors[gids] for name, vectors in towers.items()}
    return spaces | {"text": load_arrays(featurize / "text.safetensors")["vector"][gids]}


def draw_map(
    setting: Setting, facts: ItemFacts, gids: np.ndarray, spaces: Mapping[str, np.ndarray], path: Path
) -> None:
    """Write the map, unless a killed evaluation has already: layout and neighbours for each space.

    Every other layout starts from that of the first space and is turned to fit it, so that an item stays about where it
    was where the spaces agree.

    Args:
        gids: int64 [n], the items, ascending.
        spaces: name -> float [n, d], their vectors. Cosine counts.
    """
    from threadpoolctl import threadpool_limits

    if path.exists() or len(gids) < _FEWEST or not spaces:
        return
    item_type = setting.catalogue.type_of(gids)
    table = setting.ingest.items("item_id", "title").take(gids)
    drawn: dict[str, Any] = {}
    start: np.ndarray | None = None
    with threadpool_limits(1):  # sums in another order would give another layout
        for name, vectors in spaces.items():
            units = vectors.astype(np.float64)
            units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
            layout = lay_out(units, setting.seed, start)
            start = layout if start is None else start
            near = nearest(units, NEIGHBOURS)
            drawn[name] = {
                "x": layout[:, 0].round(4).tolist(),
                "y": layout[:, 1].round(4).tolist(),
                "near": near.tolist(),
                "same_type": float((item_type[near] == item_type[:, None]).mean()),
            }
    write_json(
        path,
        {
            "types": list(setting.catalogue.types),
            "catalogue": setting.catalogue.items,
            "id": table["item_id"].to_pylist(),
            "title": table["title"].to_pylist(),
            "type": item_type.tolist(),
            "tier": facts.tier[gids].tolist(),
            "unseen": facts.unseen[gids].astype(int).tolist(),
            "spaces": drawn,
        },
    )


def lay_out(
    units: Float[np.ndarray, "n d"], seed: int, start: Float[np.ndarray, "n 2"] | None = None
) -> Float[np.ndarray, "n 2"]:
    """Two dimensions by PCA and t-SNE, scaled so that nearly all points are within -1 and 1.

    Args:
        start: a layout to begin from and to be turned (or mirrored) to; default: the first two principal components.
    """
    from sklearn.decomposition import PCA  # here: tasks that only rank import this module, too
    from sklearn.manifold import TSNE

    components = PCA(min(_COMPONENTS, *units.shape), svd_solver="full").fit_transform(units)
    begin = components[:, :2] if start is None else start
    begin = begin / max(float(begin[:, 0].std()), 1e-12) * _START
    perplexity = min(30.0, (len(units) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init=begin.astype(np.float32), random_state=seed % 2**32, n_jobs=1)
    found = tsne.fit_transform(components.astype(np.float32)).astype(np.float64)
    found -= found.mean(axis=0)
    if start is not None:  # any rotation and any mirror image is as good: take the one that is most like the start
        found = found @ orthogonal_procrustes(found, start - start.mean(axis=0))[0]
    return found / max(float(np.quantile(np.abs(found), 0.995)), 1e-12)


def nearest(units: Float[np.ndarray, "n d"], count: int) -> Int[np.ndarray, "n near"]:
    """The nearest other rows by inner product, nearest first."""
    products = units @ units.T
    np.fill_diagonal(products, -np.inf)
    return np.argsort(-products, axis=1, kind="stable")[:, : min(count, len(units) - 1)]
