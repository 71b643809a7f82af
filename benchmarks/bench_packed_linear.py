"""packed_linear beside eager PyTorch and beside torch.compile with frozen weights, at the sizes of VGGT-1B.

    make bench ARGS=benchmarks/bench_packed_linear.py

FLOPs counted: 2 M N K; bias and GELU are left out. Bytes counted: x, weight and result once each. The weights are
packed before the clock starts; what that takes is printed beside it, as the peer "packing", and is paid once a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import Comparison, compare
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from vggt_mv_ext import cannot_pack_linear_weight, packed_linear, reference
from vggt_mv_ext.ops._packed_weights import pack

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROWS = {"1 frame": 1374, "4 frames": 4 * 1374}
LAYERS = {
    "qkv": (1024, 3072, "none"),
    "proj": (1024, 1024, "none"),
    "fc1 GELU": (1024, 4096, "gelu"),
    "fc2": (4096, 1024, "none"),
}


class Eager(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.activation == "gelu" else y


def frozen(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The module compiled with its weights frozen and packed, which is looked up in the code that was generated.

    `torch.compile(options={"freezing": True})` does not freeze, as of PyTorch 2.13; the setting of the process does.
    """
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(module)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        _, sources = run_and_get_code(compiled, x)
    assert any("_frozen_param" in source for source in sources), "Inductor has not frozen the weights"
    return compiled


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("width", "out", "activation"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@torch.inference_mode()
def test_packed_linear(
    benchmark: Any,
    report: Callable[[Comparison], None],
    rows: int,
    width: int,
    out: int,
    activation: str,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        x = torch.randn(rows, width).to(dtype)
        weight = nn.Parameter((torch.randn(out, width) / width**0.5).to(dtype), requires_grad=False)
        bias = nn.Parameter(torch.randn(out).to(dtype), requires_grad=False)
        eager = Eager(weight, bias, activation)
    reason = cannot_pack_linear_weight(weight)
    if reason is not None:
        pytest.skip(reason)
    compiled = frozen(eager, x)
    exact = reference.packed_linear(x.double(), weight.double(), bias.double(), activation)
    with torch.no_grad():
        for result in (packed_linear(x, weight, bias, activation), compiled(x)):
            error = ((result.double() - exact).norm() / exact.norm()).item()
            assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"
        peers: dict[str, Callable[[], Any]] = {
            "ours": lambda: packed_linear(x, weight, bias, activation),
            "eager": lambda: eager(x),
            "compiled": lambda: compiled(x),
            "packing": lambda: pack(weight),
        }
        size = (x.numel() + weight.numel() + rows * out) * x.element_size()
        moved = {**dict.fromkeys(peers, size), "packing": 2 * weight.numel() * x.element_size()}
        flops = {**dict.fromkeys(peers, 2 * rows * width * out), "packing": 0}
        title = f"{rows} x {width} -> {out} {activation}, {str(dtype)[6:]}, {torch.get_num_threads()} threads"
        comparison = compare(title, peers, moved, flops=flops)
        report(comparison)
        benchmark.extra_info["peers"] = comparison.as_dict()
        benchmark.pedantic(peers["ours"], rounds=5, warmup_rounds=1)
