"""What a detector leaves on disk: saved, tampered with, interrupted, exported."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors
import safetensors.numpy
import torch
from detector_contract import OTHER, X, same
from sklearn.preprocessing import StandardScaler
from torch import nn

from toll_plugin.pyod import TollDetector, persistence


def make(**parameters) -> TollDetector:
    return TollDetector(**{"max_steps": 25, "n_members": 2, "hidden_sizes": (16, 8), "latent_dim": 4} | parameters)


@pytest.fixture
def saved() -> Path:
    make().fit(X).save("detector.toll")
    return Path("detector.toll").absolute()


def test_everything_comes_back():
    frame = pd.DataFrame(X, columns=list("abcdef"))
    detector = make(validation_fraction=0.2, beta=0.5, contamination=np.float32(0.2), device=torch.device("cpu"))
    detector.fit(frame).save("detector.toll")
    loaded = TollDetector.load("detector.toll")
    named = pd.DataFrame(OTHER, columns=list("abcdef"))
    for method in ("decision_function", "predict", "predict_proba", "predict_confidence", "predict_with_rejection"):
        np.testing.assert_array_equal(getattr(loaded, method)(named), getattr(detector, method)(named))
    for name in ("decision_scores_", "labels_", "threshold_", "feature_names_in_", "n_features_in_", "best_epoch_"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(detector, name))
    assert loaded.history_.keys() == detector.history_.keys()
    assert loaded.get_params() | {"contamination": None, "device": None} == detector.get_params() | {
        "contamination": None,
        "device": None,
    }
    np.testing.assert_array_equal(
        loaded.fit(frame).decision_function(named), detector.fit(frame).decision_function(named)
    )


def test_a_file_of_format_1_is_read():
    """Written by 0.1.0 before the score's term could be chosen."""
    loaded = TollDetector.load(Path(__file__).parent / "data/detector_0.1.0.toll")
    scores = loaded.decision_function(np.linspace(-2, 2, 12).reshape(3, 4))
    expected = [3.239075499920327, 0.8918059896366245, 2.7372083413684547]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert loaded.score_term == "total"
    assert len(loaded.partial_fit(np.zeros((5, 4))).decision_scores_) == 5


def test_training_goes_on_after_loading(saved):
    loaded, twin = TollDetector.load(saved), make().fit(X)
    assert same(loaded.partial_fit(OTHER), twin.partial_fit(OTHER))


def test_the_file_holds_no_code(saved):
    with safetensors.safe_open(str(saved), framework="numpy") as file:
        header = file.metadata()
        assert header["format"] == "3"
        assert json.loads(header["config"])["n_features_in_"] == 6
    assert not zipfile.is_zipfile(saved)
    assert b"toll_plugin.pyod" not in saved.read_bytes()  # as a pickle would


def test_a_detector_trained_elsewhere_loads_here():
    make().fit(X).set_params(device="cuda").save("detector.toll")
    loaded = TollDetector.load("detector.toll")
    assert loaded.device == "cuda"
    loaded.decision_function(OTHER)


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.99])
def test_a_changed_file_is_refused(saved, where):
    content = bytearray(saved.read_bytes())
    content[int(where * len(content))] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"detector\.toll"):
        TollDetector.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"detector\.toll' is no detector that was saved here, or is cut off"):
        TollDetector.load(saved)


def test_other_files_are_refused(saved):
    safetensors.numpy.save_file({"a": np.zeros(2)}, "other.toll")
    with pytest.raises(ValueError, match=r"other\.toll' is a safetensors file, but no detector"):
        TollDetector.load("other.toll")
    with pytest.raises(FileNotFoundError):
        TollDetector.load("nowhere.toll")
    header, arrays = persistence._read(saved)
    safetensors.numpy.save_file(arrays, "later.toll", header | {"format": "4", "written by": "toll-plugin 9"})
    with pytest.raises(ValueError, match=r"format 4, written by toll-plugin 9; this version reads formats 1 to 3"):
        TollDetector.load("later.toll")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_what_was_there(saved, monkeypatch, failure):
    before = saved.read_bytes()

    def breaks(_, path, *__):
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(safetensors.numpy, "save_file", breaks)
    with pytest.raises(failure):
        make().fit(OTHER).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["detector.toll"]


def test_a_link_keeps_pointing_to_what_is_saved(saved):
    Path("link.toll").symlink_to(saved)
    make().fit(OTHER).save("link.toll")
    assert Path("link.toll").is_symlink()
    assert same(TollDetector.load(saved), make().fit(OTHER))


def test_a_folder_is_no_file():
    Path("folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"path must be a file, but .*folder' is a folder"):
        make().fit(X).save("folder")


class _Small(TollDetector):
    """A subclass with a constructor of its own."""

    def __init__(self, contamination=0.1):
        super().__init__(contamination, max_steps=20, n_members=1)


def test_a_subclass_loads_as_itself():
    detector = _Small().fit(X)
    detector.save("small.toll")
    loaded = _Small.load("small.toll")
    assert type(loaded) is _Small
    assert same(loaded, detector)


def test_what_is_saved_is_what_was_fitted():
    detector = make(hidden_sizes=np.array([16, 8])).fit(X)
    twin = make().fit(X)
    detector.set_params(n_members=5, latent_dim=9)
    detector.save("detector.toll")
    state = torch.get_rng_state()
    loaded = TollDetector.load("detector.toll")
    assert same(loaded, twin)
    assert list(loaded.history_) == list(twin.history_)
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_where_no_folder_is():
    with pytest.raises(FileNotFoundError):
        make().fit(X).save("nowhere/detector.toll")


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"preprocessing": StandardScaler()}, "preprocessing"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}, "optimizer"),
        ({"random_state": np.random.RandomState(0)}, "random_state"),
    ],
)
def test_what_would_need_code_is_refused_by_name(parameters, name):
    with pytest.raises(TypeError, match=f"{name} must be .* saved without code, got .* pickle the detector instead"):
        make(**parameters).fit(X).save("detector.toll")
    assert not Path("detector.toll").exists()


def test_own_modules_are_handed_in_again():
    own = {"encoder": nn.Linear(6, 2), "decoder": nn.Linear(2, 6)}
    detector = make(n_members=1, **own).fit(X)
    detector.save("detector.toll")
    fresh = {"encoder": nn.Linear(6, 2), "decoder": nn.Linear(2, 6)}
    assert same(TollDetector.load("detector.toll", **fresh), detector)
    with pytest.raises(ValueError, match=r"encoder must match the detector .* pass encoder"):
        TollDetector.load("detector.toll")
    with pytest.raises(ValueError, match="encoder and decoder must be those that were saved"):
        TollDetector.load("detector.toll", encoder=nn.Linear(6, 3), decoder=nn.Linear(3, 6))
    make().fit(X).save("plain.toll")
    with pytest.raises(ValueError, match=r"encoder must match the detector .* do not pass encoder"):
        TollDetector.load("plain.toll", **fresh)


def test_loading_in_another_process(saved):
    code = f"""
        import numpy as np
        from toll_plugin.pyod import TollDetector
        print(TollDetector.load({str(saved)!r}).decision_scores_.tobytes().hex())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == make().fit(X).decision_scores_.tobytes().hex()


# -- ONNX --------------------------------------------------------------------------------------


def scored(path, rows):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["X"]
    return session.run(["score"], {"X": rows})[0]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"metric": "euclidean", "exponent": 2, "n_members": 1, "score_scale": "none", "beta": 0.1},
        {"n_members": 3, "n_collapsed": 3, "score_term": "latent"},
        {"latent_dim": 80},  # more than rows
        {"preprocessing": "none", "batch_norm": False, "dropout": 0.2},
        {
            "encoder": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)),
            "decoder": nn.Linear(2, 6),
            "n_members": 1,
        },
    ],
    ids=["default", "paper", "latent", "wide", "raw", "own"],
)
def test_the_graph_scores_as_the_detector_does(parameters):
    detector = make(**parameters).fit(X)
    detector.to_onnx("detector.onnx")
    rows = np.vstack([X, OTHER, X * 1e3, OTHER * 1e6])
    np.testing.assert_allclose(scored("detector.onnx", rows), detector.decision_function(rows), rtol=1e-5)
    np.testing.assert_allclose(scored("detector.onnx", rows[:1]), detector.decision_function(rows[:1]), rtol=1e-5)


def test_units_are_part_of_the_graph():
    table = X * np.array([1e-30, 1e30, 1.0, 1e9, 1e-9, 1.0]) + np.array([0, 0, 1e9, 0, 0, 0])
    detector = make().fit(table)
    detector.to_onnx("detector.onnx")
    np.testing.assert_allclose(scored("detector.onnx", table), detector.decision_scores_, rtol=1e-5)


def test_no_graph_for_a_transformer(monkeypatch):
    with pytest.raises(TypeError, match="preprocessing must be 'robust', 'standard' or 'none' for to_onnx"):
        make(preprocessing=StandardScaler()).fit(X).to_onnx("detector.onnx")
    assert not Path("detector.onnx").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'to_onnx needs onnxscript: pip install "toll-plugin\[export\]"'):
        make().fit(X).to_onnx("detector.onnx")
