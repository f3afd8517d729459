"""What the programs for nodes that go away promise (`infra/docker/maskmill-*`).

* maskmill-drain says where no Ray runs and ends with 3. (What it does on a real cluster is seen
  wherever a test drains a node: `tests.cluster.RayCluster.drain` is this hook.)
* maskmill-spot-watch asks the metadata service as AWS and Google Cloud want to be asked, does
  nothing until there is a notice, and then calls maskmill-drain with the time that is left.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.infra.files import INFRA, run

DRAIN = INFRA / "docker" / "maskmill-drain"
WATCH = INFRA / "docker" / "maskmill-spot-watch"


def test_drain_where_no_ray_runs() -> None:
    # A process that exists and is no raylet.
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            done = run(DRAIN, env={"MASKMILL_RAYLET_PID": str(other.pid)})
        finally:
            other.kill()
    assert done.returncode == 3
    assert "no raylet runs here" in done.stderr


class Metadata(ThreadingHTTPServer):
    """The metadata service of a machine: first no notice, then one."""

    def __init__(self, num_quiet: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.num_quiet = num_quiet
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        wanted = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._send(200 if wanted else 400, b"token-1")

    def do_GET(self) -> None:
        self.server.num_quiet -= 1
        noticed = self.server.num_quiet < 0
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "token-1":
                self._send(401, b"")
            else:
                self._send(200 if noticed else 404, b'{"action": "terminate"}')
        elif self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers.get("Metadata-Flavor") == "Google"
            self._send(200 if known else 403, b"TRUE" if noticed else b"FALSE")
        else:
            self._send(404, b"")

    def _send(self, code: int, body: bytes) -> None:
        self.server.asked.append((self.command, self.path))
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    """Return a service that has two quiet answers before its notice."""
    with Metadata(num_quiet=2) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("cloud", "left_s"), [("aws", "110"), ("gcp", "25")])
def test_watch_drains_at_the_notice(
    tmp_path: Path, metadata: Metadata, cloud: str, left_s: str
) -> None:
    # The draining itself has its own test.
    drained = tmp_path / "drained"
    program = tmp_path / "maskmill-drain"
    program.write_text(f'#!/bin/sh\necho "$@" > {drained}\n')
    program.chmod(0o755)
    environment = {
        "PATH_FIRST": str(tmp_path),
        "MASKMILL_METADATA_URL": metadata.url,
        "MASKMILL_SPOT_WATCH_S": "0.05",
        "no_proxy": "127.0.0.1",
    }
    done = run(WATCH, cloud, env=environment)
    assert done.returncode == 0, done.stderr
    assert drained.read_text() == f"{left_s}\n"
    assert len([path for command, path in metadata.asked if command == "GET"]) == 3


def test_watch_wants_a_cloud_it_knows() -> None:
    done = run(WATCH, "azure")
    assert done.returncode == 2
    assert "azure is neither aws nor gcp" in done.stderr
