"""Targeted collapse in the scores of anomalib's other models: the term that joins them, and its units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from anomalib.data import Batch, InferenceBatch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from toll_plugin.anomalib.base import normal_terms
from toll_plugin.core.layers import watch_layer
from toll_plugin.core.objective import TollTerms, in_units, toll_score
from toll_plugin.core.penalty_mixin import TargetedCollapseBase
from toll_plugin.core.score import TermUnits
from toll_plugin.core.threads import is_this_thread, this_thread

__all__ = ["ScoresWithNorm", "indices_for"]


class ScoresWithNorm(TargetedCollapseBase):
    """What :class:`TargetedCollapseMixin` does to the scores of its host, in every verb.

    Attributes:
        collapse_units: Units of the host's score and of the norm, as buffers, made by the mixin's constructor.
    """

    collapse_units: TermUnits

    def _in_scores(self) -> AbstractContextManager[None]:
        """For a block in which the host scores: the term is added to the score that its model returns."""
        host: Any = self
        collapse = self.collapse
        # A host's step may call another one, or forward: the term is added once.
        if collapse.score_weight == 0 or host.training or self._is_scoring():
            return nullcontext()

        def with_term(terms: TollTerms[Tensor]) -> Tensor:
            terms = in_units(terms, self.collapse_units.units) if collapse.weight == "auto" else terms
            return toll_score(terms, beta=collapse.score_weight)

        return self._with_scores(with_term)

    @contextmanager
    def _with_scores(self, change: Callable[[TollTerms[Tensor]], Tensor]) -> Iterator[None]:
        """For a block in which the host scores: its model returns what ``change`` makes of its score and the norm."""
        host: Any = self
        collapse, thread = self.collapse, this_thread()
        calls = 0

        def replace(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            nonlocal calls
            if not is_this_thread(thread) or not isinstance(output, InferenceBatch):
                return output
            scores: Any = output.pred_score
            if scores is None:  # as the post-processor would make them
                scores = output.anomaly_map.amax(dim=(-2, -1))
            norms = collapse.norms(self.collapse_latent(passes, scores.shape[0]))
            passes.clear()
            calls += 1
            return output._replace(pred_score=change(TollTerms(scores, norms.reshape(scores.shape))))

        with watch_layer(self, collapse.layer) as passes:
            handle = host.model.register_forward_hook(replace)
            _SCORING.append((id(self), thread))
            try:
                yield
            finally:
                _SCORING.remove((id(self), thread))
                handle.remove()
        if not calls:
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
            return host.validation_step(batch, *indices_for(host.validation_step, args), **kwargs)

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The host's step, with the term in its scores."""
        host: Any = super()
        with self._in_scores():
            return host.test_step(batch, *indices_for(host.test_step, args), **kwargs)

    def predict_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The host's step, with the term in its scores."""
        host: Any = super()
        with self._in_scores():
            return host.predict_step(batch, *indices_for(host.predict_step, args), **kwargs)

    # --- units of the score

    def on_train_epoch_end(self) -> None:
        """The host's hook; then the units of the score are measured where no validation does it."""
        host: Any = super()
        host.on_train_epoch_end()
        me: Any = self
        if not any(me.trainer.num_val_batches):
            self._measure_units()

    def on_validation_start(self) -> None:
        """The host's hook; then a fit measures the units of the score, in which the thresholds to come have to be."""
        host: Any = super()
        host.on_validation_start()
        me: Any = self
        if me.trainer.state.fn == TrainerFn.FITTING and not me.trainer.sanity_checking:
            self._measure_units()

    def _measure_units(self) -> None:
        if self.collapse.weight != "auto" or self.collapse.score_weight == 0:
            self.collapse_units.measure(None)
            return
        me: Any = self
        # A host that diverged keeps the units that it had.
        if (terms := normal_terms(me, self._terms_of)) is not None:
            self.collapse_units.measure(terms)

    def _terms_of(self, batch: Batch) -> TollTerms[Tensor]:
        """Size of the host's score, and norm, of each image of a batch ``(N,)``."""
        host: Any = super()
        found: list[TollTerms[Tensor]] = []

        def note(terms: TollTerms[Tensor]) -> Tensor:
            found.append(TollTerms(*(term.detach().float().reshape(-1) for term in terms)))
            return terms.reconstruction

        with self._with_scores(note):
            host.predict_step(batch, *indices_for(host.predict_step, (0,)))
        # Where a host shows a batch to its model more than once, the call that it ends with counts.
        return TollTerms(found[-1].reconstruction.abs(), found[-1].latent)


#: Models that are being scored, by their id, and the threads that do it. Not an attribute, which would be pickled.
_SCORING: list[tuple[int, int]] = []


def indices_for(step: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Lightning passes behind the batch, where the host's own step takes it."""
    return args if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
