"""The balanced multi-link sampler: balance, freshness, the same number of steps, and no leak of supervision edges."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_graph import ToyGraph, both_ways

from recsys_ray.hgnn.sampler import (
    build_blocks,
    by_unordered_relation,
    dropper,
    epoch_edges,
    held_out,
    pair_keys,
    quotas,
)


def lopsided(generator=None):
    """1,000 edges of type 0 with itself, 40 between the types, 60 of type 1 with itself."""
    draw = torch.Generator().manual_seed(0)
    return {
        (0, 0): (torch.randint(50, (1000,), generator=draw), torch.randint(50, (1000,), generator=draw)),
        (0, 1): (torch.randint(50, (40,), generator=draw), 50 + torch.randint(50, (40,), generator=draw)),
        (1, 1): (50 + torch.randint(50, (60,), generator=draw), 50 + torch.randint(50, (60,), generator=draw)),
    }


def sizes(edges):
    return {relation: len(src) for relation, (src, _) in edges.items()}


def test_larger_relations_are_undersampled_to_the_smallest():
    assert quotas({(0, 0): 1000, (0, 1): 40, (1, 1): 60}, min_edges=1) == {(0, 0): 40, (0, 1): 40, (1, 1): 40}


def test_a_tiny_relation_does_not_starve_the_others():
    assert quotas({(0, 0): 1000, (0, 1): 2, (1, 1): 0}, min_edges=100) == {(0, 0): 100, (0, 1): 2, (1, 1): 0}


def test_an_epoch_is_balanced_and_the_next_one_is_fresh():
    edges = lopsided()
    shares = quotas(sizes(edges), 1)
    first = epoch_edges(edges, shares, 120, torch.Generator().manual_seed(1))
    second = epoch_edges(edges, shares, 120, torch.Generator().manual_seed(2))
    again = epoch_edges(edges, shares, 120, torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0])
    for anchors, positives in (first, second):
        kinds = torch.stack([torch.minimum(anchors, positives) >= 50, torch.maximum(anchors, positives) >= 50])
        assert (~kinds[1]).sum() == 40  # both of type 0
        assert kinds[0].sum() == 40  # both of type 1
    drawn = [set(pair_keys(a, p, 100)[(a < 50) & (p < 50)].tolist()) for a, p in (first, second)]
    assert len(drawn[0] & drawn[1]) < 20  # of 40 out of 1,000


def test_edges_are_turned_in_both_directions():
    edges = {(0, 1): (torch.arange(200), 200 + torch.arange(200))}
    anchors, _ = epoch_edges(edges, {(0, 1): 200}, 200, torch.Generator().manual_seed(0))
    assert 60 < int((anchors < 200).sum()) < 140


def test_a_rank_with_fewer_edges_takes_as_many_steps():
    edges = {(0, 0): (torch.arange(10), torch.arange(10) + 10)}
    anchors, _ = epoch_edges(edges, {(0, 0): 10}, 64, torch.Generator().manual_seed(0))
    assert len(anchors) == 64


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=50), st.integers(0, 99))
def test_both_directions_of_an_edge_are_held_out_together(pairs, seed):
    a, b = torch.tensor(pairs).T
    assert torch.equal(pair_keys(a, b, 1000), pair_keys(b, a, 1000))
    assert torch.equal(held_out(pair_keys(a, b, 1000), 0.3, seed), held_out(pair_keys(b, a, 1000), 0.3, seed))


def test_the_held_out_share_is_as_configured():
    keys = torch.arange(100_000)
    for share in (0.0, 0.1, 0.5):
        assert abs(held_out(keys, share, 3).double().mean() - share) < 0.01


def test_directions_are_joined():
    joined = by_unordered_relation({(0, 1): (torch.tensor([1]), torch.tensor([9])), (1, 0): (torch.tensor([8]),) * 2})
    assert joined.keys() == {(0, 1)}
    assert joined[0, 1][0].tolist() == [1, 8]


def complete_graph(items=12):
    pairs = [(i, j) for i in range(items) for j in range(i + 1, items)]
    return ToyGraph(*both_ways(pairs), [0, 6, items], torch.eye(items))


def test_no_message_passes_over_a_supervision_edge_in_either_direction():
    graph = complete_graph()
    anchors, positives = torch.tensor([0, 1, 7]), torch.tensor([5, 8, 11])
    drop = dropper(pair_keys(anchors, positives, 12), 12, valid_share=0.25, seed=4)
    blocks = build_blocks(graph, torch.unique(torch.cat([anchors, positives])), 0, [-1, -1], None, drop)
    banned = {frozenset(pair) for pair in zip(anchors.tolist(), positives.tolist(), strict=True)}
    passed = 0
    for block in blocks:
        for src_pos, dst_pos, _ in block.edges.values():
            src, dst = block.src[src_pos], block.dst[dst_pos]
            assert not held_out(pair_keys(src, dst, 12), 0.25, 4).any()
            for edge in zip(src.tolist(), dst.tolist(), strict=True):
                assert frozenset(edge) not in banned
                passed += 1
    assert passed > 50


def test_blocks_fit_together():
    graph = complete_graph()
    blocks = build_blocks(graph, torch.tensor([2, 9]), 0, [3, 2], torch.Generator().manual_seed(0))
    assert torch.equal(blocks[1].dst, torch.tensor([2, 9]))
    assert torch.equal(blocks[0].dst, blocks[1].src)
    for block, fanout in zip(blocks, (2, 3), strict=True):
        assert torch.equal(block.src[block.dst_in_src], block.dst)
        for _, dst_pos, _ in block.edges.values():
            assert int(torch.bincount(dst_pos).max()) <= fanout
