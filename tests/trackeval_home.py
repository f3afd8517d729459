"""TrackEval, in a folder of its own.

It asks for opencv-python, which must not lie beside the headless build that everything here uses
(both are the package `cv2`). So it is installed without what it depends on, all of which is here,
into a folder that is on the path only for those who import it from here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VERSION = "1.3.0"
TABULATE = "0.10.0"


def import_trackeval() -> Any:
    """Return the module, installed on the first call on a machine."""
    home = Path(tempfile.gettempdir()) / f"maskmill-trackeval-{VERSION}-{os.getuid()}"
    if not home.exists():
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            target = Path(folder) / "packages"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--target", str(target)]
            packages = [f"trackeval=={VERSION}", f"tabulate=={TABULATE}"]
            subprocess.run([*command, *packages], check=True, timeout=120)
            # Another process of the suite may have been quicker.
            with contextlib.suppress(OSError):
                target.rename(home)
    if str(home) not in sys.path:
        sys.path.append(str(home))
    return importlib.import_module("trackeval")
