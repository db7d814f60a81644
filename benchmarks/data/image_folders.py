"""Folders in MVTec AD's layout, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.interfaces import Split
from toll_plugin.core.checks import check_integer, check_option
from toll_plugin.image_sets import data_root


def categories(arguments: Mapping[str, Any]) -> list[str]:
    root = folder_of(arguments, "MVTecAD")
    one = (root / "train/good").is_dir()
    found = [root.resolve().name] if one else sorted(path.parents[1].name for path in root.glob("*/train/good"))
    if not found:
        msg = f"root must hold train/good, or folders that do, as MVTec AD has them, got {root}"
        raise FileNotFoundError(msg)
    return found


def folder_of(arguments: Mapping[str, Any], name: str) -> Path:
    """The ``root`` that an experiment names, there or where data are looked for; else ``name`` where they are."""
    if "root" not in arguments:
        return data_root() / name
    root = Path(arguments["root"]).expanduser()
    return root if root.exists() else data_root() / root


def _category(arguments: Mapping[str, Any], part: str) -> Path:
    root = folder_of(arguments, "MVTecAD")
    check_option("a part of mvtec", part, categories(arguments))
    return root if (root / "train/good").is_dir() else root / part


def inspected(arguments: Mapping[str, Any], part: str, seed: int) -> Split:
    """A category, resized; a fifth of the normal training images validates.

    With the argument ``joined`` the training and validation images are those of all categories, one model for all.
    """
    size = check_integer("image_size", arguments.get("image_size", 256), minimum=8)
    folder = _category(arguments, part)
    good, bad = _pictures(folder / "test/good"), []
    for kind in sorted(path for path in (folder / "test").glob("*") if path.is_dir() and path.name != "good"):
        bad += _pictures(kind)
    masks = [_mask(folder, path) for path in bad]
    if any(masks) and not all(masks):
        without = bad[masks.index(None)]
        msg = f"either no anomalous image or each must have a mask in ground_truth, got none for {without}"
        raise FileNotFoundError(msg)
    kept: list[Path] = []
    held_out: list[Path] = []
    for one in categories(arguments) if arguments.get("joined") else [part]:
        train = _pictures(_category(arguments, one) / "train/good")
        order = np.random.default_rng(seed).permutation(len(train))
        count = max(1, round(0.2 * len(train)))
        kept += [train[i] for i in order[count:]]
        held_out += [train[i] for i in order[:count]]
    shown = None
    if any(masks):
        shown = np.zeros((len(good) + len(bad), size, size), bool)
        for i, path in enumerate(masks, start=len(good)):
            shown[i] = _pixels(path, size, mask=True) > 0

    def images(paths: Sequence[Path]) -> torch.Tensor:
        pixels = np.stack([_pixels(path, size) for path in paths]) if paths else np.zeros((0, size, size, 3), np.uint8)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    return Split(
        images(kept),
        images(held_out),
        images([*good, *bad]),
        np.repeat([False, True], [len(good), len(bad)]),
        shown,
    )


def _pictures(folder: Path) -> list[Path]:
    from PIL import Image

    known = Image.registered_extensions()
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in known)


def _mask(folder: Path, path: Path) -> Path | None:
    """``ground_truth/KIND/NAME_mask.*`` or ``NAME.*`` of an image of ``test/KIND``."""
    found = _pictures(folder / "ground_truth" / path.parent.name)
    return next((mask for mask in found if mask.stem in (f"{path.stem}_mask", path.stem)), None)


def _pixels(path: Path, size: int, *, mask: bool = False) -> np.ndarray:
    """Bytes ``(size, size, 3)``, or ``(size, size)`` of a mask."""
    from PIL import Image

    with Image.open(path) as image:
        if mask:
            return np.asarray(image.convert("L").resize((size, size), Image.Resampling.NEAREST))
        if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))  # noqa: PLW2901
        elif image.mode in ("I", "F"):
            msg = f"images must have 8 or 16 bits per channel, got mode {image.mode} in {path}"
            raise ValueError(msg)
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def files_of(arguments: Mapping[str, Any], part: str) -> list[Path]:
    return sorted(path for path in _category(arguments, part).rglob("*") if path.is_file())
