"""Data sets by name: how each lists its parts and how a part becomes a :class:`Split`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.interfaces import Split
from toll_plugin.core.checks import check_integer, check_option
from toll_plugin.image_sets import ImageSetName, data_root

Kind = Literal["images", "table"]
Arguments = Mapping[str, Any]
Table = tuple[np.ndarray, np.ndarray]

PROTOCOLS = ("semi-supervised", "unsupervised")

#: ODDS' tables that were not looked at while the defaults of this package were chosen.
CHECK = ("vertebral", "lympho", "ionosphere", "cardio", "shuttle", "pendigits", "musk", "mnist")

#: Those that defaults may be chosen by.
SEARCH = ("glass", "letter", "optdigits", "pima", "satellite", "satimage-2", "vowels", "wbc")


@dataclass(frozen=True)
class Limits:
    """How a part is cut.

    Attributes:
        max_train: Training images to draw; all by default.
        max_test: Test images to draw, labels not looked at.
        max_rows: Rows of a table to draw.
        validation_rows: Share of a table's training rows that is held out, in [0, 1).
    """

    max_train: int | None = None
    max_test: int | None = None
    max_rows: int = 10_000
    validation_rows: float = 0.0


@dataclass(frozen=True)
class DataSet:
    """A data set; its functions take the arguments that an experiment gives it.

    Attributes:
        about: One line for ``list``.
        kind: Which methods it is for.
        parts: Normal classes, categories or tables, each a comparison of its own.
        files: What a part is read from, so that changed files are run again.
        load: A part as a split of images, or as rows and labels of a table.
        arguments: Which arguments there are, beside ``parts``.
    """

    about: str
    kind: Kind
    parts: Callable[[Arguments], list[str]]
    files: Callable[[Arguments, str], Sequence[Path]]
    load: Callable[[Arguments, str, int], Split] | Callable[[Arguments, str], Table]
    arguments: tuple[str, ...] = ("root",)

    def split(self, arguments: Arguments, part: str, protocol: str, seed: int, limits: Limits) -> Split:
        """What methods see of a part.

        Semi-supervised: trained on normal samples only. Unsupervised, for tables: trained on all
        rows, which are then ranked.
        """
        if self.kind == "images":
            return _drawn(self.load(arguments, part, seed), seed, limits)
        return _rows(*self.load(arguments, part), protocol, seed, limits)

    def fingerprint(self, arguments: Arguments, part: str) -> str:
        """Changes when a file of the part does."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files(arguments, part)]
        return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:16]


def halves(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half of the normal rows to train on; the others and all anomalies, shuffled, to test on; their labels."""
    draw = np.random.default_rng(seed)
    normal = draw.permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    test = draw.permutation(np.concatenate([normal[half:], np.flatnonzero(y == 1)]))
    return x[normal[:half]], x[test], y[test]


def _at_most(x: np.ndarray, y: np.ndarray, max_rows: int) -> Table:
    """The table, or so many of its rows, always the same."""
    chosen = slice(None) if len(x) <= max_rows else np.random.default_rng(0).permutation(len(x))[:max_rows]
    return x[chosen], y[chosen]


def _rows(x: np.ndarray, y: np.ndarray, protocol: str, seed: int, limits: Limits) -> Split:
    x, y = _at_most(x, y, limits.max_rows)
    train, test, y = halves(x, y, seed) if protocol == "semi-supervised" else (x, x, y)
    held_out = round(limits.validation_rows * len(train))
    train, validation = train[held_out:], train[:held_out]
    return Split(*(torch.from_numpy(rows) for rows in (train, validation, test)), y == 1)


def _drawn(split: Split, seed: int, limits: Limits) -> Split:
    """At most so many images of each part."""
    draw = np.random.default_rng(seed)
    train = draw.permutation(len(split.train))[: limits.max_train]
    held_out = draw.permutation(len(split.validation))[: limits.max_train]
    test = np.sort(draw.permutation(len(split.test))[: limits.max_test])
    return Split(
        split.train[train],
        split.validation[held_out],
        split.test[test],
        split.anomalous[test],
        None if split.masks is None else split.masks[test],
    )


def _one_vs_rest(make: Callable[..., Any], arguments: Arguments, part: str, seed: int) -> Split:
    data = make(arguments, normal_class=int(part), seed=seed)
    data.setup()
    train, validation, test = (getattr(data, f"{name}_data") for name in ("train", "val", "test"))
    return Split(train.images, validation.images, test.images, test.anomalous.numpy())


def _digits(_: Arguments, **given: Any) -> Any:
    from toll_plugin.anomalib import DigitsOneVsRest

    return DigitsOneVsRest(**given)


def _image_set(name: str, arguments: Arguments, **given: Any) -> Any:
    import toll_plugin.anomalib as adapter

    return getattr(adapter, name)(root=arguments.get("root"), download=False, **given)


@lru_cache(maxsize=1)
def _classes(name: ImageSetName, root: Path) -> int:
    from toll_plugin.image_sets import read_image_set

    return int(read_image_set(name, root)[0].labels.max()) + 1


def _set(name: ImageSetName, kind: str, folder: str, about: str) -> DataSet:
    def files(arguments: Arguments, _: str) -> list[Path]:
        found = data_root(arguments.get("root")) / folder
        return [path for path in sorted(found.glob("*")) if path.is_file()]

    return DataSet(
        about,
        "images",
        lambda arguments: [str(c) for c in range(_classes(name, data_root(arguments.get("root"))))],
        files,
        partial(_one_vs_rest, partial(_image_set, kind)),
    )


def _categories(arguments: Arguments) -> list[str]:
    root = _folder(arguments)
    found = (
        [root.name] if (root / "train/good").is_dir() else sorted(p.parents[1].name for p in root.glob("*/train/good"))
    )
    if not found:
        msg = f"root must hold train/good, or folders that do, as MVTec AD has them, got {root}"
        raise FileNotFoundError(msg)
    return found


def _folder(arguments: Arguments) -> Path:
    return Path(arguments["root"]).expanduser() if "root" in arguments else data_root() / "MVTecAD"


def _category(arguments: Arguments, part: str) -> Path:
    root = _folder(arguments)
    return root if (root / "train/good").is_dir() else root / part


def _parts_images(arguments: Arguments, part: str, seed: int) -> Split:
    """A category, resized; a fifth of the normal training images validates."""
    from anomalib.data.datasets.image.mvtecad import make_mvtec_ad_dataset
    from PIL import Image

    size = check_integer("image_size", arguments.get("image_size", 256), minimum=8)
    samples = make_mvtec_ad_dataset(_category(arguments, part))

    def read(path: str, mode: str) -> np.ndarray:
        resample = Image.Resampling.NEAREST if mode == "1" else Image.Resampling.BILINEAR
        with Image.open(path) as image:
            return np.asarray(image.convert(mode).resize((size, size), resample))

    def images(rows: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([read(path, "RGB") for path in rows.image_path])).permute(0, 3, 1, 2).clone()

    train, test = (samples[samples.split == name] for name in ("train", "test"))
    order = np.random.default_rng(seed).permutation(len(train))
    held_out = max(1, round(0.2 * len(train)))
    anomalous = test.label_index.to_numpy() == 1
    masks = None
    if (test.mask_path[anomalous] != "").any():
        empty = np.zeros((size, size), bool)
        masks = np.stack([read(path, "1") if path else empty for path in test.mask_path])
    return Split(
        images(train.iloc[order[held_out:]]), images(train.iloc[order[:held_out]]), images(test), anomalous, masks
    )


def _images_of(arguments: Arguments, part: str) -> list[Path]:
    return sorted(path for path in _category(arguments, part).rglob("*") if path.is_file())


def _tables_root(collection: str, arguments: Arguments) -> Path:
    return Path(arguments["root"]).expanduser() if "root" in arguments else data_root() / collection


def _tables(collection: str, arguments: Arguments) -> list[str]:
    root = _tables_root(collection, arguments)
    found = sorted(path.stem for kind in ("mat", "npz") for path in root.glob(f"*.{kind}"))
    if not found:
        msg = f"no .mat or .npz table in {root}: download them from {_FROM[collection]}, or name their folder by root"
        raise FileNotFoundError(msg)
    return found


_FROM = {
    "ODDS": "https://odds.cs.stonybrook.edu",
    "ADBench": "https://github.com/Minqi824/ADBench",
}


def _table_path(collection: str, arguments: Arguments, part: str) -> Path:
    return find_table(part, [_tables_root(collection, arguments)])


def find_table(name: str, roots: Sequence[Path]) -> Path:
    """``NAME.mat`` (ODDS) or ``NAME.npz`` (ADBench) in the first of ``roots`` that has it."""
    for root in roots:
        for path in (root / f"{name}.mat", root / f"{name}.npz"):
            if path.is_file():
                return path
    msg = f"no {name}.mat or {name}.npz in {', '.join(map(str, roots))}: see {_FROM['ODDS']}"
    raise FileNotFoundError(msg)


def read_table(path: Path) -> Table:
    """Rows in double precision, and labels, 1 for an anomaly, of a file with ``X`` and ``y``."""
    from scipy.io import loadmat

    table = loadmat(path) if path.suffix == ".mat" else np.load(path)
    return np.asarray(table["X"], dtype=float), np.asarray(table["y"]).ravel().astype(int)


def load(name: str, roots: Sequence[Path], max_rows: int = 10_000) -> Table:
    """A table of ODDS or ADBench by name."""
    return _at_most(*read_table(find_table(name, roots)), max_rows)


def _collection(collection: str, about: str) -> DataSet:
    return DataSet(
        about,
        "table",
        partial(_tables, collection),
        lambda arguments, part: [_table_path(collection, arguments, part)],
        lambda arguments, part: read_table(_table_path(collection, arguments, part)),
    )


def _file(arguments: Arguments) -> Path:
    if "path" not in arguments:
        msg = "the data set file needs a path, as in {file: {path: sensors.csv, label: anomaly}}"
        raise ValueError(msg)
    return Path(arguments["path"]).expanduser()


def _read_file(arguments: Arguments, _: str) -> Table:
    import pandas as pd

    path, label = _file(arguments), arguments.get("label", "label")
    check_option("the suffix of path", path.suffix, (".csv", ".parquet"))
    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    if label not in frame.columns:
        msg = f"label must name a column of {path}, {list(frame.columns)}, got {label!r}"
        raise ValueError(msg)
    values = frame.pop(label)
    if not values.isin([0, 1]).all():
        msg = f"column {label!r} of {path} must hold 1 for an anomaly and 0 for a normal row, got {values.unique()[:5]}"
        raise ValueError(msg)
    odd = [name for name, kind in frame.dtypes.items() if kind.kind not in "biuf"]
    if odd:
        msg = f"columns of {path} must be numbers, got {', '.join(map(repr, odd))}: encode or drop them"
        raise ValueError(msg)
    return frame.to_numpy(dtype=float), values.to_numpy(dtype=int)


def _gaussian(arguments: Arguments, part: str) -> Table:
    """Rows around a curved surface of ``factors`` dimensions; anomalies lie off it.

    Every informative column is a fixed mixture of the factors and of their products, with noise.
    Anomalies combine the factors of different rows, so that each column alone looks normal.
    """
    if not re.fullmatch(r"\d+(\+\d+)?", part):
        msg = f"a part must be like 16 or 16+48, columns and columns of noise, got {part!r}"
        raise ValueError(msg)
    informative, _, added = part.partition("+")
    informative, noise = check_integer("columns", int(informative), minimum=2), int(added or 0)
    factors = check_integer("factors", arguments.get("factors", 4), minimum=1)
    rows = check_integer("rows", arguments.get("rows", 1000), minimum=10)
    draw = np.random.default_rng(0)
    code = draw.normal(size=(2 * rows + rows // 5, factors))
    curved = np.concatenate([code, np.sin(2 * code), code * code[:, ::-1]], axis=1)
    y = (np.arange(len(code)) >= 2 * rows).astype(int)
    mixing = draw.normal(size=(curved.shape[1], informative)) / np.sqrt(curved.shape[1])
    x = curved @ mixing
    # A quarter of an anomaly's columns belong to another row.
    donors = x[draw.integers(0, 2 * rows, int(y.sum()))]
    taken = draw.random((int(y.sum()), informative)) < 0.25
    x[y == 1] = np.where(taken, donors, x[y == 1])
    x += 0.3 * draw.normal(size=x.shape)
    return np.concatenate([x, draw.normal(size=(len(x), noise))], axis=1), y


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        "scikit-learn's 1797 handwritten digits, 8x8, one class normal; bundled",
        "images",
        lambda _: [str(c) for c in range(10)],
        lambda *_: [],
        partial(_one_vs_rest, _digits),
        (),
    ),
    "mnist": _set("mnist", "MNISTOneVsRest", "MNIST/raw", "MNIST, one class normal"),
    "fashion_mnist": _set(
        "fashion_mnist", "FashionMNISTOneVsRest", "FashionMNIST/raw", "Fashion-MNIST, one class normal"
    ),
    "cifar10": _set("cifar10", "CIFAR10OneVsRest", "cifar-10-batches-py", "CIFAR-10, one class normal"),
    "cifar100": _set(
        "cifar100_coarse", "CIFAR100OneVsRest", "cifar-100-python", "CIFAR-100, one of 20 superclasses normal"
    ),
    "mvtec": DataSet(
        "MVTec AD, or one folder or several in its layout; masks give pixel metrics",
        "images",
        _categories,
        _images_of,
        _parts_images,
        ("root", "image_size"),
    ),
    "odds": _collection("ODDS", "the tables of a folder with ODDS' .mat files"),
    "adbench": _collection("ADBench", "the tables of a folder with ADBench's .npz files"),
    "file": DataSet(
        "a CSV or Parquet file with a column of labels (label: its name), 1 for an anomaly",
        "table",
        lambda arguments: [_file(arguments).stem],
        lambda arguments, _: [_file(arguments)],
        _read_file,
        ("path", "label"),
    ),
    "gaussian": DataSet(
        "made rows around a curved surface, anomalies off it; a part is FEATURES or FEATURES+NOISE_COLUMNS",
        "table",
        lambda _: ["16", "64", "256"],
        lambda *_: [],
        _gaussian,
        ("factors", "rows"),
    ),
}
