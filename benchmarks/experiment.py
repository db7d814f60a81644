"""``run`` an experiment, and ``list`` what can be run: methods times data sets times seeds, one record each."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.collected import lean
from benchmarks.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.interfaces import Budget
from benchmarks.records import cluster, finish, provenance
from benchmarks.report import markdown_table, report
from benchmarks.runs import Configuration, Runs, run_missing
from toll_plugin.core.checks import check_finite_float, check_integer, check_option
from toll_plugin.image_sets import data_root

EXPERIMENTS = Path(__file__).parent / "experiments"

#: A name, or a name with arguments: ``Toll`` or ``{Toll: {beta: 0}}``.
Named = str | dict[str, dict[str, Any]]

#: In the names of kept runs: a change that moves numbers makes it another.
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """A method or a data set with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, what: str, given: Named, known: Mapping[str, Any]) -> Choice:
        """From what an experiment says.

        Raises:
            ValueError: If it is neither a name nor a name with arguments, or the name is not ``known``.
        """
        if isinstance(given, dict) and len(given) != 1:
            msg = f"an entry of {what} must be a name, or one name with its arguments, got {given!r}"
            raise ValueError(msg)
        name, arguments = (given, {}) if isinstance(given, str) else next(iter(given.items()))
        check_option(f"an entry of {what}", name, known)
        return cls(name, arguments or {})

    @property
    def label(self) -> str:
        """What tables call it: ``Toll (beta=0)``."""
        if not self.arguments:
            return self.name
        return f"{self.name} ({', '.join(f'{key}={_short(value)}' for key, value in self.arguments.items())})"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Plan:
    """What is measured, without how it is run."""

    datasets: Sequence[Choice]
    methods: Sequence[Choice]
    protocols: Sequence[str]
    seeds: int
    limits: Limits
    budget: Budget
    rates: Sequence[float]
    examples: int

    def calls(self) -> Iterator[tuple[str, Configuration, tuple[Any, ...]]]:
        """Label, configuration and arguments of each run; methods that take other data are left out there."""
        from benchmarks.methods import METHODS

        for choice in self.datasets:
            data, arguments = DATASETS[choice.name], dict(choice.arguments)
            parts = [str(part) for part in arguments.pop("parts", None) or data.parts(arguments)]
            for part in parts:
                common = {
                    "version": VERSION,
                    "kind": data.kind,
                    "dataset": choice.name,
                    "dataset_arguments": json.loads(json.dumps(arguments, default=str)),
                    "part": part,
                    "files": data.fingerprint(arguments, part),
                    **self._conditions(),
                }
                for protocol in self.protocols if data.kind == "table" else PROTOCOLS[:1]:
                    for seed in range(self.seeds):
                        for method in self.methods:
                            if method.name not in METHODS[data.kind]:
                                continue
                            configuration = {
                                **common,
                                "protocol": protocol,
                                "seed": seed,
                                "method": method.name,
                                "label": method.label,
                                "arguments": dict(method.arguments),
                            }
                            name = "_".join([choice.name, part, protocol, method.label, str(seed)])
                            work = (choice, arguments, part, protocol, seed, method)
                            yield re.sub(r"[^\w+.-]+", "-", name), configuration, (self, *work)

    def _conditions(self) -> dict[str, Any]:
        weights = self.budget.weights
        named = weights and f"{weights.name}, sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
        budget = asdict(self.budget) | {"weights": named}
        return {**asdict(self.limits), **budget, "rates": list(self.rates), "examples": self.examples}


def run(
    name: str = "custom",
    about: str = "",
    datasets: Sequence[Named] = ("digits",),
    methods: Sequence[Named] = ("Toll", {"Toll": {"beta": 0.0}}, "KNN"),
    protocols: Sequence[str] = PROTOCOLS[:1],
    seeds: int = 3,
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
        methods: Names, or a name with arguments: ``{Toll: {beta: 0}}``. Methods for tables are left out on
            images, and the other way round.
        protocols: For tables: semi-supervised trains on half of the normal rows and tests on all others,
            unsupervised trains on all rows and ranks them.
        seeds: Splits, each with its own initial weights.
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
    if jobs == 0:
        msg = "jobs must not be 0; -1 is one for each core"
        raise ValueError(msg)
    plan = _plan(
        datasets,
        methods,
        protocols,
        seeds,
        Limits(max_train, max_test, max_rows, validation_rows),
        Budget(max_epochs, backbone, weights and weights.expanduser().resolve(), pretrained),
        rates,
        examples,
    )
    calls = list(plan.calls())
    if not calls:
        msg = f"none of methods, {[m.label for m in plan.methods]}, takes the data of {[d.name for d in plan.datasets]}"
        raise ValueError(msg)
    folder = Path("runs") / name
    output, page = output or folder / "record.json", page or folder / "report.html"
    for parent in (runs, output.parent, page.parent):
        parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before hours of work
    with cluster(scheduler):
        records = run_missing(Runs(runs), _run, calls, jobs, name)
    record = {"command": "run", "experiment": {"name": name, "about": about}, **begun}
    finish(output, {**record, "table": markdown_table(records), "runs": lean(records, begun)})
    report([output], page)
    failed = [r for r in records if "error" in r]
    print(f"\nrecord {output}, report {page}, runs {runs}")
    if failed:
        msg = f"{len(failed)} of {len(records)} runs failed, the first with {failed[0]['error']}"
        raise SystemExit(msg)


def _plan(
    datasets: Sequence[Named],
    methods: Sequence[Named],
    protocols: Sequence[str],
    seeds: int,
    limits: Limits,
    budget: Budget,
    rates: Sequence[float],
    examples: int,
) -> Plan:
    """Checked before anything is run."""
    from benchmarks.methods import METHODS

    data = [Choice.of("datasets", given, DATASETS) for given in datasets]
    for choice in data:
        for argument in choice.arguments:
            check_option(f"an argument of {choice.name}", argument, ("parts", *DATASETS[choice.name].arguments))
    known = {name: None for kind in METHODS.values() for name in kind}
    compared = [Choice.of("methods", given, known) for given in methods]
    for protocol in protocols:
        check_option("an entry of protocols", protocol, PROTOCOLS)
    for name, value in (
        ("max_train", limits.max_train),
        ("max_test", limits.max_test),
        ("max_epochs", budget.max_epochs),
    ):
        if value is not None:
            check_integer(name, value, minimum=1)
    check_integer("max_rows", limits.max_rows, minimum=10)
    check_integer("seeds", seeds, minimum=1)
    check_integer("examples", examples, minimum=0)
    for name, value in (("validation_rows", limits.validation_rows), *(("an entry of rates", rate) for rate in rates)):
        if check_finite_float(name, value, minimum=0) >= 1:
            msg = f"{name} must be below 1, got {value!r}"
            raise ValueError(msg)
    if budget.weights is not None and not budget.weights.is_file():
        msg = f"there is no file weights, {budget.weights}"
        raise FileNotFoundError(msg)
    return Plan(data, compared, protocols, seeds, limits, budget, rates, examples)


def _run(
    plan: Plan,
    choice: Choice,
    arguments: Mapping[str, Any],
    part: str,
    protocol: str,
    seed: int,
    method: Choice,
) -> tuple[dict[str, Any], None]:
    import torch
    from threadpoolctl import threadpool_limits

    from benchmarks.evaluate import evaluate
    from benchmarks.methods import build

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = DATASETS[choice.name]
    with threadpool_limits(1):
        split = data.split(arguments, part, protocol, seed, plan.limits)
        detector = build(data.kind, method.name, plan.budget, seed, method.arguments)
        return evaluate(detector, split, seed, plan.rates, plan.examples if seed == 0 else 0), None


def list_() -> None:
    """The experiments, methods and data sets there are."""
    import yaml

    from benchmarks.methods import METHODS

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
    return ["run", f"--config={path}", f"--name={path.stem}", *words[2:]]
