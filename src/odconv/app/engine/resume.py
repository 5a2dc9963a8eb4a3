"""Going on from a checkpoint: which one, where in the run, and whether it fits."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from odconv.app.engine.checkpoint_io import LAST, PREVIOUS
from odconv.app.engine.config import RunConfig
from odconv.checkpoints import Checkpoint, malformed, read_checkpoint
from odconv.system.text import first_few

FIXED = (
    *("arch", "kernel_num", "reduction", "layer_options", "optimizer", "attention_lr"),
    *("seed", "batch_size", "accumulate", "average"),
)
"""Options that a resumed run of any kind must share with its checkpoint: network, optimizer, order of the images."""

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """Where a run begins: the checkpoint to go on from, the epoch and its batch that are next, counted from 0.

    `options` are those that the checkpoint was made with, `processes` how many trained together then.
    """

    path: Path | None = None
    epoch: int = 0
    batch: int = 0
    options: Mapping[str, Any] = MappingProxyType({})
    processes: int | None = None


def find_resumed(config: RunConfig, classes: list[str], fixed: Sequence[str]) -> Resumed:
    """Return where to begin; a ValueError if the checkpoint has other classes, or other options that are `fixed`."""
    if config.resume is None:
        return Resumed()
    if config.resume != "auto":
        return _check(_read(Path(config.resume)), config, classes, fixed)
    last, previous = Path(config.out, LAST), Path(config.out, PREVIOUS)
    if not last.exists() and not previous.exists():
        return Resumed()
    try:
        checkpoint = _read(last)
    except (OSError, ValueError) as error:
        if not previous.exists():
            raise
        logger.warning("%s; going on from %s instead", error, previous)
        checkpoint = _read(previous)
    return _check(checkpoint, config, classes, fixed)


def describe_resumption(config: RunConfig, resumed: Resumed) -> Iterator[str]:
    """Say where a resumed run goes on, and with which other options."""
    if resumed.path:
        where = f", batch {resumed.batch + 1}" if resumed.batch else ""
        done = resumed.epoch >= config.epochs
        yield (
            f"all {config.epochs} epochs are done in {resumed.path}; more epochs would go on from it"
            if done
            else f"going on from {resumed.path} with epoch {resumed.epoch + 1}{where}"
        )
    changes = [
        f"{name} {resumed.options[name]} -> {value}"
        for name, value in asdict(config).items()
        if name != "resume" and value != resumed.options.get(name, value)
    ]
    if changes:
        yield "changed: " + ", ".join(changes)


def _read(path: Path) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    if "odconv" not in checkpoint.content:
        raise ValueError(f"cannot resume {path}: it holds no state of a training run; weights={path} starts from it")
    return checkpoint


def _check(checkpoint: Checkpoint, config: RunConfig, classes: list[str], fixed: Sequence[str]) -> Resumed:
    """Return where a checkpoint stands in its run, if this run can go on from there."""
    path = checkpoint.path
    with malformed(path):
        saved, notes = checkpoint.options, checkpoint.notes
        if other := sorted({*fixed} - {*saved}):
            raise ValueError(f"cannot resume {path}: it is of another kind of run, one without {', '.join(other)}")
        for name in (*FIXED, *fixed):
            now = getattr(config, name)
            before = saved.get(name, now)  # an option that is younger than the checkpoint
            if name == "layer_options" and "norm" in (before or {}):  # which a warm start may have added
                now = {"norm": before["norm"]} | (now or {})
            if before != now:
                raise ValueError(f"cannot resume {path}: its {name} is {before}, that of this run {now}")
        if (known := notes["classes"]) != classes:
            there, here = ([name for name in a if name not in b] for a, b in ((known, classes), (classes, known)))
            raise ValueError(
                f"cannot resume {path}: its classes are others than those of the data: only the checkpoint has "
                f"{first_few(there)}, only the data has {first_few(here)}"
            )
        batch = notes.get("batch", 0)
        done = checkpoint.content["epoch"] + (batch == 0)  # epochs
        if done + (batch > 0) > config.epochs:
            raise ValueError(f"epochs must be at least {done + (batch > 0)} to resume {path}, got {config.epochs}")
        return Resumed(path, done, batch, saved, notes.get("processes"))
