r"""Linear autoencoders on Gaussian data, where the toll can be solved on paper (arXiv 2306.12627 has the method).

Along a direction of the data with variance l, let the encoder have gain e and the decoder gain d, and let weight decay
cost g (e^2 + d^2). Squared norms are then minimised, by :func:`balance`, where 1 - de = sqrt(g (beta l + g)) / l or
nothing passes. As long as beta l is well above g, e^2 is about sqrt(g / (beta l)): the lower the variance, the
higher the gain. Plain norms give the same with l weighted by what they divide by, see :func:`theory`.

What holds the decoder matters, as cE and D/c reconstruct alike. With nothing to hold it there is no minimum, and
training only drifts: gradient flow on squared norms tends to e^2 = (8 beta l t)^(-1/2) at time t, the same power of l.
With a decoder tied to the encoder, all directions have the same gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.run.store import RESULTS, finish, provenance, whole
from benchmarks.run.tables import markdown
from toll_plugin.core import Autoencoder, CollapseMonitor, TollLoss, TollTerms, terms_of
from toll_plugin.core.checks import check_finite_float, check_integer, check_option

TERMS = ("total", "reconstruction", "latent")
SAMPLES = 500
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


class Setup(NamedTuple):
    """What is trained: ``decoder`` is "decayed" (all weights are), "free" or "tied"."""

    decoder: str
    exponent: int
    latent: int
    beta: float


def balance(fit: Any, toll: Any, decay: float) -> tuple[Any, Any]:
    """Encoder gain e and passed share de where fit (1 - de)^2 + toll e^2 + decay d^2 is least; all more than 0."""
    passed = np.maximum(0, 1 - np.sqrt(toll * decay) / fit)
    return np.sqrt(passed * np.sqrt(decay / toll)), passed


def theory(x: Any, variances: Any, setup: Setup, decay: float) -> Any:
    """Encoder gains at the minimum on rows whose covariance is diag(``variances``); ``None`` where there is none.

    The ``latent`` largest variances pass. For squared norms and full rank this is the global minimum: in the product
    of both matrices the problem is convex, a nuclear norm. For plain norms it is a stationary point: ||v|| has the
    derivative of ||v||^2 / 2 weighted by 1 / ||v||, so mean x_i^2 / (2 ||residual||) stands for l and
    beta mean x_i^2 / (2 ||z||) for beta l, iterated.
    """
    decoder, exponent, latent, beta = setup
    if decoder == "free":
        return None
    if decoder == "tied":  # the minimum over gains that all directions share; of squared norms, over all
        return np.full(len(variances), np.sqrt(max(0.0, 1 - beta / 2)) if exponent == 2 else float(beta < 1))
    kept = np.arange(len(variances)) < latent
    if exponent == 2:
        return balance(variances, beta * variances + decay, decay)[0] * kept
    gain, passed = 1.0 * kept, 0.9 * kept
    for _ in range(2000):
        fit, toll = (_weights(x, scale) / 2 for scale in (1 - passed, gain))
        found = [value * kept for value in balance(fit, beta * toll + decay, decay)]
        change = np.abs(found[0] - gain).max()
        gain, passed = (gain + found[0]) / 2, (passed + found[1]) / 2
        if change < 1e-9:
            break
    return gain


def _weights(x: Any, scale: Any) -> Any:
    return (x**2 / (np.linalg.norm(x * scale, axis=1, keepdims=True) + 1e-9)).mean(axis=0)


def sample(variances: Any, draw: np.random.Generator) -> Any:
    """Rows whose covariance is exactly diag(``variances``), so that what differs from the theory is training."""
    x = draw.standard_normal((SAMPLES, len(variances)))
    left, _, right = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return left @ right * np.sqrt(len(x) * variances)


class _Transposed(nn.Module):
    """A decoder that is its encoder's transpose; it lists no weights of its own."""

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        self._encoder = [encoder]

    def forward(self, latent: Tensor) -> Tensor:
        return latent @ self._encoder[0].weight


def train(x: Tensor, setup: Setup, *, weight_decay: float, steps: int, seed: int) -> Autoencoder:
    """Adam on all rows at once, its learning rate falling from 0.01 to 0 along a cosine."""
    dims = x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = nn.Linear(dims, setup.latent, bias=False), nn.Linear(setup.latent, dims, bias=False)
    network = Autoencoder(encoder, _Transposed(encoder) if setup.decoder == "tied" else decoder)
    loss, decay = TollLoss(setup.beta, exponent=setup.exponent), weight_decay * (setup.decoder == "decayed")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x, *network(x)).backward()
        optimizer.step()
        schedule.step()
    return network


def gains(encoder: Any, basis: Any) -> Any:
    """Length of what the encoder makes of each direction, the columns of ``basis``."""
    return np.linalg.norm(encoder @ basis, axis=0)


def detection(
    network: nn.Module, loss: TollLoss, normal: Tensor, other: Tensor, shifts: Iterable[Tensor]
) -> dict[str, list[float]]:
    """AUROC of each score for ``other`` moved by each of ``shifts``, against ``normal``."""
    from sklearn.metrics import roc_auc_score

    terms, moved = terms_of(network, normal, loss), [terms_of(network, other + shift, loss) for shift in shifts]
    labels = np.repeat([0, 1], [len(normal), len(other)])

    def auroc(shifted: TollTerms, term: Any) -> float:
        scores = torch.cat([loss.score(terms, term), loss.score(shifted, term)])
        return float(roc_auc_score(labels, scores.numpy()))

    return {term: [auroc(shifted, term) for shifted in moved] for term in TERMS}


def _run(variances: Any, setup: Setup, weight_decay: float, steps: int, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    x = sample(variances, draw)
    basis = np.linalg.qr(draw.standard_normal((len(variances), len(variances))))[0]
    normal, other = (draw.standard_normal((2000, len(variances))) * np.sqrt(variances) @ basis.T for _ in range(2))
    seen, normal, other = (torch.tensor(rows, dtype=torch.float32) for rows in (x @ basis.T, normal, other))
    shifts = torch.tensor(5 * np.sqrt(variances)[:, None] * basis.T, dtype=torch.float32)
    network = train(seen, setup, weight_decay=weight_decay, steps=steps, seed=seed)
    with torch.no_grad():
        unexplained = float((seen - network(seen)[0]).square().sum() / seen.square().sum())
    gain = gains(network.encoder.weight.detach().numpy(), basis)
    expected = theory(x, variances, setup, weight_decay / 2)
    top, collapsed = slice(setup.latent), unexplained >= CollapseMonitor.max_unexplained
    compared = expected is not None and expected.any() and not collapsed
    return {
        **setup._asdict(),
        "seed": seed,
        "gains": gain.tolist(),
        "theory": None if expected is None else expected.tolist(),
        "error": float(np.abs(gain - expected).sum() / expected.sum()) if compared else None,
        "slope": None if collapsed else float(np.polyfit(np.log(variances[top]), np.log(gain[top]), 1)[0]),
        "unexplained": unexplained,
        "collapsed": collapsed,
        "auroc": detection(network, TollLoss(setup.beta, exponent=setup.exponent), normal, other, shifts),
    }


def _table(runs: Sequence[dict[str, Any]]) -> str:
    def mean(mine: list[dict[str, Any]], name: str, form: str) -> str:
        values = [run[name] for run in mine if run[name] is not None]
        return format(np.mean(values), form) if values else "-"

    def low(mine: list[dict[str, Any]], term: str) -> str:
        return f"{np.mean([run['auroc'][term][len(run['gains']) // 2 :] for run in mine]):.3f}"

    groups: dict[Setup, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(Setup(*(run[name] for name in Setup._fields)), []).append(run)
    rows = []
    for setup, mine in groups.items():
        if not setup.beta:
            continue
        twin = groups[setup._replace(beta=0.0)]
        rows.append(
            {
                "norms": "plain" if setup.exponent == 1 else "squared",
                "decoder": setup.decoder,
                "latent": str(setup.latent),
                "beta": f"{setup.beta:g}",
                "error": mean(mine, "error", ".1%"),
                "slope": mean(mine, "slope", "+.2f"),
                "total": low(mine, "total"),
                "reconstruction": low(mine, "reconstruction"),
                "latent alone": low(mine, "latent"),
                "total (beta 0)": low(twin, "total"),
                "latent alone (beta 0)": low(twin, "latent"),
                "collapsed": f"{sum(run['collapsed'] for run in mine)}/{len(mine)}",
            }
        )
    note = (
        "Error of the gains, summed, against the theory; slope of log gain by log variance; of runs not collapsed. "
        "AUROC of shifts by 5 standard deviations along a direction, mean over the lower half of the variances."
    )
    return f"{markdown(rows)}\n\n{note}"


def plot(runs: Sequence[dict[str, Any]], variances: Any, path: Path) -> None:
    """Gains and AUROC by the direction's variance, with weight decay and full rank; none of collapsed runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    shown = [run for run in runs if run["decoder"] == "decayed" and run["latent"] == len(variances)]
    for (left, *others), exponent, norms in zip(panels, (1, 2), ("plain norms", "squared norms"), strict=True):
        for i, beta in enumerate(sorted({run["beta"] for run in shown})):
            mine = [run for run in shown if (run["beta"], run["exponent"]) == (beta, exponent)]
            style = {"color": COLOURS[i % len(COLOURS)], "marker": "osD^vPX"[i % 7], "markersize": 5}
            expected = np.mean([run["theory"] for run in mine], axis=0)
            left.plot(variances, np.where(expected > 0, expected, np.nan), color=style["color"], linewidth=1)
            mine = [run for run in mine if not run["collapsed"]]
            if not mine:
                continue
            gain = np.mean([run["gains"] for run in mine], axis=0)
            left.plot(variances, gain, linestyle="", label=f"beta {beta:g}", **style)
            for panel, term in zip(others, TERMS, strict=False):
                panel.plot(variances, np.mean([run["auroc"][term] for run in mine], axis=0), linewidth=1, **style)
        left.set(xscale="log", yscale="log", ylabel="encoder gain", title=f"{norms}: gains, theory as lines")
        for panel, term in zip(others, TERMS, strict=False):
            panel.axhline(0.5, color="0.7", linewidth=1, zorder=0)
            panel.set(ylim=(0.4, 1.02), ylabel="AUROC of a shift by 5 sd", title=f"{norms}: score by {term}")
    for panel in panels[1]:
        panel.set_xlabel("variance along the direction")
    panels[1, 0].legend(fontsize="small")
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=120)


def linear(
    betas: tuple[float, ...] = (0.03, 0.3, 3.0),
    weight_decay: float = 0.002,
    dims: int = 10,
    bottleneck: int = 3,
    seeds: int = 2,
    steps: int = 3000,
    output: Path = RESULTS / "linear.json",
    figure: Path = Path("runs/linear/linear.svg"),
) -> None:
    """Gains of linear autoencoders against the closed form, and what they detect.

    Gaussian directions have variances from 4 to 0.01, evenly spaced in the logarithm, in a random basis.

    Args:
        betas: Weights of the latent norm; 0 is run beside them.
        weight_decay: Adam's, of encoder and decoder where weights are decayed; the theory's g is half of it.
        dims: Directions, and size of the latent at full rank.
        bottleneck: Size of the latent when tight.
        seeds: Data, bases and initial weights.
        steps: Of training.
        output: Where the record goes.
        figure: Where the figure goes, by its ending an SVG, PNG or PDF.
    """
    tolls = [beta for i, beta in enumerate(betas) if check_finite_float(f"betas[{i}]", beta, minimum=0) > 0]
    if not tolls:
        msg = f"betas must hold at least one weight above 0, got {betas!r}"
        raise ValueError(msg)
    check_finite_float("weight_decay", weight_decay, minimum=0, exclusive=True)
    for name, value, minimum in (("bottleneck", bottleneck, 2), ("seeds", seeds, 1), ("steps", steps, 1)):
        check_integer(name, value, minimum=minimum)
    check_integer("dims", dims, minimum=bottleneck + 1)
    check_option("figure's ending", figure.suffix, (".svg", ".png", ".pdf"))
    torch.set_num_threads(1)
    settings = {"weight_decay": weight_decay, "bottleneck": bottleneck, "seeds": seeds, "steps": steps}
    record, variances = {"command": "linear", **provenance(), **settings}, np.geomspace(4, 0.01, dims)
    kinds = (("decayed", dims), ("decayed", bottleneck), ("free", dims), ("tied", dims))
    setups = [Setup(kind, p, k, float(b)) for p in (1, 2) for kind, k in kinds for b in dict.fromkeys((0.0, *tolls))]
    runs = [_run(variances, setup, weight_decay, steps, seed) for setup in setups for seed in range(seeds)]
    plot(runs, variances, figure)
    finish(output, {**record, "variances": variances.tolist(), "table": _table(runs), "runs": runs})
