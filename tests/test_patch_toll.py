"""PatchToll in anomalib: the contract, and what is its own."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from anomalib.data import Folder, ImageBatch, MVTecAD
from anomalib.post_processing import PostProcessor
from conftest import draw
from contracts import AnomalibCommandContract, AnomalibModelContract, checkpoint_of, engine
from sklearn.exceptions import NotFittedError
from torchvision.transforms.v2 import RandomHorizontalFlip

from toll_plugin.anomalib import PatchToll, QuantilePostProcessor, TollPostProcessor, TollPreProcessor
from toll_plugin.anomalib.patch_toll import lightning_model
from toll_plugin.core import DivergenceError, TollWarning, fit_patches
from toll_plugin.core.patches.whole import pooled

ARGUMENTS = {"image_size": (64, 96), "pre_trained": False, "max_steps": 30, "hidden_size": 32, "latent_dim": 8}


class TestContract(AnomalibModelContract, AnomalibCommandContract):
    """With a weight that follows the reconstruction and terms in units of their own: what is plain is less to keep."""

    name = "PatchToll"
    arguments = ARGUMENTS | {"beta": "auto", "strength": 0.5, "score_scale": "median", "score_weight": 0.3}
    brief = {"max_steps": 5}  # noqa: RUF012

    def test_resume_equals_an_uninterrupted_fit(self, trained, mvtec_root, tmp_path):
        """There is one pass to train in: a checkpoint is fitted, and resuming from it changes nothing."""
        resumed = self.build()
        engine(tmp_path).fit(resumed, datamodule=self.data(mvtec_root), ckpt_path=trained[-1])
        for name, value in trained[0].model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)


def _model(**changes):
    return PatchToll(**ARGUMENTS | {"seed": 0, "visualizer": False} | changes)


def _data(root, **changes):
    arguments = {"val_split_mode": "from_train", "val_split_ratio": 0.25, "seed": 0, "num_workers": 0}
    return MVTecAD(root=root, category="part", **arguments | {"train_batch_size": 4, "eval_batch_size": 3} | changes)


def _fit(model, root, data, **arguments):
    runner = engine(root, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TollWarning)
        runner.fit(model, datamodule=data)
    return runner


@pytest.fixture
def files(tmp_path):
    """Weights of a whole resnet18, as a file; not those any other model here has."""
    torch.manual_seed(7)
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path, state


# --- features


def test_the_backbone_is_frozen_and_its_features_are_computed_once(mvtec_root, tmp_path, monkeypatch):
    model, calls = _model(), []
    embed = model.model.embed
    monkeypatch.setattr(model.model, "embed", lambda *a: calls.append(len(a[0])) or embed(*a))
    before = copy.deepcopy(model.model.backbone.state_dict())
    _fit(model, tmp_path, _data(mvtec_root), limit_val_batches=0)
    assert sum(calls) == 9  # once each, though the network saw them many times
    assert len(model.history.total) > 1
    for name, value in model.model.backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_file_of_features_gives_the_same_model(mvtec_root, tmp_path):
    found = []
    for limit in (2e9, 0):
        model = _model(cache_limit=limit)
        data = _data(mvtec_root)
        data.setup()
        data.train_dataloader = lambda data=data: torch.utils.data.DataLoader(
            data.train_data, batch_size=4, collate_fn=data.train_data.collate_fn
        )
        _fit(model, tmp_path, data)
        found.append(model.model.patches.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


def test_standardised_by_the_training_images(mvtec_root, tmp_path):
    model, data = _model(), _data(mvtec_root)
    _fit(model, tmp_path, data)
    batches = [model.pre_processor.transform(batch.image) for batch in data.train_dataloader()]
    features = [model.model.embed(images) for images in batches]
    rows = torch.cat(features).permute(0, 2, 3, 1).reshape(-1, 448).double()
    patches = model.model.patches
    torch.testing.assert_close(patches.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
    deviation = rows.std(0, correction=0)
    # A dead channel, and a random backbone has some, is only centred, as far as it can be.
    alive = deviation > 1e-3 * deviation.median()
    assert alive.sum() > 350
    torch.testing.assert_close(patches.scale.double()[alive], deviation[alive], rtol=1e-3, atol=1e-5)
    assert (patches.scale > 0).all()


def test_each_pass_sees_new_augmentations(mvtec_root, tmp_path, monkeypatch):
    model, seen = _model(passes=3), defaultdict(list)
    embed = model.model.embed

    def spy(images, names):
        for name, image in zip(names, images, strict=True):
            seen[name].append(image)
        return embed(images, names)

    monkeypatch.setattr(model.model, "embed", spy)
    _fit(model, tmp_path, _data(mvtec_root, train_augmentations=RandomHorizontalFlip()), limit_val_batches=0)
    assert [len(copies) for copies in seen.values()] == [3] * 9
    assert any(not torch.equal(copies[0], other) for copies in seen.values() for other in copies[1:])
    assert bool(model.model.is_fitted)


@pytest.mark.parametrize("path_of", ["pth", "safetensors"])
def test_weights_of_a_file(files, mvtec_root, tmp_path, path_of):
    path, state = files
    if path_of == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    model = _model(pre_trained=True, weights_path=path)
    _fit(model, tmp_path, _data(mvtec_root))
    for name, value in model.model.backbone.feature_extractor.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_a_checkpoint_needs_no_weights_file(files, mvtec_root, tmp_path):
    path, _ = files
    model = _model(pre_trained=True, weights_path=path)
    _fit(model, tmp_path, _data(mvtec_root))
    path.unlink()
    loaded = PatchToll.load_from_checkpoint(checkpoint_of(tmp_path, "PatchToll", "MVTecAD", "part")).eval()
    images = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(loaded.model(images).pred_score, model.eval().model(images).pred_score)


def test_missing_weights_end_the_fit_before_an_image_is_read(mvtec_root, tmp_path, monkeypatch):
    model, embedded = _model(pre_trained=True, weights_path=tmp_path / "none.pth"), []
    monkeypatch.setattr(model.model, "embed", lambda *a: embedded.append(a))
    with pytest.raises(FileNotFoundError, match=r"weights_path must be a file.*none\.pth"):
        _fit(model, tmp_path, _data(mvtec_root))
    assert not bool(model.model.is_fitted)
    assert embedded == []


def test_without_internet_the_error_says_what_to_do(mvtec_root, tmp_path, monkeypatch):
    create = timm.create_model

    def offline(*arguments, pretrained=False, **options):
        if pretrained:
            msg = "no route to the hub"
            raise ConnectionError(msg)
        return create(*arguments, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"resnet18 are neither on this machine.*no route.*weights_path"):
        _fit(_model(pre_trained=True), tmp_path, _data(mvtec_root))


def test_never_random_without_a_word(mvtec_root, tmp_path, caplog):
    _fit(_model(), tmp_path, _data(mvtec_root))
    assert "random weights" in caplog.text


def test_a_transformer_as_backbone(mvtec_root, tmp_path):
    model = _model(backbone="vit_tiny_patch16_224", layers=["blocks.1", "blocks.3"])
    _fit(model, tmp_path, _data(mvtec_root))
    assert model.model.eval()(torch.rand(1, 3, 64, 96)).anomaly_map.shape == (1, 1, 64, 96)


def test_one_device_is_enough_whatever_the_trainer_says(mvtec_root, tmp_path):
    runner = _fit(_model(), tmp_path, _data(mvtec_root), devices=2)
    assert runner.trainer.num_devices == 1
    assert bool(runner.model.model.is_fitted)


def test_dinov2s_transformer_end_to_end(mvtec_root, tmp_path):
    import onnxruntime

    shape = {"backbone": "vit_small_patch14_dinov2.lvd142m", "image_size": (42, 56), "stride": 14}
    advised = _model(**shape, layers=["blocks.5", "blocks.7", "blocks.9"])
    assert advised.model.embed(torch.rand(1, 3, 42, 56)).shape == (1, 3 * 384, 3, 4)
    model = _model(**shape, layers=["blocks.0", "blocks.1"])  # the export of ten blocks takes half a minute
    runner = _fit(model, tmp_path, _data(mvtec_root))
    assert model.model.embed(torch.rand(1, 3, 42, 56)).shape == (1, 2 * 384, 3, 4)
    loaded = PatchToll.load_from_checkpoint(checkpoint_of(tmp_path, "PatchToll", "MVTecAD", "part")).eval()
    images = torch.rand(2, 3, 50, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(images)
    session = onnxruntime.InferenceSession(str(runner.export(loaded, "onnx", export_root=tmp_path)))
    found = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {"input": images.numpy()}), strict=True)
    )
    torch.testing.assert_close(torch.from_numpy(found["pred_score"]).flatten(), expected.pred_score.flatten())
    torch.testing.assert_close(torch.from_numpy(found["anomaly_map"]), expected.anomaly_map, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "layers", "mean", "deviation"),
    [
        ("resnet18", ["layer1"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("tf_efficientnet_lite0", ["blocks.2"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("vit_tiny_patch16_224", ["blocks.1"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_images_are_scaled_as_the_backbone_was_pretrained(backbone, layers, mean, deviation):
    model = _model(backbone=backbone, layers=layers)
    images = torch.rand(2, 3, 64, 96)
    expected = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(deviation).view(1, 3, 1, 1)
    for scale in (model.pre_processor, model.pre_processor.transform):  # of exports, and of training
        torch.testing.assert_close(scale(images), expected, rtol=0, atol=0)
    assert (model.pre_processor.scaling == "imagenet") == (backbone == "resnet18")


def test_a_checkpoint_keeps_its_scaling(mvtec_root, tmp_path, monkeypatch):
    arguments = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2"]}
    model = _model(**arguments)
    _fit(model, tmp_path, _data(mvtec_root))
    path = checkpoint_of(tmp_path, "PatchToll", "MVTecAD", "part")
    monkeypatch.setattr(lightning_model, "scaling_of", lambda _: "imagenet")
    assert _model(**arguments).pre_processor.scaling == "imagenet"
    loaded = PatchToll.load_from_checkpoint(path).eval()
    assert loaded.pre_processor.scaling == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(loaded(images).pred_score, model.eval()(images).pred_score)
    # One that is passed is not undone, and neither is another size.
    own = PatchToll.load_from_checkpoint(path, pre_processor=TollPreProcessor((64, 96), "unit"))
    assert own.pre_processor.scaling == "unit"
    assert PatchToll.load_from_checkpoint(path, image_size=(32, 48)).pre_processor.image_size == (32, 48)


# --- held-out images and thresholds


@pytest.fixture
def fitted_to(monkeypatch):
    """Arguments of each call of ``fit_patches``: the model, rows to train on and rows that are held out."""
    calls = []
    monkeypatch.setattr(lightning_model, "fit_patches", lambda *a, **k: calls.append(a) or fit_patches(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("mode", "share", "images"),
    [("same_as_test", 1.0, (10, 2)), ("from_train", 1.0, (9, 3)), ("from_train", 0.0, (7, 2))],
)
def test_training_images_are_held_out_where_validation_has_anomalies(
    mvtec_root, tmp_path, fitted_to, mode, share, images
):
    model = _model()
    _fit(model, tmp_path, _data(mvtec_root, val_split_mode=mode), limit_val_batches=share)
    ((_, rows, held_out),) = fitted_to
    assert (len(rows), len(held_out)) == (96 * images[0], 96 * images[1])
    assert torch.isfinite(model.post_processor.image_threshold)


def test_copies_of_an_image_are_held_out_together(mvtec_root, tmp_path, fitted_to):
    model = _model(passes=2)
    _fit(model, tmp_path, _data(mvtec_root, val_split_mode="same_as_test"))
    assert model.post_processor.promise == {}
    ((_, rows, held_out),) = fitted_to
    assert (len(rows), len(held_out)) == (2 * 10 * 96, 2 * 2 * 96)
    # Without augmentations copies are equal, and positions of two images of this noisy data are not.
    trained_on = set(map(tuple, rows[slice(None)].tolist()))
    assert trained_on.isdisjoint(map(tuple, held_out[slice(None)].tolist()))


def test_false_alarms_are_as_asked_for(tmp_path):
    """160 held-out and 400 fresh images of one kind; 80 % shall pass."""
    rng = np.random.default_rng(0)
    for i in range(200):
        draw(tmp_path / f"images/train/{i:03d}.png", rng, bad=False, size=(32, 32))
    for i in range(400):
        draw(tmp_path / f"images/fresh/{i:03d}.png", rng, bad=False, size=(32, 32))
    draw(tmp_path / "images/bad/0.png", rng, bad=True, size=(32, 32))
    data = Folder(
        "parts",
        root=tmp_path / "images",
        normal_dir="train",
        normal_test_dir="fresh",
        abnormal_dir="bad",
        val_split_mode="from_train",
        val_split_ratio=0.8,
        num_workers=0,
        seed=0,
    )
    model = _model(image_size=32, quantile=0.8, max_steps=60)
    runner = _fit(model, tmp_path, data)
    batches = runner.predict(model, datamodule=data)
    flagged = torch.cat([batch.pred_label[batch.gt_label == 0] for batch in batches]).float()
    assert len(flagged) == 400
    # Its deviation is sqrt(0.2 * 0.8 * (1 / 160 + 1 / 400)) = 0.037 around 0.2.
    assert 0.1 < float(flagged.mean()) < 0.3


def test_an_image_is_flagged_where_a_pixel_is(mvtec_root, tmp_path):
    model, data = _model(quantile=0.5, top_share=0.0, image_weight=0.0), _data(mvtec_root)
    runner = _fit(model, tmp_path, data)
    labels, masks = [], []
    for batch in runner.predict(model, datamodule=data):
        labels.append(batch.pred_label)
        masks.append(batch.pred_mask.flatten(1).any(dim=1))
        torch.testing.assert_close(batch.pred_score, batch.anomaly_map.flatten(1).amax(dim=1))
    torch.testing.assert_close(torch.cat(labels), torch.cat(masks))
    assert torch.cat(labels).any()


@pytest.mark.parametrize("kind", [PostProcessor, TollPostProcessor])
def test_other_post_processors_take_the_validation_split(mvtec_root, tmp_path, kind):
    model = _model(post_processor=kind())
    _fit(model, tmp_path, _data(mvtec_root, val_split_mode="same_as_test"))
    assert torch.isfinite(model.post_processor.image_threshold)


# --- scores and maps


@pytest.mark.parametrize("term", ["total", "reconstruction", "latent"])
def test_map_and_score_by_hand(mvtec_root, tmp_path, term):
    model = _model(score_term=term, sigma=0.0, beta=0.5, top_share=0.0, image_weight=0.0)
    _fit(model, tmp_path, _data(mvtec_root))
    model.eval()
    images = torch.rand(2, 3, 64, 96)
    found, features, patches = model.model(images), model.model.embed(images), model.model.patches
    x = (features - patches.mean[:, None, None]) / patches.scale[:, None, None]
    x = torch.einsum("nchw,ck->nkhw", x, patches.components)
    grid = torch.empty(2, 1, 8, 12)
    with torch.no_grad():
        for n in range(2):
            for i in range(8):
                for j in range(12):
                    made, z = patches.network(x[n : n + 1, :, i, j])
                    residual, norm = ((x[n, :, i, j] - made[0]) ** 2).sum(), (z[0] ** 2).sum()
                    total = residual + 0.5 * norm
                    grid[n, 0, i, j] = {"total": total, "reconstruction": residual, "latent": norm}[term]
    expected = torch.nn.functional.interpolate(grid, (64, 96), mode="bilinear")
    torch.testing.assert_close(found.anomaly_map, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pred_score, found.anomaly_map.flatten(1).amax(dim=1))


def test_a_spot_is_found_and_located(mvtec_root, tmp_path):
    """By a random backbone; but the defects of this data are bright squares on a smooth texture."""
    model = _model(max_steps=300, hidden_size=128, image_size=(80, 96))
    runner = _fit(model, tmp_path, _data(mvtec_root))
    results = runner.test(model, datamodule=_data(mvtec_root))
    assert results[0]["image_AUROC"] == 1
    assert results[0]["pixel_AUROC"] > 0.9


def test_a_score_does_not_depend_on_the_batch(mvtec_root, tmp_path):
    model = _model()
    _fit(model, tmp_path, _data(mvtec_root))
    model.eval()
    images = torch.rand(3, 3, 64, 96)
    alone = torch.cat([model.model(image[None]).pred_score for image in images])
    torch.testing.assert_close(model.model(images).pred_score, alone, rtol=1e-4, atol=1e-4)


# --- fits


def _folder(root, sizes, **changes):
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        draw(root / f"images/good/{i}.png", rng, bad=False, size=size)
    draw(root / "images/bad/0.png", rng, bad=True)
    arguments = {"normal_dir": "good", "abnormal_dir": "bad", "num_workers": 0, "seed": 0}
    return Folder("parts", root=root / "images", **arguments | changes)


@pytest.mark.parametrize("count", [2, 10])
def test_few_images_suffice(tmp_path, count):
    split = {"val_split_mode": "from_train", "val_split_ratio": 0.2 if count > 2 else 0.5, "test_split_ratio": 0.1}
    data = _folder(tmp_path, [(40, 48)] * count, normal_test_dir="good", **split)
    model = _model()
    _fit(model, tmp_path, data)
    batches = engine(tmp_path).predict(model, data_path=tmp_path / "images/bad")
    assert bool(batches[0].pred_label.all())


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    first, second = _model(seed=3), _model(seed=3)
    torch.testing.assert_close(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("split", ["from_train", "same_as_test"])
def test_the_seed_alone_decides_the_fit(mvtec_root, tmp_path, split):
    """Whatever order the loader, which shuffles by the global generator, gives the images in."""
    found = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        model = _model(seed=3, max_steps=5)
        _fit(model, tmp_path, _data(mvtec_root, val_split_mode=split))
        found.append((model.post_processor.image_threshold, model.model.patches.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_in_half_precision_no_held_out_image_is_flagged(mvtec_root, tmp_path):
    """The threshold is that of features in the precision in which images are scored."""
    model, data = _model(quantile=1.0), _data(mvtec_root)
    runner = _fit(model, tmp_path, data, precision="bf16-mixed")
    data.setup()
    batches = runner.predict(model, dataloaders=data.val_dataloader(), return_predictions=True)
    flags = torch.cat([batch.pred_label.flatten() for batch in batches])
    scores = torch.cat([batch.pred_score.flatten() for batch in batches])
    assert not bool(flags.any())
    assert float(scores.max()) == pytest.approx(0.5, abs=1e-6)  # that of the threshold


@pytest.mark.parametrize("limit", [1e9, 0])
def test_a_fit_that_ends_early_says_so(mvtec_root, tmp_path, limit):
    model = _model(cache_limit=limit)
    with pytest.raises(ValueError, match=r"training must see all images, 1 time\(s\), but ended early, after 4 images"):
        _fit(model, tmp_path, _data(mvtec_root), max_steps=1)
    assert model._features is None
    assert not bool(model.model.is_fitted)


def test_a_model_with_features_in_a_file_can_be_copied(mvtec_root, tmp_path, monkeypatch):
    model, copies = _model(cache_limit=0), []
    step = model.training_step
    monkeypatch.setattr(
        type(model), "training_step", lambda self, *a: (step(*a), copies.append(copy.deepcopy(self)))[0]
    )
    _fit(model, tmp_path, _data(mvtec_root), limit_train_batches=2)
    assert [one._features for one in copies] == [None, None]
    assert bool(model.model.is_fitted)


def test_thresholds_are_those_of_whole_maps(mvtec_root, tmp_path, monkeypatch):
    model, maps = _model(top_share=0.0, image_weight=0.0), []
    map_of = model.model.map_of
    monkeypatch.setattr(model.model, "map_of", lambda *a: maps.append(map_of(*a)) or maps[-1])
    monkeypatch.setattr(model, "validation_step", lambda batch, *_: batch)
    _fit(model, tmp_path, _data(mvtec_root))
    expected = QuantilePostProcessor()
    expected.calibrate(torch.cat(maps))
    for name in ("image_threshold", "pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        assert getattr(model.post_processor, name) == getattr(expected, name)


def test_a_backbone_with_channels_last_is_refused(mvtec_root, tmp_path):
    model = _model(backbone="swin_tiny_patch4_window7_224", layers=["layers.0", "layers.1"], image_size=224)
    with pytest.raises(
        ValueError, match=r"backbone must give maps \(N, channels, height, width\), got \(4, 56, 56, 96\)"
    ):
        _fit(model, tmp_path, _data(mvtec_root))


def test_passes_need_names():
    model = _model(passes=2)
    with pytest.raises(ValueError, match="passes must be 1 for data without image_path, got 2"):
        model.training_step(ImageBatch(image=torch.rand(2, 3, 64, 96)), 0)


def test_a_diverging_fit_keeps_the_fitted_model(mvtec_root, tmp_path):
    model, data = _model(), _data(mvtec_root)
    _fit(model, tmp_path, data)
    before = copy.deepcopy(model.state_dict())
    model.lr = 1e30
    with pytest.raises(DivergenceError):
        _fit(model, tmp_path, data)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_second_fit_starts_afresh(mvtec_root, tmp_path):
    model = _model()
    _fit(model, tmp_path, _data(mvtec_root))
    first, weights = model.history, copy.deepcopy(model.model.patches.state_dict())
    _fit(model, tmp_path, _data(mvtec_root))
    assert model.history == first
    torch.testing.assert_close(model.model.patches.state_dict(), weights, rtol=0, atol=0)


def test_a_checkpoint_of_version_0_1_0_scores_as_it_did():
    path = Path(__file__).parent / "data/patch_toll_0.1.0.ckpt"
    model = PatchToll.load_from_checkpoint(path).eval()
    with torch.no_grad():
        found = model(torch.linspace(0, 1, 2 * 3 * 64).reshape(2, 3, 8, 8))
    assert found.pred_score.tolist() == pytest.approx([0.2716388702392578, 0.22060763835906982], abs=1e-5)
    means = found.anomaly_map.double().mean(dim=(1, 2, 3)).tolist()
    assert means == pytest.approx([0.22805285369395278, 0.19089186086785048], abs=1e-5)


def test_pickles_and_copies_score_alike(mvtec_root, tmp_path):
    model = _model()
    _fit(model, tmp_path, _data(mvtec_root))
    images = torch.rand(1, 3, 64, 96)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other.eval()(images).pred_score, model.eval()(images).pred_score)


# --- a weight that follows the reconstruction, and terms in units of their own


def _units(model):
    return [float(unit) for unit in model.model.patches.score.units]


def test_auto_trains_and_its_held_out_loss_is_twice_the_reconstruction(mvtec_root, tmp_path):
    auto, plain = _model(beta="auto", score_weight=0.5), _model(beta=0.0)
    for model in (auto, plain):
        _fit(model, tmp_path, _data(mvtec_root))
    assert auto.history.total == pytest.approx([2 * value for value in auto.history.reconstruction], rel=1e-5)
    name = "encoder.0.weight"
    pressed, free = (model.model.patches.network.state_dict()[name] for model in (auto, plain))
    assert not torch.equal(pressed, free)
    assert auto.history.latent[-1] < plain.history.latent[-1]


def test_strength_zero_is_beta_zero_to_the_last_bit(mvtec_root, tmp_path):
    found = []
    for beta in ({"beta": "auto", "strength": 0.0}, {"beta": 0.0}):
        model = _model(**beta, score_weight=0.7, score_scale="median")
        _fit(model, tmp_path, _data(mvtec_root))
        images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        found.append((model.state_dict(), model.eval().model(images).anomaly_map))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("split", ["from_train", "same_as_test"])
def test_units_are_the_medians_over_the_positions_held_out(mvtec_root, tmp_path, fitted_to, split):
    model = _model(score_scale="median", sigma=0.0)
    plain = _model()
    for one in (model, plain):
        _fit(one, tmp_path, _data(mvtec_root, val_split_mode=split))
    patches = model.eval().model.patches
    x = patches.prepare(fitted_to[0][2][slice(None)])
    with torch.no_grad():
        made, latent = patches.network(x)
    residual, norm = ((x - made) ** 2).sum(1).double().numpy(), (latent**2).sum(1).double().numpy()
    assert _units(model) == pytest.approx([np.median(residual), np.median(norm)], rel=1e-5)
    assert _units(plain) == [1.0, 1.0]
    for name, value in plain.model.patches.network.state_dict().items():  # the score changes nothing of the fit
        torch.testing.assert_close(patches.network.state_dict()[name], value, rtol=0, atol=0)
    # The map and its threshold are in these units: the largest value of an image is the largest of its positions'.
    grids = (residual / np.median(residual) + 0.5 * norm / np.median(norm)).reshape(-1, 1, 8, 12)
    maps = torch.nn.functional.interpolate(torch.from_numpy(grids), (64, 96), mode="bilinear")
    assert float(model.post_processor.pixel_threshold) == pytest.approx(float(maps.max()), rel=1e-4)


def test_a_checkpoint_keeps_the_units(mvtec_root, tmp_path):
    model = _model(beta="auto", score_scale="median")
    _fit(model, tmp_path, _data(mvtec_root))
    loaded = PatchToll.load_from_checkpoint(checkpoint_of(tmp_path, "PatchToll", "MVTecAD", "part")).eval()
    assert _units(loaded) == _units(model) != [1.0, 1.0]
    images = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(loaded.model(images).pred_score, model.eval().model(images).pred_score)


@pytest.mark.parametrize("beta", ["auto", 1.0])
def test_constant_images_give_no_nan(tmp_path, beta):
    from PIL import Image

    for part, count in (("good", 6), ("bad", 1)):
        (tmp_path / "images" / part).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (48, 40), (128, 128, 128)).save(tmp_path / f"images/{part}/{i}.png")
    arguments = {"normal_dir": "good", "abnormal_dir": "bad", "num_workers": 0, "seed": 0}
    data = Folder("parts", root=tmp_path / "images", **arguments, val_split_mode="from_train", val_split_ratio=0.3)
    model = _model(beta=beta, score_scale="median")
    _fit(model, tmp_path, data)
    found = model.eval().model(torch.rand(2, 3, 64, 96))
    assert bool(found.anomaly_map.isfinite().all())
    assert all(unit > 0 and math.isfinite(unit) for unit in _units(model))


# --- refusals


def test_unfitted_models_do_not_score(mvtec_root, tmp_path):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        _model().eval()(torch.rand(1, 3, 64, 96))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        engine(tmp_path).test(_model(), datamodule=_data(mvtec_root))


def test_one_image_is_enough_and_promises_nothing(tmp_path, caplog):
    data = _folder(tmp_path, [(40, 48)], normal_test_dir="good", val_split_mode="same_as_test")
    model = _model()
    _fit(model, tmp_path, data)
    assert "the only image was also taken for a held-out one" in caplog.text
    assert model.post_processor.promise == {}
    found = model.eval().model(torch.rand(2, 3, 64, 96))
    assert bool(found.pred_score.isfinite().all())
    assert model.model.image_score.image_unit == torch.inf


def test_nan_pixels_are_refused(mvtec_root, tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, image, mask=None):
            return image * float("nan"), mask

    model = _model()
    model.pre_processor.transform = Broken()
    with pytest.raises(ValueError, match=r"images must be finite.*\.png"):
        _fit(model, tmp_path, _data(mvtec_root))


def test_features_that_overflow_are_refused_with_the_names_of_their_images(mvtec_root, tmp_path, monkeypatch):
    model = _model()
    embed = model.model.embed

    def overflowing(images, names):
        features = embed(images, names)
        features[[name.endswith("003.png") for name in names]] *= math.inf
        return features

    monkeypatch.setattr(model.model, "embed", overflowing)
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinite ones of [^,]*003\.png:"):
        _fit(model, tmp_path, _data(mvtec_root, val_split_mode="same_as_test"))


def test_images_of_several_sizes_are_refused_without_a_pre_processor(tmp_path):
    data = _folder(tmp_path, [(64, 64), (64, 96)], normal_test_dir="good", train_batch_size=1)
    with pytest.raises(ValueError, match="images must have one size"):
        _fit(_model(pre_processor=False, image_size=None), tmp_path, data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "resnet"}, ValueError, "backbone must be the name of a timm network, got 'resnet'"),
        ({"layers": ["layer2", "layer9"]}, ValueError, "layers must be among .*layer3.*got layer2, layer9"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"layers": ["layer2", "layer2"]}, ValueError, "layers must be named once each, got layer2, layer2"),
        ({"backbone": "vit_tiny_patch16_224"}, ValueError, "layers must be layers of vit_tiny_patch16_224, got layer1"),
        (
            {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1", "blocks.99"]},
            ValueError,
            r"layers must be among blocks\.0, .*blocks\.11 for vit_tiny_patch16_224, got blocks\.1, blocks\.99",
        ),
        (
            {"weights_path": "w.pth"},
            ValueError,
            "weights_path must be left out where pre_trained is False, got 'w.pth'",
        ),
        ({"pre_trained": "false"}, TypeError, "pre_trained must be true or false, got 'false' of type str"),
        (
            {"pre_processor": TollPreProcessor(32, "imagenet")},
            ValueError,
            r"image_size must be left out or that of pre_processor, \(32, 32\), got \(64, 96\)",
        ),
        ({"layers": "layer2"}, TypeError, "layers must be a sequence of names, got 'layer2'"),
        ({"neighbourhood": 2}, ValueError, "neighbourhood must be odd, got 2"),
        ({"quantile": 1.5}, ValueError, "quantile must be in"),
        ({"quantile": 0}, ValueError, "quantile must be finite and > 0"),
        ({"quantile": 0.9, "post_processor": False}, ValueError, "quantile and confidence must be None where post_"),
        ({"confidence": 0.9, "post_processor": False}, ValueError, "quantile and confidence must be None where post_"),
        ({"confidence": 1}, ValueError, r"confidence must be in \(0, 1\), got 1"),
        ({"beta": -1}, ValueError, "beta must be finite and >= 0"),
        ({"beta": "none"}, TypeError, "beta must be a number of at least 0 or 'auto', got 'none'"),
        ({"beta": "auto"}, ValueError, "score_scale='none' with beta='auto' needs a score_weight"),
        ({"strength": 0.5}, ValueError, "strength belongs to beta='auto', got 0.5 with beta=1.0"),
        ({"score_scale": "mean"}, ValueError, "score_scale must be one of 'median', 'none', got 'mean'"),
        ({"score_weight": -0.5}, ValueError, "score_weight must be finite and >= 0, got -0.5"),
        ({"exponent": 3}, ValueError, "exponent must be one of 1, 2"),
        ({"score_term": "both"}, ValueError, "score_term must be one of"),
        ({"sigma": -1.0}, ValueError, "sigma"),
        ({"focus": -1.0}, ValueError, "focus"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"passes": 0}, ValueError, "passes must be at least 1"),
        ({"cache_limit": -1}, ValueError, "cache_limit"),
        ({"hidden_size": 1.5}, TypeError, "hidden_size must be an integer"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        _model(**arguments)


def test_an_images_score_has_a_threshold_of_its_own(mvtec_root, tmp_path):
    model, data = _model(quantile=0.5), _data(mvtec_root)
    runner = _fit(model, tmp_path, data)
    patched, held_out = model.eval().model, []
    for batch in data.val_dataloader():  # the held-out images
        images = model.pre_processor(batch.image)
        with torch.no_grad():
            features = patched.embed(images)
            maps, image = patched.map_of(patched.patches(features), images.shape[-2:]), patched.image_score
            top = maps.flatten(1).sort(dim=1, descending=True).values[:, : round(maps[0].numel() * 0.01)].mean(dim=1)
            rest = (pooled(features, 4) - image.mean) / image.scale
            rest = rest - rest @ image.components @ image.components.T
            held_out.append(top / image.position_unit + 0.5 * rest.norm(dim=1) / image.image_unit)
    scores = torch.cat(held_out).sort().values
    expected = scores[min(math.ceil((len(scores) + 1) * 0.5), len(scores)) - 1]
    torch.testing.assert_close(model.post_processor.image_threshold, expected, rtol=1e-4, atol=1e-5)
    assert model.post_processor.pixel_threshold != model.post_processor.image_threshold
    assert any(bool(batch.pred_label.any()) for batch in runner.predict(model, datamodule=data))


def test_a_fit_after_an_older_file_scores_by_both_terms(mvtec_root, tmp_path):
    model = _model()
    state = model.model.state_dict()
    model.model.load_state_dict({name: value for name, value in state.items() if "image_score" not in name})
    assert model.model.image_score.is_maximum
    _fit(model, tmp_path, _data(mvtec_root))
    assert not model.model.image_score.is_maximum
    found = model.eval().model(torch.rand(2, 3, 64, 96))
    assert not torch.equal(found.pred_score, found.anomaly_map.amax(dim=(1, 2, 3)))
