"""The gated feed-forward layer of the giant DINOv2 model."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwiGLUFFN"]


class SwiGLUFFN(nn.Module):
    """``w3(silu(a) * b)`` with ``[a, b] = w12(x)`` (Shazeer, "GLU variants improve transformer", 2020).

    The hidden width is two thirds of `hidden_features`, rounded up to a multiple of 8, so that the layer has about as
    many parameters as an `Mlp` of that width: the sizes of the DINOv2 giant checkpoint.

    Args:
        in_features: C.
        hidden_features: width of the MLP that this stands in for, by default C.
        out_features: by default C.
        act_layer: ignored; there so that it can take the place of `Mlp`.
        drop: must be 0.
        bias: whether the layers have biases.

    Example:
        >>> SwiGLUFFN(1536, 4 * 1536).w3.weight.shape
        torch.Size([1536, 4096])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if drop:
            raise ValueError(f"SwiGLUFFN: drop must be 0, got {drop}")
        hidden = (int((hidden_features or in_features) * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)
