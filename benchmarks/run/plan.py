"""What an experiment measures: methods times parts of data sets times splits times restarts, checked first."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.data.datasets import DATASETS, PROTOCOLS, Limits
from benchmarks.interfaces import Budget
from benchmarks.report.comparison import dataset_of
from benchmarks.run.store import Configuration
from toll_plugin.core.checks import check_finite_float, check_integer, check_option

#: A name, or a name with arguments: ``Toll``, ``{Toll: {beta: 0}}`` or ``{Toll: {beta: 0}, as: the twin}``.
Named = str | dict[str, dict[str, Any] | str]

#: In the names of kept runs: a change that moves numbers makes it another.
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """A method or a data set with its arguments."""

    name: str
    arguments: Mapping[str, Any]
    called: str | None = None

    @classmethod
    def of(cls, what: str, given: Named, known: Mapping[str, Any]) -> Choice:
        """From what an experiment says.

        Raises:
            ValueError: If it is neither a name nor a name with arguments, or the name is not ``known``.
        """
        named = {given: {}} if isinstance(given, str) else dict(given)
        called = named.pop("as", None) if what == "methods" else None
        arguments = next(iter(named.values()), None) or {}
        if len(named) != 1 or not isinstance(arguments, Mapping):
            msg = f"an entry of {what} must be a name, or one name with its arguments, got {given!r}"
            raise ValueError(msg)
        if called is not None and not (isinstance(called, str) and called.strip()):
            msg = f"as must be what tables call a method, got {called!r}"
            raise ValueError(msg)
        name = next(iter(named))
        check_option(f"an entry of {what}", name, known)
        return cls(name, arguments, called)

    @property
    def label(self) -> str:
        """What tables call it: ``Toll (beta=0)``, or what ``as`` says."""
        if self.called is not None:
            return self.called
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
    restarts: int = 1

    def calls(self) -> Iterator[tuple[str, Configuration, tuple[Any, ...]]]:
        """Label, configuration and arguments of each run; methods that take other data are left out there."""
        from benchmarks.methods.registry import METHODS

        for choice in self.datasets:
            data, arguments = DATASETS[choice.name], dict(choice.arguments)
            given = arguments.pop("parts", None)
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                msg = f"parts of {choice.name} must be a list, got {given!r}"
                raise ValueError(msg)
            parts = [str(part) for part in given or data.parts(arguments)]
            for part in parts:
                common = {
                    "version": VERSION,
                    "kind": data.kind,
                    "dataset": choice.name,
                    "dataset_arguments": json.loads(json.dumps(arguments, default=str)),
                    "part": part,
                    "files": data.fingerprint(arguments, part),
                    **self._conditions(data.kind),
                }
                for protocol in self.protocols if data.kind == "table" else PROTOCOLS[:1]:
                    # Split by split, so that what an interrupted command leaves is whole comparisons.
                    methods = [method for method in self.methods if method.name in METHODS[data.kind]]
                    cells = [(method, *cell) for method in methods for cell in self._cells(method, protocol)]
                    for method, seed, restart in sorted(cells, key=lambda cell: cell[1:]):
                        configuration = {
                            **common,
                            "protocol": protocol,
                            "seed": seed,
                            "method": method.name,
                            "label": method.label,
                            "arguments": dict(method.arguments),
                        }
                        name = "_".join([choice.name, part, protocol, method.label, str(seed)])
                        if restart:  # the first has the name it had before there were others
                            configuration["restart"] = restart
                            name += f"_{restart}"
                        work = (choice, arguments, part, protocol, seed, restart, method)
                        # The digest in a run's name tells apart what is cut here.
                        yield re.sub(r"[^\w+.-]+", "-", name)[:100], configuration, (self, *work)

    def _cells(self, method: Choice, protocol: str) -> list[tuple[int, int]]:
        """Split and restart of each run of a method.

        Where there is nothing to split, seeds are initial weights only. What draws nothing runs once per split.
        """
        from benchmarks.methods.registry import DETERMINISTIC

        splits, restarts = self.seeds, self.restarts
        if protocol == "unsupervised" and not self.limits.validation_rows:
            splits, restarts = (1, 1) if method.name in DETERMINISTIC else (max(splits, restarts), 1)
        elif method.name in DETERMINISTIC:
            restarts = 1
        return [(split, restart) for split in range(splits) for restart in range(restarts)]

    def _conditions(self, kind: str) -> dict[str, Any]:
        """Of all that is set, what counts for data of this kind."""
        found = {**asdict(self.limits), **asdict(self.budget), "rates": list(self.rates), "examples": self.examples}
        if weights := self.budget.weights:
            found["weights"] = f"{weights.name}, sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
        rows = {"max_rows", "validation_rows", "rates"}
        return {name: value for name, value in found.items() if (name in rows) == (kind == "table") or name == "rates"}


def plan_of(
    datasets: Sequence[Named],
    methods: Sequence[Named],
    protocols: Sequence[str],
    seeds: int,
    limits: Limits,
    budget: Budget,
    rates: Sequence[float],
    examples: int,
    restarts: int = 1,
) -> Plan:
    """Checked before anything is run."""
    from benchmarks.methods.registry import METHODS

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
    check_integer("restarts", restarts, minimum=1)
    check_integer("examples", examples, minimum=0)
    for name, value in (("validation_rows", limits.validation_rows), *(("an entry of rates", rate) for rate in rates)):
        if check_finite_float(name, value, minimum=0) >= 1:
            msg = f"{name} must be below 1, got {value!r}"
            raise ValueError(msg)
    if budget.weights is not None and not budget.weights.is_file():
        msg = f"there is no file weights, {budget.weights}"
        raise FileNotFoundError(msg)
    return Plan(data, compared, protocols, seeds, limits, budget, rates, examples, restarts)


def all_different(configurations: Sequence[Configuration]) -> None:
    """Refuse runs that a table would put into one cell.

    Raises:
        ValueError: If two have the same label, data set, part, protocol, seed and restart.
    """
    seen: set[tuple[Any, ...]] = set()
    for c in configurations:
        key = (c["label"], dataset_of({"configuration": c}), c["part"], c["protocol"], c["seed"], c.get("restart", 0))
        if key in seen:
            twice = f"{c['label']!r} twice on {key[1]} {key[2]}"
            msg = f"methods and datasets must differ in what tables show of them, got {twice}"
            raise ValueError(msg)
        seen.add(key)
