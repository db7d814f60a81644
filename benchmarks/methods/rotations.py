"""Images seen at several angles, for want of more of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, pad, rotate

from toll_plugin.core.checks import check_integer

__all__ = ["at_angles", "turned"]


def at_angles(images: Tensor, rotations: int) -> Tensor:
    """The images ``(N, C, H, W)`` at so many equal angles, ``(rotations * N, C, H, W)``; first as they are."""
    count = check_integer("rotations", rotations, minimum=1)
    return torch.cat([images, *(turned(images, 360 * i / count) for i in range(1, count))])


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images turned about their centre; what comes in from outside is their mirror image, not a colour of its own."""
    height, width = images.shape[-2:]
    reach = math.hypot(height, width) / 2
    across, down = (min(math.ceil(reach - side / 2), side - 1) for side in (width, height))
    wide = pad(images, [across, down], padding_mode="reflect")
    return center_crop(rotate(wide, degrees, InterpolationMode.BILINEAR), [height, width])
