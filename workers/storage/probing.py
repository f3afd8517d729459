"""What a store really does, found by doing it.

Several servers that speak S3 accept the header of a conditional write and ignore it, so the
commit log believes only an experiment.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field

from workers.errors import MaskmillError, StoreError
from workers.storage.base import Store

NUM_RACERS = 8
"""Threads that create the same key at once."""


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What `probe_store` saw.

    Attributes
    ----------
    create_if_absent : bool
        A second create of a key was refused, its content stayed, and each race had one winner.
    race_winners : int
        How many of the racing threads were told that they made the key; 1 is right.
    read_after_write, list_after_write, overwrite, delete : bool
        A write is read, listed and replaced at once; a deleted key is gone.
    write_s, read_s, list_s : float
        Seconds that one operation took.
    problems : tuple of str
        One sentence for each thing that is wrong; empty is a fit store.
    """

    create_if_absent: bool = False
    race_winners: int = 0
    read_after_write: bool = False
    list_after_write: bool = False
    overwrite: bool = False
    delete: bool = False
    write_s: float = 0.0
    read_s: float = 0.0
    list_s: float = 0.0
    problems: tuple[str, ...] = field(default=())


def probe_store(store: Store) -> StoreReport:
    """Try on `store` what the commit log relies on.

    Parameters
    ----------
    store : Store
        A root that may be written; everything happens below ``_probe/<random>/`` and is deleted
        again, as far as the store lets us.

    Returns
    -------
    StoreReport
        Findings; only a store that cannot even be written raises.

    Raises
    ------
    StoreError
        The first write failed: denied, full, unreachable.
    """
    folder = f"_probe/{uuid.uuid4().hex}/"
    problems: list[str] = []
    written: list[str] = []

    def key(name: str) -> str:
        written.append(folder + name)
        return written[-1]

    try:
        plain = key("plain")
        start = time.perf_counter()
        store.write_bytes(plain, b"first")
        write_s = time.perf_counter() - start
        start = time.perf_counter()
        read_after_write = _read(store, plain) == b"first"
        read_s = time.perf_counter() - start
        if not read_after_write:
            problems.append(f"{store.uri} does not read back at once what was written")
        start = time.perf_counter()
        list_after_write = [found.key for found in store.list(folder)] == [plain]
        list_s = time.perf_counter() - start
        if not list_after_write:
            problems.append(f"{store.uri} does not list at once what was written")
        store.write_bytes(plain, b"second")
        overwrite = _read(store, plain) == b"second"
        if not overwrite:
            problems.append(f"{store.uri} does not read back at once what was overwritten")
        refuses = _refuses_second_create(store, key("twice"), problems)
        winners, intact = _race(store, key("race"))
        if refuses and (winners != 1 or not intact):
            problems.append(
                f"{store.uri} let {winners} of {NUM_RACERS} concurrent writers create one key"
            )
    except BaseException:
        _clean_up(store, written, [])
        raise
    deleted = _clean_up(store, written, problems)
    return StoreReport(
        create_if_absent=refuses and winners == 1 and intact,
        race_winners=winners,
        read_after_write=read_after_write,
        list_after_write=list_after_write,
        overwrite=overwrite,
        delete=deleted,
        write_s=write_s,
        read_s=read_s,
        list_s=list_s,
        problems=tuple(problems),
    )


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read_bytes(key)
    except FileNotFoundError:
        return None


def _refuses_second_create(store: Store, key: str, problems: list[str]) -> bool:
    try:
        first = store.create(key, b"mine")
        second = store.create(key, b"other")
    except StoreError as error:
        problems.append(str(error))
        return False
    if first and not second and _read(store, key) == b"mine":
        return True
    problems.append(
        f"{store.uri} ignores the condition of a conditional write, so two drivers could overwrite "
        "each other; use a store with conditional writes, or --single-driver at your own risk"
    )
    return False


def _race(store: Store, key: str) -> tuple[int, bool]:
    """Return how many of several threads created `key`, and whether it holds a winner's bytes."""
    winners: list[bytes] = []
    barrier = threading.Barrier(NUM_RACERS)

    def run(content: bytes) -> None:
        barrier.wait()
        try:
            if store.create(key, content):
                winners.append(content)
        except MaskmillError:
            return

    threads = [
        threading.Thread(target=run, args=(b"racer %d" % number,), daemon=True)
        for number in range(NUM_RACERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(winners), _read(store, key) in winners


def _clean_up(store: Store, keys: list[str], problems: list[str]) -> bool:
    try:
        store.delete(keys)
        left = [found.key for found in store.list(keys[0].rpartition("/")[0] + "/")] if keys else []
    except (MaskmillError, OSError) as error:
        problems.append(f"{store.uri} does not let us delete: {error}")
        return False
    if left:
        problems.append(f"{store.uri} still lists what was deleted: {left[0]}")
    return not left
