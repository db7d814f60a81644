"""``collapse``: what the method does in a picture, the latent norms of normal and anomalous images along the training.

Toll's network and training are those of its defaults, beside the same without pressure on the latents (beta 0). Test
images are only looked at: nothing is chosen by them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.style import COLORS
from benchmarks.run.store import RESULTS, finish, provenance, whole
from benchmarks.run.tables import markdown
from toll_plugin.core.checks import check_integer, check_option
from toll_plugin.image_sets import ImageSetName, data_root, download_image_set, read_image_set

#: Losses, by what the picture calls them: that of Toll's defaults, and its twin's.
LOSSES: dict[str, dict[str, Any]] = {
    "pressed (Toll's default)": {"beta": "auto", "strength": 3.0},
    "not pressed (beta 0)": {"beta": 0.0},
}

#: Of Toll's defaults.
LATENT_DIM, LR, STEPS, BATCH_SIZE = 512, 5e-4, 600, 32

KINDS = ("normal", "anomalous")


def samples(dataset: ImageSetName, root: Path, normal_class: int, size: int) -> tuple[Any, Any, np.ndarray]:
    """Training images of the class, test images, and which of these are anomalous; pixels standardised by the first."""
    train, test = read_image_set(dataset, root)
    draw = np.random.default_rng(0)

    def some(which: np.ndarray, images: Any) -> Any:
        drawn = np.sort(draw.permutation(np.flatnonzero(which))[:size])
        found = images[drawn].float() / 255
        return found[:, None] if found.ndim == 3 else found

    import torch

    labels = test.labels.numpy()
    first = some(train.labels.numpy() == normal_class, train.images)
    normal, anomalous = some(labels == normal_class, test.images), some(labels != normal_class, test.images)
    mean, deviation = first.mean(), first.std()
    tested = (torch.cat([normal, anomalous]) - mean) / deviation
    return (first - mean) / deviation, tested, np.arange(len(tested)) >= len(normal)


def watch(train: Any, test: Any, anomalous: np.ndarray, loss: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """One training: after each epoch quartiles of both kinds' latent norms, and the AUROC of each term."""
    import torch
    from sklearn.metrics import roc_auc_score

    from toll_plugin.core import ConvAutoencoder, TollLoss, cosine_adam, fit, terms_of

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        network = ConvAutoencoder(tuple(test.shape[-2:]), test.shape[1], LATENT_DIM)
    objective = TollLoss(**loss)
    per_epoch = math.ceil(len(train) / BATCH_SIZE)
    found: list[dict[str, Any]] = []

    def look(step: int) -> None:
        terms = terms_of(network, test, objective)
        norms = terms.latent.double().numpy()
        found.append(
            {
                "step": step,
                **{
                    kind: np.quantile(norms[anomalous == (kind == "anomalous")], (0.25, 0.5, 0.75)).tolist()
                    for kind in KINDS
                },
                "latent": float(roc_auc_score(anomalous, norms)),
                "reconstruction": float(roc_auc_score(anomalous, terms.reconstruction.double().numpy())),
            }
        )

    look(0)
    fit(
        network,
        train,
        objective,
        optimizer=cosine_adam(LR, steps),
        batch_size=BATCH_SIZE,
        max_epochs=None,
        max_steps=steps,
        on_epoch=lambda epoch, _: look(min(steps, (epoch + 1) * per_epoch)),
    )
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """What is left of the norms at the end of each training."""
    lines = []
    for name, course in runs.items():
        first, last = course[0], course[-1]
        normal, anomalous = ({"first": first[kind][1], "last": last[kind][1]} for kind in KINDS)
        lines.append(
            {
                "training": name,
                "steps": str(last["step"]),
                "normal norm": f"{normal['first']:.3g} to {normal['last']:.3g}",
                "anomalous norm": f"{anomalous['first']:.3g} to {anomalous['last']:.3g}",
                "anomalous over normal": f"{anomalous['first'] / normal['first']:.2f} to "
                f"{anomalous['last'] / normal['last']:.2f}",
                "AUROC of the norm": f"{last['latent']:.3f}",
                "AUROC of the residual": f"{last['reconstruction']:.3f}",
            }
        )
    return f"{markdown(lines)}\n\nMedians over the test images, before the first step and after the last."


def plot(path: Path, runs: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Above the quartiles of the norms of both kinds, below what each term alone detects; a column per training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=90, layout="constrained")
    panels = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for i, (name, course) in enumerate(runs.items()):
        steps = [look["step"] for look in course]
        upper, lower = panels[0][i], panels[1][i]
        for kind, color in zip(KINDS, COLORS, strict=False):
            low, middle, high = np.array([look[kind] for look in course]).T
            upper.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            upper.plot(steps, middle, color=color, label=f"{kind} test images")
        for term, color in zip(("latent", "reconstruction"), COLORS[2:], strict=False):
            shown = "norm of the latent" if term == "latent" else "residual"
            lower.plot(steps, [look[term] for look in course], color=color, label=shown)
        upper.set(yscale="log", title=name)
        lower.set(xlabel="step", ylim=(0, 1))
        lower.axhline(0.5, color="0.6", linewidth=0.8)
    panels[0][0].set_ylabel("norm of the latent")
    panels[1][0].set_ylabel("AUROC alone")
    for line in panels:
        line[0].legend(fontsize="small")
    figure.suptitle(title)
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:])


def collapse(
    dataset: ImageSetName = "mnist",
    root: Path | None = None,
    normal_class: int = 8,
    size: int = 1000,
    steps: int = STEPS,
    output: Path = RESULTS / "collapse.json",
    figure: Path = RESULTS / "collapse.png",
) -> None:
    """Latent norms of normal and anomalous test images along the training, with the pressure and without.

    Args:
        dataset: Which images.
        root: Folder that holds them as torchvision lays them out, and where missing ones are downloaded to;
            TOLL_DATA_ROOT or ./datasets by default.
        normal_class: Its images are normal.
        size: Training images, normal and anomalous test images, at most so many of each.
        steps: Of training, along which the learning rate falls to zero.
        output: Where the record goes.
        figure: Where the picture goes, by its ending a PNG, SVG or PDF.
    """
    check_integer("normal_class", normal_class, minimum=0)
    check_integer("size", size, minimum=2)
    check_integer("steps", steps, minimum=1)
    check_option("figure's ending", figure.suffix, (".png", ".svg", ".pdf"))
    folder = data_root(root)
    download_image_set(dataset, folder)
    train, test, anomalous = samples(dataset, folder, normal_class, size)
    if not len(train):
        msg = f"normal_class must be one of {dataset}, got {normal_class}"
        raise ValueError(msg)
    record = {"command": "collapse", **provenance(), "dataset": dataset, "normal_class": normal_class, "size": size}
    runs = {name: watch(train, test, anomalous, loss, steps) for name, loss in LOSSES.items()}
    plot(figure, runs, f"{dataset}, class {normal_class} normal")
    finish(output, {**record, "table": table(runs), "runs": runs})
