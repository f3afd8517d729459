"""What a GPU computes, tried on the CPU: the same functions, the same numbers.

* Boxes of masks are the edges of what is set in them.
* float32 is float32: TF32 is off once a network has been loaded for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from workers.engine.adapter import forbid_tf32
from workers.engine.tracking import mask_boxes


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
