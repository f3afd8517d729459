"""One attempt's Parquet files: rows in, row groups to a local spool, whole files to staging.

Rows are buffered in columns and leave as a row group of fixed size, so the memory of a writer does
not depend on the length of the video. The SHA-256 of a file is computed from the bytes as they are
written: nothing is read twice. A file reaches the store only when it is complete, under a key that
no other attempt can have.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from workers.messages import Part
from workers.sinks.schema import arrow_schema, writer_options
from workers.storage.faults import os_fault

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FLUSH_ROWS = 1024
"""Rows of a row group in staging: about 150 kB of masks, a megabyte as Python values.

Smaller groups would not save memory in a long video: their metadata is kept until the file is
closed.
"""
FLUSH_BYTES = 4 << 20
"""Variable-length bytes at which a row group is written earlier."""


def warm_up() -> None:
    """Load what the first row group of a process loads, before a video pays for it.

    Notes
    -----
    Also makes Arrow take its memory from the C library. Its own pools reserve megabytes for every
    thread that writes, and keep them; there is a new one for each video.
    """
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())
    schema = arrow_schema("masks")
    zeros = {field.name: [b"" if pa.types.is_binary(field.type) else 0] for field in schema}
    with pq.ParquetWriter(io.BytesIO(), schema, **writer_options("masks")) as writer:
        writer.write_table(pa.table(zeros, schema=schema))


class PartStore(Protocol):
    """What a writer needs of a store (see `workers.storage.Store`)."""

    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Write a local file under `key`, complete before it is visible."""


def staging_prefix(epoch: int, attempt_id: str) -> str:
    """Return where the parts of an attempt lie, with a trailing slash.

    Examples
    --------
    >>> staging_prefix(3, "a1b2")
    '_staging/3/a1b2/'
    """
    return f"_staging/{epoch}/{attempt_id}/"


class PartWriter:
    """The Parquet files of one attempt, one per table that has rows.

    A context manager: on the way out it removes the local files, uploaded or not. What reached
    staging stays there; without a commit that names it, `gc` removes it.

    Parameters
    ----------
    store : Store
        The output.
    epoch : int
        Epoch of the driver's fence.
    attempt_id : str
        The attempt.
    spool_dir : str or Path or None
        Where the local files are kept until they are uploaded; None is the system's temporary
        directory, another is made when missing.

    Raises
    ------
    StoreFull, StoreDenied, StoreError
        Here and in every method: the local spool, or the store, cannot be written.
    """

    def __init__(
        self,
        store: PartStore,
        epoch: int,
        attempt_id: str,
        spool_dir: str | Path | None = None,
    ) -> None:
        self._store = store
        self._prefix = staging_prefix(epoch, attempt_id)
        try:
            if spool_dir is not None:
                Path(spool_dir).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="maskmill-parts-", dir=spool_dir))
        except OSError as error:
            where = str(spool_dir or tempfile.gettempdir())
            raise os_fault(error, where, writing=True) from error
        self._files: dict[str, _TableFile] = {}

    def append(self, table: str, row: Sequence[Any], num_bytes: int = 0) -> None:
        """Add one row.

        Parameters
        ----------
        table : str
            Name of the table.
        row : sequence
            One value per column, in the order of the schema.
        num_bytes : int
            Size of the row's values of variable length; large ones bring the next flush nearer.
        """
        file = self._files.get(table)
        if file is None:
            file = self._files[table] = _TableFile(table, self._folder / f"{table}-0.parquet")
        file.append(row, num_bytes)

    def close_files(self) -> int:
        """Write what is still buffered and close every file.

        Returns
        -------
        int
            Size of all files together, in bytes.
        """
        for file in self._files.values():
            file.close()
        return sum(file.size_bytes for file in self._files.values())

    def upload(self, on_bytes: Callable[[int], None] | None = None) -> tuple[Part, ...]:
        """Put the closed files into staging.

        Parameters
        ----------
        on_bytes : callable, optional
            Called with the number of bytes that were sent since its last call.

        Returns
        -------
        tuple of Part
            One per table with rows, in the order their first rows came.
        """
        parts = []
        for file in self._files.values():
            key = f"{self._prefix}{file.path.name}"
            self._store.put_file(file.path, key, on_bytes=on_bytes)
            file.path.unlink()
            parts.append(Part(file.table, key, file.num_rows, file.size_bytes, file.sha256))
        return tuple(parts)

    def abort(self) -> None:
        """Drop buffers and local files; may be called at any time, also twice."""
        for file in self._files.values():
            file.discard()
        self._files = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.abort()


class _TableFile:
    """The file of one table: buffered rows in front of a Parquet writer."""

    def __init__(self, table: str, path: Path) -> None:
        self.table = table
        self.path = path
        self.num_rows = 0
        self._rows: list[Sequence[Any]] = []
        self._buffered_bytes = 0
        self._sink: _HashingFile | None = None
        self._writer: pq.ParquetWriter | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""
        return self._sink.size_bytes if self._sink else 0

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes written so far."""
        assert self._sink is not None
        return self._sink.digest.hexdigest()

    def append(self, row: Sequence[Any], num_bytes: int) -> None:
        self._rows.append(row)
        self._buffered_bytes += num_bytes
        if len(self._rows) >= FLUSH_ROWS or self._buffered_bytes >= FLUSH_BYTES:
            self.flush()
        self.num_rows += 1

    def flush(self) -> None:
        """Write the buffered rows as one row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        schema = arrow_schema(self.table)
        columns = zip(*self._rows, strict=True)
        arrays = [
            pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)
        ]
        self._rows = []
        self._buffered_bytes = 0
        try:
            if self._writer is None:
                self._sink = _HashingFile(self.path)
                self._writer = pq.ParquetWriter(self._sink, schema, **writer_options(self.table))
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        except OSError as error:
            raise os_fault(error, str(self.path.parent), writing=True) from error

    def close(self) -> None:
        """Write the rest and the footer."""
        self.flush()
        if self._writer is None or self._sink is None:
            return
        try:
            self._writer.close()
            self._sink.close()
        except OSError as error:
            raise os_fault(error, str(self.path.parent), writing=True) from error

    def discard(self) -> None:
        """Let go of the file, whatever state it is in; the folder is about to be removed."""
        self._rows = []
        if self._sink is not None and not self._sink.closed:
            # The writer would write a footer when it is collected: give it nowhere to write to.
            self._sink.deaf = True
            if self._writer is not None:
                self._writer.close()
            # What is still buffered is tried once more, on the disk that may just have been full.
            with contextlib.suppress(OSError):
                self._sink.close()
        self._writer = None


class _HashingFile:
    """A file for writing that hashes and counts what passes through it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.deaf = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> int:
        if self.deaf:
            return len(data)
        view = memoryview(data)
        self._file.write(view)
        self.digest.update(view)
        self.size_bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
