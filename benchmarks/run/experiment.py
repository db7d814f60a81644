"""``run`` an experiment, and ``list`` what can be run: methods times data sets times seeds, one record each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.interfaces import Budget
from benchmarks.report.report import markdown_table, report
from benchmarks.run.jobs import check_jobs, cluster, run_missing
from benchmarks.run.plan import Choice, Named, Plan, all_different, plan_of
from benchmarks.run.store import Runs, finish, lean, provenance
from toll_plugin.image_sets import data_root

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def run(
    name: str = "custom",
    about: str = "",
    datasets: Sequence[Named] = ("digits",),
    methods: Sequence[Named] = ("Toll", {"Toll": {"beta": 0.0}}, "KNN"),
    protocols: Sequence[str] = PROTOCOLS[:1],
    seeds: int = 3,
    restarts: int = 1,
    max_train: int | None = None,
    max_test: int | None = None,
    max_rows: int = 10_000,
    validation_rows: float = 0.0,
    max_epochs: int | None = None,
    backbone: str = "resnet18",
    weights: Path | None = None,
    pretrained: bool = True,
    rates: Sequence[float] = (),
    examples: int = 0,
    jobs: int = 1,
    scheduler: str | None = None,
    runs: Path = Path("runs/records"),
    output: Path | None = None,
    page: Path | None = None,
) -> None:
    """An experiment: every method on every part of every data set with every seed, then a report.

    ``run NAME`` takes ``benchmarks/experiments/NAME.yaml`` or a YAML file of yours, which states what
    differs from the defaults here; flags behind it override it. Finished runs are kept and shared by
    experiments; failed ones are recorded with their error and tried again by the next command.

    Args:
        name: Of the experiment; its results are named by it.
        about: What it asks, in a sentence or two, for the report.
        datasets: Names, or a name with arguments: ``{digits: {parts: [1, 8]}}``, ``{mvtec: {root: my_images}}``,
            ``{file: {path: sensors.csv, label: anomaly}}``. ``list`` has them all.
        methods: Names, or a name with arguments: ``{Toll: {beta: 0}}``, which tables call what stands behind
            ``as``: ``{Toll: {beta: 0}, as: the twin}``. Methods for tables are left out on images, and the
            other way round.
        protocols: For tables: semi-supervised trains on half of the normal rows and tests on all others,
            unsupervised trains on all rows and ranks them, bootstrap is the common protocol of papers on ADBench,
            which leaks: smaller tables are drawn up to 1000 rows, with copies, before half of the normal rows,
            in file order, are trained on.
        seeds: Splits, each with its own initial weights.
        restarts: Initial weights per split; methods that draw nothing run once per split. On the protocol
            unsupervised, which has no split, ``max(seeds, restarts)`` initial weights, and those methods once.
        max_train: Draw so many training images; all by default.
        max_test: Draw so many test images; all by default.
        max_rows: Draw so many rows of larger tables.
        validation_rows: Share of a table's training rows to hold out, for label-free statistics.
        max_epochs: Of methods that train on images; by default each has its own number.
        backbone: timm's name of the pretrained network of methods that need one.
        weights: Local file of its ImageNet weights; by default timm downloads them.
        pretrained: False leaves backbones random, and the results say so.
        rates: Also measure with test anomalies drawn down to these shares.
        examples: Heat maps to keep of each part, of the first seed.
        jobs: Runs at a time, one thread each; -1 for all cores, or all workers of a cluster.
        scheduler: Address of a Dask scheduler whose workers take the runs.
        runs: Where finished runs are kept.
        output: Where the collected record goes; runs/NAME/record.json by default.
        page: Where the report goes; runs/NAME/report.html by default.
    """
    begun = provenance()
    check_jobs(jobs)
    plan = plan_of(
        datasets,
        methods,
        protocols,
        seeds,
        Limits(max_train, max_test, max_rows, validation_rows),
        Budget(max_epochs, backbone, weights and weights.expanduser().resolve(), pretrained),
        rates,
        examples,
        restarts,
    )
    calls = list(plan.calls())
    all_different([configuration for _, configuration, _ in calls])
    if not calls:
        msg = f"none of methods, {[m.label for m in plan.methods]}, takes the data of {[d.name for d in plan.datasets]}"
        raise ValueError(msg)
    folder = Path("runs") / name
    output, page = output or folder / "record.json", page or folder / "report.html"
    for parent in (runs, output.parent, page.parent):
        parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before hours of work
    with cluster(scheduler):
        records = run_missing(Runs(runs), _run, calls, jobs, name)
    others = sum(any(r["provenance"][name] != begun[name] for name in ("commit", "packages")) for r in records)
    if others:
        print(f"{others} runs were made by another commit or other versions, which the report names")
    record = {"command": "run", "experiment": {"name": name, "about": about}, **begun}
    finish(output, {**record, "table": markdown_table(records), "runs": lean(records, begun)})
    report([output], page)
    failed = [r for r in records if "error" in r]
    print(f"\nrecord {output}, report {page}, runs {runs}")
    if failed:
        msg = f"{len(failed)} of {len(records)} runs failed, the first with {failed[0]['error']}"
        raise SystemExit(msg)


def _run(
    plan: Plan,
    choice: Choice,
    arguments: Mapping[str, Any],
    part: str,
    protocol: str,
    seed: int,
    restart: int,
    method: Choice,
) -> tuple[dict[str, Any], None]:
    import torch
    from threadpoolctl import threadpool_limits

    from benchmarks.methods.registry import build
    from benchmarks.run.evaluate import evaluate

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = DATASETS[choice.name]
    with threadpool_limits(1):
        split = data.split(arguments, part, protocol, seed, plan.limits)
        detector = build(data.kind, method.name, plan.budget, seed + 1000 * restart, method.arguments)
        return evaluate(detector, split, seed, plan.rates, plan.examples if seed == restart == 0 else 0), None


def list_() -> None:
    """The experiments, methods and data sets there are."""
    import yaml

    from benchmarks.methods.registry import METHODS

    print("experiments, for `python -m benchmarks run NAME`:")
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        print(f"  {path.stem:<14} {yaml.safe_load(path.read_text())['about']}")
    for kind, methods in METHODS.items():
        print(f"\nmethods for {kind}:\n  {', '.join(methods)}")
    print(f"\ndata sets, looked for in {data_root()} (TOLL_DATA_ROOT), or where their root or path says:")
    for name, data in DATASETS.items():
        try:
            parts = data.parts({})
            found = f"{len(parts)} parts"
        except (FileNotFoundError, ValueError):
            found = "not found here"
        given = f" [{', '.join(data.arguments)}]" if data.arguments else ""
        print(f"  {name:<14} {data.about}{given} ({found})")


def with_experiment(words: Sequence[str]) -> list[str]:
    """The command line with ``run NAME`` spelt out as the experiment's YAML and name.

    Raises:
        FileNotFoundError: If there is no such experiment.
    """
    if len(words) < 2 or words[0] != "run" or words[1].startswith("-"):
        return list(words)
    given = Path(words[1])
    path = given if given.suffix in {".yaml", ".yml"} else EXPERIMENTS / f"{words[1]}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in EXPERIMENTS.glob("*.yaml")))
        msg = f"there is no experiment {words[1]!r}: name a YAML file or one of {known}"
        raise FileNotFoundError(msg)
    return ["run", f"--name={path.stem}", f"--config={path}", *words[2:]]
