"""Forward-mode derivatives (`torch.func.jvp`, `forward_ad`), which registered operators would drop in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vggt_mv_ext as ext

GRID = (1, 2, 2, 5 + 4)  # [B, T, N, P]


def _tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "qkv": random(*GRID, 3, 2, 16),
        "memory": random(1, 3, 3, 2, 16),
        "bias": random(*GRID),
        "mask": random(*GRID).sigmoid(),
        "x": random(6, 16),
        "y": random(6, 16),
        "features": random(16),
        "map": random(1, 16, 5, 6),
        "kernel": random(16, 16, 3, 3),
        "weight": random(3, 16),
    }


LANDMARKS, NEIGHBOURS = torch.tensor([[0, 7, 20]]), torch.tensor([[0, 1], [1, -1], [2, 3], [0, 3]])
# Name -> the operator as a function of its first tensor, whose name follows, and of all the others.
CALLS: dict[str, tuple[str, Callable[[Tensor, dict[str, Tensor]], Tensor]]] = {
    "residual_scale_norm": ("x", lambda x, t: ext.residual_scale_norm(x, t["y"], *[t["features"]] * 3)[1]),
    "residual_scale_norm, out": ("x", lambda x, t: _with_out(x, t)),
    "qk_norm_rope": ("qkv", lambda x, t: ext.qk_norm_rope(x, (t["features"], t["features"]), None, (2, 2), 5)),
    "qk_norm_rope, in place": ("qkv", lambda x, t: ext.qk_norm_rope(x * 1.0, None, None, (2, 2), 5, inplace=True)),
    "alternating_attention": ("qkv", lambda x, t: ext.alternating_attention(x, "view", key_bias=t["bias"])),
    "dual_stream_attention": ("qkv", lambda x, t: _dual(x, t)),
    "memory_write": ("qkv", lambda x, t: ext.memory_write(x, t["memory"], key_bias=t["bias"])),
    "memory_read": ("qkv", lambda x, t: ext.memory_read(x, t["memory"])),
    "landmark_attention": ("qkv", lambda x, t: ext.landmark_attention(x, LANDMARKS)),
    "block_dilated_attention": ("qkv", lambda x, t: ext.block_dilated_attention(x, NEIGHBOURS)),
    "packed_linear": ("x", lambda x, t: ext.packed_linear(x, t["weight"], None, "gelu")),
    "conv3x3": ("map", lambda x, t: ext.conv3x3(x, t["kernel"], None)),
}


def _with_out(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    out = torch.zeros_like(t["x"]), torch.zeros_like(t["x"])
    ext.residual_scale_norm(x, t["y"], *[t["features"]] * 3, out=out)
    return out[1]


def _dual(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    weights = t["features"][0].abs(), t["features"][1].abs()
    return torch.stack(ext.dual_stream_attention(x, None, "global", t["mask"], *weights))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_tangents_go_through(name: str, recording: bool) -> None:
    first, call = CALLS[name]
    exact = _tensors()
    tangent = torch.randn(exact[first].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6
    ahead, behind = (call(exact[first] + sign * step * tangent, exact) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert expected.norm() > 1e-2
    narrow = {key: value.float() for key, value in exact.items()}
    with torch.set_grad_enabled(recording), forward_ad.dual_level():
        result = call(forward_ad.make_dual(narrow[first], tangent.float()), narrow)
        got = forward_ad.unpack_dual(result).tangent
    assert got is not None
    assert (got.double() - expected).norm() / expected.norm() < 1e-5


def test_jvp_of_torch_func() -> None:
    t = {key: value.float() for key, value in _tensors().items()}
    _, tangent = torch.func.jvp(lambda x: ext.alternating_attention(x, "time"), (t["qkv"],), (t["qkv"].sin(),))
    assert tangent.norm() > 1e-2
