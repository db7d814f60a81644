"""Targeted collapse in PyOD's detectors: a contract over every host, then what is particular."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from collapse_checks import hooks_of
from pyod.models.ae1svm import AE1SVM
from pyod.models.alad import ALAD
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.deep_svdd import DeepSVDD
from pyod.models.lunar import LUNAR
from pyod.models.so_gaal_new import SO_GAAL
from pyod.models.vae import VAE
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from toll_plugin.core import MahalanobisNorm
from toll_plugin.core.layers import find_layer
from toll_plugin.pyod import (
    CollapsedAE1SVM,
    CollapsedAutoEncoder,
    CollapsedDeepSVDD,
    CollapsedVAE,
    TargetedCollapseMixin,
)

X = np.random.default_rng(0).normal(size=(70, 6))
NEW = np.random.default_rng(1).normal(size=(34, 6)) * 2  # PyOD's AE1SVM cannot score a last batch of one row

HOSTS = [
    pytest.param(CollapsedAutoEncoder, AutoEncoder, {"epoch_num": 2, "verbose": 0}, id="AutoEncoder"),
    pytest.param(CollapsedVAE, VAE, {"epoch_num": 2, "verbose": 0}, id="VAE"),
    pytest.param(CollapsedAE1SVM, AE1SVM, {"epochs": 2}, id="AE1SVM"),
    pytest.param(CollapsedDeepSVDD, DeepSVDD, {"n_features": 6, "epochs": 2, "verbose": 0}, id="DeepSVDD"),
    pytest.param(
        CollapsedDeepSVDD,
        DeepSVDD,
        {"n_features": 6, "epochs": 2, "verbose": 0, "use_ae": True, "hidden_neurons": [5, 3]},
        id="DeepSVDD with decoder",
    ),
]


def seed() -> None:
    np.random.seed(0)  # noqa: NPY002  the hosts draw from the global generators
    torch.manual_seed(0)


def scores(detector: Any, x: np.ndarray = NEW) -> np.ndarray:
    seed()  # the VAE draws when it scores
    return detector.decision_function(x)


def hooks_left(detector: Any) -> int:
    return sum(hooks_of(value) for value in vars(detector).values() if isinstance(value, nn.Module))


@pytest.mark.parametrize(("kind", "host", "arguments"), HOSTS)
class TestEveryHost:
    @staticmethod
    def fit(kind: Any, arguments: dict[str, Any], **changes: Any) -> Any:
        seed()
        return kind(**arguments, **changes).fit(X)

    def test_weight_0_is_the_bare_host_bit_for_bit(self, kind, host, arguments):
        bare, none = self.fit(host, arguments), self.fit(kind, arguments, collapse_weight=0)
        np.testing.assert_array_equal(none.decision_scores_, bare.decision_scores_)
        np.testing.assert_array_equal(none.labels_, bare.labels_)
        np.testing.assert_array_equal(scores(none), scores(bare))

    def test_the_score_is_the_hosts_plus_the_weighted_norm(self, kind, host, arguments):
        detector = self.fit(kind, arguments, collapse_weight=0.5)
        latents = []
        layer = find_layer(detector, detector.collapse_layer)
        handle = layer.register_forward_hook(lambda *call: latents.extend(call[-1].tolist()))
        with_term = scores(detector)
        handle.remove()
        detector.set_params(collapse_score_weight=0.0)
        theirs = scores(detector)
        norms = [sum(value**2 for value in latent) ** 0.5 for latent in latents]
        np.testing.assert_allclose(with_term - theirs, 0.5 * np.array(norms), rtol=1e-4, atol=1e-5)
        assert max(norms) > 0
        np.testing.assert_array_equal(theirs, host.decision_function(_seeded(detector), NEW))

    def test_auto_adds_both_in_units_of_the_training_rows(self, kind, host, arguments):
        detector = self.fit(kind, arguments, collapse_weight="auto")
        layer = find_layer(detector, detector.collapse_layer)

        def both(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            latents: list[Any] = []
            handle = layer.register_forward_hook(lambda *call: latents.append(call[-1].double().numpy()))
            theirs = host.decision_function(_seeded(detector.set_params(collapse_score_weight=0.0)), x)
            handle.remove()
            detector.set_params(collapse_score_weight=None)
            return theirs, np.concatenate(latents)

        (trained, latents), (theirs, new) = both(X), both(NEW)
        measured = MahalanobisNorm.of([latents])
        lengths = [np.sqrt(np.square(measured(rows)).sum(axis=1)) for rows in (latents, new)]
        expected = theirs / np.median(np.abs(trained)) + 0.5 * lengths[1] / np.median(lengths[0])
        if kind is not CollapsedVAE:  # which draws while it scores, and fit drew other numbers
            np.testing.assert_allclose(scores(detector), expected, rtol=1e-4)
        copied = pickle.loads(pickle.dumps(detector))
        np.testing.assert_array_equal(scores(copied), scores(detector))
        with pytest.raises(NotFittedError):
            scores(clone(detector))

    def test_a_refit_forgets_the_units(self, kind, host, arguments):  # noqa: ARG002
        detector = self.fit(kind, arguments, collapse_weight="auto")
        first = detector._collapse_units
        _seeded(detector).fit(np.exp(X))
        assert detector._collapse_units.score != first.score
        _seeded(detector.set_params(collapse_weight=0.1)).fit(X)
        assert detector._collapse_units is None

    def test_auto_without_strength_leaves_the_hosts_training_alone(self, kind, host, arguments):
        bare = self.fit(host, arguments)
        none = self.fit(kind, arguments, collapse_weight="auto", collapse_strength=0, collapse_score_weight=0)
        np.testing.assert_array_equal(none.decision_scores_, bare.decision_scores_)
        pulled = self.fit(kind, arguments, collapse_weight="auto", collapse_score_weight=0)
        assert not np.array_equal(pulled.decision_scores_, bare.decision_scores_)

    def test_units_are_not_measured_on_new_rows(self, kind, host, arguments):  # noqa: ARG002
        detector = self.fit(kind, arguments, collapse_weight=0.5).set_params(collapse_weight="auto")
        with pytest.raises(NotFittedError, match="fit again after changing it"):
            scores(detector)

    def test_the_term_collapses_normal_rows(self, kind, host, arguments):  # noqa: ARG002
        many = {"epoch_num": 20, "lr": 0.01} if "epoch_num" in arguments else {"epochs": 20, "learning_rate": 0.01}
        many = arguments | many
        bare, pulled = (self.fit(kind, many, collapse_weight=weight) for weight in (0, 5.0))

        def norm(detector: Any) -> float:
            detector.set_params(collapse_score_weight=1.0)
            total = scores(detector, X)
            return float((total - scores(detector.set_params(collapse_score_weight=0.0), X)).mean())

        assert norm(pulled) < 0.9 * norm(bare)

    def test_parameters_clones_and_signature(self, kind, host, arguments):
        detector = kind(**arguments, collapse_weight=0.7, collapse_score_weight=0.2, contamination=0.2)
        parameters = detector.get_params()
        assert parameters.keys() == host(**arguments).get_params().keys() | {
            "collapse_weight",
            "collapse_strength",
            "collapse_score_weight",
            "collapse_layer",
            "collapse_pool",
        }
        other = clone(detector)
        assert (other.collapse_weight, other.collapse_score_weight, other.contamination) == (0.7, 0.2, 0.2)
        assert set(inspect.signature(kind).parameters) == parameters.keys()
        with pytest.raises(TypeError, match="collapse_wait"):
            kind(**arguments, collapse_wait=1)

    def test_copies_score_the_same(self, kind, host, arguments, tmp_path):  # noqa: ARG002
        detector = self.fit(kind, arguments, collapse_weight=0.5)
        others = [copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))]
        if hasattr(detector, "save"):
            detector.save(tmp_path / "detector")
            others.append(kind.load(tmp_path / "detector"))
        for other in others:
            np.testing.assert_array_equal(scores(other), scores(detector))
            assert other.collapse_weight == 0.5
        assert hooks_left(detector) == 0
        np.testing.assert_array_equal(self.fit(kind, arguments, collapse_weight=0.5).labels_, detector.labels_)

    def test_predictions_follow_the_scores(self, kind, host, arguments):  # noqa: ARG002
        detector = self.fit(kind, arguments, collapse_weight=0.5)
        seed()
        labels = detector.predict(NEW)
        np.testing.assert_array_equal(labels, scores(detector) > detector.threshold_)
        assert detector.predict_proba(NEW).shape == (34, 2)

    def test_a_failed_fit_leaves_no_hook_and_the_criterion_of_the_host(self, kind, host, arguments):  # noqa: ARG002
        detector = self.fit(kind, arguments, collapse_weight=0.5)
        criterion, attributes = getattr(detector, "criterion", None), set(vars(detector))
        broken = X.copy()
        broken[3, 2] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            detector.fit(broken)
        assert hooks_left(detector) == 0
        assert getattr(detector, "criterion", None) is criterion
        assert set(vars(detector)) == attributes

    def test_scoring_needs_a_fit(self, kind, host, arguments):  # noqa: ARG002
        detector = kind(**arguments)
        with pytest.raises(NotFittedError, match=f"This {kind.__name__} instance is not fitted yet"):
            detector.decision_function(NEW)

    def test_a_wrong_layer_names_what_is_there(self, kind, host, arguments):  # noqa: ARG002
        with pytest.raises(ValueError, match=r"there is no module .*'coder', it has "):
            kind(**arguments, collapse_layer=kind.collapse_layer.rsplit(".", 1)[0] + ".coder").fit(X)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"collapse_weight": -0.1}, ValueError, "^collapse_weight must be finite and >= 0, got -0.1"),
            ({"collapse_weight": "much"}, TypeError, "^collapse_weight must be a number of at least 0 or 'auto'"),
            ({"collapse_strength": -1}, ValueError, "^collapse_strength must be finite and >= 0, got -1"),
            ({"collapse_score_weight": float("nan")}, ValueError, "^collapse_score_weight must be finite"),
            ({"collapse_pool": "sum"}, ValueError, "^collapse_pool must be one of"),
        ],
    )
    def test_arguments_are_checked(self, kind, host, arguments, changes, error, message):  # noqa: ARG002
        with pytest.raises(error, match=message):
            kind(**arguments, **changes)
        detector = kind(**arguments)
        detector.set_params(**changes)
        with pytest.raises(error, match=message):
            detector.fit(X)


def _seeded(detector: Any) -> Any:
    seed()
    return detector


def test_the_criterion_of_a_step_has_the_weighted_mean_norm():
    detector = CollapsedAutoEncoder(epoch_num=1, verbose=0, dropout_rate=0.0, collapse_weight=0.5, preprocessing=False)
    detector.fit(X)
    twin = copy.deepcopy(detector)
    batch = torch.tensor(X[:32], dtype=torch.float32)
    detector.model.train()
    loss = detector.training_forward(batch)
    twin.model.train()
    z = twin.model.encoder(batch)
    norms = [sum(float(value) ** 2 for value in row) ** 0.5 for row in z]
    expected = float(((twin.model.decoder(z) - batch) ** 2).mean()) + 0.5 * sum(norms) / 32
    assert loss == pytest.approx(expected, rel=1e-4)


def test_hosts_that_train_in_their_own_fit_move_as_if_the_term_were_in_their_loss(monkeypatch):
    """Against Deep SVDD with the term written into its loss by hand."""
    arguments = {"n_features": 6, "epochs": 3, "verbose": 0, "dropout_rate": 0.0}
    seed()
    pulled = CollapsedDeepSVDD(**arguments, collapse_weight=0.5).fit(X)
    backward, codes = torch.Tensor.backward, []

    def with_term(loss: torch.Tensor) -> None:
        backward(loss + 0.5 * codes[-1].norm(dim=1).mean())

    seed()
    by_hand = DeepSVDD(**arguments)
    build = by_hand.__class__.__setattr__

    class Watching(DeepSVDD):
        def __setattr__(self, name: str, value: Any) -> None:
            build(self, name, value)
            if name == "model_" and value is not None:
                value.model.net_output.register_forward_hook(lambda *call: codes.append(call[-1]))

    monkeypatch.setattr(torch.Tensor, "backward", with_term)
    seed()
    by_hand = Watching(**arguments).fit(X)
    for p, q in zip(by_hand.model_.parameters(), pulled.model_.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_compiled_network_trains_and_scores_with_the_term(weight, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="eager"))
    plain, compiled = (
        CollapsedAutoEncoder(epoch_num=2, verbose=0, collapse_weight=weight, use_compile=use).fit(X)
        for use in (False, True)
    )
    np.testing.assert_allclose(compiled.decision_scores_, plain.decision_scores_, rtol=1e-4)


def test_a_class_of_ones_own_takes_the_hosts_arguments():
    class Mine(TargetedCollapseMixin, VAE):
        collapse_layer = "model.encoder"
        collapse_weight = 0.25

    class Narrower(Mine):
        pass

    class Explicit(TargetedCollapseMixin, AutoEncoder):
        collapse_layer = "model.encoder"

        def __init__(self, contamination=0.1, collapse_weight=0.1):
            super().__init__(contamination=contamination, epoch_num=1, verbose=0, collapse_weight=collapse_weight)

    class Inheriting(Explicit):
        pass

    assert clone(Inheriting(collapse_weight=0.3)).get_params() == {"contamination": 0.1, "collapse_weight": 0.3}
    assert Mine(0.2, latent_dim=3).get_params()["latent_dim"] == 3
    assert Narrower(0.2).collapse.weight == 0.25
    assert clone(Narrower(contamination=0.2, collapse_weight=0.5)).collapse_weight == 0.5
    assert Explicit(collapse_weight=0.3).fit(X).get_params() == {"contamination": 0.1, "collapse_weight": 0.3}


@pytest.mark.parametrize("host", [ALAD, LUNAR])
def test_hosts_whose_loss_is_out_of_reach_are_refused(host):
    kind = type("Mine", (TargetedCollapseMixin, host), {"collapse_layer": "enc"})
    with pytest.raises(TypeError, match=r"Mine trains inside its own fit.*collapse_network"):
        kind()


def test_hosts_with_several_losses_in_a_step_are_refused():
    kind = type("Mine", (TargetedCollapseMixin, SO_GAAL), {"collapse_layer": "generator"})
    with pytest.raises(RuntimeError, match="uses its criterion more than once in a step"):
        kind(epoch_num=1, verbose=0).fit(X)


def test_a_host_that_does_not_use_its_criterion_is_refused():
    class Own(AutoEncoder):
        def training_forward(self, batch_data):
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(batch_data), batch_data)
            loss.backward()
            self.optimizer.step()
            return loss.item()

    kind = type("Mine", (TargetedCollapseMixin, Own), {"collapse_layer": "model.encoder"})
    with pytest.raises(RuntimeError, match="uses its criterion never in a step"):
        kind(epoch_num=1, verbose=0).fit(X)
    assert kind(epoch_num=1, verbose=0, collapse_weight=0).fit(X).labels_.shape == (70,)


def test_a_second_encoder_pass_can_be_handled():
    class Twice(AutoEncoder):
        def training_forward(self, batch_data):
            self.model.encoder(0 * batch_data)
            return super().training_forward(batch_data)

    kind = type("Mine", (TargetedCollapseMixin, Twice), {"collapse_layer": "model.encoder"})
    with pytest.raises(RuntimeError, match="called 2 times in one step"):
        kind(epoch_num=1, verbose=0).fit(X)
    kind.collapse_latent = lambda _, passes, batch_size: passes[-1].output[:batch_size]
    assert kind(epoch_num=1, verbose=0).fit(X).labels_.shape == (70,)


@pytest.mark.parametrize(
    ("host", "attributes", "error", "message"),
    [
        (
            AutoEncoder,
            {"collapse_network": "model"},
            TypeError,
            "collapse_network is for hosts with a fit of their own",
        ),
        (AE1SVM, {"collapse_network": "net"}, RuntimeError, "Mine trained no network in 'net', its collapse_network"),
    ],
)
def test_a_wrong_network_attribute_is_an_error(host, attributes, error, message):
    kind = type("Mine", (TargetedCollapseMixin, host), {"collapse_layer": "model.encoder", **attributes})
    with pytest.raises(error, match=message):
        kind().fit(X)


class Restless(AE1SVM):
    """Calls its encoder twice a step, or with frozen weights."""

    frozen = False

    def _train_autoencoder(self, train_loader):
        encoder = self.model.encoder.requires_grad_(not self.frozen)
        forward = self.model.forward
        self.model.forward = lambda x: (encoder(x), forward(x))[1] if not self.frozen else forward(x)
        super()._train_autoencoder(train_loader)


@pytest.mark.parametrize(
    ("frozen", "message"), [(False, "called twice before a backward pass"), (True, "nothing that")]
)
def test_a_network_that_cannot_be_pulled_at_is_an_error(frozen, message):
    attributes = {"collapse_layer": "model.encoder", "collapse_network": "model", "frozen": frozen}
    detector = type("Mine", (TargetedCollapseMixin, Restless), attributes)(epochs=1)
    with pytest.raises(RuntimeError, match=message):
        detector.fit(X)
    assert hooks_left(detector) == 0


@pytest.mark.parametrize("kind", [CollapsedAutoEncoder, CollapsedDeepSVDD])
def test_threads_score_with_one_detector(kind):
    arguments = {"epoch_num": 1} if kind is CollapsedAutoEncoder else {"n_features": 6, "epochs": 1}
    detector = kind(verbose=0, **arguments).fit(X)
    expected = detector.decision_function(NEW)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: detector.decision_function(NEW), range(24)))
    for scores_ in found:
        np.testing.assert_array_equal(scores_, expected)
    assert hooks_left(detector) == 0


def test_a_wrong_layer_is_not_taken_for_a_missing_fit():
    detector = type("Mine", (TargetedCollapseMixin, AutoEncoder), {"collapse_layer": "net.encoder"})(
        epoch_num=1, verbose=0, collapse_weight=0, collapse_score_weight=0.5
    )
    with pytest.raises(
        ValueError, match=r"there is no module 'net.encoder': Mine has no 'net', it has criterion, model"
    ):
        detector.fit(X)


def test_a_layer_that_does_not_see_the_rows_is_an_error():
    detector = CollapsedAE1SVM(epochs=1).fit(X)
    detector.model.unused = nn.Identity()
    detector.set_params(collapse_layer="model.unused")
    with pytest.raises(RuntimeError, match=r"called layer 'model.unused' for 0 rows while it scored 34"):
        detector.decision_function(NEW)
