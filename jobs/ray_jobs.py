"""The job server of a Ray cluster: submit a command, ask for it, follow what it prints, stop it.

Beside the pool the only file that imports ray. It speaks HTTP through Ray's own client, needs no
Ray on this machine to run, and turns each way in which that can fail into one sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from workers.errors import ConfigError, StoreDenied, StoreError, StoreUnavailable

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where Ray's job server listens on a head node by default."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that name a cluster, in the order in which Ray looks at them."""
REACH_S = 10.0
"""How long a job server may take to accept a connection."""
ANSWER_S = 60.0
"""How long it may take to answer a request."""
SILENT_S = 30.0
"""A cluster that answers nothing for this long while its job is followed is lost."""
_TALKATIVE = (
    "ray._private.authentication.authentication_token_setup",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
"""Loggers of Ray's client that speak by themselves."""
_AGENT_WITHIN_S = 60.0
"""How long a job server that answers may take until it takes a job."""
_LOOK_EVERY_S = 5.0
"""How often a silent job is asked whether it still runs."""


class JobState(StrEnum):
    """Where a Ray job is, in Ray's own words."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self not in (JobState.PENDING, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a cluster says about one job.

    Attributes
    ----------
    state : JobState
        Where it is.
    message : str
        Ray's words for it.
    exit_code : int or None
        Of its driver, where that has ended by itself.
    """

    state: JobState
    message: str
    exit_code: int | None


class JobServer:
    """The job server of one cluster.

    Parameters
    ----------
    address : str, optional
        URL of the job server, or ``HOST:PORT`` of it or of the head node. Without it the
        environment is asked (`ADDRESS_VARIABLES`), and then this machine.
    reach_s : float
        How long it may take to accept a connection, in seconds.

    Attributes
    ----------
    address : str
        Its URL.
    session : str
        Name of the cluster's session, new with each start of a head node.

    Raises
    ------
    ConfigError
        The address is none.
    StoreUnavailable
        Nothing answers there, or it is no job server.
    StoreDenied
        A token is missing or wrong.
    """

    def __init__(self, address: str | None = None, *, reach_s: float = REACH_S) -> None:
        given = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
        self.address = given or DEFAULT_ADDRESS
        for name in _TALKATIVE:  # each fault is told as a sentence
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._told():
            self.address = _job_server_url(self.address, reach_s)
            # Ray lets these variables win over what its client is given.
            with _environment(dict.fromkeys(ADDRESS_VARIABLES)):
                self._client = _Client(self.address, headers=_token_headers())
            self.session = self._client.session_name()

    def submit(
        self,
        entrypoint: str,
        *,
        job_id: str,
        metadata: Mapping[str, str],
        runtime_env: Mapping[str, Any],
        num_cpus: float,
    ) -> None:
        """Start a command as a job.

        Parameters
        ----------
        entrypoint : str
            For a shell on the cluster.
        job_id : str
            Its id, never used on this cluster before.
        metadata : Mapping of str to str
            Stored with the job.
        runtime_env : Mapping
            Ray's runtime environment of the job; local files in it are uploaded.
        num_cpus : float
            CPUs that are reserved for the command; 0 runs it on the head node.

        Raises
        ------
        StoreError
            The cluster did not take it.
        """
        deadline = time.monotonic() + _AGENT_WITHIN_S
        with self._told():
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job_id,
                        metadata=dict(metadata),
                        runtime_env=dict(runtime_env),
                        entrypoint_num_cpus=num_cpus,
                    )
                    return
                except RuntimeError as error:
                    # The head node has just started: nothing was taken, and soon it will be.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(1)

    def report(self, job_id: str) -> JobReport | None:
        """Return where a job is.

        Parameters
        ----------
        job_id : str
            The job.

        Returns
        -------
        JobReport or None
            None if this cluster does not know it.

        Raises
        ------
        StoreError
            The cluster does not answer, or refuses the token.
        """
        with self._told():
            try:
                details = self._client.get_job_info(job_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                if re.search(r"status code 5\d\d", str(error)):  # of a proxy, or a busy head node
                    raise StoreUnavailable(
                        f"the Ray cluster at {self.address} could not tell of {job_id}: try again"
                    ) from error
                raise
        return JobReport(
            JobState(details.status.value), details.message or "", details.driver_exit_code
        )

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM to its driver, and SIGKILL if it takes too long."""
        with self._told():
            self._client.stop_job(job_id)

    def output(self, job_id: str) -> str:
        """Return what a job has printed so far."""
        with self._told():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], object]) -> JobReport:
        """Pass on what a job prints until it has ended.

        Parameters
        ----------
        job_id : str
            The job, which may still wait for its start.
        write : callable
            Receives text as it comes.

        Returns
        -------
        JobReport
            How it ended.

        Raises
        ------
        StoreUnavailable
            The cluster gave no answer for `SILENT_S` seconds, or forgot the job.
        """
        return asyncio.run(self._follow(job_id, write))

    async def _follow(self, job_id: str, write: Callable[[str], object]) -> JobReport:
        num_written = 0
        while True:
            # Each connection begins with the first line; proxies cut those that are long silent.
            num_heard = 0
            async for text in self._listen(job_id):
                num_heard += len(text)
                new = min(len(text), num_heard - num_written)
                if new > 0:
                    write(text[-new:])
                    num_written += new
            report = await self._watched(job_id)
            if report.state.has_ended():
                break
            await asyncio.sleep(1)
        # Its last words may not have come through; they went down with its node if this fails.
        with contextlib.suppress(StoreError):
            if rest := (await asyncio.to_thread(self.output, job_id))[num_written:]:
                write(rest)
        return report

    async def _listen(self, job_id: str) -> AsyncIterator[str]:
        """Yield what a job prints until the connection or the job ends, or the cluster is lost."""
        texts = self._client.tail_job_logs(job_id)
        waiting: asyncio.Future[str] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(texts))
                done, _ = await asyncio.wait([waiting], timeout=_LOOK_EVERY_S)
                if not done:  # no word may mean no cluster: a lost connection is not told
                    if (await self._watched(job_id)).state.has_ended():
                        return
                    continue
                try:
                    text = waiting.result()
                except (StopAsyncIteration, RuntimeError, ClientError, OSError):
                    return
                waiting = None
                yield text
        finally:
            if waiting is not None:
                waiting.cancel()
                with contextlib.suppress(BaseException):
                    await waiting
            await texts.aclose()

    async def _watched(self, job_id: str) -> JobReport:
        """Ask for a job, patiently."""
        silent_since = time.monotonic()
        while True:
            try:
                report = await asyncio.to_thread(self.report, job_id)
            except StoreUnavailable:
                if time.monotonic() - silent_since >= SILENT_S:
                    raise
                await asyncio.sleep(1)
                continue
            if report is None:
                raise StoreUnavailable(f"the Ray cluster at {self.address} has forgotten {job_id}")
            return report

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what Ray's client raises into a sentence."""
        where = f"the Ray cluster at {self.address}"
        try:
            yield
        except AuthenticationError as error:
            if _token_headers():
                raise StoreDenied(
                    f"{where} refused the token: give the one that it was started with, in "
                    f"RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names"
                ) from error
            raise StoreDenied(
                f"{where} wants a token and none was found: set RAY_AUTH_TOKEN, or "
                f"RAY_AUTH_TOKEN_PATH to a file with it"
            ) from error
        except (OSError, KeyError, TypeError) as error:  # no answer, or not that of a job server
            raise StoreUnavailable(
                f"no Ray job server answers at {self.address}: check --address (the job server has "
                f"usually port 8265), and that the head node runs and can be reached from here"
            ) from error
        except RuntimeError as error:
            reason = " ".join(str(error).split("Traceback")[0].split())
            raise StoreError(f"{where} did not do what was asked: {reason}") from error


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a limit to each request; it has none of its own."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        options.setdefault("timeout", (REACH_S, ANSWER_S))
        return super()._do_request(method, endpoint, **options)

    def session_name(self) -> str:
        answer = self._do_request("GET", "/api/version")
        return str(answer.json().get("session_name") or "")


def _job_server_url(address: str, reach_s: float) -> str:
    """Return the URL of the job server that an address means.

    Raises
    ------
    ConfigError
        It means none.
    OSError
        Nothing answers.
    """
    advice = (
        "give the URL of its job server, for instance http://10.0.0.1:8265, or HOST:PORT of the "
        "head node"
    )
    if address == "auto":
        return _of_head_node("auto")
    is_url = "://" in address
    parts = urlsplit(address if is_url else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or (is_url and parts.scheme not in ("http", "https")) or not (port or is_url):
        raise ConfigError(f"{address!r} is not the address of a Ray cluster: {advice}")
    port = port or (443 if parts.scheme == "https" else 80)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the address of the Ray cluster at {host}:{port} holds a name or password, and "
            f"addresses are kept with the run: leave them out, and give a token in RAY_AUTH_TOKEN"
        )
    with socket.create_connection((host, port), timeout=reach_s):
        pass
    if is_url:
        return address.rstrip("/")
    url = f"http://{address}"
    return url if _speaks_http(url, reach_s) else _of_head_node(address)


def _speaks_http(url: str, timeout_s: float) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=timeout_s):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    except Exception:  # http.client: what answered speaks something else
        return False


def _of_head_node(address: str) -> str:
    """Ask the head node of a cluster for its job server."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    if _token_headers():
        # `ray.init` and `ray start` do the same; there is no public way to.
        setup = importlib.import_module("ray._private.authentication.authentication_token_setup")
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return str(ray_address_to_api_server_url(address))


def _token_headers() -> dict[str, str]:
    """Return the header with the token, looked for where Ray looks for it; empty without one."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
        try:
            token = path.read_text()
        except OSError as error:
            if named:
                raise ConfigError(
                    f"RAY_AUTH_TOKEN_PATH names {named}, which cannot be read ({error.strerror}): "
                    f"correct it, or set RAY_AUTH_TOKEN"
                ) from error
    token = token.strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set some variables of this process for a moment; None takes one away."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        for name, value in changes.items():
            _put(name, value)
        yield
    finally:
        for name, value in before.items():
            _put(name, value)


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
