"""Submit to first frame on a warm local cluster: `maskmill submit` beside `ray job submit`.

Both commands are started as a user starts them, one after the other in turn, on the same cluster
with token authentication. The bare script joins the cluster, starts one actor, decodes the first
frame of the clip in it and writes a file; nothing else. maskmill tracks a clip of two frames with
the tracker `flow`, so that the first rows in staging are as good as its first frame: decoded,
tracked, encoded and uploaded. The times are from the start of the command to the file.

    nice -n 0 python -m tests.benchmarks.submit_latency --repeat 5        about 3 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster import RayCluster, ray_cluster
from tests.e2e.corpora import maskmill
from tests.media import write_video

BARE_SCRIPT = """
import sys
import ray

@ray.remote
class Bare:
    def first_frame(self, clip, marker):
        import av
        with av.open(clip) as container:
            frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
        with open(marker, "w") as file:
            file.write(str(frame.shape))

ray.init()
ray.get(Bare.remote().first_frame.remote(*sys.argv[1:]))
"""
POLL_S = 0.01
GIVE_UP_S = 300.0


def seconds_until(condition: Callable[[], bool], started: float) -> float:
    """Return how long after `started` something came true."""
    while not condition():
        if time.perf_counter() - started > GIVE_UP_S:
            raise TimeoutError(f"no frame within {GIVE_UP_S:g} s")
        time.sleep(POLL_S)
    return time.perf_counter() - started


def time_maskmill(cluster: RayCluster, clip: Path, out: Path) -> float:
    """Submit a run and return the seconds until its first rows are in staging."""
    started = time.perf_counter()
    command = maskmill(
        *("submit", clip, "--out", out, "--prompts", clip.parent / "prompts.jsonl"),
        *("--workers", "1", "--detach", "--address", cluster.job_server),
        env={"RAY_AUTH_TOKEN": cluster.token},
    )
    taken_s = seconds_until(lambda: any(out.glob("_staging/*/*/frames-*.parquet")), started)
    told, _ = command.communicate(timeout=GIVE_UP_S)
    if command.returncode:
        raise RuntimeError(told)
    # The next one shall not meet the end of this one.
    following = maskmill("logs", out, "--follow", env={"RAY_AUTH_TOKEN": cluster.token})
    told, _ = following.communicate(timeout=GIVE_UP_S)
    if following.returncode:
        raise RuntimeError(told)
    return taken_s


def time_bare(cluster: RayCluster, clip: Path, place: Path) -> float:
    """Submit the bare script and return the seconds until it has its frame."""
    script, marker = place / "bare.py", place / "marker"
    script.write_text(BARE_SCRIPT)
    marker.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    ray_command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait"]
    words = ["--address", cluster.job_server, "--", "python", script, clip, marker]
    started = time.perf_counter()
    command = subprocess.Popen(
        [*ray_command, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    taken_s = seconds_until(marker.exists, started)
    command.communicate(timeout=GIVE_UP_S)
    return taken_s


def main() -> None:
    """Measure both, one after the other in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_cluster(num_nodes=1, cpus_per_node=2, head_cpus=1, job_server=True) as cluster,
    ):
        place = Path(folder)
        clip = place / "clip.mp4"
        write_video(clip, num_frames=2)
        row = {"video": "clip.mp4", "frame_idx": 0, "object_id": 1, "box_xyxy": [10, 10, 40, 40]}
        (place / "prompts.jsonl").write_text(json.dumps(row))
        ours, bare = [], []
        for i in range(repeat + 1):
            bare.append(time_bare(cluster, clip, place))
            ours.append(time_maskmill(cluster, clip, place / f"out-{i}"))
            warm = "" if i else "   (cold, not counted)"
            print(f"bare {bare[-1]:6.2f} s   maskmill {ours[-1]:6.2f} s{warm}", flush=True)
        medians = [statistics.median(times[1:]) for times in (bare, ours)]
        print(
            f"median of {repeat}: bare {medians[0]:.2f} s, maskmill {medians[1]:.2f} s, "
            f"{medians[1] - medians[0]:+.2f} s"
        )


if __name__ == "__main__":
    main()
