"""Real data for the decoding tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.media import shared_dir


@pytest.fixture
def real_videos() -> list[Path]:
    """Real clips; absent data skips at home and fails in CI."""
    found = sorted((shared_dir() / "data/videos").glob("*.mp4"))
    if not found:
        if os.environ.get("CI") == "true":
            pytest.fail("the real clips of shared/data/videos are missing")
        pytest.skip("no real clips here")
    return found
