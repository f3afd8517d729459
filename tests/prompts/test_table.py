"""`workers.prompts.table`.

- JSONL, CSV and Parquet with the same content give the same prompts.
- A file that cannot be read as a whole is a ConfigError that names file, line and near miss.
- A fault in one row is an InputError for its video only, naming row and fault.
- Rows without an object id are objects of their own, numbered from 1 in the order of the file.
- The digest of a video follows its rows and mask images, and neither their order nor the rest of
  the file.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import rle
from workers.errors import ConfigError, InputError
from workers.messages import Prompt
from workers.prompts.table import PromptTable, read_prompts
from workers.storage import open_store

MASK = np.zeros((6, 8), np.uint8)
MASK[2:4, 1:5] = 1
COUNTS = rle.encode(MASK)

ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "frame_idx": 0, "object_id": 1, "label": "dog", "box_xyxy": [1, 2, 3, 4.5]},
    {"video": "b/c.mp4", "time_s": 1.5, "object_id": 7, "points": [[1, 2], [3.5, 4]],
     "point_labels": [1, 0]},
    {"video": "a.mp4", "frame_idx": 3, "object_id": 2, "label": "cat",
     "mask_rle": {"size": [6, 8], "counts": COUNTS.decode()}},
    {"video": "b/c.mp4", "frame_idx": 2, "object_id": 7, "mask": "masks/1.png", "mask_value": 3},
    {"video": "ü 1.mp4", "frame_idx": 0, "box_xyxy": [5, 6, 1, 2]},
]  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as what the name's ending says."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, columns)
            out.writeheader()
            for row in rows:
                out.writerow(
                    {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
                )
    else:
        pq.write_table(pa.Table.from_pylist([{c: r.get(c) for c in columns} for r in rows]), path)
    return str(path)


def one(tmp_path: Path, **row: Any) -> PromptTable:
    """Return the table of a good video and one more row, of the video `x`."""
    good = {"video": "good", "frame_idx": 0, "box_xyxy": [0, 0, 1, 1]}
    return read_prompts(write(tmp_path / "p.jsonl", [good, {"video": "x", **row}]))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_three_formats_say_the_same(tmp_path: Path, ending: str) -> None:
    table = read_prompts(write(tmp_path / f"p.{ending}", ROWS))
    assert table.names == ["a.mp4", "b/c.mp4", "ü 1.mp4"]
    assert len(table) == 5
    assert table.labels() == ["cat", "dog"]
    assert table.prompts_for("a.mp4") == (
        Prompt(object_id=1, frame_idx=0, label="dog", box_xyxy=(1.0, 2.0, 3.0, 4.5)),
        Prompt(object_id=2, frame_idx=3, label="cat", mask_rle={"size": (6, 8), "counts": COUNTS}),
    )
    assert table.prompts_for("b/c.mp4") == (
        Prompt(
            object_id=7,
            time_us=1_500_000,
            points_xy=((1.0, 2.0), (3.5, 4.0)),
            point_labels=(1, 0),
        ),
        Prompt(object_id=7, frame_idx=2, mask_uri=f"{tmp_path}/masks/1.png", mask_value=3),
    )
    # Reversed corners are put in order; an object without an id gets one.
    assert table.prompts_for("ü 1.mp4") == (
        Prompt(object_id=1, frame_idx=0, box_xyxy=(1.0, 2.0, 5.0, 6.0)),
    )
    assert table.prompts_for("elsewhere.mp4") == ()


@pytest.mark.parametrize("text", ["1,2,3,4", "1 2 3 4", "[1, 2, 3, 4]", " 1, 2 ,3,4 "])
def test_csv_boxes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f'video,frame_idx,box_xyxy\nv,0,"{text}"\n')
    assert read_prompts(str(path)).prompts_for("v")[0].box_xyxy == (1, 2, 3, 4)


def test_a_store_and_blank_lines_and_a_byte_order_mark() -> None:
    store = open_store(f"memory://prompts-{uuid4().hex}")
    line = b'{"video": "v", "frame_idx": 0, "mask": "m.png"}'
    store.write_bytes("x/p.jsonl", b"\xef\xbb\xbf\n" + line + b"\r\n\n")
    (prompt,) = read_prompts(store.uri_of("x/p.jsonl")).prompts_for("v")
    assert prompt.mask_uri == store.uri_of("x/m.png")


def test_ids_are_given_in_row_order_past_those_that_are_used(tmp_path: Path) -> None:
    box = {"video": "v", "frame_idx": 0, "box_xyxy": [0, 0, 1, 1]}
    rows = [box, {**box, "object_id": 2}, box, {**box, "video": "w"}]
    table = read_prompts(write(tmp_path / "p.jsonl", rows))
    assert [p.object_id for p in table.prompts_for("v")] == [1, 2, 3]
    assert [p.object_id for p in table.prompts_for("w")] == [1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "neither JSONL, CSV nor Parquet"),
        ("p.jsonl", b'{"video": "v"}\n{"video": \n', r"line 2 .*is not JSON"),
        ("p.jsonl", b'\n\n[1]\n', "line 3 .*no JSON object"),
        ("p.jsonl", b'\xff\n', "line 1 .*not UTF-8"),
        ("p.jsonl", b'{"video": "v", "box_xyxx": 1}', "line 1 .*did you mean box_xyxy?"),
        ("p.jsonl", b'{"frame_idx": 1}', "line 1 .*names no video"),
        ("p.jsonl", b'{"video": 3}', "line 1 .*names no video"),
        ("p.csv", b"video,frame\nv,0\n", "did you mean frame_idx?"),
        ("p.csv", b"vedio,frame_idx\nv,0\n", "did you mean video?"),
        ("p.csv", b"frame_idx,time_s\n0,0\n", "no column video"),
        ("p.csv", b"video,frame_idx\nv,0\nv,0,0\n", "no readable CSV.*#3"),
        ("p.csv", b"video,frame_idx\nv,0\n,1\n", "row 2 .*names no video"),
        ("p.csv", b"video,mask,mask\nv,a,b\n", "mask twice"),
        ("p.csv", b"", "no readable CSV"),
        ("p.parquet", b"PAR1 but not really", "no readable Parquet"),
    ],
)  # fmt: skip
def test_unreadable_as_a_whole(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_prompts(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv does not exist"):
        read_prompts(str(tmp_path / "gone.csv"))


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"video": pa.array([], pa.string())}), path)
    else:
        path.write_text("" if path.suffix == ".jsonl" else "video,frame_idx\n")
    table = read_prompts(str(path))
    assert len(table) == 0
    assert table.names == []
    assert table.labels() == []


BOX = {"box_xyxy": [0, 0, 2, 2]}
NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"frame_idx": 0}, "exactly one of .*none"),
        ({"frame_idx": 0, **BOX, "points": [[1, 1]]}, "box_xyxy and points"),
        (BOX, "neither"),
        ({"frame_idx": 0, "time_s": 1.0, **BOX}, "both"),
        ({"frame_idx": -1, **BOX}, "frame_idx must be a whole number from 0"),
        ({"frame_idx": 1.5, **BOX}, "frame_idx must be a whole number"),
        ({"frame_idx": "first", **BOX}, "frame_idx must be a finite number, got 'first'"),
        ({"frame_idx": True, **BOX}, "frame_idx must be a finite number"),
        ({"time_s": -0.1, **BOX}, "time_s must be 0 or later"),
        ({"time_s": NAN, **BOX}, "time_s must be a finite number"),
        ({"frame_idx": 0, "object_id": 0, **BOX}, "object_id must be a whole number from 1"),
        ({"frame_idx": 0, "box_xyxy": [0, 0, NAN, 1]}, "box_xyxy holds a value that is not"),
        ({"frame_idx": 0, "box_xyxy": [0, 0, 1]}, "box_xyxy must be 4 numbers"),
        ({"frame_idx": 0, "box_xyxy": "a,b"}, "box_xyxy must be a list of numbers, got 'a,b'"),
        ({"frame_idx": 0, "box_xyxy": [[1], [2, 3]]}, "box_xyxy must be a list of numbers"),
        ({"frame_idx": 0, "box_xyxy": [3, 1, 3, 9]}, r"the box \[3.0, 1.0, 3.0, 9.0\] has no area"),
        ({"frame_idx": 0, "points": []}, "points must be"),
        ({"frame_idx": 0, "points": [[1, 2, 3]]}, "points must be"),
        ({"frame_idx": 0, "points": [[1, 2]], "point_labels": [1, 1]}, "point_labels must be 1"),
        ({"frame_idx": 0, "points": [[1, 2]], "point_labels": [2]}, "0 or 1"),
        ({"frame_idx": 0, "points": [[1, 2]], "point_labels": [0]}, "at least one foreground"),
        ({"frame_idx": 0, **BOX, "point_labels": [1]}, "point_labels belongs to points"),
        ({"frame_idx": 0, "mask_rle": "x"}, "mask_rle must be"),
        ({"frame_idx": 0, "mask_rle": {"size": [6, 8]}}, "mask_rle must be"),
        ({"frame_idx": 0, "mask_rle": {"size": [6], "counts": "0"}}, "size of mask_rle"),
        ({"frame_idx": 0, "mask_rle": {"size": [6, 9], "counts": COUNTS.decode()}}, "9"),
        ({"frame_idx": 0, "mask_rle": {"size": [6, 8], "counts": [1, 2]}}, "compressed counts"),
        ({"frame_idx": 0, "mask_rle": {"size": [6, 8], "counts": "`1"}}, "empty"),
        ({"frame_idx": 0, "mask": 3}, "mask must be the path"),
        ({"frame_idx": 0, "mask": "m.png", "mask_value": 0}, "mask_value must be a whole number"),
    ],
)
def test_a_fault_concerns_its_video_only(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    table = one(tmp_path, **row)
    with pytest.raises(InputError, match=said) as caught:
        table.prompts_for("x")
    assert "line 2 of" in str(caught.value)
    assert "video x" in str(caught.value)
    assert table.prompts_for("good")
    assert len(table.digest("x")) == 32


def test_the_same_object_twice_on_a_frame(tmp_path: Path) -> None:
    row = {"video": "x", "frame_idx": 4, "object_id": 3, **BOX}
    later = {**row, "frame_idx": 5}
    table = read_prompts(write(tmp_path / "p.csv", [row, later, row]))
    with pytest.raises(InputError, match=r"row 3 .*object 3 is prompted again .*as in row 1"):
        table.prompts_for("x")


@given(st.randoms())
def test_the_digest_ignores_order_and_other_videos(rng: random.Random) -> None:
    rows = [
        {"video": v, "frame_idx": i, "object_id": i, "box_xyxy": [0, 0, i, i]}
        for v in "ab"
        for i in range(1, 5)
    ]
    shuffled = rng.sample(rows, len(rows))
    store = open_store(f"memory://prompts-{uuid4().hex}")
    digests = []
    for name, content in (
        ("1.jsonl", rows),
        ("2.jsonl", [r for r in shuffled if r["video"] == "a"]),
    ):
        store.write_bytes(name, "\n".join(map(json.dumps, content)).encode())
        digests.append(read_prompts(store.uri_of(name)).digest("a"))
    assert digests[0] == digests[1]


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    row = {"frame_idx": 0, "object_id": 1, "box_xyxy": [0, 0, 1, 1]}
    digests = {one(tmp_path, **row).digest("x")}
    digests.add(one(tmp_path, **{**row, "frame_idx": 1}).digest("x"))
    digests.add(one(tmp_path, **{**row, "label": "dog"}).digest("x"))
    digests.add(one(tmp_path, **{**row, "box_xyxy": [0, 0, 1, 2]}).digest("x"))
    assert len(digests) == 4


def test_the_digest_follows_the_mask_image() -> None:
    store = open_store(f"memory://prompts-{uuid4().hex}")
    store.write_bytes("p.jsonl", b'{"video": "v", "frame_idx": 0, "mask": "m/1.png"}')

    def digest() -> str:
        return read_prompts(store.uri_of("p.jsonl")).digest("v")

    digests = [digest()]
    for content in (b"one", b"three", b"three3"):
        store.write_bytes("m/1.png", content)
        digests.append(digest())
    store.write_bytes("m/2.png", b"another")
    digests.append(digest())
    assert len(set(digests)) == 4
    assert digests[-1] == digests[-2]
