"""Targeted collapse for anomalib's other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from anomalib.data import Batch
from torch import Tensor

from toll_plugin.anomalib.mixin_checks import check_backward, check_host
from toll_plugin.anomalib.mixin_scores import ScoresWithNorm, indices_for
from toll_plugin.core.layers import LayerPass, watch_layer
from toll_plugin.core.objective import Beta
from toll_plugin.core.penalty import Pool, TargetedCollapse
from toll_plugin.core.penalty_mixin import COLLAPSE_ARGUMENTS
from toll_plugin.core.score import TermUnits

__all__ = ["TargetedCollapseMixin"]


class TargetedCollapseMixin(ScoresWithNorm):
    r"""Adds :math:`w\|z_i\|` to the loss and the score of an anomalib model.

    Name it first among the bases and say where the latent is::

        class CollapsedFastRecon(TargetedCollapseMixin, FastRecon):
            collapse_layer = "model.encoder"
            collapse_weight = 0.01

    The term's mean over the normal images of a batch is added to what ``training_step`` returns and
    logged as ``train_collapse``; per image it is added to ``pred_score`` before the post-processor
    sees it, in every verb and every export. Images that are labelled anomalous are left out of the
    loss. The anomaly map is the host's. With both weights 0 the host is untouched, to the last bit; with
    ``collapse_strength=0`` it trains as if untouched.
    The host's ``self.model`` has to return an ``InferenceBatch`` when it scores, as anomalib's do.
    A network that ``torch.compile`` has compiled runs uncompiled while its layer is watched.

    With a weight that is a number, the loss is the host's plus :math:`w \cdot \mathrm{mean}_i \|z_i\|` and
    the score the host's plus :math:`w_s\|z_i\|`, as they are. With ``collapse_weight="auto"`` neither is tied to
    the scale of the data: :math:`w` is in each step what keeps the term ``collapse_strength`` times as large as
    the absolute value of the host's loss (of a manual host, the loss of that backward pass), and the score is

    .. math:: s_i = h_i / u + w_s \|z_i\| / v

    with the host's score :math:`h` and the medians :math:`u` of :math:`|h_i|` and :math:`v` of :math:`\|z_i\|` over
    the normal validation images (the training images, where there are none), see
    :func:`toll_plugin.core.typical`. Each validation of a fit measures them, which takes one more pass over its
    images; checkpoints and exports keep them, and before the first they are 1. The absolute value is
    there for hosts whose score may be negative, such as a logit: a unit is then how far normal images lie from 0.
    It is no measure of their spread: the norm outweighs a host whose scores have a large offset, as it does with the
    median of positive scores, and ``collapse_score_weight`` is there to correct it. The map stays in the host's unit.

    Ten models of anomalib are ready-made; all but two have a weight of 0 until you give one, since the term gained
    nothing in them or was not measured (benchmarks/results/mixin.md). STFPM, L2BT, FoundAD, GeneralAD and CFM
    are not ready-made, because nothing in them is a bottleneck, nor is CFA, whose descriptors have centres of their
    own; with a ``collapse_layer`` of yours the mixin takes these as well.

    Args:
        collapse_weight: ``w`` in the loss, in units of the host's loss per unit of the latent, at
            least 0; or ``"auto"``, see above. Default: the class attribute of the same name.
        collapse_score_weight: ``w_s`` in the score, in units of the host's score. Default: the
            class attribute, and where that is ``None`` the weight of the loss, times
            :meth:`collapse_score_factor`; with ``"auto"`` 0.5. With 0 the score is the host's, in its unit.
        collapse_layer: Dotted path, from the Lightning model, of the module whose output is the
            latent. Default: the class attribute.
        collapse_pool: ``"flatten"``, ``"mean"`` or ``"max"``: how a map becomes one norm, see
            :func:`toll_plugin.core.latent_norm`. Default: the class attribute, ``"mean"``.
        collapse_strength: With ``"auto"``, how many times as large as the host's loss the term is kept, at least
            0. Default: the class attribute, 1.
        **kwargs: Arguments of the host, as keywords.

    Attributes:
        collapse_backward: For hosts that optimise manually: which ``manual_backward`` of a step,
            counted from 0, gets the loss the term belongs to. ``None`` refuses such hosts.
        collapse_synthetic: Dotted path of the module that puts synthetic anomalies into training
            images, see :meth:`collapse_normal`. Empty where there is none.
        collapse_units: The units ``u`` and ``v``, as buffers. With a weight that is a number they are not used.

    Raises:
        TypeError: If the host trains nothing (memory banks, zero-shot models), is a normalising
            flow (its likelihood already pulls z to the centre), is DSR (its codes have fixed
            norms), has the term already, or optimises manually and the class does not say where
            its loss is (or the other way round); if a weight is no number, nor ``"auto"``.
        ValueError: If there is no such layer (the error lists those there are), a weight is
            negative or not finite, or the pool is unknown.

    Example:
        >>> from anomalib.models import Ganomaly
        >>> class Mine(TargetedCollapseMixin, Ganomaly):
        ...     collapse_layer, collapse_backward = "model.generator.encoder1", 0
        >>> Mine(collapse_weight=0.05, n_features=8).collapse
        TargetedCollapse('model.generator.encoder1', 0.05, score_weight=0.05, pool='mean', exponent=1)
    """

    collapse_weight: Beta = 0.01
    collapse_pool: Pool = "mean"
    collapse_backward: ClassVar[int | None] = None
    collapse_synthetic: ClassVar[str] = ""

    def __init__(
        self,
        *,
        collapse_weight: Beta | None = None,
        collapse_score_weight: float | None = None,
        collapse_layer: str | None = None,
        collapse_pool: Pool | None = None,
        collapse_strength: float | None = None,
        **kwargs: Any,
    ) -> None:
        kind = type(self)
        check_host(kind, getattr(super(TargetedCollapseMixin, kind), "training_step", None))
        given = (collapse_weight, collapse_score_weight, collapse_layer, collapse_pool, collapse_strength)
        chosen: dict[str, Any] = {
            name: getattr(kind, name) if value is None else value
            for name, value in zip(COLLAPSE_ARGUMENTS, given, strict=True)
        }
        # Wrong arguments are refused here already, before the host is built, which may download.
        TargetedCollapse(
            chosen["collapse_layer"],
            chosen["collapse_weight"],
            strength=chosen["collapse_strength"],
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
        self.collapse_units = TermUnits()

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
        args = indices_for(host.training_step, args)
        if self.collapse.is_off:
            return host.training_step(batch, *args, **kwargs)
        with self._term_of(batch) as with_term:
            if type(self).collapse_backward is None:
                return _with_loss(host.training_step(batch, *args, **kwargs), with_term)
            with self._in_manual_loss(with_term):
                return host.training_step(batch, *args, **kwargs)

    @contextmanager
    def _term_of(self, batch: Batch) -> Iterator[Callable[[Tensor], Tensor]]:
        """For a block in which the host trains on ``batch``: what adds the term to the host's loss, and logs it."""
        host: Any = self

        def with_term(loss: Tensor) -> Tensor:
            value = latent.loss(self.collapse_normal(batch, synthetic), loss)
            host.log("train_collapse", value.detach(), on_epoch=True, prog_bar=True, logger=True)
            return loss + value

        with ExitStack() as stack:
            watching = self.collapse.watch(self, lambda passes: self.collapse_latent(passes, len(batch.image)))
            latent = stack.enter_context(watching)
            anomalies = type(self).collapse_synthetic
            synthetic = stack.enter_context(watch_layer(self, anomalies)) if anomalies else []
            yield with_term

    @contextmanager
    def _in_manual_loss(self, with_term: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For a block in which the host optimises manually: the term joins the loss of one backward pass."""
        host: Any = self
        backward, own = host.manual_backward, vars(self).get("manual_backward")
        calls = 0

        def counted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal calls
            if calls == type(self).collapse_backward:
                loss = with_term(loss)
            calls += 1
            backward(loss, *args, **kwargs)

        # An attribute of the instance hides the host's method, which stays in use: it scales the sum in half precision.
        host.manual_backward = counted
        try:
            yield
        finally:
            del host.manual_backward
            if own is not None:
                host.manual_backward = own
        if calls <= (type(self).collapse_backward or 0):
            msg = f"collapse_backward is {type(self).collapse_backward}, but the step had {calls} backward passes"
            raise RuntimeError(msg)


def _with_loss(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a training step returned, a loss or a dictionary with one, with the loss changed."""
    if result is None:  # Lightning skips such a step
        return None
    if isinstance(result, Tensor):
        return change(result)
    return {**result, "loss": change(result["loss"])}
