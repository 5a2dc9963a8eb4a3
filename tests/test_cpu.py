"""The compiled CPU form: registered as an operator should be, the same on any machine, and dispensable."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import odconv
from odconv.functional import dynamic_conv
from odconv.ops import cpu

NEEDS_KERNEL = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler, or not x86 with AVX2")


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
    torch.library.opcheck(torch.ops.odconv.conv.default, (*leaves, *geometry))
    torch.library.opcheck(torch.ops.odconv.conv.default, (leaves[0], leaves[1], leaves[2], None, None, None, *geometry))
    grad = torch.randn(2, 7, 3, 6, dtype=torch.float64)
    plain = [tensor.detach() for tensor in leaves]
    for to_x, to_weights in ((True, True), (True, False), (False, True)):
        arguments = (grad, *plain, *geometry, to_x, to_weights)
        torch.library.opcheck(torch.ops.odconv.conv_backward.default, arguments)


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


def test_a_network_without_the_kernel_computes_the_same(tmp_path):
    """In processes of their own: with the kernel, told to do without, and with a compiler that fails."""
    code = (
        "import sys, torch, odconv; torch.manual_seed(0); layer = odconv.ODConv2d(8, 24, 3, padding=1);"
        "y = layer(torch.randn(3, 8, 6, 6)); y.square().mean().backward();"
        "torch.save([y.detach(), layer.weight.grad], sys.argv[1])"
    )
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    results = []
    for name, changes in {
        "with": {},
        "without": {"ODCONV_CPU_KERNEL": "0"},
        "broken": {"CXX": str(broken), "ODCONV_CACHE": str(tmp_path)},
        "missing": {"CXX": "no-such-compiler", "ODCONV_CACHE": str(tmp_path)},
    }.items():
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        run = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=True)
        told = {"broken": "no such target", "missing": "no C++ compiler 'no-such-compiler'"}
        if name in told and torch.backends.cpu.get_cpu_capability() in cpu.VECTORS:
            assert told[name] in run.stderr
            assert run.stderr.count("could not be compiled") == 1
        elif name == "without":
            assert "UserWarning" not in run.stderr
        results.append(torch.load(tmp_path / name, weights_only=True))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@NEEDS_KERNEL
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no wider vectors than the tests have")
def test_narrower_vectors_too(tmp_path):
    """The kernel as a processor without AVX-512 compiles it, in a process that PyTorch takes for one."""
    tests = [f"{__file__}::test_large_problems_are_the_reference", f"{__file__}::test_any_strides"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    changes = {"ATEN_CPU_CAPABILITY": "avx2", "ODCONV_CACHE": str(tmp_path)}
    run = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout
    assert len(list(tmp_path.glob("cpu-*.so"))) == 1


def test_the_named_form_is_strict():
    tensors, geometry = problem(2, 4, 4, 1, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend 'cpu' needs x on the CPU in float32 or float64.*torch.bfloat16"):
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
