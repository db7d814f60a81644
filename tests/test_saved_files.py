"""Files that an earlier version wrote still load, and score as they did."""

from __future__ import annotations

from pathlib import Path

import torch

from toll_plugin.anomalib import Toll

DATA = Path(__file__).parent / "data"


def test_a_toll_checkpoint_of_version_0_1_0():
    """``Toll(image_size=8, in_channels=1, latent_dim=4, seed=0)`` after two epochs on the digits' class 8."""
    model = Toll.load_from_checkpoint(DATA / "toll_0.1.0.ckpt").eval()
    with torch.no_grad():
        found = model(torch.linspace(0, 1, 2 * 3 * 64).reshape(2, 3, 8, 8))
    score, map_mean = (
        torch.tensor([0.09355571866035461, 0.8935902118682861]),
        torch.tensor([0.2016553427092731, 0.3347219666466117], dtype=torch.float64),
    )
    torch.testing.assert_close(found.pred_score, score)
    torch.testing.assert_close(found.anomaly_map.double().mean(dim=(1, 2, 3)), map_mean, rtol=1e-6, atol=0)
