"""What data sets give, what methods take, and what they return: the seam between the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Split(NamedTuple):
    """What a method sees of one data set, normal class or category.

    Attributes:
        train: Images ``(N, C, H, W)``, bytes or floats in [0, 1], with 1 or 3 channels; or rows
            ``(N, D)`` in double precision.
        validation: Held-out normal samples, the same; may be empty for rows.
        test: The same.
        anomalous: ``(n_test,)``, true for an anomaly.
        masks: ``(n_test, H, W)``, true where a test image is anomalous; ``None`` without masks.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    anomalous: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class Scored:
    """What a method says of samples.

    Attributes:
        scores: ``(N,)`` in double precision, higher is more anomalous, not yet mapped or clipped.
        terms: What a score is made of, by name, each ``(N,)``: ``reconstruction`` and ``latent``
            (the latent's norm, or its share of the score) where a method has them.
        maps: ``(N, h, w)``, higher is more anomalous, where a method locates anomalies.
    """

    scores: np.ndarray
    terms: Mapping[str, np.ndarray] = field(default_factory=dict)
    maps: np.ndarray | None = None


@dataclass(frozen=True)
class Budget:
    """What an experiment grants every method alike.

    Attributes:
        max_epochs: Of methods that train on images; by default each has its own number.
        backbone: timm's name of the pretrained network of methods that need one.
        weights: Local file of its ImageNet weights; by default timm downloads them.
        pretrained: False leaves the backbone's weights random, and the results say so.
    """

    max_epochs: int | None = None
    backbone: str = "resnet18"
    weights: Path | None = None
    pretrained: bool = True


class Detector(ABC):
    """A method under comparison. It is made with its :class:`Budget`, a seed and its arguments."""

    @abstractmethod
    def fit(self, split: Split) -> None:
        """Train on ``split.train``; ``split.validation`` may choose weights. Never looks at the test part."""

    @abstractmethod
    def score(self, samples: Tensor) -> Scored:
        """Score samples like those of ``split.test``."""

    @abstractmethod
    def size(self) -> int:
        """Bytes that have to be kept to score."""

    def facts(self) -> dict[str, Any]:
        """What else the record should say of this fit, such as ``epochs``, and ``pretrained`` where a backbone is."""
        return {}
