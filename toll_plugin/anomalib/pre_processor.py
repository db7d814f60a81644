"""Resizing and scaling that are the same in training, a checkpoint and an export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import Compose, Resize, Transform
from torchvision.transforms.v2.functional import is_pure_tensor

from toll_plugin.anomalib.toll.torch_model import check_finite
from toll_plugin.core.checks import check_image_size
from toll_plugin.core.image_scaling import MEASURED, ImageScaling, Statistics, contrast_range, standard_range
from toll_plugin.core.resize import resize_matrix

__all__ = ["TollPreProcessor"]

_logger = logging.getLogger(__name__)


class _Scale(Transform):
    """:class:`ImageScaling` as a torchvision transform: images only, masks pass."""

    _transformed_types = (tv_tensors.Image, is_pure_tensor)

    def __init__(self, scaling: ImageScaling) -> None:
        super().__init__()
        self.scaling = scaling

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        del params
        image = inpt.as_subclass(Tensor)
        scaled: Tensor = self.scaling(image) if image.ndim == 4 else self.scaling(image[None])[0]
        return tv_tensors.wrap(scaled, like=inpt) if isinstance(inpt, tv_tensors.Image) else scaled


class _ExportableResize(nn.Module):
    """Bilinear resizing with antialiasing, as two matrix products.

    torchvision's antialiased resize has no counterpart in the exporters, so anomalib drops the
    antialiasing there and an exported model sees another image than the trained one. This gives
    torchvision's values from operations that every exporter knows.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if not torch.compiler.is_compiling() and (height, width) == self.size:
            return images
        rows = resize_matrix(height, self.size[0], images, antialias=True)
        columns = resize_matrix(width, self.size[1], images, antialias=True)
        return rows @ images @ columns.T


class TollPreProcessor(PreProcessor):
    """Resize to ``image_size`` and scale, with the same result wherever the model runs.

    Args:
        image_size: ``(height, width)`` in pixels, or one integer.
        scaling: Name of an :class:`toll_plugin.core.ImageScaling`, or the mean and the deviation of each channel.
        scaling_range: Its ``value_range``. ``"standard"`` and ``"paper_cifar"`` without one get that of the
            training images when a fit begins.

    Raises:
        TypeError: If ``image_size`` is no size.
        ValueError: If the scaling is unknown or its range misplaced.

    Example:
        >>> import torch
        >>> TollPreProcessor(16, "imagenet")(torch.rand(2, 3, 40, 30)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = (256, 256),
        scaling: str | Statistics = "unit",
        scaling_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self._configure(image_size, scaling, scaling_range)

    def _configure(
        self,
        image_size: int | Sequence[int],
        scaling: str | Statistics,
        scaling_range: Sequence[float] | None,
    ) -> None:
        size = check_image_size("image_size", image_size)
        scale = ImageScaling(scaling, scaling_range)
        self.image_size = size
        self.scaling = scale.name
        self.scaling_range = scale.value_range
        self.transform = Compose([Resize(list(size), antialias=True), _Scale(scale)])
        self.export_transform = nn.Sequential(_ExportableResize(size), scale)

    @property
    def is_open(self) -> bool:
        """Whether the scaling still needs its range."""
        return self.scaling in MEASURED and self.scaling_range is None

    def measure(self, images: Tensor) -> tuple[float, float, float]:
        """What a batch adds to the range.

        Of ``"paper_cifar"`` minus its smallest and its largest value, see :func:`contrast_range`, and 0; of
        ``"standard"`` the number of its values, their sum and the sum of their squares. Those of several batches
        are joined by the maximum and by the sum.
        """
        resized: Tensor = self.transform.transforms[0](images)
        values = resized.as_subclass(Tensor).cpu().double()  # some accelerators have no double
        if self.scaling == "paper_cifar":
            low, high = contrast_range(values)
            return -low, high, 0.0
        return float(values.numel()), float(values.sum()), float(values.square().sum())

    def _measure(self, batch: Batch) -> tuple[float, float, float]:
        check_finite(batch.image, batch.image_path)
        return self.measure(batch.image)

    def scale_by(self, scaling: str | Statistics, scaling_range: Sequence[float] | None = None) -> None:
        """Scale in another way; the size stays."""
        self._configure(self.image_size, scaling, scaling_range)

    def close(self, scaling_range: Sequence[float]) -> None:
        """Set the range that was left open."""
        self.scale_by(self.scaling, scaling_range)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the range on the training images if it was left open.

        Raises:
            ValueError: If an image is not finite; it names it.
        """
        if not self.is_open:
            return
        trainer.fit_loop.setup_data()  # before any batch is scaled, so before Lightning does it
        batches: Any = trainer.train_dataloader
        # A loader draws from the global generator when it starts: what follows must not depend on the scaling.
        with isolate_rng(include_cuda=False):
            found = torch.tensor([self._measure(batch) for batch in batches], dtype=torch.float64)
        paper = self.scaling == "paper_cifar"
        own = found.amax(dim=0) if paper else found.sum(dim=0)
        # Each process has its share of the images. Some accelerators have no double, so it goes in two floats.
        head = own.float()
        parts: Any = torch.stack([head, (own - head.double()).float()]).to(trainer.strategy.root_device)
        gathered: Any = pl_module.all_gather(parts)
        of_all = gathered.reshape(-1, 2, 3).cpu().double().sum(dim=1)
        if paper:
            negative_low, high, _ = of_all.amax(dim=0).tolist()
            self.close((-negative_low, high))
        else:
            self.close(standard_range(*of_all.sum(dim=0).tolist()))
        _logger.info("scaling_range of the training images: %s", self.scaling_range)

    def checkpoint_config(self) -> dict[str, Any]:
        """Plain data from which :meth:`load_checkpoint_config` restores this object."""
        value_range = None if self.scaling_range is None else list(self.scaling_range)
        return {"image_size": list(self.image_size), "scaling": self.scaling, "scaling_range": value_range}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` returned."""
        self._configure(config["image_size"], config["scaling"], config["scaling_range"])
