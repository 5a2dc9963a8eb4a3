"""What the options of training do: parts of a step, limits, averages, layouts, compilation, traces."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import OPTIONS, Tiny, checkpoint, fit_tiny, rows, same_weights, weights
from torch.distributed.run import main as torchrun
from torchvision.transforms import v2

from odconv import create_model
from odconv.app.classify import TrainConfig, evaluate, train
from odconv.app.classify.module import ClassifierTraining, mixup_or_cutmix
from odconv.app.classify.restore import restore
from odconv.app.classify.schedule import learning_rate, temperature
from odconv.app.data import Images, evaluation_transform
from odconv.app.engine.loaders import training_loader
from odconv.layers import Attention

RECIPES = Path(__file__).parents[1] / "recipes"
IMAGENET = 1_281_167


def published_recipes() -> list[str]:
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    return [name for name in names if name.split("_")[0] not in ("cifar10", "digits", "imagenette", "kw")]


@pytest.mark.parametrize("name", published_recipes())
def test_published_schedule_at_every_iteration(name: str) -> None:
    import yaml

    config = TrainConfig(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), data="", out="")
    batches = -(-IMAGENET // 256)
    epochs = 150 if "mobilenet" in name else 100
    assert (config.epochs, config.batch_size, config.accumulate) == (epochs, 256, 1)
    step = np.arange(1, epochs * batches + 1)
    step = step[(step <= 100) | (step % batches <= 1) | (step % 97 == 0)]  # the ends of epochs, and others
    epoch = (step - 1) // batches
    if "mobilenet" in name:
        rates = 0.05 * 0.5 * (1 + np.cos(np.pi * epoch / 150))
    else:
        rates = 0.1 * 0.1 ** ((epoch >= 30).astype(int) + (epoch >= 60) + (epoch >= 90))
    temperatures = np.maximum(1, 1 + 29 * (10 * batches - step) / (10 * batches))
    by_epoch = np.array([learning_rate(config, e) for e in range(epochs)])
    assert np.allclose(by_epoch[epoch], rates, rtol=1e-12)
    ours = np.array([temperature(config, int(t), batches) for t in step])
    assert np.allclose(ours, temperatures, rtol=1e-12)


def test_parts_of_a_step_add_up_to_the_step() -> None:
    # the last of 4 steps has 6 images, in three parts where the others have four
    whole, _ = fit_tiny(count=30)
    parts, _ = fit_tiny(count=30, accumulate=4)
    assert len(parts.steps) == len(whole.steps) == 2 * 4
    assert parts.steps == whole.steps
    for name, weight in whole.weights.items():
        assert torch.allclose(parts.weights[name], weight, atol=1e-6), name


def test_the_gradient_is_clipped() -> None:
    # a single step without momentum, from the same weights: it is as long as the rate times the limit allows
    free, _ = fit_tiny(count=8, epochs=1, wd=0.0, lr=1.0)
    clipped, _ = fit_tiny(count=8, epochs=1, wd=0.0, lr=1.0, clip=0.01)
    still, _ = fit_tiny(count=8, epochs=1, wd=0.0, lr=1e-12)

    def distance(watch) -> float:
        return sum(float((watch.weights[name] - w).square().sum()) for name, w in still.weights.items()) ** 0.5

    assert distance(free) > 0.05
    assert distance(clipped) == pytest.approx(0.01, rel=1e-3)


def test_averages_of_the_weights(folder: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"data": str(folder), "temp_epoch": 100}
    train(**options, out=str(tmp_path / "average"), average=0.75)
    train(**options, out=str(tmp_path / "plain"))
    both = checkpoint(tmp_path / "average" / "last.ckpt")
    plain = checkpoint(tmp_path / "plain" / "last.ckpt")
    for name, weight in plain["state_dict"].items():
        assert torch.equal(both["current_model_state"][name], weight), name
    key = "model.classifier.1.weight"
    assert not torch.equal(both["state_dict"][key], plain["state_dict"][key])
    assert int(both["averaging_state"]["n_averaged"]) == 13
    # what is evaluated and kept is the average
    again = evaluate(weights=str(tmp_path / "average" / "last.ckpt"), data=str(folder), workers=0)
    assert again["loss"] == pytest.approx(rows(tmp_path / "average")[-1]["val_loss"], rel=1e-5)
    assert again["loss"] != pytest.approx(rows(tmp_path / "plain")[-1]["val_loss"], rel=1e-5)


def test_the_learning_rate_rises_in_the_warm_up() -> None:
    watch, _ = fit_tiny(epochs=3, warmup_epochs=1.5)  # 4 steps an epoch
    rates = [rate for rate, _ in watch.steps]
    assert rates == pytest.approx([0.1 * min(1, step / 6) for step in range(1, 13)])


def test_adamw_decays_weights_alone_and_sgd_everything() -> None:
    for optimizer, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        config = TrainConfig(arch="tiny", data="", out="", optimizer=optimizer, lr=0.1, wd=0.05, attention_lr=0.5)
        made = ClassifierTraining(Tiny(), config, list("abcd")).configure_optimizers()
        assert type(made) is kind
        groups = {(group["lr"], group["weight_decay"]) for group in made.param_groups}
        plain = {(0.1, 0), (0.05, 0)} if optimizer == "adamw" else set()
        assert groups == {(0.1, 0.05), (0.05, 0.05)} | plain


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_attentions_learn_at_their_own_rate(optimizer: str) -> None:
    options = {"optimizer": optimizer, "lr": 0.01, "wd": 0.0, "epochs": 1}
    torch.manual_seed(0)
    start = Tiny().state_dict()
    whole, still = fit_tiny(**options)[0].weights, fit_tiny(**options, attention_lr=1e-9)[0].weights
    for name, weight in start.items():
        if ".attention." in name:
            assert torch.allclose(still[name], weight, atol=1e-6)
    moved, held = (
        (w["2.attention.filter_fc.bias"] - start["2.attention.filter_fc.bias"]).norm() for w in (whole, still)
    )
    assert moved > 100 * held
    assert not torch.equal(still["2.weight"], start["2.weight"])


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_images_and_labels_are_mixed_alike(options: dict) -> None:
    mix = mixup_or_cutmix(TrainConfig(arch="tiny", data="", out="", **options), 4)
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.view(-1, 1, 1, 1).float().expand(-1, 4, 8, 8) == torch.arange(4.0).view(1, 4, 1, 1)
    torch.manual_seed(0)
    for _ in range(20):  # channel c of an image is 1 where class c is seen
        mixed, shares = mix(images.float(), labels)
        assert torch.allclose(mixed.mean((2, 3)), shares, atol=1e-6)


def test_mixing_and_smoothing_change_the_loss_and_nothing_is_mixed_by_default(folder: Path, tmp_path: Path) -> None:
    plain, _ = fit_tiny(epochs=1)
    for options in ({"mixup": 0.4}, {"cutmix": 1.0}, {"label_smoothing": 0.1}):
        other, _ = fit_tiny(epochs=1, **options)
        assert other.losses != pytest.approx(plain.losses, rel=1e-3)
    assert mixup_or_cutmix(TrainConfig(arch="tiny", data="", out=""), 4) is None
    # a modern recipe, on images of which one cannot be read
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    next((broken / "train").rglob("*.png")).write_bytes(b"no image")
    modern = {
        "optimizer": "adamw",
        "wd": 0.05,
        "warmup_epochs": 1.0,
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "cutmix": 1.0,
    }
    result = train(**OPTIONS | modern, data=str(broken), out=str(tmp_path / "run"))
    assert np.isfinite(result["top1"])
    (row,) = rows(tmp_path / "run")
    assert row["train_corrupt"] == 1
    assert np.isfinite(row["train_loss"])


def test_a_modern_run_goes_on_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    modern = {"optimizer": "adamw", "attention_lr": 0.5, "warmup_epochs": 0.5, "mixup": 0.2, "cutmix": 1.0}
    options = OPTIONS | modern | {"data": str(folder), "lr_decay": "step"}
    train(**options | {"epochs": 2}, out=str(tmp_path / "whole"))
    train(**options, out=str(tmp_path / "parts"))
    train(**options | {"epochs": 2}, out=str(tmp_path / "parts"), resume="auto")
    assert same_weights(tmp_path / "whole" / "last.ckpt", tmp_path / "parts" / "last.ckpt")
    with pytest.raises(ValueError, match="its optimizer is adamw, that of this run sgd"):
        train(**options | {"epochs": 3, "optimizer": "sgd"}, out=str(tmp_path / "parts"), resume="auto")


def test_the_options_of_layers_come_back_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    chosen = {"norm": "layer", "gain": 2.0, "kernel_gain": "sqrt"}
    train(**OPTIONS | {"kernel_num": 4, "layer_options": chosen}, data=str(folder), out=str(tmp_path))
    attention = restore(str(tmp_path / "last.ckpt")).model.features[3].conv[0][0].attention
    assert (attention.norm, attention.gain, attention.kernel_gain) == ("layer", 2.0, 2.0)
    assert rows(tmp_path)[-1]["val_loss"] == pytest.approx(
        evaluate(weights=str(tmp_path / "last.ckpt"), data=str(folder), workers=0)["loss"], rel=1e-5
    )
    content = checkpoint(tmp_path / "last.ckpt")
    content["hyper_parameters"]["layer_options"] = {"weights": "other.pth"}
    torch.save(content, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"hostile\.ckpt is malformed: TypeError: 'weights' is no option"):
        restore(str(tmp_path / "hostile.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw, got 'lion'"),
        ({"init": "warm"}, "init must be one of calm, published, got 'warm'"),
        ({"attention_lr": 0.0}, "attention_lr must be above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"mixup": -1.0}, "mixup must be at least 0"),
        ({"warmup_epochs": -0.5}, "warmup_epochs must be at least 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(arch="od_resnet18", data="", out="", **options)


@pytest.mark.parametrize("option", ["channels_last", pytest.param("compile", marks=pytest.mark.slow)])
def test_layout_and_compilation_change_nothing_else(option: str) -> None:
    plain, metrics = fit_tiny()
    other, others = fit_tiny(**{option: True})
    assert other.losses == pytest.approx(plain.losses, rel=1e-4)
    assert others == pytest.approx(metrics, rel=1e-3)


def test_channels_last_reaches_the_weights(folder: Path, tmp_path: Path) -> None:
    train(**OPTIONS | {"arch": "tiny", "channels_last": True}, data=str(folder), out=str(tmp_path))
    weight = checkpoint(tmp_path / "last.ckpt")["state_dict"]["model.features.0.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_a_trace_is_written(folder: Path, tmp_path: Path) -> None:
    train(**OPTIONS, data=str(folder), out=str(tmp_path), profile=True)
    (trace,) = (tmp_path / "trace").iterdir()
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("aten::" in name for name in names)


def test_the_time_spent_waiting_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(torch.nn.Module):
        def forward(self, image):
            time.sleep(0.01)
            return image

    images = Images(np.zeros((20, 8, 8, 3), np.uint8), [0] * 20, v2.Compose([Slow(), evaluation_transform(8, 8)]), 8)
    loader = training_loader(images, 10, 0)
    began = time.perf_counter()
    for _ in loader:
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    assert 0.2 <= loader.waited <= seconds - 0.4
    train(**OPTIONS, data=str(folder), out=str(tmp_path))
    (row,) = rows(tmp_path)
    assert 0 < row["data_wait"] < 1
    assert row["images_per_second"] == pytest.approx(104 / row["train_seconds"])
    assert f"{100 * row['data_wait']:.0f} % waiting" in capsys.readouterr().out


def test_what_needs_gpus_is_refused_without(folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="sync_batch_norm works on GPUs alone"):
        train(**OPTIONS, data=str(folder), out=str(tmp_path), sync_batch_norm=True)
    with pytest.raises(ValueError, match="amp=fp16 works on GPUs alone"):
        train(**OPTIONS, data=str(folder), out=str(tmp_path), amp="fp16")


@pytest.mark.parametrize(
    ("option", "value"),
    [("accumulate", 0), ("clip", 0.0), ("average", 1.0), ("save_every", 0), ("nan_steps", 0), ("timeout", 0.0)],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        TrainConfig(arch="", data="", out="", **{option: value})


def test_a_batch_must_divide_into_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes x accumulate = 1 x 3, got 8"):
        train(**OPTIONS, data=str(folder), out=str(tmp_path), accumulate=3)


@pytest.mark.slow
def test_compressed_gradients(tmp_path: Path) -> None:
    arguments = ["--standalone", "--nproc_per_node=2", __file__]
    for compress in ("none", "bf16"):
        torchrun([*arguments, str(tmp_path / compress), compress])
    plain, compressed = (json.loads((tmp_path / compress).read_text()) for compress in ("none", "bf16"))
    assert plain != compressed
    assert compressed == pytest.approx(plain, rel=2e-2)


def in_one_of_several_processes(path: str, compress: str) -> None:
    """What torchrun runs."""
    watch, _ = fit_tiny(compress=compress)
    Path(path).write_text(json.dumps(watch.losses))


if __name__ == "__main__":
    in_one_of_several_processes(*sys.argv[1:])


def test_a_warm_start(folder: Path, tmp_path: Path) -> None:
    static = create_model("tiny", num_classes=3, stem="small")
    torch.save(static.state_dict(), tmp_path / "static.pth")
    options = OPTIONS | {"weights": str(tmp_path / "static.pth"), "data": str(folder), "lr": 1e-9, "kernel_num": 2}
    options |= {"temp_epoch": 0}
    train(**options, warm_start=True, out=str(tmp_path / "run"))
    after = weights(tmp_path / "run" / "last.ckpt")
    kernels = after["model.features.2.conv.0.0.weight"].sum(0) / 2**0.5  # the mixture at the start
    torch.testing.assert_close(kernels, static.state_dict()["features.2.conv.0.0.weight"], rtol=1e-4, atol=1e-5)
    assert {value.item() for key, value in after.items() if key.endswith(".temperature")} == {5.0}
    assert rows(tmp_path / "run")[-1]["temperature"] == 5
    with pytest.raises(ValueError, match="does not fit"):
        train(**options, out=str(tmp_path / "cold"))
    train(**options | {"epochs": 2}, warm_start=True, resume="auto", out=str(tmp_path / "run"))
    assert rows(tmp_path / "run")[-1]["temperature"] == 5
    weights_now = options | {"weights": str(tmp_path / "run" / "last.ckpt")}
    train(**weights_now, out=str(tmp_path / "on"))  # goes on at the temperature of its weights
    assert rows(tmp_path / "on")[-1]["temperature"] == 5
    train(**options | {"temp_epoch": 1}, warm_start=True, out=str(tmp_path / "falls"))
    assert rows(tmp_path / "falls")[-1]["temperature"] == 1

    torch.save(create_model("tiny", num_classes=7, stem="small").state_dict(), tmp_path / "static.pth")
    with pytest.raises(ValueError, match="num_classes is 7 in the file, 3 in the model"):
        train(**options, warm_start=True, out=str(tmp_path / "seven"))
    assert train(**options, warm_start=True, new_classifier=True, out=str(tmp_path / "other"))["epochs"] == 1


def test_a_warm_start_of_condconv_keeps_the_norm_before_its_routers(folder: Path, tmp_path: Path) -> None:
    torch.save(create_model("tiny", num_classes=3, stem="small").state_dict(), tmp_path / "static.pth")
    options = OPTIONS | {"weights": str(tmp_path / "static.pth"), "data": str(folder), "temp_epoch": 0}
    options |= {"arch": "cond_tiny", "warm_start": True}
    first = train(**options, out=str(tmp_path / "run"))
    train(**options | {"epochs": 2}, resume="auto", out=str(tmp_path / "run"))
    file = tmp_path / "run" / "last.ckpt"
    restored = restore(str(file))
    assert evaluate(weights=str(file), data=str(folder))["top1"] >= 0
    assert {part.norm for part in restored.model.modules() if isinstance(part, Attention)} == {"layer"}
    torch.save(restored.model.state_dict(), tmp_path / "alone.pth")  # weights that say nothing of themselves
    told = restore(str(tmp_path / "alone.pth"), arch="cond_tiny", stem="small").model
    assert {part.norm for part in told.modules() if isinstance(part, Attention)} == {"layer"}
    assert first["parameters"] == sum(parameter.numel() for parameter in restored.model.parameters())
    with pytest.raises(
        ValueError, match=r"its layer_options is \{'norm': 'layer'\}, that of this run \{'norm': 'none'\}"
    ):
        train(**options | {"epochs": 3, "layer_options": {"norm": "none"}}, resume="auto", out=str(tmp_path / "run"))
    for out, published in {"named": {"layer_options": {"norm": "none"}}, "published": {"init": "published"}}.items():
        train(**options | published, out=str(tmp_path / out))
        assert not any("attention.bn." in key for key in weights(tmp_path / out / "last.ckpt"))
    file = tmp_path / "named" / "last.ckpt"  # as one that began before warm starts had the norm, and named none
    content = checkpoint(file)
    content["hyper_parameters"]["layer_options"] = None
    torch.save(content, file)
    train(**options | {"epochs": 2}, resume="auto", out=str(tmp_path / "named"))
    assert not any("attention.bn." in key for key in weights(file))


def test_a_trial_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = OPTIONS | {"data": str(folder), "fast_dev_run": 2, "accumulate": 2, "test_batch": 4}
    result = train(**options, out=str(tmp_path / "run"), resume="auto", logger="csv")
    assert result["epochs"] == 1
    assert not [*tmp_path.iterdir()]
    said = capsys.readouterr().out.splitlines()
    assert "15 to evaluate on, a trial of 2 steps that leaves no results" in said[0]
    assert said[-1] == "fast_dev_run=2: training and evaluation went well, and nothing of them is kept"
    assert not [line for line in said if "corrupt" in line or str(tmp_path) in line]  # of 15 images, 8 are evaluated
    with pytest.raises(ValueError, match="fast_dev_run begins anew; leave out resume, which is last"):
        train(**options, out=str(tmp_path / "run"), resume="last.ckpt")
    with pytest.raises(ValueError, match="fast_dev_run must be at least 1, got 0"):
        train(**options | {"fast_dev_run": 0}, out=str(tmp_path / "run"))


def test_a_trial_leaves_a_finished_run_alone(trained: Path, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    train(**OPTIONS, data=str(folder), out=str(trained), fast_dev_run=1)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
