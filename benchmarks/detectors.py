"""Detectors: ODConv against the static backbone in one run: training steps, inference, memory.

    python benchmarks/detectors.py

A training step is zero_grad, forward, the sum of the losses and backward, with the published freezing, on noise of the
given size with eight boxes (and masks) an image. Inference is on the same images, without a detection, since untrained
heads would give another number of them in each form: so it is the backbone, the pyramid, the proposals and the box
head, and all that is left out is the same for all forms. Memory is the highest resident memory of a pass over that
before it, parameters and gradients not counted, in a process of its own. Rows go to results/detectors.csv as they come.
"""

import argparse
import multiprocessing
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    PROCESS,
    RESULTS,
    Sheet,
    alternate,
    forget_peak,
    give_back_memory,
    origin,
    percentiles,
    published_form,
    resident_mb,
)
from torch import Tensor, nn

import odconv
from odconv.models.build import split_name
from odconv.ops import cpu

KEYS = ("detector", "backbone", "kernel_num", "height", "width", "batch", "mode", "form")
FORMS = ("static", "ours", "published")


def build(detector: str, backbone: str, n: int, form: str, size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    name, n_or_none = (split_name(backbone)[1], None) if form == "static" else (backbone, n)
    sizes = {"min_size": min(size), "max_size": max(size)}
    return odconv.create_detector(detector, name, kernel_num=n_or_none, score_threshold=1.0, **sizes)


def batch_of(count: int, size: tuple[int, int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    height, width = size
    images = list(torch.rand(count, 3, height, width, generator=generator))
    corners = torch.rand(count, 8, 2, generator=generator) * torch.tensor([width, height]) * 0.6
    sides = (0.05 + 0.3 * torch.rand(count, 8, 2, generator=generator)) * torch.tensor([width, height])
    targets = []
    for boxes in torch.cat([corners, corners + sides], dim=2):
        masks = torch.zeros(8, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(1, 9), "masks": masks})
    return images, targets


def train_step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], published: bool) -> None:
    torch.manual_seed(0)  # the same proposals are sampled
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    with published_form() if published else nullcontext():
        sum(model(images, targets).values()).backward()


def infer(model: nn.Module, images: list[Tensor], published: bool) -> None:
    with torch.inference_mode(), published_form() if published else nullcontext():
        model(images)


def memory(detector: str, backbone: str, n: int, form: str, size: tuple[int, int], count: int, train: bool) -> float:
    """Megabytes of one pass; for a process of its own, which has computed nothing yet."""
    libc = give_back_memory()
    cpu.available()
    small = build(detector, backbone, n, "static", (64, 64))
    train_step(small, *batch_of(1, (64, 64)), False)  # loads the code of every operator
    del small
    model = build(detector, backbone, n, form, size).train(train)
    for parameter in model.parameters():
        if train and parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter).fill_(0)
    images, targets = batch_of(count, size)
    libc.malloc_trim(0)
    forget_peak()
    before = resident_mb("VmRSS")
    if train:
        train_step(model, images, targets, form == "published")
    else:
        infer(model, images, form == "published")
    return round(resident_mb("VmHWM") - before, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=["faster_rcnn", "mask_rcnn", "retinanet"])
    parser.add_argument("--backbones", nargs="+", default=["od_resnet50", "od_mobilenetv2_100"])
    parser.add_argument("--kernel_num", type=int, default=4)
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1216], help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=("inference", "training"))
    parser.add_argument("--forms", nargs="+", default=["static", "ours"], choices=FORMS)
    parser.add_argument("--seconds", type=float, default=20, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=RESULTS / "detectors.csv", help="CSV to write")
    args = parser.parse_args()
    sheet, origin_of_rows, size = Sheet(args.out, KEYS), origin(), tuple(args.size)
    images, targets = batch_of(args.batch, size)
    for detector in args.detectors:
        for backbone in args.backbones:
            for mode in args.modes:
                train, runs = mode == "training", {}
                for form in args.forms:
                    model = build(detector, backbone, args.kernel_num, form, size).train(train)
                    published = form == "published"
                    runs[form] = (
                        partial(train_step, model, images, targets, published)
                        if train
                        else partial(infer, model, images, published)
                    )
                times = {form: percentiles(values) for form, values in alternate(runs, args.seconds).items()}
                del runs, model
                peaks: dict[str, Any] = {}
                if (PROCESS / "clear_refs").exists():
                    for form in args.forms:
                        with multiprocessing.get_context("spawn").Pool(1) as alone:
                            given = (detector, backbone, args.kernel_num, form, size, args.batch, train)
                            peaks[form] = alone.apply(memory, given)
                keys = {"detector": detector, "backbone": backbone, "kernel_num": args.kernel_num}
                keys |= {"height": size[0], "width": size[1], "batch": args.batch, "mode": mode}
                rows = []
                for form, values in times.items():
                    row = keys | {"form": form, **values}
                    row["ratio_to_static"] = round(values["median_ms"] / times["static"]["median_ms"], 3)
                    if peaks:
                        row |= {"peak_mb": peaks[form], "memory_ratio": round(peaks[form] / peaks["static"], 3)}
                    rows.append(row | origin_of_rows)
                sheet.add(rows)
                line = "  ".join(
                    f"{row['form']} {row['median_ms']:.0f} ms ({row['ratio_to_static']:.2f})"
                    + (f" {row['peak_mb']:.0f} MB ({row['memory_ratio']:.2f})" if peaks else "")
                    for row in rows
                )
                print(f"{detector} {backbone} n={args.kernel_num} {mode:9}  {line}", flush=True)


if __name__ == "__main__":
    main()
