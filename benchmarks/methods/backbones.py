"""Pretrained backbones from a local file, for machines that cannot download them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


@contextmanager
def local_backbone(name: str, weights: Path | None) -> Iterator[None]:
    """Within the block timm makes ``name`` with the weights of a file instead of downloading them.

    The file must have every weight of the layers that are asked for. Without one nothing changes,
    and timm downloads.
    """
    import timm
    import torch

    if weights is None:
        yield
        return
    state = torch.load(weights, map_location="cpu", weights_only=True)
    create = timm.create_model

    def create_locally(asked: str, pretrained: bool = False, **arguments: Any) -> Any:
        if asked != name or not pretrained:
            return create(asked, pretrained=pretrained, **arguments)
        network = create(asked, pretrained=False, **arguments)
        network.load_state_dict({key: state[key] for key in network.state_dict()})
        return network

    with mock.patch.object(timm, "create_model", create_locally):
        yield
