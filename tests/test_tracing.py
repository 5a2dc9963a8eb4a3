"""Layers and networks traced by torch.jit.trace, PyTorch's older ONNX exporter and torch.fx, as other programs do."""

import io
import itertools
import logging

import pytest
import tiny
import torch
from parameters import slow_except
from torch import fx, nn

import odconv
from odconv.functional import dynamic_conv, dynamic_conv_transpose

ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracer, and of an exporter that will go

LAYERS = {
    "ODConv2d": lambda: odconv.ODConv2d(8, 8, 3, padding=1),
    "ODConv2d 1x": lambda: odconv.ODConv2d(8, 8, 3, padding=1, kernel_num=1),
    "ODConv2d point-wise": lambda: odconv.ODConv2d(8, 8, 1),
    "ODConv2d depth-wise": lambda: odconv.ODConv2d(8, 8, 3, padding=1, groups=8),
    "ODConv2d 1x depth-wise": lambda: odconv.ODConv2d(8, 8, 3, padding=1, groups=8, kernel_num=1),
    "ODConv2d groups": lambda: odconv.ODConv2d(8, 8, 3, groups=2, dilation=2, norm="layer", gain=2),
    "ODConv2d stride": lambda: odconv.ODConv2d(8, 8, 3, stride=2, bias=True),
    "ODConv2d 1x stride": lambda: odconv.ODConv2d(8, 8, 1, stride=2, kernel_num=1, attentions=("filter",)),
    "ODConv2d same": lambda: odconv.ODConv2d(8, 8, 4, padding="same", attentions=("kernel", "channel")),
    "ODConv2d reflect": lambda: odconv.ODConv2d(8, 8, 3, padding=1, padding_mode="reflect", norm="none"),
    "DyConv2d": lambda: odconv.DyConv2d(8, 8, 3, padding=1, bias=True),
    "CondConv2d": lambda: odconv.CondConv2d(8, 8, 3, padding=1, bias=True),
    "CondConv2d 1x": lambda: odconv.CondConv2d(8, 8, 3, kernel_num=1),
    "ODConvTranspose2d": lambda: odconv.ODConvTranspose2d(8, 8, 3, padding=1, stride=2),
    "DyConvTranspose2d groups": lambda: odconv.DyConvTranspose2d(8, 8, 3, stride=2, output_padding=1, groups=2),
    "CondConvTranspose2d": lambda: odconv.CondConvTranspose2d(8, 8, 3, bias=True, kernel_num=1),
}
OTHERS = {
    "ODConv1d": (lambda: odconv.ODConv1d(8, 8, 3, padding=1), (8, 16)),
    "DyConv1d depth-wise": (lambda: odconv.DyConv1d(8, 8, 3, groups=8, padding="same"), (8, 16)),
    "ODConvTranspose1d": (lambda: odconv.ODConvTranspose1d(8, 8, 3, stride=2), (8, 16)),
    "ODConv3d": (lambda: odconv.ODConv3d(8, 8, 3, padding=1), (8, 5, 6, 7)),
    "ODConvTranspose3d": (lambda: odconv.ODConvTranspose3d(8, 8, 2, stride=2), (8, 3, 4, 5)),
}


def session(model, traced, sizes=False):
    """The network as an ONNX file of the older exporter, for any batch, and any size of the map if asked."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file = io.BytesIO()
    axes = {0: "batch"} | ({2: "height", 3: "width"} if sizes else {})
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": axes, "y": {0: "batch"}}}
    torch.onnx.export(model, (traced,), file, dynamo=False, opset_version=17, **names)
    return ort.InferenceSession(file.getvalue())


def assert_same(found, model, x):
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(found), model(x), rtol=1e-4, atol=1e-4)


def assert_exports(model, shape):
    for traced in (1, 3):
        run = session(model, torch.randn(traced, *shape))
        for batch in (1, 2, 5):
            x = torch.randn(batch, *shape)
            assert_same(run.run(None, {"x": x.numpy()})[0], model, x)


@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_every_layer_traced_at_one_batch_serves_all(name):
    torch.manual_seed(0)
    make, shape = OTHERS.get(name) or (LAYERS[name], (8, 9, 9))
    layer = make().eval()
    assert_exports(layer, shape)
    for traced in (1, 3):
        script = torch.jit.trace(layer, torch.randn(traced, *shape))
        for batch in (1, 2, 5):
            x = torch.randn(batch, *shape)
            assert_same(script(x), layer, x)


@pytest.mark.parametrize("first", slow_except(LAYERS, "ODConv2d", "CondConv2d", "ODConvTranspose2d"))
def test_pairs_of_layers_serve_all_batches(first):
    # what a layer gives must not look, to the next one, as if its batch were fixed
    torch.manual_seed(0)
    for second in ("ODConv2d", "DyConv2d", "ODConvTranspose2d"):
        assert_exports(nn.Sequential(LAYERS[first](), LAYERS[second]()).eval(), (8, 9, 9))


@pytest.mark.slow
def test_all_pairs_of_layers_serve_all_batches():
    for first, second in itertools.product(LAYERS, LAYERS):
        assert_exports(nn.Sequential(LAYERS[first](), LAYERS[second]()).eval(), (8, 15, 15))


@pytest.mark.parametrize("name", slow_except([tiny.DYNAMIC, "od_mobilenetv2_050", "dy_resnet18"], tiny.DYNAMIC))
def test_networks_serve_all_batches_and_sizes(name):
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=10).eval()
    run = session(model, torch.randn(1, 3, 64, 64), sizes=True)
    for shape in ((2, 3, 64, 64), (5, 3, 96, 64), (1, 3, 32, 32)):
        x = torch.randn(shape)
        assert_same(run.run(None, {"x": x.numpy()})[0], model, x)


@pytest.mark.parametrize("operator", [dynamic_conv, dynamic_conv_transpose])
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (1, 2), (3, 1), (3, 4)])
@pytest.mark.parametrize(
    "gates", ["kernel", "kernel spatial", "kernel channel filter", "kernel spatial channel filter"]
)
def test_the_traced_form_is_the_reference_with_its_gradients(operator, n, groups, gates):
    torch.manual_seed(0)
    shapes = {"kernel": (2, n), "spatial": (2, 3, 2), "channel": (2, 4), "filter": (2, 8)}
    given = {name: torch.rand(shapes[name], dtype=torch.float64, requires_grad=True) for name in gates.split()}
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    shape = (n, 8, 4 // groups, 3, 2) if operator is dynamic_conv else (n, 4, 8 // groups, 3, 2)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    geometry = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": groups}
    tensors = [x, weight, *given.values()]
    found, wanted = (operator(x, weight, **given, **geometry, backend=form) for form in ("traced", "reference"))
    torch.testing.assert_close(found, wanted)
    up = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, tensors, up) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ODConv2d", "ODConv2d groups", "DyConv2d", "CondConv2d", "ODConvTranspose2d"])
def test_half_precision_is_traced(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval().to(dtype)
    script = torch.jit.trace(layer, torch.randn(3, 8, 9, 9, dtype=dtype))
    x = torch.randn(2, 8, 9, 9, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(script(x), layer(x), rtol=0.02, atol=0.02)
    if dtype == torch.float16:
        run = session(layer, torch.randn(1, 8, 9, 9, dtype=dtype))
        torch.testing.assert_close(
            torch.as_tensor(run.run(None, {"x": x.numpy()})[0]), layer(x).detach(), rtol=0.02, atol=0.02
        )


class Around(nn.Module):
    """A network with a layer of each kind, and a branch."""

    def __init__(self):
        super().__init__()
        self.first = odconv.ODConv2d(3, 8, 3, padding=1)
        self.up = odconv.DyConvTranspose2d(8, 8, 2, stride=2)
        self.last = odconv.CondConv2d(8, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.up(x, output_size=[12, 12]) + self.up(x))


def test_torch_fx_sees_a_layer_as_one_node():
    model = Around().eval()
    graph = fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["first", "up", "up", "last"]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(graph(x), model(x))
    with pytest.raises(TypeError, match=r"torch\.fx has nothing to trace in a lone ODConv2d"):
        fx.symbolic_trace(model.first)


def test_hooks_and_contexts_are_those_of_the_node():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = odconv.ODConv2d(3, 8, 3, context_channels=2)
            self.register_buffer("picture", torch.randn(2, 3, 6, 6))

        def forward(self, context):
            return self.layer(self.picture, context)

    model = Inside().eval()
    model.layer.register_forward_hook(lambda module, args, y: 2 * y)
    graph = fx.symbolic_trace(model)
    context = torch.randn(2, 2)
    torch.testing.assert_close(graph(context), model(context))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "get_attr", "call_module", "output"]


def test_features_come_out_of_dynamic_networks():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = odconv.create_model("od_resnet18", num_classes=10).eval()
    extract = feature_extraction.create_feature_extractor(model, ["layer2.0.conv1", "layer4"])
    x = torch.randn(2, 3, 64, 64)
    found = extract(x)
    assert {name: tuple(y.shape) for name, y in found.items()} == {
        "layer2.0.conv1": (2, 128, 8, 8), "layer4": (2, 512, 2, 2)
    }  # fmt: skip
    kept = []
    model.layer4.register_forward_hook(lambda *args: kept.append(args[-1]))
    model(x)
    torch.testing.assert_close(found["layer4"], kept[0])


def test_quantisation_of_a_graph_leaves_dynamic_layers_as_they_are():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    model = nn.Sequential(nn.Conv2d(3, 8, 3), odconv.ODConv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 12, 12)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    converted = quantize_fx.convert_fx(prepared)
    assert sum(isinstance(module, odconv.ODConv2d) for module in converted.modules()) == 1
    y = converted(x)
    assert (y - model(x)).norm() < 0.1 * model(x).norm()


def test_scripting_says_what_to_do_instead():
    for model in (odconv.ODConv2d(4, 4, 3), nn.Sequential(odconv.DyConvTranspose1d(4, 4, 3))):
        with pytest.raises(TypeError, match=r"cannot be scripted.*torch\.jit\.trace"):
            torch.jit.script(model)
