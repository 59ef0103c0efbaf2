"""The HGNN on graphs with provably right answers."""

from __future__ import annotations

import pytest
import torch
from toy_graph import ToyGraph, both_ways

from recsys_ray.config import HgnnConfig
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.directions import graph_directions, ritz, text_directions
from recsys_ray.hgnn.encoder import make_hgnn
from recsys_ray.hgnn.graphsage import GraphSage
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.loss import in_batch_softmax, max_margin
from recsys_ray.hgnn.propagation import GAIN, PropagationEncoder, write_sums
from recsys_ray.hgnn.sampler import build_blocks, held_out, pair_keys
from recsys_ray.hgnn.signature import SignedSource, item_signatures, signs
from recsys_ray.hgnn.training import (
    EdgeTrainer,
    Graph,
    by_users,
    neighbourhoods_of,
    plan_edges,
    train_epochs,
    unknown_edges,
)
from recsys_ray.storage.checkpoint import load_checkpoint, save_checkpoint

ITEMS, HALF = 40, 20


def planted_world(told=0.0):
    """Two item types, two tastes that cross them: gid % 2. The text says nothing about taste, or so much."""
    pairs = [(i, j) for i in range(ITEMS) for j in range(i + 1, ITEMS) if i % 2 == j % 2 and (i * 7 + j) % 3]
    text = torch.randn(ITEMS, 16, generator=torch.Generator().manual_seed(1))
    text[:, 0] += told * (torch.arange(ITEMS) % 2 * 2 - 1)
    return ToyGraph(*both_ways(pairs), [0, HALF, ITEMS], torch.nn.functional.normalize(text, dim=-1))


def signed(graph, config):
    """The graph with each item's signature, as the job gives it to the model."""
    names = [f"item {gid}" for gid in range(len(graph.text))]
    return SignedSource(
        graph, torch.from_numpy(item_signatures(names, config.signature_dim).copy()), config.signature_dim
    )


def trainer_of(model, toy, config, seed=0, told=()):
    graph = signed(toy, config)
    around = neighbourhoods_of(
        model,
        graph,
        config,
        *[Graph(0, toy.messages(), torch.tensor(told, dtype=torch.int64))] * 2,
        seed,
        torch.arange(ITEMS),
        lambda dim, name: LocalStore(ITEMS, dim),
    )
    return EdgeTrainer(model, model, graph, around, model.types, config, 0, seed)


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3 if isinstance(model, PropagationEncoder) else 1e-2)


def embed(model, graph, config):
    return embed_items(model, graph, 0, torch.arange(ITEMS), LocalStore(ITEMS, config.state_dim))


def train(config, seed=0, scramble=False, told=0.0):
    """``scramble``: from random weights, since the model's own start already knows the neighbourhoods."""
    torch.manual_seed(seed)
    graph, types = planted_world(told), ItemTypes(torch.tensor([0, HALF, ITEMS]))
    model = make_hgnn(16, config, types)
    task = plan_edges(graph.edges(), config, ITEMS, 2, seed)
    trainer = trainer_of(model, graph, config, seed)
    for weight in model.parameters() if scramble else ():
        torch.nn.init.normal_(weight, std=0.3)
    graph = signed(graph, config)
    optimizer = optimizer_of(model)
    untrained = trainer.validate(task)
    state = train_epochs(trainer, task, optimizer, {}, 0)
    return model, graph, untrained, state, embed(model, graph, config)


def tastes_found(z):
    """Share of the triples of an item, one of its taste and one of the other that the embeddings put in order."""
    scores = z @ z.T
    same = torch.arange(ITEMS)[:, None] % 2 == torch.arange(ITEMS) % 2
    off = ~torch.eye(ITEMS, dtype=torch.bool)
    right = (scores[:, :, None] > scores[:, None, :]).double()  # is j nearer to i than k?
    return float(right[(same & off)[:, :, None] & ~same[:, None, :]].mean())


PROPAGATION = {"out_dim": 16, "signature_dim": 64}
GRAPHSAGE = {"encoder": "graphsage", "hidden_dim": 16, "out_dim": 16, "weights_by": "kinship", "aggregator": "mean"}
SMALL = {"batch_size": 64, "patience": 9, "min_edges": 50}


@pytest.mark.parametrize("loss", ["softmax", "max_margin"])
@pytest.mark.parametrize("encoder", [PROPAGATION, GRAPHSAGE, GRAPHSAGE | {"aggregator": "max"}])
def test_it_finds_the_planted_tastes(loss, encoder):
    config = HgnnConfig(**encoder, loss=loss, temperature=0.1, epochs=5, batch_size=64, patience=8, min_edges=100)
    told = 3.0 if encoder is PROPAGATION else 0.5  # of propagation only the text's map learns
    _, _, untrained, state, z = train(config, scramble=True, told=told)
    assert torch.allclose(z.norm(dim=-1), torch.ones(ITEMS), atol=1e-5)
    assert tastes_found(z) > 0.95
    most = 0.99 if encoder is PROPAGATION else 0.95
    assert min(epoch["valid_loss"] for epoch in state["history"]) < most * untrained


def test_untrained_weights_already_place_items_near_those_that_they_share_users_with():
    config = HgnnConfig(out_dim=64, signature_dim=128)
    graph, types = planted_world(), ItemTypes(torch.tensor([0, HALF, ITEMS]))
    torch.manual_seed(0)
    model = make_hgnn(16, config, types)
    assert tastes_found(embed(model, signed(graph, config), config)) > 0.9
    bare = torch.nn.functional.normalize(model.text(graph.text), dim=-1)
    assert tastes_found(bare) < 0.6


def test_structure_is_the_principal_directions_of_the_graph():
    """Of a graph with three positive directions and one negative, the products are those of the positive ones."""
    random = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(ITEMS, 4, generator=random)).Q
    size = torch.tensor([3.0, 2.0, 1.0, -1.0])
    whole = axes * size @ axes.T
    random_signs = torch.randn(ITEMS, 12, generator=random)
    sums = torch.cat([whole @ random_signs, whole @ whole @ random_signs], 1)
    model = PropagationEncoder(16, HgnnConfig(out_dim=16, signature_dim=12), ItemTypes(torch.tensor([0, HALF, ITEMS])))
    model.start(ritz(sums.T @ sums, sums.T @ whole @ sums, 8), torch.eye(16)[:8])
    assert torch.equal(model.text.weight, torch.eye(16)[:8])
    structure = sums[:, :12] @ model.near.T + sums[:, 12:] @ model.far.T
    products, wanted = structure @ structure.T, axes[:, :3] * size[:3] @ axes[:, :3].T
    torch.testing.assert_close(products / products.norm(), wanted / wanted.norm(), atol=1e-3, rtol=0)
    before = model.near.clone()
    nothing = ritz(torch.zeros(24, 24), torch.zeros(24, 24), 8)  # a graph without edges tells nothing
    model.start(nothing, torch.eye(16)[:8])
    assert not nothing.any() and torch.equal(model.near, before)


@pytest.mark.parametrize("sample", [1_000, 30])
def test_directions_are_counted_over_items_and_edges(sample, monkeypatch):
    """On one rank and on two, and from samples nearly the same; edges that must not count do not."""
    monkeypatch.setattr("recsys_ray.hgnn.directions._SAMPLE", sample)
    asked = []
    monkeypatch.setattr("recsys_ray.hgnn.directions.ritz", lambda *sums: asked.append(sums[:2]) or sums[0])
    config = HgnnConfig(**PROPAGATION)
    graph, store = planted_world(), LocalStore(ITEMS, 128)
    write_sums(signed(graph, config), 0, torch.arange(ITEMS), LocalStore(ITEMS, 64), store)
    adjacency = torch.zeros(ITEMS, ITEMS, dtype=torch.float64)
    adjacency[graph.dst, graph.src] = graph.weight.double()

    def odd(src, dst):
        return dst % 2 == 1

    adjacency[1::2] = 0
    for own in (torch.arange(ITEMS), *torch.arange(ITEMS).split(HALF)):
        graph_directions(store, 128, own, graph.messages(), 8, 0, odd)
    (gram, linked), *halves = asked
    both = store.table.double()
    far = 1e-4 if sample > ITEMS else 0.5  # of a sample: near
    for found, wanted in ((gram, both.T @ both), (linked, both.T @ adjacency @ both)):
        assert (found - wanted).norm() < far * wanted.norm()
    if sample > ITEMS:
        for whole, *parts in zip((gram, linked), *halves, strict=True):
            torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-3)


class Snapshots:
    """Toy graphs of the same items, by number."""

    def __init__(self, *graphs):
        self.graphs, self.features = graphs, graphs[0].features

    def sample(self, gids, snapshot, fanout, generator=None):
        return self.graphs[snapshot].sample(gids, 0, fanout, generator)


def test_structure_comes_from_the_graph_to_predict_and_sums_from_the_known_one():
    """Validation edges count in neither, nor do those that texts alone tell."""
    config, text, starts = HgnnConfig(**PROPAGATION, valid_share=0.3), planted_world().text, [0, HALF, ITEMS]
    packed = torch.from_numpy(item_signatures([f"item {gid}" for gid in range(ITEMS)], 64).copy())
    kept, cut, told, none = [], [], [], [torch.empty(0, dtype=torch.int64)] * 2
    for step in (3, 7):
        src, dst = both_ways([(i, (i + k * step) % ITEMS) for i in range(ITEMS) for k in (1, 2)])
        told.append((dst * ITEMS + src)[src % 5 == 0].sort().values)
        out = held_out(pair_keys(src, dst, ITEMS), 0.3, 0) | (src % 5 == 0)
        kept.append(ToyGraph(src, dst, starts, text))
        cut.append(ToyGraph(src[~out], dst[~out], starts, text))
    found = []
    for graphs, share, texts in ((kept, 0.3, told), (cut, 0.0, none)):
        torch.manual_seed(0)
        model = make_hgnn(16, config, ItemTypes(torch.tensor(starts)))
        known, asked = (Graph(number, graphs[number].messages(), texts[number]) for number in (0, 1))
        around = neighbourhoods_of(
            model, SignedSource(Snapshots(*graphs), packed, 64), config.model_copy(update={"valid_share": share}),
            known, asked, 0, torch.arange(ITEMS), lambda dim, name: LocalStore(ITEMS, dim),
        )  # fmt: skip
        found.append((around.sums.table, model.near, model.far))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    sums = [LocalStore(ITEMS, 128) for _ in cut]
    for graph, store in zip(cut, sums, strict=True):
        write_sums(SignedSource(graph, packed, 64), 0, torch.arange(ITEMS), LocalStore(ITEMS, 64), store)
    torch.testing.assert_close(found[0][0], sums[0].table)
    wanted = graph_directions(
        sums[1], 128, torch.arange(ITEMS), cut[1].messages(), 8, 0, lambda src, dst: torch.zeros_like(src, dtype=bool)
    )
    torch.testing.assert_close(torch.cat(found[0][1:], 1), wanted)


def test_directions_of_texts_keep_their_products():
    """Texts of rank four."""
    random = torch.Generator().manual_seed(0)
    text = torch.randn(ITEMS, 4, generator=random) @ torch.randn(4, 16, generator=random)
    graph = ToyGraph(*[torch.empty(0, dtype=torch.int64)] * 2, [0, HALF, ITEMS], text)
    short = text @ text_directions(graph, torch.arange(ITEMS), 4).T
    torch.testing.assert_close(short @ short.T, text @ text.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("encoder", [PROPAGATION, GRAPHSAGE])
def test_the_same_seed_gives_the_same_embeddings_and_a_resumed_run_too(encoder, tmp_path):
    config = HgnnConfig(**encoder, **SMALL, epochs=4)
    *_, first = train(config)
    *_, second = train(config)
    assert torch.equal(first, second)

    toy, types = planted_world(), ItemTypes(torch.tensor([0, HALF, ITEMS]))
    for epochs in (2, 4):  # killed after two epochs, started again
        torch.manual_seed(0 if epochs == 2 else 99)
        short = config.model_copy(update={"epochs": epochs})
        model = make_hgnn(16, short, types)
        optimizer = optimizer_of(model)
        trainer = trainer_of(model, toy, short)
        task = plan_edges(toy.edges(), short, ITEMS, 2, 0)
        path = tmp_path / "checkpoint.safetensors"
        state = load_checkpoint(path, model, optimizer) if path.exists() else {}
        train_epochs(
            trainer, task, optimizer, state, 0,
            on_epoch=lambda state, better: save_checkpoint(path, model, optimizer, state),  # noqa: B023
        )  # fmt: skip
    assert torch.equal(first, embed(model, signed(toy, config), config))


@pytest.mark.parametrize("encoder", [PROPAGATION, GRAPHSAGE])
def test_layer_by_layer_equals_full_neighbourhoods(encoder):
    config = HgnnConfig(**encoder, **SMALL, epochs=1)
    model, graph, _, _, z = train(config)
    seeds = torch.tensor([3, 17, 25])
    blocks = build_blocks(graph, seeds, 0, [-1, -1])
    assert torch.allclose(model.second(model.first(graph, blocks[0]), blocks[1]), z[seeds], atol=1e-6)


def test_sums_made_once_give_the_embedding_of_the_layers():
    config = HgnnConfig(**PROPAGATION)
    torch.manual_seed(0)
    model = PropagationEncoder(16, config, ItemTypes(torch.tensor([0, HALF, ITEMS])))
    graph = signed(planted_world(), config)
    sent, sums = LocalStore(ITEMS, 64), LocalStore(ITEMS, 2 * 64)
    write_sums(graph, 0, torch.arange(ITEMS), sent, sums)
    made = model(graph.features("text", torch.arange(ITEMS)), sums.table.view(ITEMS, 2, 64))
    assert torch.allclose(made, embed(model, graph, config), atol=1e-5)


def test_a_pair_is_taken_out_of_both_its_sums():
    """What the trainer sees of the two ends of an edge is what a graph without that edge shows in the first layer, and
    in the second but for what others were sent over it."""
    config = HgnnConfig(**PROPAGATION, valid_share=0.0)
    toy = ToyGraph(*both_ways([(0, 1), (0, 2), (1, 2), (2, 3), (3, 25)]), [0, HALF, ITEMS], planted_world().text)
    src, dst = torch.cat([toy.src, torch.tensor([30])]), torch.cat([toy.dst, torch.tensor([3])])
    weight = torch.tensor([0.5, 1, 2, 3, 1, 0.5, 1, 4, 3, 1, 1])
    toy = ToyGraph(src, dst, [0, HALF, ITEMS], toy.text, weight)  # 30 sends to 3, and 3 does not send to 30
    model = make_hgnn(16, config, ItemTypes(torch.tensor([0, HALF, ITEMS])))
    around = trainer_of(model, toy, config).neighbourhoods
    own, partner = torch.tensor([2, 3, 25, 30, 3]), torch.tensor([3, 2, 3, 3, 30])
    (_, sums), _ = around.inputs(own, partner, torch.Generator())
    sign = signed(toy, config).signs(torch.arange(ITEMS))
    assert torch.allclose(sums[0, 0], sign[0] + 2 * sign[1], atol=1e-6)  # 2 without 3
    assert torch.allclose(sums[0, 1], 2 * _h1(sign, 1) + _h1(sign, 0), atol=1e-6)
    assert torch.allclose(sums[1, 0], sign[25] + sign[30], atol=1e-6)  # 3 without 2
    assert torch.allclose(sums[2], torch.zeros(2, 64), atol=1e-6)  # 25 without 3: alone
    assert torch.equal(sums[3], torch.zeros(2, 64))  # 30 receives nothing, and nothing is taken from it
    assert torch.allclose(sums[4, 0], sign[25] + 3 * sign[2], atol=1e-6)
    around = trainer_of(model, toy, config, told=[3 * ITEMS + 30]).neighbourhoods  # texts alone tell that 30 sends to 3
    (_, sums), _ = around.inputs(own, partner, torch.Generator())
    assert torch.allclose(sums[1, 0], sign[25], atol=1e-6)  # so 3 heard nothing from it,
    assert torch.allclose(sums[4, 0], sign[25] + 3 * sign[2], atol=1e-6)  # and nothing is taken out


def test_what_an_earlier_graph_has_is_not_asked():
    edge = torch.tensor
    known = {(0, 0): (edge([1, 2]), edge([2, 1]))}
    asked = {(0, 0): (edge([3, 1, 2]), edge([1, 2, 3])), (1, 0): (edge([8]), edge([1]))}
    found = unknown_edges(known, asked, 10)
    assert {r: [ends.tolist() for ends in edges] for r, edges in found.items()} == {
        (0, 0): [[3, 2], [1, 3]],
        (1, 0): [[8], [1]],
    }
    whole = unknown_edges(asked, asked, 10)
    assert {r: [ends.tolist() for ends in edges] for r, edges in whole.items()} == {
        r: [src.tolist(), dst.tolist()] for r, (src, dst) in asked.items()
    }


def test_edges_that_texts_alone_tell_are_no_supervision():
    edge = torch.tensor
    edges = {(0, 0): (edge([3, 1, 2]), edge([1, 2, 3]), torch.ones(3)), (1, 0): (edge([8]), edge([1]), torch.ones(1))}
    found = by_users(Graph(0, edges, edge([1 * 10 + 8, 2 * 10 + 1])), 10)
    assert {r: [ends.tolist() for ends in kept] for r, kept in found.items()} == {
        (0, 0): [[3, 2], [1, 3]],
        (1, 0): [[], []],
    }


def _h1(sign, item):
    sent = {0: 0.5 * sign[1] + sign[2], 1: 0.5 * sign[0] + 4 * sign[2]}[item]
    return torch.nn.functional.normalize(sent, dim=-1)


def test_an_item_without_edges_is_embedded_from_its_text_alone():
    types = ItemTypes(torch.tensor([0, 2, 3]))
    graph = ToyGraph(torch.tensor([0, 1]), torch.tensor([1, 0]), [0, 2, 3], torch.eye(3, 16))
    config = HgnnConfig(**PROPAGATION)
    model = PropagationEncoder(16, config, types)
    z = embed_items(model, signed(graph, config), 0, torch.arange(3), LocalStore(3, config.state_dim))
    assert torch.allclose(z[2, :8], torch.nn.functional.normalize(model.text(graph.text[2]), dim=-1), atol=1e-6)
    assert not z[2, 8:].any() and torch.allclose(z[0, 8:].norm(), GAIN * z[0, :8].norm())
    config = HgnnConfig(**GRAPHSAGE)
    sage = GraphSage(16, config, types)
    z = embed_items(sage, signed(graph, config), 0, torch.arange(3), LocalStore(3, config.state_dim))
    h = torch.relu(sage.layers[0].own["all"](sage.project(graph.text[2])))
    alone = torch.nn.functional.normalize(sage.layers[1].own["all"](h), dim=-1)
    assert torch.allclose(z[2], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("aggregator", "pooled"),
    [("max", lambda sent: sent.amax(0)), ("mean", lambda sent: sent.mean(0))],
)
def test_graphsage_pools_neighbours_element_by_element(aggregator, pooled):
    torch.manual_seed(0)
    config = HgnnConfig(encoder="graphsage", hidden_dim=4, out_dim=4, aggregator=aggregator)
    types = ItemTypes(torch.tensor([0, 3]))
    graph = ToyGraph(torch.tensor([1, 2]), torch.tensor([0, 0]), [0, 3], torch.randn(3, 5))
    model = GraphSage(5, config, types)
    (block,) = build_blocks(graph, torch.tensor([0]), 0, [-1])
    h = model.project(graph.text[block.src])
    layer = model.layers[0]
    messages = torch.relu(layer.relation["0_0"](h[1:]))
    assert torch.allclose(layer(h, block)[0], layer.own["0"](h[0]) + pooled(messages), atol=1e-6)


@pytest.mark.parametrize("encoder", [PROPAGATION, GRAPHSAGE])
def test_weights_by_kinship_know_a_type_that_comes_later(encoder):
    """Its items are embedded as those of a known type with the same text and the same kind of edges are."""
    config = HgnnConfig(**encoder)
    torch.manual_seed(0)
    model = make_hgnn(16, config, ItemTypes(torch.tensor([0, 2, 4])))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    text = torch.randn(2, 16).repeat(3, 1)  # items 2 and 4 look like 0, items 3 and 5 like 1
    edges = both_ways([(0, 1), (2, 3), (4, 5)])
    grown = make_hgnn(16, config, ItemTypes(torch.tensor([0, 2, 4, 6])))
    grown.load_state_dict(model.state_dict())
    graph = ToyGraph(*edges, [0, 2, 4, 6], text)
    same = SignedSource(graph, torch.zeros(6, 2, dtype=torch.int64), config.signature_dim)
    z = embed_items(grown, same, 0, torch.arange(6), LocalStore(6, config.state_dim))
    assert torch.allclose(z[4:], z[2:4], atol=1e-6)
    assert not torch.allclose(z[4], z[5], atol=1e-3)
    by_relation = HgnnConfig(encoder="graphsage", hidden_dim=8, out_dim=8, weights_by="relation")
    with pytest.raises(RuntimeError, match="Missing key"):
        make_hgnn(16, by_relation, ItemTypes(torch.tensor([0, 2, 4, 6]))).load_state_dict(
            make_hgnn(16, by_relation, ItemTypes(torch.tensor([0, 2, 4]))).state_dict()
        )


def test_signatures_depend_on_the_id_alone_and_tell_items_apart():
    packed = torch.from_numpy(item_signatures(["a", "b", "c"], 128).copy())
    other = torch.from_numpy(item_signatures(["c", "日本"], 128).copy())
    assert torch.equal(packed[2], other[0])
    vectors = signs(packed, 100)  # not a multiple of 64
    assert vectors.shape == (3, 100)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-6)
    assert (vectors @ vectors.T - torch.eye(3)).abs().max() < 0.5


def test_softmax_masks_what_is_no_negative():
    z = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    anchors, positives, kinds = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 6, 5, 9]), torch.tensor([0, 0, 0, 1])
    loss = in_batch_softmax(z, z, anchors, positives, kinds, torch.zeros(4), 1.0)
    logits = z @ z.T
    # row 0: column 1 is another positive of anchor 0, column 2 the same item, column 3 of another type
    rows = [
        torch.tensor(0.0),
        torch.logsumexp(logits[1, [1, 2]], 0) - logits[1, 1],
        torch.logsumexp(logits[2, [2, 1]], 0) - logits[2, 2],
        torch.tensor(0.0),
    ]
    assert torch.allclose(loss, torch.stack(rows).mean(), atol=1e-5)


def test_max_margin_by_hand():
    a, p, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    assert max_margin(a, p, n, nothing, 0.5) == pytest.approx((1.5 + 0.5) / 2)
    assert max_margin(a, p, n, torch.tensor([[True, False]]), 0.5) == pytest.approx(0.5)
