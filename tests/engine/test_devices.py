"""What a GPU computes, tried on the CPU: the same functions, the same numbers.

* float32 is float32: TF32 is off once a network has been loaded for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.engine.adapter import forbid_tf32


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
