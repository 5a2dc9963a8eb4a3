"""Rows of predictions: as a table on the terminal, as CSV, as JSON; written as they come."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from odconv.app.predict.predictions import Prediction, Predictions
from odconv.system.files import replacing
from odconv.system.text import printable

SUFFIXES = (".csv", ".json")
Write: TypeAlias = Callable[[Prediction], None]


@contextmanager
def writing_rows(out: str | None, predictions: Predictions, console: Console) -> Iterator[Write]:
    """Give a function that writes a row: to the console, or to a file that is there once all are in it."""
    if out is None:
        yield _table(console, predictions)
        return
    rows = _csv if Path(out).suffix == ".csv" else _json
    with (
        replacing(Path(out)) as partial,
        # names of files may be no UTF-8
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        rows(file, predictions) as write,
    ):
        yield write


@contextmanager
def _csv(file: TextIO, predictions: Predictions) -> Iterator[Write]:
    table = csv.writer(file)
    table.writerow(["image", *(f"{name}_{i}" for i in range(1, predictions.top + 1) for name in ("class", "percent"))])

    def write(row: Prediction) -> None:
        table.writerow([row.image, *(cell for guess in row.guesses for cell in (guess.name, f"{guess.percent:.4f}"))])

    yield write


@contextmanager
def _json(file: TextIO, predictions: Predictions) -> Iterator[Write]:
    separator = ""
    file.write('{"images": [')

    def write(row: Prediction) -> None:
        nonlocal separator
        classes = [
            {"class": guess.name, "index": guess.output, "percent": round(guess.percent, 4)} for guess in row.guesses
        ]
        file.write(f"{separator}\n{json.dumps({'image': str(row.image), 'classes': classes})}")
        separator = ","

    yield write
    rest = {
        "unreadable": [{"image": str(image), "reason": reason} for image, reason in predictions.unreadable],
        "network": predictions.classifier.name,
        "seconds": {"waited": predictions.waited, "computed": predictions.computed},
    }
    file.write(f"\n], {json.dumps(rest, indent=1)[1:]}\n")


def _table(console: Console, predictions: Predictions) -> Write:
    """Rows as wide as the longest names, which are known before the first row is; a terminal folds longer ones."""
    longest = max([cell_len(shown(path)) for path in predictions.paths], default=0)
    name = min(40, max(map(cell_len, predictions.classifier.classes)))

    def on_terminal(lines: list[tuple[str, str, str]], first: str) -> None:
        table = Table.grid(padding=(0, 2))
        for width in (min(longest, max(20, console.width - name - 10)), 6, name):
            table.add_column(width=width, overflow="fold")
        for line in lines:
            table.add_row(*line, style=first)
            first = ""
        console.print(table)

    def in_file(lines: list[tuple[str, str, str]], first: str) -> None:
        for image, percent, guess in lines:
            print(f"{image}{' ' * (longest - cell_len(image))}  {percent}  {guess}")

    show = on_terminal if console.is_terminal else in_file
    started = False

    def write(row: Prediction) -> None:
        nonlocal started
        if not started:
            show([("image", "     %", "class")], "dim")
            started = True
        images = [shown(row.image), *[""] * len(row.guesses)]
        show(
            [(image, f"{g.percent:6.2f}", shown(g.name)) for image, g in zip(images, row.guesses, strict=False)], "bold"
        )

    return write


def shown(name: str | Path) -> str:
    """Return a name as it can be printed in a line: control characters and bytes that are no text are escaped."""
    return printable(name).replace("\n", r"\n")
