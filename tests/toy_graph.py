"""A graph in plain tensors that fulfils the sampler's ``NeighborSource``: for tests without DGL servers."""

from __future__ import annotations

import torch


class ToyGraph:
    """Directed edges (src gid, dst gid) of one snapshot; items of type i have gids starts[i] .. starts[i + 1]."""

    def __init__(self, src, dst, starts, text):
        self.src, self.dst = torch.as_tensor(src), torch.as_tensor(dst)
        self.starts, self.text = torch.as_tensor(starts), text

    def types_of(self, gids):
        return torch.searchsorted(self.starts, gids, right=True) - 1

    def features(self, name, gids):
        return self.text[gids]

    def edges(self, snapshot=0):
        kinds = self.types_of(self.src), self.types_of(self.dst)
        pairs = sorted(set(zip(kinds[0].tolist(), kinds[1].tolist(), strict=True)))
        found = {pair: (kinds[0] == pair[0]) & (kinds[1] == pair[1]) for pair in pairs}
        return {pair: (self.src[rows], self.dst[rows]) for pair, rows in found.items()}

    def sample(self, gids, snapshot, fanout, generator=None):
        sampled = {}
        for relation, (src, dst) in self.edges().items():
            positions, sources = [], []
            for position, gid in enumerate(gids.tolist()):
                own = src[dst == gid]
                if fanout >= 0:
                    own = own[torch.randperm(len(own), generator=generator)[:fanout]]
                positions += [position] * len(own)
                sources.append(own)
            sampled[relation] = (torch.tensor(positions, dtype=torch.int64), torch.cat(sources))
        return sampled


def both_ways(pairs):
    """(src, dst) of undirected pairs in both directions."""
    a, b = torch.as_tensor(pairs).T
    return torch.cat([a, b]), torch.cat([b, a])
