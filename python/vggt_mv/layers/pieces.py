"""A block in inference on a CPU, piece by piece: in memory that the pieces share, and that stays near the processor.

What a block makes on its way, queries, keys and values and the hidden layer of the MLP, is three and four times as wide
as its tokens. Attention goes by as many sequences at a time as make a piece, all else by as many tokens, and every
piece writes its result where it belongs. Results are those of the plain form, up to the order in which products sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from vggt_mv.layers.attention import Attention
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.layer_scale import LayerScale
from vggt_mv.layers.linear import Linear
from vggt_mv.layers.mlp import Mlp
from vggt_mv.layers.residual import add_and_norm, is_fused

if TYPE_CHECKING:
    from vggt_mv.layers.block import Block

__all__ = ["finish", "fits", "run"]

# The widest tensor of a piece takes at most so much, unless that leaves a thread with fewer rows than these. Memory of
# up to 32 MiB the C library can keep for the next piece; what is larger the system clears and hands out anew each time.
_BYTES: Final = 24 << 20
_ROWS_PER_THREAD: Final = 512

# Leading dimensions of ``[B, T, N, P, C]`` that no sequence of an axis reaches across: what can be cut.
_APART: Final = {"frame": 3, "view": 2, "time": 1, "global": 1}


def fits(block: Block, x: Tensor, next_norm: nn.Module | None) -> bool:
    """Whether `block` can go by pieces: in inference on a CPU, its parts are the usual ones and nobody observes them.

    Pieces write over what parts of the block gave, which a hook might still hold, and would draw dropout in another
    order.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.dtype in (torch.float32, _branch_dtype(x))
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and all(type(part) is Linear for part in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
        and _does_nothing(block.attn.proj_drop)
        and _does_nothing(block.mlp.drop)
        and is_fused(block.ls1, block.drop_path1, block.norm2)
        and is_fused(block.ls2, block.drop_path2, block.norm2 if next_norm is None else next_norm)
        and isinstance(block.ls2, LayerScale)
        and torch.promote_types(x.dtype, block.ls2.gamma.dtype) == x.dtype  # the last sum keeps it, too
        and not _is_observed(block)
    )


def _does_nothing(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)


def _is_observed(block: Block) -> bool:
    everywhere = torch.nn.modules.module
    return (
        bool(everywhere._global_forward_hooks)
        or bool(everywhere._global_forward_pre_hooks)
        or any(part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block)
    )


def run(
    block: Block, x: Tensor, normed: Tensor, grid: GridContext, next_norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """`Block.forward` on the token grid, where it `fits`; ``normed = norm1(x)``."""
    apart = _APART[grid.axis] if _can_be_cut(x, grid) else 0  # 0: attention finds what is wrong with them
    count = max(_rows(block, x) // max(x.shape[apart:-1].numel(), 1), 1)
    if count >= x.shape[:apart].numel():  # all at once
        return finish(block, x, block.attn(normed, grid=grid), next_norm)
    result = torch.empty_like(x)
    next_normed: Tensor | None = None
    x_parts, normed_parts, result_parts = (_cut(tensor, apart, count) for tensor in (x, normed, result))
    next_normed_parts: Sequence[Tensor] = ()
    for i, part_of_grid in enumerate(_cut_grid(grid, apart, count, len(x_parts))):
        y = block.attn(normed_parts[i], grid=part_of_grid)
        if next_norm is not None and next_normed is None:
            next_normed = y.new_empty(x.shape)
            next_normed_parts = _cut(next_normed, apart, count)
        _finish(block, x_parts[i], y, next_norm, result_parts[i], next_normed_parts[i] if next_normed_parts else y)
    return result, next_normed


def _can_be_cut(x: Tensor, grid: GridContext) -> bool:
    """Whether the arguments are as `GridContext` says: cut up, wrong ones might seem right."""
    gate = grid.row_gate
    return (
        x.dim() == 5
        and grid.axis in _APART
        and (grid.key_bias is None or grid.key_bias.shape == x.shape[:-1])
        and (gate is None or gate.dim() == 1 or gate.shape == x.shape[:-1])
    )


def _cut(tensor: Tensor, apart: int, count: int) -> Sequence[Tensor]:
    """The tensor by `count` of what its first `apart` dimensions number: ``[count, 1, ..., rest]``, as many of them."""
    parts = tensor.flatten(0, apart - 1).split(count)
    return [part.unflatten(0, (-1, *[1] * (apart - 1))) for part in parts]


def _cut_grid(grid: GridContext, apart: int, count: int, parts: int) -> Sequence[GridContext]:
    """What each part has to know."""
    key_bias, row_gate = (
        [bias] * parts if bias is None or bias.dim() == 1 else _cut(bias, apart, count)
        for bias in (grid.key_bias, grid.row_gate)
    )
    return [replace(grid, key_bias=key_bias[i], row_gate=row_gate[i]) for i in range(parts)]


def finish(block: Block, x: Tensor, y: Tensor, next_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """`Block.finish`, where it `fits`."""
    y = y.contiguous()
    result = torch.empty_like(x)
    in_one_piece = x.shape[:-1].numel() <= _rows(block, x)
    next_normed = _finish(block, x, y, next_norm, result, None if in_one_piece else y)
    return result, None if next_norm is None else next_normed


def _finish(
    block: Block, x: Tensor, y: Tensor, next_norm: nn.Module | None, result: Tensor, next_normed: Tensor | None
) -> Tensor:
    """Writes the block's tokens to `result`; y is used up.

    Their next norm goes to `next_normed`, which may be y. None: where the MLP's result was, which is near still, if
    that came in one piece. Returns the tensor that it went to.
    """
    add_and_norm(x, y, block.ls1, block.drop_path1, block.norm2, out=(result, y))
    count = x.shape[:-1].numel() if next_normed is None else _rows(block, x)
    targets: Sequence[Tensor | None] = [None] if next_normed is None else next_normed.flatten(0, -2).split(count)
    rows = (tensor.flatten(0, -2).split(count) for tensor in (y, result))
    for normed, tokens, target in zip(*rows, targets, strict=True):
        branch = block.mlp(normed)
        if next_norm is None:
            tokens += block.ls2(branch)
        else:
            out = tokens, branch if target is None else target
            add_and_norm(tokens, branch, block.ls2, block.drop_path2, next_norm, out=out)
    return branch.view(y.shape) if next_normed is None else next_normed


def _rows(block: Block, x: Tensor) -> int:
    """Tokens of a piece."""
    assert isinstance(block.mlp, Mlp)
    features = max(3 * block.attn.num_heads * block.attn.head_dim, block.mlp.fc1.out_features)
    return max(_BYTES // (features * _branch_dtype(x).itemsize), _ROWS_PER_THREAD * torch.get_num_threads())


def _branch_dtype(x: Tensor) -> torch.dtype:
    """The dtype of attention and MLP."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
