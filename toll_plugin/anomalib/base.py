"""What Toll and PatchToll have in common as models of anomalib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import AUROC, F1Score
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components.base import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from toll_plugin.anomalib.checkpoints import check_archive, restore_components, store_components
from toll_plugin.anomalib.metrics import gathered
from toll_plugin.anomalib.pre_processor import TollPreProcessor
from toll_plugin.core.checks import check_image_size
from toll_plugin.core.modes import evaluating
from toll_plugin.core.objective import TollTerms

__all__ = [
    "TollModuleMixin",
    "is_normal",
    "normal_terms",
    "size_for",
    "size_of",
    "training_batches",
    "validation_batches",
    "write_metadata",
]


if TYPE_CHECKING:
    from anomalib.models.components.base import AnomalibModule as _Base
else:
    _Base = object


class TollModuleMixin(_Base):
    """What Toll and PatchToll share as models of anomalib: metrics, test and predict steps, export, checkpoints.

    A model has it as its first base and ``AnomalibModule`` as its second. It is no subclass of
    ``AnomalibModule`` itself: anomalib's ``list_models`` and ``get_model`` take every direct subclass of that
    class for a model, so they would offer this one, and miss models that have it as their only base.

    The model's ``self.model`` takes images and their names, and returns an ``InferenceBatch`` in evaluation
    mode; ``self._image_size`` is the size of the images it takes.
    """

    @property
    def learning_type(self) -> LearningType:
        """Normal images only."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The default test metrics of anomalib: AUROC and F1 of images, and of pixels where there are masks.

        AUROC is that of the scores as they are. By default it would apply a sigmoid to scores outside
        [0, 1], which makes all scores above 17 equal in single precision.
        """
        return Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_", normalization=None),
                # There is no label to compare where the post-processor is switched off.
                F1Score(fields=["pred_label", "gt_label"], prefix="image_", strict=False),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False, normalization=None),
                F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
            ]
        )

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Predictions of a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image, batch.image_path)._asdict())

    def predict_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Predictions of a batch."""
        return self.test_step(batch, *args, **kwargs)

    def to_onnx(
        self,
        export_root: str | Path,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as anomalib does, at opset 18, the one that torch's exporter writes.

        anomalib asks for opset 14. The exporter's conversion to it fails, prints a traceback, and leaves
        opset 18 anyway. Without a pre-processor nothing resizes images, so the exported model takes them in
        the network's size only. What the post-processor promises is written into the metadata.
        """
        kwargs.setdefault("opset_version", 18)
        if input_size is None and self.pre_processor is None:
            input_size = self._image_size
        path: Path = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        write_metadata(
            path, {f"toll_{name}": value for name, value in getattr(self.post_processor, "promise", {}).items()}
        )
        return path

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load as anomalib does.

        Raises:
            ValueError: If the file is damaged, or what the checkpoint does not store (an encoder
                and a decoder, a pre- or post-processor of a class of your own) is not passed.
        """
        check_archive(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the classes of pre- and post-processor too, which are no hyperparameters."""
        super().on_save_checkpoint(checkpoint)
        store_components(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the classes of pre- and post-processor, then what anomalib restores."""
        restore_components(self, checkpoint)
        super().on_load_checkpoint(checkpoint)


def write_metadata(path: Path, entries: Mapping[str, float]) -> None:
    """Add entries to the metadata of an ONNX file; OpenVINO's conversion keeps them as ``framework`` of its own."""
    if not entries:
        return
    import onnx  # noqa: PLC0415  an extra, which the export has needed already

    model = onnx.load(path, load_external_data=False)
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=f"{value:.6g}")
    onnx.save(model, path)


def size_of(pre_processor: nn.Module | bool) -> tuple[int, int] | None:
    """The size that a pre-processor resizes to, if it does."""
    if isinstance(pre_processor, TollPreProcessor):
        return pre_processor.image_size
    transform = getattr(pre_processor, "transform", None)
    size = (1, 1) if transform is None else tuple(transform(torch.zeros(1, 3, 1, 1)).shape[-2:])
    return None if size == (1, 1) else size


def size_for(image_size: object, pre_processor: nn.Module | bool) -> tuple[int, int]:
    """``image_size`` as a pair; where it is ``None``, the size that a pre-processor resizes to, or 256.

    Raises:
        TypeError: If ``image_size`` is neither an integer nor a pair of integers.
        ValueError: If a side is below one pixel.
    """
    chosen = (size_of(pre_processor) or (256, 256)) if image_size is None else image_size
    return check_image_size("image_size", chosen)


def is_normal(batch: Batch) -> Tensor:
    """Which images of a batch are not labelled anomalous, shape ``(N,)``."""
    if batch.gt_label is None:
        return torch.ones(len(batch.image), dtype=torch.bool, device=batch.image.device)
    normal: Tensor = batch.gt_label == 0
    return normal


@torch.no_grad()
def normal_terms(module: AnomalibModule, terms_of: Callable[[Batch], TollTerms[Tensor]]) -> TollTerms[Tensor] | None:
    """Terms of a fit's normal validation images, or of its training images where there are none.

    Training does not depend on it: the generators are put back, from which a loader draws when it starts.

    Args:
        module: In a fit.
        terms_of: Both terms ``(N,)`` of a batch, pre-processed as for ``validation_step``; the module is in
            evaluation mode.

    Returns:
        Those of all processes; ``None`` if there is no image, or one of the terms is not finite.
    """

    def collect(batches: Iterable[Batch]) -> Tensor:
        found = (torch.stack([*terms_of(batch)])[:, is_normal(batch)] for batch in batches)
        return gathered(torch.cat([torch.empty(2, 0, device=module.device), *found], dim=1).T).T

    with isolate_rng(include_cuda=False), evaluating(module), module.trainer.precision_plugin.val_step_context():
        terms = collect(validation_batches(module))
        if not terms.shape[1]:
            terms = collect(training_batches(module))
    return TollTerms(*terms) if terms.shape[1] and bool(terms.isfinite().all()) else None


def validation_batches(module: AnomalibModule) -> Iterator[Batch]:
    """The trainer's validation batches, on the module's device and pre-processed as for ``validation_step``."""
    loaders = module.trainer.val_dataloaders or []
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    for loader, limit in zip(loaders, module.trainer.num_val_batches, strict=False):
        yield from _batches(module, loader, limit, "on_validation_batch_start")


def training_batches(module: AnomalibModule) -> Iterator[Batch]:
    """The trainer's training batches, the same way, in a new order if the loader shuffles."""
    loader: Any = module.trainer.train_dataloader
    yield from _batches(module, loader, module.trainer.num_training_batches, "on_train_batch_start")


def _batches(module: AnomalibModule, loader: Iterable[Any], limit: float, hook: str) -> Iterator[Batch]:
    trainer = module.trainer
    for index, loaded in enumerate(islice(loader, None if limit == math.inf else int(limit))):
        batch = trainer.strategy.batch_to_device(loaded, module.device)
        if isinstance(module.pre_processor, PreProcessor):
            getattr(module.pre_processor, hook)(trainer, module, batch, index)
        yield batch
