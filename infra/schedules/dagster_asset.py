"""The dataset as a Dagster asset, materialised every night: idempotent, resumed by its own retries.

    dagster dev -f infra/schedules/dagster_asset.py

`MASKMILL_NIGHTLY` in the environment says what to run, for instance ``submit --config nightly.toml
--address http://head:8265`` where the videos are tracked on a cluster. The asset has no partitions:
the output's log knows what is done, so each materialisation does what is new or has changed.
"""

import os
import shlex

import dagster as dg

NIGHTLY = os.environ.get("MASKMILL_NIGHTLY", "run --config /etc/maskmill/nightly.toml")


# A failed attempt is tried again with the same command, which resumes. The pool keeps two
# materialisations apart where its limit is 1; maskmill refuses the second in any case.
@dg.asset(
    pool="maskmill",
    retry_policy=dg.RetryPolicy(max_retries=2, delay=300, backoff=dg.Backoff.EXPONENTIAL),
)
def masks(
    context: dg.AssetExecutionContext, processes: dg.PipesSubprocessClient
) -> dg.MaterializeResult:
    """Masks of every video of the corpus, as Parquet beside a commit log."""
    # Dagster forwards what the command prints, and a signal when the run is cancelled.
    command = ["maskmill-nightly", *shlex.split(NIGHTLY)]
    processes.run(command=command, context=context)
    return dg.MaterializeResult(metadata={"command": shlex.join(command)})


nightly = dg.define_asset_job("maskmill_nightly", selection=[masks])
defs = dg.Definitions(
    assets=[masks],
    jobs=[nightly],
    schedules=[dg.ScheduleDefinition(job=nightly, cron_schedule="17 2 * * *")],
    # A run that is told to stop commits what is tracked and closes its log within a minute.
    resources={"processes": dg.PipesSubprocessClient(termination_timeout_seconds=60)},
)
