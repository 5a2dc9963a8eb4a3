"""Parameters of tests, most of them slow: what one of them shows, the others mostly show too."""

from collections.abc import Iterable
from typing import Any

import pytest
import tiny


def slow_except(values: Iterable[Any], *quick: Any) -> list:
    """Return parameters of a test that are slow but for some."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


FEW = ("resnet18", "resnet50", "mobilenetv2_100")
ZOO = slow_except(tiny.LISTED, *(name for name in tiny.LISTED if name.endswith(FEW)))
"""The networks of the zoo; those of three static networks are quick."""
