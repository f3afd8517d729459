"""The tracker inside SAM 3, on the modules of the library transformers.

It is prompted by boxes, points and masks, as SAM 2.1 is, and remembers as SAM 2.1 does; what is new
is the image encoder. The detector of SAM 3, which is prompted by words, is not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from workers.engine.model import CheckpointInfo
from workers.engine.pictures import SYMMETRIC, Levels, Resize
from workers.engine.sam3_adapter import IMAGE_SIZE, STRIDE, load_sam3_network
from workers.trackers.sam2 import SHARED_OPTIONS
from workers.trackers.sam2video import SAM2VideoLoader

OPTIONS: Mapping[str, Any] = {**SHARED_OPTIONS, "max_cond_frames_in_attn": 4}
"""Options and their defaults, see `workers.trackers.sam2.SHARED_OPTIONS`. SAM 3 attends to four
prompted frames."""


class SAM3TrackerLoader(SAM2VideoLoader):
    """SAM 3's tracker on transformers' ``Sam3TrackerVideoModel``. Options: `OPTIONS`.

    ``image_size`` is a multiple of 14, 1008 by default.
    """

    family: ClassVar[str] = "sam3-tracker"
    allowed: ClassVar[Mapping[str, Any]] = OPTIONS
    full_image_size: ClassVar[int] = IMAGE_SIZE
    image_size_step: ClassVar[int] = STRIDE
    levels: ClassVar[Levels] = SYMMETRIC

    def _load_network(
        self, path: str, image_size: int, size: str | None
    ) -> tuple[Any, CheckpointInfo]:
        return load_sam3_network(path, image_size)

    @property
    def _resize(self) -> Resize:
        return "smooth"
