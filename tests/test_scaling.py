"""The figures of docs/scaling.md: arithmetic is done again, measurements are looked up in the results."""

import csv
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from odconv import create_model

pytestmark = pytest.mark.slow  # of benchmarks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
KERNELS = {"static": None, "1x": 1, "2x": 2, "4x": 4}
NETWORKS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_100")
GPUS = (8, 64, 1024)
STEP = 0.1
BACKWARD = 2 / 3
IMAGES, KILOBYTES = 1_281_167, 115.4
IMAGE = "short side 375, quality 98"


def table(header: str) -> list[list[str]]:
    """The cells of the one table whose header begins so."""
    (found,) = re.findall(rf"^\| {re.escape(header)}.*\n\|[-| ]*\n((?:\|.*\n)+)", PAGE, flags=re.M)
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found.splitlines()]


def bandwidth(gradients: int, processes: int) -> float:
    return 2 * (processes - 1) / processes * gradients / (BACKWARD * STEP)


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def row(name: str, **wanted: str) -> dict[str, str]:
    (found,) = rows(name, **wanted)
    return found


# --- arithmetic


def test_bandwidth() -> None:
    lines = iter(table("network | form | gradients, MB | to static"))
    for network in NETWORKS:
        static = 0
        for form, n in KERNELS.items():
            with torch.device("meta"):
                model = create_model(network if n is None else f"od_{network}", kernel_num=n)
            size = 4 * sum(parameter.numel() for parameter in model.parameters())
            static = size if form == "static" else static
            assert next(lines) == [
                network,
                form,
                f"{size / 1e6:.1f}",
                f"{size / static:.2f}",
                *(f"{bandwidth(size, processes) / 1e9:.2f}" for processes in (8, 1024)),
            ]
    assert next(lines, None) is None


def test_data_plan() -> None:
    loaders = {
        way: float(row("decoding.csv", images=IMAGE, mode="training", kind="loader", way=way)["images_per_second"])
        for way in ("pil", "simplejpeg in place", "simplejpeg bytes")
    }
    lines = table("*r*, images a second a GPU")
    assert len(lines) == 4
    for line in lines:
        rate = float(line[0].replace(",", ""))
        assert line[1:] == [
            *(f"{rate / decoded:.1f}" for decoded in loaders.values()),
            f"{rate * KILOBYTES / 1e3:.1f}",
            *(f"{processes * rate * KILOBYTES / 1e6:.2f}" for processes in GPUS),
            *(f"{IMAGES / (processes * rate):.1f}" for processes in GPUS),
        ]


# --- what was measured


def test_measured_communication() -> None:
    lines = table("network | form | gradients, MB | all-reduce alone")
    assert len(lines) == 6
    for network, form, *figures in lines:
        model = network if form == "static" else f"od_{network}"
        about = {"model": model, "kernel_num": str(KERNELS[form] or "")}
        alone = row("communication.csv", kind="all-reduce", **about)
        norms = row("communication.csv", kind="sync_bn", **about)
        steps = {line["way"]: line for line in rows("communication.csv", kind="step", **about)}

        def milliseconds(line: dict[str, str]) -> str:
            value = float(line["median_ms"])
            return f"{value:.1f}" if value < 100 else f"{value:.0f}"

        assert figures == [
            f"{int(alone['bytes']) / 1e6:.1f}",
            *(milliseconds(line) for line in (alone, steps["none"], steps["plain"])),
            *(
                f"{100 * float(steps[way]['exposed']):.1f} %" if way in steps else ""
                for way in ("plain", "bucket view", "buckets of 5 MB", "bf16", "fp16")
            ),
            norms["messages"],
            milliseconds(norms),
        ]


def test_measured_images_a_second() -> None:
    lines = table("images a second of a core")
    assert len(lines) == 10
    ways = ("pil", "simplejpeg in place", "simplejpeg bytes", "pil draft", "opencv bytes")
    for line in lines:
        mode, images = line[0].removesuffix(", loader").split(", ", 1)
        kind = "loader" if line[0].endswith("loader") else "whole"
        found = {measured["way"]: measured for measured in rows("decoding.csv", images=images, mode=mode, kind=kind)}
        rates = [f"{int(found[way]['images_per_second']):,}" if way in found else "" for way in ways]
        assert line[1:] == [found["pil"]["kilobytes"], *rates]


def test_measured_steps_of_an_image() -> None:
    lines = table("step, ms an image")
    assert len(lines) == 7
    for step, *times in lines:
        for way, figure in zip(("pil", "simplejpeg"), times, strict=True):
            name = step if step == "read" else f"{way}: {step}"
            found = rows("decoding.csv", images=IMAGE, mode="training", kind="step", way=name)
            assert figure == (found[0]["median_ms"] if found else "")
