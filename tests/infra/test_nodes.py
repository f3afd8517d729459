"""What the programs for nodes that go away promise (`infra/docker/maskmill-*`).

* maskmill-drain says where no Ray runs and ends with 3. Else it announces the end of its own node
  and returns when the raylet has gone or the time is over, since SIGTERM follows at once; on demand
  it does not wait. (What the announcement does on a real cluster is seen wherever a test drains a
  node: `tests.cluster.RayCluster.drain` is this hook.)
* maskmill-spot-watch asks the metadata service as AWS and Google Cloud want to be asked, does
  nothing until there is a notice, and then calls maskmill-drain with the time that is left.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.infra.files import INFRA, run

DRAIN = INFRA / "docker" / "maskmill-drain"
WATCH = INFRA / "docker" / "maskmill-spot-watch"
STARTED_S = 1_000
"""Where the clock of a node begins."""


def test_drain_where_no_ray_runs() -> None:
    # A process that exists and is no raylet.
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            done = run(DRAIN, env={"MASKMILL_RAYLET_PID": str(other.pid)})
        finally:
            other.kill()
    assert done.returncode == 3
    assert "no raylet runs here" in done.stderr


@dataclass(frozen=True)
class Node:
    """A node with a raylet, and a clock that only `sleep` and `ray` move on.

    The hook runs with stand-ins for those programs: a real node would take the whole notice.
    """

    folder: Path
    raylet: subprocess.Popen[bytes]

    def drain(self, notice_s: int, **environment: str) -> int:
        """Run the hook to its end; return how many seconds that took by the node's clock."""
        environment |= {
            "PATH_FIRST": str(self.folder),
            "MASKMILL_RAYLET_PID": str(self.raylet.pid),
            "RAY_ADDRESS": "head:6379",
        }
        done = run(DRAIN, str(notice_s), env=environment)
        assert done.returncode == 0, done.stderr
        return int((self.folder / "clock").read_text()) - STARTED_S

    def announced(self) -> dict[str, str]:
        """Return the options that `ray drain-node` was called with."""
        verb, *words = (self.folder / "announced").read_text().splitlines()
        assert verb == "drain-node"
        return dict(zip(words[::2], words[1::2], strict=True))

    def ends_after(self, seconds: int) -> None:
        """Have the raylet go at that time; nobody waits for its zombie."""
        proc = f"/proc/{self.raylet.pid}/cmdline"
        gone = f"kill -9 {self.raylet.pid}; while grep -q . {proc}; do :; done"
        self.write("sleep", f"[ $now -lt {STARTED_S + seconds} ] || {{ {gone}; }}", takes="$1")

    def write(self, program: str, command: str = "", *, takes: str) -> None:
        """Write a stand-in for a program that takes some seconds."""
        clock = self.folder / "clock"
        path = self.folder / program
        path.write_text(
            f"#!/bin/sh\nnow=$(($(cat {clock}) + {takes}))\necho $now >{clock}\n{command}\n"
        )
        path.chmod(0o755)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Return a node whose raylet lives until it is killed."""
    words = ["/opt/ray/raylet", "-c", "read line", "--node_id=node-1"]
    with subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE) as raylet:
        node = Node(tmp_path, raylet)
        (tmp_path / "clock").write_text(str(STARTED_S))
        node.write("sleep", takes="$1")
        node.write("ray", f"printf '%s\\n' \"$@\" >{tmp_path / 'announced'}", takes="2")
        node.write("date", "echo $now", takes="0")
        yield node
        raylet.kill()


def test_drain_waits_until_the_raylet_has_gone(node: Node) -> None:
    node.ends_after(8)
    assert node.drain(20) == 8


def test_drain_waits_no_longer_than_the_notice(node: Node) -> None:
    assert node.drain(20) == 20
    assert node.raylet.poll() is None
    announced = node.announced()
    assert announced["--node-id"] == "node-1"
    assert announced["--address"] == "head:6379"
    assert announced["--deadline-remaining-seconds"] == "20"
    assert announced["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"


def test_drain_does_not_wait_on_demand(node: Node) -> None:
    assert node.drain(20, MASKMILL_DRAIN_WAIT_S="0") == 2
    assert node.announced()["--node-id"] == "node-1"
    assert node.raylet.poll() is None


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
