"""The tables of README and docs say what the rows in benchmarks/results do."""

import csv
import re
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("torchvision")

from benchmarks import tables

UNMEASURED = {
    *("1.4 to 5.9 points", "1 to 10 %", "4.03 M", "4.08 M", "147.9 GB"),  # published
    *("2 %", "8 %", "1 to 7 %", "16 times", "231.2M"),  # arithmetic, of tables that are written from rows as well
    *(
        "20 MB",
        "2 GB",
        "32 MiB",
        "128 MiB",
        "50 times",
        "20 ms",
        "50 ms",
        "100 ms",
    ),  # limits, and what a sentence supposes
    *("4 seconds", "15 s", "30 seconds", "10 minutes"),  # waits
    *("0 %", "1 %", "4 %", "5 %", "95 %", "100 %"),  # thresholds, confidence, ends of scales
}
"""Figures with a unit that stand in sentences without a row."""


def test_every_page_says_what_its_rows_do() -> None:
    pages = [page.name for page in tables.differing()]
    assert not pages, f"python -m benchmarks.tables writes {pages}"


def test_measured_figures_in_sentences_name_their_rows() -> None:
    found = {page.name: measured - UNMEASURED for page in tables.PAGES if (measured := figures(page)) - UNMEASURED}
    assert not found, "neither links to a row (see benchmarks/tables.py), nor of the kinds in UNMEASURED"
    assert {figure for page in tables.PAGES for figure in figures(page)} == UNMEASURED


def figures(page: Path) -> set[str]:
    """The numbers with a unit on a page, but for code, tables made of rows, and links to rows."""
    text = page.read_text(encoding="utf-8")
    for left_out in (re.compile(r"^```.*?^```", re.M | re.S), tables.MARKED, tables.FIGURE, re.compile(r"`[^`]*`")):
        text = left_out.sub("", text)
    number = r"\d(?:[\d,.]*\d)?"
    unit = r"(?:%|ms|s|seconds?|minutes?|[kMG]i?B|M|G|points?|times)(?!\w)"
    return set(re.findall(rf"(?<![\w.,/^-])(?:{number} to )?{number} ?{unit}", text))


def test_every_table_stands_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert {name for _, name, *_ in tables.MARKED.findall(text)} == tables.TABLES.keys()
    assert text.count("<!-- rows: ") == text.count("<!-- end of rows -->") == len(tables.MARKED.findall(text))


def test_another_row_is_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- rows: serving -->\n\n<!-- end of rows -->\n\nafter\n")
    monkeypatch.setattr(tables, "PAGES", [page])
    assert tables.differing() == [page]
    page.write_text(tables.written(page.read_text()))
    assert tables.differing() == []
    assert page.read_text().startswith("before\n\n<!-- rows: serving -->\n\n| network |")
    assert page.read_text().endswith("|\n\n<!-- end of rows -->\n\nafter\n")
    with (tables.RESULTS / "serving.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["requests_per_s"] = "48.0"
    monkeypatch.setattr(tables, "read_rows", lambda path: rows)
    assert tables.differing() == [page]


def test_a_figure_in_a_sentence_is_that_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = '(../benchmarks/results/finetune.csv "start=warm_1x init=published lr=0.0025 epoch=1: top1")'
    assert tables.written(f"It is [1.0]{link}, or [1]{link}.") == f"It is [80.3]{link}, or [80]{link}."
    wanted = {"images": "short side 375, quality 98", "way": "pil", "kind": "whole", "mode": "training"}
    rate = int(tables.row("decoding", **wanted)["images_per_second"])
    words = " ".join(f"{name}='{value}'" for name, value in wanted.items())
    link = f'(../benchmarks/results/decoding.csv "{words}: images_per_second")'
    assert tables.written(f"[1,000]{link}, [1]{link}") == f"[{rate:,}]{link}, [{rate}]{link}"
    link = '(../benchmarks/results/finetune.csv "start=warm_1x|static lr=0.0025 epoch=3: top1")'
    assert tables.written(f"[1.0 to 1.0]{link}") == f"[85.8 to 86.0]{link}"
    link = '(../benchmarks/results/costs.csv "model=resnet18: parameters / 1e6")'
    assert tables.written(f"[1.00]{link}") == f"[11.69]{link}"
    with pytest.raises(ValueError, match="has 3 rows"):
        tables.written('[1](../benchmarks/results/finetune.csv "start=warm_1x init=published lr=0.0025: top1")')


def test_halves_are_rounded_up() -> None:
    assert [tables.fixed(value, 1) for value in ("80.25", "28.45", "0.05")] == ["80.3", "28.5", "0.1"]
    assert tables.fixed("147753984", 3, "1e9") == "0.148"


def test_rows_that_are_missing_or_several_are_named() -> None:
    with pytest.raises(ValueError, match=r"starts.csv has no rows with \{'method': 'none'\}"):
        tables.rows("starts", method="none")
    with pytest.raises(
        ValueError, match=r"starts.csv has 4 rows with \{'method': 'static', 'optimizer': 'sgd'\}, not one"
    ):
        tables.row("starts", method="static", optimizer="sgd")
