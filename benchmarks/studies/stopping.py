"""Which rule without labels chooses the step best? Trained and judged on training files only."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data.tables import CHECK, SEARCH
from benchmarks.run.jobs import run_missing
from benchmarks.run.metrics import splice
from benchmarks.run.store import RESULTS, Runs, finish, provenance
from benchmarks.run.tables import markdown, mean_and_error
from benchmarks.studies import training
from benchmarks.studies.parts import Bytes, Parts, arrhythmia_rows, as_they_are
from benchmarks.studies.protocol import SETTINGS, VERSION, Settings, initial_network

#: How many validated steps a smoothed curve averages.
WINDOW = 5


def _smoothed(name: str) -> Callable[[list[dict[str, float]], int], float]:
    return lambda trace, i: statistics.mean(step[name] for step in trace[max(0, i - WINDOW + 1) : i + 1])


_SPLICED = "AUROC against spliced normal samples"

#: What each rule wants lowest, at validated step i; "labelled" sees anomalies.
RULES: dict[str, Callable[[list[dict[str, float]], int], float]] = {
    "labelled": lambda trace, i: -trace[i]["validation"],
    "held-out loss": lambda trace, i: trace[i]["total"],
    f"held-out loss, mean of {WINDOW} validations": _smoothed("total"),
    "held-out reconstruction": lambda trace, i: trace[i]["reconstruction"],
    "held-out latent norm": lambda trace, i: trace[i]["latent"],
    "spread of held-out scores over their mean": lambda trace, i: trace[i]["spread"],
    "95 % quantile of held-out scores over their median": lambda trace, i: trace[i]["tail"],
    _SPLICED: lambda trace, i: trace[i]["synthetic"],
    f"the same, mean of {WINDOW} validations": _smoothed("synthetic"),
    "last step": lambda _, i: -i,
}


def _split(
    samples: Tensor, anomalous: np.ndarray, sizes: tuple[int, int], seed: int, scale: Callable[[Tensor], Tensor]
) -> Parts:
    """Normal samples to train on; ``sizes`` held-out ones to choose and to judge by, with as many anomalies each."""
    draw = np.random.default_rng(seed)
    normal, bad = (draw.permutation(np.flatnonzero(anomalous == kind)) for kind in (False, True))
    first, both = sizes[0], sum(sizes)
    half = min(len(bad) // 2, first)
    choose = np.concatenate([normal[:first], bad[:half]])
    judge = np.concatenate([normal[first:both], bad[half : 2 * half]])
    return Parts(
        train=samples[normal[both:]],
        validation=samples[choose],
        validation_anomalous=np.arange(len(choose)) >= first,
        test=samples[judge],
        test_anomalous=np.arange(len(judge)) >= sizes[1],
        scale=scale,
        sizes=[len(normal) - both],
        trace_test=True,
        synthetic=splice(samples[normal[:first]], draw),
    )


def _images(name: str, root: Path, normal_class: int, seed: int) -> tuple[Parts, Settings]:
    from toll_plugin.image_sets import read_image_set

    part, _ = read_image_set(name, root)  # the test part is not looked at
    mine = part.labels == normal_class
    settings = replace(SETTINGS[name], batch_size=50, iterations=300, validate_every=15, bf16=True)
    scale = Bytes(settings.scaling, part.images[mine])
    return _split(part.images, (~mine).numpy(), (300, 300), seed, scale), settings


def _digits(normal_class: int, beta: float, seed: int) -> tuple[Parts, Settings]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    settings = Settings("conv8", beta, 32, 1e-3, 32, "unit", 10, iterations=600, validate_every=15)
    return _split(images, digits.target != normal_class, (36, 36), seed, as_they_are), settings


def _arrhythmia(root: Path, splits: Path | None, seed: int) -> tuple[Parts, Settings]:
    rows = arrhythmia_rows(root, splits)
    normal = np.concatenate([rows["train_normal"], rows["validation_normal"]])  # the test rows are not looked at
    bad = np.concatenate([rows["validation_anomalous"], rows["unused_anomalous"]])
    samples = torch.from_numpy(np.concatenate([normal, bad])).float()
    parts = _split(samples, np.arange(len(samples)) >= len(normal), (77, 77), seed, as_they_are)
    return parts, replace(SETTINGS["arrhythmia"], metric="AUROC")


def _table(name: str, roots: list[Path], beta: float, seed: int) -> tuple[Parts, Settings]:
    from benchmarks.data.tables import load
    from toll_plugin.core import TableScaling

    x, y = load(name, roots)
    draw = np.random.default_rng(seed).permutation(len(x))[:4000]
    x, y = x[draw], y[draw]
    quarter = int((y == 0).sum()) // 4
    parts = _split(torch.from_numpy(x), y != 0, (quarter, quarter), seed, as_they_are)
    scaling = TableScaling().fit(parts.train.numpy())
    for part in ("train", "validation", "test", "synthetic"):
        setattr(parts, part, torch.from_numpy(scaling.transform(getattr(parts, part).numpy())).float())
    size = min(128, parts.sizes[0])
    return parts, Settings("table", beta, 32, 1e-3, size, "none", 1, iterations=1500, validate_every=30)


def _network(settings: Settings, parts: Parts, seed: int) -> nn.Module:
    from toll_plugin.core import ConvAutoencoder, DenseAutoencoder

    generator = torch.Generator().manual_seed(seed)
    if settings.network == "table":
        return DenseAutoencoder(parts.train.shape[1], (64, 32), settings.latent_dim, generator=generator)
    if settings.network == "conv8":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ConvAutoencoder(8, latent_dim=settings.latent_dim)
    return initial_network(settings, seed, 0)


def _others(roots: list[Path]) -> list[str]:
    """ADBench's tables, but for those that are kept apart under another name."""
    stems = sorted(path.stem for folder in roots for path in folder.glob("[0-9]*.npz"))
    return [stem for stem in stems if stem.split("_", 1)[-1].lower() not in {*CHECK, *SEARCH}]


def judge(trace: list[dict[str, float]]) -> dict[str, float]:
    """The judging metric of the step that each rule chooses."""
    return {
        name: trace[min(range(len(trace)), key=lambda i, rule=rule: rule(trace, i))]["test"]
        for name, rule in RULES.items()
    }


def _run(
    family: str, load: Callable[..., tuple[Parts, Settings]], arguments: tuple[Any, ...], iterations: int | None
) -> tuple[dict[str, Any], None]:
    seed = arguments[-1]
    parts, settings = load(*arguments)
    settings = replace(settings, iterations=iterations or settings.iterations)
    network = _network(settings, parts, seed)
    result, _ = training.train(parts, settings, seed, 0, device="cpu", threads=1, network=network)
    described = [a for a in arguments if isinstance(a, (str, int, float))]
    return {"family": family, "arguments": described, "chosen": judge(result["trace"]), "trace": result["trace"]}, None


def _table_of(runs: list[dict[str, Any]]) -> str:
    """Mean AUROC of the labelled choice per family, and what each rule loses against it."""
    chosen: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        chosen.setdefault(run["family"], []).append(run["chosen"])
    best = {family: [run["labelled"] for run in mine] for family, mine in chosen.items()}
    shown = {family: f"{statistics.mean(values):.4f} (n {len(values)})" for family, values in best.items()}
    mean = statistics.mean(map(statistics.mean, best.values()))
    rows = [{"rule": "labelled", **shown, "mean over families": f"{mean:.4f}", "worst run": ""}]
    for rule in list(RULES)[1:]:
        gaps = {family: [run[rule] - run["labelled"] for run in mine] for family, mine in chosen.items()}
        mean, worst = statistics.mean(map(statistics.mean, gaps.values())), min(map(min, gaps.values()))
        last = {"mean over families": f"{mean:+.4f}", "worst run": f"{worst:+.3f}"}
        rows.append({"rule": rule, **{family: mean_and_error(mine) for family, mine in gaps.items()}, **last})
    gains = [
        f"{family} {mean_and_error([run[_SPLICED] - run['held-out loss'] for run in mine])}"
        for family, mine in chosen.items()
    ]
    note = f"{_SPLICED} minus held-out loss (mean, standard error): {'; '.join(gains)}."
    return f"{markdown(rows)}\n\n{note}"


def stopping(
    root: Path | None = None,
    roots: list[Path] | None = None,
    splits: Path | None = None,
    sets: tuple[str, ...] = ("mnist", "fashion_mnist", "cifar10"),
    classes: tuple[int, ...] = (0, 1, 2, 3, 4),
    names: tuple[str, ...] | None = None,
    seeds: int = 2,
    iterations: int | None = None,
    jobs: int = 2,
    runs: Path = Path("runs/stopping"),
    output: Path = RESULTS / "stopping.json",
) -> None:
    """What label-free rules for choosing the step lose in AUROC against the labelled choice.

    Held-out samples are halved: rules choose by one half and are judged by the other. Nothing that
    a benchmark here tests on is looked at.

    Args:
        root: Folder of the image sets, as torchvision has them; without it the bundled digits only.
        roots: Folders with ``NAME.mat`` or ``NAME.npz``; without them no tables are run.
        splits: The authors' indices, which keep Arrhythmia's test rows out.
        sets: Which image sets, with the authors' networks on a small budget, one seed.
        classes: Their normal classes; of the digits all ten are run.
        names: Which tables; by default all that defaults may be chosen by, and Arrhythmia.
        seeds: Splits, each with its own initial weights.
        iterations: Of every run; by default each family has its own number.
        jobs: Processes, one thread each.
        runs: Where finished runs are kept, with what was measured at every validation.
        output: Where the record goes.
    """
    record = {"command": "stopping", **provenance(), "seeds": seeds}
    calls: list[tuple[Any, ...]] = [
        (f"{name}, authors' network", _images, (name, root, c, 0)) for name in (sets if root else ()) for c in classes
    ]
    calls += [
        (f"digits, beta {beta:g}", _digits, (c, beta, seed))
        for beta in (0.01, 10.0)
        for c in (range(10) if iterations is None else classes)
        for seed in range(seeds)
    ]
    if roots:
        chosen = names or (*SEARCH, *_others(roots), "arrhythmia")
        calls += [
            (f"tables, beta {beta:g}", _table, (name, roots, beta, seed))
            for beta in (0.1, 10.0)
            for name in chosen
            if name != "arrhythmia"
            for seed in range(seeds)
        ]
        if "arrhythmia" in chosen:
            calls += [("Arrhythmia, authors' network", _arrhythmia, (roots[0], splits, s)) for s in range(5 * seeds)]
    keys = []
    for family, load, arguments in calls:
        whole = {"family": family, "arguments": json.loads(json.dumps(arguments, default=str))}
        label = "_".join([re.sub(r"\W+", "_", family), str(arguments[0 if load is not _arrhythmia else -1])])
        configuration = {**whole, "iterations": iterations, "window": WINDOW, "version": VERSION}
        keys.append((label, configuration, (family, load, arguments, iterations)))
    kept = run_missing(Runs(runs), _run, keys, jobs, "stopping")
    failed = [f"{run['configuration']['arguments']}: {run['error']}" for run in kept if "error" in run]
    done = [{name: run[name] for name in ("family", "arguments", "chosen")} for run in kept if "error" not in run]
    finish(output, {**record, "table": _table_of(done) if done else "", "failed": failed, "runs": done})
    if failed:
        raise SystemExit(1)
