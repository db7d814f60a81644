"""The picture of the collapse: what is drawn is what the networks give, and only training images scale it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import collapse as study
from benchmarks.studies.collapse import LOSSES, collapse, samples, table, watch
from toll_plugin.anomalib import Toll
from toll_plugin.core import TollLoss
from toll_plugin.image_sets import LabelledImages


@pytest.fixture
def images(monkeypatch):
    draw = torch.Generator().manual_seed(0)

    def part(count):
        made = torch.randint(0, 256, (count, 8, 8), generator=draw, dtype=torch.uint8)
        return LabelledImages(made, torch.arange(count) % 3)

    parts = part(60), part(90)
    monkeypatch.setattr(study, "read_image_set", lambda *_: parts)
    monkeypatch.setattr(study, "download_image_set", lambda *_: None)
    return parts


def test_the_training_is_that_of_tolls_defaults():
    model = Toll(image_size=28, in_channels=1)
    loss = TollLoss(**LOSSES["pressed (Toll's default)"])
    assert (loss.beta, loss.strength) == (model.model.loss.beta, model.model.loss.strength)
    assert (model.hparams["latent_dim"], model.lr, model.max_steps) == (study.LATENT_DIM, study.LR, study.STEPS)


def test_samples_are_of_their_kind_and_scaled_by_training_images(images):
    train, test, anomalous = samples("mnist", Path(), 1, 25)
    assert (len(train), len(test), int(anomalous.sum())) == (20, 50, 25)
    first = images[0].images[1::3].float() / 255
    torch.testing.assert_close(train[:, 0], (first - first.mean()) / first.std())
    labels = images[1].labels.numpy()
    pixels = images[1].images.float() / 255
    for part, which in ((test[:25], labels == 1), (test[25:], labels != 1)):
        known = {image.tobytes() for image in ((pixels[which] - first.mean()) / first.std()).numpy()}
        assert {image.tobytes() for image in part[:, 0].numpy()} <= known


@pytest.mark.usefixtures("images")
def test_norms_are_those_of_the_network():
    train, test, anomalous = samples("mnist", Path(), 1, 25)
    looks = watch(train, test, anomalous, {"beta": 0.0}, steps=3)
    assert [look["step"] for look in looks] == [0, 1, 2, 3]
    again = watch(train, test, anomalous, {"beta": "auto", "strength": 3.0}, steps=3)
    assert again[0] == looks[0]  # the same initial weights
    assert again[-1]["normal"] != looks[-1]["normal"]
    assert all(low <= middle <= high for look in looks for low, middle, high in (look["normal"], look["anomalous"]))


def test_the_table_by_hand():
    course = [
        {"step": 0, "normal": [1, 2.0, 3], "anomalous": [1, 3.0, 5], "latent": 0.6, "reconstruction": 0.5},
        {"step": 9, "normal": [0, 0.5, 1], "anomalous": [1, 2.0, 3], "latent": 0.9, "reconstruction": 0.7},
    ]
    line = table({"one": course}).splitlines()[2]
    cells = [cell.strip() for cell in line[1:-1].split("|")]
    assert cells == ["one", "9", "2 to 0.5", "3 to 2", "1.50 to 4.00", "0.900", "0.700"]


@pytest.mark.usefixtures("images")
def test_a_small_run_writes_record_and_picture(tmp_path, capsys):
    output, figure = tmp_path / "collapse.json", tmp_path / "collapse.svg"
    collapse(root=tmp_path, normal_class=1, size=20, steps=2, output=output, figure=figure)
    record = json.loads(output.read_text())
    assert record["table"] in capsys.readouterr().out
    assert list(record["runs"]) == list(LOSSES)
    assert "anomalous test images" in figure.read_text()


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normal_class": -1}, "normal_class must be at least 0"),
        ({"normal_class": 7}, "normal_class must be one of mnist, got 7"),
        ({"size": 1}, "size must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"figure": Path("collapse.txt")}, "figure's ending must be one of"),
    ],
)
def test_bad_settings_are_refused(tmp_path, wrong, message):
    given = {"root": tmp_path, "output": tmp_path / "collapse.json", "figure": tmp_path / "collapse.svg"}
    with pytest.raises(ValueError, match=message):
        collapse(**given | wrong)
    assert not list(tmp_path.iterdir())
