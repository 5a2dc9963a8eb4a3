"""Every layer of ResNet-18, ResNet-50 and MobileNetV2 by itself: ours, the static convolution and the published form.

    python benchmarks/layers.py                                forward
    python benchmarks/layers.py --train                        forward and backward
    python benchmarks/layers.py --forms cpu product grouped    named backends of the operator beside the chosen one
    python benchmarks/layers.py --models od_resnet18 --size 32 --batch 1 4 8 16 64 \\
        --forms cpu samples shared product grouped \\
        --out benchmarks/results/layers_small_maps.csv         the maps of small images
    python benchmarks/layers.py --models od_resnet18 od_mobilenetv2_100 --batch 1 4 16 --dtype bfloat16 \\
        --forms cpu single grouped shared pointwise --out benchmarks/results/layers_bfloat16.csv
    python benchmarks/layers.py --models od_resnet18 od_mobilenetv2_100 --batch 1 16 --dtype autocast --train \\
        --forms cpu grouped shared pointwise --out benchmarks/results/layers_autocast.csv
                                                               and with --models od_resnet18 --size 32 besides

With --dtype autocast, weights and attentions are in float32 and maps in bfloat16; "float32" is the operator without
autocast. What is timed is the operator, its attentions given. Where taps meet padding alone, "all taps" keeps them, and
"fewest taps" leaves out all that it can; odconv.ops.reach chooses. Rows whose attentions are "kernel" have no other:
ours is compared with timm's CondConv2d there, where timm is installed. Rows go to results/layers_MODE.csv as they come,
the picture beside it; the limits in odconv.ops.policy are set by them. Ends with the rows in which ours is slower than
1.05 times the published form.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import MODELS, RESULTS, Sheet, alternate, origin, percentiles, published_conv
from plot import draw_layers
from torch import Tensor
from torch.nn import functional as F

import odconv
from odconv.layers import DynamicConv
from odconv.ops import BACKENDS, reach
from odconv.ops.contract import Attentions, Geometry
from odconv.ops.dynamic_conv import compute
from odconv.ops.policy import is_pointwise
from odconv.ops.reach import within_reach

KEYS = ("layer", "kernel_num", "attentions", "batch", "mode", "dtype", "form")
Run = Callable[[], Any]
TARGET = 1.05  # of the published form's time


class Layer(NamedTuple):
    """What the operator is given by one layer of a network, but for the batch."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    attentions: dict[str, tuple[int, ...]]
    geometry: Geometry

    def __str__(self) -> str:
        _, filters, _, taps, _ = self.weight
        channels, height, width = self.x
        return f"{channels}->{filters} {height}x{width} k{taps} s{self.geometry.stride[0]} g{self.geometry.groups}"


def layers_of(models: Sequence[str], n: int, size: int) -> list[Layer]:
    """The distinct dynamic layers of the networks on images of `size`, the largest maps first."""
    found: dict[str, Layer] = {}

    def note(module: DynamicConv, inputs: tuple[Tensor], y: Tensor) -> None:
        geometry = Geometry(module.stride, module.padding, module.dilation, module.groups)
        layer = Layer(inputs[0].shape[1:], module.weight.shape, module.attention.heads, geometry)
        found.setdefault(str(layer), layer)

    for name in models:
        model = odconv.create_model(name, kernel_num=n).eval()
        for module in model.modules():
            if isinstance(module, DynamicConv):
                module.register_forward_hook(note)
        with torch.inference_mode():
            model(torch.zeros(1, 3, size, size))
    return sorted(found.values(), key=lambda layer: (-layer.x[1], layer.geometry.groups > 1, -layer.weight[-1]))


def tensors_of(layer: Layer, batch: int, dtype: torch.dtype, train: bool) -> tuple[Tensor, Tensor, Attentions]:
    """Random x, weight and attentions; maps of 16 bits are channels-last, which they are fastest in."""
    fan_in = math.prod(layer.weight[2:])
    layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
    x = torch.randn(batch, *layer.x).to(dtype, memory_format=layout).requires_grad_(train)
    weight = (torch.randn(layer.weight) / fan_in**0.5).to(dtype).requires_grad_(train)
    gates = {
        name: torch.rand(batch, *shape, dtype=dtype, requires_grad=train) for name, shape in layer.attentions.items()
    }
    return x, weight, Attentions(**gates)


def contenders(
    layer: Layer, batch: int, forms: Sequence[str], dtype: torch.dtype, train: bool, autocast: bool
) -> dict[tuple[str, str], Run]:
    """What is timed, by attentions and form."""
    x, weight, attentions = tensors_of(layer, batch, torch.float32 if autocast else dtype, train)
    if autocast:
        x = x.detach().to(dtype, memory_format=torch.channels_last).requires_grad_(train)
    geometry = layer.geometry
    static = weight[0].detach().clone().requires_grad_(train)
    given = (x, weight, attentions, None, geometry)
    leaves = [tensor for tensor in (x, weight, *attentions) if tensor is not None]
    runs: dict[tuple[str, str], tuple[Run, list[Tensor]]] = {
        ("all", "static"): (partial(F.conv2d, x, static, None, *geometry), [x, static]),
        ("all", "published"): (partial(published_conv, *given), leaves),
        ("all", "auto"): (partial(compute, *given), leaves),
    }
    for form in forms:
        dense = form in ("shared", "product")  # which would unfold every channel of a depth-wise layer by itself
        impossible = (form == "single" and batch > 1) or (form == "pointwise" and not is_pointwise(weight, geometry))
        if not impossible and not (dense and geometry.groups > 1):
            runs["all", form] = (partial(compute, *given, backend=form), leaves)
    with reach_from(1):
        fewer = within_reach(layer.x[1:], layer.weight[3:], geometry)
    if fewer is not None and len(fewer.cut(weight[0, 0, 0], 0).flatten()) < weight[0, 0, 0].numel():
        for form, few in (("all taps", math.inf), ("fewest taps", 1)):
            runs["all", form] = (partial(compute_from, few, *given), leaves)
    if attentions.kernel is not None:
        alone = Attentions(attentions.kernel)
        runs["kernel", "auto"] = (partial(compute, x, weight, alone, None, geometry), [x, weight, alone.kernel])
        timm = timm_condconv(layer)
        if timm is not None:
            timm.to(dtype)
            runs["kernel", "timm"] = (partial(timm, x, alone.kernel), [x, timm.weight, alone.kernel])
    if autocast:
        runs["all", "float32"] = (partial(in_float32, *given), leaves)
        runs = {key: (partial(in_autocast, run), wanted) for key, (run, wanted) in runs.items()}
    if not train:
        return {key: run for key, (run, _) in runs.items()}
    return {key: partial(forward_and_backward, *run_and_leaves) for key, run_and_leaves in runs.items()}


@contextmanager
def reach_from(few: float) -> Iterator[None]:
    """Let the operator leave out taps that meet padding alone where there are so many times fewer without them."""
    before, reach.FEW = reach.FEW, few
    yield
    reach.FEW = before


def compute_from(few: float, *given: Any) -> Tensor:
    with reach_from(few):
        return compute(*given)


def timm_condconv(layer: Layer) -> torch.nn.Module | None:
    """timm's layer of the same shape, where timm is installed."""
    try:
        from timm.layers import CondConv2d
    except ImportError:
        return None
    n, filters, _, *taps = layer.weight
    stride, padding, dilation, groups = layer.geometry
    return CondConv2d(layer.x[0], filters, tuple(taps), stride, padding[0], dilation, groups, num_experts=n)


def in_autocast(run: Run) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


def in_float32(x: Tensor, weight: Tensor, attentions: Attentions, bias: None, geometry: Geometry) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return compute(x.float(), weight, attentions, bias, geometry).bfloat16()


def forward_and_backward(run: Run, leaves: list[Tensor]) -> None:
    y = run()
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def rows_of(times: dict[tuple[str, str], list[float]], keys: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each form, with its ratio to the static layer and to the published form."""
    measured = {key: percentiles(values) for key, values in times.items()}
    static, published = (measured["all", form]["median_ms"] for form in ("static", "published"))
    rows = []
    for (attentions, form), values in measured.items():
        ratios = {"ratio_to_static": round(values["median_ms"] / static, 3)}
        if attentions == "all":
            ratios["ratio_to_published"] = round(values["median_ms"] / published, 3)
        rows.append({**keys, "attentions": attentions, "form": form, **values, **ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="networks whose layers to take")
    parser.add_argument("--size", type=int, default=224, help="of the images whose maps to take, in pixels")
    parser.add_argument("--kernel_num", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--forms", nargs="+", choices=BACKENDS, default=[], help="named forms to time besides")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "autocast"], default="float32")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, help="CSV to write; default benchmarks/results/layers_MODE.csv")
    args = parser.parse_args()
    mode = "training" if args.train else "inference"
    sheet = Sheet(args.out or RESULTS / f"layers_{mode}.csv", KEYS)
    dtype = torch.bfloat16 if args.dtype == "autocast" else getattr(torch, args.dtype)
    where, slow = origin(), []
    for n in args.kernel_num:
        for layer in layers_of(args.models, n, args.size):
            for batch in args.batch:
                with torch.inference_mode(not args.train):
                    runs = contenders(layer, batch, args.forms, dtype, args.train, args.dtype == "autocast")
                    times = alternate(runs, args.seconds)
                keys = {"layer": str(layer), "kernel_num": n, "batch": batch, "mode": mode, "dtype": args.dtype}
                rows = rows_of(times, keys)
                sheet.add([row | where for row in rows])
                line = f"{layer!s:32s} n={n} batch {batch:3d} {mode}, static {rows[0]['median_ms']:8.3f} ms:"
                for row in rows[1:]:
                    alone = " (kernel alone)" if row["attentions"] == "kernel" else ""
                    line += f"  {row['form']}{alone} {row['ratio_to_static']:.2f}"
                print(line, flush=True)
                ours = next(row for row in rows if row["form"] == "auto")
                if ours["ratio_to_published"] > TARGET:
                    slow.append((ours["ratio_to_published"], line))
    draw_layers(sheet.path)
    print(f"{len(slow)} rows slower than {TARGET} times the published form")
    for ratio, line in sorted(slow, reverse=True):
        print(f"{ratio:5.2f}  {line}")


if __name__ == "__main__":
    main()
