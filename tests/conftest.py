"""Shared fixtures."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
