"""Conversion: what is chosen, what a layer keeps, the exact warm start and that it learns, and what is refused."""

import copy
import gc
import io
import itertools
import pickle

import pytest
import torch
from parameters import slow_except
from torch import nn
from torch.export import Dim, export
from torch.nn.utils import parametrizations, prune

import odconv
from odconv.layers import DynamicConv

METHODS = ("odconv", "condconv", "dyconv")
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding="same", groups=2)
        self.downsample = nn.Sequential(nn.Conv2d(4, 6, 1, 2))

    def forward(self, x):
        return self.conv2(self.bn(self.conv1(x)).relu()) + self.downsample(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.up = nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, x):
        return self.up(self.block(self.stem(x)))


def dynamic(model):
    return [name for name, module in model.named_modules() if isinstance(module, DynamicConv)]


def image(*shape, **options):
    return torch.randn(*(shape or (4, 3, 8, 8)), **options)


# --- what is chosen


def test_by_default_stem_and_shortcuts_stay():
    model = Network()
    assert odconv.convert(model) is model
    assert dynamic(model) == ["block.conv1", "block.conv2", "up"]
    assert isinstance(model.up, odconv.ODConvTranspose2d)
    model(image()).sum().backward()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"include": "*"}, ["stem", "block.conv1", "block.conv2", "block.downsample.0", "up"]),
        ({"include": "block.*"}, ["block.conv1", "block.conv2", "block.downsample.0"]),
        ({"include": ["stem", "*.conv2"]}, ["stem", "block.conv2"]),
        ({"exclude": "block.*"}, ["up"]),
        ({"include": "block.*", "exclude": lambda name, conv: name.endswith(".0")}, ["block.conv1", "block.conv2"]),
        ({"include": lambda name, conv: conv.groups > 1}, ["block.conv2"]),
        ({"to": odconv.DyConv2d}, ["block.conv1", "block.conv2"]),
        ({"to": odconv.CondConvTranspose2d}, ["up"]),
    ],
)  # fmt: skip
def test_globs_functions_and_classes_choose(choice, expected):
    model = odconv.convert(Network(), **choice)
    assert dynamic(model) == expected
    if not isinstance(to := choice.get("to", "odconv"), str):
        assert {type(model.get_submodule(name)) for name in expected} == {to}


def test_a_model_that_is_a_convolution_is_replaced():
    layer = odconv.convert(nn.Conv1d(4, 6, 3), kernel_num=2)
    assert isinstance(layer, odconv.ODConv1d)
    assert odconv.convert(layer) is layer


@pytest.mark.parametrize("to", METHODS)
def test_converting_twice_changes_nothing(to):
    model = odconv.convert(Network(), to)
    before = list(model.modules())
    for again in ({}, {"include": "block.conv1"}, {"exclude": "up"}):
        assert list(odconv.convert(model, **again).modules()) == before
    everything = odconv.convert(Network(), include="*")
    before = list(everything.modules())
    assert list(odconv.convert(everything, include="*", kernel_num=2).modules()) == before


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class OwnStep(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class OnlyAConstructor(nn.Conv2d):
    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)


def patched():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.forward = conv.forward
    return conv


def with_buffer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.register_buffer("mask", torch.ones(4))
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Standardised(4, 4, 3, padding=1), "Standardised has a forward of its own"),
        (lambda: OwnStep(4, 4, 3, padding=1), "OwnStep has a forward of its own"),
        (patched, "Conv2d has a forward of its own"),
        (lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), "its weight is computed: weight norm"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), "its weight is computed"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), "its weight is computed"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), "its weight is computed"),
        (lambda: prune.random_unstructured(nn.Conv2d(4, 4, 3, padding=1), "weight", 0.5), "its weight is computed"),
        (with_buffer, "it holds more than a weight and a bias"),
        (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "its weight is a Parameter of torch.complex64"),
        (lambda: nn.Conv1d(4, 4, 3), "ODConv2d does not replace a Conv1d"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Complex modules")
def test_what_cannot_be_replaced_is_left_with_the_reason(make, reason):
    model = nn.ModuleList([make(), nn.Conv2d(4, 4, 3, padding=1)])
    left = model[0]
    to = odconv.ODConv2d if "does not replace" in reason else "odconv"
    report = odconv.conversion_report(model, to, include="*")
    assert reason in report.rows[0].reason
    odconv.convert(model, to, include="*")
    assert model[0] is left
    assert dynamic(model) == ["1"]


def test_tied_weights_are_left_tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    report = odconv.conversion_report(model, include="*")
    assert [row.reason for row in report.rows] == ["its weight or bias belongs to another layer too"] * 2 + [""]
    odconv.convert(model, include="*")
    assert model[1].weight is model[0].weight


def test_subclasses_that_only_build_differently_are_replaced():
    assert isinstance(odconv.convert(OnlyAConstructor(4)), odconv.ODConv2d)


# --- what a layer keeps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", METHODS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_converted_layer_computes_what_it_did(kind, to, n):
    torch.manual_seed(0)
    dims, transposed = int(kind.__name__[-2]), "Transpose" in kind.__name__
    extra = {"output_padding": 1} if transposed else {"padding_mode": "reflect"}
    conv = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, dtype=torch.float64, **extra).eval()
    x = image(3, 4, *(7,) * dims, dtype=torch.float64)
    layer = odconv.convert(conv, to, kernel_num=n)
    assert (layer.dims, layer.transposed, layer.training, layer.weight.dtype) == (dims, transposed, False, x.dtype)
    for training in (False, True):
        torch.testing.assert_close(layer.train(training)(x), conv(x), rtol=1e-12, atol=1e-12)
    assert layer.weight.shape[0] == n
    assert n == 1 or (layer.weight[0] - layer.weight[1]).abs().max() > 1e-3  # kernels that are alike would stay alike


@pytest.mark.parametrize("options", [
    {"padding": "same"}, {"padding": "valid"}, {"padding": "same", "padding_mode": "circular"}, {"bias": False},
    {"padding": (2, 1), "stride": (1, 2)},
])  # fmt: skip
def test_padding_by_name_and_layers_without_bias(options):
    conv = nn.Conv2d(4, 6, (3, 2), **options).double()
    x = image(2, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(odconv.convert(conv)(x), conv(x), rtol=1e-12, atol=1e-12)


def test_one_convolution_in_several_places_becomes_one_layer():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Conv2d(3, 3, 1)})
    assert [row.name for row in odconv.conversion_report(model, include="b.0").rows if row.becomes] == ["a"]
    odconv.convert(model, include="b.0")
    assert isinstance(model["a"], odconv.ODConv2d)
    assert model["a"] is model["b"][0]
    assert type(model["c"]) is nn.Conv2d


def test_frozen_parameters_stay_frozen_and_attributes_stay():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight.requires_grad_(False)
    conv.index = 7
    layer = odconv.convert(copy.deepcopy(conv))
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.attention.fc.weight.requires_grad
    assert layer.index == 7
    mixed = odconv.convert(copy.deepcopy(conv).requires_grad_(False), "dyconv")
    assert not mixed.kernel_bias.requires_grad


def test_hooks_move_and_their_handles_still_remove_them():
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    conv = model[1]
    note = lambda name: lambda module, *_, **__: calls.append((name, module))  # noqa: E731
    handles = [
        conv.register_forward_pre_hook(note("forward_pre")),
        conv.register_forward_hook(note("forward"), with_kwargs=True),
        conv.register_full_backward_hook(note("backward")),
        conv.register_full_backward_pre_hook(note("backward_pre")),
        conv.register_state_dict_pre_hook(note("state_dict_pre")),
        conv.register_state_dict_post_hook(note("state_dict")),
        conv.register_load_state_dict_pre_hook(note("load_pre")),
        conv.register_load_state_dict_post_hook(note("load")),
    ]
    odconv.convert(model)
    del conv
    gc.collect()
    model(image()).sum().backward()
    model.load_state_dict(model.state_dict())
    expected = [
        "forward_pre",
        "forward",
        "backward_pre",
        "backward",
        "state_dict_pre",
        "state_dict",
        "load_pre",
        "load",
    ]
    assert calls == [(name, model[1]) for name in expected]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(image()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_the_meta_device(dtype):
    model = Network().to(dtype).eval()
    expected = model(image(dtype=dtype))
    converted = odconv.convert(copy.deepcopy(model), kernel_num=3)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    meta = odconv.convert(Network().to("meta"), kernel_num=3)
    assert all(p.is_meta for p in meta.parameters())
    torch.manual_seed(0)
    x = image(dtype=dtype)
    expected, y = model(x).float(), converted(x).float()
    assert (y - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps


# --- the warm start


@pytest.mark.parametrize("to", METHODS)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("training", [False, True])
def test_a_converted_network_computes_what_it_did(to, n, training):
    torch.manual_seed(0)
    model = Network().double().train(training)
    converted = odconv.convert(copy.deepcopy(model), to, include="*", kernel_num=n)
    for exact, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x = image(dtype=exact)
        expected = model.to(exact)(x)
        error = (converted.to(exact)(x) - expected).norm() / expected.norm()
        assert error <= tolerance


@pytest.mark.parametrize("options", [
    {"gain": 1.0}, {"gain": 3.0, "kernel_num": 1}, {"temperature": 30.0}, {"attentions": ("filter", "kernel")},
    {"norm": "none", "reduction": 0.5},
])  # fmt: skip
def test_the_warm_start_is_exact_with_any_option(options):
    conv = nn.Conv2d(4, 6, 3).double()
    x = image(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(odconv.convert(conv, **options)(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("to", "options", "expected"), [
    ("odconv", {}, (2.0, 2.0, 5.0, "batch")),
    (odconv.ODConv2d, {"norm": "layer"}, (2.0, 2.0, 5.0, "layer")),
    ("odconv", {"temperature": 1.0, "kernel_gain": 1.0}, (2.0, 1.0, 1.0, "batch")),
    ("odconv", {"init": "published"}, (2.0, 1.0, 1.0, "batch")),
    ("odconv", {"attentions": ["kernel"]}, (1.0, 2.0, 1.0, "batch")),
    ("dyconv", {}, (1.0, 2.0, 1.0, "none")),
    ("condconv", {}, (1.0, 1.0, None, "layer")),
    (odconv.CondConv2d, {}, (1.0, 1.0, None, "layer")),
    (odconv.CondConv2d, {"norm": "none"}, (1.0, 1.0, None, "none")),
    ("condconv", {"init": "published"}, (1.0, 1.0, None, "none")),
    ("odconv", {"attentions": {"kernel"}}, (1.0, 2.0, 1.0, "batch")),
    ("odconv", {"attentions": iter(["kernel"])}, (1.0, 2.0, 1.0, "batch")),
])  # fmt: skip
def test_what_a_warm_start_chooses(to, options, expected):
    layer = odconv.convert(nn.Conv2d(4, 6, 3), to, kernel_num=4, **options)
    attention = layer.attention
    temperature = None if attention.temperature is None else attention.temperature.item()
    assert (attention.gain, attention.kernel_gain, temperature, attention.norm) == expected


@pytest.mark.parametrize("to", METHODS)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_reach_every_new_parameter_within_a_few_steps(to, n, zero):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    if zero:  # as the last layer of a residual branch often starts
        nn.init.zeros_(conv.weight)
    layer = odconv.convert(conv, to, kernel_num=n)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = image(8, 4, 6, 6), image(8, 6, 4, 4)
    reached = set()
    for _ in range(4):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        reached |= {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    missing = {name for name, _ in layer.named_parameters()} - reached
    assert missing == ({name for name in missing if "attention" in name} if (to, n) == ("dyconv", 1) else set())


def effective_kernel(layer, x):
    """The kernel that a layer applies, on average over the samples."""
    kernel, spatial, channel, filter = layer.attention(x)
    mixed = layer.weight if kernel is None else torch.einsum("bn,nockl->bockl", kernel, layer.weight)
    for gate, axes in ((filter, (2, 3, 4)), (channel, (1, 3, 4)), (spatial, (1, 2))):
        if gate is not None:
            mixed = mixed * gate[(slice(None), *(None if axis in axes else slice(None) for axis in range(1, 5)))]
    return mixed.mean(0)


@pytest.mark.parametrize(("to", "n"), [(to, n) for to in METHODS for n in (1, 2, 4, 8) if (to, n) != ("condconv", 1)])
def test_the_effective_kernel_moves_at_least_half_an_nth_as_far_as_the_static_one(to, n):
    torch.manual_seed(0)
    static = nn.Conv2d(8, 8, 3)
    layer = odconv.convert(copy.deepcopy(static), to, kernel_num=n)
    start, x, teacher = static.weight.detach().clone(), image(16, 8, 8, 8), nn.Conv2d(8, 8, 3)
    torch.testing.assert_close(effective_kernel(layer, x), start, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        target = teacher(x)
    for model in (static, layer):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    moved = (effective_kernel(layer, x) - start).norm() / (static.weight - start).norm()
    assert moved >= 1 / (2 * n)


@pytest.mark.parametrize(
    ("n", "options", "share"),
    [(2, {}, 1 / 2), (4, {}, 1 / 2), (8, {}, 1 / 4), (16, {}, 1 / 8), (8, {"init": "published"}, 1 / 2)],
)
def test_the_sigmoids_of_a_warm_router_sum_to_two_at_most(n, options, share):
    layer = odconv.convert(nn.Conv2d(8, 8, 3), "condconv", kernel_num=n, **options)
    shares = layer.attention(image(3, 8, 5, 5)).kernel.detach()
    torch.testing.assert_close(shares, torch.full((3, n), share).to(shares.dtype))


def test_the_logits_of_a_warm_router_move_as_slowly_as_at_the_temperature_of_gates():
    x = image(3, 64, 5, 5)
    slow, full = (odconv.convert(nn.Conv2d(64, 8, 3), "condconv", warm_start=warm) for warm in (True, False))
    temperature = odconv.convert(nn.Conv2d(64, 8, 3), "odconv").attention.temperature
    paces = []  # what a step of SGD on the router moves its logits by
    for layer in (slow, full):
        read = []
        layer.attention.kernel_fc.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        layer(x)
        paces.append(read[0].detach().square().sum(1).mean().item())
    assert paces[1] / paces[0] == pytest.approx(temperature.item() ** 2, rel=1e-4)


def test_a_cold_start_takes_the_settled_options_unless_others_are_chosen():
    settled = odconv.convert(nn.Conv2d(8, 8, 3), warm_start=False).attention
    assert (settled.norm, settled.gain, settled.kernel_gain) == ("layer", 2, 2)
    assert settled.channel_fc.weight.abs().max() > 0
    mixed = odconv.convert(nn.Conv2d(8, 8, 3), warm_start=False, norm="batch", kernel_num=9).attention
    assert (mixed.norm, mixed.gain, mixed.kernel_gain) == ("batch", 2, 3)
    assert odconv.convert(nn.Conv2d(8, 8, 3), "dyconv", warm_start=False).attention.kernel_gain == 2
    for layer in (
        odconv.convert(nn.Conv2d(8, 8, 3), warm_start=False, init="published"),
        odconv.convert(nn.Conv2d(8, 8, 3), odconv.ODConv2d, warm_start=False),  # the layer's own defaults
    ):
        assert (layer.attention.norm, layer.attention.gain, layer.attention.kernel_gain) == ("batch", 1, 1)
        assert "gain" not in repr(layer)
        assert "attention.factors" not in layer.state_dict()


def test_the_gain_survives_copies_and_travels_with_the_state_dict():
    torch.manual_seed(0)
    model = odconv.convert(Network().eval(), kernel_num=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # trained
    x = image()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = odconv.convert(Network().eval(), kernel_num=2)
    cold = odconv.convert(Network().eval(), kernel_num=2, warm_start=False, init="published")
    for loaded in (again, cold):
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again, cold):
        torch.testing.assert_close(same(x), expected, rtol=0, atol=0)
        assert "gain=2.0" in repr(same)
    plain = dict(model.state_dict())  # without metadata
    rebuilt = odconv.convert(Network().eval(), kernel_num=2)
    rebuilt.load_state_dict(plain)
    torch.testing.assert_close(rebuilt(x), expected, rtol=0, atol=0)
    published = odconv.ODConv2d(4, 6, 3)
    published.load_state_dict(odconv.ODConv2d(4, 6, 3, gain=2).state_dict())
    assert published.attention.gain == 2


def predictions(model, images):
    from odconv.app.data import normalise

    with torch.inference_mode():
        return torch.cat([model(normalise(batch)).argmax(1) for batch, _ in torch.utils.data.DataLoader(images, 50)])


@pytest.fixture(scope="module")
def real(shared_data):
    """MobileNetV2 with ImageNet weights, the 1,000 images, and its predictions."""
    pytest.importorskip("torchvision")
    from odconv.app.data import open_data

    weights = shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"
    model = odconv.create_model("mobilenetv2_100", weights=weights).eval()
    images = open_data(str(shared_data / "imagenet-sample"), image_size=224, need_train=False).val
    return model, images, predictions(model, images)


@pytest.mark.slow
@pytest.mark.parametrize("to", METHODS)
@pytest.mark.parametrize("n", [1, 4])
def test_real_weights_keep_every_prediction(to, n, real):
    model, images, expected = real
    after = predictions(odconv.convert(copy.deepcopy(model), to, kernel_num=n), images)
    assert torch.equal(after, expected)
    assert (after == torch.tensor(images.labels)).sum() == 785


# --- the report


def test_the_report_says_what_convert_does_and_leaves_the_model():
    model = Network()
    before = list(model.modules())
    report = odconv.conversion_report(model, kernel_num=2, input_size=(3, 8, 8))
    assert list(model.modules()) == before
    assert [(row.name, row.becomes or row.reason) for row in report.rows] == [
        ("stem", "the stem"),
        ("block.conv1", "ODConv2d"),
        ("block.conv2", "ODConv2d"),
        ("block.downsample.0", "a shortcut"),
        ("up", "ODConvTranspose2d"),
    ]
    profiles = odconv.profile(model, (3, 8, 8)), odconv.profile(odconv.convert(model, kernel_num=2), (3, 8, 8))
    assert report.parameters == tuple(profile.parameters for profile in profiles)
    assert report.madds == tuple(profile.madds for profile in profiles)
    assert "left: the stem" in str(report)
    assert "3 replaced, 2 left" in str(report)
    nothing = odconv.conversion_report(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert nothing.parameters[0] == nothing.parameters[1]
    assert nothing.madds is None


# --- what is refused


def quantised():
    from torch.ao.nn import quantized

    return nn.Sequential(nn.Conv2d(3, 3, 3), quantized.Conv2d(3, 3, 3))


def fails(name, conv):
    raise RuntimeError("my own")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, ValueError, "the Sequential has no convolution"),
        (Network, {"include": "blok.*"}, ValueError, r"include: .* matches 'blok.\*'; did you mean block.conv"),
        (Network, {"exclude": ["stem", "head"]}, ValueError, "exclude: no convolution has a name that matches 'head'"),
        (Network, {"include": 3}, TypeError, "include must be a glob, several of them or a function, got 3"),
        (Network, {"include": fails}, RuntimeError, "my own"),
        (Network, {"kernels": 4}, TypeError, r"'kernels' is no option of ODConv; did you mean kernel_num\?"),
        (Network, {"to": "condconv", "reduction": 0.5}, TypeError, "'reduction' is no option of CondConv; it has"),
        (Network, {"to": "fdconv"}, ValueError, r"to must be one of \['condconv', 'dyconv', 'kernelw"),
        (Network, {"to": nn.Conv2d}, ValueError, "to must be one of"),
        (Network, {"to": ["odconv"]}, ValueError, "to must be one of"),
        (lambda: Standardised(3, 3, 3), {}, ValueError, "is replaced; it: Standardised has a forward of its own"),
        (Network, {"kernel_num": 0}, ValueError, "kernel_num must be an int of at least 1, got 0"),
        (Network, {"include": "up", "gain": -1}, ValueError, "gain must be a positive number, got -1"),
        (Network, {"to": odconv.ODConv1d}, ValueError, "is replaced; stem: the stem; block.conv1: ODConv1d does not"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), {}, ValueError, "of the Sequential is replaced; 0: the stem"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.LazyConv2d(3, 3)), {}, ValueError, "1 is a LazyConv2d not init"),
        (quantised, {}, ValueError, "1 is quantised"),
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))), {}, ValueError, "the model is scripted"),
        (lambda: "resnet18", {}, TypeError, "model must be a torch.nn.Module, got str"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:Lazy modules", "ignore:torch.quantize")
def test_what_is_refused_leaves_the_network(model, options, error, message):
    network = model()
    modules = list(network.named_modules()) if isinstance(network, nn.Module) else []
    before = [list(module._parameters.items()) for _, module in modules]
    with pytest.raises(error, match=message):
        odconv.convert(network, **options)
    if modules:
        assert list(network.named_modules()) == modules
        assert [list(module._parameters.items()) for _, module in modules] == before


def test_a_network_wrapped_for_distributed_training_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Network())
        with pytest.raises(ValueError, match="the model is wrapped for distributed training"):
            odconv.convert(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert not dynamic(wrapped)


@pytest.mark.parametrize("to", slow_except(METHODS, "odconv"))
def test_a_converted_network_compiles_and_exports_with_a_dynamic_batch(to):
    torch._dynamo.reset()
    model = odconv.convert(Network().eval(), to, kernel_num=2)
    x = image()
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    for batch in (1, 7):
        x = image(batch, 3, 8, 8)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


# --- the context


@pytest.mark.parametrize(("to", "dims"), list(itertools.product(METHODS, (1, 2, 3))))
@pytest.mark.parametrize("transposed", [False, True])
def test_the_attention_looks_at_the_context(to, dims, transposed):
    torch.manual_seed(0)
    names = {"odconv": "ODConv", "condconv": "CondConv", "dyconv": "DyConv"}
    kind = getattr(odconv, f"{names[to]}{'Transpose' if transposed else ''}{dims}d")
    layer = kind(4, 6, 3, kernel_num=2, context_channels=5).double().eval()
    x, vector = image(3, 4, *(5,) * dims).double(), image(3, 5).double()
    y = layer(x, context=vector)
    torch.testing.assert_close(layer(x, context=vector[:, :, None, None].expand(3, 5, 7, 2)), y)  # any map, pooled
    assert not torch.allclose(layer(x, context=vector + 1), y)
    attentions = layer.attention(vector[..., None])
    assert all(torch.equal(a, b) for a, b in zip(attentions, layer._attend(x, vector), strict=True) if a is not None)
    own = kind(4, 6, 3).double().eval()
    torch.testing.assert_close(own(x, context=x), own(x))


def test_a_context_that_does_not_fit_is_named():
    layer = odconv.ODConv2d(4, 6, 3, context_channels=5)
    x = image(3, 4, 6, 6)
    with pytest.raises(ValueError, match="context must be given to a layer of context_channels 5"):
        layer(x)
    for shape in ((3, 4), (2, 5), (5,), (3, 4, 6, 6)):
        with pytest.raises(ValueError, match=r"context must have shape .* with B = 3 and C = 5, got \("):
            layer(x, torch.zeros(shape))
    with pytest.raises(ValueError, match="context_channels must be an int of at least 1, got 0"):
        odconv.CondConv2d(4, 6, 3, context_channels=0)
    assert "context_channels=5" in repr(layer)
