"""Encodes every item's text, each distinct text once, and only texts that no earlier run has encoded.

Vectors are kept in a cache folder per encoder, as one Parquet file per block of texts, renamed into place when the
block is done: an interrupted run loses only the blocks in progress.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.config import Config, TextConfig
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import ConfigError, DataError
from recsys_ray.core.precision import Precision, choose_precision
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables
from recsys_ray.storage.artifacts import SCRATCH, save_arrays, written_whole
from recsys_ray.text.encoder import Encoder, ModelSource, encoder_fingerprint, find_model

# Small enough that the last blocks keep all actors busy. The size is fixed, so that the blocks that a killed run
# left are cut, and thereby encoded, exactly as they would have been.
BLOCK = 256
RANDOM = "random"  # text.model: no encoder
_RANDOM_DIM = 384  # as wide as the packaged encoder's
_HASH = 16  # bytes
_STALE_S = DAY
_FEW = 200  # below this many texts, a second actor takes longer to load its model than it saves


@dataclass(frozen=True)
class _EncoderPlan:
    source: ModelSource
    max_tokens: int
    batch_size: int
    precision: Precision

    def load(self, threads: int = 1) -> Encoder:
        return Encoder(self.source, self.max_tokens, self.batch_size, self.precision, threads)


def featurize(
    config: Config, ingest_dir: Path, out: Path, cache_dir: Path, progress: Progress, cpus: int
) -> dict[str, Any]:
    """Write ``out/text.safetensors``: ``vector`` float16 [items, text_dim], row = gid, unit norm. Ray must be up.

    Args:
        cpus: encoder actors unless ``text.workers`` says otherwise, one CPU each.

    Returns:
        counts: text_dim, texts_distinct, encoded, reused, precision, encoder (fingerprint of what made the vectors).

    Raises:
        ConfigError: the model cannot be had.
    """
    if config.text.model == RANDOM:
        save_arrays(out / "text.safetensors", {"vector": random_vectors(Tables(ingest_dir).item_ids.to_pylist())})
        return {"text_dim": _RANDOM_DIM, "texts_distinct": 0, "encoded": 0, "reused": 0, "precision": "fp32",
                "encoder": RANDOM}  # fmt: skip
    source, precision = find_model(config.text.model), choose_precision(config.text.precision)
    plan = _EncoderPlan(source, config.text.max_tokens, config.text.batch_size, precision)
    encoder = encoder_fingerprint(source, plan.max_tokens, precision)
    cache = cache_dir / encoder

    def encode(blocks: Path, count: int) -> None:
        _encode_blocks(plan, blocks, cache, count, config.text.workers, cpus, progress)

    texts = item_texts(Tables(ingest_dir), config.text)
    vectors, counts = _through_cache(texts, cache, out / SCRATCH, progress, encode)
    save_arrays(out / "text.safetensors", {"vector": vectors})
    return {"text_dim": vectors.shape[1], **counts, "precision": precision, "encoder": encoder}


def encode_alike(
    texts: pa.Array, config: TextConfig, precision: Precision, encoder: str, cache: Path, progress: Progress, cpus: int
) -> np.ndarray:
    """float16 [texts, text_dim], unit norm: vectors as an earlier run of :func:`featurize` made them, in this process
    and without Ray. Texts in ``cache`` are not encoded again, so an interrupted call continues there.

    Args:
        precision, encoder: of that run's counts.

    Raises:
        ConfigError: the model is not available here, or differs from that run's.
    """
    source = find_same_model(config, precision, encoder)

    def encode(blocks: Path, count: int) -> None:
        model = _EncoderPlan(source, config.max_tokens, config.batch_size, precision).load(threads=cpus)
        with progress.task("encode", count, "texts") as task:
            for i in range(-(-count // BLOCK)):
                task.advance(_encode_block(model, blocks, i, cache))

    return _through_cache(texts, cache, cache, progress, encode)[0]


def _through_cache(
    texts: pa.Array, cache: Path, scratch: Path, progress: Progress, encode: Callable[[Path, int], None]
) -> tuple[np.ndarray, dict[str, int]]:
    """Vectors of the texts, float16 [texts, dim], and how many are distinct, were encoded and were known.

    Args:
        encode: encodes a file of blocks and the given number of texts, into the cache.
    """
    hashes = pa.array(map(hash_text, texts.to_pylist()), pa.binary(_HASH))
    coded = hashes.dictionary_encode()
    known, _ = _cached_hashes(cache, progress)
    missing = np.flatnonzero(pc.index_in(coded.dictionary, value_set=known).is_null().to_numpy(zero_copy_only=False))
    distinct, reused = len(coded.dictionary), len(coded.dictionary) - len(missing)
    progress.say(f"  {len(texts):,} items, {distinct:,} distinct texts: {reused:,} cached, {len(missing):,} to encode")
    if len(missing):
        _, first = np.unique(coded.indices.to_numpy(), return_index=True)
        encode(_write_blocks(texts, hashes, first[missing], scratch), len(missing))
    counts = {"texts_distinct": distinct, "encoded": len(missing), "reused": reused}
    return _collect(cache, hashes, progress), counts


def random_vectors(item_ids: Sequence[str]) -> np.ndarray:
    """float16 [items, 384]: unit vectors that depend on the item's id alone. They identify items and nothing else, so a
    model with them shows what it achieves without text."""
    vectors = np.empty((len(item_ids), _RANDOM_DIM), dtype=np.float16)
    for row, item_id in enumerate(item_ids):
        drawn = np.random.default_rng(list(hash_text(item_id))).standard_normal(_RANDOM_DIM)
        vectors[row] = drawn / np.linalg.norm(drawn)
    return vectors


# -- texts -----------------------------------------------------------------------------------------------------------


def item_texts(tables: Tables, config: TextConfig) -> pa.Array:
    """large_string [items]: the configured fields, or the name of the item's type where all of them are empty."""
    texts: list[pa.Array] = []
    for batch in tables.items_in_batches(*config.fields, "item_type"):
        texts.append(pa.array((text_of(row, config.fields) for row in batch.to_pylist()), pa.large_string()))
    if not texts:
        raise DataError(f"{tables.folder} has no items; run ingest again")
    return pa.concat_arrays(texts)


def find_same_model(config: TextConfig, precision: Precision, encoder: str) -> ModelSource:
    """The model that made the text vectors of a run. Arguments and errors as :func:`encode_alike`."""
    if config.model == RANDOM:
        raise ConfigError("text.model=random does not encode texts, so no items can be added to this bundle")
    source = find_model(config.model)
    if encoder_fingerprint(source, config.max_tokens, precision) != encoder:
        raise ConfigError(
            f"text.model: {config.model!r} is a different model here than the one that encoded this bundle's "
            "texts; use the original model"
        )
    return source


def text_of(row: dict[str, Any], fields: Sequence[str]) -> str:
    """``Title. Description. category, category``."""
    parts = []
    for name in fields:
        value = row[name]
        part = ", ".join(value or ()) if name == "categories" else (value or "")
        if part.strip():
            parts.append(part.strip())
    return ". ".join(parts) or row["item_type"]


def hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_HASH).digest()


def _write_blocks(texts: pa.Array, hashes: pa.Array, rows: np.ndarray, scratch: Path) -> Path:
    """The texts of ``rows`` as an Arrow file of BLOCK texts a record batch, the longest first: what takes long must
    not come last. Equal lengths are ordered by hash, so the blocks do not depend on the order of the items."""
    chosen = pa.table({"hash": hashes.take(pa.array(rows)), "text": texts.take(pa.array(rows))})
    chosen = chosen.append_column("length", pc.utf8_length(chosen["text"]))
    chosen = chosen.append_column("key", chosen["hash"].cast(pa.binary()))
    chosen = chosen.sort_by([("length", "descending"), ("key", "ascending")]).select(["hash", "text"]).combine_chunks()
    blocks = scratch / "texts.arrow"
    with written_whole(blocks) as aside, pa.ipc.new_file(str(aside), chosen.schema) as file:
        file.write_table(chosen, max_chunksize=BLOCK)
    return blocks


# -- encoding --------------------------------------------------------------------------------------------------------


class _Actor:
    """One encoder on one CPU (or GPU): block number in, a file in the cache and the number of its texts out."""

    def __init__(self, plan: _EncoderPlan, blocks: Path, cache: Path) -> None:
        self._blocks, self._cache = blocks, cache
        self._error, self._encoder = "", None
        try:
            self._encoder = plan.load()
        except ConfigError as error:  # as a value: Ray would start the actor again and again
            self._error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (i,) = batch["block"].tolist()
        done = _encode_block(self._encoder, self._blocks, i, self._cache) if self._encoder else 0
        return {"texts": np.array([done]), "error": np.array([self._error])}


def _encode_block(encoder: Encoder, blocks: Path, i: int, cache: Path) -> int:
    """Encode a block into the cache; the number of its texts."""
    with pa.memory_map(str(blocks)) as file:
        block = pa.ipc.open_file(file).get_batch(i)
        write_cache(cache, block["hash"], encoder.encode(block["text"].to_pylist()))
    return len(block)


def _encode_blocks(
    plan: _EncoderPlan, blocks: Path, cache: Path, texts: int, workers: int | None, cpus: int, progress: Progress
) -> None:
    import ray
    from ray.data import ActorPoolStrategy

    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".*.tmp"):  # what killed runs left; younger ones may be another run's
        if time.time() - left.stat().st_mtime > _STALE_S:
            left.unlink(missing_ok=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = -(-texts // BLOCK)
    actors = 1 if texts < _FEW else min(workers or gpus or cpus, count)
    granted: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    queue = ray.data.from_items([{"block": i} for i in range(count)], override_num_blocks=count)
    encoded = queue.map_batches(
        _Actor,
        fn_constructor_args=(plan, blocks.resolve(), cache.resolve()),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        **granted,
    )
    with progress.task(f"encode ({plan.precision}, {actors} workers)", total=texts, unit="texts") as task:
        for row in encoded.iter_rows():
            if row["error"]:
                raise ConfigError(row["error"])
            task.advance(row["texts"])


# -- cache -----------------------------------------------------------------------------------------------------------


def write_cache(cache: Path, hashes: pa.Array, vectors: np.ndarray) -> None:
    """Add a block to the cache: hash (16 bytes), vector (float16 bytes, dim x 2); there whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    width = vectors.shape[1] * 2
    packed = np.ascontiguousarray(vectors, dtype="<f2").tobytes()
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(vectors), [None, pa.py_buffer(packed)])
    aside = cache / f".{uuid.uuid4().hex}.tmp"
    pq.write_table(pa.table({"hash": hashes, "vector": column}), aside, use_dictionary=False)
    # Named after its texts: encoding a block again replaces it.
    name = hashlib.blake2b(b"".join(hashes.to_pylist()), digest_size=_HASH).hexdigest()
    aside.replace(cache / f"{name}.parquet")


def _cached_hashes(cache: Path, progress: Progress) -> tuple[pa.Array, list[tuple[Path, int]]]:
    """All hashes in the cache, and its files with the number of each one's rows, in the same order."""
    pieces, files = [pa.array([], pa.binary(_HASH))], []
    for file in sorted(cache.glob("*.parquet")):
        try:
            column = pq.read_table(file, columns=["hash"], use_threads=False)["hash"].combine_chunks()
        except (pa.ArrowException, OSError) as error:
            progress.say(f"  {file} is damaged ({' '.join(str(error).split())[:120]}): its texts will be encoded again")
            file.unlink(missing_ok=True)
            continue
        pieces.append(column)
        files.append((file, len(column)))
    return pa.concat_arrays(pieces), files


def _collect(cache: Path, hashes: pa.Array, progress: Progress) -> np.ndarray:
    """float16 [items, dim]: every item's vector from the cache, one file at a time."""
    known, files = _cached_hashes(cache, progress)
    found = pc.index_in(hashes, value_set=known)
    if found.null_count:  # another process has emptied the cache
        raise DataError(f"{found.null_count} vectors are missing in the text cache {cache}; run the stage again")
    at = found.to_numpy()
    order = np.argsort(at, kind="stable")
    sorted_at = at[order]
    vectors: np.ndarray | None = None
    start = 0
    for file, rows in files:
        low, high = np.searchsorted(sorted_at, [start, start + rows])
        if low < high:
            block = _read_vectors(file)
            if vectors is None:
                vectors = np.empty((len(hashes), block.shape[1]), dtype=np.float16)
            vectors[order[low:high]] = block[sorted_at[low:high] - start]
        start += rows
    assert vectors is not None  # there is at least one item
    return vectors


def _read_vectors(file: Path) -> np.ndarray:
    column = pq.read_table(file, columns=["vector"], use_threads=False)["vector"].combine_chunks()
    width = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], dtype="<f2", count=len(column) * width // 2, offset=column.offset * width)
    return flat.reshape(len(column), width // 2)
