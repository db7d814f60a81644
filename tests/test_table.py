"""From raw rows to scores: scaling, folded networks, the metric of the residual."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from threadpoolctl import threadpool_limits
from torch import nn

from toll_plugin.core import (
    Autoencoder,
    DenseAutoencoder,
    MahalanobisNorm,
    Measure,
    TableMember,
    TableModel,
    TableScaling,
    TollLoss,
    TollTerms,
    TrainedMember,
    TrainingOptions,
    fit_table,
    hold_out,
    rehearse,
    toll_score,
    typical,
)
from toll_plugin.core.tables import scoring
from toll_plugin.core.tables.rows import TableRows
from toll_plugin.core.tables.scaling import _quartiles
from toll_plugin.core.tables.scoring import BLOCK, MANY, FoldedAutoencoder, ModuleAutoencoder, Rooms, in_blocks

X = np.random.default_rng(0).normal(size=(50, 4))


# -- scaling -----------------------------------------------------------------------------------


def test_standard_scaling_by_hand():
    scaling = TableScaling("standard").fit(np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]))
    np.testing.assert_allclose(scaling.centre, [3.0, 5.0])
    np.testing.assert_allclose(scaling.scale, [np.sqrt(8 / 3), 5.0])  # a constant column by its own size
    np.testing.assert_allclose(scaling.transform(np.array([[3.0, 10.0]])), [[0.0, 1.0]])


def test_robust_scaling_leaves_out_what_lies_beyond_the_fences():
    values = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 1000.0])
    scaling = TableScaling().fit(values[:, None])
    # Quartiles 1.25 and 3.75, median 2.5: the fences lie 10 * 2.5 / 1.349 = 18.5 around it.
    np.testing.assert_allclose(scaling.centre, [2.0])
    np.testing.assert_allclose(scaling.scale, [np.sqrt(2.0)])


@given(
    table=arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-1e3, 1e3)),
)
def test_quartiles_are_numpys(table):
    np.testing.assert_array_equal(_quartiles(np.sort(table, axis=1)), np.percentile(table, [25, 50, 75], axis=1))


def test_far_values_are_compressed_by_hand():
    scaling = TableScaling("standard").fit(np.array([[-1.0], [1.0]]))
    found = scaling.transform(np.array([[10.0], [11.0], [-110.0]]))
    np.testing.assert_allclose(found.ravel(), [10.0, 10 + np.log(2), -(10 + np.log(101))])


def test_raw_values_stay():
    np.testing.assert_array_equal(TableScaling("none").fit(X).transform(X * 1e9), X * 1e9)


def test_unknown_scaling():
    with pytest.raises(ValueError, match="preprocessing must be one of 'robust', 'standard', 'none', got 'max'"):
        TableScaling("max")


finite = st.floats(-1e300, 1e300, allow_subnormal=False)


@given(
    table=arrays.arrays(np.float64, (7, 3), elements=finite),
    row=arrays.arrays(np.float64, (1, 3), elements=st.floats(allow_nan=False, allow_infinity=False)),
    kind=st.sampled_from(["robust", "standard"]),
)
def test_every_finite_value_stays_finite_and_in_order(table, row, kind):
    scaling = TableScaling(kind).fit(table)
    assert (scaling.scale > 0).all()
    found = scaling.transform(np.vstack([table, row]))
    assert np.isfinite(found).all()
    assert (found * np.sign(np.vstack([table, row]) - scaling.centre) >= -1e-9).all()
    in_torch = scaling.transform_tensor(torch.from_numpy(row))
    np.testing.assert_allclose(in_torch.numpy(), found[-1:], rtol=1e-9, atol=1e-9)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20, unique=True))
def test_scaling_keeps_the_order_of_values(values):
    rising = np.sort(np.array(values))[:, None]
    found = TableScaling().fit(X[:, :1]).transform(rising)
    assert (np.diff(found.ravel()) >= 0).all()


def test_rows_are_scaled_when_they_are_fetched():
    scaling = TableScaling().fit(X)
    rows = TableRows(X, np.array([5, 7, 9]), scaling, torch.device("cpu"))
    assert len(rows) == 3
    expected = torch.from_numpy(scaling.transform(X[[9, 5]])).float()
    torch.testing.assert_close(rows[torch.tensor([2, 0])], expected, rtol=0, atol=0)
    assert rows[0:2].shape == (2, 4)


# -- networks ----------------------------------------------------------------------------------


def trained(**arguments) -> DenseAutoencoder:
    network = DenseAutoencoder(4, (6, 5), 2, **arguments)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                for values in (module.weight, module.bias, module.running_mean):
                    values.normal_()
                module.running_var.uniform_(0.5, 2)
    return network.eval()


def test_a_room_is_used_again():
    room = Rooms()
    first = room("a", 3, 2)
    first[:] = 1
    assert first.shape == (3, 2)
    assert room("a", 2, 2).base is first.base
    assert not any(np.shares_memory(first, other) for other in (room("b", 3, 2), room("a", 3, 4), room("a", 5, 2)))


@pytest.mark.parametrize("scaling", [TableScaling("none"), TableScaling()])
@pytest.mark.parametrize("of_ones_own", [False, True])
@pytest.mark.parametrize("columns", [4, 200])
def test_rows_in_the_same_memory_have_the_scores_of_rows_in_their_own(scaling, of_ones_own, columns):
    x = np.random.default_rng(1).normal(size=(1500, columns))
    x[700] = 1e6
    norm = MahalanobisNorm.of([x[:100]])  # of low rank where the columns are more than these rows
    networks = [DenseAutoencoder(columns, (8,), 3) for _ in range(2)]
    if of_ones_own:
        networks = [Autoencoder(one.encoder, one.decoder, input_shape=(columns,)) for one in networks]
    members = [TableMember(one, Measure(norm), Measure(unit=2.0)) for one in networks]
    model = TableModel(scaling.fit(x), members, weight=0.5)
    before = x.copy()
    scores = model.score(x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(scores, np.concatenate([model.score(x[i : i + 8]) for i in range(0, len(x), 8)]))
    parts = model.parts(x)
    np.testing.assert_allclose(parts.reconstruction + 0.5 * parts.latent, scores, rtol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"batch_norm": False}, {"dropout": 0.5}])
def test_a_folded_network_computes_what_its_module_does(arguments):
    network = trained(**arguments)
    x = in_blocks(X)
    assert len(x) % BLOCK == 0
    found = FoldedAutoencoder(network)(x)
    with torch.no_grad():
        expected = network.double()(torch.from_numpy(x))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-10, atol=1e-12)
    for one, other in zip(found, ModuleAutoencoder(network)(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("columns", "low_rank"), [(30, False), (30, True), (274, True)])
@pytest.mark.parametrize("ordered", [False, True])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(columns, low_rank, ordered, monkeypatch):
    scoring.in_order.cache_clear()
    draw = np.random.default_rng(0)
    x = draw.normal(size=(3 * MANY + 5, columns))
    networks = [DenseAutoencoder(columns, (64, 9), 5) for _ in range(2)]
    rows = draw.normal(size=(20, columns)) if low_rank else x
    measure = Measure(MahalanobisNorm.of([rows]))
    model = TableModel(TableScaling().fit(x), [TableMember(network, measure) for network in networks], weight=0.3)
    whole = model.score(x)
    if not ordered:  # a library that sums in another order in larger blocks
        monkeypatch.setattr(scoring, "in_order", lambda *_: False)
    for n in (MANY - 3, 1, BLOCK, MANY, MANY + 1, 2 * MANY, len(x)):
        with threadpool_limits(2):
            np.testing.assert_array_equal(model.score(x[-n:]), whole[-n:])


def test_the_order_of_a_product_is_tried(monkeypatch):
    assert scoring.in_order.__wrapped__(30, 17, True)

    def another(x, weight, **arguments):
        flipped = slice(None, None, -1)
        found = matmul(x[..., flipped], weight[flipped], **arguments)
        return matmul(x, weight, **arguments) if x.shape[-2] == BLOCK else found

    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", another)
    assert not scoring.in_order.__wrapped__(30, 17, True)


def test_a_module_of_ones_own_is_not_changed_by_scoring():
    network = Autoencoder(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(3, 4), input_shape=(4,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    TableModel(TableScaling().fit(X), [TableMember(network)], weight=0.1).score(X)
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


# -- how residuals and latents are measured ------------------------------------------------------


def test_the_norm_by_hand():
    # Uncorrelated columns of variance 1 and 100: each distance over the deviation, and the root of 1 + ridge.
    residuals = np.array([[1.0, 10.0], [1.0, -10.0], [-1.0, 10.0], [-1.0, -10.0]])
    norm = MahalanobisNorm.of([residuals[:2], residuals[2:]])
    np.testing.assert_allclose(norm.mean, [0, 0], atol=1e-12)
    np.testing.assert_allclose(norm.matrix, np.diag([1.0, 0.1]) / np.sqrt(1.1), atol=1e-12)
    np.testing.assert_allclose(norm(np.array([[3.0, 40.0]])), np.array([[3.0, 4.0]]) / np.sqrt(1.1))


@given(
    rows=st.integers(2, 7),
    columns=st.integers(8, 12),
    seed=st.integers(0, 1000),
    constant=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_fewer_rows_than_columns_cost_no_accuracy(rows, columns, seed, constant, size):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, columns)) * size
    if constant:
        x[:, 0] = 3.0 * size
    new = draw.normal(size=(5, columns)) * 4 * size
    low, whole = MahalanobisNorm.low_rank(x), MahalanobisNorm.dense([x])
    assert low.directions.shape[1] < rows
    np.testing.assert_allclose(low(new), whole(new), rtol=1e-6, atol=1e-6 * np.abs(whole(new)).max())
    assert len(MahalanobisNorm.of([x]).matrix) == 0


def test_one_far_residual_hardly_moves_the_norm():
    residuals = np.random.default_rng(0).normal(size=(200, 3))
    plain = MahalanobisNorm.of([residuals])
    residuals[7] *= 1e6
    moved = MahalanobisNorm.of([residuals])
    np.testing.assert_allclose(moved.matrix, plain.matrix, atol=0.2)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1), (1, 4)])
def test_rows_that_do_not_vary_are_measured(shape):
    for rows in (np.zeros(shape), np.ones(shape)):
        assert np.isfinite(MahalanobisNorm.of([rows])(np.full((2, shape[1]), 7.0))).all()


def test_parts_are_those_of_an_independent_loop():
    networks = [trained().double() for _ in range(3)]
    scaling, draw = TableScaling().fit(X), np.random.default_rng(0)
    norms = [MahalanobisNorm.of([draw.normal(size=(50, size))]) for size in (4, 2)]
    members = [
        TableMember(networks[0], Measure(norms[0], 2.0), None),
        TableMember(networks[1], None, Measure(norms[1], 0.5)),
        TableMember(networks[2], Measure(None, 3.0), Measure()),
    ]
    model = TableModel(scaling, members, weight=0.3)
    parts, scores = model.parts(X), model.score(X)
    for i in (0, 17, 49):
        x = scaling.transform(X[i : i + 1])
        with torch.no_grad():
            found = [[values.numpy() for values in network(torch.from_numpy(x))] for network in networks]
        first = ((x - found[0][0] - norms[0].mean) @ norms[0].matrix).ravel()
        second = ((found[1][1] - norms[1].mean) @ norms[1].matrix).ravel()
        third = (x - found[2][0]).ravel()
        lengths = [np.sqrt((values**2).sum()) for values in (first, second, third, found[2][1])]
        error = (lengths[0] / 2 + lengths[2] / 3) / 2
        norm = (lengths[1] / 0.5 + lengths[3]) / 2
        assert scores[i] == pytest.approx(error + 0.3 * norm)
        assert parts.reconstruction[i] == pytest.approx(error)
        assert parts.latent[i] == pytest.approx(norm)
        expected = (first**2 / lengths[0] / 2 + third**2 / lengths[2] / 3) / 2
        np.testing.assert_allclose(parts.contributions[i], expected)
    alone = {
        term: TableModel(scaling, members, weight=0.3, score_term=term).score(X)
        for term in ("reconstruction", "latent")
    }
    np.testing.assert_array_equal(alone["reconstruction"], parts.reconstruction)
    np.testing.assert_array_equal(alone["latent"], parts.latent)


def test_a_model_needs_a_member_for_its_term():
    only = TableMember(trained(), None, Measure())
    with pytest.raises(ValueError, match="score_term='total' needs a member that measures its residual, got none"):
        TableModel(TableScaling().fit(X), [only], weight=1.0)


# -- splits and fits -----------------------------------------------------------------------------


def test_a_split_holds_out_the_share_it_was_asked_for():
    training, validation, measured = hold_out(50, 0.2, torch.Generator().manual_seed(0))
    assert sorted([*training, *validation]) == list(range(50))
    assert len(validation) == 10
    assert measured.tolist() == training.tolist()
    assert [len(part) for part in hold_out(3, 0.01, torch.Generator())] == [2, 1, 2]
    assert [len(part) for part in hold_out(2, 0.9, torch.Generator())] == [2, 0, 2]
    assert len(hold_out(10_050, 0.0, torch.Generator()).measured) == 10_000


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="validation_fraction must be"):
        hold_out(10, fraction, torch.Generator())


def fitted(members, split=None, **arguments):
    split = split or hold_out(len(X), 0.0, torch.Generator().manual_seed(0))
    return fit_table(X, split, TableScaling().fit(X), members, TrainingOptions(max_epochs=3), **arguments)


def test_fit_table_learns_some_rows_and_chooses_by_others():
    split = hold_out(len(X), 0.2, torch.Generator().manual_seed(0))
    member = TrainedMember(DenseAutoencoder(4, (4,), 2), TollLoss(0.1))
    model, (history,), (state,) = fitted([member], split, metric="euclidean", score_scale="none", score_weight=0.1)
    assert len(history.validation) == 3
    held_out = model.score(X[split.validation]).mean()
    assert held_out == pytest.approx(history.validation[history.best_epoch], rel=1e-5)
    assert state["steps"] == 6


def test_members_are_measured_on_training_rows_each_by_itself():
    losses = {"reconstruction": TollLoss(0.0), "latent": TollLoss("auto")}
    members = [
        TrainedMember(DenseAutoencoder(4, (4,), 2), losses[gives], gives)
        for gives in ("reconstruction", "reconstruction", "latent", "latent")
    ]
    model, histories, states = fitted(members, score_weight=0.5)
    assert len(histories) == 4
    assert len(states) == 1  # they are trained together
    assert [(m.residual is None, m.latent is None) for m in model.members] == [(False, True)] * 2 + [(True, False)] * 2
    for i, member in enumerate(model.members):
        measure = member.residual or member.latent
        vectors = list(model.vectors(i, "residual" if member.residual else "latent", X, np.arange(50)))
        np.testing.assert_allclose(measure.norm.matrix, MahalanobisNorm.of(vectors).matrix)
        assert np.median(measure.term(np.concatenate(vectors), 1)) == pytest.approx(1)
    parts = model.parts(X)
    np.testing.assert_array_equal(model.score(X), toll_score(TollTerms(*parts[:2]), beta=0.5))


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        ({}, (True, True, True)),
        ({"metric": "euclidean"}, (False, False, True)),
        ({"score_scale": "none"}, (True, False, False)),
        ({"score_scale": "none", "metric": "euclidean"}, (False, False, False)),
    ],
)
def test_what_is_measured(arguments, measured):
    model = fitted([TrainedMember(DenseAutoencoder(4, (4,), 2), TollLoss(0.1))], **arguments).model
    (member,) = model.members
    found = (member.residual.norm is not None, member.latent.norm is not None, member.residual.unit != 1)
    assert found == measured
    assert (member.latent.unit != 1) == measured[2]


def test_the_size_of_a_term():
    assert typical(np.array([4.0, 1.0, 2.0])) == 2
    assert typical(torch.tensor([0.0, 0.0, 0.0, 3.0, 5.0])) == 4  # the median is zero
    assert typical(np.zeros(3)) == 1


# -- going on ----------------------------------------------------------------------------------


def test_what_is_rehearsed():
    split = rehearse(30, 100, 500, torch.Generator().manual_seed(0))
    assert split.training[:30].tolist() == list(range(30))
    assert len(split.training) == 60
    assert split.training[30:].min() >= 30
    assert len(set(split.training)) == 60
    assert split.measured.tolist() == list(range(130))
    assert len(split.validation) == 0


@pytest.mark.parametrize(("new", "old", "seen"), [(5_000, 10_000, 45_000), (40_000, 2_000, 2_000), (20_000, 0, 0)])
def test_every_row_has_the_same_chance_to_be_kept(new, old, seen):
    measured = rehearse(new, old, seen, torch.Generator().manual_seed(0)).measured
    assert len(set(measured)) == len(measured) == 10_000
    assert measured.max() < new + old
    expected = 10_000 * new / (new + seen)
    assert (measured < new).sum() == pytest.approx(expected, abs=5 * np.sqrt(expected * seen / (new + seen)) + 1e-9)
