"""A graph in plain tensors that fulfils the sampler's ``NeighborSource``: for tests without DGL servers."""

from __future__ import annotations

import torch


class ToyGraph:
    """Directed edges (src gid, dst gid) of one snapshot; items of type i have gids starts[i] .. starts[i + 1].
    ``weight`` is what their messages count; default: 1."""

    def __init__(self, src, dst, starts, text, weight=None):
        self.src, self.dst = torch.as_tensor(src), torch.as_tensor(dst)
        self.weight = torch.ones(len(self.src)) if weight is None else torch.as_tensor(weight)
        self.starts, self.text = torch.as_tensor(starts), text
        self._edges, self._rows = {}, {}  # by relation; _rows: edges sorted by dst, and where each gid's begin
        kinds = self.types_of(self.src), self.types_of(self.dst)
        for pair in sorted(set(zip(kinds[0].tolist(), kinds[1].tolist(), strict=True))):
            chosen = (kinds[0] == pair[0]) & (kinds[1] == pair[1])
            self._edges[pair] = self.src[chosen], self.dst[chosen], self.weight[chosen]
            order = torch.argsort(self.dst[chosen], stable=True)
            pointer = torch.searchsorted(self.dst[chosen][order], torch.arange(int(self.starts[-1]) + 1))
            self._rows[pair] = self.src[chosen][order], self.weight[chosen][order], pointer

    def types_of(self, gids):
        return torch.searchsorted(self.starts, gids, right=True) - 1

    def features(self, name, gids):
        return self.text[gids]

    def messages(self):
        return self._edges

    def edges(self, snapshot=0):
        return {relation: (src, dst) for relation, (src, dst, _) in self._edges.items()}

    def sample(self, gids, snapshot, fanout, generator=None):
        sampled = {}
        for relation, (source, weight, pointer) in self._rows.items():
            counts = pointer[gids + 1] - pointer[gids]
            position = torch.repeat_interleave(torch.arange(len(gids)), counts)
            begin = torch.cumsum(counts, 0) - counts
            edge = torch.arange(len(position)) + torch.repeat_interleave(pointer[gids] - begin, counts)
            if fanout >= 0:  # shuffle each node's edges, keep the first of them
                order = torch.argsort(position + torch.rand(len(position), generator=generator, dtype=torch.float64))
                edge = edge[order]
                keep = torch.arange(len(position)) - torch.repeat_interleave(begin, counts) < fanout
                position, edge = position[keep], edge[keep]
            sampled[relation] = position, source[edge], weight[edge]
        return sampled


def both_ways(pairs):
    """(src, dst) of undirected pairs in both directions."""
    a, b = torch.as_tensor(pairs).T
    return torch.cat([a, b]), torch.cat([b, a])
