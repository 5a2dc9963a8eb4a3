"""Every recipe against what was published."""

from importlib import resources
from pathlib import Path

import pytest

from odconv import create_model, list_models
from odconv.app.classify import TrainConfig, train
from odconv.app.cli import parse_options
from odconv.app.data.transforms import evaluation_sizes
from odconv.models.build import shapes_alone

# name: parameters in millions; ResNets and MobileNetV2s share a recipe each
PUBLISHED = {
    "mobilenetv2_100": 3.50,
    "od_mobilenetv2_100_1x": 4.94,
    "od_mobilenetv2_100_4x": 11.51,
    "mobilenetv2_075": 2.64,
    "od_mobilenetv2_075_1x": 3.51,
    "od_mobilenetv2_075_4x": 7.50,
    "mobilenetv2_050": 1.97,
    "od_mobilenetv2_050_1x": 2.43,
    "od_mobilenetv2_050_4x": 4.44,
    "resnet18": 11.69,
    "od_resnet18_1x": 11.94,
    "od_resnet18_4x": 44.90,
    "resnet50": 25.56,
    "od_resnet50_1x": 28.64,
    "od_resnet50_4x": 90.67,
    "resnet101": 44.55,
    "od_resnet101_1x": 50.82,
    "od_resnet101_2x": 90.44,
}
WAREHOUSE = {
    **{"kw_resnet18_1d4x": 4.03, "kw_resnet18_1d2x": 7.43, "kw_resnet18_1x": 11.93},
    **{"kw_resnet18_2x": 23.24, "kw_resnet18_4x": 45.86},
    **{"kw_resnet50_1d2x": 17.64, "kw_resnet50_1x": 28.05, "kw_resnet50_4x": 102.02},
    **{"kw_mobilenetv2_100_1d2x": 2.65, "kw_mobilenetv2_100_1x": 5.17, "kw_mobilenetv2_100_4x": 11.38},
    **{"kw_mobilenetv2_050_1d2x": 1.47, "kw_mobilenetv2_050_1x": 2.85, "kw_mobilenetv2_050_4x": 4.65},
    "kw_convnext_tiny_1x": 39.37,
}
DATA = ("cifar10", "digits", "imagenette")
RECIPES = {Path(file.name).stem: file for file in (resources.files("odconv.app.classify") / "recipes").iterdir()}


def load(name: str) -> TrainConfig:
    options = parse_options("train", train, ["--config", name, "--data", "folder", "--out", "run"])
    return TrainConfig(**options)


def test_there_is_one_for_each_published_row_and_each_small_data_set() -> None:
    assert {name for name in RECIPES if not name.startswith(DATA)} == {*PUBLISHED, *WAREHOUSE}
    for data in DATA:
        small = sorted(name for name in RECIPES if name.startswith(data))
        assert [name[-3:] for name in small if "_od_" in name] == ["_1x", "_4x"]
        assert len(small) == 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    config, dynamic = load(name), name.startswith("od_")
    assert config.arch == (name.rpartition("_")[0] if dynamic else name)
    assert config.kernel_num == (int(name[-2]) if dynamic else None)
    assert config.reduction == (1 / 16 if dynamic else None)
    assert config.dropout == (0.2 if name in ("od_resnet18_4x", "od_mobilenetv2_100_4x") else 0)
    assert (config.batch_size, config.momentum, config.optimizer, config.attention_lr) == (256, 0.9, "sgd", 1)
    assert (config.warmup_epochs, config.label_smoothing, config.mixup, config.cutmix) == (0, 0, 0, 0)
    assert (config.init, config.layer_options) == ("published", None)
    assert (config.temp_epoch, config.temp_init) == (10, 30)
    assert evaluation_sizes(config.image_size, config.resize_size) == (224, 256)
    assert (config.augment, config.min_scale) == ("imagenet", 0.08)
    assert (config.stem, config.weights, config.amp) == ("standard", None, "none")
    if "resnet" in name:
        assert (config.epochs, config.lr, config.wd) == (100, 0.1, 1e-4)
        assert (config.lr_decay, config.schedule, config.gamma) == ("schedule", (30, 60, 90), 0.1)
    else:
        assert (config.epochs, config.lr, config.wd, config.lr_decay) == (150, 0.05, 4e-5, "cos")
    with shapes_alone():
        model = create_model(
            config.arch, kernel_num=config.kernel_num, reduction=config.reduction, dropout=config.dropout
        )
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"{millions:.2f}" == f"{PUBLISHED[name]:.2f}"
    assert f" {PUBLISHED[name]:.2f}M parameters" in RECIPES[name].read_text().splitlines()[0]


@pytest.mark.parametrize("name", WAREHOUSE)
def test_published_of_kernelwarehouse(name: str) -> None:
    config, (arch, _, size) = load(name), name.rpartition("_")
    budget = {"1d4x": 0.25, "1d2x": 0.5, "1x": 1, "2x": 2, "4x": 4}[size]
    assert (config.arch, config.layer_options, config.lr_decay, config.lr_min) == (
        arch,
        {"budget": budget},
        "cos",
        1e-6,
    )
    assert (config.kernel_num, config.reduction, config.dropout, config.weights) == (None, None, 0, None)
    if "mobilenet" not in name:
        assert (config.epochs, config.batch_size, config.accumulate, config.warmup_epochs) == (300, 4096, 4, 20)
        assert (config.optimizer, config.lr, config.wd, config.temp_epoch) == ("adamw", 4e-3, 0.05, 20)
        assert (config.augment, config.erasing, config.label_smoothing) == ("randaugment", 0.25, 0.1)
        assert (config.mixup, config.cutmix) == ((0, 0) if size == "1d4x" else (0.8, 1.0))
        whole = ("kw_resnet18_1d4x", "kw_resnet18_1d2x")
        assert config.drop_path == (0.3 if "convnext" in name else 0 if name in whole else 0.1)
        assert config.average == (0.9999 if "convnext" in name else None)
    else:
        assert (config.epochs, config.batch_size, config.lr, config.wd) == (150, 256, 0.05, 4e-5)
        assert (config.optimizer, config.momentum, config.nesterov, config.temp_epoch) == ("sgd", 0.9, True, 15)
        assert (config.augment, config.erasing, config.mixup, config.cutmix, config.drop_path) == (
            "imagenet",
            0,
            0,
            0,
            0,
        )
        smoothed = ("kw_mobilenetv2_050_4x", "kw_mobilenetv2_100_1x", "kw_mobilenetv2_100_4x")
        assert config.label_smoothing == (0.1 if name in smoothed else 0)
    with shapes_alone():
        model = create_model(arch, budget=budget)
    millions = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}"
    assert millions == f"{WAREHOUSE[name]:.2f}"
    assert f" {millions}M parameters" in RECIPES[name].read_text().splitlines()[0]


@pytest.mark.parametrize("data", DATA)
def test_small_ones_differ_in_the_network_alone(data: str) -> None:
    configs = [load(name) for name in RECIPES if name.startswith(data)]
    assert {config.arch for config in configs} <= set(list_models())
    options = [
        {name: value for name, value in vars(config).items() if name not in ("arch", "kernel_num")}
        for config in configs
    ]
    assert options[0] == options[1] == options[2]


@pytest.mark.parametrize("name", RECIPES)
def test_short_and_made_of_known_options(name: str) -> None:
    lines = RECIPES[name].read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 21
    assert {line.partition(":")[0] for line in lines[1:]} <= set(TrainConfig.__dataclass_fields__)
