"""Kernels that fused networks keep packed: the same results, and never those of weights that were changed."""

import copy
import io

import pytest
import torch
from test_half import DTYPES, PROBLEMS, problem
from torch import nn

import odconv
from odconv.ops import cpu
from odconv.ops.contract import Attentions, Geometry, per_axis

PACKS = cpu.available() and cpu.pack(torch.zeros(1, 16, 16, 1, dtype=torch.bfloat16), 1) is not None
pytestmark = pytest.mark.skipif(not PACKS, reason="no compiled kernel, or no products of 16 bits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
def test_packed_kernels_give_the_same(shape, dtype):
    *sizes, options = shape
    tensors = problem(*sizes, options, dtype, True)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    gates = Attentions(*(tensors[name] for name in Attentions._fields))
    given = {"stride": 1, "padding": 0, "dilation": 1} | {k: v for k, v in options.items() if k != "groups"}
    axes = [per_axis(name, value, weight.dim() - 3, least=0) for name, value in given.items()]
    geometry = Geometry(*axes, options.get("groups", 1))
    packed = cpu.pack(weight, geometry.groups)
    if weight.shape[2] == 1 or (geometry.groups > 1 and weight.shape[2] % 2):  # depth-wise, or without pairs
        assert packed is None
        return
    if packed is None:
        pytest.skip(f"no products of {dtype}")
    plain = cpu.convolve_fused(x, weight, gates, geometry, bias, "relu", True)
    for found, expected in zip(
        cpu.convolve_fused(x, weight, gates, geometry, bias, "relu", True, packed), plain, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def plain(**options) -> nn.Sequential:
    """A network of one layer."""
    torch.manual_seed(0)
    layer = odconv.ODConv2d(32, 48, 3, padding=1, kernel_num=4, init="published", **options)
    return nn.Sequential(layer).eval().to(torch.bfloat16)


def images() -> torch.Tensor:
    return torch.randn(4, 32, 9, 9).to(torch.bfloat16)


OTHER = torch.randn(4, 48, 32, 3, 3).to(torch.bfloat16)


def write(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        network[0].weight.copy_(OTHER)
    return network


CHANGES = {
    "written": write,
    "another parameter": lambda network: setattr(network[0], "weight", nn.Parameter(OTHER.clone())),
    "other data": lambda network: setattr(network[0].weight, "data", OTHER.clone()),
    "state dict": lambda network: network.load_state_dict(network.state_dict() | {"0.weight": OTHER}),
    "assigned": lambda network: network.load_state_dict(network.state_dict() | {"0.weight": OTHER}, assign=True),
    "dtype and back": lambda network: write(network.float()).to(torch.bfloat16),
    "float16": lambda network: write(network).to(torch.float16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changed_weights_are_packed_again(change):
    fused = odconv.fuse(plain())
    before = fused(images())
    assert fused[0].packed.of(fused[0].weight, 1) is not None
    change(fused)
    x, unpacked = images().to(fused[0].weight.dtype), copy.deepcopy(fused)
    unpacked[0].packed = None
    assert torch.equal(fused(x), unpacked(x))
    assert not torch.equal(fused(x), before)


@torch.no_grad()
def test_copies_and_files_pack_their_own():
    fused, x, file = odconv.fuse(plain()), images(), io.BytesIO()
    y = fused(x)
    torch.save(fused, file)
    assert file.tell() < 1.5 * fused[0].weight.nbytes  # the weight, not what is packed beside it
    file.seek(0)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        other[0].weight.mul_(2)
        assert not torch.equal(other(x), y)
        assert torch.equal(fused(x), y)
    assert {*fused.state_dict()} == {*odconv.fuse(plain().float()).state_dict()}  # which has nothing to pack


def test_gradients_and_transforms_do_without():
    fused, x = odconv.fuse(plain()), images()
    fused(x).float().sum().backward()
    assert fused[0].weight.grad.any()
    with torch.no_grad():
        y = fused(x)
        mapped = torch.func.vmap(lambda image: fused(image[None])[0])(x)
    torch.testing.assert_close(mapped, y, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_other_layers_pack_nothing():
    depthwise = nn.Sequential(odconv.ODConv2d(16, 16, 3, groups=16)).eval().to(torch.bfloat16)
    for network in (plain().float(), depthwise):
        layer = odconv.fuse(network)[0]
        assert layer.packed.of(layer.weight, layer.groups) is None


def test_a_network_fused_in_inference_mode_computes_the_same():
    x = images()
    with torch.inference_mode():
        fused = odconv.fuse(plain())
        y = fused(x)
        fused[0].weight.copy_(OTHER)  # of which PyTorch does not tell
        assert torch.equal(fused(x), odconv.fuse(write(plain()))(x))
        assert not torch.equal(fused(x), y)


def test_tensors_without_numbers_are_not_packed():
    from torch._subclasses import FakeTensorMode

    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode, torch.no_grad():
            layer = odconv.ODConv2d(32, 48, 3, padding=1, dtype=torch.bfloat16)
            x = torch.empty(4, 32, 9, 9, dtype=torch.bfloat16)
            assert odconv.fuse(nn.Sequential(layer).eval())(x).shape == (4, 48, 9, 9)


def test_the_operators():
    weight, x = plain()[0].weight.detach(), images()
    torch.library.opcheck(torch.ops.odconv.pack.default, (weight, 1), test_utils="test_schema")
    with pytest.raises(RuntimeError, match="weight must be contiguous numbers of 16 bits"):
        torch.ops.odconv.pack(weight.float(), 1)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    with pytest.raises(RuntimeError, match="packed must be what pack makes of weight"):
        cpu.convolve_fused(x, weight[:1], Attentions(), geometry, None, "none", False, weight.flatten())


@pytest.mark.slow
@torch.no_grad()
def test_compiled_networks_take_packed_kernels():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1, bias=False)
    static = nn.Sequential(*convs, nn.BatchNorm2d(32), nn.ReLU())
    model = odconv.convert(static, include="1", init="published", warm_start=False).eval().to(torch.bfloat16)
    model, x = odconv.fuse(model), torch.randn(4, 3, 16, 16).to(torch.bfloat16)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=0.05, atol=0.05)
