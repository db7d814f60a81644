"""Toll in anomalib: the contract, and what is its own."""

from __future__ import annotations

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import yaml
from anomalib import callbacks
from anomalib.data import Folder, ImageBatch
from anomalib.models import get_model
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from contracts import AnomalibCommandContract, AnomalibModelContract, checkpoint_of, engine, keep_onnx, run_cli
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torchvision.transforms.v2 import Resize

from toll_plugin.anomalib import DigitsOneVsRest, Toll, TollPostProcessor, TollPreProcessor
from toll_plugin.core import DivergenceError, TollWarning

VALIDATION_LOGS = frozenset({"val_loss", "val_reconstruction", "val_latent"})


#: The form with a weight that is a number, a constant rate, and a choice of the weights by the held-out loss.
PLAIN = {
    "beta": 0.01,
    "latent_dim": 32,
    "scaling": "unit",
    "lr": 1e-3,
    "max_steps": None,
    "restore_best_weights": True,
    "patience": 20,
}


class StopAfter(Callback):
    """Ends a fit after some epochs, as whoever interrupts it does."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        del pl_module
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class TestContract(AnomalibModelContract, AnomalibCommandContract):
    name = "Toll"
    validation_logs = VALIDATION_LOGS
    arguments = {"image_size": (24, 32), "latent_dim": 8}  # noqa: RUF012

    def interrupted(self):
        # The rate falls along the steps that the trainer allows, so a fit with other limits is another fit.
        return {"max_epochs": 4, "callbacks": [StopAfter(2)]}


class TestContractPaperNetwork(AnomalibModelContract):
    """The authors' network and scaling for grey images, with a score whose terms are in units of their own."""

    name = "Toll"
    validation_logs = VALIDATION_LOGS
    arguments = {  # noqa: RUF012
        "image_size": (28, 28),
        "in_channels": 1,
        "network": "paper28",
        "latent_dim": 8,
        "beta": "auto",
        "strength": 0.5,
        "score_scale": "median",
        "score_weight": 0.3,
        "scaling": "paper_mnist",
        "max_steps": None,
    }


def _digits(**arguments):
    return DigitsOneVsRest(**{"normal_class": 8, "eval_batch_size": 2000} | arguments)


def _own(**arguments):
    """Toll at its defaults, on the digits."""
    return Toll(**{"image_size": 8, "in_channels": 1, "seed": 0, "visualizer": False} | arguments)


def _toll(**arguments):
    if arguments.get("pre_processor", True) is not True:
        arguments = {"scaling": "standard"} | arguments
    return _own(**PLAIN | arguments)


def _fit(model, root, data=None, **arguments):
    runner = engine(root, **{"max_epochs": 2} | arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TollWarning)
        runner.fit(model, datamodule=data or _digits())
    return runner


class Worse(Callback):
    """Spoils some epochs by a high learning rate, so that their weights are not the best."""

    def __init__(self, *epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] = 1.0 if trainer.current_epoch in self.epochs else pl_module.lr


def _equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def _best_is_not_last(path):
    content, name = torch.load(path, weights_only=True), "model.network.encoder.0.weight"
    return not torch.equal(content["state_dict"][name], content["toll_training_state_dict"][name])


# --- scores and maps


def test_score_and_map_by_hand():
    class Zero(nn.Module):
        def forward(self, z):
            return torch.zeros(len(z), 3, 8, 8)

    model = Toll(image_size=8, encoder=nn.Flatten(), decoder=Zero(), beta=2.0, post_processor=False).eval()
    images = torch.rand(4, 3, 8, 8)
    batch = model(images)
    norm = images.flatten(1).pow(2).sum(1).sqrt()
    # The decoder gives zeros and the latent is the image: both terms are its norm.
    torch.testing.assert_close(batch.pred_score, 3 * norm)
    torch.testing.assert_close(batch.anomaly_map, images.pow(2).sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(batch.anomaly_map.flatten(1).norm(dim=1), norm)


@pytest.mark.parametrize(("term", "factor"), [("total", 3.0), ("reconstruction", 1.0), ("latent", 1.0)])
def test_score_terms(term, factor):
    class Zero(nn.Module):
        def forward(self, z):
            return torch.zeros(len(z), 3, 8, 8)

    model = Toll(
        image_size=8, encoder=nn.Flatten(), decoder=Zero(), beta=2.0, score_term=term, post_processor=False
    ).eval()
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(model(images).pred_score, factor * images.flatten(1).norm(dim=1))


def test_grey_network_averages_the_channels():
    model = Toll(image_size=16, in_channels=1, post_processor=False).eval()
    images = torch.rand(2, 3, 16, 16)
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(model(images).pred_score, model(grey).pred_score)


# --- pre-processing


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 64), (256, 256), (48, 80)])
@pytest.mark.parametrize("source", [(100, 90), (20, 300), (48, 80)])
def test_exported_resize_is_the_engines(size, source):
    pre_processor = TollPreProcessor(size, "imagenet")
    images = torch.rand(2, 3, *source)
    torch.testing.assert_close(pre_processor(images), pre_processor.transform(images), rtol=1e-4, atol=1e-5)


def test_masks_are_resized_and_not_scaled():
    from torchvision.tv_tensors import Image, Mask

    pre_processor = TollPreProcessor(16, "paper_mnist")
    mask = Mask(torch.ones(1, 40, 40, dtype=torch.bool))
    image, resized = pre_processor.transform(Image(torch.ones(1, 3, 40, 40)), mask)
    assert resized.shape[-2:] == (16, 16)
    assert resized.all()
    torch.testing.assert_close(image.as_subclass(torch.Tensor), torch.full((1, 3, 16, 16), (1 - 0.1307) / 0.3081))


def test_pre_processor_survives_its_configuration():
    original = TollPreProcessor((20, 30), "paper_cifar", (-2.0, 3.0))
    restored = TollPreProcessor()
    restored.load_checkpoint_config(original.checkpoint_config())
    images = torch.rand(2, 3, 50, 50)
    torch.testing.assert_close(restored(images), original(images))
    torch.testing.assert_close(restored.transform(images), original.transform(images))


@pytest.mark.parametrize("size", [(28, 28), (256, 256), (48, 80)])
def test_torch_onnx_and_openvino_agree(size, tmp_path, monkeypatch):
    import onnxruntime
    import openvino

    model = Toll(image_size=size, in_channels=1 if size[0] == 28 else 3, beta=1.0, seed=0).eval()
    levels = {"_image_threshold": 40.0, "image_min": 1.0, "image_max": 60.0}
    levels |= {"_pixel_threshold": 0.8, "pixel_min": 0.0, "pixel_max": 2.0}
    for name, value in levels.items():
        getattr(model.post_processor, name).fill_(value)
    images = torch.rand(3, 3, 100, 90)
    with torch.no_grad():
        # As the engine does it: torchvision's resize, the model, the post-processor.
        expected = model.post_processor(model.model(model.pre_processor.transform(images)))
        outputs = {"torch": model(images)._asdict()}
    onnx_files = keep_onnx(monkeypatch, Toll, tmp_path)
    openvino_file = model.to_openvino(tmp_path)
    session = onnxruntime.InferenceSession(str(onnx_files[0]))
    names = [output.name for output in session.get_outputs()]
    outputs["onnx"] = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    compiled = openvino.compile_model(str(openvino_file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs["openvino"] = compiled(images.numpy())
    for kind, output in outputs.items():
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(output[name], getattr(expected, name), rtol=1e-4, err_msg=f"{kind} {name}")
        assert (np.asarray(output["pred_label"]) == expected.pred_label.numpy()).all(), kind


# --- post-processing


def _validated(scores, maps, labels=None, masks=None):
    post_processor = TollPostProcessor()
    n = len(scores)
    post_processor.on_validation_batch_end(
        None,
        None,
        ImageBatch(image=torch.zeros(n, 3, 2, 2), pred_score=scores, anomaly_map=maps, gt_label=labels, gt_mask=masks),
    )
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def test_thresholds_are_on_the_scores_own_scale():
    scores = torch.tensor([60.0, 62.0, 65.0])
    maps = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(-1, 1, 2, 2)
    normals = _validated(scores, maps, torch.zeros(3, dtype=torch.int64))
    assert normals.image_threshold == 65
    assert normals.pixel_threshold == 3
    mixed = _validated(scores, maps, torch.tensor([0, 0, 1]))
    assert mixed.image_threshold == 63.5  # halfway between the anomaly and the normal image below it
    assert mixed.pixel_threshold == 2  # normal images only
    unlabelled = _validated(scores, maps)
    assert unlabelled.image_threshold == 65
    assert unlabelled.pixel_threshold == 3
    # The largest of three is not exceeded by 1 - 0.05 ** (1 / 3) of all, nineteen times in twenty.
    promise = {"held_out": 3, "confidence": 0.95, "false_alarms": pytest.approx(0.6315969)}
    assert normals.promise == unlabelled.promise == promise
    assert mixed.promise == {}
    blind = _validated(scores, maps, torch.ones(3, dtype=torch.int64))
    assert blind.pixel_threshold.isnan()  # and not -inf, which would make every map NaN
    assert blind._normalize(maps, blind.pixel_min, blind.pixel_max, blind.pixel_threshold).isfinite().all()


def test_every_anomaly_is_flagged_where_the_scores_separate():
    scores, labels = torch.tensor([1.0, 2.0, 5.0, 6.0]), torch.tensor([0, 0, 1, 1])
    post_processor = _validated(scores, torch.rand(4, 1, 2, 2), labels)
    batch = ImageBatch(image=torch.zeros(4, 3, 2, 2), pred_score=scores, anomaly_map=torch.rand(4, 1, 2, 2))
    post_processor.post_process_batch(batch)
    assert batch.pred_label.tolist() == [False, False, True, True]


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_normalisation_keeps_the_ranking_and_the_hosts_meaning(far):
    post_processor = _validated(
        torch.tensor([60.0, 62.0, 65.0]), torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    )
    scores = torch.cat([torch.linspace(0, 200, 500), torch.linspace(201, far, 100)])
    normalised = post_processor._normalize(
        scores, post_processor.image_min, post_processor.image_max, torch.tensor(65.0)
    )
    assert (normalised.diff() > 0).all()
    assert normalised.min() > 0
    assert normalised.max() < 1
    assert ((normalised > 0.5) == (scores > 65)).all()


def test_one_constant_validation_score_does_not_divide_by_zero():
    post_processor = _validated(torch.tensor([5.0]), torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
    normalised = post_processor._normalize(torch.tensor([4.0, 5.0, 6.0]), *[torch.tensor(5.0)] * 3)
    assert normalised.isfinite().all()
    assert normalised[1] == 0.5


# --- training


def test_logged_terms_add_up(tmp_path):
    model = _toll(beta=0.5)
    logged = _fit(model, tmp_path).trainer.callback_metrics
    for split in ("train", "val"):
        total = logged[f"{split}_reconstruction"] + 0.5 * logged[f"{split}_latent"]
        assert float(logged[f"{split}_loss"]) == pytest.approx(float(total), rel=1e-5)


def test_val_loss_is_that_of_the_normal_images(tmp_path):
    model, data = _toll(beta=0.5, restore_best_weights=False), _digits(val_anomalies=True)
    logged = _fit(model, tmp_path, data).trainer.callback_metrics
    normals = [item.image for item in data.val_data if not item.gt_label]
    x = torch.stack(normals).as_subclass(torch.Tensor)[:, :1]
    model.eval()
    with torch.no_grad():
        reconstruction, latent = model.model.network(x)
    expected = ((x - reconstruction).flatten(1).norm(dim=1) + 0.5 * latent.norm(dim=1)).mean()
    assert float(logged["val_loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        ({"beta": 0.5}, lambda *_: 0.5),
        (
            {"beta": "auto", "strength": 0.5},
            lambda residual, norm: 0.5 * residual.item() / norm.item(),
        ),
    ],
    ids=["number", "auto"],
)
def test_training_equals_a_plain_torch_loop(tmp_path, arguments, weight):
    model, twin, data = _toll(**arguments, lr=0.01), _toll(**arguments, lr=0.01).model.network, _digits()
    _fit(model, tmp_path, data, max_epochs=1)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    twin.train()
    for batch in data.train_dataloader():
        x = batch.image.as_subclass(torch.Tensor)[:, :1]
        x_hat, z = twin(x)
        residual, norm = (x - x_hat).flatten(1).norm(dim=1).mean(), z.norm(dim=1).mean()
        optimizer.zero_grad()
        (residual + weight(residual, norm) * norm).backward()
        optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.model.network.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_weights_of_the_lowest_val_loss_are_used_everywhere(tmp_path):
    model, data = _toll(), _digits()
    losses = []
    model.on_validation_end = lambda: losses.append(float(model.trainer.callback_metrics["val_loss"]))
    runner = _fit(model, tmp_path, data, max_epochs=4, callbacks=[Worse(3)])
    assert losses[-1] > min(losses)
    assert runner.validate(datamodule=data, verbose=False)[0]["val_loss"] == pytest.approx(min(losses), rel=1e-5)
    shown = runner.test(model, datamodule=data, verbose=False)[0]
    path = checkpoint_of(tmp_path, "Toll", "DigitsOneVsRest", "8")
    again = engine(tmp_path / "again").test(_toll(), datamodule=_digits(), ckpt_path=path, verbose=False)[0]
    assert again == pytest.approx(shown, abs=1e-6)


@pytest.mark.parametrize("worse", [(2,), (2, 3, 4)])
def test_resume_continues_from_the_last_weights_and_remembers_the_best(tmp_path, worse):
    straight, first, resumed = _toll(), _toll(), _toll(seed=9)
    _fit(straight, tmp_path / "a", max_epochs=5, callbacks=[Worse(*worse)])
    _fit(first, tmp_path / "b", max_epochs=3, callbacks=[Worse(*worse)])
    path = checkpoint_of(tmp_path / "b", "Toll", "DigitsOneVsRest", "8")
    assert _best_is_not_last(path)
    runner = engine(tmp_path / "c", max_epochs=5, callbacks=[Worse(*worse)])
    runner.fit(resumed, datamodule=_digits(), ckpt_path=path)
    _equal(resumed.state_dict(), straight.state_dict())


def test_saving_after_the_fit_still_resumes_from_the_last_weights(tmp_path):
    straight, first, resumed = _toll(), _toll(), _toll(seed=9)
    _fit(straight, tmp_path / "a", max_epochs=5, callbacks=[Worse(2)])
    runner = _fit(first, tmp_path / "b", max_epochs=3, callbacks=[Worse(2)])
    runner.trainer.save_checkpoint(tmp_path / "late.ckpt")
    assert _best_is_not_last(tmp_path / "late.ckpt")
    runner = engine(tmp_path / "c", max_epochs=5, callbacks=[Worse(2)])
    runner.fit(resumed, datamodule=_digits(), ckpt_path=tmp_path / "late.ckpt")
    _equal(resumed.state_dict(), straight.state_dict())


def test_a_weights_only_checkpoint_holds_the_best_weights_too(tmp_path):
    model, data = _toll(), _digits()
    # anomalib's class: beside Lightning's own, its engine adds a second one.
    saver = callbacks.ModelCheckpoint(tmp_path / "w", filename="w", save_weights_only=True)
    _fit(model, tmp_path, data, max_epochs=4, callbacks=[saver, Worse(3)])
    loaded = Toll.load_from_checkpoint(tmp_path / "w/w.ckpt")
    _equal(loaded.state_dict(), model.state_dict())
    assert _best_is_not_last(tmp_path / "w/w.ckpt")


def test_weights_that_are_kept_do_not_lie_on_the_device(tmp_path, monkeypatch):
    """The CPU stands in for a device: what is kept during and after a fit is a copy made on the CPU."""
    copies = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: copies.append((a[1:], k)) or to(*a, **k))
    model = _toll()
    runner = _fit(model, tmp_path)
    kept = model._best_weights
    assert copies.count((("cpu",), {"copy": True})) >= 2 * len(model.state_dict())  # the best, and the last
    assert kept._best is None  # the model holds it
    before = {name: value.clone() for name, value in kept._last.items()}
    with torch.no_grad():
        model.model.network.encoder[0].weight.zero_()
    assert torch.equal(kept._last["model.network.encoder.0.weight"], before["model.network.encoder.0.weight"])
    runner.trainer.save_checkpoint(tmp_path / "late.ckpt")
    stored = torch.load(tmp_path / "late.ckpt", weights_only=True)["toll_training_state_dict"]
    _equal(stored, before)


def test_a_users_own_model_checkpoint_holds_what_it_says(tmp_path):
    model, seen = _toll(), {}
    model.on_train_epoch_end = lambda: (
        Toll.on_train_epoch_end(model),
        seen.update({model.current_epoch: model.model.network.encoder[0].weight.detach().clone()}),
    )
    saver = ModelCheckpoint(tmp_path / "m", monitor="train_loss", filename="{epoch}", save_top_k=-1)
    _fit(model, tmp_path, max_epochs=4, callbacks=[saver, Worse(2)])
    assert len(seen) == 4
    for epoch, weight in seen.items():
        stored = torch.load(tmp_path / f"m/epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(stored["model.network.encoder.0.weight"], weight), epoch


def test_edits_after_the_fit_are_saved(tmp_path):
    model = _toll()
    runner = _fit(model, tmp_path)
    with torch.no_grad():
        model.model.network.encoder[0].weight.zero_()
    runner.trainer.save_checkpoint(tmp_path / "edited.ckpt")
    assert not Toll.load_from_checkpoint(tmp_path / "edited.ckpt").model.network.encoder[0].weight.any()


def test_resuming_without_the_choice_uses_the_last_weights(tmp_path):
    straight = _toll(restore_best_weights=False)
    _fit(straight, tmp_path / "a", max_epochs=4, callbacks=[Worse(2)])
    _fit(_toll(), tmp_path / "b", max_epochs=3, callbacks=[Worse(2)])
    resumed = _toll(seed=9, restore_best_weights=False)
    path = checkpoint_of(tmp_path / "b", "Toll", "DigitsOneVsRest", "8")
    assert _best_is_not_last(path)
    runner = engine(tmp_path / "c", max_epochs=4, callbacks=[Worse(2)])
    runner.fit(resumed, datamodule=_digits(), ckpt_path=path)
    _equal(resumed.model.state_dict(), straight.model.state_dict())


def test_the_components_of_the_checkpoint_are_restored_whatever_their_class(tmp_path):
    parts = {
        "pre_processor": PreProcessor(Resize((16, 16), antialias=True)),
        "post_processor": PostProcessor(image_sensitivity=0.3),
    }
    model = Toll(in_channels=1, seed=0, visualizer=False, **parts)
    assert model.hparams["image_size"] == (16, 16)
    _fit(model, tmp_path)
    loaded = Toll.load_from_checkpoint(checkpoint_of(tmp_path, "Toll", "DigitsOneVsRest", "8")).eval()
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(loaded(images).pred_score, model.eval()(images).pred_score)
    assert type(loaded.post_processor) is PostProcessor
    assert loaded.post_processor.image_sensitivity == 0.3

    class Mine(PostProcessor):
        pass

    model = _toll(post_processor=Mine())
    _fit(model, tmp_path / "mine")
    path = checkpoint_of(tmp_path / "mine", "Toll", "DigitsOneVsRest", "8")
    with pytest.raises(ValueError, match="trained with post_processor of class Mine: pass one"):
        Toll.load_from_checkpoint(path)
    assert type(Toll.load_from_checkpoint(path, post_processor=Mine()).post_processor) is Mine


def test_overrides_of_a_checkpoints_hyperparameters_count(tmp_path):
    path = tmp_path / "model.ckpt"
    _fit(_toll(), tmp_path).trainer.save_checkpoint(path)
    loaded = Toll.load_from_checkpoint(path, scaling="imagenet")
    assert loaded.pre_processor.scaling == "imagenet"
    given = Toll(in_channels=1, pre_processor=TollPreProcessor(8, "paper_mnist"), visualizer=False)
    assert given.hparams["image_size"] == (8, 8)
    _fit(given, tmp_path / "given").trainer.save_checkpoint(path)
    assert Toll.load_from_checkpoint(path).pre_processor.scaling == "paper_mnist"


def test_numpy_numbers_are_plain_data_in_the_checkpoint(tmp_path):
    numbers = {"beta": np.float64(0.1), "lr": np.float32(1e-3), "latent_dim": np.int64(8), "seed": np.int64(1)}
    path = tmp_path / "model.ckpt"
    _fit(_toll(**numbers), tmp_path).trainer.save_checkpoint(path)
    assert Toll.load_from_checkpoint(path).hparams["beta"] == 0.1


def test_validation_loaders_may_come_as_a_list(tmp_path):
    data = _digits()
    data.setup()
    model = _toll()
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(model, train_dataloaders=data.train_dataloader(), val_dataloaders=[data.val_dataloader()])
    assert "val_loss" in runner.trainer.callback_metrics


@pytest.mark.parametrize("arguments", [{"post_processor": False}, {"pre_processor": False}])
def test_without_a_component(tmp_path, arguments):
    model = _toll(**arguments)
    result = _fit(model, tmp_path, max_epochs=20).test(model, datamodule=_digits(), verbose=False)[0]
    assert result["image_AUROC"] > 0.6
    assert model.to_onnx(tmp_path).is_file()


def test_one_engine_for_two_models(tmp_path):
    runner = engine(tmp_path, max_epochs=1)
    for patience in (1, 5):
        runner.fit(_toll(patience=patience), datamodule=_digits())
    (stopping,) = [c for c in runner.trainer.callbacks if isinstance(c, EarlyStopping)]
    assert stopping.patience == 5


def test_patience_stops_and_a_trainers_own_early_stopping_wins(tmp_path):
    runner = _fit(_toll(lr=0.5, patience=2), tmp_path / "a", max_epochs=200)
    assert runner.trainer.current_epoch < 199
    own = EarlyStopping("val_loss", patience=150)
    runner = _fit(_toll(lr=0.5, patience=2), tmp_path / "b", max_epochs=40, callbacks=[own])
    assert [c for c in runner.trainer.callbacks if isinstance(c, EarlyStopping)] == [own]
    assert runner.trainer.current_epoch == 40
    runner = _fit(_toll(lr=0.5, patience=None), tmp_path / "c", max_epochs=30)
    assert runner.trainer.current_epoch == 30


def test_model_checkpoint_on_val_loss_by_callbacks_alone(tmp_path):
    saver = ModelCheckpoint(tmp_path / "best", monitor="val_loss", filename="{epoch}")
    _fit(_toll(), tmp_path, max_epochs=3, callbacks=[saver])
    assert len(list((tmp_path / "best").glob("*.ckpt"))) == 1
    assert saver.best_model_score is not None


def test_callbacks_on_val_loss_by_config_alone(tmp_path):
    config = {
        "model": {"class_path": "Toll", "init_args": {"image_size": 8, "in_channels": 1, "visualizer": False}},
        "data": {"class_path": "DigitsOneVsRest", "init_args": {"normal_class": 8}},
        "trainer": {
            "max_epochs": 3,
            "callbacks": [
                {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "patience": 1}},
                {
                    # Lightning exports a class of the same name, so the short one is ambiguous.
                    "class_path": "anomalib.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val_loss", "dirpath": str(tmp_path / "best"), "filename": "best"},
                },
            ],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    engine_of_cli = run_cli("train", "--config", str(path)).engine
    assert (tmp_path / "best/best.ckpt").is_file()
    (stopping,) = [c for c in engine_of_cli.trainer.callbacks if isinstance(c, EarlyStopping)]
    assert stopping.patience == 1
    assert math.isfinite(float(stopping.best_score))


def test_own_modules_by_config(tmp_path):
    config = {
        "model": {
            "class_path": "Toll",
            "init_args": {
                "image_size": 16,
                "encoder": {"class_path": "torch.nn.Flatten"},
                "decoder": {
                    "class_path": "torch.nn.Unflatten",
                    "init_args": {"dim": 1, "unflattened_size": [3, 16, 16]},
                },
            },
        },
        "data": {"class_path": "DigitsOneVsRest"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    model = run_cli("train", "--config", str(path), run=False).model
    assert isinstance(model.model.network.encoder, nn.Flatten)
    assert isinstance(model.model.network.decoder, nn.Unflatten)


def test_seed_fixes_the_weights_and_leaves_the_global_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = _toll(seed=3), _toll(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(_toll(seed=4).model.parameters()), next(first.model.parameters()))


def test_max_epochs_argument_rules_where_there_is_no_trainer_section(tmp_path):
    runner = engine(tmp_path)
    runner.fit(_toll(max_epochs=1), datamodule=_digits())
    assert runner.trainer.current_epoch == 1
    assert "max_epochs" not in _toll().trainer_arguments


def test_without_a_validation_split_the_last_weights_stay(tmp_path):
    runner = _fit(_toll(), tmp_path, _digits(val_ratio=0), max_epochs=20)
    assert "val_loss" not in runner.trainer.callback_metrics
    result = runner.test(datamodule=_digits(val_ratio=0), verbose=False)[0]
    # Raw scores lie above 1; anomalib's metric would tie them all and read 0.5.
    assert result["image_AUROC"] > 0.6


def test_a_last_batch_of_one_image_trains(tmp_path):
    class OneByOne(nn.Sequential):
        """A channel holds one value per image, which BatchNorm refuses from one image."""

    encoder = OneByOne(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    decoder = nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 1, 8))
    data = _digits()
    data.setup()
    data.train_batch_size = len(data.train_data) - 1
    _fit(_toll(encoder=encoder, decoder=decoder), tmp_path, data, max_epochs=1)


# --- the defaults: a budget of steps along which the rate falls to zero, and standardised pixels


class Rates(Callback):
    """Learning rate of each step."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        del pl_module, batch, batch_idx
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(("max_steps", "max_epochs", "steps"), [(7, 50, 7), (600, 2, 6), (3, 1, 3), (1, 1, 1)])
def test_the_rate_falls_along_the_steps_and_the_fit_ends_with_them(tmp_path, max_steps, max_epochs, steps):
    data, rates = _digits(train_batch_size=40), Rates()
    model = _own(max_steps=max_steps, lr=0.01)
    runner = _fit(model, tmp_path, data, max_epochs=max_epochs, callbacks=[rates])
    assert runner.trainer.global_step == steps
    shares = [step / steps for step in range(steps)]
    expected = [0.01 * min(1, 10 * (share + 1 / steps)) * math.cos(math.pi * share / 2) ** 2 for share in shares]
    assert rates.found == pytest.approx(expected)
    # The validation that follows the last step sets the threshold.
    images = torch.stack([item.image for item in data.val_data]).as_subclass(torch.Tensor)
    with torch.no_grad():
        found = model.eval().model(model.pre_processor(images)).pred_score
    assert float(found.max()) == pytest.approx(float(model.post_processor.image_threshold), rel=1e-5)


def test_a_trainer_without_limits_ends_with_the_steps(tmp_path):
    runner = _fit(_own(max_steps=5), tmp_path, max_epochs=-1)
    assert runner.trainer.global_step == 5


def test_pixels_are_standardised_by_the_training_images(tmp_path):
    data, model = _digits(), _own()
    data.setup()
    pixels = torch.stack([item.image for item in data.train_data]).as_subclass(torch.Tensor).double().numpy()
    assert model.pre_processor.is_open
    _fit(model, tmp_path, data, max_epochs=1)
    low, high = model.pre_processor.scaling_range
    assert (low, high - low) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-9)
    scaled = model.pre_processor(torch.from_numpy(pixels).float())
    torch.testing.assert_close(scaled.double().numpy(), (pixels - pixels.mean()) / pixels.std(), rtol=1e-4, atol=1e-5)
    loaded = Toll.load_from_checkpoint(checkpoint_of(tmp_path, "Toll", "DigitsOneVsRest", "8"))
    assert loaded.pre_processor.scaling_range == (low, high)
    _fit(loaded, tmp_path / "other", _digits(normal_class=1), max_epochs=1)
    assert loaded.pre_processor.scaling_range == (low, high)


@pytest.mark.parametrize(
    ("arguments", "loss", "weight", "scale"),
    [
        ({}, ("auto", 3.0), 1.0, "median"),
        ({"strength": 0.0}, ("auto", 0.0), 0.0, "median"),
        ({"beta": 0.0}, (0.0, 1.0), 0.0, "none"),
        ({"beta": 10}, (10.0, 1.0), 10.0, "none"),
        ({"beta": 10, "score_scale": "median"}, (10.0, 1.0), 1.0, "median"),
        ({"beta": 0, "score_scale": "median"}, (0.0, 1.0), 0.0, "median"),
        ({"score_weight": 0.25}, ("auto", 3.0), 0.25, "median"),
    ],
)
def test_what_follows_from_beta(arguments, loss, weight, scale):
    model = _own(**arguments)
    assert (model.model.loss.beta, model.model.loss.strength) == loss
    assert model.model.score.weight == weight
    assert model.score_scale == model.hparams["score_scale"] == scale


def test_a_strength_belongs_to_auto():
    with pytest.raises(ValueError, match="strength belongs to beta='auto', got 3"):
        _own(beta=1.0, strength=3.0)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        _own(max_steps=0)


# --- a weight that follows the reconstruction, and terms in units of their own


def _network_state(model):
    return {name: value.clone() for name, value in model.model.network.state_dict().items()}


def _terms(model, items):
    """Terms of images by an independent computation."""
    x = torch.stack([item.image for item in items]).as_subclass(torch.Tensor)[:, :1]
    model.eval()
    with torch.no_grad():
        made, latent = model.model.network(x)
    return (x - made).flatten(1).norm(dim=1), latent.norm(dim=1)


def _units(model):
    return [float(unit) for unit in model.model.score.units]


def test_auto_trains_and_its_held_out_loss_is_four_times_the_reconstruction(tmp_path):
    auto, plain = _toll(beta="auto"), _toll(beta=0.0)
    logged = _fit(auto, tmp_path / "a", max_epochs=4).trainer.callback_metrics
    _fit(plain, tmp_path / "b", max_epochs=4)
    assert float(logged["val_loss"]) == pytest.approx(4 * float(logged["val_reconstruction"]), rel=1e-5)
    assert float(logged["train_loss"]) == pytest.approx(4 * float(logged["train_reconstruction"]), rel=1e-5)
    one, other = _network_state(auto), _network_state(plain)
    assert not torch.equal(one["encoder.0.weight"], other["encoder.0.weight"])
    data = _digits()
    data.setup()
    terms = [_terms(model, data.val_data) for model in (auto, plain)]
    pressed, free = (float((latent / residual).mean()) for residual, latent in terms)
    assert pressed < free


@pytest.mark.parametrize("scale", ["none", "median"])
def test_strength_zero_is_beta_zero_to_the_last_bit(tmp_path, scale):
    found, data = [], _digits()
    data.setup()
    images = torch.stack([item.image for item in data.test_data][:50])
    for i, beta in enumerate(({"beta": "auto", "strength": 0.0}, {"beta": 0.0})):
        torch.manual_seed(0)
        model = _toll(**beta, score_weight=0.7, score_scale=scale)
        _fit(model, tmp_path / str(i))
        found.append((model.state_dict(), model.eval().model(images).pred_score))
    _equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("split", ["normal", "anomalies", "none"])
@pytest.mark.parametrize("exponent", [1, 2])
def test_units_are_the_medians_of_the_weights_that_are_kept(tmp_path, split, exponent):
    arguments = {"normal": {}, "anomalies": {"val_anomalies": True}, "none": {"val_ratio": 0}}[split]
    data, model = _digits(**arguments), _toll(score_scale="median", exponent=exponent)
    _fit(model, tmp_path, data, max_epochs=4, callbacks=[Worse(3)])
    items = [item for item in (data.train_data if split == "none" else data.val_data) if not item.gt_label]
    residual, latent = (np.median((term**exponent).double().numpy()) for term in _terms(model, items))
    assert _units(model) == pytest.approx([residual, latent], rel=1e-5)
    images = torch.stack([item.image for item in items][:20])
    terms = [term[:20] ** exponent for term in _terms(model, items)]
    found = model.model(images)
    torch.testing.assert_close(found.pred_score, terms[0] / residual + terms[1] / latent, rtol=1e-4, atol=1e-5)
    # The map is in the unit of its term.
    norm = found.anomaly_map.flatten(1).norm(dim=1) ** exponent
    torch.testing.assert_close(norm, terms[0] / residual, rtol=1e-4, atol=1e-5)


def test_thresholds_and_the_checkpoint_are_in_the_units_of_the_best_weights(tmp_path):
    model, data = _toll(beta="auto", score_scale="median"), _digits()
    runner = _fit(model, tmp_path, data, max_epochs=4, callbacks=[Worse(3)])
    scores = model.eval().model(torch.stack([item.image for item in data.val_data])).pred_score
    assert float(model.post_processor.image_threshold) == pytest.approx(float(scores.max()), rel=1e-5)
    shown = runner.test(model, datamodule=data, verbose=False)[0]
    path = checkpoint_of(tmp_path, "Toll", "DigitsOneVsRest", "8")
    loaded = Toll.load_from_checkpoint(path)
    assert _units(loaded) == _units(model) != [1.0, 1.0]
    again = engine(tmp_path / "again").test(
        _toll(beta="auto", score_scale="median"), datamodule=_digits(), ckpt_path=path, verbose=False
    )[0]
    assert again == pytest.approx(shown, abs=1e-6)


@pytest.mark.parametrize("val_ratio", [0.2, 0])
def test_units_change_nothing_of_the_training(tmp_path, val_ratio):
    found = []
    for scale in ("none", "median"):
        torch.manual_seed(0)
        model = _toll(score_scale=scale)
        _fit(model, tmp_path / scale, _digits(val_ratio=val_ratio), max_epochs=3)
        found.append(_network_state(model))
    _equal(*found)


def test_a_later_fit_without_units_forgets_them(tmp_path):
    model = _toll(score_scale="median")
    _fit(model, tmp_path)
    model.score_scale = "none"
    _fit(model, tmp_path)
    assert _units(model) == [1.0, 1.0]


@pytest.mark.parametrize("beta", ["auto", 0.01])
def test_constant_images_give_no_nan(tmp_path, beta):
    data, model = _digits(), _toll(beta=beta, score_scale="median")
    data.setup()
    for part in (data.train_data, data.val_data):
        part._images = torch.full_like(part._images, 0.5)
    data._is_setup = True
    _fit(model, tmp_path, data)
    found = model.eval().model(torch.rand(4, 3, 8, 8))
    assert bool(found.pred_score.isfinite().all())
    assert bool(found.anomaly_map.isfinite().all())
    assert all(unit > 0 and math.isfinite(unit) for unit in _units(model))


def test_an_unscored_latent_need_not_separate_whatever_pressed_it(tmp_path):
    model = _toll(beta="auto", score_scale="median", score_weight=0.0)
    _fit(model, tmp_path, _digits(val_anomalies=True), max_epochs=3)
    assert "latent_does_not_separate" not in [finding.signature for finding in model.findings]


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("10", 10.0)])
@pytest.mark.parametrize("name", ["Toll", "PatchToll"])
def test_beta_by_the_command_line(name, given, expected):
    arguments = ["--model", name, "--model.beta", given, "--model.score_scale", "median", "--model.image_size", "32"]
    arguments += ["--model.pre_trained", "false"] if name == "PatchToll" else []
    model = run_cli("train", *arguments, "--data", "DigitsOneVsRest", run=False).model
    assert model.hparams["beta"] == expected
    assert type(model.hparams["beta"]) is type(expected)


# --- what goes wrong


def test_divergence_stops_at_once_and_keeps_good_weights(tmp_path):
    model = _toll(lr=1e30)
    with pytest.raises(DivergenceError, match="not finite at step"):
        _fit(model, tmp_path, max_epochs=50)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())


def test_divergence_that_validation_sees_first(tmp_path):
    model, data = _toll(lr=1e20, patience=None), _digits(train_batch_size=500)
    with pytest.raises(DivergenceError, match="not finite at step"):
        _fit(model, tmp_path, data, max_epochs=50)
    assert all(value.abs().max() < 1e3 for value in model.model.parameters())


def test_beta_zero_is_not_told_that_its_latent_does_not_separate(tmp_path):
    model = _toll(beta=0.0)
    _fit(model, tmp_path, _digits(val_anomalies=True), max_epochs=30)
    assert model.findings == []


def test_failure_signatures_are_warned_of(tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(1, 1, 8, 8))

        def forward(self, z):
            return self.mean.expand(len(z), -1, -1, -1)

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    model = Toll(image_size=8, in_channels=1, encoder=encoder, decoder=Mean(), lr=0.05, beta=0.0, visualizer=False)
    with pytest.warns(TollWarning, match="predicts_mean: .* unexplained .* lower beta"):
        engine(tmp_path, max_epochs=60).fit(model, datamodule=_digits())
    assert [finding.signature for finding in model.findings] == ["predicts_mean"]


def test_a_normal_fit_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", TollWarning)
        model = _toll()
        engine(tmp_path, max_epochs=60).fit(model, datamodule=_digits())
    assert model.findings == []


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("pixel", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_refused(tmp_path, verb, pixel):
    data = _digits()
    data.setup()
    parts = {"fit": data.train_data, "validate": data.val_data, "test": data.test_data, "predict": data.test_data}
    part = parts[verb]
    part._images[1, 0, 0, 0] = pixel
    data._is_setup = True
    name = part.samples["image_path"][1]
    with pytest.raises(ValueError, match=f"images must be finite, got NaN or infinite pixels in: {name}$"):
        getattr(engine(tmp_path, max_epochs=1), verb)(_toll(), datamodule=data)


def test_an_image_that_is_not_finite_leaves_the_weights_of_the_epochs_start(tmp_path):
    """BatchNorm has seen it by the time it is found; nothing of that may stay."""
    model, data = _toll(), _digits()
    data.setup()
    starts = []
    model.on_train_epoch_start = lambda: (
        Toll.on_train_epoch_start(model),
        starts.append({name: value.clone() for name, value in model.model.state_dict().items()}),
    )

    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            del pl_module
            if trainer.current_epoch == 1 and batch_idx == 1:
                batch.image = batch.image.clone()  # one channel in memory, shown as three
                batch.image[3] = math.nan

    with pytest.raises(ValueError, match="images must be finite"):
        _fit(model, tmp_path, data, max_epochs=3, callbacks=[Spoil()])
    assert len(starts) == 2
    for name, value in starts[1].items():
        assert torch.equal(model.model.state_dict()[name], value), name


def test_a_training_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """A number that Python reads from a tensor makes it wait until the device has computed it."""
    reads = []
    for method in ("__bool__", "__float__", "__int__", "item", "tolist", "cpu", "numpy"):
        plain = getattr(torch.Tensor, method)
        monkeypatch.setattr(torch.Tensor, method, lambda *a, _m=method, _f=plain, **k: reads.append(_m) or _f(*a, **k))
    model, of_steps = _toll(), []
    step = model.training_step

    def counted(batch, batch_idx):
        reads.clear()
        loss = step(batch, batch_idx)
        of_steps.append(list(reads))
        return loss

    model.training_step = counted
    _fit(model, tmp_path, max_epochs=2)
    assert len(of_steps) == 8
    assert all(found == ["tolist"] for found in of_steps), of_steps


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": -1.0}, ValueError, "beta must be finite and >= 0, got -1.0"),
        ({"beta": math.nan}, ValueError, "beta must be finite"),
        ({"beta": "none"}, TypeError, "beta must be a number of at least 0 or 'auto', got 'none'"),
        ({"score_scale": "none"}, ValueError, "score_scale='none' with beta='auto' needs a score_weight"),
        ({"beta": 0.01, "strength": 0.5}, ValueError, "strength belongs to beta='auto', got 0.5 with beta=0.01"),
        ({"beta": "auto", "score_weight": 1.0, "strength": -1}, ValueError, "strength must be finite and >= 0"),
        ({"score_scale": "mean"}, ValueError, "score_scale must be one of 'median', 'none', got 'mean'"),
        ({"score_weight": -0.5}, ValueError, "score_weight must be finite and >= 0, got -0.5"),
        ({"score_weight": "1"}, TypeError, "score_weight must be a real number"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0"),
        ({"image_size": 7}, ValueError, "image_size must be at least 8 pixels"),
        ({"image_size": (28, 4)}, ValueError, "image_size must be at least 8 pixels"),
        ({"in_channels": 2}, ValueError, "in_channels must be one of 1, 3, got 2"),
        ({"network": "resnet"}, ValueError, "network must be one of"),
        ({"network": "paper28", "image_size": 32}, ValueError, r"network='paper28' takes .*\(1, 28, 28\)"),
        ({"network": "paper32", "image_size": 32, "in_channels": 1}, ValueError, r"takes .*\(3, 32, 32\)"),
        ({"score_term": "both"}, ValueError, "score_term must be one of"),
        ({"scaling": "zscore"}, ValueError, "scaling must be one of"),
        ({"exponent": 3}, ValueError, "exponent must be one of 1, 2"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"max_epochs": 0}, ValueError, "max_epochs must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"pre_processor": False, "scaling": "imagenet"}, ValueError, "scaling reaches the default pre_processor"),
        ({"encoder": nn.Flatten()}, ValueError, "encoder and decoder must be given together, decoder is missing"),
        ({"encoder": nn.Flatten(), "decoder": nn.Flatten()}, ValueError, "decoder must return samples"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Toll(**arguments)


def test_wrong_channels_and_size():
    model = Toll(image_size=16, pre_processor=False).eval()
    with pytest.raises(ValueError, match=r"input must have shape \(N, 3, 16, 16\), got \(2, 4, 16, 16\)"):
        model(torch.rand(2, 4, 16, 16))
    with pytest.raises(ValueError, match=r"got \(2, 3, 16, 20\)"):
        model(torch.rand(2, 3, 16, 20))


def test_own_modules_and_their_checkpoint(tmp_path):
    def modules():
        return {
            "encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
            "decoder": nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))),
        }

    model = _toll(**modules())
    _fit(model, tmp_path)
    path = checkpoint_of(tmp_path, "Toll", "DigitsOneVsRest", "8")
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="pass encoder and decoder"):
        Toll.load_from_checkpoint(path)
    loaded = Toll.load_from_checkpoint(path, **modules())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].nan_to_num(), value.nan_to_num()), name


def test_an_empty_training_folder(tmp_path):
    (tmp_path / "set/good").mkdir(parents=True)
    data = Folder("empty", root=tmp_path / "set", normal_dir="good", num_workers=0)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)image|found"):
        engine(tmp_path, max_epochs=1).fit(Toll(image_size=16), datamodule=data)


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_corrupted_checkpoint(tmp_path, damage):
    path = tmp_path / "model.ckpt"
    _fit(_toll(), tmp_path).trainer.save_checkpoint(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no checkpoint")
    with pytest.raises(ValueError, match=r"model\.ckpt is no checkpoint or a truncated one"):
        Toll.load_from_checkpoint(path)
    # The trainer reads it before any code of the model's; its error says so in its own words.
    with pytest.raises(
        (RuntimeError, pickle.UnpicklingError), match=r"(?i)corrupt|zip archive|weights.only load failed"
    ):
        engine(tmp_path).test(_toll(), datamodule=_digits(), ckpt_path=path)


def test_a_failing_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    from fsspec.implementations import local

    path = tmp_path / "model.ckpt"
    runner = _fit(_toll(), tmp_path)
    runner.trainer.save_checkpoint(path)
    before = path.read_bytes()

    def full(self, data):
        self.f.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local.LocalFileOpener, "write", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        runner.trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    Toll.load_from_checkpoint(path)


def test_pickle_carries_the_weights_once(tmp_path):
    import io

    model = _toll()
    _fit(model, tmp_path)
    fresh, fitted = io.BytesIO(), io.BytesIO()
    torch.save(_toll(), fresh)
    torch.save(model, fitted)
    assert fitted.getbuffer().nbytes < 1.2 * fresh.getbuffer().nbytes


def test_get_model_by_every_spelling():
    for spelling in ("toll", "Toll", "TOLL"):
        assert isinstance(get_model(spelling), Toll)
