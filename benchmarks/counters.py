"""What other programs count of a dynamic network, by themselves and with `odconv.profiling.counters`.

    python -m benchmarks.counters

Exact numbers, not times: multiply-adds of one image, parameters, and their bytes where the counter tells them. Rows go
to results/counters.csv; a counter that is not installed has none.
"""

import argparse
import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from benchmarks.common import RESULTS, Sheet, origin
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import odconv
from odconv.profiling import counters

Count = tuple[float | None, float | None, float | None]
"""Multiply-adds, parameters and bytes of the parameters."""


class Module(lightning.LightningModule):
    """A network for Lightning's summary."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model, self.example_input_array = model, x

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def ours(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    report = odconv.profile(model, x.shape)
    yield "", (report.madds, report.parameters, None)


def by_torch(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    yield "", (counter.get_total_flops() / 2, None, None)


def by_lightning(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    summary = ModelSummary(Module(model, x))
    yield "", (summary.total_flops / 2, summary.total_parameters, None)


def by_thop(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    import thop

    for line, ops in (("", {}), ("thop_ops", counters.thop_ops())):
        yield line, (*thop.profile(model, (x,), custom_ops=ops, verbose=False), None)


def by_ptflops(model: nn.Module, x: Tensor, backend: str) -> Iterator[tuple[str, Count]]:
    import ptflops

    for line, hooks in (("", {}), ("ptflops_hooks", counters.ptflops_hooks())):
        count = ptflops.get_model_complexity_info(
            model, tuple(x.shape[1:]), backend=backend, custom_modules_hooks=hooks, as_strings=False
        )
        yield line, (*count, None)


def by_calflops(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    import calflops

    mapping = calflops.pytorch_ops.MODULE_HOOK_MAPPING
    for line, hooks in (("", {}), ("calflops_hooks", counters.calflops_hooks())):
        mapping.update(hooks)
        _, madds, parameters = calflops.calculate_flops(
            model, tuple(x.shape), print_results=False, output_as_string=False
        )
        yield line, (madds, parameters, None)


def by_torchinfo(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    import torchinfo

    plain = torchinfo.summary(model, tuple(x.shape), verbose=0)
    for line, found in (("", plain), ("torchinfo_statistics", counters.torchinfo_statistics(plain))):
        yield line, (found.total_mult_adds, found.total_params, found.total_param_bytes)


def by_torchsummary(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    import torchsummary

    with contextlib.redirect_stdout(printed := io.StringIO()):
        torchsummary.summary(model, tuple(x.shape[1:]), device="cpu")
    (parameters,) = re.findall(r"Total params: ([\d,]+)", printed.getvalue())
    yield "", (None, float(parameters.replace(",", "")), None)


def by_fvcore(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    from fvcore.nn import FlopCountAnalysis, parameter_count

    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    yield "", (analysis.total(), parameter_count(model)[""], None)


def by_mmengine(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    from mmengine.analysis import get_model_complexity_info

    found = get_model_complexity_info(model, inputs=(x,), show_table=False, show_arch=False)
    yield "", (found["flops"], found["params"], None)


COUNTERS: dict[str, tuple[str, Callable[..., Iterator[tuple[str, Count]]], dict[str, Any]]] = {
    "odconv.profile": ("odconv", ours, {}),
    "FlopCounterMode": ("torch", by_torch, {}),
    "Lightning": ("lightning", by_lightning, {}),
    "thop": ("thop", by_thop, {}),
    "ptflops pytorch": ("ptflops", by_ptflops, {"backend": "pytorch"}),
    "ptflops aten": ("ptflops", by_ptflops, {"backend": "aten"}),
    "calflops": ("calflops", by_calflops, {}),
    "torchinfo": ("torchinfo", by_torchinfo, {}),
    "torchsummary": ("torchsummary", by_torchsummary, {}),
    "fvcore": ("fvcore", by_fvcore, {}),
    "mmengine": ("mmengine", by_mmengine, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="od_resnet18", help="network of the zoo")
    parser.add_argument("--kernel_num", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=RESULTS / "counters.csv", help="CSV to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sheet, where = Sheet(args.out, ("counter", "line", "model", "kernel_num", "size")), origin()
    for counter, (package, count, options) in COUNTERS.items():
        if find_spec(package) is None:
            continue
        torch.manual_seed(0)
        model = odconv.create_model(args.model, kernel_num=args.kernel_num).eval()
        for line, (madds, parameters, size) in count(model, torch.randn(1, 3, args.size, args.size), **options):
            row = {"counter": counter, "version": odconv.__version__ if package == "odconv" else version(package)}
            row |= {"line": line, "model": args.model, "kernel_num": args.kernel_num, "size": args.size}
            row["madds"] = "" if madds is None else round(madds)
            row["parameters"] = "" if parameters is None else round(parameters)
            row["parameter_bytes"] = "" if size is None else round(size)
            sheet.add([row | where])
            print(
                f"{counter} {line}: {madds and madds / 1e9} G, {parameters and parameters / 1e6} M, {size}", flush=True
            )


if __name__ == "__main__":
    main()
