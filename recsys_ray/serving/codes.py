"""Item vectors in 4-bit codes, which a search compares with a query at once, all of them.

Product quantization (Jegou et al., TPAMI 2011) with 16 centroids for every two numbers, scanned as in "Quicker ADC"
(Andre et al., TPAMI 2019; FAISS's fast scan): tables of 16 entries fit into a register of the processor, which looks
up many items in one instruction. A million items of 128 numbers take 33 MB and half a millisecond for each third of
them. The order by codes is rough. It selects candidates, whose vectors then decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Int64, UInt8

from recsys_ray.core.errors import ArtifactError
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.storage.artifacts import save_arrays

_TRAINED_WITH = 65_536  # vectors
_CHUNK = 65_536  # rows that are encoded at once
_BITS, _CENTROIDS, _WIDTH = 4, 16, 2  # of a code; a code stands for so many numbers


@dataclass(frozen=True)
class Codes:
    """The codes of n vectors of d numbers, in ceil(d / 2) pieces of two. Arrays may be memory maps."""

    centroids: Float32[np.ndarray, "pieces 16 2"]
    codes: UInt8[np.ndarray, "n bytes"]  # two pieces a byte

    @classmethod
    def learn(cls, vectors: Float32[np.ndarray, "n d"], rows: npt.NDArray[np.integer]) -> Codes:
        """Learn centroids from some of ``vectors[rows]``. Nothing is encoded yet, see :meth:`extended`."""
        faiss.omp_set_num_threads(1)  # FAISS's threads would spin at barriers between tiny pieces of work
        some = rows[np.linspace(0, len(rows) - 1, min(_TRAINED_WITH, len(rows))).astype(np.int64)]
        some = np.resize(some, max(len(some), _CENTROIDS))  # FAISS wants as many, be they repeated
        quantizer = _quantizer((vectors.shape[1] + 1) // _WIDTH)
        quantizer.pq.cp.min_points_per_centroid = 1  # fewer than FAISS likes are no reason for a line on the terminal
        quantizer.train(_even(vectors[some]))
        centroids = faiss.vector_to_array(quantizer.pq.centroids).reshape(-1, _CENTROIDS, _WIDTH)
        return cls(centroids, np.empty((0, quantizer.sa_code_size()), np.uint8))

    def extended(self, vectors: Float32[np.ndarray, "n d"], rows: npt.NDArray[np.integer]) -> Codes:
        """These codes and behind them those of ``vectors[rows]``."""
        faiss.omp_set_num_threads(1)
        quantizer = self._quantizer()
        parts = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        made = [quantizer.sa_encode(_even(vectors[part])) for part in parts]
        return Codes(self.centroids, np.concatenate([self.codes, *made]))

    def __len__(self) -> int:
        return len(self.codes)

    def nearest(self, queries: Float32[np.ndarray, "q d"], count: int) -> Int64[np.ndarray, "q count"]:
        """Positions of the best ``count`` of each query by their codes, best first; -1 where fewer are found, which
        happens where codes tie for the last places."""
        faiss.omp_set_num_threads(1)  # as above; who calls has the other cores busy with other queries
        found: npt.NDArray[np.int64] = self._scan.search(_even(queries), count)[1]
        return found

    @cached_property
    def _scan(self) -> faiss.IndexPQFastScan:
        quantizer = self._quantizer()
        quantizer.add_sa_codes(np.ascontiguousarray(self.codes))
        return faiss.IndexPQFastScan(quantizer)  # type: ignore[arg-type]

    def _quantizer(self) -> faiss.IndexPQ:
        quantizer = _quantizer(len(self.centroids))
        faiss.copy_array_to_vector(np.array(self.centroids).ravel(), quantizer.pq.centroids)
        quantizer.is_trained = True
        return quantizer

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {"centroids": self.centroids, "codes": self.codes})

    @classmethod
    def load(cls, path: Path, items: int, dimension: int) -> Codes:
        """Raises ArtifactError where the file is damaged or not of so many vectors of ``dimension`` numbers."""
        arrays = {name: tensor.numpy() for name, tensor in mapped_arrays(path).items()}
        pieces = (dimension + 1) // _WIDTH
        expected = {
            "centroids": (np.dtype(np.float32), (pieces, _CENTROIDS, _WIDTH)),
            "codes": (np.dtype(np.uint8), (items, (pieces * _BITS + 7) // 8)),
        }
        if {name: (array.dtype, array.shape) for name, array in arrays.items()} != expected:
            raise ArtifactError(f"{path} is not an index of {items:,} vectors of {dimension}; build the bundle again")
        if not np.isfinite(arrays["centroids"]).all():
            raise ArtifactError(f"{path} is damaged (centroids that are not finite); build the bundle again")
        return cls(**arrays)


def _quantizer(pieces: int) -> faiss.IndexPQ:
    return faiss.IndexPQ(_WIDTH * pieces, pieces, _BITS, faiss.METRIC_INNER_PRODUCT)


def _even(vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n even"]:
    """A zero behind each vector of an odd number of numbers, which changes no product."""
    made = np.zeros((len(vectors), vectors.shape[1] + vectors.shape[1] % _WIDTH), np.float32)
    made[:, : vectors.shape[1]] = vectors
    return made
