"""The frozen backbone of PatchToll: a timm network by name, and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import TimmFeatureExtractor
from torch import Tensor

from toll_plugin.core.image_scaling import Statistics, named_statistics

__all__ = ["build_backbone", "check_layers", "check_weights", "load_backbone", "scaling_of"]


def check_layers(layers: Sequence[str]) -> list[str]:
    """Return the names of a backbone's layers as a list.

    Raises:
        TypeError: If ``layers`` is no sequence of strings.
        ValueError: If there are none, or one is named twice.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(x, str) for x in layers):
        msg = f"layers must be a sequence of names, got {layers!r}"
        raise TypeError(msg)
    if not layers:
        msg = "layers must name at least one layer, got none"
        raise ValueError(msg)
    if len(set(layers)) < len(layers):
        msg = f"layers must be named once each, got {', '.join(layers)}"
        raise ValueError(msg)
    return list(layers)


def check_weights(path: str | Path | None, pre_trained: object) -> str | None:
    """Return the path of the weights as a string, for a checkpoint holds plain data only.

    Raises:
        TypeError: If ``pre_trained`` is neither true nor false.
        ValueError: If there is a path although the backbone shall stay random.
    """
    if not isinstance(pre_trained, bool):
        msg = f"pre_trained must be true or false, got {pre_trained!r} of type {type(pre_trained).__name__}"
        raise TypeError(msg)
    if path is not None and not pre_trained:
        msg = f"weights_path must be left out where pre_trained is False, got {str(path)!r}"
        raise ValueError(msg)
    return None if path is None else str(path)


def build_backbone(name: str, layers: list[str], seed: int | None) -> TimmFeatureExtractor:
    """A timm network with random weights that gives the features of some of its layers.

    Args:
        name: As timm knows it.
        layers: As timm names them.
        seed: Of the weights; ``None`` is 0.

    Raises:
        ValueError: If there is no such network, or one of the layers is not in it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        try:
            extractor = TimmFeatureExtractor(name, list(layers), pre_trained=False)
        except RuntimeError as error:
            msg = f"backbone must be the name of a timm network, got {name!r}: {error}"
            raise ValueError(msg) from error
        except ValueError as error:
            msg = f"layers must be layers of {name}, got {', '.join(layers)}: {error}"
            raise ValueError(msg) from error
        # Layers that a convolutional network does not have were dropped without a word; those of a
        # vision transformer, which has a patch_size, were not looked at.
        if not hasattr(extractor, "patch_size") and extractor.layers == layers:
            return extractor
        known = _layers_of(extractor)
    if not set(layers) <= set(known):
        msg = f"layers must be among {', '.join(known)} for {name}, got {', '.join(layers)}"
        raise ValueError(msg)
    return extractor


def scaling_of(backbone: TimmFeatureExtractor) -> str | Statistics:
    """How images were scaled when the network was pretrained, as timm knows it; like ImageNet's where it does not.

    Returns:
        A scaling of :class:`toll_plugin.core.ImageScaling`.
    """
    known = getattr(backbone.feature_extractor, "pretrained_cfg", None) or {}
    return named_statistics(known["mean"], known["std"]) if {"mean", "std"} <= set(known) else "imagenet"


def _layers_of(extractor: TimmFeatureExtractor) -> list[str]:
    """The layers of a network that give features."""
    if hasattr(extractor, "patch_size"):
        blocks: Any = extractor.feature_extractor.blocks
        return [f"blocks.{i}" for i in range(len(blocks))]
    import timm  # noqa: PLC0415  anomalib's extractor keeps the layers that were asked for only

    info: Any = timm.create_model(extractor.backbone, features_only=True)
    return [layer["module"] for layer in info.feature_info.get_dicts()]


def load_backbone(backbone: TimmFeatureExtractor, weights_path: str | Path | None) -> None:
    """Give ``backbone`` pretrained weights, from a file or by timm, which downloads them.

    Args:
        backbone: Made by name, with any weights.
        weights_path: A state dict as ``torch.save`` or safetensors writes it, of the whole network
            or up to the last layer that is used; ``None`` for timm's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no state dict, or lacks a weight or has one of another shape or one not finite.
        OSError: If timm can neither find the weights nor download them.
    """
    network = backbone.feature_extractor
    state = _downloaded(backbone) if weights_path is None else _read(Path(weights_path))
    given = {_flat(name): value for name, value in state.items()}
    # Files from torchvision lack the counts of batches, which a frozen network does not use.
    wanted = {
        name: value
        for name, value in network.state_dict().items()
        if _flat(name) in given or not name.endswith(".num_batches_tracked")
    }
    wrong = [name for name, value in wanted.items() if getattr(given.get(_flat(name)), "shape", None) != value.shape]
    if wrong:
        msg = (
            f"weights_path must have all weights of {backbone.backbone} up to {backbone.layers[-1]}, "
            f"but {weights_path} lacks {wrong[0]} or has it in another shape ({len(wrong)} of {len(wanted)} such)"
        )
        raise ValueError(msg)
    damaged = [name for name in wanted if not bool(given[_flat(name)].isfinite().all())]
    if damaged:
        msg = f"weights_path must hold finite weights, but {damaged[0]} of {weights_path} has NaN or infinity"
        raise ValueError(msg)
    network.load_state_dict({name: given[_flat(name)] for name in wanted}, strict=False)


def _flat(name: str) -> str:
    """A name by which a weight is found: where features are wanted timm renames ``stages.0`` to ``stages_0``."""
    return name.replace(".", "_")


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        msg = f"weights_path must be a file with the backbone's weights, got {path}, which is none"
        raise FileNotFoundError(msg)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415  only where such a file is given

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the readers have no error in common, least of all on damaged files
        msg = f"weights_path must be a state dict that loads with weights_only, got {path}: {error}"
        raise ValueError(msg) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        msg = f"weights_path must be a state dict, got {path}, which holds something else"
        raise ValueError(msg)
    return state


def _downloaded(backbone: TimmFeatureExtractor) -> Mapping[str, Tensor]:
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights before it reads them
            pretrained = TimmFeatureExtractor(backbone.backbone, backbone.layers, pre_trained=True)
    except Exception as error:  # the hub's clients have no error in common
        msg = (
            f"the pretrained weights of {backbone.backbone} are neither on this machine nor to be downloaded "
            f"({type(error).__name__}: {error}): pass weights_path, a file of them, "
            "or pre_trained=False for random ones"
        )
        raise OSError(msg) from error
    state: Mapping[str, Tensor] = pretrained.feature_extractor.state_dict()
    return state
