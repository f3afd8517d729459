"""Ultralytics YOLO networks: a checkpoint in, detections at full frame resolution out.

The one file that imports `ultralytics`; the YOLO tracker and the detectors are built on it. Only
the network itself is taken from the library: letterboxing, suppression and mask assembly are done
here, because the library's predictor spends its time on what a corpus job does not need (a
`Results` object, plots, timers and masks of detections nobody asked for).

Security and manners: a ``.pt`` file is a pickle, so it is opened with ``weights_only=True`` and
the library's allow-list of network classes; nothing in it can run code. Nothing is downloaded,
installed or reported: the environment is set before the import, and the library's settings file
goes to a private temporary directory unless ``YOLO_CONFIG_DIR`` says otherwise. What its import
changes in PIL, cv2, torch and NumPy is put back.

ultralytics is licensed under AGPL-3.0; installing the extra ``yolo`` means accepting that.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.errors import how_to_install
from workers.masks import Box, CroppedMask, crop_mask

UInt8Array = NDArray[np.uint8]
FloatArray = NDArray[np.float32]

PAD_VALUE = 114
"""Grey of the letterbox's border, as in training."""
MAX_CANDIDATES = 30_000
"""At most this many boxes of a frame enter suppression, the most confident first."""

MIN_ULTRALYTICS = (8, 4, 190)
"""The release from which checkpoints are known to open with an allow-list (``safe_only``)."""

_TASKS = {"detect": "detection", "segment": "segmentation"}


@dataclass(frozen=True, slots=True)
class Letterbox:
    """How a frame was scaled and padded to the network's input.

    Attributes
    ----------
    height, width : int
        Size of the frame.
    scaled_height, scaled_width : int
        Size of the frame inside the input.
    top, left : int
        Padding before it, in pixels of the input.
    input_height, input_width : int
        Size of the input.
    """

    height: int
    width: int
    scaled_height: int
    scaled_width: int
    top: int
    left: int
    input_height: int
    input_width: int

    @classmethod
    def fit(cls, height: int, width: int, image_size: int, stride: int) -> Letterbox:
        """Return the smallest rectangle of whole strides that holds the scaled frame."""
        gain = min(image_size / height, image_size / width)
        scaled_width = max(round(width * gain), 1)
        scaled_height = max(round(height * gain), 1)
        pad_x = (image_size - scaled_width) % stride
        pad_y = (image_size - scaled_height) % stride
        return cls(
            height=height,
            width=width,
            scaled_height=scaled_height,
            scaled_width=scaled_width,
            # Half a pixel of padding goes to the far side, as in training.
            top=round(pad_y / 2 - 0.1),
            left=round(pad_x / 2 - 0.1),
            input_height=scaled_height + pad_y,
            input_width=scaled_width + pad_x,
        )

    def apply(self, image: UInt8Array) -> UInt8Array:
        """Return the input picture, uint8 RGB of shape (input_height, input_width, 3)."""
        import cv2

        if image.shape[:2] != (self.scaled_height, self.scaled_width):
            image = cv2.resize(
                np.ascontiguousarray(image),
                (self.scaled_width, self.scaled_height),
                interpolation=cv2.INTER_LINEAR,
            )
        padded = np.full((self.input_height, self.input_width, 3), PAD_VALUE, np.uint8)
        bottom, right = self.top + self.scaled_height, self.left + self.scaled_width
        padded[self.top : bottom, self.left : right] = image
        return padded

    def to_frame(self, boxes_xyxy: FloatArray) -> FloatArray:
        """Return boxes of the input, float of shape (N, 4), in pixels of the frame, clipped."""
        gain = np.array(
            [self.scaled_width / self.width, self.scaled_height / self.height] * 2, np.float32
        )
        offset = np.array([self.left, self.top] * 2, np.float32)
        limit = np.array([self.width, self.height] * 2, np.float32)
        boxes: FloatArray = np.clip((boxes_xyxy - offset) / gain, 0, limit).astype(np.float32)
        return boxes


@dataclass(frozen=True, slots=True)
class _Prototypes:
    """The mask prototypes of one frame, shared by its detections.

    Attributes
    ----------
    values : ndarray of float32, shape (C, h, w)
        The basis every mask logit map is a combination of.
    letterbox : Letterbox
        Where the frame lies in them.
    """

    values: FloatArray
    letterbox: Letterbox

    def mask(self, coefficients: FloatArray, box_xyxy: Sequence[float]) -> CroppedMask:
        """Return one mask at the frame's resolution.

        The logits are combined, and bilinearly sampled at the centre of every frame pixel, only
        inside the detection's box: each pixel gets the value it would get if the whole frame were
        processed, and everything outside the box is background anyway.

        Parameters
        ----------
        coefficients : ndarray of float32, shape (C,)
            The detection's weights of the prototypes.
        box_xyxy : sequence of 4 float
            Its box, pixels of the frame.
        """
        fit = self.letterbox
        x0, y0, x1, y1 = (math.ceil(v) for v in box_xyxy)
        x1, y1 = min(x1, fit.width), min(y1, fit.height)
        if x0 >= x1 or y0 >= y1:
            return CroppedMask((0, 0, 0, 0), np.zeros((0, 0), np.uint8), 0)
        height, width = self.values.shape[1:]
        left, right, across = _samples(
            x0, x1, fit.scaled_width / fit.width, fit.left, fit.scaled_width,
            fit.input_width / width, width,
        )  # fmt: skip
        above, below, down = _samples(
            y0, y1, fit.scaled_height / fit.height, fit.top, fit.scaled_height,
            fit.input_height / height, height,
        )  # fmt: skip
        first_row, first_column = above[0], left[0]
        window = self.values[:, first_row : below[-1] + 1, first_column : right[-1] + 1]
        logits = np.tensordot(coefficients, window, axes=1)
        rows = logits[:, left - first_column] * (1 - across) + logits[:, right - first_column] * (
            across
        )
        crop = np.empty((y1 - y0, x1 - x0), np.uint8)
        # All frame rows between the same two prototype rows are done at once: the two stay in the
        # processor's cache, which makes this several times faster than gathering whole arrays.
        edges = [0, *(np.flatnonzero(np.diff(above)) + 1), len(above)]
        for start, stop in itertools.pairwise(edges):
            upper, lower = rows[above[start] - first_row], rows[below[start] - first_row]
            np.greater(
                upper + down[start:stop, None] * (lower - upper),
                0,
                out=crop[start:stop].view(np.bool_),
            )
        tight = crop_mask(crop)
        if not tight.area:
            return tight
        tx0, ty0, tx1, ty1 = tight.box_xyxy
        return CroppedMask((x0 + tx0, y0 + ty0, x0 + tx1, y0 + ty1), tight.crop, tight.area)


def _samples(
    start: int, stop: int, gain: float, pad: int, content: int, ratio: float, size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], FloatArray]:
    """Return where the pixels ``start..stop`` of one axis lie between prototype cells.

    Returns the lower cell, the upper cell and the weight of the upper one. Samples never reach
    into the letterbox's border: they are clamped to the cells that the frame covers.
    """
    position = ((np.arange(start, stop) + 0.5) * gain + pad) / ratio - 0.5
    position = np.clip(position, pad / ratio, max((pad + content) / ratio - 1, pad / ratio))
    lower = np.clip(np.floor(position).astype(np.intp), 0, size - 1)
    upper = np.minimum(lower + 1, size - 1)
    return lower, upper, (position - lower).astype(np.float32)


class YoloDetection:
    """One detection of one frame.

    Attributes
    ----------
    box_xyxy : tuple of 4 float
        Pixels of the frame.
    score : float
        Confidence, 0..1.
    category_id : int
        Index of the class.
    """

    def __init__(
        self,
        box_xyxy: tuple[float, float, float, float],
        score: float,
        category_id: int,
        prototypes: _Prototypes | None = None,
        coefficients: FloatArray | None = None,
    ) -> None:
        self.box_xyxy = box_xyxy
        self.score = score
        self.category_id = category_id
        self._prototypes = prototypes
        self._coefficients = coefficients

    def __repr__(self) -> str:
        box = ", ".join(f"{v:.1f}" for v in self.box_xyxy)
        return f"YoloDetection([{box}], {self.score:.3f}, category_id={self.category_id})"

    @cached_property
    def mask(self) -> CroppedMask | None:
        """The mask at the frame's resolution, made when first asked for; None without one."""
        if self._prototypes is None or self._coefficients is None:
            return None
        return self._prototypes.mask(self._coefficients, self.box_xyxy)

    @property
    def pixel_box_xyxy(self) -> Box:
        """The box grown to whole pixels."""
        x0, y0, x1, y1 = self.box_xyxy
        return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


class YoloNetwork:
    """A loaded YOLO network.

    Parameters
    ----------
    checkpoint_path : str or Path
        Local file of the weights.
    task : str
        ``detect`` or ``segment``: what the checkpoint must be able to do. A segmentation network
        also detects.
    device : str
        ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for the GPU where there is one.
    image_size : int or None
        Longer side of the input in pixels, rounded up to whole strides; None is what the network
        was trained with.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``; None is float32.

    Raises
    ------
    RuntimeError
        ultralytics is not installed, the file is missing, truncated, unsafe or of another task,
        or the device is not there. One sentence each.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        *,
        task: str,
        device: str = "cpu",
        image_size: int | None = None,
        dtype: str | None = None,
    ) -> None:
        path = Path(checkpoint_path)
        if not path.is_file():
            raise RuntimeError(
                f"the checkpoint {path} does not exist: give the path of a YOLO .pt file"
            )
        torch, tasks = _import_ultralytics()
        self._device = _resolve_device(torch, device)
        self._dtype = getattr(torch, dtype or "float32")
        model = _load_model(tasks, path, task)
        self.classes: dict[int, str] = {int(k): str(v) for k, v in dict(model.names).items()}
        self.has_masks: bool = model.task == "segment"
        trained_size = model.args.get("imgsz") if isinstance(model.args, dict) else None
        self.stride = max(int(model.stride.max()), 32)
        wanted = image_size or (trained_size if isinstance(trained_size, int) else 640)
        self.image_size = math.ceil(wanted / self.stride) * self.stride
        model = model.fuse(verbose=False).eval().requires_grad_(False)
        # Channels last is how CPU and GPU convolutions want their memory: a quarter less time.
        self._model: Any = model.to(
            device=self._device, dtype=self._dtype, memory_format=torch.channels_last
        )
        self._end2end = bool(getattr(model, "end2end", False))

    def detect(
        self,
        images: Sequence[UInt8Array],
        *,
        confidence: float,
        nms_iou: float = 0.7,
        max_detections: int = 300,
        categories: Collection[int] | None = None,
    ) -> list[list[YoloDetection]]:
        """Return the detections of each picture, the most confident first.

        Parameters
        ----------
        images : sequence of ndarray of uint8, shape (H, W, 3)
            RGB, 0-255; pictures of one size go through the network together.
        confidence : float
            Smallest confidence that counts, 0..1.
        nms_iou : float
            Of two boxes of a class that overlap by more, the less confident goes. Networks
            without suppression (end to end) do not use it.
        max_detections : int
            At most this many detections of a picture.
        categories : collection of int, optional
            Only these classes; every class when left out.

        Returns
        -------
        list of list of YoloDetection
            One list per picture.
        """
        import torch

        fits = [Letterbox.fit(i.shape[0], i.shape[1], self.image_size, self.stride) for i in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, fit in enumerate(fits):
            groups.setdefault((fit.input_height, fit.input_width), []).append(i)
        found: list[list[YoloDetection]] = [[] for _ in images]
        for members in groups.values():
            inputs = np.stack([fits[i].apply(images[i]) for i in members])
            with torch.inference_mode():
                batch = torch.from_numpy(inputs).to(self._device).permute(0, 3, 1, 2)
                # The stride order of NHWC memory is channels last already: no copy is made.
                output = self._model(batch.to(self._dtype).div_(255))
                predictions, prototypes = self._split(output)
                for slot, i in enumerate(members):
                    rows = self._select(
                        predictions[slot].float(), confidence, nms_iou, max_detections, categories
                    )
                    basis = (
                        _Prototypes(prototypes[slot].float().cpu().numpy(), fits[i])
                        if prototypes is not None and len(rows)
                        else None
                    )
                    found[i] = _detections(rows, fits[i], basis)
        return found

    def _split(self, output: Any) -> tuple[Any, Any | None]:
        """Return predictions and prototypes from the network's nested output."""
        if not self.has_masks:
            return (output[0] if isinstance(output, (tuple, list)) else output), None
        first, second = output[0], output[1]
        if isinstance(first, (tuple, list)):
            return first[0], first[1]
        return first, second

    def _select(
        self,
        prediction: Any,
        confidence: float,
        nms_iou: float,
        max_detections: int,
        categories: Collection[int] | None,
    ) -> FloatArray:
        """Return the kept rows ``x0, y0, x1, y1, score, class, coefficients...`` of one picture.

        `prediction` is (4 + classes + coefficients, N) with centre boxes, or (N, 6 +
        coefficients) with corner boxes when the network is end to end.
        """
        import torch
        from torchvision.ops import batched_nms

        num_classes = len(self.classes)
        if self._end2end:
            score, category = prediction[:, 4], prediction[:, 5]
        else:
            score, category = prediction[4 : 4 + num_classes].max(0)
        counts = score >= confidence
        if categories is not None:
            counts &= torch.isin(category.int(), torch.tensor([*categories]).to(category.device))
        keep = torch.nonzero(counts)[:, 0]
        if not len(keep):
            return np.zeros((0, 6), np.float32)
        if self._end2end:
            return np.asarray(prediction[keep[:max_detections]].cpu().numpy(), np.float32)
        # Stable, so that equal scores keep their order on every machine.
        keep = keep[score[keep].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
        score, category, prediction = score[keep], category[keep], prediction[:, keep].T
        centre, half = prediction[:, :2], prediction[:, 2:4] / 2
        boxes = torch.cat((centre - half, centre + half), 1)
        chosen = batched_nms(boxes, score, category, nms_iou)[:max_detections]
        rows = torch.cat(
            (
                boxes[chosen],
                score[chosen, None],
                category[chosen, None].to(score.dtype),
                prediction[chosen, 4 + num_classes :],
            ),
            1,
        )
        return np.asarray(rows.cpu().numpy(), np.float32)


def _detections(
    rows: FloatArray, letterbox: Letterbox, prototypes: _Prototypes | None
) -> list[YoloDetection]:
    boxes = letterbox.to_frame(rows[:, :4])
    return [
        YoloDetection(
            (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            float(row[4]),
            int(row[5]),
            prototypes,
            row[6:] if prototypes is not None else None,
        )
        for row, box in zip(rows, boxes, strict=True)
        if box[2] > box[0] and box[3] > box[1]
    ]


def _import_ultralytics() -> tuple[Any, Any]:
    """Import torch and `ultralytics.nn.tasks` with every outward door of the latter shut."""
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["ULTRALYTICS_SAFE_LOAD"] = "true"
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = str(_private_folder())
    try:
        import torch

        with _patches_undone():
            import ultralytics
            from ultralytics.nn import tasks
    except ImportError as error:
        raise RuntimeError(
            f"YOLO needs the package ultralytics (AGPL-3.0): {how_to_install('yolo')} ({error})"
        ) from error
    numbers = re.findall(r"\d+", ultralytics.__version__)[:3]
    if tuple(int(n) for n in numbers) < MIN_ULTRALYTICS:
        wanted = ".".join(map(str, MIN_ULTRALYTICS))
        raise RuntimeError(
            f"ultralytics {ultralytics.__version__} would run code that a checkpoint holds: "
            f"install {wanted} or newer, pip install -U 'ultralytics>={wanted}'"
        )
    return torch, tasks


@contextmanager
def _patches_undone() -> Iterator[None]:
    """Undo what the import of ultralytics changes in other libraries.

    It replaces functions of PIL, cv2 and torch for the whole process (a broken picture then fails
    with a missing HEIF plugin instead of `UnidentifiedImageError`), stops cv2's threads, and
    changes how NumPy prints.
    """
    import cv2
    import torch
    from PIL import Image

    owned: list[tuple[Any, str]] = [(Image, "open"), (torch, "save")]
    owned += [(cv2, name) for name in ("imread", "imwrite", "imshow") if hasattr(cv2, name)]
    before = [getattr(module, name) for module, name in owned]
    num_threads = cv2.getNumThreads()
    try:
        with np.printoptions():
            yield
    finally:
        for (module, name), function in zip(owned, before, strict=True):
            setattr(module, name, function)
        cv2.setNumThreads(num_threads)


def _private_folder() -> Path:
    """Return a folder of this user for the library's settings, below the temporary one."""
    shared_name = Path(tempfile.gettempdir()) / f"maskmill-ultralytics-{os.getuid()}"
    try:
        shared_name.mkdir(mode=0o700, exist_ok=True)
        if not shared_name.is_symlink() and shared_name.stat().st_uid == os.getuid():
            return shared_name
    except OSError:
        pass  # a file or a stranger's folder of that name
    return Path(tempfile.mkdtemp(prefix="maskmill-ultralytics-"))


def _load_model(tasks: Any, path: Path, task: str) -> Any:
    """Return the network of a checkpoint, float32, on the CPU, not yet fused."""
    import torch

    try:
        checkpoint, _ = tasks.torch_safe_load(str(path.resolve()), safe_only=True)
        model = checkpoint.get("ema") or checkpoint.get("model")
    except Exception as error:  # whatever a damaged pickle makes of itself
        reason = " ".join(str(error).split()).encode("ascii", "ignore").decode()
        raise RuntimeError(
            f"the checkpoint {path} cannot be read as a YOLO .pt file, it is truncated or of "
            f"another kind: fetch it again ({type(error).__name__}: {reason[:200]})"
        ) from error
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "names"):
        raise RuntimeError(
            f"the checkpoint {path} holds no YOLO network: export it with ultralytics' model.save"
        )
    model = model.float()
    model.args = {**(checkpoint.get("train_args") or {})}
    model.task = getattr(model, "task", None) or tasks.guess_model_task(model)
    if model.task not in _TASKS or (task == "segment" and model.task != "segment"):
        raise RuntimeError(
            f"the checkpoint {path} is a YOLO network for {_TASKS.get(model.task, model.task)}, "
            f"but {_TASKS[task]} is needed: give a {'-seg ' if task == 'segment' else ''}checkpoint"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Upsample) and not hasattr(module, "recompute_scale_factor"):
            module.recompute_scale_factor = None  # checkpoints older than torch 1.11
    return model


def _resolve_device(torch: Any, device: str) -> Any:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise RuntimeError(
            f"there is no device {device!r}: use auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device {device} is not there: use cpu, or a machine with a GPU")
    return resolved
