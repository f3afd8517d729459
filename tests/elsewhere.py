"""Packages for comparison only, each in a folder of its own.

They ask for opencv-python, which must not lie beside the headless build that everything here uses
(both are the package `cv2`). So they are installed without what they depend on, all of which is
here, into a folder that only those have on their path who ask for it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def install_elsewhere(name: str, *packages: str) -> Path:
    """Return the folder with some packages, installed by the first call on a machine.

    Parameters
    ----------
    name : str
        Of the folder; another set or version needs another name.
    *packages : str
        ``NAME==VERSION``.
    """
    home = Path(tempfile.gettempdir()) / f"maskmill-{name}-{os.getuid()}"
    if not home.exists():
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            target = Path(folder) / "packages"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--target", str(target)]
            subprocess.run([*command, *packages], check=True, timeout=120)
            # Another process of the suite may have been quicker.
            with contextlib.suppress(OSError):
                target.rename(home)
    return home
