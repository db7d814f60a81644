"""How each of anomalib's models is trained where nobody says otherwise, Toll among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Patches that PatchCore keeps at most: anomalib's search takes as many passes over all patches.
PATCHES = 2000


class Task(NamedTuple):
    """What a model is built for.

    Attributes:
        size: It sees, ``(height, width)``.
        images: To train on.
        channels: Of theirs.
        backbone: Its name, empty for models without.
        weights: File of the backbone's weights, ``None`` for timm's or random ones.
        pretrained: Whether the backbone has any.
        seed: Of the run.
        folder: Empty, and there until training ends.
    """

    size: tuple[int, int]
    images: int
    channels: int
    backbone: str
    weights: Path | None
    pretrained: bool
    seed: int
    folder: str


class Model(NamedTuple):
    """How a model is trained where nobody says otherwise.

    Attributes:
        kind: Its class in ``anomalib.models`` or this package, or the path of another.
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


def _stages(backbone: str, *strides: int) -> list[dict[str, Any]]:
    """The stages of a backbone that shrink images by these factors, as timm describes them; of a ResNet 4 is layer1."""
    import timm

    with torch.random.fork_rng(devices=[]):  # it draws weights, which nobody needs
        stages = timm.create_model(backbone, features_only=True).feature_info.get_dicts()
    found = {stage["reduction"]: stage for stage in stages}
    return [found[stride] for stride in strides]


def _at(*strides: int, one: bool = False) -> Callable[[Task], dict[str, Any]]:
    """The backbone, and its layers of these strides, or its ``layer``."""

    def arguments(task: Task) -> dict[str, Any]:
        names = [stage["module"] for stage in _stages(task.backbone, *strides)]
        return {**_backbone(task), **({"layer": names[0]} if one else {"layers": names})}

    return arguments


def _padim(task: Task) -> dict[str, Any]:
    """anomalib knows how many features to draw for two backbones only."""
    return {**_at(4, 8, 16)(task), "n_features": 550 if task.backbone == "wide_resnet50_2" else 100}


def _patchcore(task: Task) -> dict[str, Any]:
    """anomalib's tenth of the patches, or fewer if that is more than two cores can search for."""
    patches = task.images * task.size[0] * task.size[1] // 64
    return {**_at(8, 16)(task), "coreset_sampling_ratio": min(0.1, PATCHES / patches)}


def _fre(task: Task) -> dict[str, Any]:
    """The features of stride 16, averaged over 2x2: their number is an argument."""
    (stage,) = _stages(task.backbone, 16)
    cells = (task.size[0] // 32) * (task.size[1] // 32)
    return {**_backbone(task), "layer": stage["module"], "input_dim": stage["num_chs"] * cells}


def _toll(task: Task) -> dict[str, Any]:
    return {"image_size": task.size, "in_channels": task.channels, "seed": task.seed}


def _patch_toll(task: Task) -> dict[str, Any]:
    weights = str(task.weights) if task.weights is not None and task.pretrained else None
    return {
        **_at(4, 8, 16)(task),
        "weights_path": weights,
        "pre_trained": task.pretrained,
        "image_size": task.size,
        "seed": task.seed,
    }


def _predict(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    found = model.model(images)
    return {"scores": found.pred_score, "maps": found.anomaly_map}


def _predict_toll(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    made = model.model.reconstruct(images)
    found, terms = model.model.predict(made), made.terms
    return {"scores": found.pred_score, "maps": found.anomaly_map, **terms._asdict()}


def _predict_patch_toll(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    """Of each term of a position the largest value, and both terms of the image."""
    patches, size = model.model.patches, images.shape[-2:]
    features = model.model.embed(images)
    terms, score = patches.terms(features), model.model.image_score
    maps = model.model.map_of(patches.score_of(terms), size)
    largest = {name: term.flatten(1).amax(dim=1) for name, term in terms._asdict().items()}
    whole = score.terms(maps, features)
    return {"scores": score.score_of(whole), "maps": maps, **largest, **whole._asdict()}


def _predict_dfkde(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    """Minus the logarithm of its density, which itself underflows: all images far away would tie."""
    kde = model.model.classifier
    features = kde.pca_model.transform(model.model.get_features(images))
    features, _ = kde.pre_process(features, kde.max_length)
    apart = torch.cdist((features @ kde.kde_model.bw_transform).double(), kde.kde_model.dataset.double())
    return {"scores": -torch.logsumexp(-apart.square() / 2, dim=1)}


def _predict_collapsed(model: Any, images: Tensor) -> dict[str, Tensor | None]:
    """The score with its term, the host's own, and the norms of the latent, which are what differs."""
    from anomalib.data import ImageBatch

    own, scores = model.model(images), model.predict_step(ImageBatch(image=images), 0).pred_score
    host = own.pred_score.reshape(scores.shape)
    # Under "auto" the host's scores are in another unit within the sum.
    weight = 0.0 if model.collapse.weight == "auto" else model.collapse.score_weight
    norms = {"latent": (scores.double() - host.double()) / weight} if weight > 0 else {}
    return {"scores": scores, "maps": own.anomaly_map, "host": host, **norms}


def _collapsed_draem(task: Task) -> dict[str, Any]:
    """Random textures where DRAEM's own, 640 MB, would have to be downloaded."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(8):
        noise = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(Path(task.folder) / f"{i}.png")
    return {"dtd_dir": task.folder}


def _collapsed_glass(task: Task) -> dict[str, Any]:
    """384 is the channels of a ResNet-18's second and third layer."""
    return {**_backbone(task), "input_shape": task.size, "pretrain_embed_dim": 384, "target_embed_dim": 384, "step": 3}


#: By the names of the field. All backbones are used up to a stride of 16, a ResNet's third layer, also by DFKDE,
#: whose default is the fourth. Steps are what one core does in about two minutes on a few hundred images of
#: 128x128 pixels, far fewer than the papers'; ``max_epochs`` of a budget grants more.
MODELS: dict[str, Model] = {
    # Its own early stopping ends it; one-channel images stay so, and none is resized.
    "Toll": Model("Toll", _toll, _predict_toll, False, lambda height, width: (height, width), epochs=200),
    # One pass over the images; its steps are its own.
    "PatchToll": Model("PatchToll", _patch_toll, _predict_patch_toll, batch_size=16),
    "PatchCore": Model("Patchcore", _patchcore, _predict),
    "PaDiM": Model("Padim", _padim, _predict),
    # PatchToll without its network.
    "Subspace": Model("benchmarks.methods.subspace.Subspace", _at(4, 8, 16), _predict),
    "DFM": Model("Dfm", _at(16, one=True), _predict),
    "DFKDE": Model("Dfkde", _at(16), _predict_dfkde),
    "FRE": Model("Fre", _fre, _predict, steps=200),
    "STFPM": Model("Stfpm", _backbone, _predict, steps=100),
    "ReverseDistillation": Model("ReverseDistillation", _backbone, _predict, steps=100, batch_size=16),
    "CFA": Model("Cfa", _backbone, _predict, steps=100, batch_size=8),
    "FastFlow": Model("Fastflow", _backbone, _predict, steps=50),
    "GANomaly": Model("Ganomaly", lambda _: {"n_features": 32}, _predict, False, lambda *_: (32, 32), steps=300),
    # Downloads its teacher, and ImageNette unless `imagenet_dir` has it. A step, of one image, takes seconds.
    "EfficientAd": Model("EfficientAd", lambda _: {}, _predict, False, lambda *_: (256, 256), steps=500, batch_size=1),
    # Those with targeted collapse; a collapse_weight of 0 makes each its bare host.
    "CollapsedGanomaly": Model(
        "CollapsedGanomaly",
        lambda _: {"n_features": 32, "latent_vec_size": 64, "batch_size": 16},
        _predict_collapsed,
        False,
        lambda *_: (32, 32),
        steps=300,
        batch_size=16,
    ),
    "CollapsedReverseDistillation": Model(
        "CollapsedReverseDistillation", _backbone, _predict_collapsed, steps=100, batch_size=16
    ),
    "CollapsedFre": Model(
        "CollapsedFre", lambda task: {**_fre(task), "latent_dim": 64}, _predict_collapsed, steps=200, batch_size=16
    ),
    "CollapsedSupersimplenet": Model(
        "CollapsedSupersimplenet",
        lambda task: {**_backbone(task), "layers": ["layer2", "layer3"]},
        _predict_collapsed,
        size=lambda height, width: _square(max(96, height, width)),  # its noise fails on smaller maps
        steps=20,
        batch_size=16,
    ),
    "CollapsedGlass": Model("CollapsedGlass", _collapsed_glass, _predict_collapsed, steps=20, batch_size=16),
    "CollapsedDraem": Model(
        "CollapsedDraem", _collapsed_draem, _predict_collapsed, False, lambda *_: (32, 32), steps=30, batch_size=8
    ),
}
