"""More objects than memory: one sentence that says how many fitted, and the tracker goes on.

The memory is really used up, in a process of its own whose address space is limited; there a mask
is 16 MB, and four times as much on the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engine import reference

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource
from pathlib import Path

import numpy as np
import torch

from tests.engine import reference
from workers.trackers.base import TrackingConfig
from workers.trackers.registry import create_tracking_loader

torch.set_num_threads(1)
path = str(reference.seeing_checkpoint())
config = TrackingConfig("sam2", device="cpu", checkpoint_path=path, image_size=128)
loader = create_tracking_loader("sam2", config)
loader.load()
frame = np.zeros((4000, 4000, 3), np.uint8)
with loader.open_session(4000, 4000) as session:
    for i in (1, 2):
        session.prompt(0, i, box_xyxy=[0, 0, 1000 * i, 1000])
    session.step(frame)
    for i in range(3, 15):
        session.prompt(1, i, box_xyxy=[0, 0, 100 * i, 900])
    # The picture is encoded before: what does not fit are the objects.
    session.look_ahead([frame])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + (32 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))
    try:
        session.step(frame)
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with loader.open_session(4000, 4000) as session:
    session.prompt(0, 1, box_xyxy=[0, 0, 1000, 1000])
    print(len(session.step(frame)))
"""


def test_too_many_objects_are_told_and_the_loader_goes_on() -> None:
    reference.seeing_checkpoint()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told, num_frames = done.stdout.splitlines()
    assert told.startswith("14 objects at once at image size 128 do not fit into the memory of cpu")
    assert ", 2 did: track fewer objects" in told
    assert num_frames == "1"
