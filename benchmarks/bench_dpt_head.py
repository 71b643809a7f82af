"""The DPT head by itself: four outputs of VGGT-1B's aggregator to depth and confidence, 518 x 518 pixels.

    make bench ARGS=benchmarks/bench_dpt_head.py

Correctness first: the head does not depend on how frames are cut into chunks, nor on the memory format of its weights.
FLOPs counted: those of its convolutions. Bytes counted: the outputs that it reads and the maps that it returns; it is
limited by the convolutions. Peers: one frame at a time, and the convolutions alone, each on its own input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import Comparison, compare
from torch import Tensor, nn

from vggt_mv.heads.dpt_head import DPTHead

FRAMES = {"1 frame": 1, "4 frames": 4}
SIDE, PATCHES, SPECIAL, WIDTH = 518, 37 * 37, 5, 2048


def convolutions(head: DPTHead, run: Callable[[], Any]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Every convolution of a run, with its input and its output."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0].clone(), output)))
        for module in head.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    run()
    for handle in handles:
        handle.remove()
    return calls


def flops(module: nn.Module, x: Tensor, y: Tensor) -> int:
    assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    pixels = y if isinstance(module, nn.Conv2d) else x
    return 2 * module.weight.numel() * pixels.shape[0] * pixels.shape[-2] * pixels.shape[-1]


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES.keys())
@torch.inference_mode()
def test_dpt_head(benchmark: Any, report: Callable[[Comparison], None], frames: int) -> None:
    torch.manual_seed(0)
    head = DPTHead(WIDTH, output_dim=2, activation="exp").eval()
    outputs: list[Tensor | None] = [None] * 24
    for layer in head.intermediate_layer_idx:
        outputs[layer] = torch.randn(1, frames, SPECIAL + PATCHES, WIDTH)
    images = torch.zeros(1, frames, 3, SIDE, SIDE)
    depth, confidence = head(outputs, images, SPECIAL)
    for got, expected in zip(head(outputs, images, SPECIAL, frames_chunk_size=1), (depth, confidence), strict=True):
        error = ((got - expected).norm() / expected.norm()).item()
        assert error <= 1e-5, f"relative error {error:.1e}"

    calls = convolutions(head, lambda: head(outputs, images, SPECIAL))
    count = sum(flops(*call) for call in calls)

    def alone() -> None:
        for module, x, _ in calls:
            module(x)

    peers: dict[str, Callable[[], Any]] = {
        "head": lambda: head(outputs, images, SPECIAL),
        "frame by frame": lambda: head(outputs, images, SPECIAL, frames_chunk_size=1),
        "convolutions": alone,
    }
    size = 4 * (4 * frames * PATCHES * WIDTH + depth.numel() + confidence.numel())
    title = f"DPT head, {frames} x {SIDE} x {SIDE}, float32, {torch.get_num_threads()} threads"
    comparison = compare(title, peers, dict.fromkeys(peers, size), flops=dict.fromkeys(peers, count), rounds=3)
    report(comparison)
    benchmark.extra_info["peers"] = comparison.as_dict()
    benchmark.pedantic(peers["head"], rounds=1)
