"""Packages of others: those that not everybody has installed, and what they log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_by(what: str, install: str) -> Iterator[None]:
    """Say what to install where a package cannot be imported.

    Args:
        what: what needs it, such as "odconv.timm".
        install: what pip is to install.

    Raises:
        ImportError: one cannot be imported.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ImportError(f"{what} needs {package}: pip install {install}") from error


@contextmanager
def without_warnings(package: str) -> Iterator[None]:
    """Let a package log errors alone: what it warns of is nothing that its caller's users could change."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
