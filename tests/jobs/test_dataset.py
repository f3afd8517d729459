"""The reader of a dataset.

* It yields every committed video once, with its frames in order of time and their masks.
* A masklet holds all masks of one object in order; an object that is never present has none.
* One video is read from the files that may hold it, and there only from the row groups that may.
* A copy of the visible folders without the log reads alike; a remote store too.
* Names follow the rule of the corpus; what fits nothing, or several videos, is said.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco

from jobs import dataset as module
from jobs import publication
from jobs.commit_log import CommitLog
from jobs.dataset import Dataset, open_dataset
from jobs.publication import Publisher
from tests import servers
from tests.jobs.outputs import HEIGHT, WIDTH, commit_videos, run_plan, stage_video
from workers.errors import ConfigError, StoreError
from workers.storage import Store, open_store

KEYS = (3, -9, 2**61, 12, -(2**60))


def make(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    publisher = Publisher(log)
    commit_videos(log, KEYS[:3], num_frames=4, num_objects=3)
    publisher.publish()
    commit_videos(log, KEYS[3:], num_frames=2, num_objects=0)
    publisher.publish()


def assert_reads(dataset: Dataset) -> None:
    videos = {video.video_key: video for video in dataset.videos()}
    assert set(videos) == set(KEYS)
    assert dataset.categories == {0: "cat", 1: "dog"}
    frames = list(dataset.frames(videos[3]))
    assert [frame.frame_idx for frame in frames] == [0, 1, 2, 3]
    assert [frame.pts_us for frame in frames] == [0, 1000, 2000, 3000]
    for frame in frames:
        assert [mask.object_id for mask in frame.masks] == [1, 2, 3]
        for mask in frame.masks:
            pixels = mask.decode()
            assert pixels.shape == (HEIGHT, WIDTH)
            assert pixels.sum() == mask.area
            rle = {"size": list(mask.size), "counts": mask.counts}
            assert tuple(coco.toBbox(rle)) == mask.bbox_xywh
    masklets = list(dataset.masklets(videos[3]))
    assert [masklet.object_id for masklet in masklets] == [1, 2, 3]
    for masklet in masklets:
        assert masklet.frame_idx.tolist() == [0, 1, 2, 3]
        assert len(masklet) == 4
        by_frame = [frame.masks[masklet.object_id - 1] for frame in frames]
        assert masklet.counts == tuple(mask.counts for mask in by_frame)
        np.testing.assert_array_equal(masklet.bbox_xywh, [mask.bbox_xywh for mask in by_frame])
        np.testing.assert_array_equal(masklet.decode(2), by_frame[2].decode())
    assert [len(frame.masks) for frame in dataset.frames(videos[12])] == [0, 0]
    assert list(dataset.masklets(videos[12])) == []
    assert dataset.table("masks").num_rows == 36
    assert dataset.table("objects", columns=("object_id",), video_key=3).to_pydict() == {
        "object_id": [1, 2, 3]
    }
    assert dataset.table("masks", video_key=404).num_rows == 0


def test_everything_is_read_back(tmp_path: Path) -> None:
    make(open_store(str(tmp_path)))
    assert_reads(open_dataset(str(tmp_path)))


def test_a_copy_without_the_log_reads_alike(tmp_path: Path) -> None:
    make(open_store(str(tmp_path / "out")))
    hidden = shutil.ignore_patterns("_*")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=hidden)
    dataset = open_dataset(str(tmp_path / "copy"))
    assert dataset.state is None
    assert_reads(dataset)


def test_a_remote_dataset_reads_alike(seaweedfs: servers.S3Server) -> None:
    uri = seaweedfs.new_bucket() + "/out"
    make(open_store(uri, seaweedfs.options))
    assert_reads(open_dataset(uri, seaweedfs.options))


def test_batches_may_cut_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(open_store(str(tmp_path)))
    monkeypatch.setattr(module, "BATCH_ROWS", 2)
    assert_reads(open_dataset(str(tmp_path)))


def test_only_the_row_groups_of_a_video_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "ROW_GROUP_ROWS", 8)
    store = open_store(str(tmp_path))
    make(store)
    dataset = Dataset(store)
    assert len(dataset._files("masks", 3)) == 1
    assert len(dataset._files("masks", None)) == 2
    # The twelve rows of -9 are in the first two groups of eight: damage the last one.
    path = store.local_path(dataset._files("masks", -9)[0])
    assert path is not None
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 5
    counts = metadata.row_group(4).column(metadata.schema.names.index("rle_counts"))
    content = bytearray(path.read_bytes())
    content[counts.data_page_offset : counts.data_page_offset + 20] = bytes(20)
    path.write_bytes(bytes(content))
    with pytest.raises(OSError, match="deserialize"):
        list(dataset.batches("masks", video_key=2**61))
    assert sum(batch.num_rows for batch in dataset.batches("masks", video_key=-9)) == 12


def test_names(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = CommitLog.acquire(store, "one")
    commits = []
    for key, name in enumerate(["a/clip.mp4", "b/clip.mp4", "b/other.v2.mkv", "folder"]):
        commit = stage_video(store, 1, key)
        video = {**commit.video, "name": name, "uri": f"/corpus/{name}"}
        commits.append(type(commit)(key, 1, "a", 1, commit.parts, video, commit.stages))
    log.commit(commits)
    Publisher(log).publish()
    dataset = open_dataset(str(tmp_path))
    for asked, key in {
        "a/clip.mp4": 0,
        "b/clip": 1,
        "other.v2": 2,
        "other.v2.mkv": 2,
        "folder": 3,
        "/corpus/b/clip.mp4": 1,
    }.items():
        assert dataset.video(asked).video_key == key
    assert dataset.video(2).name == "b/other.v2.mkv"
    with pytest.raises(ConfigError, match=r"'clip' fits 2 videos \(a/clip.mp4, b/clip.mp4\)"):
        dataset.video("clip")
    with pytest.raises(ConfigError, match="no video named 'lip'"):
        dataset.video("lip")
    with pytest.raises(ConfigError, match="key 99"):
        dataset.video(99)


def test_nothing_there_and_gone_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no dataset"):
        open_dataset(str(tmp_path / "nowhere"))
    store = open_store(str(tmp_path / "out"))
    make(store)
    dataset = open_dataset(str(tmp_path / "out"))
    Publisher(CommitLog.acquire(store, "two")).compact()
    with pytest.raises(StoreError, match="open it again"):
        list(dataset.videos())
    assert_reads(open_dataset(str(tmp_path / "out")))
