"""The command `odconv compare`: runs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from odconv.app.pages.curves import draw_history
from odconv.app.pages.reports.content import words
from odconv.app.pages.reports.read_run import Run, read_run
from odconv.profiling.table import Table, show
from odconv.system.files import replacing
from odconv.system.text import UNKNOWN, duration, number, share

ALWAYS = ("arch", "kernel_num", "epochs", "out", "resume")
"""Options that are in the table already, or say nothing about what was computed."""


def compare(runs: list[str], *, out: str = "compare.png") -> dict[str, Run]:
    """Put runs side by side: print a table, and draw their curves.

    Args:
        runs: Folders of runs, finished or not.
        out: File of the picture; its suffix says the format, .png, .svg or .pdf for example.

    Returns:
        The runs, by the names that the table and the picture call them.

    Raises:
        ValueError: a run that is named twice, or a suffix of no format.
        FileNotFoundError: a folder that is missing or holds no run.
        OSError: the picture cannot be written.
    """
    named = name_runs([read_run(folder) for folder in runs])
    kind = check_format(Path(out))
    show(tabulate(named))
    if differing := differences(named):
        show(Table(["options that differ", *named], differing, left=1))
    for name, run in named.items():
        for problem in run.problems:
            print(f"{name}: {problem}")
    if curves := {name: run.epochs for name, run in named.items() if run.epochs}:
        with replacing(Path(out)) as partial:
            draw_history(curves).savefig(partial, format=kind, dpi=120)
        print(f"curves in {out}")
    else:
        print("there are no curves: no epoch of these runs has ended")
    return named


def name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Name runs by their folders, and where these are called the same, by as many folders above them as it takes."""
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"runs must be different ones, got {folder} {folders.count(folder)} times")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return {str(Path(*folder.parts[-depth:])): run for folder, run in zip(folders, runs, strict=True)}


def check_format(out: Path) -> str:
    """Return the format that a file's suffix says."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if (kind := out.suffix[1:].lower()) not in known:
        raise ValueError(f"out must end in one of {', '.join(f'.{name}' for name in sorted(known))}, got {out}")
    return kind


def tabulate(runs: Mapping[str, Run]) -> Table:
    """Return the numbers of runs, a column a run."""
    columns = [describe(run) for run in runs.values()]
    lines = dict.fromkeys(line for column in columns for line in column)
    return Table(["", *runs], [[line, *(column.get(line, UNKNOWN) for column in columns)] for line in lines], left=1)


def describe(run: Run) -> dict[str, str]:
    """Return the numbers of a run, by what they are."""
    return {
        "state": "finished" if run.finished else "unfinished",
        "network": words(run.config.get("arch", UNKNOWN)),
        "kernels": words(run.config.get("kernel_num") or UNKNOWN),
        "parameters": number(run.result.get("parameters"), 0),
        "epochs": run.progress,
        **run.scores,
        "best epoch": number(run.best.get("epoch"), 0),
        "training loss": number(run.last("train_loss"), 4),
        "training an epoch": duration(run.median("train_seconds")),
        "evaluation an epoch": duration(run.median("val_seconds")),
        "images a second": number(run.median("images_per_second"), 1),
        "waiting for images": share(run.median("data_wait")),
    }


def differences(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return the options that are not the same in all runs that have them, and their value in each."""
    names = dict.fromkeys(name for run in runs.values() for name in run.config)
    table = [
        [name, *(words(run.config[name]) if name in run.config else UNKNOWN for run in runs.values())] for name in names
    ]
    return [line for line in table if len({*line[1:]} - {UNKNOWN}) > 1 and line[0] not in ALWAYS]
