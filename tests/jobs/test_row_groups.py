"""Parquet files are read in memory that does not depend on their size.

* Every row comes out once, in order, in batches of at most so many rows; only chosen groups and
  columns where some are chosen.
* A process that reads a file of many row groups never holds it as a whole.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.row_groups import batches

NUM_GROUPS, NUM_ROWS, ROW_BYTES = 24, 4096, 1024  # 96 MiB that cannot be compressed


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("groups") / "rows.parquet"
    schema = pa.schema([("at", pa.int64()), ("data", pa.binary(ROW_BYTES))])
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(found, schema) as writer:
        for group in range(NUM_GROUPS):
            at = np.arange(NUM_ROWS) + group * NUM_ROWS
            data = [rng.bytes(ROW_BYTES) for _ in range(NUM_ROWS)]
            writer.write_table(pa.table({"at": at, "data": data}, schema=schema))
    return found


def test_every_row_once(path: Path) -> None:
    with pq.ParquetFile(path) as parquet:
        found = list(batches(parquet, 1000, columns=["at"]))
        some = list(batches(parquet, groups=[3, 1], columns=["at"]))
    assert max(batch.num_rows for batch in found) == 1000
    assert found[0].schema.names == ["at"]
    rows = np.concatenate([batch.column("at").to_numpy() for batch in found])
    assert np.array_equal(rows, np.arange(NUM_GROUPS * NUM_ROWS))
    assert [batch.column("at")[0].as_py() for batch in some] == [3 * NUM_ROWS, NUM_ROWS]


READER = """
import sys
import pyarrow.parquet as pq
from jobs.row_groups import batches

def anonymous():
    return int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]) * 1024

with pq.ParquetFile(sys.argv[1]) as parquet:
    # Not from the first group on: buffers that are used again are as large as one group.
    held = [anonymous() for number, _ in enumerate(batches(parquet, 4096)) if number >= 4]
print(held[-1] - held[0])
"""


def test_a_file_is_never_held_whole(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READER, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < path.stat().st_size / 4
