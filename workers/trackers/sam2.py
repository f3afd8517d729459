"""SAM 2 and 2.1, and what all trackers built on their networks share.

A session translates: frames and prompts in pixels of the video go to the engine, which knows
neither videos nor ids; what the engine decides comes back as frames in order. Which masks are taken
and what is remembered is the policy's, one `Track` per object.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from workers.engine import archive
from workers.engine.attention import Savings
from workers.engine.bank import Clock, Sighting
from workers.engine.lineage import Kept, Spool
from workers.engine.model import (
    IMAGE_SIZE_STEP,
    MODEL_IMAGE_SIZE,
    CheckpointInfo,
    load_network,
)
from workers.engine.pictures import IMAGENET, Levels, Resize, to_pixels
from workers.engine.policies.base import Decided, Track
from workers.engine.policies.frames import FrameTrack
from workers.engine.policies.sam2 import Sam2Track
from workers.engine.tracking import Engine, FramePrompt, FrameWork
from workers.rle import LazyMask
from workers.trackers.base import (
    SessionPrompt,
    TrackingConfig,
    TrackingFrame,
    TrackingMask,
    TrackingModelLoader,
    TrackingResult,
    TrackingSession,
    UInt8Array,
    check_options,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from workers.engine.adapter import Features

SHARED_OPTIONS: Mapping[str, Any] = {
    "cache_keys": False,
    "compat": "none",
    "fast_float32": False,
    "fill_hole_area": 0,
    "max_cond_frames_in_attn": -1,
}
"""Options of every tracker on a SAM 2 network.

* ``cache_keys``: keep the projected keys of every remembered frame. They take 16 times the memory
  of what is remembered, 32 times in float32, and round a little more coarsely in bfloat16.
* ``compat``: ``original`` reproduces the faults of the published program, ``none`` does not.
* ``fast_float32``: compute in float32 with the library that is faster on this CPU instead of the
  one the originals use; the rounding differs, which trained weights hardly show.
* ``fill_hole_area``: holes of a mask of up to so many pixels of the low-resolution mask are filled;
  0 for none, which is how the published package behaves without its compiled extension.
* ``max_cond_frames_in_attn``: prompted frames that are attended to, the newest ones; -1 for all.
  Memory then grows by half a MiB (at 1024 pixels) with every frame on which an object is prompted.
"""

OPTIONS = SHARED_OPTIONS

ALGORITHM = "sam2-engine-3"
"""Changes whenever results change; part of every snapshot's fingerprint."""

_COMPAT = ("none", "original")
_DTYPES = ("float32", "bfloat16")
TrackFactory = Callable[[Clock, Spool], Track]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sighting on a frame that others wait for; its mask is in the spool."""

    confidence: float
    is_hidden: bool
    kept: Kept | None


@dataclass(slots=True)
class _OpenFrame:
    """A stepped frame that is not yet final for all of its objects.

    There may be as many as a video has, so one that nothing is known of is small.

    Attributes
    ----------
    label : int
        Its ``frame_idx``.
    elapsed_s : float
        Time spent on it.
    live : tuple of int
        Objects that were live then; frames with the same ones share it.
    decided : dict of int to Sighting or _Waiting, or None
        Those of them that are decided; None for none.
    """

    label: int
    elapsed_s: float
    live: tuple[int, ...]
    decided: dict[int, Sighting | _Waiting] | None = None

    @property
    def is_final(self) -> bool:
        return len(self.decided or ()) == len(self.live)

    def decide(self, object_id: int, sighting: Sighting | _Waiting) -> None:
        if self.decided is None:
            self.decided = {}
        self.decided[object_id] = sighting


class EngineSession(TrackingSession):
    """One video on a SAM 2 network.

    Parameters
    ----------
    height, width : int
        Size of every frame in pixels.
    num_frames : int or None
        Length of the video; it sets the scale of temporal distances.
    engine : Engine
        The network and what is common to all policies.
    make_track : callable
        Makes the track of a new object.
    clock : Clock
        How time is told.
    resize : str
        How frames become the network's picture.
    levels : Levels
        What that picture is normalised by.
    fingerprint : str
        Digest of weights and settings.
    """

    kind: ClassVar[str] = "sam2"

    def __init__(
        self,
        height: int,
        width: int,
        *,
        num_frames: int | None,
        engine: Engine,
        make_track: TrackFactory,
        clock: Clock,
        resize: Resize,
        levels: Levels,
        fingerprint: str,
    ) -> None:
        super().__init__(height, width, num_frames=num_frames)
        self._engine = engine
        self._make_track = make_track
        self._clock = clock
        self._resize: Resize = resize
        self._levels = levels
        self._digest = fingerprint
        self._spool = Spool()
        self._undecided: deque[_OpenFrame] = deque()
        self._live: tuple[int, ...] = ()
        self._ahead: list[tuple[UInt8Array, Features]] = []
        self.tracks: dict[int, Track] = {}
        """The policy's view of every live object."""

    # -- one frame ---------------------------------------------------------------------------

    def _advance(
        self, frame: UInt8Array, frame_idx: int, prompts: Sequence[SessionPrompt]
    ) -> list[TrackingFrame]:
        start = time.perf_counter()
        work = self.prepare(frame, prompts)
        decided = self._engine.step([work])[0] if work is not None else {}
        return self.conclude(frame_idx, decided, time.perf_counter() - start)

    def prepare(self, frame: UInt8Array, prompts: Sequence[SessionPrompt]) -> FrameWork | None:
        """Begin a step.

        Returns
        -------
        FrameWork or None
            What the engine has to do; None where no object is live.
        """
        for object_id in self.object_ids:
            if object_id not in self.tracks:
                self.tracks[object_id] = self._make_track(self._clock, self._spool)
        features = self._taken_from_ahead(frame)
        if not self.tracks:
            return None
        return FrameWork(
            self._pixels(frame) if features is None else features,
            self.num_steps - 1,
            # In the order of ids, so that the order of prompts cannot matter.
            dict(sorted(self.tracks.items())),
            self._frame_prompts(prompts),
            (self.height, self.width),
        )

    def conclude(
        self, frame_idx: int, decided: Mapping[int, Decided], elapsed_s: float
    ) -> list[TrackingFrame]:
        """End a step with what the engine decided; return the frames that are final."""
        if self._live != tuple(self.tracks):
            self._live = tuple(self.tracks)
        self._undecided.append(_OpenFrame(frame_idx, elapsed_s, self._live))
        seen = {i: track.latest for i, track in self.tracks.items()}
        self._latest = _shown(frame_idx, elapsed_s, seen)
        return self._settle(decided)

    def look_ahead(self, frames: Sequence[UInt8Array]) -> None:
        """Encode the next frames in one batch, as `TrackingSession.look_ahead`."""
        self._check_open()
        if not self.object_ids and not self._pending:
            return  # Where nothing is tracked no picture is looked at.
        if any(frame is known for frame in frames[:1] for known, _ in self._ahead):
            return  # A batch is worth it when all that was known is used up.
        new = frames[: self._engine.max_batch]
        for frame in new:
            self._check_frame(frame)
        features = self._engine.encode([self._pixels(frame) for frame in new])
        self._ahead = list(zip(new, features, strict=True))

    def _pixels(self, frame: UInt8Array) -> torch.Tensor:
        network = self._engine.network
        return to_pixels(frame, network.image_size, self._resize, network.device, self._levels)

    def _taken_from_ahead(self, frame: UInt8Array) -> Features | None:
        """Return what is known of a frame, and forget it and whatever should have come before."""
        for place, (known, features) in enumerate(self._ahead):
            if known is frame:
                del self._ahead[: place + 1]
                return features
        self._ahead.clear()
        return None

    def _frame_prompts(self, prompts: Sequence[SessionPrompt]) -> dict[int, FramePrompt]:
        """Return what is prompted of each object, in pixels of the model's picture.

        A mask says all there is to say; of several boxes the last one counts.
        """
        by_object: dict[int, list[SessionPrompt]] = {}
        for prompt in prompts:
            by_object.setdefault(prompt.object_id, []).append(prompt)
        return {i: self._combined(of_object) for i, of_object in sorted(by_object.items())}

    def _combined(self, prompts: Sequence[SessionPrompt]) -> FramePrompt:
        box, mask = None, None
        points = [np.zeros((0, 2))]
        labels = [np.zeros(0, np.int32)]
        for prompt in prompts:
            if prompt.mask is not None:
                mask = prompt.mask
            elif prompt.box_xyxy is not None:
                box = prompt.box_xyxy
            else:
                assert prompt.points_xy is not None
                assert prompt.point_labels is not None
                points.append(prompt.points_xy)
                labels.append(prompt.point_labels.astype(np.int32))
        if box is not None:
            points.insert(0, box.reshape(2, 2))
            labels.insert(0, np.array([2, 3], np.int32))
        # In float32 and in this order, as the originals compute it.
        image_size = np.float32(self._engine.network.image_size)
        size = np.array([self.width, self.height], np.float32)
        scaled = np.concatenate(points).astype(np.float32) / size * image_size
        return FramePrompt(
            points_xy=scaled,
            labels=np.concatenate(labels),
            box_xyxy=None if box is None else scaled[:2].astype(np.float64).reshape(4),
            mask=mask,
        )

    # -- what comes out ----------------------------------------------------------------------

    def _settle(self, decided: Mapping[int, Decided]) -> list[TrackingFrame]:
        """Take in what was decided and return the frames that are final."""
        first = self._first_undecided
        for object_id, frames in decided.items():
            for step, sighting in frames:
                self._undecided[step - first].decide(object_id, sighting)
        final = []
        while self._undecided and self._undecided[0].is_final:
            final.append(self._final(self._undecided.popleft()))
        first = self._first_undecided
        for frames in decided.values():
            for step, _ in frames:
                if step >= first:
                    self._store(self._undecided[step - first])
        return final

    @property
    def _first_undecided(self) -> int:
        """When the oldest undecided frame was stepped."""
        return self.num_steps - len(self._undecided)

    def _store(self, frame: _OpenFrame) -> None:
        """Put the masks of a frame that others still wait for into the spool."""
        for object_id, sighting in (frame.decided or {}).items():
            if isinstance(sighting, Sighting):
                mask = sighting.mask
                kept = None if mask is None else self._spool.put(mask.counts)
                waiting = _Waiting(sighting.confidence, sighting.is_hidden, kept)
                frame.decide(object_id, waiting)

    def _sighting(self, confidence: float, is_hidden: bool, counts: bytes | None) -> Sighting:
        mask = None if counts is None else LazyMask(self.height, self.width, counts=counts)
        return Sighting(confidence, mask, is_hidden)

    def _counts(self, waiting: _Waiting) -> bytes | None:
        return None if waiting.kept is None else self._spool.get(waiting.kept)

    def _final(self, frame: _OpenFrame) -> TrackingFrame:
        """Return a frame that all is known of."""
        seen = {}
        for object_id, sighting in (frame.decided or {}).items():
            if isinstance(sighting, Sighting):
                seen[object_id] = sighting
                continue
            counts = self._counts(sighting)
            seen[object_id] = self._sighting(sighting.confidence, sighting.is_hidden, counts)
            if sighting.kept is not None:
                self._spool.drop(sighting.kept)
        return _shown(frame.label, frame.elapsed_s, seen)

    def _is_idle(self) -> bool:
        return not self._undecided

    def _flush(self) -> list[TrackingFrame]:
        return self._settle({i: track.finish() for i, track in self.tracks.items()})

    def _forget(self, object_id: int) -> None:
        track = self.tracks.pop(object_id, None)
        if track is None or not self._undecided:
            return
        # It was there on the frames before: they are decided for its best hypothesis.
        first = self._first_undecided
        for step, sighting in track.finish():
            self._undecided[step - first].decide(object_id, sighting)
            self._store(self._undecided[step - first])

    def close(self) -> None:
        """Free the session's memory; it cannot be used afterwards."""
        self._undecided.clear()
        self._ahead.clear()
        super().close()
        self.tracks.clear()
        self._spool.close()

    # -- snapshots ---------------------------------------------------------------------------

    def _get_state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays, plain = archive.pack(
            {
                "tracks": {str(i): track.get_state() for i, track in self.tracks.items()},
                "open": [
                    [
                        frame.label,
                        frame.elapsed_s,
                        list(frame.live),
                        {
                            str(i): [waiting.confidence, waiting.is_hidden, self._counts(waiting)]
                            for i, waiting in (frame.decided or {}).items()
                            if isinstance(waiting, _Waiting)  # as all are between steps
                        },
                    ]
                    for frame in self._undecided
                ],
            }
        )
        return arrays, {"engine": plain}

    def _set_state(self, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
        state = archive.unpack(arrays, header["engine"], self._engine.network.device)
        self.tracks = {}
        for object_id, of_object in state["tracks"].items():
            self.tracks[int(object_id)] = self._make_track(self._clock, self._spool)
            self.tracks[int(object_id)].set_state(of_object)
        self._undecided.clear()
        for label, elapsed_s, live, decided in state["open"]:
            frame = _OpenFrame(label, elapsed_s, tuple(live))
            for object_id, values in decided.items():
                frame.decide(int(object_id), self._sighting(*values))
            self._store(frame)
            self._undecided.append(frame)

    def _fingerprint(self) -> str:
        return self._digest


def _shown(label: int, elapsed_s: float, seen: Mapping[int, Sighting]) -> TrackingFrame:
    """Return a frame as the user sees it."""
    masks = [
        TrackingMask(sighting.mask, sighting.confidence, object_id)
        for object_id, sighting in sorted(seen.items())
        if sighting.mask is not None
    ]
    occlusions = {i: one.mask is None or one.is_hidden for i, one in sorted(seen.items())}
    return TrackingFrame(label, masks, occlusions, elapsed_s)


class EngineLoader(TrackingModelLoader):
    """A tracker on a SAM 2 network.

    Parameters
    ----------
    config : TrackingConfig
        ``checkpoint_path`` is the local file, an official ``.pt`` or the same tensors as
        ``.safetensors``; without it the official file name of the size in ``cache_dir``.
        ``image_size`` is a multiple of `image_size_step`; the official checkpoints know
        `full_image_size`. ``dtype`` is
        ``float32`` (on a CPU the default) or ``bfloat16`` (on a GPU).

    Raises
    ------
    ValueError
        An option is unknown or out of range, or the image size or dtype cannot be had.
    """

    family: ClassVar[str]
    """Registered name, without a size."""
    allowed: ClassVar[Mapping[str, Any]]
    """Options and their defaults."""
    full_image_size: ClassVar[int] = MODEL_IMAGE_SIZE
    """Side of the picture that the official checkpoints were trained with."""
    image_size_step: ClassVar[int] = IMAGE_SIZE_STEP
    """Sides of the picture are multiples of this."""
    levels: ClassVar[Levels] = IMAGENET
    """What pictures are normalised by."""
    is_early_fork: ClassVar[bool] = False
    """Whether the original is a program on the first releases of ``sam2``, whose attention rounds
    differently on a CPU; reproduced for ``compat="original"``."""
    _bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    _dtype = ""

    def __init__(self, config: TrackingConfig) -> None:
        super().__init__(config)
        self.options: dict[str, Any] = check_options(self.family, config.options, self.allowed)
        bounds = {"fill_hole_area": (0, float("inf"))} | dict(self._bounds)
        for name, (least, most) in bounds.items():
            # Written this way round, NaN is refused too.
            if name in self.options and not least <= self.options[name] <= most:
                limits = f"at least {least}" if most == float("inf") else f"in {least}..{most}"
                raise ValueError(
                    f"option {name} of tracker {self.family} must be {limits}, got "
                    f"{self.options[name]}"
                )
        if self.options["compat"] not in _COMPAT:
            raise ValueError(
                f"option compat of tracker {self.family} must be one of {', '.join(_COMPAT)}, got "
                f"{self.options['compat']!r}"
            )
        limit = self.options["max_cond_frames_in_attn"]
        if limit != -1 and limit < 1:
            raise ValueError(
                f"option max_cond_frames_in_attn of tracker {self.family} must be -1 for all, or "
                f"at least 1, got {limit}"
            )
        size, step = config.image_size, self.image_size_step
        if size is not None and (size < 2 * step or size % step):
            raise ValueError(
                f"the image size of tracker {self.family} must be a multiple of {step} from "
                f"{2 * step} on, got {size}"
            )
        if config.dtype not in (None, *_DTYPES):
            raise ValueError(
                f"tracker {self.family} computes in {' or '.join(_DTYPES)}, not in {config.dtype}"
            )
        self.fingerprint = ""
        """Digest of the weights and of every setting that changes masks; empty before `load`."""
        # Rounding, too, is the original's where its faults are: these random differences grow.
        self.savings = Savings(
            values=not self.is_faithful,
            attention=not self.is_faithful,
            keys=self.options["cache_keys"],
            products=self.options["fast_float32"] or config.dtype == "bfloat16",
        )
        """Exact savings to use from `load` on; changed for a comparison only."""
        self._engine: Engine | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has run."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine on the loaded network.

        Raises
        ------
        RuntimeError
            Nothing is loaded.
        """
        self._check_loaded()
        assert self._engine is not None
        return self._engine

    @property
    def can_track(self) -> bool:
        """Whether the loaded checkpoint has a memory; one without can segment frames only."""
        return self._engine is None or self._engine.network.info.has_memory

    @property
    def dtype(self) -> str:
        """Number format of the loaded network: as configured, else what suits the device."""
        return self._dtype

    def load(self) -> None:
        """Load the weights.

        Raises
        ------
        RuntimeError
            The weights are missing, truncated, of another size or another network's, or the
            package that they need or the device is not there.
        """
        import torch

        from workers.engine.adapter import Sam2Network
        from workers.weights import file_sha256

        device = _device(self.config.device)
        path = self._checkpoint()
        image_size = self.config.image_size or self.full_image_size
        dtype = self.config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self._dtype = dtype
        size = self.config.model_id.partition(":")[2] or None
        modules, info = self._load_network(path, image_size, size)
        self._adapt_options(info.size)
        settings = {
            "algorithm": ALGORITHM,
            "tracker": self.family,
            "sha256": file_sha256(path),
            "image_size": image_size,
            "dtype": dtype,
            "options": self.options,
        }
        text = json.dumps(settings, sort_keys=True)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._engine = Engine(
            Sam2Network(
                modules,
                info,
                device,
                self.savings,
                getattr(torch, dtype),
                plain_attention=self.is_early_fork and self.is_faithful,
            ),
            fill_hole_area=self.options["fill_hole_area"],
            keep_prompted_masks=not self.is_faithful,
        )

    def unload(self) -> None:
        """Free the weights."""
        self._engine = None

    @property
    def num_ahead(self) -> int:
        """Frames that are worth naming ahead: a GPU encodes several at once, a CPU does not."""
        return self.engine.max_batch if self.engine.max_batch > 1 else 0

    def _step_many(
        self, begun: Sequence[tuple[TrackingSession, UInt8Array, int, list[SessionPrompt]]]
    ) -> list[list[TrackingFrame]]:
        start = time.perf_counter()
        works: list[FrameWork | None] = []
        for session, frame, _, prompts in begun:
            assert isinstance(session, EngineSession)
            works.append(session.prepare(frame, prompts))
        decided = iter(self.engine.step([work for work in works if work is not None]))
        elapsed_s = (time.perf_counter() - start) / len(begun)
        results = []
        for (session, _, label, _), work in zip(begun, works, strict=True):
            assert isinstance(session, EngineSession)
            results.append(
                session.conclude(label, {} if work is None else next(decided), elapsed_s)
            )
        return results

    @property
    def is_faithful(self) -> bool:
        """Whether the original's faults are reproduced."""
        return bool(self.options["compat"] == "original")

    def track(
        self,
        frames: Sequence[Image.Image],
        initial_masks: Sequence[Any],
        object_ids: Sequence[int],
    ) -> TrackingResult:
        """Track objects from their masks on the first frame, as `TrackingModelLoader.track`.

        Raises
        ------
        RuntimeError
            The checkpoint can segment frames, not track.
        """
        if not self.can_track:
            raise RuntimeError(
                "this checkpoint can segment frames, not track: it has no memory; give a complete "
                "checkpoint, or prompt every frame"
            )
        return super().track(frames, initial_masks, object_ids)

    # -- what a family says ------------------------------------------------------------------

    def _load_network(
        self, path: str, image_size: int, size: str | None
    ) -> tuple[Any, CheckpointInfo]:
        """Return the network of a checkpoint; see `load_network`."""
        return load_network(path, image_size, size=size)

    def _checkpoint_name(self, size: str) -> str:
        """Return the official file name of the weights of a size."""
        return checkpoint_name(size)

    def _make_track(self, clock: Clock, spool: Spool) -> Track:
        """Return the track of a new object."""
        raise NotImplementedError

    def _clock(self, num_frames: int | None) -> Clock:
        return Clock(num_frames)

    @property
    def _resize(self) -> Resize:
        return "bicubic"

    def _adapt_options(self, size: str) -> None:
        """Set the defaults that depend on the size of the network."""

    # -- private -----------------------------------------------------------------------------

    def _open(self, height: int, width: int, num_frames: int | None) -> TrackingSession:
        def make_track(clock: Clock, spool: Spool) -> Track:
            if not self.can_track:
                return FrameTrack(self.options, clock)
            return self._make_track(clock, spool)

        return EngineSession(
            height,
            width,
            num_frames=num_frames,
            engine=self.engine,
            make_track=make_track,
            clock=self._clock(num_frames),
            # Single frames are the image predictor's business.
            resize=self._resize if self.can_track else "smooth",
            levels=self.levels,
            fingerprint=self.fingerprint,
        )

    def _checkpoint(self) -> str:
        """Return the path of the weights."""
        config = self.config
        if config.checkpoint_path is not None:
            return config.checkpoint_path
        name = self._checkpoint_name(config.model_id.partition(":")[2] or "tiny")
        if config.cache_dir is not None:
            return str(Path(config.cache_dir) / name)
        raise RuntimeError(
            f"tracker {config.model_id} needs its weights, which are not downloaded for you: give "
            f"the checkpoint {name}"
        )


class SAM2Loader(EngineLoader):
    """SAM 2 and 2.1 as published; the version is the checkpoint's. Options: `OPTIONS`."""

    family: ClassVar[str] = "sam2"
    allowed: ClassVar[Mapping[str, Any]] = OPTIONS

    def _make_track(self, clock: Clock, spool: Spool) -> Track:
        return Sam2Track(self.options, clock)


def checkpoint_name(size: str) -> str:
    """Return the official file name of the SAM 2.1 weights of a size."""
    return f"sam2.1_hiera_{size.replace('-', '_')}.pt"


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RuntimeError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device {name} is not there: use cpu, or a machine with a GPU")
    return device
