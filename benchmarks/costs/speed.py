"""TollDetector's hot paths beside PyOD's AutoEncoder, onnxruntime and a plain torch loop."""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.run.records import RESULTS, finish, provenance

#: Name, features, hidden sizes, latent, batch size: the networks of the comparison.
NETS = {
    "100-64-32, batch 32": (100, (64,), 32, 32),
    "100-64-32, batch 1024": (100, (64,), 32, 1024),
    "274-256-128-16, batch 100": (274, (256, 128), 16, 100),
}

#: One network as the others train it, for as many epochs as they do.
PLAIN = {"n_members": 1, "noise": 0.0, "metric": "euclidean", "max_steps": None}


def median_seconds(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns, after one run of each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _silent(run: Callable[[], Any]) -> Callable[[], Any]:
    def quiet() -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run()

    return quiet


def _pair(net: str, epochs: int) -> tuple[Any, Any]:
    """The same network in both: BatchNorm, dropout 0.2, Adam, MSE's or the norm's gradient."""
    from pyod.models.auto_encoder import AutoEncoder

    from toll_plugin.pyod import TollDetector

    _, hidden, latent, batch = NETS[net]
    toll = TollDetector(
        hidden_sizes=hidden,
        latent_dim=latent,
        batch_size=batch,
        dropout=0.2,
        epochs=epochs,
        **PLAIN,
    )
    pyod = AutoEncoder(hidden_neuron_list=[*hidden, latent], batch_size=batch, epoch_num=epochs, verbose=0)
    return toll, pyod


def _rows(count: int, features: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).normal(size=(count, features))


def _fit(rows: int, epochs: int, repeats: int) -> list[str]:
    lines = []
    for net, (features, *_) in NETS.items():
        x = _rows(rows, features)
        toll, pyod = _pair(net, epochs)
        taken = median_seconds(
            {"toll": lambda x=x, d=toll: d.fit(x), "pyod": _silent(lambda x=x, d=pyod: d.fit(x))}, repeats
        )
        lines.append(_line(f"`fit`, {net}, {rows} rows", taken["pyod"], taken["toll"], "PyOD AutoEncoder"))
    return lines


def _line(what: str, other: float, ours: float, whom: str, unit: float = 1000.0, name: str = "ms") -> str:
    return f"| {what} | {whom} | {other * unit:.4g} {name} | {ours * unit:.4g} {name} | {other / ours:.2f} |"


def _score(rows: int, repeats: int) -> list[str]:
    import onnxruntime

    from toll_plugin.pyod import TollDetector

    net = "100-64-32, batch 32"
    x = _rows(rows, 100)
    toll, pyod = _pair(net, 1)
    toll.fit(x[:2000])
    _silent(lambda: pyod.fit(x[:2000]))()
    default = TollDetector(max_steps=20).fit(x[:2000])
    taken = median_seconds(
        {
            "toll": lambda: toll.decision_function(x),
            "default": lambda: default.decision_function(x),
            "pyod": _silent(lambda: pyod.decision_function(x)),
        },
        repeats,
    )
    lines = [
        _line(f"`decision_function`, {rows} rows, 100-64-32", taken["pyod"], taken["toll"], "PyOD AutoEncoder"),
        _line(
            f"the same, TollDetector's defaults ({default.n_members} members, metric)",
            taken["pyod"],
            taken["default"],
            "PyOD AutoEncoder",
        ),
    ]

    one = x[:1]
    with tempfile.TemporaryDirectory() as folder:
        toll.to_onnx(Path(folder) / "toll.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(Path(folder) / "toll.onnx", options, providers=["CPUExecutionProvider"])

    def many(run: Callable[[], Any], times: int) -> Callable[[], Any]:
        def loop() -> None:
            for _ in range(times):
                run()

        return loop

    times = 200
    taken = median_seconds(
        {
            "toll": many(lambda: toll.decision_function(one), times),
            "pyod": _silent(many(lambda: pyod.predict(one), times)),
            "onnx": many(lambda: session.run(None, {"X": one}), times),
        },
        repeats,
    )
    micro = 1e6 / times
    lines += [
        _line("one row", taken["pyod"], taken["toll"], "PyOD AutoEncoder's `predict`", micro, "us"),
        _line("one row", taken["onnx"], taken["toll"], "onnxruntime, the exported graph", micro, "us"),
    ]
    return lines


def _plain_loop(x: Any, hidden: tuple[int, ...], latent: int, batch: int, epochs: int) -> None:
    """One network, the way a torch tutorial trains it."""
    import torch

    from toll_plugin.core import DenseAutoencoder, TollLoss

    rows = torch.from_numpy(x).float()
    network, loss = DenseAutoencoder(rows.shape[1], hidden, latent), TollLoss(0.1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.train()
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(rows)), batch):
            part = rows[index]
            value = loss(part, *network(part))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


def _members(rows: int, epochs: int, repeats: int) -> list[str]:
    from toll_plugin.pyod import TollDetector

    lines = []
    for features, hidden, latent, batch in ((20, (64,), 32, 32), (274, (256, 128), 16, 100)):
        x = _rows(rows, features)
        ten = TollDetector(
            hidden_sizes=hidden,
            latent_dim=latent,
            batch_size=batch,
            epochs=epochs,
            **PLAIN | {"n_members": 10},
        )
        taken = median_seconds(
            {
                "ten": lambda x=x, ten=ten: ten.fit(x),
                "plain": lambda x=x, n=(hidden, latent, batch): _plain_loop(x, *n, epochs),
            },
            repeats,
        )
        net = "-".join(map(str, (features, *hidden, latent)))
        lines.append(
            _line(f"ten members, {net}, batch {batch}", taken["plain"], taken["ten"], "one network, plain torch loop")
        )
    return lines


def _own_modules(rows: int, epochs: int, repeats: int) -> list[str]:
    from torch import nn

    from toll_plugin.core import DenseAutoencoder
    from toll_plugin.pyod import TollDetector

    x, twin = _rows(rows, 100), DenseAutoencoder(100, (64,), 32)
    own = TollDetector(
        encoder=nn.Sequential(*twin.encoder),
        decoder=nn.Sequential(*twin.decoder),
        batch_size=128,
        preprocessing="none",
        epochs=epochs,
        **PLAIN,
    )
    taken = median_seconds(
        {"own": lambda: own.fit(x), "plain": lambda: _plain_loop(x, (64,), 32, 128, epochs)}, repeats
    )
    return [_line("`fit` of your own modules, 100-64-32, batch 128", taken["plain"], taken["own"], "plain torch loop")]


MEMORY = """
    import contextlib, io, resource, sys, threading, time
    import numpy as np

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    if sys.argv[1] == "toll":
        from toll_plugin.pyod import TollDetector
        make = lambda: TollDetector(max_steps=300)
    else:
        from pyod.models.auto_encoder import AutoEncoder
        make = lambda: AutoEncoder(epoch_num=1, batch_size=8192, verbose=0)
    x = np.random.default_rng(0).standard_normal((int(sys.argv[2]), 100), dtype=np.float32)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make().fit(x[:20000]).decision_function(x[:2000])  # loads what is loaded once
        before, peak, done = resident(), 0, False

        def watch():
            global peak
            while not done:
                peak = max(peak, resident())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        make().fit(x).decision_function(x)
        done = True
        watcher.join()
    print((peak - before) / x.nbytes)
"""


def _memory(rows: int) -> list[str]:
    shares = {}
    for whom in ("pyod", "toll"):
        done = subprocess.run(  # noqa: S603  this interpreter, the text above
            [sys.executable, "-c", textwrap.dedent(MEMORY), whom, str(rows)], capture_output=True, text=True, check=True
        )
        shares[whom] = float(done.stdout)
    what = f"extra peak memory of `fit` and `decision_function`, {rows} x 100 float32"
    pyod, toll = shares["pyod"], shares["toll"]
    return [f"| {what} | PyOD AutoEncoder | {pyod:.2f} of the data | {toll:.2f} of the data | {pyod / toll:.1f} |"]


def _until(roots: list[Path], names: list[str], steps: tuple[int, ...]) -> list[str]:
    """Fit time until the AutoEncoder's own AUROC is reached, defaults of both."""
    import numpy as np
    from pyod.models.auto_encoder import AutoEncoder
    from sklearn.metrics import roc_auc_score

    from benchmarks.data.tables import halves, load
    from toll_plugin.pyod import TollDetector

    lines, ratios, missed = [], [], []
    for name in names:
        train, test, y = halves(*load(name, roots), seed=0)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            start = time.perf_counter()
            pyod = AutoEncoder(verbose=0).fit(train)
            theirs = time.perf_counter() - start
            goal = roc_auc_score(y, np.nan_to_num(pyod.decision_function(test)))
        for count in steps:
            start = time.perf_counter()
            toll = TollDetector(max_steps=count).fit(train)
            ours = time.perf_counter() - start
            if roc_auc_score(y, toll.decision_function(test)) >= goal:
                ratios.append(theirs / ours)
                lines.append(
                    _line(
                        f"fit until AUROC {goal:.3f} on {name} ({count} steps)",
                        theirs,
                        ours,
                        "PyOD AutoEncoder",
                        1,
                        "s",
                    )
                )
                break
        else:
            missed.append(name)
    if ratios:
        text = f", not reached on {', '.join(missed)}" if missed else ""
        lines.append(
            f"| median of these {len(ratios)}{text} | PyOD AutoEncoder | | | {statistics.median(ratios):.1f} |"
        )
    return lines


def speed(
    rows: int = 10_000,
    epochs: int = 2,
    repeats: int = 5,
    memory_rows: int = 1_000_000,
    roots: list[Path] | None = None,
    names: list[str] | None = None,
    output: Path = RESULTS / "speed.json",
) -> None:
    """Times side by side, in turns, one thread, medians; the last column is the others' over ours.

    Args:
        rows: Rows of the fits.
        epochs: Their epochs.
        repeats: Runs of each, after one that is not counted.
        memory_rows: Rows of the memory comparison; 0 leaves it out.
        roots: Folders with tables, for the time until an AUROC is reached; without any it is left out.
        names: Which tables; by default those of `tables`.
        output: Where the record goes.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from benchmarks.data.tables import CHECK

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = {"command": "speed", **provenance(), "rows": rows, "epochs": epochs, "repeats": repeats}
    with threadpool_limits(1):
        lines = [
            "| what | beside | theirs | ours | theirs / ours |",
            "|---|---|---|---|---|",
            *_fit(rows, epochs, repeats),
            *_members(rows // 5, epochs, repeats),
            *_own_modules(rows // 2, epochs, repeats),
            *_score(rows, repeats),
            *(_memory(memory_rows) if memory_rows else []),
            *(_until(roots, names or list(CHECK), (25, 50, 100, 200, 400, 800, 1600, 3200)) if roots else []),
        ]
    finish(output, {**record, "table": "\n".join(lines)})
