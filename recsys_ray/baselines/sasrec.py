"""SASRec (Kang and McAuley, ICDM 2018): a causal transformer over the user's sequence of items predicts the next one.

It is trained with a softmax over sampled negatives instead of the paper's binary cross-entropy with a single negative,
which makes it a markedly stronger baseline (Klenitskiy and Vasilev, RecSys 2023). Implemented here because RecTools
requires NumPy 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recsys_ray.baselines.histories import HistoryRule
from recsys_ray.baselines.interface import Baseline, Choice, KnownData, Params, Real, Space, Watch, Whole
from recsys_ray.baselines.sampling import batch_size, softmax_loss, train
from recsys_ray.config import Config
from recsys_ray.core.seeds import seed_from
from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.ranking import Scorer, UserBatch, popular_where

_EPOCHS = 100
_LENGTH = 50  # latest items of a user that the model reads, as in the paper for data like these
_HEADS = 2
_TOKENS = 1_024  # a batch, at most; with several thousand it needs five times the epochs, and as long
_NEGATIVES = 512
_PAD = 0  # token 0; item gid is token gid + 1

# Shapes: B sequences, L positions (the newest last), D width, V tokens


class Transformer(nn.Module):
    """Tokens to the vector at each position that scores what comes next."""

    def __init__(self, tokens: int, width: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(tokens, width, padding_idx=_PAD)
        self.places = nn.Embedding(_LENGTH, width)  # 0 is the newest
        layer = nn.TransformerEncoderLayer(
            width,
            _HEADS,
            dim_feedforward=4 * width,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for table in (self.items, self.places):
                table.weight.normal_(std=width**-0.5)
            self.items.weight[_PAD] = 0

    def forward(self, sequence_BL: Tensor) -> Tensor:
        """[B, L, D]. Sequences are padded on the left, where the result means nothing."""
        length = sequence_BL.shape[1]
        place = torch.arange(length - 1, -1, -1)
        state = self.dropout(self.items(sequence_BL) + self.places(place))
        # Every position sees itself, padding too: one that sees nothing at all is NaN to torch's fused kernels, and NaN
        # spreads to the next block even from where the weight is zero.
        padded_BL = sequence_BL == _PAD
        unseen_BLL = torch.ones(length, length, dtype=torch.bool).triu(1) | padded_BL[:, None, :]
        unseen_BLL &= ~torch.eye(length, dtype=torch.bool)
        result: Tensor = self.blocks(state, mask=unseen_BLL.repeat_interleave(_HEADS, 0))
        return result


@dataclass
class SasRec:
    """Answers from the user's latest items alone; popularity where there are none."""

    model: Transformer
    popularity: np.ndarray  # [items]
    name: str = "sasrec"

    def scorer(self, users: UserBatch) -> Scorer:
        row, event, _ = HistoryRule(_LENGTH).entries(users)
        ends = np.searchsorted(row, np.arange(len(users)), side="right")
        sequence = np.full((len(users), _LENGTH), _PAD, np.int64)
        sequence[row, _LENGTH - (ends[row] - np.arange(len(row)))] = users.gid[event] + 1
        vectors = torch.zeros((len(users), self.model.items.embedding_dim))
        self.model.eval()
        with torch.no_grad():
            for chosen in np.array_split(np.argsort((sequence != _PAD).sum(1), kind="stable"), -(-len(users) // 64)):
                longest = max(int((sequence[chosen] != _PAD).sum(1).max(initial=0)), 1)
                vectors[chosen] = self.model(torch.from_numpy(sequence[chosen, -longest:]))[:, -1]
            table = self.model.items.weight[1:]

        def score(first: int, last: int) -> Tensor:
            return vectors @ table[first:last].detach().T

        return popular_where(users.empty, score, self.popularity)


@dataclass(frozen=True)
class Sequences:
    """Windows of users' items, each once, in order of time."""

    token: np.ndarray  # int64 [places]
    target: np.ndarray  # int64 [places]: gid of the next item; -1: not to be predicted
    begin: np.ndarray  # int64 [windows]
    length: np.ndarray  # int64 [windows]

    def batch(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """(tokens, targets), int64 [windows, longest], padded on the left."""
        length = self.length[chosen]
        longest = int(length.max())
        place = self.begin[chosen][:, None] + np.arange(-longest, 0) + length[:, None]
        there = place >= self.begin[chosen][:, None]
        token = np.where(there, self.token[np.maximum(place, 0)], _PAD)
        target = np.where(there, self.target[np.maximum(place, 0)], -1)
        return torch.from_numpy(token), torch.from_numpy(target)


def make_sequences(data: KnownData) -> Sequences:
    """Every user's items at their first touch; a target is an item that the user chose (a positive event)."""
    users = data.users
    rows = users.rows
    pair = rows * np.int64(data.catalogue.items) + users.gid
    _, first = np.unique(pair, return_index=True)
    first = np.sort(first)
    chosen = np.isin(pair[first], pair[data.positive[users.event]])
    row, gid = rows[first], users.gid[first].astype(np.int64)
    follows = np.append(row[1:] == row[:-1], False)
    target = np.where(follows & np.append(chosen[1:], False), np.append(gid[1:], -1), -1)
    # The last item of a user predicts nothing. Longer sequences are several windows, counted from the newest.
    kept = np.flatnonzero(follows)
    _, begin, length = np.unique(row[kept], return_index=True, return_counts=True)
    windows = [(int(b + max(n - k - _LENGTH, 0)), int(min(_LENGTH, n - k))) for b, n in zip(begin, length, strict=True)
               for k in range(0, int(n), _LENGTH)]  # fmt: skip
    starts, sizes = np.array(windows, np.int64).reshape(-1, 2).T
    return Sequences(gid[kept] + 1, target[kept], starts, sizes)


def _batches(sequences: Sequences, tokens: int, random: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in batches of about ``tokens`` places; windows of like length together, batches in any order."""
    order = np.lexsort((random.random(len(sequences.length)), sequences.length))
    cuts = np.flatnonzero(np.diff(np.cumsum(sequences.length[order]) // tokens)) + 1
    batches = np.split(order, cuts)
    for k in random.permutation(len(batches)):
        if len(batches[k]):
            yield sequences.batch(batches[k])


def _space(config: Config) -> Space:
    return {
        "width": Choice(64, (32, 64, 128)),
        "blocks": Whole(2, 1, 3),
        "dropout": Real(0.2, 0.0, 0.6),
        "learning_rate": Real(3e-3, 3e-4, 1e-2, log=True),
        "decay": Real(1e-5, 1e-6, 1e-1, log=True),
    }


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> SasRec:
    sequences = make_sequences(data)
    popularity = data.popularity(data.config.graph.window_days)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, "sasrec"))
        model = Transformer(data.catalogue.items + 1, params["width"], params["blocks"], params["dropout"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=params["learning_rate"], weight_decay=params["decay"])
        fitted = SasRec(model, popularity)

        def losses(epoch: int) -> Iterator[Tensor]:
            return _losses(model, sequences, data.catalogue, seed_from(seed, "sasrec", epoch))

        train(optimizer, params["epochs"], losses, watch, lambda: fitted)
    return fitted


def _losses(model: Transformer, sequences: Sequences, catalogue: Catalogue, seed: int) -> Iterator[Tensor]:
    """One epoch: the loss of each batch of windows, once the step before has been taken."""
    draw, tokens = torch.Generator().manual_seed(seed), batch_size(len(sequences.token), _TOKENS)
    model.train()
    for token_BL, target_BL in _batches(sequences, tokens, np.random.default_rng(seed)):
        wanted = target_BL >= 0
        if wanted.any():
            queries, table = model(token_BL)[wanted], model.items.weight[1:]
            loss = softmax_loss(queries, target_BL[wanted], table, catalogue, _NEGATIVES, draw)
            yield loss / int(wanted.sum())


SASREC = Baseline(
    name="sasrec",
    note="SASRec, a transformer over the sequence of items of all types, sampled softmax; tuned; epochs by validation.",
    space=_space,
    fit=_fit,
    seeded=True,
    max_epochs=_EPOCHS,
)
