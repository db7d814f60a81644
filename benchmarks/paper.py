"""The paper's five experiments: one training per class and seed, three protocols, one table."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from benchmarks import protocol
from benchmarks.records import RESULTS, cluster, finish, provenance
from benchmarks.runs import Runs, run_missing
from toll_plugin.image_sets import data_root, read_image_set

DataSet = Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "arrhythmia"]

#: Data set, root, the authors' indices, validation size: what :func:`load` reads.
Source = tuple[DataSet, Path, Path | None, int]

#: Files in the authors' folder "val IDs".
_SPLITS = {"mnist": "mnist", "fashion_mnist": "fmnist", "cifar10": "cifar10", "cifar100": "cifar100"}

#: One-vs-rest AUROC as published, mean over all classes. Each has its own network and selection.
PUBLISHED = {
    "mnist": {
        "GT": 98.0,
        "P-KDGAN": 97.8,
        "MemAE": 97.5,
        "OCGAN": 97.5,
        "Deep SVDD": 94.8,
        "AnoGAN": 93.7,
        "IF": 92.3,
        "OC-SVM": 91.3,
    },
    "fashion_mnist": {"GT": 93.5, "Deep SVDD": 93.0, "AE": 82.0},
    "cifar10": {
        "GT": 86.0,
        "DROCC": 74.2,
        "P-KDGAN": 73.8,
        "OCGAN": 65.6,
        "Deep SVDD": 64.8,
        "OC-SVM": 64.8,
        "AnoGAN": 61.2,
        "MemAE": 60.9,
        "IF": 55.4,
    },
}

#: What the authors' own code gives on Arrhythmia with the same split and seeds 0 to 9, measured once.
AUTHORS_F1 = "63.8 ± 6.9"

_HEADS = {
    "paper": "labelled choice (the authors')",
    "label-free": "label-free choice",
    "last": "last step",
}

_DETECTOR = Path(__file__).parents[1] / "configs/paper/arrhythmia.yaml"


def paper(
    dataset: DataSet = "mnist",
    root: Path | None = None,
    splits: Path | None = None,
    seeds: int = 10,
    classes: str | None = None,
    iterations: int = 2000,
    batch_size: int | None = None,
    validate_every: int = 20,
    validation_size: int = 10_000,
    beta: float | None = None,
    latent_dim: int | None = None,
    lr: float | None = None,
    bf16: bool = False,
    mode: Literal["train", "eval"] = "train",
    device: str = "auto",
    jobs: int = 1,
    scheduler: str | None = None,
    runs: Path = Path("runs/paper"),
    output: Path | None = None,
) -> None:
    """One of the paper's experiments by the authors' protocol, a label-free choice of the step, and the last step.

    All three score the same training, whose weights and batches are the authors'. Runs that are
    finished are kept and not run again, so a killed command goes on where it was.

    Args:
        dataset: Which experiment.
        root: Folder that holds the data; TOLL_DATA_ROOT or ./datasets by default. Images lie as torchvision has them.
        splits: Folder with the authors' indices ("val IDs" in their repository); by default as many are drawn.
        seeds: Initial weights 0, 1, ...
        classes: Normal classes, as 0-9 or 0,3,8; all by default.
        iterations: Training batches.
        batch_size: By default the authors'.
        validate_every: Iterations between labelled validations.
        validation_size: Of the validation images, use the first so many.
        beta: By default the authors'.
        latent_dim: By default the authors'.
        lr: By default the authors'.
        bf16: Compute in bfloat16 where torch's autocast does.
        mode: eval scores the weights again that finished runs kept, without training.
        device: auto, cpu, cuda, cuda:1, ...
        jobs: Runs at a time, also on one GPU; -1 for all cores, or all workers of a cluster.
        scheduler: Address of a Dask scheduler whose workers take the runs; they read root and splits too.
        runs: Where finished runs and their weights are kept.
        output: Where the record goes; benchmarks/results/paper_DATASET.json by default.
    """
    defaults = protocol.SETTINGS[dataset]
    given = {"batch_size": batch_size, "beta": beta, "latent_dim": latent_dim, "lr": lr}
    settings = replace(
        defaults,
        iterations=iterations,
        validate_every=validate_every,
        bf16=bf16,
        **{name: value for name, value in given.items() if value is not None},
    )
    chosen = parse_classes(classes, settings.n_classes)
    # Every process reads the files itself: sending them along with each run would cost more.
    source = (dataset, data_root(root).resolve(), splits and splits.resolve(), validation_size)
    _, drawn = load(*source)
    kept = Runs(runs / dataset)
    common = {"dataset": dataset, **asdict(settings), "held_out": drawn, "label_free": protocol.LABEL_FREE}
    keys = [
        (f"class{c}_seed{s}", {**common, "class": c, "seed": s}, (source, settings, c, s))
        for s in range(seeds)
        for c in chosen
    ]
    record = {"command": "paper", **provenance(), "dataset": dataset, "seeds": seeds, **asdict(settings)}
    if mode == "eval":
        records = [_again(kept, key, device) for key in keys]
    else:
        threads = max(1, protocol.cores() // (jobs if jobs > 0 else protocol.cores()))
        extra = (device, threads, jobs == 1 and scheduler is None)
        with cluster(scheduler):
            calls = [(label, configuration, (*arguments, *extra)) for label, configuration, arguments in keys]
            records = run_missing(kept, _run, calls, jobs, f"paper {dataset}")
    output = output or RESULTS / f"paper_{dataset}.json"
    table = make_table(dataset, settings, records, splits is not None)
    failed = sorted({f"class {r['configuration']['class']}: {r['error']}" for r in records if "error" in r})
    if failed:
        table += "\n\nFailed, and left out: " + "; ".join(failed) + "."
    finish(output, {**record, "split": "authors" if splits else "drawn", "table": table, "runs": _slim(records)})
    picture = kept.folder / "paper.png"
    plot(dataset, settings, records, picture)
    print(f"\nrecord {output}, plot {picture}, runs and weights {kept.folder}")


def parse_classes(classes: str | None, count: int) -> list[int]:
    """``None``, ``"0-9"``, ``"0,3,8"`` or ``"8"`` as a list."""
    if classes is None:
        return list(range(count))
    found: list[int] = []
    try:
        for item in classes.split(","):
            first, dash, last = item.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        found = []
    if not found or min(found) < 0 or max(found) >= count:
        msg = f"classes must be like 0-{count - 1} or 0,{count - 1}, within 0 to {count - 1}, got {classes!r}"
        raise ValueError(msg)
    return sorted(set(found))


@lru_cache(maxsize=1)
def load(dataset: DataSet, root: Path, splits: Path | None, validation_size: int) -> tuple[protocol.Arrays, str]:
    """The arrays of a data set, and a digest of what is held out."""
    if dataset == "arrhythmia":
        data = protocol.arrhythmia_rows(root, splits)
        held_out = data["validation_normal"]
    else:
        parts = read_image_set("cifar100_coarse" if dataset == "cifar100" else dataset, root)
        data = {}
        for name, part in zip(("train", "test"), parts, strict=True):
            data |= {f"{name}_images": part.images.numpy(), f"{name}_labels": part.labels.numpy()}
        if splits is None:
            indices = protocol.draw_validation(len(data["train_labels"]), validation_size)
        else:
            indices = np.load(splits / f"10000_val_indices_{_SPLITS[dataset]}.npy")
        # Images that are held out but not used to validate are not trained on either.
        data |= {"val_indices": indices[:validation_size], "held_out": indices}
        held_out = data["val_indices"]
    return data, hashlib.sha256(np.ascontiguousarray(held_out).tobytes()).hexdigest()[:10]


def _parts(data: protocol.Arrays, settings: protocol.Settings, normal_class: int) -> protocol.Parts:
    make = protocol.image_parts if "val_indices" in data else protocol.table_parts
    return make(data, settings, normal_class)


def _run(
    source: Source,
    settings: protocol.Settings,
    normal_class: int,
    seed: int,
    device: str,
    threads: int,
    show: bool,
) -> tuple[dict[str, Any], Any]:
    from tqdm import tqdm

    data, _ = load(*source)
    bar = tqdm(total=settings.iterations, desc=f"class {normal_class}, seed {seed}", leave=False) if show else None
    with bar or nullcontext():
        result, weights = protocol.train(
            _parts(data, settings, normal_class),
            settings,
            seed,
            normal_class,
            device=device,
            threads=threads,
            on_iteration=bar.update if bar else lambda: None,
        )
    if source[0] == "arrhythmia" and find_spec("pyod"):
        result["detectors"] = _detectors(data, settings.iterations, seed)
    return result, weights


def _detectors(data: protocol.Arrays, iterations: int, seed: int) -> dict[str, float]:
    """Test F1 of TollDetector with the authors' settings and with its own."""
    from toll_plugin.pyod import TollDetector

    rows = np.concatenate([data["test_normal"], data["test_anomalous"]])
    anomalous = np.arange(len(rows)) >= len(data["test_normal"])
    authors = yaml.safe_load(_DETECTOR.read_text())["init_args"]
    found = {}
    for name, arguments in (
        ("TollDetector, the authors' settings", authors | {"max_steps": iterations}),
        ("TollDetector, defaults", {}),
    ):
        detector = TollDetector(**arguments, random_state=seed).fit(data["train_normal"])
        found[name] = protocol.f1_at_known_rate(anomalous, detector.decision_function(rows))
    return found


def _again(kept: Runs, key: tuple[str, dict[str, Any], tuple[Any, ...]], device: str) -> dict[str, Any]:
    """A finished run with its kept weights scored again."""
    label, configuration, (source, settings, normal_class, _) = key
    record = kept.find(label, configuration)
    if record is None:
        msg = f"{label} of these settings is not in {kept.folder}: run without mode=eval first"
        raise FileNotFoundError(msg)
    data, _ = load(*source)
    found = protocol.score(_parts(data, settings, normal_class), settings, kept.weights(label, configuration), device)
    for result in record["protocols"].values():
        result.update(found[result["step"]])
    return record


def _slim(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what all of a table share; the files of the runs have it whole."""
    shared = ("configuration", "traceback")
    return [
        {"class": r["configuration"]["class"], "seed": r["configuration"]["seed"]}
        | {name: value for name, value in r.items() if name not in shared}
        for r in records
    ]


def _cell(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent; over seeds as the authors take it, with n below."""
    if not values:
        return ""
    spread = f" ± {100 * statistics.pstdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def make_table(
    dataset: str, settings: protocol.Settings, records: Sequence[dict[str, Any]], authors_split: bool
) -> str:
    """A line per class, empty where it was not run, and beside it what others published."""
    done = [record for record in records if "error" not in record]
    if dataset == "arrhythmia":
        return _arrhythmia_table(settings, done, authors_split)
    by: dict[tuple[str, int], list[float]] = {}
    for record in done:
        for name, result in record["protocols"].items():
            by.setdefault((name, record["configuration"]["class"]), []).append(result["total"])
    lines = [f"| normal class, test {settings.metric} in % | " + " | ".join(_HEADS.values()) + " | seeds |"]
    lines.append("|---" * (len(_HEADS) + 2) + "|")
    ran = [c for c in range(settings.n_classes) if ("last", c) in by]
    for c in range(settings.n_classes):
        count = str(len(by["last", c])) if c in ran else ""
        lines.append(f"| {c} | " + " | ".join(_cell(by.get((name, c), [])) for name in _HEADS) + f" | {count} |")
    if ran:
        which = "all" if len(ran) == settings.n_classes else f"the {len(ran)} that were run"
        means = [_cell([statistics.mean(by[name, c]) for c in ran]).split(" ±")[0] for name in _HEADS]
        lines.append(f"| mean over {which} | " + " | ".join(means) + " | |")
    lines.append("")
    lines.append(_budget(settings, done, authors_split))
    if dataset in PUBLISHED:
        peers = ", ".join(f"{name} {value:.1f}" for name, value in PUBLISHED[dataset].items())
        lines += [
            "",
            f"Published by others, not measured here, mean over all classes, each by its own selection: {peers}.",
        ]
    return "\n".join(lines)


def _budget(settings: protocol.Settings, done: Sequence[dict[str, Any]], authors_split: bool) -> str:
    first = done[0] if done else {}
    held_out = "the authors' validation indices" if authors_split else "validation indices drawn here"
    authors = protocol.SETTINGS.values()
    full = any(settings == replace(other, bf16=settings.bf16) for other in authors)
    budget = "The authors' full budget" if full else "A reduced budget, not the authors'"
    steps = {name: statistics.median(r["protocols"][name]["step"] for r in done) for name in _HEADS} if done else {}
    seconds = statistics.median(sum(r["seconds"].values()) for r in done) if done else 0.0
    return (
        f"{budget}: {settings.iterations} iterations of {settings.batch_size}, beta {settings.beta:g}, validated every "
        f"{settings.validate_every}, {held_out}, {'bfloat16 autocast' if settings.bf16 else 'single precision'}; "
        f"{seconds:.0f} s a run (median) on {first.get('device', '')} with {first.get('threads', '')} thread(s); "
        f"median step chosen: {steps.get('paper', 0):g} with labels, {steps.get('label-free', 0):g} without."
    )


def _arrhythmia_table(settings: protocol.Settings, done: Sequence[dict[str, Any]], authors_split: bool) -> str:
    lines = ["| how | test F1, % | smallest | largest |", "|---|---|---|---|"]
    if authors_split and settings == protocol.SETTINGS["arrhythmia"]:
        lines.append(
            f"| the authors' own code, their protocol (measured, not by this command) | {AUTHORS_F1} | 53.8 | 69.2 |"
        )
    rows = {head: [r["protocols"][name]["total"] for r in done] for name, head in _HEADS.items()}
    for name in done[0].get("detectors", {}) if done else ():
        rows[name] = [r["detectors"][name] for r in done]
    for name, values in rows.items():
        if values:
            lines.append(f"| {name} | {_cell(values)} | {100 * min(values):.1f} | {100 * max(values):.1f} |")
    return "\n".join([*lines, "", _budget(settings, done, authors_split)])


def plot(dataset: str, settings: protocol.Settings, records: Sequence[dict[str, Any]], path: Path) -> None:
    """What each protocol scores per class, and how the metric and the held-out loss move with the iterations."""
    from matplotlib.figure import Figure

    done = [record for record in records if "error" not in record]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for offset, (name, head) in zip((-0.2, 0.0, 0.2), _HEADS.items(), strict=True):
        x = [r["configuration"]["class"] + offset for r in done]
        left.plot(x, [100 * r["protocols"][name]["total"] for r in done], "o", label=head, alpha=0.7)
    for record in done:
        steps = [step["step"] for step in record["trace"]]
        colour = f"C{record['configuration']['class'] % 10}"
        middle.plot(steps, [100 * step["validation"] for step in record["trace"]], color=colour, alpha=0.6)
        right.plot(steps, [step["total"] for step in record["trace"]], color=colour, alpha=0.6)
    left.set(xlabel="normal class", ylabel=f"test {settings.metric}, %", title=f"{dataset}: by protocol")
    left.legend(fontsize="small")
    middle.set(xlabel="iteration", ylabel=f"validation {settings.metric}, %", title="with labels")
    right.set(xlabel="iteration", ylabel="mean score of held-out normal samples", title="without labels", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
