"""The transposed operator and layers: against the definition, against torch, and life as a module among others."""

import copy
import inspect
import itertools
import pickle
import re
from functools import partial

import operands
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ATTENTIONS, outcome
from parameters import slow_except
from torch import nn
from torch.export import Dim, export

import odconv
from odconv.conversion.convert import options_of
from odconv.functional import dynamic_conv_transpose
from odconv.layers import DynamicConvTranspose

arguments = partial(operands.arguments, transposed=True)
FORMS = ["auto", "grouped", "dense"]
LAYERS = {name: getattr(odconv, name) for name in odconv.__all__ if "Transpose" in name}
CHANNELS = {"in_channels": 8, "out_channels": 12}


@st.composite
def problems(draw):
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    n = draw(st.integers(1, 3))
    taps = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    present = {name for name in ATTENTIONS if draw(st.booleans())} | ({"kernel"} if n > 1 else set())
    bias = draw(st.sampled_from([None, "static", "mixed"] if "kernel" in present else [None, "static"]))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    size = tuple(draw(st.integers(1, 5)) for _ in range(dims))
    whole = [(e - 1) * s + d * (k - 1) + p for e, s, d, k, p in zip(size, stride, dilation, taps, extra, strict=True)]
    padding = tuple(draw(st.integers(0, min(2, w // 2))) for w in whole)
    tensors = (draw(st.integers(1, 3)), channels, filters, n, taps, size, groups, sorted(present), bias)
    geometry = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation, "groups": groups}
    return tensors, geometry


@settings(max_examples=150, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_every_form_is_the_reference(problem, seed):
    torch.manual_seed(seed)
    shape, geometry = problem
    tensors = arguments(*shape)
    expected = outcome(dynamic_conv_transpose, tensors, **geometry, backend="reference")
    for form in FORMS:
        for value, wanted in zip(
            outcome(dynamic_conv_transpose, tensors, **geometry, backend=form), expected, strict=True
        ):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, form=form: f"{form}: {m}")


@pytest.mark.parametrize("form", ["reference", "grouped", "dense"])
@pytest.mark.parametrize("present", [p for r in range(5) for p in itertools.combinations(ATTENTIONS, r)])
def test_gradcheck_of_every_form_and_attention_subset(form, present):
    torch.manual_seed(0)
    n = 2 if "kernel" in present else 1
    tensors = arguments(2, 4, 2, n, (2, 3), (2, 3), groups=2, present=present, bias="static")

    def run(*values):
        named = dict(zip(tensors, values, strict=True))
        return dynamic_conv_transpose(**named, padding=(0, 1), stride=(1, 2), groups=2, backend=form)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("form", ["grouped", "dense"])
def test_double_backward(form):
    torch.manual_seed(0)
    tensors = arguments(2, 2, 2, 2, (2, 2), (3, 3))
    run = lambda *values: dynamic_conv_transpose(**dict(zip(tensors, values, strict=True)), backend=form)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bias", [None, "static", "mixed"])
def test_an_empty_batch_gives_an_empty_output_and_gradients(dims, n, bias):
    tensors = arguments(0, 4, 6, n, (3,) * dims, (5,) * dims, bias=bias)
    y = dynamic_conv_transpose(**tensors, stride=2, padding=1)
    assert y.shape == (0, 6, *(9,) * dims)
    y.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors.values())
    assert dynamic_conv_transpose(**tensors, stride=2, padding=1, backend="reference").shape == y.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_stays_near_float64(dtype, form):
    torch.manual_seed(0)
    tensors = arguments(3, 16, 8, 4, (3, 3), (6, 6))
    exact = dynamic_conv_transpose(**tensors, stride=2, backend="reference")
    y = dynamic_conv_transpose(**{k: t.to(dtype) for k, t in tensors.items()}, stride=2, backend=form)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_theirs(dtype):
    torch.manual_seed(0)
    tensors = arguments(3, 8, 8, 2, (3, 3), (5, 5), dtype=torch.float32)
    exact = dynamic_conv_transpose(**tensors, stride=2, backend="reference")
    with torch.autocast("cpu", dtype=dtype):
        y = dynamic_conv_transpose(**tensors, stride=2)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


X, W, K = torch.zeros(8, 4, 5, 5), torch.zeros(3, 4, 6, 3, 3), torch.zeros(8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.zeros(8, 4)}, r"kernel must have shape \(B, n\) = \(8, 3\), got \(8, 4\)"),
        ({"filter": torch.zeros(8, 4)}, r"filter must have shape \(B, O\) = \(8, 6\), got \(8, 4\)"),
        ({"x": torch.zeros(8, 6, 5, 5)}, r"x must have shape \(B, C, H, W\) with C = 4, got \(8, 6, 5, 5\)"),
        ({"weight": torch.zeros(6, 4, 3)}, r"weight must have shape \(n, C, O/groups, \*kernel_size\)"),
        ({"groups": 3}, r"groups must be a positive divisor of the 4 channels in weight, got 3"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(O\) = \(6,\)"),
        ({"output_padding": 1}, r"output_padding must be below stride \(1, 1\) or dilation \(1, 1\), got \(1, 1\)"),
        ({"padding": 4}, r"padding must leave some of the output, got \(4, 4\) for x of \(8, 4, 5, 5\)"),
        ({"stride": 0}, "stride must be an int or 2 ints, each at least 1, got 0"),
        ({"backend": "single"}, "backend must be 'auto' or one of .*, got 'single'"),
        ({"x": X[:0], "kernel": K[:0], "backend": "grouped"}, "backend 'grouped' needs at least one sample"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dynamic_conv_transpose(**({"x": X, "weight": W, "kernel": K} | change))


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.float32, got torch.float64"):
        dynamic_conv_transpose(X, W.double(), kernel=K)


def map_of(layer_class, batch=3, extent=4, **options):
    return torch.randn(batch, 8, *(extent,) * layer_class.dims, **options)


def plain_like(layer, **options):
    return getattr(nn, f"ConvTranspose{layer.dims}d")(8, 12, 3, 2, 1, 1, 2, True, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_with_equal_attentions_a_layer_is_torchs(name):
    """Positional arguments in torch's order, and output_size as torch takes it."""
    layer = LAYERS[name](8, 12, 3, 2, 1, 1, 2, True, kernel_num=1, dtype=torch.float64)
    plain = plain_like(layer, dtype=torch.float64)
    for parameter in layer.attention.parameters():
        nn.init.zeros_(parameter)  # sigmoids of 0.5, a softmax of 1
    bias = layer.bias if layer.kernel_bias is None else layer.kernel_bias[0]
    kernel_scale, bias_scale = {"ODConv": (8, 1), "DyConv": (1, 1), "CondConv": (2, 2)}[name.partition("T")[0]]
    plain.load_state_dict({"weight": layer.weight[0] / kernel_scale, "bias": bias / bias_scale})
    x = map_of(layer, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    for size in ([7] * layer.dims, [3, 12, *[8] * layer.dims]):
        torch.testing.assert_close(layer(x, size), plain(x, size), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"output_size must lie between \(7,.* and \(8,.* got \(9"):
        layer(x, output_size=(9,) * layer.dims)


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_reaches_every_parameter_and_copies_compute_the_same(name):
    torch.manual_seed(0)
    layer = LAYERS[name](**CHANNELS, kernel_size=3, stride=2, output_padding=1, kernel_num=3, bias=True)
    layer(map_of(layer)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    x = map_of(layer.eval())
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(same(x), layer(x))
    assert "output_padding=(1" in repr(layer)
    assert layer.to("meta")(x.to("meta")).shape == (3, 12, *(10,) * layer.dims)


def test_the_kernels_are_drawn_by_the_fan_out():
    torch.manual_seed(0)
    layer = odconv.ODConvTranspose2d(128, 256, 3, groups=2)
    for kernel in layer.weight:  # every input is spread over 128 filters of 9 taps
        assert kernel.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", slow_except(LAYERS, "ODConvTranspose2d"))
def test_export_with_a_dynamic_batch_and_compile(name):
    layer = LAYERS[name](**CHANNELS, kernel_size=3, stride=2, padding=1, output_padding=1, groups=2, kernel_num=2)
    layer.eval()
    program = export(layer, (map_of(layer),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (3, 1, 2, 7):
        x = map_of(layer, batch)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_multiply_adds_are_those_of_the_transposed_convolution_and_its_attention():
    plain, layer = nn.ConvTranspose2d(8, 12, 3, 2, bias=False), odconv.CondConvTranspose2d(8, 12, 3, 2, kernel_num=2)
    own = 8 * 2 + 2 * plain.weight.numel()  # the routing head, and mixing two kernels
    assert odconv.profile(layer, (8, 5, 5)).madds == odconv.profile(plain, (8, 5, 5)).madds + own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros' for a transposed layer, got 'reflect'"),
        ({"padding": "same"}, "padding must be an int or 2 ints, each at least 0, got 'same'"),
        ({"output_padding": -1}, "output_padding must be an int or 2 ints"),
        ({"kernel_num": 0}, "kernel_num must be an int of at least 1, got 0"),
    ],
)
def test_what_a_layer_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        odconv.ODConvTranspose2d(**(CHANNELS | {"kernel_size": 3} | change))


def test_there_is_a_layer_for_every_method_and_dimension():
    assert len(LAYERS) == 9
    assert all(issubclass(layer, DynamicConvTranspose) for layer in LAYERS.values())


@pytest.mark.parametrize("name", [name for name in odconv.__all__ if re.fullmatch(r"(OD|Dy|Cond)Conv.*d", name)])
def test_a_layer_has_the_signature_of_its_convolution_and_its_methods_options(name):
    layer = getattr(odconv, name)
    found = inspect.signature(layer).parameters
    static = inspect.signature(getattr(nn, f"Conv{'Transpose' if layer.transposed else ''}{layer.dims}d")).parameters
    positional = [key for key, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [key for key in static if key not in ("device", "dtype")]
    for key in positional[3:]:
        assert found[key].default == (False if key == "bias" else static[key].default), key
    method = inspect.signature(getattr(odconv, name.replace("Transpose", ""))).parameters
    assert [p for p in found.values() if p.kind is p.KEYWORD_ONLY] == [
        p for p in method.values() if p.kind is p.KEYWORD_ONLY
    ]
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in found.values())
    assert options_of(layer) == [key for key in found if key not in (*positional, "device", "dtype")]
