"""`maskmill models pull`: the weights of a tracker, brought here or to a folder or bucket."""

from __future__ import annotations

from pathlib import Path

from workers.errors import ConfigError
from workers.hub import TRANSFORMERS_FILE, is_hub_id
from workers.messages import StoreOptions
from workers.trackers.registry import TrackerInfo, tracker_info
from workers.weights import copy_weights, fetch_weights


def pull_weights(
    name: str, to: str | None, options: StoreOptions, *, tracker: str | None = None
) -> list[str]:
    """Fetch weights, and copy them if asked to.

    Parameters
    ----------
    name : str
        A tracker, with its size or as the id of a model; an id of the hub; a URL or a path.
    to : str or None
        Folder or bucket that gets them; None only brings them to this machine.
    options : StoreOptions
        How to reach the stores.
    tracker : str, optional
        Which tracker they are for: ids of the hub may offer several layouts.

    Returns
    -------
    list of str
        What happened, and what to give as ``--checkpoint``.

    Raises
    ------
    ConfigError
        The name is unknown, its weights are not on the hub or damaged.
    StoreError
        A store or the hub is unreachable, denies access, or is full.
    """
    source, file_name, info = _source(name, tracker)
    licence = f"licence {info.licence}" if info else "mind their licence"
    if to is None:
        found = fetch_weights(source, options, file_name=file_name)
        size_bytes = found.path.stat().st_size
        where, digest = str(found.path), found.sha256
    else:
        copy = copy_weights(source, to, options, file_name=file_name)
        where, digest, size_bytes = copy.uri, copy.sha256, copy.size_bytes
    return [
        f"{source}: {size_bytes / 1e6:,.1f} MB, sha256 {digest}, {licence}",
        f"--checkpoint {where}",
    ]


def _source(name: str, tracker: str | None) -> tuple[str, str, TrackerInfo | None]:
    """Return where weights come from, which file is meant, and whose they are."""
    try:
        is_path = "://" in name or (not _is_tracker(name) and Path(name).expanduser().exists())
        if is_path or (tracker and is_hub_id(name)):
            info = tracker_info(tracker) if tracker else None
            return name, info.weights if info else TRANSFORMERS_FILE, info
        info = tracker_info(name)
    except ValueError as error:
        if is_hub_id(name) and not tracker:
            # Ids that are no tracker's: of checkpoints that others have trained.
            return name, TRANSFORMERS_FILE, None
        raise ConfigError(f"{error}; or give an id of the hub, a URL or a path") from error
    if not info.weights:
        raise ConfigError(f"tracker {info.name} needs no weights: there is nothing to pull")
    if not info.hub_id:
        raise ConfigError(
            f"the weights {info.weights} of tracker {info.name} are not on the hub: give their URL "
            f"or path"
        )
    return info.hub_id, info.weights, info


def _is_tracker(name: str) -> bool:
    """Whether a word is the name of a tracker, also where a file or folder is called like it."""
    try:
        tracker_info(name)
    except ValueError:
        return False
    return "/" not in name
