"""One video through the pipeline, in tests: a spec, an attempt, and the rows that come out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tests import media
from workers.messages import (
    Attempt,
    DetectorSpec,
    Phase,
    Prompt,
    Proposal,
    SourceKind,
    TrackerSpec,
    VideoSource,
    WorkerSpec,
)
from workers.pipeline import track_video
from workers.prompts.detector import Detection, Detector
from workers.sinks.schema import TABLES
from workers.trackers.base import TrackingConfig, TrackingModelLoader
from workers.trackers.registry import create_tracking_loader

Rows = list[dict[str, Any]]

BOX = Prompt(object_id=1, frame_idx=0, box_xyxy=(10, 8, 40, 30))
"""One box on the first frame."""


def source_of(path: Path, **fields: Any) -> VideoSource:
    """Return the source of a local video; a folder is one of frames."""
    kind = SourceKind.FRAMES if path.is_dir() else SourceKind.FILE
    return VideoSource(video_key=77, uri=str(path), name=path.name, kind=kind, **fields)


def spec_of(tmp_path: Path, options: Mapping[str, Any] | None = None, **fields: Any) -> WorkerSpec:
    """Return a spec with the fake tracker and an output below `tmp_path`."""
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    fields.setdefault("tracker", TrackerSpec("fake", options=options or {}))
    fields.setdefault("out_uri", str(tmp_path / "out"))
    return WorkerSpec(run_id="run", spool_dir=str(spool), **fields)


def attempt_of(
    path: Path, *prompts: Prompt, attempt_id: str = "a1", small: bool = False, **source: Any
) -> Attempt:
    """Return an attempt with given prompts; none at all is an empty table."""
    return Attempt(
        attempt_id, 3, 1, source_of(path, **source), prompts=prompts, small_profile=small
    )


def loaded(spec: WorkerSpec) -> TrackingModelLoader:
    """Return the loaded tracker of a spec."""
    tracker = spec.tracker
    config = TrackingConfig(tracker.name, device="cpu", options=tracker.options)
    loader = create_tracking_loader(tracker.name, config)
    loader.load()
    return loader


class Reports:
    """Remembers every heartbeat."""

    def __init__(self) -> None:
        self.seen: list[tuple[Phase, int, int, int]] = []

    def __call__(
        self, phase: Phase, num_steps: int, num_masks: int = 0, num_bytes: int = 0
    ) -> None:
        self.seen.append((phase, num_steps, num_masks, num_bytes))

    def phases(self) -> list[Phase]:
        """Return the phases in order, each change once."""
        order: list[Phase] = []
        for phase, *_ in self.seen:
            if not order or order[-1] is not phase:
                order.append(phase)
        return order


def track(
    spec: WorkerSpec, attempt: Attempt, detector: Detector | None = None, **kwargs: Any
) -> Proposal:
    """Run the pipeline with the tracker of the spec."""
    kwargs.setdefault("report", Reports())
    return track_video(attempt, spec, loaded(spec), detector, **kwargs)


def read_rows(spec: WorkerSpec, proposal: Proposal) -> dict[str, Rows]:
    """Return the rows of every table, checking each part against what the proposal says."""
    rows: dict[str, Rows] = {name: [] for name in TABLES}
    for part in proposal.parts:
        path = Path(spec.out_uri) / part.key
        data = path.read_bytes()
        assert part.size_bytes == len(data)
        assert part.sha256 == hashlib.sha256(data).hexdigest()
        table = pq.read_table(path)
        assert table.schema.equals(TABLES[part.table], check_metadata=True)
        assert part.num_rows == table.num_rows > 0
        rows[part.table] += table.to_pylist()
    return rows


def write_frames(folder: Path, num_frames: int, width: int = 96, height: int = 64) -> Path:
    """Write a folder of PNG frames, ``00000.png`` and on."""
    from PIL import Image

    folder.mkdir(parents=True)
    for idx in range(num_frames):
        Image.fromarray(media.picture(idx, width, height)).save(folder / f"{idx:05d}.png")
    return folder


class ScriptedDetector:
    """A detector that finds what a script says for each frame of `tests.media`.

    A real network cannot be told on which frames it finds nothing, which is what these tests are
    about; the real one is tested in its own room and end to end.
    """

    def __init__(self, script: Mapping[int, Sequence[tuple[float, float, float, float]]]) -> None:
        self.script = script
        self.asked: list[int] = []

    def load(self) -> None:
        """Do nothing."""

    def unload(self) -> None:
        """Do nothing."""

    @property
    def classes(self) -> dict[int, str]:
        """One class."""
        return {5: "thing"}

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Return the boxes of this frame."""
        frame_idx = media.read_index(image)
        self.asked.append(frame_idx)
        return [Detection(box, 0.75, 5) for box in self.script.get(frame_idx, ())]


DETECTOR = DetectorSpec(name="scripted")
"""The spec that goes with a `ScriptedDetector`."""
