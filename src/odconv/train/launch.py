"""The beginning and the end of every run, whatever is trained: its Trainer, its folder, what it says of itself."""

import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from odconv.files import replacing
from odconv.models import METHODS, check_layer_options, split_name
from odconv.report import write_machine, write_report
from odconv.train.claim import CONFIG, RESULT
from odconv.train.config import RunConfig, defaults
from odconv.train.files import BEST
from odconv.train.keep import Best, Last
from odconv.train.resume import Resumed
from odconv.train.trace import Trace
from odconv.train.trainer import make_trainer


def make_run(config: RunConfig, monitor: str, callbacks: Sequence[Callback], **options: Any) -> pl.Trainer:
    """Set up the Trainer of a run, with what keeps its checkpoints.

    Args:
        config: the options of the run.
        monitor: the metric by which the best checkpoint is chosen.
        callbacks: further callbacks, which act before the checkpoints are written.
        options: further arguments of the Trainer.

    Raises:
        ValueError: the machine has no such devices or precision, or the batch cannot be shared out.
    """
    out = Path(config.out)
    trainer = make_trainer(
        config.devices,
        config.amp,
        callbacks=[
            *callbacks,
            *([Trace(out / "trace")] if config.profile else []),
            *([EMAWeightAveraging(decay=config.average)] if config.average else []),
            # first: if the run is killed between the two, resuming repeats the epoch, and with it this one
            Best(out, monitor),
            Last(out, config.save_every),
        ],
        timeout=config.timeout,
        logger=TensorBoardLogger(out / "tensorboard", name="", version="", default_hp_metric=False),
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        **options,
    )
    parts = trainer.world_size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes x accumulate = {trainer.world_size} x "
            f"{config.accumulate}, got {config.batch_size}"
        )
    return trainer


def resolve_layers(arch: str, kernel_num: int | None, reduction: float | None) -> dict[str, Any]:
    """Return the options of a network's dynamic layers by name, with what is None filled in by the defaults."""
    given = {"kernel_num": kernel_num, "reduction": reduction}
    method_name, _ = split_name(arch)
    if method_name is None:
        return given
    method = METHODS[method_name]
    defaults = {name: parameter.default for name, parameter in inspect.signature(method.layer).parameters.items()}
    return {name: (defaults | method.options).get(name) if value is None else value for name, value in given.items()}


def layer_options(config: RunConfig) -> dict[str, Any]:
    """Return the further options of the dynamic layers of a run: `init` and others; none for a static network."""
    given = config.layer_options or {}
    check_layer_options(config.arch, given)
    return {"init": config.init, **given} if split_name(config.arch)[0] else {}


def is_finished(config: RunConfig, resumed: Resumed) -> bool:
    """Say whether there is nothing left to do."""
    return resumed.epoch == config.epochs and (Path(config.out) / RESULT).exists()


def write_beginning(config: RunConfig, resumed: Resumed, processes: int) -> None:
    """Write what is known before the first step, and bring the best checkpoint so far along."""
    out = Path(config.out)
    if not is_finished(config, resumed):
        _write(out / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
        write_machine(out, processes)
    if resumed.path and not (out / BEST).exists() and (best := resumed.path.with_name(BEST)).exists():
        with replacing(out / BEST) as partial:
            shutil.copyfile(best, partial)


def write_result(config: RunConfig, resumed: Resumed, result: Mapping[str, Any]) -> None:
    """Write what came out, and the report, unless they were there before: a run may be killed between the two."""
    written, report = Path(config.out, RESULT), Path(config.out, "report.html")
    if not is_finished(config, resumed):
        _write(written, json.dumps(result, indent=2) + "\n")
    if not report.exists() or report.stat().st_mtime_ns < written.stat().st_mtime_ns:
        print(write_report(config.out, defaults(type(config))))


def describe_resumption(config: RunConfig, resumed: Resumed) -> Iterator[str]:
    """Say where a resumed run goes on, and with which other options."""
    if resumed.path:
        where = f", batch {resumed.batch + 1}" if resumed.batch else ""
        yield f"going on from {resumed.path} with epoch {resumed.epoch + 1}{where}"
    changes = [
        f"{name} {resumed.options[name]} -> {value}"
        for name, value in asdict(config).items()
        if name != "resume" and value != resumed.options.get(name, value)
    ]
    if changes:
        yield "changed: " + ", ".join(changes)


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a network learns, or could learn if nothing were frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)
