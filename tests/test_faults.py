"""What can go wrong in a long run, for real: kills, signals, lost files and processes, numbers that are none."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import (
    AGAIN,
    OPTIONS,
    RANDOM,
    checkpoint,
    children,
    make_folder,
    rows,
    same_weights,
    start,
    wait_until,
    weights,
    without_times,
)

from odconv.app.classify import evaluate, train
from odconv.app.engine.checkpoint_io import LAST, PREVIOUS, CheckpointFiles

HOT = {"temp_epoch": 1000}  # these images are noise: at temperature 1 the gradients would soon explode


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def in_mid_epoch(out: Path) -> bool:
    return (out / LAST).exists() and checkpoint(out / LAST)["odconv"]["batch"] > 0


def freeze_in_mid_epoch(out: Path, process: subprocess.Popen) -> None:
    """Stop a process at some step that is not near the end of an epoch, with a checkpoint from the same epoch."""
    while True:
        wait_until(lambda: in_mid_epoch(out), process)
        process.send_signal(signal.SIGSTOP)
        if 0 < checkpoint(out / LAST)["odconv"]["batch"] <= 6:
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_ended_in_mid_epoch_ends_with_the_same_weights(
    folder: Path, trained: Path, out: Path, workers: int, number: signal.Signals
) -> None:
    options = OPTIONS | RANDOM | {"data": str(folder), "out": str(out), "workers": workers}
    process = start(options | {"save_every": 3})
    freeze_in_mid_epoch(out, process)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert in_mid_epoch(out)
    assert checkpoint(out / LAST)["global_step"] < 3 * 13
    train(**options, resume="auto")
    assert without_times(rows(out)) == without_times(rows(trained))
    assert same_weights(out / LAST, trained / LAST)


CLUSTER = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize(
    ("number", "environment", "launcher"),
    [
        (signal.SIGTERM, {}, ()),
        pytest.param(signal.SIGTERM, {}, TORCHRUN, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, CLUSTER | {"SLURM_LOCALID": "0"}, (), marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, CLUSTER | {"SLURM_LOCALID": "0"}, (), marks=pytest.mark.slow),
    ],
    ids=["alone", "torchrun", "SLURM", "SLURM with SIGUSR1"],
)
def test_a_signal_saves_the_step_it_came_in(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, number: int, environment: dict, launcher: tuple
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = start(OPTIONS | HOT | {"data": str(folder), "out": str(out), "epochs": 1000, "workers": 2}, launcher)
    wait_until((out / LAST).exists, process)
    before = checkpoint(out / LAST)["global_step"]
    if launcher:
        process.send_signal(number)  # torchrun passes it on to the groups of its processes
    else:
        os.killpg(process.pid, number)  # to all of them, those that read images too
    output = process.communicate()[0]
    assert process.returncode == (1 if launcher else 128 + signal.SIGTERM), output
    assert "odconv: error" not in output
    saved = checkpoint(out / LAST)
    assert saved["global_step"] >= before
    assert saved["odconv"]["batch"] == saved["global_step"] % 13
    assert not [*Path().glob("hpc_ckpt*")]


@pytest.mark.slow
def test_parts_and_averages_survive_a_kill(folder: Path, tmp_path: Path) -> None:
    options = OPTIONS | RANDOM | {"data": str(folder), "accumulate": 2, "average": 0.9, "workers": 0, "epochs": 2}
    train(**options, out=str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = start(options | {"out": killed, "save_every": 2})
    wait_until(lambda: in_mid_epoch(killed), process)
    process.kill()
    process.communicate()
    train(**options, out=str(killed), resume="auto")
    assert without_times(rows(killed)) == without_times(rows(tmp_path / "whole"))
    assert same_weights(killed / LAST, tmp_path / "whole" / LAST)
    for name in ("current_model_state", "averaging_state"):
        one, other = (checkpoint(run / LAST)[name] for run in (killed, tmp_path / "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other)
    # what is evaluated and kept is the average
    again = evaluate(weights=str(killed / LAST), data=str(folder), workers=0)
    assert again["loss"] == pytest.approx(rows(killed)[-1]["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_process_that_reads_images_is_killed(folder: Path, trained: Path, out: Path) -> None:
    options = OPTIONS | RANDOM | HOT | {"data": str(folder), "out": str(out)}
    process = start(options | {"epochs": 1000})
    wait_until((out / LAST).exists, process)
    while process.poll() is None:  # those that have read all their images are not missed
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    message = process.communicate()[0]
    assert process.returncode == 1
    assert "error: a process that reads images was killed; is there enough memory?" in message
    # a loader that was just being made complains when it is collected (torch 2.14)
    assert "Traceback" not in message.partition("odconv: error")[2].partition("Exception ignored in")[0]
    done = checkpoint(out / LAST)["epoch"] + 1
    train(**options | {"epochs": done + 1, "workers": 0}, resume="auto")
    assert [row["epoch"] for row in rows(out)] == [*range(1, done + 2)]


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_torchrun_starts_them_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else gloo meets the addresses of the first start
    options = OPTIONS | HOT | {"data": str(folder), "epochs": 3, "save_every": 3, "resume": "auto"}
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = start(options | {"out": whole}, launcher)
    assert first.communicate()[0]
    process = start(options | {"out": killed}, launcher)
    wait_until(lambda: in_mid_epoch(killed), process)
    trainers = [pid for pid in children(process.pid) if "tiny" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(trainers) == 2
    os.kill(trainers[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert (first.returncode, process.returncode) == (0, 0), output
    assert "going on from" in output
    pairs = zip(without_times(rows(killed)), without_times(rows(whole)), strict=True)
    # the mean loss is summed in another order
    assert all(one == pytest.approx(other, rel=1e-6) for one, other in pairs)
    assert same_weights(killed / LAST, whole / LAST)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A finished run in a folder of its own."""
    return shutil.copytree(trained, tmp_path / "copy")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_truncated_checkpoint(copy: Path, trained: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = AGAIN | {"data": str(folder), "out": str(copy), "resume": "auto"}
    cut(copy / LAST)
    train(**options)
    assert "last.ckpt" in caplog.text
    assert "going on from" in caplog.text
    assert same_weights(copy / LAST, trained / LAST)
    for name in (LAST, PREVIOUS):
        cut(copy / name)
    with pytest.raises((ValueError, OSError), match=PREVIOUS):
        train(**options)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(copy: Path) -> None:
    state, before = checkpoint(copy / LAST), (copy / PREVIOUS).read_bytes()
    cut(copy / LAST)
    CheckpointFiles().save_checkpoint(state, copy / LAST)
    assert (copy / PREVIOUS).read_bytes() == before
    CheckpointFiles().save_checkpoint(state, copy / LAST)
    assert checkpoint(copy / PREVIOUS)["global_step"] == state["global_step"]


def test_weights_that_are_not_finite_are_not_saved(copy: Path, folder: Path) -> None:
    before = (copy / LAST).read_bytes()
    options = AGAIN | {"data": str(folder), "out": str(copy), "resume": "auto", "epochs": 4, "save_every": 1}
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        train(**options | {"lr": 3e38, "lr_decay": "step"})
    assert (copy / LAST).read_bytes() == before


@pytest.mark.parametrize("nan_steps", [1, 1000])
def test_all_images_are_lost(tmp_path: Path, out: Path, nan_steps: int) -> None:
    data = make_folder(tmp_path / "data", {"train": 8, "val": 2})
    train(**OPTIONS, data=str(data), out=str(out))
    before = (out / LAST).read_bytes()
    for path in data.glob("train/*/*.png"):
        path.write_bytes(b"")
    options = OPTIONS | {"data": str(data), "out": str(out), "resume": "auto", "epochs": 2}
    with pytest.raises(OSError, match="can be read"):
        train(**options, nan_steps=nan_steps)
    assert (out / LAST).read_bytes() == before


def test_a_loss_that_is_not_a_number(copy: Path, folder: Path) -> None:
    before = (copy / LAST).read_bytes()
    options = AGAIN | {"data": str(folder), "out": str(copy), "resume": "auto", "epochs": 6, "lr": 1e9}
    with pytest.raises(FloatingPointError, match=r"since step 4\d"):  # the first step of the fourth epoch is 40
        train(**options | {"nan_steps": 4})
    assert (copy / LAST).read_bytes() == before
    with pytest.raises(FloatingPointError, match="the checkpoints are from before"):  # at the end of the epoch
        train(**options | {"nan_steps": 1000})
    assert (copy / LAST).read_bytes() == before
    assert all(tensor.isfinite().all() for tensor in weights(copy / LAST).values())


@pytest.mark.slow
def test_an_image_is_lost_between_epochs(tmp_path: Path, out: Path) -> None:
    data = make_folder(tmp_path / "data", {"train": 8, "val": 2})
    process = start(OPTIONS | HOT | {"data": data, "out": out, "epochs": 1000})
    wait_until((out / LAST).exists, process)
    (data / "train" / "dot" / "3.png").unlink()
    seen = checkpoint(out / LAST)["epoch"] + 1
    wait_until(lambda: checkpoint(out / LAST)["epoch"] > seen + 1, process)
    process.terminate()
    output = process.communicate()[0]
    assert "dot/3.png" in output
    counts = [row["train_corrupt"] for row in rows(out)]
    assert (counts[0], counts[-1]) == (0, 1)


@pytest.mark.slow
def test_a_rendezvous_that_cannot_be_reached(folder: Path, out: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment = os.environ | place | {"LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    flags = [f"--{name}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "tiny", "train", *flags, f"--data={folder}", f"--out={out}", "--timeout=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "odconv: error in process 1: the other processes cannot be reached" in done.stderr
    assert "127.0.0.1:1" in done.stderr


def test_somebody_elses_folder_is_left_alone(folder: Path, out: Path, trained: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("do not overwrite")
    options = OPTIONS | {"data": str(folder), "out": str(out), "resume": "auto"}
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        train(**options)
    (out / "thesis.txt").unlink()
    shutil.copy(trained / "best.ckpt", out)
    shutil.copy(trained / "config.yaml", out)
    with pytest.raises(FileNotFoundError, match=r"neither last\.ckpt nor previous\.ckpt"):
        train(**options)
    (out / "best.ckpt").unlink()  # a run that was killed before its first checkpoint
    train(**options)
    assert (out / LAST).exists()


def test_readers_that_an_error_left_do_not_hold_up_the_end() -> None:
    code = """
from odconv.app.engine.loaders import Loader
batches = iter(Loader(range(64), batch_size=1, num_workers=2))
next(batches)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
