"""The residual addition of a branch, and the norm that follows it."""

from __future__ import annotations

from torch import Tensor, nn

from vggt_mv.layers.drop_path import DropPath
from vggt_mv.layers.layer_scale import LayerScale
from vggt_mv_ext import residual_scale_norm

__all__ = ["add_and_norm", "is_fused"]


def is_fused(scale: nn.Module, drop_path: DropPath, norm: nn.Module) -> bool:
    """Whether `add_and_norm` is one pass over the tokens, for which both modules have to be the usual ones."""
    return (
        isinstance(scale, LayerScale)
        and isinstance(norm, nn.LayerNorm)
        and norm.elementwise_affine
        and norm.bias is not None
        and not drop_path.active
    )


def add_and_norm(
    x: Tensor,
    y: Tensor,
    scale: nn.Module,
    drop_path: DropPath,
    norm: nn.Module,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + drop_path(scale(y))`` and ``norm(x')``, in one pass where `is_fused` says so.

    That pass reads the parameters of `scale` and `norm` directly: forward hooks on those two modules see nothing of it.
    It alone can write into `out` (see `residual_scale_norm`).
    """
    if is_fused(scale, drop_path, norm):
        gamma, weight, bias = scale.gamma, norm.weight, norm.bias
        return residual_scale_norm(x, y, gamma, weight, bias, norm.eps, out=out)  # type: ignore[arg-type]
    assert out is None
    x = x + drop_path(scale(y))
    return x, norm(x)
