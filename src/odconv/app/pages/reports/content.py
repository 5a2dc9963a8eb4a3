"""What a report says: the numbers of a run, as text."""

from math import isfinite
from pathlib import Path
from typing import Any

from odconv.app.pages.reports.read_run import Run
from odconv.system.text import count, duration, number, share

MACHINE = {
    "processor": "Processor", "gpus": "GPUs", "cores": "CPU cores", "memory": "Memory, GiB", "processes": "Processes",
    "system": "System", "python": "Python", "torch": "PyTorch", "torchvision": "torchvision", "lightning": "Lightning",
    "odconv": "odconv", "cuda": "CUDA",
}  # fmt: skip
"""What the page calls the entries of machine.json."""


def title(run: Run) -> str:
    """Return the network: "od_resnet18, 4 kernels", or "faster_rcnn on od_resnet18, 4 kernels"."""
    kernels = run.config.get("kernel_num")
    network = [str(run.config[name]) for name in ("detector", "arch") if name in run.config]
    return (" on ".join(network) or run.name) + (f", {count(kernels, 'kernel')}" if isinstance(kernels, int) else "")


def sentence(run: Run) -> str:
    """Return what came out, in a sentence."""
    if not run.epochs:
        return "No epoch of this run has ended."
    data = f" on {Path(str(run.config['data'])).name}" if "data" in run.config else ""
    state, best = "" if run.finished else "Unfinished: ", ""
    if run.best and run.best is not run.epochs[-1]:
        best = f"; the best was {number(run.best[run.score], 2, ' %')} after epoch {int(run.best['epoch'])}"
    name = {"top1": "top-1 accuracy", "ap": "average precision of boxes"}[run.score]
    last = number(run.last(run.score), 2, " %")
    return f"{state}{last} {name} in validation after epoch {run.progress}{data}{best}."


def numbers(run: Run) -> dict[str, str]:
    """Return the final numbers, by what they are."""
    seconds = sum(run.values("train_seconds")) + sum(run.values("val_seconds"))
    return {
        **run.scores,
        "training loss": number(run.last("train_loss"), 4),
        "parameters": number(run.result.get("parameters"), 0),
        "epochs": run.progress,
        "time": duration(seconds) if seconds else number(None),
    }


def throughput(run: Run) -> list[tuple[str, str, str, str, str]]:
    """Return measures of the run's speed: name, first epoch, median one, last one, and all."""
    measures = {
        "train_seconds": ("training", duration, True),
        "val_seconds": ("evaluation", duration, True),
        "images_per_second": ("images a second in training", lambda value: number(value, 1), False),
        "data_wait": ("waiting for images", share, False),
    }
    return [
        (label, write(values[0]), write(run.median(column)), write(values[-1]), write(sum(values)) if total else "")
        for column, (label, write, total) in measures.items()
        if (values := run.values(column))
    ]


def epochs(run: Run) -> dict[str, list[str]]:
    """Return the columns of metrics.csv."""
    columns = dict.fromkeys(column for row in run.epochs for column in row)
    return {column: [compact(row.get(column)) for row in run.epochs] for column in columns}


def compact(value: float | None) -> str:
    """Return a number of any size in a few digits."""
    return number(value) if value is None or not isfinite(value) else f"{value:.5g}"


def faults(run: Run) -> list[tuple[int, int, int]] | None:
    """Return the epochs with unreadable images, and how many in training and validation; None if not counted."""
    if not run.values("train_corrupt") and not run.values("val_corrupt"):
        return None
    counted = [
        (int(row["epoch"]), int(max(0, row.get("train_corrupt", 0))), int(max(0, row.get("val_corrupt", 0))))
        for row in run.epochs
    ]
    return [row for row in counted if any(row[1:])]


def options(run: Run) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Return the options that differ from their defaults, with value and default, and the values of the others."""
    values = {name: words(value) for name, value in run.config.items()}
    usual = {name: words(value) for name, value in run.defaults.items()}
    changed = {name: (value, usual.get(name, "")) for name, value in values.items() if value != usual.get(name)}
    return changed, {name: value for name, value in values.items() if name not in changed}


def machine(run: Run) -> dict[str, str]:
    """Return the machine and the versions, by what they are."""
    return {label: words(run.machine[name]) for name, label in MACHINE.items() if run.machine.get(name)}


def words(value: Any) -> str:
    """Return a value as an option is written."""
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
