"""Which video of a run a sequence of the ground truth is about.

A sequence is named like its video (`jobs.ground_truth`). The closest name wins: the whole name;
without the extension; of a folder of frames called ``frames`` or the like, the folder above; ``/``
written as ``__``, as exports do; without leading folders of the video's name; without those of the
sequence's; and last by the folders above the corpus root, since the one video of a corpus is
called by its last folder or file alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.dataset import Dataset, Video
from jobs.ground_truth import TruthSequence

FRAME_FOLDERS = frozenset({"frames", "JPEGImages", "images", "img", "rgb"})
"""Names of folders that say nothing about the video whose frames they hold."""
FLAT_SEPARATOR = "__"
"""What exports write in the place of a slash."""
MAX_NAMED = 4
_WITHOUT_LEADING, _WITHOUT_LEADING_OF_TRUTH, _BY_URI = 1_000, 2_000, 3_000
"""How far names are when folders are left out; more than any path has folders."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The videos that can be measured, and what cannot.

    Attributes
    ----------
    pairs : list of (int, TruthSequence)
        Key of the video, and what is known about it; several time ranges of one video share a
        sequence.
    missing : list of str
        Sequences without a video.
    faults : list of str
        A sentence per sequence that fits several videos.
    num_unknown : int
        Videos about which nothing is known.
    """

    pairs: list[tuple[int, TruthSequence]]
    missing: list[str]
    faults: list[str]
    num_unknown: int


@dataclass(slots=True)
class _Candidates:
    """The videos whose names are closest to a sequence's."""

    distance: int
    keys: list[int] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def pair_videos(
    dataset: Dataset,
    sequences: Mapping[str, TruthSequence],
    wanted: Collection[Video] | None = None,
) -> Pairing:
    """Find the video of every sequence.

    Parameters
    ----------
    dataset : Dataset
        The run; its videos are streamed, only those that fit are kept.
    sequences : Mapping of str to TruthSequence
        By name.
    wanted : collection of Video, optional
        Only these. Then a sequence without a video is not missing.

    Returns
    -------
    Pairing
        Pairs in order of the sequences.
    """
    chosen = None if wanted is None else {video.video_key for video in wanted}
    shortened = _shortened(sequences)
    best: dict[str, _Candidates] = {}
    num_videos = 0
    for batch in dataset.batches("videos", columns=("video_key", "name", "uri")):
        for row in batch.to_pylist():
            num_videos += chosen is None or row["video_key"] in chosen
            # Names mean the same whatever is selected, so all videos take part.
            for distance, name in _closest(row, sequences, shortened):
                known = best.setdefault(name, _Candidates(distance))
                if distance < known.distance:
                    known = best[name] = _Candidates(distance)
                if distance == known.distance:
                    known.keys.append(row["video_key"])
                    known.names[row["uri"]] = row["name"]
    pairs, faults = [], []
    for name, found in best.items():
        keys = [key for key in found.keys if chosen is None or key in chosen]
        if len(found.names) > 1 and keys:
            named = ", ".join(sorted(found.names.values())[:MAX_NAMED])
            faults.append(
                f"the ground truth {name} fits {len(found.names)} videos ({named}): name it by "
                f"the path below the corpus root"
            )
        else:
            pairs += [(key, sequences[name]) for key in sorted(keys)]
    order = {name: position for position, name in enumerate(sequences)}
    pairs.sort(key=lambda pair: order[pair[1].name])
    missing = [] if wanted is not None else [name for name in sequences if name not in best]
    return Pairing(pairs, missing, faults, num_videos - len({key for key, _ in pairs}))


def _shortened(sequences: Mapping[str, TruthSequence]) -> dict[str, list[str]]:
    """Return the sequences by their names without leading folders."""
    shortened: dict[str, list[str]] = {}
    for name in sequences:
        for short in _without_leading(name):
            shortened.setdefault(short, []).append(name)
    return shortened


def _closest(
    video: Mapping[str, str],
    sequences: Mapping[str, TruthSequence],
    shortened: Mapping[str, list[str]],
) -> list[tuple[int, str]]:
    """Return the sequences that a video's name is closest to, and how far that is."""
    forms = list(dict.fromkeys(_forms(video["name"])))
    for distance, form in enumerate(forms):
        if form in sequences:
            return [(distance, form)]
    found = _by_end(forms, sequences)
    if found is not None:
        return [(_WITHOUT_LEADING + found[0], found[1])]
    for form in forms:
        if form in shortened:
            return [(_WITHOUT_LEADING_OF_TRUTH, name) for name in shortened[form]]
    found = _by_end(list(_forms(video["uri"])), sequences)
    return [] if found is None else [(_BY_URI + found[0], found[1])]


def _by_end(forms: Sequence[str], sequences: Mapping[str, TruthSequence]) -> tuple[int, str] | None:
    """Return the sequence that a form ends with, and how many folders are left out for it."""
    for form in forms:
        for short in _without_leading(form):
            if short in sequences:
                return form.count("/") - short.count("/"), short
    return None


def _forms(name: str) -> Iterator[str]:
    """Yield the ways in which a sequence may call a video, the closest first."""
    folder, slash, last = name.rpartition("/")
    whole = [name, folder + slash + (last.rpartition(".")[0] or last)]
    if last in FRAME_FOLDERS and folder:
        whole.append(folder)
    yield from whole
    yield from (form.replace("/", FLAT_SEPARATOR) for form in whole)


def _without_leading(name: str) -> Iterator[str]:
    """Yield what is left of a name without its first folder, its first two, and so on."""
    while "/" in name:
        name = name.partition("/")[2]
        yield name
