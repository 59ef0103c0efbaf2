"""The two-tower: what it learns, its losses, its batches, and that a user's vector depends on the user alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import CHANCE, CONFIG, ITEMS, LIKED, TEXT, TYPES, USERS, board_task, board_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.choose import Chosen
from recsys_ray.scoring.scorer import ScoreSpec
from recsys_ray.storage.checkpoint import load_checkpoint, save_checkpoint
from recsys_ray.two_tower.batches import batches_in, country_index, epoch_batches, make_batch, tables_for, user_inputs
from recsys_ray.two_tower.features import UserInputs
from recsys_ray.two_tower.loss import inclusion_log_q, paper_loss, sampled_softmax
from recsys_ray.two_tower.rows import histories_of
from recsys_ray.two_tower.towers import TwoTower, load_towers, load_user_tower
from recsys_ray.two_tower.training import (
    item_vectors,
    learned_vectors,
    refit,
    start,
    train_epochs,
    user_vectors,
)

EMPTY = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize("loss", ["softmax", "paper"])
@pytest.mark.parametrize("with_hgnn", [True, False])
def test_it_learns_the_checkerboard(loss, with_hgnn):
    task = board_task("hgnn" if with_hgnn else "text", with_hgnn)
    trainer, optimizer = board_trainer(task, CONFIG.model_copy(update={"loss": loss}))
    state = train_epochs(trainer, optimizer, {})
    assert state["history"][-1]["valid_hr_at_10"] > 0.97
    assert state["history"][-1]["loss"] < state["history"][0]["loss"]
    users = user_vectors(trainer.averaged, task.source, task.catalogue, "valid", task.queries, np.arange(USERS))
    items = item_vectors(trainer.averaged, task.source, task.catalogue, "valid")
    for vectors in (users, items):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-5)


def papers_board(with_hgnn: bool = True) -> TowerTask:
    task = board_task(with_hgnn=with_hgnn)
    return replace(task, spec=replace(task.spec, inputs="paper", id_dim=0, last_item=False))


def test_it_learns_the_checkerboard_from_the_papers_inputs():
    trainer, optimizer = board_trainer(papers_board())
    assert train_epochs(trainer, optimizer, {})["history"][-1]["valid_hr_at_10"] > 0.97


@pytest.mark.parametrize("with_hgnn", [True, False])
def test_the_papers_towers_read_what_paper_a_feeds_and_no_more(someone, with_hgnn):
    _, _, inputs, tables = someone
    task = papers_board(with_hgnn)
    trainer, _ = board_trainer(task)
    model, random = trainer.model.eval(), torch.Generator().manual_seed(0)
    start(model, task, 0)
    assert not any("linear" in name or "ids" in name for name, _ in model.named_parameters())

    def moved(**changes: object) -> bool:
        tables_now = replace(tables, **{n: v for n, v in changes.items() if hasattr(tables, n)})
        inputs_now = replace(inputs, **{n: v for n, v in changes.items() if hasattr(inputs, n)})
        return not torch.allclose(model.users(inputs_now, tables_now), model.users(inputs, tables), atol=1e-6)

    other = torch.nn.functional.normalize(torch.randn(ITEMS, 16, generator=random), dim=1)
    assert not moved(text=other.half()) and not moved(events=torch.tensor([1, 0, 0]))
    twice = {"gids": inputs.gids.repeat(2), "events": inputs.events.repeat(2), "offsets": torch.tensor([0, 6, 6, 6])}
    assert not moved(**twice)  # how much of each type is no feature
    assert moved(hgnn=other) == moved(gids=torch.tensor([3, 150, 5])) == with_hgnn
    assert moved(age=torch.tensor([60.0, 20.0, 30.0])) and moved(tastes={"music": torch.ones(3, 3)})

    gids = torch.arange(ITEMS)
    rows = task.catalogue.rows(gids, "valid", tables.text.float(), tables.hgnn if with_hgnn else None)
    items = model.items(rows)
    hidden = replace(rows, activity=rows.activity + 1, ntype=1 - rows.ntype, owners=rows.owners.flip(0))
    assert torch.equal(items, model.items(hidden))
    assert not torch.allclose(items, model.items(replace(rows, text=other)), atol=1e-6)
    assert not torch.allclose(items, model.items(replace(rows, categories=1 - rows.categories + 1)), atol=1e-6)


def test_without_a_feature_that_tells_the_board_it_does_not_see_it():
    trainer, optimizer = board_trainer(board_task("nowhere"), CONFIG.model_copy(update={"epochs": 2}))
    state = train_epochs(trainer, optimizer, {})
    assert state["history"][-1]["valid_hr_at_10"] < 2 * CHANCE


def test_the_refit_takes_one_more_epoch_over_the_validation_periods_examples_too():
    task = board_task()
    trainer, optimizer = board_trainer(task, CONFIG.model_copy(update={"epochs": 1}))
    train_epochs(trainer, optimizer, {})
    before, steps = [p.clone() for p in trainer.averaged.parameters()], []
    model = refit(trainer, optimizer, 1, lambda epoch, step, loss: steps.append((epoch, step)))
    snapshots = np.concatenate([task.examples["snapshot"], task.later["snapshot"]])
    assert steps == [(1, step) for step in range(batches_in(snapshots, CONFIG.batch_size))]
    assert len(steps) > trainer.steps and not model.training
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.averaged.parameters(), strict=True))
    assert not torch.equal(before[-1], list(model.parameters())[-1])


def test_a_resumed_training_equals_an_undisturbed_one_bit_for_bit(tmp_path):
    task, path = board_task(rows=slice(0, 700)), tmp_path / "checkpoint.safetensors"
    task.spec = replace(task.spec, dropout=0.2)
    config = CONFIG.model_copy(update={"epochs": 4})
    whole, optimizer = board_trainer(task, config)
    undisturbed = train_epochs(whole, optimizer, {})
    for epochs in (2, 4):  # killed after two epochs, started again
        trainer, optimizer = board_trainer(task, config.model_copy(update={"epochs": epochs}))
        if path.exists():
            for weight in [*trainer.model.parameters(), *trainer.averaged.parameters()]:  # all must come back
                torch.nn.init.zeros_(weight)
        state = load_checkpoint(path, trainer.weights, optimizer) if path.exists() else {}
        state = train_epochs(
            trainer, optimizer, state,
            on_epoch=lambda state, better: save_checkpoint(path, trainer.weights, optimizer, state),  # noqa: B023
        )  # fmt: skip
    assert state == undisturbed
    for towers, resumed in ((whole.model, trainer.model), (whole.averaged, trainer.averaged)):
        for name, weight in towers.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name]), name


def test_it_stops_when_validation_does_not_improve():
    trainer, optimizer = board_trainer(
        board_task("nowhere", rows=slice(0, 100)), CONFIG.model_copy(update={"epochs": 9, "patience": 1})
    )
    trainer.validate = lambda: Chosen(ScoreSpec(), 0.5, 0.25)
    assert len(train_epochs(trainer, optimizer, {})["history"]) == 2


def test_the_best_epoch_is_the_one_with_the_best_ndcg():
    trainer, optimizer = board_trainer(board_task(rows=slice(0, 100)), CONFIG.model_copy(update={"epochs": 3}))
    figures = iter([(0.1, 0.3, 0.01, 3.0), (0.3, 0.2, 0.02, 10.0), (0.2, 0.4, 0.03, 30.0)])

    def validate() -> Chosen:
        hit_rate, gain, memory, ridge = next(figures)
        return Chosen(ScoreSpec(memory=memory, ridge=ridge), hit_rate, gain)

    trainer.validate = validate
    better = []
    state = train_epochs(trainer, optimizer, {}, on_epoch=lambda state, best: better.append(best))
    assert better == [True, False, True]
    assert state["best"] == 0.4 and ScoreSpec(**state["score"]) == ScoreSpec(memory=0.03, ridge=30.0)
    assert [epoch["valid_hr_at_10"] for epoch in state["history"]] == [0.1, 0.3, 0.2]
    assert [epoch["valid_ndcg_at_100"] for epoch in state["history"]] == [0.3, 0.2, 0.4]


def test_inclusion_probability_is_what_a_simulation_counts():
    share = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    random = np.random.default_rng(0)
    batches = random.choice(5, size=(20_000, 8), p=share.double().numpy() / share.double().sum().item())
    counted = [(batches == item).any(1).mean() for item in range(5)]
    assert inclusion_log_q(share, 8).exp().tolist() == pytest.approx(counted, abs=0.01)
    extremes = inclusion_log_q(torch.tensor([0.0, 1.0]), 1024)
    assert torch.isfinite(extremes).all()
    assert extremes[1] == pytest.approx(0.0)


def test_sampled_softmax_by_hand():
    user = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    item = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    target, log_q = torch.tensor([0, 2]), torch.log(torch.tensor([0.5, 0.2, 0.1]))
    touched = torch.tensor([[False, False, True], [False, False, True]])  # a user's own target is never masked
    first = torch.tensor([1 / 0.5, 0.6 / 0.5]) - log_q[:2]
    second = torch.tensor([0 / 0.5, 0.8 / 0.5, 1 / 0.5]) - log_q
    wanted = (torch.logsumexp(first, 0) - first[0] + torch.logsumexp(second, 0) - second[2]) / 2
    assert sampled_softmax(user, item, target, log_q, touched, 0.5) == pytest.approx(wanted.item(), rel=1e-5)


def test_paper_loss_by_hand():
    user = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    item = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    share = torch.tensor([0.5, 0.25, 0.25])
    touched = torch.tensor([[False, False, False], [True, False, False]])
    # user 0: negatives 1 (score .6) and 2 (score 0), both weigh 4; user 1: negative 1 (score .8) alone
    wanted = ((0.6 + 0.0) / 2 - 1.0 + 0.8 - 1.0) / 2
    assert paper_loss(user, item, torch.tensor([0, 2]), share, touched) == pytest.approx(wanted, rel=1e-5)
    rare = torch.tensor([0.5, 0.1, 0.4])  # weights 10 and 2.5
    wanted = (0.6 * 10 / 12.5 - 1.0 + 0.8 - 1.0) / 2
    assert paper_loss(user, item, torch.tensor([0, 2]), rare, touched) == pytest.approx(wanted, rel=1e-5)
    alone = torch.tensor([[False, True, True], [True, True, False]])  # no negative at all: finite
    assert torch.isfinite(paper_loss(user, item, torch.tensor([0, 2]), share, alone))


def test_a_batch_masks_what_is_no_negative():
    task = board_task()
    rows = np.random.default_rng(0).choice(len(task.examples["target"]), 50, replace=False)
    batch = make_batch(task.examples, rows, task.spec, task.source, task.catalogue, task.snapshot_names)
    candidates = batch.candidates.tolist()
    assert candidates == sorted(set(task.examples["target"][rows].tolist()))
    for place, row in enumerate(rows):
        target, touched = task.examples["target"][row], set(histories_of(task.examples, np.array([row]))[0].tolist())
        assert candidates[batch.target[place]] == target
        wanted = [gid in touched or gid // (2 * LIKED) != target // (2 * LIKED) for gid in candidates]
        assert batch.not_negative[place].tolist() == wanted
    assert batch.not_negative.any()
    assert not batch.not_negative.all()


def test_a_batch_holds_each_items_features_of_its_snapshot():
    task = board_task()
    rows = np.arange(40)
    batch = make_batch(task.examples, rows, task.spec, task.source, task.catalogue, task.snapshot_names)
    assert torch.equal(batch.rows.hgnn, task.source.tables["hgnn_cut0"][batch.candidates])
    assert torch.equal(batch.rows.text, task.source.tables["text"][batch.candidates])
    history, _, offsets = histories_of(task.examples, rows)
    assert torch.equal(batch.tables.hgnn[batch.inputs.gids], task.source.tables["hgnn_cut0"][history])
    assert batch.inputs.offsets.tolist() == offsets.tolist()


def test_categories_stay_with_their_items():
    task = board_task()
    gids = torch.tensor([5, 0, 7])
    rows = task.catalogue.rows(gids, "cut0", task.source.features("text", gids), None)
    assert rows.categories.tolist() == [1, 2]
    assert rows.category_offsets.tolist() == [0, 0, 2]


@pytest.fixture
def someone():
    """Three users: one with a history and everything known, one with an empty history, one with nothing."""
    task = board_task(id_dim=4)
    trainer, _ = board_trainer(task)
    trainer.model.ids.assign(torch.ones(ITEMS))
    nan = float("nan")
    inputs = UserInputs(
        gids=torch.tensor([3, 150, 3]), events=torch.tensor([0, 1, 1]), offsets=torch.tensor([0, 3, 3, 3]),
        age=torch.tensor([30.0, 20.0, nan]), country=torch.tensor([1, 0, -1]),
        tastes={"music": torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0], [nan, nan, nan]])},
    )  # fmt: skip
    tables = tables_for(task.source, task.spec, task.catalogue, "valid", torch.arange(ITEMS))
    return task, trainer.model.eval(), inputs, tables


def test_whatever_is_absent_the_vector_is_finite(someone):
    _, model, inputs, tables = someone
    nothing = UserInputs(EMPTY, EMPTY, torch.tensor([0, 0]), torch.tensor([float("nan")]), torch.tensor([-1]))
    for given_ in (inputs, nothing):
        vectors = model.users(given_, tables)
        assert torch.isfinite(vectors).all()
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-5)
    assert torch.allclose(model.users(inputs, tables)[2], model.users(nothing, tables)[0], atol=1e-6)


@pytest.mark.parametrize("trait", ["age", "country", "tastes", "history"])
def test_every_trait_counts_and_absent_is_not_zero(someone, trait):
    _, model, inputs, tables = someone
    before = model.users(inputs, tables)
    if trait == "history":
        changed = replace(inputs, gids=torch.tensor([3, 150, 5]))
    elif trait == "tastes":
        changed = replace(inputs, tastes={"music": torch.full((3, 3), float("nan"))})
    else:
        changed = replace(inputs, **{trait: torch.full_like(getattr(inputs, trait), 0)})
    difference = (model.users(changed, tables) - before).abs().amax(1)
    assert difference[0] > 1e-6
    assert (difference[1] > 1e-9) == (trait in {"tastes", "age"})  # country is 0 already, and it has no history


def test_a_user_vector_does_not_depend_on_the_tables_rows_nor_on_the_other_users(someone):
    task, model, inputs, tables = someone
    needed, place = torch.unique(inputs.gids, return_inverse=True)
    compact = tables_for(task.source, task.spec, task.catalogue, "valid", needed)
    whole = model.users(inputs, tables)
    assert torch.allclose(whole, model.users(replace(inputs, gids=place), compact), atol=1e-6)
    alone = UserInputs(inputs.gids, inputs.events, torch.tensor([0, 3]), inputs.age[:1], inputs.country[:1],
                       {"music": inputs.tastes["music"][:1]})  # fmt: skip
    assert torch.allclose(whole[:1], model.users(alone, tables), atol=1e-6)


def test_saved_towers_answer_as_the_trained_ones(someone, tmp_path):
    task, model, inputs, tables = someone
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    task.spec.save(tmp_path / "spec.json")
    learned = learned_vectors(load_towers(tmp_path), task.source, task.catalogue, "valid")
    alone = replace(tables, ids=learned)
    assert torch.equal(load_user_tower(tmp_path)(inputs, alone), model.users(inputs, tables))
    towers = load_towers(tmp_path)
    assert towers.user.spec == task.spec
    vectors = item_vectors(model, task.source, task.catalogue, "valid")
    assert torch.equal(item_vectors(towers, task.source, task.catalogue, "valid"), vectors)


@pytest.mark.parametrize("harm", ["no weights", "no spec", "foreign spec"])
def test_damaged_towers_are_one_clear_sentence(someone, tmp_path, harm):
    task, model, _, _ = someone
    if harm != "no weights":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    if harm != "no spec":
        spec = replace(task.spec, layers=[8, 4]) if harm == "foreign spec" else task.spec
        spec.save(tmp_path / "spec.json")
    with pytest.raises(ArtifactError):
        load_user_tower(tmp_path)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_example_once_and_one_snapshot_a_batch(snapshots, batch_size, extra, seed):
    snapshot = np.array(snapshots, np.int16)
    steps = batches_in(snapshot, batch_size)
    batches = list(epoch_batches(snapshot, batch_size, steps + extra, np.random.default_rng(seed)))
    assert len(batches) == steps + extra  # as many as the rank with the most
    assert sorted(np.concatenate(batches[:steps]).tolist()) == list(range(len(snapshot)))
    for rows in batches:
        assert len(set(snapshot[rows].tolist())) == 1
        assert 1 <= len(rows) <= max(1.5 * batch_size, 1)


def test_epochs_are_shuffled_afresh_and_by_their_seed_alone():
    snapshot = np.repeat([0, 1], 50)
    first, again, other = (
        np.concatenate(list(epoch_batches(snapshot, 10, 10, np.random.default_rng(seed)))) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_countries_outside_the_vocabulary_are_absent():
    known = ["DE", "SE", "US"]
    assert country_index(known, np.array(["SE", "", "XX", "DE"])).tolist() == [1, -1, -1, 0]
    assert country_index([], np.array(["SE"])).tolist() == [-1]


def test_examples_without_any_history_make_inputs():
    task = board_task()
    rows = np.arange(3)
    examples = {**task.examples, "offsets": np.zeros_like(task.examples["offsets"])}
    inputs = user_inputs(examples, rows, task.spec)
    assert inputs.offsets.tolist() == [0, 0, 0, 0]
    batch = make_batch(examples, rows, task.spec, task.source, task.catalogue, task.snapshot_names)
    assert not batch.not_negative[torch.arange(3), batch.target].any()


@pytest.mark.parametrize("with_hgnn", [True, False])
def test_before_its_first_step_it_recommends_what_is_near(with_hgnn):
    """Of the widths here nothing of the vectors is lost: both towers turn centred text and HGNN vectors alike."""
    task = board_task("text", with_hgnn, id_dim=TEXT)
    task.spec = replace(task.spec, layers=[8, 2 * TEXT])
    torch.manual_seed(0)
    model = TwoTower(task.spec).eval()
    model.ids.own.weight.data.zero_()
    start(model, task, seed=0)
    items = item_vectors(model, task.source, task.catalogue, "cut1")
    users = user_vectors(model, task.source, task.catalogue, "cut1", task.examples, np.arange(50))
    history, _, offsets = histories_of(task.examples, np.arange(50))
    parts = np.split(history, offsets[1:-1])

    def near(vectors):
        centred = vectors - vectors.mean(0)
        return torch.stack([centred[part].sum(0) / max(len(part), 1) for part in parts]), centred

    means = [near(task.source.tables["text"])] + ([near(task.source.tables["hgnn_cut1"])] if with_hgnn else [])
    known = torch.from_numpy(np.diff(offsets) > 0)
    wanted = cosine(torch.cat([u for u, _ in means], 1)[known], torch.cat([i for _, i in means], 1))
    assert torch.allclose((users @ items.T)[known], wanted, atol=1e-4)


def cosine(users, items):
    unit = torch.nn.functional.normalize
    return unit(users, dim=-1) @ unit(items, dim=-1).T


def test_the_share_of_an_item_is_that_of_its_snapshot():
    task = board_task()
    trainer, _ = board_trainer(task)
    for snapshot in (0, 1):
        targets = task.examples["target"][task.examples["snapshot"] == snapshot]
        wanted = np.bincount(targets, minlength=ITEMS) / len(targets)
        assert np.allclose(trainer.share[snapshot].numpy(), wanted, atol=1e-6)


def test_weights_are_averaged_over_steps():
    trainer, _ = board_trainer(board_task(), CONFIG.model_copy(update={"averaging": 0.5}))
    start = trainer.averaged.item.kind.weight.clone()
    with torch.no_grad():
        trainer.model.item.kind.weight += 1
    trainer.average(steps=1000)
    assert torch.allclose(trainer.averaged.item.kind.weight, start + 0.5)
    trainer.average(steps=0)  # early on the newest weights count for more
    assert torch.allclose(trainer.averaged.item.kind.weight, start + 0.95)


def test_the_last_item_counts_beside_the_mean(someone):
    _, model, inputs, tables = someone
    same_last = replace(inputs, gids=torch.tensor([150, 3, 3]), events=torch.tensor([1, 0, 1]))
    base = model.users(inputs, tables)[0]
    assert torch.allclose(model.users(same_last, tables)[0], base, atol=1e-6)  # the mean knows no order
    other_last = replace(inputs, gids=torch.tensor([3, 3, 150]), events=torch.tensor([0, 1, 1]))
    assert not torch.allclose(model.users(other_last, tables)[0], base, atol=1e-4)


def test_means_of_the_latest_are_weighted_by_place(someone):
    task, model, inputs, tables = someone
    spec = replace(task.spec, tastes={}, recent=[1.0])
    tables = replace(tables, ids=model.ids(tables.owners, tables.hgnn).detach())
    features = TwoTower(spec).user._features(replace(inputs, tastes={}), tables)
    behind = 2 * TYPES + 2 + 16  # how much of each type, age, country
    latest = features[:, :-behind][:, -(spec.text_dim + spec.id_dim) :]
    text = tables.text.float() * spec.text_dim**0.5
    for vectors, found in ((text, latest[:, : spec.text_dim]), (tables.ids, latest[:, spec.text_dim :])):
        wanted = (vectors[3] / 4 + vectors[150] / 2 + vectors[3]) / 1.75
        assert torch.allclose(found[0], wanted, atol=1e-5)
        assert not found[1:].any()  # no history


def test_a_type_that_came_later_counts_in_the_means_over_all_types(someone):
    task, model, inputs, tables = someone
    later = replace(tables, ntype=tables.ntype.where(tables.ntype == 0, TYPES))  # items of type 1 are of a new one
    users, before = model.users(inputs, later), model.users(inputs, tables)
    assert torch.isfinite(users).all()
    assert not torch.allclose(users[0], before[0], atol=1e-4)
    assert torch.equal(users[1:], before[1:])
    gids = torch.arange(ITEMS)
    rows = task.catalogue.rows(
        gids, "cut0", task.source.features("text", gids), task.source.features("hgnn_cut0", gids)
    )
    vectors = model.items(replace(rows, ntype=torch.full_like(rows.ntype, TYPES)))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(ITEMS), atol=1e-5)
