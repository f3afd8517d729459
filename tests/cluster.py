"""A real Ray cluster on one machine, for tests: a head and some nodes, with token authentication.

Every node is its own `ray start --block` with its own loopback address (127.0.0.1 for the head,
127.0.0.2 and on for the others), so that a driver always joins through the head and a test may
kill any other raylet. Ports are free ones, files live in a temporary folder of the cluster, and
only processes that descend from the ones started here are ever killed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_START_TIMEOUT_S = 400.0
_PATIENCE = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "120",
}
"""What Ray is told to wait for its own processes: the machine may be busy with others."""
_JOB_SERVER_ALONE = """
import sys
if sys.argv[0].endswith("ray/dashboard/dashboard.py") and "--modules-to-load" not in str(sys.argv):
    sys.argv.append("--modules-to-load=JobHead,NodeHead")
"""
"""A `sitecustomize` for nodes: of a dashboard's ten servers, processes of their own that take
longer to start than all else, only the job server and what it needs run. `ray start` has no option
for it."""
_STARTS = 6
"""How often a node is started at most; some of Ray's waits cannot be made longer."""
_SERVICES = (
    "node-manager",
    "object-manager",
    "dashboard-agent-listen",
    "dashboard-agent-grpc",
    "runtime-env-agent",
)


def free_port() -> int:
    """Return a TCP port that nothing listens on, on any address, at this moment.

    It lies below the ports that the kernel gives to outgoing connections: on a busy machine many
    seconds pass before Ray binds it, and one of those might take it meanwhile.
    """
    for _ in range(1000):
        port = 15_000 + secrets.randbelow(17_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError("no free port between 15000 and 32000")


def _end_with_parent() -> None:
    """Have the kernel end a node when the tests are killed; `ray start` then ends its own."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class RayNode:
    """One `ray start --block` and its descendants.

    Attributes
    ----------
    ip : str
        The loopback address that the node announces.
    process : subprocess.Popen
        The starting command; its descendants are the node's processes.
    metrics_port : int
        Where the node's exporter answers Prometheus.
    """

    def __init__(
        self,
        ip: str,
        process: subprocess.Popen[bytes],
        log_path: Path,
        metrics_port: int,
        start_again: Callable[[], RayNode],
    ) -> None:
        self.ip = ip
        self.process = process
        self.log_path = log_path
        self.metrics_port = metrics_port
        self._start_again = start_again
        self._known: set[psutil.Process] = set()

    def restart(self) -> None:
        """Start a node that was killed once more, under the same address."""
        again = self._start_again()
        self.process, self.metrics_port = again.process, again.metrics_port

    def processes(self) -> list[psutil.Process]:
        """Return every process of the node seen so far that still lives."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            self._known.update({root, *root.children(recursive=True)})
        for known in list(self._known):  # orphans keep their children
            with suppress(psutil.NoSuchProcess):
                self._known.update(known.children(recursive=True))
        return [p for p in self._known if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def find(self, name: str) -> list[psutil.Process]:
        """Return the node's processes whose program is called `name` (``raylet``, ...)."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                command = process.cmdline()
                if command and Path(command[0]).name.startswith(name):
                    found.append(process)
        return found

    def kill_raylet(self) -> None:
        """SIGKILL the node's raylet: to the cluster the whole node is lost, without a word."""
        self.processes()  # remember the descendants before they are orphaned
        for raylet in self.find("raylet"):
            raylet.send_signal(signal.SIGKILL)

    def kill_gcs(self) -> None:
        """SIGKILL the cluster's control store; only the head has one."""
        self.processes()
        for gcs in self.find("gcs_server"):
            gcs.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL everything that belongs to the node, and reap it."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)


class RayCluster:
    """A head without CPUs and any number of nodes.

    Parameters
    ----------
    num_nodes : int
        Nodes beside the head.
    cpus_per_node : int
        Logical CPUs that each of them offers.
    head_cpus : int
        Logical CPUs of the head; 0 keeps workers off it, so that they can be killed with a node.
    job_server : bool
        Run the dashboard, which takes jobs, at `job_server`.
    environment : Mapping
        More variables of every node; a ``PYTHONPATH`` comes before the sources.
    """

    def __init__(
        self,
        num_nodes: int = 2,
        cpus_per_node: int = 1,
        head_cpus: int = 0,
        *,
        job_server: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # Unix sockets below the folder must stay shorter than 108 bytes, so it is short itself.
        self.folder = Path(tempfile.mkdtemp(prefix="mmray", dir="/tmp"))
        self.token = secrets.token_hex(32)
        self.port = free_port()
        self.dashboard_port = free_port() if job_server else None
        self.cpus_per_node = cpus_per_node
        self.node_environment = dict(environment or {})
        self.nodes: list[RayNode] = []
        self._num_added = 0
        (self.folder / "site").mkdir()
        (self.folder / "site" / "sitecustomize.py").write_text(_JOB_SERVER_ALONE)
        try:
            self.head = self._start_node("127.0.0.1", head_cpus, head=True)
            self._wait_started(self.head)
            for _ in range(num_nodes):
                self.add_node(wait=False)
            for node in self.nodes:
                self._wait_started(node)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Address for ``RAY_ADDRESS``."""
        return f"127.0.0.1:{self.port}"

    @property
    def job_server(self) -> str:
        """URL of the job server."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a driver, in this process or another, may join."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }

    def add_node(self, *, wait: bool = True, resources: str = "{}") -> RayNode:
        """Start one more node, as an autoscaler would; `resources` is JSON, as Ray takes it."""
        self._num_added += 1
        ip = f"127.0.0.{self._num_added + 1}"
        node = self._start_node(ip, self.cpus_per_node, resources=resources)
        self.nodes.append(node)
        if wait:
            self._wait_started(node)
        return node

    def drain(self, node: RayNode, *, deadline_s: int = 60) -> None:
        """Announce that a node is about to be taken away, with the hook that pods run."""
        (raylet,) = node.find("raylet")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= self.environment
        environment |= {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "MASKMILL_RAYLET_PID": str(raylet.pid),
            "MASKMILL_DRAIN_WAIT_S": "0",
        }
        hook = Path(__file__).resolve().parents[1] / "infra" / "docker" / "maskmill-drain"
        subprocess.run(
            [hook, str(deadline_s)],
            env=environment,
            check=True,
            capture_output=True,
            timeout=_START_TIMEOUT_S,
        )

    def close(self) -> None:
        """Kill every process of the cluster and remove its folder."""
        for node in [*self.nodes, *([self.head] if hasattr(self, "head") else [])]:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_node(
        self, ip: str, num_cpus: int, *, head: bool = False, resources: str = "{}"
    ) -> RayNode:
        metrics_port = free_port()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        if head:
            command += [
                "--head",
                f"--port={self.port}",
                f"--include-dashboard={'true' if self.dashboard_port else 'false'}",
                f"--dashboard-port={self.dashboard_port or free_port()}",
                f"--ray-client-server-port={free_port()}",
                "--no-monitor",
            ]
        else:
            command += [f"--address={self.address}"]
        command += [
            f"--node-ip-address={ip}",
            # One each: nodes that start at the same time would choose the same socket in one.
            f"--temp-dir={self._node_folder(ip)}",
            f"--num-cpus={num_cpus}",
            "--num-gpus=0",
            f"--resources={resources}",
            f"--metrics-export-port={metrics_port}",
            "--object-store-memory=80000000",
            "--min-worker-port=0",  # any free port: several raylets share this machine
            "--max-worker-port=0",
            "--disable-usage-stats",
            "--include-log-monitor=false",
            # Left to Ray, some of these are fixed numbers, and a taken one ends the raylet.
            *(f"--{service}-port={free_port()}" for service in _SERVICES),
            "--log-style=record",
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        # Nodes see the sources as a cluster's image would have the package installed.
        root = str(Path(__file__).resolve().parents[1])
        own = dict(self.node_environment)
        site = str(self.folder / "site")
        paths = [site, own.pop("PYTHONPATH", ""), root, os.environ.get("PYTHONPATH", "")]
        environment |= {
            # The command line is where an installed package puts it.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **own,
            **self.environment,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        del environment["RAY_ADDRESS"]
        environment |= _PATIENCE
        log_path = self.folder / f"node-{ip}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,  # Ray lets workers import from where a driver started
                preexec_fn=_end_with_parent,
            )

        def start_again() -> RayNode:
            return self._start_node(ip, num_cpus, head=head, resources=resources)

        return RayNode(ip, process, log_path, metrics_port, start_again)

    def _node_folder(self, ip: str) -> Path:
        return self.folder / ip.rpartition(".")[2]

    def _gave_up(self, node: RayNode) -> bool:
        logs = self._node_folder(node.ip).glob("session_2*/logs/raylet*")
        return any(
            "Timed out waiting for file" in path.read_text(errors="replace") for path in logs
        )

    def _wait_started(self, node: RayNode) -> None:
        """Wait until a node is up; start it again if some process of it gave up on another.

        A raylet allows its agent, a Python of its own, some fifteen seconds, whatever else the
        machine is busy with.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        num_starts = 1
        while time.monotonic() < deadline:
            if "Ray runtime started" in node.log_path.read_text(errors="replace"):
                node.processes()
                return
            has_failed = self._gave_up(node) or node.process.poll() is not None
            if has_failed and num_starts < _STARTS:
                num_starts += 1
                node.kill()
                shutil.rmtree(self._node_folder(node.ip), ignore_errors=True)
                node.restart()
            if node.process.poll() is not None:
                break
            time.sleep(0.1)
        words = "\n".join(
            line[:500]
            for path in self.folder.glob("*/session_2*/logs/raylet*")
            for line in path.read_text(errors="replace").splitlines()
            if " C " in line[:60] or "Check failed" in line or " E " in line[:60]
        )
        raise RuntimeError(
            f"the Ray node {node.ip} did not start: "
            f"{node.log_path.read_text(errors='replace')[-500:]}\n{words}"
        )


@contextmanager
def ray_cluster(
    num_nodes: int = 2,
    cpus_per_node: int = 1,
    head_cpus: int = 0,
    *,
    job_server: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RayCluster]:
    """Run a cluster for the length of a ``with`` block."""
    cluster = RayCluster(
        num_nodes, cpus_per_node, head_cpus, job_server=job_server, environment=environment
    )
    try:
        yield cluster
    finally:
        cluster.close()
