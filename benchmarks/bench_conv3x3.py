"""conv3x3 beside PyTorch's convolution, at the sizes of a DPT head on 518 x 518 pixels.

    make bench ARGS=benchmarks/bench_conv3x3.py

FLOPs counted: those of the direct sum, 18 N C O h w, for both, so that a rate above the processor's peak means that
fewer multiplications were done. Bytes counted: maps, weights and residual once each. Peers: `eager` is F.conv2d,
addition in place and ReLU in place, on a weight that is channels-last already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import Comparison, compare
from torch import Tensor

from vggt_mv_ext import conv3x3, explain

SIZES = {
    "fusion 148": (256, 256, 148),
    "fusion 74": (256, 256, 74),
    "fusion 37": (256, 256, 37),
    "entry 74": (512, 256, 74),
    "entry 37": (1024, 256, 37),
    "output 296": (256, 128, 296),
    "output 518": (128, 32, 518),
}


@pytest.mark.parametrize(("channels", "outputs", "side"), SIZES.values(), ids=SIZES.keys())
@torch.inference_mode()
def test_conv3x3(benchmark: Any, report: Callable[[Comparison], None], channels: int, outputs: int, side: int) -> None:
    torch.manual_seed(0)

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    x = channels_last(torch.randn(1, channels, side, side).relu_())
    weight, bias = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(outputs)
    eager_weight = channels_last(weight)
    residual = channels_last(torch.randn(1, outputs, side, side))
    if explain("conv3x3", x, weight).backend != "cpu":
        pytest.skip(explain("conv3x3", x, weight).passed_over["cpu"])

    corner = (..., slice(0, 36), slice(0, 36))  # float64 is slow
    exact = F.conv2d(x[..., :37, :37].double(), weight.double(), bias.double(), padding=1)[corner]
    exact = (exact + residual[corner].double()).relu()
    got = conv3x3(x, weight, bias, residual, "relu")[corner]
    error = ((got - exact).norm() / exact.norm()).item()
    assert error <= 5e-6, f"relative error {error:.1e}"

    def eager() -> Tensor:
        return F.conv2d(x, eager_weight, bias, padding=1).add_(residual).relu_()

    peers: dict[str, Callable[[], Any]] = {"ours": lambda: conv3x3(x, weight, bias, residual, "relu"), "eager": eager}
    size = 4 * (x.numel() + weight.numel() + 2 * residual.numel())
    count = 18 * channels * outputs * side * side
    title = f"{channels} -> {outputs}, {side} x {side}, float32, {torch.get_num_threads()} threads; error {error:.1e}"
    comparison = compare(title, peers, dict.fromkeys(peers, size), flops=dict.fromkeys(peers, count), rounds=9)
    report(comparison)
    benchmark.extra_info["peers"] = comparison.as_dict()
    benchmark.pedantic(peers["ours"], rounds=3, warmup_rounds=1)
