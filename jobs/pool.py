"""The worker pool on Ray Core: the only file that imports ray.

One actor per worker, never restarted and no call ever repeated by Ray: whatever dies is reported
and the scheduler decides. All of Ray's exceptions are translated here, into `FailureKind` and one
sentence. Calls of an actor go through concurrency groups, so heartbeats and cancellations are
answered while videos are tracked.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from math import ceil
from pathlib import Path
from typing import Any

import ray
import ray.exceptions as rex
from ray.job_config import JobConfig

from jobs.config import PoolConfig
from jobs.shipping import installed_version
from jobs.submitted import reserved_cpus, use_spare_workers
from jobs.workforce import (
    AttemptDone,
    AttemptError,
    Event,
    GpuPacking,
    Heartbeat,
    PoolNotice,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
    down_after_setup,
    failed_attempt,
)
from workers.errors import ConfigError, FailureKind, MaskmillError, StoreError
from workers.messages import Attempt, Proposal, WorkerSpec

_log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_CENSUS_S = 5.0
"""How often the cluster's resources are looked at, for ``--workers auto``."""
_LOCAL_STARTS = 3
"""Some of Ray's waits for its own processes are fixed; a busy machine gets another chance."""
_REACH_S = 10.0
"""How long a head node may take to accept a connection."""
_CLOSE_S = 10.0
"""How long workers may take to free their models when the pool closes."""
_LEAVE_S = 30.0
"""How long a released worker may take to free its model before its process is ended."""
_OBJECT_STORE_BYTES = 128 << 20
"""Object store of a local Ray: proposals are a few kilobytes each."""
_TRACKERS_WITHOUT_GPU = ("flow",)
_ACCELERATOR = "accelerator_type:"
"""How the resource begins with which a node tells the model of its GPUs."""

# What tells that an actor, or the way to it, is gone. The first is the family of actor errors;
# the others stand beside it in Ray's tree, not below it. RayTaskError, an exception of our own
# code, is deliberately not here.
_DEATHS = (
    rex.RayActorError,
    rex.NodeDiedError,
    rex.WorkerCrashedError,
    rex.LocalRayletDiedError,
    rex.OutOfMemoryError,
    rex.ObjectLostError,  # an answer went down with its node
    rex.ActorUnschedulableError,
    rex.RuntimeEnvSetupError,
    rex.RaySystemError,
)


_COLOURS = re.compile(r"\x1b\[\d+m")
_NODE_DIED = re.compile(r"\bnode\b.{0,40}\b(died|dead)\b")


class _Call(Enum):
    """What an outstanding reference answers."""

    PLACED = auto()
    NODE_SETUP = auto()
    SETUP = auto()
    PROCESS = auto()
    PROGRESS = auto()


@dataclass(slots=True, eq=False)
class _Actor:
    worker_id: str
    handle: Any
    since: float
    """When it was asked for, then when its setup began."""
    placed: bool = False
    ready: bool = False
    told_draining: bool = False
    host: str = ""
    node_id: str = ""
    refs: dict[Any, tuple[_Call, str]] = field(default_factory=dict)
    """Outstanding calls: reference -> (what, attempt id)."""
    asked_at: float = 0.0
    asking: bool = False


class RayPool:
    """Workers as Ray actors, on a cluster or on a Ray that is started here.

    Parameters
    ----------
    spec : WorkerSpec
        What every worker is born with.
    config : PoolConfig
        How many workers, and what each may use. ``config.ray_address``, else ``RAY_ADDRESS``,
        joins a cluster; without either a local Ray is started, and ended by `close`.
    worker_cls : type, optional
        The worker; `workers.actor.TrackingWorker` by default.
    head_lost_after_s : float
        After so many seconds without an answer from the head node the run ends. Ray ends the whole
        process, without an exception, after 60.
    setup_within_s : float
        How long a worker may take to load, in seconds, download of the weights included.

    Raises
    ------
    StoreError
        The cluster is unreachable or refuses the token.
    ConfigError
        The address is none, or this machine cannot hold a single worker.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        config: PoolConfig,
        *,
        worker_cls: Any = None,
        head_lost_after_s: float = 40.0,
        setup_within_s: float = 1800.0,
    ) -> None:
        if worker_cls is None:
            from workers.actor import TrackingWorker

            worker_cls = TrackingWorker
        self._spec = spec
        self._config = config
        self._head_lost_after_s = head_lost_after_s
        self._setup_within_s = setup_within_s
        self._actors: dict[str, _Actor] = {}
        self._num_started = 0
        self._pending: list[Event] = []
        self._num_places = 0
        self._kinds: set[frozenset[str]] = set()
        self._draining: dict[str, float] = {}  # by node: when it goes, on the monotonic clock
        self._leaving: list[tuple[float, Any]] = []  # released actors, and when to end them
        self._census_at = float("-inf")
        self._no_place_since: float | None = None
        self._crowded_since: float | None = None
        self._owns_ray = False
        self._is_local = False
        self._closed = False
        self._join()
        try:
            self._gcs_address = str(ray.get_runtime_context().gcs_address)
            self._head_seen_at = self._head_asked_at = time.monotonic()
            self._driver_cpus = {ray.get_runtime_context().get_node_id(): reserved_cpus()}
            # None unless workers are to share GPUs as far as measured memory allows.
            self._packing = GpuPacking() if config.gpus_per_worker == "auto" else None
            self._num_gpus = self._gpus_per_worker()
            self._actor_cls = ray.remote(
                num_cpus=config.cpus_per_worker,
                num_gpus=self._num_gpus,
                max_restarts=0,
                max_task_retries=0,
                concurrency_groups={"process": config.videos_per_worker + 1, "control": 2},
                scheduling_strategy="SPREAD",
            )(worker_cls)
            self._take_census(time.monotonic())
        except BaseException:
            self.close()
            raise

    # -- the verbs of a pool -------------------------------------------------------------------

    @property
    def num_workers(self) -> int:
        """Workers that the run may have now.

        A number that was asked for stands. Otherwise it is what the nodes can hold, at least the
        minimum; on a cluster a maximum is asked for at once, since actors without a place are what
        makes an autoscaler bring nodes.
        """
        config = self._config
        if config.workers != "auto":
            return config.workers
        num_workers = self._num_places
        if config.max_workers is not None:
            is_demand = not self._is_local
            num_workers = config.max_workers if is_demand else min(num_workers, config.max_workers)
        return max(1, num_workers, config.min_workers or 0)

    @property
    def is_mixed(self) -> bool:
        """Whether nodes that can hold workers announce different types of accelerators."""
        return len(self._kinds) > 1

    def start_worker(self) -> str:
        """Ask Ray for one more actor and return its id."""
        self._num_started += 1
        worker_id = f"worker-{self._num_started}"
        handle = self._actor_cls.options(num_gpus=self._num_gpus).remote(self._spec, keep_log=True)
        actor = _Actor(worker_id, handle, time.monotonic())
        self._actors[worker_id] = actor
        # The first answer tells that the actor has found a place, and which.
        self._call(actor, _Call.PLACED, handle.__ray_call__, _place_of, group="control")
        return worker_id

    def forgo_worker(self) -> str | None:
        """Give up the newest actor that no node has a place for; return its id."""
        for worker_id, actor in reversed(self._actors.items()):
            if not actor.placed:
                self.kill(worker_id)
                return worker_id
        return None

    def gpu_measured(self, peak_bytes: int, total_bytes: int) -> bool:
        """With ``--gpus-per-worker auto``: whether actors from now on share a GPU otherwise."""
        if self._packing is None or not self._packing.measured(peak_bytes, total_bytes):
            return False
        self._num_gpus = self._packing.share
        self._census_at = float("-inf")  # the nodes hold another number of workers now
        return True

    def begin(self, worker_id: str, attempt: Attempt) -> None:
        """Send an attempt to its actor."""
        actor = self._actors.get(worker_id)
        if actor is not None:  # else its WorkerDown is on its way to the driver
            process = actor.handle.process
            self._call(actor, _Call.PROCESS, process, attempt, group="process")

    def cancel(self, worker_id: str, attempt_id: str) -> None:
        """Ask an attempt to stop; it answers with an `AttemptError`."""
        actor = self._actors.get(worker_id)
        if actor is not None:
            actor.handle.cancel.options(concurrency_group="control").remote(attempt_id)

    def kill(self, worker_id: str) -> None:
        """End an actor's process at once."""
        actor = self._actors.pop(worker_id, None)
        if actor is not None:
            self._end(actor)

    def release(self, worker_id: str) -> None:
        """Let an actor free its model and end; what takes too long is ended by force."""
        actor = self._actors.pop(worker_id, None)
        if actor is None:
            return
        actor.refs.clear()
        with contextlib.suppress(rex.RayError, ValueError):
            actor.handle.destroy.remote()
            actor.handle.__ray_terminate__.remote()  # once it has done so
        self._leaving.append((time.monotonic() + _LEAVE_S, actor.handle))

    def events(self, timeout_s: float) -> list[Event]:
        """Return what happened, waiting at most `timeout_s` seconds for the first event.

        Parameters
        ----------
        timeout_s : float
            Longest wait in seconds.

        Returns
        -------
        list of Event
            Results first, then losses: an attempt that ended before its worker died has ended.

        Raises
        ------
        StoreError
            The head node of the cluster is lost, or no node can hold a worker.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            self._watch_head(now)
            self._take_census(now)
            self._watch_places(now)
            self._ask_for_heartbeats(now)
            self._give_up_slow_starters(now)
            self._end_those_that_left(now)
            events, self._pending = self._pending, []
            wait_s = 0.0 if events else max(0.0, min(deadline - now, _HEARTBEAT_S / 2))
            events += self._answers(wait_s)
            if events or time.monotonic() >= deadline:
                return events

    def close(self) -> None:
        """Let workers free their models, end them, and end a Ray that was started here."""
        if self._closed:
            return
        self._closed = True
        if not ray.is_initialized():
            return
        try:
            head_answers = self._head_answers()
            if head_answers:
                farewells = [a.handle.destroy.remote() for a in self._actors.values() if a.ready]
                if farewells:
                    ray.wait(farewells, num_returns=len(farewells), timeout=_CLOSE_S)
                for actor in self._actors.values():
                    self._end(actor)
                self._end_those_that_left(float("inf"))
        except rex.RayError as error:
            _log.warning("workers could not be ended in good order: %s", _first_line(error))
        finally:
            self._actors.clear()
            if self._owns_ray:
                ray.shutdown()

    # -- joining -------------------------------------------------------------------------------

    def _join(self) -> None:
        """Join the cluster, or start a local Ray."""
        if ray.is_initialized():  # by the caller, who will also end it
            return
        address = self._config.ray_address or os.environ.get("RAY_ADDRESS") or None
        self._is_local = address in (None, "local")
        if address is not None and not self._is_local:
            _check_reachable(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._is_local:
            # Ray's waits are too short for a start on a machine that is busy with other things.
            os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
            options |= self._local_options()
        else:
            options["address"] = address
        num_starts = _LOCAL_STARTS if self._is_local else 1
        use_spare_workers()
        for starts_left in reversed(range(num_starts)):
            try:
                with _own_sigterm_kept():
                    ray.init(**options)
                break
            except Exception as error:  # a node that starts too slowly raises a bare Exception
                if not starts_left or "timed out during startup" not in str(error):
                    raise _join_error(address, error) from error
                _log.warning("a local Ray did not start in time and is started again")
                ray.shutdown()
        self._owns_ray = True
        _keep_messages_off_the_terminal()

    def _local_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        config = self._config
        num_asked = (config.min_workers or 0) if config.workers == "auto" else config.workers
        # So many were asked for, so they run, even if they share this machine's cores.
        if num_asked:
            wanted = ceil(num_asked * config.cpus_per_worker)
            options["num_cpus"] = max(wanted, os.cpu_count() or 1)
        # Workers find the packages where this process found them, also in a source checkout.
        root = str(Path(importlib.import_module("workers").__path__[0]).parent)
        options["job_config"] = JobConfig(_py_driver_sys_path=[root])
        return options

    def _gpus_per_worker(self) -> float:
        if isinstance(self._config.gpus_per_worker, (int, float)):
            return self._config.gpus_per_worker
        tracker = self._spec.tracker
        if tracker.device == "cpu" or tracker.name.split(":")[0] in _TRACKERS_WITHOUT_GPU:
            return 0
        if self._config.gpus_per_worker == "auto":
            return 1  # also of a cluster whose GPUs come with demand
        return 1 if ray.cluster_resources().get("GPU", 0) else 0

    # -- the cluster ---------------------------------------------------------------------------

    def _take_census(self, now: float) -> None:
        """Count how many workers the nodes could hold; complain when that is none for long."""
        if now - self._census_at < _CENSUS_S:
            return
        nodes = self._nodes()
        if nodes is None:
            return  # the last one stands
        self._census_at = now
        places = 0
        for node in nodes:
            if node["NodeID"] in self._draining:
                continue
            resources = node["Resources"]
            num_cpus = resources.get("CPU", 0) - self._driver_cpus.get(node["NodeID"], 0)
            fitting = [max(num_cpus, 0) / self._config.cpus_per_worker]
            if self._num_gpus:
                fitting.append(resources.get("GPU", 0) / self._num_gpus)
            held = int(min(fitting) + 1e-6)
            places += held
            if held:
                self._kinds.add(frozenset(r for r in resources if r.startswith(_ACCELERATOR)))
        self._num_places = places
        if places:
            self._no_place_since = None
            return
        if self._no_place_since is None:
            self._no_place_since = now
            if self._is_local:
                raise ConfigError(
                    f"{self._demand()}, and this Ray has {self._supply()}: ask for less with "
                    "--cpus-per-worker and --gpus-per-worker"
                )
            self._notice(f"{self._demand()}, and the cluster has {self._supply()}: waiting")
        if now - self._no_place_since >= self._config.place_within_s:
            raise StoreError(
                f"{self._demand()}, and for {self._config.place_within_s:g} s no node of the "
                f"cluster could hold one, it has {self._supply()}: add nodes, or ask for less with "
                "--cpus-per-worker and --gpus-per-worker"
            )

    def _watch_places(self, now: float) -> None:
        """Complain when for long no worker gets its place, although nodes could hold some."""
        if not self._actors or any(actor.placed for actor in self._actors.values()):
            self._crowded_since = None
        elif self._crowded_since is None:
            self._crowded_since = now
        elif self._num_places and now - self._crowded_since >= self._config.place_within_s:
            raise StoreError(
                f"{self._demand()}, and for {self._config.place_within_s:g} s none was free on a "
                f"cluster with {self._supply()}: other programs hold them, wait for their end or "
                "add nodes"
            )

    def _notice(self, text: str) -> None:
        _log.warning("%s", text)
        self._pending.append(PoolNotice(text))

    def _nodes(self) -> list[dict[str, Any]] | None:
        """Return the living nodes; None while the head does not answer."""
        if not self._head_answers():  # ray.nodes() would block
            return None
        return [node for node in ray.nodes() if node["Alive"]]

    def _note_draining_nodes(self) -> None:
        """Remember which nodes are to be taken away: when they go, Ray often says only 'lost'."""
        state: Any = getattr(importlib.import_module("ray._private.state"), "state", None)
        ask = getattr(state, "get_draining_nodes", None)  # there is no public way to ask
        if ask is None:
            return
        for node_id, unix_ms in ask().items():
            left_s = unix_ms / 1000 - time.time() if unix_ms else float("inf")
            if node_id not in self._draining:
                self._census_at = float("-inf")  # it has no places any more
            self._draining[node_id] = time.monotonic() + left_s

    def _tell_of_draining(self) -> None:
        """Say once of each worker in service that its node goes; end those that still load."""
        for actor in list(self._actors.values()):
            if actor.node_id not in self._draining or actor.told_draining:
                continue
            actor.told_draining = True
            if actor.ready:
                left_s = self._draining[actor.node_id] - time.monotonic()
                self._pending.append(WorkerDraining(actor.worker_id, max(0.0, left_s)))
            else:
                self.kill(actor.worker_id)
                sentence = "a worker was given up while it loaded: its node is being taken away"
                self._pending.append(WorkerDown(actor.worker_id, FailureKind.PREEMPTED, sentence))

    def _drained(self, actor: _Actor) -> bool:
        if actor.node_id not in self._draining and self._head_answers():
            self._note_draining_nodes()
        return actor.node_id in self._draining

    def _demand(self) -> str:
        gpus = f" and {self._num_gpus:g} GPUs" if self._num_gpus else ""
        return f"a worker needs {self._config.cpus_per_worker:g} CPUs{gpus}"

    def _supply(self) -> str:
        nodes = [node["Resources"] for node in self._nodes() or ()]
        totals = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        places = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
        return f"{totals['CPU']:g} CPUs and {totals['GPU']:g} GPUs on {places}"

    def _watch_head(self, now: float) -> None:
        if now - self._head_asked_at < 2 * _HEARTBEAT_S:
            return
        self._head_asked_at = now
        if self._head_answers():
            self._head_seen_at = time.monotonic()
            self._note_draining_nodes()
            self._tell_of_draining()
        elif now - self._head_seen_at >= self._head_lost_after_s:
            raise StoreError(
                f"the head node of the Ray cluster at {self._gcs_address} has not answered for "
                f"{self._head_lost_after_s:g} s: what is committed stays, run the same command "
                "again once the cluster is back"
            )

    def _head_answers(self) -> bool:
        """Whether the cluster's control store accepts a connection; Ray itself would block."""
        return not hasattr(self, "_gcs_address") or _answers(self._gcs_address, 1.0)

    # -- the calls -----------------------------------------------------------------------------

    def _call(
        self, actor: _Actor, call: _Call, method: Any, *args: Any, group: str | None = None
    ) -> None:
        bound = method.options(concurrency_group=group) if group else method
        attempt_id = args[0].attempt_id if call is _Call.PROCESS else ""
        actor.refs[bound.remote(*args)] = (call, attempt_id)

    def _ask_for_heartbeats(self, now: float) -> None:
        for actor in self._actors.values():
            if actor.ready and not actor.asking and now - actor.asked_at >= _HEARTBEAT_S:
                actor.asking, actor.asked_at = True, now
                self._call(actor, _Call.PROGRESS, actor.handle.progress, group="control")

    def _give_up_slow_starters(self, now: float) -> None:
        for actor in list(self._actors.values()):
            if actor.placed and not actor.ready and now - actor.since >= self._setup_within_s:
                self.kill(actor.worker_id)
                sentence = f"a worker was not ready {self._setup_within_s:g} s after its start"
                self._pending.append(WorkerDown(actor.worker_id, FailureKind.WORKER_LOST, sentence))

    def _end_those_that_left(self, now: float) -> None:
        while self._leaving and self._leaving[0][0] <= now:
            with contextlib.suppress(rex.RayError, ValueError):
                ray.kill(self._leaving.pop(0)[1], no_restart=True)

    def _answers(self, wait_s: float) -> list[Event]:
        """Wait for outstanding calls and turn their answers into events."""
        owners = {ref: actor for actor in self._actors.values() for ref in actor.refs}
        if not owners:
            time.sleep(wait_s)
            return []
        refs = list(owners)
        done, _ = ray.wait(refs, num_returns=1, timeout=wait_s)
        if done:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        events: list[Event] = []
        losses: dict[str, BaseException] = {}
        for ref in done:
            actor = owners[ref]
            if ref not in actor.refs:  # an earlier answer of this batch ended the actor
                continue
            call, attempt_id = actor.refs[ref]
            try:
                answer = ray.get(ref, timeout=_HEARTBEAT_S)
            except rex.GetTimeoutError:
                continue  # still on its way from another node
            except _DEATHS as error:
                losses.setdefault(actor.worker_id, error)
                continue
            except Exception as error:  # our own code, as RayTaskError or as what it wraps
                del actor.refs[ref]
                events += self._raised(actor, call, attempt_id, error)
                continue
            del actor.refs[ref]
            events += self._answered(actor, call, attempt_id, answer)
        for worker_id, loss in losses.items():
            lost = self._actors.pop(worker_id, None)
            if lost is not None:
                events.append(self._loss(lost, loss))
                self._end(lost)
        return events

    def _answered(
        self, actor: _Actor, call: _Call, attempt_id: str, answer: Any
    ) -> Iterator[Event]:
        match call:
            case _Call.PLACED:
                actor.placed, actor.since = True, time.monotonic()
                actor.node_id, version = answer
                if version == installed_version():
                    self._call(actor, _Call.NODE_SETUP, actor.handle.setup_on_node)
                    return
                # Before it is sent anything else: it might understand it differently.
                self.kill(actor.worker_id)
                yield down_after_setup(actor.worker_id, _other_version(version))
            case _Call.NODE_SETUP:
                self._call(actor, _Call.SETUP, actor.handle.setup)
            case _Call.SETUP:
                actor.ready, actor.host = True, answer.host
                yield WorkerUp(actor.worker_id, answer)
            case _Call.PROGRESS:
                actor.asking = False
                yield Heartbeat(actor.worker_id, tuple(answer.values()))
            case _Call.PROCESS if isinstance(answer, Proposal):
                yield AttemptDone(attempt_id, answer)
            case _Call.PROCESS:
                yield AttemptError(attempt_id, answer)

    def _raised(
        self, actor: _Actor, call: _Call, attempt_id: str, error: Exception
    ) -> Iterator[Event]:
        cause = getattr(error, "cause", None)
        cause = cause if isinstance(cause, BaseException) else error
        if call is _Call.PROCESS:
            yield failed_attempt(attempt_id, cause, _COLOURS.sub("", str(error)))
        elif call is _Call.PROGRESS:
            actor.asking = False
            _log.warning("%s did not tell its progress: %s", actor.worker_id, _first_line(cause))
        else:
            _log.info("%s did not start: %s", actor.worker_id, _COLOURS.sub("", str(error)))
            self.kill(actor.worker_id)
            yield down_after_setup(actor.worker_id, _missing_code(str(error)) or cause)

    def _end(self, actor: _Actor) -> None:
        """Kill an actor; one that is unreachable or dead already is no error."""
        actor.refs.clear()
        with contextlib.suppress(rex.RayError, ValueError):
            ray.kill(actor.handle, no_restart=True)

    def _loss(self, actor: _Actor, error: BaseException) -> WorkerDown:
        """Translate a death: what Ray says becomes a kind and a sentence."""
        _log.info("%s is lost: %s", actor.worker_id, error)
        where = f"a worker on {actor.host}" if actor.host else "a worker"
        text = str(error)
        if (isinstance(error, rex.RayActorError) and error.preempted) or self._drained(actor):
            sentence = f"{where} was lost: its node was taken away"
            return WorkerDown(actor.worker_id, FailureKind.PREEMPTED, sentence)
        if isinstance(error, rex.OutOfMemoryError):
            sentence = f"{where} was stopped because its node ran out of memory"
            return WorkerDown(actor.worker_id, FailureKind.OUT_OF_MEMORY, sentence)
        if isinstance(error, rex.RayActorError) and error.actor_init_failed:
            cause = getattr(error, "cause", None) or RuntimeError(_last_line(text))
            return down_after_setup(actor.worker_id, _missing_code(text) or cause)
        if isinstance(error, rex.ActorUnavailableError):
            # It may live on, cut off from us: it is killed, so that it cannot go on unseen.
            reason = "it cannot be reached any more"
        elif isinstance(error, rex.NodeDiedError) or _NODE_DIED.search(text):
            reason = "its node died"
        elif isinstance(error, (rex.RayActorError, rex.WorkerCrashedError)):
            reason = "its process was killed or crashed"
        else:
            reason = _first_line(error)
        kind = FailureKind.WORKER_LOST
        return WorkerDown(actor.worker_id, kind, f"{where} was lost: {reason}")


def _place_of(worker: object) -> tuple[str, str]:
    """Return an actor's node, and the version of maskmill there; called inside the actor."""
    return str(ray.get_runtime_context().get_node_id()), installed_version()


def _other_version(version: str) -> ConfigError:
    return ConfigError(
        f"the driver has maskmill {installed_version()}, and a worker's node has maskmill "
        f"{version}: install the same version on every node, or submit with --ship-code"
    )


def _missing_code(text: str) -> ConfigError | None:
    """Return the sentence for a worker whose node could not import its class, if Ray says so."""
    if "failed to import on the worker" not in text:
        return None
    reason = next(
        (line for line in text.splitlines() if "No module named" in line), _last_line(text)
    )
    return ConfigError(
        f"a worker's node cannot import maskmill ({_COLOURS.sub('', reason).strip()}): install "
        f"maskmill {installed_version()} on every node, or submit with --ship-code"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _answers(address: str, timeout_s: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except OSError:
        return False


def _check_reachable(address: str) -> None:
    """Refuse an address that is none, and find out soon whether anything listens there.

    `ray.init` would try for minutes.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ConfigError(
            f"{address!r} is not the address of a Ray cluster: give HOST:PORT of its head node, "
            "for instance 10.0.0.1:6379 (maskmill needs the cluster itself, not a Ray Client)"
        )
    deadline = time.monotonic() + _REACH_S
    while not _answers(address, timeout_s=_REACH_S / 2):
        if time.monotonic() >= deadline:
            raise StoreError(
                f"no Ray cluster answers at {address}: check RAY_ADDRESS, and that the head node "
                "runs and can be reached from here"
            )
        time.sleep(0.5)


def _join_error(address: str | None, error: BaseException) -> MaskmillError:
    if isinstance(error, rex.AuthenticationError):
        where = f"the Ray cluster at {address}" if address else "Ray"
        return StoreError(
            f"{where} wants a token and none was found ({_first_line(error).split('. ')[0]}): set "
            "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
        )
    if address in (None, "local"):
        return StoreError(f"a local Ray could not be started: {_first_line(error)}")
    if address == "auto":
        return StoreError("no Ray cluster runs on this machine: start one, or name its address")
    return StoreError(
        f"the Ray cluster at {address} did not let us in: check the token (RAY_AUTH_MODE=token "
        f"with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, the same as on the cluster) and that it runs "
        f"Ray {ray.__version__} on Python {sys.version_info.major}.{sys.version_info.minor} as "
        f"well ({_first_line(error)})"
    )


@contextlib.contextmanager
def _own_sigterm_kept() -> Iterator[None]:
    """Undo what `ray.init` does to SIGTERM: the driver ends on its own terms."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, TypeError):  # not the main thread: Ray set none either
            signal.signal(signal.SIGTERM, handler)


def _keep_messages_off_the_terminal() -> None:
    """Send what raylets report (a page of state for each lost node) to the log instead of stdout.

    Ray has no public switch for these messages: `log_to_driver` covers the workers' own output.
    """
    worker_module = importlib.import_module("ray._private.worker")

    def log_message(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data.get("lines", ()):
            _log.info("ray: %s", _first_line(RuntimeError(line)))

    hook = "print_to_stdstream"
    if hasattr(worker_module, hook):
        setattr(worker_module, hook, log_message)
