"""Contract of `workers.sinks.schema`.

* SCHEMA.md is what the program prints, so it documents every column with its unit.
* The tables have the columns and types of the design, `video_key` first where there is one.
* A file carries version, table, descriptions and units in its metadata, page indexes, zstd, and no
  dictionary for the counts; DuckDB, Polars and pyarrow read it.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workers.sinks import schema

MASKS = {
    "video_key": "int64", "frame_idx": "int32", "pts_us": "int64", "object_id": "int32",
    "category_id": "int16", "score": "float", "bbox_x": "float", "bbox_y": "float",
    "bbox_w": "float", "bbox_h": "float", "area": "int32", "rle_h": "int16", "rle_w": "int16",
    "rle_counts": "binary", "flags": "uint8",
}  # fmt: skip
FOLDERS = [
    "masks", "frames", "prompts", "categories", "objects", "videos", "stages", "workers", "runs",
    "quarantine",
]  # fmt: skip


def test_schema_md_is_what_the_program_prints() -> None:
    page = Path(__file__).resolve().parents[2] / "SCHEMA.md"
    assert page.read_text() == schema.as_markdown(), "run python -m workers.sinks.schema"


def test_the_tables_of_the_design() -> None:
    assert list(schema.TABLES) == FOLDERS
    assert {f.name: str(f.type) for f in schema.TABLES["masks"]} == MASKS
    nullable = [field.name for field in schema.TABLES["masks"] if field.nullable]
    assert nullable == ["category_id"]
    for name in ("masks", "frames", "prompts", "objects", "videos", "stages", "quarantine"):
        assert schema.TABLES[name].field(0).name == "video_key"


@pytest.mark.parametrize("declared", schema.DECLARATIONS, ids=lambda table: table.name)
def test_every_column_has_a_sentence_and_a_unit(declared: schema.Table) -> None:
    arrow = schema.TABLES[declared.name]
    assert set(declared.sorted_by) <= set(arrow.names)
    assert set(declared.plain) <= set(arrow.names)
    for field in arrow:
        assert field.metadata[b"description"].endswith(b".")
        assert field.metadata[b"unit"]


def row_of(name: str) -> dict[str, object]:
    """Return one row with a value of the right type in every column."""
    values = {"string": "x", "binary": b"0", "bool": True, "list<int32>": [1, 2]}
    row: dict[str, object] = {}
    for column in next(t for t in schema.DECLARATIONS if t.name == name).columns:
        row[column.name] = values.get(column.type, 1)
    return row


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_read_by_everybody(tmp_path: Path, name: str) -> None:
    table = pa.Table.from_pylist([row_of(name)] * 3, schema=schema.TABLES[name])
    path = tmp_path / f"{name}.parquet"
    with pq.ParquetWriter(path, table.schema, **schema.writer_options(name)) as writer:
        writer.write_table(table)

    file = pq.ParquetFile(path)
    assert file.schema_arrow.equals(schema.TABLES[name], check_metadata=True)
    assert file.schema_arrow.metadata[schema.VERSION_KEY] == str(schema.SCHEMA_VERSION).encode()
    group = file.metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        assert column.compression == "ZSTD"
        assert column.has_offset_index
        if column.path_in_schema == "rle_counts":
            assert not column.has_dictionary_page
        else:
            assert column.has_column_index

    glob = str(tmp_path / "*.parquet")
    query = f"SELECT count(*), count(COLUMNS(*)) FROM '{glob}'"
    with duckdb.connect() as connection:
        (found,) = connection.execute(query).fetchall()
    assert set(found) == {3}
    assert polars.read_parquet(glob).shape == (3, len(table.column_names))
