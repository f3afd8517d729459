"""The choices of `maskmill import`; light, because the command line shows them."""

from __future__ import annotations

from enum import StrEnum


class ImportFormat(StrEnum):
    """What can be read."""

    COCO = "coco"
    YTVIS = "ytvis"
    DAVIS = "davis"
    MOTS = "mots"
    SAV = "sav"


class PromptFrames(StrEnum):
    """Which masks of an object become prompts."""

    FIRST = "first"
    """The first one."""
    ALL = "all"
    """Each, for prompt modes that prompt again."""
