"""Item vectors that anyone can make in a few lines from the same interactions: what an embedding has to be worth more
than. No Ray in here.

Each takes who had which item, a matrix [users, items] of ones, and gives a vector of ``DIM`` numbers an item. Memory
grows with the catalogue and with the pairs of items that share a user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds
from torch.nn.functional import embedding, softplus

from recsys_ray.baselines.ials import fit_factors

DIM = 64
_REGULARIZATION, _ALPHA = 1.0, 5.0  # of iALS, before any tuning
_CONTEXTS = 5  # item2vec: other items of the user that an item is asked to predict in an epoch
_NEGATIVES = 5.0  # what the negatives of a pair weigh; a batch shares ``_DRAWN`` of them
_DRAWN = 512
_BATCH, _EPOCHS, _RATE = 2048, 30, 0.01
_SMOOTHING = 0.75  # negatives are drawn by frequency to this power (Mikolov et al., 2013)


def svd(had: sp.csr_matrix, seed: int) -> np.ndarray:
    """Truncated SVD of the matrix, each entry divided by the roots of its user's and its item's number of entries."""
    users, items = (np.asarray(had.sum(axis)).ravel() for axis in (1, 0))
    scaled = sp.diags(_root(users)) @ had @ sp.diags(_root(items))
    _, size, axes = _largest(scaled, seed)
    return (axes.T * size).astype(np.float32)


def pmi_svd(had: sp.csr_matrix, seed: int) -> np.ndarray:
    """SVD of the items' positive pointwise mutual information, which is what item2vec factorises (Levy and Goldberg,
    NIPS 2014)."""
    shared = (had.T @ had).tocoo()
    apart = shared.row != shared.col
    row, column, count = shared.row[apart], shared.col[apart], shared.data[apart].astype(np.float64)
    total = np.bincount(row, count, minlength=had.shape[1])
    information = np.log(count * total.sum() / (total[row] * total[column]))
    kept = information > 0
    positive = sp.csr_matrix((information[kept], (row[kept], column[kept])), shape=shared.shape)
    left, size, _ = _largest(positive, seed)
    return (left * np.sqrt(size)).astype(np.float32)


def ials(had: sp.csr_matrix, seed: int) -> np.ndarray:
    """Implicit ALS (Hu, Koren and Volinsky, ICDM 2008). Needs the package implicit."""
    return fit_factors(had.astype(np.float32), DIM, _REGULARIZATION, _ALPHA, seed)


def item2vec(had: sp.csr_matrix, seed: int) -> np.ndarray:
    """Skip-gram with negative sampling, a user's items as the sentence and all of them as the window (Barkan and
    Koenigstein, 2016)."""
    generator = torch.Generator().manual_seed(seed)
    centres, contexts = (
        torch.nn.Embedding.from_pretrained(
            torch.randn(had.shape[1], DIM, generator=generator) * DIM**-0.5, freeze=False, sparse=True
        )
        for _ in range(2)
    )
    optimizer = torch.optim.SparseAdam([centres.weight, contexts.weight], lr=_RATE)
    items = torch.from_numpy(had.indices.astype(np.int64))
    length = np.diff(had.indptr)
    begin, others = (torch.from_numpy(np.repeat(part, length)).long() for part in (had.indptr[:-1], length))
    place = torch.arange(len(items)) - begin
    often = torch.from_numpy(np.bincount(had.indices, minlength=had.shape[1]) ** _SMOOTHING)
    several = torch.nonzero(others > 1)[:, 0].repeat(_CONTEXTS)
    for _ in range(_EPOCHS):
        shuffled = several[torch.randperm(len(several), generator=generator)]
        for entry in shuffled.split(_BATCH):
            step = 1 + (torch.rand(len(entry), generator=generator) * (others[entry] - 1)).long()
            other = items[begin[entry] + (place[entry] + step) % others[entry]]  # never the item itself
            drawn = torch.multinomial(often, _DRAWN, replacement=True, generator=generator)
            centre = centres(items[entry])
            positive = softplus(-(centre * contexts(other)).sum(1)).sum()
            negative = softplus(centre @ embedding(drawn, contexts.weight, sparse=True).T).sum() * (_NEGATIVES / _DRAWN)
            optimizer.zero_grad()
            ((positive + negative) / len(entry)).backward()
            optimizer.step()
    vectors = centres.weight.detach().numpy().copy()
    vectors[np.bincount(had.indices, minlength=len(vectors)) == 0] = 0.0  # nothing is known of it
    return vectors


FACTORS: Mapping[str, Callable[[sp.csr_matrix, int], np.ndarray]] = {
    "svd": svd, "pmi_svd": pmi_svd, "ials": ials, "item2vec": item2vec,
}  # fmt: skip


def _root(count: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(np.maximum(count, 1))


def _largest(matrix: sp.csr_matrix, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``DIM`` largest singular values and their vectors; fewer of a smaller matrix."""
    return svds(matrix.astype(np.float64), k=min(DIM, min(matrix.shape) - 1), random_state=seed)
