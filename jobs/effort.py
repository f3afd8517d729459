"""How fast a worker will probably be: from the arithmetic of a network, never a measurement.

A frame costs a SAM network what its image encoder takes, whatever is tracked, and then as much
again for every object. Both are counted operations (multiply and add are two) of the published
networks at 1024 pixels in the steady state; savings of the engine are not subtracted. How many of
them a device gets through in a second is assumed, and said with every estimate.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from jobs.config import PoolConfig, RunConfig
from workers.messages import PromptMode
from workers.trackers.registry import tracker_info

ENCODER_GFLOP = {"tiny": 292.0, "small": 360.0, "base-plus": 647.0, "large": 1823.0}
"""Of the image encoder, by size of the network."""
ATTENTION_GFLOP = 551.0
"""Of attention between pixels, per object; it grows with the square of the number of pixels."""
PIXELWISE_GFLOP = 54.0
"""Of the rest of memory attention, per object."""
HEADS_GFLOP = 15.2
"""Of mask decoder and memory encoder, per object; all that a prompted frame costs."""
FULL_IMAGE_SIZE = 1024
"""Side of the picture that the counts are of."""
SAM3_ENCODER_GFLOP = 5613.0
"""Of the image encoder of SAM 3 at 1008 pixels."""
SAM3_IMAGE_SIZE = 1008
SAM3_PIXELS = 16 / 14
"""A picture of SAM 3 has the cells of one of SAM 2 whose side is so many times as long."""

GPU_TFLOPS = 80.0
"""A second on a GPU: what Meta's compiled predictor reaches on an A100, after its own figures."""
CPU_TFLOPS_PER_CORE = 0.09
"""A second on a core, float32: what Meta's predictor was measured to reach on a server CPU."""

NOMINAL_FPS = {"flow": 25.0, "yolo": 20.0}
"""Frames per second of one core with the other families of trackers."""
OTHER_FPS = 20.0
DETECTION_S = 0.05
"""Of a core, for each frame that a detector is asked about."""

_SAM3 = "sam3-tracker"
_SAM_FAMILIES = ("sam2", "samurai", "sam2long", "sam2-rt", "sam2video", _SAM3)


@dataclass(frozen=True, slots=True)
class Effort:
    """What one worker is expected to do.

    Attributes
    ----------
    fps : float
        Tracked frames per second.
    basis : str
        What the number rests on, for people.
    """

    fps: float
    basis: str


def encoder_gflop(size: str, image_size: int = FULL_IMAGE_SIZE) -> float:
    """Return the operations of one picture, in GFLOP.

    Parameters
    ----------
    size : str
        ``tiny``, ``small``, ``base-plus`` or ``large``.
    image_size : int
        Side of the model's square picture in pixels.

    Examples
    --------
    >>> encoder_gflop("tiny", 512)
    73.0
    """
    return ENCODER_GFLOP[size] * _pixel_share(image_size)


def object_gflop(image_size: float = FULL_IMAGE_SIZE, *, prompted: bool = False) -> float:
    """Return the operations of one object on one frame, in GFLOP.

    Parameters
    ----------
    image_size : float
        Side of the model's square picture in pixels.
    prompted : bool
        A frame on which the object is prompted attends to no memory.

    Examples
    --------
    >>> round(object_gflop())
    620
    >>> round(object_gflop(512))
    52
    """
    share = _pixel_share(image_size)
    if prompted:
        return HEADS_GFLOP * share
    return ATTENTION_GFLOP * share**2 + (PIXELWISE_GFLOP + HEADS_GFLOP) * share


def estimate(config: RunConfig, num_objects: float | None = None) -> Effort:
    """Return how fast a worker of a run is expected to be.

    Parameters
    ----------
    config : RunConfig
        The run.
    num_objects : float, optional
        Objects in a video, on average; one is assumed when nobody knows.

    Returns
    -------
    Effort
        Frames per second, and what was assumed.
    """
    name, _, size = tracker_info(config.tracker.name).name.partition(":")
    if name not in _SAM_FAMILIES:
        fps = next((n for family, n in NOMINAL_FPS.items() if name.startswith(family)), OTHER_FPS)
        seconds = 1 / fps + _detection_s(config)
        return Effort(1 / seconds, f"{name}: {fps:g} frames/s of one core")
    objects = 1.0 if num_objects is None else num_objects
    prompted = config.prompts.mode is PromptMode.EVERY_FRAME
    if name == _SAM3:
        model, image_size = name, config.tracker.image_size or SAM3_IMAGE_SIZE
        picture = SAM3_ENCODER_GFLOP * (image_size / SAM3_IMAGE_SIZE) ** 2
        of_object = object_gflop(image_size * SAM3_PIXELS, prompted=prompted)
    else:
        size = size or _size_of_checkpoint(config.tracker.checkpoint)
        model, image_size = f"{name} {size}", config.tracker.image_size or FULL_IMAGE_SIZE
        picture = encoder_gflop(size, image_size)
        of_object = object_gflop(image_size, prompted=prompted)
    on_gpu = runs_on_gpu(config)
    pool = config.pool
    if on_gpu:
        share = pool.gpus_per_worker if isinstance(pool.gpus_per_worker, (int, float)) else 1.0
        tflops = GPU_TFLOPS * min(1.0, share or 1.0)
        device = "a GPU"
    else:
        num_cores = max(1, int(pool.cpus_per_worker))
        tflops = CPU_TFLOPS_PER_CORE * num_cores
        device = "one core" if num_cores == 1 else f"{num_cores} cores"
    seconds = (picture + objects * of_object) / tflops / 1e3
    if not on_gpu:
        seconds += _detection_s(config)
    told = f"{objects:.2g} object{'' if objects == 1 else 's'} in a video"
    if num_objects is None:
        told += " (--objects)"
    basis = (
        f"{model} at {image_size} pixels, {told}: {picture:.0f} GFLOP a frame and "
        f"{of_object:.0f} an object, {tflops:g} TFLOP/s of {device}"
    )
    if name == "sam2long":
        basis += "; an object whose hypotheses disagree costs up to three times as much"
    return Effort(1 / seconds, basis)


def runs_on_gpu(config: RunConfig) -> bool:
    """Return whether workers will probably have a GPU.

    The configuration may say so. Otherwise this machine's driver tells of a run here, and a
    cluster is believed to have them.
    """
    device, asked = config.tracker.device, config.pool.gpus_per_worker
    if device == "cpu" or asked == 0:
        return False
    if device != "auto" or asked is not None:
        return True
    return _is_on_cluster(config.pool) or shutil.which("nvidia-smi") is not None


def _is_on_cluster(pool: PoolConfig) -> bool:
    address = pool.ray_address or os.environ.get("RAY_ADDRESS", "")
    return address not in ("", "local")


def _detection_s(config: RunConfig) -> float:
    """Return the time that detections take, per tracked frame."""
    prompts = config.prompts
    if prompts.detector is None or prompts.mode is PromptMode.FIRST_FRAME:
        return 0.0
    period = 1 if prompts.mode is PromptMode.EVERY_FRAME else prompts.interval
    return DETECTION_S / period


def _size_of_checkpoint(checkpoint: str | None) -> str:
    """Return the size that the official name of a checkpoint tells; tiny where it tells none."""
    plain = (checkpoint or "").lower().replace("_", "-")
    return next((size for size in ENCODER_GFLOP if size in plain), "tiny")


def _pixel_share(image_size: float) -> float:
    return (image_size / FULL_IMAGE_SIZE) ** 2
