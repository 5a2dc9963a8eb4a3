"""The command `odconv profile`."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from odconv.models.build import create_model, split_name
from odconv.profiling.count import profile
from odconv.profiling.latency import describe, latencies
from odconv.profiling.published import NOTES, published_table
from odconv.profiling.table import short, show
from odconv.system.devices import Device, find_device


def profile_networks(
    names: Sequence[str] = (),
    *,
    kernel_num: int | None = None,
    reduction: float | None = None,
    num_classes: int = 1000,
    stem: Literal["standard", "small"] = "standard",
    image_size: int = 224,
    batch_size: int = 1,
    latency: bool = True,
    runs: int = 10,
    device: Device = "cpu",
    table: bool = False,
) -> None:
    """Count parameters and multiply-adds, and measure latency.

    Args:
        names: Networks, such as od_resnet18; odconv.list_models() has all names.
        kernel_num: Kernels a dynamic layer mixes; default: that of the network.
        reduction: Width of the attention's hidden layer, as a share of the channels; default: that of the network.
        num_classes: Outputs of the classifier.
        stem: First layers: standard, or small for images well below 100 pixels.
        image_size: Side of the images, in pixels.
        batch_size: Images at a time when latency is measured.
        latency: Measure latency, and its ratio to the static network's.
        runs: Timed runs, of which the median counts.
        device: Where latency is measured: cpu, gpu, or auto for a GPU if there is one.
        table: Print the published table of ODConv beside what is counted here.
    """
    if not names and not table:
        raise ValueError("name a network, such as od_resnet18, or give --table for the published ones")
    for option, value in {"image_size": image_size, "batch_size": batch_size, "runs": runs}.items():
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    place = find_device(device)
    if table:
        show(published_table())
        print(NOTES)
    for name in names:
        options: dict[str, Any] = {"num_classes": num_classes, "stem": stem}
        model = create_model(name, kernel_num=kernel_num, reduction=reduction, **options).eval()
        counts = profile(model, (3, image_size, image_size))
        show(counts.table)
        print(f"{name}: {counts.parameters / 1e6:.2f}M parameters, {short(counts.madds)} multiply-adds an image")
        if not latency:
            continue
        models = [model.to(place)]
        method, backbone = split_name(name)
        if method:
            models.append(create_model(backbone, **options).eval().to(place))
        ours, *static = latencies(models, torch.rand(batch_size, 3, image_size, image_size, device=place), runs)
        how = f"median of {runs} runs, batch {batch_size}, {image_size} x {image_size}, {describe(place)}"
        print(f"latency {ours * 1e3:.1f} ms ({how})")
        if static:
            print(f"{ours / static[0]:.2f} times that of {backbone} ({static[0] * 1e3:.1f} ms, measured in turns)")
