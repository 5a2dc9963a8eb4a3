"""The benchmark of accuracies: every cell can be built, is trained once, and is reported as it came out."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import report
from benchmarks.accuracy.cells import RECIPES, STUDIES, Recipe
from benchmarks.accuracy.networks import ABLATIONS, METHODS, build
from benchmarks.accuracy.report import difference, top1, write_report

NETWORK = ("imagenette", "mobilenetv2_050")


@pytest.fixture
def data(tmp_path):
    """Images of two colours, 20 to train on and 4 to test on of each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for number, colour in enumerate(("dark", "light")):
            folder = tmp_path / "data" / "imagenette96" / split / colour
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(128 * number, 128 * number + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        command.main()
    finally:
        torch.set_num_threads(threads)


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("network", ["mobilenetv2_050", "resnet18"])
def test_every_method_builds(network):
    static = sum(p.numel() for p in build(network, "static", "small", 10).parameters())
    for method in METHODS | ABLATIONS:
        with torch.device("meta"):
            model = build(network, method, "small", 10)
        dynamic = [m for m in model.modules() if hasattr(m, "kernel_num")]
        assert bool(dynamic) == (method not in ("static", "se"))
        assert {layer.kernel_num for layer in dynamic} <= {(METHODS | ABLATIONS)[method].kernel_num}
        assert (sum(p.numel() for p in model.parameters()) > static) == (method != "static")


def test_cells_are_told_apart():
    for scale in ("small", "full"):
        cells = {cell for study in STUDIES.values() for cell in study(scale, 2)}
        assert len({cell.name for cell in cells}) == len(cells)
        assert {cell.split for cell in cells if cell.study == "tuning"} == {"validation"}


def test_trains_once_goes_on_and_reports(tmp_path, data, monkeypatch, capsys):
    recipe = Recipe(32, 2, 0.02, batch_size=20)
    monkeypatch.setitem(RECIPES, "tiny", {NETWORK: recipe})
    monkeypatch.setattr(report, "SECONDS", 0)
    out = tmp_path / "accuracy.csv"
    arguments = ["--data", data, "--scale", "tiny", "--out", out, "--runs", tmp_path / "runs", "--seeds", 1]
    call(monkeypatch, *arguments, "--methods", "static")
    call(monkeypatch, *arguments, "--methods", "static", "odconv_4x")
    assert capsys.readouterr().out.count("epoch   1/2") == 2
    static, dynamic = rows(out)
    assert (static["method"], dynamic["method"], dynamic["kernel_num"]) == ("static", "odconv_4x", "4")
    assert static["split"] == "test"
    assert float(static["top1"]) in [100 * right / 8 for right in range(9)]
    assert not list((tmp_path / "runs").rglob("last.ckpt"))

    call(monkeypatch, *arguments, "--methods", "zero_heads", "--studies", "tuning")
    tuned = [row for row in rows(out) if row["study"] == "tuning"]
    assert {row["split"] for row in tuned} == {"validation"}
    assert {row["train_images"] for row in tuned} == {"36"}  # a tenth was cut off

    call(monkeypatch, "--report", "--out", out)
    text = (tmp_path / "accuracy.md").read_text()
    assert f"| static | 1 | {float(static['top1']):.2f} |" in text
    assert "## The recipe was chosen on: mobilenetv2_050, Imagenette, 36 training images" in text
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_differences_are_paired():
    one, other = {"0": 61.0, "1": 63.0, "2": 65.0}, {"0": 60.0, "1": 62.5, "2": 63.5, "3": 0.0}
    assert difference(one, other) == "+1.00 (-0.24 to +2.24)"  # t = 4.303 of two degrees of freedom
    assert difference({"0": 61.0}, other) == "+1.00"
    assert difference({"9": 61.0}, other) == ""


def test_what_diverged_counts_as_chance():
    assert top1([{"seed": "0", "top1": "61.5"}, {"seed": "1", "top1": "diverged"}]) == {"0": 61.5, "1": 10.0}


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        write_report(tmp_path / "none.csv", tmp_path / "costs.csv", tmp_path)
