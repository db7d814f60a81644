"""anomalib's models as the benchmarks train them."""

from __future__ import annotations

import logging
import os
import random
import tempfile

import numpy as np
import pytest
import timm
import torch
from torchvision.transforms.v2 import Compose, Normalize, Resize

from benchmarks.interfaces import Budget, Split
from benchmarks.methods.engine import EngineDetector
from benchmarks.methods.models import MODELS

RANDOM = Budget(max_epochs=1, pretrained=False)
#: What keeps a fit to a second.
FAST = {
    "Toll": {"beta": 0.3},
    "PaDiM": {"n_features": 8},
    "PatchCore": {},
    "Subspace": {},
    "DFKDE": {"n_pca_components": 2},
    "GANomaly": {"n_features": 4, "latent_vec_size": 8},
    "CollapsedGanomaly": {"n_features": 4, "latent_vec_size": 8, "collapse_score_weight": 0.5},
}
NEEDS_BACKBONE = [name for name, model in MODELS.items() if model.backbone]


def _split(channels=1, side=16, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, channels, side, side), generator=generator)
    images[:24] //= 4
    images = images.to(torch.uint8) if dtype == torch.uint8 else images / 255
    return Split(images[:16], images[16:22], images[22:], np.arange(10) > 1)


def _fitted(name, seed=0, split=None):
    detector = EngineDetector(name, RANDOM, seed, **FAST[name])
    detector.fit(split or _split())
    return detector


@pytest.fixture(scope="module")
def fitted():
    return {name: _fitted(name) for name in FAST}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    network = timm.create_model("resnet18", features_only=True, out_indices=[1, 2, 3])
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", FAST)
def test_scores_are_raw_and_of_each_sample_alone(fitted, name):
    test = _split().test
    found = fitted[name].score(test)
    assert found.scores.shape == (10,)
    assert found.scores.dtype == np.float64
    assert len(np.unique(found.scores)) == 10
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(fitted[name].score(test[order]).scores, found.scores[order], rtol=1e-4)
    np.testing.assert_allclose(fitted[name].score(test[3:4]).scores, found.scores[3:4], rtol=1e-4)
    assert found.maps is None or found.maps.shape == (10, *fitted[name].facts()["image_size"])
    assert (found.maps is None) == (name in {"DFKDE", "GANomaly", "CollapsedGanomaly"})


@pytest.mark.parametrize("name", FAST)
def test_the_same_seed_gives_the_same_scores(fitted, name):
    test = _split().test
    first = fitted[name].score(test).scores
    np.testing.assert_allclose(_fitted(name).score(test).scores, first, rtol=1e-5)
    if name != "PatchCore":  # so few patches that any start keeps much the same
        assert not np.allclose(_fitted(name, seed=1).score(test).scores, first, rtol=1e-5)


def test_tolls_terms_make_its_score(fitted):
    found = fitted["Toll"].score(_split().test)
    np.testing.assert_allclose(found.terms["reconstruction"] + 0.3 * found.terms["latent"], found.scores, rtol=1e-5)
    # The map is the residual's norm over the channels, so its norm is the reconstruction term.
    np.testing.assert_allclose(np.linalg.norm(found.maps, axis=(1, 2)), found.terms["reconstruction"], rtol=1e-5)
    assert fitted["Toll"].facts() == {
        "epochs": 1,
        "parameters": sum(p.numel() for p in fitted["Toll"].model.parameters()),
        "image_size": [16, 16],
        "backbone": None,
        "pretrained": None,
    }


def test_bytes_and_floats_are_the_same_images(fitted):
    scores = [fitted["Toll"].score(_split(dtype=dtype).test).scores for dtype in (torch.uint8, torch.float32)]
    np.testing.assert_allclose(*scores, rtol=1e-6)


def test_ganomaly_by_a_loop(fitted):
    test, detector = _split().test, fitted["GANomaly"]
    see = Compose([Resize((32, 32), antialias=True), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    expected = []
    with torch.no_grad():
        for image in test:
            _, first, second = detector.model.model.generator(see(image.float().expand(3, -1, -1) / 255)[None])
            expected.append(float((first - second).square().mean()))
    np.testing.assert_allclose(detector.score(test).scores, expected, rtol=1e-4)


def test_the_term_of_a_collapsed_model_by_a_loop(fitted):
    test, detector = _split().test, fitted["CollapsedGanomaly"]
    found = detector.score(test)
    see = Compose([Resize((32, 32), antialias=True), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    norms = []
    with torch.no_grad():
        for image in test:
            latent = detector.model.model.generator.encoder1(see(image.float().expand(3, -1, -1) / 255)[None])
            norms.append(float(latent.norm()))
    np.testing.assert_allclose(found.terms["latent"], norms, rtol=1e-4)
    np.testing.assert_allclose(found.terms["host"] + 0.5 * found.terms["latent"], found.scores, rtol=1e-6)


def test_draem_has_textures_while_it_trains(tmp_path):
    detector = EngineDetector("CollapsedDraem", RANDOM, 0)
    detector._build(_split().train, str(tmp_path))
    assert len(list(tmp_path.glob("*.png"))) == 8


def test_images_are_resized_as_in_training():
    split = _split(channels=3, side=160)
    detector = EngineDetector("PaDiM", RANDOM, 0, n_features=8, image_size=64)
    seen = []
    detector.fit(split)
    detector.model.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    detector.score(split.test)
    expected = Resize((64, 64), antialias=True)(split.test.float() / 255)
    expected = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(expected)
    torch.testing.assert_close(torch.cat(seen), expected)


def test_backbones_see_images_as_they_were_pretrained(tmp_path):
    images = torch.rand(2, 3, 64, 64)
    for name, layers, mean, deviation in (
        ("tf_efficientnet_lite0", ["blocks.1", "blocks.2"], 0.5, 0.5),
        ("resnet18", ["layer1"], torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])),
    ):
        detector = EngineDetector("PatchCore", RANDOM, 0, backbone=name, layers=layers, image_size=64)
        seen = detector._build(_split().train, str(tmp_path)).pre_processor.transform(images)
        expected = (images.movedim(1, 3) - mean) / deviation
        torch.testing.assert_close(seen, expected.movedim(3, 1))


def test_dfkde_is_anomalibs_density_until_that_underflows(fitted):
    detector, test = fitted["DFKDE"], _split().test
    seen = detector.model.pre_processor.transform(_split().train[:4].float().expand(-1, 3, -1, -1) / 255)
    features = detector.model.model.get_features(seen)
    features = torch.cat([features, features + torch.linspace(1, 2, 4)[:, None]])
    detector.model.model.get_features = lambda _: features.clone()
    found = detector.score(test[:8]).scores
    with torch.no_grad():
        density = detector.model.model.classifier.compute_kde_scores(features.clone(), as_log_likelihood=True).numpy()
    del detector.model.model.get_features
    near = np.isfinite(density)
    assert near.tolist() == [True] * 4 + [False] * 4
    np.testing.assert_allclose(found[near] - found[near][0], density[near][0] - density[near], rtol=1e-3, atol=1e-3)
    assert len(np.unique(found[~near])) == (~near).sum()


@pytest.mark.parametrize(
    ("shape", "size"),
    [((8, 8), 64), ((28, 28), 64), ((64, 64), 64), ((100, 90), 96), ((128, 128), 128), ((900, 700), 256)],
)
def test_sizes_that_backbones_see(shape, size):
    assert MODELS["PaDiM"].size(*shape) == (size, size)
    assert MODELS["Toll"].size(*shape) == shape
    assert MODELS["GANomaly"].size(*shape) == (32, 32)


def test_patchcores_bank_has_a_bound(fitted):
    from benchmarks.methods.models import PATCHES, Task

    # 64x64 pixels are 8x8 patches: 16 images have 1024.
    assert len(fitted["PatchCore"].model.model.memory_bank) == 102
    large = MODELS["PatchCore"].arguments(Task((64, 64), 6000, 1, "resnet18", None, False, seed=0, folder=""))
    assert large["coreset_sampling_ratio"] == PATCHES / 384000
    detector = EngineDetector("PatchCore", RANDOM, 0, coreset_sampling_ratio=0.05)
    detector.fit(_split())
    assert len(detector.model.model.memory_bank) == 51
    # What the bank, of 384 numbers in 4 bytes, adds to the size.
    assert fitted["PatchCore"].size() - detector.size() == 51 * 384 * 4


def _refuse(*_, **__):
    msg = "a download"
    raise OSError(msg)


def _with_weights(detector, folder):
    """A model as its fit begins: PatchToll's backbone has its weights only then."""
    model = detector._build(_split().train, str(folder))
    model.on_fit_start()
    return model


@pytest.mark.parametrize("name", NEEDS_BACKBONE)
def test_random_weights_only_where_asked_for(name, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: (_refuse if k.get("pretrained") else create)(*a, **k))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _refuse)
    detector = EngineDetector(name, RANDOM, 0)
    detector.model = _with_weights(detector, tmp_path)
    assert detector.facts()["pretrained"] == "random"
    assert detector.facts()["backbone"] == "resnet18"
    with pytest.raises(OSError, match="a download"):
        _with_weights(EngineDetector(name, Budget(), 0), tmp_path)


@pytest.mark.parametrize("name", NEEDS_BACKBONE)
def test_local_weights(name, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", _refuse)
    detector = EngineDetector(name, Budget(weights=weights), 0)
    detector.model = _with_weights(detector, tmp_path)
    assert detector.facts()["pretrained"] == "imagenet, local file"
    given, held = torch.load(weights), [module.state_dict() for module in detector.model.modules()]
    backbones = [state for state in held if "conv1.weight" in state and set(state) <= set(given)]
    assert any(all(torch.equal(value, given[key]) for key, value in state.items()) for state in backbones)


def test_weights_that_are_not_there(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        EngineDetector("PaDiM", Budget(weights=tmp_path / "nowhere.pth"), 0)
    detector = EngineDetector("DFKDE", Budget(weights=weights), 0, layers=["layer4"])
    with pytest.raises(ValueError, match=r"must have all weights that DFKDE needs, but does not have 'layer4"):
        detector.fit(_split())
    # A model without a backbone does not ask for them.
    EngineDetector("GANomaly", Budget(weights=tmp_path / "nowhere.pth"), 0)


def _surroundings():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.get_rng_state().tolist(),
        dict(os.environ),
        logging.root.manager.disable,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(tmp_path, monkeypatch, capfd, fails):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    detector = EngineDetector("GANomaly", RANDOM, 3, **FAST["GANomaly"])
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    before = _surroundings()
    if fails:
        monkeypatch.setattr(detector._kind, "training_step", _refuse)
        with pytest.raises(OSError, match="a download"):
            detector.fit(_split())
    else:
        detector.fit(_split())
        detector.score(_split().test)
    assert _surroundings() == before
    assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]
    assert capfd.readouterr() == ("", "")


def test_epochs():
    split = _split()
    for name, epochs in (("FRE", 2), ("PaDiM", 1)):  # PaDiM takes one pass, whatever it is granted
        detector = EngineDetector(name, Budget(max_epochs=2, pretrained=False), 0)
        detector.fit(split)
        assert detector.facts()["epochs"] == epochs


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"name must be one of Toll, PatchToll, PatchCore, .*, got 'Patchcore'"):
        EngineDetector("Patchcore", RANDOM, 0)
    with pytest.raises(TypeError, match=r"arguments of PaDiM must be among backbone, .*, got depth"):
        EngineDetector("PaDiM", RANDOM, 0, depth=3)
    with pytest.raises(ValueError, match="no version with pretrained=False"):
        EngineDetector("EfficientAd", RANDOM, 0)
