"""A fitted model as one ONNX graph from raw features to score."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from toll_plugin.core.modes import evaluating
from toll_plugin.core.objective import terms_of_residual
from toll_plugin.core.tables.model import TableModel
from toll_plugin.core.tables.scaling import TableScaling
from toll_plugin.pyod.files import replacing

__all__ = ["to_onnx"]


class _Score(nn.Module):
    """:meth:`TableModel.score` as a graph, in double precision."""

    def __init__(self, model: TableModel, scaling: TableScaling) -> None:
        super().__init__()
        self._scaling, self._loss, self._term = scaling, model.loss, model.score_term
        self.networks = nn.ModuleList(copy.deepcopy(network).double() for network in model.networks)
        metric = model.metric
        self._metric = None if metric is None else (torch.from_numpy(metric.mean), torch.from_numpy(metric.matrix))

    def forward(self, x: Tensor) -> Tensor:
        scaled, limit = self._scaling.transform_tensor(x), self._scaling.limit
        inputs = scaled if limit is None else scaled.clamp(-limit, limit)
        scores = []
        for network in self.networks:
            reconstruction, latent = network(inputs)
            residual = scaled - reconstruction
            if self._metric is not None:
                mean, matrix = self._metric
                residual = (residual - mean) @ matrix
            terms = terms_of_residual(residual, latent, exponent=self._loss.exponent)
            scores.append(self._loss.score(terms, self._term))
        return torch.stack(scores).mean(dim=0)


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
