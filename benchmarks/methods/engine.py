"""anomalib's models, and Toll among them, trained by anomalib's own Engine; see :class:`EngineDetector`."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.interfaces import Budget, Detector, Scored, Split
from benchmarks.methods.backbones import local_backbone
from benchmarks.methods.models import MODELS, Task
from benchmarks.methods.rotations import at_angles
from benchmarks.quiet import apart, device, quiet_engine


class EngineDetector(Detector):
    """One of :data:`MODELS`, trained on one device by anomalib's Engine, see :func:`benchmarks.quiet.device`.

    Its scores are the model's own, before anomalib's normalisation, which clips to [0, 1]. Images
    are resized as in training, with antialiasing.

    Args:
        name: Of :data:`MODELS`.
        budget: Epochs, and the weights of a backbone; random ones only where it says so.
        seed: Of weights and batches; global generators are left as they were.
        arguments: Of the model's constructor, before those in :data:`MODELS`; and ``image_size``.
        rotations: At how many angles each training image is seen, as methods for few images do. Default 1.

    Raises:
        FileNotFoundError: If the file of the backbone's weights does not exist.
        TypeError: If the model takes no such argument.
        ValueError: If there is no such model, or it needs weights that the budget denies.
    """

    def __init__(self, name: str, budget: Budget, seed: int, rotations: int = 1, **arguments: Any) -> None:
        if name not in MODELS:
            msg = f"name must be one of {', '.join(MODELS)}, got {name!r}"
            raise ValueError(msg)
        self._name, self._spec, self._budget, self._seed = name, MODELS[name], budget, seed
        self._kind, self._arguments, self._rotations = _kind(self._spec.kind), arguments, rotations
        known = {"image_size", *_parameters(self._kind)}
        if unknown := set(arguments) - known:
            msg = f"arguments of {name} must be among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}"
            raise TypeError(msg)
        if name == "EfficientAd" and not budget.pretrained:
            msg = "EfficientAd learns from a pretrained teacher: it has no version with pretrained=False"
            raise ValueError(msg)
        self._backbone = arguments.get("backbone", budget.backbone) if self._spec.backbone else None
        if self._local and not budget.weights.is_file():
            msg = f"weights must be a file of the weights of {self._backbone}, got {budget.weights}, which is none"
            raise FileNotFoundError(msg)
        self._size: tuple[int, int] = (0, 0)
        self._epochs = 0
        self.model: Any = None

    @property
    def _local(self) -> bool:
        """Whether the file of weights is this backbone's."""
        budget = self._budget
        return budget.pretrained and budget.weights is not None and self._backbone == budget.backbone

    def fit(self, split: Split) -> None:
        """Build and train."""
        from anomalib.callbacks import ModelCheckpoint
        from lightning.pytorch import seed_everything

        split = split._replace(train=at_angles(split.train, self._rotations))
        batches = math.ceil(len(split.train) / self._spec.batch_size)
        epochs = self._budget.max_epochs or max(self._spec.epochs, math.ceil(self._spec.steps / batches))
        with TemporaryDirectory() as folder, apart():
            seed_everything(self._seed, verbose=False)
            self.model = self._build(split.train, folder)
            engine = quiet_engine(
                folder,
                epochs,
                # Toll keeps its best weights in memory; a file per epoch would be deleted with the folder.
                callbacks=[ModelCheckpoint(save_top_k=0)],
                # Only Toll stops by it; EfficientAd needs it once, for quantiles.
                check_val_every_n_epoch=1 if self._name == "Toll" else epochs,
            )
            engine.fit(self.model, datamodule=_data_module(split, self._spec.batch_size))
        self._epochs = engine.trainer.current_epoch
        self.model.eval()

    def _build(self, images: Tensor, folder: str) -> Any:
        from toll_plugin.core.checks import check_image_size

        count, channels, height, width = images.shape
        arguments = dict(self._arguments)
        size = arguments.pop("image_size", None)
        self._size = self._spec.size(height, width) if size is None else check_image_size("image_size", size)
        weights = self._budget.weights if self._local else None
        task = Task(
            self._size, count, channels, self._backbone or "", weights, self._budget.pretrained, self._seed, folder
        )
        with self._weights():
            arguments = {**self._spec.arguments(task), **arguments}
            if "image_size" not in arguments:
                arguments["pre_processor"] = _scaled_for(self._backbone, self._kind.configure_pre_processor(self._size))
            return self._kind(**arguments, evaluator=False, visualizer=False)

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        """Within the block backbones have the file's weights, or random ones, if the budget says so.

        Some models have no argument that keeps timm from downloading, and CFA asks torchvision,
        whose networks have the same weights by the same names.
        """
        import timm
        from anomalib.models.components import TimmFeatureExtractor
        from anomalib.models.image.cfa import torch_model as cfa

        if self._budget.pretrained and not self._local:
            yield
            return
        create = timm.create_model

        def create_randomly(*names: str, pretrained: bool = False, **arguments: Any) -> Any:
            del pretrained
            return create(*names, pretrained=False, **arguments)

        random_backbone = mock.patch.object(timm, "create_model", create_randomly)
        through_timm = mock.patch.object(cfa, "get_feature_extractor", lambda *of: TimmFeatureExtractor(*of).eval())
        with local_backbone(self._backbone, self._budget.weights) if self._local else random_backbone, through_timm:
            try:
                yield
            except KeyError as error:
                msg = f"{self._budget.weights} must have all weights that {self._name} needs, but does not have {error}"
                raise ValueError(msg) from error

    def score(self, samples: Tensor) -> Scored:
        """In batches; a sample's score does not depend on the others."""
        data, found = _dataset(samples), []
        self.model.to(device())  # the Engine leaves it on the CPU
        with torch.no_grad():
            for start in range(0, len(samples), self._spec.batch_size):
                images = data.__getitems__(range(start, min(start + self._spec.batch_size, len(samples)))).image.to(
                    device()
                )
                # Not the pre-processor itself, which is for exported models and resizes without antialiasing.
                said = self._spec.predict(self.model, self.model.pre_processor.transform(images))
                found.append({key: value.as_subclass(Tensor).cpu() for key, value in said.items() if value is not None})
        joined = {key: torch.cat([batch[key] for batch in found]) for key in found[0]}
        maps = joined.pop("maps", None)
        terms = {key: value.double().reshape(-1).numpy() for key, value in joined.items()}
        return Scored(terms.pop("scores"), terms, None if maps is None else maps.reshape(-1, *maps.shape[-2:]).numpy())

    def size(self) -> int:
        """Of parameters and buffers, without GANomaly's discriminator, which does not score."""
        state = self.model.model.state_dict().items()
        return sum(value.nbytes for name, value in state if not name.startswith("discriminator."))

    def facts(self) -> dict[str, Any]:
        """Epochs, parameters, the image size, and where a backbone is, its weights."""
        weights = None
        if self._backbone is not None:
            hub = "torchvision" if self._name == "CFA" else "timm"
            weights = f"imagenet, {'local file' if self._local else hub}" if self._budget.pretrained else "random"
        return {
            "epochs": self._epochs,
            "parameters": sum(p.numel() for p in self.model.model.parameters()),
            "image_size": list(self._size),
            "backbone": self._backbone,
            "pretrained": "imagenet, anomalib" if self._name == "EfficientAd" else weights,
            **({} if device() == "cpu" else {"device": torch.cuda.get_device_name(device())}),
        }


def _scaled_for(backbone: str | None, pre_processor: Any) -> Any:
    """Scale by the mean and deviation that a backbone was pretrained with, where anomalib takes ImageNet's for all."""
    import timm
    from torchvision.transforms.v2 import Normalize

    known = timm.get_pretrained_cfg(backbone) if backbone else None
    for step in getattr(pre_processor.transform, "transforms", ()) if known else ():
        if isinstance(step, Normalize):
            step.mean, step.std = list(known.mean), list(known.std)
    return pre_processor


def _kind(name: str) -> Any:
    module, _, name = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anomalib.models

        import toll_plugin.anomalib as adapter

    if module:
        return getattr(import_module(module), name)
    return getattr(adapter, name, None) or getattr(anomalib.models, name)


def _parameters(kind: type) -> set[str]:
    """Names of a constructor's arguments; of a mixin, which hands on what it does not know, also its host's."""
    found: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def _dataset(images: Tensor) -> Any:
    from toll_plugin.anomalib.datasets import TensorImageDataset

    images = images if images.dtype == torch.uint8 else images.float()
    return TensorImageDataset(images, torch.zeros(len(images), dtype=torch.bool))


def _data_module(split: Split, batch_size: int) -> Any:
    from anomalib.data import AnomalibDataModule

    class SplitData(AnomalibDataModule):
        """Normal images to train and to validate with."""

        def _setup(self, _stage: str | None = None) -> None:
            self.train_data, self.val_data = _dataset(split.train), _dataset(split.validation)

        def _create_test_split(self) -> None:
            """Nothing is tested here."""

        def _create_val_split(self) -> None:
            """It is given."""

    return SplitData(train_batch_size=batch_size, eval_batch_size=batch_size, num_workers=0)
