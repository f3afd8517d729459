"""Tells videos that are bad from an outage of the world around them.

An outage must quarantine no good video, and what concerns one video must never stop a run, so final
failures are held back until something else happens, and are counted in three ways. An unusable
input (the video was read and found so) would come back whenever it is tried: it never comes here,
and says nothing about an outage, neither for it nor against it, since a corpus may well hold a
thousand web pages named ``.mp4`` in a row. `TRANSIENT` (a store that gave no answer in all the
tries) speaks against the store, however few workers asked and whatever it said, until a commit
proves the contrary. All others are an outage when many in a row look alike on two workers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from workers.errors import FailureKind, StoreError

Task = TypeVar("Task")
"""Whatever the caller knows a task by."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task was given up: the kind, one sentence, and where it was raised."""

    kind: FailureKind
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Verdict(Generic[Task]):
    """What follows.

    Attributes
    ----------
    let_out : sequence of (Task, Failure)
        Tasks that failed by themselves: they go into quarantine.
    outage : StoreError or None
        Why the run must stop; what is held back then is nobody's fault.
    """

    let_out: Sequence[tuple[Task, Failure]] = ()
    outage: StoreError | None = None


@dataclass(slots=True)
class _Streak(Generic[Task]):
    """Tasks that failed for what may be one cause."""

    failures: list[tuple[Task, Failure]] = field(default_factory=list)
    workers: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.failures)

    def empty(self) -> list[tuple[Task, Failure]]:
        found, self.failures = self.failures, []
        self.workers.clear()
        return found


class OutageWatch(Generic[Task]):
    """Holds tasks that were given up back, until it is known whether all fail alike.

    Parameters
    ----------
    outage_after : int
        So many in a row are an outage: that look alike, on two or more workers, or that the store
        did not answer, on any number.

    Examples
    --------
    >>> watch = OutageWatch(outage_after=2)
    >>> lost = Failure(FailureKind.WORKER_LOST, "the process was killed")
    >>> verdict = watch.failed("a", lost, "w1", is_only_worker=False)
    >>> verdict.let_out, len(watch)
    ([], 1)
    >>> [task for task, _ in watch.committed().let_out], len(watch)
    (['a'], 0)
    >>> for task, worker in (("b", "w1"), ("c", "w2")):
    ...     verdict = watch.failed(task, lost, worker, is_only_worker=False)
    >>> verdict.let_out, type(verdict.outage).__name__
    ([], 'StoreError')
    """

    def __init__(self, outage_after: int) -> None:
        self._outage_after = outage_after
        self._alike: _Streak[Task] = _Streak()
        self._unanswered: _Streak[Task] = _Streak()  # only a commit ends it

    def __len__(self) -> int:
        """Return how many tasks are held back."""
        return len(self._alike) + len(self._unanswered)

    def failed(
        self, task: Task, failure: Failure, worker_id: str, *, is_only_worker: bool
    ) -> Verdict[Task]:
        """Hold a task back that was given up; an unlike failure lets those before it out.

        Parameters
        ----------
        task : Task
            The task.
        failure : Failure
            Its last failure.
        worker_id : str
            Where that was.
        is_only_worker : bool
            No second worker will ever tell an outage from bad videos: they are let out in time.

        Returns
        -------
        Verdict
            What follows.
        """
        let_out: list[tuple[Task, Failure]] = []
        if self._alike.failures and not _alike(self._alike.failures[0][1], failure):
            let_out = self._alike.empty()
        unanswered = failure.kind is FailureKind.TRANSIENT
        streak = self._unanswered if unanswered else self._alike
        streak.failures.append((task, failure))
        streak.workers.add(worker_id)
        if len(streak) < self._outage_after:
            return Verdict(let_out)
        if unanswered:
            return Verdict(let_out, self._silence())
        if len(streak.workers) >= 2:
            return Verdict(
                let_out,
                StoreError(
                    f"the last {len(streak)} videos failed alike on {len(streak.workers)} workers, "
                    f"so none of them was quarantined: {failure.message}; mend the cause and run "
                    "the same command again, or, if these videos really are bad, run it with "
                    "--workers 1, which quarantines them"
                ),
            )
        if is_only_worker or len(streak) >= _ONE_OF_MANY * self._outage_after:
            let_out += streak.empty()
        return Verdict(let_out)

    def committed(self) -> Verdict[Task]:
        """Let everything out: what failed before a success was no outage."""
        return Verdict(self._alike.empty() + self._unanswered.empty())

    def ended(self) -> Verdict[Task]:
        """Judge what is held back, now that nothing else is left that could happen."""
        if len(self._unanswered) >= 2:
            return Verdict(outage=self._silence())
        return self.committed()

    def _silence(self) -> StoreError:
        count, message = len(self._unanswered), self._unanswered.failures[-1][1].message
        return StoreError(
            f"the store gave no answer for the last {count} videos, each tried several times, "
            "and nothing was committed in between, so none of them was quarantined: "
            f"{message}; run the same command again when the store answers"
        )


_ONE_OF_MANY = 50
"""What fails on one worker of several is held back so many times longer: others may meet it yet."""
_PUNCTUATION = ".,:;!?()[]\"'`"


def _words(message: str) -> frozenset[str]:
    """Return the plain words of a message: no names, paths, numbers or quoted things."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", " ", message)
    words = (word.strip(_PUNCTUATION).lower() for word in plain.split())
    return frozenset(word for word in words if word.isalpha())


def _alike(first: Failure, second: Failure) -> bool:
    """Whether two failures look like one cause: the same kind, and mostly the same words."""
    if first.kind is not second.kind:
        return False
    ours, theirs = _words(first.message), _words(second.message)
    return len(ours & theirs) >= 0.6 * len(ours | theirs)
