"""A frame each of any number of videos, for any number of objects: the same for every policy.

Each picture is encoded once. Objects prompted on their frame are decoded from their prompts, the
others from what they remember; all that can be computed together is. Results do not depend on
which other objects and videos there are, up to the rounding of batched arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workers.engine.adapter import ABSENT_LOGIT, Features, HeadOutput, Sam2Network
from workers.engine.bank import Candidates, Entry, Recall, Sighting
from workers.engine.devices import upload
from workers.engine.outlines import masks_of
from workers.engine.policies.base import Decided, Track
from workers.errors import is_out_of_memory
from workers.rle import LazyMask

if TYPE_CHECKING:
    import torch

GPU_BATCH = 8
"""Tracks computed at once on a GPU, and pictures encoded at once; more would need memory without
being faster."""


@dataclass(slots=True)
class FramePrompt:
    """All that is prompted of one object on one frame, in pixels of the model's picture.

    Attributes
    ----------
    points_xy : ndarray of float32, shape (P, 2)
        Corners of the box first, then points. Empty for a mask.
    labels : ndarray of int32, shape (P,)
        1 foreground, 0 background, 2 and 3 the corners of a box.
    box_xyxy : ndarray of float64, shape (4,), or None
        The box once more.
    mask : ndarray of uint8, shape (H, W), or None
        A mask at the size of the frame; points are not used beside it.
    """

    points_xy: NDArray[np.float32]
    labels: NDArray[np.int32]
    box_xyxy: NDArray[np.float64] | None = None
    mask: NDArray[np.uint8] | None = None


@dataclass(slots=True)
class FrameWork:
    """A frame of one video, to be tracked.

    Attributes
    ----------
    picture : Features, or Tensor of float32, shape (1, 3, image_size, image_size)
        What was encoded ahead, or a normalised picture that is still to be encoded.
    step : int
        Steps of the session before this one.
    tracks : Mapping of int to Track
        Every live object.
    prompts : Mapping of int to FramePrompt
        Those prompted on this frame.
    size : tuple of int
        Height and width of the frame.
    """

    picture: Features | torch.Tensor
    step: int
    tracks: Mapping[int, Track]
    prompts: Mapping[int, FramePrompt]
    size: tuple[int, int]


@dataclass(slots=True, eq=False)
class _Live:
    """One object on one frame, and what becomes of it."""

    frame: FrameWork
    features: Features
    track: Track
    prompt: FramePrompt | None
    recalls: list[Recall] = field(default_factory=list)
    offers: list[Candidates] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)


@dataclass(slots=True)
class _Asked:
    """What was asked about a batch of objects; the numbers of the answer are on the device yet."""

    places: list[tuple[_Live, int]]
    """Each object, and which of its recalls."""
    logits: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    num_candidates: int
    numbers: torch.Tensor


@dataclass(slots=True)
class _Taken:
    """A candidate that a track keeps, on its way to an entry and a sighting."""

    live: _Live
    offer: Candidates
    candidate: int


class Engine:
    """Takes frames through a network under the tracks' policies.

    Parameters
    ----------
    network : Sam2Network
        The loaded network.
    fill_hole_area : int
        Holes of a mask up to this many pixels of the low-resolution mask are filled, 0 for none.
    keep_prompted_masks : bool
        On its own frame a prompted mask comes back as it was given, not as the network stores it.
    """

    def __init__(
        self, network: Sam2Network, *, fill_hole_area: int = 0, keep_prompted_masks: bool = True
    ) -> None:
        self.network = network
        # A CPU is busy with one picture or object at a time, and alone each is computed bit by
        # bit as in a session of its own.
        self.max_batch = 1 if network.device.type == "cpu" else GPU_BATCH
        """Tracks, or pictures, computed at once."""
        self._fill_hole_area = fill_hole_area
        self._keep_prompted_masks = keep_prompted_masks
        self._num_fitted = 0

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[Features]:
        """Encode pictures, of any videos.

        Parameters
        ----------
        pixels : sequence of Tensor of float32, shape (1, 3, image_size, image_size)
            Normalised pictures.

        Returns
        -------
        list of Features
            One per picture.
        """
        import torch

        encoded: list[Features] = []
        with torch.inference_mode():
            for start in range(0, len(pixels), self.max_batch):
                part = torch.cat(list(pixels[start : start + self.max_batch]))
                encoded += self.network.encode_images(part)
        return encoded

    def step(self, frames: Sequence[FrameWork]) -> list[dict[int, Decided]]:
        """Track a frame of each of several videos.

        Parameters
        ----------
        frames : sequence of FrameWork
            Of different videos.

        Returns
        -------
        list of dict of int to Decided
            For each video and object the frames that became final, this one or older ones.

        Raises
        ------
        MemoryError
            There are too many objects; the sentence says how many have fitted.
        """
        num_objects = sum(len(frame.tracks) for frame in frames)
        try:
            decided = self._step(frames)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(self._too_many(num_objects)) from error
        self._num_fitted = max(self._num_fitted, num_objects)
        return decided

    def _too_many(self, num_objects: int) -> str:
        size = self.network.image_size
        return (
            f"{num_objects} objects at once at image size {size} do not fit into the memory of "
            f"{self.network.device}, {self._num_fitted} did: track fewer objects or videos at once "
            f"or choose a smaller image size, and open the session anew"
        )

    def _step(self, frames: Sequence[FrameWork]) -> list[dict[int, Decided]]:
        import torch

        lives = [
            [_Live(frame, seen, track, frame.prompts.get(i)) for i, track in frame.tracks.items()]
            for frame, seen in zip(frames, self._features(frames), strict=True)
        ]
        with torch.inference_mode():
            all_lives = [live for of_frame in lives for live in of_frame]
            # Nothing waits for the device until all of it has been asked for.
            asked = [self._ask_prompted(live, live.prompt) for live in all_lives if live.prompt]
            asked += self._ask_tracked([live for live in all_lives if live.prompt is None])
            self._answer(asked)
            prompted = [
                _Taken(live, live.offers[0], live.track.choose_prompted(live.offers[0]))
                for live in all_lives
                if live.prompt is not None
            ]
            kept = [
                _Taken(live, live.offers[choice.recall], choice.candidate)
                for live in all_lives
                if live.prompt is None
                for choice in live.track.choose(live.frame.step, live.offers)
            ]
            shown: list[torch.Tensor] = []
            for taken in (prompted, kept):
                for start in range(0, len(taken), self.max_batch):
                    shown += self._remember(taken[start : start + self.max_batch])
            self._see([*prompted, *kept], shown)
        return [
            {
                object_id: self._keep(live)
                for object_id, live in zip(frame.tracks, of_frame, strict=True)
            }
            for frame, of_frame in zip(frames, lives, strict=True)
        ]

    def _features(self, frames: Sequence[FrameWork]) -> list[Features]:
        """Return the encoded picture of every frame; those that lack it are encoded together."""
        new = iter(self.encode([f.picture for f in frames if not isinstance(f.picture, Features)]))
        return [f.picture if isinstance(f.picture, Features) else next(new) for f in frames]

    def _keep(self, live: _Live) -> Decided:
        """Let a track remember its frame."""
        if live.prompt is None:
            return live.track.keep(live.frame.step, live.entries, live.sightings)
        (entry,), (sighting,), (offer,) = live.entries, live.sightings, live.offers
        return live.track.keep_prompted(entry, sighting, offer, live.prompt.box_xyxy)

    # -- what the network offers -------------------------------------------------------------

    def _ask_prompted(self, live: _Live, prompt: FramePrompt) -> _Asked:
        """Ask the network about a prompted object."""
        network, features = self.network, live.features
        if prompt.mask is not None:
            heads = network.decode_mask(self._shrunk(prompt.mask), features)
            return self._asked([(live, 0)], heads)
        points = (
            upload(prompt.points_xy[None], network.device),
            upload(prompt.labels[None], network.device),
        )
        heads = network.decode(
            network.without_memory(features),
            [features],
            points=points,
            multimask=len(prompt.labels) == 1,
        )
        return self._asked([(live, 0)], heads)

    def _shrunk(self, mask: NDArray[np.uint8]) -> torch.Tensor:
        """Return a mask of the frame in the model's picture, shape (1, 1, side, side)."""
        import torch.nn.functional as F  # noqa: N812

        given = upload(mask[None, None], self.network.device).float()
        image_size = self.network.image_size
        if given.shape[-2:] == (image_size, image_size):
            return given
        resized = F.interpolate(
            given, size=(image_size, image_size), mode="bilinear", antialias=True
        )
        return (resized >= 0.5).float()

    def _ask_tracked(self, tracked: Sequence[_Live]) -> list[_Asked]:
        """Ask the network about each tracked object, for each of its recalls."""
        groups: dict[tuple[int, int], list[tuple[_Live, int]]] = {}
        for live in tracked:
            live.recalls = live.track.recalls(live.frame.step)
            for place, recall in enumerate(live.recalls):
                groups.setdefault(recall.signature, []).append((live, place))
        asked = []
        for group in groups.values():
            for start in range(0, len(group), self.max_batch):
                part = group[start : start + self.max_batch]
                features = [live.features for live, _ in part]
                recalls = [live.recalls[place] for live, place in part]
                heads = self.network.decode(self.network.condition(features, recalls), features)
                asked.append(self._asked(part, heads))
        return asked

    def _asked(self, places: list[tuple[_Live, int]], heads: HeadOutput) -> _Asked:
        """Prepare the answer for the host; an absent object has no mask."""
        import torch

        tracks = [live.track for live, _ in places]
        scores = torch.stack([heads.object_logits, heads.pointer_logits], 1)
        is_present = self._above_least(scores[:, 0], tracks)[:, None, None, None]
        logits = torch.where(is_present, heads.logits, ABSENT_LOGIT)
        columns = [scores, heads.ious]
        if any(track.needs_boxes for track in tracks):
            columns.append(mask_boxes(self.network.enlarge(logits) > 0).flatten(1))
        numbers = torch.cat(columns, 1)
        return _Asked(places, logits, heads.tokens, scores, heads.ious.shape[1], numbers)

    def _above_least(self, scores: torch.Tensor, tracks: Sequence[Track]) -> torch.Tensor:
        """Tell which objects are there, by one of their scores, without waiting for the device."""
        # As on the host: the threshold is not rounded to float32.
        least = upload([track.min_object_logit for track in tracks], scores.device, np.float64)
        return scores.double() > least

    def _answer(self, asked: Sequence[_Asked]) -> None:
        """Give each object what it is offered; all numbers of a step leave the device together."""
        import torch

        if not asked:
            return
        together = torch.cat([batch.numbers.flatten() for batch in asked]).cpu().numpy()
        ends = np.cumsum([batch.numbers.numel() for batch in asked])
        answers: list[tuple[int, _Live, Candidates]] = []
        for batch, flat in zip(asked, np.split(together, ends[:-1]), strict=True):
            numbers = flat.reshape(len(batch.places), -1)
            end = 2 + batch.num_candidates
            for row, (live, place) in enumerate(batch.places):
                boxes = numbers[row, end:].reshape(-1, 4).astype(np.float64)
                offer = Candidates(
                    logits=batch.logits[row],
                    ious=numbers[row, 2:end],
                    object_logit=float(numbers[row, 0]),
                    tokens=batch.tokens[row],
                    pointer_logit=float(numbers[row, 1]),
                    scores=batch.scores[row],
                    boxes=boxes if live.track.needs_boxes else None,
                )
                answers.append((place, live, offer))
        # Recalls of one object may have been in different batches.
        for _, live, offer in sorted(answers, key=lambda answer: answer[0]):
            live.offers.append(offer)

    # -- what becomes of a choice ------------------------------------------------------------

    def _remember(self, taken: Sequence[_Taken]) -> list[torch.Tensor]:
        """Make entries of a batch of choices, all prompted or none; return the masks to show."""
        import torch

        network = self.network
        is_prompted = taken[0].live.prompt is not None
        logits = torch.stack([one.offer.logits[one.candidate] for one in taken])
        shown = self._filled(logits)
        tokens = torch.stack([one.offer.token(one.candidate) for one in taken])
        memories: list[torch.Tensor | None] = [None] * len(taken)
        if network.info.has_memory:
            object_logits, pointer_logits = torch.stack([one.offer.scores for one in taken]).T
            tracks = [one.live.track for one in taken]
            tokens = network.point(tokens, self._above_least(pointer_logits, tracks))
            # Only prompted frames remember the mask with its holes filled. Each memory is a copy
            # of its own, or the whole batch would live as long as one of them.
            encoded = network.memorise(
                [one.live.features for one in taken],
                shown if is_prompted else logits,
                object_logits,
                binary=is_prompted,
            )
            memories = [memory.clone() for memory in encoded]
        for one, token, memory in zip(taken, tokens, memories, strict=True):
            iou, object_logit = float(one.offer.ious[one.candidate]), one.offer.object_logit
            entry = Entry(one.live.frame.step, iou, object_logit, token.clone(), memory)
            one.live.entries.append(entry)
        return list(shown)

    def _see(self, taken: Sequence[_Taken], shown: Sequence[torch.Tensor]) -> None:
        """Make sightings of all choices of a step; their masks leave the device together."""
        masks = masks_of(shown, [one.live.frame.size for one in taken])
        for one, mask in zip(taken, masks, strict=True):
            prompt = one.live.prompt
            if self._keep_prompted_masks and prompt is not None and prompt.mask is not None:
                mask = LazyMask.of(prompt.mask)
            confidence = min(1.0, max(0.0, float(one.offer.ious[one.candidate])))
            seen = None if mask.is_empty else mask
            one.live.sightings.append(Sighting(confidence, seen, one.offer.object_logit <= 0))

    def _filled(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits with small holes of their masks filled."""
        if not self._fill_hole_area:
            return logits
        import cv2
        import torch

        filled = logits.clone()
        for i, mask in enumerate((logits > 0).cpu().numpy()):
            background = (~mask).astype(np.uint8)
            _, labels, stats, _ = cv2.connectedComponentsWithStats(background, connectivity=8)
            small = stats[:, cv2.CC_STAT_AREA] <= self._fill_hole_area
            small[0] = False  # the object itself
            filled[i][torch.from_numpy(small[labels]).to(filled.device)] = 0.1
        return filled


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the boxes of masks: smallest and largest column and row, all zero for an empty one.

    Parameters
    ----------
    masks : Tensor of bool, shape (B, M, H, W)
        Masks.

    Returns
    -------
    Tensor of float32, shape (B, M, 4)
        ``x0, y0, x1, y1``, the last row and column included.
    """
    import torch

    edges = []
    for is_taken in (masks.any(-2), masks.any(-1)):
        marks = is_taken.to(torch.uint8)
        first = marks.argmax(-1)
        last = marks.shape[-1] - 1 - marks.flip(-1).argmax(-1)
        edges.append(torch.stack([first, last], -1) * marks.amax(-1, keepdim=True))
    columns, rows = edges
    return torch.stack([columns[..., 0], rows[..., 0], columns[..., 1], rows[..., 1]], -1).float()
