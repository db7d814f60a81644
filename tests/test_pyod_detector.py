"""TollDetector: the contract in every way of being fitted, and what is particular to it."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from detector_contract import OTHER, DetectorContract, X, same
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, QuantileTransformer, StandardScaler
from torch import nn

from toll_plugin.core import DivergenceError, MahalanobisNorm
from toll_plugin.pyod import TollDetector


def make(**parameters) -> TollDetector:
    return TollDetector(**{"max_steps": 25, "n_members": 2, "hidden_sizes": (16, 8), "latent_dim": 4} | parameters)


class _Toll(DetectorContract):
    def make(self, **parameters):
        return make(**parameters)


class TestFitted(_Toll):
    """The plain way."""


class TestPickled(_Toll):
    def ready(self, detector, x):
        return pickle.loads(pickle.dumps(detector.fit(x)))


class TestCloned(_Toll):
    def ready(self, detector, x):
        return clone(detector.fit(OTHER)).fit(x)


class TestRefitted(_Toll):
    def ready(self, detector, x):
        return detector.fit(OTHER[:, :3]).fit(x)


class TestLoaded(_Toll):
    def ready(self, detector, x):
        detector.fit(x).save("detector.toll")
        return type(detector).load("detector.toll")


class TestPaper(_Toll):
    """The score as the paper has it."""

    def make(self, **parameters):
        paper = {"metric": "euclidean", "score_scale": "none", "beta": 0.1, "n_members": 1}
        return make(**paper | parameters)


class TestEveryMemberGivesBothTerms(_Toll):
    def make(self, **parameters):
        return make(**{"n_members": 3, "n_collapsed": 3, "exponent": 2, "strength": 0.5} | parameters)


class TestOwnModules(_Toll):
    def make(self, **parameters):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
            own = {"encoder": encoder, "decoder": nn.Linear(3, 6), "n_members": 1}
        return make(**own | parameters)

    def test_a_failed_fit_leaves_what_was_there(self, fitted):
        with pytest.raises(ValueError, match=r"encoder does not accept samples of shape \(4,\)"):
            fitted.fit(X[:, :4])
        super().test_a_failed_fit_leaves_what_was_there(fitted)

    def test_the_users_modules_are_not_trained(self, fitted):
        before = copy.deepcopy(fitted.encoder.state_dict())
        fitted.fit(OTHER)
        for name, value in fitted.encoder.state_dict().items():
            assert torch.equal(value, before[name])


# -- the constructor ---------------------------------------------------------------------------


def test_the_constructor_only_stores():
    names = [name for name in inspect.signature(TollDetector.__init__).parameters if name != "self"]
    marks = {name: object() for name in names}
    detector = TollDetector(**marks)
    assert vars(detector) == marks
    assert detector.get_params(deep=False) == marks


@pytest.mark.parametrize(
    ("parameter", "value", "error", "message"),
    [
        ("contamination", 0.6, ValueError, r"contamination must be in \(0, 0.5\], got 0.6"),
        ("contamination", 0, ValueError, "contamination must be finite and > 0, got 0"),
        ("contamination", "auto", TypeError, "contamination must be a real number, got 'auto'"),
        ("hidden_sizes", 64, TypeError, "hidden_sizes must be a sequence of integers, got 64"),
        ("hidden_sizes", (8, 0), ValueError, r"hidden_sizes\[1\] must be at least 1, got 0"),
        ("latent_dim", 0, ValueError, "latent_dim must be at least 1, got 0"),
        ("beta", -1.0, ValueError, "beta must be finite and >= 0, got -1.0"),
        ("beta", "relative", TypeError, "beta must be a number of at least 0 or 'auto', got 'relative'"),
        ("strength", -1.0, ValueError, "strength must be finite and >= 0, got -1.0"),
        ("score_scale", "mean", ValueError, "score_scale must be one of 'median', 'none', got 'mean'"),
        ("score_scale", "none", ValueError, "score_scale='none' with beta='auto' needs a score_weight"),
        ("score_weight", -1, ValueError, "score_weight must be finite and >= 0, got -1"),
        ("n_collapsed", 3, ValueError, "n_collapsed must be at most n_members, 2, got 3"),
        ("n_collapsed", -1, ValueError, "n_collapsed must be at least 0, got -1"),
        ("exponent", 3, ValueError, "exponent must be one of 1, 2, got 3"),
        ("dropout", 1.0, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ("n_members", 0, ValueError, "n_members must be at least 1, got 0"),
        ("preprocessing", "minmax", ValueError, "preprocessing must be one of 'robust', 'standard', 'none'"),
        ("preprocessing", 3, TypeError, "preprocessing must be a name or a scikit-learn transformer, got 3"),
        ("metric", "cosine", ValueError, "metric must be one of 'mahalanobis', 'euclidean', got 'cosine'"),
        ("noise", -0.1, ValueError, "noise must be finite and >= 0, got -0.1"),
        ("epochs", 0, ValueError, "epochs must be at least 1, got 0"),
        ("max_steps", 0, ValueError, "max_steps must be at least 1, got 0"),
        ("max_steps", None, ValueError, "epochs and max_steps must not both be None"),
        ("batch_size", 0, ValueError, "batch_size must be at least 1, got 0"),
        ("batch_size", 1.5, TypeError, "batch_size must be an integer, got 1.5"),
        ("lr", 0, ValueError, "lr must be finite and > 0, got 0"),
        ("optimizer", "lion", ValueError, "optimizer must be one of 'adam', 'adamw', 'sgd', got 'lion'"),
        ("optimizer", 3, TypeError, "optimizer must be a name or take the parameters .* got 3"),
        ("validation_fraction", 1.0, ValueError, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ("patience", 0, ValueError, "patience must be at least 1, got 0"),
        ("device", "gpu7", ValueError, "device must be one that torch can use here, such as 'cpu', got 'gpu7'"),
        (
            "random_state",
            "x",
            TypeError,
            "random_state must be None, an integer, a RandomState or a Generator, got 'x'",
        ),
        ("random_state", -1, ValueError, "random_state must be at least 0, got -1"),
        ("verbose", 3, ValueError, "verbose must be one of 0, 1, 2, got 3"),
        ("encoder", nn.Linear(6, 2), ValueError, "decoder must be given together with encoder, got None"),
    ],
)
def test_bad_parameters_are_named_by_fit(parameter, value, error, message):
    detector = make(**{parameter: value})
    with pytest.raises(error, match=message):
        detector.fit(X)
    assert not hasattr(detector, "decision_scores_")
    assert not hasattr(detector, "n_features_in_")


def test_own_modules_that_cannot_be():
    with pytest.raises(ValueError, match=r"n_members must be 1 with an encoder and decoder.* got 2"):
        make(encoder=nn.Linear(6, 2), decoder=nn.Linear(2, 6)).fit(X)
    with pytest.raises(ValueError, match=r"decoder must return samples of the input's shape \(6,\), got \(5,\)"):
        make(encoder=nn.Linear(6, 2), decoder=nn.Linear(2, 5), n_members=1).fit(X)
    with pytest.raises(TypeError, match=r"encoder must be a torch\.nn\.Module, got 3"):
        make(encoder=3, decoder=nn.Linear(2, 6), n_members=1).fit(X)


@pytest.mark.parametrize("contamination", [np.float32(0.25), np.float64(0.25), 0.25])
def test_contamination_of_any_float_type(contamination):
    detector = make(contamination=contamination).fit(X)
    assert detector.contamination is contamination
    assert detector.labels_.sum() == 15
    assert detector.predict(X).sum() == 15
    detector.predict_with_rejection(X)
    detector.compute_rejection_stats()


def test_contamination_is_checked_again_by_fit():
    detector = make().set_params(contamination=0.9)
    with pytest.raises(ValueError, match=r"contamination must be in \(0, 0.5\], got 0.9"):
        detector.fit(X)


# -- randomness and surroundings ---------------------------------------------------------------


@pytest.mark.parametrize(
    "make_state", [lambda: 3, lambda: np.int64(3), lambda: np.random.RandomState(3), lambda: np.random.default_rng(3)]
)
def test_kinds_of_random_state(make_state):
    state = make_state()
    first = make(random_state=state).fit(X)
    assert same(first, make(random_state=make_state()).fit(X))
    assert same(first, clone(first).fit(X))
    assert same(first, make(random_state=state).fit(X))  # the caller's generator was not used up


def test_no_seed_means_another_fit_each_time():
    assert not same(make(random_state=None).fit(X), make(random_state=None).fit(X))


def test_nothing_global_is_touched(tmp_path):
    before = dict(os.environ)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)

    def state():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    settings_before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), Path.cwd())
    drawn = state()
    detector = make(random_state=None).fit(X)
    detector.predict_proba(OTHER)
    detector.partial_fit(X)
    assert state() == drawn
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), Path.cwd()) == settings_before
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own", [False, True])
def test_torchs_modes_do_not_matter(own):
    modules = {"encoder": nn.Linear(6, 2), "decoder": nn.Linear(2, 6), "n_members": 1} if own else {}

    def fit():
        return make(**modules).fit(X)

    plain = fit()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(fit(), plain)
            assert same(plain, plain)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(fit(), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_reproduce():
    plain, found = make().fit(X), [None] * 4

    def work(i):
        found[i] = make().fit(X).decision_function(OTHER)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scores in found:
        np.testing.assert_array_equal(scores, plain.decision_function(OTHER))


FORKED = """
    import os, sys, numpy as np, torch
    from torch import nn
    from toll_plugin.pyod import TollDetector

    X = np.random.default_rng(0).normal(size=(2000, 60))
    torch.manual_seed(0)
    own = {"encoder": nn.Linear(60, 8), "decoder": nn.Linear(8, 60)} if sys.argv[1] == "own" else {}
    detector = TollDetector(max_steps=20, batch_size=1024, n_members=1, **own)
    expected = detector.fit(X).decision_scores_
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # starts torch's threads, which a fork does not take along
    child = os.fork()
    if not child:
        scores = detector.decision_function(X)
        again = detector.fit(X).decision_scores_
        close = np.allclose(again, expected, rtol=1e-3)  # own modules may have trained on more threads before
        os._exit(0 if np.array_equal(scores, expected) and close else 1)
    sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("networks", ["dense", "own"])
def test_a_forked_process_fits_and_scores(networks):
    command = [sys.executable, "-c", textwrap.dedent(FORKED), networks]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_another_process_scores_the_same(tmp_path):
    detector = make().fit(X)
    joblib.dump(detector, tmp_path / "detector.joblib")
    np.save(tmp_path / "rows.npy", OTHER)
    code = """
        import joblib, numpy as np
        print(joblib.load("detector.joblib").decision_function(np.load("rows.npy")).tobytes().hex())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == detector.decision_function(OTHER).tobytes().hex()


# -- tables ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 40),
    batch_size=st.integers(1, 50),
    held_out=st.sampled_from([0.0, 0.2, 0.9]),
    members=st.integers(1, 2),
)
def test_any_number_of_rows_with_any_batch_size(n, batch_size, held_out, members):
    detector = make(max_steps=3, batch_size=batch_size, validation_fraction=held_out, n_members=members).fit(X[:n])
    assert np.isfinite(detector.decision_scores_).all()
    assert np.isfinite(detector.predict_proba(OTHER, method="unify")).all()


def test_columns_are_checked_by_name():
    frame = pd.DataFrame(X, columns=list("abcdef"))
    detector = make().fit(frame)
    assert detector.feature_names_in_.tolist() == list("abcdef")
    np.testing.assert_array_equal(detector.decision_function(frame), detector.decision_scores_)
    with pytest.raises(ValueError, match="feature names should match"):
        detector.decision_function(frame[list("fedcba")])
    bad = frame.copy()
    bad.loc[4, "c"] = np.nan
    with pytest.raises(ValueError, match=r"X contains NaN: row 4, column 2 \('c'\)"):
        detector.predict(bad)
    with pytest.raises(ValueError, match=r"X contains NaN: row 4, column 2 \('c'\)"):
        make().fit(bad)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        detector.decision_function(X)
    assert not hasattr(detector.fit(X), "feature_names_in_")


@settings(max_examples=20, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 30), min_size=6, max_size=6),
    shift=st.sampled_from([0.0, 1.0, -100.0]),
)
def test_units_of_the_columns_do_not_matter(exponents, shift):
    plain = make(max_steps=5).fit(X)
    factors = 2.0 ** np.array(exponents)  # exact in floating point
    moved = make(max_steps=5).fit((X + shift) * factors)
    np.testing.assert_allclose(
        moved.decision_function((OTHER + shift) * factors), plain.decision_function(OTHER), rtol=1e-4
    )


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("preprocessing", ["robust", "standard"])
def test_tiny_and_huge_data_rank_the_same(factor, preprocessing):
    plain = make(preprocessing=preprocessing).fit(X)
    scaled = make(preprocessing=preprocessing).fit(X * factor)
    np.testing.assert_array_equal(
        rankdata(scaled.decision_function(OTHER * factor)), rankdata(plain.decision_function(OTHER))
    )


@pytest.mark.parametrize("metric", ["mahalanobis", "euclidean"])
def test_one_far_row_does_not_blind(metric):
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(300, 2))
    normal = hidden @ rng.normal(size=(2, 8)) + 0.05 * rng.normal(size=(300, 8))
    odd = rng.permuted(normal[200:], axis=0)  # each column as it was, but no longer together
    train = normal[:200].copy()
    train[17] = 1e6
    detector = make(max_steps=300, hidden_sizes=(64, 32), metric=metric).fit(train)
    scores = detector.decision_function(np.vstack([normal[200:], odd]))
    assert roc_auc_score(np.repeat([0, 1], 100), scores) > 0.95
    assert np.argmax(detector.decision_scores_) == 17


def test_constant_columns():
    table = np.column_stack([X, np.full(61, 7.0), np.zeros(61), np.full(61, 1e-20)])
    detector = make().fit(table)
    assert np.isfinite(detector.decision_scores_).all()
    usual = table[:1]
    for column in (6, 7, 8):
        moved = usual.copy()
        moved[0, column] += max(abs(moved[0, column]), 1.0) * 100
        assert detector.decision_function(moved) > detector.decision_function(usual)


def test_a_table_of_equal_rows():
    detector = make().fit(np.ones((10, 3)))
    assert np.isfinite(detector.decision_scores_).all()
    assert np.isfinite(detector.predict_proba(np.ones((2, 3)), method="unify")).all()
    assert np.isfinite(detector.predict_proba(np.full((2, 3), 5.0))).all()


def test_raw_features_are_left_alone():
    detector = make(preprocessing="none", metric="euclidean", n_members=1, beta=0.5, score_scale="none").fit(X)
    network = detector._model.members[0].network.double().eval()
    with torch.no_grad():
        reconstruction, latent = network(torch.from_numpy(OTHER))
    expected = np.sqrt(np.square(OTHER - reconstruction.numpy()).sum(axis=1))
    expected += 0.5 * np.sqrt(np.square(latent.numpy()).sum(axis=1))
    np.testing.assert_allclose(detector.decision_function(OTHER), expected, rtol=1e-9)
    assert np.isfinite(detector.decision_function(np.full((1, 6), 1e300))).all()


def test_a_transformer_of_the_users():
    transformer = QuantileTransformer(n_quantiles=20)
    detector = make(preprocessing=transformer).fit(X)
    assert not hasattr(transformer, "quantiles_")
    np.testing.assert_array_equal(detector.decision_function(X), detector.decision_scores_)
    assert detector.get_params()["preprocessing__n_quantiles"] == 20


@pytest.mark.parametrize("kind", ["memmap", "float32"])
def test_large_tables_are_not_copied(tmp_path, kind):
    table = np.random.default_rng(0).normal(size=(40_000, 200)).astype(np.float32)
    if kind == "memmap":
        np.save(tmp_path / "table.npy", table)
        table = np.load(tmp_path / "table.npy", mmap_mode="r")
    detector = make(max_steps=5)
    make(max_steps=2).fit(table[:200])  # first calls load modules
    tracemalloc.start()
    detector.fit(table)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # torch's memory is not traced, but the batches it holds are small and made from NumPy's.
    assert peak < 0.2 * table.nbytes


# -- training ----------------------------------------------------------------------------------


def test_history_has_a_value_per_epoch_and_adds_up():
    detector = make(epochs=4, max_steps=None, batch_size=16, beta=0.5, n_collapsed=2).fit(X)
    assert set(detector.history_) == {"total", "reconstruction", "latent"}
    assert {len(values) for values in detector.history_.values()} == {4}
    np.testing.assert_allclose(
        detector.history_["total"], detector.history_["reconstruction"] + 0.5 * detector.history_["latent"]
    )
    assert detector.best_epoch_ == [3, 3]
    # Of two members, one without the term, and one that keeps it twice as large as the other term.
    found = make(epochs=4, max_steps=None, batch_size=16, strength=2).fit(X)
    alone = make(epochs=4, max_steps=None, batch_size=16, strength=0).fit(X)
    assert (found.history_["latent"] < alone.history_["latent"]).all()
    assert (found.history_["total"] > alone.history_["total"]).all()
    np.testing.assert_allclose(alone.history_["total"], alone.history_["reconstruction"])


def test_steps_and_epochs_end_the_fit_whichever_is_first():
    assert len(make(epochs=2, max_steps=1000, batch_size=10).fit(X).history_["total"]) == 2
    assert len(make(epochs=50, max_steps=8, batch_size=10).fit(X).history_["total"]) == 2


def test_held_out_rows_choose_the_epoch_without_labels():
    detector = make(max_steps=400, validation_fraction=0.3, patience=10, lr=0.05, n_members=1).fit(X)
    held_out = detector.history_["validation"]
    assert detector.best_epoch_ == [int(np.argmin(held_out))]
    assert len(held_out) == detector.best_epoch_[0] + 11


def test_a_large_beta_makes_latents_small():
    def mean_norm(beta):
        detector = make(beta=beta, max_steps=200).fit(X)
        return np.linalg.norm(detector._model.latent(X), axis=1).mean()

    assert mean_norm(10.0) < 0.5 * mean_norm(0.0)


def test_divergence_leaves_the_earlier_fit():
    detector = make().fit(X)
    scores = detector.decision_function(OTHER)
    with pytest.raises(DivergenceError):
        detector.set_params(lr=1e30).fit(X)
    np.testing.assert_array_equal(detector.decision_function(OTHER), scores)


# -- pieces ------------------------------------------------------------------------------------


def surface(kind: str, n: int, seed: int) -> np.ndarray:
    """Rows around one of two curved surfaces of two dimensions in six columns."""
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(-1, 1, size=(2, n))
    if kind == "first":
        x = np.stack([u, v, u * v, u**2, u - v, np.sin(3 * v)], axis=1)
    else:
        x = np.stack([u + v, -u, v**2, u, v, np.cos(3 * u)], axis=1) + 2
    return x + 0.05 * rng.normal(size=x.shape)


def aurocs(detector: TollDetector) -> list[float]:
    """Of anomalies beside each surface."""
    found = []
    for kind in ("first", "second"):
        normal, anomalous = surface(kind, 300, 8), surface(kind, 300, 9)
        anomalous += 1.5 * np.random.default_rng(0).normal(size=anomalous.shape)
        scores = detector.decision_function(np.concatenate([normal, anomalous]))
        found.append(roc_auc_score(np.repeat([0, 1], 300), scores))
    return found


@pytest.mark.parametrize("order", [["first", "second"], ["first", "second"] * 5, ["first"] * 5 + ["second"] * 5])
def test_a_piece_does_not_erase_those_before(order):
    detector = TollDetector()
    for i, kind in enumerate(order):
        detector.partial_fit(surface(kind, 500, i))
    assert min(aurocs(detector)) > 0.98


def test_pieces_come_near_to_one_fit():
    detector, pieces = make(n_members=1), np.split(surface("first", 1200, 0), 6)
    for piece in pieces * 5:
        detector.partial_fit(piece)
    whole = make(n_members=1, max_steps=300).fit(np.concatenate(pieces))
    assert aurocs(detector)[0] > 0.95 * aurocs(whole)[0]
    np.testing.assert_allclose(detector._model.scaling.scale, whole._model.scaling.scale, rtol=0.05)


def test_a_call_is_one_pass_or_as_many_as_asked_for():
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    detector = make(optimizer=lambda parameters: Counting(parameters, lr=0.01), batch_size=10, n_members=1)
    detector.partial_fit(surface("first", 40, 0))
    assert len(steps) == 4
    detector.partial_fit(surface("first", 40, 1), epochs=3)
    assert len(steps) == 4 + 3 * 8  # with the 40 rows of the first piece
    assert len(detector.history_["total"]) == 4
    assert detector.best_epoch_ == [3]
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        detector.partial_fit(surface("first", 40, 2), epochs=0)


def test_the_optimiser_goes_on():
    detector, steps = make(batch_size=20), []
    for lr in (1e-3, 1e-3, 1e-2):
        detector.set_params(lr=lr).partial_fit(surface("first", 40, 0))
        (state,) = detector._stream.states
        steps.append(int(state["steps"]))
    assert steps == [2, 2 + 4, 4]  # with as many rows rehearsed; another learning rate starts afresh


def test_pieces_end_where_they_end_in_another_process():
    pieces = np.array_split(X, 3)

    def fed(copied):
        detector = make()
        for piece in pieces:
            detector = copied(detector).partial_fit(piece)
        return detector

    assert same(fed(lambda d: d), fed(lambda d: pickle.loads(pickle.dumps(d))))


def test_what_a_fit_learned_goes_on_to_be_trained_as_it_was_scaled():
    detector = make().fit(X)
    scaling = detector._model.scaling
    for _ in range(2):
        detector.partial_fit(OTHER + 5)
        np.testing.assert_array_equal(detector._model.scaling.centre, scaling.centre)
    assert detector.history_["total"].shape == (make().fit(X).history_["total"].shape[0] + 2,)
    assert detector.fit(X)._stream is None


def test_silent_unless_asked(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().fit(X).predict(X)
    assert capsys.readouterr() == ("", "")
    make(verbose=1).fit(X)
    assert "step" in capsys.readouterr().err
    make(verbose=2, epochs=2, max_steps=None, validation_fraction=0.2).fit(X)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1"], ["epoch", "2"]]
    assert all("total" in line and "validation" in line for line in lines)


def test_no_strength_is_beta_0_to_the_last_bit():
    none, zero = make(strength=0, n_members=4).fit(X), make(beta=0, n_members=4).fit(X)
    np.testing.assert_array_equal(none.decision_scores_, zero.decision_scores_)
    assert not np.array_equal(make(n_members=4).fit(X).decision_scores_, zero.decision_scores_)


@pytest.mark.parametrize("exponent", [1, 2])
def test_the_pressure_keeps_the_latent_in_proportion_whatever_the_exponent(exponent):
    pulled = make(exponent=exponent, n_members=1, max_steps=200).fit(X)
    free = make(exponent=exponent, n_members=1, max_steps=200, beta=0).fit(X)
    assert pulled.history_["latent"][-1] < 0.5 * free.history_["latent"][-1]
    np.testing.assert_allclose(pulled.history_["total"], 2 * pulled.history_["reconstruction"])
    assert np.isfinite(pulled.decision_function(OTHER * 1e6)).all()


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(
    "table",
    [np.ones((10, 3)), np.zeros((10, 3)), np.ones((10, 1)), X[:2], X[:, :1], X[:2, :1], np.eye(6)[:3]],
    ids=["ones", "zeros", "one constant column", "two rows", "one column", "two numbers", "half zero"],
)
def test_tables_with_little_in_them(table, members):
    detector = make(n_members=members).fit(table)
    new = np.vstack([table, table + 1, table * 1e9, -table])
    scores = detector.decision_function(new)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(detector.decision_function(table), detector.decision_scores_)
    found = detector.explain(new)
    np.testing.assert_allclose(found.reconstruction + found.latent, scores)


def test_scores_are_in_medians_of_training_rows():
    detector = make(n_members=4, score_weight=0.25).fit(X)
    found = detector.explain(X)
    assert np.median(found.reconstruction) == pytest.approx(1, rel=0.1)
    assert np.median(found.latent) == pytest.approx(0.25, rel=0.1)
    np.testing.assert_allclose(found.reconstruction + found.latent, detector.decision_scores_)
    np.testing.assert_allclose(found.contributions.sum(axis=1), found.reconstruction)


def test_more_columns_than_rows():
    wide = np.random.default_rng(0).normal(size=(12, 40)) @ np.random.default_rng(1).normal(size=(40, 40))
    detector = make(n_members=1).fit(wide)
    measure = detector._model.members[0].residual
    assert len(measure.norm.matrix) == 0
    residuals = np.concatenate(list(detector._model.vectors(0, "residual", wide, np.arange(12))))
    norm = MahalanobisNorm.dense([residuals])
    measured = np.sqrt(np.square(norm(residuals)).sum(axis=1))
    np.testing.assert_allclose(detector.explain(wide).reconstruction, measured / np.median(measured), rtol=1e-6)
    detector.save("wide.toll")
    np.testing.assert_array_equal(TollDetector.load("wide.toll").decision_function(wide), detector.decision_scores_)


def test_members_are_averaged():
    detector = make(n_members=3, n_collapsed=3, metric="euclidean").fit(X)
    model = detector._model
    alone = [type(model)(model.scaling, [member], model.weight).score(OTHER) for member in model.members]
    np.testing.assert_allclose(detector.decision_function(OTHER), np.mean(alone, axis=0))
    assert not np.allclose(alone[0], alone[1])


@pytest.mark.parametrize(
    ("members", "collapsed", "gives"),
    [(1, None, "b"), (2, None, "rl"), (5, None, "rrrll"), (3, 3, "bbb"), (2, 0, "rr")],
)
def test_members_that_reconstruct_and_members_that_collapse(members, collapsed, gives):
    model = make(n_members=members, n_collapsed=collapsed).fit(X)._model
    with pytest.raises(ValueError, match="score_term='latent' needs members that collapse, got n_collapsed=0"):
        make(n_collapsed=0, score_term="latent").fit(X)
    kinds = {(True, True): "b", (True, False): "r", (False, True): "l"}
    assert [kinds[m.residual is not None, m.latent is not None] for m in model.members] == list(gives)


def test_the_metric_is_the_mahalanobis_distance_of_the_residual():
    detector = make(n_members=1, beta=0.0, score_scale="none").fit(X)
    model = detector._model
    residuals = np.concatenate(list(model.vectors(0, "residual", X, np.arange(61))))
    correlation = np.corrcoef(residuals.T) + 0.1 * np.eye(6)
    others = np.concatenate(list(model.vectors(0, "residual", OTHER, np.arange(23))))
    standard = (others - residuals.mean(axis=0)) / residuals.std(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", standard, np.linalg.inv(correlation), standard))
    np.testing.assert_allclose(detector.decision_function(OTHER), expected, rtol=1e-6)


def test_explanations_name_the_feature_that_is_off():
    frame = pd.DataFrame(X, columns=list("abcdef"))
    detector = TollDetector().fit(frame)
    rows = pd.concat([frame.iloc[[30]]] * 6)
    rows += 40 * np.eye(6)
    found = detector.explain(rows)
    assert [found.top(i, 1)[0][0] for i in range(6)] == list("abcdef")
    assert len(found.top(0, 3)) == 3
    with pytest.raises(ValueError, match="count must be at least 1"):
        found.top(0, 0)


def test_plots_return_axes():
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes

    detector = make(validation_fraction=0.2).fit(X)
    _, given_axes = plt.subplots()
    for drawn in (detector.plot_history(), detector.plot_latent(X), detector.explain(X).plot(0)):
        assert isinstance(drawn, Axes)
        drawn.figure.canvas.draw()
    assert detector.plot_history(ax=given_axes) is given_axes
    assert {line.get_label() for line in given_axes.lines} == set(detector.history_)
    make(latent_dim=1).fit(X).plot_latent(X)
    plt.close("all")


def test_a_pickle_holds_no_training_rows_and_no_optimiser():
    short, long = make().fit(np.tile(X, (2, 1))), make().fit(np.tile(X, (200, 1)))
    rows = 61 * 198
    grown = len(pickle.dumps(long)) - len(pickle.dumps(short))
    assert grown <= rows * 16 + 4000  # a score and a label each, and the curves
    assert b"torch.optim" not in pickle.dumps(short)


# -- what a review found -----------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"metric": "euclidean"}, {"score_scale": "none", "beta": 0.1}])
def test_scores_grow_on_every_ray_once_it_is_far(parameters):
    x = np.random.default_rng(0).normal(size=(200, 2))
    detector = TollDetector(**{"max_steps": 400} | parameters).fit(x)
    angles = np.linspace(0.1, 2 * np.pi, 24)
    rays = np.column_stack([np.cos(angles), np.sin(angles)])
    highest = detector.decision_scores_.max()
    near, far, farther = (detector.decision_function(radius * rays) for radius in (12, 200, 1e5))
    assert (near > highest).all()
    assert (far > 2 * highest).all()
    assert (farther > far).all()


def test_threads_may_score_at_once_with_own_modules():
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    detector = make(encoder=encoder, decoder=nn.Linear(3, 6), n_members=1).fit(X)
    rows, wrong = np.tile(OTHER, (40, 1)), []
    expected = detector.decision_function(rows)

    def work():
        wrong.extend(not np.array_equal(detector.decision_function(rows), expected) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    np.testing.assert_array_equal(detector.decision_function(rows), expected)


def test_fits_that_overlap_put_the_threads_back():
    from threadpoolctl import threadpool_info

    def limits():
        return sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info())

    before = limits()
    threads = [threading.Thread(target=make(max_steps=steps).fit, args=(X,)) for steps in (100, 300, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limits() == before


def test_wide_networks_score_alike_on_any_number_of_threads():
    from threadpoolctl import threadpool_limits

    table = np.random.default_rng(0).normal(size=(60, 600))
    detector = make(hidden_sizes=(400,), max_steps=3).fit(table)
    with threadpool_limits(1):
        alone = detector.decision_function(table)
    np.testing.assert_array_equal(detector.decision_function(table), alone)
    np.testing.assert_array_equal(alone, detector.decision_scores_)


def test_parameters_set_after_a_fit_wait_for_the_next():
    detector = make(beta=0.5).fit(X)
    scores = detector.decision_function(OTHER)
    detector.set_params(beta=5.0, exponent=2, metric="euclidean", n_members=7, preprocessing="none")
    np.testing.assert_array_equal(detector.decision_function(OTHER), scores)
    found = detector.explain(OTHER)
    np.testing.assert_allclose(found.reconstruction + found.latent, scores)


class _InPlace(StandardScaler):
    """Writes to what it is given."""

    def __init__(self):
        super().__init__(copy=False)


@pytest.mark.parametrize("transformer", [_InPlace(), PCA(3), StandardScaler()], ids=["in place", "fewer", "plain"])
def test_transformers_get_copies_in_blocks_of_one_size(transformer):
    before = X.copy()
    detector = make(preprocessing=transformer).fit(X)
    np.testing.assert_array_equal(X, before)
    scores = detector.decision_function(X)
    np.testing.assert_array_equal(scores, detector.decision_scores_)
    np.testing.assert_array_equal(np.concatenate([detector.decision_function(X[i : i + 1]) for i in range(61)]), scores)
    single = X.astype(np.float32)
    np.testing.assert_array_equal(
        detector.decision_function(single), detector.decision_function(single.astype(np.float64))
    )


def test_explanations_take_their_names_from_the_transformer():
    frame = pd.DataFrame(X, columns=list("abcdef"))
    assert make(preprocessing=PCA(6)).fit(frame).explain(frame).names[0] == "pca0"
    assert make(preprocessing=StandardScaler()).fit(frame).explain(frame).names == tuple("abcdef")
    nameless = FunctionTransformer(np.abs)
    assert make(preprocessing=nameless).fit(frame).explain(frame).names[1] == "input 1"


def test_transformers_that_give_no_finite_table():
    detector = make(preprocessing=FunctionTransformer(np.log)).fit(np.exp(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of the logarithm
        with pytest.raises(ValueError, match="preprocessing must give one row of finite values for each row"):
            detector.decision_function(-np.exp(X))
    with pytest.raises(ValueError, match="preprocessing must give a dense table of numbers"):
        make(preprocessing=OneHotEncoder(handle_unknown="ignore")).fit(X)
    with pytest.raises(ValueError, match="preprocessing must give values that single precision holds, got up to 1e"):
        make(preprocessing="none").fit(np.full((5, 3), 1e60) * RNG_SIGNS)


RNG_SIGNS = np.array([1.0, -1.0, 1.0])


def test_one_far_row_does_not_blind_a_sparse_column():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 3))
    table[:, 0] = np.where(rng.random(500) < 0.9, 0.0, rng.normal(3, 0.5, size=500))
    odd = np.array([[60.0, 0.0, 0.0]])
    table[17, 0] = 1e6
    detector = make(max_steps=200).fit(table)
    assert (detector.decision_function(odd) > detector.decision_scores_).mean() > 0.99


def test_curves_of_members_that_stopped_apart_are_averaged(monkeypatch):
    from toll_plugin.core.training import fit as training

    monkeypatch.setattr(training, "written_out", lambda _: False)  # as on a device other than the CPU
    detector = make(max_steps=None, epochs=60, patience=2, validation_fraction=0.3, lr=0.02, n_members=3).fit(X)
    assert len(set(detector.best_epoch_)) > 1
    assert np.isfinite(detector.history_["validation"]).all()
    assert len(detector.history_["validation"]) == max(detector.best_epoch_) + 3


def test_patience_needs_rows_held_out():
    for parameters in ({}, {"validation_fraction": 0.2}):
        with pytest.raises(ValueError, match="patience needs rows held out: validation_fraction must be more than 0"):
            make(patience=5, **parameters).fit(X[:2])


def test_an_iterator_is_no_list_of_layers():
    with pytest.raises(TypeError, match="hidden_sizes must be a sequence of integers, got <list_iterator"):
        make(hidden_sizes=iter([16, 8])).fit(X)
    assert len(list(make(hidden_sizes=np.array([16, 8])).fit(X)._model.members[0].network.encoder)) == 7


def test_each_term_alone_is_a_score():
    whole = make(beta=2.0).fit(X)
    found, parts = whole.explain(OTHER), {}
    for term in ("reconstruction", "latent"):
        detector = make(beta=2.0, score_term=term).fit(X)
        parts[term] = detector.decision_function(OTHER)
        np.testing.assert_array_equal(detector.explain(OTHER).score, parts[term])
        detector.save("detector.toll")
        np.testing.assert_array_equal(TollDetector.load("detector.toll").decision_function(OTHER), parts[term])
    np.testing.assert_allclose(parts["reconstruction"], found.reconstruction)
    np.testing.assert_allclose(0.5 * parts["latent"], found.latent)
    with pytest.raises(ValueError, match="score_term must be one of 'total', 'reconstruction', 'latent', got 'sum'"):
        make(score_term="sum").fit(X)


def test_one_row_is_no_piece():
    detector = make().fit(X)
    with pytest.raises(ValueError, match="1 sample"):
        detector.partial_fit(X[:1])


def test_a_thresholder_that_labels_nothing():
    class Never:
        labels_, thresh_ = None, 1e9

        def fit(self, scores):
            self.labels_ = np.zeros(len(scores), dtype=int)

        def predict(self, scores):
            return np.zeros(len(scores), dtype=int)

    detector = make(contamination=Never()).fit(X)
    rejected, stats = detector.predict_with_rejection(X, return_stats=True)
    assert set(np.unique(rejected)) <= {-2, 0}
    assert np.isfinite(stats).all()
    assert detector.rejection_threshold_ == pytest.approx(1 - 2 * np.exp(-32))


@pytest.mark.parametrize("value", [1e154, 1e300])
def test_raw_rows_beyond_double_precision_are_silent_and_explained(value):
    detector = make(preprocessing="none").fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = np.full((1, 6), value)
        assert np.isfinite(detector.decision_function(row)).all()
        assert np.isfinite(detector.explain(row).contributions).all()
