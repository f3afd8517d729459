"""The values that pass between the driver and a worker: all frozen, all picklable, no behaviour.

Everything a worker needs to know about one video is in an `Attempt`; everything it has to say
about it comes back as a `Proposal` or a `TaskFailed`. Nothing here imports Ray, a model or a
decoder, so both sides, tests and notebooks can build these by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from workers.errors import FailureKind


class SourceKind(StrEnum):
    """What a video is made of."""

    FILE = "file"
    """A container file (MP4, MKV, ...)."""
    FRAMES = "frames"
    """A folder that directly holds one image per frame, ordered by name."""


class PromptMode(StrEnum):
    """When a video is prompted."""

    FIRST_FRAME = "first_frame"
    EVERY_N_FRAMES = "every_n_frames"
    EVERY_FRAME = "every_frame"


class Stage(StrEnum):
    """The stages a video passes through; one row each in the table `stages`."""

    DOWNLOAD = "download"
    DECODE = "decode"
    ENCODE_IMAGE = "encode_image"
    TRACK = "track"
    RLE = "rle"
    WRITE = "write"
    UPLOAD = "upload"


class Phase(StrEnum):
    """Where an attempt is; the deadline runs in every phase but WAITING."""

    DOWNLOADING = "downloading"
    WAITING = "waiting"
    """First frames are decoded; the attempt waits for its turn on the tracker."""
    TRACKING = "tracking"
    FINISHING = "finishing"


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach an object store. Never holds a secret: those come from the environment.

    Attributes
    ----------
    endpoint_url : str or None
        S3-compatible endpoint; None asks the environment (``AWS_ENDPOINT_URL``), then AWS.
    path_style : bool
        Address buckets as ``endpoint/bucket`` instead of ``bucket.endpoint``.
    profile : str or None
        Named profile of the AWS configuration files.
    region : str or None
        Region to sign for.
    anonymous : bool
        Send unsigned requests.
    """

    endpoint_url: str | None = None
    path_style: bool = False
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False


@dataclass(frozen=True, slots=True)
class VideoSource:
    """One video of the corpus, or the part of it that a manifest row selects.

    Attributes
    ----------
    video_key : int
        First 8 bytes of blake2b(canonical URI and time range), signed.
    uri : str
        Canonical URI, the object's key kept verbatim.
    name : str
        Path below the corpus root.
    kind : SourceKind
        Container file or folder of frames.
    size_bytes : int or None
        Size of the object (sum of the images of a folder), when the store tells it.
    etag : str or None
        Entity tag, else ``size-mtime``; part of the input identity.
    start_us, end_us : int or None
        Half-open time range in microseconds from the start of the stream; None is unbounded.
    stride : int
        Every how many decoded frames one is tracked, at least 1.
    """

    video_key: int
    uri: str
    name: str
    kind: SourceKind
    size_bytes: int | None = None
    etag: str | None = None
    start_us: int | None = None
    end_us: int | None = None
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a box, points or a mask for one object on one frame.

    Attributes
    ----------
    object_id : int or None
        The object it belongs to. An attempt's prompts all have one: whoever reads a table gives
        rows without one the next free ids.
    frame_idx : int or None
        0-based decoded frame of the source. Exactly one of frame_idx and time_us is set, but for
        detections, which belong to the frame they were made on.
    time_us : int or None
        Time from the start of the stream, in microseconds: the frame shown at that time.
    box_xyxy : tuple of 4 float or None
        Pixels of the original frame.
    points_xy : tuple of (float, float) or None
        Pixels of the original frame.
    point_labels : tuple of int or None
        1 foreground, 0 background, one per point.
    mask_rle : Mapping or None
        ``{"size": [H, W], "counts": bytes}``, COCO compressed.
    mask_uri : str or None
        A mask image, read by the worker: values above 0 are the object (see ``mask_value``).
    mask_value : int or None
        Only this value of the mask image is the object.
    label : str or None
        Category name, as given.
    category_id : int or None
        Category id, resolved by the plan (detector class index or rank of the label).
    score : float or None
        Detector confidence, 0..1.
    source : str
        Where it came from: ``file``, ``folder`` or ``detector:NAME``.
    """

    object_id: int | None = None
    frame_idx: int | None = None
    time_us: int | None = None
    box_xyxy: tuple[float, float, float, float] | None = None
    points_xy: tuple[tuple[float, float], ...] | None = None
    point_labels: tuple[int, ...] | None = None
    mask_rle: Mapping[str, Any] | None = None
    mask_uri: str | None = None
    mask_value: int | None = None
    label: str | None = None
    category_id: int | None = None
    score: float | None = None
    source: str = "file"


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """Which tracker to load, and how.

    Attributes
    ----------
    name : str
        Registered name, with an optional ``:SIZE``.
    checkpoint : str or None
        Path or fsspec URL of the weights.
    image_size : int or None
        Side of the model's square input in pixels; None is the model's own.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``; None is the tracker's own.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    options : Mapping
        Tracker options by name; unknown names are errors.
    """

    name: str = "flow"
    checkpoint: str | None = None
    image_size: int | None = None
    dtype: str | None = None
    device: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DetectorSpec:
    """Which detector makes prompts, and which of its detections count.

    Attributes
    ----------
    name : str
        Registered name, for instance ``yolo11n``.
    checkpoint : str or None
        Path or fsspec URL of the weights.
    classes : tuple of str
        Class names or indices to keep; empty keeps all.
    confidence : float
        Smallest confidence that counts, 0..1.
    max_objects : int or None
        Keep at most this many detections of a frame, the most confident first.
    forget_after : int or None
        Objects that were out of sight for so many tracked frames are tracked no more; None for
        never.
    """

    name: str
    checkpoint: str | None = None
    classes: tuple[str, ...] = ()
    confidence: float = 0.25
    max_objects: int | None = None
    forget_after: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything that is the same for every video of a run: one per worker, given at its birth.

    Attributes
    ----------
    run_id : str
        The run this worker serves.
    out_uri : str
        Root of the output.
    tracker : TrackerSpec
        The tracker to load.
    detector : DetectorSpec or None
        The detector that makes prompts, if any.
    prompt_mode : PromptMode
        When prompts are taken.
    prompt_interval : int
        Period of ``every_n_frames``, in tracked frames.
    threshold : float
        Masks with a lower confidence are not written.
    allow_unprompted : bool
        A video without any prompt is committed with zero objects instead of quarantined.
    corpus_store, out_store : StoreOptions
        How to reach the videos (and prompts and weights), and the output.
    config_fingerprint : str
        Fingerprint of all that changes masks; stored with every video.
    num_threads : int
        Threads the tracker may use, from ``--cpus-per-worker``.
    videos_in_flight : int
        Videos tracked at the same time.
    spool_dir : str or None
        Directory for downloaded videos; None is the system's temporary directory.
    """

    run_id: str
    out_uri: str
    tracker: TrackerSpec
    detector: DetectorSpec | None = None
    prompt_mode: PromptMode = PromptMode.FIRST_FRAME
    prompt_interval: int = 30
    threshold: float = 0.0
    allow_unprompted: bool = False
    corpus_store: StoreOptions = field(default_factory=StoreOptions)
    out_store: StoreOptions = field(default_factory=StoreOptions)
    config_fingerprint: str = ""
    num_threads: int = 1
    videos_in_flight: int = 1
    spool_dir: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of one video, sent to one worker.

    Attributes
    ----------
    attempt_id : str
        Unique over the life of the output; names the staging folder.
    epoch : int
        Epoch of the driver's fence; the staging folder's parent.
    number : int
        1-based count of tries of this video.
    source : VideoSource
        The video.
    prompts : tuple of Prompt or None
        Prompts from ``--prompts``; None when prompts come from a folder or a detector.
    prompts_dir : str or None
        URI of this video's own folder of mask images (``--prompts-dir``).
    small_profile : bool
        Use the least memory: smallest queues and batches, one video at a time.
    """

    attempt_id: str
    epoch: int
    number: int
    source: VideoSource
    prompts: tuple[Prompt, ...] | None = None
    prompts_dir: str | None = None
    small_profile: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One Parquet file in staging.

    Attributes
    ----------
    table : str
        Name of the table it holds rows of.
    key : str
        Key below the output's root.
    num_rows, size_bytes : int
        Rows in it and its size.
    sha256 : str
        Hex digest of the whole file.
    """

    table: str
    key: str
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StageStats:
    """How one video spent its time in one stage.

    Attributes
    ----------
    stage : Stage
        The stage.
    items : int
        Frames (masks for ``rle`` and ``write``, bytes for ``download`` and ``upload``).
    busy_s, wait_input_s, wait_output_s : float
        Seconds working, waiting for the stage before, waiting for the stage after.
    """

    stage: Stage
    items: int
    busy_s: float
    wait_input_s: float = 0.0
    wait_output_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """A finished attempt: what the driver may commit.

    Attributes
    ----------
    attempt_id : str
        The attempt it answers.
    video : Mapping of str to value
        The row of the table `videos`, but for the columns only the driver knows
        (``name``, ``status``, ``attempts``, ``queue_s``).
    stages : tuple of StageStats
        One per stage that ran.
    parts : tuple of Part
        Files in staging; a table without rows has none.
    """

    attempt_id: str
    video: Mapping[str, Any]
    stages: tuple[StageStats, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A failed attempt, as data.

    Attributes
    ----------
    attempt_id : str
        The attempt that failed.
    kind : FailureKind
        Decides what happens next.
    message : str
        One sentence a stranger understands.
    traceback : str
        For the engineer; may be empty.
    """

    attempt_id: str
    kind: FailureKind
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """A heartbeat of one attempt.

    Attributes
    ----------
    attempt_id : str
        Whose heartbeat it is.
    phase : Phase
        Where the attempt is.
    num_steps : int
        Frames stepped by the tracker so far (not frames emitted); before the first one is, frames
        decoded. With `num_bytes`, any growth is progress.
    num_masks : int
        Masks emitted so far.
    num_bytes : int
        Bytes fetched so far, then bytes uploaded.
    """

    attempt_id: str
    phase: Phase
    num_steps: int
    num_masks: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """What a worker reports once its model is loaded.

    Attributes
    ----------
    host, gpu : str
        Where it runs; ``gpu`` is empty without one.
    gpu_memory_bytes : int
        Memory of that GPU; 0 without one.
    pid : int
        Process id on that host.
    load_s : float
        Seconds that `setup` took.
    tracker_sha256, detector_sha256 : str
        Digests of the weights; empty for a tracker without any.
    classes : Mapping of int to str
        Class names of the detector (or of a tracker that detects); empty without one.
    versions : Mapping of str to str
        Versions of the packages that matter for results.
    dtype : str
        Number format that the network computes in; empty for trackers without one.
    """

    host: str
    gpu: str
    pid: int
    load_s: float
    tracker_sha256: str = ""
    detector_sha256: str = ""
    classes: Mapping[int, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    gpu_memory_bytes: int = 0
    dtype: str = ""
