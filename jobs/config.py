"""The configuration of a run: one frozen tree, checked as soon as it is made.

Flags, a TOML/YAML file and `--set key=value` all end here; unknown keys are errors. The part that
changes masks has a fingerprint, and one output holds one fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jobs.limits import parse_deadline
from jobs.notify import check_url
from workers.errors import ConfigError
from workers.messages import (
    DetectorSpec,
    PromptMode,
    StoreOptions,
    TrackerSpec,
    WorkerSpec,
)
from workers.sinks.schema import SCHEMA_VERSION

PROMPTED_FRAMES = 4
"""Prompted frames that a SAM 2 network attends to where frames are prompted again and again: all of
them, as for a few prompts, would be more work and memory with each."""


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreConfig(Section):
    """How to reach an object store; secrets come from the environment only."""

    endpoint_url: str | None = None
    path_style: bool = False
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False

    def options(self) -> StoreOptions:
        """Return the same as the message that workers receive."""
        return StoreOptions(**self.model_dump())


class CorpusConfig(Section):
    """Which videos."""

    paths: tuple[str, ...] = ()
    """Files, prefixes, globs or folders of frames, as fsspec URLs."""
    manifest: str | None = None
    """CSV, JSONL or Parquet with a column `video`."""
    inventory: str | None = None
    """The ``manifest.json`` of a bucket inventory, read instead of listing the bucket."""
    since: str | None = None
    """Only what changed, or is dated, from here on: a date, a time, or an age such as ``36h``."""
    until: str | None = None
    """Only what changed, or is dated, before this."""
    videos: tuple[str, ...] = ()
    """Only these, by name or URI, however many more are listed; all of them when empty."""
    limit: int | None = Field(default=None, ge=1)
    sample: int | None = Field(default=None, ge=1)
    seed: int = 0
    stride: int = Field(default=1, ge=1)
    """Stride of every video whose manifest row has none."""
    store: StoreConfig = StoreConfig()


class TrackerConfig(Section):
    """Which tracker."""

    name: str = "flow"
    checkpoint: str | None = None
    image_size: int | None = Field(default=None, ge=32)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "auto"
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_model_id(cls, given: Any) -> Any:
        """Let the id of a model name the tracker and, where none are given, its weights."""
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(name, str) or "/" not in name:
            return given
        from workers.trackers.registry import tracker_info

        info = tracker_info(name)
        return given | {"name": info.name, "checkpoint": given.get("checkpoint") or info.hub_id}


class DetectorConfig(Section):
    """Which detector makes prompts."""

    name: str
    checkpoint: str | None = None
    classes: tuple[str, ...] = ()
    confidence: float = Field(default=0.25, ge=0, le=1)
    max_objects: int | None = Field(default=None, ge=1)
    forget_after: int | None = Field(default=None, ge=1)
    """Tracked frames after which an object out of sight is tracked no more; None for never."""


class PromptConfig(Section):
    """Where prompts come from and when they are taken. At most one source."""

    file: str | None = None
    dir: str | None = None
    detector: DetectorConfig | None = None
    mode: PromptMode = PromptMode.FIRST_FRAME
    interval: int = Field(default=30, ge=1)
    threshold: float = Field(default=0.0, ge=0, le=1)
    allow_unprompted: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> PromptConfig:
        given = [n for n in ("file", "dir", "detector") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"prompts come from one place, not from {' and '.join(given)}")
        return self


class PoolConfig(Section):
    """How many workers, and what each may use."""

    workers: int | Literal["auto"] = "auto"
    """A number: exactly so many, while there are so many videos left. ``auto``: as many as the
    nodes hold, between `min_workers` and `max_workers`; idle ones go when the tail is short."""
    min_workers: int | None = Field(default=None, ge=0)
    """With ``auto``: so many are asked for even where no node can hold them yet, and kept."""
    max_workers: int | None = Field(default=None, ge=1)
    """With ``auto``: the most; on a cluster so many are asked for (never more than videos are
    left), which is the demand that an autoscaler answers with nodes."""
    idle_after_s: float = Field(default=60, gt=0)
    """With ``auto``: a worker that no video was left for goes after this long."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] | None = None
    """None is 1 where the cluster has GPUs and the tracker uses them, else 0. ``auto`` is 1 until
    the first videos have shown how much GPU memory a worker needs, then the share that fits."""
    cpus_per_worker: float = Field(default=1, gt=0)
    videos_per_worker: int = Field(default=1, ge=1)
    stuck_after_s: float = Field(default=300, gt=0)
    """An attempt without progress for this long is stopped."""
    place_within_s: float = Field(default=1800, gt=0)
    """How long a cluster may have no place for any worker before the run ends: enough for an
    autoscaler to bring a node, with driver and image."""
    ray_address: str | None = None
    """None starts a local Ray, or joins the one that RAY_ADDRESS names."""
    spool_dir: str | None = None

    @field_validator("workers")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"workers must be at least 1 or auto, got {value}")
        return value

    @model_validator(mode="after")
    def _bounds_fit(self) -> PoolConfig:
        low, high = self.min_workers, self.max_workers
        if self.workers != "auto" and (low is not None or high is not None):
            raise ValueError(
                f"workers = {self.workers} means exactly so many: leave min_workers and "
                "max_workers out, or workers at auto"
            )
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_workers = {low} is more than max_workers = {high}")
        return self


class OutConfig(Section):
    """Where results go."""

    uri: str
    store: StoreConfig = StoreConfig()
    single_driver: bool = False
    """Run on a store without conditional writes; the user promises that no other driver runs."""
    if_running: Literal["take-over", "refuse"] = "take-over"
    """What a start does while another driver is at work on this output: fence it out, or not."""


class LimitsConfig(Section):
    """When a start of the run stops although work is left; the same command resumes."""

    budget_hours: float | None = Field(default=None, gt=0)
    """Worker-hours of this start, the loading of models included."""
    deadline: str | None = None
    """A duration, a clock time, or a date with a time; see `jobs.limits.parse_deadline`."""
    exit_code: int = 130
    """What a start ends with that a limit has stopped: 130 as for a signal, or 0 for schedulers,
    which would try again at once what shall wait for the next night."""

    @field_validator("exit_code")
    @classmethod
    def _is_one_of_two(cls, value: int) -> int:
        if value not in (0, 130):
            raise ValueError(f"--limit-exit-code (limits.exit_code) must be 0 or 130, got {value}")
        return value

    @field_validator("deadline")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                # The form alone: whether it is over is judged when the run starts.
                parse_deadline(value, datetime.fromtimestamp(0, UTC))
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return value


class NotifyConfig(Section):
    """Who is told how a run ends."""

    url: str | None = Field(default=None, exclude=True, repr=False)
    """A webhook. It is a secret, so it is stored and shown nowhere: not with the run, not by
    ``plan``, not in the command that `submit` sends. Without, the environment's
    MASKMILL_NOTIFY_URL."""
    above_rate: float = Field(default=0.1, ge=0, le=1)
    """It is also told when more than this share of the settled videos is in quarantine."""

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                check_url(value)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return value


class RunConfig(Section):
    """Everything about one run."""

    corpus: CorpusConfig
    out: OutConfig
    tracker: TrackerConfig = TrackerConfig()
    prompts: PromptConfig = PromptConfig()
    pool: PoolConfig = PoolConfig()
    limits: LimitsConfig = LimitsConfig()
    notify: NotifyConfig = NotifyConfig()

    def mask_settings(self, *, tracker_sha256: str, detector_sha256: str) -> dict[str, Any]:
        """Return everything that changes masks, by dotted key.

        Parameters
        ----------
        tracker_sha256, detector_sha256 : str
            Digests of the weights; empty for none. Paths are left out on purpose: the same
            weights elsewhere are the same run.

        Returns
        -------
        dict of str to value
            JSON-serialisable, the input of the fingerprint. The tracker goes by its registered
            name and all its options are there, so that spelling a default out changes nothing.
            Prompts are not: they are part of each video's identity.

        Raises
        ------
        ConfigError
            The tracker or one of its options is unknown.
        """
        name, _, options = _tracker_settings(self.tracker, self.prompts.mode)
        settings: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "tracker.name": name,
            "tracker.sha256": tracker_sha256,
            "tracker.image_size": self.tracker.image_size,
            "tracker.dtype": self.tracker.dtype,
            "prompts.mode": self.prompts.mode.value,
            "prompts.interval": self.prompts.interval
            if self.prompts.mode is PromptMode.EVERY_N_FRAMES
            else None,
            "prompts.threshold": self.prompts.threshold,
        }
        for key, value in sorted(options.items()):
            settings[f"tracker.options.{key}"] = value
        detector = self.prompts.detector
        if detector is not None:
            settings |= {
                "detector.name": detector.name.lower().replace("_", "-"),
                "detector.sha256": detector_sha256,
                "detector.classes": sorted(detector.classes),
                "detector.confidence": detector.confidence,
                "detector.max_objects": detector.max_objects,
            }
            if detector.forget_after is not None:
                settings["detector.forget_after"] = detector.forget_after
        return settings

    @property
    def prompt_kind(self) -> str:
        """``file``, ``folder``, ``detector`` or ``none``."""
        if self.prompts.file is not None:
            return "file"
        if self.prompts.dir is not None:
            return "folder"
        return "detector" if self.prompts.detector is not None else "none"

    def worker_spec(
        self, *, run_id: str, config_fingerprint: str, dtype: str | None = None
    ) -> WorkerSpec:
        """Return what every worker of the run is born with.

        Parameters
        ----------
        run_id, config_fingerprint : str
            The run, and `fingerprint` of its settings.
        dtype : str, optional
            Number format that the masks of the output were computed in so far, which those that
            follow shall have, too, where the configuration leaves it open.
        """
        detector = self.prompts.detector
        _, options, _ = _tracker_settings(self.tracker, self.prompts.mode)
        changes = {"dtype": self.tracker.dtype or dtype, "options": options}
        return WorkerSpec(
            run_id=run_id,
            out_uri=self.out.uri,
            tracker=TrackerSpec(**self.tracker.model_dump() | changes),
            detector=DetectorSpec(**detector.model_dump()) if detector else None,
            prompt_mode=self.prompts.mode,
            prompt_interval=self.prompts.interval,
            threshold=self.prompts.threshold,
            allow_unprompted=self.prompts.allow_unprompted,
            corpus_store=self.corpus.store.options(),
            out_store=self.out.store.options(),
            config_fingerprint=config_fingerprint,
            num_threads=max(1, int(self.pool.cpus_per_worker)),
            videos_in_flight=self.pool.videos_per_worker,
            spool_dir=self.pool.spool_dir,
        )


def _tracker_settings(
    tracker: TrackerConfig, mode: PromptMode
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return a tracker's registered name, its options as they are set, and all with defaults."""
    # Late, as the registry imports the module of a tracker: `--help` needs none of them.
    import sys

    from workers.trackers.base import TrackingConfig, check_options
    from workers.trackers.registry import create_tracking_loader, tracker_info

    try:
        name = tracker_info(tracker.name).name
        loader = create_tracking_loader(name, TrackingConfig(name))
        defaults = sys.modules[type(loader).__module__].OPTIONS
        given = dict(tracker.options)
        if mode is not PromptMode.FIRST_FRAME and "max_cond_frames_in_attn" in defaults:
            given = {"max_cond_frames_in_attn": PROMPTED_FRAMES} | given
        return name, given, check_options(name, given, defaults)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fingerprint(mask_settings: Mapping[str, Any]) -> str:
    """Return the fingerprint of the settings that change masks, 16 hex digits."""
    text = json.dumps(dict(mask_settings), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
