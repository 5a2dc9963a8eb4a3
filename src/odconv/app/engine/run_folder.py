"""The folder of a run: locked, so that nothing in it is lost, and what is written to it; that of a trial is deleted."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from odconv.app.engine.checkpoint_io import BEST, LAST, PREVIOUS
from odconv.app.engine.config import RunConfig, defaults
from odconv.app.engine.machine import describe_machine
from odconv.app.engine.resume import Resumed
from odconv.system.files import check_writable, replacing, write_json, write_text
from odconv.system.text import count

LOCK = ".lock"
LOCK_WAIT = 10
"""Seconds; processes that read images for a run that was killed hold its lock for some 5 s longer."""

Config = TypeVar("Config", bound=RunConfig)

CONFIG, DEFAULTS, RESULT = "config.yaml", "defaults.yaml", "result.json"


@contextmanager
def lock_folder(out: Path, resume: str | None) -> Iterator[None]:
    """Make the folder of the run and keep others out of it; see that it holds nothing that would be lost.

    It is an OSError if another run is writing to it, or it cannot be written, or it holds what the run does not go on
    with.
    """
    check_writable(out)
    _check_content(out, resume)
    try:
        locked = FileLock(out / LOCK).acquire(timeout=LOCK_WAIT)
    except Timeout as error:
        raise OSError(f"another run is writing to {out}") from error
    with locked:
        _check_content(out, resume)  # another run may have been quicker
        for partial in out.glob(".*.partial"):  # of a run that was killed
            partial.unlink()
        yield


def _check_content(out: Path, resume: str | None) -> None:
    names = {path.name for path in out.iterdir()} - {LOCK}
    if resume == "auto":
        # a run that was killed before its first checkpoint begins anew; somebody else's folder is left alone
        if names and not names & {LAST, PREVIOUS, CONFIG}:
            raise FileExistsError(f"the output folder {out} is not empty and holds no run to go on with")
        if (out / BEST).exists() and not names & {LAST, PREVIOUS}:
            raise FileNotFoundError(f"{out} holds {BEST} but neither {LAST} nor {PREVIOUS}: there is nothing to resume")
    elif names and (resume is None or out.resolve() not in Path(resume).resolve().parents):
        raise FileExistsError(f"the output folder {out} is not empty; resume=auto goes on with a run that is in it")


def is_finished(config: RunConfig, resumed: Resumed) -> bool:
    """Say whether there is nothing left to do."""
    return resumed.epoch == config.epochs and (Path(config.out) / RESULT).exists()


def write_beginning(config: RunConfig, resumed: Resumed, processes: int) -> None:
    """Write what is known before the first step, and bring the best checkpoint so far along."""
    out = Path(config.out)
    if not is_finished(config, resumed):
        write_text(out / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
        write_text(out / DEFAULTS, yaml.safe_dump(defaults(type(config)), sort_keys=False))
        write_json(out / "machine.json", describe_machine(processes))
    if resumed.path and not (out / BEST).exists() and (best := resumed.path.with_name(BEST)).exists():
        with replacing(out / BEST) as partial:
            shutil.copyfile(best, partial)


def write_result(config: RunConfig, resumed: Resumed, result: Mapping[str, Any]) -> None:
    """Write what came out, unless it was there before."""
    if not is_finished(config, resumed):
        write_json(Path(config.out, RESULT), result)


@contextmanager
def trial(config: Config) -> Iterator[Config]:
    """Give the options of the run: if it is a trial, with a folder that is deleted afterwards for `out`."""
    if config.fast_dev_run is None:
        yield config
        return
    if config.resume not in (None, "auto"):
        raise ValueError(f"fast_dev_run begins anew; leave out resume, which is {config.resume}")
    with TemporaryDirectory(prefix="odconv_") as folder:
        yield replace(config, out=folder)


def place(config: RunConfig) -> str:
    """Say where the results will be."""
    if config.fast_dev_run:
        return f"a trial of {count(config.fast_dev_run, 'step')} that leaves no results"
    return f"results in {config.out}"


def conclusion(config: RunConfig, scores: str) -> str:
    """Say what came out: the scores, and the file of the best; of a trial, that it went well."""
    if config.fast_dev_run:
        return f"fast_dev_run={config.fast_dev_run}: training and evaluation went well, and nothing of them is kept"
    return f"{scores}: {Path(config.out) / BEST}"
