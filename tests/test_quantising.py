"""Kernels in eight bits: a quarter of the file, and nearly the same outputs."""

from pathlib import Path

import pytest
import torch
from test_export import SIZE, nodes, randomise, run, small
from torch import Tensor, nn

import odconv
from odconv.app.cli import main
from odconv.export import export_torch, verify
from odconv.export.quantisation import balanced

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
slow = pytest.mark.slow


def wide() -> nn.Module:
    """As in networks of the zoo, nearly all weights are kernels of dynamic layers; filters differ a hundredfold."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        odconv.ODConv2d(16, 96, 3, padding=1),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        odconv.ODConv2d(96, 96, 3, padding=1, groups=96),
        nn.BatchNorm2d(96),
        odconv.ODConv2d(96, 64, 1, kernel_num=8),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        odconv.CondConv2d(64, 32, 3, padding=1, bias=True),
    )
    with torch.no_grad():
        for layer in (model[1], model[4], model[6]):
            layer.weight *= torch.logspace(-2, 0, layer.out_channels).view(-1, 1, 1, 1)
    return randomise(model).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return wide()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantising")
    paths = {precision: folder / f"{precision}.onnx" for precision in ("float32", "int8")}
    for precision, path in paths.items():
        odconv.export_onnx(
            model, path, SIZE, precision=precision, dynamic_size=True, metadata={"arch": "wide", "classes": ["a"]}
        )
    return paths


def initializers(path: Path) -> list:
    network = onnx.load(path)
    inner = [a.g for node in network.graph.node for a in node.attribute if a.HasField("g")]
    return [tensor for graph in (network.graph, *inner) for tensor in graph.initializer]


def test_the_file_is_a_quarter(files, model):
    sizes = {precision: path.stat().st_size for precision, path in files.items()}
    assert sizes["int8"] < 0.3 * sizes["float32"]
    kernels = [layer.weight.numel() for layer in model.modules() if isinstance(layer, odconv.DynamicConv)]
    quantised = [len(t.raw_data) for t in initializers(files["int8"]) if t.data_type == onnx.TensorProto.UINT8]
    assert set(kernels) <= set(quantised)


@pytest.mark.parametrize("batch", [1, 2, 7])
@torch.no_grad()
def test_one_file_serves_every_batch_and_size(files, model, batch):
    images = torch.randn(batch, 3, 40, 24)
    (logits,) = run(files["int8"], images)
    wanted = model(images)
    assert logits.dtype == torch.float32
    assert 0 < (logits - wanted).abs().max() < 0.06 * wanted.abs().max()


def test_the_file_is_plain_onnx_and_says_what_it_is(files):
    network = onnx.load(files["int8"])
    onnx.checker.check_model(network, full_check=True)
    assert [(entry.domain, entry.version) for entry in network.opset_import] == [("", 18)]
    assert {node.domain for node in nodes(network.graph)} == {""}
    assert {entry.key: entry.value for entry in network.metadata_props} == {"arch": '"wide"', "classes": '["a"]'}
    sessions = [runtime.InferenceSession(path) for path in files.values()]
    described = [[(v.name, v.type, v.shape) for v in (*s.get_inputs(), *s.get_outputs())] for s in sessions]
    assert described[0] == described[1]


@pytest.mark.slow
def test_another_form_and_opset(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    written = odconv.export_onnx(small(), path, SIZE, precision="int8", form="product", opset=20)
    assert 0 < written.error < 0.02
    assert "Scan" not in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["ODConv2d", "DyConv2d", "CondConv2d", "ODConvTranspose2d", "DyConvTranspose2d"])
@torch.no_grad()
def test_balanced_filters_compute_the_same(method, groups):
    layer = getattr(odconv, method)(4, 6, 3, groups=groups, bias=True)
    axis = layer.weight.dim() - 3 if "Transpose" in method else 1
    layer.weight.select(axis, 1).mul_(100)
    layer.weight.select(axis, 2).zero_()
    before: Tensor = layer.weight.clone()
    x = torch.randn(3, 4, 7, 7)
    copied = balanced(layer)
    torch.testing.assert_close(copied(x), layer(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, before)
    largest = copied.weight.abs().amax()
    assert largest == 1
    assert copied.attention.scale.shape == (6,)


@pytest.mark.slow
def test_filters_of_different_size_need_balance(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr("odconv.export.onnx_file.balanced", lambda model: model)
    odconv.export_onnx(model, tmp_path / "net.onnx", SIZE, precision="int8", check=False)
    with pytest.raises(ValueError, match="does not compute"):
        verify(tmp_path / "net.onnx", model, [(2, *SIZE)], tolerance=0.06)
    assert verify(files["int8"], model, [(2, *SIZE)], tolerance=0.06) > 0


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)), odconv.ODConv2d(3, 4, 3, kernel_num=1)],
    ids=["static", "one kernel"],
)
def test_networks_without_kernels_to_mix(network, tmp_path):
    with pytest.raises(ValueError, match="'int8' is for dynamic layers that mix kernels, and the network has none"):
        odconv.export_onnx(network, tmp_path / "net.onnx", (3, 8, 8), precision="int8")
    assert not list(tmp_path.iterdir())


def test_precisions_that_there_are(model, tmp_path):
    with pytest.raises(ValueError, match="precision must be 'float32', 'float16' or 'int8' for ONNX, got 'int4'"):
        odconv.export_onnx(model, tmp_path / "net.onnx", SIZE, precision="int4")
    with pytest.raises(ValueError, match=r"precision must be one of \('float32', 'float16', 'bfloat16'\), got 'int8'"):
        export_torch(model, tmp_path / "net.pt2", SIZE, precision="int8")


@slow
def test_the_command(tmp_path, capsys):
    model = randomise(odconv.create_model("od_resnet18", kernel_num=4, num_classes=3, stem="small"))
    for name, weight in model.named_parameters():
        if ".attention." in name and "_fc.weight" in name:  # untrained attentions would make much of little
            nn.init.zeros_(weight)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    given = ["--weights", str(tmp_path / "net.pth"), "--arch", "od_resnet18", "--kernel_num", "4", "--stem", "small"]
    given += ["--image_size", "64", "--out", str(tmp_path / "net.onnx"), "--precision", "int8"]
    assert main(["export", *given]) == 0
    assert "od_resnet18, ONNX with opset 18, int8, 46." in capsys.readouterr().out
    assert main(["export", *given, "--format", "torch", "--out", str(tmp_path / "net.pt2")]) == 1
    assert "got int8" in capsys.readouterr().err


@slow
@torch.no_grad()
def test_what_a_thousand_images_are_taken_for(shared_data, tmp_path):
    """Trained weights, as four kernels that differ, with attentions that differ between images."""
    pytest.importorskip("torchvision")
    from odconv.app.data import normalise, open_data

    images = open_data(str(shared_data / "imagenet-sample"), image_size=224, resize_size=256, need_train=False).val
    weights = shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"
    model = odconv.convert(odconv.create_model("mobilenetv2_100", weights=weights), kernel_num=4).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, odconv.DynamicConv)]
    for layer in layers:
        layer.attention.bn.train().momentum = None  # takes the statistics of what comes
    model(normalise(torch.stack([images[i][0] for i in range(0, 1000, 50)])))
    random = torch.Generator().manual_seed(0)
    for layer in layers:
        spread = layer.weight.flatten(2).std(2)
        noise = 0.1 * torch.randn(layer.weight.shape, generator=random) * spread.view(*spread.shape, 1, 1, 1)
        layer.weight += noise - noise.mean(0)
        for name, weight in layer.attention.named_parameters():
            if "_fc.weight" in name:
                weight.normal_(0, 0.02 if "kernel" in name else 0.0005, generator=random)
    sessions, labels = [], torch.tensor([int(label) for label in images.labels])
    for precision in ("float32", "int8"):
        path = tmp_path / f"{precision}.onnx"
        odconv.export_onnx(model.eval(), path, (3, 224, 224), precision=precision)
        sessions.append(runtime.InferenceSession(path))
    chosen: list[list[int]] = [[], []]
    for image, _ in images:
        for session, classes in zip(sessions, chosen, strict=True):
            classes.append(session.run(None, {"images": normalise(image[None]).numpy()})[0].argmax().item())
    float32, int8 = torch.tensor(chosen)
    assert (float32 == int8).sum() > 850
    assert (int8 == labels).sum() > (float32 == labels).sum() - 20
