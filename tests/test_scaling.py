"""The figures of docs/scaling.md: arithmetic is done again, measurements are looked up in the results."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip("torchvision")

from odconv import create_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
TEXT = " ".join(PAGE.split())
KERNELS = {"static": None, "1x": 1, "2x": 2, "4x": 4}
NETWORKS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_100")
GPUS = (8, 64, 1024)
STEP = 0.1
BACKWARD = 2 / 3
IMAGES, KILOBYTES = 1_281_167, 115.4
IMAGE = "short side 375, quality 98"


def table(header: str) -> list[list[str]]:
    """The cells of the one table whose header begins so."""
    (found,) = re.findall(rf"^\| {re.escape(header)}.*\n\|[-| ]*\n((?:\|.*\n)+)", PAGE, flags=re.M)
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found.splitlines()]


def build(network: str, form: str) -> torch.nn.Module:
    n = KERNELS[form]
    with torch.device("meta"):
        return create_model(network if n is None else f"od_{network}", kernel_num=n)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], torch.nn.Module]:
    return {(network, form): build(network, form) for network in NETWORKS for form in KERNELS}


@pytest.fixture(scope="module")
def gradients(models: dict[tuple[str, str], torch.nn.Module]) -> dict[tuple[str, str], int]:
    return {key: 4 * sum(parameter.numel() for parameter in model.parameters()) for key, model in models.items()}


def sent(gradients: int, processes: int) -> float:
    return 2 * (processes - 1) / processes * gradients


def bandwidth(gradients: int, processes: int, step: float) -> float:
    return sent(gradients, processes) / (BACKWARD * step)


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def row(name: str, **wanted: str) -> dict[str, str]:
    (found,) = rows(name, **wanted)
    return found


# --- arithmetic


def test_gradients(models: dict[tuple[str, str], torch.nn.Module], gradients: dict[tuple[str, str], int]) -> None:
    lines = table("network | form | parameters")
    assert [(line[0], line[1]) for line in lines] == list(models)
    for network, form, *figures in lines:
        model, size = models[network, form], gradients[network, form]
        parameters = list(model.parameters())[::-1]
        buckets, _ = dist._compute_bucket_assignment_by_size(
            parameters, [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20], [False] * len(parameters)
        )
        last = sum(4 * parameters[i].numel() for i in buckets[-1])
        channels = [module.num_features for module in model.modules() if isinstance(module, _BatchNorm)]
        assert figures == [
            f"{size // 4:,}",
            f"{size / 1e6:.1f}",
            f"{size / gradients[network, 'static']:.2f}",
            str(len(buckets)),
            f"{last / 1e6:.1f}",
            str(len(channels)),
            f"{4 * sum((2 * count + 1) + 2 * count for count in channels) / 1e3:.1f}",
        ]
    largest = max(float(line[6]) / float(line[3].replace(",", "")) for line in lines if "mobilenet" in line[0])
    assert f"up to {100 * largest:.0f} % of a MobileNetV2's gradients" in TEXT


def test_bandwidth(gradients: dict[tuple[str, str], int]) -> None:
    lines = table("network | form | 8 GPUs, MB")
    assert [(line[0], line[1]) for line in lines] == list(gradients)
    for network, form, *figures in lines:
        size = gradients[network, form]
        assert figures == [
            *(f"{sent(size, processes) / 1e6:,.1f}" for processes in GPUS),
            *(f"{bandwidth(size, processes, STEP) / 1e9:.2f}" for processes in GPUS),
        ]


def test_bandwidth_at_published_steps(gradients: dict[tuple[str, str], int]) -> None:
    lines = table("network | step, ms")
    assert len(lines) == 4
    for name, milliseconds, megabytes, needed in lines:
        network, form = name.split(", ")[:2]
        size = gradients[network, form]
        assert megabytes == f"{size / 1e6:.1f}"
        assert needed == f"{bandwidth(size, 1024, float(milliseconds) / 1e3) / 1e9:.1f}"


def test_ratios_in_the_text(gradients: dict[tuple[str, str], int]) -> None:
    def ratios(form: str, longer: float, networks: tuple[str, ...] = NETWORKS) -> list[float]:
        return [gradients[network, form] / gradients[network, "static"] / longer for network in networks]

    assert "2.56 times the bandwidth of the static ResNet18 and 2.37 times that of ResNet50" in TEXT
    assert [f"{ratio:.2f}" for ratio in ratios("4x", 1.5, ("resnet18", "resnet50"))] == ["2.56", "2.37"]
    assert "needs 0.82 and 0.90 times" in TEXT
    assert [f"{ratio:.2f}" for ratio in ratios("1x", 1.25, ("resnet18", "resnet50"))] == ["0.82", "0.90"]
    for text, form, networks, digits in (
        ("4x means 3.5 to 3.8 times", "4x", NETWORKS[:3], 1),
        ("and 2.3 to 3.3 times", "4x", NETWORKS[3:], 1),
        ("1.02 to 1.14 times", "1x", NETWORKS[:3], 2),
    ):
        assert text in TEXT
        low, high = re.findall(r"\d+\.\d+", text)
        assert f"{min(ratios(form, 1, networks)):.{digits}f}" == low
        assert f"{max(ratios(form, 1, networks)):.{digits}f}" == high


def test_powersgd(models: dict[tuple[str, str], torch.nn.Module]) -> None:
    def smaller(form: str, rank: int) -> float:
        """PyTorch's rule: a matrix of shape[0] rows is compressed if that halves it at least."""
        before = after = 0.0
        for parameter in models["resnet18", form].parameters():
            height, width = parameter.shape[0], parameter.numel() // parameter.shape[0]
            compressed = min(height, width, rank) * (height + width)
            before += height * width
            after += compressed if height * width > 2 * compressed else height * width
        return before / after

    assert f"{smaller('4x', 1):.2f} times with rank 1 and {smaller('4x', 4):.2f} times with rank 2 or 4" in TEXT
    assert f"{smaller('4x', 2):.2f}" == f"{smaller('4x', 4):.2f}"
    assert f"1x {smaller('1x', 1):.2f} times with any" in TEXT
    assert f"{smaller('1x', 4):.2f}" == f"{smaller('1x', 1):.2f}"
    assert f"{smaller('static', 4):.2f} times with rank 4" in TEXT


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
    assert f"{128 / 0.0052:,.0f} a second" in TEXT
    assert f"take {128 / 0.0052 / loaders['simplejpeg bytes']:.0f} cores" in TEXT


def test_shares_of_the_batch() -> None:
    lines = table("GPUs | images each, of 256")
    assert [line[0] for line in lines] == [f"{processes:,}" for processes in GPUS]
    for line, processes in zip(lines, GPUS, strict=True):
        assert line[1:] == [f"{256 / processes:g}", f"{32 * processes:,}", f"{math.ceil(IMAGES / (32 * processes)):,}"]
    assert f"{10 * math.ceil(IMAGES / 256):,} steps at 256, and {10 * math.ceil(IMAGES / 32768)} at 32,768" in TEXT


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
