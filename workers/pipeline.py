"""One video: decode -> track -> encode -> parts.

Three threads overlap: one decodes, the caller's tracks, one encodes and writes. Bounded queues
between them keep memory independent of the video's length. The caller's thread first fetches the
video and waits for its first frames; only then does it ask for the tracker (`gate`), which is how
the next video is prefetched while the current one is tracked.
"""

from __future__ import annotations

import logging
import platform
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from workers import faults
from workers.conveyor import ConveyorStopped, PictureQueue, StageThread
from workers.decode.fetch import fetch_video
from workers.decode.reader import DecodedFrame, LocalVideo, VideoHeader, VideoReader, open_video
from workers.errors import InputError, PreemptedError
from workers.messages import (
    Attempt,
    Part,
    Phase,
    Proposal,
    Stage,
    StageStats,
    WorkerReady,
    WorkerSpec,
)
from workers.prompting import (
    Moment,
    PromptSource,
    ResolvedPrompt,
    prompt_source,
    unprompted_sentence,
)
from workers.prompts.detector import Detector
from workers.sinks.parts import PartWriter
from workers.sinks.rows import SeenMask, VideoRows
from workers.spool import spool_folder
from workers.stepping import Stepper
from workers.storage import open_store
from workers.trackers.base import TrackingFrame, TrackingModelLoader, TrackingSession

_log = logging.getLogger(__name__)


class Report(Protocol):
    """Called as the attempt moves on, with what `workers.messages.Progress` holds."""

    def __call__(
        self, phase: Phase, num_steps: int, num_masks: int = 0, num_bytes: int = 0
    ) -> None:
        """Take note; must be quick."""


def track_video(
    attempt: Attempt,
    spec: WorkerSpec,
    loader: TrackingModelLoader,
    detector: Detector | None,
    *,
    report: Report,
    gate: AbstractContextManager[Any] | None = None,
    cancelled: threading.Event | None = None,
    stepper: Stepper | None = None,
    worker: WorkerReady | None = None,
) -> Proposal:
    """Track one video and stage its rows.

    Parameters
    ----------
    attempt : Attempt
        The video, its prompts, and where its parts go.
    spec : WorkerSpec
        What is the same for every video of the run.
    loader : TrackingModelLoader
        Loaded.
    detector : Detector or None
        Loaded, where the run has one.
    report : callable
        Called often, from more than one thread; must be quick.
    gate : context manager, optional
        Held while the tracker works on this video; entered once, after the first frames are
        decoded.
    cancelled : threading.Event, optional
        Set it to stop the attempt.
    stepper : Stepper, optional
        Steps the sessions of `loader`, where several videos share it.
    worker : WorkerReady, optional
        Facts about the worker for the table `videos`.

    Returns
    -------
    Proposal
        Everything lies in staging; nothing is committed yet.

    Raises
    ------
    TaskError
        The attempt failed; its kind says whose fault it is. Local files are removed, and threads
        have ended, whatever happens.
    """
    cancelled = cancelled or threading.Event()
    with faults.as_task_errors(attempt.source.name, cancelled), ExitStack() as stack:
        if attempt.prompts == () and not spec.allow_unprompted:
            raise InputError(unprompted_sentence(attempt))
        times = _Times()
        spool = stack.enter_context(spool_folder(spec.spool_dir))
        arrival = _Arrival(report)
        local = stack.enter_context(
            fetch_video(attempt.source, spec.corpus_store, spool, arrival.on_bytes, cancelled)
        )
        times.fetched = time.perf_counter()
        store = open_store(spec.out_uri, spec.out_store)
        parts = stack.enter_context(PartWriter(store, attempt.epoch, attempt.attempt_id, spool))
        decoding = _Decoding(attempt, local, spec.num_threads, cancelled)
        stack.callback(decoding.stop)
        header = decoding.start(arrival.on_decoded)
        names = local.images.names if local.images is not None else None
        prompts = prompt_source(spec, attempt, detector, header, names)
        arrival.end()
        report(Phase.WAITING, 0)
        times.gate_asked = time.perf_counter()

        with gate or nullcontext():
            times.gate_passed = time.perf_counter()
            report(Phase.TRACKING, 0)
            writing = _Writing(attempt, spec, header, parts, cancelled)
            stack.callback(writing.stop)
            writing.start()
            tracking = _Tracking(attempt, spec, stepper or Stepper(loader), prompts)
            with closing(tracking.run(decoding, header)) as steps:
                for final in steps:
                    for tracked in final:
                        writing.put(tracked)
                    report(Phase.TRACKING, tracking.num_steps, writing.num_masks)
                    if cancelled.is_set():
                        raise PreemptedError(f"{attempt.source.name}: the attempt was cancelled")
            times.tracked = time.perf_counter()
            report(Phase.FINISHING, tracking.num_steps, writing.num_masks)

        writing.finish(lambda: report(Phase.FINISHING, tracking.num_steps, writing.num_masks))
        times.closed = time.perf_counter()
        num_uploaded = 0

        def on_uploaded(num_bytes: int) -> None:
            nonlocal num_uploaded
            num_uploaded += num_bytes
            report(Phase.FINISHING, tracking.num_steps, writing.num_masks, num_uploaded)
            if cancelled.is_set():
                raise PreemptedError(f"{attempt.source.name}: the attempt was cancelled")

        staged = parts.upload(on_uploaded)
        times.uploaded = time.perf_counter()
        stages = _stage_stats(times, arrival, decoding, tracking, writing, staged)
        video = _video_row(attempt, spec, worker, times, stages, decoding, writing)
        return Proposal(attempt.attempt_id, video, stages, staged)


class _Arrival:
    """Counts and tells what is fetched, and what is decoded before the first tracked frame.

    A folder of frames goes on fetching while it is decoded, and a range that starts late is
    reached through thousands of frames: two threads have something to tell.
    """

    def __init__(self, report: Report) -> None:
        self.num_bytes = 0
        self._num_decoded = 0
        self._is_told = True
        self._report = report
        self._lock = threading.Lock()
        report(Phase.DOWNLOADING, 0)

    def on_bytes(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            self._tell()

    def on_decoded(self, num_frames: int) -> None:
        with self._lock:
            self._num_decoded += num_frames
            self._tell()

    def end(self) -> None:
        """Go on counting, and say no more: the attempt is in another phase."""
        with self._lock:
            self._is_told = False

    def _tell(self) -> None:
        if self._is_told:
            self._report(Phase.DOWNLOADING, self._num_decoded, num_bytes=self.num_bytes)


@dataclass(slots=True)
class _Times:
    """Moments of one attempt, on the clock of `time.perf_counter`."""

    begin: float = field(default_factory=time.perf_counter)
    fetched: float = 0.0
    gate_asked: float = 0.0
    gate_passed: float = 0.0
    tracked: float = 0.0
    closed: float = 0.0
    uploaded: float = 0.0


class _Decoding:
    """The thread that decodes, and the queue of what it decoded."""

    def __init__(
        self, attempt: Attempt, local: LocalVideo, num_threads: int, cancelled: threading.Event
    ) -> None:
        self._source = attempt.source
        self._local = local
        self._num_threads = num_threads
        self.queue: PictureQueue[tuple[DecodedFrame, int | None]] = PictureQueue(
            attempt.small_profile, cancelled
        )
        self._thread = StageThread("maskmill-decode", self._work, self.queue.fail)
        self._reader: VideoReader | None = None
        self.first_decoded = 0.0
        self.busy_s = 0.0

    @property
    def reader(self) -> VideoReader:
        """The open video; there is one as soon as there is a frame."""
        assert self._reader is not None
        return self._reader

    def start(self, on_decoded: Callable[[int], None]) -> VideoHeader:
        """Start the thread and wait for the first frame, telling of those that lie before it."""
        last = 0

        def look() -> None:
            nonlocal last
            num_decoded = self._reader.num_decoded if self._reader is not None else 0
            # A seek that turned out not to be exact begins to count anew.
            if num_decoded > last:
                on_decoded(num_decoded - last)
            last = num_decoded

        self._thread.start()
        self.queue.peek(look)
        # Waiting for the first frame is the start of the video, not a stall of the tracker.
        self.queue.wait_get_s = 0.0
        return self.reader.header

    def stop(self) -> None:
        self.queue.stop()
        self._thread.join()

    def _work(self) -> None:
        begin = time.perf_counter()
        with open_video(self._source, self._local, num_threads=self._num_threads) as reader:
            self._reader = reader
            self.first_decoded = time.perf_counter()
            # A frame is handed on when the time of the next is known: a prompt that names a time
            # belongs to the frame shown then.
            held: DecodedFrame | None = None
            for frame in reader:
                if held is not None:
                    self._put(held, frame.pts_us)
                held = frame
            if held is not None:
                self._put(held, None)
        self.busy_s = time.perf_counter() - begin - self.queue.wait_put_s
        if reader.truncated:
            _log.warning("%s", reader.truncation)
        if reader.num_resized:
            _log.warning("%d frames were scaled to the first one's size", reader.num_resized)
        self.queue.end()

    def _put(self, frame: DecodedFrame, until_us: int | None) -> None:
        self.queue.put((frame, until_us), frame.image.nbytes)


@dataclass(frozen=True, slots=True)
class _Tracked:
    """One final frame on its way to the tables."""

    frame: TrackingFrame
    pts_us: int
    prompts: list[ResolvedPrompt]


class _Tracking:
    """The session of one video, fed frame by frame."""

    def __init__(
        self,
        attempt: Attempt,
        spec: WorkerSpec,
        stepper: Stepper,
        prompts: PromptSource,
    ) -> None:
        self._name = attempt.source.name
        self._tracker = spec.tracker.name
        self._stepper = stepper
        self._prompts = prompts
        self._undecided: deque[tuple[int, int, list[ResolvedPrompt]]] = deque()
        self.num_steps = 0

    def run(
        self, decoding: _Decoding, header: VideoHeader
    ) -> Generator[list[_Tracked], None, None]:
        """Track every frame; yields after each step what became final."""
        stepper = self._stepper
        with self._guard(), stepper.alone():
            session = stepper.loader.open_session(header.height, header.width)
        with session, stepper.member():
            is_prompted = False
            for frame, until_us in decoding.queue:
                moment = Moment(frame, until_us, self.num_steps)
                with stepper.alone():
                    with self._guard():
                        prompts = self._prompts.take(moment, session.latest)
                    for prompt in prompts:
                        self._prompt(session, frame.frame_idx, prompt)
                    with self._guard():
                        for object_id in self._prompts.forgotten(self.num_steps):
                            session.remove(object_id)
                is_prompted = is_prompted or bool(prompts)
                self._undecided.append((frame.frame_idx, frame.pts_us, prompts))
                if is_prompted:
                    with self._guard():
                        self._look_ahead(session, frame, decoding)
                        final = stepper.step(session, frame.image, frame.frame_idx)
                else:
                    # Before the first prompt there is nothing to track, and no session may
                    # be stepped: the frame is there, and empty.
                    final = [TrackingFrame(frame.frame_idx, [], {}, 0.0)]
                self.num_steps += 1
                yield [self._tracked(emitted) for emitted in final]
            self._prompts.finish(decoding.reader.num_frames)
            with self._guard(), stepper.alone():
                final = session.finish()
            yield [self._tracked(emitted) for emitted in final]
        if self._undecided:
            raise faults.tracker_fault(
                self._name,
                self._tracker,
                f"it never returned frame {self._undecided[0][0]}",
            )

    def _look_ahead(
        self, session: TrackingSession, frame: DecodedFrame, decoding: _Decoding
    ) -> None:
        """Name the frames that are decoded already to a tracker that has a use for it."""
        num = self._stepper.loader.num_ahead
        if num:
            ahead = [decoded.image for decoded, _ in decoding.queue.waiting(num - 1)]
            with self._stepper.alone():
                session.look_ahead([frame.image, *ahead])

    def _prompt(self, session: TrackingSession, frame_idx: int, prompt: ResolvedPrompt) -> None:
        try:
            session.prompt(frame_idx, prompt.object_id, **prompt.arguments)
        except ValueError as error:
            raise InputError(f"{self._name}, frame {frame_idx}: {error}") from error

    def _tracked(self, frame: TrackingFrame) -> _Tracked:
        expected = self._undecided[0][0] if self._undecided else None
        if frame.frame_idx != expected:
            raise faults.tracker_fault(
                self._name,
                self._tracker,
                f"it returned frame {frame.frame_idx} where {expected} was due",
            )
        _, pts_us, prompts = self._undecided.popleft()
        return _Tracked(frame, pts_us, prompts)

    def _guard(self) -> AbstractContextManager[None]:
        return faults.as_tracker_errors(self._name, self._tracker, self.num_steps)


class _Writing:
    """The thread that encodes and writes, and the queue of what it shall write."""

    def __init__(
        self,
        attempt: Attempt,
        spec: WorkerSpec,
        header: VideoHeader,
        parts: PartWriter,
        cancelled: threading.Event,
    ) -> None:
        self._threshold = spec.threshold
        self._parts = parts
        self._cancelled = cancelled
        self.rows = VideoRows(parts, attempt.source.video_key, header.height, header.width)
        self.queue: PictureQueue[_Tracked] = PictureQueue(attempt.small_profile, cancelled)
        self._thread = StageThread("maskmill-write", self._work, lambda _: self.queue.stop())
        self.rle_s = 0.0
        self.write_s = 0.0

    @property
    def num_masks(self) -> int:
        return self.rows.num_masks

    def start(self) -> None:
        self._thread.start()

    def put(self, tracked: _Tracked) -> None:
        cost = sum(mask.num_bytes for mask in tracked.frame.masks)
        try:
            self.queue.put(tracked, cost)
        except ConveyorStopped:
            self._raise_failure()
            raise

    def finish(self, report: Callable[[], None]) -> None:
        """Wait until every row is written and every file closed."""
        self.queue.end()
        while not self._thread.join(0.25):
            report()
            if self._cancelled.is_set():
                raise PreemptedError("the attempt was cancelled")
        self._raise_failure()
        report()

    def stop(self) -> None:
        self.queue.stop()
        self._thread.join()

    def _raise_failure(self) -> None:
        self._thread.join()
        if self._thread.failure is not None:
            raise self._thread.failure

    def _work(self) -> None:
        for tracked in self.queue:
            begin = time.perf_counter()
            seen, occluded_ids = self._encode(tracked)
            encoded = time.perf_counter()
            frame_idx = tracked.frame.frame_idx
            for prompt in tracked.prompts:
                self.rows.add_prompt(
                    prompt.object_id,
                    frame_idx,
                    prompt.kind,
                    prompt.payload,
                    prompt.source,
                    prompt.category_id,
                    prompt.score,
                )
            self.rows.add_frame(frame_idx, tracked.pts_us, seen, occluded_ids)
            self.rle_s += encoded - begin
            self.write_s += time.perf_counter() - encoded
        begin = time.perf_counter()
        self.rows.finish()
        self._parts.close_files()
        self.write_s += time.perf_counter() - begin

    def _encode(self, tracked: _Tracked) -> tuple[list[SeenMask], list[int]]:
        """Return the masks to be written, and the objects that are hidden or gone."""
        frame = tracked.frame
        prompted = {prompt.object_id for prompt in tracked.prompts}
        occluded = {object_id for object_id, hidden in frame.occlusions.items() if hidden}
        seen = []
        for mask in frame.masks:
            if mask.confidence < self._threshold:
                continue
            encoded = mask.encoded()
            if not encoded.area:
                # An object without a pixel is not visible, whatever the tracker calls it.
                occluded.add(mask.object_id)
                continue
            seen.append(
                SeenMask(
                    mask.object_id,
                    float(mask.confidence),
                    encoded,
                    mask.object_id in prompted,
                    mask.object_id in occluded,
                )
            )
        return seen, sorted(occluded)


def _stage_stats(
    times: _Times,
    arrival: _Arrival,
    decoding: _Decoding,
    tracking: _Tracking,
    writing: _Writing,
    staged: Sequence[Part],
) -> tuple[StageStats, ...]:
    waited_s = decoding.queue.wait_get_s, writing.queue.wait_put_s
    num_masks = writing.rows.num_masks
    num_bytes = sum(part.size_bytes for part in staged)
    return (
        StageStats(Stage.DOWNLOAD, arrival.num_bytes, times.fetched - times.begin),
        StageStats(
            Stage.DECODE,
            decoding.reader.num_decoded,
            decoding.busy_s,
            wait_output_s=decoding.queue.wait_put_s,
        ),
        StageStats(
            Stage.TRACK,
            tracking.num_steps,
            times.tracked - times.gate_passed - sum(waited_s),
            *waited_s,
        ),
        StageStats(Stage.RLE, num_masks, writing.rle_s, writing.queue.wait_get_s),
        StageStats(Stage.WRITE, num_masks, writing.write_s),
        StageStats(Stage.UPLOAD, num_bytes, times.uploaded - times.closed),
    )


def _video_row(
    attempt: Attempt,
    spec: WorkerSpec,
    worker: WorkerReady | None,
    times: _Times,
    stages: tuple[StageStats, ...],
    decoding: _Decoding,
    writing: _Writing,
) -> dict[str, Any]:
    """Return the row of the table `videos`, but for what only the driver knows."""
    source, reader, header, rows = (
        attempt.source,
        decoding.reader,
        decoding.reader.header,
        writing.rows,
    )
    busy_s = dict.fromkeys(Stage, 0.0) | {stats.stage: stats.busy_s for stats in stages}
    # Waiting for the tracker while it works on another video is no part of this one's speed.
    waited_s = times.gate_passed - times.gate_asked
    active_s = times.closed - decoding.first_decoded - waited_s
    return {
        "video_key": source.video_key,
        "uri": source.uri,
        "etag": source.etag,
        "size_bytes": source.size_bytes,
        "codec": header.codec,
        "width": header.width,
        "height": header.height,
        "rotation": header.rotation,
        "fps": header.fps,
        "vfr": reader.vfr,
        "duration_us": header.duration_us,
        "frames_decoded": reader.num_decoded,
        "frames_tracked": rows.num_frames,
        "frames_corrupt": reader.num_corrupt,
        "start_frame": rows.first_frame,
        "end_frame": None if rows.last_frame is None else rows.last_frame + 1,
        "stride": source.stride,
        "truncated": reader.truncated,
        "num_objects": rows.num_objects,
        "num_masks": rows.num_masks,
        "wall_s": times.uploaded - times.begin,
        **{f"{stage.value}_s": seconds for stage, seconds in busy_s.items()},
        "fps_end_to_end": rows.num_frames / active_s if active_s > 0 else 0.0,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_memory_bytes": _peak_gpu_memory_bytes(),
        "host": worker.host if worker else platform.node(),
        "gpu": worker.gpu if worker else "",
        "decoder": header.decoder,
        "tracker": spec.tracker.name,
        "config_fingerprint": spec.config_fingerprint,
        "weights_sha256": worker.tracker_sha256 if worker else "",
        "detector_sha256": worker.detector_sha256 if worker else "",
    }


def _peak_gpu_memory_bytes() -> int | None:
    """Return the largest GPU memory PyTorch held, without importing it for the question."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
