"""Training on real, tiny images: schedules, resuming, several processes, unreadable images, evaluation."""

import json
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import AGAIN, OPTIONS, Tiny, fit_as_one_of_two, fit_tiny, make_folder, rows, weights
from torch import nn
from torch.utils.data import DataLoader

from odconv.app.classify import TrainConfig, evaluate, train
from odconv.app.classify.module import ClassifierEvaluation, ClassifierTraining
from odconv.app.data import IGNORE, normalise
from odconv.app.engine.checkpoint_io import CheckpointFiles
from odconv.app.engine.trainer import make_trainer


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ({"lr_decay": "cos"}, lambda epoch: 0.1 * 0.5 * (1 + cos(pi * epoch / 5))),
        ({"lr_decay": "schedule", "schedule": (1, 3)}, lambda epoch: [0.1, 0.01, 0.01, 0.001, 0.001][epoch]),
        ({"lr_decay": "step", "step": 2, "gamma": 0.5}, lambda epoch: [0.1, 0.1, 0.05, 0.05, 0.025][epoch]),
    ],
)
def test_learning_rate_and_temperature_of_every_step(options, lr) -> None:
    watch, _ = fit_tiny(epochs=5, temp_epoch=3, **options)
    annealed = 3 * 4
    temperatures = [1 + 29 * max(0, (annealed - t) / annealed) for t in range(1, 5 * 4 + 1)]
    assert watch.steps == [
        (pytest.approx(lr((t - 1) // 4), rel=1e-12), pytest.approx(temperatures[t - 1], rel=1e-6))
        for t in range(1, 5 * 4 + 1)
    ]
    assert [step[1] for step in watch.steps[annealed - 1 :]] == [1] * 9
    assert watch.evaluations == [watch.steps[t - 1][1] for t in (4, 8, 12, 16, 20)]


def test_no_annealing() -> None:
    watch, _ = fit_tiny(temp_epoch=0)
    assert {temperature for _, temperature in watch.steps} == {1}


def test_two_processes_train_and_evaluate_like_one(tmp_path: Path) -> None:
    # torchrun itself is called by slow tests: these two import Lightning once, where they are forked
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    context.set_forkserver_preload(["small_runs"])
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    processes = [context.Process(target=fit_as_one_of_two, args=(i, port, tmp_path / "two")) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    two = json.loads((tmp_path / "two").read_text())
    watch, metrics = fit_tiny()
    assert two["processes"] == 2
    assert two["losses"] == pytest.approx(watch.losses, rel=1e-5)
    assert len(watch.losses) == 2 * 4
    assert metrics["val_images"] == 37
    assert two["metrics"] == pytest.approx(metrics, rel=1e-5)


def test_what_a_run_leaves(trained: Path, folder: Path) -> None:
    names = {path.name for path in trained.iterdir()} - {".lock"}
    logs = {"metrics.csv", "attentions.csv", "machine.json", "result.json", "report.html", "tensorboard"}
    assert names == logs | {"config.yaml", "defaults.yaml", "best.ckpt", "last.ckpt", "previous.ckpt"}
    table, result = rows(trained), json.loads((trained / "result.json").read_text())
    assert [row["epoch"] for row in table] == [1, 2, 3]
    best = max(table, key=lambda row: row["top1"])
    assert (result["best_top1"], result["best_epoch"]) == (best["top1"], best["epoch"])
    assert result["top1"] == table[-1]["top1"]
    # 105 images in batches of 8 are 13 steps: the last one, of a single image, is left out
    assert CheckpointFiles().load_checkpoint(trained / "last.ckpt")["global_step"] == 3 * 13
    assert table[0]["temperature"] == 1 + 29 * (26 - 13) / 26
    assert evaluate(weights=str(trained / "best.ckpt"), data=str(folder), workers=0)["top1"] == pytest.approx(
        best["top1"], abs=1e-3
    )
    config = TrainConfig(**yaml.safe_load((trained / "config.yaml").read_text()))
    assert (config.num_classes, config.data, config.schedule) == (3, str(folder), (30, 60, 90))
    assert (config.kernel_num, config.reduction) == (1, 0.0625)
    assert result["kernel_num"] == 1


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The finished run in another folder."""
    return shutil.copytree(trained, tmp_path / "copy")


def test_a_finished_run_is_not_changed_by_resuming(copy: Path, folder: Path, capsys) -> None:
    files = [path for path in copy.iterdir() if path.is_file()]
    before = [path.read_bytes() for path in files]
    train(**AGAIN | {"wd": 1.0}, data=str(folder), out=str(copy), resume="auto")
    assert f"all 3 epochs are done in {copy / 'last.ckpt'}" in capsys.readouterr().out
    ours = {"best.ckpt", "config.yaml", "metrics.csv", "result.json"}
    assert ours < {path.name for path in files}
    for path, content in zip(files, before, strict=True):
        assert path.name not in ours or path.read_bytes() == content, path


def test_a_moved_run_keeps_its_best(copy: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, best = CheckpointFiles().load_checkpoint(copy / "last.ckpt"), (copy / "best.ckpt").read_bytes()
    for state in checkpoint["callbacks"].values():  # as if the second epoch had been better than any can be
        if "clocks" in state:
            state["rows"][1]["top1"] = 101.0
        elif state.get("monitor"):
            score = torch.tensor(101.0)
            state |= {"best_model_score": score, "kth_value": score, "best_k_models": {state["best_model_path"]: score}}
    torch.save(checkpoint, copy / "last.ckpt")
    result = train(**AGAIN | {"epochs": 4, "lr": 0.05}, data=str(folder), out=str(copy), resume="auto")
    assert (result["best_top1"], result["best_epoch"]) == (101, 2)
    assert (copy / "best.ckpt").read_bytes() == best
    assert "lr 0.003 -> 0.05" in capsys.readouterr().out


def test_going_on_in_another_folder(trained: Path, copy: Path, folder: Path, tmp_path: Path) -> None:
    options = AGAIN | {"epochs": 4, "lr": 1.0, "data": str(folder), "resume": str(trained / "last.ckpt")}
    with pytest.raises(FileExistsError, match="copy is not empty"):
        train(**options, out=str(copy))
    train(**options, out=str(tmp_path / "new"))
    assert (tmp_path / "new" / "best.ckpt").read_bytes() == (trained / "best.ckpt").read_bytes()
    assert len(rows(tmp_path / "new")) == 4


def test_two_runs_cannot_share_a_folder(copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odconv.app.engine.run_folder.LOCK_WAIT", 0.1)
    options = AGAIN | {"data": str(folder), "out": str(copy), "resume": "auto"}
    hold = (
        "from filelock import FileLock\nwith FileLock(__import__('sys').argv[1]):\n    print(flush=True)\n    input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(copy / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(OSError, match=r"another run is writing to .*copy"):
            train(**options)
    finally:
        other.kill()
        other.communicate()
    train(**options)


def test_a_full_disk(copy: Path, folder: Path) -> None:
    before = {name: (copy / name).read_bytes() for name in ("best.ckpt", "last.ckpt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\.ckpt cannot be written"):
            train(**AGAIN | {"epochs": 4}, data=str(folder), out=str(copy), resume="auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (copy / name).read_bytes() for name in before} == before
    assert not [*copy.glob(".*.partial")]


def test_a_report_that_a_kill_prevented_is_written_later(copy: Path, folder: Path) -> None:
    report = copy / "report.html"
    before = report.read_text()
    again = AGAIN | {"data": str(folder), "out": str(copy), "resume": "auto"}
    report.unlink()
    train(**again)
    assert report.read_text().count("<svg") == before.count("<svg") > 0
    report.write_text("of the run as it was before its end")
    os.utime(report, ns=(0, (copy / "result.json").stat().st_mtime_ns - 1))
    train(**again)
    written = report.stat().st_mtime_ns
    assert report.read_text() != "of the run as it was before its end"
    train(**again)
    assert report.stat().st_mtime_ns == written


def test_a_folder_that_is_deleted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: the folder .*gone is gone"):
        CheckpointFiles().save_checkpoint({"epoch": 0}, tmp_path / "gone" / "last.ckpt")


def test_resuming_needs_the_same_data_and_order(copy: Path, folder: Path, tmp_path: Path) -> None:
    options = AGAIN | {"out": str(copy), "resume": "auto"}
    others = make_folder(tmp_path / "others", {"train": 1, "val": 1}, ("bar", "spot", "gap"))
    with pytest.raises(ValueError, match="only the checkpoint has dot, only the data has spot"):
        train(**options, data=str(others))
    for name, value in {"seed": 1, "batch_size": 4, "temp_epoch": 0, "kernel_num": 4}.items():
        with pytest.raises(ValueError, match=f"its {name} is .*, that of this run {value}"):
            train(**options | {name: value}, data=str(folder))


def test_evaluation_uses_the_temperature_of_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    # after one of ten epochs of annealing the temperature is still near 30
    train(**OPTIONS | {"temp_epoch": 10}, data=str(folder), out=str(tmp_path))
    result = evaluate(weights=str(tmp_path / "last.ckpt"), data=str(folder), workers=0)
    assert result["loss"] == pytest.approx(rows(tmp_path)[0]["val_loss"], rel=1e-5)
    other = evaluate(weights=str(tmp_path / "last.ckpt"), data=str(folder), workers=0, temperature=0.1)
    assert other["loss"] != pytest.approx(result["loss"], rel=1e-5)


def test_the_end_of_the_temperature_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = OPTIONS | {"temp_epoch": 10, "temp_init": 31.0, "data": str(folder)}
    train(**options, out=str(tmp_path / "od"))
    assert "the temperature will end at 28\n" in capsys.readouterr().out
    train(**options | {"arch": "tiny"}, out=str(tmp_path / "static"))
    assert "temperature" not in capsys.readouterr().out


def test_unreadable_images_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, out = make_folder(tmp_path / "data", {"train": 8, "val": 4}), tmp_path / "out"
    for name in ("train/dot/2.png", "val/bar/1.png", "val/gap/3.png"):
        (data / name).write_bytes((data / name).read_bytes()[:60])
    train(**OPTIONS | {"epochs": 2}, data=str(data), out=str(out))
    assert [(row["train_corrupt"], row["val_corrupt"]) for row in rows(out)] == [(1, 2), (1, 2)]
    assert all(name in caplog.text for name in ("dot/2.png", "bar/1.png", "gap/3.png"))
    options = {"weights": str(out / "last.ckpt"), "data": str(data), "workers": 0}
    with pytest.raises(ValueError, match="2 of 12 images cannot be read"):
        evaluate(**options)
    result = evaluate(**options, skip_corrupt=True)
    assert (result["images"], result["corrupt"]) == (10, 2)
    assert result["loss"] == pytest.approx(rows(out)[-1]["val_loss"], rel=1e-5)
    for name in ("bar/1.png", "gap/3.png"):
        (data / "val" / name).unlink()
    without = evaluate(**options)
    assert [without[name] for name in ("top1", "top5", "images")] == [
        result[name] for name in ("top1", "top5", "images")
    ]


def test_no_readable_image_for_evaluation(trained: Path, tmp_path: Path) -> None:
    data, out = make_folder(tmp_path / "data", {"train": 3, "val": 1}), tmp_path / "out"
    for path in data.glob("val/*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the images for evaluation can be read"):
        evaluate(weights=str(trained / "last.ckpt"), data=str(data), workers=0, skip_corrupt=True)
    with pytest.raises(ValueError, match="none of the images for evaluation can be read"):
        train(**OPTIONS, data=str(data), out=str(out))
    assert not [*out.glob("*.ckpt")]


@pytest.mark.parametrize("readable", [5, 2])
def test_unreadable_images_do_not_count_in_batch_norm(readable: int) -> None:
    chance = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=chance), torch.arange(5) % 4
    blank = torch.tensor([i >= readable for i in range(5)]).roll(2)
    images[blank], labels[blank] = 0, IGNORE
    norm = nn.BatchNorm2d(3)
    module = ClassifierTraining(nn.Sequential(norm, Tiny()), TrainConfig(arch="tiny", data="", out=""), list("abcd"))
    trainer = make_trainer(1, "none", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader([(images, labels)], batch_size=None))
    assert torch.allclose(norm.running_mean, 0.1 * normalise(images[~blank]).mean((0, 2, 3)), atol=1e-6)
    assert trainer.callback_metrics["train_corrupt"] == 5 - readable


def test_a_batch_without_a_readable_image_changes_nothing() -> None:
    module = ClassifierTraining(Tiny(), TrainConfig(arch="tiny", data="", out=""), list("abcd"))
    loss = module.training_step((torch.zeros(3, 3, 8, 8), torch.full((3,), IGNORE)), 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in module.model.parameters())


def test_the_loss_of_an_epoch_is_the_mean_over_its_images() -> None:
    module = ClassifierTraining(Tiny(), TrainConfig(arch="tiny", data="", out=""), list("abcd"))
    images, labels = torch.randn(7, 3, 8, 8), torch.arange(7) % 4
    labels[3] = IGNORE
    for part in (slice(0, 5), slice(5, 7)):
        module.training_step((images[part], labels[part]), 0)
    mean = module.train_loss.compute() / module.train_images.compute()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(module.model(images), labels, ignore_index=IGNORE)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)


def test_accuracy_is_that_of_the_logits() -> None:
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 7
    labels[::9] = IGNORE
    module = ClassifierEvaluation(nn.Identity())
    for part in (slice(0, 13), slice(13, 40)):
        module.validation_step((logits[part], labels[part]), 0)
    counted = labels != IGNORE
    rank = (logits > logits.gather(1, labels.clamp(min=0)[:, None])).sum(1)[counted]
    assert module.val_top1.compute().item() == pytest.approx(100 * (rank < 1).float().mean().item())
    assert module.val_top5.compute().item() == pytest.approx(100 * (rank < 5).float().mean().item())
    assert module.val_images.compute().item() == counted.sum()
    expected = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)
    assert module.val_loss.compute().item() == pytest.approx(expected.item(), rel=1e-5)


FP16 = pytest.param("fp16", torch.float16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize(("amp", "dtype"), [("none", torch.float32), ("bf16", torch.bfloat16), FP16])
def test_mixed_precision(tmp_path: Path, amp: str, dtype: torch.dtype) -> None:
    data, used = make_folder(tmp_path / "data", {"train": 4, "val": 1}), set()

    def note(module: nn.Module, _: object, output: object) -> None:
        if module.training and isinstance(module, nn.Linear) and isinstance(output, torch.Tensor):
            used.add(output.dtype)

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        train(**OPTIONS | {"amp": amp}, data=str(data), out=str(tmp_path / "out"))
    finally:
        hook.remove()
    assert used == {dtype}
    assert np.isfinite(rows(tmp_path / "out")[0]["train_loss"])


def test_evaluation_by_class_names(trained: Path, folder: Path, tmp_path: Path) -> None:
    some = tmp_path / "some" / "val"
    for name in ("dot", "gap"):
        shutil.copytree(folder / "val" / name, some / name)
    everything = evaluate(weights=str(trained / "last.ckpt"), data=str(folder), workers=0)
    part = evaluate(weights=str(trained / "last.ckpt"), data=str(some.parent), workers=0)
    assert part["images"] == 10
    bar = tmp_path / "bar" / "val"
    shutil.copytree(folder / "val" / "bar", bar / "bar")
    rest = evaluate(weights=str(trained / "last.ckpt"), data=str(bar.parent), workers=0)
    assert 2 * part["loss"] + rest["loss"] == pytest.approx(3 * everything["loss"], rel=1e-5)
    (some / "dot").rename(some / "spot")
    with pytest.raises(ValueError, match="classes that the network does not know: spot"):
        evaluate(weights=str(trained / "last.ckpt"), data=str(some.parent), workers=0)


def test_weights_of_others_need_a_description(trained: Path, folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights(trained / "last.ckpt").items()}}, path)
    known = {"arch": "od_tiny", "stem": "small", "image_size": 16, "resize_size": 16}
    ours = evaluate(weights=str(trained / "last.ckpt"), data=str(folder), workers=0)
    assert evaluate(weights=path, data=str(folder), workers=0, **known)["loss"] == pytest.approx(ours["loss"])
    with pytest.raises(ValueError, match="arch must be given"):
        evaluate(weights=path, data=str(folder), workers=0)
    with pytest.raises(ValueError, match="the data has 10 classes, the network 3 outputs"):
        evaluate(weights=path, data="digits", workers=0, **known)


@pytest.mark.parametrize("name", ["kernel_num", "reduction", "image_size", "resize_size", "temperature"])
def test_nothing_is_out_of_range(trained: Path, folder: Path, name: str) -> None:
    options = {"weights": str(trained / "last.ckpt"), "data": str(folder)}
    for option in (name, "test_batch", "devices"):
        with pytest.raises(ValueError, match=f"{option} must be a(t least 1|bove 0).*, got 0"):
            evaluate(**options | {option: 0})
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        evaluate(**options, **{name: 0})


@pytest.mark.parametrize(
    ("option", "allowed"),
    [({"seed": 2**32}, "at most 2"), ({"schedule": (3, 1)}, "ascending"), ({"schedule": (0, 1)}, "ascending")],
)
def test_options_out_of_range(option: dict, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*{allowed}"):
        TrainConfig(arch="", data="", out="", **option)


def test_the_result_of_an_evaluation_is_kept(trained: Path, folder: Path, tmp_path: Path) -> None:
    options = {"weights": str(trained / "last.ckpt"), "data": str(folder), "workers": 0}
    result = evaluate(**options, out=str(tmp_path / "new" / "result.json"))
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "must be a file"), (tmp_path / "file" / "x.json", "cannot be written")):
        with pytest.raises(OSError, match=message):
            evaluate(**options | {"weights": "does-not-matter.ckpt"}, out=str(out))


def test_starting_from_weights(trained: Path, folder: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"lr": 1e-12, "wd": 0.0, "temp_epoch": 0}
    train(**options, data=str(folder), out=str(tmp_path), weights=str(trained / "last.ckpt"))
    before, after = weights(trained / "last.ckpt"), weights(tmp_path / "last.ckpt")
    learned = [key for key in before if key.endswith(".weight")]
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in learned)


@pytest.mark.slow
def test_published_accuracy_of_mobilenetv2(shared_data: Path) -> None:
    result = evaluate(
        weights=str(shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"),
        arch="mobilenetv2_100",
        data=str(shared_data / "imagenet-sample"),
    )
    assert result["top1"] == pytest.approx(78.5, abs=0.3)
    assert result["top5"] == pytest.approx(94.8, abs=0.3)
