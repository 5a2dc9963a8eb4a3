"""Networks in the engines of devices: static copies in all of them, dynamic ones where the engine mixes kernels.

`make engines` makes an environment that has them.
"""

import os

import numpy
import pytest
import torch
from torch import Tensor, nn

import odconv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Network(nn.Module):
    """Layers in a row under names, since pnnx writes `self.0` for those of nn.Sequential."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """A dynamic network of all methods, grouped and depth-wise layers too, and its static copy."""
    torch.manual_seed(0)
    dynamic = Network(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        odconv.ODConv2d(16, 32, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        odconv.ODConv2d(32, 32, 3, padding=1, groups=32, gain=2.0, kernel_gain="sqrt"),
        odconv.DyConv2d(32, 16, 3, stride=2, padding=1, bias=True),
        nn.ReLU(),
        odconv.CondConv2d(16, 16, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    for layer in dynamic.layers:
        if isinstance(layer, odconv.DynamicConv):
            for head in layer.attention.linear_layers()[-len(layer.attention.heads) :]:
                nn.init.normal_(head.weight)
    for _ in range(30):
        dynamic.train()(torch.randn(16, 3, 32, 32))
    dynamic.eval()
    static = odconv.to_static(dynamic, [torch.randn(8, 3, 32, 32)]).model
    return {"static": static, "dynamic": dynamic}


def image_and_logits(network: nn.Module) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        return x, network(x)


FORMS = pytest.mark.parametrize("form", ["static", "dynamic"])


def test_the_forms_differ(networks):
    assert not torch.allclose(*(image_and_logits(network)[1] for network in networks.values()), rtol=0.01)


@FORMS
def test_ncnn_by_pnnx(networks, form, tmp_path, monkeypatch):
    ncnn, pnnx = pytest.importorskip("ncnn"), pytest.importorskip("pnnx")
    monkeypatch.chdir(tmp_path)
    x, wanted = image_and_logits(networks[form])
    checked = pnnx.export(networks[form], "network.pt", x)
    if form == "static":  # the check that pnnx makes of a dynamic one runs batch norm in training mode
        torch.testing.assert_close(checked(x), wanted, rtol=1e-4, atol=1e-5)
    net = ncnn.Net()
    assert net.load_param("network.ncnn.param") == net.load_model("network.ncnn.bin") == 0
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(x[0].numpy()))
    failed, found = extractor.extract("out0")
    assert not failed
    torch.testing.assert_close(torch.from_numpy(numpy.array(found))[None], wanted, rtol=1e-3, atol=1e-4)


@FORMS
def test_litert(networks, form):
    litert_torch = pytest.importorskip("litert_torch")
    x, wanted = image_and_logits(networks[form])
    found = litert_torch.convert(networks[form], (x,))(x)
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("form", "way"), [("static", "trace"), ("static", "export"), ("dynamic", "export")])
def test_core_ml(networks, form, way):
    coremltools = pytest.importorskip("coremltools")
    x, wanted = image_and_logits(networks[form])
    if way == "trace":
        source = torch.jit.trace(networks[form], x)
    else:
        source = torch.export.export(networks[form], (x,)).run_decompositions({})
    model = coremltools.convert(
        source, inputs=[coremltools.TensorType("image", x.shape)] if way == "trace" else None, convert_to="mlprogram"
    )
    (output,) = model.get_spec().description.output
    assert [*output.type.multiArrayType.shape] == [*wanted.shape] or not output.type.multiArrayType.shape
    if os.uname().sysname == "Darwin":  # the one system that runs it
        (name,) = (entry.name for entry in model.get_spec().description.input)
        found = torch.tensor(model.predict({name: x.numpy()})[output.name])
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def quantised(network: nn.Module, x: Tensor) -> nn.Module:
    """What pt2e makes of a network with the quantiser for x86."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = quantizers.X86InductorQuantizer()
    quantizer.set_global(quantizers.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(network, (x,)).module(), quantizer)
    for _ in range(4):
        prepared(torch.randn_like(x))
    prepared(x)
    return pt2e.convert_pt2e(prepared)


def test_pt2e_quantises_static_copies(networks):
    x, wanted = image_and_logits(networks["static"])
    model = quantised(networks["static"], x)
    assert sum("quantize" in str(node.target) for node in model.graph.nodes) > 5
    assert (model(x) - wanted).norm() < 0.1 * wanted.norm()


def test_pt2e_wants_constant_kernels(networks):
    x, _ = image_and_logits(networks["dynamic"])
    with pytest.raises(ValueError, match="Expected get_attr node"):
        quantised(networks["dynamic"], x)
