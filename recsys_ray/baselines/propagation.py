"""Product of a fixed sparse matrix with a dense one, differentiable in the dense one: a layer of a graph network over
users and items."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


class SparseMap:
    """A sparse float32 matrix and its transpose, both ready to multiply with."""

    def __init__(self, matrix: sp.csr_matrix) -> None:
        self.forward, self.backward = _as_torch(matrix), _as_torch(matrix.T.tocsr())

    def __call__(self, dense: Tensor) -> Tensor:
        """[rows, columns] times [columns, d]."""
        result: Tensor = _Product.apply(self, dense)
        return result

    @property
    def transposed(self) -> SparseMap:
        turned = SparseMap.__new__(SparseMap)
        turned.forward, turned.backward = self.backward, self.forward
        return turned


class _Product(torch.autograd.Function):
    """torch would transpose the matrix again in each backward pass."""

    @staticmethod
    def forward(context: Any, matrix: SparseMap, dense: Tensor) -> Tensor:
        context.matrix = matrix
        return matrix.forward @ dense

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, context.matrix.backward @ gradients[0]


def _as_torch(matrix: sp.csr_matrix) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data.astype(np.float32)),
            size=matrix.shape,
            check_invariants=False,
        )


def symmetric(links: sp.csr_matrix) -> sp.csr_matrix:
    """Each entry divided by the roots of its row's and its column's sum."""
    return sp.diags(_inverse(links, 1) ** 0.5) @ links @ sp.diags(_inverse(links, 0) ** 0.5)


def row_means(links: sp.csr_matrix) -> sp.csr_matrix:
    """Each row divided by its sum."""
    return sp.diags(_inverse(links, 1)) @ links


def _inverse(links: sp.csr_matrix, axis: int) -> np.ndarray:
    total = np.asarray(links.sum(axis=axis), dtype=np.float64).ravel()
    return np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
