"""`maskmill plan` beyond what the typed life of a dataset shows.

* A file whose header kills the process that reads it is named, and the others are still read.
* A large corpus is sampled; the rest is estimated by the sample's frames per byte.
* Warnings of the corpus are told.
* Strides leave frames out, not hours of video.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from jobs import preview
from jobs.config import CorpusConfig, DetectorConfig, OutConfig, PromptConfig, RunConfig
from jobs.probe import ProbeRow, probe_video
from tests.media import write_video
from workers.errors import ConfigError
from workers.messages import StoreOptions, VideoSource


def config_of(corpus: Path, stride: int = 1) -> RunConfig:
    return RunConfig(
        corpus=CorpusConfig(paths=(str(corpus),), stride=stride),
        out=OutConfig(uri=""),
        prompts=PromptConfig(allow_unprompted=True),
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(6):
        write_video(folder / f"v{index}.mp4", num_frames=30, fps=10)
    return folder


def probe_or_die(source: VideoSource, options: StoreOptions) -> ProbeRow:
    """Read a header, but die as a decoder would that a file has crashed."""
    if source.name == "v3.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    return probe_video(source, options)


def test_fatal_header_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "probe_video", probe_or_die)
    found = preview.make_preview(config_of(corpus))
    lines = preview.preview_lines(config_of(corpus), found, fps=25)
    assert "  headers      6 read, 1 of them unreadable" in lines
    assert any("the header of v3.mp4 is fatal" in line for line in lines)
    assert "  frames       about 150 to track" in lines
    assert "  videos       6, 5 to track" in lines


def test_missing_weights_are_refused_as_by_a_run(corpus: Path, tmp_path: Path) -> None:
    detector = DetectorConfig(name="yolo11n", checkpoint=str(tmp_path / "none.pt"))
    config = config_of(corpus).model_copy(update={"prompts": PromptConfig(detector=detector)})
    with pytest.raises(ConfigError, match=r"none\.pt does not exist"):
        preview.make_preview(config)


def test_warnings_of_the_corpus_are_told(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", num_frames=3)
    (tmp_path / "thumbnail.jpg").write_bytes(b"")
    config = config_of(tmp_path)
    lines = preview.preview_lines(config, preview.make_preview(config), fps=25)
    (warning,) = (line for line in lines if line.startswith("warning: "))
    assert "1 images are taken for thumbnails" in warning


def test_sample_speaks_for_the_rest(corpus: Path) -> None:
    found = preview.make_preview(config_of(corpus), max_probes=2)
    assert len(found.probed) == 2
    assert found.plan.num_frames_left == pytest.approx(180, rel=0.15)
    assert found.hours == pytest.approx(18 / 3600, rel=0.15)


def test_stride_leaves_frames_out_but_no_time(corpus: Path) -> None:
    found = preview.make_preview(config_of(corpus, stride=3))
    assert found.plan.num_frames_left == 60
    assert found.hours == pytest.approx(18 / 3600, rel=0.01)
    lines = preview.preview_lines(config_of(corpus, 3), found, fps=1, price=60)
    assert any(re.search(r"cost +about 1\.00 at 60 per worker-hour", line) for line in lines)
