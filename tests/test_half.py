"""The compiled kernel in bfloat16 and float16: as near to float64 as rounding allows, in any layout, for any batch."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from operands import ATTENTIONS, arguments

import odconv
from odconv.functional import dynamic_conv, dynamic_conv_transpose, per_sample_conv
from odconv.ops import cpu, policy
from odconv.ops.contract import Attentions, Geometry

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler, or no processor for it")
DTYPES = [torch.bfloat16, torch.float16]

# batch, channels, filters, n, map, taps, geometry: odd channels, groups, several blocks of filters and of positions,
# more and fewer samples than kernels, and depth-wise layers, whose channels fill no whole number of vectors.
PROBLEMS = [
    (1, 64, 130, 4, (14, 13), (3, 3), {"padding": 1}),
    (5, 70, 96, 4, (7, 7), (3, 3), {"padding": 1}),
    (3, 33, 65, 3, (9, 9), (3, 3), {"padding": 1, "stride": 2}),
    (6, 64, 64, 4, (20, 21), (1, 1), {}),
    (2, 130, 24, 1, (8, 8), (1, 1), {"stride": 2}),
    (4, 96, 96, 2, (8, 8), (3, 3), {"padding": 1, "groups": 3}),
    (2, 51, 60, 2, (8, 8), (3, 3), {"padding": 1, "groups": 3}),
    (2, 8, 300, 9, (30, 31), (5, 5), {"padding": 2}),
    (3, 32, 48, 2, (100,), (5,), {"padding": 4, "dilation": 2}),
    (2, 18, 20, 3, (5, 6, 7), (2, 3, 3), {"padding": (0, 1, 1), "stride": (1, 2, 1)}),
    (2, 20, 40, 2, (6, 6), (1, 17), {"padding": (0, 8)}),
    (3, 40, 40, 4, (14, 14), (3, 3), {"padding": 1, "groups": 40}),
    (1, 130, 130, 2, (15, 14), (3, 3), {"padding": 1, "stride": 2, "groups": 130}),
    (2, 24, 24, 2, (3, 2), (5, 5), {"padding": 3, "groups": 24}),
    (2, 24, 24, 2, (9, 4, 5), (3, 1, 2), {"padding": (1, 0, 1), "groups": 24}),
]


def problem(batch, channels, filters, n, size, taps, geometry, dtype, last):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *size)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    weight = torch.randn(n, filters, channels // geometry.get("groups", 1), *taps)
    shapes = {"kernel": (batch, n), "spatial": (batch, *taps), "channel": (batch, channels), "filter": (batch, filters)}
    gates = {name: torch.rand(shape) for name, shape in shapes.items()}
    bias = torch.randn(filters)
    return {name: t.to(dtype) for name, t in {"x": x, "weight": weight, **gates, "bias": bias}.items()}


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_one_rounding_of_the_kernel_and_one_of_the_output(shape, dtype, last):
    *sizes, geometry = shape
    tensors = problem(*sizes, geometry, dtype, last)
    exact = dynamic_conv(**{name: t.double() for name, t in tensors.items()}, **geometry, backend="reference")
    y = dynamic_conv(**tensors, **geometry, backend="cpu")
    assert y.dtype == dtype
    assert y.shape == exact.shape
    assert not last or y.dim() != 4 or y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, exact) < torch.finfo(dtype).eps / 2
    assert (y.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch(shape):
    *sizes, geometry = shape
    tensors = problem(*sizes, geometry, torch.bfloat16, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dynamic_conv(**tensors, **geometry, backend="cpu")
        torch.set_num_threads(3)
        assert torch.equal(dynamic_conv(**tensors, **geometry, backend="cpu"), alone)
    finally:
        torch.set_num_threads(threads)
    for b in range(sizes[0]):
        sample = {name: t if name in ("weight", "bias") else t[b : b + 1] for name, t in tensors.items()}
        assert torch.equal(dynamic_conv(**sample, **geometry, backend="cpu")[0], alone[b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 40])
def test_a_kernel_for_each_sample(groups, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 40, 9, 9).to(dtype), torch.randn(3, 40, 40 // groups, 3, 3).to(dtype)
    bias = torch.randn(3, 40).to(dtype)
    given = {"padding": 1, "groups": groups}
    exact = per_sample_conv(x.double(), weight.double(), bias=bias.double(), **given, backend="reference")
    assert error(per_sample_conv(x, weight, bias=bias, **given, backend="cpu"), exact) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_gradients_are_as_near_to_float64_as_rounding_allows(shape, dtype, backend):
    *sizes, geometry = shape
    tensors = {name: t.requires_grad_() for name, t in problem(*sizes, geometry, dtype, True).items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    wanted = dynamic_conv(**exact, **geometry, backend="reference")
    upstream = torch.randn_like(wanted)
    y = dynamic_conv(**tensors, **geometry, backend=backend)
    found = torch.autograd.grad(y, list(tensors.values()), upstream.to(dtype))
    for value, gradient in zip(found, torch.autograd.grad(wanted, list(exact.values()), upstream), strict=True):
        assert value.dtype == dtype
        assert error(value, gradient) < 4 * torch.finfo(dtype).eps


@st.composite
def any_problem(draw):
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    sizes = draw(st.integers(1, 5)), groups * draw(st.integers(1, 40)), groups * draw(st.integers(1, 80))
    n = draw(st.sampled_from([1, 2, 4, None]))
    taps = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    axes = {
        name: tuple(draw(st.integers(least, 3)) for _ in range(dims))
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    span = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(taps, axes["padding"], axes["dilation"], strict=True)]
    size = tuple(draw(st.integers(max(1, least), max(1, least) + 18 // dims)) for least in span)
    present = [name for name in ATTENTIONS if (name == "kernel" and n not in (1, None)) or draw(st.booleans())]
    return (*sizes, n, taps, size, groups, present), axes, draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(problem=any_problem(), seed=st.integers(0, 2**31))
def test_any_shape_in_bfloat16_is_the_reference_with_all_gradients(problem, seed):
    torch.manual_seed(seed)
    shape, axes, last = problem
    groups, n = shape[6], shape[3]
    call = per_sample_conv if n is None else dynamic_conv
    exact = arguments(*shape)
    with torch.no_grad():
        for tensor in exact.values():
            tensor.copy_(tensor.bfloat16())
    tensors = {name: tensor.detach().bfloat16() for name, tensor in exact.items()}
    if last:
        tensors["x"] = tensors["x"].movedim(1, -1).contiguous().movedim(-1, 1)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    wanted = call(**exact, **axes, groups=groups, backend="reference")
    upstream = torch.randn_like(wanted).bfloat16()
    y = call(**tensors, **axes, groups=groups, backend="cpu")
    found = y, *torch.autograd.grad(y, list(tensors.values()), upstream)
    like = wanted.detach(), *torch.autograd.grad(wanted, list(exact.values()), upstream.double())
    for value, expected in zip(found, like, strict=True):
        assert value.shape == expected.shape
        # sums of few terms of both signs may be much smaller than what was rounded in them
        torch.testing.assert_close(value.double(), expected, rtol=0.05, atol=0.03 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("groups", [1, 40], ids=["dense", "depth-wise"])
def test_attentions_in_float32_are_not_rounded(groups):
    torch.manual_seed(0)
    tensors = problem(3, 40, 40, 4, (9, 8), (3, 3), {"groups": groups}, torch.bfloat16, True)
    tensors |= {name: torch.rand_like(tensors[name], dtype=torch.float32) for name in Attentions._fields}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    given = {"padding": 1, "groups": groups}
    wanted = dynamic_conv(**exact, **given, backend="reference")
    y = dynamic_conv(**tensors, **given, backend="cpu")
    assert y.dtype == torch.bfloat16
    assert error(y, wanted) < torch.finfo(torch.bfloat16).eps / 2
    upstream = torch.randn_like(wanted)
    found = torch.autograd.grad(y, list(tensors.values()), upstream.bfloat16(), create_graph=True)
    again = torch.autograd.grad(y, list(tensors.values()), upstream.bfloat16())
    for gradients in (found, again):
        for name, gradient, like in zip(
            tensors, gradients, torch.autograd.grad(wanted, list(exact.values()), upstream, True), strict=True
        ):
            assert gradient.dtype == tensors[name].dtype
            assert error(gradient, like) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("call", [dynamic_conv, dynamic_conv_transpose, per_sample_conv])
@pytest.mark.parametrize(("batch", "kernels", "groups"), [(1, 4, 1), (8, 4, 1), (8, 1, 1), (4, 4, 16)])
@pytest.mark.parametrize(
    ("size", "stride"),
    [((1,), 2), ((1, 1), 2), ((1, 1), 1), ((8, 1), 2), ((2, 8, 8), 1), ((2, 4, 4), 2), ((1, 4, 4), 1)],
)
def test_gradients_of_taps_that_meet_padding_alone_are_zeros(call, batch, kernels, groups, size, stride):
    torch.manual_seed(0)
    x, taps = torch.randn(batch, 32, *size).bfloat16(), (3,) * len(size)
    weight = torch.randn(batch if call is per_sample_conv else kernels, 32, 32 // groups, *taps).bfloat16()
    given = {"stride": stride, "padding": 1, "groups": groups}
    gates = {} if call is per_sample_conv else {"kernel": torch.rand(batch, kernels)}
    tensors = [t.requires_grad_() for t in (weight, weight.detach().double())]
    wanted = call(x.double(), tensors[1], **gates, **given, backend="reference")
    upstream = torch.randn_like(wanted).bfloat16()
    y = call(x, tensors[0], **gates, **given)
    for numbers in range(1 << 10, 1 << 19, 1 << 14):  # what is left unwritten is what lay in memory before
        torch.full((numbers,), float("nan"))
    (found,) = torch.autograd.grad(y, tensors[0], upstream)
    (exact,) = torch.autograd.grad(wanted, tensors[1], upstream.double())
    assert error(found, exact) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("processor", "backends"),
    [
        # large and small map of 3x3 taps, few positions, large and small map of one tap, a batch of one
        ({"has_bfloat16": False, "has_matrix_units": False}, ["cpu"] * 6),
        ({"has_bfloat16": True, "has_matrix_units": False}, ["cpu", "cpu", "cpu", "pointwise", "cpu", "cpu"]),
        (
            {"has_bfloat16": True, "has_matrix_units": True},
            ["grouped", "product", "shared", "pointwise", "pointwise", "single"],
        ),
    ],
    ids=["neither", "bfloat16", "matrix units"],
)
def test_the_backend_of_a_training_in_bfloat16_is_that_of_the_processor(processor, backends, monkeypatch):
    for name, value in processor.items():
        monkeypatch.setattr(cpu, name, lambda value=value: value)
    weight = torch.zeros(2, 256, 64, 3, 3, dtype=torch.bfloat16)
    calls = [(8, 20, 3), (8, 12, 3), (8, 4, 3), (8, 48, 1), (8, 7, 1), (1, 20, 3)]
    for (batch, size, taps), backend in zip(calls, backends, strict=True):
        x = torch.zeros(batch, 64, size, size, dtype=torch.bfloat16)
        geometry = Geometry((1, 1), (taps // 2,) * 2, (1, 1), 1)
        kernels = weight[..., :taps, :taps]
        assert policy.choose(x, kernels, geometry, True).backend == backend
        assert policy.choose(x.half(), kernels.half(), geometry, True).backend == "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [20, 12, 4])
def test_autocast_rounds_kernels_in_training_no_more_than_it_must(size, dtype):
    torch.manual_seed(0)
    layer = odconv.ODConv2d(64, 256, 3, padding=1, kernel_num=2, norm="layer")
    exact = copy.deepcopy(layer).double()
    x = torch.randn(8, 64, size, size)
    upstream = torch.randn(8, 256, size, size).to(dtype)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.backward(upstream)
    wanted = exact(x.double())
    wanted.backward(upstream.double())
    assert error(y, wanted.detach()) < torch.finfo(dtype).eps
    for parameter, like in zip(layer.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert error(parameter.grad, like.grad) < 4 * torch.finfo(dtype).eps


def test_not_a_number_stays_one():
    x, weight = torch.zeros(2, 32, 4, 4), torch.ones(1, 32, 32, 3, 3)
    x[1, 3, 1, 2] = float("nan")
    for dtype in DTYPES:
        y = dynamic_conv(x.to(dtype), weight.to(dtype), padding=1, backend="cpu")
        assert y[1, :, 0:3, 1:4].isnan().all()
        assert not y[0].isnan().any()


@pytest.mark.parametrize("layer", [odconv.ODConv2d, odconv.DyConv2d, odconv.CondConv2d])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])
def test_the_attention_in_one_call_is_the_attention(layer, dtype, last):
    torch.manual_seed(0)
    layer = layer(37, 20, 3, padding=1).to(dtype).eval()
    x = torch.randn(5, 37, 13, 12, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    with torch.no_grad():
        fused = layer.attention(x)
    for value, wanted in zip(fused, layer.attention(x), strict=True):
        assert (value is None) == (wanted is None)
        if wanted is not None:
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, wanted)


def test_pooling_is_the_mean():
    for dtype in (*DTYPES, torch.float32, torch.float64):
        for size in ((300,), (33, 35), (3, 4, 5), (1, 1)):
            x = (torch.randn(3, 19, *size, dtype=torch.float64) + 1).to(dtype)
            wanted = x.double().flatten(2).mean(2)
            for maps in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), torch.stack([x, x], -1)[..., 0]):
                found = torch.ops.odconv.pool(maps)
                assert found.dtype == torch.promote_types(dtype, torch.float32)
                torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="odconv: x must be"):
        torch.ops.odconv.pool(torch.ones(2, 3))


def test_what_the_processor_cannot_do_in_16_bits_is_done_in_32():
    """A group of an odd number of channels has no pairs to multiply, and is computed in float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 8, 8).bfloat16(), torch.randn(1, 40, 3, 3, 3).bfloat16()
    geometry = Geometry((1, 1), (1, 1), (1, 1), 2)
    y = cpu.convolve(x, weight, Attentions(), geometry)
    exact = dynamic_conv(x.double(), weight.double(), padding=1, groups=2, backend="reference")
    assert error(y, exact) < torch.finfo(torch.bfloat16).eps / 2
