"""A run as its folder tells it: whole, unfinished, or with files that are missing or damaged."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite, nan
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from odconv.attentions.statistics import COLUMNS
from odconv.models.build import split_name
from odconv.system.text import number

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds; what is missing is empty.

    `epochs` are the rows of metrics.csv, numbers by the name of their column, nan where a cell holds none; `attentions`
    those of attentions.csv, likewise, but for the words `layer` and `attention`. `problems` says which files cannot be
    read, and why.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    epochs: list[Row] = field(default_factory=list)
    attentions: list[Row] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def dynamic(self) -> bool:
        """Whether the network has dynamic layers."""
        return bool(self.attentions) or split_name(str(self.config.get("arch")))[0] is not None

    @property
    def planned(self) -> int | None:
        """How many epochs the run shall have."""
        epochs = self.config.get("epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def progress(self) -> str:
        """How many epochs the run has had: "3 of 10"."""
        done = int(self.last("epoch")) if self.epochs else 0
        return f"{done} of {self.planned}" if self.planned else str(done)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; one that was taken up again for more epochs has to come there again."""
        return bool(self.result and self.epochs) and self.last("epoch") >= (self.planned or 0)

    @property
    def score(self) -> str:
        """The column of what is best: top-1 accuracy, or the average precision of a detector."""
        return "ap" if "detector" in self.config or self.values("ap") else "top1"

    @cached_property
    def best(self) -> Row:
        """The first epoch with the greatest score; an empty row where there is none."""
        measured = [row for row in self.epochs if isfinite(row.get(self.score, nan))]
        return max(measured, key=lambda row: row[self.score], default={})

    @property
    def scores(self) -> dict[str, str]:
        """The scores after the last epoch, and the best one, by what they are."""
        name = {"ap": "AP", "top1": "top-1"}[self.score]
        scores = {
            name: number(self.last(self.score), 2, " %"),
            f"best {name}": number(self.best.get(self.score), 2, " %"),
        }
        if self.score == "top1":
            scores |= {"top-5": number(self.last("top5"), 2, " %"), "validation loss": number(self.last("val_loss"), 4)}
        else:
            others = {"ap50": "AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}
            scores |= {
                title: number(self.last(column), 2, " %") for column, title in others.items() if self.values(column)
            }
        return scores

    def values(self, column: str) -> list[float]:
        """Return the finite numbers of a column of metrics.csv; none for a column that is missing."""
        return [row[column] for row in self.epochs if isfinite(row.get(column, nan))]

    def last(self, column: str) -> float:
        """Return a column's number in the last epoch, nan where there is none."""
        return self.epochs[-1].get(column, nan) if self.epochs else nan

    def median(self, column: str) -> float:
        """Return a column's median over the epochs, nan where there is none."""
        return median(self.values(column) or [nan])


def read_run(folder: str | Path) -> Run:
    """Read the folder of a run, which `odconv train` got as `out`; an OSError if it is none."""
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, and not the folder of a run")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.csv")):
        raise FileNotFoundError(f"the folder {folder} is no run: it holds neither config.yaml nor metrics.csv")
    content: dict[str, Any] = {}
    problems = []
    for name, (file, read) in FILES.items():
        try:
            content[name] = read((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
        except (ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
            problems.append(f"{file} cannot be read: {' '.join(str(error).split())}")
    return Run(folder, **content, problems=problems)


def _read_table(text: str, needed: Sequence[str] = ("epoch",), words: Sequence[str] = ()) -> list[Row]:
    rows: list[Row] = [
        {name: cell or "" if name in words else _number(cell) for name, cell in line.items() if name}
        for line in csv.DictReader(text.splitlines())
    ]
    if rows and (missing := [name for name in needed if name not in rows[0]]):
        raise ValueError(f"it has no column {missing[0]}")
    for index, row in enumerate(rows, start=1):
        if not isfinite(row["epoch"]):
            raise ValueError(f"row {index} has no number in the column epoch")
    return rows


def _number(cell: str | None) -> float:
    try:
        return float(cell or nan)
    except ValueError:
        return nan


def _read_values(text: str, load: Callable[[str], Any]) -> dict[str, Any]:
    if not isinstance(content := load(text), dict):
        raise ValueError("it holds no names with values")
    return {str(name): value for name, value in content.items()}


FILES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "config": ("config.yaml", partial(_read_values, load=yaml.safe_load)),
    "defaults": ("defaults.yaml", partial(_read_values, load=yaml.safe_load)),
    "epochs": ("metrics.csv", _read_table),
    "attentions": ("attentions.csv", partial(_read_table, needed=("epoch", *COLUMNS), words=COLUMNS[:2])),
    "result": ("result.json", partial(_read_values, load=json.loads)),
    "machine": ("machine.json", partial(_read_values, load=json.loads)),
}
