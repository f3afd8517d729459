"""`maskmill demo`: the whole pipeline on a clip whose true masks are known.

Nothing is simulated: the clip is encoded as H.264, prompted with the masks of its first frame,
tracked by a worker on Ray, committed and published like any corpus; then the dataset is read back,
pictured and measured against the truth.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from jobs.demo_scene import CLIP_NAME, LABELS, NUM_FRAMES, write_clip
from jobs.progress import format_duration
from workers.errors import ConfigError

if TYPE_CHECKING:
    from jobs.config import RunConfig
    from jobs.dataset import Frame
    from jobs.evaluation.davis import ObjectScore

UInt8Array = NDArray[np.uint8]

MARKER = "scene.json"
"""Tells our folder from anybody else's, and a complete clip from a broken-off one."""
SCENE_VERSION = 1
MOMENTS = (0.0, 0.18, 0.27, 0.5, 0.79, 1.0)
"""What the picture shows, as parts of the clip: before, during and after the occlusion."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured.

    Attributes
    ----------
    scores : Mapping of int to ObjectScore
        By object id, first and last frame left out.
    j_and_f : float
        Mean over the objects.
    overlay : Path
        The picture.
    """

    scores: Mapping[int, ObjectScore]
    j_and_f: float
    overlay: Path


def run_demo(folder: Path, *, num_frames: int = NUM_FRAMES, stream: TextIO | None = None) -> int:
    """Render, track, picture and score the demo clip.

    Parameters
    ----------
    folder : Path
        Receives the clip, its prompts and truth, ``dataset/`` and ``overlay.png``. What an
        earlier demo left there is used again.
    num_frames : int
        Length of the clip.
    stream : TextIO, optional
        Where results are printed; standard output by default.

    Returns
    -------
    int
        Exit code of the run.

    Raises
    ------
    ConfigError
        The folder holds something else.
    """
    from jobs.driver import run
    from jobs.progress import make_reporter
    from jobs.report import summary_lines

    def say(text: str) -> None:
        print(text, file=stream or sys.stdout, flush=True)

    start_s = time.monotonic()
    folder = folder.expanduser().absolute()
    say(f"A clip of {num_frames} frames in {folder}")
    prepare_clip(folder, num_frames)
    reporter = make_reporter()
    try:
        summary = run(demo_config(folder), reporter=reporter)
    finally:
        reporter.close()
    for line in summary_lines(summary, f"maskmill demo --out {folder}"):
        say(line)
    if summary.exit_code != 0:
        return summary.exit_code
    result = picture_and_score(folder, num_frames)
    say("")
    say("Against the known masks (J overlap, F outline; first and last frame left out)")
    for object_id, score in result.scores.items():
        say(
            f"  {object_id} {LABELS[object_id]:<10} J {score.region.mean:.3f}   "
            f"F {score.boundary.mean:.3f}"
        )
    say(f"  J&F {result.j_and_f:.3f}")
    say("")
    say(f"  picture  {result.overlay}")
    say(f"  dataset  {folder / 'dataset'}")
    say(f"  in all   {format_duration(time.monotonic() - start_s)}")
    return 0


def prepare_clip(folder: Path, num_frames: int = NUM_FRAMES) -> None:
    """Render the clip into a folder, unless it is there already.

    Parameters
    ----------
    folder : Path
        New, empty, or that of an earlier demo.
    num_frames : int
        Length of the clip.

    Raises
    ------
    ConfigError
        The folder holds something else, or a clip of another length.
    """
    scene = {"version": SCENE_VERSION, "num_frames": num_frames}
    marker = folder / MARKER
    if marker.exists():
        if json.loads(marker.read_text()) == scene:
            return
        raise ConfigError(
            f"{folder} holds the clip of another version of the demo: delete it or choose another "
            f"--out"
        )
    # Only the folders that we write may be there: those of a demo that was broken off.
    foreign = {p.name for p in folder.iterdir()} if folder.exists() else set()
    foreign -= {"videos", "prompts", "truth"}
    if foreign:
        raise ConfigError(
            f"{folder} is not empty and was not made by the demo ({sorted(foreign)[0]} is in it): "
            f"choose another --out"
        )
    write_clip(folder, num_frames)
    marker.write_text(json.dumps(scene))


def demo_config(folder: Path) -> RunConfig:
    """Return the configuration of the demo's run.

    Parameters
    ----------
    folder : Path
        Absolute.

    Returns
    -------
    RunConfig
        One worker, the tracker `flow`, first-frame masks as prompts.
    """
    from jobs.config import CorpusConfig, OutConfig, PoolConfig, PromptConfig, RunConfig

    return RunConfig(
        corpus=CorpusConfig(paths=(str(folder / "videos"),)),
        out=OutConfig(uri=str(folder / "dataset")),
        prompts=PromptConfig(file=str(folder / "prompts" / "prompts.jsonl")),
        pool=PoolConfig(workers=1),
    )


def picture_and_score(folder: Path, num_frames: int = NUM_FRAMES) -> DemoResult:
    """Read the demo's dataset back, draw it and measure it.

    Parameters
    ----------
    folder : Path
        Of the demo.
    num_frames : int
        Length of the clip.

    Returns
    -------
    DemoResult
        Scores, and where the picture is.
    """
    from jobs.dataset import open_dataset
    from jobs.evaluation.davis import evaluate_object, mean_j_and_f

    dataset = open_dataset(str(folder / "dataset"))
    frames = list(dataset.frames(dataset.video(CLIP_NAME)))
    truths = read_truth(folder, num_frames)
    scores = {
        object_id: evaluate_object(
            [
                next((m.decode() for m in frame.masks if m.object_id == object_id), None)
                for frame in frames
            ],
            [truth == object_id for truth in truths],
        )
        for object_id in LABELS
    }
    j_and_f = mean_j_and_f(scores)
    overlay = folder / "overlay.png"
    _draw(folder, frames, dataset.categories, j_and_f, overlay)
    return DemoResult(scores, j_and_f, overlay)


def read_truth(folder: Path, num_frames: int) -> list[UInt8Array]:
    """Return the true object ids per frame, each of shape (H, W)."""
    from PIL import Image

    return [
        np.asarray(Image.open(folder / "truth" / f"{index:05d}.png")) for index in range(num_frames)
    ]


def _draw(
    folder: Path,
    frames: Sequence[Frame],
    categories: Mapping[int, str],
    j_and_f: float,
    path: Path,
) -> None:
    """Write the contact sheet."""
    from jobs.rendering.overlay import Overlay
    from jobs.rendering.sheet import contact_sheet, write_png

    chosen = {frames[round(moment * (len(frames) - 1))].frame_idx for moment in MOMENTS}
    images = _read_frames(folder / "videos" / f"{CLIP_NAME}.mp4", chosen)
    height, width = next(iter(images.values())).shape[:2]
    overlay = Overlay(height, width, categories)
    pictures: list[UInt8Array] = []
    captions: list[str] = []
    for frame in frames:
        if frame.frame_idx not in chosen:
            overlay.follow(frame)
            continue
        pictures.append(overlay.draw(images[frame.frame_idx], frame))
        hidden = " and ".join(LABELS[object_id] for object_id in frame.occluded_ids)
        note = f"   {hidden} out of sight" if hidden else ""
        captions.append(f"frame {frame.frame_idx}   {frame.pts_us / 1e6:.2f} s{note}")
    sheet = contact_sheet(
        pictures,
        captions,
        title="maskmill demo",
        subtitle=f"tracker flow, prompted on the first frame only   ·   J&F {j_and_f:.2f} against "
        f"the known masks",
    )
    write_png(path, sheet)


def _read_frames(video: Path, indices: Collection[int]) -> dict[int, UInt8Array]:
    """Return some frames of a video as RGB."""
    import av

    frames: dict[int, UInt8Array] = {}
    with av.open(str(video)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in indices:
                picture: Any = frame.to_ndarray(format="rgb24")
                frames[index] = picture
    return frames
