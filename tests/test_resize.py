"""The matrix that resizes an axis, against torch's own interpolation."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import interpolate

from toll_plugin.core.resize import resize_matrix


def _resized(images, size, *, antialias):
    rows, columns = (
        resize_matrix(n, out, images, antialias=antialias) for n, out in zip(images.shape[-2:], size, strict=True)
    )
    return rows @ images @ columns.T


@pytest.mark.parametrize("antialias", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    before=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    after=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    seed=st.integers(0, 100),
)
def test_it_is_torchs_bilinear_interpolation(antialias, before, after, seed):
    # To a width of 1 torch 2.14 with antialiasing gives wrong values: three zeros for the column 0, 1 as three rows.
    assume(not antialias or after[1] != 1)
    images = torch.rand(2, 3, *before, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = interpolate(images, after, mode="bilinear", align_corners=False, antialias=antialias)
    torch.testing.assert_close(_resized(images, after, antialias=antialias), expected)
    single = _resized(images.float(), after, antialias=antialias)
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)


def test_by_hand():
    like = torch.empty(0)
    # Enlarged: cell centres lie at a quarter and three quarters of the first cell and of the second.
    enlarged = [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    assert resize_matrix(2, 4, like, antialias=False).tolist() == enlarged
    assert resize_matrix(2, 4, like, antialias=True).tolist() == enlarged
    # Reduced: a centre between the second cell and the third takes a half of each, or with the whole reach
    # of 2 cells, 1/8, 3/8, 3/8 and 1/8 of four.
    assert resize_matrix(4, 2, like, antialias=False).tolist() == [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    thirds = torch.tensor([[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]]) / 7  # the edge cuts off the fourth
    torch.testing.assert_close(resize_matrix(4, 2, like, antialias=True), thirds)


@pytest.mark.parametrize("antialias", [True, False])
def test_same_size_changes_nothing(antialias):
    assert torch.equal(resize_matrix(7, 7, torch.empty(0), antialias=antialias), torch.eye(7))


def test_of_one_column_too():
    column = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    assert _resized(column, (3, 1), antialias=True).flatten().tolist() == [0.0, 0.5, 1.0]


def test_precision_and_device_are_those_of_the_example():
    matrix = resize_matrix(3, 5, torch.empty(0, dtype=torch.float64, device="meta"), antialias=True)
    assert (matrix.dtype, matrix.device.type, matrix.shape) == (torch.float64, "meta", (5, 3))


@pytest.mark.filterwarnings("ignore")
def test_an_export_resizes_images_of_any_size(tmp_path):
    class Resize(nn.Module):
        def forward(self, images):
            return _resized(images, (6, 9), antialias=True)

    sizes = {"images": {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}}
    path = tmp_path / "resize.onnx"
    torch.onnx.export(
        Resize().eval(), (torch.rand(1, 3, 12, 20),), path, input_names=["images"], dynamic_shapes=sizes, dynamo=True
    )
    session = onnxruntime.InferenceSession(str(path))
    for size in ((12, 20), (40, 5), (3, 31)):
        images = torch.rand(1, 3, *size)
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, _resized(images, (6, 9), antialias=True).numpy(), rtol=1e-4, atol=1e-6)
