"""Fitted detectors in one file that holds no code: safetensors, with JSON in its header."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn

from toll_plugin import __version__
from toll_plugin.core.networks import Autoencoder, DenseAutoencoder
from toll_plugin.core.tables.metric import MahalanobisNorm
from toll_plugin.core.tables.model import Measure, TableMember, TableModel
from toll_plugin.core.tables.scaling import TableScaling
from toll_plugin.pyod.base import CURVES, CarefulDetector
from toll_plugin.pyod.files import replacing

__all__ = ["FORMAT", "fingerprint", "load", "save"]

#: Counts up when files change in a way that earlier versions could not read; what they wrote is read.
FORMAT = 3

#: What was learned beside the model and the arrays, as JSON knows it.
_FITTED = ("n_features_in_", "best_epoch_", "threshold_", "_mu", "_sigma", "_thresholder")

#: What a member may measure.
_MEASURED = ("residual", "latent")

Arrays = dict[str, NDArray[Any]]
DetectorT = TypeVar("DetectorT", bound=CarefulDetector)


def save(detector: CarefulDetector, path: str | PathLike[str]) -> None:
    """See :meth:`toll_plugin.pyod.TollDetector.save`."""
    model = detector._model
    scaling = model.scaling
    parameters = {name: _plain(name, value) for name, value in detector.get_params(deep=False).items()}
    if not isinstance(scaling, TableScaling):
        msg = f"preprocessing must be a name to be saved without code, got {scaling!r}; pickle the detector instead"
        raise TypeError(msg)
    if not isinstance(detector._thresholder, float):
        msg = (
            f"contamination must be a number to be saved without code, got {detector.contamination!r}; "
            "pickle the detector instead"
        )
        raise TypeError(msg)
    names = getattr(detector, "feature_names_in_", None)
    config = {name: getattr(detector, name) for name in _FITTED} | {
        "feature_names_in_": None if names is None else [str(name) for name in names],
        "parameters": parameters,
        "inputs": model.inputs,
        "networks": [getattr(member.network, "arguments", None) for member in model.members],
        "units": [[measure and measure.unit for measure in member[1:]] for member in model.members],
        "scaling": scaling.kind,
        "weight": model.weight,
        "exponent": model.exponent,
        "score_term": model.score_term,
    }
    arrays: Arrays = {
        "scores": detector.decision_scores_,
        "labels": detector.labels_,
        "scaling.centre": scaling.centre,
        "scaling.scale": scaling.scale,
    }
    arrays |= {f"history.{name}": values for name, values in detector.history_.items()}
    arrays |= _learned(model)
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    text = json.dumps(config)
    header = {
        "format": str(FORMAT),
        "written by": f"toll-plugin {__version__}",
        "config": text,
        "digest": _digest(text, arrays),
    }
    with replacing(Path(path)) as part:
        safetensors.numpy.save_file(arrays, str(part), header)


def _learned(model: TableModel) -> Arrays:
    """Weights of the networks, and how their residuals and latents are measured."""
    arrays: Arrays = {}
    for i, member in enumerate(model.members):
        arrays |= {f"network.{i}.{name}": value.numpy() for name, value in member.network.state_dict().items()}
        for kind, measure in zip(_MEASURED, member[1:], strict=True):
            if measure is not None and measure.norm is not None:
                arrays |= {f"{kind}.{i}.{name}": values for name, values in measure.norm._asdict().items()}
    return arrays


def fingerprint(detector: CarefulDetector) -> str:
    """What two detectors share only if they give the same scores, to the last bit."""
    model = detector._model
    units = [[measure and measure.unit for measure in member[1:]] for member in model.members]
    scaling = hashlib.sha256(pickle.dumps(model.scaling, protocol=4)).hexdigest()
    names = [str(name) for name in getattr(detector, "feature_names_in_", ())]
    return _digest(repr([scaling, units, model.weight, model.exponent, model.score_term, names]), _learned(model))


def load(
    cls: type[DetectorT], path: str | PathLike[str], encoder: nn.Module | None, decoder: nn.Module | None
) -> DetectorT:
    """See :meth:`toll_plugin.pyod.TollDetector.load`."""
    header, arrays = _read(Path(path))
    config = json.loads(header["config"])
    own = {"encoder": encoder, "decoder": decoder}
    trained_own = config["networks"] == [None]
    for name, module in own.items():
        if trained_own != (module is not None):
            what = "was trained with one of your own: pass" if module is None else "has none of your own: do not pass"
            msg = f"{name} must match the detector in {str(path)!r}, which {what} {name}"
            raise ValueError(msg)
    parameters: dict[str, Any] = {
        name: own.get(name, tuple(value) if isinstance(value, list) else value)
        for name, value in config["parameters"].items()  # those of a subclass may be others
    }
    detector = cls(**parameters)
    unused = torch.Generator()  # initial weights are drawn, though not from the global generator
    dense = [DenseAutoencoder(**shape, generator=unused) for shape in config["networks"] if shape is not None]
    networks: list[nn.Module] = list(dense)
    if encoder is not None and decoder is not None:
        modules = copy.deepcopy((encoder, decoder))
        networks = [Autoencoder(*(module.float() for module in modules), input_shape=(config["inputs"],))]
    for i, network in enumerate(networks):
        prefix = f"network.{i}."
        state = {
            name.removeprefix(prefix): torch.from_numpy(a) for name, a in arrays.items() if name.startswith(prefix)
        }
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            msg = f"encoder and decoder must be those that were saved in {str(path)!r}: {error}"
            raise ValueError(msg) from error
    scaling = TableScaling(config["scaling"])
    scaling.centre, scaling.scale = arrays["scaling.centre"], arrays["scaling.scale"]
    units = config.get("units", [[1.0, 1.0]] * len(networks))  # before format 3, terms were added as they are
    members = [
        TableMember(network, *(_measure(kind, i, unit, arrays) for kind, unit in zip(_MEASURED, both, strict=True)))
        for i, (network, both) in enumerate(zip(networks, units, strict=True))
    ]
    model = TableModel(
        scaling,
        members,
        weight=config["weight"] if "weight" in config else config["beta"],
        exponent=config["exponent"],
        score_term=config.get("score_term", "total"),  # format 1 knows no other
    )
    _restore(detector, model, config, arrays)
    return detector


def _measure(kind: str, i: int, unit: float | None, arrays: Arrays) -> Measure | None:
    """How member ``i`` measures its residual or latent; ``None`` if it does not."""
    if unit is None:
        return None
    if kind == "residual" and "metric.mean" in arrays:  # before format 3, all members shared one
        size = len(arrays["metric.mean"])
        whole = MahalanobisNorm(
            arrays["metric.mean"], np.ones(size), np.zeros((size, 0)), np.zeros(0), arrays["metric.matrix"]
        )
        return Measure(whole, unit)
    if f"{kind}.{i}.mean" not in arrays:
        return Measure(None, unit)
    return Measure(MahalanobisNorm(*(arrays[f"{kind}.{i}.{name}"] for name in MahalanobisNorm._fields)), unit)


def _restore(detector: CarefulDetector, model: TableModel, config: dict[str, Any], arrays: Arrays) -> None:
    """Set what ``fit`` would have set."""
    for name in _FITTED:
        setattr(detector, name, config[name])
    names = config["feature_names_in_"]
    if names is not None:
        detector.feature_names_in_ = np.array(names, dtype=object)
    detector._model, detector._classes = model, 2
    detector.decision_scores_, detector.labels_ = arrays["scores"], arrays["labels"]
    detector.history_ = {name: arrays[f"history.{name}"] for name in CURVES if f"history.{name}" in arrays}


def _read(path: Path) -> tuple[dict[str, str], Arrays]:
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except safetensors.SafetensorError as error:
        msg = f"{str(path)!r} is no detector that was saved here, or is cut off: {error}"
        raise ValueError(msg) from error
    if not {"format", "config", "digest"} <= set(header):
        msg = f"{str(path)!r} is a safetensors file, but no detector that was saved here"
        raise ValueError(msg)
    if header["format"] not in map(str, range(1, FORMAT + 1)):
        msg = (
            f"{str(path)!r} has format {header['format']}, written by {header.get('written by')}; "
            f"this version reads formats 1 to {FORMAT}"
        )
        raise ValueError(msg)
    if header["digest"] != _digest(header["config"], arrays):
        msg = f"{str(path)!r} was changed after it was saved: its digest does not match its content"
        raise ValueError(msg)
    return header, arrays


def _digest(config: str, arrays: Arrays) -> str:
    found = hashlib.sha256(config.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        found.update(arrays[name].tobytes())
    return found.hexdigest()


def _plain(name: str, value: Any) -> Any:
    """A parameter as JSON knows it; a module of the user's own becomes true.

    Raises:
        TypeError: If it has no such form.
    """
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    msg = f"{name} must be a plain value to be saved without code, got {value!r}; pickle the detector instead"
    raise TypeError(msg)
