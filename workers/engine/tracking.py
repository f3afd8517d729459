"""One frame for any number of objects: what every policy goes through in the same way.

The picture is encoded once. Objects prompted on this frame are decoded from their prompts, the
others from what they remember; all that can be computed together is. Results do not depend on
which other objects there are, up to the rounding of batched arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.engine.adapter import ABSENT_LOGIT, Features, HeadOutput, Sam2Network
from workers.engine.bank import Candidates, Entry, Recall, Sighting
from workers.engine.policies.base import Choice, Decided, Track

if TYPE_CHECKING:
    import torch

GPU_BATCH = 8
"""Tracks computed at once on a GPU; more would need memory without being faster."""


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
class _Taken:
    """A candidate that a track keeps, on its way to an entry and a sighting."""

    object_id: int
    offer: Candidates
    candidate: int
    prompt: FramePrompt | None


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
        # A CPU is busy with one object at a time, and alone each is computed bit by bit as in a
        # session of its own.
        self.max_batch = 1 if network.device.type == "cpu" else GPU_BATCH
        """Tracks computed at once."""
        self._fill_hole_area = fill_hole_area
        self._keep_prompted_masks = keep_prompted_masks

    def step(
        self,
        pixels: torch.Tensor,
        step: int,
        tracks: Mapping[int, Track],
        prompts: Mapping[int, FramePrompt],
        size: tuple[int, int],
    ) -> dict[int, Decided]:
        """Track one frame.

        Parameters
        ----------
        pixels : Tensor of float32, shape (1, 3, image_size, image_size)
            The picture.
        step : int
            Steps of the session before this one.
        tracks : Mapping of int to Track
            Every live object.
        prompts : Mapping of int to FramePrompt
            Those prompted on this frame.
        size : tuple of int
            Height and width of the frame.

        Returns
        -------
        dict of int to Decided
            For each object the frames that became final, this one or older ones.
        """
        import torch

        with torch.inference_mode():
            (features,) = self.network.encode_images(pixels)
            prompted = [
                _Taken(object_id, offer, tracks[object_id].choose_prompted(offer), prompt)
                for object_id, prompt in prompts.items()
                for offer in [self._offer_prompted(tracks[object_id], features, prompt, size)]
            ]
            tracked: list[_Taken] = []
            for object_id, (offers, choices) in self._choices(
                step, {i: t for i, t in tracks.items() if i not in prompts}, features
            ).items():
                tracked += [_Taken(object_id, offers[c.recall], c.candidate, None) for c in choices]
            entries: dict[int, list[Entry]] = {object_id: [] for object_id in tracks}
            sightings: dict[int, list[Sighting]] = {object_id: [] for object_id in tracks}
            for taken in (prompted, tracked):
                for start in range(0, len(taken), self.max_batch):
                    part = taken[start : start + self.max_batch]
                    self._finish(step, part, tracks, features, size, entries, sightings)
            decided: dict[int, Decided] = {}
            for one in prompted:
                i = one.object_id
                box = None if one.prompt is None else one.prompt.box_xyxy
                decided[i] = tracks[i].keep_prompted(entries[i][0], sightings[i][0], one.offer, box)
            for object_id, track in tracks.items():
                if object_id not in decided:
                    decided[object_id] = track.keep(step, entries[object_id], sightings[object_id])
            return decided

    # -- what the network offers -------------------------------------------------------------

    def _offer_prompted(
        self, track: Track, features: Features, prompt: FramePrompt, size: tuple[int, int]
    ) -> Candidates:
        """Return the candidates of a prompted object."""
        import torch

        network = self.network
        if prompt.mask is not None:
            return self._offer(track, network.decode_mask(self._shrunk(prompt.mask), features), 0)
        points = (
            torch.from_numpy(prompt.points_xy)[None].to(network.device),
            torch.from_numpy(prompt.labels)[None].to(network.device),
        )
        heads = network.decode(
            network.without_memory(features),
            features,
            points=points,
            multimask=len(prompt.labels) == 1,
        )
        return self._offer(track, heads, 0)

    def _shrunk(self, mask: NDArray[np.uint8]) -> torch.Tensor:
        """Return a mask of the frame in the model's picture, shape (1, 1, side, side)."""
        import torch
        import torch.nn.functional as F  # noqa: N812

        given = torch.from_numpy(mask)[None, None].to(self.network.device).float()
        image_size = self.network.image_size
        if given.shape[-2:] == (image_size, image_size):
            return given
        resized = F.interpolate(
            given, size=(image_size, image_size), mode="bilinear", antialias=True
        )
        return (resized >= 0.5).float()

    def _choices(
        self, step: int, tracks: Mapping[int, Track], features: Features
    ) -> dict[int, tuple[list[Candidates], list[Choice]]]:
        """Return what each tracked object is offered, and what it takes."""
        recalls = {object_id: track.recalls(step) for object_id, track in tracks.items()}
        groups: dict[tuple[int, int], list[tuple[int, int, Recall]]] = {}
        for object_id, of_object in recalls.items():
            for place, recall in enumerate(of_object):
                groups.setdefault(recall.signature, []).append((object_id, place, recall))
        offers: dict[tuple[int, int], Candidates] = {}
        for group in groups.values():
            for start in range(0, len(group), self.max_batch):
                part = group[start : start + self.max_batch]
                conditioned = self.network.condition(features, [recall for *_, recall in part])
                heads = self.network.decode(conditioned, features)
                for row, (object_id, place, _) in enumerate(part):
                    offers[object_id, place] = self._offer(tracks[object_id], heads, row)
        result = {}
        for object_id, track in tracks.items():
            offered = [offers[object_id, i] for i in range(len(recalls[object_id]))]
            result[object_id] = (offered, track.choose(step, offered))
        return result

    def _offer(self, track: Track, heads: HeadOutput, row: int) -> Candidates:
        """Return one row of the decoder's output as candidates; an absent object has no mask."""
        object_logit = float(heads.object_logits[row])
        logits = heads.logits[row]
        if not object_logit > track.min_object_logit:
            logits = logits.new_full(logits.shape, ABSENT_LOGIT)
        return Candidates(
            logits=logits,
            ious=heads.ious[row].cpu().numpy(),
            object_logit=object_logit,
            tokens=heads.tokens[row],
            pointer_logit=float(heads.pointer_logits[row]),
            boxes=self._boxes_of(logits),
        )

    def _boxes_of(self, logits: torch.Tensor) -> Callable[[], NDArray[np.float64]]:
        return lambda: mask_boxes(self.network.enlarge(logits[None])[0] > 0)

    # -- what becomes of a choice ------------------------------------------------------------

    def _finish(
        self,
        step: int,
        taken: list[_Taken],
        tracks: Mapping[int, Track],
        features: Features,
        size: tuple[int, int],
        entries: dict[int, list[Entry]],
        sightings: dict[int, list[Sighting]],
    ) -> None:
        """Make entries and sightings of a batch of choices."""
        import torch

        network = self.network
        is_prompted = taken[0].prompt is not None
        logits = torch.stack([one.offer.logits[one.candidate] for one in taken])
        shown = self._filled(logits)
        object_logits = torch.tensor(
            [one.offer.object_logit for one in taken], device=network.device
        )
        tokens = torch.stack([one.offer.token(one.candidate) for one in taken])
        memories: list[torch.Tensor | None] = [None] * len(taken)
        if network.info.has_memory:
            present = torch.tensor(
                [one.offer.pointer_logit > tracks[one.object_id].min_object_logit for one in taken],
                device=network.device,
            )
            tokens = network.point(tokens, present)
            # Only prompted frames remember the mask with its holes filled. Each memory is a copy
            # of its own, or the whole batch would live as long as one of them.
            encoded = network.memorise(
                features,
                shown if is_prompted else logits,
                object_logits,
                binary=is_prompted,
                num_enlarged=1 if is_prompted else tracks[taken[0].object_id].num_enlarged,
            )
            memories = [memory.clone() for memory in encoded]
        for i, one in enumerate(taken):
            iou = float(one.offer.ious[one.candidate])
            entry = Entry(step, iou, one.offer.object_logit, tokens[i].clone(), memories[i])
            mask = self._at_size(shown[i], size)
            if self._keep_prompted_masks and one.prompt is not None and one.prompt.mask is not None:
                mask = one.prompt.mask
            sighting = Sighting(min(1.0, max(0.0, iou)), mask if mask.any() else None)
            entries[one.object_id].append(entry)
            sightings[one.object_id].append(sighting)

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

    def _at_size(self, logits: torch.Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the mask of low-resolution logits at the size of the frame."""
        import torch.nn.functional as F  # noqa: N812

        large = F.interpolate(logits[None, None], size=size, mode="bilinear")[0, 0]
        return np.asarray((large > 0).cpu().numpy()).view(np.uint8)


def mask_boxes(masks: Any) -> NDArray[np.float64]:
    """Return the boxes of masks: smallest and largest column and row, all zero for an empty one.

    Parameters
    ----------
    masks : Tensor of bool, shape (M, H, W)
        Masks.

    Returns
    -------
    ndarray of float64, shape (M, 4)
        ``x0, y0, x1, y1``, the last row and column included.
    """
    boxes = np.zeros((len(masks), 4))
    columns, rows = masks.any(1).cpu().numpy(), masks.any(2).cpu().numpy()
    for i in range(len(masks)):
        xs, ys = np.flatnonzero(columns[i]), np.flatnonzero(rows[i])
        if len(xs):
            boxes[i] = xs[0], ys[0], xs[-1], ys[-1]
    return boxes
