"""What the runs of one of the paper's experiments say: a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report.published import PUBLISHED
from benchmarks.run.tables import markdown
from benchmarks.studies.protocol import SETTINGS

#: How the step was chosen, by protocol.
HEADS = {
    "paper": "labelled choice (the authors')",
    "label-free": "label-free choice",
    "held-out loss": "lowest held-out loss",
    "last": "last step",
}


#: The same of the twins with beta 0.
TWIN_HEADS = {
    "paper": "beta 0, labelled",
    "label-free": "beta 0, label-free",
    "held-out loss": "beta 0, held-out loss",
    "last": "beta 0, last step",
}

Runs = Sequence[Mapping[str, Any]]


def is_twin(record: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether a run is the twin of another: with beta 0, in a record of another beta."""
    return bool(run.get("beta", record["beta"]) != record["beta"])  # old records have no twins and state beta once


def finished(record: Mapping[str, Any], runs: Runs) -> tuple[Runs, Runs]:
    """The runs of a record that have not failed, and those of the twins."""
    done = [run for run in runs if "error" not in run]
    return [run for run in done if not is_twin(record, run)], [run for run in done if is_twin(record, run)]


def paired_gains(done: Runs, twins: Runs, protocol: str) -> dict[int, list[float]]:
    """By class, the test metric minus the twin's, for each seed that both have finished."""
    theirs = {(run["class"], run["seed"]): run["protocols"][protocol]["total"] for run in twins}
    found: dict[int, list[float]] = {}
    for run in done:
        if (run["class"], run["seed"]) in theirs:
            gain = run["protocols"][protocol]["total"] - theirs[run["class"], run["seed"]]
            found.setdefault(run["class"], []).append(gain)
    return found


def _cell(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent; over seeds as the authors take it, with n below."""
    if not values:
        return ""
    spread = f" ± {100 * statistics.pstdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _gain(values: Sequence[float]) -> str:
    """Mean and standard error of paired differences, in points."""
    if not values:
        return ""
    error = f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    mean = round(100 * statistics.mean(values), 1) + 0.0  # no minus before a zero
    return f"{mean:+.1f}{error}"


def _mean(by_class: Sequence[Sequence[float]]) -> str:
    """Mean over classes of the means over seeds, in per cent; how many, if some have failed."""
    means = [statistics.mean(values) for values in by_class if values]
    if not means:
        return ""
    return f"{100 * statistics.mean(means):.1f}" + f" ({len(means)} of them)" * (len(means) < len(by_class))


def make_table(record: Mapping[str, Any], runs: Runs) -> str:
    """A line per class that was run, their mean, the gain over the twins, and below what others published.

    Args:
        record: Of the command ``paper``: what was set.
        runs: Its runs, as the record has them; failed ones are left out.
    """
    done, twins = finished(record, runs)
    dataset = record["dataset"]
    rows = _arrhythmia_rows(record, done, twins) if dataset == "arrhythmia" else _class_rows(record, done, twins)
    paragraphs = [*([markdown(rows)] if rows else []), _budget(record, done, twins)]
    if twins:
        paragraphs.append(_of_twins(record, twins))
    if dataset in PUBLISHED:
        peers = ", ".join(f"{name} {value:.1f}" for name, value in PUBLISHED[dataset].items())
        text = "Published by others, not measured here, each by its own selection; means over all classes, so not to be"
        paragraphs.append(f"{text} compared with a mean over some: {peers}.")
    return "\n\n".join(paragraphs)


def _class_rows(record: Mapping[str, Any], done: Runs, twins: Runs) -> list[dict[str, str]]:
    settings = SETTINGS[record["dataset"]]
    ran = sorted({run["class"] for run in (*done, *twins)})
    columns: dict[str, list[list[float]]] = {}
    for name, head in HEADS.items():
        columns[head] = _by_class(done, name, ran)
        if twins:
            columns[TWIN_HEADS[name]] = _by_class(twins, name, ran)
    first = f"normal class, test {settings.metric} in %{_at_width(record)}"
    rows = [
        {first: str(c), **{head: _cell(found[i]) for head, found in columns.items()}, "seeds": _seeds(done, twins, c)}
        for i, c in enumerate(ran)
    ]
    if ran:
        which = "all classes" if len(ran) == settings.n_classes else f"the classes that were run ({len(ran)})"
        rows.append({first: f"mean over {which}", **{head: _mean(found) for head, found in columns.items()}})
    gains = {head: list(map(statistics.mean, paired_gains(done, twins, n).values())) for n, head in HEADS.items()}
    if pairs := len(gains[HEADS["last"]]):
        over = f"mean ± standard error over {pairs} classes" if pairs > 1 else "one class"
        rows.append({first: f"gain over beta 0: {over}", **{head: _gain(found) for head, found in gains.items()}})
    return rows


def _by_class(runs: Runs, protocol: str, classes: Sequence[int]) -> list[list[float]]:
    return [[run["protocols"][protocol]["total"] for run in runs if run["class"] == c] for c in classes]


def _seeds(done: Runs, twins: Runs, normal_class: int) -> str:
    """How many seeds have finished, and how many of the twins' if they are not as many."""
    mine, theirs = (sum(run["class"] == normal_class for run in runs) for runs in (done, twins))
    return f"{mine}, beta 0: {theirs}" if twins and mine != theirs else str(mine)


def _at_width(record: Mapping[str, Any]) -> str:
    return "" if record.get("width", 1) == 1 else f" (width {record['width']:g})"


def _budget(record: Mapping[str, Any], done: Runs, twins: Runs) -> str:
    """What was spent, and whether that is what the authors spend."""
    settings = asdict(SETTINGS[record["dataset"]])
    images = record["dataset"] != "arrhythmia"
    full = all(record[name] == value for name, value in settings.items() if name not in ("bf16", "width"))
    full = full and (record["validation_size"] >= 10_000 or not images)
    whose = "the authors'" if record["split"] == "authors" else "drawn"
    held_out = f"on {min(record['validation_size'], 10_000)} of {whose} 10 000" if images else f"on {whose} rows"
    width = record.get("width", 1)
    text = "" if width == 1 else f"{'Narrow' if width < 1 else 'Wide'} network (width {width:g}), not the authors'. "
    text += ("The authors' full budget" if full else "A reduced budget, not the authors'") + (
        f": {record['iterations']} iterations of {record['batch_size']}, beta {record['beta']:g}, latent size "
        f"{record['latent_dim']}, learning rate {record['lr']:g}, "
        f"validated every {record['validate_every']} {held_out}, "
        f"{'bfloat16 autocast' if record['bf16'] else 'single precision'}"
    )
    if not done and not twins:
        return f"{text}."
    seconds = statistics.median(sum(r["seconds"].values()) for r in (*done, *twins))
    devices = ", ".join(sorted({f"{r['device']} with {r['threads']} thread(s)" for r in (*done, *twins)}))
    text += f"; {seconds:.0f} s a run (median) on {devices}"
    return f"{text}; median step chosen: {_steps(done)}." if done else f"{text}."


def _steps(runs: Runs) -> str:
    labelled, free = (statistics.median(r["protocols"][name]["step"] for r in runs) for name in ("paper", "label-free"))
    return f"{labelled:g} with labels, {free:g} without"


def _of_twins(record: Mapping[str, Any], twins: Runs) -> str:
    """What the twins are, and how the gain is taken."""
    classes = record["dataset"] != "arrhythmia"
    over = "classes, each the mean of its seeds" if classes else "seeds"
    return (
        "Beta 0 is the twin of each run: the same initial weights, batches, number of iterations and rules of choice, "
        f"without the latent term. Gains are paired by {'class and ' * classes}seed; their standard error is over "
        f"{over}. Median step that the twins chose: {_steps(twins)}."
    )


def _arrhythmia_rows(record: Mapping[str, Any], done: Runs, twins: Runs) -> list[dict[str, str]]:
    found = {head: [run["protocols"][name]["total"] for run in done] for name, head in HEADS.items()}
    for run in done:
        for name, value in run.get("detectors", {}).items():
            found.setdefault(name, []).append(value)
    beside: dict[str, dict[str, str]] = {}
    for name, head in HEADS.items():
        if twins:
            gains = [gain for found in paired_gains(done, twins, name).values() for gain in found]
            theirs = _cell([run["protocols"][name]["total"] for run in twins])
            beside[head] = {"beta 0": theirs, "gain ± standard error": _gain(gains)}
    return [
        {
            f"how{_at_width(record)}": head,
            "test F1, %": _cell(values),
            **beside.get(head, {}),
            "smallest": f"{100 * min(values):.1f}",
            "largest": f"{100 * max(values):.1f}",
            "seeds": str(len(values)),
        }
        for head, values in found.items()
        if values
    ]


def plot(record: Mapping[str, Any], runs: Runs, path: Path) -> None:
    """The test metric by class and choice of the step, and what the labelled and the label-free choice go by."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    dataset, metric = record["dataset"], record["metric"]
    done, twins = finished(record, runs)
    unit = "seed" if dataset == "arrhythmia" else "class"
    values = sorted({run[unit] for run in (*done, *twins)})
    colours = {value: f"C{i % 10}" for i, value in enumerate(values)}
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    places = zip((-0.24, -0.08, 0.08, 0.24), "o^sD", HEADS.items(), strict=True)
    for offset, marker, (name, head) in places:
        x = [run[unit] + offset for run in done]
        y = [100 * run["protocols"][name]["total"] for run in done]
        style = {"fillstyle": "none" if marker == "o" else "full", "alpha": 0.7}
        left.plot(x, y, marker, color="0.35", label=head, **style)
        x = [run[unit] + offset for run in twins]
        left.plot(x, [100 * run["protocols"][name]["total"] for run in twins], marker, color="C3", **style)
    panels = ((middle, "paper", "validation", 1), (right, "label-free", "synthetic", -1))
    for panel, name, key, sign in panels:
        for run in done:
            found = {step["step"]: 100 * (step[key] if sign > 0 else 1 - step[key]) for step in run["trace"]}
            colour = colours[run[unit]]
            panel.plot(list(found), list(found.values()), ".-", color=colour, alpha=0.5)
            chosen = run["protocols"][name]["step"]
            panel.plot([chosen], [found[chosen]], "*", color=colour, markersize=12)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if twins:
        left.plot([], [], "s", color="C3", label="the same with beta 0")
    for value in values[:10]:
        middle.plot([], [], color=colours[value], label=f"{unit} {value}")
    left.set(
        xlabel=f"normal {unit}" if unit == "class" else unit,
        ylabel=f"test {metric}, %",
        title=dataset + _at_width(record),
    )
    left.set_xticks(values)
    left.legend(fontsize="small")
    middle.set(xlabel="iteration", ylabel=f"validation {metric}, %", title="labelled choice (star)")
    middle.legend(fontsize="small")
    right.set(xlabel="iteration", ylabel="AUROC against spliced samples, %", title="label-free choice (star)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
