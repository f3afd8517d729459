"""Planning a resume over a million videos of which most are committed: seconds and peak memory.

Two processes. The first makes the input: a Parquet manifest (URI, size, etag) and an output whose
log holds a snapshot and a tail of 511 full commit records behind it, the longest a tail gets. The
second, measured, does what a driver does before its first task: replay the log, read the manifest,
join the two, put what is left in order. Probes are not part of it.

    python tests/benchmarks/resume_plan.py [--videos 1000000] [--committed 900000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TAIL_RECORDS = 511
VIDEOS_PER_RECORD = 64


def make(folder: Path, num_videos: int, num_committed: int) -> None:
    """Write the manifest and the output."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.commit_log import CommitLog, RunPlan, VideoCommit, input_identity
    from jobs.planner import read_inputs
    from jobs.records import TaskState
    from tests.jobs.outputs import video_row
    from workers.messages import Part, Stage, StageStats
    from workers.storage import open_store

    numbers = range(num_videos)
    manifest = pa.table(
        {
            "video": [f"s3://corpus/videos/{n // 1000:04d}/clip-{n:07d}.mp4" for n in numbers],
            "size_bytes": pa.array([1_000_000 + n * 7919 % 9_000_000 for n in numbers], pa.int64()),
            "etag": [f"{n * 2654435761 % 2**64:032x}" for n in numbers],
        }
    )
    pq.write_table(manifest, folder / "manifest.parquet")
    corpus = read_inputs(config_for(folder)).corpus
    columns = ("etag", "size_bytes", "start_us", "end_us", "stride")
    etags, sizes, starts, ends, strides = (corpus.table[n].to_pylist() for n in columns)
    values = zip(etags, sizes, starts, ends, strides, strict=True)
    identities = np.array([input_identity(*row, "") for row in values], np.int64)
    done = np.random.default_rng(0).permutation(num_videos)[:num_committed]
    num_tail = min(num_committed // 2, TAIL_RECORDS * VIDEOS_PER_RECORD)
    base, tail = done[num_tail:], done[:num_tail]

    store = open_store(str(folder / "out"))
    log = CommitLog.acquire(store, "maker", snapshot_every=10**9)
    log.plan(RunPlan("run-1", {}, {"tracker.name": "flow"}, "0" * 16))
    # The summary as it would stand after all these commits became part of segments; only how it
    # came about is left out.
    order = base[np.argsort(corpus.keys[base])]
    tasks = log.state._tasks
    tasks.keys = corpus.keys[order]
    tasks.identities = identities[order]
    tasks.states = np.full(len(order), TaskState.COMMITTED, np.uint8)
    tasks.segments = (np.arange(len(order)) % 40 + 3).astype(np.int32)
    log.state.num_committed = len(order)
    log.snapshot()
    stages = tuple(StageStats(stage, 300, 1.0) for stage in Stage)
    for start in range(0, num_tail, VIDEOS_PER_RECORD):
        commits = []
        for row in tail[start : start + VIDEOS_PER_RECORD].tolist():
            key = int(corpus.keys[row])
            parts = tuple(
                Part(table, f"_staging/1/1-{row}/{table}-0.parquet", 300, 40_000, f"{row:064x}")
                for table in ("masks", "frames", "objects", "prompts")
            )
            video = video_row(key, 300, 2)
            commits.append(
                VideoCommit(key, int(identities[row]), f"1-{row}", 1, parts, video, stages)
            )
        log.commit(commits)


def config_for(folder: Path) -> Any:
    """Return the configuration of the run that is resumed."""
    from jobs.config import CorpusConfig, OutConfig, PromptConfig, RunConfig

    return RunConfig(
        corpus=CorpusConfig(manifest=str(folder / "manifest.parquet")),
        out=OutConfig(uri=str(folder / "out")),
        prompts=PromptConfig(allow_unprompted=True),
    )


def measure(folder: Path) -> dict[str, float]:
    """Plan the resume; return what it took and what it found."""
    begin = time.perf_counter()
    from jobs.commit_log import read_state
    from jobs.planner import make_plan, read_inputs
    from workers.storage import open_store

    imported = time.perf_counter()
    state = read_state(open_store(str(folder / "out")))
    replayed = time.perf_counter()
    config = config_for(folder)
    inputs = read_inputs(config)
    listed = time.perf_counter()
    plan = make_plan(config, inputs, state)
    planned = time.perf_counter()
    return {
        "import_s": imported - begin,
        "replay_s": replayed - imported,
        "manifest_s": listed - replayed,
        "join_s": planned - listed,
        "total_s": planned - begin,
        "cpu_s": time.process_time(),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "num_videos": len(inputs.corpus),
        "num_committed": plan.num_committed,
        "num_left": len(plan.order),
        "num_tail_videos": len(state.unpublished),
    }


def main() -> None:
    """Make the input in one process, measure in another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--committed", type=int, default=900_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.videos, arguments.committed)
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--videos", str(arguments.videos), "--committed", str(arguments.committed)]
        call = [sys.executable, __file__]
        subprocess.run([*call, "--make", folder, *sizes], check=True, env=environment)
        snapshot = next(Path(folder, "out", "_snapshots").iterdir())
        found = subprocess.run(
            [*call, "--measure", folder], check=True, env=environment, stdout=subprocess.PIPE
        )
        result = json.loads(found.stdout)
        result["snapshot_mb"] = snapshot.stat().st_size / 1e6
    if result["num_committed"] != arguments.committed:
        raise SystemExit(f"the plan counts {result['num_committed']} committed videos")
    if result["num_left"] != arguments.videos - arguments.committed:
        raise SystemExit(f"the plan leaves {result['num_left']} videos")
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
