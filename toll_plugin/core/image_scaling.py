"""How pixels in [0, 1] are scaled before the network sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toll_plugin.core.checks import check_finite_float, check_option

__all__ = [
    "MEASURED",
    "SCALINGS",
    "ImageScaling",
    "Statistics",
    "contrast_normalise",
    "contrast_range",
    "named_statistics",
    "standard_range",
]

#: Mean and standard deviation of each channel.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

#: Those of each scaling, of one grey or three colour channels.
_STATISTICS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "paper_mnist": ((0.1307,), (0.3081,)),
    "paper_fashion_mnist": ((0.2860,), (0.3530,)),
}

#: Those that are ``(x - a) / (b - a)`` with a range ``(a, b)`` that is measured on the training images.
MEASURED = ("standard", "paper_cifar")

SCALINGS = ("unit", "imagenet", "standard", "paper_mnist", "paper_fashion_mnist", "paper_cifar")


def contrast_normalise(images: Tensor) -> Tensor:
    """Subtract each image's mean and divide by its mean absolute value.

    Args:
        images: Shape ``(N, C, H, W)``, any unit: the result does not depend on it.

    Returns:
        The same shape, with mean 0 and mean absolute value 1 per image; a constant image
        becomes zeros.

    Source:
        Global contrast normalisation with the L1 norm, as the authors prepare the CIFARs.

    Example:
        >>> import torch
        >>> contrast_normalise(torch.tensor([[[[0.0, 2.0]]]]))
        tensor([[[[-1.,  1.]]]])
    """
    centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
    spread = centred.abs().mean(dim=(1, 2, 3), keepdim=True)
    return centred / torch.where(spread > 1e-6 * images.abs().amax(dim=(1, 2, 3), keepdim=True), spread, torch.inf)


def contrast_range(images: Tensor) -> tuple[float, float]:
    """Smallest and largest contrast-normalised pixel, the ``scaling_range`` of ``"paper_cifar"``.

    Args:
        images: The normal class's training images, shape ``(N, C, H, W)``.

    Example:
        >>> import torch
        >>> contrast_range(torch.tensor([[[[0.0, 2.0]]]]))
        (-1.0, 1.0)
    """
    scaled = contrast_normalise(images)
    return float(scaled.min()), float(scaled.max())


def standard_range(count: float, total: float, squares: float) -> tuple[float, float]:
    """Mean of all pixels and one standard deviation more, the ``scaling_range`` of ``"standard"``.

    Args:
        count: How many values there are in all channels of the training images.
        total: Their sum.
        squares: The sum of their squares. Where they do not vary, the deviation is taken for 1.

    Example:
        >>> standard_range(2, 2.0, 4.0)  # the values 0 and 2
        (1.0, 2.0)
    """
    mean = total / count
    variance = squares / count - mean**2
    return mean, mean + (variance**0.5 if variance > 1e-12 else 1.0)


class ImageScaling(nn.Module):
    r"""Scale images in [0, 1].

    Args:
        name: ``"unit"`` leaves them; ``"imagenet"``, ``"paper_mnist"`` and
            ``"paper_fashion_mnist"`` subtract a mean and divide by a standard deviation, as does a pair
            ``(means, deviations)`` of numbers of your own, one per channel;
            ``"standard"`` is :math:`(x - a) / (b - a)`, and ``"paper_cifar"`` is
            :func:`contrast_normalise` followed by the same.
        value_range: ``(a, b)``, what becomes 0 and what becomes 1. Of ``"standard"``: the mean of all pixels of the
            training images, and one standard deviation more (:func:`standard_range`). Of ``"paper_cifar"``:
            :func:`contrast_range` of the training images. ``None`` leaves it open: ``"standard"`` then leaves
            images as they are, and ``"paper_cifar"`` can scale nothing until it is set.

    Shape:
        ``(N, C, H, W)`` to the same.

    Raises:
        TypeError: If ``name`` is neither a string nor two sequences of numbers.
        ValueError: If the name is unknown, a deviation not positive, or ``value_range`` is misplaced or empty.
        RuntimeError: When scaling by ``"paper_cifar"`` before its range is known.

    Example:
        >>> import torch
        >>> ImageScaling("paper_mnist")(torch.full((1, 1, 1, 1), 0.1307))
        tensor([[[[0.]]]])
        >>> ImageScaling(((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))(torch.zeros(1, 3, 1, 1)).flatten()
        tensor([-1., -1., -1.])
    """

    name: str | Statistics

    def __init__(self, name: str | Statistics = "unit", value_range: Sequence[float] | None = None) -> None:
        super().__init__()
        if isinstance(name, str):
            check_option("scaling", name, SCALINGS)
        else:
            name = _own_statistics(name)
        if value_range is not None and name not in MEASURED:
            msg = (
                f"scaling_range must be given with scaling='standard' or 'paper_cifar' only, "
                f"got scaling={name!r} and scaling_range={value_range!r}"
            )
            raise ValueError(msg)
        if value_range is not None:
            if len(value_range) != 2:
                msg = f"scaling_range must be a pair (minimum, maximum), got {value_range!r}"
                raise ValueError(msg)
            low = check_finite_float("scaling_range[0]", value_range[0])
            check_finite_float("scaling_range[1]", value_range[1], minimum=low, exclusive=True)
        self.name = name
        self.value_range = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        mean, deviation = _STATISTICS.get(name, ((0.0,), (1.0,))) if isinstance(name, str) else name
        # Constants of the name, so not state: a checkpoint stores the name.
        self.register_buffer("_mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("_deviation", torch.tensor(deviation).reshape(1, -1, 1, 1), persistent=False)
        self._mean: Tensor
        self._deviation: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Scale a batch."""
        if self.name in MEASURED:
            if self.value_range is None:
                if self.name == "standard":
                    return images
                msg = "scaling_range of scaling='paper_cifar' is not known yet: fit the model, or pass it"
                raise RuntimeError(msg)
            low, high = self.value_range
            values = contrast_normalise(images) if self.name == "paper_cifar" else images
            return (values - low) / (high - low)
        if self.name == "unit":
            return images
        return (images - self._mean) / self._deviation

    def extra_repr(self) -> str:
        """Arguments as the constructor takes them."""
        return f"{self.name!r}" + ("" if self.value_range is None else f", {self.value_range}")


def named_statistics(mean: Sequence[float], deviation: Sequence[float]) -> str | Statistics:
    """The name of the scaling that subtracts a mean and divides by a deviation, or both where none has a name."""
    statistics = _own_statistics((mean, deviation))
    return next((name for name, known in _STATISTICS.items() if known == statistics), statistics)


def _own_statistics(given: object) -> Statistics:
    if not isinstance(given, Sequence) or len(given) != 2 or len({len(numbers) for numbers in given}) != 1:
        msg = f"scaling must be a name, or a mean and a deviation of each channel, got {given!r}"
        raise TypeError(msg)
    mean = tuple(check_finite_float(f"scaling[0][{i}]", number) for i, number in enumerate(given[0]))
    deviation = tuple(
        check_finite_float(f"scaling[1][{i}]", number, minimum=0, exclusive=True) for i, number in enumerate(given[1])
    )
    return mean, deviation
