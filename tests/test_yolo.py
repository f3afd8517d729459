"""`workers.yolo`.

- Every family and head gives the detections of the library's own predictor, and masks at the
  frame's resolution that equal its full-resolution masks.
- A mask computed inside its box is what the whole frame would give there.
- Pictures of several sizes in one call give what one call each gives.
- A checkpoint that is missing, truncated, of another task, no network, or that would run code is
  refused in one sentence; nothing is downloaded, installed or written beside it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.media import shared_dir
from tests.networks import NUM_CLASSES, random_checkpoint, real_checkpoint, scene
from workers.masks import crop_mask, cropped_iou_matrix
from workers.yolo import Letterbox, YoloDetection, YoloNetwork, _patches_undone, _Prototypes

CONFIDENCE = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def predictor_results(path: Path, image: NDArray[np.uint8], **options: Any) -> Any:
    """Return what the library itself finds, with full-size masks, without boxes of no area."""
    with _patches_undone():  # for the tests after this one
        from ultralytics import YOLO

    bgr = np.ascontiguousarray(image[..., ::-1])
    found = YOLO(str(path)).predict(
        bgr, conf=CONFIDENCE, retina_masks=True, verbose=False, device="cpu", **options
    )[0]
    sides = found.boxes.xyxy[:, 2:] - found.boxes.xyxy[:, :2]
    return found[(sides > 0).all(1)]


def agreement(ours: list[YoloDetection], theirs: Any) -> tuple[float, float]:
    """Return the share of their detections that we have too, and the mean IoU of those masks.

    Rounding differs between memory layouts, so detections are paired by content, not by order.
    """
    found = 0
    overlaps = []
    for i, box in enumerate(theirs.boxes):
        for detection in ours:
            if (
                detection.category_id == int(box.cls)
                and abs(detection.score - float(box.conf)) < 0.01
                and np.abs(box.xyxy[0].numpy() - detection.box_xyxy).max() < 1
            ):
                found += 1
                if theirs.masks is not None and detection.mask is not None:
                    other = crop_mask(theirs.masks.data[i].numpy())
                    overlaps.append(cropped_iou_matrix([detection.mask], [other])[0, 0])
                break
    return found / max(len(theirs.boxes), 1), float(np.mean(overlaps)) if overlaps else 1.0


@pytest.mark.parametrize("shape", [(180, 320), (321, 250), (96, 160)])
@pytest.mark.parametrize(
    ("family", "end2end"),
    [("yolov8n-seg", False), ("yolo11n-seg", False), ("yolo26n-seg", False), ("yolo26n-seg", True),
     ("yolo26n", True)],
)  # fmt: skip
def test_every_family_equals_the_predictor(
    folder: Path, family: str, end2end: bool, shape: tuple[int, int]
) -> None:
    path = random_checkpoint(folder, family, end2end=end2end)
    network = YoloNetwork(path, task="segment" if family.endswith("-seg") else "detect")
    assert len(network.classes) == NUM_CLASSES
    image = scene(*shape)
    ours = network.detect([image], confidence=CONFIDENCE)[0]
    ours = [d for d in ours if d.mask is None or d.mask.area]
    options: dict[str, Any] = {"nms": False} if end2end else {}
    theirs = predictor_results(path, image, imgsz=network.image_size, **options)
    assert len(theirs.boxes) > 5
    assert abs(len(ours) - len(theirs.boxes)) <= 0.03 * len(theirs.boxes) + 1
    share, overlap = agreement(ours, theirs)
    assert share > 0.95
    # The library resamples in two steps where padding is no whole prototype cell, which shows on
    # an untrained network's jagged logits; without padding both do the same.
    assert overlap > (0.999 if shape == (96, 160) else 0.93)


def test_the_real_network_equals_the_predictor() -> None:
    path = real_checkpoint("yolo11n-seg.pt")
    import av

    network = YoloNetwork(path, task="segment")
    for clip in ("02_cups.mp4", "bedroom.mp4"):
        with av.open(str(shared_dir() / "data/videos" / clip)) as container:
            image = next(container.decode(video=0)).to_ndarray(format="rgb24")
        (ours,) = network.detect([image], confidence=CONFIDENCE)
        theirs = predictor_results(path, image)
        assert len(ours) == len(theirs.boxes) > 1
        share, overlap = agreement(ours, theirs)
        assert share == 1
        assert overlap > 0.995


def bilinear(values: NDArray[np.float32], fit: Letterbox) -> NDArray[np.float64]:
    """Return prototypes of one channel at every frame pixel, pixel by pixel."""
    height, width = values.shape
    out = np.empty((fit.height, fit.width))
    for y in range(fit.height):
        for x in range(fit.width):
            at = []
            for centre, scaled, size, pad, inside, cells in (
                (y + 0.5, fit.scaled_height, fit.height, fit.top, fit.input_height, height),
                (x + 0.5, fit.scaled_width, fit.width, fit.left, fit.input_width, width),
            ):
                ratio = inside / cells
                position = (centre * scaled / size + pad) / ratio - 0.5
                at.append(min(max(position, pad / ratio), (pad + scaled) / ratio - 1))
            j, i = int(at[0]), int(at[1])
            v, u = at[0] - j, at[1] - i
            j1, i1 = min(j + 1, height - 1), min(i + 1, width - 1)
            out[y, x] = (values[j, i] * (1 - u) + values[j, i1] * u) * (1 - v) + (
                values[j1, i] * (1 - u) + values[j1, i1] * u
            ) * v
    return out


@settings(deadline=None, max_examples=30)
@given(
    st.integers(5, 60),
    st.integers(5, 60),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.integers(0, 99),
)
def test_a_cropped_mask_is_part_of_the_whole(
    height: int, width: int, corners: list[float], seed: int
) -> None:
    # Given random prototypes of a letterboxed frame, and a box in it
    fit = Letterbox.fit(height, width, 64, 32)
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(1, fit.input_height // 4, fit.input_width // 4)).astype(np.float32)
    x0, x1 = sorted((corners[0] * width, corners[1] * width))
    y0, y1 = sorted((corners[2] * height, corners[3] * height))
    # When the mask is made inside the box
    mask = _Prototypes(values, fit).mask(np.ones(1, np.float32), (x0, y0, x1, y1))
    # Then it equals the whole frame's, cut to the box; only a logit of nearly 0 may round away
    logits = bilinear(values[0], fit)
    ys, xs = np.mgrid[:height, :width]
    logits[(xs < x0) | (xs >= x1) | (ys < y0) | (ys >= y1)] = -1
    clear = np.abs(logits) > 1e-4
    assert np.array_equal(mask.paste(height, width)[clear], (logits > 0)[clear])


def test_sizes_are_batched_without_mixing(folder: Path) -> None:
    network = YoloNetwork(random_checkpoint(folder, "yolo11n-seg"), task="segment")
    images = [scene(180, 320), scene(96, 160, 1), scene(180, 320, 2), scene(64, 64, 3)]
    together = network.detect(images, confidence=CONFIDENCE)
    for image, found in zip(images, together, strict=True):
        (alone,) = network.detect([image], confidence=CONFIDENCE)
        assert abs(len(alone) - len(found)) <= 1
        assert alone[0].score == pytest.approx(found[0].score, abs=1e-3)
        assert alone[0].box_xyxy == pytest.approx(found[0].box_xyxy, abs=0.1)
    assert network.detect([], confidence=CONFIDENCE) == []


@pytest.mark.parametrize("end2end", [False, True])
def test_limits(folder: Path, end2end: bool) -> None:
    network = YoloNetwork(random_checkpoint(folder, "yolo26n", end2end=end2end), task="detect")
    image = scene(180, 320)
    (found,) = network.detect([image], confidence=CONFIDENCE)
    assert all(d.score >= CONFIDENCE and d.mask is None for d in found)
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    (few,) = network.detect([image], confidence=CONFIDENCE, max_detections=3)
    assert 1 <= len(few) <= 3
    assert [d.box_xyxy for d in few] == [d.box_xyxy for d in found[: len(few)]]
    wanted = found[-1].category_id
    (of_class,) = network.detect([image], confidence=CONFIDENCE, categories=[wanted])
    assert {d.category_id for d in of_class} == {wanted}
    assert network.detect([image], confidence=1.0) == [[]]


def test_image_size_is_rounded_up_to_strides(folder: Path) -> None:
    path = random_checkpoint(folder, "yolo11n-seg")
    assert YoloNetwork(path, task="segment").image_size == 160
    assert YoloNetwork(path, task="segment", image_size=161).image_size == 192


def test_bad_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    import torch

    good = random_checkpoint(folder, "yolo26n").read_bytes()
    cases: dict[str, tuple[bytes | None, str]] = {
        "gone.pt": (None, "does not exist"),
        "empty.pt": (b"", "cannot be read"),
        "cut.pt": (good[: len(good) // 2], "cannot be read"),
        "text.pt": (b"<html>not found</html>", "cannot be read"),
        "detector.pt": (good, "for detection, but segmentation is needed"),
    }
    torch.save({"weights": torch.zeros(2)}, tmp_path / "tensors.pt")
    cases["tensors.pt"] = ((tmp_path / "tensors.pt").read_bytes(), "holds no YOLO network")
    for name, (data, said) in cases.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(RuntimeError, match=said) as caught:
            YoloNetwork(path, task="segment")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_checkpoint_never_runs_code(tmp_path: Path, archive: bool) -> None:
    import torch

    sprung = tmp_path / "sprung"
    path = tmp_path / "trap.pt"
    if archive:
        torch.save({"model": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Trap(sprung)}))
    with pytest.raises(RuntimeError, match="cannot be read"):
        YoloNetwork(path, task="segment")
    assert not sprung.exists()


def test_an_unknown_device_is_refused(folder: Path) -> None:
    path = random_checkpoint(folder, "yolo26n")
    with pytest.raises(RuntimeError, match="no device 'gpu'"):
        YoloNetwork(path, task="detect", device="gpu")
    with pytest.raises(RuntimeError, match="cuda:99 is not there"):
        YoloNetwork(path, task="detect", device="cuda:99")


def test_the_library_stays_quiet(folder: Path, tmp_path: Path) -> None:
    """A fresh process prints nothing, writes nothing at home, opens no connection, patches nothing.

    In a fresh process, because the library may have been imported into this one.
    """
    path = random_checkpoint(folder, "yolo26n")
    code = (
        "import socket, sys, numpy as np\n"
        "def refuse(*a, **k): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = refuse\n"
        "import cv2, torch, PIL.Image\n"
        "owned = [(PIL.Image, 'open'), (cv2, 'imread'), (cv2, 'imwrite'), (torch, 'save'),\n"
        "         (torch, 'load'), (cv2, 'getNumThreads')]\n"
        "before = [getattr(*pair) for pair in owned]\n"
        "settings = np.get_printoptions(), cv2.getNumThreads()\n"
        "from workers.yolo import YoloNetwork\n"
        f"net = YoloNetwork({str(path)!r}, task='detect')\n"
        "net.detect([np.zeros((64, 64, 3), np.uint8)], confidence=0.2)\n"
        "from ultralytics.utils.events import events\n"
        "assert not events.enabled\n"
        "assert before == [getattr(*pair) for pair in owned]\n"
        "assert settings == (np.get_printoptions(), cv2.getNumThreads())\n"
    )
    home, here, temporary = tmp_path / "home", tmp_path / "here", tmp_path / "tmp"
    for made in (home, here, temporary):
        made.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO", "PYTEST"))}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "http" not in done.stderr
    assert done.stdout == ""
    assert list(here.iterdir()) == []
    assert not list(home.rglob("*ltralytics*"))
    made_by_it = [p.name for p in temporary.iterdir() if "ltralytics" in p.name]
    assert made_by_it == [f"maskmill-ultralytics-{os.getuid()}"]
