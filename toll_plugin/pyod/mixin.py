"""Targeted collapse for PyOD's own deep detectors."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pyod.models.base_dl import BaseDeepLearningDetector
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toll_plugin.core.layers import LayerPass, find_layer, only_pass, watch_layer
from toll_plugin.core.objective import TollTerms, toll_score, typical
from toll_plugin.core.penalty import TargetedCollapse, WatchedLatent
from toll_plugin.core.penalty_mixin import COLLAPSE_ARGUMENTS, TargetedCollapseBase
from toll_plugin.core.tables.metric import MahalanobisNorm
from toll_plugin.core.tables.model import Measure

__all__ = ["TargetedCollapseMixin"]


class TargetedCollapseMixin(TargetedCollapseBase):
    r"""Adds :math:`w\|z_i\|` to the loss and the score of a PyOD detector with a network.

    Name it first among the bases and say where the latent is. The constructor takes the host's
    arguments and those below, and ``get_params``, ``clone`` and ``save`` know them all::

        class CollapsedAutoEncoder(TargetedCollapseMixin, AutoEncoder):
            collapse_layer = "model.encoder"

    Detectors built on PyOD's ``BaseDeepLearningDetector`` get the term in the criterion of each
    step and in the scores of each batch. Detectors that train inside their own ``fit`` need
    ``collapse_network``; their weights then move as if the term were in the loss, which they do not
    report, and by which they do not choose an epoch. That works where ``fit`` trains one network with one call
    of the layer per step, as in AE1SVM and Deep SVDD, and not in LUNAR, ALAD or AnoGAN. With both
    weights 0 the host is untouched, to the last bit.

    Args:
        *args: Arguments of the host.
        collapse_weight: ``w`` in the loss, in units of the host's loss per unit of the latent, at
            least 0; or ``"auto"``, which keeps the term as large as the host's loss in every step (where the loss
            is out of reach, its gradient at the latent as long as the host's). Then the host's score and the norm of
            the latent, here its distance under the covariance of the training rows' latents, are each divided
            by their median size on the training rows before they are added, as in :class:`TollDetector`.
            Default: the class attribute of the same name, 0.1.
        collapse_strength: With ``"auto"``, how many times as large. Default 1.
        collapse_score_weight: ``w`` in the score, in units of the host's score. Default ``None``,
            the weight of the loss; with ``"auto"`` 0.5.
        collapse_layer: Dotted path, from the detector, of the module whose output is the latent;
            one call of it per step. Default: the class attribute.
        collapse_pool: How maps become one norm, see :func:`toll_plugin.core.latent_norm`; vectors
            need none. Default ``"flatten"``.
        **kwargs: Arguments of the host.

    Attributes:
        collapse_network: For hosts with a ``fit`` of their own: the attribute ``fit`` keeps its
            network in.

    Raises:
        TypeError: If the host trains inside its own ``fit`` and the class has no
            ``collapse_network``, or a weight is no number.
        ValueError: If a weight is negative or not finite, or the pool is unknown; when fitted,
            if there is no such layer (the error lists those there are).

    Example:
        >>> from pyod.models.vae import VAE
        >>> class Mine(TargetedCollapseMixin, VAE):
        ...     collapse_layer = "model.encoder_mu"
        >>> detector = Mine(collapse_weight=0.5, latent_dim=3)
        >>> detector.get_params()["collapse_weight"], detector.get_params()["latent_dim"]
        (0.5, 3)
    """

    collapse_network: ClassVar[str] = ""
    _collapse_units: _Units | None = None
    _collapse_measures: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class without a constructor of its own one whose signature PyOD and scikit-learn can read."""
        super().__init_subclass__(**kwargs)
        if cls.__init__ is TargetedCollapseMixin.__init__ or hasattr(cls.__init__, "is_generated"):
            cls.__init__ = _generated_constructor(cls)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, BaseDeepLearningDetector) and not type(self).collapse_network:
            msg = (
                f"{type(self).__name__} trains inside its own fit, where the loss is out of reach: set the class "
                "attribute collapse_network to the attribute in which fit keeps its network, if it has a latent"
            )
            raise TypeError(msg)
        if isinstance(self, BaseDeepLearningDetector) and type(self).collapse_network:
            msg = (
                f"collapse_network is for hosts with a fit of their own, not for {type(self).__name__}: leave it empty"
            )
            raise TypeError(msg)
        chosen = {name: kwargs.pop(name, getattr(type(self), name)) for name in COLLAPSE_ARGUMENTS}
        super().__init__(*args, **kwargs)
        for name, value in chosen.items():
            setattr(self, name, value)
        _ = self.collapse  # refuses wrong values

    # --- hosts built on BaseDeepLearningDetector

    def training_forward(self, batch_data: Any) -> Any:
        """The host's step, with the term in its criterion."""
        host: Any = super()
        if self.collapse.is_off:
            return host.training_forward(batch_data)
        me: Any = self
        criterion, calls = me.criterion, 0
        uses = f"{type(self).__name__} uses its criterion {{}} in a step: the term has to join one loss"

        def with_term(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(uses.format("more than once"))
            loss = criterion(*args, **kwargs)
            return loss + latent.loss(reference=loss)

        with self._watching(batch_data) as latent:
            me.criterion = with_term
            try:
                loss = host.training_forward(batch_data)
            finally:
                me.criterion = criterion
        if not calls:
            raise RuntimeError(uses.format("never"))
        return loss

    def evaluating_forward(self, batch_data: Any) -> Any:
        """The host's scores of a batch, with the term."""
        host: Any = super()
        if self.collapse.score_weight == 0 or self.collapse.weight == "auto":
            return host.evaluating_forward(batch_data)
        with self._watching(batch_data) as latent:
            scores = host.evaluating_forward(batch_data)
        return scores + latent.score().detach().cpu().numpy()

    def _watching(self, batch_data: Any) -> AbstractContextManager[WatchedLatent]:
        return self.collapse.watch(self, lambda passes: self.collapse_latent(passes, len(batch_data)))

    # --- hosts with a fit of their own

    def fit(self, X: Any, y: Any = None, **kwargs: Any) -> Any:  # noqa: N803
        """The host's ``fit``, with the term."""
        host: Any = super()
        collapse = self.collapse
        hidden = bool(type(self).collapse_network) and not collapse.is_off
        self._collapse_units = None
        self._collapse_measures = True
        try:
            if not hidden:
                return host.fit(X, y, **kwargs)
            self._gradient_term: _GradientTerm = _GradientTerm(self, collapse)
            fitted = host.fit(X, y, **kwargs)
            self._gradient_term.check_used()
        finally:
            del self._collapse_measures
            if hidden:
                self._gradient_term.detach()
                del self._gradient_term
        return fitted

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The host's fit builds its network and trains it at once: this is the only moment in between.
        if name == type(self).collapse_network and isinstance(value, nn.Module) and "_gradient_term" in self.__dict__:
            self._gradient_term.attach()

    def decision_function(self, X: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        """The host's scores, with the term."""
        host: Any = super()
        network, collapse = type(self).collapse_network, self.collapse
        if collapse.score_weight == 0:
            return host.decision_function(X, *args, **kwargs)
        if "_gradient_term" in self.__dict__:  # fit scores the training rows after it has trained
            self._gradient_term.check_used()
        if getattr(self, network or "feature_size", None) is None:
            msg = f"This {type(self).__name__} instance is not fitted yet. Call 'fit' before using it"
            raise NotFittedError(msg)
        if not network and collapse.weight != "auto":
            return host.decision_function(X, *args, **kwargs)
        with watch_layer(self, collapse.layer) as passes:
            scores = host.decision_function(X, *args, **kwargs)
        latents = [only_pass([one]).detach() for one in passes]
        rows = sum(map(len, latents))
        if rows != len(scores):
            msg = (
                f"{type(self).__name__} called layer {collapse.layer!r} for {rows} rows while it scored {len(scores)}: "
                "name another collapse_layer, or set collapse_score_weight to 0"
            )
            raise RuntimeError(msg)
        if collapse.weight != "auto":
            return scores + np.concatenate([collapse.score(latent).cpu().numpy() for latent in latents])
        vectors = np.concatenate([latent.flatten(1).cpu().double().numpy() for latent in latents])
        if self._collapse_measures:  # fit scores the training rows
            self._collapse_units = _Units.of(scores, vectors)
        if self._collapse_units is None:
            msg = "collapse_weight='auto' needs units that fit measures: fit again after changing it"
            raise NotFittedError(msg)
        return toll_score(self._collapse_units.terms(scores, vectors), beta=collapse.score_weight)


class _Units(NamedTuple):
    """What brings the host's scores and the latents to units of their own.

    Attributes:
        score: Median size of the host's scores, which may have a sign, on the training rows.
        latent: How latents are measured.
    """

    score: float
    latent: Measure

    @classmethod
    def of(cls, scores: Any, vectors: Any) -> _Units:
        """From what the training rows have, scores ``(N,)`` and latents ``(N, latent_dim)``."""
        measure = Measure(MahalanobisNorm.of([vectors]))
        return cls(typical(np.abs(scores)), measure._replace(unit=typical(measure.term(vectors, 1))))

    def terms(self, scores: Any, vectors: Any) -> TollTerms[Any]:
        """The host's scores and the latents' norms, each in its unit."""
        return TollTerms(scores / self.score, self.latent.term(vectors, 1))


class _GradientTerm:
    """Brings the term into a fit whose loss is out of reach, by adding its gradient to that of the latent.

    A hook on the latent's layer does so in each training step. It is attached to the network that
    ``fit`` builds, so it lives for one fit.
    """

    def __init__(self, owner: TargetedCollapseMixin, collapse: TargetedCollapse) -> None:
        self._owner = owner
        self._collapse = collapse
        self._handle: RemovableHandle | None = None
        self._waits_for_backward = False
        self._steps = 0

    def attach(self) -> None:
        """Watch the layer of the network that the host has built."""
        self.detach()
        layer = find_layer(self._owner, self._collapse.layer)
        self._handle = layer.register_forward_hook(self._after_forward)

    def detach(self) -> None:
        """Leave the network as the host built it."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def check_used(self) -> None:
        """Raise a ``RuntimeError`` if no training step had the term."""
        if not self._steps:
            kind = type(self._owner)
            msg = f"{kind.__name__} trained no network in {kind.collapse_network!r}, its collapse_network"
            raise RuntimeError(msg)

    def _after_forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        latent = only_pass([LayerPass(layer, inputs, output)])
        if self._waits_for_backward:
            msg = (
                f"layer {self._collapse.layer!r} was called twice before a backward pass: the term belongs to one call"
            )
            raise RuntimeError(msg)
        self._collapse.pull(latent)
        self._waits_for_backward = True
        self._steps += 1
        latent.register_hook(self._after_backward)  # type: ignore[no-untyped-call]

    def _after_backward(self, gradient: Tensor) -> None:
        del gradient
        self._waits_for_backward = False


def _generated_constructor(kind: type[TargetedCollapseMixin]) -> Any:
    """A constructor of ``kind`` that takes what its bases take, and whose signature says so.

    PyOD and scikit-learn read the names of the parameters from the signature of the class itself, where
    ``*args`` is an error and ``**kwargs`` is nothing. The signature has the host's arguments, then the term's.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(kind, self).__init__(*args, **kwargs)

    host: Any = super(TargetedCollapseMixin, kind)
    theirs = inspect.signature(host.__init__)
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter(name, keyword, default=getattr(kind, name)) for name in COLLAPSE_ARGUMENTS]
    constructor: Any = __init__
    constructor.is_generated = True
    constructor.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *ours])
    return constructor
