"""What networks cost by `odconv.profile`: parameters and multiply-adds for one image.

    python -m benchmarks.costs

Counts, not times: every machine has the same. The published networks, and ResNet-18 by the other methods, at 224
pixels; the parameters of the published detectors; networks of ultralytics at 640 pixels where it is installed, with
the GFLOPs that it says itself after `odconv.yolo.convert`. Rows go to results/costs.csv.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from benchmarks.common import RESULTS, origin, write_rows
from torch import nn

import odconv
from odconv import yolo
from odconv.profiling import PUBLISHED, Published, profile
from odconv.profiling.published import count_published

OTHERS = (Published("cond_resnet18", 8, 0, None, 0, 0), Published("dy_resnet18", 4, 0, None, 0, 0))
"""Networks of ResNet-18's table that nobody published in this form."""
BACKBONES = {"resnet50": None, "od_resnet50": 4, "mobilenetv2_100": None, "od_mobilenetv2_100": 4}
COLUMNS = ("model", "kernel_num", "budget", "size", "parameters", "madds", "madds_as_published", "gflops")


Row = dict[str, Any]


def published() -> Iterator[Row]:
    for network in (*PUBLISHED, *OTHERS):
        counts, as_published = count_published(network)
        row = {"model": network.name, "kernel_num": network.kernel_num, "budget": network.budget, "size": 224}
        yield row | {"parameters": counts.parameters, "madds": counts.madds, "madds_as_published": as_published}


def detectors() -> Iterator[Row]:
    for detector, (backbone, n) in product(("faster_rcnn", "mask_rcnn"), BACKBONES.items()):
        with torch.device("meta"):
            model = odconv.create_detector(detector, backbone, kernel_num=n)
        yield {"model": f"{detector} {backbone}", "kernel_num": n, "parameters": count_parameters(model)}


def of_ultralytics() -> Iterator[Row]:
    import ultralytics

    for name, n in product(("yolov8n", "yolo11n"), (None, 1, 4)):
        model = ultralytics.YOLO(f"{name}.yaml").model.eval()
        if n is not None:
            yolo.convert(model, kernel_num=n)
        row = {"model": name, "kernel_num": n, "size": 640, "parameters": count_parameters(model)}
        yield row | {"madds": profile(model, (3, 640, 640)).madds, "gflops": round(model.info(imgsz=640)[3], 4)}


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    found = [*published(), *detectors(), *(of_ultralytics() if find_spec("ultralytics") else ())]
    write_rows(RESULTS / "costs.csv", [dict.fromkeys(COLUMNS) | row | origin() for row in found])


if __name__ == "__main__":
    main()
