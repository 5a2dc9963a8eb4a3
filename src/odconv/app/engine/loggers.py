"""Where the curves of a run go besides its folder: Lightning's loggers, by name."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from odconv.app.engine.config import logger_names
from odconv.system.packages import needed_by


def make_loggers(names: str, out: Path) -> list[Logger]:
    """Return the loggers that the option `logger` names, which write nothing before the run begins.

    An ImportError names a package that is missing; without a login, Weights & Biases is a ValueError.
    """
    return [LOGGERS[name](out) for name in logger_names(names)]


class Wandb(WandbLogger):
    """Weights & Biases' logger, whose run ends with the training: the process's next training has its own."""

    def __init__(self, out: Path) -> None:
        super().__init__(out.resolve().name, out, project=os.environ.get("WANDB_PROJECT", "odconv"))

    def finalize(self, status: str) -> None:
        """End the run."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))


def _wandb(out: Path) -> Logger:
    with needed_by("logger wandb", "wandb"):
        wandb = import_module("wandb")
    _check_login(wandb)
    return Wandb(out)


@rank_zero_only  # the process that logs
def _check_login(wandb: ModuleType) -> None:
    """Fail before the run has a folder, and not as it begins."""
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ValueError("logger wandb needs a login: call wandb login, set WANDB_API_KEY, or WANDB_MODE=offline")


def _mlflow(out: Path) -> Logger:
    with needed_by("logger mlflow", "mlflow"):
        mlflow = import_module("mlflow")
    # Lightning's own default is a folder, which MLflow 3 refuses
    return MLFlowLogger("odconv", run_name=out.resolve().name, tracking_uri=mlflow.get_tracking_uri())


LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda out: TensorBoardLogger(out / "tensorboard", name="", version="", default_hp_metric=False),
    "csv": lambda out: CSVLogger(out / "csv", name=""),
    "wandb": _wandb,
    "mlflow": _mlflow,
}
