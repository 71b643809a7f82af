"""Tests that need a CUDA device: without one they skip, or fail where `VGGT_MV_REQUIRE_GPU=1` (`make gpu-check`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda_device() -> Iterator[None]:
    if not torch.cuda.is_available():
        if os.environ.get("VGGT_MV_REQUIRE_GPU") == "1":
            pytest.fail("VGGT_MV_REQUIRE_GPU=1 and torch finds no CUDA device")
        pytest.skip("needs a CUDA device")
    # float32 means float32: TF32 keeps 10 bits of the mantissa, and convolutions use it by default.
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags
