"""The README's picture: what the latent term does to norms, and PatchToll's maps beside PatchCore's."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report.style import COLORS, INK, MUTED
from benchmarks.run.store import RESULTS, Run, read, whole

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

#: Class and split that are shown.
_DIGIT, _SEED = "8", 0


def overview(path: Path) -> None:
    """Write the picture as a PNG, from the records of ``digits`` and ``patches``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    digits, screws = _runs("digits", _DIGIT), _runs("patches", "screw")
    colors = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "axes.edgecolor": MUTED}
    with rc_context({"font.size": 10, **colors}):
        figure = Figure((9.4, 6), dpi=112, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05)
        above, below = figure.subfigures(2, height_ratios=(1, 1.45), hspace=0.03)
        _norms(
            above,
            {"without the term (β = 0)": digits["Toll (beta=0)"], "with the term": digits["Toll"]},
        )
        _maps(below, {name: screws[name]["examples"] for name in ("PatchToll", "PatchCore")})
        stream = BytesIO()
        figure.savefig(stream)
    with whole(path) as part:
        Image.open(stream).convert("RGB").quantize(256).save(part, format="PNG", optimize=True)


def _runs(name: str, part: str) -> dict[str, Run]:
    """First runs on one part with one seed, by label."""
    runs = [(run["configuration"], run) for run in read(RESULTS / f"{name}.json").runs]
    wanted = (part, _SEED, 0)
    return {c["label"]: run for c, run in runs if (str(c["part"]), c["seed"], c.get("restart", 0)) == wanted}


def _norms(figure: SubFigure, runs: Mapping[str, Run]) -> None:
    """A histogram for each run; areas of normal and anomalous images are equal, however many there are."""
    figure.suptitle(f"Latent norms of test digits, after training on {_DIGIT}s only", weight="bold")
    panels = figure.subplots(1, len(runs))
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        norms = run["latent_norms"]
        kinds = (("normal", COLORS[1], f"{_DIGIT}s, normal"), ("anomalous", COLORS[0], "other digits, anomalous"))
        for kind, color, name in kinds:
            share = np.asarray(norms[kind]) / sum(norms[kind])
            axes.stairs(share, norms["edges"], fill=True, color=color, alpha=0.35, linewidth=0, label=name)
            axes.stairs(share, norms["edges"], color=color, linewidth=1.6)
        axes.set_title(f"{title}: the norm alone has AUROC {run['term_auroc']['latent']:.2f}", fontsize=10)
        axes.set(xlabel="latent norm ‖z‖", yticks=[], xlim=(0, norms["edges"][-1]))
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_ylabel("share of images")
    panels[0].legend(frameon=False, loc="upper left")


def _maps(figure: SubFigure, examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Every test image that the record holds, with the outline of its mask, and below it the maps."""
    first = next(iter(examples.values()))
    figure.suptitle("Anomaly maps of test screws (outlined: the defect; the last one has none)", weight="bold")
    rows = {"image": [one["image"] for one in first]}
    rows |= {label: [one["map"] for one in shown] for label, shown in examples.items()}
    panels = figure.subplots(len(rows), len(first), gridspec_kw={"wspace": 0, "hspace": 0})
    for line, (label, pictures) in zip(panels, rows.items(), strict=True):
        for axes, picture, one in zip(line, pictures, first, strict=True):
            extent = (0, 1, 1, 0)
            axes.imshow(
                _pixels(picture), cmap="gray" if label == "image" else "inferno", vmin=0, vmax=255, extent=extent
            )
            if one["anomalous"]:
                axes.contour(_pixels(one["mask"]), [127], colors="cyan", linewidths=0.8, extent=extent, origin="upper")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label)


def _pixels(png: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(BytesIO(base64.b64decode(png))).convert("L"))
