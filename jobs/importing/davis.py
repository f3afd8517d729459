"""DAVIS: a folder per video with a picture of object ids per frame.

These are the pictures that ground truth is kept as, so the reader of ground truth reads them: 255
is void, or the only object of a video that has no other value (Pont-Tuset et al., "The 2017 DAVIS
Challenge on Video Object Segmentation", arXiv 1704.00675).
"""

from __future__ import annotations

import numpy as np

from jobs.ground_truth import TruthKind, open_ground_truth
from jobs.importing.annotations import Annotations
from jobs.importing.source import Naming, Source
from workers import rle
from workers.errors import ConfigError


def read_davis(source: Source, naming: Naming, into: Annotations) -> None:
    """Read pictures of object ids.

    Parameters
    ----------
    source : Source
        A folder that holds a folder per video.
    naming : Naming
        What the user says about names and numbers.
    into : Annotations
        Receives what was read.

    Raises
    ------
    ConfigError
        The source is missing, holds no picture, or only boxes.
    InputError
        A picture is unreadable or contradicts the others of its video.
    """
    truth = open_ground_truth(source.uri, source.options)
    found = [s for s in truth.sequences.values() if s.kind is TruthKind.PICTURES]
    if not found:
        raise ConfigError(
            f"{source.uri} holds no picture: give the folder whose folders are named like the "
            f"videos, with pictures of object ids in them"
        )
    for sequence in found:
        place = f"{source.uri}/{sequence.key}"
        video = naming.video_of_sequence(sequence.name)
        for frame in truth.frames(sequence):
            frame_idx = naming.frame_idx(frame.frame_idx)
            into.add_frame(video, frame_idx, frame.size, place)
            for object_id, mask in frame.masks.items():
                counts = rle.encode(mask.paste(*frame.size))
                into.add_mask(video, frame_idx, object_id, counts, place)
            if frame.void is not None:
                into.add_void(video, frame_idx, rle.encode(frame.void.view(np.uint8)))
