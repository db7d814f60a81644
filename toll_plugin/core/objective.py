"""The method's one formula: per-sample terms, their weighted sum, its mean.

Training minimises the mean of what scoring reports per sample, so both come from
:func:`toll_score`.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import NamedTuple

from toll_plugin.core.checks import check_finite_float, check_option

__all__ = [
    "SCORE_WEIGHT",
    "Beta",
    "ScoreScale",
    "ScoreTerm",
    "TollLoss",
    "TollTerms",
    "check_beta",
    "check_score_weight",
    "in_units",
    "norm_per_sample",
    "relative_pressure",
    "terms_of_residual",
    "toll_score",
    "toll_slopes",
    "toll_terms",
    "typical",
    "typical_terms",
]

ScoreTerm = Literal["total", "reconstruction", "latent"]

#: Whether the score adds its terms in units of their own, or as they are.
ScoreScale = Literal["median", "none"]

#: Of the latent term in the score, where both terms are in units of their own.
SCORE_WEIGHT = 0.5

#: A weight that is a number, or one that follows the reconstruction.
Beta = float | Literal["auto"]

#: Images are tensors, tables are NumPy arrays.
ArrayT = TypeVar("ArrayT", Tensor, NDArray[Any])
#: What has been averaged over a batch is a number.
ValueT = TypeVar("ValueT", Tensor, NDArray[Any], float)


class TollTerms(NamedTuple, Generic[ValueT]):
    """The two unweighted terms: of each of N samples, or their means over a batch as two numbers.

    Attributes:
        reconstruction: Norm of each sample's residual, shape ``(N,)``, in units of the input.
        latent: Norm of each sample's latent, shape ``(N,)``, in units of the latent.
    """

    reconstruction: ValueT
    latent: ValueT


def norm_per_sample(values: Any, exponent: int) -> Any:
    """Euclidean norm of each row's values, to the power ``exponent``: the one norm of loss and score."""
    if isinstance(values, np.ndarray):
        values = values.reshape(len(values), -1)
        total = np.einsum("nd,nd->n", values, values)
        return total if exponent == 2 else np.sqrt(total)
    values = values.flatten(1)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()  # a sum of squares over an image overflows half precision
    if torch.compiler.is_exporting():
        # The ONNX operator for a norm has no conversion to the opset anomalib asks for; the
        # gradient of this form is NaN at zero, so it stays out of training.
        squared = values.square().sum(dim=1)
        return squared if exponent == 2 else squared.sqrt()
    norm = torch.linalg.vector_norm(values, dim=1)
    return norm.square() if exponent == 2 else norm


def terms_of_residual(residual: ArrayT, latent: ArrayT, *, exponent: int = 1) -> TollTerms[ArrayT]:
    r"""Per-sample terms :math:`\|r_i\|_2^p` and :math:`\|z_i\|_2^p` of a residual that is already there.

    For a residual :math:`r = x - \hat x` that is measured in a metric of its own before its norm is
    taken; :func:`toll_terms` is this function of the plain residual.

    Args:
        residual: Shape ``(N, *)``; flattened per sample.
        latent: What the encoder made of the samples, shape ``(N, *)``; flattened per sample.
        exponent: ``p``, 1 or 2, see :func:`toll_terms`.

    Returns:
        Both terms, each of shape ``(N,)``, of the kind of the arguments.

    Raises:
        ValueError: If ``latent`` does not have one row per sample, or ``exponent`` is neither 1 nor 2.

    Example:
        >>> import numpy as np
        >>> terms_of_residual(np.array([[3.0, 4.0]]), np.array([[0.6, 0.8]]))
        TollTerms(reconstruction=array([5.]), latent=array([1.]))
    """
    check_option("exponent", exponent, (1, 2))
    if latent.ndim < 2 or latent.shape[0] != residual.shape[0]:
        msg = f"latent must have shape ({residual.shape[0]}, ...), one row per sample, got {tuple(latent.shape)}"
        raise ValueError(msg)
    return TollTerms(norm_per_sample(residual, exponent), norm_per_sample(latent, exponent))


def toll_terms(x: ArrayT, reconstruction: ArrayT, latent: ArrayT, *, exponent: int = 1) -> TollTerms[ArrayT]:
    r"""Per-sample terms :math:`\|x_i - \hat x_i\|_2^p` and :math:`\|z_i\|_2^p`.

    Args:
        x: Inputs, shape ``(N, *)``.
        reconstruction: What the decoder made of them, the same shape.
        latent: What the encoder made of them, shape ``(N, *)``; flattened per sample.
        exponent: ``p``. 1 is the authors' code, 2 the squared norms that the paper's text
            also writes.

    Returns:
        Both terms, each of shape ``(N,)``, at least in single precision. NumPy arrays, with
        which tables are trained and scored, give NumPy arrays.

    Raises:
        ValueError: If the shapes do not belong together or ``exponent`` is neither 1 nor 2.

    Source:
        arXiv 2306.12627, section 3, and the loss in the authors' code.

    Example:
        >>> import torch
        >>> x, x_hat = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
        >>> toll_terms(x, x_hat, torch.tensor([[0.6, 0.8]]))
        TollTerms(reconstruction=tensor([5.]), latent=tensor([1.]))
    """
    if x.shape != reconstruction.shape:
        msg = f"reconstruction must have the shape of x, {tuple(x.shape)}, got {tuple(reconstruction.shape)}"
        raise ValueError(msg)
    return terms_of_residual(x - reconstruction, latent, exponent=exponent)


def toll_score(terms: TollTerms[ValueT], *, beta: Any, term: ScoreTerm = "total") -> ValueT:
    r"""Anomaly score :math:`s_i = \|x_i - \hat x_i\|^p + \beta\|z_i\|^p`, higher is more anomalous.

    Args:
        terms: What :func:`toll_terms` returned, or :func:`in_units` made of it.
        beta: Weight of the latent term, in units of the first term per unit of the second: a number, or an
            array that :func:`relative_pressure` returned.
        term: ``"total"``, or one term alone and unweighted (the ablation of the score).

    Returns:
        Scores of the shape of the terms. The training loss is the mean of the ``"total"``.

    Raises:
        ValueError: If ``beta`` is negative or not finite, or ``term`` is unknown.

    Source:
        arXiv 2306.12627, section 3 (anomaly score).

    Example:
        >>> import torch
        >>> terms = TollTerms(torch.tensor([5.0]), torch.tensor([1.0]))
        >>> toll_score(terms, beta=10.0)
        tensor([15.])
        >>> toll_score(terms, beta=10.0, term="latent")
        tensor([1.])
    """
    check_option("term", term, get_args(ScoreTerm))
    if not isinstance(beta, (Tensor, np.ndarray)):  # what the batch gives needs no check
        beta = check_finite_float("beta", beta, minimum=0)
    if term == "reconstruction":
        return terms.reconstruction
    if term == "latent":
        return terms.latent
    total: ValueT = terms.reconstruction + beta * terms.latent
    return total


def relative_pressure(means: TollTerms[ValueT], strength: float = 1.0) -> ValueT:
    r"""The weight of the latent term that keeps both terms in proportion.

    .. math:: b = s \cdot \mathrm{mean}_i \|r_i\|^p / \mathrm{mean}_i \|z_i\|^p

    With it, the latent term of a batch is always ``strength`` times the reconstruction term. A fixed beta
    fades instead: a network with a BatchNorm behind the latent reconstructs as well from a latent of any scale, so
    training shrinks the latent until :math:`\beta\|z\|` is nothing beside the residual. The weight is a number for
    the step, through which no gradient flows: the step goes along the gradient of
    :math:`\mathrm{mean}\|r\|^p \cdot (\mathrm{mean}\|z\|^p)^s`, and nothing has to be tuned to the scale of the data.

    Args:
        means: Of both terms over the batch: two numbers, or arrays of them.
        strength: ``s``, at least 0.

    Returns:
        The weight, of the kind of the means; 0 where all latents are 0.

    Source:
        This package's; the paper's weight is a constant.

    Example:
        >>> relative_pressure(TollTerms(6.0, 1.5))
        4.0
    """
    reconstruction, latent = (mean.detach() if isinstance(mean, Tensor) else mean for mean in means)
    weight: ValueT = strength * reconstruction / (latent + (latent == 0)) * (latent > 0)
    return weight


def typical(values: ArrayT) -> float:
    """The size of a term on samples taken for normal: its median, which a minority of anomalies does not move.

    Where the median is zero, it is the median of the values that are not, and 1 where there are none.

    Args:
        values: Of the samples, at least 0, shape ``(N,)``, N at least 1.

    Example:
        >>> import numpy as np
        >>> typical(np.array([1.0, 2.0, 90.0])), typical(np.array([0.0, 0.0, 3.0])), typical(np.array([0.0, 0.0]))
        (2.0, 3.0, 1.0)
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    middle = float(np.median(array))
    if middle == 0:
        positive = array[array > 0]
        middle = float(np.median(positive)) if len(positive) else 1.0
    return middle


def typical_terms(terms: TollTerms[ArrayT]) -> TollTerms[float]:
    """What is :func:`typical` of each term on samples taken for normal, each of shape ``(N,)``."""
    return TollTerms(*(typical(term) for term in terms))


def in_units(terms: TollTerms[ValueT], units: TollTerms[Any]) -> TollTerms[ValueT]:
    r"""Each term divided by its unit.

    With units that :func:`typical_terms` measured, both are near 1 on normal samples.
    Terms in these units can be added without a weight that is tied to the scale of the data, and scores of
    several networks can be averaged.

    Example:
        >>> import numpy as np
        >>> in_units(TollTerms(np.array([6.0]), np.array([1.0])), TollTerms(2.0, 4.0))
        TollTerms(reconstruction=array([3.]), latent=array([0.25]))
    """
    return TollTerms(terms.reconstruction / units.reconstruction, terms.latent / units.latent)


def toll_slopes(terms: TollTerms[ArrayT], *, beta: Any, exponent: int = 1) -> tuple[ArrayT, ArrayT]:
    r"""Derivatives of :func:`toll_score` along the residual and the latent, for steps written out.

    The derivative of sample i's score by its reconstruction is :math:`a_i (\hat x_i - x_i)`, by
    its latent :math:`b_i z_i`, with :math:`a_i = 1 / \|\hat x_i - x_i\|` and :math:`b_i = \beta / \|z_i\|` for
    p = 1, and 2 and :math:`2 \beta` for p = 2. As in torch, the derivative of a norm at zero is
    zero: there the slope is finite, and what it multiplies is zero.

    Args:
        terms: What :func:`toll_terms` returned, as tensors or as NumPy arrays.
        beta: Weight of the latent term, a number or an array that :func:`relative_pressure` returned.
        exponent: The one that ``terms`` were made with.

    Returns:
        a and b, of the kind and shape of the terms.

    Example:
        >>> import torch
        >>> toll_slopes(TollTerms(torch.tensor([5.0]), torch.tensor([2.0])), beta=10.0)
        (tensor([0.2000]), tensor([5.]))
    """
    if exponent == 2:
        return terms.reconstruction * 0 + 2, terms.latent * 0 + 2 * beta
    return 1 / (terms.reconstruction + _TINY), beta / (terms.latent + _TINY)


#: Too small to change a norm that is not zero, in single precision as well.
_TINY = 1e-37


class TollLoss(nn.Module):
    r"""Loss :math:`\frac1N\sum_i \|x_i - \hat x_i\|^p + \beta\|z_i\|^p`.

    Args:
        beta: Weight of the latent term. A number, at least 0, as in the paper: it is tied to the scale of the
            data, and the authors use 10 to 1000 with unnormalised norms (section 4, per data set). Or ``"auto"``: in
            each batch the weight that :func:`relative_pressure` gives, which fits every scale and does not fade.
            Default 0.01.
        strength: Of ``"auto"``: how many times as large as the reconstruction term the latent term is kept. With 0
            training is that of beta 0, to the last bit. Default 1; a number as beta needs none.
        exponent: ``p``, 1 (default, the authors' code) or 2.

    Shape:
        ``x`` and ``reconstruction`` ``(N, *)``, ``latent`` ``(N, *)``; a scalar comes out.

    Raises:
        TypeError: If ``beta`` is neither a number nor ``"auto"``, or ``strength`` no number.
        ValueError: If one is negative or not finite, ``strength`` is given for a beta that is a number, or
            ``exponent`` is neither 1 nor 2.

    Example:
        >>> import torch
        >>> x, x_hat, z = torch.ones(2, 4), torch.zeros(2, 4), torch.ones(2, 1)
        >>> TollLoss(beta=10.0)(x, x_hat, z)
        tensor(12.)
        >>> TollLoss("auto", strength=0.5)(x, x_hat, z)  # half as much again as the reconstruction's 2
        tensor(3.)
    """

    def __init__(self, beta: Beta = 0.01, *, strength: float = 1.0, exponent: int = 1) -> None:
        super().__init__()
        check_option("exponent", exponent, (1, 2))
        self.beta = check_beta("beta", beta)
        self.strength = check_finite_float("strength", strength, minimum=0)
        if self.beta != "auto" and self.strength != 1:
            msg = f"strength belongs to beta='auto', got {strength!r} with beta={beta!r}"
            raise ValueError(msg)
        self.exponent = int(exponent)

    @property
    def weight(self) -> float:
        """Weight of the latent term in the score: beta, or the strength, of terms that are :func:`in_units`."""
        return self.strength if self.beta == "auto" else self.beta

    def terms(self, x: ArrayT, reconstruction: ArrayT, latent: ArrayT) -> TollTerms[ArrayT]:
        """Unweighted per-sample terms, see :func:`toll_terms`."""
        return toll_terms(x, reconstruction, latent, exponent=self.exponent)

    def pressure(self, terms: TollTerms[ArrayT]) -> ArrayT | float:
        """Weight of the latent term for a batch with these terms: beta, or the :func:`relative_pressure`.

        Samples lie along the last axis.
        """
        if self.beta != "auto":
            return self.beta
        weight: ArrayT = relative_pressure(TollTerms(*(term.mean(-1)[..., None] for term in terms)), self.strength)
        return weight

    def slopes(self, terms: TollTerms[ArrayT]) -> tuple[ArrayT, ArrayT]:
        """Derivatives of :meth:`losses` along residual and latent, see :func:`toll_slopes`."""
        return toll_slopes(terms, beta=self.pressure(terms), exponent=self.exponent)

    def losses(self, terms: TollTerms[ArrayT]) -> ArrayT:
        """What each sample of a batch adds to its loss; the loss is their mean."""
        return toll_score(terms, beta=self.pressure(terms))

    def of_means(self, means: TollTerms[ValueT]) -> ValueT:
        """The loss of a batch from the means of its terms, without gradients through the weight."""
        beta = relative_pressure(means, self.strength) if self.beta == "auto" else self.beta
        return toll_score(means, beta=beta)

    def score(self, terms: TollTerms[ValueT], term: ScoreTerm = "total") -> ValueT:
        """Per-sample anomaly score, see :func:`toll_score`.

        With ``beta="auto"`` the terms must be :func:`in_units`.
        """
        return toll_score(terms, beta=self.weight, term=term)

    def forward(self, x: Tensor, reconstruction: Tensor, latent: Tensor) -> Tensor:
        """Mean loss of the batch."""
        return self.losses(self.terms(x, reconstruction, latent)).mean()

    def extra_repr(self) -> str:
        """Arguments as the constructor takes them."""
        beta = f"'auto', strength={self.strength:g}" if self.beta == "auto" else f"{self.beta:g}"
        return f"beta={beta}, exponent={self.exponent}"


def check_beta(name: str, value: object) -> Beta:
    """``value`` as a weight: ``"auto"``, or a finite number of at least 0.

    Raises:
        TypeError: If it is neither that word nor a number.
        ValueError: If it is out of range.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        msg = f"{name} must be a number of at least 0 or 'auto', got {value!r}"
        raise TypeError(msg)
    return check_finite_float(name, value, minimum=0)


def check_score_weight(
    score_weight: object, *, beta: object, score_scale: object, default: float = SCORE_WEIGHT
) -> float:
    """The weight of the latent term in the score, of which the loss's weight is only one choice.

    Args:
        score_weight: A number of at least 0, which is the weight; or ``None`` for the default: beta
            where the terms stay as they are, ``default`` where each is in its unit, in which beta is not.
        beta: Of the loss, see :class:`TollLoss`.
        score_scale: ``"none"`` or ``"median"``.
        default: See ``score_weight``; by default :data:`SCORE_WEIGHT`.

    Raises:
        TypeError: If ``score_weight`` or ``beta`` has the wrong type.
        ValueError: If one is out of range, ``score_scale`` is unknown, or there is neither a beta that is a number
            nor a unit nor a ``score_weight``.

    Example:
        >>> check_score_weight(None, beta=10.0, score_scale="none")
        10.0
        >>> check_score_weight(None, beta="auto", score_scale="median")
        0.5
    """
    check_option("score_scale", score_scale, get_args(ScoreScale))
    beta = check_beta("beta", beta)
    if score_weight is not None:
        return check_finite_float("score_weight", score_weight, minimum=0)
    if score_scale == "median":
        return default
    if beta == "auto":
        msg = "score_scale='none' with beta='auto' needs a score_weight: there is no beta to weigh the latent by"
        raise ValueError(msg)
    return beta
