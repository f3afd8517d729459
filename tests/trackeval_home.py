"""TrackEval, in a folder of its own (see `tests.elsewhere`)."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tests.elsewhere import install_elsewhere

VERSION = "1.3.0"
TABULATE = "0.10.0"


def import_trackeval() -> Any:
    """Return the module, installed on the first call on a machine."""
    packages = f"trackeval=={VERSION}", f"tabulate=={TABULATE}"
    home = install_elsewhere(f"trackeval-{VERSION}", *packages)
    if str(home) not in sys.path:
        sys.path.append(str(home))
    return importlib.import_module("trackeval")
