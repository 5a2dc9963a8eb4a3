"""Detectors trained, measured and used from the command line, on small data, in real processes."""

import csv
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from small_runs import checkpoint, same_weights, start, wait_until, weights

import odconv
from odconv.app.cli import main, parse_options
from odconv.app.detect import DetectConfig, evaluate, predict, train
from odconv.app.detect.coco import read_annotations
from odconv.app.detect.images import UNREADABLE, CocoImages
from odconv.app.detect.module import DetectorTraining
from odconv.app.detect.restore import RestoredDetector, build, coco_classes
from odconv.app.detect.schedule import learning_rate
from odconv.layers import Attention
from odconv.models.build import shapes_alone
from odconv.models.detectors import backbone, conventions

OPTIONS = {
    "detector": "mask_rcnn",
    "arch": "od_tiny",
    "kernel_num": 2,
    "min_size": [32],
    "max_size": 48,
    "anchor_sizes": [8, 12, 16, 24, 32],
    "options": {
        "rpn_post_nms_top_n_train": 16,
        "rpn_post_nms_top_n_test": 8,
        "box_batch_size_per_image": 8,
    },
    "batch_size": 2,
    "test_batch": 4,
    "epochs": 1,
    "lr": 0.002,
    "warmup_steps": 4,
    "clip": 5.0,
    "workers": 0,
}
PUBLISHED = {
    "faster_rcnn_resnet50": 43.80,
    "faster_rcnn_od_resnet50_4x": 108.91,
    "faster_rcnn_mobilenetv2_100": 21.13,
    "faster_rcnn_od_mobilenetv2_100_4x": 29.14,
    "mask_rcnn_resnet50": 46.45,
    "mask_rcnn_od_resnet50_4x": 111.56,
    "mask_rcnn_mobilenetv2_100": 23.78,
    "mask_rcnn_od_mobilenetv2_100_4x": 31.80,
}


def make_coco(root: Path, counts: dict[str, int], masks: bool = True, size: tuple[int, int] | None = None) -> Path:
    """Images of 44 x 32 or 32 x 44, or of one size, with a coloured rectangle on most."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": 4, "name": "red"}, {"id": 9, "name": "blue"}]
        (root / f"{split}2017").mkdir(parents=True)
        for i in range(count):
            height, width = size or ((32, 44) if i % 3 else (44, 32))
            pixels = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
            content["images"].append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
            if i != 1:
                x, y, label = int(random.integers(1, 12)), int(random.integers(1, 12)), i % 2
                pixels[y : y + 14, x : x + 18, 2 * label] = 255
                corners = [x, y, x + 18, y, x + 18, y + 14, x, y + 14]
                item = {"id": i, "image_id": 100 + i, "category_id": (4, 9)[label], "bbox": [x, y, 18, 14]}
                item |= {"area": 252, "iscrowd": 0} | ({"segmentation": [corners]} if masks else {})
                content["annotations"].append(item)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{i}.png")
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Make the pyramids of all detectors narrow, as they are in processes of `tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "CHANNELS", tiny.CHANNELS)
        yield


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"), {"train": 9, "val": 5})


@pytest.fixture(scope="module")
def run(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(**OPTIONS | {"epochs": 2}, data=str(coco), out=str(out))
    return out


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def flags(options: dict) -> dict[str, str]:
    return {name: json.dumps(value) if isinstance(value, (list, dict)) else value for name, value in options.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "CHANNELS", 256)
    given = parse_options("detect train", train, ["--config", name, "--data", "coco", "--out", "run"])
    config = DetectConfig(**given)
    assert name == f"{config.detector}_{config.arch}" + ("_4x" if config.kernel_num == 4 else "")
    assert (config.kernel_num == 4) == config.arch.startswith("od_")
    with shapes_alone():
        model = build(config, 80)
    classifier = 2.049 if "resnet" in name else 1.281
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6 + classifier
    assert abs(millions - PUBLISHED[name]) <= 0.02
    assert (model.transform.min_size, model.transform.max_size) == ([800], 1333)
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh, model.roi_heads.detections_per_img) == (
        0.05,
        0.5,
        100,
    )
    assert (config.epochs, config.batch_size, config.momentum, config.wd) == (12, 16, 0.9, 1e-4)
    assert (config.frozen_stages, config.norm_eval, config.augment) == (1, True, "flip")
    assert {part.initial_temperature for part in model.modules() if isinstance(part, Attention)} <= {1.0, None}
    assert (config.conventions, config.negatives, config.options) == (
        "mmdetection",
        False,
        {"rpn_post_nms_top_n_train": 1000},
    )
    steps = 7330  # in an epoch of 117,266 images
    for step in (0, 1, 250, 499):
        assert learning_rate(config, 0, step) == pytest.approx(0.02 * (1 - (1 - step / 500) * (1 - 0.001)))
    for epoch in range(12):
        expected = 0.02 * (1 if epoch < 8 else 0.1 if epoch < 11 else 0.01)
        assert learning_rate(config, epoch, max(500, epoch * steps)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("backbone", "budget"),
    [("resnet50", 1), ("resnet50", 4), ("mobilenetv2_100", 1), ("mobilenetv2_100", 4), ("convnext_tiny", 1)],
)
def test_published_recipes_of_kernel_warehouse(backbone: str, budget: int) -> None:
    name = f"mask_rcnn_kw_{backbone}_{budget}x"
    given = parse_options("detect train", train, ["--config", name, "--data", "coco", "--out", "run"])
    config = DetectConfig(**given)
    assert (config.detector, config.arch, config.layer_options) == ("mask_rcnn", f"kw_{backbone}", {"budget": budget})
    assert (config.optimizer, config.lr, config.wd, config.schedule) == ("adamw", 1e-4, 0.05, (8, 11))
    assert (config.frozen_stages, config.norm_eval, config.blend_epochs, config.init) == (1, True, 0, "published")
    with torch.device("meta"):
        model = build(config, 80)
    assert model.transform.min_size == [*range(480, 801, 32)]


@pytest.mark.parametrize("name", ["small_mask_rcnn_mobilenetv2_100", "small_mask_rcnn_od_mobilenetv2_100_4x"])
def test_small_recipes(name: str) -> None:
    options = parse_options("detect train", train, ["--config", name, "--data", "coco", "--out", "run"])
    config = DetectConfig(**options)
    assert config.warm_start == config.arch.startswith("od_")
    static = DetectConfig(**options | {"arch": "mobilenetv2_100", "kernel_num": None, "warm_start": False})
    with shapes_alone():
        assert len(build(static, 3).transform.min_size) == 1


def test_what_a_run_leaves(run: Path, coco: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "best.ckpt",
        "last.ckpt",
        "metrics.csv",
        "config.yaml",
        "machine.json",
        "result.json",
        "tensorboard",
    }
    table, result = rows(run), json.loads((run / "result.json").read_text())
    assert [row["epoch"] for row in table] == [1, 2]
    assert table[0]["steps"] == 5  # 3 high and 6 wide images in batches of 2, each of one kind
    assert table[1]["train_loss"] < table[0]["train_loss"]
    assert result["epochs"] == 2
    assert result["best_ap"] == max(row["ap"] for row in table)
    config = DetectConfig(**yaml.safe_load((run / "config.yaml").read_text()))
    assert config.conventions == "torchvision"
    notes = checkpoint(run / "best.ckpt")["odconv"]
    assert (notes["classes"], notes["categories"], notes["temperature"]) == (["red", "blue"], [4, 9], 1.0)


def test_a_trial_leaves_nothing_behind(coco: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = train(**OPTIONS | {"test_batch": 2}, data=str(coco), out=str(tmp_path / "run"), fast_dev_run=2)
    assert result["epochs"] == 1
    assert not [*tmp_path.iterdir()]
    said = capsys.readouterr().out
    assert said.endswith("fast_dev_run=2: training and evaluation went well, and nothing of them is kept\n")
    assert "corrupt" not in said


def test_a_trial_evaluates_images_that_have_an_object(tmp_path: Path) -> None:
    data = make_coco(tmp_path / "coco", {"train": 4, "val": 3})
    path = data / "annotations" / "instances_val2017.json"
    found = json.loads(path.read_text())
    last = found["images"][-1]["id"]
    found["annotations"] = [one for one in found["annotations"] if one["image_id"] == last]
    path.write_text(json.dumps(found))
    train(**OPTIONS | {"test_batch": 1}, data=str(data), out=str(tmp_path / "run"), fast_dev_run=1)


def test_evaluation_is_that_of_the_run(run: Path, coco: Path, tmp_path: Path, capsys) -> None:
    result = evaluate(weights=str(run / "last.ckpt"), data=str(coco), workers=0, out=str(tmp_path))
    row = rows(run)[-1]
    for name in ("ap", "ap50", "mask_ap", "ap_small"):
        assert result[name] == pytest.approx(row[name], abs=1e-3)
    assert result["images"] == 5
    assert {*result["classes"]} == {"red", "blue"}
    assert "AP by class              boxes   masks" in capsys.readouterr().out
    boxes, masks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("bbox", "segm"))
    assert len(boxes) == len(masks) > 0
    assert {*boxes[0]} == {"image_id", "category_id", "score", "bbox"}
    assert {*masks[0]} == {"image_id", "category_id", "score", "segmentation"}
    assert {item["category_id"] for item in boxes} <= {4, 9}
    assert json.loads((tmp_path / "scores.json").read_text())["ap"] == result["ap"]


@pytest.mark.slow
def test_two_processes_score_the_same(run: Path, coco: Path, tmp_path: Path) -> None:
    options = {"weights": str(run / "last.ckpt"), "data": str(coco), "workers": 0, "score_threshold": 0.0}
    one = evaluate(**options, test_batch=1, out=str(tmp_path / "one"))  # an image a batch in both: nothing is padded
    two = start({**options, "devices": 2, "test_batch": 2, "out": tmp_path / "two"}, command=("detect", "evaluate"))
    assert two.wait() == 0, two.stdout.read()
    scores = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert scores["images"] == 5
    for name in ("bbox", "segm"):
        results = [json.loads((tmp_path / place / f"{name}.json").read_text()) for place in ("one", "two")]
        first, second = (sorted(json.dumps(item) for item in result) for result in results)
        assert first == second
        assert len(first) > 50  # of 5 images x 8 proposals x 2 classes
    assert {name: scores[name] for name in ("ap", "ap50", "mask_ap", "classes")} == {
        name: one[name] for name in ("ap", "ap50", "mask_ap", "classes")
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_is_ended_in_mid_epoch_ends_with_the_same_weights(
    run: Path, coco: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    options = flags(OPTIONS | {"epochs": 2, "data": coco, "out": out, "save_every": 1})
    process = start(options, command=("detect", "train"))
    wait_until((out / "last.ckpt").exists, process)
    os.kill(process.pid, number)
    process.wait()
    left = checkpoint(out / "last.ckpt")["odconv"]
    assert left["batch"] > 0
    again = start({**options, "resume": "auto"}, command=("detect", "train"))
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert f"going on from {out / 'last.ckpt'}" in output
    assert same_weights(out / "last.ckpt", run / "last.ckpt")
    assert rows(out)[-1]["ap"] == rows(run)[-1]["ap"]
    assert rows(out)[0]["train_loss"] == pytest.approx(rows(run)[0]["train_loss"], rel=1e-6)


STATIC = {"detector": "retinanet", "arch": "tiny", "kernel_num": None, "options": None, "augment": "none"}
"""A detector without randomness, whose losses are means over images: parts of a batch add up to the whole."""


@pytest.fixture(scope="module")
def whole_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Options of a run on images of one size in steps of four, and that run in one process and whole steps."""
    data = make_coco(tmp_path_factory.mktemp("coco"), {"train": 8, "val": 2}, size=(44, 44))
    options = OPTIONS | STATIC | {"batch_size": 4, "lr": 0.01, "clip": None, "warmup_steps": 0, "data": str(data)}
    train(**options, out=str(data / "whole"))
    return options, data / "whole"


def distance(one: Path, other: Path) -> float:
    pairs = zip(weights(one / "last.ckpt").values(), weights(other / "last.ckpt").values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_step_in_parts_is_the_same_step(whole_steps, tmp_path: Path, accumulate: int) -> None:
    options, whole = whole_steps
    train(**options, accumulate=accumulate, out=str(tmp_path / "run"))
    assert rows(tmp_path / "run")[0]["steps"] == 2
    assert distance(tmp_path / "run", whole) <= 1e-7


@pytest.mark.slow
def test_two_processes_make_the_same_step(whole_steps, tmp_path: Path) -> None:
    options, whole = whole_steps
    process = start(
        flags({k: v for k, v in options.items() if v is not None} | {"devices": 2, "out": tmp_path / "run"}),
        command=("detect", "train"),
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert distance(tmp_path / "run", whole) <= 1e-7
    assert rows(tmp_path / "run")[0]["train_loss"] == pytest.approx(rows(whole)[0]["train_loss"])


class Oracle(torch.nn.Module):
    """A detector that knows what is on the images, in an order of classes of its own, with one class more."""

    def __init__(self, truth: CocoImages) -> None:
        super().__init__()
        self.truth, self.asked = truth, 0
        self.classes = [*reversed(truth.annotations.classes), "unicorn"]
        self.roi_heads = torch.nn.Identity()
        self.roi_heads.has_mask = lambda: True

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        answers = []
        for image in images:
            _, target = self.truth[self.asked]
            self.asked += 1
            assert image.shape[1:] == target["masks"].shape[1:]
            labels = torch.tensor([len(self.classes) - label for label in target["labels"].tolist()], dtype=torch.int64)
            found = {"boxes": target["boxes"], "labels": labels, "scores": torch.ones(len(labels))}
            answers.append(found | {"masks": target["masks"][:, None].float()})
        return answers


def test_a_detector_that_knows_scores_100(coco: Path, monkeypatch) -> None:
    annotations = read_annotations(coco / "annotations/instances_val2017.json", masks=True)
    oracle = Oracle(CocoImages(annotations, coco / "val2017", "none", masks=True))
    restored = RestoredDetector(oracle, "oracle", oracle.classes, [7, 8, 9])
    monkeypatch.setattr("odconv.app.detect.restore.restore", lambda *_, **__: restored)
    scores = evaluate(weights="", data=str(coco), workers=0)
    assert (scores["ap"], scores["mask_ap"]) == (100.0, 100.0)
    assert [*scores["classes"].values()] == 2 * [{"ap": 100.0, "mask_ap": 100.0}]


def test_some_classes_alone(coco: Path, tmp_path: Path) -> None:
    result = train(**OPTIONS | STATIC, data=str(coco), out=str(tmp_path / "run"), classes="blue")
    scores = evaluate(weights=str(tmp_path / "run" / "best.ckpt"), data=str(coco), workers=0)
    assert {*scores["classes"]} == {"blue"}
    assert scores["ap"] == pytest.approx(result["best_ap"], abs=1e-3)


def test_conventions_stay_with_the_weights(coco: Path, tmp_path: Path, caplog) -> None:
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    options = OPTIONS | {"data": str(coco)}
    train(**options, conventions="mmdetection", temperature=10.0, out=one)
    (tmp_path / "one" / "best.ckpt").rename(tmp_path / "moved.ckpt")
    train(**options, weights=str(tmp_path / "moved.ckpt"), temperature=1.0, out=two)
    described = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())
    assert (described["conventions"], described["temperature"]) == ("mmdetection", 1.0)
    assert "moved.ckpt was trained with temperature 10.0, and goes on with 1.0" in caplog.text
    (tmp_path / "moved.ckpt").unlink()
    train(
        **options | {"weights": str(tmp_path / "moved.ckpt"), "epochs": 2}, out=two, resume="auto"
    )  # needs it no more
    built = odconv.create_detector(
        options["detector"], options["arch"], kernel_num=2, num_classes=3, weights=f"{one}/last.ckpt"
    )
    assert isinstance(built.transform, conventions.Transform)
    assert {layer.temperature.item() for layer in built.modules() if isinstance(layer, Attention)} == {10.0}
    with pytest.raises(ValueError, match="its conventions are mmdetection, those of this run torchvision"):
        train(**options | {"epochs": 3}, out=two, resume="auto", conventions="torchvision")
    for given, message in (
        ({"new_predictor": True}, "new_predictor needs weights"),
        (
            {"weights": two + "/best.ckpt", "weights_backbone": "x"},
            "weights and weights_backbone must not both be given",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(**options | given, out=three)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_other_detectors_need_no_masks(tmp_path: Path, detector: str) -> None:
    data = make_coco(tmp_path / "data", {"train": 4, "val": 2}, masks=False)
    options = None if detector == "retinanet" else OPTIONS["options"]
    changed = OPTIONS | {"detector": detector, "options": options, "amp": "bf16", "average": 0.9, "augment": "strong"}
    # oneDNN's bf16 weight gradient of a strided convolution of one pixel, at the pyramid's tip, reads memory that was
    # never written
    changed |= {"amp": "none"} if detector == "retinanet" else {}
    result = train(**changed, data=str(data), out=str(tmp_path / "run"))
    assert "mask_ap" not in result
    assert math.isfinite(rows(tmp_path / "run")[0]["train_loss"])
    scores = evaluate(weights=str(tmp_path / "run" / "best.ckpt"), data=str(data), workers=0, amp="bf16")
    assert "mask_ap" not in scores
    with pytest.raises(ValueError, match=r"Mask R-CNN needs masks, and .* has none"):
        train(**OPTIONS, data=str(data), out=str(tmp_path / "masks"))


def test_predicting(run: Path, coco: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.png").write_text("no image")
    files = [str(coco / "val2017"), str(tmp_path / "broken.png")]
    threshold = 0.05
    found = predict(files, weights=str(run / "best.ckpt"), out=str(tmp_path / "out"), threshold=threshold)
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert written == found
    assert len(found["images"]) == 5
    assert found["categories"] == [{"id": 4, "name": "red"}, {"id": 9, "name": "blue"}]
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert "5 images" in captured.out
    assert found["annotations"]
    for item in found["annotations"]:
        assert item["score"] > threshold
        assert item["category_id"] in (4, 9)
        assert item["segmentation"]["size"]
    for entry in found["images"]:
        with Image.open(tmp_path / "out" / entry["picture"]) as picture, Image.open(entry["file_name"]) as original:
            assert picture.size == original.size
            objects = [item for item in found["annotations"] if item["image_id"] == entry["id"]]
            same = np.array_equal(np.asarray(picture), np.asarray(original))
            assert same == (not objects)
    with pytest.raises(ValueError, match="none of the images can be read"):
        predict([str(tmp_path / "broken.png")], weights=str(run / "best.ckpt"), out=str(tmp_path / "none"))


def test_a_new_predictor(run: Path, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data", {"train": 2, "val": 1})
    for split in ("train", "val"):
        path = data / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 11, "name": "green"})
        path.write_text(json.dumps(content))
    start_from = OPTIONS | {"weights": str(run / "best.ckpt"), "data": str(data), "lr": 1e-9}
    with pytest.raises(ValueError, match="does not fit"):
        train(**start_from, out=str(tmp_path / "refused"))
    train(**start_from | {"new_predictor": True}, out=str(tmp_path / "run"))
    before, after = weights(run / "best.ckpt"), weights(tmp_path / "run" / "last.ckpt")
    for key, tensor in after.items():
        if "box_predictor" in key or "mask_fcn_logits" in key:
            assert tensor.shape != before[key].shape
        else:
            torch.testing.assert_close(tensor, before[key])


def test_a_warm_start(coco: Path, tmp_path: Path) -> None:
    static = odconv.create_model("tiny", num_classes=3)
    torch.save(static.state_dict(), tmp_path / "static.pth")
    options = OPTIONS | {"weights_backbone": str(tmp_path / "static.pth"), "data": str(coco), "lr": 1e-9}
    with pytest.raises(ValueError, match="does not fit"):
        train(**options, out=str(tmp_path / "cold"))
    train(**options | {"warm_start": True}, out=str(tmp_path / "run"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["temperature"] == 5
    further = OPTIONS | {"weights": str(tmp_path / "run" / "last.ckpt"), "data": str(coco)}
    train(**further, out=str(tmp_path / "on"))  # goes on at the temperature of its weights
    assert rows(tmp_path / "on")[-1]["temperature"] == 5
    train(**further | {"epochs": 2}, out=str(tmp_path / "on"), resume="auto")
    assert rows(tmp_path / "on")[-1]["temperature"] == 5
    with pytest.raises(ValueError, match=r"its temperature is 5\.0, that of this run 1\.0"):
        train(**further | {"epochs": 3}, out=str(tmp_path / "on"), resume="auto", temperature=1.0)
    restored = odconv.app.detect.restore.restore(str(tmp_path / "run" / "last.ckpt")).model
    body, features = restored.backbone.body, static.eval().features
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, expected = body(x)["3"], features(x)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3)


def test_a_warm_start_of_condconv_keeps_the_norm_before_its_routers(coco: Path, tmp_path: Path) -> None:
    torch.save(odconv.create_model("tiny", num_classes=3).state_dict(), tmp_path / "static.pth")
    options = OPTIONS | {"arch": "cond_tiny", "weights_backbone": str(tmp_path / "static.pth"), "data": str(coco)}
    train(**options | {"warm_start": True}, out=str(tmp_path / "run"))
    restored = odconv.app.detect.restore.restore(str(tmp_path / "run" / "last.ckpt"))
    torch.save(restored.model.state_dict(), tmp_path / "alone.pth")  # weights that say nothing of themselves
    described = {name: OPTIONS[name] for name in ("detector", "kernel_num", "anchor_sizes", "options")}
    told = odconv.app.detect.restore.restore(str(tmp_path / "alone.pth"), arch="cond_tiny", **described)
    for model in (restored.model, told.model):
        assert {part.norm for part in model.modules() if isinstance(part, Attention)} == {"layer"}


def test_unreadable_images_are_counted(tmp_path: Path, caplog) -> None:
    data = make_coco(tmp_path / "data", {"train": 5, "val": 3})
    for path in ("train2017/2.png", "train2017/1.png", "val2017/0.png"):
        (data / path).write_text("no image")
    options = OPTIONS | {"batch_size": 1, "data": str(data)}
    train(**options, out=str(tmp_path / "run"))
    (row,) = rows(tmp_path / "run")
    assert (row["train_corrupt"], row["val_corrupt"]) == (2, 1)
    assert math.isfinite(row["train_loss"])
    assert "2.png" in caplog.text
    best = str(tmp_path / "run" / "best.ckpt")
    with pytest.raises(ValueError, match="1 of 3 images cannot be read"):
        evaluate(weights=best, data=str(data), workers=0)
    assert evaluate(weights=best, data=str(data), workers=0, skip_corrupt=True)["corrupt"] == 1


def test_a_loss_that_is_not_a_number_stops_the_run(coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = OPTIONS | {"lr": 1e9, "clip": None, "warmup_steps": 0, "nan_steps": 2, "epochs": 5}
    with pytest.raises(FloatingPointError, match=r"the loss is not a number, or infinite, since step|not finite"):
        train(**options, data=str(coco), out=str(out))
    assert not (out / "last.ckpt").exists() or all(
        tensor.isfinite().all() for tensor in weights(out / "last.ckpt").values() if tensor.is_floating_point()
    )


def test_all_losses_reach_what_is_watched(coco: Path) -> None:
    from odconv.app.detect.run import make_loaders, read_data

    for detector in ("mask_rcnn", "retinanet"):
        options = OPTIONS | {"detector": detector, "options": None if detector == "retinanet" else OPTIONS["options"]}
        config = DetectConfig(**options, data=str(coco), out="")
        data = read_data(config)
        module = DetectorTraining(build(config, 2), config, data[1])
        images, targets = next(iter(make_loaders(config, *data)[0]))
        assert all(target["index"] != UNREADABLE for target in targets)
        losses = module.model([image.float() / 255 for image in images], targets)
        assert len(losses) == {"mask_rcnn": 5, "retinanet": 2}[detector]
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, module.watched[0], retain_graph=True, allow_unused=True)
            assert gradient is not None, name
            assert gradient.abs().sum() > 0, name


def test_classes_of_files_that_do_not_name_them() -> None:
    names, numbers = coco_classes(81)
    assert (len(names), names[0], numbers[0], names[-1], numbers[-1]) == (80, "person", 1, "toothbrush", 90)
    names, numbers = coco_classes(91)
    assert (names[0], names[-1], numbers[-1]) == ("person", "toothbrush", 90)
    assert coco_classes(4) == (["class 1", "class 2", "class 3"], [1, 2, 3])


def test_a_plain_file_needs_a_description(run: Path, coco: Path, tmp_path: Path) -> None:
    state = {key.removeprefix("model."): tensor for key, tensor in weights(run / "last.ckpt").items()}
    torch.save(state, tmp_path / "plain.pth")
    plain = {"weights": str(tmp_path / "plain.pth"), "data": str(coco), "workers": 0}
    with pytest.raises(ValueError, match="detector and arch must be given"):
        evaluate(**plain)
    described = {name: OPTIONS[name] for name in ("detector", "arch", "kernel_num", "max_size")} | {"min_size": 32}
    with pytest.raises(ValueError, match="the data has classes that the detector does not know: blue, red"):
        evaluate(**plain, **described)
    with pytest.raises(ValueError, match=r"classes must be 2 names, as many as .* has, got 1"):
        evaluate(**plain, **described, classes="red")
    described |= {name: OPTIONS[name] for name in ("anchor_sizes", "options")}
    named = evaluate(**plain, **described, classes="red,blue", out=str(tmp_path / "plain"))
    known = evaluate(weights=str(run / "last.ckpt"), data=str(coco), workers=0, out=str(tmp_path / "known"))
    assert named["classes"] == known["classes"]
    assert (tmp_path / "plain/bbox.json").read_text() == (tmp_path / "known/bbox.json").read_text()
    with pytest.raises(ValueError, match="does not fit"):
        evaluate(**plain, **described | {"arch": "tiny", "kernel_num": None})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "faster_rcn_resnet50"], "did you mean faster_rcnn_resnet50?"),
        (["train", "--config", "lenet"], "odconv detect train has neither a file nor a recipe 'lenet'"),
        (["train", "--config", "od_resnet50_4x"], "a recipe 'od_resnet50_4x'; it is one of odconv train"),
        (["train", "--detector", "yolo", "--arch", "resnet18", "--data", "d", "--out", "o"], "yolo"),
        (["trian"], "unknown command 'detect trian'; did you mean detect train?"),
        (
            ["train", "--detector", "mask_rcnn", "--arch", "resnet18", "--data", "absent", "--out", "OUT"],
            "does not exist",
        ),
        (["evaluate", "--weights", "absent.ckpt", "--data", "d"], "absent.ckpt"),
        (["predict", "a.png", "--weights", "absent.ckpt", "--out", "OUT"], "absent.ckpt"),
        (
            ["predict", "a.png", "--weights", "w", "--out", "OUT", "--threshold", "2"],
            "threshold must be at least 0 and at",
        ),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["detect", *(str(tmp_path / "out") if word == "OUT" else word for word in words)]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("odconv: error: ")
    assert error.count("\n") == 1 or "does not fit" in error


def test_help(capsys) -> None:
    assert main(["detect"]) == 0
    assert main(["detect", "--help"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("detect train") == 2
    assert "sort-val" not in listed


def test_other_files_are_refused(run: Path, trained: Path, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint of a detector, but of the classifier od_tiny"):
        evaluate(weights=str(trained / "best.ckpt"), data=str(coco), workers=0)
    with pytest.raises(ValueError, match="it is of another kind of run"):
        train(**OPTIONS, data=str(coco), out=str(tmp_path / "run"), resume=str(trained / "last.ckpt"))
    changed = OPTIONS | {"anchor_sizes": [8, 12, 16, 24, 48]}
    with pytest.raises(ValueError, match=r"its anchor_sizes is \(8, 12, 16, 24, 32\), that of this run"):
        train(**changed, data=str(coco), out=str(tmp_path / "other"), resume=str(run / "last.ckpt"))


def test_categories_that_differ(coco: Path, tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data", {"train": 2, "val": 1})
    path = data / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "pink"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"have different categories; only in the first: red; only in the second: pink"
    ):
        train(**OPTIONS, data=str(data), out=str(tmp_path / "run"))
    (data / "val2017" / "0.png").unlink()
    content["categories"][0]["name"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"1 of the 1 images listed in .*: 0\.png"):
        train(**OPTIONS, data=str(data), out=str(tmp_path / "run"))
