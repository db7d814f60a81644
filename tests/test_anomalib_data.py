"""One-vs-rest data: who lands in which split, in which order, at which cost in copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anomalib import TaskType
from contracts import engine
from image_files import write_cifar, write_mnist
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.transforms.v2 import Compose, RandomErasing, Resize

from toll_plugin.anomalib import (
    CIFAR10OneVsRest,
    CIFAR100OneVsRest,
    DigitsOneVsRest,
    FashionMNISTOneVsRest,
    MNISTOneVsRest,
    OneVsRest,
    TensorImageDataset,
    Toll,
    TollPreProcessor,
)
from toll_plugin.core import contrast_range
from toll_plugin.image_sets import LabelledImages


def _split(data):
    data.setup()
    return {
        split: {(int(i.image_path[:-4].split("_")[-1]), bool(i.gt_label)) for i in getattr(data, f"{split}_data")}
        for split in ("train", "val", "test")
        if hasattr(data, f"{split}_data")
    }


@pytest.mark.parametrize("normal_class", range(10))
def test_digits_are_split_by_class(normal_class):
    from sklearn.datasets import load_digits

    target = load_digits().target
    parts = _split(DigitsOneVsRest(normal_class))
    assert not any(bad for _, bad in parts["train"] | parts["val"])
    everyone = [i for part in parts.values() for i, _ in part]
    assert sorted(everyone) == list(range(1797))
    for i, bad in set.union(*parts.values()):
        assert bad == (target[i] != normal_class)
    n = int((target == normal_class).sum())
    assert len(parts["val"]) == round(0.2 * n)
    assert sum(not bad for _, bad in parts["test"]) == round(0.2 * n)


def test_the_seed_decides_the_split():
    assert _split(DigitsOneVsRest(3, seed=1)) == _split(DigitsOneVsRest(3, seed=1))
    assert _split(DigitsOneVsRest(3, seed=1)) != _split(DigitsOneVsRest(3, seed=2))


def test_validation_anomalies_only_when_asked_and_never_tested():
    parts = _split(DigitsOneVsRest(3, val_anomalies=True))
    bad = {i for i, is_bad in parts["val"] if is_bad}
    assert len(bad) == round(0.2 * (1797 - 183))
    assert not bad & {i for i, _ in parts["test"]}


class Squares(OneVsRest):
    """A set with a test part: class c is a flat image of value 10 c."""

    def load(self):
        def part(n):
            labels = torch.arange(n) % 4
            return LabelledImages((10 * labels).to(torch.uint8)[:, None, None, None].repeat(1, 3, 5, 6), labels)

        return part(80), part(24)


def test_a_set_with_a_test_part():
    data = Squares(2, val_ratio=0.25)
    parts = _split(data)
    assert {split: len(part) for split, part in parts.items()} == {"train": 15, "val": 5, "test": 24}
    assert sum(not bad for _, bad in parts["test"]) == 6
    item = data.train_data[0]
    torch.testing.assert_close(item.image.as_subclass(torch.Tensor), torch.full((3, 5, 6), 20 / 255))


def test_batches_come_whole_and_equal_their_items():
    data = DigitsOneVsRest(8, train_batch_size=50)
    data.setup()
    batches = list(data.val_dataloader())
    assert sum(len(b.image) for b in batches) == len(data.val_data)
    for i, path in enumerate(batches[0].image_path):
        assert torch.equal(batches[0].image[i], data.val_data[i].image)
        assert path == data.val_data[i].image_path


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        data = DigitsOneVsRest(8, seed=seed)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [path.split("/")[-1] for batch in loader for path in batch.image_path]

    torch.manual_seed(1)
    first = order(0, 3)
    torch.manual_seed(2)
    assert order(0, 3) == first
    assert order(0, 4) != first
    assert sorted(order(0, 4)) == sorted(first)


def test_augmentations_see_one_image_at_a_time():
    images = torch.ones(64, 1, 8, 8)
    data = TensorImageDataset(images, torch.zeros(64), augmentations=RandomErasing(p=0.5, scale=(0.1, 0.2)))
    batch = data.__getitems__(range(64)).image
    erased = [bool((image == 0).any()) for image in batch]
    assert 5 < sum(erased) < 59
    data.augmentations = Compose([Resize((16, 16))])
    assert data.__getitems__([0, 1]).image.shape == (2, 3, 16, 16)


def test_subsample_shares_the_images():
    data = TensorImageDataset(torch.rand(10, 1, 4, 4), torch.arange(10) >= 5, [f"{i}.png" for i in range(10)])
    part = data.subsample([7, 2])
    assert [item.image_path for item in part] == ["7.png", "2.png"]
    assert [bool(item.gt_label) for item in part] == [True, False]
    assert part._images.data_ptr() == data._images.data_ptr()
    assert part.task == TaskType.CLASSIFICATION
    assert part.has_normal
    assert part.has_anomalous
    with pytest.raises(ValueError, match="no duplicates"):
        data.subsample([1, 1])


def test_loading_copies_no_global_randomness():
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    DigitsOneVsRest(1).setup()
    assert (np.random.get_state()[1] == np_state).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def _written(monkeypatch):
    """The names of the images that the data set writes to files, as they are written."""
    names = []
    write = TensorImageDataset.write_images

    def noted(self, wanted, folder):
        before = set(folder.rglob("*.png"))
        files = write(self, wanted, folder)
        names.extend(sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*.png")) - before))
        return files

    monkeypatch.setattr(TensorImageDataset, "write_images", noted)
    return names


def test_heat_maps_are_drawn_from_images_in_memory(tmp_path, monkeypatch):
    written = _written(monkeypatch)
    data = Squares(2)
    engine(tmp_path, max_epochs=1).train(Toll(image_size=8, seed=0), datamodule=data)
    drawn = sorted(tmp_path.glob("Toll/Squares/2/v0/images/**/*.png"))
    assert [path.parent.name for path in drawn] == ["bad"] * 18 + ["good"] * 6
    assert sorted(written) == sorted(data.test_data.samples["image_path"])
    for path in drawn:
        # The left panel is the image itself, of class c a flat one of value 10 c.
        shown = np.asarray(Image.open(path))[128, 128]
        assert (shown == 10 * int(path.name[0])).all(), path


def test_nothing_is_written_where_nothing_is_drawn(tmp_path, monkeypatch):
    written = _written(monkeypatch)
    data = Squares(2)
    silent = Toll(image_size=8, seed=0, visualizer=False)
    runner = engine(tmp_path, max_epochs=1)
    runner.train(silent, datamodule=data)
    runner.predict(silent, datamodule=data)
    loud = Toll(image_size=8, seed=0)
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(loud, datamodule=data)  # draws in test and predict only
    runner.validate(loud, datamodule=data)
    assert written == []
    assert data._image_folder is None


def test_only_the_images_that_are_drawn_are_written(tmp_path, monkeypatch):
    written = _written(monkeypatch)
    data = Squares(2, eval_batch_size=5)
    runner = engine(tmp_path, limit_test_batches=2, limit_predict_batches=3)
    model = Toll(image_size=8, seed=0)
    runner.test(model, datamodule=data)
    names = data.test_data.samples["image_path"]
    assert sorted(written) == sorted(names[:10])
    batches = runner.predict(model, datamodule=data)
    assert sorted(written) == sorted(names[:15])  # each once
    assert [path[-12:] for path in batches[2].image_path] == [name[-12:] for name in names[10:15]]


def test_sets_add_up():
    data = Squares(2)
    data.setup()
    both = data.train_data + data.test_data
    assert len(both) == len(data.train_data) + 24
    assert torch.equal(both[len(data.train_data)].image, data.test_data[0].image)
    with pytest.raises(TypeError, match="only a TensorImageDataset"):
        _ = data.train_data + [1]  # noqa: RUF005  the addition is what is tested


@pytest.mark.parametrize("val_anomalies", [False, True])
@pytest.mark.parametrize("as_file", [False, True])
def test_given_indices_validate(val_anomalies, as_file, tmp_path):
    indices = [2, 6, 3, 40]  # classes 2, 2, 3, 0
    if as_file:
        np.save(tmp_path / "held_out.npy", indices)
    parts = _split(
        Squares(2, val_indices=tmp_path / "held_out.npy" if as_file else indices, val_anomalies=val_anomalies)
    )
    assert parts["val"] == {(2, False), (6, False)} | ({(3, True), (40, True)} if val_anomalies else set())
    assert parts["train"] == {(i, False) for i in range(2, 80, 4) if i not in indices}
    assert len(parts["test"]) == 24


@pytest.mark.parametrize("indices", [[2, 2], [-1], [80], [0.5], [[1]], []])
def test_bad_indices(indices):
    with pytest.raises(ValueError, match="val_indices must be distinct integers from 0 to 79, got"):
        Squares(2, val_indices=indices).setup()


def test_indices_may_be_of_any_integer_type():
    assert _split(Squares(2, val_indices=np.array([2, 3], dtype=np.uint64)))["val"] == {(2, False)}


def test_indices_that_leave_nothing_to_train_on_or_to_validate(tmp_path):
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"val_indices must be integers or a .npy file of them, got .*text.npy"):
        Squares(2, val_indices=tmp_path / "text.npy").setup()
    with pytest.raises(ValueError, match="val_indices must hold an image of class 2, got none among 2"):
        Squares(2, val_indices=[1, 3]).setup()
    with pytest.raises(ValueError, match="hold out fewer val_indices"):
        Squares(2, val_indices=list(range(80))).setup()
    with pytest.raises(FileNotFoundError):
        Squares(2, val_indices="nowhere.npy").setup()


@pytest.mark.parametrize(
    ("kind", "folder", "arguments", "n_classes"),
    [
        (MNISTOneVsRest, "MNIST", {}, 10),
        (FashionMNISTOneVsRest, "FashionMNIST", {}, 10),
        (CIFAR10OneVsRest, "CIFAR10", {}, 10),
        (CIFAR100OneVsRest, "CIFAR100", {}, 20),
        (CIFAR100OneVsRest, "CIFAR100", {"class_labels": "fine"}, 100),
    ],
)
def test_image_sets_keep_their_test_part(kind, folder, arguments, n_classes, tmp_path, monkeypatch):
    if "CIFAR" in folder:
        labels = write_cifar(tmp_path, folder, monkeypatch)["test_labels" if n_classes != 20 else "test_coarse"]
    else:
        labels = write_mnist(tmp_path, folder)["test_labels"]
    data = kind(tmp_path, normal_class=1, val_ratio=0.0 if n_classes == 100 else 0.25, **arguments)
    data.prepare_data()
    parts = _split(data)
    assert parts["test"] == {(i, bool(labels[i] != 1)) for i in range(40)}
    assert not any(bad for _, bad in parts["train"])
    if n_classes == 20:
        assert len(parts["train"]) == 3
    assert data.train_data._images.dtype == torch.uint8
    assert data.name == kind.__name__


def test_missing_files_are_reported_by_the_data_module(tmp_path, monkeypatch):
    def offline(_):
        raise OSError

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    with pytest.raises(FileNotFoundError, match="MNIST is not complete"):
        MNISTOneVsRest(tmp_path).prepare_data()
    data = MNISTOneVsRest(tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match="MNIST is not complete"):
        data.setup()
    with pytest.raises(ValueError, match="class_labels must be one of 'coarse', 'fine', got 'both'"):
        CIFAR100OneVsRest(class_labels="both")


def test_the_range_of_the_scaling_is_that_of_the_training_images(tmp_path, monkeypatch):
    written = write_cifar(tmp_path / "data", "CIFAR10", monkeypatch)
    data = CIFAR10OneVsRest(tmp_path / "data", normal_class=3, train_batch_size=2, val_indices=[3, 13])
    model = Toll(image_size=32, network="paper32", latent_dim=4, scaling="paper_cifar", seed=0, visualizer=False)
    with pytest.raises(RuntimeError, match="not known yet"):
        model(torch.rand(1, 3, 32, 32))
    trainer = engine(tmp_path, max_epochs=1, max_steps=2)
    trainer.fit(model, datamodule=data)
    rows = [i for i in range(3, 80, 10) if i not in (3, 13)]
    expected = contrast_range(torch.from_numpy(written["train_images"][rows]) / 255)
    assert model.pre_processor.scaling_range == pytest.approx(expected, rel=1e-6)
    x = torch.rand(2, 3, 32, 32)
    scores = model.eval()(x).pred_score
    # From a checkpoint by Lightning, and by an engine whose model has its range still open.
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = Toll.load_from_checkpoint(checkpoint).eval()
    assert torch.equal(loaded(x).pred_score, scores)
    fresh = Toll(image_size=32, network="paper32", latent_dim=4, scaling="paper_cifar", visualizer=False)
    trainer.test(fresh, datamodule=data, ckpt_path=checkpoint)
    assert torch.equal(fresh.eval()(x).pred_score, scores)
    # Lightning's own trainer validates before it trains; a pre-processor may be the user's.
    own = Toll(pre_processor=TollPreProcessor(32, "paper_cifar"), network="paper32", visualizer=False)
    Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False).fit(own, datamodule=data)
    assert own.pre_processor.scaling_range == model.pre_processor.scaling_range
    # A range that was given is left alone.
    given = Toll(image_size=32, network="paper32", scaling="paper_cifar", scaling_range=(-9.0, 9.0), visualizer=False)
    engine(tmp_path / "given", max_epochs=1, max_steps=1).fit(given, datamodule=data)
    assert given.pre_processor.scaling_range == (-9.0, 9.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normal_class": 10}, r"normal_class must be one of \[0, 1, .*9\], got 10"),
        ({"normal_class": -1}, "normal_class must be at least 0"),
        ({"val_ratio": 1.0}, "val_ratio must be below 1"),
        ({"val_ratio": -0.1}, "val_ratio must be finite and >= 0"),
        ({"test_ratio": 0.0}, "test_ratio must be finite and > 0"),
        ({"val_ratio": 0.6, "test_ratio": 0.5}, "lower the ratios"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsOneVsRest(**arguments).setup()
