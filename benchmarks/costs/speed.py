"""TollDetector's hot paths beside PyOD's AutoEncoder, onnxruntime and a plain torch loop."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.quiet import apart
from benchmarks.run.measure import in_new_process, median_seconds, peak_memory
from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown

#: Features, hidden sizes, latent and batch size of the networks of the comparison.
NETS = {
    "100-64-32, batch 32": (100, (64,), 32, 32),
    "100-64-32, batch 1024": (100, (64,), 32, 1024),
    "274-256-128-16, batch 100": (274, (256, 128), 16, 100),
}

#: One network as the others train it, for as many epochs as they do.
PLAIN = {"n_members": 1, "beta": 0.1, "score_scale": "none", "metric": "euclidean", "max_steps": None, "lr": 1e-3}

#: What is aimed at: times as fast as PyOD's fit of the same network, and seconds of default fits by their rows.
GOALS = {"100-64-32, batch 32": "6", "100-64-32, batch 1024": "4", "274-256-128-16, batch 100": "3"}
_SECONDS = {500: 1, 100_000: 10}

#: Steps of TollDetector until an AUROC is reached.
STEPS = (25, 50, 100, 200, 400, 800, 1600, 3200)

Row = dict[str, str]


def row(
    what: str,
    whom: str,
    theirs: float,
    ours: float,
    unit: str = "ms",
    scale: float = 1000.0,
    *,
    goal: str = "",
    products: float = 0.0,
) -> Row:
    """A line of the table: seconds of both and of our products alone, shown as ``scale`` times as many of ``unit``."""
    found = {
        "what": what,
        "beside": whom,
        "theirs": f"{theirs * scale:.4g} {unit}",
        "ours": f"{ours * scale:.4g} {unit}",
        "theirs / ours": f"{theirs / ours:.2f}",
    }
    if goal:
        found["goal"] = goal
    if products:
        found["products alone"] = f"{products * scale:.4g} {unit}"
    return found


def _timed(what: str, whom: str, theirs: Callable[[], Any], ours: Callable[[], Any], repeats: int, **more: Any) -> Row:
    taken = median_seconds({"theirs": theirs, "ours": ours}, repeats)
    return row(what, whom, taken["theirs"], taken["ours"], **more)


def _products(widths: Sequence[int], batch: int, members: int, steps: int, scored: int) -> float:
    """Seconds of the matrix products of so many steps in single precision and of scoring so many rows in double.

    Args:
        widths: Of the layers, from the inputs to the latent; the decoder mirrors them.
        batch: Rows of a step.
        members: Networks.
        steps: How many.
        scored: Rows.
    """
    import numpy as np

    draw, piece = np.random.default_rng(0), 512
    shapes = list(pairwise([*widths, *widths[-2::-1]]))

    def arrays(rows: int, kind: type) -> list[list[Any]]:
        sizes = [((members, rows, k), (members, k, n), (members, rows, n)) for k, n in shapes]
        return [[draw.normal(size=size).astype(kind) for size in layer] for layer in sizes]

    trained, evaluated = arrays(batch, np.float32), arrays(piece, np.float64)

    def step() -> None:
        for i, (x, weight, slope) in enumerate(trained):
            np.matmul(x, weight)
            np.matmul(x.swapaxes(1, 2), slope)
            if i:
                np.matmul(slope, weight.swapaxes(1, 2))

    def score() -> None:
        for x, weight, _ in evaluated:
            np.matmul(x, weight)

    taken = median_seconds({"step": step, "score": score}, 20)
    return steps * taken["step"] + scored / piece * taken["score"]


def _pair(net: str, epochs: int) -> tuple[Any, Any]:
    """The same network in both: BatchNorm, dropout 0.2, Adam, MSE's or the norm's gradient."""
    from pyod.models.auto_encoder import AutoEncoder

    from toll_plugin.pyod import TollDetector

    _, hidden, latent, batch = NETS[net]
    toll = TollDetector(hidden_sizes=hidden, latent_dim=latent, batch_size=batch, dropout=0.2, epochs=epochs, **PLAIN)
    pyod = AutoEncoder(hidden_neuron_list=[*hidden, latent], batch_size=batch, epoch_num=epochs, verbose=0)
    return toll, pyod


def _rows(count: int, features: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).normal(size=(count, features))


def _fit(rows: int, epochs: int, repeats: int) -> list[Row]:
    found = []
    for net, (features, hidden, latent, batch) in NETS.items():
        x = _rows(rows, features)
        toll, pyod = _pair(net, epochs)
        fits = (partial(pyod.fit, x), partial(toll.fit, x))
        products = _products((features, *hidden, latent), batch, 1, epochs * -(-rows // batch), rows)
        more = {"goal": GOALS[net], "products": products}
        found.append(_timed(f"`fit`, {net}, {rows} rows", "PyOD AutoEncoder", *fits, repeats, **more))
    return found


def _defaults(sizes: Sequence[tuple[int, int]], repeats: int) -> list[Row]:
    """Fits by TollDetector's defaults, in this process and as the first of another one."""
    from toll_plugin.pyod import TollDetector

    found = []
    for rows, features in sizes:
        x, size = _rows(rows, features), f"{rows} x {features}"
        seconds = median_seconds({"ours": partial(TollDetector().fit, x)}, repeats)["ours"]
        goal = {"goal": f"{_SECONDS[rows]} s"} if rows in _SECONDS else {}
        found.append({"what": f"default `fit`, {size}", "ours": f"{seconds:.3g} s", **goal})
        first = in_new_process("benchmarks.costs.speed", "first", rows, features)
        found.append({"what": "the same, the first of a process", "ours": f"{first:.3g} s", **goal})
    return found


def _first_fit(rows: int, features: int) -> float:
    """What :func:`_defaults` runs in a new process: the seconds of its first fit, imports aside."""
    from toll_plugin.pyod import TollDetector

    x = _rows(rows, features)
    start = time.perf_counter()
    TollDetector().fit(x)
    return time.perf_counter() - start


def warm(steps: int) -> None:
    """Train so many steps; after 2500 the process has its compiled loops, as one that trains for some seconds does."""
    from toll_plugin.pyod import TollDetector

    TollDetector(max_steps=steps).fit(_rows(2000, 20))


def _score(rows: int, repeats: int) -> list[Row]:
    import onnxruntime

    from toll_plugin.pyod import TollDetector

    x = _rows(rows, 100)
    toll, pyod = _pair("100-64-32, batch 32", 1)
    toll.fit(x[:2000])
    pyod.fit(x[:2000])
    default = TollDetector(max_steps=20).fit(x[:2000])
    many = median_seconds(
        {
            "toll": lambda: toll.decision_function(x),
            "default": lambda: default.decision_function(x),
            "pyod": lambda: pyod.decision_function(x),
        },
        repeats,
    )
    one, times = x[:1], 200
    with tempfile.TemporaryDirectory() as folder:
        toll.to_onnx(Path(folder) / "toll.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(Path(folder) / "toll.onnx", options, providers=["CPUExecutionProvider"])
    single = median_seconds(
        {
            "toll": lambda: [toll.decision_function(one) for _ in range(times)],
            "pyod": lambda: [pyod.predict(one) for _ in range(times)],
            "onnx": lambda: [session.run(None, {"X": one}) for _ in range(times)],
        },
        repeats,
    )
    scored = f"`decision_function`, {rows} rows, 100-64-32"
    defaults = f"the same, TollDetector's defaults ({default.n_members} members, metric)"
    each = {"unit": "us", "scale": 1e6 / times}
    products = _products((100, 64, 32), 32, 1, 0, rows)
    pyods = "PyOD AutoEncoder's `predict`"
    return [
        row(scored, "PyOD AutoEncoder", many["pyod"], many["toll"], goal="20", products=products),
        row(defaults, "PyOD AutoEncoder", many["pyod"], many["default"]),
        row("one row", pyods, single["pyod"], single["toll"], **each, goal="15"),
        row("one row", "onnxruntime, the exported graph", single["onnx"], single["toll"], **each, goal="0.62"),
    ]


def _plain_loop(x: Any, hidden: tuple[int, ...], latent: int, batch: int, epochs: int) -> Any:
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
    return network


def _members(rows: int, epochs: int, repeats: int) -> list[Row]:
    from toll_plugin.pyod import TollDetector

    found = []
    for goal, (features, hidden, latent, batch) in zip(
        ("1", "0.18"), ((20, (64,), 32, 32), (274, (256, 128), 16, 100)), strict=True
    ):
        x, settings = (
            _rows(rows, features),
            PLAIN | {"n_members": 10, "n_collapsed": 10, "batch_size": batch, "epochs": epochs},
        )
        ten = TollDetector(hidden_sizes=hidden, latent_dim=latent, **settings)
        what = f"ten members, {'-'.join(map(str, (features, *hidden, latent)))}, batch {batch}"
        fits = (partial(_plain_loop, x, hidden, latent, batch, epochs), partial(ten.fit, x))
        products = _products((features, *hidden, latent), batch, 10, epochs * -(-rows // batch), rows)
        more = {"goal": goal, "products": products}
        found.append(_timed(what, "one network, plain torch loop", *fits, repeats, **more))
    return found


def _own_modules(rows: int, epochs: int, repeats: int) -> Row:
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
    fits = (partial(_plain_loop, x, (64,), 32, 128, epochs), partial(own.fit, x))
    return _timed("`fit` of your own modules, 100-64-32, batch 128", "plain torch loop", *fits, repeats)


def _memory(rows: int, warm_steps: int) -> Row:
    pyod, toll = (in_new_process("benchmarks.costs.speed", whom, rows, warm_steps) for whom in ("pyod", "toll"))
    return {
        "what": f"extra peak memory of `fit` and `decision_function`, {rows} x 100 float32",
        "beside": "PyOD AutoEncoder",
        "theirs": f"{pyod:.2f} of the data",
        "ours": f"{toll:.2f} of the data",
        "theirs / ours": f"{pyod / toll:.1f}",
        "goal": "0.10 of the data",
    }


def _share_of_the_data(whom: str, rows: int, warm_steps: int) -> float:
    """What :func:`_memory` runs: the memory that a fit and scoring take more, in times of the data's own."""
    import numpy as np

    def make() -> Any:
        if whom == "toll":
            from toll_plugin.pyod import TollDetector

            return TollDetector()
        from pyod.models.auto_encoder import AutoEncoder

        return AutoEncoder(epoch_num=1, batch_size=8192, verbose=0)

    x = np.random.default_rng(0).standard_normal((rows, 100), dtype=np.float32)
    if whom == "toll":
        warm(warm_steps)
    make().fit(x[:20000]).decision_function(x[:2000])  # loads what is loaded once
    with peak_memory() as memory:
        make().fit(x).decision_function(x)
    return memory[0] * 1e6 / x.nbytes


def _until(roots: list[Path], names: list[str]) -> list[Row]:
    """Fit time until the AutoEncoder's own AUROC is reached, defaults of both."""
    import numpy as np
    from pyod.models.auto_encoder import AutoEncoder
    from sklearn.metrics import roc_auc_score

    from benchmarks.data.tables import halves, load
    from toll_plugin.pyod import TollDetector

    found, ratios, missed = [], [], []
    for name in names:
        train, test, y = halves(*load(name, roots), seed=0)
        start = time.perf_counter()
        pyod = AutoEncoder(verbose=0).fit(train)
        theirs = time.perf_counter() - start
        goal = roc_auc_score(y, np.nan_to_num(pyod.decision_function(test)))
        for count in STEPS:
            start = time.perf_counter()
            toll = TollDetector(max_steps=count).fit(train)
            ours = time.perf_counter() - start
            if roc_auc_score(y, toll.decision_function(test)) >= goal:
                ratios.append(theirs / ours)
                what = f"fit until AUROC {goal:.3f} on {name} ({count} steps)"
                found.append(row(what, "PyOD AutoEncoder", theirs, ours, "s", 1))
                break
        else:
            missed.append(name)
    if ratios:
        not_reached = f", not reached on {', '.join(missed)}" if missed else ""
        what = f"median of these {len(ratios)}{not_reached}"
        median = f"{statistics.median(ratios):.1f}"
        found.append({"what": what, "beside": "PyOD AutoEncoder", "theirs / ours": median, "goal": "10"})
    return found


def speed(
    rows: int = 10_000,
    epochs: int = 2,
    repeats: int = 5,
    defaults: tuple[tuple[int, int], ...] = ((500, 20), (100_000, 30)),
    memory_rows: int = 1_000_000,
    roots: list[Path] | None = None,
    names: list[str] | None = None,
    warm_steps: int = 2500,
    output: Path = RESULTS / "speed.json",
) -> None:
    """Times side by side, in turns, one thread, medians; the others' over ours beside what is aimed at.

    The products alone are what no form of the step, and no scoring in double precision, takes less than.

    Args:
        rows: Rows of the fits.
        epochs: Their epochs.
        repeats: Runs of each, after one that is not counted.
        defaults: Rows and columns of the fits by TollDetector's defaults.
        memory_rows: Rows of the memory comparison; 0 leaves it out.
        roots: Folders with tables, for the time until an AUROC is reached; without any it is left out.
        names: Which tables; by default those that defaults were not chosen by.
        warm_steps: Of a training before all others, after which the process has its compiled loops.
        output: Where the record goes.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from benchmarks.data.tables import CHECK

    torch.set_num_threads(1)
    record = {"command": "speed", **provenance(), "rows": rows, "epochs": epochs, "repeats": repeats}
    with threadpool_limits(1), apart():
        warm(warm_steps)
        found = [
            *_fit(rows, epochs, repeats),
            *_defaults(defaults, repeats),
            *_members(rows // 5, epochs, repeats),
            _own_modules(rows // 2, epochs, repeats),
            *_score(rows, repeats),
            *([_memory(memory_rows, warm_steps)] if memory_rows else []),
            *(_until(roots, names or list(CHECK)) if roots else []),
        ]
    finish(output, {**record, "table": markdown(found)})


if __name__ == "__main__":
    with apart():
        what, *numbers = sys.argv[1:]
        given = map(int, numbers)
        measured = _first_fit(*given) if what == "first" else _share_of_the_data(what, *given)
    print(measured)
