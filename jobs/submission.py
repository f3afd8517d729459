"""Runs as Ray jobs: submit one, follow what it prints, cancel it; all from its output.

The output's log is the truth about a run, and the cluster is asked only whether its driver still
lives. So a run that is at work is not submitted twice, one that ended or died is resumed by the
same command, on this cluster or another, and nothing here is needed for the result to be right:
the fence of the log keeps two drivers apart whatever is overlooked.
"""

from __future__ import annotations

import shlex
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commit_log import read_state
from jobs.flags import command_words
from jobs.ray_jobs import JobReport, JobServer, JobState
from jobs.records import Job, Outcome
from jobs.shipping import build_wheel, installed_version
from jobs.startup import refuse_live, with_settled_window
from jobs.submitted import (
    GRACE_VARIABLE,
    METADATA_CPUS,
    METADATA_NUMBER,
    METADATA_OUT,
    Submission,
    claim_submission,
    read_submission,
    submission_key,
    submission_numbers,
)
from workers.errors import ConfigError, StoreError, StoreUnavailable
from workers.logs import redact

if TYPE_CHECKING:
    from jobs.commit_log import LogState
    from jobs.config import RunConfig
    from workers.storage import Store

DRIVER_CPUS = 1.0
"""CPUs reserved for a driver. Ray then places it where CPUs are free, and for what needs no GPU it
prefers nodes without one."""
GRACE_S = 60
"""How long a cancelled driver has to close its log before Ray kills it. `jobs.driver` lets attempts
end for ten seconds, workers and the last segment take the rest; Ray's own default is three."""
CANCEL_WITHIN_S = GRACE_S + 15.0
"""How long `cancel` waits for the end of a job."""
EXIT_NO_COMMAND = 127
"""A shell's exit code for a command that is not there."""
_YOUNG_S = 60.0
"""A submission whose job the cluster does not know yet may be on its way for this long."""
_POLL_S = 0.5

Tell = Callable[[str], object]


def submit(
    config: RunConfig,
    store: Store,
    server: JobServer,
    *,
    tell: Tell,
    ship_code: bool = False,
    take_over: bool = False,
    driver_cpus: float = DRIVER_CPUS,
) -> Submission:
    """Start a run, or what is left of it, as a job.

    Parameters
    ----------
    config : RunConfig
        The run.
    store : Store
        Its output.
    server : JobServer
        Job server of the cluster.
    tell : callable
        Receives sentences about what takes time.
    ship_code : bool
        Send the code of this process along, instead of using what the nodes have installed.
    take_over : bool
        Do not look whether a driver is at work; the new one fences it out.
    driver_cpus : float
        CPUs reserved for the driver; 0 runs it on the head node.

    Returns
    -------
    Submission
        As it is recorded in the output.

    Raises
    ------
    ConfigError
        The command holds a secret, which anyone could read in the job's record.
    StoreError
        The run is live, or store or cluster refuse.
    """
    command = _run_words(config, store)
    state = read_state(store)
    if not take_over:
        _refuse_live(store, state, server, tell)
    with tempfile.TemporaryDirectory(prefix="maskmill-") as folder:
        # `cancel` must leave a closed log: Ray reads this where the job's supervisor runs.
        runtime_env: dict[str, Any] = {"env_vars": {GRACE_VARIABLE: str(GRACE_S)}}
        program, version = ["maskmill"], installed_version()
        if ship_code:
            wheel, version = build_wheel(Path(folder))
            runtime_env["py_modules"] = [str(wheel)]
            # Not what the folder may hold that the job happens to start in.
            program = ["python", "-P", "-m", "jobs.cli"]
        submission = _claim(store, state, server, version)
        try:
            server.submit(
                # The driver itself gets the signals, not a shell in front of it.
                "exec " + shlex.join([*program, "run", *command]),
                job_id=submission.job.job_id,
                metadata={
                    METADATA_OUT: store.uri,
                    METADATA_NUMBER: str(submission.number),
                    METADATA_CPUS: f"{driver_cpus:g}",
                },
                runtime_env=runtime_env,
                num_cpus=driver_cpus,
            )
        except StoreUnavailable:
            raise  # it may have been taken all the same
        except StoreError as error:
            # Ray answers with an error also where something failed after it had taken the job.
            is_known = _is_known(server, submission)
            if is_known is False:
                store.delete([submission_key(submission.number)])
            # A record that stays keeps the number of a job that is there already from coming again.
            if not is_known or "already exists" in str(error):
                raise
        except Exception:
            store.delete([submission_key(submission.number)])
            raise
    return submission


def _is_known(server: JobServer, submission: Submission) -> bool | None:
    """Whether a cluster knows a job; None if it does not tell."""
    try:
        return server.report(submission.job.job_id) is not None
    except StoreError:
        return None


def follow(server: JobServer, submission: Submission, write: Tell) -> int:
    """Pass on what a job prints until it ends.

    Parameters
    ----------
    server : JobServer
        Of the cluster it was submitted to.
    submission : Submission
        Which.
    write : callable
        Receives text as it comes.

    Returns
    -------
    int
        Exit code of the driver.

    Raises
    ------
    StoreError
        The cluster or the driver was lost.
    ConfigError
        The cluster has no maskmill.
    """
    try:
        report = server.follow(submission.job.job_id, write)
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"the Ray cluster at {server.address} was lost while {submission.job.job_id} ran: what "
            f"is committed stays, submit the same command again once a cluster is back"
        ) from error
    return exit_code(report, submission)


def exit_code(report: JobReport, submission: Submission) -> int:
    """Return the exit code of a job that has ended.

    Parameters
    ----------
    report : JobReport
        What its cluster says.
    submission : Submission
        Which job.

    Returns
    -------
    int
        That of its driver, 130 if it was stopped.

    Raises
    ------
    ConfigError
        The cluster has no maskmill.
    StoreError
        Its driver never started, or died.
    """
    if report.state is JobState.SUCCEEDED:
        return 0
    if report.state is JobState.STOPPED:
        return 130
    if report.exit_code == EXIT_NO_COMMAND:
        raise ConfigError(
            f"the cluster at {submission.job.address} has no maskmill on the PATH of its nodes: "
            f"install it there, or pass --ship-code"
        )
    if report.exit_code is not None and report.exit_code > 0:
        return report.exit_code
    raise StoreError(
        f"the driver of {submission.job.job_id} was lost ({_first_sentence(report.message)}): what "
        f"is committed stays, submit the same command again"
    )


def cancel(store: Store, server: JobServer, submission: Submission) -> str:
    """Stop a job, so that its run can be resumed; wait for its end.

    Parameters
    ----------
    store : Store
        The output.
    server : JobServer
        Of the cluster it was submitted to.
    submission : Submission
        Which.

    Returns
    -------
    str
        One sentence on how it ended.

    Raises
    ------
    StoreError
        The cluster does not know the job any more, or the driver did not end.
    """
    job_id = submission.job.job_id
    report = _known(server, submission)
    if report.state.has_ended():
        return f"{job_id} has ended already ({report.state.lower()}): nothing to cancel"
    server.stop(job_id)
    deadline = time.monotonic() + CANCEL_WITHIN_S
    while not report.state.has_ended():
        if time.monotonic() > deadline:
            if report.state is JobState.PENDING:
                return f"{job_id} still waits for its start; it ends as soon as it gets it"
            raise StoreError(f"{job_id} was told to stop and has not ended: try again")
        time.sleep(_POLL_S)
        report = _known(server, submission)
    state = read_state(store)
    if state.is_live:
        return (
            f"{job_id} was stopped before its driver could close the log: the same submit command "
            f"resumes it"
        )
    if state.outcome is Outcome.FINISHED:
        return f"{job_id} had finished before it could be stopped"
    return (
        f"{job_id} was stopped: {state.num_committed:,} videos are committed, the same submit "
        f"command resumes it"
    )


def find_submission(store: Store, number: int | None = None) -> Submission:
    """Return a submission of an output.

    Parameters
    ----------
    store : Store
        The output.
    number : int, optional
        Which; the newest by default.

    Raises
    ------
    ConfigError
        There is none.
    """
    submission = read_submission(store, number)
    if submission is not None:
        return submission
    numbers = submission_numbers(store)
    if numbers:
        raise ConfigError(
            f"{store.uri} has no submission {number}: the newest is {numbers[-1]}, the oldest "
            f"{numbers[0]}"
        )
    raise ConfigError(
        f"nothing was submitted for {store.uri}: check the path; a run that was started with "
        f"maskmill run ends with Ctrl-C, and its log lines are in {store.uri_of('_logs')}"
    )


def server_of(submission: Submission, address: str | None = None) -> JobServer:
    """Return the job server that a submission was made to.

    Parameters
    ----------
    submission : Submission
        Which.
    address : str, optional
        How to reach the cluster from here, where it is not as whoever submitted reached it.

    Raises
    ------
    StoreUnavailable
        That cluster is gone.
    """
    server = JobServer(address or submission.job.address)
    if server.session != submission.job.session:
        raise StoreUnavailable(
            f"the Ray cluster at {server.address} is not the one that ran {submission.job.job_id}, "
            f"which is gone: maskmill status tells what is left of the run"
        )
    return server


def stored_log_lines(store: Store, run_id: str) -> Iterator[str]:
    """Return the log lines of a run that its driver and workers put into the output.

    Parameters
    ----------
    store : Store
        The output.
    run_id : str
        The run.

    Yields
    ------
    str
        JSON, as written, without line ends; the files in the order of their names.
    """
    for stat in store.list(f"_logs/{run_id}/"):
        yield from store.read_bytes(stat.key).decode("utf-8", "replace").splitlines()


# Before a submission.


def _run_words(config: RunConfig, store: Store) -> list[str]:
    """Return the run's command for the cluster, free of secrets."""
    # On the cluster Ray itself says which it is.
    pool = config.pool.model_copy(update={"ray_address": None})
    out = config.out.model_copy(update={"uri": store.uri})
    settled = with_settled_window(config)
    words = command_words(settled.model_copy(update={"pool": pool, "out": out}))
    for word in words:
        if (shown := redact(word)) != word:
            raise ConfigError(
                f"{shown} holds a secret, and everyone who may look at the cluster can read the "
                f"command of a job: let the nodes get it from their environment or their identity"
            )
    return words


def _refuse_live(store: Store, state: LogState, server: JobServer, tell: Tell) -> None:
    """Refuse a run that a driver is at work on, or that is about to start.

    Raises
    ------
    StoreError
        It is live.
    """
    last = read_submission(store)
    is_dead = False
    if last is not None:
        report = _ask(last, server)
        if report is not None and not report.state.has_ended():
            raise StoreError(
                f"the run in {store.uri} is live: {last.job.job_id} is {report.state.lower()} on "
                f"{last.job.address}; follow it with maskmill logs {store.uri} --follow, stop it "
                f"with maskmill cancel {store.uri}"
            )
        is_here = last.job.session == server.session
        if report is None and is_here and time.time() - last.time_s < _YOUNG_S:
            raise StoreError(
                f"the run in {store.uri} was submitted from {last.host} a moment ago: wait a "
                f"minute, or pass --if-running take-over"
            )
        is_dead = report is not None and last.job == state.job
    if is_dead or not state.is_live:
        return
    tell(f"looking whether the driver {state.owner} is alive, since no cluster tells")
    refuse_live(store)


def _ask(submission: Submission, server: JobServer) -> JobReport | None:
    """Return what the cluster of a submission says about it; None if it says nothing."""
    if submission.job.session == server.session:
        return server.report(submission.job.job_id)
    try:
        return server_of(submission).report(submission.job.job_id)
    except StoreError:
        return None


def _claim(store: Store, state: LogState, server: JobServer, version: str) -> Submission:
    """Record the next submission of an output, as the only one with its number.

    Raises
    ------
    StoreError
        Another one is being made at this moment.
    """
    last = read_submission(store)
    if state.plan is not None:
        run_id = state.plan.run_id
    elif last is not None:
        run_id = last.run_id
    else:
        run_id = f"{uuid.uuid4().hex[:6]}-{uuid.uuid4().hex[:6]}"
    number = last.number + 1 if last is not None else 1
    job = Job(f"maskmill-{run_id}-{number}", server.address, server.session)
    submission = Submission(number, run_id, job, time.time(), socket.gethostname(), version)
    if not claim_submission(store, submission):
        raise StoreError(
            f"the run in {store.uri} is being submitted by another command at this moment: see "
            f"maskmill status {store.uri}"
        )
    return submission


def _known(server: JobServer, submission: Submission) -> JobReport:
    report = server.report(submission.job.job_id)
    if report is None:
        raise StoreError(
            f"the Ray cluster at {server.address} does not know {submission.job.job_id}: it was "
            f"never started there, maskmill status tells what is left of the run"
        )
    return report


def _first_sentence(text: str) -> str:
    line = (text.strip().splitlines() or ["Ray says no more"])[0]
    return redact(line.rstrip(".:"))
