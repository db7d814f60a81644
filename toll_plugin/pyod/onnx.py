"""A fitted model as one ONNX graph from raw features to score."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from toll_plugin.core.modes import evaluating
from toll_plugin.core.objective import TollTerms, norm_per_sample, toll_score
from toll_plugin.core.tables.metric import MahalanobisNorm
from toll_plugin.core.tables.model import Measure, TableModel
from toll_plugin.core.tables.scaling import TableScaling
from toll_plugin.pyod.files import replacing

__all__ = ["to_onnx"]


class _Score(nn.Module):
    """:meth:`TableModel.score` as a graph, in double precision."""

    def __init__(self, model: TableModel, scaling: TableScaling) -> None:
        super().__init__()
        self._scaling, self._model = scaling, model
        self.networks = nn.ModuleList(copy.deepcopy(member.network).double() for member in model.members)
        self._measures = [[_of_tensors(measure) for measure in member[1:]] for member in model.members]

    def forward(self, x: Tensor) -> Tensor:
        scaled, limit = self._scaling.transform_tensor(x), self._scaling.limit
        inputs = scaled if limit is None else scaled.clamp(-limit, limit)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for network, measures in zip(self.networks, self._measures, strict=True):
            reconstruction, latent = network(inputs)
            for terms, measure, rows in zip(found, measures, (scaled - reconstruction, latent), strict=True):
                if measure is not None:
                    measured = rows if measure.norm is None else measure.norm(rows)
                    terms.append(norm_per_sample(measured, self._model.exponent) / measure.unit)
        means = TollTerms(*(torch.stack(terms).mean(dim=0) if terms else scaled.new_zeros(len(x)) for terms in found))
        return toll_score(means, beta=self._model.weight, term=self._model.score_term)


def _of_tensors(measure: Measure | None) -> Measure | None:
    """A measure whose norm takes tensors."""
    if measure is None or measure.norm is None:
        return measure
    tensors: Any = map(torch.from_numpy, measure.norm)
    return Measure(MahalanobisNorm(*tensors), measure.unit)


def to_onnx(model: TableModel, n_features: int, path: str | PathLike[str]) -> None:
    """See :meth:`toll_plugin.pyod.TollDetector.to_onnx`."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        msg = f'to_onnx needs {" and ".join(missing)}: pip install "toll-plugin[export]"'
        raise ImportError(msg)
    if not isinstance(model.scaling, TableScaling):
        msg = (
            f"preprocessing must be 'robust', 'standard' or 'none' for to_onnx, "
            f"got {model.scaling!r}, whose steps have no ONNX graph here"
        )
        raise TypeError(msg)
    score = _Score(model, model.scaling)
    example = (torch.zeros(2, n_features, dtype=torch.float64),)
    with replacing(Path(path)) as part, evaluating(score), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own internals
        program = torch.onnx.export(
            score,
            example,
            input_names=["X"],
            output_names=["score"],
            dynamic_shapes={"x": {0: torch.export.Dim("rows")}},
            dynamo=True,
            verbose=False,
        )
        cast("torch.onnx.ONNXProgram", program).save(str(part))
