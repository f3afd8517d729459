#!/usr/bin/env bash
# check.sh [airflow] [dagster]: run the nightly command under the real schedulers, twice each.
#
# Makes an environment of its own for each below WORK (a temporary folder without), installs the
# scheduler, renders a corpus of two tiny videos, and has it tracked. Passes when the first night
# commits both videos and the second finds nothing to do. Needs maskmill on the PATH, and uses uv
# for the environments where it is there. Minutes, most of them for Airflow's installation.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
work="${WORK:-$(mktemp -d)}"
mkdir -p "$work"
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
AIRFLOW_VERSION=3.3.2
DAGSTER_VERSION=1.13.28

if ! command -v maskmill >/dev/null; then
    echo "check.sh: maskmill is not on the PATH: activate the environment it is installed in" >&2
    exit 2
fi

environment() { # NAME REQUIREMENT
    [ -x "$work/$1/bin/python" ] && return
    if command -v uv >/dev/null; then
        uv venv --quiet "$work/$1"
        uv pip install --quiet --python "$work/$1/bin/python" "$2"
    else
        python3 -m venv "$work/$1"
        "$work/$1/bin/pip" install --quiet "$2"
    fi
}

corpus() { # FOLDER
    rm -rf "$1"
    python3 - "$1" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

for name, shift in (("one", 2), ("two", 3)):
    folder = Path(sys.argv[1], "videos", name)
    folder.mkdir(parents=True)
    noise = np.random.default_rng(shift).integers(0, 255, (64, 96, 3), np.uint8)
    for idx in range(6):
        Image.fromarray(np.roll(noise, idx * shift, axis=1)).save(folder / f"{idx:03d}.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 24:72] = 1
    prompts = Path(sys.argv[1], "prompts", name)
    prompts.mkdir(parents=True)
    Image.fromarray(mask).save(prompts / "000.png")
Path(sys.argv[1], "nightly.toml").write_text(
    f"""
[corpus]
paths = ["{sys.argv[1]}/videos"]
[out]
uri = "{sys.argv[1]}/dataset"
if_running = "refuse"
[prompts]
dir = "{sys.argv[1]}/prompts"
[pool]
workers = 1
"""
)
PYTHON
}

two_nights() { # NAME COMMAND...: once to track, once to find nothing new
    local name="$1" first second
    shift
    export MASKMILL_NIGHTLY="run --config $work/$name-night/nightly.toml"
    export PATH="$here:$PATH"
    corpus "$work/$name-night"
    "$@" >"$work/$name-1.log" 2>&1 || { tail -40 "$work/$name-1.log" && return 1; }
    first="$(ls "$work/$name-night/dataset/videos")"
    "$@" >"$work/$name-2.log" 2>&1 || { tail -40 "$work/$name-2.log" && return 1; }
    second="$(ls "$work/$name-night/dataset/videos")"
    [ "$first" = "$second" ] || { echo "$name: the second night wrote $second" && return 1; }
    maskmill verify "$work/$name-night/dataset" | tee "$work/$name-verify.log"
    grep -q '^2 videos' "$work/$name-verify.log"
    echo "$name: two nights, two videos, nothing twice"
}

check_airflow() {
    environment airflow "apache-airflow==$AIRFLOW_VERSION"
    export AIRFLOW_HOME="$work/airflow-home" AIRFLOW__CORE__LOAD_EXAMPLES=False
    export AIRFLOW__CORE__DAGS_FOLDER="$work/dags"
    mkdir -p "$work/dags"
    cp "$here/airflow_dag.py" "$work/dags/"
    "$work/airflow/bin/airflow" db migrate >"$work/airflow-db.log" 2>&1
    "$work/airflow/bin/airflow" dags reserialize >>"$work/airflow-db.log" 2>&1
    two_nights airflow "$work/airflow/bin/airflow" dags test maskmill_nightly
    # `dags test` ends with 0 whatever the state of the run is.
    [ "$(grep -c "DagRun Finished.*state=success" "$work"/airflow-[12].log | grep -c ":1$")" = 2 ]
}

check_dagster() {
    environment dagster "dagster==$DAGSTER_VERSION"
    export DAGSTER_HOME="$work/dagster-home"
    mkdir -p "$DAGSTER_HOME"
    two_nights dagster "$work/dagster/bin/dagster" asset materialize \
        -f "$here/dagster_asset.py" --select masks
}

[ "$#" -gt 0 ] || set -- airflow dagster
for scheduler in "$@"; do
    "check_$scheduler"
done
