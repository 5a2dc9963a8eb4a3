"""The compiled CPU form: registered as an operator should be, the same on any machine, and dispensable."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from operands import ATTENTIONS, arguments, assert_laid_out_as_told, outcome
from parameters import slow_except
from torch import nn

import odconv
from odconv.functional import dynamic_conv, per_sample_conv
from odconv.ops import cpu
from odconv.ops.contract import Geometry
from odconv.ops.cpu import library
from odconv.ops.policy import choose
from odconv.system.files import cache_folder

NEEDS_KERNEL = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler, or no processor for it")


def problem(batch, channels, filters, n, side, taps=3, stride=1, groups=1, dtype=torch.float64):
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(batch, channels, side, side, dtype=dtype),
        "weight": torch.randn(n, filters, channels // groups, taps, taps, dtype=dtype),
        "kernel": torch.rand(batch, n, dtype=dtype),
        "spatial": torch.rand(batch, taps, taps, dtype=dtype),
        "channel": torch.rand(batch, channels, dtype=dtype),
        "filter": torch.rand(batch, filters, dtype=dtype),
    }
    return tensors, {"stride": stride, "padding": taps // 2, "groups": groups}


def gradients(tensors, geometry, backend):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = dynamic_conv(**leaves, **geometry, backend=backend)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, list(leaves.values()), upstream)]


# Maps and kernels of several tiles, parts and bundles; a batch below and above n; filters that fill no vector.
LARGE = [
    (1, 70, 130, 4, 14),
    (3, 70, 130, 4, 14),
    (9, 40, 72, 4, 7),
    (2, 20, 24, 2, 48),
    (5, 33, 65, 3, 9, 3, 2),
    (6, 64, 64, 4, 7, 1, 2),
    (4, 96, 96, 2, 8, 3, 1, 3),
    (2, 8, 300, 9, 5, 5),
    (3, 40, 40, 4, 14, 3, 1, 40),
    (2, 24, 24, 1, 29, 5, 2, 24),
    (1, 33, 33, 2, 7, 3, 3, 33),
    (3, 140, 70, 4, 13, 1),
    (1, 20, 150, 2, 20, 1, 1, 2),
    (9, 600, 24, 4, 9, 1),
    (2, 30, 20, 5, 21, 1, 2),
]


@NEEDS_KERNEL
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_problems_are_the_reference(shape, memory_format):
    tensors, geometry = problem(*shape)
    tensors["x"] = tensors["x"].to(memory_format=memory_format)
    found = gradients(tensors, geometry, "cpu")
    assert found[0].is_contiguous(memory_format=memory_format)
    for value, wanted in zip(found, gradients(tensors, geometry, "reference"), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


@NEEDS_KERNEL
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_float32_is_as_near_to_float64_as_rounding_allows(shape):
    tensors, geometry = problem(*shape, dtype=torch.float32)
    exact = gradients({name: tensor.double() for name, tensor in tensors.items()}, geometry, "reference")
    for value, wanted in zip(gradients(tensors, geometry, "cpu"), exact, strict=True):
        assert (value - wanted).abs().max() < 5e-6 * wanted.abs().max()


@NEEDS_KERNEL
@pytest.mark.parametrize(
    "present", [[], ["kernel"], ["filter"], ["spatial"], ["kernel", "channel"], ATTENTIONS], ids=str
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("sizes", "geometry"),
    [
        ((3, 72, 80, 1, (3, 3), (4, 4)), {"padding": 1}),
        ((2, 70, 300, 1, (3, 3), (9, 7)), {"padding": 1, "stride": 2}),
        ((4, 33, 140, None, (2, 3), (5, 4)), {"dilation": (1, 1)}),
        ((2, 96, 192, 1, (5,), (12,)), {"padding": 4, "dilation": 2, "groups": 2}),
        ((2, 64, 64, 1, (2, 1, 2), (2, 3, 2)), {"padding": (1, 0, 0)}),
    ],
    ids=str,
)
def test_a_lone_kernel_on_a_small_map_is_not_mixed_and_gives_the_same(sizes, geometry, last, present):
    torch.manual_seed(0)
    groups = geometry.get("groups", 1)
    tensors = arguments(*sizes, groups, [name for name in present if sizes[3] or name != "kernel"])
    if last:
        tensors["x"] = tensors["x"].detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    operator = dynamic_conv if sizes[3] else per_sample_conv
    found, wanted = (outcome(operator, tensors, **geometry, backend=backend) for backend in ("cpu", "reference"))
    for value, like in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, like, rtol=1e-11, atol=1e-11)


@NEEDS_KERNEL
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch(shape):
    tensors, geometry = problem(*shape, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(tensors, geometry, "cpu")
        torch.set_num_threads(3)
        together = gradients(tensors, geometry, "cpu")
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(gradients(tensors, geometry, "cpu"), gradients(tensors, geometry, "cpu"), strict=True):
        assert torch.equal(a, b)  # from run to run
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])
    for a, b in zip(alone[2:], together[2:], strict=True):  # tiles are cut by the number of threads
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for b in range(shape[0]):
        sample = {name: tensor if name == "weight" else tensor[b : b + 1] for name, tensor in tensors.items()}
        assert torch.equal(dynamic_conv(**sample, **geometry, backend="cpu")[0], alone[0][b])


@NEEDS_KERNEL
@pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
def test_any_strides(layout):
    tensors, geometry = problem(4, 6, 20, 2, 9)
    tensors["x"] = {
        "expanded": tensors["x"][:1].expand(4, -1, -1, -1),
        "sliced": torch.randn(4, 12, 9, 18, dtype=torch.float64)[:, ::2, :, ::2],
        "transposed": tensors["x"].transpose(2, 3),
    }[layout]
    tensors["weight"] = tensors["weight"].transpose(3, 4)
    tensors["channel"] = tensors["channel"].t().contiguous().t()
    found = gradients(tensors, geometry, "cpu")
    for value, wanted in zip(found, gradients(tensors, geometry, "reference"), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


@NEEDS_KERNEL
def test_the_operators_are_registered_as_operators_should_be():
    tensors, _ = problem(2, 5, 7, 2, 6)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    bias = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.odconv.conv.default, (*leaves, *geometry, bias))
    alone = (leaves[0], leaves[1], leaves[2], None, None, None, *geometry, None)
    torch.library.opcheck(torch.ops.odconv.conv.default, alone)
    grad = torch.randn(2, 7, 3, 6, dtype=torch.float64)
    plain = [tensor.detach() for tensor in leaves]
    for to_x, to_weights in ((True, True), (True, False), (False, True)):
        arguments = (grad, *plain, *geometry, to_x, to_weights)
        torch.library.opcheck(torch.ops.odconv.conv_backward.default, arguments)
        halves = [tensor.bfloat16() for tensor in (grad, *plain[:2])]
        floats = [tensor.float() for tensor in plain[2:]]
        torch.library.opcheck(torch.ops.odconv.conv_backward.default, (*halves, *floats, *geometry, to_x, to_weights))


@NEEDS_KERNEL
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("groups", [1, 32], ids=["dense", "depth-wise"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 3])
def test_operators_lay_out_what_they_return_as_torch_compile_is_told(taps, axes, groups, last):
    x = torch.randn(2, 32, *[7] * axes)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, kernel = torch.randn(4, 32, 32 // groups, *[taps] * axes), torch.rand(2, 4)
    geometry = ([1] * axes, [taps // 2] * axes, [1] * axes, groups)
    forward = (x, weight, kernel, None, None, None, *geometry)
    y = torch.ops.odconv.conv(*forward, None)
    calls = {
        torch.ops.odconv.conv: (*forward, None),
        torch.ops.odconv.conv_fused: (*forward, None, "relu", True, None),
        torch.ops.odconv.conv_backward: (torch.randn_like(y), *forward, True, True),
    }
    for operator, given in calls.items():
        assert_laid_out_as_told(operator, given)


@NEEDS_KERNEL
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 1), (3, 4)])
@pytest.mark.parametrize(("channels", "axes"), [(16, 1), (100, 2), (33, 3)])
@pytest.mark.parametrize(("taps", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (2, 3, 2), (1, 2, 1), (3, 4, 1)])
def test_depth_wise_layers_train_on_channels_last_maps(batch, n, channels, axes, taps, stride, dilation):
    torch.manual_seed(0)
    x = torch.randn(batch, *(9, 7, 6)[:axes], channels, dtype=torch.float64).movedim(-1, 1)
    weight = torch.randn(n, channels, 1, *[taps] * axes, dtype=torch.float64)
    shapes = {"kernel": (n,), "spatial": [taps] * axes, "channel": (channels,), "filter": (channels,)}
    gates = {name: torch.rand(batch, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in {"x": x, "weight": weight, **gates}.items()}
    geometry = {"stride": stride, "padding": 1, "dilation": dilation, "groups": channels}
    assert choose(x, weight, Geometry((stride,), (1,), (dilation,), channels), True).backend == "cpu"
    results = []
    for backend in ("reference", "auto"):
        y = dynamic_conv(**leaves, **geometry, backend=backend)
        results.append([y, *torch.autograd.grad((y * y.detach()).sum(), list(leaves.values()))])
    for found, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@NEEDS_KERNEL
@pytest.mark.parametrize("layer", [odconv.ODConv2d, odconv.DyConv2d, odconv.CondConv2d])
@pytest.mark.parametrize("temperature", [1.0, 7.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_without_gradients_is_the_attention(layer, temperature, dtype):
    torch.manual_seed(0)
    layer = layer(37, 20, 3, padding=1, dtype=dtype)
    odconv.set_temperature(layer, temperature)
    x = torch.randn(5, 37, 6, 6, dtype=dtype)
    layer.train()(x)  # statistics that are not those of a new batch norm
    layer.eval()
    with torch.no_grad():
        fused = layer.attention(x)
    for value, wanted in zip(fused, layer.attention(x), strict=True):
        assert (value is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(value, wanted)
            assert not value.requires_grad


@pytest.mark.parametrize("without", slow_except(["told", "broken", "missing"], "broken"))
def test_a_network_without_the_kernel_computes_the_same(without, tmp_path):
    """In a process that is told to do without, or has a compiler that fails or none, as in this one with the kernel."""
    code = (
        "torch.manual_seed(0); layer = odconv.ODConv2d(8, 24, 3, padding=1);"
        "y = layer(torch.randn(3, 8, 6, 6)); y.square().mean().backward();"
        "result = [y.detach(), layer.weight.grad]"
    )
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    changes = {
        "told": {"ODCONV_CPU_KERNEL": "0"},
        "broken": {"CXX": str(broken), "ODCONV_CACHE": str(tmp_path)},
        "missing": {"CXX": "no-such-compiler", "ODCONV_CACHE": str(tmp_path)},
    }[without]
    program = f"import sys, torch, odconv; {code}; torch.save(result, sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "result")]
    run = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=True)
    told = {"broken": "no such target", "missing": "no C++ compiler 'no-such-compiler'"}
    if without in told and library.variant() is not None:
        assert told[without] in run.stderr
        assert run.stderr.count("could not be compiled") == 1
    elif without == "told":
        assert "UserWarning" not in run.stderr
    here = {"torch": torch, "odconv": odconv}
    exec(code, here)
    found = torch.load(tmp_path / "result", weights_only=True)
    torch.testing.assert_close(found, here["result"], rtol=1e-4, atol=1e-5)


def operands(**changes):
    """Arguments of torch.ops.odconv.conv that fit each other, but for the changes."""
    given = {
        "x": torch.ones(2, 4, 5, 5),
        "weight": torch.ones(3, 6, 2, 3, 3),
        "kernel": torch.ones(2, 3),
        "spatial": torch.ones(2, 3, 3),
        "channel": torch.ones(2, 4),
        "filter": torch.ones(2, 6),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 2,
    }
    return [*(given | changes).values()]


HUGE = 2**62
WRONG = {
    "no stride": {"stride": []},
    "stride 0": {"stride": [0, 1]},
    "stride below 0": {"stride": [-1, 1]},
    "one stride": {"stride": [1]},
    "stride for three axes": {"stride": [1, 1, 1]},
    "huge stride": {"stride": [HUGE, HUGE]},
    "padding below 0": {"padding": [-1, 0]},
    "huge padding": {"padding": [HUGE, HUGE]},
    "no padding": {"padding": []},
    "dilation 0": {"dilation": [0, 1]},
    "huge dilation": {"dilation": [HUGE, HUGE]},
    "a reach beyond the map": {"dilation": [5, 1]},
    "no groups": {"groups": 0},
    "groups below 0": {"groups": -2},
    "groups that do not divide": {"groups": 4},
    "huge groups": {"groups": HUGE},
    "an empty batch": {"x": torch.ones(0, 4, 5, 5)},
    "an empty map": {"x": torch.ones(2, 4, 5, 0)},
    "other channels": {"x": torch.ones(2, 3, 5, 5)},
    "integers": {
        "x": torch.ones(2, 4, 5, 5, dtype=torch.int64),
        "weight": torch.ones(3, 6, 2, 3, 3, dtype=torch.int64),
    },
    "a weight of floats beside halves": {"x": torch.ones(2, 4, 5, 5).half()},
    "shares of halves beside floats": {"kernel": torch.ones(2, 3).half()},
    "shares of doubles beside halves": {
        "x": torch.ones(2, 4, 5, 5).half(),
        "weight": torch.ones(3, 6, 2, 3, 3).half(),
        "kernel": torch.ones(2, 3).double(),
    },
    "no space": {"x": torch.ones(2, 4), "weight": torch.ones(3, 6, 2)},
    "four axes": {"x": torch.ones(2, 4, 2, 2, 2, 2), "weight": torch.ones(3, 6, 2, 1, 1, 1, 1)},
    "a weight of other axes": {"weight": torch.ones(3, 6, 2, 3)},
    "an empty weight": {"weight": torch.ones(0, 6, 2, 3, 3)},
    "a weight without taps": {"weight": torch.ones(3, 6, 2, 0, 3)},
    "a weight of doubles": {"weight": torch.ones(3, 6, 2, 3, 3).double()},
    "a strided weight": {"weight": torch.ones(3, 6, 2, 3, 6)[..., ::2]},
    "a kernel too few": {"kernel": torch.ones(2, 2)},
    "no shares": {"kernel": None},
    "shares of another batch": {"kernel": torch.ones(3, 2)},
    "shares of doubles": {"kernel": torch.ones(2, 3).double()},
    "strided shares": {"kernel": torch.ones(3, 2).t()},
    "other taps": {"spatial": torch.ones(2, 2, 2)},
    "a number": {"spatial": torch.tensor(1.0)},
    "a channel too few": {"channel": torch.ones(2, 3)},
    "a filter too many": {"filter": torch.ones(2, 7)},
}


@NEEDS_KERNEL
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_operators_refuse_what_does_not_fit(changes):
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.conv(*operands(**changes), None)
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.conv_backward(torch.ones(2, 6, 5, 5), *operands(**changes), True, True)


@NEEDS_KERNEL
def test_operators_take_what_fits():
    y = torch.ops.odconv.conv(*operands(), torch.arange(6.0)[None])
    assert y[0, 5, 2, 2] == 3 * 2 * 9 + 5
    for bias in (torch.ones(6), torch.ones(3, 6), torch.ones(1, 5), torch.ones(1, 6).half(), torch.ones(6, 2).t()):
        with pytest.raises(RuntimeError, match="odconv: bias must be"):
            torch.ops.odconv.conv(*operands(), bias)
    for grad in (torch.ones(2, 6, 5, 4), torch.ones(2, 6, 5, 5).double(), torch.ones(6, 5, 5), torch.ones(0)):
        with pytest.raises(RuntimeError, match="odconv: grad must be"):
            torch.ops.odconv.conv_backward(grad, *operands(), True, True)
    found = torch.ops.odconv.conv_backward(torch.ones(2, 6, 5, 5), *operands(), True, True)
    assert [gradient.shape for gradient in found] == [tensor.shape for tensor in operands()[:6]]


@NEEDS_KERNEL
@pytest.mark.parametrize(
    "changes",
    [
        {"pooled": torch.ones(2, 4, 1)},
        {"pooled": torch.ones(2, 0)},
        {"pooled": torch.ones(4, 2).t()},
        {"pooled": torch.ones(2, 4).half()},
        {"fc": torch.ones(3, 4).half()},
        {"fc": torch.ones(3, 5)},
        {"fc": torch.ones(0, 4)},
        {"fc": torch.tensor(1.0)},
        {"norm": [torch.ones(3)] * 3},
        {"norm": [torch.ones(2)] * 4},
        {"norm": [torch.ones(3).double()] * 4},
        {"weights": []},
        {"weights": [torch.ones(5, 2), torch.ones(7, 3)]},
        {"weights": [torch.tensor(1.0), torch.ones(7, 3)]},
        {"biases": [torch.ones(5)]},
        {"biases": [torch.ones(5), torch.ones(6)]},
        {"norm": [torch.ones(3)] * 5},
        {"groups": 0},
        {"groups": 2},
        {"weights": [torch.ones(11, 3)], "biases": [torch.ones(11)]},
        {"weights": [torch.ones(12, 3)]},
        {"sizes": [5, 8]},
        {"sizes": [5]},
        {"sizes": [], "gains": []},
        {"sizes": [0, 12], "weights": [torch.ones(12, 3)], "biases": [torch.ones(12)]},
        {"sizes": [2**62, 2**62], "weights": [torch.ones(12, 3)], "biases": [torch.ones(12)]},
        {"softmax": 2},
        {"gains": [1.0]},
        {"gains": []},
        {"temperature": torch.ones(2)},
        {"temperature": torch.ones(0)},
        {"temperature": torch.ones((), dtype=torch.float64)},
    ],
    ids=str,
)
def test_the_attention_refuses_what_does_not_fit(changes):
    given = {
        "pooled": torch.ones(2, 4),
        "fc": torch.ones(3, 4),
        "norm": [torch.ones(3)] * 4,
        "groups": 1,
        "eps": 1e-5,
        "weights": [torch.ones(5, 3), torch.ones(7, 3)],
        "biases": [torch.ones(5), torch.ones(7)],
        "sizes": [5, 7],
        "gains": [1.0, 2.0],
        "softmax": 1,
        "temperature": torch.tensor(1.0),
    }
    assert [gate.shape for gate in torch.ops.odconv.attend(*given.values())] == [(2, 5), (2, 7)]
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.attend(*(given | changes).values())


@pytest.mark.slow
@NEEDS_KERNEL
def test_no_sanitizer_complains(tmp_path):
    """The kernel with AddressSanitizer and UBSan in it, and the tests of its results and of wrong arguments."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ -fsanitize=address,undefined -fno-sanitize-recover=all -g "$@"\n')
    compiler.chmod(0o755)
    found = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True) for name in ("libasan", "libubsan")
    ]
    changes = {
        "CXX": str(compiler),
        "ODCONV_CACHE": str(tmp_path),
        "LD_PRELOAD": ":".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    tests = [
        "test_large_problems",
        "test_any_strides",
        "test_operators",
        "test_the_attention_refuses",
        "test_attention_without",
        "test_one_rounding",
        "test_pooling",
        "test_a_kernel_for_each_sample",
        "test_cells_are_mixed",
        "test_all_gradients",
        "test_the_operator_",
        "test_depth_wise_layers_train",
        "test_gradients_are_as_near",
        "test_it_is_the_reference",
    ]
    others = ("test_half.py", "test_cells.py", "test_samples.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", " or ".join(tests)]
    run = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


USE = (
    "import torch; from odconv.ops import cpu; assert cpu.available();"
    "x, weight, ones = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 3, 3), [1, 1];"
    "torch.ops.odconv.conv(x, weight, *[None] * 4, ones, ones, ones, 1, None)"
)


class Compiler:
    """What stands for the compiler and takes a second: it copies what was compiled before, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.log, script = folder / "cache", folder / "log", folder / "compiler"
        script.write_text(
            f'#!/bin/sh\necho >> {self.log}\nsleep 1\nwhile [ "$1" != -o ]; do shift; done\ncp {library.build()} "$2"\n'
        )
        script.chmod(0o755)
        self.environment = os.environ | {"CXX": str(script), "ODCONV_CACHE": str(self.cache)}
        self.command = [sys.executable, "-c", USE]

    def use(self) -> str:
        """Use the kernel in a process of its own; what it says."""
        run = subprocess.run(self.command, env=self.environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stderr

    @property
    def library(self) -> Path:
        (file,) = self.cache.glob("cpu-*.so")
        return file

    @property
    def times(self) -> int:
        return len(self.log.read_text())


@pytest.fixture
def compiler(tmp_path):
    return Compiler(tmp_path)


@NEEDS_KERNEL
@pytest.mark.slow
def test_eight_processes_compile_once_and_say_so_once(compiler):
    streams = {"env": compiler.environment, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(compiler.command, **streams) for _ in range(8)]
    said = "".join(process.communicate()[1] for process in processes)
    assert [process.returncode for process in processes] == [0] * 8, said
    assert compiler.times == 1
    assert said.count("compiling odconv's kernel for the CPU into") == said.count("\n") == 1
    assert compiler.use() == ""
    assert not [*compiler.cache.glob(".*")]


@NEEDS_KERNEL
@pytest.mark.slow
@pytest.mark.parametrize("case", ["cut", "empty", "another", "no record", "group writes", "folder", "owner"])
def test_what_is_no_longer_what_was_compiled_is_compiled_again_once(compiler, case):
    compiler.use()
    kept = compiler.library
    if case == "cut":
        os.truncate(kept, kept.stat().st_size // 2)
    elif case == "empty":
        os.truncate(kept, 0)
    elif case == "another":  # with which nothing is wrong, but that it is not ours
        kept.write_bytes(Path(next(Path(torch.__file__).parent.glob("lib/libc10.so"))).read_bytes())
    elif case == "no record":
        kept.with_suffix(".sha256").unlink()
    elif case == "group writes":
        kept.chmod(0o775)
    elif case == "folder":
        kept.unlink()
        kept.symlink_to(kept.parent)
    elif os.geteuid():
        pytest.skip("only root can give a file away")
    else:
        os.chown(kept, 12345, 12345)
    assert "compiling odconv's kernel" in compiler.use()
    assert compiler.use() == ""
    assert compiler.times == 2
    assert compiler.library.stat().st_uid == os.geteuid()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ODCONV_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ODCONV_CACHE")
    assert cache_folder() == tmp_path / "odconv"
    for value in ("", "relative"):  # which its standard says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path("~/.cache/odconv").expanduser()


@pytest.mark.slow
@NEEDS_KERNEL
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no wider vectors than the tests have")
@pytest.mark.parametrize(("compiler", "capability"), [("g++", "avx2"), ("clang++", "avx2"), ("clang++", "avx512")])
def test_narrower_vectors_and_clang_too(compiler, capability, tmp_path):
    """The kernel as clang or a processor without AVX-512 compiles it, in a process that PyTorch takes for one."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    names = ("large_problems_are_the_reference", "any_strides", "depth_wise_layers_train_on_channels_last_maps")
    tests = [f"{__file__}::test_{name}" for name in names]
    tests += [str(Path(__file__).with_name(name)) for name in ("test_half.py", "test_cells.py", "test_samples.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    changes = {"CXX": compiler, "ATEN_CPU_CAPABILITY": capability, "ODCONV_CACHE": str(tmp_path)}
    run = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout
    assert len(list(tmp_path.glob("cpu-*.so"))) == 1


def test_the_named_form_is_strict():
    tensors, geometry = problem(0, 4, 4, 1, 5)
    with pytest.raises(ValueError, match=r"backend 'cpu' needs x on the CPU in floating point, at least one sample"):
        dynamic_conv(**tensors, **geometry, backend="cpu")


@NEEDS_KERNEL
def test_backward_keeps_no_mixed_kernel():
    """What autograd saves beyond x, the weight and the attentions: nothing, in every form that it chooses."""
    for groups in (1, 32):
        tensors, geometry = problem(16, 32, 32, 4, 8, groups=groups, dtype=torch.float32)
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        own = {tensor.data_ptr() for tensor in leaves.values()}
        y = dynamic_conv(**leaves, **geometry)
        saved = {tensor.data_ptr() for tensor in y.grad_fn.saved_tensors if tensor is not None}
        assert saved == own


def test_chunks_change_nothing(monkeypatch):
    from odconv.ops import recompute

    tensors, geometry = problem(5, 6, 6, 2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("grouped", "product", "shared"):
            whole = gradients(tensors, geometry, form)
            with monkeypatch.context() as patch:
                patch.setattr(recompute, "WORKSPACE", 2 * tensors["x"][0].numel() * 9 * 8)
                parts = gradients(tensors, geometry, form)
            for value, wanted in zip(parts, whole, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 8])
def test_channels_last_networks(groups):
    """`Module.to(memory_format=...)` meets weights, and their gradients, of five axes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), odconv.ODConv2d(8, 8, 3, groups=groups)).eval()
    x = torch.randn(2, 3, 9, 9)
    wanted = net(x)
    wanted.sum().backward()
    y = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, wanted)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[1].weight.is_contiguous()
    assert net[1].weight.grad.is_contiguous()


def test_gradients_to_differentiate_again_where_the_attention_depends_on_x():
    """As in a gradient penalty: autograd must not go through the attention twice."""
    torch.manual_seed(0)
    layer = odconv.ODConv2d(4, 16, 3, padding=1, dtype=torch.float64)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    tensors = [x, *layer.parameters()]
    once = torch.autograd.grad(layer(x).square().sum(), tensors)
    again = torch.autograd.grad(layer(x).square().sum(), tensors, create_graph=True)
    for value, wanted in zip(again, once, strict=True):
        torch.testing.assert_close(value, wanted)


@NEEDS_KERNEL
def test_depthwise_maps_of_one_position_that_grow():
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64).to(memory_format=torch.channels_last)
    tensors = {"x": x, "weight": torch.randn(2, 8, 1, 3, 3, dtype=torch.float64), "kernel": torch.rand(1, 2).double()}
    geometry = {"padding": 2, "groups": 8}
    for value, wanted in zip(
        gradients(tensors, geometry, "cpu"), gradients(tensors, geometry, "reference"), strict=True
    ):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("change", ["strided", "mixed dtypes"])
def test_attention_with_unusual_parameters(change):
    torch.manual_seed(0)
    layer = odconv.ODConv2d(20, 8, 3).eval()
    fc = layer.attention.fc
    if change == "strided":
        fc.weight.data = fc.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        layer.attention.bn.double()
    x = torch.randn(2, 20, 6, 6)
    with torch.no_grad():
        found = layer.attention(x)
    for value, wanted in zip(found, layer.attention(x), strict=True):
        torch.testing.assert_close(value, wanted)


def test_forward_mode_differentiation():
    tensors, geometry = problem(2, 4, 5, 2, 5)
    primal = {name: tensor for name, tensor in tensors.items() if name != "x"}
    tangent = torch.randn_like(tensors["x"])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors["x"], tangent)
        found = torch.autograd.forward_ad.unpack_dual(dynamic_conv(x=dual, **primal, **geometry)).tangent
    torch.testing.assert_close(found, dynamic_conv(x=tangent, **primal, **geometry))
