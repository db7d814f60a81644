"""Targeted collapse for PyOD's own deep detectors."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from pyod.models.base_dl import BaseDeepLearningDetector
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toll_plugin.core.layers import LayerPass, find_layer, only_pass, watch_layer
from toll_plugin.core.penalty import COLLAPSE_ARGUMENTS, Collapsing, TargetedCollapse, WatchedLatent

__all__ = ["TargetedCollapseMixin"]


class TargetedCollapseMixin(Collapsing):
    r"""Adds :math:`w\|z_i\|` to the loss and the score of a PyOD detector with a network.

    Name it first among the bases and say where the latent is. The constructor takes the host's
    arguments and those below, and ``get_params``, ``clone`` and ``save`` know them all::

        class CollapsedAutoEncoder(TargetedCollapseMixin, AutoEncoder):
            collapse_layer = "model.encoder"

    Detectors built on PyOD's ``BaseDeepLearningDetector`` get the term in the criterion of each
    step and in the scores of each batch. Detectors that train inside their own ``fit`` need
    ``collapse_network``; their weights then move as if the term were in the loss, which they do not
    report, and by which they do not choose an epoch. With both weights 0 the host is untouched,
    to the last bit.

    Args:
        *args: Arguments of the host.
        collapse_weight: ``w`` in the loss, in units of the host's loss per unit of the latent, at
            least 0. Default: the class attribute of the same name, 0.1.
        collapse_score_weight: ``w`` in the score, in units of the host's score. Default ``None``,
            the weight of the loss.
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class a constructor whose signature PyOD and scikit-learn can read."""
        super().__init_subclass__(**kwargs)
        if cls.__init__ is TargetedCollapseMixin.__init__ or hasattr(cls.__init__, "of_the_mixin"):
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]

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
        _ = self.collapse  # checks them

    # --- hosts built on BaseDeepLearningDetector

    def training_forward(self, batch_data: Any) -> Any:
        """The host's step, with the term in its criterion."""
        host: Any = super()
        if self.collapse.weight == 0:
            return host.training_forward(batch_data)
        me: Any = self
        criterion, calls = me.criterion, 0
        uses = f"{type(self).__name__} uses its criterion {{}} in a step: the term has to join one loss"

        def with_term(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(uses.format("more than once"))
            return criterion(*args, **kwargs) + latent.loss()

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
        if self.collapse.score_weight == 0:
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
        if not type(self).collapse_network or self.collapse.weight == 0:
            return host.fit(X, y, **kwargs)
        self._puller: _Puller = _Puller(self, self.collapse)
        try:
            fitted = host.fit(X, y, **kwargs)
            self._puller.check_pulls()
        finally:
            self._puller.let_go()
            del self._puller
        return fitted

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Within the host's fit nothing else happens between building a network and training it.
        if name == type(self).collapse_network and isinstance(value, nn.Module) and "_puller" in self.__dict__:
            self._puller.take()

    def decision_function(self, X: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        """The host's scores, with the term."""
        host: Any = super()
        network, collapse = type(self).collapse_network, self.collapse
        if collapse.score_weight == 0:
            return host.decision_function(X, *args, **kwargs)
        if "_puller" in self.__dict__:
            self._puller.check_pulls()
        if getattr(self, network or "feature_size", None) is None:
            msg = f"This {type(self).__name__} instance is not fitted yet. Call 'fit' before using it"
            raise NotFittedError(msg)
        if not network:
            return host.decision_function(X, *args, **kwargs)
        with watch_layer(self, collapse.layer) as passes:
            scores = host.decision_function(X, *args, **kwargs)
        terms = [collapse.score(only_pass([one])).detach().cpu().numpy() for one in passes]
        rows = sum(map(len, terms))
        if rows != len(scores):
            msg = (
                f"{type(self).__name__} called layer {collapse.layer!r} for {rows} rows while it scored {len(scores)}: "
                "name another collapse_layer, or set collapse_score_weight to 0"
            )
            raise RuntimeError(msg)
        return scores + np.concatenate(terms)


class _Puller:
    """Pulls at the latent of a network while its detector is fitted."""

    def __init__(self, owner: TargetedCollapseMixin, collapse: TargetedCollapse) -> None:
        self._owner = owner
        self._collapse = collapse
        self._handle: RemovableHandle | None = None
        self._waiting = False
        self._pulls = 0

    def take(self) -> None:
        self.let_go()
        self._handle = find_layer(self._owner, self._collapse.layer).register_forward_hook(self._pull)

    def check_pulls(self) -> None:
        if not self._pulls:
            kind = type(self._owner)
            msg = f"{kind.__name__} trained no network in {kind.collapse_network!r}, its collapse_network"
            raise RuntimeError(msg)

    def let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _pull(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        latent = only_pass([LayerPass(layer, inputs, output)])
        if self._waiting:
            msg = f"layer {self._collapse.layer!r} was called twice before a backward pass: the term has to pull at one"
            raise RuntimeError(msg)
        self._collapse.pull(latent)
        self._waiting = True
        self._pulls += 1
        latent.register_hook(self._passed)  # type: ignore[no-untyped-call]

    def _passed(self, gradient: Tensor) -> None:
        del gradient
        self._waiting = False


def _constructor(kind: type[TargetedCollapseMixin]) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(kind, self).__init__(*args, **kwargs)

    host: Any = super(TargetedCollapseMixin, kind)
    theirs = inspect.signature(host.__init__)
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter(name, keyword, default=getattr(kind, name)) for name in COLLAPSE_ARGUMENTS]
    constructor: Any = __init__
    constructor.of_the_mixin = True
    constructor.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *ours])
    return constructor
