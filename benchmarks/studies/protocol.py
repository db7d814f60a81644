"""The authors' experiments: their settings, splits, batches and weights, and one training for all protocols.

Needs torch, NumPy and scikit-learn only, so that it also runs on a machine without anomalib and PyOD.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.data.tables import read_table
from toll_plugin.core import (
    DenseAutoencoder,
    ImageScaling,
    Paper28Autoencoder,
    Paper32Autoencoder,
    TollLoss,
    TollTerms,
    contrast_range,
    terms_of,
)

Arrays = dict[str, np.ndarray]

#: The authors' networks.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "paper28": Paper28Autoencoder,
    "paper32": Paper32Autoencoder,
    "dense": lambda latent_dim: DenseAutoencoder(latent_dim=latent_dim),
}


@dataclass(frozen=True)
class Settings:
    """What is trained on one data set; the defaults of a data set are in :data:`SETTINGS`."""

    network: str
    beta: float
    latent_dim: int
    lr: float
    batch_size: int
    scaling: str
    n_classes: int
    metric: str = "AUROC"
    iterations: int = 2000
    validate_every: int = 20
    bf16: bool = False


#: From the authors' README and code.
SETTINGS = {
    "mnist": Settings("paper28", 1000.0, 128, 1e-4, 1000, "paper_mnist", 10),
    "fashion_mnist": Settings("paper28", 100.0, 256, 1e-4, 500, "paper_fashion_mnist", 10),
    "cifar10": Settings("paper32", 10.0, 64, 1e-2, 50, "paper_cifar", 10),
    "cifar100": Settings("paper32", 100.0, 64, 1e-3, 100, "paper_cifar", 20),
    "arrhythmia": Settings("dense", 10.0, 16, 1e-3, 100, "none", 1, "F1"),
}

#: Of the training, in the names of kept runs: a change that moves numbers makes it another.
VERSION = 1

#: The protocols: the step whose weights are scored has the lowest value. ``benchmarks/stopping.py``
#: compares rules without labels; on the authors' networks spliced samples lose least.
PROTOCOLS: dict[str, Callable[[dict[str, float]], float]] = {
    "paper": lambda step: -step["validation"],
    "label-free": lambda step: step["synthetic"],
    "held-out loss": lambda step: step["total"],
    "last": lambda step: -step["step"],
}


@dataclass
class Parts:
    """What one class's runs see: samples as they lie in memory, and how the network sees them."""

    train: Tensor
    validation: Tensor
    validation_anomalous: np.ndarray
    test: Tensor
    test_anomalous: np.ndarray
    scale: Callable[[Tensor], Tensor]
    #: Stand-ins for anomalies, made of the held-out normal samples.
    synthetic: Tensor
    #: Training samples of this class and of those that the authors' loop trains before it.
    sizes: list[int]
    #: Whether the test part is scored at every validation, for a study.
    trace_test: bool = False


def image_parts(data: Arrays, settings: Settings, normal_class: int) -> Parts:
    """Parts of an image set: ``{train, test}_{images, labels}`` as bytes, ``held_out`` and ``val_indices``.

    The class's training images that are not held out train, images of all classes validate
    and test.
    """
    held_out = np.zeros(len(data["train_labels"]), dtype=bool)
    held_out[data["held_out"]] = True
    labels = data["train_labels"]
    mine = labels == normal_class

    def images(part: str, rows: Any) -> Tensor:
        return torch.from_numpy(data[f"{part}_images"][rows])  # a copy: a process may share the array read-only

    value_range = contrast_range(images("train", mine).double()) if settings.scaling == "paper_cifar" else None
    validation, anomalous = images("train", data["val_indices"]), ~mine[data["val_indices"]]
    return Parts(
        train=images("train", mine & ~held_out),
        validation=validation,
        validation_anomalous=anomalous,
        synthetic=splice(validation[torch.from_numpy(~anomalous)], np.random.default_rng(0)),
        test=images("test", np.arange(len(data["test_labels"]))),
        test_anomalous=data["test_labels"] != normal_class,
        scale=Bytes(ImageScaling(settings.scaling, value_range)),
        sizes=[int((labels[~held_out] == c).sum()) for c in range(normal_class + 1)],
    )


class Bytes:
    """Bytes to what the network sees, on whatever device they are."""

    def __init__(self, scaling: ImageScaling) -> None:
        self._scaling = scaling

    def __call__(self, images: Tensor) -> Tensor:
        """Scale a batch, like the authors in double precision where the device has it."""
        wide = torch.float32 if images.device.type == "mps" else torch.float64
        return self._scaling.to(images.device)(images.to(wide) / 255).float()


def table_parts(data: Arrays, settings: Settings, normal_class: int = 0) -> Parts:
    """Parts of Arrhythmia, raw: rows ``{train, validation, test}_{normal, anomalous}``."""
    del settings, normal_class

    def rows(*names: str) -> Tensor:
        return torch.from_numpy(np.concatenate([data[name] for name in names])).float()

    def anomalous(part: str) -> np.ndarray:
        return np.repeat([False, True], [len(data[f"{part}_normal"]), len(data[f"{part}_anomalous"])])

    return Parts(
        train=rows("train_normal"),
        validation=rows("validation_normal", "validation_anomalous"),
        validation_anomalous=anomalous("validation"),
        synthetic=splice(rows("validation_normal"), np.random.default_rng(0)),
        test=rows("test_normal", "test_anomalous"),
        test_anomalous=anomalous("test"),
        scale=as_they_are,
        sizes=[len(data["train_normal"])],
        trace_test=True,
    )


def as_they_are(rows: Tensor) -> Tensor:
    return rows


def splice(samples: Tensor, generator: np.random.Generator) -> Tensor:
    """Stand-ins for anomalies: each sample with a part of another one, from elsewhere in an image, in a third of a row.

    After CutPaste (arXiv 2104.04015), with another image as the source.
    """
    made, others = samples.clone(), samples[generator.permutation(len(samples))]
    for sample, other in zip(made, others, strict=True):
        if samples.ndim == 2:
            columns = generator.permutation(samples.shape[1])[: max(1, samples.shape[1] // 3)]
            sample[columns] = other[columns]
            continue
        height, width = sample.shape[1:]
        h, w = (int(generator.integers(max(1, side // 4), side // 2 + 1)) for side in (height, width))
        (top, to), (left, at) = (generator.integers(0, side - cut + 1, 2) for side, cut in ((height, h), (width, w)))
        sample[:, top : top + h, left : left + w] = other[:, to : to + h, at : at + w]
    return made


def draw(count: int) -> np.ndarray:
    """A shuffle where the authors' is not at hand, always the same."""
    return np.random.default_rng(0).permutation(count)


def f1_at_known_rate(anomalous: np.ndarray, scores: np.ndarray) -> float:
    """F1 of flagging as many samples as there are anomalies; of equal scores, normal samples are flagged first."""
    order = np.lexsort((anomalous, -scores))
    return float(anomalous[order[: anomalous.sum()]].mean())


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "AUROC": lambda anomalous, scores: float(roc_auc_score(anomalous, scores)),
    "F1": f1_at_known_rate,
}

_GLOBAL_GENERATOR = threading.Lock()


def initial_network(settings: Settings, seed: int, normal_class: int) -> nn.Module:
    """The authors' initial weights: they seed torch once per seed and build one network per class after it."""
    build = NETWORKS[settings.network]
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(normal_class):
            build(settings.latent_dim)
        return build(settings.latent_dim)


def batches(sizes: list[int], settings: Settings) -> Iterator[np.ndarray]:
    """The authors' batches of the last of ``sizes``: NumPy's old generator at 42, through the classes in turn."""
    draw = np.random.RandomState(42)  # the generator behind the authors' numpy.random.choice
    for size in sizes[:-1]:
        for _ in range(settings.iterations):
            draw.permutation(size)
    for _ in range(settings.iterations):
        yield draw.permutation(sizes[-1])[: settings.batch_size]


def pick_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        ValueError: If torch knows no such device, or cannot use it here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (AssertionError, RuntimeError) as error:
        msg = f"device must be auto or one that torch can use here, got {device!r}: {error}"
        raise ValueError(msg) from error
    return picked


def train(
    parts: Parts,
    settings: Settings,
    seed: int,
    normal_class: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    network: nn.Module | None = None,
    on_iteration: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """Train once; return what each protocol chose and scored, and the weights of the chosen steps.

    Args:
        parts: The data.
        settings: The experiment.
        seed: Of the initial weights.
        normal_class: The class, which decides what the authors' generators drew before it.
        device: ``auto``, ``cpu``, ``cuda``, ...
        threads: Of torch, for the length of the run. Default: as it is.
        network: Another than the authors', with its initial weights.
        on_iteration: Called after each.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If a class has fewer training samples than a batch, or validation or test lack a kind.
    """
    if settings.batch_size > parts.sizes[-1]:
        msg = f"batch_size must be at most the {parts.sizes[-1]} training samples, got {settings.batch_size}"
        raise ValueError(msg)
    for name, anomalous in (("validation", parts.validation_anomalous), ("test", parts.test_anomalous)):
        if not anomalous.any() or (~anomalous).sum() < 2:
            counts = f"{anomalous.sum()} and {(~anomalous).sum()}"
            msg = f"the {name} part must hold an anomaly and two normal samples, got {counts}"
            raise ValueError(msg)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        run = _Run(parts, settings, network or initial_network(settings, seed, normal_class), pick_device(device))
        return run.train(on_iteration)
    finally:
        torch.set_num_threads(before)


def score(
    parts: Parts, settings: Settings, weights: dict[int, dict[str, Tensor]], device: str = "auto"
) -> dict[int, dict[str, float]]:
    """Test metrics of kept weights, by step."""
    network = NETWORKS[settings.network](settings.latent_dim)
    run = _Run(parts, settings, network, pick_device(device))
    return {step: run.test(state) for step, state in weights.items()}


class _Run:
    """A network, its data on one device, and what is measured on the way."""

    def __init__(self, parts: Parts, settings: Settings, network: nn.Module, device: torch.device) -> None:
        self._settings, self._scale, self._device = settings, parts.scale, device
        self._network, self._loss = network.to(device), TollLoss(settings.beta)
        self._metric = METRICS[settings.metric]
        self._parts = replace(
            parts,
            train=parts.train.to(device),
            validation=parts.validation.to(device),
            test=parts.test.to(device),
            synthetic=parts.synthetic.to(device),
        )

    def train(self, on_iteration: Callable[[], object]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
        settings, parts, network = self._settings, self._parts, self._network
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
        trace: list[dict[str, float]] = []
        chosen: dict[str, tuple[float, int]] = {}
        weights: dict[int, dict[str, Tensor]] = {}
        seconds = dict.fromkeys(("training", "validation", "test"), 0.0)
        clock = _Clock(seconds, self._device)
        for iteration, index in enumerate(batches(parts.sizes, settings), start=1):
            network.train()
            x = self._scale(parts.train[torch.from_numpy(index).to(self._device)])
            with self._autocast():
                terms = self._loss.terms(x, *network(x))
            # The score of the means is the mean of the scores; in this order the authors' loop is met to the last bit.
            loss = self._loss.score(TollTerms(terms.reconstruction.mean(), terms.latent.mean()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_iteration()
            if iteration % settings.validate_every and iteration < settings.iterations:
                continue
            clock.stop("training")
            trace.append({"step": iteration, "batch_loss": loss.item(), **self._validate()})
            for protocol, value in ((name, rule(trace[-1])) for name, rule in PROTOCOLS.items()):
                if protocol not in chosen or value < chosen[protocol][0]:
                    chosen[protocol] = (value, iteration)
            kept = {step for _, step in chosen.values()}
            if iteration in kept:
                weights[iteration] = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
            weights = {step: weights[step] for step in sorted(kept)}
            clock.stop("validation")
        tested = {step: self.test(state) for step, state in weights.items()}
        clock.stop("test")
        result = {
            "protocols": {name: {"step": step, **tested[step]} for name, (_, step) in chosen.items()},
            "trace": [{k: round(v, 6) for k, v in step.items()} for step in trace],
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
            "threads": torch.get_num_threads(),
            "train_samples": len(parts.train),
        }
        return result, weights

    def test(self, state: dict[str, Tensor]) -> dict[str, float]:
        """The metric on the test part, by the score and by each term alone."""
        self._network.load_state_dict(state)
        terms = self._terms(self._parts.test)
        return {
            name: self._metric(self._parts.test_anomalous, self._loss.score(terms, name).numpy())
            for name in ("total", "reconstruction", "latent")
        }

    def _validate(self) -> dict[str, float]:
        """The labelled metric, and what is known of the held-out normal samples without labels."""
        terms = self._terms(self._parts.validation)
        anomalous = self._parts.validation_anomalous
        scores = self._loss.score(terms)
        found = {"validation": self._metric(anomalous, scores.numpy())}
        normal = torch.from_numpy(~anomalous)
        held_out = TollTerms(*(term[normal].double() for term in terms))
        found |= statistics(held_out, self._loss)
        made = self._loss.score(self._terms(self._parts.synthetic))
        both = torch.cat([scores[normal], made]).numpy()
        found["synthetic"] = 1 - METRICS["AUROC"](np.arange(len(both)) >= int(normal.sum()), both)
        if self._parts.trace_test:
            tested = self._loss.score(self._terms(self._parts.test))
            found["test"] = self._metric(self._parts.test_anomalous, tested.numpy())
        return found

    def _terms(self, samples: Tensor) -> TollTerms:
        with self._autocast():
            found = [terms_of(self._network, self._scale(part), self._loss) for part in torch.split(samples, 500)]
        terms = TollTerms(*(torch.cat(term).float().cpu() for term in zip(*found, strict=True)))
        if not all(bool(term.isfinite().all()) for term in terms):
            msg = "a score is not finite: training has diverged, a lower lr may help"
            raise FloatingPointError(msg)
        return terms

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.bf16)


def statistics(held_out: TollTerms, loss: TollLoss) -> dict[str, float]:
    """What held-out normal samples alone say about a step: means of the score and its terms, and its spread."""
    scores = loss.score(held_out)
    return {
        "total": float(scores.mean()),
        "reconstruction": float(held_out.reconstruction.mean()),
        "latent": float(held_out.latent.mean()),
        "spread": float(scores.std() / scores.mean()),
        "tail": float(scores.quantile(0.95) / scores.median()),
    }


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device, self._last = seconds, device, time.perf_counter()

    def stop(self, what: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[what] += now - self._last
        self._last = now


def arrhythmia_rows(root: Path, splits: Path | None) -> Arrays:
    """The authors' parts: 232 training rows, 77 normal and 13 anomalous rows each to validate and to test."""
    path = next((p for p in (root / "arrhythmia.mat", root / "ODDS" / "arrhythmia.mat") if p.is_file()), None)
    if path is None:
        msg = (
            f"no arrhythmia.mat in {root} or {root / 'ODDS'}: download it from "
            "https://odds.cs.stonybrook.edu/arrhythmia-dataset/, or set root or TOLL_DATA_ROOT to its folder"
        )
        raise FileNotFoundError(msg)
    x, y = read_table(path)
    parts: Arrays = {}
    for kind, rows in (("normal", x[y == 0]), ("anomalous", x[y == 1])):
        authors = splits and splits / f"randomized_{kind}_indices_arrhythmia.npy"
        order = np.load(authors) if authors else draw(len(rows))
        first, second = round(0.2 * len(rows)), round(0.4 * len(rows))
        shuffled = rows[order]
        parts |= {f"test_{kind}": shuffled[:first], f"validation_{kind}": shuffled[first:second]}
        # The authors leave the other anomalies aside.
        parts |= {"train_normal" if kind == "normal" else "unused_anomalous": shuffled[second:]}
    return parts


def threads_each(jobs: int) -> int:
    """Threads of each of several runs at a time, at most those that torch would take (``OMP_NUM_THREADS``)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // jobs, torch.get_num_threads()))
