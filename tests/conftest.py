"""Fixtures of the whole suite: real S3 servers, started once and only when a test asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from tests import servers

# Tests run in as many processes as there are cores. Threads of OpenMP that wait for each other
# keep cores busy meanwhile: two processes of two each took twenty times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[None]:
    """Put the credentials of the test servers into the environment for the session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", servers.ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def seaweedfs(s3_credentials: None) -> Iterator[servers.S3Server]:
    """Return an S3 server with faithful conditional writes."""
    yield from _running(servers.seaweedfs(), "weed")


@pytest.fixture(scope="session")
def rclone(s3_credentials: None) -> Iterator[servers.S3Server]:
    """Return an S3 server that ignores the conditions of a write."""
    yield from _running(servers.rclone(), "rclone")


def _running(
    server: AbstractContextManager[servers.S3Server], program: str
) -> Iterator[servers.S3Server]:
    try:
        servers.binary(program)
    except FileNotFoundError as missing:
        # A machine without the test extra may skip; a green CI must have run it.
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
    with server as running:
        yield running
