"""Tracking without weights: optical flow carries masks, three kinds of evidence correct them.

For each object a map of log-odds "object against background" lives on a reduced picture. A frame
takes it through one predict-and-correct cycle:

1. *Carry.* Dense inverse search flow (Kroeger et al., ECCV 2016) in both directions brings the
   log-odds of the last frame to this one. Where forward and backward flow disagree nothing is
   carried: what was uncovered or is new must be judged by the evidence alone.
2. *Appearance.* A classifier learned from the prompt and slowly brought up to date says how much
   each pixel looks like the object rather than its surroundings. It is ridge regression on random
   Fourier features (Rahimi and Recht, NIPS 2007) of colour at three scales and texture; the
   statistics it needs have a fixed size, so its memory does not grow, and a part of them belongs
   to the prompt for ever, so it cannot drift away from it.
3. *Motion.* The smooth motion of the object and that of the background around it each predict the
   frame from the last one. The one that predicts a pixel better is evidence for its layer. It
   counts where that layer was visible before, so uncovered background is not taken for object.
4. *Edges.* A guided filter (He, Sun and Tang, ECCV 2010) moves the outline to edges of the picture.

Objects compete for pixels: the background and all objects share one softmax. An object of which
too little is left is occluded; it is then looked for by its appearance, in a window that grows
around the place in the picture where it was last seen (a camera that follows an object keeps it
there), until it is found again.

Linear algebra runs on one thread, so that results do not depend on the number of cores.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from workers.trackers.base import (
    SessionPrompt,
    TrackingConfig,
    TrackingFrame,
    TrackingMask,
    TrackingModelLoader,
    TrackingSession,
    UInt8Array,
    check_options,
)
from workers.trackers.cut_out import prompted_mask

if TYPE_CHECKING:
    import cv2

FloatArray = NDArray[np.float32]

OPTIONS: Mapping[str, Any] = {
    "work_pixels": 102_400,  # masks are tracked on a picture of at most this many pixels
    "flow_preset": "fast",  # of the optical flow: ultrafast, fast or medium
    "persistence": 0.8,  # share of the log-odds that is carried to the next frame, 0..1
    "appearance_weight": 2.0,  # log-odds per unit of the appearance score, which is about -1..1
    "motion_weight": 1.0,  # steepness of the motion evidence; 0 leaves it out
    "background_bias": 0.2,  # log-odds by which what is unknown counts as background
    "reach_px": 12,  # an object grows at most this far in a frame, in pixels of the small picture
    "prompt_share": 0.8,  # share of the object's appearance that stays as prompted, 0..1
    "num_features": 200,  # random features of the appearance model
    "lost_area": 0.1,  # below this share of its area an object is occluded, 0..1
    "redetect": True,  # look for occluded objects by their appearance
}
"""Options by name, with their defaults."""

ALGORITHM = "flow-1"
"""Changes whenever results change; part of every snapshot's fingerprint."""

_PRESETS = ("ultrafast", "fast", "medium")
_SHARES = ("persistence", "prompt_share", "lost_area")
_SEED = 20260211
_MIN_SIDE = 32  # optical flow needs a few patches in each direction
_LOGIT_CAP = 5.0
_SCORE_CAP = 1.5
_MOTION_CAP = 2.0
_NUM_SAMPLES = 1250  # of each class, when the appearance model learns
_EPSILON = 1e-3


@dataclass(slots=True)
class _Picture:
    """A frame at the reduced size, and at half of that.

    Attributes
    ----------
    lab : ndarray of uint8, shape (h, w, 3)
        Lab colours.
    gray : ndarray of uint8, shape (h, w)
        Brightness, for the flow.
    lab_half : ndarray of float32, shape (h // 2, w // 2, 3)
        Lab colours at half the size.
    """

    lab: UInt8Array
    gray: UInt8Array
    lab_half: FloatArray


@dataclass(slots=True)
class _Statistics:
    """What the appearance model keeps of one class: second and first moments of its features.

    Attributes
    ----------
    second : ndarray of float32, shape (F, F)
        Mean outer product of the feature vectors.
    first : ndarray of float32, shape (F, 1)
        Mean feature vector.
    """

    second: FloatArray
    first: FloatArray

    def mixed(self, other: _Statistics, share: float) -> _Statistics:
        """Return these statistics with a share of the other's."""
        return _Statistics(
            (1 - share) * self.second + share * other.second,
            (1 - share) * self.first + share * other.first,
        )


@dataclass(slots=True)
class _Target:
    """One object.

    Attributes
    ----------
    logit : ndarray of float32, shape (h, w)
        Log-odds that a pixel of the small picture is the object's.
    probability : ndarray of float32, shape (h, w)
        The same as a probability, once the objects have competed.
    centre_xy : ndarray of float64, shape (2,)
        Where it was last seen.
    full_area : float
        The area it has when nothing hides it; follows the object's size slowly.
    num_lost : int
        Steps since it was last seen.
    anchor, recent : tuple of _Statistics
        Appearance of object and background as prompted, and as lately seen.
    weights : ndarray of float32, shape (F, 1)
        Of the classifier made from them.
    confidence : float
        Of its mask on the last frame.
    """

    logit: FloatArray
    probability: FloatArray
    centre_xy: NDArray[np.float64]
    full_area: float
    num_lost: int
    anchor: tuple[_Statistics, _Statistics]
    recent: tuple[_Statistics, _Statistics]
    weights: FloatArray
    confidence: float


@dataclass(slots=True)
class _Motion:
    """How the small picture moved since the last frame.

    Attributes
    ----------
    source_xy : ndarray of float32, shape (h, w, 2)
        Where each pixel was on the last frame.
    consistency : ndarray of float32, shape (h, w)
        1 where forward and backward flow agree, 0 where they do not.
    flow_half : ndarray of float32, shape (h // 2, w // 2, 2)
        Backward flow at half the size, in its pixels.
    trust_half : ndarray of float32, shape (h // 2, w // 2)
        Consistency at half the size.
    """

    source_xy: FloatArray
    consistency: FloatArray
    flow_half: FloatArray
    trust_half: FloatArray


class FlowSession(TrackingSession):
    """One video of the flow tracker.

    Parameters
    ----------
    height, width : int
        Size of every frame in pixels.
    num_frames : int or None
        Not used: results depend on the frames alone.
    options : Mapping
        See `OPTIONS`.
    fingerprint : str
        Digest of the settings.
    """

    kind: ClassVar[str] = "flow"

    def __init__(
        self,
        height: int,
        width: int,
        *,
        num_frames: int | None,
        options: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        super().__init__(height, width, num_frames=num_frames)
        self._options = options
        self._digest = fingerprint
        scale = min(1.0, (options["work_pixels"] / (height * width)) ** 0.5)
        self._size = max(_MIN_SIDE, round(width * scale)), max(_MIN_SIDE, round(height * scale))
        self._half = self._size[0] // 2, self._size[1] // 2
        self._targets: dict[int, _Target] = {}
        self._previous: _Picture | None = None
        self._flow: cv2.DISOpticalFlow | None = None

    # -- one frame ---------------------------------------------------------------------------

    def _advance(
        self, frame: UInt8Array, frame_idx: int, prompts: Sequence[SessionPrompt]
    ) -> list[TrackingFrame]:
        start = time.perf_counter()
        picture = self._reduced(frame)
        descriptors = _described(picture.lab, self._half)
        by_object: dict[int, list[SessionPrompt]] = {}
        for prompt in prompts:
            by_object.setdefault(prompt.object_id, []).append(prompt)
        carried = [i for i in self._targets if i not in by_object]
        if carried:
            self._propagate(carried, picture, descriptors)
        given: dict[int, UInt8Array] = {}
        for object_id, of_object in by_object.items():
            given[object_id] = prompted_mask(frame, of_object, _SEED + self.num_steps)
            self._start(object_id, given[object_id], descriptors)
            if any(prompt.mask is not None for prompt in of_object):
                self._targets[object_id].confidence = 1.0
        self._previous = picture

        masks: list[TrackingMask] = []
        occlusions: dict[int, bool] = {}
        for object_id in sorted(self.object_ids):
            target = self._targets[object_id]
            mask = given.get(object_id)
            if mask is None and target.num_lost == 0:
                mask = self._enlarged(target.probability)
            present = mask is not None and bool(mask.any())
            occlusions[object_id] = not present
            if mask is not None and present:
                masks.append(TrackingMask(mask, target.confidence, object_id))
        result = TrackingFrame(frame_idx, masks, occlusions, time.perf_counter() - start)
        self._latest = result
        return [result]

    def _start(self, object_id: int, mask: UInt8Array, descriptors: FloatArray) -> None:
        """Begin an object, or begin it anew, from its mask on the current frame."""
        import cv2

        probability = cv2.resize(
            mask.astype(np.float32), self._size, interpolation=cv2.INTER_AREA
        ).astype(np.float32)
        known = self._targets.get(object_id)
        target = _Target(
            logit=_log_odds(probability),
            probability=probability,
            centre_xy=_centre(probability),
            full_area=float(probability.sum()),
            num_lost=0,
            anchor=self._no_statistics(),
            recent=self._no_statistics(),
            weights=np.zeros((self._options["num_features"] + 1, 1), np.float32),
            confidence=_certainty(probability),
        )
        learned = self._learned(target, descriptors)
        fresh = (
            learned[0] or target.anchor[0],
            learned[1] or target.anchor[1],
        )
        # A second prompt adds to what the first one taught about the object.
        target.anchor = (
            fresh
            if known is None
            else (known.anchor[0].mixed(fresh[0], 0.5), known.anchor[1].mixed(fresh[1], 0.5))
        )
        target.recent = fresh
        self._solve(target)
        self._targets[object_id] = target

    def _propagate(
        self, object_ids: Sequence[int], picture: _Picture, descriptors: FloatArray
    ) -> None:
        """Carry objects from the last frame to this one and correct them by the evidence."""
        import cv2

        assert self._previous is not None
        options = self._options
        motion = self._motion(self._previous, picture)
        targets = [self._targets[i] for i in object_ids]
        carried = [_sampled(t.logit, motion.source_xy) for t in targets]
        carried_half = [
            cv2.resize(_sigmoid(c), self._half, interpolation=cv2.INTER_AREA) for c in carried
        ]
        background = _smooth_motion(motion, 1 - 2 * np.sum(carried_half, axis=0), sigma_px=25)
        background_error = self._prediction_error(picture, background)

        windows: list[tuple[slice, slice]] = []
        logits: list[FloatArray] = []
        total: FloatArray = np.ones(picture.gray.shape, np.float32)
        for target, logit, half in zip(targets, carried, carried_half, strict=True):
            reachable = self._reachable(target, half)
            window = _window(reachable, picture.gray.shape)
            score = np.full(reachable.shape, -1, np.float32)
            if reachable.any():
                score[reachable] = self._scores(target, descriptors[reachable])
            evidence = options["appearance_weight"] * np.clip(score, -_SCORE_CAP, _SCORE_CAP)
            if options["motion_weight"]:
                evidence += self._motion_evidence(
                    target, picture, motion, half, background, background_error
                )
            if target.num_lost and options["redetect"]:
                evidence += 4.0 * self._redetected(target, score)
            evidence -= options["background_bias"]
            evidence[~reachable] = -20.0
            large = cv2.resize(evidence, self._size, interpolation=cv2.INTER_LINEAR)[window]
            corrected = options["persistence"] * motion.consistency[window] * logit[window] + large
            odds = np.exp(np.clip(corrected, -20, 20)).astype(np.float32)
            total[window] += odds
            logits.append(odds)
            windows.append(window)

        crowd = np.zeros(picture.gray.shape, np.float32)
        for target, odds, window in zip(targets, logits, windows, strict=True):
            filtered = _guided(picture.lab[window], odds / total[window])
            target.probability = np.zeros(picture.gray.shape, np.float32)
            target.probability[window] = np.clip(filtered, 0, 1)
            crowd += target.probability
        for object_id, target in zip(object_ids, targets, strict=True):
            if len(targets) > 1:
                # The filter works on each object alone; no pixel may belong to two.
                target.probability /= np.maximum(crowd, 1)
            self._update(self._targets[object_id], motion, descriptors)

    def _update(self, target: _Target, motion: _Motion, descriptors: FloatArray) -> None:
        """Take the new probabilities into what is remembered of the object."""
        probability = target.probability
        target.logit = _log_odds(probability)
        area = float(probability.sum())
        lost = area < self._options["lost_area"] * target.full_area
        target.num_lost = target.num_lost + 1 if lost else 0
        if not lost:
            target.centre_xy = _centre(probability)
            # Grows with the object, though not as fast as a leak may; shrinks slowly, for what
            # hides an object does not make it smaller.
            target.full_area = max(min(area, 1.2 * target.full_area), 0.98 * target.full_area)
        inside = probability > 0.5
        trusted = float(motion.consistency[inside].mean()) if inside.any() else 0.0
        # Presence is decided by the area, so a present object is worth at least one half.
        target.confidence = 0.5 + 0.5 * _certainty(probability) * (0.5 + 0.5 * trusted)
        learned_object, learned_background = self._learned(target, descriptors)
        recent_object, recent_background = target.recent
        if learned_object is not None and area > 0.2 * target.full_area:
            recent_object = recent_object.mixed(learned_object, 0.05)
        if learned_background is not None:
            recent_background = recent_background.mixed(learned_background, 0.1)
        target.recent = recent_object, recent_background
        self._solve(target)

    # -- evidence ----------------------------------------------------------------------------

    def _motion(self, previous: _Picture, picture: _Picture) -> _Motion:
        """Return the flow between two pictures and how far it can be trusted."""
        import cv2

        if self._flow is None:
            preset = _PRESETS.index(self._options["flow_preset"])
            self._flow = cv2.DISOpticalFlow.create(preset)
        # A flow object keeps nothing between calls, but buffers and an initial flow if given.
        backward = np.asarray(self._flow.calc(picture.gray, previous.gray, None), np.float32)
        forward = np.asarray(self._flow.calc(previous.gray, picture.gray, None), np.float32)
        source = _grid(*self._size) + backward
        gap = backward + _sampled(forward, source)
        squared_gap = gap[..., 0] ** 2 + gap[..., 1] ** 2
        squared_length = backward[..., 0] ** 2 + backward[..., 1] ** 2
        tolerance = 0.3**2 + 0.02**2 * squared_length
        consistency = cv2.exp(-0.5 * squared_gap / tolerance)
        scale = np.array(self._half, np.float32) / np.array(self._size, np.float32)
        area = cv2.INTER_AREA
        return _Motion(
            source,
            np.asarray(consistency, np.float32),
            cv2.resize(backward, self._half, interpolation=area).astype(np.float32) * scale,
            cv2.resize(consistency, self._half, interpolation=area).astype(np.float32),
        )

    def _prediction_error(self, picture: _Picture, flow_half: FloatArray) -> FloatArray:
        """Return how badly a motion predicts each pixel from the last frame, in Lab units."""
        import cv2

        assert self._previous is not None
        predicted = _sampled(self._previous.lab_half, _grid(*self._half) + flow_half)
        difference = cv2.absdiff(picture.lab_half, predicted)
        summed = cv2.transform(difference, np.ones((1, 3), np.float32))
        return np.asarray(cv2.GaussianBlur(summed, (0, 0), 1.5), np.float32)

    def _motion_evidence(
        self,
        target: _Target,
        picture: _Picture,
        motion: _Motion,
        carried_half: FloatArray,
        background: FloatArray,
        background_error: FloatArray,
    ) -> FloatArray:
        """Return log-odds from which layer's motion predicts a pixel better."""
        import cv2

        own = _smooth_motion(motion, 2 * carried_half - 1, sigma_px=12)
        own_error = self._prediction_error(picture, own)
        least = np.minimum(own_error, background_error)
        evidence = self._options["motion_weight"] * (background_error - own_error)
        evidence = np.clip(evidence / (10 + 0.5 * least), -_MOTION_CAP, _MOTION_CAP)
        before = cv2.resize(target.probability, self._half, interpolation=cv2.INTER_AREA)
        # For the object speaks only what was object before, seen along its own motion. What the
        # background's motion takes from inside the old mask may be limbs that stand still.
        was_object = np.clip(2 * _sampled(before, _grid(*self._half) + own) - 0.8, 0, 1)
        was_covered = _sampled(before, _grid(*self._half) + background)
        gated = np.where(evidence > 0, evidence * was_object, evidence * (1 - 0.5 * was_covered))
        return np.asarray(gated, np.float32)

    def _reachable(self, target: _Target, carried_half: FloatArray) -> NDArray[np.bool_]:
        """Return where, at half the size, an object can be now."""
        import cv2

        missing = np.clip(1 - target.probability.sum() / target.full_area, 0, 1)
        radius = max(1, int(self._options["reach_px"] * (1 + 2 * missing)) // 2)
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        reachable = cv2.dilate((carried_half > 0.4).view(np.uint8), disk) > 0
        if target.num_lost and self._options["redetect"]:
            distance = 2 * _grid(*self._half) - target.centre_xy.astype(np.float32)
            searched = (1 + 0.5 * target.num_lost) * target.full_area**0.5
            reachable |= (distance**2).sum(2) < searched**2
        return np.asarray(reachable, np.bool_)

    def _redetected(self, target: _Target, score: FloatArray) -> NDArray[np.bool_]:
        """Return the place, at half the size, that looks most like a lost object, if any does."""
        import cv2

        smooth = cv2.GaussianBlur(score, (0, 0), 1.5)
        num, labels = cv2.connectedComponents((smooth > 0.2).astype(np.uint8))
        if num < 2:
            return np.zeros(score.shape, np.bool_)
        mass = np.bincount(labels.ravel(), np.maximum(smooth, 0).ravel(), num)
        mass[0] = 0
        best = int(mass.argmax())
        # A pixel of half the size stands for four.
        if 4 * mass[best] < 0.25 * target.full_area:
            return np.zeros(score.shape, np.bool_)
        return np.asarray(labels == best, np.bool_)

    # -- appearance --------------------------------------------------------------------------

    def _learned(
        self, target: _Target, descriptors: FloatArray
    ) -> tuple[_Statistics | None, _Statistics | None]:
        """Return statistics of the object and of its surroundings on the current frame."""
        import cv2

        half = cv2.resize(target.probability, self._half, interpolation=cv2.INTER_AREA)
        outside = (half < 0.5).astype(np.uint8)
        # Without any object there is no distance to it; a picture's diagonal is far enough.
        distance = np.minimum(cv2.distanceTransform(outside, cv2.DIST_L2, 3), sum(self._half)) * 2
        near = np.exp(-distance / (0.6 * 2 * np.count_nonzero(outside == 0) ** 0.5 + 10)).ravel()
        half = half.ravel()
        certain = np.abs(2 * half - 1)
        flat = descriptors.reshape(-1, descriptors.shape[2])
        found: list[_Statistics | None] = []
        for chosen, weight in (
            (half > 0.5, certain),
            ((half <= 0.5) & (near > 0.05), certain * near),
        ):
            index = np.flatnonzero(chosen)
            if len(index) > _NUM_SAMPLES:
                step = len(index) / _NUM_SAMPLES
                index = index[(np.arange(_NUM_SAMPLES) * step).astype(int)]
            if not len(index):
                found.append(None)
                continue
            share = weight[index] / (weight[index].sum() + 1e-6)
            root = np.sqrt(share).astype(np.float32)[:, None]
            features = self._features(flat[index])
            # Products with a matrix are several times faster than sums over an axis.
            first = cv2.gemm(features, root * root, 1, None, 0, flags=cv2.GEMM_1_T)
            features *= root
            found.append(_Statistics(cv2.mulTransposed(features, True), first))
        return found[0], found[1]

    def _solve(self, target: _Target) -> None:
        """Make the classifier from the statistics: ridge regression to 1 on object, -1 around."""
        import cv2

        kept = self._options["prompt_share"]
        of_object = target.anchor[0].mixed(target.recent[0], 1 - kept)
        around = target.anchor[1].mixed(target.recent[1], 0.5)
        second = of_object.second + around.second
        second[np.diag_indices_from(second)] += 0.2 / self._options["num_features"]
        solved, weights = cv2.solve(
            second, of_object.first - around.first, flags=cv2.DECOMP_CHOLESKY
        )
        if solved:
            target.weights = np.asarray(weights, np.float32)

    def _scores(self, target: _Target, descriptors: FloatArray) -> FloatArray:
        """Return the classifier's answers, about 1 on the object and -1 around it, shape (P,)."""
        import cv2

        features = self._features(descriptors)
        return np.asarray(cv2.gemm(features, target.weights, 1, None, 0), np.float32)[:, 0]

    def _features(self, descriptors: FloatArray) -> FloatArray:
        """Return random Fourier features and a constant 1, shape (P, num_features + 1)."""
        import cv2

        num = self._options["num_features"]
        directions, phases = _random_features(descriptors.shape[1], num)
        features = np.ones((len(descriptors), num + 1), np.float32)
        angles = cv2.gemm(np.ascontiguousarray(descriptors), directions, 1, None, 0)
        np.cos(angles + phases, out=features[:, :num])
        features[:, :num] *= np.float32((2 / num) ** 0.5)
        return features

    def _no_statistics(self) -> tuple[_Statistics, _Statistics]:
        size = self._options["num_features"] + 1
        nothing = _Statistics(np.zeros((size, size), np.float32), np.zeros((size, 1), np.float32))
        return nothing, nothing

    # -- sizes -------------------------------------------------------------------------------

    def _reduced(self, frame: UInt8Array) -> _Picture:
        import cv2

        small = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        return self._picture(
            np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2Lab), np.uint8),
            np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8),
        )

    def _picture(self, lab: UInt8Array, gray: UInt8Array) -> _Picture:
        import cv2

        half = cv2.resize(lab, self._half, interpolation=cv2.INTER_AREA)
        return _Picture(lab, gray, half.astype(np.float32))

    def _enlarged(self, probability: FloatArray) -> UInt8Array:
        """Return the mask at the size of the frame."""
        import cv2

        large = cv2.resize(probability, (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(large > 0.5).view(np.uint8)

    # -- the rest of the contract ------------------------------------------------------------

    def _forget(self, object_id: int) -> None:
        self._targets.pop(object_id, None)

    def _get_state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        if self._previous is not None:
            arrays["lab"], arrays["gray"] = self._previous.lab, self._previous.gray
        targets: list[dict[str, Any]] = []
        for object_id, target in self._targets.items():
            arrays[f"{object_id}.logit"] = target.logit
            arrays[f"{object_id}.probability"] = target.probability
            arrays[f"{object_id}.weights"] = target.weights
            for name, pair in (("anchor", target.anchor), ("recent", target.recent)):
                for layer, statistics in zip(("object", "around"), pair, strict=True):
                    arrays[f"{object_id}.{name}.{layer}.second"] = statistics.second
                    arrays[f"{object_id}.{name}.{layer}.first"] = statistics.first
            targets.append(
                {
                    "object_id": object_id,
                    "centre_xy": target.centre_xy.tolist(),
                    "full_area": target.full_area,
                    "num_lost": target.num_lost,
                    "confidence": target.confidence,
                }
            )
        return arrays, {"targets": targets}

    def _set_state(self, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
        self._previous = self._picture(arrays["lab"], arrays["gray"]) if "lab" in arrays else None
        self._targets = {}
        for entry in header["targets"]:
            object_id = entry["object_id"]

            def pair(name: str, key: int = object_id) -> tuple[_Statistics, _Statistics]:
                of_object, around = (
                    _Statistics(
                        arrays[f"{key}.{name}.{layer}.second"],
                        arrays[f"{key}.{name}.{layer}.first"],
                    )
                    for layer in ("object", "around")
                )
                return of_object, around

            self._targets[object_id] = _Target(
                logit=arrays[f"{object_id}.logit"],
                probability=arrays[f"{object_id}.probability"],
                centre_xy=np.array(entry["centre_xy"]),
                full_area=entry["full_area"],
                num_lost=entry["num_lost"],
                anchor=pair("anchor"),
                recent=pair("recent"),
                weights=arrays[f"{object_id}.weights"],
                confidence=entry["confidence"],
            )

    def _fingerprint(self) -> str:
        return self._digest


class FlowLoader(TrackingModelLoader):
    """The flow tracker; needs no weights and no GPU: `TrackingConfig.device` is not used.

    Parameters
    ----------
    config : TrackingConfig
        Its options are those of `OPTIONS`; ``image_size`` is another way to say ``work_pixels``,
        as the side of a square.

    Raises
    ------
    ValueError
        An option is unknown or out of range, or weights are given.
    """

    def __init__(self, config: TrackingConfig) -> None:
        super().__init__(config)
        options = check_options("flow", config.options, OPTIONS)
        if config.image_size is not None and "work_pixels" not in config.options:
            options["work_pixels"] = config.image_size**2
        for name in _SHARES:
            if not 0 <= options[name] <= 1:
                raise ValueError(
                    f"option {name} of tracker flow must lie in 0..1, got {options[name]}"
                )
        for name, least in (
            ("work_pixels", _MIN_SIDE**2),
            ("reach_px", 1),
            ("num_features", 8),
            ("appearance_weight", 0),
            ("motion_weight", 0),
        ):
            # Written this way round, NaN is refused too.
            if not options[name] >= least:
                raise ValueError(
                    f"option {name} of tracker flow must be at least {least}, got {options[name]}"
                )
        if not np.isfinite(options["background_bias"]):
            raise ValueError("option background_bias of tracker flow must be a finite number")
        if options["flow_preset"] not in _PRESETS:
            raise ValueError(
                f"option flow_preset of tracker flow must be one of {', '.join(_PRESETS)}, got "
                f"{options['flow_preset']!r}"
            )
        if config.checkpoint_path is not None:
            raise ValueError("tracker flow has no weights: leave out the checkpoint")
        if config.dtype not in (None, "float32"):
            raise ValueError(f"tracker flow computes in float32, not in {config.dtype}")
        self._options = options
        text = json.dumps([ALGORITHM, options], sort_keys=True)
        self._fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._loaded = False

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has run."""
        return self._loaded

    def load(self) -> None:
        """Make sessions possible; there is nothing to read.

        Notes
        -----
        From here on the process's BLAS has one thread, see `_hold_blas_to_one_thread`.
        """
        _hold_blas_to_one_thread()
        self._loaded = True

    def unload(self) -> None:
        """Undo `load`."""
        self._loaded = False

    def _open(self, height: int, width: int, num_frames: int | None) -> TrackingSession:
        return FlowSession(
            height,
            width,
            num_frames=num_frames,
            options=self._options,
            fingerprint=self._fingerprint,
        )


@functools.cache
def _hold_blas_to_one_thread() -> None:
    """Make products of matrices independent of the number of cores, for the life of the process.

    The wheels of OpenCV bring OpenBLAS, whose sums depend on the number of its threads: all cores
    unless the environment says otherwise. It is not given back on `unload`, for another loader in
    this process may still count on it.
    """
    import cv2  # noqa: F401 - its BLAS is found only once it is loaded
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1, user_api="blas")


# -- pictures and maps -----------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _grid(width: int, height: int) -> FloatArray:
    """Return the coordinates x, y of every pixel, shape (height, width, 2); read only."""
    grid = np.empty((height, width, 2), np.float32)
    grid[..., 0] = np.arange(width, dtype=np.float32)
    grid[..., 1] = np.arange(height, dtype=np.float32)[:, None]
    grid.flags.writeable = False
    return grid


@functools.lru_cache(maxsize=8)
def _random_features(num_inputs: int, num: int) -> tuple[FloatArray, FloatArray]:
    """Return the directions and phases of random Fourier features of a Gaussian kernel."""
    # RandomState, not Generator: its stream is the same in every version of NumPy.
    random = np.random.RandomState(_SEED)
    directions = random.standard_normal((num_inputs, num)).astype(np.float32)
    phases = random.uniform(0, 2 * np.pi, num).astype(np.float32)
    return directions, phases


def _described(lab: UInt8Array, size: tuple[int, int]) -> FloatArray:
    """Return what a small neighbourhood looks like: colour at three scales, and texture.

    The scales of the twelve numbers set the width of the kernel: a distance of 1 is a clear
    difference.
    """
    import cv2

    colour = cv2.resize(lab, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    # Brightness changes with light and shadow, so it weighs less than hue.
    colour *= np.array([0.024, 0.064, 0.064], np.float32)
    bright = np.ascontiguousarray(lab[..., 0]).astype(np.float32)
    fine = cv2.absdiff(bright, cv2.GaussianBlur(bright, (0, 0), 1.2))
    across = cv2.absdiff(cv2.Sobel(bright, cv2.CV_32F, 1, 0), 0) * (1 / 6)
    down = cv2.absdiff(cv2.Sobel(bright, cv2.CV_32F, 0, 1), 0) * (1 / 6)
    texture = cv2.resize(cv2.merge([fine, across, down]), size, interpolation=cv2.INTER_AREA)
    parts = [
        colour,
        cv2.GaussianBlur(colour, (0, 0), 1.5),
        cv2.GaussianBlur(colour, (0, 0), 5),
        cv2.GaussianBlur(texture, (0, 0), 1.8) / 8,
    ]
    return np.concatenate(parts, axis=2, dtype=np.float32)


def _sampled(values: FloatArray, source_xy: FloatArray) -> FloatArray:
    """Return `values` read at other places, linearly interpolated; borders are repeated."""
    import cv2

    return np.asarray(
        cv2.remap(values, source_xy, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
        np.float32,
    )


def _smooth_motion(motion: _Motion, membership: FloatArray, sigma_px: float) -> FloatArray:
    """Return the motion of one layer, everywhere, from the flow where the layer is seen."""
    import cv2

    width, height = motion.trust_half.shape[1], motion.trust_half.shape[0]
    weight = (motion.trust_half + 0.02) * np.clip(membership, 0, 1)
    weighted = np.dstack([motion.flow_half * weight[..., None], weight])
    # A wide blur costs as much as a narrow one on a smaller picture.
    coarse = cv2.resize(
        weighted, (max(width // 4, 1), max(height // 4, 1)), interpolation=cv2.INTER_AREA
    )
    coarse = cv2.GaussianBlur(coarse, (0, 0), sigma_px / 4)
    # Far from the layer its mean motion takes over.
    coarse = coarse + 1e-6 * coarse.mean((0, 1)) + np.float32(1e-9)
    smooth = np.asarray(coarse[..., :2] / coarse[..., 2:], np.float32)
    return np.asarray(
        cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR), np.float32
    )


def _guided(lab: UInt8Array, values: FloatArray, radius: int = 4, noise: float = 30) -> FloatArray:
    """Return `values` smoothed along the edges of a colour picture.

    Parameters
    ----------
    lab : ndarray of uint8, shape (H, W, 3)
        The picture whose edges guide.
    values : ndarray of float32, shape (H, W)
        What is smoothed.
    radius : int
        Of the square neighbourhood, in pixels.
    noise : float
        Variance of colour below which nothing counts as an edge.
    """
    import cv2

    size = (2 * radius + 1, 2 * radius + 1)

    def mean(array: FloatArray) -> FloatArray:
        blurred = cv2.boxFilter(array, -1, size, borderType=cv2.BORDER_REFLECT)
        return np.asarray(blurred, np.float32)

    guide = lab.astype(np.float32)
    mean_guide, mean_values = mean(guide), mean(values)
    covariance = mean(guide * values[..., None]) - mean_guide * mean_values[..., None]
    first, second, third = cv2.split(guide)
    m1, m2, m3 = cv2.split(mean_guide)
    squares = mean(cv2.merge([first * first, first * second, first * third]))
    others = mean(cv2.merge([second * second, second * third, third * third]))
    s11, s12, s13 = cv2.split(squares)
    s22, s23, s33 = cv2.split(others)
    # The symmetric 3x3 matrix of each neighbourhood is inverted by its cofactors.
    a, b, c = s11 - m1 * m1 + noise, s12 - m1 * m2, s13 - m1 * m3
    d, e, f = s22 - m2 * m2 + noise, s23 - m2 * m3, s33 - m3 * m3 + noise
    ca, cb, cc = d * f - e * e, c * e - b * f, b * e - c * d
    cd, ce, cf = a * f - c * c, b * c - a * e, a * d - b * b
    inverse = 1 / (a * ca + b * cb + c * cc)
    v1, v2, v3 = cv2.split(covariance)
    slope = cv2.merge(
        [
            (ca * v1 + cb * v2 + cc * v3) * inverse,
            (cb * v1 + cd * v2 + ce * v3) * inverse,
            (cc * v1 + ce * v2 + cf * v3) * inverse,
        ]
    )
    ones = np.ones((1, 3), np.float32)
    offset = mean_values - cv2.transform(slope * mean_guide, ones)
    return np.asarray(cv2.transform(mean(slope) * guide, ones) + mean(offset), np.float32)


def _sigmoid(logit: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-logit)), np.float32)


def _log_odds(probability: FloatArray) -> FloatArray:
    odds = (probability + _EPSILON) / (1 - probability + _EPSILON)
    return np.clip(np.log(odds), -_LOGIT_CAP, _LOGIT_CAP).astype(np.float32)


def _certainty(probability: FloatArray) -> float:
    """Return how far the pixels of a mask are from doubt, 0..1."""
    inside = probability[probability > 0.5]
    return float(2 * inside.mean() - 1) if len(inside) else 0.0


def _centre(probability: FloatArray) -> NDArray[np.float64]:
    import cv2

    moments = cv2.moments(probability)
    area = max(moments["m00"], _EPSILON)
    return np.array([moments["m10"] / area, moments["m01"] / area])


def _window(
    reachable_half: NDArray[np.bool_], shape: tuple[int, ...], margin: int = 12
) -> tuple[slice, slice]:
    """Return the part of the small picture that holds all of a mask at half the size."""
    rows, columns = np.flatnonzero(reachable_half.any(1)), np.flatnonzero(reachable_half.any(0))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return (
        slice(max(0, 2 * rows[0] - margin), min(shape[0], 2 * rows[-1] + 3 + margin)),
        slice(max(0, 2 * columns[0] - margin), min(shape[1], 2 * columns[-1] + 3 + margin)),
    )
