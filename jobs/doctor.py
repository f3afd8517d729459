"""What this machine and a store can really do, found by looking and by trying.

Nothing here imports a model: GPUs are asked for through their driver's own tool, and torch is
asked in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from workers.errors import ConfigError, MaskmillError, StoreDenied, StoreError
from workers.messages import StoreOptions
from workers.storage import Store, open_store, probe_store
from workers.storage.probing import NUM_RACERS

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_REQUIRED = (
    "av",
    "botocore",
    "fsspec",
    "numpy",
    "pillow",
    "pyarrow",
    "pycocotools",
    "pydantic",
    "ray",
    "scipy",
)
_OPTIONAL = {
    "torch": "trackers with weights need it",
    "ultralytics": "the YOLO trackers and detectors need it; its licence is AGPL-3.0",
}
_CV2_WHEELS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
_DECODERS = {
    "H.264": ("h264",),
    "HEVC": ("hevc",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "libaom-av1"),
    "MJPEG": ("mjpeg",),
    "MPEG-4": ("mpeg4",),
}
_SMALL_SPOOL_BYTES = 5 * 10**9
_TOOL_TIMEOUT_S = 60


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    level : Level
        Whether it is fine.
    subject : str
        What was looked at: ``python``, ``decoders``, a URI.
    message : str
        One sentence; of a fault, what to do.
    exit_code : int
        What the command should end with for this finding alone: 0, 2 or 3.
    """

    level: Level
    subject: str
    message: str
    exit_code: int = 0


def diagnose(uris: Sequence[str] = (), options: StoreOptions | None = None) -> list[Finding]:
    """Look at this machine, and try every store of `uris`.

    Parameters
    ----------
    uris : sequence of str
        Folders or buckets; each is written below ``_probe/`` for a moment.
    options : StoreOptions or None
        How to reach them.

    Returns
    -------
    list of Finding
        In the order in which a reader wants them; nothing is raised for what is found.
    """
    findings = [
        *_packages(),
        *_opencv(),
        _machine(),
        *_gpus(),
        _decoders(),
        _weights(),
        _spool(),
    ]
    for uri in uris:
        findings += check_store(uri, options)
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """Return what the command ends with: a store's fault (3) before this machine's (2).

    Parameters
    ----------
    findings : sequence of Finding
        What `diagnose` returned.

    Returns
    -------
    int
        0, 2 or 3.
    """
    return max((finding.exit_code for finding in findings), default=0)


def check_store(uri: str, options: StoreOptions | None = None) -> list[Finding]:
    """Try one store.

    Parameters
    ----------
    uri : str
        Folder or bucket.
    options : StoreOptions or None
        How to reach it.

    Returns
    -------
    list of Finding
        One ``ok``, or one for each thing that is wrong, with exit code 3 (2 for a wrong URI).
    """
    store = None
    try:
        store = open_store(uri, options)
        report = probe_store(store)
    except StoreDenied as error:
        message = str(error)
        if store is not None and _can_be_listed(store):
            message = (
                f"{store.uri} can be read but not written, so it serves as a corpus and not as an "
                f"output: {error}"
            )
        return [Finding(Level.FAIL, uri, message, error.exit_code)]
    except MaskmillError as error:
        return [Finding(Level.FAIL, uri, str(error), error.exit_code)]
    if not report.problems:
        message = (
            f"{store.uri} is fit for an output: it creates exclusively (one of "
            f"{NUM_RACERS} concurrent writers won), and reads, lists and deletes at once; "
            f"a write took {report.write_s * 1e3:.0f} ms, a read {report.read_s * 1e3:.0f} ms"
        )
        return [Finding(Level.OK, uri, message)]
    serious = not (
        report.create_if_absent
        and report.read_after_write
        and report.list_after_write
        and report.overwrite
    )
    # Without the right to delete a run still works, only `gc` and `compact` do not.
    level, code = (Level.FAIL, StoreError.exit_code) if serious else (Level.WARN, 0)
    return [Finding(level, uri, problem, code) for problem in report.problems]


def _can_be_listed(store: Store) -> bool:
    try:
        next(store.list(), None)
    except MaskmillError:
        return False
    return True


def _packages() -> Iterator[Finding]:
    wanted = _version_ranges()
    versions = []
    for name in _REQUIRED:
        found = _version(name)
        if found is None:
            yield _failure(name, f"{name} is not installed: pip install {name}")
        elif name in wanted and not wanted[name].contains(found, prereleases=True):
            yield _failure(
                name,
                f"{name} {found} does not satisfy {name}{wanted[name]}: "
                f"pip install '{name}{wanted[name]}'",
            )
        else:
            versions.append(f"{name} {found}")
    ours = _version("maskmill") or "not installed as a package"
    yield Finding(
        Level.OK,
        "versions",
        f"maskmill {ours}, Python {platform.python_version()}, {', '.join(versions)}",
    )
    for name, reason in _OPTIONAL.items():
        found = _version(name) or _version(f"{name}-opencv-headless")
        if found is None:
            yield Finding(
                Level.WARN, name, f"{name} is not installed: {reason}; the tracker flow does not"
            )
        else:
            yield Finding(Level.OK, name, f"{name} {found}")


def _version_ranges() -> dict[str, SpecifierSet]:
    """Return the versions that this distribution asks for, by package name."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("maskmill") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    required = [Requirement(line) for line in lines]
    return {r.name.lower(): r.specifier for r in required if r.marker is None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _opencv() -> Iterator[Finding]:
    wheels = [f"{name} {found}" for name in _CV2_WHEELS if (found := _version(name))]
    if len(wheels) > 1:
        yield Finding(
            Level.WARN,
            "opencv",
            f"{' and '.join(wheels)} overwrite each other's files: uninstall all of them and "
            "install opencv-python-headless alone",
        )
    try:
        import cv2
    except ImportError as error:
        yield _failure(
            "opencv",
            f"cv2 cannot be imported ({error}): pip uninstall opencv-python, then pip install "
            "--force-reinstall opencv-python-headless",
        )
    else:
        yield Finding(Level.OK, "opencv", f"OpenCV {cv2.__version__}")


def _machine() -> Finding:
    num_cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(
        Level.OK,
        "machine",
        f"{num_cores} cores, {memory / 1e9:.0f} GB of memory, {platform.platform()}",
    )


def _gpus() -> Iterator[Finding]:
    listing = _run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if listing is None:
        yield Finding(Level.OK, "gpu", "no NVIDIA GPU here: trackers run on the CPU")
        return
    yield Finding(Level.OK, "gpu", "; ".join(listing.splitlines()))
    if _version("torch") is None:
        return
    code = "import torch; print(torch.cuda.is_available(), torch.__version__, torch.version.cuda)"
    answer = _run([sys.executable, "-c", code])
    if answer is None:
        yield _failure("gpu", "torch cannot be imported: pip install --force-reinstall torch")
    elif not answer.startswith("True"):
        _, version, cuda = answer.split()
        yield Finding(
            Level.WARN,
            "gpu",
            f"torch {version} does not see the GPU (it is built for CUDA {cuda}): install a newer "
            "driver, or the torch build that fits the driver",
        )


def _decoders() -> Finding:
    try:
        import av
    except ImportError as error:
        return _failure("decoders", f"PyAV cannot be imported ({error}): pip install av")
    available = av.codec.codecs_available
    missing = [name for name, codecs in _DECODERS.items() if not available & set(codecs)]
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    if missing:
        return Finding(
            Level.WARN,
            "decoders",
            f"PyAV {av.__version__} cannot decode {', '.join(missing)}, so such videos will be "
            "quarantined: pip install --force-reinstall av for a complete wheel",
        )
    return Finding(
        Level.OK,
        "decoders",
        f"PyAV {av.__version__} (libavcodec {ffmpeg}) decodes {', '.join(_DECODERS)}",
    )


def _weights() -> Finding:
    from workers.weights import cache_folder

    folder = cache_folder()
    files = [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".safetensors")]
    if files:
        size = sum(path.stat().st_size for path in files)
        message = f"{folder} holds {len(files)} checkpoints, {size / 1e9:.1f} GB"
    else:
        message = (
            f"{folder} holds no checkpoints: the tracker flow needs none, others take --checkpoint"
        )
    return Finding(Level.OK, "weights", message)


def _spool() -> Finding:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if free < _SMALL_SPOOL_BYTES:
        return Finding(
            Level.WARN,
            "spool",
            f"{folder} has only {free / 1e9:.1f} GB free for downloaded videos: free some space, "
            "set TMPDIR, or set pool.spool_dir",
        )
    return Finding(Level.OK, "spool", f"{folder} has {free / 1e9:.0f} GB free for videos")


def _failure(subject: str, message: str) -> Finding:
    return Finding(Level.FAIL, subject, message, ConfigError.exit_code)


def _run(command: Sequence[str]) -> str | None:
    """Return what a program printed, or None when it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TOOL_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
