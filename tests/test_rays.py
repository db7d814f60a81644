"""The rays are where they are said to be, a latent norm helps where it must, and the command measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.studies.rays import ANGLE, NETWORKS, detector, measure, plot, rays, rows, table


def test_rows_lie_on_the_line_at_their_distances():
    found = rows(np.array([2.0, -4.0]), 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(found, [[np.sqrt(3), 1], [-2 * np.sqrt(3), -2]])
    noisy = rows(np.zeros(4000), 0.5, np.random.default_rng(0))
    across = noisy @ [-np.sin(ANGLE), np.cos(ANGLE)]
    np.testing.assert_allclose(noisy @ [np.cos(ANGLE), np.sin(ANGLE)], 0, atol=1e-12)
    assert across.std() == pytest.approx(0.5, rel=0.05)


def test_detectors_clip_or_do_not():
    train = rows(np.random.default_rng(0).standard_normal(300), 0.1, np.random.default_rng(1))
    far = np.array([[1e6, 1e6], [2e6, 2e6]])
    latents = {}
    for inputs in ("clipped", "unbounded"):
        fitted = detector("linear, one latent", "euclidean", inputs, 0, beta=0.0, max_steps=50).fit(train)
        latents[inputs] = fitted.explain(far).latent
    # Both rows are beyond the limit, where a clipped network sees one and the same row.
    assert latents["clipped"][0] == latents["clipped"][1]
    assert latents["unbounded"][1] == pytest.approx(2 * latents["unbounded"][0], rel=1e-3)


def test_initial_weights_are_the_seeds_and_global_ones_stay():
    before = torch.random.get_rng_state()
    first, again, other = (NETWORKS["linear, one latent"](seed)["encoder"].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_linear_network_is_blind_along_the_line_and_its_latent_is_not():
    """The case by construction: what is reconstructed exactly has the error of its noise, whatever its distance."""
    found = measure("linear, one latent", "euclidean", "unbounded", "beta=0", 0, 0.1, (3.0, 6.0), 500)["auroc"]
    assert found["reconstruction"][0] == pytest.approx(0.5, abs=0.06)
    assert found["latent"][0] > 0.98
    assert found["score"][1] > found["reconstruction"][1] + 0.2


def test_the_table_by_hand():
    one = {"network": "n", "residuals": "r", "inputs": "i", "weight": "w"}
    runs = [
        one | {"seed": seed, "auroc": {"reconstruction": [value], "latent": [1.0], "score": [0.5]}}
        for seed, value in enumerate((0.5, 0.7))
    ]
    line = table(runs, [3.0]).splitlines()[2]
    # The standard deviation of 0.5 and 0.7 is 0.1 sqrt 2, over sqrt 2.
    assert [cell.strip() for cell in line[1:-1].split("|")] == [
        *("n", "r", "i", "w"),
        *("0.600 ± 0.100", "1.000 ± 0.000", "0.500 ± 0.000"),
    ]


def test_the_picture_is_small(tmp_path):
    plot(tmp_path / "plots" / "rays.png", "linear, one latent", "euclidean", 0.1, 100, reach=12.0, max_steps=50)
    assert (tmp_path / "plots" / "rays.png").stat().st_size < 150_000
    with Image.open(tmp_path / "plots" / "rays.png") as picture:
        assert picture.width > 600


def test_a_small_run_writes_record_and_picture(tmp_path, capsys):
    output, figure = tmp_path / "rays.json", tmp_path / "rays.svg"
    rays(distances=(4.0,), size=40, seeds=1, max_steps=5, output=output, figure=figure)
    record = json.loads(output.read_text())
    assert record["table"] in capsys.readouterr().out
    assert {"commit", "packages", "noise", "distances", "size"} <= set(record)
    assert len(record["runs"]) == 3 * 2 * 2 * 2
    assert {len(values) for run in record["runs"] for values in run["auroc"].values()} == {1}
    assert "reconstruction, inputs clipped" in figure.read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise": 0.0}, "noise must be finite and > 0"),
        ({"distances": (3.0, -1.0)}, r"distances\[1\] must be finite and > 0, got -1"),
        ({"distances": ()}, "distances must hold at least one distance"),
        ({"size": 1}, "size must be at least 10"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"figure": Path("rays.txt")}, "figure's ending must be one of"),
    ],
)
def test_bad_settings_are_refused_before_work(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        rays(**{"output": tmp_path / "rays.json", "figure": tmp_path / "rays.svg", **wrong})
    assert not list(tmp_path.iterdir())
