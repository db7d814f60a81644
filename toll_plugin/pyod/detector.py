"""Toll as a PyOD detector for tables."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from torch import Tensor, nn

from toll_plugin.core.checks import check_integer, check_option
from toll_plugin.core.networks import Autoencoder, DenseAutoencoder
from toll_plugin.core.objective import Beta, ScoreTerm, TollLoss, check_score_weight
from toll_plugin.core.rows import random_order
from toll_plugin.core.tables.distant import DistantTable, Table
from toll_plugin.core.tables.fit import (
    FittedTable,
    Metric,
    ScoreScale,
    TableSplit,
    TrainedMember,
    fit_table,
    hold_out,
    rehearse,
)
from toll_plugin.core.tables.rows import Preprocessing, scale_rows
from toll_plugin.core.tables.scaling import Floats, TablePreprocessing, TableScaling
from toll_plugin.core.training.loop import History
from toll_plugin.core.training.optimizers import MakeOptimizer
from toll_plugin.core.training.options import TrainingOptions
from toll_plugin.pyod.base import CURVES, CarefulDetector
from toll_plugin.pyod.explanation import Explanation, plot_history, plot_latent
from toll_plugin.pyod.onnx import to_onnx
from toll_plugin.pyod.persistence import load, save
from toll_plugin.pyod.scale.pieces import Piece, Pieces, by_pieces, pieces_of
from toll_plugin.pyod.validation import check_contamination, check_device, check_finite, check_table, located, seed_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TollDetector"]

#: Bytes that rows of data in pieces may take at a time.
MEMORY = 1 << 28


class TollDetector(CarefulDetector):
    r"""Targeted collapse autoencoders for tables: train on rows that are mostly normal, score any.

    The score of a row x, higher is more anomalous, is

    .. math:: s(x) = \frac1R \sum_r \frac{\|x - \hat x_r\|^p}{e_r} + w \frac1C \sum_c \frac{\|z_c\|^p}{l_c}

    with x scaled as :class:`toll_plugin.core.TableScaling` says. Of ``n_members`` networks that differ by their
    initial weights, R learn to reconstruct, by the mean of :math:`\|x - \hat x\|^p`, and give the first term; C learn
    by the whole loss, the mean of :math:`\|x - \hat x\|^p + \beta \|z\|^p`, and give the second. Norms are
    distances under the covariance of training rows (``metric``), and each is divided by its median on training
    rows, e and l (``score_scale``), so both terms are near 1 on normal rows and w needs no tuning.

    The latent term is for anomalies among the training rows, as there are when ``fit`` is called on all rows. It
    adds a good deal on some such tables and little on others, and nothing where all training rows are normal:
    benchmarks/results/tables.md has the numbers. Compare with ``beta=0`` on your own data.

    Scores are computed in double precision and do not depend, to the last bit, on which rows are
    scored together. What the paper does is ``n_members=1, beta=10.0, score_scale="none", metric="euclidean"``, with one
    network that gives both terms; see configs/paper/arrhythmia.yaml.

    Args:
        contamination: Share of anomalies in the training rows, in (0, 0.5], from which threshold
            and labels follow, or a thresholder of ``pyod.models.thresholds``. Default 0.1.
        hidden_sizes: Widths of the encoder's hidden layers; the decoder mirrors them. Default (64, 32).
        latent_dim: Length of the latent z. Default 32.
        beta: Weight of the latent norm in the loss. ``"auto"`` (default) keeps the latent term as large as the
            reconstruction term in every batch (:func:`toll_plugin.core.relative_pressure`); a number is the
            paper's fixed weight, in units of the scaled data per unit of the latent.
        strength: With ``beta="auto"``, how many times as large. Default 1; 0 is ``beta=0``.
        exponent: p, 1 (default, the authors' code) or 2 (squared norms, the paper's text).
        score_scale: ``"median"`` (default) as above; ``"none"`` adds the terms as they are, as the paper does.
        score_weight: w. Default ``None``: 0.5 with medians, else beta.
        score_term: What a score is: ``"total"`` (default, the sum above), ``"reconstruction"`` or
            ``"latent"`` alone and unweighted; training does not change.
        encoder: Module of your own, rows ``(N, n_inputs)`` to latents; with ``decoder`` and ``n_members=1``.
            It is copied, and the copy trained on from the weights it has. Weights that encoder and decoder
            share are shared in the copy, but not in a ``clone``, which copies each by itself.
        decoder: Module of your own, latents back to ``(N, n_inputs)``.
        batch_norm: Whether a BatchNorm stands before each ReLU. Default True.
        dropout: Share of hidden units dropped in training, in [0, 1). Default 0.
        n_members: Networks, R and C together. Default 8.
        n_collapsed: C, in [0, ``n_members``]. Default ``None``: half, and one if there is one member. If all
            are, each gives both terms, as in the paper; if none is, there is no latent term.
        preprocessing: ``"robust"`` (default), ``"standard"``, ``"none"`` (raw features), or a scikit-learn
            transformer, which is cloned and fitted on arrays of at most 10 000 rows.
        metric: ``"mahalanobis"`` (default): when rows are scored, residuals and, with medians, latents are measured
            by their covariance on the training rows; ``"euclidean"``: by their plain norms, as in the paper.
        noise: Standard deviation of Gaussian noise on the inputs in training, in units of the scaled
            columns; the targets stay clean. Default 0.
        epochs: Passes over the rows, or ``None`` (default) if ``max_steps`` alone ends the fit.
        max_steps: Steps, or ``None``; whichever of the two comes first. Default 300: longer training learns
            more of the anomalies among the rows.
        batch_size: Rows per step. Default 128.
        lr: Learning rate. Default 2e-3.
        optimizer: ``"adam"`` (default), ``"adamw"``, ``"sgd"``, or called with the parameters to make one; what
            it makes must work element by element, because the weights of all members are one parameter.
        validation_fraction: Share of rows held out, in [0, 1), at least two rows staying. The weights of the
            epoch with the lowest loss on them are the ones kept; with ``beta="auto"`` that is the epoch with the lowest
            reconstruction term. Default 0: the last weights are.
        patience: Epochs without a lower held-out loss after which training stops; ``None`` (default) never.
            Needs ``validation_fraction``.
        device: Where to train, such as ``"cuda"``; scores are computed on the CPU. Default ``"cpu"``.
        random_state: ``None``, an integer, a RandomState or a Generator (which are left as they are).
            Default 42.
        verbose: 0 (default) silent, 1 a progress bar, 2 a line per epoch.

    Attributes:
        decision_scores_: Scores of the training rows, equal to ``decision_function`` of them; of data in pieces see
            :meth:`fit`.
        threshold_: Score above which a row is labelled 1.
        labels_: 0 or 1 for each training row.
        history_: Curves per epoch, means over the members: ``total``, ``reconstruction``, ``latent``
            and, with rows held out, ``validation``. Each ``partial_fit`` adds its epochs.
        best_epoch_: The epoch, from 0, whose weights each member has.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, if the table had any.

    Raises:
        TypeError: By ``fit``, if a parameter has the wrong type.
        ValueError: By ``fit``, if a parameter is out of range; by every method, if the table is.
        NotFittedError: By every other method before ``fit``.
        DivergenceError: By ``fit``, if the loss stops being finite.

    A ``fit`` that fails or is interrupted leaves the detector as it was. Networks of this
    package's own train on one thread of the CPU, so that the result does not depend on the number of cores,
    and no global generator is touched. Once a process has trained for some seconds, parts of a step run in loops that
    numba compiles in about 3 s, or loads in 0.3 s where it has kept them from an earlier process; they take 45 MB.
    Weights and scores are the same to the last bit with them and without.

    Source:
        arXiv 2306.12627, section 3, and the authors' Arrhythmia network. The scaling, the members and their two
        kinds, the metric, the medians and the weight that follows the reconstruction are this package's:
        behind the latent a BatchNorm makes the decoder blind to the scale of z, so a fixed weight fades in
        training (benchmarks/results/tables.md).

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(200, 5))
        >>> detector = TollDetector(max_steps=50).fit(X)
        >>> detector.predict(np.vstack([X[:2], np.full((1, 5), 9.0)]))
        array([0, 0, 1])
    """

    _stream: _Stream | None = None

    def __init__(
        self,
        contamination: Any = 0.1,
        *,
        hidden_sizes: Sequence[int] = (64, 32),
        latent_dim: int = 32,
        beta: Beta = "auto",
        strength: float = 1.0,
        exponent: int = 1,
        score_scale: ScoreScale = "median",
        score_weight: float | None = None,
        score_term: ScoreTerm = "total",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        batch_norm: bool = True,
        dropout: float = 0.0,
        n_members: int = 8,
        n_collapsed: int | None = None,
        preprocessing: TablePreprocessing | Any = "robust",
        metric: Metric = "mahalanobis",
        noise: float = 0.0,
        epochs: int | None = None,
        max_steps: int | None = 300,
        batch_size: int = 128,
        lr: float = 2e-3,
        optimizer: str | MakeOptimizer = "adam",
        validation_fraction: float = 0.0,
        patience: int | None = None,
        device: str | torch.device = "cpu",
        random_state: Any = 42,
        verbose: int = 0,
    ) -> None:
        # Nothing but storing: scikit-learn clones by these, and PyOD's base class would check and convert.
        self.contamination = contamination
        self.hidden_sizes = hidden_sizes
        self.latent_dim = latent_dim
        self.beta = beta
        self.strength = strength
        self.exponent = exponent
        self.score_scale = score_scale
        self.score_weight = score_weight
        self.score_term = score_term
        self.encoder = encoder
        self.decoder = decoder
        self.batch_norm = batch_norm
        self.dropout = dropout
        self.n_members = n_members
        self.n_collapsed = n_collapsed
        self.preprocessing = preprocessing
        self.metric = metric
        self.noise = noise
        self.epochs = epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.lr = lr
        self.optimizer = optimizer
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    # -- fitting -------------------------------------------------------------------------------

    @torch.inference_mode(mode=False)
    def fit(self, X: Any, y: Any = None, *, memory: int = MEMORY) -> TollDetector:  # noqa: ARG002, N803
        """Train on rows.

        Data that come in pieces (:class:`Parquet` or a path, a Dask DataFrame or Array, an iterator of batches) are
        read into memory if they fit there, else in passes of which each fetches as many rows as ``memory``
        holds. Either way the networks learn the same rows in the same order as from one table, so that the result is
        the same, bit for bit, on any number of partitions and workers. The default parameters take three passes
        over any number of rows (of up to 400 columns); each of ``epochs`` over data that do not fit takes as many
        passes as they are times larger than half the memory. Of more than 1 000 000 rows that do not fit, so
        many are drawn, by the seed, for ``decision_scores_``, ``labels_`` and the threshold.

        Args:
            X: Rows ``(N, n_features)``, N at least 2: array, DataFrame, nested list, or data in pieces.
            y: Ignored.
            memory: Bytes that rows of data in pieces may take at a time. Default 256 MiB.

        Raises:
            ValueError: If a value, a column or a parameter is wrong; of data in pieces with partition, row and column.
        """
        new = copy.copy(self)
        pieces = pieces_of(X)
        check_integer("memory", memory, minimum=1)
        table = new._checked(X, reset=True) if pieces is None else new._table_of(pieces, memory)
        options = new._options(self.epochs, self.max_steps, self.patience)
        generator = torch.Generator().manual_seed(seed_of(self.random_state))
        split = hold_out(len(table), self.validation_fraction, generator)
        if self.patience is not None and len(split.validation) == 0:
            msg = f"patience needs rows held out: validation_fraction must be more than 0, got {len(table)} rows and "
            msg += f"validation_fraction={self.validation_fraction!r}"
            raise ValueError(msg)
        if isinstance(table, DistantTable):
            table.keep(split.measured)
        scaling = new._fit_scaling(table, split.measured)
        networks = new._build_networks(scale_rows(scaling, table[split.measured[:1]]).shape[1], generator)
        fitted = new._train(table, split, scaling, networks, options, generator)
        new._take(fitted, table, {}, generator)
        new._stream = None
        self.__dict__ = new.__dict__
        return self

    @torch.inference_mode(mode=False)
    def partial_fit(self, X: Any, y: Any = None, *, epochs: int = 1) -> TollDetector:  # noqa: ARG002, N803
        """Learn one more piece of data that arrive in pieces, without forgetting those before.

        A call is one pass over the piece, not a whole ``fit``: the parameters ``max_steps``, ``epochs``,
        ``validation_fraction`` and ``patience`` do not count. Networks and optimiser go on from call to
        call. The detector keeps a sample of at most 10 000 rows in which each row of all pieces has the same
        chance to be. On it columns and residuals are measured anew each time, and as many of its rows as
        the piece has are trained on beside them, so that the order of the pieces matters little.

        ``fit`` and :meth:`load` leave no such sample: what they learned goes on to be trained with its columns
        scaled as before, but their rows are not rehearsed. Whoever will add pieces begins with
        ``partial_fit(X, epochs=...)``.

        Afterwards training scores, labels and threshold are those of the latest piece, and the history is
        that of all pieces.

        Of data that come in pieces (see :meth:`fit`) each is learned in its turn, and a stream of pieces that do not
        drift ends as near to a :meth:`fit` of all rows as two fits with other seeds lie to each other.

        Args:
            X: Rows ``(N, n_features)``, N at least 2, or data in pieces, each of which fits in memory.
            y: Ignored.
            epochs: Passes over the piece. Default 1.

        Raises:
            TypeError: If ``epochs`` is no integer.
            ValueError: If it is below 1, or the table has other columns than before.
        """
        new, pieces = copy.copy(self), pieces_of(X)
        for piece in [Piece(X, "")] if pieces is None else pieces.of_two_rows():
            new._learn(piece, epochs)
        self.__dict__ = new.__dict__
        return self

    def _learn(self, piece: Piece, epochs: int) -> None:
        """What :meth:`partial_fit` does with a piece."""
        first = not hasattr(self, "_model")
        with located(piece.place):
            new = self._checked(piece.rows, reset=first, first=piece.first)
        options = self._options(check_integer("epochs", epochs, minimum=1), None, None)
        generator = torch.Generator().manual_seed(seed_of(self.random_state))
        stream = self._stream or _Stream(new[:0], 0, first, [], None, generator.get_state())
        generator.set_state(stream.random)
        rows = np.concatenate([new, stream.sample]) if len(stream.sample) else new
        split = rehearse(len(new), len(stream.sample), stream.seen, generator)
        scaling = self._fit_scaling(rows, split.measured) if stream.whole else self._model.scaling
        if first:
            networks = self._build_networks(scale_rows(scaling, new[:1]).shape[1], generator)
        else:
            networks = [copy.deepcopy(member.network) for member in self._model.members]
        optimizer = (self.optimizer, self.lr)
        states = stream.states if stream.optimizer == optimizer else []
        fitted = self._train(rows, split, scaling, networks, options, generator, states)
        self._take(fitted, new, {} if first else self.history_, generator)
        seen = stream.seen + len(new)
        self._stream = _Stream(
            rows[split.measured], seen, stream.whole, fitted.optimizers, optimizer, generator.get_state()
        )

    def _checked(self, x: Any, *, reset: bool, first: int = 0) -> NDArray[Any]:
        """The rows to train on, the first of which has the number ``first``, and the parameters."""
        self._check_parameters()
        return check_table(self, x, reset=reset, minimum=2, first=first)

    def _table_of(self, pieces: Pieces, memory: int) -> Table:
        """The same of data in pieces."""
        self._check_parameters()
        return pieces.table(self, memory)

    def _check_parameters(self) -> None:
        """Check those that no later step looks at."""
        self._thresholder = check_contamination(self.contamination)
        self._collapsed()
        check_option("score_term", self.score_term, get_args(ScoreTerm))
        check_option("score_scale", self.score_scale, get_args(ScoreScale))
        check_option("verbose", self.verbose, (0, 1, 2))
        self._loss()
        self._score_weight()

    def _options(self, epochs: int | None, max_steps: int | None, patience: int | None) -> TrainingOptions:
        if epochs is not None:
            check_integer("epochs", epochs, minimum=1)
        elif max_steps is None:
            msg = "epochs and max_steps must not both be None: nothing would end the fit"
            raise ValueError(msg)
        return TrainingOptions(
            optimizer=self.optimizer,
            lr=self.lr,
            batch_size=self.batch_size,
            max_epochs=epochs,
            max_steps=max_steps,
            patience=patience,
            noise=self.noise,
        )

    def _train(
        self,
        table: Table,
        split: TableSplit,
        scaling: Preprocessing,
        networks: list[nn.Module],
        options: TrainingOptions,
        generator: torch.Generator,
        optimizers: Sequence[dict[str, Any] | None] = (),
    ) -> FittedTable:
        return fit_table(
            table,
            split,
            scaling,
            self._members(networks),
            options,
            metric=self.metric,
            score_scale=self.score_scale,
            score_weight=self._score_weight(),
            score_term=self.score_term,
            device=check_device(self.device),
            generator=generator,
            progress=self.verbose == 1,
            on_epoch=_print_epoch if self.verbose == 2 else None,
            optimizers=optimizers,
        )

    def _members(self, networks: Sequence[nn.Module]) -> list[TrainedMember]:
        """The networks with their losses: those that only reconstruct come first."""
        loss, plain = self._loss(), len(networks) - self._collapsed()
        if plain == 0:
            return [TrainedMember(network, loss) for network in networks]
        without = TollLoss(0.0, exponent=self.exponent)
        return [TrainedMember(network, without, "reconstruction") for network in networks[:plain]] + [
            TrainedMember(network, loss, "latent") for network in networks[plain:]
        ]

    def _collapsed(self) -> int:
        """How many members are trained with the latent term."""
        members = check_integer("n_members", self.n_members, minimum=1)
        if self.n_collapsed is None:
            return max(1, members // 2)
        collapsed = check_integer("n_collapsed", self.n_collapsed, minimum=0)
        if collapsed > members:
            msg = f"n_collapsed must be at most n_members, {members}, got {self.n_collapsed}"
            raise ValueError(msg)
        if collapsed == 0 and self.score_term == "latent":
            msg = "score_term='latent' needs members that collapse, got n_collapsed=0"
            raise ValueError(msg)
        return collapsed

    def _loss(self) -> TollLoss:
        return TollLoss(self.beta, strength=self.strength, exponent=self.exponent)

    def _score_weight(self) -> float:
        return check_score_weight(self.score_weight, beta=self.beta, score_scale=self.score_scale)

    def _take(
        self, fitted: FittedTable, table: Table, before: Mapping[str, Floats], generator: torch.Generator
    ) -> None:
        """Set what a fit leaves on the detector; ``before`` are the curves that the new ones go on from."""
        self._model = fitted.model
        curves = _mean_curves(fitted.histories)
        done = len(before.get("total", ()))
        self.history_ = {name: np.concatenate([before.get(name, new[:0]), new]) for name, new in curves.items()}
        self.best_epoch_ = [done + history.best_epoch for history in fitted.histories]
        if isinstance(table, DistantTable):
            scored = np.sort(random_order(len(table), _SCORED, generator).numpy())
            pieces = table.batches(np.array_split(scored, -(-len(scored) // _PIECE)))
            self.decision_scores_ = np.concatenate([fitted.model.score(piece) for piece in pieces])
        else:
            self.decision_scores_ = fitted.model.score(table)
        self._label()

    def _fit_scaling(self, table: Table, rows: NDArray[np.int64]) -> Preprocessing:
        if isinstance(self.preprocessing, str):
            return TableScaling(cast("TablePreprocessing", self.preprocessing)).fit(table, rows)
        if not callable(getattr(self.preprocessing, "transform", None)):
            msg = f"preprocessing must be a name or a scikit-learn transformer, got {self.preprocessing!r}"
            raise TypeError(msg)
        fitted: Preprocessing = clone(self.preprocessing).fit(table[rows])
        return fitted

    def _build_networks(self, inputs: int, generator: torch.Generator) -> list[nn.Module]:
        if self.encoder is None and self.decoder is None:
            shape: dict[str, Any] = {"batch_norm": self.batch_norm, "dropout": self.dropout, "generator": generator}
            return [
                DenseAutoencoder(inputs, self.hidden_sizes, self.latent_dim, **shape) for _ in range(self.n_members)
            ]
        if self.encoder is None or self.decoder is None:
            given, missing = ("encoder", "decoder") if self.decoder is None else ("decoder", "encoder")
            msg = f"{missing} must be given together with {given}, got None"
            raise ValueError(msg)
        if self.n_members != 1:
            msg = (
                f"n_members must be 1 with an encoder and decoder, which have one set of weights, got {self.n_members}"
            )
            raise ValueError(msg)
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            if not isinstance(module, nn.Module):
                msg = f"{name} must be a torch.nn.Module, got {module!r}"
                raise TypeError(msg)
        own = copy.deepcopy((self.encoder, self.decoder))
        return [Autoencoder(*(module.float() for module in own), input_shape=(inputs,))]

    # -- scoring -------------------------------------------------------------------------------

    @by_pieces
    def decision_function(self, X: Any) -> Floats:  # noqa: N803
        """Anomaly scores ``(N,)`` of rows ``(N, n_features)``; higher is more anomalous.

        Like :meth:`predict`, :meth:`predict_proba` and :meth:`explain`, it takes what :meth:`fit` takes: the result
        is lazy for a Dask collection, for an iterator one of a result for each batch.
        """
        self._check_fitted()
        return self._model.score(self._table(X))

    @by_pieces
    def explain(self, X: Any) -> Explanation:  # noqa: N803
        """What each row's score is made of, see :class:`toll_plugin.pyod.Explanation`."""
        self._check_fitted()
        table = self._table(X)
        return Explanation.of(
            self._model.parts(table), self._model.score(table), self._model.weight, self._input_names()
        )

    def _input_names(self) -> list[str]:
        names: Any = getattr(self, "feature_names_in_", range(self.n_features_in_))
        if not isinstance(self._model.scaling, TableScaling):
            try:
                names = self._model.scaling.get_feature_names_out(names)  # type: ignore[attr-defined]
            except (AttributeError, TypeError, ValueError):
                names = [f"input {i}" for i in range(self._model.inputs)]
        return [str(name) for name in names]

    def _table(self, x: Any, first: int = 0) -> NDArray[Any]:
        # scikit-learn's check takes longer than scoring a row. It is needed for everything but plain arrays.
        plain = type(x) is np.ndarray and x.ndim == 2 and x.dtype in _PLAIN and len(x) > 0
        if not plain or x.shape[1] != self.n_features_in_ or hasattr(self, "feature_names_in_"):
            return check_table(self, x, reset=False, first=first)
        check_finite(x, None, first)
        table: NDArray[Any] = x
        return table

    # -- plots, files --------------------------------------------------------------------------

    def plot_history(self, ax: Axes | None = None) -> Axes:
        """Draw :attr:`history_`; returns the axes."""
        self._check_fitted()
        return plot_history(self.history_, ax)

    def plot_latent(self, X: Any, ax: Axes | None = None) -> Axes:  # noqa: N803
        """Draw the latents of rows about the origin; returns the axes.

        The first member's, in the two directions in which they reach furthest from it.
        """
        self._check_fitted()
        table = self._table(X)
        return plot_latent(self._model.latent(table), self._model.score(table), self.threshold_, ax)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted detector to one file that holds no code.

        Weights and scores are in safetensors' format, everything else is JSON in its header. The
        file is complete or not there: an interrupted save leaves what was there before.

        Raises:
            NotFittedError: Before ``fit``.
            TypeError: If a parameter cannot be written without code (a scikit-learn transformer, a
                thresholder, an optimiser of your own): pickle such a detector.
        """
        self._check_fitted()
        save(self, path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, encoder: nn.Module | None = None, decoder: nn.Module | None = None
    ) -> TollDetector:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            encoder: Your own module, of the class that was trained; its weights come from the file.
            decoder: The same.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no such file, of a later format, cut off or changed.
        """
        return load(cls, path, encoder, decoder)

    def to_onnx(self, path: str | PathLike[str]) -> None:
        """Write one ONNX graph from raw features to score.

        Its input is ``X``, double precision, shape ``(N, n_features)``, its output ``score``, ``(N,)``,
        equal to :meth:`decision_function` to 1e-5 relative. Needs ``pip install "toll-plugin[export]"``.

        Raises:
            ImportError: If ``onnx`` is missing.
            NotFittedError: Before ``fit``.
            TypeError: If the preprocessing is a scikit-learn transformer.
        """
        self._check_fitted()
        to_onnx(self._model, self.n_features_in_, path)


class _Stream(NamedTuple):
    """What ``partial_fit`` needs to go on, beside the model.

    Attributes:
        sample: Of all rows of all pieces.
        seen: How many rows those were.
        whole: Whether they are all that the networks have learned.
        states: Of the optimisers.
        optimizer: The parameters ``optimizer`` and ``lr`` that the states belong to.
        random: State of the generator.
    """

    sample: NDArray[Any]
    seen: int
    whole: bool
    states: list[dict[str, Any] | None]
    optimizer: tuple[Any, float] | None
    random: Tensor


def _mean_curves(histories: list[History]) -> dict[str, Floats]:
    curves = {}
    for name in CURVES:
        values = [getattr(history, name) for history in histories]
        # Members that were trained one after the other may have stopped at different epochs.
        whole = np.full((len(values), max(map(len, values))), np.nan)
        for row, known in zip(whole, values, strict=True):
            row[: len(known)] = known
        if whole.size:
            curves[name] = np.nanmean(whole, axis=0)
    return curves


def _print_epoch(epoch: int, histories: list[History]) -> None:
    values = " ".join(f"{name} {values[-1]:.6g}" for name, values in _mean_curves(histories).items())
    sys.stdout.write(f"epoch {epoch + 1} {values}\n")


#: Of larger data in pieces, so many rows are scored for the threshold.
_SCORED = 1_000_000
#: Rows of which the scores are computed at a time.
_PIECE = 1 << 12
_PLAIN = (np.dtype(np.float64), np.dtype(np.float32))
