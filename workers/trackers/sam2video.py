"""SAM 2 on the modules of the library transformers: the same engine, the same masks.

For those who have their weights in the layout of transformers (``config.json`` and
``model.safetensors``), or do not want the package ``sam2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from workers.engine.bank import Clock
from workers.engine.lineage import Spool
from workers.engine.model import CheckpointInfo
from workers.engine.pictures import Resize
from workers.engine.policies.base import Track
from workers.engine.policies.sam2 import Sam2Track
from workers.engine.transformers_adapter import CHECKPOINT_NAME, load_transformers_network
from workers.trackers.sam2 import SHARED_OPTIONS, EngineLoader

OPTIONS: Mapping[str, Any] = SHARED_OPTIONS
"""Options and their defaults, see `workers.trackers.sam2.SHARED_OPTIONS`. ``compat="original"``
resizes bilinearly, as the processor of transformers does, and not bicubically as Meta's loader."""


class SAM2VideoLoader(EngineLoader):
    """SAM 2 and 2.1 on transformers' ``Sam2VideoModel``. Options: `OPTIONS`."""

    family: ClassVar[str] = "sam2video"
    allowed: ClassVar[Mapping[str, Any]] = OPTIONS

    def _load_network(
        self, path: str, image_size: int, size: str | None
    ) -> tuple[Any, CheckpointInfo]:
        return load_transformers_network(path, image_size, size=size)

    def _checkpoint(self) -> str:
        path = Path(super()._checkpoint())
        return str(path / CHECKPOINT_NAME if path.is_dir() else path)

    def _checkpoint_name(self, size: str) -> str:
        return CHECKPOINT_NAME

    def _make_track(self, clock: Clock, spool: Spool) -> Track:
        return Sam2Track(self.options, clock)

    @property
    def _resize(self) -> Resize:
        return "smooth" if self.is_faithful else "bicubic"
