"""The nightly run as an Airflow DAG: one task, idempotent, resumed by its own retries.

Copy it into the folder of DAGs. `MASKMILL_NIGHTLY` in the environment of the workers says what to
run, for instance ``submit --config nightly.toml --address http://head:8265`` where the videos are
tracked on a cluster. Nothing depends on the date of the run: the output's log knows what is done,
so a missed night needs no catching up and a cleared task does no work twice.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

NIGHTLY = os.environ.get("MASKMILL_NIGHTLY", "run --config /etc/maskmill/nightly.toml")

with DAG(
    dag_id="maskmill_nightly",
    description="Track the videos of the corpus that are new or have changed.",
    schedule="17 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    tags=["maskmill"],
):
    # A stopped task sends SIGTERM, on which maskmill closes its log. Exit codes other than 0 fail
    # the attempt; a retry is the same command, which resumes (after 2 it ends at once and alike).
    BashOperator(
        task_id="track",
        bash_command=f"maskmill-nightly {NIGHTLY} ",
        append_env=True,
        retries=2,
        retry_delay=timedelta(minutes=5),
        retry_exponential_backoff=True,
        execution_timeout=timedelta(hours=23),
    )
