"""What alternating_attention's CUDA kernel is asked to run and what not, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from vggt_mv_ext.ops import _kernels
from vggt_mv_ext.ops.alternating_attention import OPERATOR

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_the_kernel_takes(width: int, dtype: torch.dtype) -> None:
    assert OPERATOR.limits["cuda"](torch.empty(1, 1, 1, 2, 3, 1, width, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        (
            F32,
            (1, 1, 1, 2, 3, 1, 64),
            "float32 attention goes to .*scaled_dot_product_attention: .* TF32 .*",
        ),
        (F64, (1, 1, 1, 2, 3, 1, 64), "float64 runs on the reference alone"),
        (F16, (1, 1, 1, 2, 3, 1, 48), "D must be 32, 64, 96 or 128, got 48"),
        (BF16, (1, 1, 0, 2, 3, 1, 64), "an empty tensor needs no kernel"),
    ],
    ids=["float32", "float64", "width", "empty"],
)
def test_the_kernel_passes_over(dtype: torch.dtype, shape: tuple[int, ...], reason: str) -> None:
    found = OPERATOR.limits["cuda"](torch.empty(shape, dtype=dtype))
    assert found is not None
    assert re.fullmatch(reason, found)


def offset(qkv: Tensor) -> Tensor:
    return torch.empty(qkv.numel() + 1, dtype=qkv.dtype)[1:].view(qkv.shape)


def test_only_rows_that_are_not_aligned_are_copied() -> None:
    qkv = torch.randn(1, 2, 1, 5, 3, 2, 32).to(F16)
    assert _kernels.aligned_rows(qkv) is qkv
    view = qkv.transpose(1, 2)
    assert _kernels.aligned_rows(view) is view
    one_head = torch.as_strided(qkv, (1, 2, 1, 5, 3, 1, 32), (*qkv.stride()[:5], 33, 1))  # a stride that is never taken
    assert _kernels.aligned_rows(one_head) is one_head
    assert _kernels.qkv_steps(one_head) == (0, *qkv.stride()[1:2], 0, *qkv.stride()[3:5], 0)  # the launcher sees none
    for crooked in (offset(qkv).copy_(qkv), torch.cat((qkv, qkv[..., :1]), dim=-1)[..., :32]):
        straight = _kernels.aligned_rows(crooked)
        assert straight is not crooked
        assert torch.equal(straight, qkv)
        assert straight.data_ptr() % 16 == 0
        assert straight.is_contiguous()
