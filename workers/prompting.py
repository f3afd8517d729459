"""Which prompts act on which frame of one video, whether they were given or are detected.

The rooms of `workers.prompts` read tables, folders and pictures and know the policy; here their
answers become calls on a session, for the frame about to be tracked.
"""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from workers import rle
from workers.decode.reader import DecodedFrame, VideoHeader
from workers.errors import InputError
from workers.messages import Attempt, Prompt, PromptMode, StoreOptions, WorkerSpec
from workers.prompts.detector import Detection, Detector
from workers.prompts.modes import FIRST_OBJECT_ID, LostObjects, PromptPolicy, assign_ids
from workers.storage import open_store, split_uri
from workers.trackers.base import TrackingFrame

Latest = Callable[[], TrackingFrame | None]


@dataclass(frozen=True, slots=True)
class ResolvedPrompt:
    """One prompt for the frame about to be tracked.

    Attributes
    ----------
    object_id : int
        The object it belongs to.
    kind : str
        ``box``, ``points`` or ``mask``.
    arguments : dict of str to value
        Keyword arguments of `TrackingSession.prompt`.
    payload : value
        The same, as it is stored; see SCHEMA.md.
    source : str
        ``file``, ``folder`` or ``detector:NAME``.
    category_id : int or None
        Category of the object, where known.
    score : float or None
        Confidence of the detector.
    """

    object_id: int
    kind: str
    arguments: dict[str, Any]
    payload: Any
    source: str
    category_id: int | None
    score: float | None


class Moment(NamedTuple):
    """The frame about to be tracked, and how long it is shown.

    Attributes
    ----------
    frame : DecodedFrame
        The frame.
    until_us : int or None
        Time of the next tracked frame, in microseconds; None for the last one.
    step_idx : int
        0-based count of tracked frames.
    """

    frame: DecodedFrame
    until_us: int | None
    step_idx: int


class PromptSource(Protocol):
    """Where one video's prompts come from."""

    def take(self, moment: Moment, latest: Latest) -> list[ResolvedPrompt]:
        """Return the prompts that act on a frame, ordered by object id.

        Parameters
        ----------
        moment : Moment
            The frame; frames come in order.
        latest : callable
            Returns the session's latest estimate, None before the first step.

        Raises
        ------
        InputError
            A prompt cannot be used.
        """

    def forgotten(self, step_idx: int) -> list[int]:
        """Return the objects that are not to be tracked any more, after `take` for the same frame.

        Parameters
        ----------
        step_idx : int
            0-based count of tracked frames.
        """

    def finish(self, num_frames: int | None) -> None:
        """Check, at the end of the video, that no prompt was left over.

        Parameters
        ----------
        num_frames : int or None
            Frames of the whole video; None when its time range ended before its end was seen.

        Raises
        ------
        InputError
            A prompt lies beyond the end, or no prompt was used at all although some were given.
        """


class GivenPrompts:
    """Prompts from a table or a folder.

    Parameters
    ----------
    prompts : sequence of Prompt
        All prompts of the video.
    policy : PromptPolicy
        Which of them are used.
    header : VideoHeader
        The video.
    attempt : Attempt
        Its name and range, for messages and for prompts on a time.
    corpus_store : StoreOptions
        How to reach mask images.

    Raises
    ------
    InputError
        Of `take`, where two prompts are for the same object on the same frame.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        policy: PromptPolicy,
        header: VideoHeader,
        attempt: Attempt,
        corpus_store: StoreOptions,
    ) -> None:
        self._policy = policy
        self._header = header
        self._source = attempt.source
        self._corpus_store = corpus_store
        self._by_frame: dict[int, list[Prompt]] = defaultdict(list)
        self._timed: list[Prompt] = []
        self._num_used = 0
        self._num_prompts = len(prompts)
        for prompt in prompts:
            if prompt.frame_idx is not None:
                self._by_frame[prompt.frame_idx].append(prompt)
            else:
                self._timed.append(prompt)
        self._frames = sorted(self._by_frame, reverse=True)
        self._timed.sort(key=_time_of, reverse=True)

    def take(self, moment: Moment, latest: Latest) -> list[ResolvedPrompt]:
        """Return the prompts that act on a frame; see `PromptSource`."""
        frame = moment.frame
        while self._frames and self._frames[-1] < frame.frame_idx:
            self._pass_over(self._frames.pop())
        rows: list[Prompt] = []
        if self._frames and self._frames[-1] == frame.frame_idx:
            rows += self._by_frame.pop(self._frames.pop())
        if self._timed:
            until_us = self._last_until_us(moment) if moment.until_us is None else moment.until_us
            while self._timed and _time_of(self._timed[-1]) < until_us:
                row = self._timed.pop()
                if _time_of(row) < frame.pts_us:
                    raise self._left_out(row)
                rows.append(row)
        if not rows or not self._policy.takes_row(moment.step_idx):
            return []
        rows.sort(key=_object_of)
        for before, after in itertools.pairwise(rows):
            if before.object_id == after.object_id:
                raise InputError(
                    f"{self._source.name}: object {after.object_id} is prompted twice on frame "
                    f"{frame.frame_idx}: give each object an id of its own, or one prompt a frame"
                )
        self._num_used += len(rows)
        return [self._resolve(row, frame) for row in rows]

    def forgotten(self, step_idx: int) -> list[int]:
        """Return none: who names objects wants them."""
        return []

    def finish(self, num_frames: int | None) -> None:
        """Check that no prompt was left over; see `PromptSource`."""
        while self._frames and (num_frames is None or self._frames[-1] < num_frames):
            self._pass_over(self._frames.pop())
        if self._frames and num_frames is not None:
            prompt = self._by_frame[self._frames[0]][0]
            raise InputError(
                f"{self._source.name}: the prompt for object {prompt.object_id} is on frame "
                f"{prompt.frame_idx}, but the video ends with frame {num_frames - 1} (frames are "
                f"counted from 0): correct frame_idx"
            )
        if self._timed:
            prompt = self._timed[0]
            raise InputError(
                f"{self._source.name}: the prompt for object {prompt.object_id} is at "
                f"{_time_of(prompt) / 1e6:.3f} s, after the last tracked frame: correct time_s"
            )
        if not self._num_used:
            raise InputError(
                f"{self._source.name} has {self._num_prompts} prompts, but none on a frame that "
                f"{self._policy.mode.value} takes: move one to the first tracked frame, or use "
                f"--prompt-mode {PromptMode.FIRST_FRAME.value}"
            )

    def _last_until_us(self, moment: Moment) -> int:
        """Return until when the last tracked frame is shown."""
        step_us = 1e6 / self._header.fps * self._source.stride if self._header.fps else 1.0
        until_us = max(moment.frame.pts_us + int(step_us), self._header.duration_us or 0)
        return until_us if self._source.end_us is None else min(until_us, self._source.end_us)

    def _pass_over(self, frame_idx: int) -> None:
        """Refuse the prompts of a frame that was left out, unless no mode would take them."""
        prompt = self._by_frame[frame_idx][0]
        # A folder of annotations is dense by nature: the interval modes pick their frames from
        # it. A row of a table was written for its frame.
        is_picked = self._policy.mode is not PromptMode.FIRST_FRAME and prompt.source == "folder"
        if frame_idx < 0 or not is_picked:
            raise self._left_out(prompt)

    def _left_out(self, prompt: Prompt) -> InputError:
        if prompt.frame_idx is None:
            where = f"at {_time_of(prompt) / 1e6:.3f} s, before the first tracked frame"
        elif prompt.frame_idx < 0:
            where = f"on frame {prompt.frame_idx}; frames are counted from 0"
        else:
            where = f"on frame {prompt.frame_idx}, which its time range or stride leaves out"
        return InputError(
            f"{self._source.name}: the prompt for object {prompt.object_id} is {where}: move the "
            f"prompt to a tracked frame"
        )

    def _resolve(self, prompt: Prompt, frame: DecodedFrame) -> ResolvedPrompt:
        arguments: dict[str, Any]
        payload: Any
        if prompt.box_xyxy is not None:
            box = [float(value) for value in prompt.box_xyxy]
            kind, arguments, payload = "box", {"box_xyxy": box}, {"box_xyxy": box}
        elif prompt.points_xy is not None:
            points = [[float(x), float(y)] for x, y in prompt.points_xy]
            labels = [1] * len(points) if prompt.point_labels is None else [*prompt.point_labels]
            arguments = {"points_xy": points, "point_labels": labels}
            kind, payload = "points", dict(arguments)
        else:
            mask = self._mask_of(prompt, frame)
            kind, arguments, payload = "mask", {"mask": mask}, _mask_payload(mask)
        return ResolvedPrompt(
            _object_of(prompt),
            kind,
            arguments,
            payload,
            prompt.source,
            prompt.category_id,
            prompt.score,
        )

    def _mask_of(self, prompt: Prompt, frame: DecodedFrame) -> NDArray[np.uint8]:
        height, width = frame.image.shape[:2]
        name = (
            f"{self._source.name}: the mask of object {prompt.object_id} on frame {frame.frame_idx}"
        )
        if prompt.mask_rle is not None:
            try:
                mask_height, mask_width = (int(side) for side in prompt.mask_rle["size"])
                counts = prompt.mask_rle["counts"]
                # The size first: a wrong one could ask for any amount of memory.
                if (mask_height, mask_width) != (height, width):
                    raise _wrong_size(name, (mask_height, mask_width), frame)
                mask = rle.decode(counts, mask_height, mask_width)
            except (rle.InvalidRleError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{name} is no COCO RLE: {error}") from error
        elif prompt.mask_uri is not None:
            mask = _read_mask_image(name, prompt.mask_uri, prompt.mask_value, self._corpus_store)
        else:
            raise InputError(f"{name} is missing: give it a box, points or a mask")
        if mask.shape != (height, width):
            raise _wrong_size(name, mask.shape, frame)
        return mask


class DetectedPrompts:
    """Prompts from a detector.

    Parameters
    ----------
    detector : Detector
        Loaded.
    name : str
        Its name, stored with every prompt.
    policy : PromptPolicy
        On which frames it is asked.
    forget_after : int or None
        Objects that were out of sight for so many tracked frames are forgotten; None for never.
    """

    def __init__(
        self,
        detector: Detector,
        name: str,
        policy: PromptPolicy,
        forget_after: int | None = None,
    ) -> None:
        self._detector = detector
        self._name = name
        self._policy = policy
        self._categories: dict[int, int | None] = {}
        self._next_id = FIRST_OBJECT_ID
        self._lost = LostObjects()
        self._forget_after = forget_after
        self._in_sight_at: dict[int, int] = {}

    def take(self, moment: Moment, latest: Latest) -> list[ResolvedPrompt]:
        """Return the prompts that act on a frame; see `PromptSource`."""
        seen = latest()
        present = {m.object_id: m.mask for m in seen.masks} if seen is not None else {}
        self._lost.update(moment.step_idx, present)
        prompts = self._detect(moment, present)
        self._in_sight_at |= dict.fromkeys(present, moment.step_idx - 1)
        self._in_sight_at |= {prompt.object_id: moment.step_idx for prompt in prompts}
        return prompts

    def forgotten(self, step_idx: int) -> list[int]:
        """Return the objects that are out of sight for too long; see `PromptSource`."""
        if self._forget_after is None:
            return []
        first = step_idx - self._forget_after
        gone = [i for i, at in self._in_sight_at.items() if at < first]
        for object_id in gone:
            del self._in_sight_at[object_id], self._categories[object_id]
        self._lost.forget(gone)
        return gone

    def _detect(
        self, moment: Moment, present: Mapping[int, NDArray[np.uint8]]
    ) -> list[ResolvedPrompt]:
        if not self._policy.is_due(moment.step_idx):
            return []
        detections = self._detector.detect(moment.frame.image)
        if not detections:
            return []
        self._policy.on_prompted(moment.step_idx)
        assigned = assign_ids(detections, present, self._categories, self._next_id)
        # What is in sight comes first; only what is left may be something seen before.
        others = [assignment.detection for assignment in assigned if assignment.is_new]
        assigned = [assignment for assignment in assigned if not assignment.is_new]
        assigned += assign_ids(others, self._lost.last_seen, self._categories, self._next_id)
        prompts = []
        for object_id, detection, is_new in assigned:
            if is_new:
                self._next_id = object_id + 1
                self._categories[object_id] = detection.category_id
            prompts.append(self._resolve(object_id, detection))
        return sorted(prompts, key=lambda prompt: prompt.object_id)

    def finish(self, num_frames: int | None) -> None:
        """Do nothing: a video without any detection is a result."""

    def _resolve(self, object_id: int, detection: Detection) -> ResolvedPrompt:
        arguments: dict[str, Any]
        payload: Any
        if detection.mask is not None:
            kind, arguments = "mask", {"mask": detection.mask}
            payload = _mask_payload(detection.mask)
        else:
            box = [float(value) for value in detection.box_xyxy]
            kind, arguments, payload = "box", {"box_xyxy": box}, {"box_xyxy": box}
        return ResolvedPrompt(
            object_id,
            kind,
            arguments,
            payload,
            f"detector:{self._name}",
            int(detection.category_id),
            float(detection.score),
        )


class NoPrompts:
    """A video that nobody prompts, where that is allowed."""

    def take(self, moment: Moment, latest: Latest) -> list[ResolvedPrompt]:
        """Return nothing."""
        return []

    def forgotten(self, step_idx: int) -> list[int]:
        """Return none."""
        return []

    def finish(self, num_frames: int | None) -> None:
        """Do nothing."""


def prompt_source(
    spec: WorkerSpec,
    attempt: Attempt,
    detector: Detector | None,
    header: VideoHeader,
    frame_names: Sequence[str] | None,
) -> PromptSource:
    """Return where the prompts of an attempt come from.

    Parameters
    ----------
    spec : WorkerSpec
        Mode, interval and detector of the run.
    attempt : Attempt
        The video and the prompts that were given for it.
    detector : Detector or None
        Loaded, where the run has one.
    header : VideoHeader
        The video.
    frame_names : sequence of str or None
        File names of a folder of frames, in frame order.

    Raises
    ------
    InputError
        There is no prompt, or one cannot be used.
    """
    policy = PromptPolicy(spec.prompt_mode, spec.prompt_interval)
    given: Sequence[Prompt] | None = attempt.prompts
    if attempt.prompts_dir is not None:
        from workers.prompts.folder import read_folder

        stems = None if frame_names is None else [PurePosixPath(name).stem for name in frame_names]
        given = read_folder(
            attempt.prompts_dir,
            spec.corpus_store,
            stems,
            spec.prompt_mode,
            is_due=_due_frames(attempt, policy),
        )
    if given:
        return GivenPrompts(given, policy, header, attempt, spec.corpus_store)
    if given is None and detector is not None and spec.detector is not None:
        return DetectedPrompts(detector, spec.detector.name, policy, spec.detector.forget_after)
    if spec.allow_unprompted:
        return NoPrompts()
    raise InputError(unprompted_sentence(attempt))


def unprompted_sentence(attempt: Attempt) -> str:
    """Return what is said about a video without any prompt."""
    return (
        f"{attempt.source.name} has no prompt: add one, choose a --detector, or commit such "
        f"videos without objects with --allow-unprompted"
    )


def _due_frames(attempt: Attempt, policy: PromptPolicy) -> Callable[[int], bool] | None:
    """Return which frames may take a picture, where that is known before decoding."""
    source = attempt.source
    if source.start_us is not None:
        return None
    # Without a range the first tracked frame is frame 0, so frames and steps count alike.
    return lambda idx: idx % source.stride == 0 and policy.takes_row(idx // source.stride)


def _wrong_size(name: str, size: tuple[int, ...], frame: DecodedFrame) -> InputError:
    height, width = frame.image.shape[:2]
    return InputError(
        f"{name} is {size[1]}x{size[0]} pixels, but the picture is {width}x{height}: give masks at "
        f"the size of the video"
    )


def _time_of(prompt: Prompt) -> int:
    assert prompt.time_us is not None
    return prompt.time_us


def _object_of(prompt: Prompt) -> int:
    assert prompt.object_id is not None
    return prompt.object_id


def _read_mask_image(
    name: str, uri: str, value: int | None, options: StoreOptions
) -> NDArray[np.uint8]:
    """Return the object's pixels of a mask image; palette indices count, not their colours."""
    from PIL import Image, UnidentifiedImageError

    root, key = split_uri(uri)
    try:
        data = open_store(root, options).read_bytes(key)
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture)
    except FileNotFoundError as error:
        raise InputError(f"{name} should be in {uri}, which does not exist") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be read from {uri}: {error}") from error
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)
    mask = pixels == value if value is not None else pixels > 0
    if not mask.any():
        wanted = f"no pixel of value {value}" if value is not None else "no pixel above 0"
        raise InputError(f"{name} is empty: {uri} has {wanted}")
    return mask.astype(np.uint8)


def _mask_payload(mask: NDArray[np.uint8]) -> dict[str, Any]:
    height, width = mask.shape
    return {"size": [height, width], "counts": rle.encode(mask).decode("ascii")}
