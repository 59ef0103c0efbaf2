"""What each baseline computes, against small cases by hand. The contract of all is in test_recommenders.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from colour_world import CATALOGUE, ITEMS, MOMENT, USERS, colour_events, fit, known_data, write_features

from recsys_ray.baselines import BASELINES, chosen_baselines, ease, item_knn, sasrec
from recsys_ray.baselines.hgnn_users import means_per_type
from recsys_ray.baselines.histories import HistoryRule, favour_popular, training_matrix
from recsys_ray.baselines.interface import Choice, default_point
from recsys_ray.baselines.lightgcn import Propagation
from recsys_ray.baselines.propagation import SparseMap, row_means, symmetric
from recsys_ray.baselines.sampling import bpr_loss, softmax_loss
from recsys_ray.config import BASELINES as NAMES
from recsys_ray.config import load_config
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import ConfigError, UserError
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.ranking import batch_of, rank


def events(*rows: tuple[int, int, int, int]) -> Events:
    """(uid, gid, event, timestamp)"""
    return Events(*np.array(rows, np.int64).T)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("features")
    write_features(made)
    return made


class TestHistories:
    BATCH = batch_of(np.array([1, 2]), events((1, 7, 0, 1), (1, 8, 1, 2), (1, 7, 1, 3), (1, 9, 0, 4)))
    POSITIVE = np.array([True, False])

    def entries(self, rule: HistoryRule) -> list[tuple[int, int, float]]:
        row, event, weight = rule.entries(self.BATCH)
        return [(int(r), int(g), float(w)) for r, g, w in zip(row, self.BATCH.gid[event], weight, strict=True)]

    def test_latest_items_each_once(self):
        assert self.entries(HistoryRule(10)) == [(0, 8, 1), (0, 7, 1), (0, 9, 1)]
        assert self.entries(HistoryRule(2)) == [(0, 7, 1), (0, 9, 1)]

    def test_older_places_weigh_less(self):
        assert self.entries(HistoryRule(10, half_life=1)) == [(0, 8, 0.25), (0, 7, 0.5), (0, 9, 1)]

    def test_weak_signals_weigh_less_unless_the_item_was_chosen_too(self):
        assert self.entries(HistoryRule(10, weak=0.5, positive=self.POSITIVE)) == [(0, 8, 0.5), (0, 7, 1), (0, 9, 1)]
        assert self.entries(HistoryRule(2, weak=0.0, positive=self.POSITIVE)) == [(0, 7, 1), (0, 9, 1)]

    def test_old_events_weigh_less_in_training(self, folder):
        data = replace(known_data(folder, events((1, 7, 0, 0), (1, 9, 0, 30 * DAY))), moment=60 * DAY)
        matrix = training_matrix(data, {"days_half_life": 30}).toarray()
        assert matrix[0, [7, 9]] == pytest.approx([0.25, 0.5])

    def test_popularity_counts_positives_of_the_window(self, folder):
        data = replace(
            known_data(folder, events((1, 7, 0, 0), (1, 8, 1, 9 * DAY), (1, 9, 0, 9 * DAY))), moment=10 * DAY
        )
        assert np.flatnonzero(data.popularity(7)).tolist() == [9]
        assert np.flatnonzero(data.popularity(None)).tolist() == [7, 9]


class TestTrend:
    POPULARITY = np.array([0, 3, 8])

    def test_multiplies_scores_by_popularity(self):
        given = torch.tensor([[2.0, 1.0, -1.0]])
        favoured = favour_popular(lambda first, last: given[:, first:last], self.POPULARITY, 0.5)(0, 3)
        assert favoured[0] == pytest.approx([2.0, 2.0, 0.0], abs=1e-5)
        assert favoured[0, 1] > favoured[0, 0]  # of equals, the more popular

    def test_without_power_scores_stay(self):
        given = torch.tensor([[2.0, 1.0, -1.0]])
        assert torch.equal(favour_popular(lambda first, last: given[:, first:last], self.POPULARITY, 0.0)(0, 3), given)

    @pytest.mark.parametrize("name", ["item_knn", "ease", "ials"])
    def test_what_is_popular_now_comes_first(self, folder, name):
        """Item 8 was chosen of late, by users who share nothing else; to those of its colour it comes first."""
        if name == "ials":
            pytest.importorskip("implicit")
        log = colour_events()
        late = events(*((100 + user, 8, 0, MOMENT - 1) for user in range(30)))
        merged = Events(*(np.concatenate(pair) for pair in zip(vars(log).values(), vars(late).values(), strict=True)))
        data = known_data(folder, merged)
        rows = [u for u in range(0, USERS - 1, 2) if 8 not in log.gid[log.uid == u]]
        batch = batch_of(np.array(rows), log)
        assert (rank(fit(name, data, popular_power=1.5), batch, CATALOGUE, 0, k=1) == 8).all()


class TestItemKnn:
    LIKES = sp.csr_matrix(np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]], dtype=np.float32))
    KINDS = np.array([0, 0, 0, 1])

    def test_cosine_of_co_occurrence(self, monkeypatch):
        monkeypatch.setattr(item_knn, "_ROWS", 3)
        similar = item_knn.nearest_items(self.LIKES, self.KINDS, 10).toarray()
        dense = self.LIKES.toarray()
        expected = (dense.T @ dense) / np.sqrt(np.outer(dense.sum(0), dense.sum(0)))
        np.fill_diagonal(expected, 0)
        assert similar == pytest.approx(expected)

    def test_exponents_and_shrinkage(self):
        similar = item_knn.nearest_items(self.LIKES, self.KINDS, 10, own=1.0, other=0.0, shrink=3.0).toarray()
        assert similar[0, 2] == pytest.approx(1 / (2 + 3)) and similar[3, 2] == pytest.approx(1 / (1 + 3))

    def test_the_nearest_of_each_type_stay(self):
        similar = item_knn.nearest_items(self.LIKES, self.KINDS, 1)
        assert similar[0].toarray().ravel() == pytest.approx([0, 1, 0, 0])
        assert (similar[2].toarray() > 0).ravel().tolist() == [True, False, False, True]  # of equals, the first

    def test_types_apart(self):
        similar = item_knn.nearest_items(self.LIKES, self.KINDS, 10, joint=False).toarray()
        assert similar[2, 3] == similar[3, 2] == 0 and similar[2, 0] > 0


class TestEase:
    def test_closed_form(self, monkeypatch):
        monkeypatch.setattr(ease, "_ROWS", 3)
        dense = np.random.default_rng(0).integers(0, 2, (30, 8)).astype(np.float32)
        weights = ease.solve(sp.csr_matrix(dense), l2=2.0)
        inverse = np.linalg.inv(dense.T @ dense + 2.0 * np.eye(8))
        expected = -inverse / np.diag(inverse)
        np.fill_diagonal(expected, 0)
        assert weights == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("joint", [True, False])
    def test_only_the_most_touched_items_up_to_the_limit(self, folder, joint):
        data = known_data(folder, config=load_config(None, ["evaluate.ease_items=20"]))
        model = fit("ease", data, joint=joint)
        assert [len(block.gid) for block in model.blocks] == ([20] if joint else [20, 20])
        touched = np.bincount(data.events.gid, minlength=ITEMS)
        for block in model.blocks:
            first, last = (0, ITEMS) if joint else CATALOGUE.range_of(int(CATALOGUE.type_of(block.gid[:1])[0]))
            others = np.setdiff1d(np.arange(first, last), block.gid)
            assert touched[block.gid].min() >= touched[others].max()
        assert (rank(model, data.users, CATALOGUE, 0, k=30) >= 0).all()  # the others are ranked by popularity


class TestPropagation:
    LINKS = sp.csr_matrix(np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32))

    def test_normalisations(self):
        assert symmetric(self.LINKS).toarray()[0] == pytest.approx([1 / 2**0.5, 1 / 2, 0])
        assert row_means(self.LINKS).toarray()[:, 1] == pytest.approx([0.5, 1, 0])
        links = sp.csr_matrix(np.array([[1, 1, 1], [0, 2, 2]], dtype=np.float32))
        assert means_per_type(links, np.array([0, 2, 3])).toarray().tolist() == [[0.5, 0.5, 1], [0, 1, 1]]

    def test_gradients_are_those_of_a_dense_product(self):
        dense = torch.randn(3, 4, requires_grad=True)
        weight = torch.randn(3, 4)
        (SparseMap(self.LINKS)(dense) * weight).sum().backward()
        assert torch.allclose(dense.grad, torch.from_numpy(self.LINKS.toarray()).T @ weight)
        turned = SparseMap(self.LINKS).transposed(dense.detach())
        assert torch.allclose(turned, torch.from_numpy(self.LINKS.toarray()).T @ dense.detach())

    def test_lightgcn_is_the_mean_over_its_layers(self):
        model = Propagation(self.LINKS, 4, 2, torch.Generator().manual_seed(0))
        users, items = model()
        norm = torch.from_numpy(symmetric(self.LINKS).toarray()).float()
        adjacency = torch.zeros(6, 6)
        adjacency[:3, 3:], adjacency[3:, :3] = norm, norm.T
        start = torch.cat([model.users, model.items])
        expected = (start + adjacency @ start + adjacency @ adjacency @ start) / 3
        assert torch.allclose(torch.cat([users, items]), expected, atol=1e-6)

    @pytest.mark.parametrize("joint", [True, False])
    def test_lightgcn_answers_users_that_were_not_fitted(self, folder, joint):
        known = colour_events()
        fitted = known.select(known.uid < USERS // 2)
        model = fit("lightgcn", known_data(folder, fitted), joint=joint)
        strangers = batch_of(np.arange(USERS // 2, USERS - 1), known)
        ranked = rank(model, strangers, CATALOGUE, 1, k=10)
        assert (ranked % 2 == strangers.uid[:, None] % 2).mean() > 0.95


class TestSampling:
    TABLE = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    WORLD = Catalogue(("a", "b"), np.array([0, 2, 6]), np.ones(6, dtype=bool))

    def test_negatives_are_other_items_of_the_type(self):
        """Type a has two items: whatever is drawn, the only negative of one is the other."""
        query, positive = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
        draw = torch.Generator().manual_seed(1)
        loss = softmax_loss(query, positive, self.TABLE, self.WORLD, 1, draw)
        scores = query @ self.TABLE[:2].T
        own, other = scores.gather(1, positive[:, None])[:, 0], scores.gather(1, 1 - positive[:, None])[:, 0]
        draw = torch.Generator().manual_seed(1)
        drawn = torch.randint(0, 2, (1,), generator=draw)
        expected = torch.where(positive == drawn, 0.0, torch.nn.functional.softplus(other - own)).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_bpr_draws_from_the_type(self):
        """The positive scores 0, the other item of its type 1, those of the other type 9."""
        table = torch.tensor([[0.0], [1.0], [9.0], [9.0], [9.0], [9.0]])
        positive = torch.zeros(1000, dtype=torch.int64)
        loss = bpr_loss(torch.ones(1000, 1), positive, table, self.WORLD, torch.Generator().manual_seed(0)).item()
        assert 1000 * np.log(2) < loss < 1000 * np.log(1 + np.e)


class TestSasRec:
    def test_sequences_by_hand(self, folder):
        log = events((1, 5, 0, 1), (1, 6, 1, 2), (1, 5, 0, 3), (1, 7, 0, 4), (2, 9, 0, 1), (3, 1, 0, 1), (3, 2, 0, 2))
        made = sasrec.make_sequences(known_data(folder, log))
        token, target = made.batch(np.array([0, 1]))
        assert token.tolist() == [[6, 7], [0, 2]]  # gid + 1; user 2 has nothing to predict
        assert target.tolist() == [[-1, 7], [-1, 2]]  # item 6 was touched by a weak signal alone

    def test_long_sequences_are_windows_from_the_newest(self, folder, monkeypatch):
        monkeypatch.setattr(sasrec, "_LENGTH", 3)
        log = events(*((1, item, 0, item) for item in range(8)))
        made = sasrec.make_sequences(known_data(folder, log))
        windows = sorted(made.token[b : b + n].tolist() for b, n in zip(made.begin, made.length, strict=True))
        assert windows == [[1], [2, 3, 4], [5, 6, 7]]

    def test_sees_nothing_of_what_comes_after_nor_of_padding(self):
        torch.manual_seed(0)
        model = sasrec.Transformer(20, 8, 2, 0.5).eval()
        before = model(torch.tensor([[3, 4, 5, 6]]))
        after = model(torch.tensor([[3, 4, 5, 9]]))
        assert torch.allclose(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3], after[:, 3])
        padded = model(torch.tensor([[0, 0, 3, 4, 5, 6]]))
        assert torch.allclose(padded[:, 2:], before, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
class TestEvery:
    def test_space_has_its_default_inside(self, name):
        for config in (load_config(), load_config(None, ["events.weak=[]", "graph.window_days=90"])):
            space = BASELINES[name].space(config)
            for dimension in space.values():
                if isinstance(dimension, Choice):
                    assert dimension.default in dimension.values
                else:
                    assert dimension.low <= dimension.default <= dimension.high
            assert ("weak" in space) <= bool(config.events.weak)  # no dimension that changes nothing

    def test_same_seed_same_model(self, name, folder):
        if name == "ials":
            pytest.importorskip("implicit")
        changed = {"epochs": 2} if BASELINES[name].max_epochs else {}
        one, two = (fit(name, known_data(folder), **changed) for _ in range(2))
        batch = batch_of(np.arange(USERS), colour_events())
        assert torch.equal(one.scorer(batch)(0, ITEMS), two.scorer(batch)(0, ITEMS))

    def test_every_choice_can_be_fitted(self, name, folder):
        if name == "ials":
            pytest.importorskip("implicit")
        data = known_data(folder)
        changed = {"epochs": 1} if BASELINES[name].max_epochs else {}
        for key, dimension in BASELINES[name].space(data.config).items():
            values = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
            for value in values:
                model = fit(name, data, **{**changed, key: value})
                assert (rank(model, data.users, CATALOGUE, 1, k=10) >= 0).all(), (key, value)


@pytest.mark.parametrize("name", [name for name, baseline in BASELINES.items() if baseline.max_epochs])
def test_epochs_are_what_the_watch_says(name, folder):
    baseline = BASELINES[name]
    seen, data = [], known_data(folder)
    params = {**default_point(baseline.space(data.config)), "epochs": 5}
    batch = batch_of(np.arange(USERS), colour_events())

    def watch(epoch, model) -> bool:
        seen.append(model().scorer(batch)(0, ITEMS))
        return epoch == 2

    stopped = baseline.fit(data, params, 0, 1, watch).scorer(batch)(0, ITEMS)
    assert len(seen) == 2 and torch.equal(seen[1], stopped) and not torch.equal(seen[0], seen[1])
    assert torch.equal(fit(name, data, **{**params, "epochs": 2}).scorer(batch)(0, ITEMS), stopped)


def test_data_hold_only_what_was_known(folder):
    assert known_data(folder).events.timestamp.max() < MOMENT


def test_a_missing_package_is_said_with_how_to_install_it():
    lacking = replace(BASELINES["ials"], module="no_such_package")
    with pytest.raises(UserError, match=r"'ials' needs the package 'no_such_package'.*\[baselines\]"):
        lacking.check()


def test_names_in_the_configuration():
    def chosen(text: str) -> list[str]:
        return [b.name for b in chosen_baselines(load_config(None, [f"evaluate.baselines={text}"]))]

    assert chosen("all") == list(NAMES)
    assert chosen("default") == ["popularity", "item_knn", "llm_knn", "hgnn"]
    assert chosen("sasrec, item_knn") == chosen("[sasrec,item_knn]") == ["item_knn", "sasrec"]
    with pytest.raises(ConfigError, match=r"unknown baseline 'item_nn'; choose from popularity, item_knn"):
        chosen("item_nn")
