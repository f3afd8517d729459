"""Small pictures of what deserves a look, read again from the corpus and drawn over.

A picture that cannot be made, because its source is gone or out of reach, is replaced by the
sentence that says so: a report never fails for want of a picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.rendering.overlay import Overlay
from jobs.rendering.sheet import contact_sheet, shrink
from jobs.rendering.source import pictures_at, tracked_source
from workers.errors import MaskmillError

if TYPE_CHECKING:
    from jobs.dataset import Dataset, Frame, Video
    from jobs.quality import ReviewItem
    from workers.messages import StoreOptions

UInt8Array = NDArray[np.uint8]

MAX_PER_VIDEO = 4
"""Objects of one video that get a picture: the list must not be about one video only."""
SHEET_FRAMES = 6
SHEET_PICTURE_PX = 420
THUMBNAIL_PX = (320, 240)
CROP_SHARE = 1.7
"""Of the object's box that a thumbnail shows, for its surroundings."""
JPEG_QUALITY = 80


@dataclass(slots=True)
class Pictures:
    """Pictures for a page, as ``data:`` URIs.

    Attributes
    ----------
    thumbnails : dict of (video_key, object_id) to str
        One object on the frame that shows its fault.
    sheets : list of (str, str)
        Name of a video and its contact sheet.
    missing : list of str
        Why there is no picture of some videos, a sentence each.
    """

    thumbnails: dict[tuple[int, int], str] = field(default_factory=dict)
    sheets: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def take_pictures(
    dataset: Dataset,
    review: Sequence[ReviewItem],
    options: StoreOptions,
    num_videos: int,
    progress: Callable[[int], None] | None = None,
) -> Pictures:
    """Picture the objects that come first in a ranked list.

    Parameters
    ----------
    dataset : Dataset
        The run.
    review : sequence of ReviewItem
        Ranked.
    options : StoreOptions
        How to reach the corpus.
    num_videos : int
        Videos whose sources are read; the first half of them get a contact sheet, too.
    progress : callable, optional
        Told after each video how many are done.

    Returns
    -------
    Pictures
        What could be made.
    """
    chosen: dict[int, list[ReviewItem]] = {}
    for item in review:
        if item.video_key in chosen or len(chosen) < num_videos:
            chosen.setdefault(item.video_key, []).append(item)
    pictures = Pictures()
    for number, (video_key, items) in enumerate(chosen.items(), 1):
        try:
            video = dataset.video(video_key)
            _picture_video(
                dataset,
                video,
                items[:MAX_PER_VIDEO],
                options,
                pictures,
                2 * number <= num_videos + 1,
            )
        except MaskmillError as error:
            pictures.missing.append(str(error))
        if progress is not None:
            progress(number)
    return pictures


def _picture_video(
    dataset: Dataset,
    video: Video,
    items: Sequence[ReviewItem],
    options: StoreOptions,
    pictures: Pictures,
    with_sheet: bool,
) -> None:
    source = tracked_source(video, options)
    places: set[int] = set()
    if with_sheet:
        number = min(SHEET_FRAMES, video.num_frames)
        places = set(np.linspace(0, video.num_frames - 1, number).round().astype(int).tolist())
    looked_at = {item.look_at_frame for item in items}
    on_sheet: set[int] = set()
    wanted: list[Frame] = []
    for place, frame in enumerate(dataset.frames(video)):
        if place in places:
            on_sheet.add(frame.frame_idx)
        if place in places or frame.frame_idx in looked_at:
            wanted.append(frame)
    small: list[UInt8Array] = []
    captions: list[str] = []
    near = _Follower(dataset, video, None)
    far = _Follower(dataset, video, SHEET_PICTURE_PX)
    for frame, image in pictures_at(source, options, wanted):
        if frame.frame_idx in on_sheet:
            small.append(shrink(far.draw(frame, image), SHEET_PICTURE_PX))
            captions.append(f"frame {frame.frame_idx}   {frame.pts_us / 1e6:.2f} s")
        if frame.frame_idx in looked_at:
            drawn = near.draw(frame, image)
            for item in items:
                if item.look_at_frame == frame.frame_idx:
                    key = (video.video_key, item.object_id)
                    pictures.thumbnails[key] = data_uri(_close_up(drawn, frame, item.object_id))
    if small:
        sheet = contact_sheet(small, captions, title="")
        pictures.sheets.append((video.name, data_uri(sheet)))


class _Follower:
    """Draws a few frames of a video, and takes note of those between them."""

    def __init__(self, dataset: Dataset, video: Video, shown_px: int | None) -> None:
        self._rows = dataset.frames(video)
        self._overlay = Overlay(video.height, video.width, dataset.categories, shown_px=shown_px)

    def draw(self, frame: Frame, image: UInt8Array) -> UInt8Array:
        """Return a picture with its objects; frames must come in order of time."""
        for passed in self._rows:
            if passed.frame_idx == frame.frame_idx:
                break
            self._overlay.follow(passed)
        return self._overlay.draw(image, frame)


def _close_up(picture: UInt8Array, frame: Frame, object_id: int) -> UInt8Array:
    """Return the part of a picture around an object; the whole where it is not to be seen."""
    height, width = picture.shape[:2]
    box = next((mask.bbox_xywh for mask in frame.masks if mask.object_id == object_id), None)
    aspect = THUMBNAIL_PX[0] / THUMBNAIL_PX[1]
    if box is None:
        return shrink(picture, THUMBNAIL_PX[0])
    x, y, w, h = box
    crop_w = max(w * CROP_SHARE, h * CROP_SHARE * aspect, THUMBNAIL_PX[0])
    crop_w = min(crop_w, float(width), height * aspect)
    crop_h = crop_w / aspect
    left = round(min(max(x + w / 2 - crop_w / 2, 0), width - crop_w))
    top = round(min(max(y + h / 2 - crop_h / 2, 0), height - crop_h))
    part = picture[top : top + max(1, round(crop_h)), left : left + max(1, round(crop_w))]
    return shrink(part, THUMBNAIL_PX[0])


def data_uri(picture: UInt8Array) -> str:
    """Return a picture as a JPEG that a page can hold.

    Parameters
    ----------
    picture : ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.

    Returns
    -------
    str
        ``data:image/jpeg;base64,...``.
    """
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
