"""Local files of one attempt, in a folder that is found and removed when its process was killed.

Nothing runs in a process that is killed, so somebody else must take its files away: the next
worker that starts on the node. What it may take is what no living process holds. Each folder
carries a lock (flock(2)) that the kernel drops with the process; unlike a process id it is never
given to another process, and it means the same in every container that shares the directory. The
host is in the name, since on some network file systems these locks end at the host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workers.storage.faults import os_fault

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def spool_folder(spool_dir: str | Path | None = None) -> Iterator[Path]:
    """Make a folder for local files, and remove it with all it holds at the end.

    Parameters
    ----------
    spool_dir : str or Path or None
        Where; made when missing. None is the system's temporary directory.

    Yields
    ------
    Path
        Empty, readable by this user only. If this process is killed, `remove_abandoned` of
        another one on this host removes it.

    Raises
    ------
    StoreFull, StoreDenied, StoreError
        The folder cannot be made.
    """
    place = Path(spool_dir) if spool_dir is not None else Path(tempfile.gettempdir())
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder, lock = _make_locked(place)
    except OSError as error:
        if isinstance(error, FileExistsError):
            error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        raise os_fault(error, f"the spool directory {place}", writing=True) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(spool_dir: str | Path | None = None) -> int:
    """Remove the spool folders of this host's processes that have died.

    Parameters
    ----------
    spool_dir : str or Path or None
        Where they lie, as for `spool_folder`.

    Returns
    -------
    int
        Folders that were removed. What cannot be judged or removed is left: it belongs to another
        user, or its file system knows no locks.
    """
    place = Path(spool_dir) if spool_dir is not None else Path(tempfile.gettempdir())
    ours = re.compile(re.escape(_prefix()) + r"\d+-\w+")
    num_removed = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for folder in [path for path in place.iterdir() if ours.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    # BlockingIOError, an OSError: a living process holds it.
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                    num_removed += 1
                finally:
                    os.close(lock)
    if num_removed:
        _log.info("removed %d spool folders of processes that died", num_removed)
    return num_removed


def _make_locked(place: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=place))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # Where there are no locks, nobody can take one and remove the folder either.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        # It was taken for an abandoned one between the two calls.
        os.close(lock)


def _prefix() -> str:
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "host"
    return f"maskmill-{host}-"
