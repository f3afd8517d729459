"""The demo: a clip with known masks, tracked by the whole pipeline, pictured and scored.

* The clip is photographic, the same every time, and its truth is exact: three objects, the coffee
  cup wholly hidden for a while behind the cat, and seen again.
* The encoded clip shows what the truth says, its prompts are the truth of the first frame.
* A foreign folder is refused, a broken-off rendering is made whole, a finished one is kept.
* `maskmill demo` ends with exit code 0, a dataset, a picture, and J&F of at least 0.5; a second
  time it finds everything done.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from jobs.dataset import open_dataset
from jobs.demo import demo_config, prepare_clip, read_truth
from jobs.demo_scene import HEIGHT_PX, LABELS, NUM_FRAMES, WIDTH_PX, render_scene, write_clip
from workers.errors import ConfigError
from workers.prompts.table import read_prompts


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a clip of nine frames."""
    folder = tmp_path_factory.mktemp("demo") / "clip"
    write_clip(folder, 9)
    return folder


def test_scene_has_a_real_occlusion() -> None:
    frames = [frame.truth for frame in render_scene(25)]
    visible = np.array([[(truth == i).sum() for i in LABELS] for truth in frames])
    cat, astronaut, coffee = visible.T
    assert cat.min() > 5000
    assert astronaut.min() > 5000
    hidden = np.flatnonzero(coffee == 0)
    assert len(hidden) >= 2
    assert 0 < hidden[0] <= hidden[-1] < len(frames) - 1
    assert (np.diff(hidden) == 1).all(), "hidden once, not flickering"
    assert coffee[0] > 5000
    assert coffee[-1] > 5000


def test_scene_is_photographic() -> None:
    image = next(iter(render_scene(2))).image
    assert image.shape == (HEIGHT_PX, WIDTH_PX, 3)
    colours = np.unique(image.reshape(-1, 3), axis=0)
    assert len(colours) > 20_000


def test_clip_is_the_same_every_time(short_clip: Path, tmp_path: Path) -> None:
    write_clip(tmp_path, 9)
    for name in ("videos/adrift.mp4", "prompts/prompts.jsonl", "prompts/first_frame.png"):
        assert (tmp_path / name).read_bytes() == (short_clip / name).read_bytes(), name


def test_encoded_clip_shows_the_scene(short_clip: Path) -> None:
    import av

    with av.open(str(short_clip / "videos" / "adrift.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    scene = list(render_scene(9))
    assert len(decoded) == 9
    for shown, frame in zip(decoded, scene, strict=True):
        error = np.abs(shown.astype(int) - frame.image).mean()
        assert error < 6, "the encoder loses little"
    truths = read_truth(short_clip, 9)
    for truth, frame in zip(truths, scene, strict=True):
        assert np.array_equal(truth, frame.truth)


def test_prompts_are_the_truth_of_the_first_frame(short_clip: Path) -> None:
    table = read_prompts(str(short_clip / "prompts" / "prompts.jsonl"))
    prompts = table.prompts_for("adrift.mp4")
    assert {(p.object_id, p.label, p.frame_idx) for p in prompts} == {
        (object_id, label, 0) for object_id, label in LABELS.items()
    }
    assert all(p.mask_uri and p.mask_uri.endswith("first_frame.png") for p in prompts)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.docx is in it"):
        prepare_clip(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.docx"]


def test_broken_off_rendering_is_made_whole_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "adrift.mp4").write_bytes(b"half")
    prepare_clip(tmp_path, 3)
    clip = tmp_path / "videos" / "adrift.mp4"
    made = clip.stat()
    assert made.st_size > 1000
    prepare_clip(tmp_path, 3)
    assert clip.stat().st_mtime_ns == made.st_mtime_ns
    with pytest.raises(ConfigError, match="another version of the demo"):
        prepare_clip(tmp_path, 4)


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    j_and_f = float(shown.split("J&F ")[1].split()[0])
    assert j_and_f >= 0.5
    from PIL import Image

    with Image.open(folder / "overlay.png") as picture:
        assert picture.size[0] > 1500
        small = np.asarray(picture.convert("RGB").resize((200, 100)))
        assert len(np.unique(small.reshape(-1, 3), axis=0)) > 3000
    dataset = open_dataset(str(folder / "dataset"))
    frames = list(dataset.frames(dataset.video("adrift")))
    assert [frame.frame_idx for frame in frames] == list(range(NUM_FRAMES))
    assert {m.object_id for frame in frames for m in frame.masks} == set(LABELS)
    assert any(frame.occluded_ids == (3,) for frame in frames)
    named = {m.object_id: dataset.categories[m.category_id or 0] for m in frames[0].masks}
    assert named == LABELS
    config = json.loads(demo_config(folder).model_dump_json())
    assert config["tracker"]["name"] == "flow"

    assert cli.main(["demo", "--out", str(folder)]) == 0
    again = capsys.readouterr().out
    assert "1 of 1 videos, settled before" in again
    assert f"J&F {j_and_f:.3f}" in again
    assert cli.main(["verify", str(folder / "dataset")]) == 0
