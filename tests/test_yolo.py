"""YOLO: blocks with the signature of its ``Conv``, and ultralytics networks converted, trained and exported."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stirring import stirred
from torch import nn

import odconv
from odconv import yolo
from odconv.layers import DynamicConv

PAGE = (Path(__file__).parents[1] / "docs" / "yolo.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture
def ultralytics(monkeypatch, tmp_path):
    """The package, with nothing written outside tmp_path and nothing installed or downloaded on the way."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_VERBOSE", "false")
    package = pytest.importorskip("ultralytics")
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    thop = pytest.importorskip("thop")
    engine = pytest.importorskip("ultralytics.engine.model")
    replaced = {"parse_model": tasks, "load": tasks.BaseModel, "train": engine.Model, "profile": thop}
    for name, owner in replaced.items():
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restored afterwards
    monkeypatch.chdir(tmp_path)
    return package


def static_network(ultralytics, name="yolov8n.yaml"):
    torch.manual_seed(0)
    return stirred(ultralytics.nn.tasks.DetectionModel(name, verbose=False)).double().eval()


def boxes(model, x):
    return model(x)[0].detach()


def dynamic_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, DynamicConv)]


# --- the block


def test_a_misspelt_option_of_a_block_is_named():
    with pytest.raises(TypeError, match="'kernel_nun' is no option of ODConv2d; did you mean kernel_num"):
        yolo.ODConv(8, 8, kernel_nun=2)
    assert yolo.ODConv(8, 8, 3, padding_mode="reflect").conv.padding_mode == "reflect"


@pytest.mark.parametrize(("k", "p", "d", "expected"), [
    (1, None, 1, 0), (3, None, 1, 1), (3, None, 2, 2), (4, None, 1, 2), (6, None, 3, 8), (3, 0, 1, 0),
    ([3, 5], None, 2, [2, 4]), ((1, 7), None, 1, [0, 3]), (5, (1, 2), 1, (1, 2)),
])  # fmt: skip
def test_autopad(k, p, d, expected):
    assert yolo.autopad(k, p, d) == expected


@pytest.mark.parametrize("block", [yolo.ODConv, yolo.DyConv, yolo.CondConv])
def test_the_block_is_convolution_norm_and_activation(block):
    torch.manual_seed(0)
    layer = block(4, 8, 3, 2, None, 2, 2, nn.ReLU(), kernel_num=3)
    x = torch.randn(2, 4, 9, 9)
    assert layer(x).shape == (2, 8, 5, 5)
    torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)).relu())
    assert (layer.conv.kernel_num, layer.conv.groups, layer.conv.dilation, layer.conv.bias) == (3, 2, (2, 2), None)
    assert isinstance(block(4, 8).act, nn.SiLU)
    assert isinstance(block(4, 8, act=False).act, nn.Identity)
    layer.train()(x[:1]).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("block", [yolo.ODConv, yolo.DyConv, yolo.CondConv])
@pytest.mark.parametrize("n", [1, 4])
def test_the_block_fuses(block, n):
    torch.manual_seed(0)
    model = stirred(nn.Sequential(block(3, 8, 3, 2, kernel_num=n), block(8, 8, 3, g=8, kernel_num=n))).double().eval()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    for _ in range(2):  # once more changes nothing
        assert yolo.fuse(model) is model
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert [type(layer.bn) for layer in model] == [nn.Identity] * 2
    torch.testing.assert_close(copy.deepcopy(model).half()(x.half()), expected.half(), rtol=0.05, atol=0.02)


# --- in a YAML


def network_yaml(first="[-1, 1, ODConv, [128, 3, 2, {kernel_num: 1}]]"):
    return f"""
nc: 3
activation: nn.ReLU()
scales: {{n: [0.33, 0.25, 1024]}}
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - {first}
  - [-1, 1, C2f, [128, True]]
  - [-1, 3, DyConv, [128, 3]]
  - [-1, 1, CondConv, [256, 3, 2, None, 1, 1, False]]
head:
  - [[2, 4], 1, Detect, [nc]]
"""


def from_yaml(ultralytics, text):
    import yaml

    return ultralytics.nn.tasks.DetectionModel({**yaml.safe_load(text), "scale": "n"}, verbose=False)


def test_a_yaml_names_the_blocks(ultralytics):
    before = ultralytics.nn.tasks.parse_model
    yolo.register()
    once = ultralytics.nn.tasks.parse_model
    yolo.register()
    assert ultralytics.nn.tasks.parse_model is once is not before
    model = from_yaml(ultralytics, network_yaml())  # which runs it in training mode on one image
    first, repeated, last = model.model[1], model.model[3], model.model[4]
    assert type(first) is yolo.ODConv
    assert (first.conv.in_channels, first.conv.out_channels, first.conv.kernel_num) == (16, 32, 1)  # width 0.25
    assert (first.conv.stride, first.conv.padding, type(first.act)) == ((2, 2), (1, 1), nn.ReLU)
    assert [type(block) for block in (repeated, last)] == [yolo.DyConv, yolo.CondConv]  # depth 0.33: once
    assert isinstance(last.act, nn.Identity)
    assert (first.i, first.f, first.type) == (1, -1, "odconv.yolo.ODConv")
    assert first.np == sum(parameter.numel() for parameter in first.parameters())
    assert model.stride.tolist() == [4, 8]
    assert model.yaml["backbone"][1][2] == "ODConv"  # so that training builds it again from there
    assert boxes(model.eval(), torch.rand(2, 3, 64, 64)).shape == (2, 7, 16 * 16 + 8 * 8)


def test_repeated_blocks_and_unknown_options(ultralytics):
    yolo.register()
    model = from_yaml(ultralytics, network_yaml("[-1, 6, ODConv, [64, 3]]"))
    assert [type(block) for block in model.model[1]] == [yolo.ODConv] * 2
    with pytest.raises(TypeError, match="experts"):
        from_yaml(ultralytics, network_yaml("[-1, 1, ODConv, [64, 3, {experts: 2}]]"))


def parse(ultralytics, row):
    """The part of a network that a row of a YAML describes, for an input of 16 channels."""
    rows = {"backbone": [[-1, 1, "Conv", [64, 3, 2]], row], "head": [[-1, 1, "nn.Identity", []]]}
    return ultralytics.nn.tasks.parse_model({"nc": 3, "scales": {"n": [0.5, 0.25, 1024]}, "scale": "n", **rows}, 3)[0][
        1
    ]


@pytest.mark.parametrize(("row", "dynamic", "kind"), [
    ([-1, 1, "odconv.yolo.ODConv", [128, 3, 2]], ["conv"], yolo.ODConv),
    ([-1, 1, "DWConv_DyConv", [64, 3]], ["conv"], yolo.DyConv),
    ([-1, 1, "Bottleneck_ODConv", [128]], ["cv1.conv", "cv2.conv"], yolo.ODConv),
    ([-1, 2, "Bottleneck_CondConv", [64]], ["cv1.conv", "cv2.conv"], yolo.CondConv),
    ([-1, 4, "C2f_ODConv", [128, True]], [f"m.{i}.cv{j}.conv" for i in (0, 1) for j in (1, 2)], yolo.ODConv),
    ([-1, 1, "odconv.yolo.C2f_DyConv", [128]], ["m.0.cv1.conv", "m.0.cv2.conv"], yolo.DyConv),
    ([-1, 1, "C3_CondConv", [128]], ["m.0.cv1.conv", "m.0.cv2.conv"], yolo.CondConv),
    ([-1, 1, "C3k2_ODConv", [128, False, 0.25]], ["m.0.cv1.conv", "m.0.cv2.conv"], yolo.ODConv),
    ([-1, 1, "C3k2_ODConv", [128, True]], [f"m.0.m.{i}.cv{j}.conv" for i in (0, 1) for j in (1, 2)], yolo.ODConv),
    ([-1, 1, "SPPF_ODConv", [128, 5]], ["cv1.conv", "cv2.conv"], yolo.ODConv),
    ([-1, 1, "GhostConv_ODConv", [128, 3]], ["cv1.conv", "cv2.conv"], yolo.ODConv),
])  # fmt: skip
def test_blocks_whose_convolutions_are_dynamic(ultralytics, row, dynamic, kind):
    yolo.register()
    static = parse(ultralytics, [*row[:2], row[2].split(".")[-1].split("_")[0].replace("ODConv", "Conv"), row[3]])
    part = parse(ultralytics, [*row[:3], [*row[3], {"kernel_num": 3}]])
    assert dynamic_names(part) == dynamic
    layers = [part.get_submodule(name) for name in dynamic]
    assert {type(layer) for layer in layers} == {kind.layer}
    assert {layer.kernel_num for layer in layers} == {3}
    assert {type(part.get_submodule(name.removesuffix("conv").removesuffix("."))) for name in dynamic} == {kind}
    assert part.np == sum(parameter.numel() for parameter in part.parameters())
    assert part.type.endswith(row[2].split(".")[-1])
    x = torch.rand(2, 16, 8, 8)
    assert part(x).shape == static(x).shape


def test_static_weights_of_the_same_yaml_start_the_rows(ultralytics):
    yolo.register()
    text = network_yaml("[-1, 2, C2f_ODConv, [128, True, {kernel_num: 2}]]")
    plain = (
        text.replace(", {kernel_num: 2}", "")
        .replace("_ODConv", "")
        .replace("DyConv", "Conv")
        .replace("CondConv", "Conv")
    )
    static = stirred(from_yaml(ultralytics, plain))
    model = from_yaml(ultralytics, text)
    assert dynamic_names(static) == []
    model.load(static)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(boxes(model.eval(), x), boxes(static.eval(), x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "hint"), [
    ("C2f_ODCnov", "did you mean C2f_ODConv"), ("c2f_odconv", "did you mean C2f_ODConv"), ("ODConv2d", "ODConv"),
    ("odconv.yolo.ODCon", "ODConv"), ("C4k2_DyConv", "C3k2_DyConv"), ("Wavelet", "alone or behind another block's"),
])  # fmt: skip
def test_a_block_that_there_is_not(ultralytics, name, hint):
    yolo.register()
    with pytest.raises(ValueError, match=f"no block is called '{name}'; .*{hint}"):
        parse(ultralytics, [-1, 1, name, [64]])


def test_rows_that_cannot_be_dynamic(ultralytics):
    yolo.register()
    with pytest.raises(ValueError, match=r"nn\.ReLU_ODConv: a nn\.ReLU has no convolution that could be dynamic"):
        parse(ultralytics, [-1, 1, "nn.ReLU_ODConv", []])
    with pytest.raises(TypeError, match="experts"):
        parse(ultralytics, [-1, 1, "C2f_ODConv", [64, {"experts": 2}]])
    with pytest.raises(TypeError, match="'kernel_nun' is no option of ODConv2d; did you mean kernel_num"):
        parse(ultralytics, [-1, 1, "ODConv", [64, {"kernel_nun": 2}]])
    with pytest.raises(ValueError, match="C2f_ODConv: the options of the layers must be the last argument, got"):
        parse(ultralytics, [-1, 1, "C2f_ODConv", [64, {"kernel_num": 2}, True]])
    with pytest.raises(KeyError, match="nonsense"):  # what is no block's name is not explained as one
        ultralytics.nn.tasks.parse_model(
            {"nc": 3, "scale": "nonsense", "scales": {"n": [1, 1, 8]}, "backbone": [], "head": []}, 3
        )


# --- conversion


def test_what_cannot_be_converted_is_said(ultralytics):
    with pytest.raises(TypeError, match="model must be a network of ultralytics or a YOLO, got str"):
        yolo.convert("yolov8n.yaml")
    with pytest.raises(ValueError, match=r"the Sequential has none of ultralytics' Conv blocks; use odconv\.convert"):
        yolo.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_a_converted_network_computes_what_it_did_and_fuses(ultralytics, name, n):
    model = static_network(ultralytics, name)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    expected = boxes(model, x)
    assert yolo.convert(model, kernel_num=n) is model
    torch.testing.assert_close(boxes(model, x), expected, rtol=1e-10, atol=1e-9)
    stirred(model)
    expected = boxes(model, x)
    for fused in (copy.deepcopy(model).fuse(verbose=False), yolo.fuse(copy.deepcopy(model)).fuse(verbose=False)):
        assert fused.is_fused()
        torch.testing.assert_close(boxes(fused, x), expected, rtol=1e-10, atol=1e-9)
    own = [m for key, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d) and ".attention." not in key]
    assert own == []


def test_which_convolutions_are_converted(ultralytics):
    convolutions = {key for key, m in static_network(ultralytics).named_modules() if type(m) is nn.Conv2d}
    model = yolo.convert(static_network(ultralytics), kernel_num=1)
    dynamic = {key for key, m in model.named_modules() if isinstance(m, DynamicConv)}
    last = {key for key in convolutions if re.fullmatch(r"model\.22\.cv[23]\.\d\.2", key)}
    assert convolutions - dynamic == {"model.0.conv", "model.22.dfl.conv", *last}
    assert all(isinstance(model.get_submodule(key.removesuffix(".conv")), yolo.DynamicBlock) for key in dynamic)
    assert [(m.i, m.f) for m in model.model] == [(m.i, m.f) for m in static_network(ultralytics).model]
    again = [id(module) for module in yolo.convert(model).modules()]
    assert again == [id(module) for module in model.modules()]
    some = yolo.convert(static_network(ultralytics), "dyconv", include="model.?.*", exclude=["*.m.*", "model.0.*"])
    assert {key for key, m in some.named_modules() if isinstance(m, odconv.DyConv2d)} == {
        key for key in dynamic if re.match(r"model\.\d\.", key) and ".m." not in key
    }
    with pytest.raises(ValueError, match=r"exclude: no convolution has a name that matches 'model\.99"):
        yolo.convert(static_network(ultralytics), exclude="model.99.*")


def test_branches_that_are_merged_into_one_kernel_stay(ultralytics):
    from ultralytics.nn.modules.block import RepVGGDW
    from ultralytics.nn.modules.conv import Conv, Conv2, DWConv, RepConv

    torch.manual_seed(0)
    model = nn.Sequential(Conv(4, 4), RepConv(4, 8), RepVGGDW(8), Conv2(8, 8), Conv(8, 8, 3), DWConv(8, 8, 3))
    yolo.convert(model, include="*")
    assert [name for name, m in model.named_modules() if isinstance(m, DynamicConv)] == ["0.conv", "4.conv", "5.conv"]


@pytest.mark.parametrize("n", [1, 4])
def test_half_precision_copies_counters_and_a_batch_of_one(ultralytics, n):
    from ultralytics.utils.torch_utils import ModelEMA, get_num_params

    model = stirred(yolo.convert(static_network(ultralytics), kernel_num=n)).float()
    x = torch.rand(1, 3, 64, 64)
    expected = boxes(model, x)
    half = boxes(copy.deepcopy(model).half(), x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=1.0)  # in pixels
    assert get_num_params(model) == sum(parameter.numel() for parameter in model.parameters())
    report = odconv.profile(model, (3, 64, 64))
    assert report.parameters == get_num_params(model)
    assert report.madds > 8.7e9 / 2 * (64 / 640) ** 2  # what the static network needs
    ema = ModelEMA(model)
    model.train()(x)
    ema.update(model)
    assert boxes(ema.ema, x).isfinite().all()


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_gflops(ultralytics, name, n):
    """ultralytics extrapolates from small images, where mixing the kernels costs as much as anywhere."""
    from ultralytics.utils.torch_utils import get_flops

    model = static_network(ultralytics, name).float()
    size, x = 320, torch.rand(1, 3, 320, 320)
    static, madds = get_flops(model, size), odconv.profile(model, x.shape).madds
    yolo.convert(model, kernel_num=n)
    added = 2 * (odconv.profile(model, x.shape).madds - madds) / 1e9
    norms = sum(2 * 2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)) / 1e9
    assert get_flops(model, size) == pytest.approx(static + added, abs=norms)
    assert model.info(imgsz=size)[3] == get_flops(model, size)


def test_a_conversion_is_part_of_the_yaml(ultralytics):
    static = static_network(ultralytics, "yolo11n.yaml")
    before = copy.deepcopy(static.yaml)
    model = yolo.convert(copy.deepcopy(static), kernel_num=2, include="model.?.*", exclude="model.0.*")
    yolo.convert(model, "dyconv", include="model.1?.cv?.*", warm_start=False)
    assert static.yaml == before
    stirred(model)
    again = ultralytics.nn.tasks.DetectionModel(model.yaml, verbose=False)
    assert dynamic_names(again) == dynamic_names(model)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    again.load(model, verbose=False)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(boxes(again.eval(), x), boxes(model.float().eval(), x), rtol=0, atol=0)
    assert yolo.convert(model, include=dynamic_names(model)).yaml == again.yaml  # nothing was left to convert
    whole = ultralytics.YOLO("yolo11n.yaml")
    assert yolo.convert(whole, kernel_num=2) is whole
    assert whole.model.yaml["odconv"][0]["include"] == dynamic_names(whole.model)


def test_other_networks_are_built_again_too(ultralytics):
    tasks = ultralytics.nn.tasks
    model = yolo.convert(tasks.ClassificationModel("yolo11n-cls.yaml", verbose=False), kernel_num=2)
    assert dynamic_names(tasks.ClassificationModel(model.yaml, nc=7, verbose=False)) == dynamic_names(model)


@pytest.mark.parametrize("classes", [80, 5])
def test_static_weights_are_a_start(ultralytics, classes):
    """Also where a head for another number of classes is as wide as the weights have it, and is replaced."""
    static = static_network(ultralytics, "yolo11n.yaml").float()
    yaml = yolo.convert(copy.deepcopy(static), kernel_num=2).yaml
    model = ultralytics.nn.tasks.DetectionModel(yaml, nc=classes, verbose=False)
    expected = dynamic_names(model)
    model.load(static, verbose=False)
    plain = ultralytics.nn.tasks.DetectionModel("yolo11n.yaml", nc=classes, verbose=False)
    plain.load(static, verbose=False)
    last = {key: value for key, value in plain.state_dict().items() if re.search(r"cv3\.\d\.2\.", key)}
    model.load_state_dict(last, strict=False)  # drawn anew for other classes
    assert dynamic_names(model) == expected
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(boxes(model.eval(), x), boxes(plain.eval(), x), rtol=1e-3, atol=1e-3)


def test_dynamic_layers_that_are_lost_are_named(ultralytics, caplog):
    model = static_network(ultralytics).float()
    model.model[1].conv = odconv.ODConv2d(16, 32, 3, 2, 1)
    fresh = ultralytics.nn.tasks.DetectionModel("yolov8n.yaml", verbose=False)
    yolo.register()
    with caplog.at_level("WARNING", "ultralytics"):
        fresh.load(model)
    assert "1 dynamic layers of the weights are lost" in caplog.text
    assert "model.1.conv" in caplog.text


# --- training, validation, export


@pytest.fixture(scope="module")
def detection_data(shared_data, tmp_path_factory):
    """COCO-mini in YOLO's layout: a YAML file beside images and labels."""
    folder = tmp_path_factory.mktemp("coco")
    names = []
    for split in ("train2017", "val2017"):
        source = shared_data / "coco-mini"
        content = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        number = {category["id"]: index for index, category in enumerate(content["categories"])}
        names = [category["name"] for category in content["categories"]]
        labels: dict = {image["id"]: [] for image in content["images"]}
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for box in content["annotations"]:
            if not box["iscrowd"]:
                (x, y, w, h), (width, height) = box["bbox"], sizes[box["image_id"]]
                row = (number[box["category_id"]], (x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                labels[box["image_id"]].append(" ".join(map(str, row)))
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for image in content["images"]:
            file = Path(image["file_name"])
            (folder / "images" / split / file).symlink_to((source / split / file).resolve())
            (folder / "labels" / split / file.with_suffix(".txt")).write_text("\n".join(labels[image["id"]]))
    splits = {"train": "images/train2017", "val": "images/val2017"}
    (folder / "data.yaml").write_text(json.dumps({"path": str(folder), "names": dict(enumerate(names)), **splits}))
    return folder / "data.yaml"


QUICK = {"imgsz": 64, "batch": 8, "workers": 0, "device": "cpu", "plots": False, "verbose": False}


@pytest.mark.parametrize("n", [1, 4])
def test_a_converted_network_trains_validates_and_exports(ultralytics, detection_data, tmp_path, n):
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            model = yolo.convert(super().get_model(cfg, weights, verbose), kernel_num=n)
            if weights is not None:
                model.load(weights)
            self.first = {key: value.clone() for key, value in model.state_dict().items()}
            return model

    network = ultralytics.YOLO("yolov8n.yaml")
    options = QUICK | {"data": str(detection_data), "project": str(tmp_path), "name": "run"}
    network.train(trainer=Trainer, epochs=1, warmup_epochs=0, **options)
    blocks = [module for module in network.model.modules() if isinstance(module, yolo.DynamicBlock)]
    assert len(blocks) == 56
    assert {block.conv.kernel_num for block in blocks} == {n}
    learnt = network.model.state_dict()
    for key in ("model.1.conv.weight", "model.1.conv.attention.filter_fc.weight"):
        assert (learnt[key] - network.trainer.first[key]).abs().max() > 1e-4

    again = ultralytics.YOLO(tmp_path / "run" / "weights" / "last.pt")
    metrics = again.val(**options)
    assert 0 <= metrics.box.map <= 1
    trainer = Trainer(overrides=options | {"model": str(tmp_path / "run" / "weights" / "last.pt"), "epochs": 1})
    loaded = trainer.get_model(again.model.yaml, again.model, verbose=False).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in again.model.state_dict().items())

    x = torch.rand(2, 3, 64, 64)
    static = ultralytics.nn.tasks.DetectionModel("yolov8n.yaml", verbose=False)
    warm = trainer.get_model(static.yaml, static, verbose=False).eval()
    torch.testing.assert_close(boxes(warm, x), boxes(static.eval(), x), rtol=1e-3, atol=1e-3)
    expected = boxes(again.model.eval(), x)
    yolo.fuse(again.model)
    exported = torch.jit.load(again.export(format="torchscript", imgsz=64, device="cpu"))
    assert not any("odconv::" in node.kind() for node in exported.inlined_graph.nodes())  # runs without odconv
    torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory):
    """Eight images to train on and four to evaluate on, of one bright box each, in two classes."""
    folder = tmp_path_factory.mktemp("boxes")
    random = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 4}.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            x, y, w, h = *random.integers(0, 32, 2), *random.integers(16, 32, 2)
            pixels = random.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            pixels[y : y + h, x : x + w, i % 2] = 250
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            row = (i % 2, (x + w / 2) / 64, (y + h / 2) / 64, w / 64, h / 64)
            (folder / "labels" / split / f"{i}.txt").write_text(" ".join(map(str, row)))
    content = {"path": str(folder), "train": "images/train", "val": "images/val", "names": {0: "red", 1: "green"}}
    (folder / "data.yaml").write_text(json.dumps(content))
    return folder / "data.yaml"


def kernels(model, name="model.1.conv"):
    return model.get_submodule(name).weight.detach().clone()


def train_drawn(network, drawn_data, tmp_path, **options):
    """The network after training, and what it was when training began."""
    begun = {}

    def remember(trainer):
        begun.update({key: value.detach().clone() for key, value in trainer.model.state_dict().items()})

    network.add_callback("on_train_start", remember)
    own = {"data": str(drawn_data), "project": str(tmp_path), "epochs": 1, "warmup_epochs": 0, "amp": False}
    network.train(**QUICK | {"batch": 4} | own | options)
    return network.model, begun


def test_plain_training_keeps_a_conversion(ultralytics, drawn_data, tmp_path):
    torch.manual_seed(0)
    network = ultralytics.YOLO("yolo11n.yaml")
    yolo.convert(network.model, kernel_num=2)
    expected, first = dynamic_names(network.model), kernels(network.model)
    model, begun = train_drawn(network, drawn_data, tmp_path, name="run", epochs=2)
    assert dynamic_names(model) == expected
    assert torch.equal(begun["model.1.conv.weight"], first)  # from the very kernels that were there
    assert (kernels(model) - first).abs().max() > 1e-4
    assert model.names == {0: "red", 1: "green"}

    again = ultralytics.YOLO(tmp_path / "run" / "weights" / "best.pt")
    assert dynamic_names(again.model) == expected
    assert torch.equal(kernels(again.model), kernels(model))
    assert 0 <= again.val(**QUICK | {"data": str(drawn_data)}).box.map <= 1
    image = drawn_data.parent / "images" / "val" / "0.png"
    assert again.predict(image, imgsz=64, device="cpu", verbose=False)[0].orig_shape == (64, 64)
    x = torch.rand(2, 3, 64, 64)
    again = ultralytics.YOLO(tmp_path / "run" / "weights" / "best.pt")
    exported = torch.jit.load(again.export(format="torchscript", imgsz=64, device="cpu"))
    torch.testing.assert_close(exported(x), boxes(again.model.eval(), x), rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_a_converted_checkpoint(ultralytics, drawn_data, tmp_path):
    torch.manual_seed(0)
    network = ultralytics.YOLO("yolo11n.yaml")
    yolo.convert(network, kernel_num=2)
    network.save(tmp_path / "converted.pt")
    options = {**QUICK, "data": str(drawn_data), "project": str(tmp_path), "name": "run", "epochs": 1, "amp": False}
    options |= {"batch": 4, "warmup_epochs": 0}
    program = f"""
import ultralytics
ultralytics.YOLO({str(tmp_path / "converted.pt")!r}).train(**{options})
"""  # nothing of odconv: the checkpoint brings it
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = ultralytics.YOLO(tmp_path / "run" / "weights" / "last.pt")
    assert dynamic_names(last.model) == dynamic_names(network.model)
    assert 1e-4 < (kernels(last.model) - kernels(network.model)).abs().max() < 1
    model, begun = train_drawn(last, drawn_data, tmp_path, name="drawn anew", pretrained=False)
    assert dynamic_names(model) == dynamic_names(network.model)
    assert (begun["model.1.conv.weight"] - kernels(network.model)).abs().max() > 0.01


def test_training_stops_and_resumes(ultralytics, drawn_data, tmp_path):
    network = yolo.convert(ultralytics.YOLO("yolov8n.yaml"), kernel_num=2)

    class Stopped(Exception):
        pass

    def stop(trainer):
        raise Stopped

    network.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        train_drawn(network, drawn_data, tmp_path, name="run", epochs=2)
    last = ultralytics.YOLO(tmp_path / "run" / "weights" / "last.pt")
    weights = last.model.state_dict()
    begun = {}
    last.add_callback("on_train_start", lambda trainer: begun.update(copy.deepcopy(trainer.ema.ema.state_dict())))
    last.train(resume=True)
    assert last.trainer.start_epoch == 1
    assert dynamic_names(last.model) == dynamic_names(network.model)
    torch.testing.assert_close(begun["model.1.conv.weight"], weights["model.1.conv.weight"])


def test_training_starts_from_static_weights(ultralytics, drawn_data, tmp_path):
    torch.manual_seed(0)
    static = ultralytics.YOLO("yolo11n.yaml")
    static.save(tmp_path / "static.pt")
    network = ultralytics.YOLO("yolo11n.yaml").load(tmp_path / "static.pt")
    yolo.convert(network, "condconv", kernel_num=2)
    expected = dynamic_names(network.model)
    model, begun = train_drawn(network, drawn_data, tmp_path)
    assert dynamic_names(model) == expected
    mixed = begun["model.1.conv.weight"].mean(0)  # of experts that are weighted by 1/2 each, which sum to n/2
    torch.testing.assert_close(mixed, kernels(static.model), rtol=1e-2, atol=1e-3)


def test_networks_with_rows_of_ours_train_as_they_did(ultralytics, drawn_data, tmp_path):
    yolo.register()
    (tmp_path / "yolov8n-rows.yaml").write_text(network_yaml("[-1, 1, C2f_ODConv, [128, True, {kernel_num: 2}]]"))
    network = ultralytics.YOLO(tmp_path / "yolov8n-rows.yaml")
    expected = dynamic_names(network.model)
    model, _ = train_drawn(network, drawn_data, tmp_path)
    assert dynamic_names(model) == expected
    assert "model.1.m.0.cv1.conv" in expected


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_onnx_with_a_dynamic_batch_and_size(ultralytics, name, n):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    network = ultralytics.YOLO(name)
    stirred(yolo.convert(network.model, kernel_num=n)).eval()
    inputs = [torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 96), torch.rand(5, 3, 96, 64)]
    expected = [boxes(network.model, x) for x in inputs]
    file = network.export(format="onnx", dynamic=True, simplify=False, imgsz=64, device="cpu")
    session = runtime.InferenceSession(file)
    for x, y in zip(inputs, expected, strict=True):
        exported = session.run(None, {"images": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(exported), y, rtol=1e-3, atol=1e-3)


# --- the page


def run(snippets, names):
    for snippet in snippets:
        exec(compile(snippet, "yolo.md", "exec"), names)


def test_the_snippets_without_ultralytics_run():
    own = [snippet for snippet in SNIPPETS if not re.search("ultralytics|network|Trainer", snippet)]
    assert len(own) == 2
    run(own, {})


@pytest.mark.slow
def test_the_snippets_with_ultralytics_run(ultralytics, detection_data, tmp_path):
    (tmp_path / "yolov8n-od.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)[0])
    (tmp_path / "data.yaml").write_text(detection_data.read_text())
    snippets = SNIPPETS
    small = "epochs=1, imgsz=64, batch=8, workers=0, device='cpu', plots=False"
    small += f", project={str(tmp_path)!r}"
    for long, short in (("epochs=100, imgsz=640", small), ("network.val()", f"network.val({small})"), ("=640", "=64")):
        snippets = [snippet.replace(long, short) for snippet in snippets]
    assert sum("epochs=1," in snippet for snippet in snippets) == 2
    run(snippets, {})
