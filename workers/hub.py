"""Weights from the Hugging Face hub: which file an id means, and that file on this node.

The library ``huggingface_hub`` keeps its own cache on the node (``HF_HOME``), where other programs
may have put the same file; ten workers that start together download once. ``HF_ENDPOINT``,
``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are respected. Nothing but the named files is ever fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from workers.errors import ConfigError, StoreDenied, StoreUnavailable, how_to_install

TRANSFORMERS_FILE = "model.safetensors"
"""The weights in a checkpoint of transformers; ``config.json`` is beside it."""
CHECKPOINT_FILES = {
    f"facebook/sam{version}-hiera-{size}": f"sam{version}_hiera_{size.replace('-', '_')}.pt"
    for version in ("2.1", "2")
    for size in ("tiny", "small", "base-plus", "large")
}
"""The checkpoint in Meta's layout that an id offers."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILE_SUFFIXES = (".pt", ".pth", ".safetensors", ".onnx", ".bin", ".ckpt")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(text: str) -> bool:
    """Return whether a checkpoint is named by an id of the hub: ``ORG/NAME[@REVISION]``.

    A file or folder of that name here, a URL, and what ends like a file are none.

    Examples
    --------
    >>> is_hub_id("facebook/sam2.1-hiera-tiny@main"), is_hub_id("weights/a.pt")
    (True, False)
    """
    if not _ID.fullmatch(text) or text.endswith(_FILE_SUFFIXES):
        return False
    return not Path(text).exists()


def fetch_from_hub(hub_id: str, file_name: str = "") -> tuple[Path, str | None]:
    """Bring the weights of a hub id to this node.

    Parameters
    ----------
    hub_id : str
        ``ORG/NAME``, or ``ORG/NAME@REVISION`` for a branch, tag or commit.
    file_name : str
        The file that is wanted; `TRANSFORMERS_FILE` brings the configuration beside it. Any other
        name means the checkpoint in Meta's layout, which is looked up by the id.

    Returns
    -------
    path : Path
        The file, in the library's cache.
    sha256 : str or None
        The digest that the hub knows it by; None where it tells none.

    Raises
    ------
    ConfigError
        There is no such id, revision or file, or the library is not installed.
    StoreError
        The hub cannot be reached, or refuses the token.
    """
    repository, _, revision = hub_id.partition("@")
    if file_name != TRANSFORMERS_FILE:
        if repository not in CHECKPOINT_FILES:
            raise ConfigError(
                f"which file of {hub_id} is the checkpoint is not known (and there is no such file "
                f"or folder here): give its URL, hf://{repository}/FILE.pt, or one of the ids "
                f"{', '.join(CHECKPOINT_FILES)}"
            )
        file_name = CHECKPOINT_FILES[repository]
    path = _download(hub_id, repository, file_name, revision or None)
    if file_name == TRANSFORMERS_FILE:
        # Of the very same commit, which is the name of the folder.
        _download(hub_id, repository, "config.json", path.parent.name)
    # The cache names large files by the hub's digest of their content.
    digest = path.resolve().name
    return path, digest if _SHA256.fullmatch(digest) else None


def _download(hub_id: str, repository: str, file_name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import constants, errors, hf_hub_download
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError as error:
        raise ConfigError(
            f"weights of the hub need the library huggingface_hub: {how_to_install('transformers')}"
        ) from error
    disable_progress_bars()
    logging.set_verbosity_error()  # its remarks on every retry; what comes of them is told below
    try:
        return Path(
            hf_hub_download(
                repository,
                file_name,
                revision=revision,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
                library_name="maskmill",
            )
        )
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and they are not in this node's cache"
        elif isinstance(error.__cause__, errors.HfHubHTTPError):
            reason = _answer(error.__cause__)
        else:
            reason = "the hub cannot be reached from here"
        raise StoreUnavailable(_elsewhere(hub_id, file_name, reason)) from error
    except errors.GatedRepoError as error:
        raise StoreDenied(
            f"the hub wants terms accepted for {repository}: accept them on its page, and set "
            f"HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"the hub has no model {repository}, or shows it to its members only (and there is no "
            f"such file or folder here): mind the spelling, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{repository} has no revision {revision}: give a branch, a tag or a commit of it"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ConfigError(
            f"{hub_id} has no file {file_name}: choose a tracker that fits its layout, sam2video "
            f"or sam3-tracker for {TRANSFORMERS_FILE}, the others for Meta's .pt"
        ) from error
    except errors.HfHubHTTPError as error:
        reason = _answer(error)
        raise StoreUnavailable(_elsewhere(hub_id, file_name, reason)) from error
    except OSError as error:
        reason = f"the download failed ({error.strerror or error})"
        raise StoreUnavailable(_elsewhere(hub_id, file_name, reason)) from error


def _answer(error: Exception) -> str:
    return f"the hub answered {' '.join(str(error).split())[:120]}"


def _elsewhere(hub_id: str, file_name: str, reason: str) -> str:
    what = hub_id
    if file_name not in CHECKPOINT_FILES.values():
        what += f" --for {'sam3-tracker' if 'sam3' in hub_id.lower() else 'sam2video'}"
    return (
        f"the weights {hub_id} cannot be had, since {reason}: where the hub can be reached, run "
        f"maskmill models pull {what} --to URI, then give what it prints as --checkpoint"
    )
