"""How long a corpus takes: makespan over the ideal, longest first against first come.

Run it with ``python -m tests.benchmarks.makespan [--videos N] [--workers N] [--sigma S]``. The real
scheduler gives videos of log-normal length to simulated workers; nothing else is real. The ideal is
the larger of all frames over all speeds together and the longest video on the fastest worker: no
schedule is shorter. Four orders are compared, on workers that are alike and on workers of which a
half is ``--slower`` times slower:

* ``longest first``: as the planner orders, with lengths known;
* ``first come``: the order of the listing;
* ``guessed``: longest first by lengths that are wrong by a factor of up to two, as guesses from
  file sizes are;
* ``blind``: longest first, the scheduler not told how fast the workers are (unlike workers only).
"""

from __future__ import annotations

import argparse
import heapq

import numpy as np
from numpy.typing import NDArray

from jobs.scheduler import Action, Begin, Commit, Scheduler, StartWorker
from jobs.speeds import SETTLES_S
from workers.messages import Phase

Floats = NDArray[np.floating]


def lengths_of(num_videos: int, sigma: float, seed: int) -> Floats:
    """Return log-normal lengths in frames, a thousand in the middle."""
    return np.random.default_rng(seed).lognormal(np.log(1000), sigma, num_videos)


def ideal(lengths: Floats, speeds: Floats) -> float:
    """Return a time in seconds that no schedule can be shorter than."""
    return float(max(lengths.sum() / speeds.sum(), lengths.max() / speeds.max()))


def makespan(
    lengths: Floats,
    speeds: Floats,
    *,
    guesses: Floats | None = None,
    is_sorted: bool = True,
    tells_speeds: bool = True,
) -> float:
    """Return how long the scheduler and simulated workers take for a corpus, in seconds.

    Parameters
    ----------
    lengths : ndarray of float, shape (N,)
        True lengths in frames.
    speeds : ndarray of float, shape (W,)
        Frames per second of each worker.
    guesses : ndarray of float, shape (N,), optional
        Lengths that the scheduler believes in; the true ones without.
    is_sorted : bool
        Whether the longest comes first; otherwise the scheduler knows no lengths.
    tells_speeds : bool
        Whether the scheduler is told the kinds of workers, and their speeds as they are measured.
    """
    believed = lengths if guesses is None else guesses
    order = np.argsort(-believed) if is_sorted else np.arange(len(lengths))
    scheduler = Scheduler(
        len(lengths),
        order,
        num_workers=len(speeds),
        costs=believed if is_sorted else None,
        is_mixed=tells_speeds and bool(speeds.min() < speeds.max()),
    )
    now = 0.0
    ends: list[tuple[float, str, str]] = []
    queues: dict[str, list[Begin]] = {}
    speed_of: dict[str, float] = {}
    num_committed = 0

    def track_next(worker_id: str) -> None:
        begin = queues[worker_id][0]
        scheduler.progress(begin.attempt_id, Phase.TRACKING, 0, now)
        duration_s = lengths[begin.task] / speed_of[worker_id]
        heapq.heappush(ends, (now + duration_s, worker_id, begin.attempt_id))

    def do(actions: list[Action]) -> None:
        nonlocal num_committed
        for action in actions:
            match action:
                case Begin(worker_id=worker_id):
                    queues[worker_id].append(action)
                    if len(queues[worker_id]) == 1:
                        track_next(worker_id)
                case StartWorker():
                    worker_id = f"w{len(queues)}"
                    speed_of[worker_id] = float(speeds[len(queues)])
                    queues[worker_id] = []
                case Commit():
                    num_committed += 1

    do(scheduler.start(now))
    for worker_id in list(queues):
        kind = f"{speed_of[worker_id]:g} frames/s" if tells_speeds else ""
        do(scheduler.worker_ready(worker_id, now, kind))
    while ends:
        now, worker_id, attempt_id = heapq.heappop(ends)
        queues[worker_id].pop(0)
        if queues[worker_id]:
            track_next(worker_id)
        do(scheduler.attempt_finished(attempt_id, now))
        # Heartbeats, so that nothing looks stuck; and what is left of the others is known.
        for worker, begun in queues.items():
            if begun:
                end_s = next(end for end, w, _ in ends if w == worker)
                left = (end_s - now) * speed_of[worker]
                steps = int(lengths[begun[0].task] - left)
                scheduler.progress(begun[0].attempt_id, Phase.TRACKING, steps, now)
                if tells_speeds and now >= SETTLES_S:
                    scheduler.set_speed(worker, speed_of[worker])
    assert num_committed == len(lengths), "a video was left over"
    return now


def compare(num_videos: int, speeds: Floats, sigma: float, seeds: range) -> dict[str, list[float]]:
    """Return makespan over ideal of every order, one value per seed."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        lengths = lengths_of(num_videos, sigma, seed)
        wrong = np.exp2(np.random.default_rng(1000 + seed).uniform(-1, 1, num_videos))
        times = {
            "longest first": makespan(lengths, speeds),
            "first come": makespan(lengths, speeds, is_sorted=False),
            "guessed": makespan(lengths, speeds, guesses=lengths * wrong),
        }
        if speeds.min() < speeds.max():
            times["blind"] = makespan(lengths, speeds, tells_speeds=False)
        for name, time_s in times.items():
            found.setdefault(name, []).append(time_s / ideal(lengths, speeds))
    return found


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=1.2, help="of the logarithm of the length")
    parser.add_argument("--slower", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    alike = np.full(options.workers, 25.0)
    unlike = alike.copy()
    unlike[::2] /= options.slower
    for title, speeds in (("alike", alike), (f"half {options.slower:g} times slower", unlike)):
        print(f"{options.videos} videos, {options.workers} workers, {title}: makespan over ideal")
        found = compare(options.videos, speeds, options.sigma, range(options.seeds))
        for name, ratios in found.items():
            print(f"  {name:<14} mean {np.mean(ratios):.3f}, worst {np.max(ratios):.3f}")


if __name__ == "__main__":
    main()
