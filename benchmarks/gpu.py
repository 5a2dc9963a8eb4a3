"""Everything about the GPU in one run of under ten minutes: correctness, layers, mixing, networks; CSVs and a picture.

    python benchmarks/gpu.py                              all parts, most important first, until the minutes are spent
    python benchmarks/gpu.py --parts networks compiled    some of them
    python benchmarks/gpu.py --device cpu --quick --out DIR   a dry run of the logic; its times mean nothing

Layers run on bfloat16, channels-last maps, as CUDA graphs and from a cold cache, so that no row measures Python. Their
rows name the policy's choice, and that of the tuner, which the form auto takes: it measures anew in each run, eager
calls from a warm cache. Training steps of networks are forward, backward and update under bfloat16 autocast; inference
is in bfloat16. Peak memory is what a step takes beyond parameters, gradients and optimizer state. Ratios are to the
static layer or network in the same row. Exits with 1 where a result is wrong. With TRITON_INTERPRET=1 the dry run
checks the Triton form too.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import MODELS, RESULTS, alternate, origin, percentiles, published_conv, write_rows
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.functional import dynamic_conv
from odconv.layers import conv as layer_room
from odconv.models.build import split_name
from odconv.ops import BACKENDS, triton
from odconv.ops.contract import Attentions, Geometry
from odconv.ops.dynamic_conv import compute
from odconv.ops.policy import choose
from odconv.ops.tuning import cuda as tuner
from odconv.ops.tuning import memory
from odconv.profiling.explanation import chosen

Run = Callable[[], Any]
Rows = list[dict[str, Any]]
PARTS = ("correctness", "networks", "layers", "mixing", "compiled")
BY_NAME = ("single", "shared", "product", "pointwise", "grouped", "triton")
FORMS = ("auto", *(form for form in BY_NAME if form in BACKENDS))
SHAPES = (  # channels, filters, map, kernel, stride, groups: layers of ResNet-18, ResNet-50 and MobileNetV2
    (64, 64, 56, 3, 1, 1),
    (128, 128, 28, 3, 1, 1),
    (256, 256, 14, 3, 1, 1),
    (256, 512, 14, 3, 2, 1),
    (512, 512, 7, 3, 1, 1),
    (64, 256, 56, 1, 1, 1),
    (256, 64, 56, 1, 1, 1),
    (1024, 256, 14, 1, 1, 1),
    (512, 2048, 7, 1, 1, 1),
    (144, 144, 56, 3, 1, 144),
    (960, 960, 7, 3, 1, 960),
    (24, 144, 56, 1, 1, 1),
    (960, 320, 7, 1, 1, 1),
)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of norm(error) / norm(exact)
COLD = 256 * 2**20  # bytes written between two runs of a layer: more than any cache holds


class Bench:
    """The machine, the time that is left, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.cuda, self.device, self.quick, self.seconds = args.device != "cpu", args.device, args.quick, args.seconds
        self.out, self.ends = args.out, time.perf_counter() + 60 * args.minutes
        self.where = origin() | ({"commit": args.commit} if args.commit else {})
        if self.cuda:
            versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
            self.where |= {"machine": torch.cuda.get_device_name()} | versions
        self.left_out: list[str] = []

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left for a row; those that had to be left out are reported at the end."""
        if self.ends - time.perf_counter() > seconds:
            return True
        self.left_out.append(f"{what}: no time left")
        return False

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def times(self, runs: dict[str, Run], cold: bool = False) -> dict[str, list[float]]:
        """Milliseconds of each run on the device, taken in turns."""
        if not self.cuda:
            return alternate(runs, self.seconds)
        flush = torch.empty(COLD if cold else 0, dtype=torch.int8, device=self.device)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        started = time.perf_counter()
        while time.perf_counter() - started < self.seconds or len(next(iter(events.values()))) < 5:
            for name, run in runs.items():
                flush.zero_()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                events[name].append((begin, end))
        return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}

    def ready(self, what: str, runs: dict[str, Run], graphs: bool) -> dict[str, Run]:
        """The runs that work, warmed up, as CUDA graphs where asked; the others are reported."""
        working = {}
        for name, run in runs.items():
            try:
                working[name] = captured(run) if graphs and self.cuda else warmed_up(run)
            except Exception as error:  # one form that fails, most likely out of memory, must not end the others
                self.left_out.append(f"{what}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
                if self.cuda:
                    torch.cuda.empty_cache()
        return working

    def row(self, what: str, keys: dict[str, Any], runs: dict[str, Run], cold: bool, base: str = "static") -> Rows:
        """One row of each run: percentiles, and the ratio to the base."""
        if base not in runs:
            return []
        measured = {name: percentiles(times) for name, times in self.times(runs, cold).items()}
        rows = []
        for name, values in measured.items():
            ratio = round(values["median_ms"] / measured[base]["median_ms"], 3)
            rows.append(keys | {"form": name} | values | {f"ratio_to_{base}": ratio})
        shown = "  ".join(f"{row['form']} {row[f'ratio_to_{base}']:.2f}" for row in rows if row["form"] != base)
        print(f"{what:58s} {base} {measured[base]['median_ms']:8.3f} ms:  {shown}", flush=True)
        return rows

    def write(self, name: str, rows: Rows) -> None:
        if rows:
            write_rows(self.out / name, [row | self.where for row in rows])


def warmed_up(run: Run) -> Run:
    for _ in range(2):
        run()
    return run


def captured(run: Run) -> Run:
    """The run as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def layer_tensors(
    shape: tuple[int, ...], n: int, batch: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor | None], dict[str, int], Tensor]:
    """The operator's arguments for one layer of an ODConv network, and a gradient for its output."""
    channels, filters, side, taps, stride, groups = shape
    sizes = {
        "x": (batch, channels, side, side),
        "weight": (n, filters, channels // groups, taps, taps),
        "kernel": (batch, n) if n > 1 else None,
        "spatial": (batch, taps, taps) if taps > 1 else None,
        "channel": (batch, channels),
        "filter": (batch, filters) if groups == 1 else None,
    }
    tensors = {}
    for name, size in sizes.items():
        value = None if size is None else (torch.randn if name in ("x", "weight") else torch.rand)(size, device=device)
        if name == "weight":
            value = value / math.sqrt(channels // groups * taps**2)
        elif name == "kernel" and value is not None:
            value = value / value.sum(1, keepdim=True)
        tensors[name] = None if value is None else value.to(dtype)
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    out = (side + 2 * (taps // 2) - taps) // stride + 1
    upstream = torch.randn(batch, filters, out, out, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    return tensors, {"stride": stride, "padding": taps // 2, "dilation": 1, "groups": groups}, upstream


def forms_for(batch: int, taps: int, groups: int) -> list[str]:
    """The forms that make sense for a layer: no unfolding where every channel is a group."""
    forms = [form for form in FORMS if groups == 1 or form in ("auto", "grouped", "triton")]
    possible = {"single": batch == 1, "pointwise": taps == 1}
    return [form for form in forms if possible.get(form, True)]


def value_and_gradients(
    conv: Callable[..., Tensor], tensors: dict[str, Tensor | None], upstream: Tensor, **options: Any
) -> list[Tensor]:
    """The output, and the gradient of every tensor."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    y = conv(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves.values() if t is not None], upstream)]


def check_correctness(bench: Bench) -> bool:
    """Every form against float64 on fresh random inputs, in values, gradients and, for Triton, in bits run by run."""
    right = True
    with strictness():
        for dtype, bound in BOUNDS.items():
            worst: dict[str, tuple[float, str]] = {}
            for shape, n in itertools.product(quick_shapes() if bench.quick else SHAPES, (1, 4)):
                where = f"{shape_name(shape)} n={n}"
                if not bench.has_time(f"correctness, {dtype}, {where}", 5):
                    continue
                batches = (1, 3) if shape[2] < 56 else (3,)
                for batch in batches:
                    tensors, geometry, upstream = layer_tensors(shape, n, batch, dtype, bench.device)
                    exact = {name: None if t is None else t.double() for name, t in tensors.items()}
                    wanted = value_and_gradients(
                        dynamic_conv, exact, upstream.double(), **geometry, backend="reference"
                    )
                    for form in forms_for(batch, shape[3], geometry["groups"]):
                        if form == "triton" and not bench.cuda and (dtype == torch.bfloat16 or not triton.INTERPRETED):
                            continue  # the interpreter's product takes the bits of bfloat16 for integers
                        error = relative_error(tensors, upstream, geometry | {"backend": form}, wanted)
                        worst[form] = max(worst.get(form, (0.0, "")), (error, f"{where} batch {batch}"))
            for form, (error, place) in worst.items():
                verdict = "" if error < bound else f"  WRONG: not below {bound}"
                right = right and not verdict
                print(f"correctness {dtype!s:15s} {form:10s} error {error:.2e} at {place}{verdict}", flush=True)
    return right


def relative_error(
    tensors: dict[str, Tensor | None], upstream: Tensor, options: dict[str, Any], wanted: list[Tensor]
) -> float:
    """The largest norm(error) / norm(exact) of value and gradients; infinite for NaN and for bits that change."""
    try:
        found = value_and_gradients(dynamic_conv, tensors, upstream, **options)
        again = value_and_gradients(dynamic_conv, tensors, upstream, **options)
    except Exception as error:
        print(f"{options['backend']}: {type(error).__name__}: {error}")
        return math.inf
    if options["backend"] == "triton" and not all(a.equal(b) for a, b in zip(found, again, strict=True)):
        return math.inf
    errors = [((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)


@contextmanager
def strictness() -> Iterator[None]:
    """Float32 in full, and NaN in fresh memory, so that what a kernel forgets to write is seen."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = tf32


def quick_shapes() -> tuple[tuple[int, ...], ...]:
    return (8, 8, 5, 3, 2, 1), (8, 24, 4, 1, 1, 1), (8, 8, 5, 3, 1, 8)


def shape_name(shape: tuple[int, ...]) -> str:
    channels, filters, side, taps, stride, groups = shape
    return f"{channels}->{filters} {side}x{side} k{taps} s{stride} g{groups}"


def run_layers(bench: Bench) -> Rows:
    """Forward, and forward with all gradients, of every form on every layer."""
    rows: Rows = []
    shapes = quick_shapes() if bench.quick else SHAPES
    for batch, shape, n in itertools.product((1, 2) if bench.quick else (32, 128, 8, 1), shapes, (1, 4)):
        for mode in ("inference", "training"):
            what = f"{shape_name(shape)} n={n} batch {batch} {mode}"
            if not bench.has_time(what, 3):
                continue
            tensors, geometry, upstream = layer_tensors(shape, n, batch, torch.bfloat16, bench.device)
            static: dict[str, Tensor | None] = {"input": tensors["x"], "weight": tensors["weight"][0].clone()}
            forms: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor | None]]] = {
                "static": (F.conv2d, static),
                "published": (published_layer, tensors),
            }
            for form in forms_for(batch, shape[3], geometry["groups"]):
                if form != "triton" or bench.cuda:
                    forms[form] = (partial(dynamic_conv, backend=form), tensors)
            runs: dict[str, Run] = {}
            for form, (conv, given) in forms.items():
                if mode == "inference":
                    runs[form] = partial(without_gradients, conv, given, **geometry)
                else:
                    runs[form] = partial(value_and_gradients, conv, given, upstream, **geometry)
            keys = {"layer": shape_name(shape), "kernel_num": n, "batch": batch, "mode": mode}
            runs = bench.ready(what, runs, graphs=True)
            choices = chosen_backends(tensors, geometry, mode == "training")
            rows += bench.row(what, keys | choices, runs, cold=True)
            print(" " * 20 + "  ".join(f"{who}: {backend}" for who, backend in choices.items()), flush=True)
    return rows


def chosen_backends(tensors: dict[str, Tensor | None], geometry: dict[str, int], training: bool) -> dict[str, str]:
    """What the policy chooses for a layer, and what the tuner did; nothing where it measured nothing."""
    x, weight = tensors["x"], tensors["weight"]
    sizes = Geometry(*((geometry[name],) * 2 for name in ("stride", "padding", "dilation")), geometry["groups"])
    present = [name for name, tensor in tensors.items() if tensor is not None]
    choice, times = chosen(x, weight, x.device, present, sizes, training)
    return {"policy": choose(x, weight, sizes, training).backend, "tuned": choice.backend if times else ""}


def without_gradients(conv: Callable[..., Tensor], tensors: dict[str, Tensor | None], **options: Any) -> Tensor:
    with torch.no_grad():
        return conv(**tensors, **options)


def eager_mixing(weight: Tensor, kernel: Tensor, channel: Tensor, filter: Tensor, spatial: Tensor | None) -> Tensor:
    """Mixed kernels, (B, O, C, k, k), as plain PyTorch."""
    mixed = (kernel @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    mixed = mixed * filter[:, :, None, None, None] * channel[:, None, :, None, None]
    return mixed if spatial is None else mixed * spatial[:, None, None]


def run_mixing(bench: Bench) -> Rows:
    """Mixing alone, forward and gradients: the hand-written kernel, plain PyTorch, and that compiled."""
    if not triton.INSTALLED:
        bench.left_out.append("mixing: Triton is not installed")
        return []
    from odconv.ops.triton import launch

    rows: Rows = []
    compiled = torch.compile(eager_mixing, dynamic=True)
    shapes = [shape for shape in (quick_shapes() if bench.quick else SHAPES) if shape[5] == 1]
    for batch, shape in itertools.product((2,) if bench.quick else (32, 8), shapes):
        what = f"mixing {shape_name(shape)} n=4 batch {batch}"
        if not bench.has_time(what, 40):
            continue
        tensors, _, _ = layer_tensors(shape, 4, batch, torch.bfloat16, bench.device)
        del tensors["x"]
        given: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        weight, attentions = given["weight"], Attentions(**{name: tensors[name] for name in Attentions._fields})
        laid, _ = launch.lay(weight, 1)
        mixed = laid.new_empty(batch, *laid.shape[1:])
        upstream = torch.randn(batch, *weight.shape[1:], dtype=weight.dtype, device=bench.device)
        d_laid = laid.new_zeros((launch.split_batch(laid, 1, batch), *laid.shape), dtype=torch.float32)

        def by_hand(gradients: bool, weight=weight, attentions=attentions, mixed=mixed, d_laid=d_laid) -> None:
            laid, groups = launch.lay(weight, 1)
            launch.mix(laid, attentions, groups, mixed)
            if gradients:
                launch.mix_gradient(mixed, laid, attentions, groups, d_laid.zero_())
                d_laid.sum(0)

        for mode in ("inference", "training"):
            plain = given | {"spatial": given.get("spatial")}
            runs: dict[str, Run] = {"triton": partial(by_hand, mode == "training")} if bench.cuda else {}
            for name, mix in (("eager", eager_mixing), ("compiled", compiled)):
                if mode == "inference":
                    runs[name] = partial(without_gradients, mix, plain)
                else:
                    runs[name] = partial(value_and_gradients, mix, plain, upstream)
            keys = {"layer": shape_name(shape), "kernel_num": 4, "batch": batch, "mode": f"mixing, {mode}"}
            rows += bench.row(f"{what} {mode}", keys, bench.ready(what, runs, graphs=True), cold=True, base="compiled")
    return rows


def published_layer(
    x: Tensor,
    weight: Tensor,
    kernel: Tensor | None,
    spatial: Tensor | None,
    channel: Tensor | None,
    filter: Tensor | None,
    **geometry: int,
) -> Tensor:
    """The published form with the arguments of dynamic_conv, but for the bias."""
    sizes = ((geometry[name],) * 2 for name in ("stride", "padding", "dilation"))
    return published_conv(
        x, weight, Attentions(kernel, spatial, channel, filter), None, Geometry(*sizes, geometry["groups"])
    )


def published_in_bfloat16(
    x: Tensor, weight: Tensor, attentions: Attentions, bias: None, geometry: Geometry, **_: Any
) -> Tensor:
    """The published form with all its tensors in bfloat16, as they are under its own autocast."""
    low = Attentions(*(None if a is None else a.bfloat16() for a in attentions))
    return published_conv(x.bfloat16(), weight.bfloat16(), low, bias, geometry)


FORCED = {form: partial(compute, backend=form) for form in BACKENDS} | {"published": published_in_bfloat16}


class Network:
    """One network in one form, for training steps and for inference."""

    def __init__(self, bench: Bench, name: str, n: int | None, form: str, training: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        options = {} if n is None else {"kernel_num": n}
        model = odconv.create_model(name, **options).to(bench.device).train(training)
        model = nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
        self.model = model if training else model.to(torch.bfloat16)
        self.called: Callable[..., Tensor] = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
        self.form, self.bench = form, bench

    def computing(self) -> Any:
        """Let every dynamic layer compute in this network's form."""
        if self.form not in FORCED:
            return nullcontext()
        return mock.patch.object(layer_room, "compute", FORCED[self.form])

    def infer(self, x: Tensor) -> Tensor:
        with self.computing(), torch.inference_mode():
            return self.called(x)

    def step(self, x: Tensor, labels: Tensor) -> None:
        with self.computing(), torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.called(x), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # memory of the gradients is no part of a step's peak

    def peak_mb(self, x: Tensor, labels: Tensor) -> float:
        """Megabytes that a step takes beyond what is there before and after it."""
        if not self.bench.cuda:
            return math.nan
        self.bench.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(x, labels)
        self.bench.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def run_networks(bench: Bench, compiled: bool) -> Rows:
    """A training step and inference of the networks, eager (as CUDA graphs for a batch of one) or compiled."""
    rows: Rows = []
    forms = ("auto", *(["triton"] if "triton" in BACKENDS and bench.cuda else []), *([] if compiled else ["published"]))
    size = 32 if bench.quick else 224
    plans = [("training", 2 if bench.quick else 128), ("inference", 1), ("inference", 2 if bench.quick else 128)]
    models = ("od_resnet18",) if bench.quick else MODELS
    for (mode, batch), name, n in itertools.product(plans, models, (1, 4)):
        way = ("compiled" if compiled else "eager") + (" as a graph" if (mode, batch) == ("inference", 1) else "")
        what = f"{name} n={n} batch {batch} {mode} {way}"
        if not bench.has_time(what, 10 if bench.quick else 150 if compiled else 40):
            continue
        torch._dynamo.reset()
        x = torch.randn(batch, 3, size, size, device=bench.device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(1000, (batch,), device=bench.device)
        runs: dict[str, Run] = {}
        networks: dict[str, Network] = {}
        for form in ("static", *forms):
            own = (split_name(name)[1], None) if form == "static" else (name, n)
            network = networks[form] = Network(bench, *own, form, mode == "training", compiled)
            if mode == "training":
                runs[form] = partial(network.step, x, labels)
            else:
                runs[form] = partial(network.infer, x.to(torch.bfloat16))
        runs = bench.ready(what, runs, graphs=(mode, batch) == ("inference", 1))
        keys = {"model": name, "kernel_num": n, "batch": batch, "size": size, "mode": mode, "way": way}
        found = bench.row(what, keys, runs, cold=False)
        peaks = {form: networks[form].peak_mb(x, labels) for form in runs} if mode == "training" else {}
        for row in found:
            peak, base = peaks.get(row["form"], math.nan), peaks.get("static", math.nan)
            row |= {"peak_mb": peak, "peak_ratio_to_static": round(peak / base, 3)}
        if peaks:
            print(
                " " * 20 + "peak memory:  " + "  ".join(f"{form} {peak} MiB" for form, peak in peaks.items()),
                flush=True,
            )
        rows += found
    return rows


def draw(rows: Rows, path: Path) -> None:
    """Ratio by layer and batch: a table for each mode and number of kernels, with the best form and the published."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(2, 2, figsize=(6 + 2.4 * len(batches), 2 + 0.9 * len(layers)), layout="constrained")
    for axis, (mode, n) in zip(axes.flat, itertools.product(("inference", "training"), (1, 4)), strict=True):
        ratios = torch.full((len(layers), len(batches)), math.nan)
        for i, j in itertools.product(range(len(layers)), range(len(batches))):
            cell = {
                row["form"]: row["ratio_to_static"]
                for row in rows
                if (row["layer"], row["batch"], row["mode"], row["kernel_num"]) == (layers[i], batches[j], mode, n)
            }
            published = cell.pop("published", math.nan)
            cell = {form: ratio for form, ratio in cell.items() if form not in ("static", "auto")}
            if cell:
                best = min(cell, key=cell.__getitem__)
                ratios[i, j] = cell[best]
                axis.text(
                    j, i, f"{cell[best]:.2f} {best}\n(published {published:.1f})", ha="center", va="center", size=7
                )
        picture = axis.imshow(ratios.log2(), cmap="RdYlGn_r", vmin=-1, vmax=2, aspect="auto")
        axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axis.set_yticks(range(len(layers)), layers, size=8)
        axis.set_title(f"{mode}, n = {n}")
    bar = figure.colorbar(picture, ax=axes, ticks=[-1, 0, 1, 2], shrink=0.6)
    bar.ax.set_yticklabels(["0.5", "1", "2", "4"])
    bar.set_label("time over the static layer's")
    figure.savefig(path, dpi=120)
    print(f"picture in {path}")


@contextmanager
def own_tuning(cuda: bool) -> Iterator[None]:
    """Let the tuner know nothing of earlier runs; a dry run lets it measure the CPU, without Triton's interpreter."""
    stand_ins: dict[str, Any] = {
        "is_timed": lambda device: True,
        "is_capturing": lambda: False,
        "name_device": lambda device: ("dry run", "0.0"),
        "milliseconds": lambda run, device: alternate({"": run}, 0, least=1)[""][0],
    }
    takes = triton.takes if cuda else lambda x: False
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton, "takes", takes),
        mock.patch.object(memory, "cache_folder", return_value=Path(folder)),
        nullcontext() if cuda else mock.patch.multiple(tuner, **stand_ins),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--seconds", type=float, default=0.25, help="time for each row of comparisons, after warming up"
    )
    parser.add_argument("--minutes", type=float, default=8, help="time for all; rows that do not fit in are reported")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu for a dry run")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one small network")
    parser.add_argument("--commit", help="what to write as the commit where the files are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_*.csv and the picture")
    args = parser.parse_args()
    if args.device == "cpu" and args.out == RESULTS:
        parser.error("a dry run on the cpu needs --out: its times are no results")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick --out DIR is a dry run")
    bench = Bench(args)
    torch.backends.cudnn.benchmark = True
    print(bench.where, flush=True)

    with own_tuning(bench.cuda):
        right = run_parts(bench, args.parts)
    print(*(f"not run: {what}" for what in bench.left_out), sep="\n")
    sys.exit(0 if right else 1)


def run_parts(bench: Bench, parts: Sequence[str]) -> bool:
    """Run some parts and write their rows; whether all results are right."""
    right = True
    networks: Rows = []
    for part in (part for part in PARTS if part in parts):
        started = time.perf_counter()
        if part == "correctness":
            right = check_correctness(bench)
        elif part == "layers":
            layers = run_layers(bench)
            bench.write("gpu_layers.csv", layers)
            draw(layers, bench.out / "gpu_layers.png")
        elif part == "mixing":
            bench.write("gpu_mixing.csv", run_mixing(bench))
        else:
            networks += run_networks(bench, compiled=part == "compiled")
            bench.write("gpu_networks.csv", networks)
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    return right


if __name__ == "__main__":
    main()
