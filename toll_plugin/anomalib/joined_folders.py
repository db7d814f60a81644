"""Several parts in MVTec AD's layout as one data set: one model that learns them all."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.utils import Split
from torchvision.transforms.v2 import Transform

from toll_plugin.core.checks import check_finite_float, check_integer, check_option

__all__ = ["JoinedFolders"]


class JoinedFolders(AnomalibDataModule):
    """Folders of parts, each in MVTec AD's layout, as one training set, and the test of all or of one of them.

    A part is a folder with normal images in ``train/good`` and ``test/good``, anomalous ones in other folders of
    ``test``, and optionally a mask of each in the folder of the same name in ``ground_truth``. Of each part the same
    share of the normal training images is held out to validate with. So one model learns all parts, and has one
    threshold for all. Images are resized by the model, since those of parts differ in size.

    Args:
        roots: Folders, each a part or a folder of parts. One path alone is a list of one.
        test_part: Name of the part that is tested and predicted. Default: all. The training does not depend on it, so
            that a model that learnt all parts can be tested on each.
        train_batch_size: Images per training step. Default 16.
        eval_batch_size: Images per evaluation step. Default 16.
        num_workers: Data loader processes. Default 0.
        val_ratio: Share of each part's normal training images that validates, in (0, 1), at least one. Default 0.2.
        train_augmentations: Applied to each training image.
        val_augmentations: Applied to each validation image.
        test_augmentations: Applied to each test image.
        augmentations: For the splits that have none of their own.
        seed: Of the split. Default 0.

    Attributes:
        parts: Names of the parts, by which :meth:`of` takes one: those of their folders.

    Raises:
        FileNotFoundError: If there is no part below one of ``roots``.
        TypeError: If an argument has the wrong type.
        ValueError: If two parts have one name, ``test_part`` is none of them, ``val_ratio`` is out of range, or a part
            has fewer than two training images.

    Example:
        On the command line ``--data toll_plugin.anomalib.JoinedFolders --data.roots MVTecAD``, and with
        ``--data.test_part screw`` the test of one part. The AUROC of each part of one model in Python::

            data = JoinedFolders(["MVTecAD/screw", "my_parts"])
            engine.fit(model, datamodule=data)
            for part in data.parts:
                engine.test(model, datamodule=data.of(part))
    """

    def __init__(
        self,
        roots: str | Path | Sequence[str | Path],
        test_part: str | None = None,
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        val_ratio: float = 0.2,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=check_integer("train_batch_size", train_batch_size, minimum=1),
            eval_batch_size=check_integer("eval_batch_size", eval_batch_size, minimum=1),
            num_workers=check_integer("num_workers", num_workers, minimum=0),
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            seed=check_integer("seed", seed, minimum=0),
        )
        if check_finite_float("val_ratio", val_ratio, minimum=0, exclusive=True) >= 1:
            msg = f"val_ratio must be below 1, got {val_ratio!r}"
            raise ValueError(msg)
        self.val_ratio = val_ratio
        self._folders: dict[str, Path] = {}
        for root in [roots] if isinstance(roots, (str, Path)) else roots:
            for folder in _parts_of(Path(root)):
                if folder.name in self._folders:
                    msg = f"roots must hold parts of different names, got {self._folders[folder.name]} and {folder}"
                    raise ValueError(msg)
                self._folders[folder.name] = folder
        self._test(test_part)

    @property
    def parts(self) -> list[str]:
        """Names of the parts."""
        return list(self._folders)

    def of(self, part: str) -> JoinedFolders:
        """The same data, of which one part is tested and predicted.

        Raises:
            ValueError: If there is no such part.
        """
        chosen = copy(self)
        for split in ("train_data", "val_data", "test_data"):  # without them it is set up again
            chosen.__dict__.pop(split, None)
        chosen._test(part)
        return chosen

    def _test(self, part: str | None) -> None:
        if part is not None:
            check_option("test_part", part, self.parts)
        self.test_part = part
        self._category = part or "all"

    def _setup(self, _stage: str | None = None) -> None:
        tested = self.parts if self.test_part is None else [self.test_part]
        learnt = [self._held_out(_read(self._folders[part], Split.TRAIN)) for part in self.parts]
        self.train_data = _joined([train for train, _ in learnt])
        self.val_data = _joined([validation for _, validation in learnt])
        self.test_data = _joined([_read(self._folders[part], Split.TEST) for part in tested])

    def _held_out(self, data: FolderDataset) -> tuple[FolderDataset, FolderDataset]:
        if len(data) < 2:
            msg = f"train/good must hold at least two images, one to validate with, got {len(data)} in {data.root}"
            raise ValueError(msg)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = min(max(1, round(self.val_ratio * len(data))), len(data) - 1)
        return data.subsample(sorted(order[count:])), data.subsample(sorted(order[:count]))

    def _create_test_split(self) -> None:
        """Splits are made above, part by part."""

    def _create_val_split(self) -> None:
        """Splits are made above, part by part."""


def _parts_of(root: Path) -> list[Path]:
    root = root.expanduser().resolve()
    found = [root] if (root / "train/good").is_dir() else sorted(path.parents[1] for path in root.glob("*/train/good"))
    if not found:
        msg = f"roots must be parts with train/good, or folders of such parts, got {root}"
        raise FileNotFoundError(msg)
    return found


def _read(folder: Path, split: Split) -> FolderDataset:
    kinds = sorted(path.name for path in folder.glob("test/*") if path.is_dir() and path.name != "good")
    masked = bool(kinds) and all((folder / "ground_truth" / kind).is_dir() for kind in kinds)
    return FolderDataset(
        name=folder.name,
        root=folder,
        normal_dir="train/good",
        normal_test_dir="test/good" if (folder / "test/good").is_dir() else None,
        abnormal_dir=[f"test/{kind}" for kind in kinds] or None,
        mask_dir=[f"ground_truth/{kind}" for kind in kinds] if masked else None,
        split=split,
    )


def _joined(parts: Sequence[FolderDataset]) -> AnomalibDataset:
    """One data set of all; pixels are measured only where each part has masks."""
    tasks = {str(part.samples.attrs["task"]) for part in parts}
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    whole.samples.attrs["task"] = "classification" if "classification" in tasks else "segmentation"
    return whole
