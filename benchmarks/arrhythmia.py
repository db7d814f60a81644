"""The paper's experiment on a table: Arrhythmia by the authors' protocol, split and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, finish, provenance, run_all

#: What the authors' own code gives with the same split and seeds 0 to 9, measured once.
AUTHORS = "63.8 ± 6.9"

#: TollDetector with the authors' settings.
PAPER = {
    "hidden_sizes": (256, 128),
    "latent_dim": 16,
    "beta": 10.0,
    "preprocessing": "none",
    "metric": "euclidean",
    "noise": 0.0,
    "n_members": 1,
    "batch_size": 100,
    "lr": 1e-3,
    "max_steps": 2000,
}


def split(root: Path, splits: Path) -> dict[str, Any]:
    """The authors' parts: 232 training rows, 77 normal and 13 anomalous rows each to validate and to test."""
    import numpy as np

    from benchmarks.tables import load

    x, y = load("arrhythmia", [root])
    parts: dict[str, Any] = {}
    for kind, rows in (("normal", x[y == 0]), ("anomalous", x[y == 1])):
        shuffled = rows[np.load(splits / f"randomized_{kind}_indices_arrhythmia.npy")]
        first, second = round(0.2 * len(shuffled)), round(0.4 * len(shuffled))
        parts |= {f"test {kind}": shuffled[:first], f"validation {kind}": shuffled[first:second]}
        parts |= {"train": shuffled[second:]} if kind == "normal" else {}
    return parts


def f1(normal: Any, anomalous: Any) -> float:
    """F1 of flagging as many rows as there are anomalies; a normal row of equal score is flagged first."""
    import numpy as np

    scores = np.concatenate([normal, anomalous])
    is_anomaly = np.arange(len(scores)) >= len(normal)
    order = np.lexsort((is_anomaly, -scores))  # by score, normal rows first where it is equal
    return float(is_anomaly[order[: len(anomalous)]].mean())


def _iterations(parts: dict[str, Any], seed: int, iterations: int) -> Iterator[tuple[Any, Any]]:
    """The authors' training; every 20 iterations, the network in evaluation mode and its loss."""
    import numpy as np
    import torch

    from toll_plugin.core import DenseAutoencoder, TollLoss

    draw = np.random.default_rng(seed)
    network = DenseAutoencoder(generator=torch.Generator().manual_seed(seed))
    loss, optimizer = TollLoss(10.0), torch.optim.Adam(network.parameters(), lr=1e-3)
    train = torch.from_numpy(parts["train"]).float()
    for iteration in range(1, iterations + 1):
        network.train()
        batch = train[draw.choice(len(train), 100, replace=False)]
        value = loss(batch, *network(batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if iteration % 20 == 0:
            yield network.eval(), loss


def _one(parts: dict[str, Any], seed: int, iterations: int) -> dict[str, float]:
    """Test F1 by how the step was chosen, and of TollDetector."""
    import torch

    from toll_plugin.core import terms_of
    from toll_plugin.pyod import TollDetector

    torch.set_num_threads(1)
    tensors = {name: torch.from_numpy(rows).float() for name, rows in parts.items()}
    best = {"labelled": -1.0, "label-free": float("-inf")}
    found: dict[str, float] = {}
    for network, loss in _iterations(parts, seed, iterations):
        scores = {name: loss.score(terms_of(network, rows, loss)).numpy() for name, rows in tensors.items()}
        test = f1(scores["test normal"], scores["test anomalous"])
        goodness = {
            "labelled": f1(scores["validation normal"], scores["validation anomalous"]),
            "label-free": -float(scores["validation normal"].mean()),
        }
        for name, value in goodness.items():
            if value > best[name]:
                best[name], found[name] = value, test
        found["last"] = test
    for name, settings in (
        ("TollDetector, the authors' settings", PAPER | {"max_steps": iterations}),
        ("TollDetector, defaults", {}),
    ):
        detector = TollDetector(random_state=seed, **settings).fit(parts["train"])
        found[name] = f1(*(detector.decision_function(parts[f"test {kind}"]) for kind in ("normal", "anomalous")))
    return found


def arrhythmia(
    root: Path,
    splits: Path,
    seeds: int = 10,
    iterations: int = 2000,
    jobs: int = 2,
    output: Path = RESULTS / "arrhythmia.json",
) -> None:
    """Test F1 on Arrhythmia, in per cent: 13 of 90 rows are flagged, so one more found is 7.7.

    Args:
        root: Folder with ODDS' ``arrhythmia.mat``.
        splits: Folder with the authors' ``randomized_*_indices_arrhythmia.npy`` ("val IDs" in their repository).
        seeds: Initial weights; the split is always the authors'.
        iterations: Batches of 100.
        jobs: Processes, one thread each.
        output: Where the record goes.
    """
    record = {"command": "arrhythmia", **provenance(), "seeds": seeds, "iterations": iterations}
    parts = split(root, splits)
    runs = run_all(_one, [(parts, seed, iterations) for seed in range(seeds)], jobs, "arrhythmia", "seed")
    labels = {
        "labelled": "the authors' protocol: the step of 100 with the best F1 on labelled validation rows",
        "label-free": "the step with the lowest loss on the normal validation rows",
        "last": "the last step",
    }
    lines = ["| how | test F1, % | smallest | largest |", "|---|---|---|---|"]
    lines.append(f"| the authors' own code, their protocol (measured, not by this command) | {AUTHORS} | 53.8 | 69.2 |")
    for name in runs[0]:
        values = [100 * run[name] for run in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        text = labels.get(name, name)
        lines.append(f"| {text} | {statistics.mean(values):.1f}{spread} | {min(values):.1f} | {max(values):.1f} |")
    finish(output, {**record, "table": "\n".join(lines), "runs": runs})
