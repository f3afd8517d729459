"""How fast each worker tracks, from its heartbeats: what lets long videos go to fast workers.

A worker's speed is its frames over the time in which it tracked, the recent past weighing more. A
worker that has not tracked yet is as fast as the others on its model of GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HALF_LIFE_S = 120.0
"""After so many seconds of tracking a measurement weighs half."""
SETTLES_S = 5.0
"""Tracking for this long tells a speed."""


@dataclass(slots=True)
class _Tally:
    gpu: str
    frames: float = 0.0
    seconds: float = 0.0
    heard_at: float | None = None
    """The last heartbeat in which something was tracked."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps by attempt, in that heartbeat."""


class Speeds:
    """Frames per second of every worker.

    Examples
    --------
    >>> speeds = Speeds()
    >>> speeds.add("a", "H200")
    >>> for second in range(11):
    ...     speeds.heard("a", {"attempt": 40 * second}, float(second))
    >>> speeds.add("b", "H200")
    >>> round(speeds.of("a")), round(speeds.of("b")), speeds.of("unknown")
    (40, 40, None)
    """

    def __init__(self) -> None:
        self._tallies: dict[str, _Tally] = {}

    def add(self, worker_id: str, gpu: str) -> None:
        """Take a worker in; `gpu` is the name of its GPU, empty without one."""
        self._tallies[worker_id] = _Tally(gpu)

    def remove(self, worker_id: str) -> None:
        """Forget a worker; an unknown one is no error."""
        self._tallies.pop(worker_id, None)

    def heard(self, worker_id: str, steps: dict[str, int], now: float) -> None:
        """Take a heartbeat.

        Parameters
        ----------
        worker_id : str
            Whose it is.
        steps : dict of str to int
            Frames stepped so far, for each attempt that is being tracked.
        now : float
            The time, in seconds.
        """
        tally = self._tallies.get(worker_id)
        if tally is None:
            return
        if steps and tally.heard_at is not None:
            passed_s = now - tally.heard_at
            gained = sum(
                max(0, count - tally.steps[attempt_id])
                for attempt_id, count in steps.items()
                if attempt_id in tally.steps
            )
            if passed_s > 0 and steps.keys() & tally.steps.keys():
                kept = 0.5 ** (passed_s / HALF_LIFE_S)
                tally.frames = tally.frames * kept + gained
                tally.seconds = tally.seconds * kept + passed_s
        tally.heard_at, tally.steps = (now if steps else None), dict(steps)

    def finished(self, worker_id: str, num_frames: int, frames_per_s: float) -> None:
        """Take a whole video: where videos are short, heartbeats see too little of them."""
        tally = self._tallies.get(worker_id)
        if tally is not None and tally.seconds < SETTLES_S and frames_per_s > 0:
            tally.frames += num_frames
            tally.seconds += num_frames / frames_per_s

    def of(self, worker_id: str) -> float | None:
        """Return a worker's frames per second; None while that is not known."""
        tally = self._tallies.get(worker_id)
        if tally is None:
            return None
        if tally.seconds >= SETTLES_S and tally.frames > 0:
            return tally.frames / tally.seconds
        return self.by_gpu().get(tally.gpu) if tally.gpu else None

    def by_gpu(self) -> dict[str, float]:
        """Return the mean speed of the workers on each model of GPU, where it is known."""
        sums: dict[str, tuple[float, float]] = {}
        for tally in self._tallies.values():
            if tally.seconds >= SETTLES_S and tally.frames > 0:
                frames, seconds = sums.get(tally.gpu, (0.0, 0.0))
                sums[tally.gpu] = frames + tally.frames, seconds + tally.seconds
        return {gpu: frames / seconds for gpu, (frames, seconds) in sums.items()}
