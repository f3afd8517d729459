"""What a GPU computes, tried on the CPU: the same functions, the same numbers.

* A picture resized and normalised on a device is PIL's, bit by bit, whatever the sizes.
* Where masks change is what their pixels say, for masks of any sizes, empty and full ones; counts,
  area, box and pixels made of it are those made of the pixels.
* A step waits for the device three times, however many objects, batches and sizes there are.
* Boxes of masks are the edges of what is set in them.
* All that is asked of the network in a step stays on one device, without a look at any number:
  tried on a GPU that torch only imagines, in float32 and bfloat16.
* float32 is float32: TF32 is off once a network has been loaded for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine import reference
from tests.engine.test_engine import BOXES, clip, opened
from workers import rle
from workers.engine import adapter, outlines, pictures, positions, tracking
from workers.engine.adapter import Sam2Network, forbid_tf32
from workers.engine.attention import Savings
from workers.engine.bank import Candidates, Clock, Entry
from workers.engine.model import CheckpointInfo, build_network
from workers.engine.pictures import normalised, resized, to_pixels
from workers.engine.policies.sam2 import Sam2Track
from workers.engine.policies.samurai import SamuraiTrack
from workers.engine.tracking import Engine, FramePrompt, FrameWork, mask_boxes
from workers.trackers.samurai import OPTIONS as SAMURAI_OPTIONS


@pytest.fixture
def tf32_before() -> Iterator[None]:
    """Put torch's switches back."""
    import torch

    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.usefixtures("tf32_before")
def test_float32_is_float32_on_a_gpu() -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    forbid_tf32()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_boxes_are_the_edges_of_masks() -> None:
    import torch

    random = np.random.default_rng(0)
    masks = random.random((5, 3, 17, 23)) < np.array([0, 1e-2, 0.5])[:, None, None]
    masks[0, 0, 16, 22] = masks[1, 0, 0, 0] = True
    boxes = mask_boxes(torch.from_numpy(masks)).numpy()
    assert boxes.shape == (5, 3, 4)
    for box, mask in zip(boxes.reshape(-1, 4), masks.reshape(-1, 17, 23), strict=True):
        rows, columns = np.nonzero(mask)
        edges = [columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [0] * 4
        assert box.tolist() == edges
    assert not boxes[2:, 0].any()


@pytest.mark.parametrize(
    ("height", "width", "image_size"),
    [
        (540, 960, 512),
        (240, 135, 128),
        (60, 128, 128),
        (128, 100, 128),
        (47, 61, 512),
        (901, 7, 64),
    ],
)
def test_pictures_are_resized_as_by_pil(height: int, width: int, image_size: int) -> None:
    import torch

    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (height, width, 3), np.uint8)
    edges = (noise > 127).astype(np.uint8) * 255  # beyond which the cubic overshoots
    for frame in (noise, edges):
        expected = to_pixels(frame, image_size, "bicubic")
        assert expected.shape == (1, 3, image_size, image_size)
        small = resized(torch.from_numpy(frame), image_size)
        assert torch.equal(normalised(small), expected)
        if height <= width:
            size = (image_size, image_size)
            whole = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(small.numpy(), np.asarray(whole).transpose(2, 0, 1))


def drawn_logits() -> Any:
    """Return logits of a blob, of nothing, of everything, and of noise, shape (4, 32, 32)."""
    import torch

    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    blob = 9 - np.hypot(x - 12, y - 19) + 3 * np.sin(x)
    noise = random.normal(size=(32, 32))
    return torch.from_numpy(np.stack([blob, blob * 0 - 1, blob * 0 + 1, noise])).float()


@pytest.mark.parametrize("max_pixels", [1, 1 << 28])
def test_changes_of_masks_are_those_of_their_pixels(
    monkeypatch: pytest.MonkeyPatch, max_pixels: int
) -> None:
    monkeypatch.setattr(outlines, "_MAX_PIXELS", max_pixels)
    monkeypatch.setattr(outlines, "_MAX_ENLARGED", 3)
    logits = list(drawn_logits()) * 2
    sizes = [(40, 71)] * 4 + [(71, 40), (1, 9), (9, 1), (71, 40)]
    seen = outlines.changes_of(logits, sizes)
    by_pixels = outlines.masks_of(logits, sizes)
    assert [mask.is_empty for mask in seen] == [False, True, False, False] * 2
    for mask, other in zip(seen, by_pixels, strict=True):
        assert mask.num_bytes == mask.changes.nbytes
        pixels = other.pixels.copy()
        assert mask.is_empty == other.is_empty
        assert mask.encoded() == other.encoded() == rle.encode_with_stats(pixels)
        assert mask.counts == rle.encode(pixels)
        counted = rle.LazyMask(mask.height, mask.width, counts=mask.counts)
        assert counted.encoded() == mask.encoded()
        for form in (mask, counted):
            np.testing.assert_array_equal(form.pixels, pixels)


@dataclass
class Waits:
    """What would wait for a device, were there one."""

    num_copies: int = 0
    num_searches: int = 0
    num_scalars: int = 0


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Count until the block ends."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    waits, to_host = Waits(), torch.Tensor.cpu

    def counted(tensor: Any) -> Any:
        waits.num_copies += 1
        return to_host(tensor)

    class Mode(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            waits.num_searches += "nonzero" in str(func)
            waits.num_scalars += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patched, Mode():
        patched.setattr(torch.Tensor, "cpu", counted)
        yield waits


@pytest.mark.parametrize("name", ["sam2", "samurai", "sam2long"])
def test_a_step_waits_three_times_however_many_objects(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = reference.small_loader(name)
    monkeypatch.setattr(tracking, "masks_of", outlines.changes_of)
    monkeypatch.setattr(made.engine, "max_batch", 2)
    frames = clip()[:4]
    tall = [np.ascontiguousarray(frame.transpose(1, 0, 2)) for frame in frames]
    prompts = {1: {0: BOXES[1]}, 2: {1: BOXES[2]}, 3: {0: BOXES[1]}, 7: {0: BOXES[7], 2: BOXES[7]}}
    with (
        opened(made, prompts) as session,
        made.open_session(*tall[0].shape[:2]) as other,
    ):
        other.prompt(0, 1, box_xyxy=[0, 75, 99, 129])
        for t in range(4):
            with counted_waits() as waits:
                made.step_many([(session, frames[t]), (other, tall[t])])
            assert waits == Waits(num_copies=2, num_searches=1, num_scalars=0)


# -- an imagined GPU -------------------------------------------------------------------------


def made_there(module: Any, what: Any) -> Any:
    """Stand in for `torch.nn.Module.to`: make tensors on the GPU instead of moving them there."""
    import torch

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, held in table.items():
                if held is not None:
                    dtype = what if isinstance(what, torch.dtype) else held.dtype
                    table[name] = torch.empty(held.shape, dtype=dtype, device="cuda:0")
    return module


def imagined_upload(values: Any, device: Any, dtype: Any = None) -> Any:
    """Stand in for `upload`: memory cannot be locked for a device that is not there."""
    import torch

    array = np.asarray(values, dtype)
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return torch.empty(array.shape, dtype=kind, device=device)


@pytest.fixture
def made_outside() -> tuple[CheckpointInfo, Any]:
    """Return a network for pictures of 128 pixels, made before a GPU is imagined."""
    reference.folder()
    info = CheckpointInfo("tiny", "2.1", True)
    return info, build_network(info, 128)


@pytest.fixture
def imagined_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a GPU whose tensors have all but numbers: asking for one would raise."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    caches = pictures._weights, pictures._table_on, positions._waves
    for cache in caches:
        cache.cache_clear()
    for module in (adapter, pictures, tracking):
        monkeypatch.setattr(module, "upload", imagined_upload)
    monkeypatch.setattr(torch.nn.Module, "to", made_there)
    with FakeTensorMode(), torch.inference_mode():
        yield torch.device("cuda", 0)
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("tf32_before")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [Sam2Track, SamuraiTrack])
def test_what_is_asked_of_the_network_stays_on_its_device(
    made_outside: Any, imagined_gpu: Any, policy: type[Sam2Track], dtype: str
) -> None:
    import torch

    gpu, side, (info, modules) = imagined_gpu, 8, made_outside
    network = Sam2Network(modules, info, gpu, Savings(), getattr(torch, dtype))
    engine = Engine(network)
    frame = torch.empty(100, 200, 3, dtype=torch.uint8, device=gpu)
    picture = normalised(resized(frame, 16 * side))
    one, other = engine.encode([picture, picture])
    box = FramePrompt(np.zeros((2, 2), np.float32), np.array([2, 3], np.int32))
    mask = FramePrompt(
        np.zeros((0, 2), np.float32), np.zeros(0, np.int32), mask=np.ones((100, 200), np.uint8)
    )
    track = policy(SAMURAI_OPTIONS, Clock())
    work = FrameWork(one, 3, {}, {}, (100, 200))
    lives = [tracking._Live(work, seen, track, None) for seen in (one, one, other)]
    for step in range(3):
        entry = Entry(
            step,
            0.9,
            1.0,
            torch.empty(256, device=gpu),
            torch.empty(side * side, 64, dtype=torch.bfloat16, device=gpu),
        )
        (track.recent if step else track.prompts).add(entry)
    asked = engine._ask_tracked(lives)
    asked += [engine._ask_prompted(lives[0], prompt) for prompt in (box, mask)]
    assert [batch.numbers.device for batch in asked] == [gpu] * len(asked)
    assert asked[0].numbers.shape == (3, 5 + 12 * track.needs_boxes)
    taken = []
    for live, row in zip(lives, range(3), strict=True):
        scores, tokens = asked[0].scores[row], asked[0].tokens[row]
        ious, logits = np.zeros(3, np.float32), asked[0].logits[row]
        offer = Candidates(logits, ious, 1.0, tokens, 1.0, scores)
        taken.append(tracking._Taken(live, offer, row))
    shown = engine._remember(taken)
    flags = outlines._change_flags(outlines._enlarged(torch.stack(shown), (100, 200)))
    assert (flags.device, flags.shape) == (gpu, (3 * 100 * 200,))
    kept = lives[0].entries[0]
    assert kept.memory is not None
    assert (kept.memory.device, kept.memory.dtype) == (gpu, torch.bfloat16)
    assert (kept.pointer.device, kept.pointer.dtype) == (gpu, torch.float32)
