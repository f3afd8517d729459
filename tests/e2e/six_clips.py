"""Submit the six shared clips to a real cluster, disturb the run, and compare with a calm one.

A program, since it takes minutes; `test_submit.py` holds the same contract with rendered clips.

    python -m tests.e2e.six_clips [--stride N]

On a head and two nodes with token authentication: `submit --follow`; then, on another output,
`submit --detach`, the same again (refused), `status`, `logs`, `cancel`, `submit` again, SIGKILL to
the head in the middle, `status` without a cluster, `submit` to a new cluster. The dataset must
equal the calm run's, and `verify --deep` must find it whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jobs.commit_log import read_state
from jobs.maintenance import verify
from tests.cluster import RayCluster, ray_cluster
from tests.datasets import assert_same, results
from tests.e2e.corpora import finish, maskmill
from tests.e2e.test_submit import hold_half_done
from tests.media import shared_dir
from workers.storage import open_store

BOX = [200, 120, 500, 400]
"""What is tracked in each clip: not what matters here."""
WAIT_S = 1800.0


class Session:
    """The commands of one corpus on one cluster.

    Parameters
    ----------
    cluster : RayCluster
        Where.
    place : Path
        Holds ``prompts.jsonl``.
    stride : int
        Every how many frames one is tracked.
    """

    def __init__(self, cluster: RayCluster, place: Path, stride: int) -> None:
        self.environment = {"RAY_AUTH_TOKEN": cluster.token}
        self.words = ["submit", videos(), "--prompts", place / "prompts.jsonl"]
        self.words += ["--stride", stride, "--workers", 2, "--address", cluster.job_server]

    def submit(self, out: Path, *more: str, expect: int = 0) -> None:
        """Submit and check the exit code."""
        self.call(*self.words, "--out", out, *more, expect=expect)

    def call(self, *words: object, expect: int = 0) -> None:
        """Run a command, print what it printed, and check its exit code."""
        started = time.monotonic()
        code, told = finish(maskmill(*words, env=self.environment), WAIT_S)
        print(
            f"$ maskmill {words[0]} ...   exit {code}, {time.monotonic() - started:.0f} s\n{told}"
        )
        if code != expect:
            raise SystemExit(f"expected exit code {expect}")


def videos() -> Path:
    """Return the folder of the shared clips."""
    return shared_dir() / "data" / "videos"


def num_committed(out: Path) -> int:
    """Return how many videos of an output are committed."""
    return read_state(open_store(str(out))).num_committed


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("it did not happen")
        time.sleep(0.3)


def main() -> None:
    """Run it all; the exit code is 0 if it went as told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1)
    stride = parser.parse_args().stride
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [
            {"video": clip.name, "frame_idx": 0, "object_id": 1, "box_xyxy": BOX}
            for clip in videos().glob("*.mp4")
        ]
        (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        calm, wild = place / "calm", place / "wild"
        with ray_cluster(num_nodes=2, head_cpus=1, job_server=True) as cluster:
            session = Session(cluster, place, stride)
            session.submit(calm, "--follow")
            session.submit(wild, "--detach")
            workers = hold_half_done(cluster, wild)
            session.submit(wild, expect=3)
            session.call("status", wild)
            session.call("logs", wild)
            for worker in workers:
                worker.resume()
            session.call("cancel", wild)
            if not read_state(open_store(str(wild))).closed:
                raise SystemExit("the cancelled run has not closed its log")
            before = num_committed(wild)
            following = maskmill(*session.words, "--out", wild, "--follow", env=session.environment)
            wait_until(lambda: num_committed(wild) > before or following.poll() is not None)
            cluster.head.kill()
            print(f"the head was killed with {num_committed(wild)} of {len(rows)} videos committed")
            code, told = finish(following, WAIT_S)
            print(told)
            if code != 3:
                raise SystemExit(f"the lost cluster was exit code {code}")
            session.call("status", wild)
        with ray_cluster(num_nodes=2, head_cpus=1, job_server=True) as another:
            Session(another, place, stride).submit(wild, "--follow")
        assert_same(wild, results(calm))
        report = verify(open_store(str(wild)), deep=True)
        if report.problems:
            raise SystemExit("\n".join(report.problems))
        print(f"the same: {report.num_videos} videos, {report.num_masks} masks")


if __name__ == "__main__":
    main()
