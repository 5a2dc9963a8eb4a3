"""Training where the system lacks what Linux has; Windows lacks all of this."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import OPTIONS, checkpoint

LACKING = """
import os, signal, sys, types

import filelock  # it and Lightning have their own ways for Windows
import platformdirs  # likewise: it takes the module of the system that it is on
from lightning.pytorch.trainer.connectors import signal_connector

signal_connector.signal = types.SimpleNamespace(**vars(signal))
sys.modules["fcntl"] = None
for module, names in {
    signal: ("SIGUSR1", "SIGUSR2", "pthread_sigmask"),
    os: ("fork", "geteuid", "getuid", "pread", "sched_getaffinity"),
}.items():
    for name in names:
        delattr(module, name)


def fsync(handle, sync=os.fsync):
    os.write(handle, b"")  # fails where it is not open for writing
    sync(handle)


os.fsync = fsync
"""


@pytest.mark.slow
def test_training_where_the_system_lacks_much(folder: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"data": str(tmp_path / "shards"), "out": str(tmp_path / "run"), "save_every": 3}
    commands = [
        ["pack", "--data", str(folder), "--out", str(tmp_path / "shards"), "--workers", "1"],
        ["train", *(f"--{name}={value}" for name, value in options.items())],
        ["train", *(f"--{name}={value}" for name, value in (options | {"epochs": 2, "resume": "auto"}).items())],
        ["evaluate", "--data", str(folder), "--weights", str(tmp_path / "run/best.ckpt"), "--workers", "0"],
    ]
    code = (
        LACKING
        + f"import tiny\nfrom odconv.app.cli import main\nfor words in {commands}:\n    assert main(words) == 0, words"
    )
    environment = os.environ | {"ODCONV_CPU_KERNEL": "0", "OMP_NUM_THREADS": "1"}  # it is for Linux
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["epochs"] == 2 or checkpoint(tmp_path / "run/last.ckpt")["epoch"] == 1
    assert {"report.html", "previous.ckpt", "metrics.csv"} <= {path.name for path in (tmp_path / "run").iterdir()}
