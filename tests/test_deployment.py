"""What the benchmark of inspection measures are models of the right size; the README's test runs it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.costs.deployment import LAYERS, _features, _model, _scoring
from benchmarks.run.measure import median_seconds

COMPONENTS, CHANNELS, HIDDEN, LATENT = 192, 64 + 128 + 256, 1024, 32


def _bytes(model):
    return sum(value.nbytes for value in model.state_dict().values())


@pytest.mark.parametrize("bank", [32, 320])
def test_sizes_of_patchcore_by_hand(bank):
    alone = _bytes(_features("resnet18", LAYERS["PatchCore"]))
    # A patch is 128 + 256 numbers in 4 bytes; a Gaussian of 33 x 33 pixels smooths the map.
    assert _bytes(_model("PatchCore", "resnet18", 64, bank)) - alone == bank * 384 * 4 + 33 * 33 * 4


def test_size_of_patchtoll_by_hand():
    alone = _bytes(_features("resnet18", LAYERS["PatchToll"]))
    weights = 2 * (COMPONENTS * HIDDEN + HIDDEN * LATENT) + 2 * HIDDEN + LATENT + COMPONENTS
    norms = 2 * 4 * HIDDEN  # two BatchNorms: weight, bias, mean and variance
    standardisation = 2 * CHANNELS + CHANNELS * COMPONENTS
    whole = 16 * CHANNELS * (2 + 32)  # of the image's score: 4 x 4 windows, their mean, deviation and 32 components
    expected = 4 * (weights + norms + standardisation + whole)
    assert _bytes(_model("PatchToll", "resnet18", 64, 0)) - alone == pytest.approx(expected, rel=0.005)


def test_models_score_and_are_timed_in_turns():
    image, order = torch.rand(1, 3, 64, 64), []

    def calling(name, model):
        def call():
            order.append(name)
            with torch.no_grad():
                found = model(image)
            assert found.pred_score.shape[0] == 1
            assert found.anomaly_map.shape[-2:] == (64, 64)

        return call

    taken = median_seconds({name: calling(name, _model(name, "resnet18", 64, 10)) for name in LAYERS}, 3)
    assert order == [*LAYERS] * 4  # the first round warms up
    assert list(taken) == [*LAYERS]


@pytest.mark.parametrize("bank", [None, 10])
def test_the_memory_of_scoring_is_printed(bank, capsys):
    _scoring("PatchCore", "resnet18", 64, bank)
    assert float(capsys.readouterr().out) >= 0
