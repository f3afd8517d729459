"""Faults of the operating system, told as the errors of this project."""

from __future__ import annotations

import errno
import os

from workers.errors import StoreDenied, StoreError, StoreFull, StoreUnavailable

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a write that found no room: the disk, a quota, a limit on the size of files."""
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENFILE,
}


def os_fault(error: OSError, uri: str, *, writing: bool) -> Exception:
    """Return what to raise for `error`.

    Parameters
    ----------
    error : OSError
        What the operating system, or a library in its manner, raised.
    uri : str
        The place it concerns.
    writing : bool
        While writing, a file where a folder must be is a refusal; while reading, it is only a
        missing object.

    Returns
    -------
    Exception
        StoreFull, StoreDenied, StoreUnavailable, FileNotFoundError or StoreError, with a sentence.
    """
    code = error.errno
    reason = (error.strerror or str(error) or type(error).__name__).strip()
    verb = "written" if writing else "read"
    if code in FULL:
        # in the system's words: libraries that write wrap them in their own
        reason = os.strerror(code)
        return StoreFull(
            f"{uri} cannot be written: {reason.lower()}; free some space or choose another place"
        )
    if code in _DENIED or isinstance(error, PermissionError):
        return StoreDenied(
            f"{uri} cannot be {verb}: {reason.lower()}; change its permissions or choose another "
            "place"
        )
    if code in _MISSING or isinstance(error, FileNotFoundError):
        if not writing:
            return FileNotFoundError(f"{uri} does not exist")
        if code == errno.ENOENT:
            return StoreError(f"{uri} cannot be written: its folder does not exist")
        return StoreDenied(
            f"{uri} cannot be written: {reason.lower()}; a file and a folder have the same name, "
            "so choose another place"
        )
    if code in _PASSING or isinstance(error, (ConnectionError, TimeoutError)):
        return StoreUnavailable(f"{uri} cannot be {verb} now: {reason.lower()}; try again later")
    return StoreError(f"{uri} cannot be {verb}: {reason.lower()}")
