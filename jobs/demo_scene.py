"""The clip of `maskmill demo`: three photographed things adrift in a photographed sky.

Rendered on the spot from pictures that lie in the scikit-image wheel, so nothing is downloaded,
and every true mask is known. The things drift, turn and change size; the coffee cup passes behind
the cat, is hidden altogether for a while, and comes out again on the other side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH_PX, HEIGHT_PX = 640, 360
NUM_FRAMES = 72
FRAME_RATE = 24
CLIP_NAME = "adrift"
LABELS = {1: "cat", 2: "astronaut", 3: "coffee"}
"""Labels by object id."""

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]
Points = Sequence[tuple[float, float]]

ASTRONAUT_OUTLINE: Points = (
    *((153, 78), (160, 52), (178, 32), (205, 18), (235, 14), (262, 20), (285, 38), (298, 62)),
    *((300, 90), (293, 112), (278, 128), (270, 152), (258, 172), (285, 192), (302, 222)),
    *((305, 246), (330, 262), (346, 290), (356, 325), (362, 350), (400, 344), (440, 350)),
    *((470, 370), (488, 400), (496, 430), (500, 470), (510, 511), (24, 511), (26, 450)),
    *((18, 410), (24, 350), (32, 310), (48, 268), (80, 235), (112, 208), (114, 190)),
    *((130, 166), (160, 152), (186, 150), (183, 132), (168, 122), (156, 104)),
)
"""Outline of the astronaut in `skimage.data.astronaut`, pixels (x, y)."""
COFFEE_OUTLINE: Points = (
    *((77, 196), (84, 160), (102, 126), (130, 98), (172, 74), (180, 62), (200, 42), (232, 26)),
    *((272, 18), (312, 20), (350, 32), (382, 52), (400, 72), (412, 66), (425, 74), (418, 104)),
    *((440, 126), (462, 160), (476, 200), (480, 240), (472, 280), (452, 318), (420, 350)),
    *((380, 372), (336, 384), (290, 387), (244, 382), (196, 364), (150, 334), (112, 294)),
    *((88, 250),),
)
"""Outline of cup and saucer in `skimage.data.coffee`, pixels (x, y)."""
CAT_CENTRE, CAT_RADII = (212.0, 150.0), (172.0, 147.0)
"""The cat's face in `skimage.data.chelsea`, pixels: an ellipse."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Where a sprite is on one frame: centre in pixels, height in pixels, angle in degrees."""

    x: float
    y: float
    height_px: float
    angle: float


@dataclass(frozen=True, slots=True)
class Sprite:
    """A thing cut out of a photograph.

    Attributes
    ----------
    object_id : int
        Its id in the clip.
    image : ndarray of float32, shape (H, W, 3)
        RGB, 0–255.
    alpha : ndarray of float32, shape (H, W)
        1 on the thing, 0 around it, between on its edge.
    start, middle, end : Pose
        The poses at the first frame, half-way, and at the last; a parabola lies through them.
    """

    object_id: int
    image: Float32Array
    alpha: Float32Array
    start: Pose
    middle: Pose
    end: Pose

    def pose(self, t: float) -> Pose:
        """Return the pose at time `t`, 0 at the first frame and 1 at the last."""
        # Lagrange's polynomials of degree two for the nodes 0, 1/2 and 1.
        weights = (2 * (t - 0.5) * (t - 1), 4 * t * (1 - t), 2 * t * (t - 0.5))
        poses = (self.start, self.middle, self.end)
        return Pose(
            *(
                sum(w * getattr(pose, name) for w, pose in zip(weights, poses, strict=True))
                for name in ("x", "y", "height_px", "angle")
            )
        )


@dataclass(frozen=True, slots=True)
class SceneFrame:
    """One frame of the clip and its truth.

    Attributes
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.
    truth : ndarray of uint8, shape (H, W)
        The id of the visible object, 0 where there is none.
    """

    image: UInt8Array
    truth: UInt8Array


def render_scene(num_frames: int = NUM_FRAMES) -> Iterator[SceneFrame]:
    """Yield the frames of the clip in order.

    Parameters
    ----------
    num_frames : int
        Frames to render, at least 2; the same motion takes longer with more.

    Yields
    ------
    SceneFrame
        Frame and truth.
    """
    from skimage import data

    sky = data.hubble_deep_field()
    # Painted in this order: what comes later hides what came before.
    sprites = (
        _cut_out(
            3,
            data.coffee(),
            COFFEE_OUTLINE,
            Pose(578, 290, 116, -14),
            Pose(428, 186, 92, 8),
            Pose(292, 74, 112, 34),
        ),
        _cut_out(
            2,
            data.astronaut(),
            ASTRONAUT_OUTLINE,
            Pose(128, 236, 214, -5),
            Pose(146, 216, 226, 3),
            Pose(118, 226, 222, -4),
        ),
        _cut_out(
            1,
            data.chelsea(),
            _ellipse(CAT_CENTRE, CAT_RADII),
            Pose(430, 172, 172, 12),
            Pose(428, 186, 190, -2),
            Pose(456, 216, 200, -18),
        ),
    )
    for index in range(num_frames):
        t = index / (num_frames - 1)
        canvas = _pan(sky, t)
        truth = np.zeros((HEIGHT_PX, WIDTH_PX), np.uint8)
        for sprite in sprites:
            image, alpha = _place(sprite, sprite.pose(t))
            canvas += alpha[..., None] * (image - canvas)
            truth[alpha > 0.5] = sprite.object_id
        yield SceneFrame(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), truth)


def write_clip(folder: Path, num_frames: int = NUM_FRAMES) -> list[UInt8Array]:
    """Write the clip, its first-frame prompts and its truth below a folder.

    Parameters
    ----------
    folder : Path
        Receives ``videos/adrift.mp4``, ``prompts/prompts.jsonl`` with the masks of the first frame
        in ``prompts/first_frame.png``, and ``truth/<frame>.png``.
    num_frames : int
        Frames to render.

    Returns
    -------
    list of ndarray of uint8, shape (H, W)
        The truth per frame, object ids.
    """
    import av
    from PIL import Image

    videos, prompts, truths = (folder / n for n in ("videos", "prompts", "truth"))
    for path in (videos, prompts, truths):
        path.mkdir(parents=True, exist_ok=True)
    known: list[UInt8Array] = []
    with av.open(str(videos / f"{CLIP_NAME}.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        # One thread and a fixed quality: the same bytes from the same libraries every time, so
        # that running the demo again finds its video unchanged.
        stream.options = {"crf": "18", "preset": "medium", "threads": "1"}
        for frame in render_scene(num_frames):
            picture = av.VideoFrame.from_ndarray(frame.image, format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
            _indexed_png(Image, frame.truth).save(truths / f"{len(known):05d}.png")
            known.append(frame.truth)
        for packet in stream.encode():
            container.mux(packet)
    _indexed_png(Image, known[0]).save(prompts / "first_frame.png")
    rows = [
        {
            "video": f"{CLIP_NAME}.mp4",
            "frame_idx": 0,
            "object_id": object_id,
            "label": label,
            "mask": "first_frame.png",
            "mask_value": object_id,
        }
        for object_id, label in LABELS.items()
    ]
    (prompts / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return known


def _indexed_png(pillow: Any, ids: UInt8Array) -> Any:
    """Return an index image with a palette, as annotation tools write it."""
    from jobs.rendering.colours import object_colour

    picture = pillow.fromarray(ids)
    picture.putpalette([0, 0, 0, *(c for i in range(1, 256) for c in object_colour(i))])
    return picture


def _cut_out(
    object_id: int, photo: UInt8Array, outline: Points, start: Pose, middle: Pose, end: Pose
) -> Sprite:
    """Return the part of a photograph inside an outline as a sprite."""
    import cv2

    alpha = np.zeros(photo.shape[:2], np.uint8)
    points = np.round(_smooth(outline)).astype(np.int32)
    cv2.fillPoly(alpha, [points], 255, cv2.LINE_AA)
    x, y, width, height = cv2.boundingRect(points)
    y0, y1, x0, x1 = max(y, 0), y + height, max(x, 0), x + width
    return Sprite(
        object_id,
        photo[y0:y1, x0:x1].astype(np.float32),
        cv2.GaussianBlur(alpha, (0, 0), 0.8)[y0:y1, x0:x1].astype(np.float32) / 255,
        start,
        middle,
        end,
    )


def _smooth(outline: Points, rounds: int = 2) -> NDArray[np.float64]:
    """Return a closed outline with its corners cut (Chaikin, 1974)."""
    points = np.asarray(outline, np.float64)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        points = np.stack((0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after), 1)
        points = points.reshape(-1, 2)
    return points


def _ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> Points:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [
        (centre[0] + radii[0] * math.cos(a), centre[1] + radii[1] * math.sin(a)) for a in angles
    ]


def _pan(sky: UInt8Array, t: float) -> Float32Array:
    """Return the part of the sky that the camera sees, drifting and closing in a little."""
    import cv2

    scale = 0.86 + 0.06 * t
    x, y = 20 + 120 * t, 90 + 60 * t
    matrix = np.array([[scale, 0, -x * scale], [0, scale, -y * scale]])
    seen = cv2.warpAffine(
        sky, matrix, (WIDTH_PX, HEIGHT_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(seen, np.float32)


def _place(sprite: Sprite, pose: Pose) -> tuple[Float32Array, Float32Array]:
    """Return a sprite's colours and opacity on the canvas."""
    import cv2

    height, width = sprite.alpha.shape
    scale = pose.height_px / height
    # A first reduction by areas keeps the second, which turns and shifts, free of aliasing.
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = cv2.resize(sprite.image, size, interpolation=cv2.INTER_AREA)
    alpha = cv2.resize(sprite.alpha, size, interpolation=cv2.INTER_AREA)
    rest = pose.height_px / size[1]
    matrix = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), pose.angle, rest)
    matrix[:, 2] += (pose.x - size[0] / 2, pose.y - size[1] / 2)
    canvas = (WIDTH_PX, HEIGHT_PX)
    return (
        cv2.warpAffine(image, matrix, canvas, borderMode=cv2.BORDER_REPLICATE),
        cv2.warpAffine(alpha, matrix, canvas),
    )
