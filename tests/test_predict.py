"""Predictions: the same from every kind of file, of every kind of image, in every form of output."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack

import numpy as np
import pytest
import tiny
import torch
from hostile_images import postscript, progressive
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from small_runs import OPTIONS
from torch import nn

import odconv
from odconv.app.classify import evaluate, train
from odconv.app.cli import main
from odconv.app.data import evaluation_transform, normalise, read_image, read_pixels
from odconv.app.data.parallel import ahead
from odconv.app.predict import Classifier, Prediction, Predictions, Unreadable, load_classifier, predict
from odconv.app.predict.rows import shown, writing_rows
from odconv.checkpoints import save_safetensors
from odconv.export import export_onnx, export_torch

CPU = torch.device("cpu")
NAME = tiny.DYNAMIC
NOTES = {
    "arch": "tiny",
    "classes": ["one", "two"],
    "image_size": 16,
    "resize_size": 20,
    "mean": [0.5] * 3,
    "std": [1] * 3,
}


class Colours(nn.Module):
    """How red, green and blue an image is, doubled to make it sure."""

    def forward(self, images):
        return 20 * images.mean((2, 3))


def colours(**options) -> Classifier:
    """A classifier that says what an image is most: red, green or blue."""
    names = {"name": "colours", "classes": ["red", "green", "blue"], "mean": [0.0] * 3, "std": [1.0] * 3}
    sizes = {"image_size": 8, "resize_size": 8}
    return Classifier(**{**names, **sizes, "compute": Colours(), "device": CPU} | options)


def best(prediction: Prediction | Unreadable) -> str:
    assert isinstance(prediction, Prediction), prediction
    return prediction.guesses[0].name


def save(path: Path, colour: object = "red", size: tuple[int, int] = (12, 10), mode: str = "RGB", **options) -> Path:
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


# --- what it says


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network that has more outputs than there are classes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(**OPTIONS | {"num_classes": 5}, data=str(folder), out=str(out))
    return out


def test_a_run_predicts_what_it_was_evaluated_with(run: Path, folder: Path) -> None:
    classifier = load_classifier(str(run / "last.ckpt"))
    assert (classifier.name, classifier.classes) == (NAME, ["bar", "dot", "gap", "class 3", "class 4"])
    surprise = []
    for name in ("bar", "dot", "gap"):
        for prediction in Predictions(classifier, [folder / "val" / name], batch_size=3):
            percents = {guess.name: guess.percent for guess in prediction.guesses}
            assert sum(percents.values()) == pytest.approx(100, abs=1e-3)
            assert list(percents.values()) == sorted(percents.values(), reverse=True)
            surprise.append(-math.log(percents[name] / 100))
    loss = evaluate(weights=str(run / "last.ckpt"), data=str(folder), workers=0)["loss"]
    assert len(surprise) == 15
    assert sum(surprise) / len(surprise) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("fixed", [None, 1, 4])
def test_the_order_is_kept_whatever_the_batches(fixed: int | None, workers: int, tmp_path: Path) -> None:
    wanted = {tmp_path / f"{i:02}.png": ("red", "green", "blue")[i * i % 3] for i in range(23)}
    for path, colour in wanted.items():
        save(path, {"green": "lime"}.get(colour, colour))
    sizes: list[int] = []

    def compute(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return Colours()(images)

    rows = Predictions(colours(compute=compute, batch=fixed), [tmp_path], batch_size=7, workers=workers)
    assert {row.image: best(row) for row in rows} == wanted
    assert [row.image for row in rows] == sorted(wanted)  # again
    assert set(sizes) == {fixed or 7, fixed or 2}
    assert rows.read == 23
    assert rows.computed > 0


def test_a_network_that_overflows_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"colours gives logits that are no finite numbers, near .*x\.png"):
        list(Predictions(colours(compute=lambda images: images.mean((2, 3)) * math.inf), [tmp_path]))


def test_reading_ahead_is_bounded_and_ends_early() -> None:
    asked: list[int] = []
    numbers = iter(range(10**9))

    def arguments():
        for number in numbers:
            asked.append(number)
            yield number

    results = ahead(lambda number: 2 * number, arguments(), threads=2, count=5)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(asked) <= 10 + 6
    before = threading.active_count()
    results.close()
    assert threading.active_count() == before - 2


# --- where networks come from


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = odconv.create_model(NAME, kernel_num=2, num_classes=7, stem="small").eval()
    for name, parameter in model.named_parameters():
        if "_fc.weight" in name:
            nn.init.normal_(parameter, std=0.1)  # attentions that depend on the image
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # takes the statistics of what comes
    nn.init.normal_(model.classifier[1].weight, std=1.0)
    odconv.set_temperature(model, 2.0)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def assert_computes(classifier: Classifier, model: nn.Module, pixels: torch.Tensor, mean=None, std=None) -> None:
    norm = {"mean": mean, "std": std} if mean else {}
    with torch.no_grad():
        wanted = model(normalise(pixels, **norm))
    assert wanted.std() > 0.1
    torch.testing.assert_close(classifier(pixels), wanted, rtol=1e-3, atol=1e-4)


def test_weights_of_every_kind(network: nn.Module, pixels: torch.Tensor, tmp_path: Path) -> None:
    hub = pytest.importorskip("odconv.hub")
    known = {"arch": NAME, "kernel_num": 2, "stem": "small", "image_size": 32, "resize_size": 32}
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "t.tar"
    )
    save_safetensors(network, tmp_path / "net.safetensors")
    shared = hub.HubModel(NAME, kernel_num=2, num_classes=7, stem="small", weights=tmp_path / "net.safetensors")
    shared.save_pretrained(tmp_path / "hub", model_card_kwargs={"image_size": 32})
    (tmp_path / "names.txt").write_text("\n".join("abcdefg") + "\n")
    for file, options in {
        "plain.pth": {**known, "temperature": 2.0},
        "t.tar": {**known, "temperature": 2.0},
        "net.safetensors": known,
        "hub": {"image_size": 32, "resize_size": 32, "classes": str(tmp_path / "names.txt")},
    }.items():
        classifier = load_classifier(str(tmp_path / file), **options)
        assert_computes(classifier, network, pixels)
        assert classifier.name == NAME
        assert classifier.model is not None
        assert classifier.classes == (list("abcdefg") if "classes" in options else [f"class {i}" for i in range(7)])
    warm = load_classifier(str(tmp_path / "hub"), temperature=9.0)
    assert (warm(pixels) - classifier(pixels)).abs().max() > 0.1


def test_a_repository_of_the_hub(
    network: nn.Module, pixels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("odconv.hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "cache" / "models--someone--flowers"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    save_safetensors(network, tmp_path / "net.safetensors")
    shared = hub.HubModel(NAME, kernel_num=2, num_classes=7, stem="small", weights=tmp_path / "net.safetensors")
    shared.save_pretrained(root / "snapshots" / commit, model_card_kwargs={"image_size": 32})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("someone/flowers", "hf://someone/flowers"):
        assert_computes(load_classifier(name, image_size=32, resize_size=32), network, pixels)
    with pytest.raises(FileNotFoundError, match="someone/trees is no file, and the Hugging Face Hub gives no"):
        load_classifier("someone/trees")


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), odconv.ODConv2d(4, 4, 3, kernel_num=2, norm="none"), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)).eval()


@pytest.fixture(scope="module")
def exported(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    options = {"metadata": NOTES, "check": False}
    export_onnx(tiny, folder / "any.onnx", (3, 16, 16), dynamic_size=True, **options)
    export_torch(tiny, folder / "any.pt2", (3, 16, 16), dynamic_size=True, **options)
    export_torch(tiny, folder / "one.pt2", (3, 16, 16), dynamic_batch=False, **options)
    export_torch(tiny, folder / "bare.pt2", (3, 16, 16), check=False)
    return folder


def test_another_size_is_resized_in_proportion(run: Path, network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    known = {"arch": NAME, "kernel_num": 2, "stem": "small"}
    recorded = OPTIONS["image_size"], OPTIONS["resize_size"]
    for weights, options, wanted in [
        (run / "last.ckpt", {}, recorded),
        (run / "last.ckpt", {"image_size": 2 * recorded[0]}, (2 * recorded[0], 2 * recorded[1])),
        (run / "last.ckpt", {"image_size": 8, "resize_size": 8}, (8, 8)),
        (tmp_path / "plain.pth", known, (224, 256)),
        (tmp_path / "plain.pth", known | {"image_size": 112}, (112, 128)),
    ]:
        classifier = load_classifier(str(weights), **options)
        assert (classifier.image_size, classifier.resize_size) == wanted


@pytest.mark.parametrize("name", ["any.onnx", "any.pt2", "one.pt2"])
def test_exported_files_say_what_they_need(name: str, exported: Path, tiny: nn.Module, caplog) -> None:
    trust = name.endswith(".pt2")
    classifier = load_classifier(str(exported / name), trust=trust)
    assert (classifier.name, classifier.classes) == ("tiny", ["one", "two"])
    assert (classifier.image_size, classifier.resize_size) == (16, 20)
    assert classifier.batch == (1 if name.startswith("one") else None)
    for batch in (1, 2, 5):
        pixels = torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)
        assert_computes(classifier, tiny, pixels, NOTES["mean"], NOTES["std"])
    assert not [record for record in caplog.records if record.name.startswith("odconv")]
    if name.startswith("any"):
        larger = load_classifier(str(exported / name), image_size=24, trust=trust)
        assert (larger.image_size, larger.resize_size) == (24, 30)  # in proportion
        assert_computes(larger, tiny, torch.zeros(3, 3, 24, 24, dtype=torch.uint8), NOTES["mean"], NOTES["std"])
    else:
        with pytest.raises(ValueError, match=r"image_size must be 16, the only size that .*one.* takes, got 24"):
            load_classifier(str(exported / name), image_size=24, trust=trust)
    with pytest.raises(ValueError, match="is an exported network; leave out arch, temperature"):
        load_classifier(str(exported / name), arch="od_resnet18", temperature=1.0)


def test_what_a_file_does_not_say_is_assumed_and_said(exported: Path, tiny: nn.Module, caplog) -> None:
    classifier = load_classifier(str(exported / "bare.pt2"), trust=True)
    assert_computes(classifier, tiny, torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    assert classifier.classes == ["class 0", "class 1"]
    assert "assumed: resize_size = 18, mean = (0.485, 0.456, 0.406), std = (0.229, 0.224, 0.225)" in caplog.text
    assert "image_size" not in caplog.text.split("assumed")[1]


@pytest.mark.slow
def test_packages_of_aotinductor(tiny: nn.Module, tmp_path: Path, caplog) -> None:
    options = {"compiled": True, "check": False}
    export_torch(tiny, tmp_path / "any.pt2", (3, 16, 16), metadata=NOTES, dynamic_size=True, **options)
    export_torch(tiny, tmp_path / "one.pt2", (3, 16, 16), metadata=NOTES, dynamic_batch=False, **options)
    for name in ("any.pt2", "one.pt2"):
        classifier = load_classifier(str(tmp_path / name), trust=True)
        assert (classifier.name, classifier.classes, classifier.resize_size) == ("tiny", ["one", "two"], 20)
        assert classifier.batch == (1 if name == "one.pt2" else None)
        for batch in (1, 2, 5):
            pixels = torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)
            assert_computes(classifier, tiny, pixels, NOTES["mean"], NOTES["std"])
    assert not [record for record in caplog.records if record.name.startswith("odconv")]
    program = torch.export.export(tiny, (torch.ones(1, 3, 16, 16),))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "others.pt2"))
    classifier = load_classifier(str(tmp_path / "others.pt2"), image_size=16, trust=True)
    assert "batch = 1" in caplog.text
    assert_computes(classifier, tiny, torch.zeros(3, 3, 16, 16, dtype=torch.uint8))


# --- files of others


def others(path: Path, inputs: dict, outputs: dict, nodes: list[tuple], dtype: str = "FLOAT") -> str:
    """Write an ONNX file of a few nodes: (operator, inputs, outputs, attributes)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kind = getattr(onnx.TensorProto, dtype)

    def values(shapes: dict) -> list:
        return [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]

    made = [onnx.helper.make_node(kind, given, result, **options) for kind, given, result, options in nodes]
    graph = onnx.helper.make_graph(made, "graph", values(inputs), values(outputs))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    model.metadata_props.add(key="mean", value="none of yours")  # text of others, under our name
    path.write_bytes(model.SerializeToString())
    return str(path)


def means(given: str = "x", result: str = "y") -> list[tuple]:
    return [("GlobalAveragePool", [given], ["pooled"], {}), ("Flatten", ["pooled"], [result], {})]


@pytest.mark.parametrize(
    ("dtype", "batch", "side"), [("FLOAT", "N", "S"), ("FLOAT16", "N", "S"), ("FLOAT", 4, 8), ("FLOAT", 1, "S")]
)
def test_onnx_files_of_others(dtype: str, batch: int | str, side: int | str, tmp_path: Path, caplog) -> None:
    shape = [batch, 3, side, side]
    file = others(tmp_path / "x.onnx", {"any name": shape}, {"y": [batch, 3]}, means("any name"), dtype)
    classifier = load_classifier(file, **{} if side == 8 else {"image_size": 8, "resize_size": 8})
    assert classifier.image_size == 8
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    expected = normalise(pixels).mean((2, 3))
    torch.testing.assert_close(classifier(pixels), expected, rtol=1e-3, atol=2e-3)
    assert "mean = (0.485, 0.456, 0.406)" in caplog.text


IMAGES = {"x": ["N", 3, 8, 8]}
REFUSED = {
    "several inputs": (
        *(IMAGES | {"mask": [1]}, {"y": ["N", 3]}, means()),
        "must have one input, the images, but it has x, mask",
    ),
    "another rank": (
        *({"x": ["N", 3]}, {"y": ["N", 3]}, [("Relu", ["x"], ["y"], {})]),
        r"must take images \(batch, 3, side, side\), but it takes \(any, 3\)",
    ),
    "channels last": ({"x": ["N", 8, 8, 3]}, {"y": ["N", 8]}, means(), r"but it takes \(any, 8, 8, 3\)"),
    "another size": ({"x": ["N", 3, 8, 9]}, {"y": ["N", 3]}, means(), r"but it takes \(any, 3, 8, 9\)"),
    "no classes": (
        *(IMAGES, {"y": ["N", 3, 8, 8]}, [("Relu", ["x"], ["y"], {})]),
        r"must give logits \(batch, classes\), but it gives \(1, 3, 8, 8\)",
    ),
    "several outputs": (
        *(IMAGES, {"y": ["N", 3], "z": ["N", 3]}, [*means(), ("Relu", ["y"], ["z"], {})]),
        "must have one output, or one called logits, but it has y, z",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_onnx_files_that_are_no_classifiers(case: str, tmp_path: Path) -> None:
    inputs, outputs, nodes, message = REFUSED[case]
    file = others(tmp_path / "x.onnx", inputs, outputs, nodes)
    with pytest.raises(ValueError, match=message):
        load_classifier(file)


def test_numbers_that_are_no_images(tmp_path: Path) -> None:
    file = others(tmp_path / "x.onnx", IMAGES, {"y": ["N", 3, 8, 8]}, [("Not", ["x"], ["y"], {})], "BOOL")
    with pytest.raises(ValueError, match=r"the input x of .* must be float32 or float16, got tensor\(bool\)"):
        load_classifier(file)


def test_the_output_called_logits_counts(tmp_path: Path) -> None:
    nodes = [("Relu", ["x"], ["maps"], {}), *means("maps", "logits")]
    file = others(tmp_path / "x.onnx", IMAGES, {"maps": ["N", 3, 8, 8], "logits": ["N", 3]}, nodes)
    assert load_classifier(file)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 3)


def test_files_that_are_none(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "cut.pt2").write_bytes((exported / "any.pt2").read_bytes()[:5000])
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("notes.txt", "no network")
    for name, message in {
        "text.onnx": "onnxruntime cannot",
        "cut.pt2": "cut short",
        "other.pt2": "PyTorch cannot",
    }.items():
        with pytest.raises(OSError, match=message) as caught:
            load_classifier(str(tmp_path / name), trust=True)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.onnx"):
        load_classifier(str(tmp_path / "missing.onnx"))


def with_code(program: Path, path: Path, member: str, before: bytes, after: bytes) -> Path:
    """Write a copy of a program of torch.export in which some bytes of a member are others."""
    with zipfile.ZipFile(program) as given, zipfile.ZipFile(path, "w") as made:
        for name in given.namelist():
            content = given.read(name)
            if name.endswith(member):
                assert before in content
                content = content.replace(before, after)
            made.writestr(name, content)
    return path


class Code:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_no_exported_file_runs_code_unless_it_is_trusted(exported: Path, tmp_path: Path, capsys) -> None:
    ran, pickled = tmp_path / "ran", io.BytesIO()
    torch.save(Code(ran), pickled)
    with zipfile.ZipFile(exported / "any.pt2") as archive:
        names = {part: name for name in archive.namelist() for part in ("sample_inputs", "model.json") if part in name}
        sample, model = (archive.read(names[part]) for part in ("sample_inputs", "model.json"))
    size = re.findall(rb"Symbol\('s\d+', positive=True, integer=True\)", model)[0]
    hostile = {
        "pickle.pt2": (names["sample_inputs"], sample, pickled.getvalue()),
        "size.pt2": (names["model.json"], size, f"__import__('pathlib').Path('{ran}').touch() or ".encode() + size),
    }
    image = str(save(tmp_path / "red.png"))
    for name, change in hostile.items():
        file = with_code(exported / "any.pt2", tmp_path / name, *change)
        with pytest.raises(ValueError, match=rf"{name} can run code when it is opened.* --trust"):
            load_classifier(str(file))
        assert main(["predict", image, "--weights", str(file)]) == 1
        with pytest.raises(OSError, match="onnxruntime cannot read"):  # the name decides
            load_classifier(str(file.rename(tmp_path / "renamed.onnx")))
        assert not ran.exists()
        with suppress(Exception):  # of PyTorch, about what the code gave back
            torch.export.load(io.BytesIO((tmp_path / "renamed.onnx").read_bytes()))
        assert ran.exists(), "the file is as harmless as others"
        ran.unlink()
    assert "if you trust its source" in capsys.readouterr().err
    assert main(["predict", image, "--weights", str(exported / "any.pt2"), "--trust"]) == 0


def test_weights_that_do_not_fit(network: nn.Module, run: Path, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    fits = f"it fits --arch {NAME} --kernel_num"
    with pytest.raises(ValueError, match=f"arch must be given, since .*plain.pth holds weights alone; {fits} 2"):
        load_classifier(str(tmp_path / "plain.pth"))
    with pytest.raises(ValueError, match="does not fit the MobileNetV2") as caught:
        load_classifier(str(tmp_path / "plain.pth"), arch="mobilenetv2_050")
    assert "the file is of a dynamic network, the model is static" in str(caught.value)
    assert f"{fits} 2" in str(caught.value)
    with pytest.raises(ValueError, match=f"arch must be {NAME}, the network of .*last.ckpt, got od_resnet18"):
        load_classifier(str(run / "last.ckpt"), arch="od_resnet18")
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json and no model\.safetensors; did you mean .*best\.ckpt"
    ):
        load_classifier(str(run))
    hyper = {"detector": "mask_rcnn", "arch": "od_resnet50"}
    torch.save({"state_dict": {"w": torch.ones(2, 2)}, "hyper_parameters": hyper, "odconv": {}}, tmp_path / "d.ckpt")
    with pytest.raises(ValueError, match=r"d\.ckpt is a detector, mask_rcnn: see odconv detect"):
        load_classifier(str(tmp_path / "d.ckpt"))
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"classes must be a file of 5 lines, one an output, but .*names\.txt has 2"):
        load_classifier(str(run / "last.ckpt"), classes=str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match="resize_size must be at least image_size = 300, got 256"):
        load_classifier(str(run / "last.ckpt"), image_size=300, resize_size=256)


def test_temperatures_and_sizes_of_nothing_are_refused(run: Path, tmp_path: Path) -> None:
    for name in ("kernel_num", "reduction", "image_size", "resize_size", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
            load_classifier(str(run / "last.ckpt"), **{name: 0})
    static = odconv.create_model("mobilenetv2_050", num_classes=5)
    torch.save(static.state_dict(), tmp_path / "static.pth")
    with pytest.raises(ValueError, match="temperature must not be given: no layer of mobilenetv2_050 has one"):
        load_classifier(str(tmp_path / "static.pth"), arch="mobilenetv2_050", temperature=1.0)
    for name in ("top", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            predict(["x.png"], weights=str(run / "last.ckpt"), **{name: 0})


# --- what is written


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A red, a green and a blue image, one of them with a name of two lines and one with letters of another script."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    save(folder / "red\n, tall.png", "red")
    save(folder / "\u7eff [1].png", "lime")
    save(folder / "more" / "blue.png", "blue")
    (folder / "broken.png").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """An ONNX file that says what colour an image is."""
    scale = [("Constant", [], ["scale"], {"value_float": 20.0}), ("Mul", ["pale", "scale"], ["y"], {})]
    return others(tmp_path / "colours.onnx", {"x": ["N", 3, 8, 8]}, {"y": ["N", 3]}, [*means("x", "pale"), *scale])


NAMED = {"red\n, tall.png": "class 0", "\u7eff [1].png": "class 1", "more/blue.png": "class 2"}


def test_the_table(photos: Path, weights: str, capsys) -> None:
    given = [str(photos), str(photos / "nothing*"), str(photos / "more" / "blue.png"), str(photos / "*[[]1].png")]
    assert main(["predict", *given, "--weights", weights, "--top", "2"]) == 0
    shown = capsys.readouterr()
    rows = shown.out.splitlines()
    assert rows[0].split() == ["image", "%", "class"]
    assert rows[-1].startswith("3 images in ")
    assert "waiting for images" in rows[-1]
    assert rows[-1].endswith("3 left out that cannot be read")
    assert len(rows) == 2 + 3 * 2
    first = {row.split("  ")[0] for row in rows[1:-1] if not row.startswith(" ")}
    assert first == {f"{photos}/{name}" for name in ("red\\n, tall.png", "\u7eff [1].png", "more/blue.png")}
    for row in rows[1:-1:2]:
        assert float(row.split()[-3]) > 99
    for name in ("broken.png", "empty.jpg", "nothing*"):
        assert name in shown.err


def test_csv(photos: Path, weights: str, tmp_path: Path, capsys) -> None:
    rows = predict([str(photos)], weights=weights, top=9, out=str(tmp_path / "new" / "out.csv"), batch_size=2)
    assert rows.read == 3
    with (tmp_path / "new" / "out.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {str(Path(row["image"]).relative_to(photos)): row["class_1"] for row in table} == NAMED
    assert [row["image"] for row in table] == sorted(row["image"] for row in table)
    for row in table:
        assert sum(float(row[f"percent_{i}"]) for i in (1, 2, 3)) == pytest.approx(100, abs=1e-3)
    assert "class" not in capsys.readouterr().out


def test_json(photos: Path, weights: str, tmp_path: Path) -> None:
    strange = os.fsdecode(os.fsencode(photos) + b"/\xff.png")  # no UTF-8
    save(photos / "more" / "x.png").rename(strange)
    predict([str(photos), "nowhere"], weights=weights, out=str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text())
    said = {str(Path(row["image"]).relative_to(photos)): row["classes"][0]["class"] for row in written["images"]}
    assert said == NAMED | {Path(strange).name: "class 0"}
    assert written["images"][0]["classes"][0].keys() == {"class", "index", "percent"}
    reasons = {Path(row["image"]).name: row["reason"] for row in written["unreadable"]}
    assert reasons.keys() == {"broken.png", "empty.jpg", "nowhere"}
    assert "no image, or of an unknown kind" in reasons["broken.png"]
    assert written["network"] == "colours.onnx"
    assert written["seconds"]["computed"] > 0
    predict([strange], weights=weights, out=str(tmp_path / "out.csv"))
    assert b"\xff.png" in (tmp_path / "out.csv").read_bytes()


def test_files_are_written_whole_or_not_at_all(photos: Path, weights: str, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("before")
    with pytest.raises(ValueError, match="none of the images can be read"):
        predict([str(photos / "broken.png")], weights=weights, out=str(tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "colours.onnx", "out.csv"}
    for out, kind, message in (
        ("out.txt", ValueError, r"out must end in \.csv or \.json, got .*out\.txt"),
        ("colours.onnx/out.csv", OSError, "the output folder .*colours.onnx cannot be written"),
    ):
        with pytest.raises(kind, match=message):
            predict([str(photos)], weights="never read", out=str(tmp_path / out))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(IsADirectoryError, match="out must be a file"):
        predict([str(photos)], weights="never read", out=str(tmp_path / "folder.csv"))


def test_nothing_to_look_at(weights: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), "--weights", weights]) == 1
    errors = capsys.readouterr().err
    assert f"no image found at {tmp_path / 'empty'}" in errors
    assert "none of the images can be read" in errors
    assert main(["predict", "--weights", weights]) == 2
    assert "images" in capsys.readouterr().err


def test_a_terminal_gets_a_table_that_fits(photos: Path) -> None:
    names = ["[bold]red", ":green_heart:", "a name of a class that goes on and on"]
    predictions = Predictions(colours(classes=names), [photos])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, markup=False, emoji=False, highlight=False)
    with writing_rows(None, predictions, console) as write:
        for row in predictions:
            if isinstance(row, Prediction):
                write(row)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert all(cell_len(line) <= 80 for line in lines)
    for name in names:
        assert sum(name in line for line in lines) == 3


def test_names_can_be_printed() -> None:
    assert shown("a b\u00e9.png") == "a b\u00e9.png"
    assert shown("a\nb\x1b[31m\udcff") == r"a\nb\x1b[31m\udcff"


# --- images of every kind


def test_images_of_every_kind(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (9, 8), (0, 0, 255, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 9, 7))  # red, and a line of white
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "lime", "blue")]
    palette = Image.new("P", (9, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 9, 1))
    save(tmp_path / "rgb.png")
    save(tmp_path / "one pixel.png", size=(1, 1))
    save(tmp_path / "cmyk.jpg", mode="CMYK", quality=95)
    save(tmp_path / "cmyk.tiff", mode="CMYK")
    clear.save(tmp_path / "clear.png")
    clear.save(tmp_path / "clear.webp", lossless=True)
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "palette.gif", transparency=0)
    for suffix in ("gif", "webp", "png", "tiff"):
        frames[0].save(tmp_path / f"animated.{suffix}", save_all=True, append_images=frames[1:])
    (tmp_path / "16 bits.png").write_bytes(png16(np.full((8, 9, 3), [65535, 300, 200])))
    rows = list(Predictions(colours(), [tmp_path]))
    assert {row.image.name: best(row) for row in rows} == dict.fromkeys(os.listdir(tmp_path), "red")
    assert all(row.guesses[0].percent > 99 for row in rows)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits(suffix: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    if suffix == "png":
        (tmp_path / "x.png").write_bytes(png16(ramp))
    else:
        Image.fromarray(ramp).save(tmp_path / "x.tiff")
    read = np.asarray(read_image(tmp_path / f"x.{suffix}"))
    assert np.array_equal(read, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, grey (H, W) or colour (H, W, 3), which Pillow reads but does not write."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return png(header, zlib.compress(lines))


def png(header: bytes, content: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


TURNED = {  # what EXIF says of a picture, and how to store one that is red on top
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_photographs_are_turned_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 24), "lime")
    picture.paste("red", (0, 0, 16, 8))
    picture.paste("blue", (0, 8, 8, 24))
    turn = TURNED[orientation]
    stored = picture if turn is None else picture.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **{"quality": 95} if suffix != "png" else {})
    seen = {}

    def compute(images: torch.Tensor) -> torch.Tensor:
        top, left, right = images[0, :, :2], images[0, :, 4:, :3], images[0, :, 4:, -3:]
        seen.update(top=top.mean((1, 2)), left=left.mean((1, 2)), right=right.mean((1, 2)))
        return images.mean((2, 3))

    list(Predictions(colours(compute=compute), [tmp_path], workers=0))
    assert {where: int(colour.argmax()) for where, colour in seen.items()} == {"top": 0, "left": 2, "right": 1}
    as_stored = read_image(tmp_path / f"x.{suffix}")  # data sets are read as they are
    if suffix != "tiff":
        assert as_stored.size == stored.size


def test_damaged_exif_is_no_reason_to_lose_an_image(tmp_path: Path) -> None:
    save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\xff\xff\xff\xff\xff")
    (row,) = Predictions(colours(), [tmp_path])
    assert best(row) == "red"


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 5_000)])
def test_long_images_stay_small(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "lime")
    middle = tuple(extent // 2 for extent in size)
    image.paste("red", tuple(max(0, m - 40) for m in middle) + tuple(m + 40 for m in middle))
    prepared = colours(image_size=224, resize_size=256).prepare(image)
    assert prepared.shape == (3, 224, 224)
    assert prepared[0].min() == 255


def test_images_that_are_not_too_long_are_prepared_as_for_evaluation() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 240, 3), dtype=np.uint8))
    assert torch.equal(colours().prepare(image), evaluation_transform(8, 8)(image))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "gif", "webp", "tiff"):
        noise.save(tmp_path / f"cut.{suffix}")
        whole = (tmp_path / f"cut.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "nothing")
    rows = list(Predictions(colours(), [tmp_path]))
    assert {row.image.name for row in rows} == set(os.listdir(tmp_path))
    for row in rows:
        assert isinstance(row, Unreadable)
        assert str(row.image) in row.reason


def test_a_pipe_that_the_process_was_given_is_read_once() -> None:
    content = io.BytesIO()
    Image.new("RGB", (9, 8), "red").save(content, "PNG")
    for sent in (content.getvalue(), b""):
        read, write = os.pipe()
        path = Path(f"/dev/fd/{read}")
        os.write(write, sent)
        os.close(write)
        (row,) = Predictions(colours(), [path])
        os.close(read)
        if sent:
            assert best(row) == "red"
        else:
            assert row == Unreadable(path, f"unreadable image {path}: it is no image, or of an unknown kind")


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_what_has_no_end_is_refused_at_once(read: Callable, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # to which nobody writes
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.write(b"\xff\xd8")
        file.truncate(10**12)
    for name, reason in {
        "pipe.jpg": "it is no regular file, but a pipe or a device",
        "device.jpg": "it is no regular file, but a pipe or a device",
        "sparse.jpg": "it has 1,000,000,000,000 bytes, and 500,000,000 are allowed",
    }.items():
        start = time.perf_counter()
        with pytest.raises(OSError, match=f"unreadable image .*{name}: {reason}"):
            read(tmp_path / name)
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_only_listed_formats_are_read(read: Callable, tmp_path: Path, monkeypatch) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "drawing.jpg").write_bytes(postscript())
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    for source in (tmp_path / "drawing.jpg", (tmp_path / "drawing.jpg").read_bytes()):
        with pytest.raises(OSError, match="it is no image, or of an unknown kind"):
            read(source)
    assert not (tmp_path / "ran").exists()
    with suppress(OSError), Image.open(tmp_path / "drawing.jpg") as image:
        image.load()
    assert (tmp_path / "ran").exists(), "Pillow would not have started it"


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_a_jpeg_of_many_scans_is_refused_before_it_takes_seconds(read: Callable) -> None:
    with pytest.raises(OSError, match="its 500 scans of 4,000,000 pixels each take too long to decode"):
        read(progressive(2000, 500))
    read(progressive(2000, 50))


LIMITED = """
import resource, sys
from odconv.app.data import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1])
except OSError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_image_of_30000_by_30000_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    lines = zlib.compressobj(1)
    content = b"".join([lines.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)] + [lines.flush()])
    (tmp_path / "huge.png").write_bytes(png(pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0), content))
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "huge.png")]
    message, kilobytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "huge.png" in message
    assert "(900000000 pixels) exceeds limit of 178956970 pixels" in message
    assert int(kilobytes) < 20_000


# --- folders for exports


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_an_export_that_cannot_be_written_is_refused_before_the_work(
    form: str, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    traced: list[object] = []
    module = "odconv.export.onnx_file" if form == "onnx" else "odconv.export.torch_file"
    monkeypatch.setattr(f"{module}.trace", lambda *given: traced.append(given))
    suffix = {"onnx": ".onnx", "torch": ".pt2"}[form]
    (tmp_path / "file").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    for out, message in {
        f"file/net{suffix}": "the output folder .*file cannot be written",
        f"folder{suffix}": "path must be a file, got the folder",
    }.items():
        given = ["--weights", str(run / "last.ckpt"), "--format", form, "--out", str(tmp_path / out)]
        assert main(["export", *given]) == 1
        assert re.search(message, capsys.readouterr().err)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        given = [
            "--weights",
            str(run / "last.ckpt"),
            "--format",
            form,
            "--out",
            str(tmp_path / "locked" / f"x{suffix}"),
        ]
        assert main(["export", *given]) == 1
        assert "locked cannot be written: Permission denied" in capsys.readouterr().err
    assert not traced
