"""The paper's protocol: the authors' generators and formula, what each protocol chooses, and runs that are kept."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_files import write_arrhythmia, write_cifar, write_mnist

from benchmarks.__main__ import main
from benchmarks.run.jobs import as_they_finish, run_missing
from benchmarks.run.metrics import f1_at_known_rate, splice
from benchmarks.run.store import Runs
from benchmarks.studies import parts as studied
from benchmarks.studies import protocol, training
from benchmarks.studies.paper import _same, _with_twin, load, paper, parse_classes
from benchmarks.studies.paper_table import make_table
from benchmarks.studies.stopping import RULES, judge, stopping
from toll_plugin.core import DenseAutoencoder, Paper32Autoencoder

DENSE = replace(protocol.SETTINGS["arrhythmia"], iterations=6, validate_every=2, batch_size=8)


def _parts(seed=0, n=30):
    rng = np.random.default_rng(seed)

    def rows(count, shift):
        return rng.normal(size=(count, 274)) + shift

    data = {"train_normal": rows(n, 0)}
    for part in ("validation", "test"):
        data |= {f"{part}_normal": rows(12, 0), f"{part}_anomalous": rows(5, 0.4)}
    return studied.table_parts(data)


@pytest.mark.parametrize(("seed", "normal_class"), [(0, 0), (3, 2)])
def test_initial_weights_are_those_of_the_authors_loop(seed, normal_class):
    settings = protocol.SETTINGS["cifar10"]
    state = torch.get_rng_state()
    network = protocol.initial_network(settings, seed, normal_class)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(seed)
    for _ in range(normal_class + 1):
        expected = Paper32Autoencoder(64)
    for mine, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_batches_are_those_of_numpys_global_generator():
    settings = replace(DENSE, iterations=3, batch_size=4)
    np.random.seed(42)  # noqa: NPY002  as the authors' loop does
    expected = {}
    for c, size in enumerate((11, 7, 9)):
        expected[c] = [np.random.choice(size, 4, replace=False) for _ in range(3)]  # noqa: NPY002
    for c, sizes in enumerate(([11], [11, 7], [11, 7, 9])):
        np.testing.assert_array_equal(list(protocol.batches(sizes, settings)), expected[c])


def test_the_last_step_is_that_of_a_plain_loop_and_its_metrics_are_those_of_the_formula():
    parts = _parts()
    result, weights = training.train(parts, DENSE, 1, 0, device="cpu")
    network = protocol.initial_network(DENSE, 1, 0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for index in protocol.batches([30], DENSE):
        x = parts.train[index]
        x_hat, z = network(x)
        loss = sum((a - b).norm() + 10 * c.norm() for a, b, c in zip(x, x_hat, z, strict=True)) / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [step["step"] for step in result["trace"]] == [2, 4, 6]
    np.testing.assert_allclose([s["batch_loss"] for s in result["trace"]], losses[1::2], rtol=1e-5)
    assert result["protocols"]["last"]["step"] == 6
    # The same weights, in double precision and by loops.
    network.load_state_dict(weights[6])
    network.double().eval()
    scores, held_out = [], []
    with torch.no_grad():
        for samples, found in ((parts.test, scores), (parts.validation[:12], held_out)):
            for row in samples.double():
                (x_hat,), (z,) = network(row[None])
                residual = sum(float(v) ** 2 for v in row - x_hat) ** 0.5
                found.append(residual + 10 * sum(float(v) ** 2 for v in z) ** 0.5)
    assert result["trace"][-1]["total"] == pytest.approx(np.mean(held_out), rel=1e-6)
    order = np.argsort(scores)[::-1][:5]
    assert result["protocols"]["last"]["total"] == pytest.approx(np.mean(order >= 12))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_loss_and_scores_of_images_by_loops(name, tmp_path, monkeypatch):
    if name == "mnist":
        written = write_mnist(tmp_path)
        raw = written["train_images"][:, None] / 255
        scaled = (raw - 0.1307) / 0.3081
    else:
        written = write_cifar(tmp_path, "CIFAR10", monkeypatch)
        raw = written["train_images"].astype(float)
        centred = raw - raw.mean(axis=(1, 2, 3), keepdims=True)
        scaled = centred / np.abs(centred).mean(axis=(1, 2, 3), keepdims=True)
        mine = scaled[written["train_labels"] == 4]
        scaled = (scaled - mine.min()) / (mine.max() - mine.min())
    settings = replace(protocol.SETTINGS[name], iterations=1, batch_size=3, validate_every=1)
    held_out = np.array([0, 4, 14, 9])
    data = {key: value[:, None] if value.ndim == 3 else value for key, value in written.items()}
    data |= {"held_out": held_out, "val_indices": held_out}
    parts = studied.image_parts(data, settings, 4)
    assert parts.sizes == [7, 8, 8, 8, 6]
    assert len(parts.train) == 6
    assert parts.validation_anomalous.tolist() == [True, False, False, True]
    double = replace(parts, scale=lambda images: parts.scale(images).double())
    network = protocol.initial_network(settings, 0, 4).double()
    rows = np.flatnonzero((written["train_labels"] == 4) & ~np.isin(np.arange(80), held_out))
    (index,) = protocol.batches(parts.sizes, settings)
    batch = torch.from_numpy(scaled[rows[index]])
    with torch.no_grad():
        x_hat, z = network.train()(batch)
        terms = [
            np.sqrt(sum(v**2 for v in (a - b).flatten().tolist()))
            + settings.beta * np.sqrt(sum(v**2 for v in c.tolist()))
            for a, b, c in zip(batch, x_hat, z, strict=True)
        ]
    result, weights = training.train(double, settings, 0, 4, network=protocol.initial_network(settings, 0, 4).double())
    assert result["trace"][0]["batch_loss"] == pytest.approx(np.mean(terms), rel=1e-6)
    network.load_state_dict(weights[1])
    normal = torch.from_numpy(scaled[[4, 14]])
    with torch.no_grad():
        x_hat, z = network.eval()(normal)
    expected = (normal - x_hat).flatten(1).norm(dim=1) + settings.beta * z.norm(dim=1)
    assert result["trace"][0]["total"] == pytest.approx(float(expected.mean()), rel=1e-6)


def test_each_protocol_keeps_the_step_it_chooses():
    parts = _parts()
    settings = replace(DENSE, iterations=40)
    result, weights = training.train(parts, settings, 0, 0, device="cpu")
    trace = result["trace"]
    best = max(step["validation"] for step in trace)
    first = next(step["step"] for step in trace if step["validation"] == best)
    assert result["protocols"]["paper"]["step"] == first
    lowest = min(trace, key=lambda step: step["total"])["step"]
    assert result["protocols"]["held-out loss"]["step"] == lowest
    spliced = min(trace, key=lambda step: step["synthetic"])["step"]
    assert result["protocols"]["label-free"]["step"] == spliced
    assert result["protocols"]["last"]["step"] == 40
    assert set(weights) == {first, lowest, spliced, 40}
    # Tables are tested at every validation: what was kept scores as it did then.
    for chosen in result["protocols"].values():
        assert chosen["total"] == next(step["test"] for step in trace if step["step"] == chosen["step"])
    again = training.score(parts, settings, weights, "cpu")
    assert again == {c["step"]: {k: c[k] for k in again[c["step"]]} for c in result["protocols"].values()}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_without_both_kinds_is_refused(part):
    parts = _parts()
    setattr(parts, f"{part}_anomalous", np.zeros(17, dtype=bool))
    with pytest.raises(ValueError, match=f"the {part} part must hold an anomaly and two normal samples, got 0 and 17"):
        training.train(parts, DENSE, 0, 0, device="cpu")


def test_a_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="not finite: training has diverged"):
        training.train(_parts(), replace(DENSE, lr=1e30), 0, 0, device="cpu")
    with pytest.raises(ValueError, match="batch_size must be at most the 30 training samples, got 31"):
        training.train(_parts(), replace(DENSE, batch_size=31), 0, 0, device="cpu")


def test_bfloat16_is_near():
    parts, settings = _parts(), replace(DENSE, iterations=2)
    single, _ = training.train(parts, settings, 0, 0, device="cpu")
    half, _ = training.train(parts, replace(settings, bf16=True), 0, 0, device="cpu")
    assert half["trace"][0]["total"] != single["trace"][0]["total"]
    assert half["trace"][0]["total"] == pytest.approx(single["trace"][0]["total"], rel=0.02)


def test_ties_count_against_the_method():
    def f1(normal, anomalous):
        scores = np.concatenate([normal, anomalous]).astype(float)
        return f1_at_known_rate(np.arange(len(scores)) >= len(normal), scores)

    # Two anomalies, so two rows are flagged: 5 and one of the 3s, which is taken to be the normal one.
    assert f1([3, 1], [5, 3]) == 0.5
    assert f1([1, 1], [5, 3]) == 1.0
    assert f1([7, 7], [5, 3]) == 0.0
    assert f1([7, 0], [5, 5]) == 0.5


def test_classes_are_lists_and_ranges():
    assert parse_classes(None, 3) == [0, 1, 2]
    assert parse_classes("0-2,8", 10) == [0, 1, 2, 8]
    assert parse_classes("7", 10) == [7]
    for bad in ("10", "a", "3-", "-1", "", "5-4"):
        with pytest.raises(ValueError, match="classes must be like 0-9"):
            parse_classes(bad, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
        ({"validation_size": 1}, "validation_size must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"beta": -1.0}, "beta must be finite and >= 0"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"width": 0.0}, "width must be finite and > 0, got 0.0"),
        ({"device": "gpu"}, "device must be auto or one that torch can use here, got 'gpu'"),
        ({"jobs": 0}, "jobs must not be 0"),
        ({"classes": "20"}, "classes must be like 0-9"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        paper("mnist", root=tmp_path, **arguments)


def _square(x):
    if x < 0:
        raise ArithmeticError(x)
    if x == 9:
        raise KeyboardInterrupt
    return {"square": x * x}, {"x": torch.tensor(x)}


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    runs = Runs(tmp_path / "runs")

    def command(values):
        return run_missing(runs, _square, [(f"run{x}", {"x": x}, (x,)) for x in values], 1, "test")

    with pytest.raises(KeyboardInterrupt):
        command([2, 3, 9, 4])
    assert [runs.find(f"run{x}", {"x": x}) is not None for x in (2, 3, 4)] == [True, True, False]
    assert int(runs.weights("run3", {"x": 3})["x"]) == 3
    ran = []
    monkeypatch.setattr("benchmarks.run.jobs._attempt", lambda f, a: (ran.append(a), f(*a))[1])
    assert [record["square"] for record in command([2, 3, 4])] == [4, 9, 16]
    assert ran == [(4,)]
    # The label alone does not make it the same run.
    assert runs.find("run2", {"x": 2, "beta": 1}) is None


def test_the_bar_says_how_many_runs_are_under_way(capsys):
    for _ in as_they_finish(_square, [(1,), (2,), (3,)], 1, "squares"):
        pass
    shown = capsys.readouterr().err
    assert "squares:   0%" in shown
    assert "1 under way" in shown
    assert "3/3" in shown
    assert shown.rstrip().endswith("0 under way]")


def test_names_of_kept_runs_have_not_changed(tmp_path, monkeypatch):
    """Runs that users keep must be found again."""
    names = []

    def only_names(runs, _function, calls, _jobs, _what):
        names.extend(runs.path(label, configuration).name for label, configuration, _ in calls)
        raise KeyboardInterrupt

    for study in ("paper", "stopping"):
        monkeypatch.setattr(f"benchmarks.studies.{study}.run_missing", only_names)
    monkeypatch.setattr("benchmarks.studies.paper.load", lambda *_: ({}, "0" * 16))
    monkeypatch.setattr("benchmarks.studies.paper.download_image_set", lambda *_: None)
    for arguments in ({"twin": False}, {}, {"width": 1.0}, {"width": 0.25, "twin": False}, {"beta": 0.0}):
        with pytest.raises(KeyboardInterrupt):
            paper("arrhythmia", root=tmp_path, seeds=1, runs=tmp_path, **arguments)
    with pytest.raises(KeyboardInterrupt):
        paper("mnist", root=tmp_path, classes=3, seeds=1, runs=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopping(classes=(1,), seeds=1, iterations=30, runs=tmp_path)
    mine, twin, narrow = (f"class0_seed0_{digest}.json" for digest in ("7bbc6429a8", "3f6c5acf58", "f963540b3f"))
    assert names == [
        mine,
        mine,
        twin,
        mine,
        twin,
        narrow,
        twin,  # --beta 0 makes the run that is the twin of another
        "class3_seed0_40e33a6efb.json",
        "class3_seed0_d8f96bce46.json",
        "digits_beta_0_01_1_35f4c092eb.json",
        "digits_beta_10_1_a1d2efec5e.json",
    ]


def _cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_arrhythmia_that_is_missing_is_named_with_its_address(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"arrhythmia\.mat .*https://odds\.cs\.stonybrook\.edu/arrhythmia-dataset/"
    ):
        paper("arrhythmia", root=tmp_path, runs=tmp_path)


def test_failed_runs_are_recorded_and_tried_again(tmp_path):
    runs = Runs(tmp_path)
    calls = [("bad", {"x": -1}, (-1,)), ("good", {"x": 2}, (2,))]
    bad, good = run_missing(runs, _square, calls, 1, "test")
    assert bad["error"] == "ArithmeticError: -1"
    assert "_square" in bad["traceback"]
    assert good["square"] == 4
    assert runs.find("bad", {"x": -1}) is None
    runs.path("good", {"x": 2}).with_suffix(".pt").unlink()
    assert runs.find("good", {"x": 2}) is None  # without its weights it is not finished
    runs.path("good", {"x": 2}).write_text("{")
    with pytest.raises(ValueError, match=r"good_.*is no record"):
        run_missing(runs, _square, calls, 1, "test")


@pytest.fixture
def arrhythmia(tmp_path):
    write_arrhythmia(tmp_path / "ODDS", tmp_path / "splits")
    arguments = {"root": tmp_path, "splits": tmp_path / "splits", "seeds": 2, "iterations": 4, "validate_every": 2}
    return {"dataset": "arrhythmia", "runs": tmp_path / "runs", "output": tmp_path / "out.json", **arguments}


def test_the_command_on_arrhythmia_and_its_evaluation(arrhythmia, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.studies.paper._detectors", lambda *_: {"TollDetector, defaults": 0.5})
    with pytest.raises(FileNotFoundError, match="no run of these settings is finished in"):
        paper(**arrhythmia, mode="eval")
    paper(**arrhythmia)
    first = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "dirty", "packages", "iterations", "split"} <= set(first)
    assert [(run["seed"], run["beta"]) for run in first["runs"]] == [(0, 10.0), (0, 0.0), (1, 10.0), (1, 0.0)]
    assert ["detectors" in run for run in first["runs"]] == [True, False, True, False]
    cells = ["TollDetector, defaults", "50.0 ± 0.0", "", "", "50.0", "50.0", "2"]
    assert cells in map(_cells, first["table"].splitlines())
    assert (tmp_path / "runs/arrhythmia/paper.png").stat().st_size > 10_000
    assert len(list((tmp_path / "runs/arrhythmia").glob("*.pt"))) == 4
    capsys.readouterr()
    paper(**arrhythmia, mode="eval")
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == first["runs"]
    paper(**arrhythmia | {"seeds": 3}, mode="eval")
    # What is missing is said.
    assert "class0_seed2 (beta 10), class0_seed2 (beta 0)" in capsys.readouterr().out
    paper(**arrhythmia | {"seeds": 1})
    assert "2 of 2 runs are in" in capsys.readouterr().out
    paper(**arrhythmia, twin=False)
    assert "2 of 2 runs are in" in capsys.readouterr().out
    alone = json.loads((tmp_path / "out.json").read_text())
    assert alone["runs"] == first["runs"][::2]
    assert "beta 0" not in alone["table"]
    # Other data are other runs.
    write_arrhythmia(tmp_path / "ODDS", tmp_path / "splits", seed=1)
    load.cache_clear()
    paper(**arrhythmia | {"seeds": 1})
    assert "are in" not in capsys.readouterr().out


def test_the_command_on_images(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("TOLL_DATA_ROOT", str(tmp_path))
    paper(
        "mnist",
        classes="2",
        seeds=1,
        iterations=2,
        batch_size=3,
        validate_every=1,
        validation_size=40,
        runs=tmp_path / "runs",
        output=tmp_path / "out.json",
    )
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["split"] == "drawn"
    assert [step["step"] for step in record["runs"][0]["trace"]] == [1, 2]
    lines = record["table"].splitlines()
    names = [_cells(line)[0] for line in lines[2:5]]
    assert names == ["2", "mean over the classes that were run (1)", "gain over beta 0: one class"]
    assert "A reduced budget" in record["table"]
    assert "MemAE 97.5" in record["table"]
    with pytest.raises(SystemExit, match="1"):  # a class that is too small is left out, and said to be
        paper(
            "mnist",
            classes="2",
            seeds=1,
            batch_size=50,
            validation_size=40,
            runs=tmp_path / "runs",
            output=tmp_path / "out.json",
        )
    text = (tmp_path / "out.json").read_text()
    assert "Failed, and left out: class 2, beta 0: ValueError: batch_size must be at most" in text
    assert "; class 2: ValueError: batch_size must be at most" in text


def test_a_small_validation_holds_every_class(tmp_path):
    labels = write_mnist(tmp_path)["train_labels"]
    by_class = np.argsort(labels, kind="stable")  # as the authors' indices of Fashion-MNIST
    np.save(tmp_path / "10000_val_indices_mnist.npy", by_class)
    data, _ = load("mnist", tmp_path, tmp_path, 40)
    assert len(data["val_indices"]) == 40
    assert set(labels[data["val_indices"]]) == set(range(10))
    np.testing.assert_array_equal(data["held_out"], by_class)
    whole, _ = load("mnist", tmp_path, tmp_path, 10_000)
    np.testing.assert_array_equal(whole["val_indices"], by_class)


def _finished(c, seed, *values, **more):
    """A run as a record has it; ``values`` are the protocols' test metrics."""
    chosen = {name: {"step": 20, "total": v} for name, v in zip(protocol.PROTOCOLS, values, strict=True)}
    times = {"seconds": {"training": 3.0}, "device": "cpu", "threads": 1}
    return {"class": c, "seed": seed, "protocols": chosen, **times, **more}


def _record(name, **more):
    return {"dataset": name, **asdict(protocol.SETTINGS[name]), "validation_size": 10_000, "split": "authors", **more}


#: As records had them before there were twins.
OLD = [
    _finished(0, 0, 0.9, 0.8, 0.3, 0.7),
    _finished(0, 1, 0.8, 0.8, 0.3, 0.9),
    _finished(2, 0, 0.5, 0.6, 0.2, 0.7),
    {"class": 1, "seed": 0, "error": "x"},
]


def test_table_by_hand():
    record = _record("mnist")
    del record["width"]
    lines = make_table(record, OLD).splitlines()
    assert [_cells(line) for line in lines[2:5]] == [
        ["0", "85.0 ± 5.0", "80.0 ± 0.0", "30.0 ± 0.0", "80.0 ± 10.0", "2"],
        ["2", "50.0", "60.0", "20.0", "70.0", "1"],
        ["mean over the classes that were run (2)", "67.5", "70.0", "25.0", "75.0", ""],
    ]
    assert lines[5] == ""
    assert lines[6].startswith("The authors' full budget: 2000 iterations of 1000, beta 1000")
    reduced = make_table(record | {"validation_size": 2000}, []).splitlines()
    assert reduced[0].startswith("A reduced budget, not the authors': 2000 iterations")
    assert reduced[0].endswith("on 2000 of the authors' 10 000, single precision.")  # and no times of no runs


def test_gains_over_the_twins_by_hand():
    twins = [
        _finished(0, 0, 0.8, 0.8, 0.4, 0.5, beta=0.0),
        _finished(0, 1, 0.9, 0.7, 0.4, 0.5, beta=0.0),
        _finished(2, 0, 0.3, 0.6, 0.1, 0.4, beta=0.0),
        _finished(1, 0, 0.1, 0.1, 0.1, 0.1, beta=0.0),  # the run beside it has failed
        {"class": 2, "seed": 1, "error": "y", "beta": 0.0},
    ]
    table = make_table(_record("mnist"), [*OLD, *twins])
    lines = [_cells(line) for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == [
        "normal class, test AUROC in %",
        "labelled choice (the authors')",
        "beta 0, labelled",
        "label-free choice",
        "beta 0, label-free",
        "lowest held-out loss",
        "beta 0, held-out loss",
        "last step",
        "beta 0, last step",
        "seeds",
    ]
    pairs = ["85.0 ± 5.0", "85.0 ± 5.0", "80.0 ± 0.0", "75.0 ± 5.0", "30.0 ± 0.0", "40.0 ± 0.0"]
    pairs += ["80.0 ± 10.0", "50.0 ± 0.0"]
    assert lines[2:5] == [
        ["0", *pairs, "2"],
        ["1", "", "10.0", "", "10.0", "", "10.0", "", "10.0", "0, beta 0: 1"],
        ["2", "50.0", "30.0", "60.0", "60.0", "20.0", "10.0", "70.0", "40.0", "1"],
    ]
    # Beta 0, labelled: the mean of 85, 10 and 30.
    mean = ["67.5 (2 of them)", "41.7", "70.0 (2 of them)", "48.3", "25.0 (2 of them)", "20.0", "75.0 (2 of them)"]
    assert lines[5] == ["mean over the classes that were run (3)", *mean, "33.3", ""]
    # Class 0 gains 0, 5, -10 and 30, the means of (10, -10), (0, 10), (-10, -10) and (20, 40); class 2 gains
    # 20, 0, 10 and 30. The standard error of two values is half of their distance.
    gains = ["+10.0 ± 10.0", "", "+2.5 ± 2.5", "", "+0.0 ± 10.0", "", "+30.0 ± 0.0", ""]
    assert lines[6] == ["gain over beta 0: mean ± standard error over 2 classes", *gains, ""]
    assert "without the latent term. Gains are paired by class and seed" in table
    one = make_table(_record("mnist"), [OLD[0], twins[0]])
    assert "| gain over beta 0: one class" in one
    assert "+10.0  " in one
    both_failed = make_table(_record("mnist"), [{"class": 0, "seed": 0, "error": "x"}, twins[3]])
    assert "gain" not in both_failed.partition("\n\n")[0]  # no pair


def test_gains_on_arrhythmia_by_hand():
    runs = [
        _finished(0, seed, value, 0.5, 0.5, 0.5, beta=10.0, detectors={"TollDetector, defaults": 0.5})
        for seed, value in enumerate((0.6, 0.8, 0.7))
    ]
    runs += [_finished(0, seed, value, 0.5, 0.5, 0.4, beta=0.0) for seed, value in enumerate((0.5, 0.5))]
    table = make_table(_record("arrhythmia"), runs)
    lines = [_cells(line) for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["how", "test F1, %", "beta 0", "gain ± standard error", "smallest", "largest", "seeds"]
    assert lines[2] == [
        "labelled choice (the authors')",
        "70.0 ± 8.2",
        "50.0 ± 0.0",
        "+20.0 ± 10.0",
        "60.0",
        "80.0",
        "3",
    ]
    assert lines[5] == ["last step", "50.0 ± 0.0", "40.0 ± 0.0", "+10.0 ± 0.0", "50.0", "50.0", "3"]
    assert lines[6] == ["TollDetector, defaults", "50.0 ± 0.0", "", "", "50.0", "50.0", "3"]
    assert "Gains are paired by seed; their standard error is over seeds." in table


def test_a_table_says_that_a_network_is_not_the_authors():
    table = make_table(_record("mnist", width=0.25), OLD)
    assert table.startswith("| normal class, test AUROC in % (width 0.25) ")
    assert "\n\nNarrow network (width 0.25), not the authors'. The authors' full budget: 2000" in table
    assert "Wide network (width 2), not the authors'." in make_table(_record("arrhythmia", width=2), [])
    rows = [_finished(0, 0, 0.5, 0.5, 0.5, 0.5)]
    assert make_table(_record("arrhythmia", width=0.5), rows).startswith("| how (width 0.5) ")


def _sees(monkeypatch, settings, parts, normal_class):
    """Initial weights and batches of a run, as its network gets them."""
    seen, build = [], protocol.initial_network

    def watched(*arguments):
        network = build(*arguments)
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        network.register_forward_pre_hook(lambda module, x: seen.append(x[0].clone()) if module.training else None)
        return network

    monkeypatch.setattr(training, "initial_network", watched)
    result, weights = training.train(parts, settings, 1, normal_class, device="cpu")
    monkeypatch.setattr(training, "initial_network", build)
    return seen[0], seen[1:], result, weights


@pytest.mark.parametrize("width", [1.0, 0.1])
@pytest.mark.parametrize("name", ["mnist", "arrhythmia"])
def test_a_twin_begins_with_the_same_weights_and_sees_the_same_batches(name, width, tmp_path, monkeypatch):
    settings = replace(protocol.SETTINGS[name], iterations=3, validate_every=1, batch_size=3, width=width)
    mine, twin = _with_twin(settings, twin=True)
    assert twin == replace(mine, beta=0.0)
    if name == "mnist":
        written = write_mnist(tmp_path)
        data = {key: value[:, None] if value.ndim == 3 else value for key, value in written.items()}
        parts = studied.image_parts(data | {"held_out": np.arange(40), "val_indices": np.arange(40)}, settings, 2)
    else:
        parts = _parts()
    runs = [_sees(monkeypatch, each, parts, 0 if name == "arrhythmia" else 2) for each in (mine, twin)]
    (weights, batches, result, trained), (others, other_batches, other, otherwise) = runs
    assert list(weights) == list(others)
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert len(batches) == len(other_batches) == 3
    assert all(torch.equal(a, b) for a, b in zip(batches, other_batches, strict=True))
    assert not torch.equal(batches[0], batches[1])
    assert [step["step"] for step in result["trace"]] == [step["step"] for step in other["trace"]] == [1, 2, 3]
    # The weight of the latent term alone differs: the first loss by beta times the mean norm, and what is learned.
    network = protocol.initial_network(mine, 1, 0 if name == "arrhythmia" else 2)
    network.load_state_dict(weights)
    with torch.no_grad():
        _, z = network.train()(batches[0])
    gap = result["trace"][0]["batch_loss"] - other["trace"][0]["batch_loss"]
    assert gap == pytest.approx(settings.beta * np.mean([float((row**2).sum()) ** 0.5 for row in z]), rel=1e-4)
    assert any(not torch.equal(trained[3][key], otherwise[3][key]) for key in weights)


def test_runs_with_beta_0_have_no_twin():
    assert _with_twin(replace(DENSE, beta=0.0), twin=True) == [replace(DENSE, beta=0.0)]
    assert _with_twin(DENSE, twin=False) == [DENSE]


def test_flags_of_twin_and_width_in_a_command_and_in_yaml(arrhythmia, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.studies.paper._detectors", lambda *_: {})
    given = {key: str(value) if isinstance(value, Path) else value for key, value in arrhythmia.items()}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(given | {"width": 0.1, "seeds": 1}))
    for flags, betas in (([], [10.0, 0.0]), (["--twin", "false"], [10.0])):
        monkeypatch.setattr("sys.argv", ["benchmarks", "paper", "--config", str(tmp_path / "paper.yaml"), *flags])
        main()
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["width"] == 0.1
        assert [run["beta"] for run in record["runs"]] == betas
    words = ["benchmarks", "paper", "--config", str(tmp_path / "paper.yaml"), "--width", "0.2", "--mode", "eval"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(FileNotFoundError, match="no run of these settings is finished in"):
        main()
    monkeypatch.setattr("sys.argv", [*words[:4], "--mode", "eval"])
    main()  # weights of a narrow network are scored by one
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == 2


@pytest.mark.usefixtures("arrhythmia")
def test_a_worker_refuses_other_files_than_the_command_has_read(tmp_path):
    source = ("arrhythmia", tmp_path / "ODDS", tmp_path / "splits", 2)
    _, digest = load(*source)
    write_arrhythmia(tmp_path / "ODDS", tmp_path / "splits", seed=1)
    assert _same(source, digest)  # as it was read
    load.cache_clear()
    with pytest.raises(ValueError, match=f"is not what the command was given: its digest is .*, not {digest}"):
        _same(source, digest)


def test_dask_workers_give_what_this_process_gives(tmp_path, monkeypatch):
    from dask.distributed import LocalCluster

    write_mnist(tmp_path)
    arguments = {"dataset": "mnist", "root": tmp_path, "classes": "2", "seeds": 2, "output": tmp_path / "out.json"}
    arguments |= {"iterations": 2, "batch_size": 3, "validate_every": 1, "validation_size": 40, "width": 0.05}
    monkeypatch.setattr("benchmarks.studies.paper.find_spec", lambda _: None)
    monkeypatch.setattr("benchmarks.studies.training.threads_each", lambda _: 1)  # as on a worker: sums depend on it
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        paper(**arguments, runs=tmp_path / "there", jobs=-1, scheduler=cluster.scheduler_address)
    theirs = json.loads((tmp_path / "out.json").read_text())["runs"]
    paper(**arguments, runs=tmp_path / "here")
    ours = json.loads((tmp_path / "out.json").read_text())["runs"]
    for there, here in zip(theirs, ours, strict=True):
        assert there["protocols"] == here["protocols"]


def test_rules_choose_by_hand():
    trace = [
        {"validation": 0.9, "total": 3.0, "test": 0.1},
        {"validation": 0.8, "total": 1.0, "test": 0.2},
        {"validation": 0.7, "total": 2.0, "test": 0.3},
    ]
    trace = [step | dict.fromkeys(("reconstruction", "latent", "spread", "tail", "synthetic"), 1.0) for step in trace]
    chosen = judge(trace)
    assert chosen["labelled"] == 0.1
    assert chosen["held-out loss"] == 0.2
    assert chosen["last step"] == 0.3
    assert set(chosen) == set(RULES)


def test_spliced_samples_are_made_of_two():
    rng = np.random.default_rng(0)
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 1, 8, 8)
    for i, image in enumerate(splice(images, rng)):
        values = image.unique().tolist()
        assert i in values
        assert len(values) <= 2
        assert (image == i).float().mean() >= 0.75
    rows = torch.arange(4.0)[:, None].expand(-1, 9)
    for i, row in enumerate(splice(rows, rng)):
        assert (row == i).sum() in (6, 9)


def test_the_study_runs(tmp_path):
    write_arrhythmia(tmp_path / "ODDS", tmp_path / "splits")
    stopping(
        roots=[tmp_path / "ODDS"],
        splits=tmp_path / "splits",
        names=("arrhythmia",),
        classes=(1,),
        seeds=1,
        iterations=30,
        jobs=1,
        runs=tmp_path / "runs",
        output=tmp_path / "stopping.json",
    )
    record = json.loads((tmp_path / "stopping.json").read_text())
    assert "digits, beta 0.01" in record["table"]
    assert "Arrhythmia, authors' network" in record["table"]


def test_the_networks_are_those_of_the_settings():
    for settings in protocol.SETTINGS.values():
        network = settings.build()
        assert isinstance(network, DenseAutoencoder) == (settings.network == "dense")
        _, z = network.eval()(torch.zeros(2, *(network.input_shape or (274,))))
        assert z.shape == (2, settings.latent_dim)
        assert "width" not in settings.configuration()
        assert replace(settings, width=0.5).configuration() == settings.configuration() | {"width": 0.5}
    assert replace(DENSE, width=0.1).build().arguments["hidden_sizes"] == [26, 13]
