"""Other people's dynamic layers: recognised, compared, accelerated and restored."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from odconv.conversion.acceleration import accelerate, is_accelerated, restore_forward


class FourGates(nn.Module):
    """An attention that gives what that of the copied ODConv files gives: four tensors with axes of one, or 1.0."""

    def __init__(self, channels, filters, size, groups, kernels):
        super().__init__()
        self.fc = nn.Conv2d(channels, 16, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.temperature = 3.0
        depthwise = groups == channels == filters
        widths = {
            "channel": channels,
            "filter": 0 if depthwise else filters,
            "spatial": size * size if size > 1 else 0,
            "kernel": kernels if kernels > 1 else 0,
        }
        self.heads = nn.ModuleDict({name: nn.Conv2d(16, width, 1) for name, width in widths.items() if width})
        self.shapes = {
            "channel": (-1, channels, 1, 1),
            "filter": (-1, filters, 1, 1),
            "spatial": (-1, 1, 1, 1, size, size),
            "kernel": (-1, kernels, 1, 1, 1, 1),
        }

    def forward(self, x):
        z = F.relu(self.bn(self.fc(F.adaptive_avg_pool2d(x, 1))))
        found = []
        for name, shape in self.shapes.items():
            if name not in self.heads:
                found.append(1.0)
                continue
            logits = self.heads[name](z).view(shape) / self.temperature
            found.append(logits.softmax(1) if name == "kernel" else logits.sigmoid())
        return tuple(found)


class CopiedODConv(nn.Module):
    """A layer with the attributes and the arithmetic of those files."""

    def __init__(self, channels, filters, size, stride=1, padding=0, dilation=1, groups=1, kernels=4):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.kernel_num = kernels
        self.attention = FourGates(channels, filters, size, groups, kernels)
        self.weight = nn.Parameter(torch.randn(kernels, filters, channels // groups, size, size))

    def forward(self, x):
        channel, filter, spatial, kernel = self.attention(x)
        batch, kernels = x.shape[0], (spatial * kernel * self.weight[None]).sum(1)
        kernels = kernels.expand(batch, *self.weight.shape[1:]).flatten(0, 1)
        y = F.conv2d(
            (x * channel).flatten(0, 1)[None], kernels, None, self.stride, self.padding, self.dilation,
            batch * self.groups,
        )  # fmt: skip
        return y.view(batch, -1, *y.shape[2:]) * filter


class CopiedDyConv(nn.Module):
    """The same for the other method: shares of shape (B, K), a bias of K rows or False."""

    def __init__(self, channels, filters, size, bias, padding=0):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = 1, padding, 1, 1
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, 4), nn.Softmax(1)
        )
        self.weight = nn.Parameter(torch.randn(4, filters, channels, size, size))
        self.bias = nn.Parameter(torch.randn(4, filters)) if bias else False

    def forward(self, x):
        shares = self.attention(x)
        outputs = []
        for image, share in zip(x, shares, strict=True):
            kernel = torch.einsum("k,k...->...", share, self.weight)
            bias = share @ self.bias if isinstance(self.bias, nn.Parameter) else None
            outputs.append(F.conv2d(image[None], kernel, bias, 1, self.padding))
        return torch.cat(outputs)


class Contextual(nn.Module):
    """A layer like EfficientAT's: a context vector chooses among k kernels, which lie flat."""

    def __init__(self, channels, filters, context, size, groups=1):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = channels, filters, size
        self.stride, self.padding, self.dilation, self.groups = 1, size // 2, 1, groups
        self.k, self.att_groups, self.temperature, self.bias = 4, 1, 2.0, None
        self.residuals = nn.Sequential(nn.Linear(context, 4))
        self.weight = nn.Parameter(torch.randn(1, 1, 4, filters * channels // groups * size * size))

    def forward(self, x, g=None):
        shares = F.softmax(self.residuals(g[0].flatten(1)) / self.temperature, dim=-1)
        kernels = (shares @ self.weight[0, 0]).view(-1, self.in_channels // self.groups, *(self.kernel_size,) * 2)
        y = F.conv2d(x.flatten(0, 1)[None], kernels, padding=self.padding, groups=self.groups * len(x))
        return y.view(len(x), self.out_channels, *y.shape[2:])


LAYERS = {
    "ODConv": lambda: CopiedODConv(6, 8, 3, stride=2, padding=1),
    "ODConv 1x": lambda: CopiedODConv(6, 8, 3, kernels=1, dilation=2),
    "ODConv point-wise": lambda: CopiedODConv(6, 8, 1),
    "ODConv 1x point-wise": lambda: CopiedODConv(6, 8, 1, kernels=1),
    "ODConv depth-wise": lambda: CopiedODConv(6, 6, 3, padding=1, groups=6),
    "ODConv groups": lambda: CopiedODConv(6, 8, 3, groups=2),
    "DyConv": lambda: CopiedDyConv(6, 8, 3, bias=True, padding=1),
    "DyConv without bias": lambda: CopiedDyConv(6, 8, 3, bias=False),
}


def other_forward(module, *inputs):
    """What a module computes on inputs before and after, with all gradients."""
    found = []
    for changed in (copy.deepcopy(module), module):
        y = changed(*inputs)
        tensors = [t for t in (*changed.parameters(), *inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
        found.append((y, torch.autograd.grad(y.square().sum(), tensors, allow_unused=True)))
        accelerate(module)
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("train", [False, True])
def test_copied_layers_compute_what_they_did_with_all_gradients(name, train):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().train(train)
    keys = [*layer.state_dict()]
    x = torch.randn(3, 6, 9, 10, dtype=torch.float64, requires_grad=True)
    (y, gradients), (again, others) = other_forward(layer, x)
    assert is_accelerated(layer)
    torch.testing.assert_close(again, y, rtol=1e-11, atol=1e-11)
    for one, other in zip(gradients, others, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert [*layer.state_dict()] == keys
    assert not layer.eval()(x[:1]).isnan().any()


@pytest.mark.parametrize("groups", [1, 6])
def test_a_context_vector_is_handed_on(groups):
    torch.manual_seed(0)
    layer = Contextual(6, 6, 5, 3, groups).double()
    x, g = torch.randn(3, 6, 7, 8, dtype=torch.float64), (torch.randn(3, 5, 1, 1, dtype=torch.float64), None, None)
    wanted = layer(x, g)
    assert str(accelerate(layer)).endswith("EfficientAT's DynamicConv")
    torch.testing.assert_close(layer(x, g=g), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("padding", ["", "same", 1])
@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False)])
@pytest.mark.parametrize("size", [(9, 10), (8, 8)])
def test_timms_condconv(padding, stride, bias, size):
    condconv = pytest.importorskip("timm.layers").CondConv2d
    torch.manual_seed(0)
    layer = condconv(6, 8, 3, stride=stride, padding=padding, bias=bias, num_experts=3).double()
    x, shares = torch.randn(2, 6, *size, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    wanted = layer(x, shares)
    accelerate(layer)
    assert is_accelerated(layer)
    torch.testing.assert_close(layer(x, shares), wanted, rtol=1e-12, atol=1e-12)


def test_a_network_of_timms_is_accelerated_and_restored():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        report = accelerate(model)
        assert len(report.layers) == 24
        assert str(report).startswith("24 of 24 dynamic layers accelerated")
        for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert sum(map(is_accelerated, changed.modules())) == 24
            torch.testing.assert_close(changed(x), wanted, rtol=1e-3, atol=1e-4)
        clone = copy.deepcopy(model)
        for parameter in clone.parameters():  # runs on its own parameters, not on those it was copied from
            parameter.mul_(0)
        assert clone(x).abs().max() == 0
        assert all("accelerated already" in layer.reason for layer in accelerate(model).layers)
        assert restore_forward(model) is model
        assert not any(map(is_accelerated, model.modules()))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


def test_accelerated_networks_compile_and_are_exported_with_any_batch():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(CopiedODConv(3, 8, 3, padding=1), nn.ReLU(), CopiedDyConv(8, 4, 3, bias=True)).eval()
    accelerate(model)
    x = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1)},)).module()
        for batch in (1, 2):
            torch.testing.assert_close(program(x[:batch]), wanted[:batch], rtol=1e-4, atol=1e-5)


class Noisy(CopiedODConv):
    """Looks like a known layer and computes something else."""

    def forward(self, x):
        return super().forward(x) + 1e-6


class Dropping(CopiedODConv):
    """Does something else while it trains."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Doubled(CopiedODConv):
    """Computes twice as much of kernels that begin as zeros."""

    def __init__(self, *args):
        super().__init__(*args)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return 2 * super().forward(x)


class Broken(CopiedODConv):
    """Fails on any input."""

    def forward(self, x):
        raise RuntimeError("not today")


def test_what_only_looks_like_a_known_layer_is_left_with_a_reason():
    own = CopiedODConv(6, 8, 3)
    own.forward = lambda x: x
    with torch.device("meta"):
        elsewhere = CopiedODConv(6, 8, 3)
    others = [Noisy(6, 8, 3), Dropping(6, 8, 3), Doubled(6, 8, 3)]
    model = nn.ModuleList([*others, Broken(6, 8, 3), own, elsewhere, nn.Conv2d(6, 8, 3), nn.Linear(3, 3)])
    state = torch.random.get_rng_state()
    reasons = [layer.reason for layer in accelerate(model).layers]
    assert torch.equal(state, torch.random.get_rng_state())
    assert reasons == [
        *["it computes something else"] * 3,
        "its own forward fails on a small input: not today",
        "its forward was replaced by something else",
        "it is on the meta device",
    ]
    assert not any(map(is_accelerated, model.modules()))


class SwappedGates(FourGates):
    """Gives its gates in another order, which shows only where they differ."""

    def forward(self, x):
        channel, filter, *others = super().forward(x)
        return filter, channel, *others


def test_gates_in_another_order_are_noticed_though_new_ones_are_alike():
    layer = CopiedODConv(6, 6, 3)
    own = layer.attention
    layer.attention = SwappedGates(6, 6, 3, 1, 4)
    layer.attention.load_state_dict(own.state_dict())
    for head in layer.attention.heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    forward = CopiedODConv.forward

    class Swapping(CopiedODConv):
        def forward(self, x):
            filter, channel, spatial, kernel = self.attention(x)
            gates = (channel, filter, spatial, kernel)
            return forward(Given(self, gates), x)

    layer.__class__ = Swapping
    assert accelerate(layer).layers[0].reason == "it computes something else"


class Given:
    """A layer as it is, with gates that are given."""

    def __init__(self, layer, gates):
        self.__dict__.update(vars(layer) | {"weight": layer.weight, "attention": lambda _: gates})


def test_masked_layers_are_left_and_hooks_do_not_fire():
    layer, fired = CopiedODConv(6, 8, 3), []
    layer.register_forward_hook(lambda *_: fired.append(1))
    assert accelerate(layer).layers[0].reason == ""
    assert not fired
    masked = CopiedODConv(6, 8, 3)
    prune.l1_unstructured(masked, "weight", amount=0.5)
    masked(torch.randn(2, 6, 9, 9))
    assert "it cannot be copied" in accelerate(masked).layers[0].reason


def test_layers_of_our_own_are_no_news():
    odconv = pytest.importorskip("odconv")
    assert accelerate(nn.Sequential(odconv.ODConv2d(4, 4, 3))).layers == []


# ---- KernelWarehouse's file


class CellShares(nn.Module):
    """Rows of signed shares of n cells and of none, one for each of m pieces of each sample's kernel."""

    def __init__(self, channels, pieces, cells):
        super().__init__()
        self.cells, self.temp_value = cells, 0.25
        self.fc1, self.norm1 = nn.Linear(channels, 16, bias=False), nn.BatchNorm1d(16)
        self.fc2 = nn.Linear(16, pieces * (cells + 1))
        self.temp_bias = torch.eye(pieces, cells + 1)

    def forward(self, x):
        z = self.fc2(self.norm1(self.fc1(x.flatten(2).mean(2))).relu()).reshape(-1, len(self.temp_bias), self.cells + 1)
        z = z / (z.abs().sum(2, keepdim=True) + 1e-3)
        shares = (1 - self.temp_value) * z + self.temp_value * self.temp_bias
        return shares.flatten(0, 1)[:, :-1]


class Manager(nn.Module):
    """Holds the cells of some layers."""

    def __init__(self, cells):
        super().__init__()
        self.weights = nn.ParameterList(cells)

    def take_cell(self, number):
        return self.weights[number]


class CopiedKW(nn.Module):
    """A layer that mixes the pieces of its kernels of a manager's cells, which it hides in a list."""

    def __init__(self, manager, number, channels, filters, size, groups=1, bias=True, **options):
        super().__init__()
        self.in_planes, self.out_planes, self.kernel_size, self.groups = channels, filters, [*size], groups
        for name, value in {"stride": 1, "padding": 0, "dilation": 1, **options}.items():
            setattr(self, name, [value] * len(size))
        self.bias = nn.Parameter(torch.randn(filters)) if bias else None
        self.warehouse_id, self.warehouse_manager = number, [manager]
        cell = manager.take_cell(number).shape
        pieces = filters * (channels // groups) * torch.Size(size).numel() // cell[1:].numel()
        self.attention = CellShares(channels, pieces, cell[0])

    def forward(self, x):
        cells = self.warehouse_manager[0].take_cell(self.warehouse_id)
        outer, inner, *window = cells.shape[1:]
        taps = torch.Size(self.kernel_size).numel() // torch.Size(window).numel()
        blocks = (taps, self.out_planes // outer, self.in_planes // self.groups // inner, outer, inner)
        pieces = (self.attention(x) @ cells.flatten(1)).reshape(len(x), *blocks, -1)
        kernels = pieces.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, self.in_planes // self.groups, *self.kernel_size)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(window) - 1]
        y = conv(
            x.flatten(0, 1)[None], kernels, None, self.stride, self.padding, self.dilation, len(x) * self.groups
        )  # fmt: skip
        y = y.reshape(len(x), -1, *y.shape[2:])
        return y if self.bias is None else y + self.bias.view(-1, *(1,) * len(window))


class CopiedKWNetwork(nn.Module):
    """Two layers that share cells and one with cells of its own, whose windows are whole kernels."""

    def __init__(self, layer=CopiedKW, dims=2):
        super().__init__()
        ones = (1,) * dims
        self.warehouse_manager = Manager([torch.randn(20, 4, 3, *ones), torch.randn(9, 2, 2, *(3,) * dims)])
        self.layers = nn.Sequential(
            layer(self.warehouse_manager, 0, 6, 8, (3,) * dims, padding=1),
            layer(self.warehouse_manager, 1, 8, 6, (3,) * dims, groups=2, stride=2, bias=False),
            layer(self.warehouse_manager, 0, 6, 4, ones),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("train", [False, True])
def test_layers_of_kernelwarehouse_compute_what_they_did_with_all_gradients(dims, train):
    torch.manual_seed(0)
    model = CopiedKWNetwork(dims=dims).double().train(train)
    keys = [*model.state_dict()]
    x = torch.randn(3, 6, *(9, 8, 7)[:dims], dtype=torch.float64, requires_grad=True)
    (y, gradients), (again, others) = other_forward(model, x)
    report = accelerate(model)
    assert [(row.kind, row.reason) for row in report.layers] == [("KernelWarehouse's layer", "accelerated already")] * 3
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients, others, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert [*model.state_dict()] == keys
    clone = copy.deepcopy(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(clone(x), model.eval()(x), rtol=1e-12, atol=1e-12)
        clone.warehouse_manager.weights[0].zero_()  # its own cells, not those it was copied from
        assert clone(x).std() < model(x).std()
        assert torch.equal(restore_forward(model)(x), CopiedKWNetwork.forward(model, x))
    assert not any(map(is_accelerated, model.modules()))


class Transposing(CopiedKW):
    """Has its pieces in another order."""

    def forward(self, x):
        cells, own = self.warehouse_manager[0].take_cell(self.warehouse_id), self.warehouse_manager[0]
        self.warehouse_manager = [Manager([cells.flip(1)] * 2)]
        y = super().forward(x)
        self.warehouse_manager = [own]
        return y


def test_what_only_looks_like_kernelwarehouse_is_left():
    torch.manual_seed(0)
    model = CopiedKWNetwork(Transposing)
    x = torch.randn(2, 6, 9, 8)
    wanted = model.eval()(x)
    assert [row.reason for row in accelerate(model).layers] == ["it computes something else"] * 3
    assert torch.equal(model(x), wanted)
    assert all(layer.warehouse_manager[0] is model.warehouse_manager for layer in model.layers)


def test_accelerated_kernelwarehouse_is_exported_with_any_batch():
    torch.manual_seed(0)
    model = CopiedKWNetwork().eval()
    accelerate(model)
    x = torch.randn(3, 6, 9, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1)},)).module()
        for batch in (1, 3):
            torch.testing.assert_close(program(x[:batch]), model(x[:batch]), rtol=1e-4, atol=1e-5)
