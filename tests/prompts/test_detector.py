"""`workers.prompts.detector`.

- Names are known by family and size, whatever their case; a misspelt one names its neighbours.
- Only detections of the wanted classes and confidence count, at most as many as wanted, the most
  confident first; classes are wanted by name or index, and an unknown one names its neighbours.
- Pictures are RGB; detections are in their pixels, masks (of segmentation networks) of their size.
- Weights that are missing or of another kind are one sentence, as `ConfigError`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media import shared_dir
from tests.networks import random_checkpoint, real_checkpoint, scene
from workers.errors import ConfigError
from workers.messages import DetectorSpec
from workers.prompts.detector import Detector, create_detector
from workers.yolo import _patches_undone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def loaded(path: Path, spec: DetectorSpec) -> Detector:
    detector = create_detector(spec, device="cpu", checkpoint_path=path)
    detector.load()
    return detector


@pytest.mark.parametrize("name", ["yolo11n", "YOLO11N_seg", "yolov8x-seg", "yolo26m"])
def test_names(name: str) -> None:
    assert create_detector(DetectorSpec(name)).classes == {}


def test_a_misspelt_name_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"no detector 'yolo11'.*yolo11"):
        create_detector(DetectorSpec("yolo11"))


def test_filters(folder: Path) -> None:
    # Given everything the network finds
    path = random_checkpoint(folder, "yolo11n-seg")
    image = scene(180, 320)
    everything = loaded(path, DetectorSpec("yolo11n-seg")).detect(image)
    scores = [d.score for d in everything]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= 0.25
    for found in everything:
        assert found.mask is not None
        assert found.mask.shape == (180, 320)
        assert found.mask.dtype == np.uint8
        assert found.mask.any()
        x0, y0, x1, y1 = found.box_xyxy
        assert 0 <= x0 < x1 <= 320
        assert 0 <= y0 < y1 <= 180

    # When it is filtered, then what is left is what it would have been
    def boxes(spec: DetectorSpec) -> list[tuple[float, ...]]:
        return [d.box_xyxy for d in loaded(path, spec).detect(image)]

    assert boxes(DetectorSpec("yolo11n-seg", max_objects=2)) == [d.box_xyxy for d in everything[:2]]
    sure = [d.box_xyxy for d in everything if d.score >= 0.4]
    assert boxes(DetectorSpec("yolo11n-seg", confidence=0.4)) == sure
    wanted = {everything[0].category_id, everything[-1].category_id}
    of_class = [d.box_xyxy for d in everything if d.category_id in wanted]
    assert boxes(DetectorSpec("yolo11n-seg", classes=tuple(map(str, wanted)))) == of_class
    few = boxes(DetectorSpec("yolo11n-seg", classes=tuple(map(str, wanted)), max_objects=3))
    assert few == of_class[:3]


def test_an_unknown_class_names_its_neighbours(folder: Path) -> None:
    path = random_checkpoint(folder, "yolo26n")
    assert loaded(path, DetectorSpec("yolo26n", classes=("4",))).classes[4]
    for wanted, said in (("5", "no class '5': it knows"), ("-1", "no class '-1'")):
        with pytest.raises(ConfigError, match=said):
            loaded(path, DetectorSpec("yolo26n", classes=(wanted,)))


def test_bad_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs its weights"):
        create_detector(DetectorSpec("yolo11n")).load()
    with pytest.raises(ConfigError, match=r"gone\.pt does not exist"):
        create_detector(DetectorSpec("yolo11n", checkpoint=str(tmp_path / "gone.pt"))).load()
    with pytest.raises(ConfigError, match="segmentation is needed"):
        loaded(random_checkpoint(folder, "yolo26n"), DetectorSpec("yolo26n-seg"))


def test_nothing_is_found_before_load() -> None:
    with pytest.raises(RuntimeError, match="not loaded"):
        create_detector(DetectorSpec("yolo11n")).detect(scene(32, 32))


def test_a_real_detector_sees_a_real_dog_in_rgb() -> None:
    path = real_checkpoint("yolo11n.pt")
    sequence = shared_dir() / "data/davis/dog"
    frame = min((sequence / "frames").iterdir())
    image = np.asarray(Image.open(frame).convert("RGB"))
    truth = np.asarray(Image.open(min((sequence / "masks").iterdir()))) > 0
    # Given a class by name, in any case
    detector = loaded(path, DetectorSpec("yolo11n", classes=("Dog",)))
    assert detector.classes[16] == "dog"
    (found,) = detector.detect(image)
    # Then the box is the mask's, give or take 5 % of the picture
    assert found.category_id == 16
    assert found.mask is None
    ys, xs = np.nonzero(truth)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert np.abs(np.subtract(found.box_xyxy, box)).max() < 0.05 * image.shape[1]
    # And the score is what the library gives for the file; with colours swapped it is another
    with _patches_undone():  # for the tests after this one
        from ultralytics import YOLO

    theirs = YOLO(str(path)).predict(str(frame), classes=[16], verbose=False, device="cpu")[0]
    assert found.score == pytest.approx(float(theirs.boxes.conf[0]), abs=5e-3)
    (swapped,) = detector.detect(image[..., ::-1])
    assert swapped.score != pytest.approx(found.score, abs=1e-2)
    with pytest.raises(ConfigError, match="no class 'dogg': did you mean dog"):
        loaded(path, DetectorSpec("yolo11n", classes=("dogg",)))
