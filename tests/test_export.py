"""Exported files compute what the network does, from one file at any batch, and say why where they cannot be made."""

import copy
import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import odconv
from odconv.app.cli import main
from odconv.export import export_torch, verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
slow = pytest.mark.slow
SIZE = (3, 32, 32)


def randomise(model: nn.Module) -> nn.Module:
    """Batch norm that fits the network and has weights of its own, and attentions that differ between samples."""
    torch.manual_seed(0)
    differ(model, 0.02)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.7, 1.4)
            norm.momentum = None  # takes the statistics of what comes
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return model


def differ(model: nn.Module, scale: float) -> nn.Module:
    """Let the attentions differ between samples."""
    for name, parameter in model.named_parameters():
        if ".attention." in name and name.endswith("_fc.weight"):
            nn.init.normal_(parameter, 0, scale)
    return model


def warm(name: str, method: str, **options) -> nn.Module:
    """A network of the zoo, dynamic by a warm start.

    Deep dynamic networks that are untrained are chaotic: rounding errors grow to the size of the outputs.
    """
    return differ(odconv.convert(randomise(odconv.create_model(name, **options)), method, kernel_num=4), 0.002)


def small() -> nn.Module:
    """Every method, grouped, depth-wise, strided, padded and 1x1."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        odconv.ODConv2d(8, 16, 3, padding=1, bias=True),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        odconv.ODConv2d(16, 16, 3, stride=2, padding=1, groups=16),
        odconv.DyConv2d(16, 8, 1),
        odconv.CondConv2d(8, 8, 3, padding="same", dilation=2, groups=2, bias=True, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    odconv.set_temperature(randomise(model), 0.5)
    return model


def after_a_layer(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(odconv.ODConv2d(3, 4, 3, kernel_num=2, norm="none"), *layers)


def run(path: Path, images: Tensor) -> list[Tensor]:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def nodes(graph) -> list:
    """The nodes of a graph and of the graphs inside of it."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for part in inner for node in nodes(part))]


@torch.no_grad()
def assert_agrees(outputs: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(outputs) == len(expected)
    for one, other in zip(outputs, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small().eval()


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    model.train()
    odconv.export_onnx(model, path, SIZE, dynamic_size=True, metadata={"classes": ["a", "é"], "image_size": 32})
    model.eval()
    return path


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("size", [(32, 32), (37, 64)])
@torch.no_grad()
def test_one_file_serves_every_batch_and_size(file, model, batch, size):
    images = torch.randn(batch, 3, *size)
    assert_agrees(run(file, images), [model(images)])


def test_what_the_file_says(file):
    network = onnx.load(file)
    onnx.checker.check_model(network, full_check=True)
    session = runtime.InferenceSession(file)
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("images", ["batch", 3, "height", "width"])
    ]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch", 5])]
    assert {entry.domain: entry.version for entry in network.opset_import}[""] == 18
    said = {entry.key: entry.value for entry in network.metadata_props}
    assert said == {"classes": '["a", "\\u00e9"]', "image_size": "32"}
    assert b"site-packages" not in file.read_bytes()
    assert str(Path(odconv.__file__).parent).encode() not in file.read_bytes()


def test_the_batch_is_nowhere_a_group(file):
    groups = [
        attribute.i
        for node in nodes(onnx.load(file).graph)
        for attribute in node.attribute
        if attribute.name == "group"
    ]
    assert {*groups} == {1, 2, 16}  # how many there are depends on PyTorch


@pytest.mark.parametrize(
    "options",
    [
        {"opset": 20, "precision": "float16"},
        pytest.param({"form": "product"}, marks=slow),
    ],
)
@torch.no_grad()
def test_other_forms_opsets_and_precisions(model, tmp_path, options):
    path = tmp_path / "net.onnx"
    odconv.export_onnx(model, path, SIZE, **options)
    network = onnx.load(path)
    assert {entry.domain: entry.version for entry in network.opset_import}[""] == options.get("opset", 18)
    kinds = {node.op_type for node in nodes(network.graph)}
    assert ("Scan" in kinds) == ("form" not in options)
    assert "GatherElements" not in kinds
    for batch in (1, 2, 7):
        images = torch.randn(batch, *SIZE)
        assert_agrees(run(path, images), [model(images)], 5e-2 if "precision" in options else 1e-4)
    if "precision" in options:
        kept = [
            t for node in nodes(network.graph) for a in node.attribute for t in a.g.initializer if t.data_type == 10
        ]
        assert sum(len(t.raw_data) for t in kept) >= sum(2 * layer.weight.numel() for layer in (model[1], model[4]))


def test_batches_of_one_and_a_network_that_stays_as_it_is(tmp_path):
    model, path = small().train(), tmp_path / "one.onnx"
    model[4].eval()
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    odconv.export_onnx(model, path, SIZE, dynamic_batch=False)

    assert "Scan" not in {node.op_type for node in onnx.load(path).graph.node}
    images = torch.randn(1, *SIZE)
    assert_agrees(run(path, images), [copy.deepcopy(model).eval()(images)])
    with pytest.raises(Exception, match="Got: 2 Expected: 1"):
        run(path, images.expand(2, -1, -1, -1))

    state, expected = model.state_dict(), before.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert model[1].attention.temperature == before[1].attention.temperature == 0.5
    for one, other in zip(model.modules(), before.modules(), strict=True):
        assert one.training == other.training
        assert len(one._forward_hooks) == len(one._forward_pre_hooks) == 0
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad


def test_a_static_network_needs_no_loop(tmp_path):
    path = tmp_path / "static.onnx"
    odconv.export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)), path, (3, 8, 8))
    assert {node.op_type for node in onnx.load(path).graph.node} == {"Conv", "Reshape"}


class Maps(nn.Module):
    """Several outputs, as a backbone has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = odconv.ODConv2d(3, 4, 3, 2, 1), odconv.ODConv2d(4, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.first(x)
        return {"0": fine, "1": self.second(fine), "pool": fine.mean((2, 3))}


@torch.no_grad()
def test_several_outputs(tmp_path):
    model, path = Maps().eval(), tmp_path / "maps.onnx"
    written = odconv.export_onnx(model, path, (3, 16, 16), dynamic_size=True)
    assert written.outputs == ["output_0", "output_1", "pool"]
    assert [value.name for value in runtime.InferenceSession(path).get_outputs()] == written.outputs
    images = torch.randn(3, 3, 20, 24)
    assert_agrees(run(path, images), list(model(images).values()))


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


class Others(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), {}, r"layer 1 \(BatchNorm2d\) .* the others in the batch"),
        (nn.Sequential(nn.ReLU(), Singular()), {}, r"layer 1\.1 \(Singular\) cannot be exported: .*_linalg_svd"),
        (Branch(), {}, r"layer 1 \(Branch\) cannot be exported: .*data-dependent"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(144, 3)),
            {"dynamic_size": True},
            r"layer 1\.1 \(Linear\) cannot be exported: .*for inputs of shape \(1, 3, 40, 40\)",
        ),
        (odconv.ODConv2d(4, 4, 3, context_channels=5), {}, r"layer 1 \(ODConv2d\) cannot be exported: context must"),
        (Others(), {}, "does not compute what the network does: logits is off"),
        (nn.ReLU(), {"precision": "bfloat16"}, "precision must be 'float32', 'float16' or 'int8'"),
        (nn.ReLU(), {"opset": 12}, "opset must be at least 18, got 12"),
        (nn.ReLU(), {"opset": 99}, r"opset must be at most \d+, .*, got 99"),
        (nn.ReLU(), {"form": "scan"}, "form must be 'loop' or 'product', got 'scan'"),
        (nn.ReLU(), {"input_size": 8}, r"input_size must be \(C, H, W\).*got 8"),
    ],
)
def test_what_cannot_be_exported(layer, options, message, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("as it was")
    with pytest.raises(ValueError, match=message):
        odconv.export_onnx(after_a_layer(layer), path, **{"input_size": (3, 8, 8)} | options)
    assert path.read_text() == "as it was"
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the output folder .*file cannot be written: it is a file"):
        odconv.export_onnx(after_a_layer(), tmp_path / "file" / "net.onnx", (3, 8, 8))
    with pytest.raises(IsADirectoryError, match="path must be a file, got the folder"):
        odconv.export_onnx(after_a_layer(), tmp_path, (3, 8, 8))


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'odconv\[export\]'"):
        odconv.export_onnx(after_a_layer(), tmp_path / "net.onnx", (3, 8, 8))


def test_verify_sees_other_weights(file, model):
    assert verify(file, model, [(2, *SIZE)]) <= 1e-4
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"logits is off by .* for inputs of shape \(2, 3, 32, 32\)"):
        verify(file, other, [(2, *SIZE)])
    with pytest.raises(FileNotFoundError, match="no file"):
        verify(file.with_name("none.onnx"), model, [(1, *SIZE)])
    with pytest.raises(OSError, match=r"onnxruntime cannot read .*test_export\.py"):
        verify(__file__, model, [(1, *SIZE)])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"dynamic_size": True}, marks=slow),
        {"precision": "bfloat16", "dynamic_batch": False},
    ],
)
@torch.no_grad()
def test_programs_of_torch_export(model, tmp_path, options):
    path = tmp_path / "net.pt2"
    written = export_torch(model, path, SIZE, **options)
    assert written.error is not None
    network = torch.export.load(path).module()
    for batch in (1, 2, 7) if options.get("dynamic_batch", True) else (1,):
        images = torch.randn(batch, 3, *((48, 40) if "dynamic_size" in options else (32, 32)))
        assert_agrees(list(network(images)), [model(images)], 2e-1 if "precision" in options else 1e-4)
    with pytest.raises(ValueError, match=r"path must end in \.pt2"):
        export_torch(model, tmp_path / "net.pt", SIZE)


def command(folder: Path, *options: str) -> int:
    given = ["--weights", str(folder / "net.pth"), "--out", str(folder / "new" / "net.onnx"), "--stem", "small"]
    return main(["export", *given, "--image_size", "32", *options])


def test_the_command(tmp_path, capsys):
    model = randomise(odconv.create_model("tiny", num_classes=3, stem="small"))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    assert command(tmp_path, "--arch", "od_tiny") == 1
    assert "attention" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert command(tmp_path, "--arch", "tiny") == 0
    shown, meanwhile = capsys.readouterr()
    assert meanwhile.startswith("exporting tiny, which may take minutes")
    assert re.search(r"tiny, ONNX with opset 18, float32, 0\.\d MB", shown)
    assert "images (batch, 3, 32, 32) -> logits (batch, 3)" in shown
    assert "differs from PyTorch by" in shown
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "new" / "net.onnx").metadata_props}
    assert said["arch"] == '"tiny"'
    assert said["mean"] == "[0.485, 0.456, 0.406]"
    assert command(tmp_path, "--arch", "tiny", "--batch_one") == 0
    assert "images (1, 3, 32, 32) -> logits (1, 3)" in capsys.readouterr().out


def test_nothing_is_said_of_what_is_not_folded(tmp_path, caplog):
    layer = odconv.ODConv2d(4, 4, 3, kernel_num=2)
    odconv.export_onnx(layer, tmp_path / "net.onnx", (4, 6, 6), form="product", check=False)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(("format", "name", "suffix"), [("onnx", "net.pt2", "onnx"), ("aoti", "net.onnx", "pt2")])
def test_the_name_says_how_a_file_is_opened(tmp_path, capsys, format, name, suffix):
    assert main(["export", "--weights", "absent.pth", "--out", str(tmp_path / name), "--format", format]) == 1
    assert f"out must end in .{suffix} where format is {format}, got {tmp_path / name}" in capsys.readouterr().err


def test_options_that_cannot_be(tmp_path, capsys):
    given = ["--weights", "absent.pth", "--out", str(tmp_path / "net.onnx")]
    assert main(["detect", "export", *given, "--height", "0"]) == 1
    assert "height must be at least 1, got 0" in capsys.readouterr().err
    given = ["--weights", "absent.pth", "--out", "net.pt2", "--format", "aoti"]
    assert main(["export", *given, "--precision", "int8"]) == 1
    assert "precision must be float32, float16 or bfloat16 where format is aoti, got int8" in capsys.readouterr().err


@slow
@pytest.mark.parametrize(
    "options", [("--precision", "float16"), ("--format", "aoti"), ("--batch_one", "--dynamic_size")]
)
def test_the_command_with_a_dynamic_network(tmp_path, options):
    model = warm("resnet18", "odconv", num_classes=3, stem="small")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    file = tmp_path / "out" / ("net.pt2" if "aoti" in options else "net.onnx")
    assert command(tmp_path, "--arch", "od_resnet18", "--kernel_num", "4", *options, "--out", str(file)) == 0
    assert verify(file, model, [(1, *SIZE)], tolerance=5e-2, trust=True) > 0


@slow
@pytest.mark.parametrize("arch", ["mobilenetv2_050", "od_mobilenetv2_050"])
def test_the_command_for_detectors(arch, tmp_path, capsys):
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    detector = odconv.create_detector("faster_rcnn", arch, num_classes=3)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    given = ["--weights", str(tmp_path / "detector.pth"), "--out", str(tmp_path / "pyramid.onnx")]
    assert main(["detect", "export", *given]) == 1
    assert "detector and arch must be given" in capsys.readouterr().err
    given += ["--detector", "faster_rcnn", "--arch", arch, "--height", "64", "--width", "96"]
    assert main(["detect", "export", *given]) == 0
    shown = capsys.readouterr().out
    assert f"backbone of faster_rcnn on {arch}, ONNX with opset 18, float32" in shown
    assert "images (batch, 3, height, width) -> output_0, output_1, output_2, output_3, pool\n" in shown
    assert verify(tmp_path / "pyramid.onnx", detector.backbone, [(1, 3, 96, 64), (2, 3, 64, 128)]) < 1e-4


METHODS = [f"{method}{kind}" for method in ("ODConv", "DyConv", "CondConv") for kind in ("", "Transpose")]


@slow
@pytest.mark.parametrize("form", ["loop", "product"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer(method, dims, form, tmp_path):
    size = (4, *[{1: 14, 2: 9, 3: 7}[dims]] * dims)
    layer = getattr(odconv, f"{method}{dims}d")(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=True)
    written = odconv.export_onnx(layer, tmp_path / "net.onnx", size, dynamic_size=True, form=form)
    assert written.error < 1e-5


@slow
@pytest.mark.parametrize("form", ["loop", "product"])
@pytest.mark.parametrize("padding", ["reflect", "replicate", "circular", "same"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_padding(dims, padding, form, tmp_path):
    options = {"padding": "same"} if padding == "same" else {"padding": 1, "padding_mode": padding}
    layer = getattr(odconv, f"ODConv{dims}d")(3, 4, 4, **options)
    odconv.export_onnx(layer, tmp_path / "net.onnx", (3, *[6] * dims), dynamic_size=True, form=form)


@slow
@pytest.mark.parametrize("padding", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("batch_one", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("method", ["ODConv", "DyConv", "CondConv"])
def test_maps_with_fewer_positions_than_filters(method, dims, batch_one, padding, tmp_path):
    for groups in (1, 2):
        options = {"padding": 1, "padding_mode": padding, "groups": groups, "bias": True}
        layer = getattr(odconv, f"{method}{dims}d")(8, 130, 3, stride=2, **options)
        written = odconv.export_onnx(layer, tmp_path / "net.onnx", (8, *[5] * dims), dynamic_batch=not batch_one)
        assert written.error < 1e-5


@slow
@pytest.mark.parametrize("name", ["od_resnet18", "od_mobilenetv2_050"])
def test_the_maps_of_a_detector(name, tmp_path):
    pytest.importorskip("torchvision")
    detector = odconv.create_detector("faster_rcnn", name, kernel_num=2, num_classes=3)
    pyramid = odconv.export_onnx(detector.backbone, tmp_path / "pyramid.onnx", (3, 64, 64), dynamic_size=True)
    assert pyramid.outputs == ["output_0", "output_1", "output_2", "output_3", "pool"]
    body = odconv.export_onnx(detector.backbone.body, tmp_path / "body.onnx", (3, 64, 64))
    assert body.outputs == ["output_0", "output_1", "output_2", "output_3"]


@slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("resnet50", "odconv"),
        ("mobilenetv2_100", "odconv"),
        ("resnet18", "dyconv"),
        ("mobilenetv2_050", "condconv"),
    ],
)
def test_networks_of_the_zoo(name, method, tmp_path):
    model = warm(name, method)
    written = odconv.export_onnx(model, tmp_path / "net.onnx", (3, 64, 64), dynamic_size=True)
    assert verify(written.path, model, [(batch, 3, 96, 64) for batch in (1, 2, 7, 32)]) <= 1e-4


@slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@torch.no_grad()
def test_packages_of_aotinductor(model, precision, tmp_path):
    path = tmp_path / "net.pt2"
    export_torch(model, path, SIZE, precision=precision, compiled=True)
    with zipfile.ZipFile(path) as archive:
        assert any(name.endswith(".so") for name in archive.namelist())
    network = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 2, 7):
        images = torch.randn(batch, *SIZE)
        assert_agrees(list(network(images)), [model(images)], 1e-4 if precision == "float32" else 2e-1)


@slow
@torch.no_grad()
def test_the_same_classes_on_a_thousand_images(shared_data, tmp_path):
    """Trained weights, warm-started to four kernels, with attentions that differ between images."""
    pytest.importorskip("torchvision")
    from odconv.app.data import normalise, open_data

    model = odconv.create_model(
        "mobilenetv2_100", weights=shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"
    )
    odconv.convert(model, kernel_num=4)
    random = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, odconv.DynamicConv):
            for name, weight in layer.attention.named_parameters():
                if "_fc.weight" in name:  # heads of zeros would weight all images alike
                    weight.normal_(0, 0.001, generator=random)
    path = tmp_path / "net.onnx"
    odconv.export_onnx(model, path, (3, 224, 224))
    splits = open_data(str(shared_data / "imagenet-sample"), image_size=224, resize_size=256, need_train=False)
    session, right, batch = runtime.InferenceSession(path), 0, 50
    model.eval()
    for start in range(0, 1000, batch):
        images = normalise(torch.stack([splits.val[i][0] for i in range(start, start + batch)]))
        ours = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert torch.equal(ours.argmax(1), model(images).argmax(1))
        right += (ours.argmax(1) == torch.tensor(splits.val.labels[start : start + batch])).sum().item()
    assert right > 700  # 785 with static weights


@slow
def test_a_file_runs_where_there_is_no_odconv(model, tmp_path):
    export_torch(model, tmp_path / "net.pt2", SIZE)
    code = (
        "import sys; sys.modules['odconv'] = None; import torch; "
        f"print(*torch.export.load({str(tmp_path / 'net.pt2')!r}).module()(torch.ones(2, 3, 32, 32))[0].shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["2", "5"]
