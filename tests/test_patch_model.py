"""The torch model of PatchToll, its backbone's weights, and thresholds from held-out normal images."""

from __future__ import annotations

import logging
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.models.components import TimmFeatureExtractor
from anomalib.post_processing import PostProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.tv_tensors import Image

from toll_plugin.anomalib.checkpoints import restore_components, store_components
from toll_plugin.anomalib.patch_toll import backbone as backbone_module
from toll_plugin.anomalib.patch_toll.backbone import load_backbone
from toll_plugin.anomalib.patch_toll.torch_model import PatchTollModel
from toll_plugin.anomalib.post_processor import QuantilePostProcessor
from toll_plugin.core import DenseAutoencoder, PatchAutoencoder, TollLoss, promised_rate, threshold_rank
from toll_plugin.core.patches.model import enlarge


class _Backbone(nn.Module):
    """Layers of 1, 2 and 4 pixels a cell, one of them of one channel; not in the order of their sizes."""

    def forward(self, x):
        return {"coarse": x[:, :, ::4, ::4].sum(1, keepdim=True), "fine": x[:, :, ::2, ::2], "pixels": x}


def _model(neighbourhood: int = 3, stride: int = 2, sigma: float = 1.0) -> PatchTollModel:
    torch.manual_seed(0)
    patches = PatchAutoencoder(DenseAutoencoder(7, (6,), 2), TollLoss(0.1, exponent=2))
    return PatchTollModel(_Backbone(), patches, neighbourhood=neighbourhood, stride=stride, sigma=sigma)


# --- features


def _averaged(features: Tensor, side: int) -> Tensor:
    """A loop over cells; what lies beyond the edge is left out."""
    count, channels, height, width = features.shape
    found, reach = torch.zeros_like(features), side // 2
    for n in range(count):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    rows = range(max(0, i - reach), min(height, i + reach + 1))
                    columns = range(max(0, j - reach), min(width, j + reach + 1))
                    near = [float(features[n, c, k, m]) for k in rows for m in columns]
                    found[n, c, i, j] = sum(near) / len(near)
    return found


def _blocks(features: Tensor, side: int) -> Tensor:
    """Means of whole squares of cells."""
    height, width = (size // side for size in features.shape[-2:])
    cells = features[:, :, : height * side, : width * side].unflatten(3, (width, side)).unflatten(2, (height, side))
    return cells.mean(dim=(3, 5))


#: Pixels from position to position, size of the image, the grid, and of each layer how many cells
#: along a side a position spans, as far as that is whole.
GRIDS = [
    (2, (8, 8), (4, 4), {"pixels": 2}),
    (2, (8, 20), (4, 10), {"pixels": 2}),
    (2, (9, 14), (5, 7), {}),  # 9 pixels are less than twice 5
    (4, (16, 12), (4, 3), {"pixels": 4, "fine": 2}),
    (4, (18, 22), (5, 6), {"pixels": 3}),
    (1, (6, 5), (6, 5), {}),
    (3, (10, 7), (4, 3), {"pixels": 2}),
]


@pytest.mark.parametrize("neighbourhood", [1, 3, 5])
@pytest.mark.parametrize(("stride", "size", "grid", "spans"), GRIDS)
def test_features_equal_a_loop_over_cells(neighbourhood, stride, size, grid, spans):
    images = torch.randn(2, 3, *size)
    model = _model(neighbourhood, stride).train()
    expected = []
    for name, layer in _Backbone()(images).items():
        features = _blocks(_averaged(layer, neighbourhood), spans.get(name, 1))
        expected.append(interpolate(features, grid, mode="bilinear", align_corners=False))
    found = model.embed(images)
    assert found.shape == (2, 7, *grid)
    torch.testing.assert_close(found, torch.cat(expected, dim=1))
    torch.testing.assert_close(model(images), found)  # what it returns in training mode


def test_an_even_neighbourhood_has_no_middle():
    with pytest.raises(ValueError, match="neighbourhood must be odd, got 4"):
        _model(4)


def test_average_and_interpolation_by_hand():
    images = torch.zeros(1, 3, 4, 8)
    images[0, 0, 0, 4] = 36.0
    found = _model(3).embed(images)[0]
    # The fine layer has 2 by 4 cells, of which (0, 2) holds 36: a sixth of the six cells around (0, 2),
    # and of those around its neighbours, but a quarter at the edge, where there are four.
    torch.testing.assert_close(found[1], torch.tensor([[0.0, 6.0, 6.0, 9.0]] * 2))
    # The coarse layer has 1 by 2, the second of which holds 36: a half, which interpolation keeps.
    torch.testing.assert_close(found[0], torch.full((2, 4), 18.0))
    # Pixel (0, 4) is a sixth of the averages in the first row, 6, and a ninth in the second, 4, from
    # column 3 to 5; positions span two rows and two columns, so they see 0 0, 0 1, 1 1 and 0 0 of it.
    torch.testing.assert_close(found[4], torch.tensor([[0.0, 2.5, 5.0, 0.0], [0.0] * 4]))
    alone = _model(1).embed(images)[0, 0]
    # Cell centres lie at a quarter and three quarters: in between, a quarter and three quarters of 36.
    torch.testing.assert_close(alone, torch.tensor([[0.0, 9.0, 27.0, 36.0]] * 2))


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    stride=st.integers(1, 4),
    neighbourhood=st.sampled_from([1, 3]),
)
def test_of_an_even_image_all_positions_are_equal(size, stride, neighbourhood):
    """Also those at the edges, which would otherwise be a kind of their own."""
    images = torch.tensor([1.0, -2.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, *size)
    found = _model(neighbourhood, stride).embed(images)
    assert found.shape[-2:] == tuple(math.ceil(side / stride) for side in size)
    expected = torch.tensor([4.0, 1.0, -2.0, 5.0, 1.0, -2.0, 5.0]).view(1, 7, 1, 1)
    torch.testing.assert_close(found, expected.expand_as(found))


def test_a_tv_tensor_gives_the_same_features_as_a_plain_tensor():
    images, model = torch.rand(2, 3, 8, 8), _model()
    found = model.embed(Image(images))
    assert type(found) is Tensor
    assert torch.equal(found, model.embed(images))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (1, 4, 8, 8)])
def test_other_than_three_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, height, width\), got"):
        _model().embed(torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_images_that_are_not_finite_are_named(bad):
    images = torch.zeros(3, 3, 8, 8)
    images[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"in: sample\(s\) \[1\] of the batch"):
        _model().embed(images)
    with pytest.raises(ValueError, match=r"in: b\.png$"):
        _model()(images, ["a.png", "b.png", "c.png"])


# --- predictions


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (16, 8)])
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_the_score_is_the_maximum_of_the_map(size, sigma):
    model = _model(sigma=sigma).eval()
    model.is_fitted.fill_(True)
    images = torch.randn(3, 3, *size)
    found = model(images)
    assert isinstance(found, InferenceBatch)
    assert found.anomaly_map.shape == (3, 1, *size)
    assert torch.equal(found.pred_score, found.anomaly_map.flatten(1).max(dim=1).values)
    with torch.no_grad():
        expected = enlarge(model.patches(model.embed(images)), size, sigma)
    torch.testing.assert_close(found.anomaly_map.detach(), expected)


def test_a_map_of_scores_by_hand():
    found = _model(sigma=0.0).map_of(torch.tensor([[[[1.0, 3.0]]], [[[8.0, 0.0]]]]), (1, 4))
    assert found.flatten(1).tolist() == [[1.0, 1.5, 2.5, 3.0], [8.0, 6.0, 2.0, 0.0]]


def test_half_precision_serves_the_backbone_only():
    model = _model().eval()
    model.is_fitted.fill_(True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.embed(images)
        found = model(images)
    with torch.no_grad():
        expected = model.predict(features, (32, 32))
    assert found.anomaly_map.dtype is found.pred_score.dtype is torch.float32
    assert torch.equal(found.anomaly_map, expected.anomaly_map)


def test_it_refuses_to_predict_before_it_is_fitted():
    model, images = _model().eval(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(NotFittedError, match="not fitted yet: train it, or load a checkpoint"):
        model(images)
    assert model.train()(images).shape == (1, 7, 4, 4)  # features are there from the start
    fitted = _model()
    fitted.is_fitted.fill_(True)
    model.load_state_dict(fitted.state_dict())  # it is the weights that know
    assert model.eval()(images).anomaly_map.shape == (1, 1, 8, 8)


# --- weights of the backbone


class _Extractor:
    """What load_backbone needs of anomalib's."""

    backbone, layers = "tiny", ("a", "b")

    def __init__(self, seed: int = 0, *arguments: object, **keywords: object) -> None:
        del arguments, keywords
        torch.manual_seed(seed if isinstance(seed, int) else 7)
        self.feature_extractor = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def _state(seed: int = 1) -> dict[str, Tensor]:
    state = _Extractor(seed).feature_extractor.state_dict()
    state["1.running_mean"] = torch.arange(4.0)
    return dict(state)


def _assert_loaded(extractor, state):
    for name, value in extractor.feature_extractor.state_dict().items():
        assert torch.equal(value, state[name]), name


SAVERS = {
    "plain.pth": torch.save,
    "legacy.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "wrapped.ckpt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "plain.safetensors": save_file,
}


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("as_string", [False, True])
def test_weights_are_read_in_each_format(name, as_string, tmp_path):
    state = _state() | {"fc.weight": torch.ones(2, 2)}  # more than is needed: the rest of a whole network
    SAVERS[name](state, tmp_path / name)
    extractor = _Extractor()
    load_backbone(extractor, str(tmp_path / name) if as_string else tmp_path / name)
    _assert_loaded(extractor, state)


def test_half_precision_weights_are_made_single(tmp_path):
    state = {name: value.half() if value.is_floating_point() else value for name, value in _state().items()}
    torch.save(state, tmp_path / "half.pth")
    extractor = _Extractor()
    load_backbone(extractor, tmp_path / "half.pth")
    _assert_loaded(extractor, state)
    assert extractor.feature_extractor[0].weight.dtype == torch.float32


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = _state()
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name].view(-1)[0] = math.nan
    torch.save(state, tmp_path / "w.pth")
    extractor = _Extractor()
    before = {key: value.clone() for key, value in extractor.feature_extractor.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weights_path must hold finite weights, but {name} of .*w\.pth has NaN"):
        load_backbone(extractor, tmp_path / "w.pth")
    _assert_loaded(extractor, before)


def test_counts_of_batches_may_be_missing(tmp_path):
    """They are no weights, and torchvision's files were made before torch had them."""
    state = _state()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    extractor = _Extractor()
    load_backbone(extractor, tmp_path / "old.pth")
    _assert_loaded(extractor, state | {"1.num_batches_tracked": torch.tensor(0)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"0.weight": None}, "0.weight"),
        ({"1.running_var": None}, "1.running_var"),
        ({"0.weight": torch.zeros(4, 3, 5, 5)}, "0.weight"),
        ({"0.bias": torch.zeros(5)}, "0.bias"),
    ],
)
def test_missing_weights_and_other_shapes_are_refused_and_nothing_is_loaded(change, named, tmp_path):
    state = {name: value for name, value in (_state() | change).items() if value is not None}
    torch.save(state, tmp_path / "w.pth")
    extractor = _Extractor()
    with pytest.raises(
        ValueError, match=rf"weights of tiny up to b, but .*w\.pth lacks {named} or has it .*\(1 of 7 such\)"
    ):
        load_backbone(extractor, tmp_path / "w.pth")
    _assert_loaded(extractor, _Extractor().feature_extractor.state_dict())


def test_no_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="weights_path must be a file"):
            load_backbone(_Extractor(), path)


def _not_a_state_dict(path):
    torch.save([torch.zeros(2)], path)


def _not_only_tensors(path):
    torch.save({"model": {"0.weight": torch.zeros(2)}, "epoch": 3}, path)


def _wrapped_nothing(path):
    torch.save({"state_dict": None}, path)


@pytest.mark.parametrize("write", [_not_a_state_dict, _not_only_tensors, _wrapped_nothing])
def test_something_else_than_a_state_dict_is_refused(write, tmp_path):
    write(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"weights_path must be a state dict, got .*, which holds something else"):
        load_backbone(_Extractor(), tmp_path / "w.pth")


class _Runs:
    """Would run what it likes when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_runs_code_is_refused(new_format, tmp_path):
    torch.save(_Runs(), tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"a state dict that loads with weights_only, got .*w\.pth"):
        load_backbone(_Extractor(), tmp_path / "w.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_Runs(), protocol=2))
    with pytest.raises(ValueError, match="a state dict that loads with weights_only"):
        load_backbone(_Extractor(), tmp_path / "bare.pth")


@pytest.mark.parametrize("name", ["plain.pth", "legacy.pt", "plain.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_ends_early_is_refused(name, share, tmp_path):
    SAVERS[name](_state(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="weights_path must be a state dict that loads with weights_only"):
        load_backbone(_Extractor(), tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=12), suffix=st.sampled_from(["pth", "safetensors"]))
def test_whatever_stands_in_a_file_is_refused_with_one_error(content, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights_path must be a state dict"):
        load_backbone(_Extractor(), path)


@pytest.mark.parametrize("content", [b".", b"\x85", b"h\x00", b"X\x10\x00", b"\x80\x02M\xe9\x03.", b"hello world"])
def test_damaged_pickles_are_refused(content, tmp_path):
    """Those on which torch's reader raises something else than an unpickling error."""
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match="weights_path must be a state dict that loads with weights_only"):
        load_backbone(_Extractor(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_resnet", ["layer1", "layer3"]),
        ("test_convnext", ["stages.0", "stages.1"]),  # timm renames stages.0 to stages_0 where features are wanted
        ("test_efficientnet", ["blocks.1", "blocks.2"]),
    ],
)
def test_a_whole_networks_file_gives_its_features(name, layers, tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model(name).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    torch.manual_seed(2)
    extractor = TimmFeatureExtractor(name, layers, pre_trained=False)
    load_backbone(extractor, tmp_path / "whole.pth")

    expected = {}
    for layer in layers:
        whole.get_submodule(layer).register_forward_hook(lambda _m, _i, out, key=layer: expected.update({key: out}))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole(images)
    for layer, found in extractor(images).items():
        torch.testing.assert_close(found, expected[layer])


def test_without_a_path_timm_is_asked(monkeypatch):
    asked = []

    def make(*arguments: object, **keywords: object) -> _Extractor:
        asked.append((arguments, keywords))
        return _Extractor(7)

    monkeypatch.setattr(backbone_module, "TimmFeatureExtractor", make)
    extractor = _Extractor()
    load_backbone(extractor, None)
    assert asked == [(("tiny", ("a", "b")), {"pre_trained": True})]
    _assert_loaded(extractor, _Extractor(7).feature_extractor.state_dict())


@pytest.mark.parametrize("error", [RuntimeError("no pretrained weights"), ConnectionError("offline"), KeyError("etag")])
def test_without_a_path_and_a_net_the_error_says_what_to_do(error, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(backbone_module, "TimmFeatureExtractor", refuse)
    with pytest.raises(OSError, match=rf"weights of tiny are neither .*{type(error).__name__}.*: pass weights_path"):
        load_backbone(_Extractor(), None)


# --- thresholds from held-out normal images


def _maps(scores) -> Tensor:
    """Maps of 2 by 3 pixels whose maxima, at another pixel each time, are the scores."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    maps = (scores[:, None] - torch.linspace(1, 2, 6)).view(-1, 1, 2, 3)
    for n, score in enumerate(scores):
        maps[n, 0, n % 2, n % 3] = score
    return maps


def _calibrated(scores, quantile: float, **arguments) -> QuantilePostProcessor:
    post_processor = QuantilePostProcessor(quantile, **arguments)
    post_processor.calibrate(_maps(scores))
    return post_processor


@pytest.mark.parametrize(
    ("n", "quantile", "rank"),
    [
        (19, 0.9, 18),  # 20 * 0.9 = 18
        (99, 0.55, 55),  # 100 * 0.55 = 55, which in floating point is a little more
        (99, 0.57, 57),  # 100 * 0.57 = 57, which is a little less
        (99, 0.99, 99),  # 100 * 0.99 = 99: the fewest of which the largest is the 0.99 quantile
        (98, 0.99, 98),  # 99 * 0.99 = 98.01 asks for a 99th, which there is not
        (199, 0.99, 198),  # 200 * 0.99 = 198
        (200, 0.99, 199),  # 201 * 0.99 = 198.99
        (9, 0.7, 7),  # 10 * 0.7 = 7
        (9, 0.71, 8),  # 7.1
        (5, 0.5, 3),  # 6 * 0.5: the median
        (7, 1.0, 7),
        (1, 0.99, 1),
        (1, 0.01, 1),
        (9, 0.01, 1),  # 0.1: nothing is below the smallest
        (5, 1e-12, 1),
    ],
)
def test_the_threshold_has_the_rank_worked_out_by_hand(n, quantile, rank):
    scores = torch.arange(1.0, n + 1)  # so that a score is its rank
    post_processor = _calibrated(scores[torch.randperm(n)], quantile)
    assert post_processor.image_threshold == rank
    assert post_processor.pixel_threshold == rank


def test_thresholds_and_ranges_by_hand():
    post_processor = QuantilePostProcessor(0.5)
    maps = torch.tensor([[1.0, 2.0, -3.0], [7.0, 0.0, 0.0], [4.0, 5.0, 1.0]]).view(3, 1, 1, 3)
    post_processor.calibrate(maps)
    assert post_processor.image_threshold == post_processor.pixel_threshold == 5  # of 2, 5, 7
    assert post_processor.image_min == post_processor.pixel_min == -3
    assert post_processor.image_max == post_processor.pixel_max == 7
    post_processor.calibrate(maps + 10)  # a second fit replaces the first
    assert post_processor.image_threshold == 15
    assert (post_processor.image_min, post_processor.pixel_max) == (7, 17)


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), thousandths=st.integers(1, 1000))
def test_the_threshold_is_the_smallest_score_that_reaches_the_quantile(scores, thousandths):
    threshold = float(_calibrated(scores, thousandths / 1000).image_threshold)
    # Counted instead of sorted, in integers: the smallest score with enough scores at or below it, else the largest.
    needed = (len(scores) + 1) * thousandths
    enough = [score for score in scores if 1000 * sum(other <= score for other in scores) >= needed]
    assert threshold == (min(enough) if enough else max(scores))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 80),
    quantile=st.sampled_from([0.5, 0.8, 0.9, 0.95]),
    shape=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_the_rate_of_false_alarms_is_the_one_chosen(n, quantile, shape, seed):
    """Scores of any distribution: at most 1 - q on average, and at least 1 - q - 1/(n + 1), where n is large enough.

    Else the threshold is the largest of n scores, which one more exceeds in one of n + 1 cases.
    """
    rng = np.random.default_rng(seed)
    repetitions, rates = 200, []
    post_processor = QuantilePostProcessor(quantile)
    for _ in range(repetitions):
        post_processor.calibrate(torch.from_numpy(rng.gamma(shape, size=(n, 1, 1, 1)).astype(np.float32)))
        fresh = rng.gamma(shape, size=500).astype(np.float32)
        rates.append(float((fresh > float(post_processor.image_threshold)).mean()))
    # Six standard errors, so that no seed that hypothesis may try falls out by chance.
    tolerance = 6 * max(np.std(rates), 0.005) / math.sqrt(repetitions)
    if (n + 1) * quantile <= n:
        assert 1 - quantile - 1 / (n + 1) - tolerance <= np.mean(rates) <= 1 - quantile + tolerance
    else:
        assert np.mean(rates) == pytest.approx(1 / (n + 1), abs=tolerance)


def test_with_quantile_one_the_largest_score_is_the_threshold_and_no_held_out_image_is_flagged():
    scores = torch.rand(50) * 100
    post_processor = _calibrated(scores, 1.0)
    assert post_processor.image_threshold == scores.max()
    found = post_processor(InferenceBatch(pred_score=scores, anomaly_map=_maps(scores)))
    assert not found.pred_label.any()
    assert not found.pred_mask.any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    quantile=st.sampled_from([0.3, 0.9, 0.99, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    as_batch=st.booleans(),
)
def test_an_image_is_flagged_exactly_where_one_of_its_pixels_is(seed, quantile, scale, as_batch):
    generator = torch.Generator().manual_seed(seed)
    post_processor = QuantilePostProcessor(quantile)
    held_out = torch.rand(30, 1, 4, 5, generator=generator) * scale
    post_processor.calibrate(held_out)
    # Half of them lie about the threshold, and some are the held-out maps themselves, so one is exactly at it.
    maps = torch.cat([held_out, held_out + 0.3 * scale * torch.randn(30, 1, 4, 5, generator=generator)])
    scores = maps.amax((1, 2, 3))
    if as_batch:
        found = ImageBatch(image=torch.zeros(60, 3, 4, 5), pred_score=scores, anomaly_map=maps)
        post_processor.post_process_batch(found)
    else:
        found = post_processor(InferenceBatch(pred_score=scores, anomaly_map=maps))
    assert torch.equal(found.pred_label.flatten(), found.pred_mask.flatten(1).any(dim=1))
    assert torch.equal(found.pred_score, found.anomaly_map.flatten(1).amax(dim=1))
    assert torch.equal(found.pred_label[:30].flatten(), scores[:30] > post_processor.image_threshold)


def _buffers(post_processor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in post_processor.state_dict().items()}


def test_the_validation_split_changes_nothing():
    post_processor = _calibrated(torch.arange(1.0, 20.0), 0.9)
    before = _buffers(post_processor)
    batch = ImageBatch(
        image=torch.zeros(4, 3, 2, 3),
        pred_score=torch.full((4,), 500.0),
        anomaly_map=torch.full((4, 1, 2, 3), 500.0),
        gt_label=torch.tensor([0, 0, 1, 1]),
        gt_mask=torch.zeros(4, 2, 3, dtype=torch.int64),
    )
    post_processor.on_validation_batch_end(None, None, batch, batch, 0)
    post_processor.on_validation_epoch_end(SimpleNamespace(sanity_checking=False), None)
    assert before.keys() == post_processor.state_dict().keys()
    assert set(before) >= {"_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"}
    for name, value in post_processor.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert batch.pred_score.tolist() == [500.0] * 4


def test_the_configuration_goes_through_a_checkpoint():
    original = _calibrated(torch.arange(1.0, 20.0), 0.9, image_sensitivity=0.4)
    config = original.checkpoint_config()
    assert config["quantile"] == 0.9
    promise = config.pop("promise")  # 20 * 0.9: the second largest of 19
    assert promise == {"held_out": 19, "quantile": 0.9, "confidence": 0.95, "false_alarms": promised_rate(19, 18)}
    assert config.pop("confidence") is None
    assert all(isinstance(value, bool | float) for value in config.values())  # plain, for weights_only
    config |= {"promise": promise, "confidence": None}
    restored = QuantilePostProcessor(0.5)
    restored.load_checkpoint_config(config)
    restored.load_state_dict(original.state_dict())
    assert (restored.quantile, restored.confidence, restored.image_sensitivity) == (0.9, None, 0.4)
    assert restored.promise == promise
    assert restored.image_threshold == original.image_threshold == 18
    restored.calibrate(_maps(torch.arange(1.0, 10.0)))
    assert restored.image_threshold == 9  # 10 * 0.9, and not 5


def test_a_confidence_asks_for_a_higher_threshold():
    scores = torch.arange(1.0, 201.0)
    average, sure = _calibrated(scores, 0.9), _calibrated(scores, 0.9, confidence=0.95)
    assert average.image_threshold == 181  # 201 * 0.9, rounded up
    assert sure.image_threshold == threshold_rank(200, 0.9, 0.95) == 188
    assert average.promise["false_alarms"] > 0.1 >= sure.promise["false_alarms"]
    assert sure.promise["confidence"] == 0.95


@pytest.mark.parametrize(
    ("n", "quantile", "confidence", "few"),
    [
        (18, 0.95, None, "too few for quantile 0.95, which takes 19"),
        (19, 0.95, None, ""),
        (58, 0.95, 0.95, "too few for quantile 0.95, which takes 59"),
        (59, 0.95, 0.95, ""),
        (5, 1.0, None, ""),
    ],
)
def test_what_held_out_images_promise_is_said(n, quantile, confidence, few, caplog):
    with caplog.at_level(logging.INFO, "toll_plugin"):
        _calibrated(torch.rand(n), quantile, confidence=confidence)
    (record,) = caplog.records
    assert record.levelname == ("WARNING" if few else "INFO")
    assert f"{n} held-out images{', ' if few else ''}{few}: with 95 % confidence at most" in record.getMessage()


def test_copies_of_an_image_promise_nothing(caplog):
    post_processor = _calibrated(torch.rand(30), 0.9)
    with caplog.at_level(logging.INFO, "toll_plugin"):
        post_processor.calibrate(_maps(torch.arange(1.0, 20.0)), independent=False)
    assert post_processor.image_threshold == 18
    assert (post_processor.promise, caplog.records) == ({}, [])


@pytest.mark.parametrize("confidence", [0, 1, 1.5, math.nan])
def test_bad_confidences_are_refused(confidence):
    with pytest.raises(ValueError, match="confidence must be"):
        QuantilePostProcessor(0.9, confidence)


class _Holder:
    """A model as far as checkpoints ask: its two components."""

    def __init__(self, post_processor) -> None:
        self.pre_processor, self.post_processor = None, post_processor


@pytest.mark.parametrize("verb", ["on_validation_epoch_end", "on_test_start", "on_predict_start"])
def test_without_a_calibration_nothing_is_flagged_in_silence(verb):
    trainer, model = SimpleNamespace(sanity_checking=False), nn.Linear(1, 1)
    with pytest.raises(NotFittedError, match="no threshold: Linear is not fitted yet, or never calls calibrate"):
        getattr(QuantilePostProcessor(), verb)(trainer, model)
    getattr(_calibrated([1.0, 2.0], 0.9), verb)(trainer, model)


def test_a_checkpoint_names_the_kind():
    checkpoint: dict = {}
    store_components(_Holder(_calibrated([1.0, 2.0], 0.7)), checkpoint)
    holder = _Holder(PostProcessor())
    restore_components(holder, checkpoint)
    assert type(holder.post_processor) is QuantilePostProcessor


@pytest.mark.parametrize("maps", [torch.empty(0, 1, 2, 2), torch.tensor([[[[1.0, math.nan]]]])])
def test_thresholds_need_finite_maps(maps):
    post_processor = _calibrated([1.0, 2.0], 0.9)
    with pytest.raises(ValueError, match="maps must be those of at least one image and finite"):
        post_processor.calibrate(maps)
    assert post_processor.image_threshold == 2


@pytest.mark.parametrize(
    ("quantile", "error", "message"),
    [
        (0, ValueError, "quantile must be finite and > 0, got 0"),
        (-0.5, ValueError, "quantile must be finite and > 0"),
        (1.01, ValueError, r"quantile must be in \(0, 1\], got 1.01"),
        (99, ValueError, r"quantile must be in \(0, 1\], got 99"),
        (math.nan, ValueError, "quantile must be finite"),
        (math.inf, ValueError, "quantile must be finite"),
        ("0.9", TypeError, "quantile must be a real number"),
        (None, TypeError, "quantile must be a real number"),
        (True, TypeError, "quantile must be a real number"),
    ],
)
def test_bad_quantiles_are_refused(quantile, error, message):
    with pytest.raises(error, match=message):
        QuantilePostProcessor(quantile)


def test_scores_and_maps_have_thresholds_of_their_own():
    post_processor = QuantilePostProcessor(0.5)
    maps = torch.tensor([[1.0, 4.0], [2.0, 6.0], [0.0, 5.0]]).view(3, 1, 1, 2)
    post_processor.calibrate(maps, torch.tensor([30.0, 10.0, 20.0]))
    found = (post_processor.image_threshold, post_processor.image_min, post_processor.image_max)
    assert [float(value) for value in found] == [20.0, 10.0, 30.0]
    found = (post_processor.pixel_threshold, post_processor.pixel_min, post_processor.pixel_max)
    assert [float(value) for value in found] == [5.0, 0.0, 6.0]
    for scores in (torch.zeros(2), torch.tensor([0.0, 1.0, torch.nan])):
        with pytest.raises(ValueError, match="scores must be finite, one for each of 3 maps"):
            post_processor.calibrate(maps, scores)
