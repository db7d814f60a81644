"""Targeted collapse for anomalib's other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from anomalib.data import Batch, InferenceBatch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from toll_plugin.anomalib.mixin_checks import check_backward, check_host
from toll_plugin.core.layers import LayerPass, watch_layer
from toll_plugin.core.penalty import Pool, TargetedCollapse
from toll_plugin.core.penalty_mixin import COLLAPSE_ARGUMENTS, TargetedCollapseBase
from toll_plugin.core.threads import is_this_thread, this_thread

__all__ = ["TargetedCollapseMixin"]


class TargetedCollapseMixin(TargetedCollapseBase):
    r"""Adds :math:`w\|z_i\|` to the loss and the score of an anomalib model.

    Name it first among the bases and say where the latent is::

        class CollapsedFastRecon(TargetedCollapseMixin, FastRecon):
            collapse_layer = "model.encoder"
            collapse_weight = 0.01

    The term's mean over the normal images of a batch is added to what ``training_step`` returns and
    logged as ``train_collapse``; per image it is added to ``pred_score`` before the post-processor
    sees it, in every verb and every export. Images that are labelled anomalous are left out of the
    loss. The anomaly map is the host's. With both weights 0 the host is untouched, to the last bit.
    The host's ``self.model`` has to return an ``InferenceBatch`` when it scores, as anomalib's do.
    A network that ``torch.compile`` has compiled runs uncompiled while its layer is watched.

    Ten models of anomalib are ready-made. STFPM, L2BT, FoundAD, GeneralAD and CFM are not, because nothing
    in them is a bottleneck, nor is CFA, whose descriptors have centres of their own; with a
    ``collapse_layer`` of yours the mixin takes these as well.

    Args:
        collapse_weight: ``w`` in the loss, in units of the host's loss per unit of the latent, at
            least 0. Default: the class attribute of the same name.
        collapse_score_weight: ``w`` in the score, in units of the host's score. Default: the
            class attribute, and where that is ``None`` the weight of the loss, times
            :meth:`collapse_score_factor`.
        collapse_layer: Dotted path, from the Lightning model, of the module whose output is the
            latent. Default: the class attribute.
        collapse_pool: ``"flatten"``, ``"mean"`` or ``"max"``: how a map becomes one norm, see
            :func:`toll_plugin.core.latent_norm`. Default: the class attribute, ``"mean"``.
        **kwargs: Arguments of the host, as keywords.

    Attributes:
        collapse_backward: For hosts that optimise manually: which ``manual_backward`` of a step,
            counted from 0, gets the loss the term belongs to. ``None`` refuses such hosts.
        collapse_synthetic: Dotted path of the module that puts synthetic anomalies into training
            images, see :meth:`collapse_normal`. Empty where there is none.

    Raises:
        TypeError: If the host trains nothing (memory banks, zero-shot models), is a normalising
            flow (its likelihood already pulls z to the centre), is DSR (its codes have fixed
            norms), has the term already, or optimises manually and the class does not say where
            its loss is (or the other way round); if a weight is no number.
        ValueError: If there is no such layer (the error lists those there are), a weight is
            negative or not finite, or the pool is unknown.

    Example:
        >>> from anomalib.models import Ganomaly
        >>> class Mine(TargetedCollapseMixin, Ganomaly):
        ...     collapse_layer, collapse_backward = "model.generator.encoder1", 0
        >>> Mine(collapse_weight=0.05, n_features=8).collapse
        TargetedCollapse('model.generator.encoder1', 0.05, score_weight=0.05, pool='mean', exponent=1)
    """

    collapse_weight: float = 0.01
    collapse_pool: Pool = "mean"
    collapse_backward: ClassVar[int | None] = None
    collapse_synthetic: ClassVar[str] = ""

    def __init__(
        self,
        *,
        collapse_weight: float | None = None,
        collapse_score_weight: float | None = None,
        collapse_layer: str | None = None,
        collapse_pool: Pool | None = None,
        **kwargs: Any,
    ) -> None:
        kind = type(self)
        check_host(kind, getattr(super(TargetedCollapseMixin, kind), "training_step", None))
        given = (collapse_weight, collapse_score_weight, collapse_layer, collapse_pool)
        chosen: dict[str, Any] = {
            name: getattr(kind, name) if value is None else value
            for name, value in zip(COLLAPSE_ARGUMENTS, given, strict=True)
        }
        if chosen["collapse_weight"] == "auto":
            msg = "collapse_weight must be a number for a model of anomalib, got 'auto'"
            raise ValueError(msg)
        # Wrong arguments are refused here already, before the host is built, which may download.
        TargetedCollapse(
            chosen["collapse_layer"],
            chosen["collapse_weight"],
            score_weight=chosen["collapse_score_weight"],
            pool=chosen["collapse_pool"],
            prefix="collapse_",
        )
        super().__init__(**kwargs)
        host: Any = self
        for name, value in chosen.items():
            setattr(self, name, value)
        # What the class says today, so that neither a checkpoint nor a log depends on the class.
        host.hparams.update(chosen)
        host._hparams_initial.update(chosen)
        check_backward(kind.__name__, kind.collapse_backward, manual=not host.automatic_optimization)
        self.collapse.find(self)

    # --- what a host with a latent of its own kind overrides

    def collapse_normal(self, batch: Batch, synthetic: Sequence[LayerPass]) -> Tensor | None:
        """Which images of a training batch the term counts, booleans ``(N,)``; ``None`` for all.

        Args:
            batch: As the host got it. Images labelled anomalous do not count.
            synthetic: Calls of ``collapse_synthetic``, whose output ends with a mask that is not
                zero where it put an anomaly. Images that got one do not count.
        """
        normal = None if batch.gt_label is None else batch.gt_label == 0
        for call in synthetic:
            untouched = ~call.output[-1].flatten(1).ne(0).any(dim=1)
            normal = untouched if normal is None else normal & untouched
        return normal

    # --- training

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The host's step, with the term in its loss."""
        host: Any = super()
        args = _indices(host.training_step, args)
        if self.collapse.weight == 0:
            return host.training_step(batch, *args, **kwargs)
        with self._term_of(batch) as term:
            if type(self).collapse_backward is None:
                return _add(host.training_step(batch, *args, **kwargs), term)
            with self._in_manual_loss(term):
                return host.training_step(batch, *args, **kwargs)

    @contextmanager
    def _term_of(self, batch: Batch) -> Iterator[Callable[[], Tensor]]:
        """For a block in which the host trains on ``batch``: what then computes the term, and logs it."""
        host: Any = self

        def term() -> Tensor:
            value = latent.loss(self.collapse_normal(batch, synthetic))
            host.log("train_collapse", value.detach(), on_epoch=True, prog_bar=True, logger=True)
            return value

        with ExitStack() as stack:
            watching = self.collapse.watch(self, lambda passes: self.collapse_latent(passes, len(batch.image)))
            latent = stack.enter_context(watching)
            anomalies = type(self).collapse_synthetic
            synthetic = stack.enter_context(watch_layer(self, anomalies)) if anomalies else []
            yield term

    @contextmanager
    def _in_manual_loss(self, term: Callable[[], Tensor]) -> Iterator[None]:
        """For a block in which the host optimises manually: the term joins the loss of one backward pass."""
        host: Any = self
        backward, own = host.manual_backward, vars(self).get("manual_backward")
        calls = 0

        def with_term(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal calls
            if calls == type(self).collapse_backward:
                loss = loss + term()
            calls += 1
            backward(loss, *args, **kwargs)

        # An attribute of the instance hides the host's method, which stays in use: it scales the sum in half precision.
        host.manual_backward = with_term
        try:
            yield
        finally:
            del host.manual_backward
            if own is not None:
                host.manual_backward = own
        if calls <= (type(self).collapse_backward or 0):
            msg = f"collapse_backward is {type(self).collapse_backward}, but the step had {calls} backward passes"
            raise RuntimeError(msg)

    # --- scores

    @contextmanager
    def _in_scores(self) -> Iterator[None]:
        """For a block in which the host scores: the term is added to the score that its model returns."""
        host: Any = self
        collapse, thread = self.collapse, this_thread()
        # A host's step may call another one, or forward: the term is added once.
        if collapse.score_weight == 0 or host.training or self._is_scoring():
            yield
            return
        added = 0

        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            nonlocal added
            if not is_this_thread(thread) or not isinstance(output, InferenceBatch):
                return output
            scores: Any = output.pred_score
            if scores is None:  # as the post-processor would make them
                scores = output.anomaly_map.amax(dim=(-2, -1))
            term = collapse.score(self.collapse_latent(passes, scores.shape[0]))
            passes.clear()
            added += 1
            return output._replace(pred_score=scores + term.reshape(scores.shape))

        with watch_layer(self, collapse.layer) as passes:
            handle = host.model.register_forward_hook(add)
            _SCORING.append((id(self), thread))
            try:
                yield
            finally:
                _SCORING.remove((id(self), thread))
                handle.remove()
        if not added:
            msg = (
                f"the model of {type(self).__name__} returned no InferenceBatch, so there is no score that "
                "the term could join: set collapse_score_weight to 0"
            )
            raise RuntimeError(msg)

    def _is_scoring(self) -> bool:
        return any(model == id(self) and is_this_thread(thread) for model, thread in tuple(_SCORING))

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Predictions, as the exports make them."""
        host: Any = super()
        with self._in_scores():
            return host.forward(batch, *args, **kwargs)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The host's step, with the term in its scores."""
        host: Any = super()
        with self._in_scores():
            return host.validation_step(batch, *_indices(host.validation_step, args), **kwargs)

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The host's step, with the term in its scores."""
        host: Any = super()
        with self._in_scores():
            return host.test_step(batch, *_indices(host.test_step, args), **kwargs)

    def predict_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The host's step, with the term in its scores."""
        host: Any = super()
        with self._in_scores():
            return host.predict_step(batch, *_indices(host.predict_step, args), **kwargs)


#: Models that are being scored, by their id, and the threads that do it. Not an attribute, which would be pickled.
_SCORING: list[tuple[int, int]] = []


def _indices(step: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Lightning passes behind the batch, where the host's own step takes it."""
    return args if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()


def _add(result: Any, term: Callable[[], Tensor]) -> Any:
    """What a training step returned, a loss or a dictionary with one, with the term added to the loss."""
    if result is None:  # Lightning skips such a step
        return None
    if isinstance(result, Tensor):
        return result + term()
    return {**result, "loss": result["loss"] + term()}
