"""The operator: every form against the definition, in values and gradients, over drawn shapes; and what it refuses."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ATTENTIONS, arguments, assert_gradients_stand_alone, outcome
from torch import nn
from torch.nn import functional as F

from odconv.functional import dynamic_conv
from odconv.ops import BACKENDS, cpu

# Those that do not take everything have tests of their own; without a compiler there is no "cpu".
FORMS = [
    "auto",
    *(
        name
        for name in BACKENDS
        if name not in {"reference", "triton", "pointwise", "samples"} and (name != "cpu" or cpu.available())
    ),
]


@st.composite
def problems(draw):
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    n = draw(st.integers(1, 3))
    taps = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    present = {name for name in ATTENTIONS if draw(st.booleans())} | ({"kernel"} if n > 1 else set())
    bias = draw(st.sampled_from([None, "static", "mixed"] if "kernel" in present else [None, "static"]))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    size = tuple(d * (k - 1) + draw(st.integers(1, 5)) for d, k in zip(dilation, taps, strict=True))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * dims)))
    stride = 1 if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    tensors = (draw(st.integers(1, 3)), channels, filters, n, taps, size, groups, sorted(present), bias)
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@settings(max_examples=150, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_every_form_is_the_reference(problem, seed):
    torch.manual_seed(seed)
    shape, geometry = problem
    tensors = arguments(*shape)
    expected = outcome(dynamic_conv, tensors, **geometry, backend="reference")
    for form in FORMS:
        if form == "single" and shape[0] != 1:
            continue
        for value, wanted in zip(outcome(dynamic_conv, tensors, **geometry, backend=form), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, form=form: f"{form}: {m}")


@pytest.mark.parametrize("form", [name for name in FORMS if name != "single"])
@pytest.mark.parametrize("present", [["channel", "filter"], ["filter"], ATTENTIONS])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(form, present):
    torch.manual_seed(0)
    tensors = arguments(3, 6, 4, 1, (3, 2), (6, 5), 2, present, "static")
    assert_gradients_stand_alone(dynamic_conv, tensors, padding=1, stride=(2, 1), groups=2, backend=form)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("present", [[], ["kernel"], ["channel", "spatial"], ATTENTIONS])
@pytest.mark.parametrize(("size", "stride"), [((5,), 1), ((4, 3), (2, 1)), ((4, 1, 3), (1, 1, 2)), ((1, 1), 1)])
def test_kernels_of_one_tap_are_matrix_products(size, stride, present, last):
    torch.manual_seed(0)
    tensors = arguments(3, 5, 4, 2 if "kernel" in present else 1, (1,) * len(size), size, 1, present, "static")
    if last:
        tensors["x"] = tensors["x"].detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    results = [outcome(dynamic_conv, tensors, stride=stride, backend=form) for form in ("reference", "pointwise")]
    for value, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="backend 'pointwise' needs kernels of one tap without groups and padding"):
        dynamic_conv(**tensors, stride=stride, padding=1, backend="pointwise")


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("present", [p for r in range(5) for p in itertools.combinations(ATTENTIONS, r)])
def test_gradcheck_of_every_form_and_attention_subset(form, present):
    torch.manual_seed(0)
    n = 2 if "kernel" in present else 1
    tensors = arguments(1 if form == "single" else 2, 4, 2, n, (2, 3), (3, 4), groups=2, present=present, bias="static")

    def run(*values):
        named = dict(zip(tensors, values, strict=True))
        return dynamic_conv(**named, padding=(0, 1), stride=(1, 2), groups=2, backend=form)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("form", ["auto", "shared", "product", "grouped"])
def test_double_backward(form):
    torch.manual_seed(0)
    tensors = arguments(2, 2, 2, 2, (2, 2), (3, 3))
    run = lambda *values: dynamic_conv(**dict(zip(tensors, values, strict=True)), backend=form)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


def test_the_definition_without_attentions_is_an_ordinary_convolution():
    x, weight = torch.randn(3, 4, 7, 6), torch.randn(1, 5, 4, 3, 3)
    for form in ["reference", "auto", "shared", "product", "grouped"]:
        y = dynamic_conv(x, weight, padding=1, stride=2, backend=form)
        torch.testing.assert_close(y, F.conv2d(x, weight[0], padding=1, stride=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("taps", [1, 3])
def test_an_empty_batch_gives_an_empty_output_and_gradients(dims, n, taps):
    tensors = arguments(0, 4, 6, n, (taps,) * dims, (5,) * dims, bias="static")
    y = dynamic_conv(**tensors, padding=1)
    assert y.shape == (0, 6, *(5 + 2 - taps + 1,) * dims)
    y.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors.values())
    assert dynamic_conv(**tensors, padding=1, backend="reference").shape == y.shape


@pytest.mark.parametrize("size", [(2, 2), (9, 9)], ids=["unfolded", "grouped"])
@pytest.mark.parametrize("taps", [1, 3])
def test_memory_formats_give_the_same(size, taps):
    torch.manual_seed(0)
    tensors = arguments(3, 4, 6, 2, (taps, taps), size)
    expected = dynamic_conv(**tensors, padding=1)
    x = tensors.pop("x").detach()
    strided = torch.randn(3, 4, *size, 2, dtype=torch.float64)
    strided[..., 0] = x
    for same in (
        x.to(memory_format=torch.channels_last),
        strided[..., 0],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        torch.testing.assert_close(dynamic_conv(same, **tensors, padding=1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_stays_near_float64(dtype, form):
    torch.manual_seed(0)
    tensors = arguments(1 if form == "single" else 3, 16, 8, 4, (3, 3), (6, 6))
    exact = dynamic_conv(**tensors, padding=1, backend="reference")
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    y = dynamic_conv(**low, padding=1, backend=form)
    assert y.dtype == dtype
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_theirs(dtype):
    torch.manual_seed(0)
    tensors = arguments(3, 8, 8, 2, (3, 3), (5, 5), dtype=torch.float32)
    exact = dynamic_conv(**tensors, padding=1, backend="reference")
    with torch.autocast("cpu", dtype=dtype):
        y = dynamic_conv(**tensors, padding=1)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


def test_the_batch_can_be_split_anywhere():
    torch.manual_seed(0)
    tensors = arguments(7, 6, 9, 3, (3, 3), (2, 3))
    whole = dynamic_conv(**tensors, padding=1)
    weight = tensors.pop("weight")
    parts = [{name: tensor[a:b] for name, tensor in tensors.items()} for a, b in ((0, 1), (1, 4), (4, 7))]
    again = torch.cat([dynamic_conv(weight=weight, **part, padding=1) for part in parts])
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-12)


def test_torch_compile_takes_the_whole_operator():
    tensors = arguments(3, 4, 6, 2, (3, 3), (2, 2))
    compiled = torch.compile(dynamic_conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tensors, padding=1), dynamic_conv(**tensors, padding=1))


X, W = torch.zeros(8, 4, 5, 5), torch.zeros(3, 6, 4, 3, 3)
K = torch.zeros(8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.zeros(8, 4)}, r"kernel must have shape \(B, n\) = \(8, 3\), got \(8, 4\)"),
        ({"kernel": None}, r"kernel must have shape \(B, n\) = \(8, 3\) .* got None"),
        ({"spatial": torch.zeros(8, 9)}, r"spatial must have shape \(B, \*kernel_size\) = \(8, 3, 3\), got \(8, 9\)"),
        ({"channel": torch.zeros(8, 6)}, r"channel must have shape \(B, C\) = \(8, 4\), got \(8, 6\)"),
        ({"filter": torch.zeros(7, 6)}, r"filter must have shape \(B, O\) = \(8, 6\), got \(7, 6\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(O\) = \(6,\) or \(n, O\) = \(3, 6\), got \(4,\)"),
        ({"x": torch.zeros(8, 5, 5, 5)}, r"x must have shape \(B, C, H, W\) with C = 4, got \(8, 5, 5, 5\)"),
        ({"x": torch.zeros(4, 5, 5)}, r"x must have shape"),
        ({"weight": torch.zeros(6, 4, 3)}, r"weight must have shape"),
        (
            {"weight": torch.zeros(0, 6, 4, 3, 3), "kernel": torch.zeros(8, 0)},
            r"weight must have shape .* none of them 0",
        ),
        ({"groups": 2.0}, "groups must be an int of at least 1, got 2.0"),
        ({"groups": 4}, r"groups must be a positive divisor of the 6 filters in weight, got 4"),
        ({"stride": 0}, r"stride must be an int or 2 ints, each at least 1, got 0"),
        ({"padding": (1, 1, 1)}, r"padding must be an int or 2 ints, each at least 0, got \(1, 1, 1\)"),
        ({"padding": "full"}, r"padding must be ints, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \(2, 2\)"),
        ({"x": torch.zeros(8, 4, 5, 2)}, r"x must have a map of at least the kernel's span, .* got \(8, 4, 5, 2\)"),
        ({"dilation": -1}, r"dilation must be"),
        ({"backend": "fast"}, r"backend must be 'auto' or one of .*, got 'fast'"),
        ({"backend": "single"}, r"backend 'single' needs a batch of one, got x of shape \(8, 4, 5, 5\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dynamic_conv(**({"x": X, "weight": W, "kernel": K} | change))


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.float32, got torch.float64"):
        dynamic_conv(X, W.double(), kernel=K)


def test_a_mixed_bias_needs_a_kernel_attention():
    with pytest.raises(ValueError, match="mixed by kernel, which is None"):
        dynamic_conv(X, nn.Parameter(torch.zeros(1, 6, 4, 3, 3)), bias=torch.zeros(1, 6))
