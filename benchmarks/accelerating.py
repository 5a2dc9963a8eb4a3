"""Networks of other people's dynamic layers, as they are and under `odconv.accelerate`, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.accelerating

timm's tf_efficientnet_cc_b0_4e, a ResNet-18 whose 3x3 convolutions are an ODConv2d as many repositories copied it, one
of KernelWarehouse at 1x whose layers are those of its published file, one of layers in the manner of FDConv, and
twelve blocks in the manner of EfficientAT's. The ratio is how many times as fast the accelerated one is; `saved_mb` is
what autograd keeps of a training step; `load` is the system's load average, to which the measurement itself adds 1.
Rows go to results/accelerating.csv.
"""

import argparse
import copy
import os
from functools import partial
from pathlib import Path

import timm
import torch
from benchmarks.common import RESULTS, Sheet, alternate, origin, percentiles, saved_mb
from tests.test_acceleration import Contextual, CopiedKW, CopiedODConv, Manager
from tests.test_folded_batch import Frequency
from torch import Tensor, nn
from torchvision.models import resnet18

import odconv


def copied_resnet18() -> nn.Module:
    """A ResNet-18 whose convolutions but for stem and shortcuts are copied ODConv2d with four kernels."""
    model = resnet18()
    for name, conv in [*model.named_modules()]:
        if type(conv) is nn.Conv2d and name != "conv1" and "downsample" not in name:
            size, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
            model.set_submodule(name, CopiedODConv(conv.in_channels, conv.out_channels, size, stride, padding))
    return model


def copied_kernelwarehouse() -> nn.Module:
    """A kw_resnet18 whose layers compute as in the published file."""
    model = odconv.create_model("kw_resnet18")
    manager = Manager(model.warehouse_manager.weights)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, odconv.KWConv2d):
            given = {"stride": layer.stride[0], "padding": layer.padding[0], "bias": False}
            copied = CopiedKW(manager, layer.pool, layer.in_channels, layer.out_channels, layer.kernel_size, **given)
            model.set_submodule(name, copied)
    model.warehouse_manager = manager
    return model


def frequency_resnet18() -> nn.Module:
    """A ResNet-18 whose 3x3 convolutions are in the manner of FDConv."""
    model = resnet18()
    for name, conv in [*model.named_modules()]:
        if type(conv) is nn.Conv2d and conv.kernel_size == (3, 3):
            layer = Frequency(conv.in_channels, conv.out_channels, 3, stride=conv.stride, padding=1, bias=False)
            model.set_submodule(name, layer)
    return model


class ContextBlock(nn.Module):
    """An inverted residual whose convolutions are chosen by one context vector."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, context = 4 * channels, channels // 4
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, context, 1), nn.ReLU())
        self.convs = nn.ModuleList(
            [
                Contextual(channels, wide, context, 1),
                Contextual(wide, wide, context, 3, groups=wide),
                Contextual(wide, channels, context, 1),
            ]
        )
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.05)
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)

    def forward(self, x: Tensor) -> Tensor:
        g, y = (self.context(x), None, None), x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(y, g)).relu()
        return x + y


def contextual_blocks() -> nn.Module:
    """Twelve such blocks of 96 channels, on maps an eighth as wide as the image."""
    return nn.Sequential(nn.Conv2d(3, 96, 8, 8), *(ContextBlock(96) for _ in range(12)))


NETWORKS = {
    "tf_efficientnet_cc_b0_4e": partial(timm.create_model, "tf_efficientnet_cc_b0_4e"),
    "resnet18 of copied ODConv2d": copied_resnet18,
    "resnet18 of copied KernelWarehouse": copied_kernelwarehouse,
    "resnet18 in the manner of FDConv": frequency_resnet18,
    "blocks in the manner of EfficientAT": contextual_blocks,
}


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def train(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=NETWORKS)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--round", type=int, default=1, help="number of the rows, to measure again beside others")
    parser.add_argument("--seconds", type=float, default=15, help="time for each comparison, after warming up")
    parser.add_argument("--out", type=Path, default=RESULTS / "accelerating.csv", help="CSV to write")
    args = parser.parse_args()
    sheet, where = Sheet(args.out, ("network", "mode", "batch", "size", "form", "threads", "round")), origin()
    for name in args.networks:
        torch.manual_seed(0)
        plain = NETWORKS[name]()
        accelerated = copy.deepcopy(plain)
        layers = len(odconv.accelerate(accelerated).layers)
        for mode, batch in (("inference", 1), ("inference", 8), ("training", 8)):
            x, run = torch.randn(batch, 3, args.size, args.size), infer if mode == "inference" else train
            forms = {"as it is": plain, "accelerated": accelerated}
            runs = {form: partial(run, model.train(mode == "training"), x) for form, model in forms.items()}
            measured = {form: percentiles(times) for form, times in alternate(runs, args.seconds, least=7).items()}
            load = round(os.getloadavg()[0], 1)
            ratio = round(measured["as it is"]["median_ms"] / measured["accelerated"]["median_ms"], 2)
            rows = [
                {"network": name, "layers": layers, "mode": mode, "batch": batch, "size": args.size, "form": form}
                | {"round": args.round}
                | times
                | {"times_as_fast": 1.0 if form == "as it is" else ratio, "load": load, "timm": timm.__version__}
                | ({"saved_mb": saved_mb(forms[form], x)} if mode == "training" else {})
                | where
                for form, times in measured.items()
            ]
            sheet.add(rows)
            print(f"{name} {mode} {batch}: {ratio} times as fast, load {load}", flush=True)


if __name__ == "__main__":
    main()
