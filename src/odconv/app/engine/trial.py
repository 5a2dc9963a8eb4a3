"""A run of a few steps, to see that all goes well, which leaves nothing behind: the option fast_dev_run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from odconv.app.engine.checkpoint_io import BEST
from odconv.app.engine.config import RunConfig
from odconv.system.text import count

Config = TypeVar("Config", bound=RunConfig)


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
