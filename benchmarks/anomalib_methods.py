"""anomalib's models, and Toll among them, trained by anomalib's own Engine; see :class:`EngineDetector`."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.backbones import local_backbone
from benchmarks.interfaces import Budget, Detector, Scored, Split

#: Patches that PatchCore keeps at most: anomalib's search takes as many passes over all patches.
PATCHES = 2000


class Task(NamedTuple):
    """What a model is built for: the size it sees, the training images, their channels, a backbone and a seed."""

    size: tuple[int, int]
    images: int
    channels: int
    backbone: str
    seed: int


class Model(NamedTuple):
    """How a model is trained where nobody says otherwise.

    Attributes:
        kind: Its class in ``anomalib.models``.
        arguments: Of its constructor, beyond its defaults.
        predict: What it says of a batch, before any mapping of scores.
        backbone: Whether it needs a pretrained network of the experiment's choice.
        size: What it sees of images ``(height, width)``.
        epochs: At least.
        steps: Of its optimiser, at least; models that take one pass over the data have none.
        batch_size: Of training and scoring.
    """

    kind: str
    arguments: Callable[[Task], dict[str, Any]]
    predict: Callable[[Any, Tensor], dict[str, Tensor | None]]
    backbone: bool = True
    size: Callable[[int, int], tuple[int, int]] = lambda height, width: _square(max(height, width))
    epochs: int = 1
    steps: int = 0
    batch_size: int = 32


def _square(side: int) -> tuple[int, int]:
    """A multiple of 32, which backbones' strides need, from 64 to 256, anomalib's default."""
    side = 32 * max(2, min(round(side / 32), 8))
    return side, side


def _backbone(task: Task) -> dict[str, Any]:
    return {"backbone": task.backbone}


def _patchcore(task: Task) -> dict[str, Any]:
    """anomalib's tenth of the patches, or fewer if that is more than two cores can search for."""
    patches = task.images * task.size[0] * task.size[1] // 64
    return {**_backbone(task), "coreset_sampling_ratio": min(0.1, PATCHES / patches)}


def _fre(task: Task) -> dict[str, Any]:
    """The third layer's features, averaged over 2x2: their number is an argument."""
    import timm

    layers = timm.create_model(task.backbone, features_only=True).feature_info.get_dicts()
    layer = next(layer for layer in layers if layer["module"] == "layer3")
    stride = 2 * layer["reduction"]
    return {
        **_backbone(task),
        "layer": "layer3",
        "input_dim": layer["num_chs"] * (task.size[0] // stride) * (task.size[1] // stride),
    }


def _toll(task: Task) -> dict[str, Any]:
    return {"image_size": task.size, "in_channels": task.channels, "seed": task.seed}


def _predict(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    found = model.model(images)
    return {"scores": found.pred_score, "maps": found.anomaly_map}


def _predict_toll(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    shown, reconstruction, terms = model.model.reconstruct(images)
    found = model.model.predict(shown, reconstruction, terms)
    return {"scores": found.pred_score, "maps": found.anomaly_map, **terms._asdict()}


def _predict_dfkde(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    """Minus the logarithm of its density, which itself underflows: all images far away would tie."""
    kde = model.model.classifier
    features = kde.pca_model.transform(model.model.get_features(images))
    features, _ = kde.pre_process(features, kde.max_length)
    apart = torch.cdist((features @ kde.kde_model.bw_transform).double(), kde.kde_model.dataset.double())
    return {"scores": -torch.logsumexp(-apart.square() / 2, dim=1)}


#: By the names of the field. All backbones are used up to their third layer, also by DFKDE, whose
#: default is the fourth. Steps are what one core does in about two minutes on a few hundred images of
#: 128x128 pixels, far fewer than the papers'; ``max_epochs`` of a budget grants more.
MODELS: dict[str, Model] = {
    # Its own early stopping ends it; one-channel images stay so, and none is resized.
    "Toll": Model("Toll", _toll, _predict_toll, False, lambda height, width: (height, width), epochs=200),
    "PatchCore": Model("Patchcore", _patchcore, _predict),
    "PaDiM": Model("Padim", _backbone, _predict),
    "DFM": Model("Dfm", lambda task: {**_backbone(task), "layer": "layer3"}, _predict),
    "DFKDE": Model("Dfkde", lambda task: {**_backbone(task), "layers": ["layer3"]}, _predict_dfkde),
    "FRE": Model("Fre", _fre, _predict, steps=200),
    "STFPM": Model("Stfpm", _backbone, _predict, steps=100),
    "ReverseDistillation": Model("ReverseDistillation", _backbone, _predict, steps=100, batch_size=16),
    "CFA": Model("Cfa", _backbone, _predict, steps=100, batch_size=8),
    "FastFlow": Model("Fastflow", _backbone, _predict, steps=50),
    "GANomaly": Model("Ganomaly", lambda _: {"n_features": 32}, _predict, False, lambda *_: (32, 32), steps=300),
    # Downloads its teacher, and ImageNette unless `imagenet_dir` has it. A step, of one image, takes seconds.
    "EfficientAd": Model("EfficientAd", lambda _: {}, _predict, False, lambda *_: (256, 256), steps=500, batch_size=1),
}


class EngineDetector(Detector):
    """One of :data:`MODELS`, trained on one CPU device by anomalib's Engine.

    Its scores are the model's own, before anomalib's normalisation, which clips to [0, 1]. Images
    are resized as in training, with antialiasing.

    Args:
        name: Of :data:`MODELS`.
        budget: Epochs, and the weights of a backbone; random ones only where it says so.
        seed: Of weights and batches; global generators are left as they were.
        arguments: Of the model's constructor, before those in :data:`MODELS`; and ``image_size``.

    Raises:
        FileNotFoundError: If the file of the backbone's weights does not exist.
        TypeError: If the model takes no such argument.
        ValueError: If there is no such model, or it needs weights that the budget denies.
    """

    def __init__(self, name: str, budget: Budget, seed: int, **arguments: Any) -> None:
        if name not in MODELS:
            msg = f"name must be one of {', '.join(MODELS)}, got {name!r}"
            raise ValueError(msg)
        self._name, self._spec, self._budget, self._seed = name, MODELS[name], budget, seed
        self._kind, self._arguments = _kind(self._spec.kind), arguments
        known = {"image_size", *inspect.signature(self._kind).parameters}
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
        self._model: Any = None

    @property
    def _local(self) -> bool:
        """Whether the file of weights is this backbone's."""
        budget = self._budget
        return budget.pretrained and budget.weights is not None and self._backbone == budget.backbone

    def fit(self, split: Split) -> None:
        """Build and train."""
        from anomalib.callbacks import ModelCheckpoint
        from anomalib.engine import Engine
        from lightning.pytorch import seed_everything

        batches = math.ceil(len(split.train) / self._spec.batch_size)
        epochs = self._budget.max_epochs or max(self._spec.epochs, math.ceil(self._spec.steps / batches))
        with _apart() as folder:
            seed_everything(self._seed, verbose=False)
            self._model = self._build(split.train)
            engine = Engine(
                default_root_dir=folder,
                # Toll keeps its best weights in memory; a file per epoch would be deleted with the folder.
                callbacks=[ModelCheckpoint(save_top_k=0)],
                max_epochs=epochs,
                # Only Toll stops by it; EfficientAd needs it once, for quantiles.
                check_val_every_n_epoch=1 if self._name == "Toll" else epochs,
                accelerator="cpu",
                devices=1,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            engine.fit(self._model, datamodule=_data_module(split, self._spec.batch_size))
        self._epochs = engine.trainer.current_epoch
        self._model.eval()

    def _build(self, images: Tensor) -> Any:
        from toll_plugin.core.checks import check_image_size

        count, channels, height, width = images.shape
        arguments = dict(self._arguments)
        size = arguments.pop("image_size", None)
        self._size = self._spec.size(height, width) if size is None else check_image_size("image_size", size)
        task = Task(self._size, count, channels, self._backbone or "", self._seed)
        with self._weights():
            arguments = {**self._spec.arguments(task), **arguments}
            if "image_size" not in arguments:
                arguments["pre_processor"] = self._kind.configure_pre_processor(self._size)
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
        with torch.no_grad():
            for start in range(0, len(samples), self._spec.batch_size):
                images = data.__getitems__(range(start, min(start + self._spec.batch_size, len(samples)))).image
                # Not the pre-processor itself, which is for exported models and resizes without antialiasing.
                said = self._spec.predict(self._model, self._model.pre_processor.transform(images))
                found.append({key: value.as_subclass(Tensor) for key, value in said.items() if value is not None})
        joined = {key: torch.cat([batch[key] for batch in found]) for key in found[0]}
        maps = joined.pop("maps", None)
        terms = {key: value.double().reshape(-1).numpy() for key, value in joined.items()}
        return Scored(terms.pop("scores"), terms, None if maps is None else maps.reshape(-1, *maps.shape[-2:]).numpy())

    def size(self) -> int:
        """Of parameters and buffers, without GANomaly's discriminator, which does not score."""
        state = self._model.model.state_dict().items()
        return sum(value.nbytes for name, value in state if not name.startswith("discriminator."))

    def facts(self) -> dict[str, Any]:
        """Epochs, parameters, the image size, and where a backbone is, its weights."""
        weights = None
        if self._backbone is not None:
            hub = "torchvision" if self._name == "CFA" else "timm"
            weights = f"imagenet, {'local file' if self._local else hub}" if self._budget.pretrained else "random"
        return {
            "epochs": self._epochs,
            "parameters": sum(p.numel() for p in self._model.model.parameters()),
            "image_size": list(self._size),
            "backbone": self._backbone,
            "pretrained": "imagenet, anomalib" if self._name == "EfficientAd" else weights,
        }


def _kind(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anomalib.models

        import toll_plugin.anomalib  # noqa: F401  makes Toll an attribute of the above

    return getattr(anomalib.models, name)


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


@contextlib.contextmanager
def _apart() -> Iterator[str]:
    """A folder for the block, which prints nothing and leaves generators, environment and log levels as they were."""
    states, disabled = (random.getstate(), np.random.get_state()), logging.root.manager.disable  # noqa: NPY002
    logging.disable(logging.WARNING)
    try:
        with (
            TemporaryDirectory() as folder,
            mock.patch.dict(os.environ),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield folder
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        logging.disable(disabled)
