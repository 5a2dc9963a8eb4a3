"""Shared fixtures."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny  # before any other module builds a network

TESTS = Path(__file__).resolve().parent
# for processes that start with `python -m tiny`
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
SHARED = TESTS.parents[1] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data beside the checkout; tests that need it are skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of values computed by the published code."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared/golden beside the checkout")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 105 tiny images to train on and 15 to evaluate on, in three classes."""
    from small_runs import make_folder  # which imports Lightning, for seconds

    return make_folder(tmp_path_factory.mktemp("images"), {"train": 35, "val": 5})


@pytest.fixture(scope="session")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with all that is random in one."""
    from small_runs import OPTIONS, RANDOM

    from odconv.app.classify import train

    out = tmp_path_factory.mktemp("runs") / "whole"
    train(**OPTIONS | RANDOM, data=str(folder), out=str(out))
    return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pyramids of detectors narrow: the heads of 256 channels take longer than all the rest."""
    monkeypatch.setattr("odconv.models.detectors.backbone.CHANNELS", tiny.CHANNELS)


DRAWN = ("test_accuracy", "test_demo", "test_report", "test_visualize")
"""The modules that look at pictures."""


@pytest.fixture(scope="module", autouse=True)
def plain_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the pictures of pages empty where no test looks at them: they take longer than the runs that they show."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in DRAWN:
            patch.setattr("odconv.app.pages.drawing.Drawing.svg", lambda drawing: "<svg></svg>")
            patch.setattr("odconv.app.pages.drawing.Drawing.save", lambda drawing, path: path.touch())
        yield
