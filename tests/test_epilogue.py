"""Activations and means as part of a convolution: by operator, by layer and in fused networks."""

import copy

import pytest
import torch
from stirring import stirred
from torch import nn
from torch.nn import functional as F

import odconv
from odconv.layers import DynamicConv
from odconv.ops import cpu
from odconv.ops.contract import Attentions, Geometry
from odconv.ops.epilogue import ACTIVATIONS

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no compiled kernel here")
SHAPES = {  # channels, filters, groups, taps, map, stride
    "one tap": (24, 70, 1, (1, 1), (9, 13), 1),
    "three taps": (5, 33, 1, (3, 3), (12, 11), 2),
    "large": (16, 130, 1, (3, 3), (40, 30), 1),
    "groups": (32, 64, 2, (3, 3), (7, 6), 1),
    "depth-wise": (35, 35, 35, (3, 3), (24, 25), 1),
    "depth-wise, strided": (20, 20, 20, (5, 5), (17, 9), 2),
    "1-d": (6, 20, 1, (3,), (37,), 1),
    "3-d": (4, 18, 1, (3, 1, 2), (5, 6, 7), 1),
}


def operands(shape, dtype, batch=3, n=2):
    channels, filters, groups, taps, size, stride = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *size, dtype=dtype)
    weight = torch.randn(n, filters, channels // groups, *taps, dtype=dtype) / (channels // groups) ** 0.5
    attentions = Attentions(
        torch.rand(batch, n, dtype=dtype),
        torch.rand(batch, *taps, dtype=dtype),
        torch.rand(batch, channels, dtype=dtype),
        torch.rand(batch, filters, dtype=dtype),
    )
    geometry = Geometry((stride,) * len(taps), tuple(t // 2 for t in taps), (1,) * len(taps), groups)
    return x, weight, attentions, geometry


@needs_kernel
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_activates_what_it_writes_and_knows_its_means(shape, dtype, last):
    x, weight, attentions, geometry = operands(shape, dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    for bias in (None, torch.randn(weight.shape[1], dtype=dtype), torch.randn(3, weight.shape[1], dtype=dtype)):
        plain = 3 * cpu.convolve(x, weight / 3, attentions, geometry, None if bias is None else bias / 3)
        for name, function in ACTIVATIONS.items():
            y, means = cpu.convolve_fused(x, weight, attentions, geometry, bias, name, True)
            assert y.stride() == plain.stride()
            torch.testing.assert_close(y, function(plain), rtol=tolerance, atol=tolerance)
            axes = tuple(range(2, y.dim()))
            expected = y.double().mean(axes).to(means.dtype)
            torch.testing.assert_close(means, expected, rtol=tolerance, atol=tolerance / 10)
            alone, nothing = cpu.convolve_fused(x, weight, attentions, geometry, bias, name, False)
            assert torch.equal(alone, y)
            assert nothing is None


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_means_depend_neither_on_threads_nor_on_the_batch(shape, dtype):
    x, weight, attentions, geometry = operands(shape, dtype, batch=5)
    arguments = (geometry, None, "silu", True)
    whole = cpu.convolve_fused(x, weight, attentions, *arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = cpu.convolve_fused(x, weight, attentions, *arguments)
    finally:
        torch.set_num_threads(threads)
    alone = cpu.convolve_fused(x[1:3], weight, Attentions(*(a[1:3] for a in attentions)), *arguments)
    for of_all, of_some, parts in zip(whole, again, alone, strict=True):
        assert torch.equal(of_all, of_some)
        assert torch.equal(of_all[1:3], parts)


@needs_kernel
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("filters", "groups", "taps"), [(48, 1, 1), (64, 2, 3), (44, 1, 1), (48, 2, 1)])
def test_maps_that_are_written_past_the_caches_are_those_of_their_samples(filters, groups, taps, dtype, n):
    # each map is below, and all together are above, the size from which they are; not where vectors are not whole
    torch.manual_seed(0)
    x = torch.randn(5, 6, 120, 130, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(n, filters, 6 // groups, taps, taps, dtype=dtype)
    kernel = torch.rand(5, n, dtype=dtype) if n > 1 else None
    attentions = Attentions(kernel, torch.rand(5, taps, taps, dtype=dtype), torch.rand(5, 6, dtype=dtype))
    arguments = (Geometry((1, 1), (taps // 2,) * 2, (1, 1), groups), torch.randn(filters, dtype=dtype), "relu6", True)
    together, means = cpu.convolve_fused(x, weight, attentions, *arguments)
    for i in range(5):
        own = Attentions(*(None if a is None else a[i : i + 1] for a in attentions))
        alone, mean = cpu.convolve_fused(x[i : i + 1], weight, own, *arguments)
        assert torch.equal(together[i : i + 1], alone)
        assert torch.equal(means[i : i + 1], mean)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activations_at_the_ends_of_numbers(dtype):
    values = [-1e30, -200, -88, -20, -3, -1, -0.0, 0, 0.5, 3, 6, 20, 88, 1e30, float("inf"), float("nan")]
    x = torch.tensor(values, dtype=dtype)[None, :, None, None]
    one = torch.ones(1, 16, 1, 1, 1, dtype=dtype)
    for name, function in ACTIVATIONS.items():
        y, _ = cpu.convolve_fused(x, one, Attentions(), Geometry((1, 1), (0, 0), (1, 1), 16), None, name, False)
        torch.testing.assert_close(y, function(x), equal_nan=True, rtol=1e-6, atol=1e-35)


@needs_kernel
def test_what_the_operator_refuses():
    x, weight, attentions, geometry = operands("one tap", torch.float32)
    with pytest.raises(RuntimeError, match="activation must be none, relu, relu6, hardswish or silu, got gelu"):
        cpu.convolve_fused(x, weight, attentions, geometry, None, "gelu", True)
    torch.library.opcheck(
        torch.ops.odconv.conv_fused.default, (x, weight, *attentions, *geometry, None, "relu", True, None)
    )


class Mixed(nn.Module):
    """Blocks with each activation, one that is shared, a branch, and layers of each method and dimension."""

    def __init__(self):
        super().__init__()
        layer = odconv.ODConv2d
        self.stem = nn.Sequential(layer(3, 32, 3, padding=1, kernel_num=2), nn.BatchNorm2d(32), nn.SiLU())
        self.wide = nn.Sequential(odconv.CondConv2d(32, 48, 1, bias=True), nn.BatchNorm2d(48), nn.Hardswish(True))
        self.deep = nn.Sequential(layer(48, 48, 3, groups=48, padding=1), nn.BatchNorm2d(48), nn.ReLU6(True))
        self.first, self.first_norm = odconv.DyConv2d(48, 32, 1), nn.BatchNorm2d(32)
        self.second, self.second_norm = layer(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.gate, self.up = nn.SiLU(), odconv.ODConvTranspose2d(32, 8, 2, stride=2)
        self.up_norm, self.up_act = nn.BatchNorm2d(8), nn.ReLU()
        self.last = layer(8, 4, 1)

    def forward(self, x):
        x = self.deep(self.wide(self.stem(x)))
        y = self.relu(self.first_norm(self.first(x)))
        y = self.relu(self.second_norm(self.second(y)) + y)
        return self.last(self.up_act(self.up_norm(self.up(self.gate(y) * y))))


def fused_and_not(model, *shape, dtype=torch.float64):
    model = stirred(model).to(dtype).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return odconv.fuse(copy.deepcopy(model)), model, torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_fused_network_computes_what_it_did(last):
    fused, model, x = fused_and_not(Mixed(), 3, 3, 14, 13)
    if last:
        fused, x = fused.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    activations = [part.epilogue.activation for part in fused.modules() if isinstance(part, DynamicConv)]
    assert activations == ["silu", "hardswish", "relu6", "relu", None, "relu", None]
    with torch.no_grad():
        expected = model(x)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert (fused(x) - expected).norm() <= 1e-12 * expected.norm()
    assert (fused(x) - expected).norm() <= 1e-12 * expected.norm()
    assert not any(isinstance(part, nn.SiLU) for part in fused.stem.modules())
    assert isinstance(fused.gate, nn.SiLU)
    again = odconv.fuse(fused)
    with torch.no_grad():
        assert (again(x) - expected).norm() <= 1e-12 * expected.norm()


@needs_kernel
def test_means_are_taken_over_and_only_where_they_are_those_of_the_input(monkeypatch):
    fused, model, x = fused_and_not(Mixed(), 2, 3, 14, 13)
    fused, x = fused.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    pooled = []
    pool = cpu.pool
    monkeypatch.setattr(cpu, "pool", lambda x: pooled.append(tuple(x.shape)) or pool(x))
    with torch.inference_mode():
        expected = model(x)
        assert len(pooled) == 7
        pooled.clear()
        fused(x)
        # stem, what follows a map with two users, the transposed layer, and what follows it
        assert pooled == [(2, 3, 14, 13), (2, 32, 14, 13), (2, 32, 14, 13), (2, 8, 28, 26)]
        pooled.clear()
        with odconv.layers.pool_inside(fused, torch.tensor([[0.5, 1.0], [1.0, 0.5]])):
            inside = fused(x)
        with odconv.layers.pool_inside(model, torch.tensor([[0.5, 1.0], [1.0, 0.5]])):
            assert (inside - model(x)).norm() <= 1e-12 * expected.norm()
        fused.stem[2].register_forward_hook(lambda module, inputs, output: output * 2)  # another tensor
        model.stem[2].register_forward_hook(lambda module, inputs, output: output * 2)
        assert (fused(x) - model(x)).norm() <= 1e-12 * expected.norm()


@needs_kernel
def test_compiled_networks_take_means_over_too():
    fused, model, x = fused_and_not(Mixed(), 2, 3, 14, 13)
    fused, x = fused.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    apart = copy.deepcopy(fused)  # whose parts are compiled each for itself: what is said of an output leaves its graph
    for name, part in apart.named_children():
        setattr(apart, name, torch.compile(part, backend=backend))
    with torch.inference_mode():
        expected = model(x)
        for network in (torch.compile(fused, fullgraph=True, backend=backend), apart):
            graphs.clear()
            assert (network(x) - expected).norm() <= 1e-12 * expected.norm()
            called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
            assert sum(str(target) == "odconv.pool" for target in called) == 4  # as without a compiler


@pytest.mark.parametrize("name", ["od_resnet18", "od_mobilenetv2_050", "odl_mobilenetv2_050", "dy_resnet18"])
def test_networks_of_the_zoo(name):
    fused, model, x = fused_and_not(odconv.create_model(name, kernel_num=2, num_classes=5), 2, 3, 64, 64)
    layers = [part for part in fused.modules() if isinstance(part, DynamicConv)]
    taking = sum(layer.attention.takes_means for layer in layers)
    assert taking == (8 if "resnet" in name else 33)
    with torch.inference_mode():
        expected = model(x)
        assert (fused(x) - expected).norm() <= 1e-11 * expected.norm()


def test_hardswish_and_silu_in_networks_of_timm():
    timm = pytest.importorskip("timm")
    for name in ("mobilenetv3_small_050", "efficientnet_b0"):
        network = odconv.convert(timm.create_model(name, num_classes=4), kernel_num=2, warm_start=False)
        fused, model, x = fused_and_not(network, 2, 3, 64, 64)
        found = {part.epilogue.activation for part in fused.modules() if isinstance(part, DynamicConv)}
        assert found & {"hardswish", "silu"}, found
        with torch.inference_mode():
            expected = model(x)
            assert (fused(x) - expected).norm() <= 1e-11 * expected.norm()


def test_a_fused_network_compiles_exports_and_becomes_static(tmp_path):
    fused, model, x = fused_and_not(Mixed(), 2, 3, 14, 13, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        close = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), expected, **close)
        torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected, **close)
        torch.testing.assert_close(torch.jit.trace(fused, x)(x), expected, **close)
        torch.testing.assert_close(copy.deepcopy(fused)(x), expected, **close)

    class Classifier(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).mean((2, 3))

    loader = [x]
    before, after = (odconv.to_static(Classifier(network), loader).model for network in (model, fused))
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), **close)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_another_activation_behind_a_shared_one_is_not_passed_over(last):
    shared = nn.ReLU6(inplace=True)
    model = nn.Sequential(
        *(odconv.ODConv2d(16, 32, 1), shared),
        *(odconv.ODConv2d(32, 32, 1), nn.ReLU(inplace=True), shared),
        odconv.ODConv2d(32, 8, 1),
    )
    fused, model, x = fused_and_not(model, 2, 16, 9, 9)
    fused, model = (net.to(memory_format=torch.channels_last) if last else net for net in (fused, model))
    assert [fused[i].epilogue.activation for i in (0, 2, 5)] == ["relu6", "relu", None]
    assert [fused[i].attention.takes_means for i in (0, 2, 5)] == [False, True, False]
    with torch.inference_mode():
        x = 20 * x
        expected = model(x)
        assert (fused(x) - expected).norm() <= 1e-12 * expected.norm()


class Changed(nn.Module):
    """Activations whose output is changed, in some way, before another activation of the same kind."""

    def __init__(self, change, shared):
        super().__init__()
        self.change = change
        self.first, self.norm = odconv.ODConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.between, self.last = odconv.ODConv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.relu, self.clip, self.drop = nn.ReLU(), nn.Hardtanh(0.1, 0.9, inplace=True), nn.Dropout()
        self.other = self.relu if shared else nn.ReLU()

    def forward(self, x):
        x = self.relu(self.between(x))  # by a module that is called in several places
        y = self.change(self, self.other(self.norm(self.first(x))), self.last(x))
        return self.relu(y)


def add_in_place(network, y, z):
    y += z
    return y


def add_elsewhere(network, y, z):
    y.flatten(1).add_(z.flatten(1))
    return y


CHANGES = {
    "+": lambda network, y, z: y + z,
    "+ the other way round": lambda network, y, z: z + y,
    "+=": add_in_place,
    "add_": lambda network, y, z: y.add_(z),
    "a view's add_": add_elsewhere,
    "torch.sub, out": lambda network, y, z: torch.sub(z, y, out=y),
    "behind dropout": lambda network, y, z: network.drop(y).sub_(z),
    "by name": lambda network, y, z: torch.sub(other=z, input=y, out=y),
    "flattened by name": lambda network, y, z: torch.flatten(input=y, start_dim=2).sub_(z.flatten(2)).view(y.shape),
    "a module": lambda network, y, z: network.clip(y) - z,
    "a module, and a function": lambda network, y, z: F.hardtanh(network.clip(y), -0.2, 0.8, True).sub_(0.5),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_that_is_changed_is_activated_again(change, shared, mode):
    fused, model, x = fused_and_not(Changed(CHANGES[change], shared), 2, 8, 7, 7)
    assert fused.between.epilogue.activation == "relu"
    assert (fused.first.epilogue.activation == "relu") == (not shared or change == "+ the other way round")
    with mode():
        expected = model(x.clone())
        assert (fused(x.clone()) - expected).norm() <= 1e-12 * expected.norm()


def test_what_hooks_want_to_see_stays():
    model = nn.Sequential(odconv.ODConv2d(4, 6, 1), nn.ReLU(), odconv.ODConv2d(6, 6, 1), nn.ReLU()).eval()
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].min() < 0, output.min() < 0)))
    model[2].register_forward_hook(lambda module, inputs, output: -output)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(odconv.fuse(model)(x), expected, rtol=1e-5, atol=1e-6)
    assert [type(part) for part in model] == [odconv.ODConv2d, nn.ReLU] * 2
    assert seen == [(True, False)] * 2


def test_gradients_of_a_fused_network():
    fused, model, x = fused_and_not(Mixed(), 2, 3, 8, 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    one, other = (
        torch.autograd.grad(net(x).square().sum(), x)[0] for net, x in zip((fused, model), inputs, strict=True)
    )
    assert (one - other).norm() <= 1e-10 * other.norm()


def test_batch_norm_behind_an_activation_is_not_folded():
    layer = odconv.fuse(nn.Sequential(odconv.ODConv2d(4, 6, 1), nn.ReLU(), nn.BatchNorm2d(6)).eval())
    assert isinstance(layer[2], nn.BatchNorm2d)
    assert "activation=relu" in repr(layer[0])
    with pytest.raises(ValueError, match="layer must not activate what it gives, got one with relu"):
        odconv.conversion.fusion.fold_batch_norm(layer[0], nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer[0](x), F.relu(layer[0](x)))
