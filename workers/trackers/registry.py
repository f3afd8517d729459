"""Which trackers there are: names, what they need, and how one is made from a configuration.

The table is a literal, so that reading it tells the whole story; the module of a tracker is only
imported when one is made, so that listing them costs nothing and needs none of their packages.
"""

from __future__ import annotations

import difflib
import importlib
import re
from dataclasses import dataclass, replace

from workers.trackers.base import TrackingConfig, TrackingModelLoader


@dataclass(frozen=True, slots=True)
class TrackerInfo:
    """What a person wants to know before choosing a tracker.

    Attributes
    ----------
    name : str
        The name to choose it by.
    description : str
        One sentence.
    weights : str
        File name of the weights it needs; empty for none.
    licence : str
        SPDX identifier of the licence of tracker and weights.
    sizes : tuple of str
        What may follow the name after a colon; empty for a tracker of one size.
    aliases : tuple of str
        Other names of the same.
    hub_id : str
        Where the weights are on the Hugging Face hub, ``ORG/NAME`` or ``ORG/NAME@REVISION``;
        empty where they are not.
    """

    name: str
    description: str
    weights: str
    licence: str
    sizes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    hub_id: str = ""


_YOLO_SIZES = ("n", "s", "m", "l", "x")
_YOLO_NAME = re.compile(r"yolo(?P<family>v8|11|26)(?P<size>[nsmlx]?)seg")

_SAM2_SIZES = ("tiny", "small", "base-plus", "large")
_SAM2_HUB_ID = "facebook/sam2.1-hiera-tiny"
_SAM3_HUB_ID = "facebook/sam3"

_MODEL_IDS = {
    "facebook/sam2.1-hiera-": ("sam2", "sam2.1_hiera_tiny.pt", _SAM2_HUB_ID),
    "facebook/sam2-hiera-": ("sam2", "sam2_hiera_tiny.pt", "facebook/sam2-hiera-tiny"),
    "Gy920/sam2-1-hiera-": ("sam2-rt", "sam2.1_hiera_tiny.pt", _SAM2_HUB_ID),
    "sam2video/": ("sam2video", "model.safetensors", _SAM2_HUB_ID),
    _SAM3_HUB_ID: ("sam3-tracker", "model.safetensors", _SAM3_HUB_ID),
}
"""How ids of models begin that are known elsewhere; a size follows where there are sizes. For each
the tracker, its weights, and where they are on the hub (of Gy920's ids the weights are Meta's)."""

_LOADERS: dict[str, tuple[str, str]] = {
    "flow": ("workers.trackers.flow", "FlowLoader"),
    "yolo11n-seg": ("workers.trackers.yolo", "YOLO11SegLoader"),
    "yolov8n-seg": ("workers.trackers.yolo", "YOLO11SegLoader"),
    "yolo26n-seg": ("workers.trackers.yolo", "YOLO11SegLoader"),
    "sam2": ("workers.trackers.sam2", "SAM2Loader"),
    "samurai": ("workers.trackers.samurai", "SAMURAILoader"),
    "sam2long": ("workers.trackers.sam2long", "SAM2LongLoader"),
    "sam2-rt": ("workers.trackers.sam2_rt", "SAM2RealtimeLoader"),
    "sam2video": ("workers.trackers.sam2video", "SAM2VideoLoader"),
    "sam3-tracker": ("workers.trackers.sam3_tracker", "SAM3TrackerLoader"),
    "fake": ("workers.trackers.fake", "FakeLoader"),
}

TRACKERS: tuple[TrackerInfo, ...] = (
    TrackerInfo(
        name="flow",
        description="Masks carried by dense optical flow, corrected by a model of appearance and "
        "motion learned from the prompt; CPU only.",
        weights="",
        licence="Apache-2.0",
    ),
    TrackerInfo(
        name="yolo11n-seg",
        description="YOLO11 instance segmentation of every frame, identities by mask overlap.",
        weights="yolo11n-seg.pt",
        licence="AGPL-3.0",
        sizes=_YOLO_SIZES,
        aliases=("yolo11seg",),
    ),
    TrackerInfo(
        name="yolov8n-seg",
        description="YOLOv8 instance segmentation of every frame, identities by mask overlap.",
        weights="yolov8n-seg.pt",
        licence="AGPL-3.0",
        sizes=_YOLO_SIZES,
        aliases=("yolov8seg",),
    ),
    TrackerInfo(
        name="yolo26n-seg",
        description="YOLO26 instance segmentation of every frame, identities by mask overlap.",
        weights="yolo26n-seg.pt",
        licence="AGPL-3.0",
        sizes=_YOLO_SIZES,
        aliases=("yolo26seg",),
    ),
    TrackerInfo(
        name="sam2",
        description="SAM 2.1 (or 2.0) as published: the best mask, the memory of the last frames.",
        weights="sam2.1_hiera_tiny.pt",
        licence="Apache-2.0",
        sizes=_SAM2_SIZES,
        aliases=("sam2.1",),
        hub_id=_SAM2_HUB_ID,
    ),
    TrackerInfo(
        name="samurai",
        description="SAM 2.1 with a motion model that helps to choose the mask, and a memory of "
        "good frames only.",
        weights="sam2.1_hiera_tiny.pt",
        licence="Apache-2.0",
        sizes=_SAM2_SIZES,
        hub_id=_SAM2_HUB_ID,
    ),
    TrackerInfo(
        name="sam2long",
        description="SAM 2.1 that follows several hypotheses per object and decides late: for long "
        "videos with occlusions.",
        weights="sam2.1_hiera_tiny.pt",
        licence="Apache-2.0",
        sizes=_SAM2_SIZES,
        aliases=("sam2-long",),
        hub_id=_SAM2_HUB_ID,
    ),
    TrackerInfo(
        name="sam2-rt",
        description="SAM 2.1 for cameras: objects are prompted, added and removed while it runs.",
        weights="sam2.1_hiera_tiny.pt",
        licence="Apache-2.0",
        sizes=_SAM2_SIZES,
        hub_id=_SAM2_HUB_ID,
    ),
    TrackerInfo(
        name="sam2video",
        description="The same as sam2 on the modules of the library transformers, for weights in "
        "its layout.",
        weights="model.safetensors",
        licence="Apache-2.0",
        sizes=_SAM2_SIZES,
        hub_id=_SAM2_HUB_ID,
    ),
    TrackerInfo(
        name="sam3-tracker",
        description="The tracker inside SAM 3, prompted as SAM 2.1 is (not by words), on the "
        "modules of transformers.",
        weights="model.safetensors",
        licence="LicenseRef-SAM",
        hub_id=_SAM3_HUB_ID,
    ),
    TrackerInfo(
        name="fake",
        description="Moves each prompted shape evenly, without looking at the pictures: for tests "
        "of a cluster or a store.",
        weights="",
        licence="Apache-2.0",
    ),
)
"""Every tracker, in the order in which they are listed."""


def tracker_info(name: str) -> TrackerInfo:
    """Return what is known of a tracker, with the weights of the chosen size.

    Parameters
    ----------
    name : str
        Registered name or alias, with an optional ``:SIZE``; case, ``_`` and ``-`` do not matter.
        Or the id of a model, such as ``facebook/sam2.1-hiera-tiny``, ``Gy920/sam2-1-hiera-tiny``,
        ``sam2video/small`` or ``facebook/sam3``; with ``@REVISION``, that revision of the weights
        on the hub.

    Returns
    -------
    TrackerInfo
        Under its canonical name: ``yolo11s-seg`` for ``YOLO11_seg:s``.

    Raises
    ------
    ValueError
        There is no such tracker or no such size; the message lists those there are.
    """
    return _resolve(name)[0]


def create_tracking_loader(name: str, config: TrackingConfig) -> TrackingModelLoader:
    """Make the loader of a tracker; nothing is loaded yet.

    Parameters
    ----------
    name : str
        As for `tracker_info`.
    config : TrackingConfig
        How to load it. Its ``model_id`` is replaced by the canonical name.

    Returns
    -------
    TrackingModelLoader
        Call its `load` next.

    Raises
    ------
    ValueError
        There is no such tracker or size, or an option of the configuration is wrong.
    """
    info, registered = _resolve(name)
    module, class_name = _LOADERS[registered]
    loader_class: type[TrackingModelLoader] = getattr(importlib.import_module(module), class_name)
    return loader_class(replace(config, model_id=info.name))


def _resolve(name: str) -> tuple[TrackerInfo, str]:
    """Return what is known of a tracker, and the name it is registered under."""
    if "/" in name:
        return _resolve_model_id(name.strip())
    base, colon, size = name.strip().lower().partition(":")
    key = _plain(base)
    yolo = _YOLO_NAME.fullmatch(key)
    if yolo:
        registered = f"yolo{yolo['family']}n-seg"
        info = _registered(registered)
        if colon and yolo["size"] not in ("", size):
            raise ValueError(
                f"tracker {name!r} names two sizes, {yolo['size']} and {size}: leave one out"
            )
        letter = size or yolo["size"] or "n"
        _check_size(name, letter, info)
        canonical = f"yolo{yolo['family']}{letter}-seg"
        return replace(info, name=canonical, weights=f"{canonical}.pt"), registered
    for info in TRACKERS:
        if key in {_plain(known) for known in (info.name, *info.aliases)}:
            if not colon:
                return info, info.name
            size = size.replace("_", "-")
            _check_size(name, size, info)
            return _of_size(info, size), info.name
    known = [n for info in TRACKERS for n in (info.name, *info.aliases)]
    close = difflib.get_close_matches(base, known, n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}? The" if close else "the"
    raise ValueError(f"there is no tracker {name!r}: {hint} trackers are {', '.join(known)}")


def _resolve_model_id(name: str) -> tuple[TrackerInfo, str]:
    """Return what is known of the tracker of a model's id, and the name it is registered under."""
    model_id, at, revision = name.partition("@")
    for start, (registered, weights, hub_id) in _MODEL_IDS.items():
        if not model_id.lower().startswith(start.lower()):
            continue
        size = model_id[len(start) :].lower()
        info = replace(_registered(registered), weights=weights, hub_id=hub_id)
        if size and not info.sizes:
            continue
        if info.sizes:
            _check_size(name, size, info)
            info = _of_size(info, size)
        return replace(info, hub_id=f"{info.hub_id}{at}{revision}"), registered
    known = ", ".join(
        f"{start}SIZE" if _registered(tracker).sizes else start
        for start, (tracker, _, _) in _MODEL_IDS.items()
    )
    raise ValueError(
        f"there is no tracker {name!r}: the known ids of models are {known}; for other weights "
        f"name a tracker, and give their id as --checkpoint"
    )


def _of_size(info: TrackerInfo, size: str) -> TrackerInfo:
    return replace(
        info,
        name=f"{info.name}:{size}",
        weights=info.weights.replace("tiny", size.replace("-", "_")),
        hub_id=info.hub_id.replace("tiny", size),
    )


def _check_size(name: str, size: str, info: TrackerInfo) -> None:
    if size in info.sizes:
        return
    if not info.sizes:
        raise ValueError(f"tracker {info.name} has no sizes: leave out what follows the colon")
    raise ValueError(f"tracker {name!r} has no such size: its sizes are {', '.join(info.sizes)}")


def _registered(name: str) -> TrackerInfo:
    return next(info for info in TRACKERS if info.name == name)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")
