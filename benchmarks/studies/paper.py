"""The paper's five experiments: one training per class and seed, three protocols, one table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from benchmarks.run.jobs import check_jobs, cluster, run_missing
from benchmarks.run.metrics import f1_at_known_rate
from benchmarks.run.store import Configuration, Runs, finish, provenance
from benchmarks.studies import parts, training
from benchmarks.studies.paper_table import is_twin, make_table, plot
from benchmarks.studies.protocol import SETTINGS, VERSION, Settings
from toll_plugin.core.checks import check_finite_float, check_integer
from toll_plugin.image_sets import ImageSetName, data_root, download_image_set, read_image_set

DataSet = Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "arrhythmia"]

#: Data set, root, the authors' indices, validation size: what :func:`load` reads.
Source = tuple[DataSet, Path, Path | None, int]

#: Label, configuration and what :func:`_run` takes first.
Key = tuple[str, Configuration, tuple[Source, str, Settings, int, int]]

#: Files in the authors' folder "val IDs".
_SPLITS = {"mnist": "mnist", "fashion_mnist": "fmnist", "cifar10": "cifar10", "cifar100": "cifar100"}

_DETECTOR = Path(__file__).parents[2] / "configs/paper/arrhythmia.yaml"


def paper(
    dataset: DataSet = "mnist",
    root: Path | None = None,
    splits: Path | None = None,
    seeds: int = 10,
    classes: str | int | None = None,
    iterations: int = 2000,
    batch_size: int | None = None,
    validate_every: int = 20,
    validation_size: int = 10_000,
    beta: float | None = None,
    latent_dim: int | None = None,
    lr: float | None = None,
    bf16: bool = False,
    width: float = 1.0,
    twin: bool = True,
    mode: Literal["train", "eval"] = "train",
    device: str = "auto",
    jobs: int = 1,
    scheduler: str | None = None,
    runs: Path = Path("runs/paper"),
    output: Path | None = None,
) -> None:
    """One of the paper's experiments: the authors' labelled choice of the step, two without labels, and the last step.

    The label-free choice is the step that tells held-out normal samples best from splices of two of
    them. All score the same training, whose weights and batches are the authors'. Beside each run stands
    its twin: a run with beta 0 that begins with the same weights and sees the same batches. Runs that are
    finished are kept and not run again, so a killed command goes on where it was; failed ones are
    tried again, and the exit code is 1 while there are any.

    Args:
        dataset: Which experiment.
        root: Folder that holds the data; TOLL_DATA_ROOT or ./datasets by default. Images lie as torchvision has
            them, which downloads missing ones.
        splits: Folder with the authors' indices ("val IDs" in their repository); by default as many are drawn.
        seeds: Initial weights 0, 1, ...
        classes: Normal classes, as 0-9 or 0,3,8; all by default.
        iterations: Training batches.
        batch_size: By default the authors'.
        validate_every: Iterations between labelled validations.
        validation_size: Validate on so many of the 10 000 images that are held out, drawn at random.
        beta: By default the authors'.
        latent_dim: By default the authors'.
        lr: By default the authors'.
        bf16: Compute in bfloat16 where torch's autocast does.
        width: What the networks' hidden sizes are multiplied by; other than 1 is not the authors' network.
        twin: Whether each run has a twin with beta 0, which takes as long; runs with beta 0 have none.
        mode: eval scores the weights again that finished runs kept, without training, one after the other.
        device: auto, cpu, cuda, cuda:1, ...
        jobs: Runs at a time, also on one GPU; -1 for all cores, or all workers of a cluster.
        scheduler: Address of a Dask scheduler whose workers take the runs; they read root and splits too.
        runs: Where finished runs and their weights are kept.
        output: Where the record goes; record.json beside the runs by default.
    """
    check_integer("seeds", seeds, minimum=1)
    check_integer("validation_size", validation_size, minimum=2)
    check_jobs(jobs)
    if scheduler is None:
        training.pick_device(device)
    settings = replace(
        SETTINGS[dataset],
        iterations=check_integer("iterations", iterations, minimum=1),
        validate_every=check_integer("validate_every", validate_every, minimum=1),
        bf16=bf16,
        width=check_finite_float("width", width, minimum=0, exclusive=True),
        **_given(batch_size=batch_size, beta=beta, latent_dim=latent_dim, lr=lr),
    )
    chosen = parse_classes(classes, settings.n_classes)
    # Every process reads the files itself: sending them along with each run would cost more.
    source = (dataset, data_root(root).resolve(), splits and splits.expanduser().resolve(), validation_size)
    kept = Runs(runs / dataset)
    output = output or kept.folder / "record.json"
    for folder in (kept.folder, output.parent):
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before hours of work
    if dataset != "arrhythmia":
        download_image_set(_image_set(dataset), source[1])
    _, digest = load(*source)
    experiment = {"dataset": dataset, **asdict(settings), "validation_size": validation_size, "seeds": seeds}
    keys = [
        _key(source, digest, each, c, s)
        for s in range(seeds)
        for c in chosen
        for each in _with_twin(settings, twin=twin)
    ]
    split = "authors" if splits else "drawn"
    record = {"command": "paper", **provenance(), **experiment, "twin": twin, "mode": mode, "split": split}
    if mode == "eval":
        records = _again(kept, keys, device)
    else:
        threads = 1 if scheduler or jobs < 1 else training.threads_each(jobs)
        alone = jobs == 1 and scheduler is None
        calls = [(label, configuration, (*given, device, threads, alone)) for label, configuration, given in keys]
        with cluster(scheduler):
            records = run_missing(kept, _run, calls, jobs, f"paper {dataset}")
    found = _slim(records)
    table = make_table(record, found)
    failed = sorted({f"{_named(record, run)}: {run['error']}" for run in found if "error" in run})
    if failed:
        table += "\n\nFailed, and left out: " + "; ".join(failed) + "."
    finish(output, {**record, "table": table, "runs": found})
    picture = kept.folder / "paper.png"
    if any("error" not in run for run in found):
        plot(record, found, picture)
    print(f"\nrecord {output}, plot {picture}, runs and weights {kept.folder}")
    if failed:
        raise SystemExit(1)


def _with_twin(settings: Settings, *, twin: bool) -> list[Settings]:
    """The settings, and those of the twin where there is one: nothing but the weight of the latent term differs."""
    return [settings, replace(settings, beta=0.0)] if twin and settings.beta else [settings]


def _key(source: Source, digest: str, settings: Settings, normal_class: int, seed: int) -> Key:
    dataset, _, _, validation_size = source
    configuration = {"dataset": dataset, **settings.configuration(), "validation_size": validation_size}
    configuration |= {"data": digest, "version": VERSION, "class": normal_class, "seed": seed}
    # A twin is the run that --beta 0 would make, so it has that run's name.
    return f"class{normal_class}_seed{seed}", configuration, (source, digest, settings, normal_class, seed)


def _named(record: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """A run's class, and its beta where that tells it from the run whose twin it is."""
    return f"class {run['class']}" + ", beta 0" * is_twin(record, run)


def _given(batch_size: int | None, beta: float | None, latent_dim: int | None, lr: float | None) -> dict[str, Any]:
    """What replaces the authors' settings."""
    given: dict[str, Any] = {}
    for name, size in (("batch_size", batch_size), ("latent_dim", latent_dim)):
        if size is not None:
            given[name] = check_integer(name, size, minimum=1)
    for name, number in (("beta", beta), ("lr", lr)):
        if number is not None:
            given[name] = check_finite_float(name, number, minimum=0, exclusive=name == "lr")
    return given


def parse_classes(classes: str | int | None, count: int) -> list[int]:
    """``None``, ``"0-9"``, ``"0,3,8"`` or ``"8"`` as a list."""
    if classes is None:
        return list(range(count))
    found: list[int] = []
    try:
        for item in str(classes).split(","):
            first, dash, last = item.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        found = []
    if not found or min(found) < 0 or max(found) >= count:
        msg = f"classes must be like 0-{count - 1} or 0,{count - 1}, within 0 to {count - 1}, got {classes!r}"
        raise ValueError(msg)
    return sorted(set(found))


def _image_set(dataset: DataSet) -> ImageSetName:
    return "cifar100_coarse" if dataset == "cifar100" else dataset


@lru_cache(maxsize=1)
def load(dataset: DataSet, root: Path, splits: Path | None, validation_size: int) -> tuple[parts.Arrays, str]:
    """The arrays of a data set, and their digest."""
    if dataset == "arrhythmia":
        data = parts.arrhythmia_rows(root, splits)
    else:
        data = {}
        for name, part in zip(("train", "test"), read_image_set(_image_set(dataset), root), strict=True):
            data |= {f"{name}_images": part.images.numpy(), f"{name}_labels": part.labels.numpy()}
        count = len(data["train_labels"])
        if splits is None:
            indices = parts.draw(count)[: min(10_000, count // 2)]
        else:
            indices = np.load(splits / f"10000_val_indices_{_SPLITS[dataset]}.npy")
        # Images that are held out but not used to validate are not trained on either. Some are drawn: the
        # authors' file for Fashion-MNIST is sorted by class.
        drawn = np.sort(parts.draw(len(indices))[:validation_size])
        data |= {"val_indices": indices[drawn], "held_out": indices}
    digest = hashlib.sha256()
    for name, array in sorted(data.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array))
    return data, digest.hexdigest()[:16]


def _parts(data: parts.Arrays, settings: Settings, normal_class: int) -> parts.Parts:
    if "val_indices" in data:
        return parts.image_parts(data, settings, normal_class)
    return parts.table_parts(data)


def _same(source: Source, digest: str) -> parts.Arrays:
    """The arrays, if they are those that the command has read."""
    data, found = load(*source)
    if found != digest:
        load.cache_clear()  # a worker may outlive the files it has read
        data, found = load(*source)
    if found != digest:
        msg = f"{source[0]} in {source[1]} is not what the command was given: its digest is {found}, not {digest}"
        raise ValueError(msg)
    return data


def _run(
    source: Source,
    digest: str,
    settings: Settings,
    normal_class: int,
    seed: int,
    device: str,
    threads: int,
    alone: bool,
) -> tuple[dict[str, Any], Any]:
    from tqdm import tqdm

    data = _same(source, digest)
    samples, what = _parts(data, settings, normal_class), f"class {normal_class}, seed {seed}, beta {settings.beta:g}"
    # Bars of several processes would write over each other.
    with tqdm(total=settings.iterations, desc=what, leave=False, disable=not alone) as bar:
        result, weights = training.train(
            samples, settings, seed, normal_class, device=device, threads=threads, on_iteration=bar.update
        )
    authors = SETTINGS["arrhythmia"]
    if replace(settings, iterations=authors.iterations, validate_every=authors.validate_every) == authors and find_spec(
        "pyod"
    ):
        result["detectors"] = _detectors(data, settings.iterations, seed)
    return result, weights


def _detectors(data: parts.Arrays, iterations: int, seed: int) -> dict[str, float]:
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
        found[name] = f1_at_known_rate(anomalous, detector.decision_function(rows))
    return found


def _again(kept: Runs, keys: Sequence[Key], device: str) -> list[dict[str, Any]]:
    """Finished runs with their kept weights scored again; what is not finished is said.

    Raises:
        FileNotFoundError: If none is.
    """
    found: list[dict[str, Any]] = []
    missing: list[str] = []
    for label, configuration, (source, digest, settings, normal_class, _) in keys:
        record = kept.find(label, configuration)
        if record is None:
            missing.append(f"{label} (beta {settings.beta:g})")
            continue
        samples = _parts(_same(source, digest), settings, normal_class)
        scored = training.score(samples, settings, kept.weights(label, configuration), device)
        for result in record["protocols"].values():
            result.update(scored[result["step"]])
        found.append(record)
    if missing:
        print(f"not finished with these settings in {kept.folder}: {', '.join(missing)}")
    if not found:
        msg = f"no run of these settings is finished in {kept.folder}: run without mode=eval first"
        raise FileNotFoundError(msg)
    return found


def _slim(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what all of a table share; the files of the runs have it whole."""
    shared = ("configuration", "traceback", "weights")
    return [
        {name: r["configuration"][name] for name in ("class", "seed", "beta")}
        | {name: value for name, value in r.items() if name not in shared}
        for r in records
    ]
