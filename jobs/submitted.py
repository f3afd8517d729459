"""Which Ray jobs were submitted for an output: one small record per attempt, beside its log.

`submit` creates `_jobs/<number>.json` before it speaks to the cluster, and only if no other has
that number, so of two submissions at the same moment one learns of the other. With it `status`,
`logs` and `cancel` find cluster and job from the output alone, also before the driver has written
its fence; and a driver that cannot find its own record knows that it sees another place than the
machine it was submitted from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from jobs.records import JOBS_FOLDER, Job
from workers.errors import ConfigError, StoreError
from workers.storage import Store

METADATA_OUT = "maskmill_out"
METADATA_NUMBER = "maskmill_submission"
"""Metadata of a Ray job: for which output it was submitted, and as which of its submissions."""
METADATA_CPUS = "maskmill_driver_cpus"
"""Metadata of a Ray job: CPUs that are reserved for its driver on the node that runs it."""
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Tells the supervisor of a job how many seconds lie between SIGTERM and SIGKILL."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray puts what a job is into the environment of its entrypoint."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One submission of a run: the content of its record.

    Attributes
    ----------
    number : int
        Counts the submissions of an output from 1.
    run_id : str
        The run.
    job : Job
        The Ray job, and where it was submitted to.
    time_s : float
        When, in seconds since 1970.
    host : str
        From which machine.
    version : str
        Version of maskmill that wrote the command.
    """

    number: int
    run_id: str
    job: Job
    time_s: float
    host: str
    version: str

    def to_bytes(self) -> bytes:
        """Return the record as UTF-8 JSON."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(value | {"job": self.job.to_json()}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Submission:
        """Return the submission in `data`.

        Raises
        ------
        StoreError
            It is no such record; the message names `key`.
        """
        try:
            value = json.loads(data)
            job = Job.from_json(value["job"])
            return cls(**{f.name: value[f.name] for f in fields(cls)} | {"job": job})
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the record of a submission {key} is damaged ({error}): delete it"
            ) from error


def submission_key(number: int) -> str:
    """Return the key of the record of a submission."""
    return f"{JOBS_FOLDER}/{number:06d}.json"


def submission_numbers(store: Store) -> list[int]:
    """Return the numbers of all submissions of an output, ascending."""
    names = [stat.key.rpartition("/")[2] for stat in store.list(f"{JOBS_FOLDER}/")]
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def read_submission(store: Store, number: int | None = None) -> Submission | None:
    """Return a submission of an output.

    Parameters
    ----------
    store : Store
        The output.
    number : int, optional
        Which; the newest by default.

    Returns
    -------
    Submission or None
        None if there is no such submission.

    Raises
    ------
    StoreError
        The store cannot be read, or the record is damaged.
    """
    if number is None:
        numbers = submission_numbers(store)
        if not numbers:
            return None
        number = numbers[-1]
    key = submission_key(number)
    try:
        return Submission.from_bytes(store.read_bytes(key), store.uri_of(key))
    except FileNotFoundError:
        return None


def claim_submission(store: Store, submission: Submission) -> bool:
    """Write the record of a submission, unless another has its number; tell whether it was free."""
    return store.create(submission_key(submission.number), submission.to_bytes())


def own_submission(
    store: Store, version: str, environment: Mapping[str, str] = os.environ
) -> tuple[Job | None, str | None]:
    """Return which Ray job this process is the driver of.

    Parameters
    ----------
    store : Store
        The output of the run.
    version : str
        Version of maskmill in this process.
    environment : Mapping
        Variables of this process.

    Returns
    -------
    job : Job or None
        None outside of any Ray job.
    run_id : str or None
        The run that `submit` began or resumed; None when another tool submitted.

    Raises
    ------
    StoreError
        The record of the submission is not in this output, so it is another place.
    ConfigError
        The command was written by another version of maskmill.
    """
    metadata = _job_metadata(environment)
    job_id = metadata.get("job_submission_id")
    if not job_id:
        return None, None
    number = metadata.get(METADATA_NUMBER)
    if number is None or metadata.get(METADATA_OUT) != store.uri:
        return Job(job_id), None
    submission = read_submission(store, int(number))
    if submission is None or submission.job.job_id != job_id:
        raise StoreError(
            f"{store.uri} on this node is not the place that was submitted to: {job_id} is not "
            f"recorded in it; give --out a bucket, or a folder that all machines share"
        )
    if submission.version != version:
        raise ConfigError(
            f"this job was submitted by maskmill {submission.version}, and the driver's node has "
            f"maskmill {version}: install the same version on both, or pass --ship-code"
        )
    return submission.job, submission.run_id


def reserved_cpus(environment: Mapping[str, str] = os.environ) -> float:
    """Return how many CPUs of its node are reserved for this process as the driver of a Ray job.

    Ray counts them among what the node has in all, and workers do not get them.
    """
    try:
        return max(0.0, float(_job_metadata(environment).get(METADATA_CPUS, 0)))
    except (ValueError, TypeError):
        return 0.0


def use_spare_workers(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep from the workers of a job what concerns its supervisor alone.

    Ray keeps a few processes ready for actors; one that asks for variables of its own waits for a
    new process instead, some seconds. To be called before the driver joins the cluster.

    Parameters
    ----------
    environment : MutableMapping
        Variables of this process.
    """
    try:
        config = json.loads(environment.get(_JOB_CONFIG, "{}"))
        variables = config["runtime_env"]["env_vars"]
        del variables[GRACE_VARIABLE]
    except (ValueError, KeyError, TypeError):
        return
    if not variables:
        del config["runtime_env"]["env_vars"]
    environment[_JOB_CONFIG] = json.dumps(config)


def _job_metadata(environment: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        metadata = json.loads(environment.get(_JOB_CONFIG, "{}")).get("metadata")
    except (ValueError, AttributeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
