"""What the runs of one of the paper's experiments say: a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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


def _cell(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent; over seeds as the authors take it, with n below."""
    if not values:
        return ""
    spread = f" ± {100 * statistics.pstdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def make_table(record: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """A line per class that was run, and below what others published.

    Args:
        record: Of the command ``paper``: what was set.
        runs: Its runs, as the record has them; failed ones are left out.
    """
    done = [run for run in runs if "error" not in run]
    dataset = record["dataset"]
    if dataset == "arrhythmia":
        return _arrhythmia_table(record, done)
    settings = SETTINGS[dataset]
    by: dict[tuple[str, int], list[float]] = {}
    for run in done:
        for name, result in run["protocols"].items():
            by.setdefault((name, run["class"]), []).append(result["total"])
    ran, first = sorted({run["class"] for run in done}), f"normal class, test {settings.metric} in %"
    rows = [
        {first: str(c), **{head: _cell(by[name, c]) for name, head in HEADS.items()}, "seeds": str(len(by["last", c]))}
        for c in ran
    ]
    if ran:
        which = "all classes" if len(ran) == settings.n_classes else f"the classes that were run ({len(ran)})"
        means = {
            head: f"{100 * statistics.mean(statistics.mean(by[name, c]) for c in ran):.1f}"
            for name, head in HEADS.items()
        }
        rows.append({first: f"mean over {which}", **means, "seeds": ""})
    paragraphs = [*([markdown(rows)] if rows else []), _budget(record, done)]
    if dataset in PUBLISHED:
        peers = ", ".join(f"{name} {value:.1f}" for name, value in PUBLISHED[dataset].items())
        text = "Published by others, not measured here, each by its own selection; means over all classes, so not to be"
        paragraphs.append(f"{text} compared with a mean over some: {peers}.")
    return "\n\n".join(paragraphs)


def _budget(record: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    """What was spent, and whether that is what the authors spend."""
    settings = asdict(SETTINGS[record["dataset"]])
    images = record["dataset"] != "arrhythmia"
    full = all(record[name] == value for name, value in settings.items() if name != "bf16")
    full = full and (record["validation_size"] >= 10_000 or not images)
    whose = "the authors'" if record["split"] == "authors" else "drawn"
    held_out = f"on {min(record['validation_size'], 10_000)} of {whose} 10 000" if images else f"on {whose} rows"
    text = ("The authors' full budget" if full else "A reduced budget, not the authors'") + (
        f": {record['iterations']} iterations of {record['batch_size']}, beta {record['beta']:g}, latent size "
        f"{record['latent_dim']}, learning rate {record['lr']:g}, "
        f"validated every {record['validate_every']} {held_out}, "
        f"{'bfloat16 autocast' if record['bf16'] else 'single precision'}"
    )
    if not done:
        return f"{text}."
    steps = {name: statistics.median(r["protocols"][name]["step"] for r in done) for name in HEADS}
    seconds = statistics.median(sum(r["seconds"].values()) for r in done)
    devices = ", ".join(sorted({f"{r['device']} with {r['threads']} thread(s)" for r in done}))
    return (
        f"{text}; {seconds:.0f} s a run (median) on {devices}; "
        f"median step chosen: {steps['paper']:g} with labels, {steps['label-free']:g} without."
    )


def _arrhythmia_table(record: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    found = {head: [run["protocols"][name]["total"] for run in done] for name, head in HEADS.items()}
    for run in done:
        for name, value in run.get("detectors", {}).items():
            found.setdefault(name, []).append(value)
    rows = [
        {
            "how": name,
            "test F1, %": _cell(values),
            "smallest": f"{100 * min(values):.1f}",
            "largest": f"{100 * max(values):.1f}",
            "seeds": str(len(values)),
        }
        for name, values in found.items()
        if values
    ]
    return "\n\n".join([*([markdown(rows)] if rows else []), _budget(record, done)])


def plot(record: dict[str, Any], runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The test metric by class and choice of the step, and what the labelled and the label-free choice go by."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    dataset, metric = record["dataset"], record["metric"]
    done = [run for run in runs if "error" not in run]
    unit = "seed" if dataset == "arrhythmia" else "class"
    values = sorted({run[unit] for run in done})
    colours = {value: f"C{i % 10}" for i, value in enumerate(values)}
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    places = zip((-0.24, -0.08, 0.08, 0.24), "o^sD", HEADS.items(), strict=True)
    for offset, marker, (name, head) in places:
        x = [run[unit] + offset for run in done]
        y = [100 * run["protocols"][name]["total"] for run in done]
        left.plot(x, y, marker, color="0.35", fillstyle="none" if marker == "o" else "full", label=head, alpha=0.7)
    panels = ((middle, "paper", "validation", 1), (right, "label-free", "synthetic", -1))
    for panel, name, key, sign in panels:
        for run in done:
            found = {step["step"]: 100 * (step[key] if sign > 0 else 1 - step[key]) for step in run["trace"]}
            colour = colours[run[unit]]
            panel.plot(list(found), list(found.values()), ".-", color=colour, alpha=0.5)
            chosen = run["protocols"][name]["step"]
            panel.plot([chosen], [found[chosen]], "*", color=colour, markersize=12)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for value in values[:10]:
        middle.plot([], [], color=colours[value], label=f"{unit} {value}")
    left.set(xlabel=f"normal {unit}" if unit == "class" else unit, ylabel=f"test {metric}, %", title=dataset)
    left.set_xticks(values)
    left.legend(fontsize="small")
    middle.set(xlabel="iteration", ylabel=f"validation {metric}, %", title="labelled choice (star)")
    middle.legend(fontsize="small")
    right.set(xlabel="iteration", ylabel="AUROC against spliced samples, %", title="label-free choice (star)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
