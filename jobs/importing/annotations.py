"""What an import has read, in one order whatever the order of its source.

Labelling tools and exporters write annotations in any order, and gigabytes of them. So readers put
every mask, as it comes, into a database on disk that sorts by video, frame and object and refuses
what comes twice; the writers take one video at a time out of it. Memory does not grow with either.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from workers.errors import ConfigError

MAX_OBJECT_ID = 2**31 - 1

_CACHED_VIDEOS = 4096
_CACHE_KIB = 64 * 1024
_SCHEMA = """
CREATE TABLE videos (video INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, height INT, width INT);
CREATE TABLE frames (video INT, frame_idx INT, void BLOB, PRIMARY KEY (video, frame_idx))
    WITHOUT ROWID;
CREATE TABLE masks (
    video INT, frame_idx INT, object_id INT, label TEXT, counts BLOB,
    PRIMARY KEY (video, frame_idx, object_id)) WITHOUT ROWID;
CREATE TABLE unnumbered (
    number INTEGER PRIMARY KEY, video INT, frame_idx INT, track TEXT, label TEXT,
    counts BLOB);
"""


@dataclass(frozen=True, slots=True)
class ReadMask:
    """One mask as an import read it.

    Attributes
    ----------
    frame_idx : int
        0-based frame of its video.
    object_id : int
        The object, unique within its video, from 1.
    label : str or None
        Name of its category.
    counts : bytes
        COCO compressed counts; never of an empty mask.
    """

    frame_idx: int
    object_id: int
    label: str | None
    counts: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReadVideo:
    """One video as an import read it.

    Attributes
    ----------
    name : str
        As the source names it.
    height, width : int
        Pixels of every picture.
    number : int
        Its place in `Annotations`.
    """

    name: str
    height: int
    width: int
    number: int = field(repr=False)


class Annotations:
    """Masks on disk, sorted by video, frame and object; a context manager that deletes nothing.

    Parameters
    ----------
    folder : Path
        An empty folder of the caller, which he deletes.

    Attributes
    ----------
    num_masks : int
        Masks that were added, the empty ones left out.
    num_unlinked : int
        Masks without any track, each an object of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.num_masks = 0
        self.num_unlinked = 0
        self._database = sqlite3.connect(folder / "annotations.sqlite")
        # The file is worth nothing after a crash, so it needs no journal.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._database.executescript(_SCHEMA)
        self._known: dict[str, ReadVideo] = {}

    def __enter__(self) -> Annotations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    @property
    def num_videos(self) -> int:
        """Number of videos that were added."""
        return self._count("videos")

    @property
    def num_frames(self) -> int:
        """Number of annotated frames, those without a mask included."""
        return self._count("frames")

    def add_frame(self, video: str, frame_idx: int, size: tuple[int, int], place: str) -> None:
        """Say that a frame is annotated, whether or not anything is on it; twice does no harm.

        Parameters
        ----------
        video : str
            Name of the video.
        frame_idx : int
            0-based.
        size : tuple of (int, int)
            Height and width in pixels.
        place : str
            Where that was read, for messages.

        Raises
        ------
        ConfigError
            Another frame of the video has another size, or the index or name is impossible.
        """
        number = self._video(video, size, place).number
        if not 0 <= frame_idx < 2**31:
            raise ConfigError(
                f"{place} is frame {frame_idx} of {video}, but frames are counted from 0: pass "
                f"--first-frame with the number of the first frame in this source"
            )
        self._database.execute(
            "INSERT OR IGNORE INTO frames VALUES (?, ?, NULL)", (number, frame_idx)
        )

    def add_void(self, video: str, frame_idx: int, counts: bytes) -> None:
        """Say which pixels of a frame that was added belong to nobody; what is said adds up.

        Parameters
        ----------
        video : str
            Name of the video.
        frame_idx : int
            0-based.
        counts : bytes
            COCO compressed counts.
        """
        from pycocotools import mask as coco

        known = self._known_video(video)
        (before,) = self._database.execute(
            "SELECT void FROM frames WHERE video = ? AND frame_idx = ?", (known.number, frame_idx)
        ).fetchone()
        if before is not None:
            size = [known.height, known.width]
            parts = [{"size": size, "counts": part} for part in (before, counts)]
            counts = coco.merge(parts)["counts"]
        self._database.execute(
            "UPDATE frames SET void = ? WHERE video = ? AND frame_idx = ?",
            (counts, known.number, frame_idx),
        )

    def add_mask(
        self,
        video: str,
        frame_idx: int,
        track: int | str | None,
        counts: bytes,
        place: str,
        *,
        label: str | None = None,
    ) -> None:
        """Add a mask of a frame that was added.

        Parameters
        ----------
        video : str
            Name of the video.
        frame_idx : int
            0-based.
        track : int, str or None
            What links the masks of one object. A whole number from 1 on is its object id; for
            anything else ids are given by `number_objects`. None belongs to no other mask.
        counts : bytes
            COCO compressed counts of a mask that is not empty.
        place : str
            Where that was read, for messages.
        label : str, optional
            Name of the category.

        Raises
        ------
        ConfigError
            The object has a mask on this frame already.
        """
        number = self._known_video(video).number
        self.num_masks += 1
        if not isinstance(track, int) or not 1 <= track <= MAX_OBJECT_ID:
            self.num_unlinked += track is None
            self._database.execute(
                "INSERT INTO unnumbered VALUES (NULL, ?, ?, ?, ?, ?)",
                (number, frame_idx, None if track is None else str(track), label, counts),
            )
            return
        try:
            self._database.execute(
                "INSERT INTO masks VALUES (?, ?, ?, ?, ?)",
                (number, frame_idx, track, label, counts),
            )
        except sqlite3.IntegrityError:
            raise ConfigError(
                f"{place}: object {track} has a second mask on frame {frame_idx} of {video}: keep "
                f"one of the two"
            ) from None

    def number_objects(self) -> None:
        """Give object ids to what came without: in order of frames, past the largest id.

        Raises
        ------
        ConfigError
            A track has two masks on one frame.
        """
        self._database.execute("CREATE INDEX by_frame ON unnumbered (video, frame_idx, number)")
        rows = self._database.execute(
            "SELECT video, frame_idx, track, label, counts FROM unnumbered "
            "ORDER BY video, frame_idx, number"
        )
        current: int | None = None
        last = 0
        given: dict[str, int] = {}
        for video, frame_idx, track, label, counts in rows:
            if video != current:
                current, last, given = video, self._last_object(video), {}
            object_id = given.get(track) if track is not None else None
            if object_id is None:
                last = object_id = last + 1
                if track is not None:
                    given[track] = object_id
            try:
                self._database.execute(
                    "INSERT INTO masks VALUES (?, ?, ?, ?, ?)",
                    (video, frame_idx, object_id, label, counts),
                )
            except sqlite3.IntegrityError:
                (name,) = self._database.execute(
                    "SELECT name FROM videos WHERE video = ?", (video,)
                ).fetchone()
                raise ConfigError(
                    f"the track {track} has a second mask on frame {frame_idx} of {name}: keep one "
                    f"of the two"
                ) from None

    def videos(self) -> Iterator[ReadVideo]:
        """Yield the videos, ordered by name."""
        rows = self._database.execute("SELECT name, height, width, video FROM videos ORDER BY name")
        for row in rows:
            yield ReadVideo(*row)

    def names_with(self, stem: str) -> list[str]:
        """Return the names of the videos that are called `stem`, or that with an extension."""
        # The character after the dot is the slash: no name with an extension is behind it.
        rows = self._database.execute(
            "SELECT name FROM videos WHERE name = ? OR (name > ? AND name < ?)",
            (stem, f"{stem}.", f"{stem}/"),
        )
        return [name for (name,) in rows if not set("./") & set(name[len(stem) + 1 :])]

    def frames(self, video: ReadVideo) -> Iterator[tuple[int, list[ReadMask], bytes | None]]:
        """Yield the annotated frames of one video in order of time.

        Yields
        ------
        tuple of (int, list of ReadMask, bytes or None)
            Index of the frame, its masks by ascending object id, and the counts of its void.
        """
        rows = self._database.execute(
            "SELECT f.frame_idx, f.void, m.object_id, m.label, m.counts FROM frames f "
            "LEFT JOIN masks m USING (video, frame_idx) WHERE f.video = ? "
            "ORDER BY f.frame_idx, m.object_id",
            (video.number,),
        )
        current: tuple[int, list[ReadMask], bytes | None] | None = None
        for frame_idx, void, object_id, label, counts in rows:
            if current is None or current[0] != frame_idx:
                if current is not None:
                    yield current
                current = (frame_idx, [], void)
            if object_id is not None:
                current[1].append(ReadMask(frame_idx, object_id, label, counts))
        if current is not None:
            yield current

    def first_masks(self, video: ReadVideo) -> Iterator[ReadMask]:
        """Yield the first mask of each object of one video, ordered by frame."""
        rows = self._database.execute(
            "SELECT frame_idx, object_id, label, counts FROM masks JOIN "
            "(SELECT object_id, min(frame_idx) AS frame_idx FROM masks WHERE video = ? "
            "GROUP BY object_id) USING (object_id, frame_idx) WHERE video = ? "
            "ORDER BY frame_idx, object_id",
            (video.number, video.number),
        )
        for row in rows:
            yield ReadMask(*row)

    def object_ids(self, video: ReadVideo) -> list[int]:
        """Return the ids of the objects of one video, ascending."""
        rows = self._database.execute(
            "SELECT DISTINCT object_id FROM masks WHERE video = ? ORDER BY object_id",
            (video.number,),
        )
        return [object_id for (object_id,) in rows]

    def _last_object(self, video: int) -> int:
        (last,) = self._database.execute(
            "SELECT coalesce(max(object_id), 0) FROM masks WHERE video = ?", (video,)
        ).fetchone()
        return int(last)

    def _count(self, table: str) -> int:
        (count,) = self._database.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)

    def _known_video(self, name: str) -> ReadVideo:
        known = self._known.get(name)
        if known is None:
            row = self._database.execute(
                "SELECT name, height, width, video FROM videos WHERE name = ?", (name,)
            ).fetchone()
            if row is None:
                raise KeyError(name)
            if len(self._known) >= _CACHED_VIDEOS:
                self._known.clear()
            known = self._known[name] = ReadVideo(*row)
        return known

    def _video(self, name: str, size: tuple[int, int], place: str) -> ReadVideo:
        try:
            video = self._known_video(name)
        except KeyError:
            if not name or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
                raise ConfigError(
                    f"{place} names its video {name!r}, which is no path below a corpus: pass "
                    f"--video NAME"
                ) from None
            self._database.execute("INSERT INTO videos VALUES (NULL, ?, ?, ?)", (name, *size))
            video = self._known_video(name)
        if (video.height, video.width) != size:
            raise ConfigError(
                f"{place} is {size[1]}x{size[0]} pixels, but other frames of {name} are "
                f"{video.width}x{video.height}: the frames of one video have one size, so mend or "
                f"leave out those that differ"
            )
        return video
