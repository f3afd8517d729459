"""The code of this process as a wheel, for clusters whose nodes do not have it installed.

Made of the files that run here, installed or from a source checkout, without any build tool. Its
version carries a digest of them, so a node that has another copy of the same release is told apart.
It names no dependencies: they are to be on the nodes, and nothing is downloaded there.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import zipfile
from pathlib import Path

PACKAGES = ("jobs", "workers")
DISTRIBUTION = "maskmill"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in a wheel: the same code is the same bytes, which are uploaded once."""


def installed_version() -> str:
    """Return the version of maskmill in this process."""
    return importlib.metadata.version(DISTRIBUTION)


def build_wheel(folder: Path) -> tuple[Path, str]:
    """Write the code of this process as a wheel.

    Parameters
    ----------
    folder : Path
        Where; it must exist.

    Returns
    -------
    path : Path
        The wheel.
    version : str
        Its version: the installed one with a digest of the code as its local part.
    """
    files = _code()
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    # A version has one local part; code that was shipped may ship itself on.
    version = f"{installed_version().partition('+')[0]}+code.{digest.hexdigest()[:12]}"
    about = f"{DISTRIBUTION}-{version}.dist-info"
    files[f"{about}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n"
    ).encode()
    files[f"{about}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: maskmill\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{about}/RECORD"] = _record(files, f"{about}/RECORD")
    path = folder / f"{DISTRIBUTION}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return path, version


def _code() -> dict[str, bytes]:
    """Return the files of the packages by their names in a wheel."""
    files = {}
    for package in PACKAGES:
        root = Path(importlib.import_module(package).__path__[0])
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return files


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{own_name},,\n"]).encode()
