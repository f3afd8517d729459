"""Read a Parquet file of any size in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def batches(
    parquet: pq.ParquetFile,
    max_rows: int = 65_536,
    *,
    columns: Sequence[str] | None = None,
    groups: Iterable[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file, one row group at a time.

    Arrow's own iterator keeps what it has read of all the groups that it is asked for until the
    last one, so that a large file was held as a whole in the end.

    Parameters
    ----------
    parquet : ParquetFile
        The open file.
    max_rows : int
        Most rows of a batch.
    columns : sequence of str, optional
        The columns to read; all by default.
    groups : iterable of int, optional
        The row groups to read; all by default.
    """
    for group in range(parquet.num_row_groups) if groups is None else groups:
        yield from parquet.iter_batches(
            max_rows, row_groups=[group], columns=None if columns is None else list(columns)
        )
