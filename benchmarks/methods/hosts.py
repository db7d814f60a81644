"""anomalib's models that targeted collapse is tried on, at a size that two cores can train."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.methods.backbones import local_backbone
from benchmarks.quiet import quiet_trainer

RESNET = {"backbone": "resnet18"}


class ImageHost(NamedTuple):
    """How a host is trained here.

    Attributes:
        arguments: Of its constructor, given the side of the images.
        pretrained: Whether it needs pretrained weights of a ResNet-18.
        sizes: Side of the images in pixels, on the digits and on parts; 0 where it is not run.
        epochs: On the digits and on parts.
        batch_size: Of training.
    """

    arguments: Callable[[int], dict[str, Any]]
    pretrained: bool
    sizes: tuple[int, int]
    epochs: tuple[int, int]
    batch_size: int = 16


HOSTS = {
    "Ganomaly": ImageHost(
        lambda _: {"n_features": 32, "latent_vec_size": 64, "batch_size": 16}, False, (32, 64), (20, 6)
    ),
    "ReverseDistillation": ImageHost(lambda _: RESNET, True, (64, 128), (10, 3)),
    "Fre": ImageHost(
        lambda side: RESNET | {"layer": "layer3", "latent_dim": 64, "input_dim": 256 * (side // 32) ** 2},
        True,
        (64, 128),
        (30, 5),
    ),
    "Supersimplenet": ImageHost(lambda _: RESNET | {"layers": ["layer2", "layer3"]}, True, (96, 96), (2, 1)),
    "Glass": ImageHost(
        lambda side: (
            RESNET | {"input_shape": (side, side), "pretrain_embed_dim": 384, "target_embed_dim": 384, "step": 3}
        ),
        True,
        (64, 128),
        (10, 1),
    ),
    # A step of 16 images of 128 pixels takes a minute on one core.
    "Draem": ImageHost(lambda _: {}, False, (32, 0), (2, 0), 8),
}


def _data(part: str, seed: int, batch_size: int, mvtec: Path | None) -> Any:
    from anomalib.data import MVTecAD

    from toll_plugin.anomalib import DigitsOneVsRest

    if part.isdigit():
        return DigitsOneVsRest(int(part), train_batch_size=batch_size, eval_batch_size=64, seed=seed)
    return MVTecAD(
        root=mvtec,
        category=part,
        train_batch_size=batch_size,
        eval_batch_size=16,
        num_workers=0,
        val_split_mode="from_train",
        val_split_ratio=0.2,
        seed=seed,
    )


def _model(name: str, side: int, weight: float | None, weights: Path | None, textures: str) -> Any:
    import toll_plugin.anomalib as collapsed

    host, kind = HOSTS[name], getattr(collapsed, f"Collapsed{name}")
    arguments = host.arguments(side) | ({"dtd_dir": textures} if name == "Draem" else {})
    with local_backbone("resnet18", weights):
        return kind(
            collapse_weight=weight,
            pre_processor=kind.configure_pre_processor((side, side)),
            visualizer=False,
            evaluator=False,
            **arguments,
        )


def _batches(data: Any, seed: int) -> Any:
    """The test images; of the digits all normal ones and as many others as make 300."""
    import numpy as np

    if not hasattr(data.test_data, "__getitems__"):
        yield from data.test_dataloader()
        return
    labels = data.test_data.__getitems__(range(len(data.test_data))).gt_label.numpy()
    others = np.random.default_rng(seed).permutation(np.flatnonzero(labels == 1))
    chosen = np.concatenate([np.flatnonzero(labels == 0), others])[:300]
    for start in range(0, len(chosen), 50):
        yield data.test_data.__getitems__(chosen[start : start + 50].tolist())


def _scores(model: Any, batches: Any) -> tuple[Any, Any, Any]:
    """The host's raw scores, before any mapping ties them; norms of the latent; labels."""
    import torch

    model.eval()
    model.collapse_score_weight = 0.0
    scores, norms, labels = [], [], []
    with torch.no_grad():
        for loaded in batches:
            labels.append(loaded.gt_label)
            batch = loaded.update(image=model.pre_processor(loaded.image))
            n = len(batch.image)
            with model.collapse.watch(model, lambda passes, n=n: model.collapse_latent(passes, n)) as latent:
                scores.append(model.predict_step(batch, 0).pred_score.reshape(-1))
            norms.append(model.collapse.norms(latent.latent))
    return torch.cat(scores).double().numpy(), torch.cat(norms).double().numpy(), torch.cat(labels).int().numpy()


def run_image(
    name: str,
    part: str,
    seed: int,
    strength: float,
    mvtec: Path | None,
    weights: Path | None,
    epochs: int | None,
) -> tuple[Any, Any, Any, float, float]:
    """A host trained with ``strength`` times its default weight.

    Returns:
        Its scores of the test images without the term, norms of their latents, their labels, the
        default weight of the score, and the seconds of the fit.
    """
    import lightning.pytorch as pl
    import torch

    import toll_plugin.anomalib as collapsed

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    digits = part.isdigit()
    host = HOSTS[name]
    side, usual = host.sizes[not digits], host.epochs[not digits]
    kind = getattr(collapsed, f"Collapsed{name}")
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        folder = stack.enter_context(_textures())
        data = _data(part, seed, host.batch_size, mvtec)
        pl.seed_everything(seed, verbose=False)
        model = _model(name, side, strength * kind.collapse_weight, weights if host.pretrained else None, folder)
        trainer = quiet_trainer(epochs or usual)
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        data.setup("test")
        return *_scores(model, _batches(data, seed)), kind.collapse_weight * model.collapse_score_factor(), seconds


@contextlib.contextmanager
def _textures() -> Any:
    """A folder of random textures, where DRAEM's own, 640 MB, would have to be downloaded."""
    from tempfile import TemporaryDirectory

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        for i in range(8):
            noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(Path(folder) / f"{i}.png")
        yield folder
