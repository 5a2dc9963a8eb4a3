"""A kernel for each sample: against a loop of PyTorch's convolution, in values and gradients; mixing; exports."""

import copy
import itertools

import numpy as np
import onnxruntime
import operands
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import outcome
from torch import nn
from torch.nn import functional as F

from odconv.functional import dynamic_conv, mixed_conv, per_sample_conv
from odconv.ops import cpu, recompute
from odconv.ops.dynamic_conv import PER_SAMPLE

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ATTENTIONS = ("spatial", "channel", "filter")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
SPECIAL = {"triton", "pointwise"}  # not for all shapes
NAMES = ["auto", *(name for name in PER_SAMPLE if name not in SPECIAL and (name != "cpu" or cpu.available()))]


def loop(x, weight, *, channel=None, filter=None, spatial=None, bias=None, **geometry):
    """The formula, by PyTorch's convolution, sample by sample."""
    outputs = []
    axes = (1,) * (x.dim() - 2)
    for b in range(len(x)):
        sample = x[b : b + 1] if channel is None else x[b : b + 1] * channel[b].view(1, -1, *axes)
        y = CONV[x.dim() - 2](sample, weight[b] if spatial is None else weight[b] * spatial[b], None, **geometry)
        y = y if filter is None else y * filter[b].view(1, -1, *axes)
        if bias is not None:
            y = y + (bias if bias.dim() == 1 else bias[b]).view(1, -1, *axes)
        outputs.append(y)
    return torch.cat(outputs)


def assert_same(found, wanted, tolerance=1e-10):
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def arguments(batch, channels, filters, *others, **options):
    """Random tensors with one kernel per sample."""
    return operands.arguments(batch, channels, filters, None, *others, **options)


@st.composite
def problems(draw):
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    taps = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    present = [name for name in ATTENTIONS if draw(st.booleans())]
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    size = tuple(d * (k - 1) + draw(st.integers(1, 5)) for d, k in zip(dilation, taps, strict=True))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * dims)))
    stride = (1,) * dims if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    bias = draw(st.sampled_from([None, "static", "own"]))
    tensors = (draw(st.integers(1, 3)), channels, filters, taps, size, groups, present, bias)
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_every_backend_is_the_loop(problem, seed):
    torch.manual_seed(seed)
    shape, geometry = problem
    tensors = arguments(*shape)
    wanted = outcome(loop, tensors, **geometry)
    for name in NAMES:
        if name == "single" and shape[0] != 1:
            continue
        found = outcome(per_sample_conv, tensors, **geometry, backend=name)
        for value, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


# Maps and kernels of several tiles, parts and bundles; depth-wise ones; groups wide enough for vectors.
LARGE = [
    (5, 40, 72, (3, 3), (14, 13), 1, {"padding": 1}),
    (3, 33, 65, (3, 3), (9, 9), 1, {"padding": 1, "stride": 2}),
    (2, 64, 96, (1, 1), (40, 40), 1, {}),
    (4, 48, 48, (3, 3), (8, 8), 3, {"padding": 1}),
    (3, 40, 40, (3, 3), (24, 25), 40, {"padding": 1}),
    (2, 24, 24, (5, 5), (29, 29), 24, {"padding": 2, "stride": 2}),
    (3, 20, 33, (5,), (100,), 1, {"padding": 4, "dilation": 2}),
    (2, 18, 20, (2, 3, 3), (5, 6, 7), 1, {"padding": (0, 1, 1)}),
]


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler, or no processor for it")
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_large_problems_on_the_compiled_kernel(shape, last):
    torch.manual_seed(0)
    *sizes, groups, geometry = shape
    tensors = arguments(*sizes, groups)
    if last:
        tensors["x"] = tensors["x"].detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    wanted = outcome(loop, tensors, **geometry, groups=groups)
    assert_same(outcome(per_sample_conv, tensors, **geometry, groups=groups, backend="cpu"), wanted)


@pytest.mark.parametrize("present", [p for r in range(4) for p in itertools.combinations(ATTENTIONS, r)])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, present):
    torch.manual_seed(0)
    tensors = arguments(1 if name == "single" else 2, 4, 2, (2, 3), (3, 4), 2, present, "own")

    def run(*values):
        named = dict(zip(tensors, values, strict=True))
        return per_sample_conv(**named, padding=(0, 1), stride=(1, 2), groups=2, backend=name)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["auto", "product", "grouped"])
def test_double_backward(name):
    torch.manual_seed(0)
    tensors = arguments(2, 2, 2, (2, 2), (3, 3))
    run = lambda *values: per_sample_conv(**dict(zip(tensors, values, strict=True)), backend=name)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_empty_batch_and_a_batch_of_one(dims):
    for batch in (0, 1):
        tensors = arguments(batch, 4, 6, (3,) * dims, (5,) * dims, bias="static")
        y = per_sample_conv(**tensors, padding=1)
        assert y.shape == (batch, 6, *(5,) * dims)
        y.sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_stays_near_float64(dtype, name):
    torch.manual_seed(0)
    tensors = arguments(1 if name == "single" else 3, 16, 8, (3, 3), (6, 6))
    exact = loop(**tensors, padding=1)
    y = per_sample_conv(**{key: tensor.to(dtype) for key, tensor in tensors.items()}, padding=1, backend=name)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_theirs(dtype):
    torch.manual_seed(0)
    tensors = arguments(3, 16, 16, (3, 3), (5, 5), dtype=torch.float32)
    exact = outcome(loop, tensors, padding=1)
    with torch.autocast("cpu", dtype=dtype):
        y = per_sample_conv(**tensors, padding=1)
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, list(tensors.values()), torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))]
    for value, wanted in zip(found, exact, strict=True):
        assert (value.float() - wanted).norm() / wanted.norm() < 8 * torch.finfo(dtype).eps
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])


def test_dynamic_conv_is_mixing_and_a_convolution_per_sample():
    torch.manual_seed(0)
    x, kernels, kernel = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4, 7, 7), (5, 6, 4, 3, 3), (3, 5)))
    own = torch.einsum("bn,nocij->bocij", kernel, kernels)
    torch.testing.assert_close(per_sample_conv(x, own, padding=1), dynamic_conv(x, kernels, kernel=kernel, padding=1))


# ---- mixing of one's own


def by_cells(cells, shares):
    """Kernels (B, 6, 4, 3, 3) of 2 x 2 pieces, each a mixture of cells (n, 3, 2, 3, 3) by shares (B, 4, n)."""
    pieces = (shares @ cells.flatten(1)).unflatten(2, cells.shape[1:]).unflatten(1, (2, 2))
    return pieces.permute(0, 1, 3, 2, 4, 5, 6).flatten(3, 4).flatten(1, 2)


def cell_tensors(batch=5):
    torch.manual_seed(0)
    shapes = {"x": (batch, 8, 6, 6), "parts": (7, 3, 2, 3, 3), "shares": (batch, 4, 7), "filter": (batch, 6)}
    return {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


def mixed(x, parts, shares, filter, **options):
    return mixed_conv(x, by_cells, parts, shares, (6, 4, 3, 3), filter=filter, groups=2, padding=1, **options)


def directly(x, parts, shares, filter):
    return loop(x, by_cells(parts, shares), filter=filter, groups=2, padding=1)


@pytest.mark.parametrize("workspace", [1, 2 * 6 * 4 * 9 * 8 * 2, 2**27])
def test_mixing_is_done_again_in_chunks(workspace, monkeypatch):
    monkeypatch.setattr(recompute, "WORKSPACE", workspace)
    tensors = cell_tensors()
    assert_same(outcome(mixed, tensors), outcome(directly, tensors))


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler, or no processor for it")
def test_mixing_with_the_compiled_kernel():
    torch.manual_seed(0)
    shapes = {"x": (3, 32, 9, 9), "parts": (4, 24, 32, 3, 3), "shares": (3, 4)}
    tensors = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    mix = lambda parts, shares: torch.einsum("bn,nocij->bocij", shares.tanh(), parts)  # noqa: E731
    run = lambda x, parts, shares: mixed_conv(x, mix, parts, shares, (24, 32, 3, 3), padding=1)  # noqa: E731
    wanted = lambda x, parts, shares: loop(x, mix(parts, shares), padding=1)  # noqa: E731
    assert_same(outcome(run, tensors), outcome(wanted, tensors))


def test_mixing_keeps_no_kernel_and_has_second_derivatives():
    tensors = cell_tensors(2)
    y = mixed(**tensors)
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None} == {t.data_ptr() for t in tensors.values()}
    assert torch.autograd.gradcheck(mixed, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(mixed, tuple(tensors.values()), fast_mode=True)
    empty = {name: t if name == "parts" else t[:0] for name, t in tensors.items()}
    assert mixed(**empty).shape == (0, 6, 6, 6)


def test_mixing_under_autocast():
    tensors = {name: t.detach().float().requires_grad_() for name, t in cell_tensors().items()}
    wanted = outcome(directly, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixed(**tensors)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, list(tensors.values()), torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16())
    for value, expected in zip((y, *found), wanted, strict=True):
        assert (value.float() - expected).norm() / expected.norm() < 8 * torch.finfo(torch.bfloat16).eps


# ---- compilation and exports


class Hyper(nn.Module):
    """A convolution whose kernel a linear layer makes of each sample's mean."""

    def __init__(self, groups=1, gates=False):
        super().__init__()
        self.linear = nn.Linear(4, 6 * (4 // groups) * 9)
        self.gates, self.groups = nn.Linear(4, 4 + 6 + 9) if gates else None, groups

    def forward(self, x):
        pooled = x.mean((2, 3))
        weight = self.linear(pooled).reshape(-1, 6, 4 // self.groups, 3, 3)
        given = {}
        if self.gates is not None:
            channel, filter, spatial = self.gates(pooled).sigmoid().split((4, 6, 9), 1)
            given = {"channel": channel, "filter": filter, "spatial": spatial.reshape(-1, 3, 3)}
        return per_sample_conv(x, weight, **given, padding=1, groups=self.groups)


NETWORKS = [(1, False), (1, True), (2, True)]


@pytest.mark.parametrize(("groups", "gates"), NETWORKS)
def test_torch_export_serves_every_batch(groups, gates):
    torch.manual_seed(0)
    net = Hyper(groups, gates).eval()
    exported = torch.export.export(net, (torch.randn(3, 4, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 8, 8)
        torch.testing.assert_close(exported.module()(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("groups", "gates"), NETWORKS)
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
def test_onnx_serves_every_batch(tmp_path, groups, gates, dynamo):
    torch.manual_seed(0)
    net = Hyper(groups, gates).eval()
    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    x = torch.randn(3 if dynamo else 1, 4, 8, 8)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", input_names=["x"], dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 4, 8, 8)
        y = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(y, net(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_torch_compile_takes_the_whole_operator():
    torch.manual_seed(0)
    net = Hyper(gates=True).double()
    other, x = copy.deepcopy(net), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    net(x).sum().backward()
    compiled(x).sum().backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- what does not fit

X, W = torch.zeros(8, 4, 5, 5), torch.zeros(8, 6, 4, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(3, 6, 4, 3, 3)},
            r"weight must have a kernel for each of the 8 samples in x, got \(3, 6",
        ),
        ({"weight": torch.zeros(6, 4, 3)}, r"weight must have shape \(B, O, C/groups, \*kernel_size\)"),
        ({"weight": torch.zeros(8, 6, 0, 3, 3)}, r"weight must have shape .* none of them 0"),
        ({"spatial": torch.zeros(8, 9)}, r"spatial must have shape \(B, \*kernel_size\) = \(8, 3, 3\), got \(8, 9\)"),
        ({"channel": torch.zeros(8, 6)}, r"channel must have shape \(B, C\) = \(8, 4\), got \(8, 6\)"),
        ({"filter": torch.zeros(7, 6)}, r"filter must have shape \(B, O\) = \(8, 6\), got \(7, 6\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(O\) = \(6,\) or \(B, O\) = \(8, 6\), got \(4,\)"),
        ({"x": torch.zeros(8, 5, 5, 5)}, r"x must have shape \(B, C, H, W\) with C = 4"),
        ({"groups": 4}, r"groups must be a positive divisor of the 6 filters in weight, got 4"),
        ({"stride": 0}, r"stride must be an int or 2 ints, each at least 1, got 0"),
        ({"padding": "full"}, r"padding must be ints, 'same' or 'valid', got 'full'"),
        ({"x": torch.zeros(8, 4, 5, 2)}, r"x must have a map of at least the kernel's span"),
        ({"backend": "shared"}, r"backend must be 'auto' or one of .*, got 'shared'"),
        ({"backend": "single"}, r"backend 'single' needs a batch of one"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        per_sample_conv(**({"x": X, "weight": W} | change))


def test_mixtures_that_do_not_fit_are_named():
    tensors = {name: t.detach() for name, t in cell_tensors().items()}
    with pytest.raises(ValueError, match=r"shares must have shape \(B, \.\.\.\) with B = 5, got \(3, 4, 7\)"):
        mixed(**(tensors | {"shares": torch.zeros(3, 4, 7)}))
    with pytest.raises(ValueError, match=r"filter must have shape"):
        mixed(**(tensors | {"filter": torch.zeros(5, 7)}))
    with pytest.raises(TypeError, match="dtype"):
        mixed(**(tensors | {"x": tensors["x"].float()}))
    x, shares = tensors["x"], tensors["shares"]
    with pytest.raises(ValueError, match=r"mix must make kernels of \('B', 6, 4, 3, 3\), got \(5, 6, 3, 3\)"):
        mixed_conv(x, lambda parts, _: parts, torch.zeros(5, 6, 3, 3).to(x), shares, (6, 4, 3, 3), groups=2)


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_of_one_tap_are_matrix_products(stride):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("reference", "pointwise"):
        y = per_sample_conv(x, weight, stride=stride, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    for value, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
