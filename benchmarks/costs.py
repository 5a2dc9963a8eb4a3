"""What networks cost by `odconv.profile`: parameters and multiply-adds for one image.

    python -m benchmarks.costs

Counts, not times: every machine has the same. The published networks, and ResNet-18 by the other methods, at 224
pixels; networks of ultralytics at 640 where it is installed, with the GFLOPs that it says itself after
`odconv.yolo.convert`. Rows go to results/costs.csv.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.common import RESULTS, Sheet, origin

from odconv import yolo
from odconv.profiling import PUBLISHED, Published, profile
from odconv.profiling.published import count_published

OTHERS = (Published("cond_resnet18", 8, 0, None, 0, 0), Published("dy_resnet18", 4, 0, None, 0, 0))
"""Networks of ResNet-18's table that nobody published in this form."""
YOLO = ("yolov8n", "yolo11n")


def published() -> Iterator[dict[str, Any]]:
    for network in (*PUBLISHED, *OTHERS):
        counts, as_published = count_published(network)
        yield {
            "model": network.name,
            "kernel_num": network.kernel_num or "",
            "budget": network.budget or "",
            "size": 224,
            "parameters": counts.parameters,
            "madds": counts.madds,
            "madds_as_published": as_published,
            "gflops": "",
        }


def of_ultralytics() -> Iterator[dict[str, Any]]:
    import ultralytics

    for name in YOLO:
        for n in (None, 1, 4):
            model = ultralytics.YOLO(f"{name}.yaml").model.eval()
            if n is not None:
                yolo.convert(model, kernel_num=n)
            counts = profile(model, (3, 640, 640))
            same = {"model": name, "kernel_num": n or "", "budget": "", "size": 640, "parameters": counts.parameters}
            yield same | {"madds": counts.madds, "madds_as_published": "", "gflops": round(model.info(imgsz=640)[3], 4)}


def main() -> None:
    torch.set_num_threads(1)
    sheet, where = Sheet(RESULTS / "costs.csv", ("model", "kernel_num", "budget", "size")), origin()
    sheet.add([row | where for row in published()])
    if find_spec("ultralytics"):
        sheet.add([row | where for row in of_ultralytics()])


if __name__ == "__main__":
    main()
