"""The networks of the zoo as parameters of tests: those of three static networks; the others are slow."""

import pytest
import tiny

MOSTLY = ("resnet18", "resnet50", "mobilenetv2_100")
ZOO = [pytest.param(name, marks=() if name.endswith(MOSTLY) else pytest.mark.slow) for name in tiny.LISTED]
