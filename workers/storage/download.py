"""The local end of a download."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

from workers.storage.faults import os_fault


class Download:
    """A local file that is filled piece by piece and removed again when the block raises.

    Parameters
    ----------
    local_path : str or Path
        Written in place; its folder must exist.

    Raises
    ------
    StoreFull, StoreDenied, StoreError
        The disk does not take it.
    """

    def __init__(self, local_path: str | Path) -> None:
        self.path = str(local_path)
        self._descriptor = -1

    def __enter__(self) -> Download:
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise os_fault(error, self.path, writing=True) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
        if error is not None:
            with contextlib.suppress(OSError):
                Path(self.path).unlink()

    def write_at(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset` bytes from the start; threads may do so at once."""
        view = memoryview(data)
        while view:
            try:
                num_written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise os_fault(error, self.path, writing=True) from error
            view = view[num_written:]
            offset += num_written
