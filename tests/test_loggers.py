"""Loggers by name: what each writes, with its own package, and what is refused before anything is written."""

import csv
import sys
from pathlib import Path

import pytest
from small_runs import OPTIONS, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from odconv.app.classify import TrainConfig, train
from odconv.app.cli import main
from odconv.app.pages.reports import read_run, write_report


def run(folder: Path, out: Path, logger: str) -> dict[str, float]:
    """Train for two epochs; return the row of the last."""
    train(**OPTIONS | {"epochs": 2}, data=str(folder), out=str(out), logger=logger)
    write_report(read_run(out))
    assert (out / "tensorboard").exists() == ("tensorboard" in logger)
    return rows(out)[-1]


def test_tensorboard_and_csv_say_what_metrics_csv_does(folder: Path, tmp_path: Path) -> None:
    last = run(folder, tmp_path / "run", "csv,tensorboard")
    with (tmp_path / "run/csv/version_0/metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["top1"]]
    assert [float(row["epoch"]) for row in logged] == [1, 2]
    assert {name: float(logged[-1][name]) for name in last} == pytest.approx(last, rel=1e-6)
    assert "\nlr: 0.003\n" in (tmp_path / "run/csv/version_0/hparams.yaml").read_text()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert events.Scalars("top1")[-1].value == pytest.approx(last["top1"])
    train(**OPTIONS | {"epochs": 3}, data=str(folder), out=str(tmp_path / "run"), logger="csv", resume="auto")
    assert (tmp_path / "run/csv/version_1/metrics.csv").exists()


def test_a_run_without_a_logger_has_its_report(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "run", "none")["epoch"] == 2
    assert "<h2>Throughput</h2>" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_mlflow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages than the tests have
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    last = run(folder, tmp_path / "one", "mlflow")
    client = mlflow.tracking.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("odconv").experiment_id])
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert found.data.params["arch"] == OPTIONS["arch"]
    assert {name: found.data.metrics[name] for name in last} == pytest.approx(last)


@pytest.mark.slow
def test_wandb_gives_each_training_a_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        run(folder, tmp_path / name, "wandb")
        assert wandb.run is None
        assert len([*(tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")]) == 1


def test_wandb_without_a_login_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # what it was told before
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = tmp_path / "run"
    assert main(["train", "--arch=resnet18", "--data=digits", f"--out={out}", "--logger=wandb"]) == 1
    assert "needs a login: call wandb login, set WANDB_API_KEY, or WANDB_MODE=offline" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    assert main(["train", "--arch=resnet18", "--data=digits", f"--out={out}", f"--logger=csv,{name}"]) == 1
    assert capsys.readouterr().err == f"odconv: error: logger {name} needs {name}: pip install {name}\n"
    assert not out.exists()


@pytest.mark.parametrize(("given", "hint"), [("wandbb", "; did you mean wandb"), ("csv,none", ""), ("", "")])
def test_an_unknown_logger_is_refused_with_those_there_are(given: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"one or more of tensorboard, csv, wandb, mlflow .* got '{given}'{hint}"):
        TrainConfig(arch="resnet18", data="digits", out="run", logger=given)
