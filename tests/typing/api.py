"""Public use, as a type checker sees it: `mypy` checks it beside the package. Nothing here runs.

Lines that are wrong on purpose say by which error; strict mypy complains where that error does not come.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from toll_plugin.anomalib import DigitsOneVsRest, PatchToll, Toll
from toll_plugin.core import (
    ConvAutoencoder,
    DenseAutoencoder,
    History,
    TargetedCollapse,
    TollLoss,
    fit,
    latent_norm,
    terms_of,
    toll_score,
    toll_terms,
)
from toll_plugin.pyod import (
    BatchScorer,
    CollapsedAutoEncoder,
    Explanation,
    Parquet,
    ScoredParquet,
    TollDetector,
    score_parquet,
)

images, rows = torch.rand(8, 1, 28, 28), np.zeros((8, 3))

# The method.
network, loss = ConvAutoencoder(28), TollLoss(beta=0.01, exponent=2)
assert_type(fit(network, images, loss, validation=images, max_epochs=2), History)
terms = toll_terms(images, images, torch.zeros(8, 2))
assert_type(terms.reconstruction, Tensor)
assert_type(toll_score(terms, beta=1.0), Tensor)
assert_type(latent_norm(torch.zeros(8, 2), pool="mean"), Tensor)
assert_type(loss.score(terms_of(network, images, loss)), Tensor)
with TargetedCollapse("0", weight=0.1).watch(nn.Sequential(nn.Linear(3, 2))) as latent:
    assert_type(latent.loss(), Tensor)
DenseAutoencoder(3, hidden_sizes=(8,), latent_dim=2)

# Detectors for tables.
detector = TollDetector(contamination=0.02, hidden_sizes=[16], epochs=None, patience=5, validation_fraction=0.2)
assert_type(detector.fit(rows), TollDetector)
assert_type(detector.partial_fit(rows), TollDetector)
assert_type(TollDetector.load("detector.toll"), TollDetector)
assert_type(detector.explain(rows), Explanation)
CollapsedAutoEncoder(epoch_num=5, collapse_weight=0.1)
source = Parquet("rows/*.parquet", columns=["a", "b"])
assert_type(detector.fit(source, memory=2**30), TollDetector)
assert_type(score_parquet(detector, source, "scores", keys=["id"], errors="flag"), ScoredParquet)
BatchScorer(detector, keys=["id"]).each([])

# Models for images.
Toll(image_size=28, in_channels=1, patience=None, seed=0)
Toll(image_size=(64, 48), score_term="latent")
PatchToll(layers=["layer1"], quantile=0.9, pre_trained=False)
DigitsOneVsRest(normal_class=8, seed=0)

# Wrong on purpose.
TollLoss(beta="1")  # type: ignore[arg-type]
TollDetector(0.1, (64, 32))  # type: ignore[call-arg]
TollDetector(metric="cosine")  # type: ignore[arg-type]
TollDetector(n_member=4)  # type: ignore[call-arg]
BatchScorer(detector, errors="skip")  # type: ignore[arg-type]
Toll(network="resnet")  # type: ignore[arg-type]
Toll(score_term="norm")  # type: ignore[arg-type]
PatchToll(layers=1)  # type: ignore[arg-type]
latent_norm(images, pool="sum")  # type: ignore[arg-type]
fit(network, images, loss, max_epoch=2)  # type: ignore[call-arg]
