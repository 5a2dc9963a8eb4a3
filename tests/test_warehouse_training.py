"""Training of KernelWarehouse's networks: the blend, what their recipes use, and going on exactly."""

from pathlib import Path

import pytest
import torch
from small_runs import OPTIONS, make_folder, rows, same_weights, weights
from torch import nn

import odconv
from odconv.app.classify import TrainConfig, evaluate, train
from odconv.app.classify.drop_path import drop_paths
from odconv.app.classify.module import ClassifierTraining
from odconv.app.classify.restore import restore
from odconv.app.classify.schedule import blend, learning_rate
from odconv.app.data.transforms import training_transform
from odconv.app.detect import DetectConfig
from odconv.app.detect import schedule as detector_schedule
from odconv.app.engine.layer_options import check_fall
from odconv.layers.warehouse_attention import WarehouseAttention

KW = OPTIONS | {"arch": "kw_mobilenetv2_050", "lr": 0.001}
RECIPE = {
    "augment": "randaugment",
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "optimizer": "adamw",
    "accumulate": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), {"train": 8, "val": 2})


def config(**options: object) -> TrainConfig:
    return TrainConfig(**{"arch": "kw_resnet18", "data": "", "out": ""} | options)


def blends(path: Path) -> set[float]:
    return {value.item() for name, value in weights(path).items() if name.endswith("attention.blend")}


def test_the_blend_falls_as_published() -> None:
    """From 1 before the first step, by every step, to 0 at the last one of temp_epoch epochs."""
    options = config(temp_epoch=2)
    steps = [blend(options, step, 5) for step in range(1, 13)]
    assert steps == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0])
    assert blend(config(), 1, 5) == 0
    detector = DetectConfig(detector="mask_rcnn", arch="kw_resnet50", data="", out="", blend_epochs=2)
    assert [detector_schedule.blend(detector, step, 5) for step in range(1, 13)] == pytest.approx(steps)


def test_the_cosine_ends_at_lr_min() -> None:
    options = config(lr=0.4, lr_decay="cos", epochs=10, lr_min=0.2)
    assert [learning_rate(options, epoch) for epoch in (0, 5, 10)] == pytest.approx([0.4, 0.3, 0.2])


def test_a_network_is_trained_evaluated_and_goes_on_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    options = KW | RECIPE | {"data": str(folder), "lr_decay": "schedule"}  # which knows no number of epochs
    train(**options | {"epochs": 2}, out=str(tmp_path / "whole"))
    assert [row["blend"] for row in rows(tmp_path / "whole")] == [0.5, 0]
    assert rows(tmp_path / "whole")[0]["steps"] > 1
    assert "temperature" not in rows(tmp_path / "whole")[0]
    train(**options, out=str(tmp_path / "parts"))
    assert blends(tmp_path / "parts" / "last.ckpt") == {0.5}
    assert restore(str(tmp_path / "parts" / "last.ckpt")).model.features[1].conv[1].attention.blend == 0.5
    train(**options | {"epochs": 2}, out=str(tmp_path / "parts"), resume="auto")
    assert same_weights(tmp_path / "whole" / "last.ckpt", tmp_path / "parts" / "last.ckpt")
    assert blends(tmp_path / "parts" / "last.ckpt") == {0}
    result = evaluate(weights=str(tmp_path / "whole" / "last.ckpt"), data=str(folder), workers=0)
    assert result["loss"] == pytest.approx(rows(tmp_path / "whole")[-1]["val_loss"], rel=1e-5)


def test_a_warm_start_begins_as_the_static_network_and_needs_epochs_to_leave_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    static = KW | {"arch": "mobilenetv2_050", "data": str(folder)}
    train(**static, out=str(tmp_path / "static"))
    warm = KW | {"data": str(folder), "weights": str(tmp_path / "static" / "last.ckpt"), "warm_start": True}
    with pytest.raises(ValueError, match="temp_epoch must be at least 1 for warm_start of kw_mobilenetv2_050, got 0"):
        train(**warm | {"temp_epoch": 0}, out=str(tmp_path / "refused"))
    train(**warm | {"temp_epoch": 100, "lr": 1e-9}, out=str(tmp_path / "warm"))
    assert "the blend will end at 0.99" in capsys.readouterr().out
    (last,) = rows(tmp_path / "warm")
    assert last["blend"] == pytest.approx(0.99)
    with pytest.raises(ValueError, match="blend_epochs must be at least 1 for warm_start of kw_resnet50"):
        check_fall("kw_resnet50", True, "blend_epochs", 0)
    check_fall("od_resnet50", True, "blend_epochs", 0)


def test_weights_with_a_blend_do_not_hold_it_in_a_new_run() -> None:
    model = odconv.create_model("kw_resnet18", stem="small", num_classes=3)
    odconv.set_blend(model, 1.0)
    module = ClassifierTraining(model, config(), list("abc"))
    assert module.blend == 0
    assert {part.blend.item() for part in model.modules() if isinstance(part, WarehouseAttention)} == {0}
    assert ClassifierTraining(odconv.create_model("resnet18"), config(), list("abc")).blend is None


def test_images_are_erased_one_by_one_and_branches_dropped() -> None:
    model = odconv.create_model("resnet18", stem="small", num_classes=3)
    module = ClassifierTraining(model, config(erasing=0.5), list("abc"))
    assert module.erase is not None
    torch.manual_seed(0)
    erased = torch.stack([module.erase(image) for image in torch.zeros(40, 3, 16, 16)])
    touched = (erased != 0).flatten(1).any(1)
    assert 10 < touched.sum() < 30
    assert len({tuple((image != 0).any(0).sum(0).tolist()) for image in erased[touched]}) > 5
    keys, x = [*model.state_dict()], torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        before = model.eval()(x)
        drop_paths(model, 0.25)
        assert torch.equal(model(x), before)
    assert [*model.state_dict()] == keys
    seen: list[torch.Tensor] = []
    model.layer2[0].bn2.register_forward_hook(lambda module, inputs, y: seen.append(y.clone()))
    model.train()(x)
    dropped = (seen[0].flatten(1) == 0).all(1).float().mean()
    assert 0.05 < dropped < 0.5
    deep = odconv.create_model("convnext_tiny")
    drop_paths(deep, 0.3)
    assert [deep.stages[0][0].drop_path.p, deep.stages[3][2].drop_path.p] == [0, 0.3]
    with pytest.raises(ValueError, match="drop_path must be 0 for a Sequential, which is no ResNet"):
        drop_paths(nn.Sequential(), 0.5)


def test_randaugment_changes_more_than_the_crop() -> None:
    image = torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)
    for augment, different in (("imagenet", False), ("randaugment", True)):
        transform = training_transform(40, augment=augment, min_scale=1.0, flip=False)
        torch.manual_seed(1)
        results = [transform(image).float().sum((1, 2)) for _ in range(12)]
        spread = torch.stack(results).std(0) / torch.stack(results).mean()
        assert (spread.max() > 0.05) == different
