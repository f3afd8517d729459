"""`maskmill render`: one tracked video as an overlay film and a contact sheet.

Three threads: decode, draw (the caller's), encode; bounded queues join them. Nothing is held but
what lies in the queues and the few small pictures of the sheet, whatever the video's length.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jobs.rendering.film import FilmWriter, write_film
from jobs.rendering.overlay import Overlay
from jobs.rendering.sheet import caption_bar, contact_sheet, shrink, write_png
from jobs.rendering.source import check_same_frame, open_source, tracked_source
from workers.conveyor import PictureQueue, StageThread
from workers.errors import ConfigError

if TYPE_CHECKING:
    from jobs.dataset import Dataset, Frame, Video
    from workers.decode.reader import DecodedFrame
    from workers.messages import StoreOptions, VideoSource

UInt8Array = NDArray[np.uint8]

SHEET_PICTURES = 12
SHEET_COLUMNS = 3
SHEET_PAIRS = 6
"""Pictures of a contact sheet of two runs, which are twice as wide and stand alone in their row."""
SHEET_PX = 1920
"""Width of all pictures in a row of the contact sheet: what screens show without shrinking it."""
MAX_NAMED = 6
"""Hidden objects named in the caption; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run whose masks of a video are drawn.

    Attributes
    ----------
    dataset : Dataset
        The run.
    video : Video
        The video in it.
    title : str
        Written into the captions; may be empty.
    """

    dataset: Dataset
    video: Video
    title: str = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What came out.

    Attributes
    ----------
    film, sheet : Path
        The files.
    num_frames : int
        Frames of the film.
    """

    film: Path
    sheet: Path
    num_frames: int


class _View:
    """The masks of one run, in step with the pictures."""

    def __init__(self, run: Run) -> None:
        video = run.video
        self._title = run.title
        self._overlay = Overlay(video.height, video.width, run.dataset.categories)
        self._bar_px = max(20, video.height // 18) // 2 * 2
        self._frames = run.dataset.frames(video)
        self.ahead = next(self._frames, None)
        """The next frame that this run tracked; None after its last."""

    def picture(self, decoded: DecodedFrame) -> UInt8Array:
        """Return the picture with its masks and a caption below it; indices must ascend."""
        while self.ahead is not None and self.ahead.frame_idx < decoded.frame_idx:
            self._overlay.follow(self.ahead)
            self.ahead = next(self._frames, None)
        drawn, frame = decoded.image, None
        if self.ahead is not None and self.ahead.frame_idx == decoded.frame_idx:
            frame = self.ahead
            drawn = self._overlay.draw(decoded.image, frame)
            self.ahead = next(self._frames, None)
        bar = caption_bar(drawn.shape[1], self._bar_px, self._caption(decoded, frame))
        return np.concatenate([drawn, bar])

    def _caption(self, decoded: DecodedFrame, frame: Frame | None) -> str:
        title = [self._title] if self._title else []
        words = [*title, f"frame {decoded.frame_idx}", f"{decoded.pts_us / 1e6:.3f} s"]
        if frame is None:
            return "   ".join([*words, "not tracked"])
        words.append(count(len(frame.masks), "object"))
        hidden = hidden_words(frame, self._overlay)
        return "   ".join([*words, hidden] if hidden else words)


def render_video(
    run: Run,
    options: StoreOptions,
    film: Path,
    sheet: Path,
    *,
    beside: Run | None = None,
    moved_to: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rendered:
    """Write the overlay film and the contact sheet of one video.

    Parameters
    ----------
    run : Run
        What to draw. Frames it did not track are left out.
    options : StoreOptions
        How to reach the corpus.
    film, sheet : Path
        Where to; what is there is replaced, once the new file is complete.
    beside : Run, optional
        The same video in another run, drawn to the right.
    moved_to : str, optional
        Where the source is now, if not in the corpus.
    progress : callable, optional
        Told after every frame how many are drawn.

    Returns
    -------
    Rendered
        What came out.

    Raises
    ------
    ConfigError
        The source is gone or another one, the two runs do not fit, or there is nothing to draw.
    """
    if not run.video.num_frames:
        raise ConfigError(f"{run.video.name} was committed without any frame: nothing to draw")
    if beside is not None:
        _check_fits(run.video, beside.video)
    source = tracked_source(run.video, options, moved_to=moved_to)
    pieces = _Pieces(run.video.num_frames, in_pairs=beside is not None)
    with replaced(film) as film_part, replaced(sheet) as sheet_part:
        pictures = _draw(run, beside, source, options)
        num_frames = _encode(run.video, pictures, film_part, pieces, progress)
        write_png(sheet_part, pieces.sheet(run, beside))
    return Rendered(film, sheet, num_frames)


def find_video(dataset: Dataset, name: str) -> Video:
    """Return a video of a dataset by name, and say more where it is not there.

    Raises
    ------
    ConfigError
        It is in quarantine, not committed yet, unknown, or the name fits several.
    """
    try:
        return dataset.video(name)
    except ConfigError as error:
        state = dataset.state
        for entry in state.quarantined.values() if state is not None else ():
            if name in (entry.name, entry.uri):
                raise ConfigError(
                    f"{name} was not tracked, it is in quarantine: {entry.message}"
                ) from error
        if state is not None and not state.closed:
            raise ConfigError(f"{error}, or not yet: its run has not ended") from error
        raise


def same_video(dataset: Dataset, video: Video) -> Video:
    """Return a video of another run in this dataset: by key, else by name.

    Raises
    ------
    ConfigError
        It is not there.
    """
    try:
        return dataset.video(video.video_key)
    except ConfigError:
        return find_video(dataset, video.name)


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    Examples
    --------
    >>> count(1, "object"), count(1200, "object")
    ('1 object', '1,200 objects')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def hidden_words(frame: Frame, overlay: Overlay) -> str:
    """Return which objects are hidden on a frame; empty text for none."""
    present = {mask.object_id for mask in frame.masks}
    names = [overlay.name(each) for each in frame.occluded_ids if each not in present]
    if not names:
        return ""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"hidden: {', '.join(names[:MAX_NAMED])}{more}"


def _check_fits(video: Video, other: Video) -> None:
    """Refuse to compare what was not made on the same pictures."""
    sizes = [(each.width, each.height) for each in (video, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{video.name} has {sizes[0][0]}x{sizes[0][1]} pixels in one run and "
            f"{sizes[1][0]}x{sizes[1][1]} in the other: these are two different videos"
        )
    if video.uri == other.uri and video.row["etag"] != other.row["etag"]:
        raise ConfigError(
            f"{video.name} changed between the two runs, so that they cannot be compared: track "
            f"it again in the older one"
        )


class _Pieces:
    """The small pictures of the contact sheet, taken as the film goes by."""

    def __init__(self, num_frames: int, *, in_pairs: bool) -> None:
        number = min(SHEET_PAIRS if in_pairs else SHEET_PICTURES, num_frames)
        self._num_columns = 1 if in_pairs else SHEET_COLUMNS
        self._wanted = set(np.linspace(0, num_frames - 1, number).round().astype(int).tolist())
        self._pictures: list[UInt8Array] = []

    def offer(self, index: int, picture: UInt8Array) -> None:
        if index in self._wanted:
            self._pictures.append(shrink(picture, SHEET_PX // self._num_columns).copy())

    def sheet(self, run: Run, beside: Run | None) -> UInt8Array:
        row = run.video.row
        other = f" beside {beside.video.row['tracker']}" if beside is not None else ""
        facts = (
            f"{row['tracker']}{other}",
            f"{run.video.width}x{run.video.height}",
            count(run.video.num_frames, "frame"),
            count(run.video.num_objects, "object"),
            count(run.video.num_masks, "mask"),
        )
        # The caption is in the pictures already.
        return contact_sheet(
            self._pictures,
            [""] * len(self._pictures),
            title=run.video.name,
            subtitle="   ·   ".join(facts),
            num_columns=self._num_columns,
        )


def _draw(
    run: Run, beside: Run | None, source: VideoSource, options: StoreOptions
) -> Iterator[tuple[int, UInt8Array]]:
    """Yield time and picture of every tracked frame; the next ones are decoded meanwhile."""
    views = [_View(each) for each in (run, beside) if each is not None]
    leading = views[0]
    assert leading.ahead is not None, "a video without frames is refused before"
    stride = run.video.row["stride"]
    part = replace(source, start_us=leading.ahead.pts_us, stride=stride)
    queue: PictureQueue[DecodedFrame] = PictureQueue(False, threading.Event())

    def decode() -> None:
        with open_source(part, options) as reader:
            for decoded in reader:
                queue.put(decoded, decoded.image.nbytes)
        queue.end()

    thread = StageThread("decode", decode, queue.fail)
    thread.start()
    try:
        while (frame := leading.ahead) is not None:
            decoded = queue.get()
            check_same_frame(source, frame.frame_idx, decoded.frame_idx if decoded else None)
            assert decoded is not None, "no frame is refused above"
            pictures = [view.picture(decoded) for view in views]
            yield frame.pts_us, np.concatenate(pictures, axis=1) if beside else pictures[0]
    finally:
        queue.stop()
        thread.join()


def _encode(
    video: Video,
    pictures: Iterator[tuple[int, UInt8Array]],
    path: Path,
    pieces: _Pieces,
    progress: Callable[[int], None] | None,
) -> int:
    """Write the film in a thread of its own while the pictures are drawn here."""
    queue: PictureQueue[tuple[int, UInt8Array]] = PictureQueue(False, threading.Event())
    fps = video.row["fps"]
    nominal_us = round(1e6 * video.row["stride"] / (fps or 24.0))

    def encode() -> None:
        first = queue.peek()
        assert first is not None, "a video without frames is refused before"
        height, width = first[1].shape[:2]
        with write_film(path, height, width, fps) as film:
            _write_all(film, queue, nominal_us)

    thread = StageThread("encode", encode, lambda _: queue.stop())
    thread.start()
    num_frames = 0
    try:
        for pts_us, picture in pictures:
            pieces.offer(num_frames, picture)
            queue.put((pts_us, picture), picture.nbytes)
            num_frames += 1
            if progress is not None:
                progress(num_frames)
        queue.end()
        while not thread.join():
            pass
    except BaseException:
        queue.stop()
        thread.join()
        if thread.failure is None:
            raise
    finally:
        pictures.close()  # type: ignore[attr-defined]
    if thread.failure is not None:
        raise thread.failure
    return num_frames


def _write_all(
    film: FilmWriter, queue: PictureQueue[tuple[int, UInt8Array]], nominal_us: int
) -> None:
    """Write what comes, each picture until the next one; the film begins with the first."""
    start_us: int | None = None
    held: tuple[int, UInt8Array] | None = None
    for pts_us, picture in queue:
        if held is not None and start_us is not None:
            film.write(held[1], held[0] - start_us, pts_us - held[0])
        start_us = pts_us if start_us is None else start_us
        held = pts_us, picture
    if held is not None and start_us is not None:
        film.write(held[1], held[0] - start_us, nominal_us)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` that takes its name if the context ends well.

    Parameters
    ----------
    path : Path
        What is there is replaced then, and stays otherwise.

    Yields
    ------
    Path
        Nothing is there yet; what is there after a failure is removed.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
