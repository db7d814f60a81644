"""An epoch of anomalib's Engine against a bare torch loop of the same network on the same data."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quiet import apart, quiet_engine
from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown


def _engine(image_size: int, max_epochs: int) -> float:
    from toll_plugin.anomalib import DigitsOneVsRest, Toll

    with tempfile.TemporaryDirectory() as folder:
        engine = quiet_engine(folder, max_epochs)
        # As many steps as the bare loop takes, each with the same work.
        form = {"beta": 0.01, "latent_dim": 32, "scaling": "unit", "lr": 1e-3, "max_steps": None}
        model = Toll(image_size, 1, **form, restore_best_weights=True, seed=0, visualizer=False)
        data = DigitsOneVsRest(8)
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        return (time.perf_counter() - start) / max_epochs


def _tensors(image_size: int) -> tuple[Any, Any]:
    import torch
    from torchvision.transforms.v2.functional import resize

    from toll_plugin.anomalib import DigitsOneVsRest

    data = DigitsOneVsRest(8)
    data.setup()

    def images(part: Any) -> Any:
        whole = part.__getitems__(range(len(part))).image.as_subclass(torch.Tensor)[:, :1]
        return resize(whole, [image_size, image_size], antialias=True).contiguous()

    return images(data.train_data), images(data.val_data)


def _bare(image_size: int, max_epochs: int) -> float:
    import torch

    from toll_plugin.core import ConvAutoencoder, TollLoss

    x, held_out = _tensors(image_size)
    network, loss = ConvAutoencoder(image_size), TollLoss(0.01)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(max_epochs):
        network.train()
        for index in torch.split(torch.randperm(len(x)), 32):
            batch = x[index]
            value = loss(batch, *network(batch))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            loss(held_out, *network(held_out))
    return (time.perf_counter() - start) / max_epochs


def _loading(image_size: int, max_epochs: int) -> float:
    """An epoch's batches, loaded, resized and thrown away."""
    from toll_plugin.anomalib import DigitsOneVsRest, TollPreProcessor

    data, transform = DigitsOneVsRest(8), TollPreProcessor(image_size).transform
    data.setup()
    data.train_data.augmentations = data.val_data.augmentations = transform.transforms[0]
    start = time.perf_counter()
    for epoch in range(max_epochs):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in (*loader, *data.val_dataloader()):
            transform(batch.image, batch.gt_mask)
    return (time.perf_counter() - start) / max_epochs


def overhead(
    max_epochs: int = 30,
    repeats: int = 5,
    sizes: tuple[int, ...] = (8, 32, 64),
    output: Path = RESULTS / "overhead.json",
) -> None:
    """Milliseconds per epoch (108 training images in batches of 32, 36 validation images).

    Args:
        max_epochs: Epochs per run.
        repeats: Interleaved runs of each; medians are shown.
        sizes: Image sizes, to which the 8x8 images are enlarged.
        output: Where the record goes.
    """
    import torch

    torch.set_num_threads(1)
    record = {"command": "overhead", **provenance(), "max_epochs": max_epochs, "repeats": repeats}
    rows = []
    for image_size in sizes:
        with apart():
            _engine(image_size, 2)  # imports and first-call costs
            _bare(image_size, 2)
            measured: dict[str, list[float]] = {"engine": [], "bare": [], "loading": []}
            for _ in range(repeats):
                measured["engine"].append(_engine(image_size, max_epochs))
                measured["bare"].append(_bare(image_size, max_epochs))
                measured["loading"].append(_loading(image_size, max_epochs))
        engine, bare, loading = (1000 * statistics.median(values) for values in measured.values())
        rows.append(
            {
                "image size": str(image_size),
                "Engine, ms": f"{engine:.1f}",
                "bare loop, ms": f"{bare:.1f}",
                "Engine / bare": f"{engine / bare:.2f}",
                "data path alone, ms": f"{loading:.1f}",
            }
        )
    finish(output, {**record, "table": markdown(rows)})
