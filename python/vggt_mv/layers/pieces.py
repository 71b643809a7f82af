"""A block in inference on a CPU, piece by piece: in memory that the pieces share, and that stays near the processor.

What a block makes on its way, queries, keys and values and the hidden layer of the MLP, is three and four times as wide
as its tokens. Attention goes by as many sequences at a time as make a piece, all else by as many tokens, and every
piece writes its result where it belongs. Results are those of the plain form, up to the order in which products sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from vggt_mv.layers.attention import Attention
from vggt_mv.layers.grid import GridContext
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

# Leading dimensions of ``[B, T, N, P, C]`` that count sequences, where each lies in one stretch of memory.
_SEQUENCE_DIMS: Final = {"frame": 3, "view": 2, "time": 1, "global": 1}


def fits(block: Block, x: Tensor, next_norm: nn.Module | None) -> bool:
    """Whether `block` can go by pieces: in inference on a CPU, its parts are the usual ones and nobody observes them.

    Pieces write over what parts of the block gave, which a hook might still hold.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.dtype in (torch.float32, _branch_dtype(x))
        and type(block.attn) is Attention
        and type(block.attn.proj) is Linear
        and type(block.mlp) is Mlp
        and type(block.mlp.fc1) is Linear
        and is_fused(block.ls1, block.drop_path1, block.norm2)
        and is_fused(block.ls2, block.drop_path2, block.norm2 if next_norm is None else next_norm)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block)
    )


def run(
    block: Block, x: Tensor, normed: Tensor, grid: GridContext, next_norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """`Block.forward` on the token grid, where it `fits`; ``normed = norm1(x)``."""
    dims = _SEQUENCE_DIMS[grid.axis]
    tokens = x.shape[dims:-1].numel()  # of a sequence
    count = max(_rows(block, x) // max(tokens, 1), 1)
    if count >= x.shape[:dims].numel():
        return finish(block, x, block.attn(normed, grid=grid), next_norm)
    result = torch.empty_like(x)
    next_normed: Tensor | None = None
    split = partial(_sequences, dims=dims, count=count)
    for i, (x_part, normed_part, to) in enumerate(zip(split(x), split(normed), split(result), strict=True)):
        y = block.attn(normed_part, grid=_grid_of(grid, i, split))
        if next_norm is not None and next_normed is None:
            next_normed = y.new_empty(x.shape)
        _finish(block, x_part, y, next_norm, to, y if next_normed is None else split(next_normed)[i])
    return result, next_normed


def _grid_of(grid: GridContext, i: int, split: Callable[[Tensor], Sequence[Tensor]]) -> GridContext:
    """What piece i has to know."""
    key_bias, row_gate = grid.key_bias, grid.row_gate
    if key_bias is not None:
        key_bias = split(key_bias)[i]
    if row_gate is not None and row_gate.dim() > 1:
        row_gate = split(row_gate)[i]
    return replace(grid, key_bias=key_bias, row_gate=row_gate)


def finish(block: Block, x: Tensor, y: Tensor, next_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """`Block.finish`, where it `fits`."""
    y = y.contiguous()
    result = torch.empty_like(x)
    _finish(block, x, y, next_norm, result, y)
    return result, None if next_norm is None else y


def _finish(
    block: Block, x: Tensor, y: Tensor, next_norm: nn.Module | None, result: Tensor, next_normed: Tensor
) -> None:
    """Writes the block's tokens to `result` and their next norm to `next_normed`, which may be y; y is used up."""
    add_and_norm(x, y, block.ls1, block.drop_path1, block.norm2, out=(result, y))
    count = _rows(block, x)
    rows = [tensor.flatten(0, -2).split(count) for tensor in (y, result, next_normed)]
    for normed, tokens, next_to in zip(*rows, strict=True):
        branch = block.mlp(normed)
        if next_norm is None:
            tokens += block.ls2(branch)
        else:
            add_and_norm(tokens, branch, block.ls2, block.drop_path2, next_norm, out=(tokens, next_to))


def _rows(block: Block, x: Tensor) -> int:
    """Tokens of a piece."""
    assert isinstance(block.mlp, Mlp)
    features = max(3 * block.attn.num_heads * block.attn.head_dim, block.mlp.fc1.out_features)
    return max(_BYTES // (features * _branch_dtype(x).itemsize), _ROWS_PER_THREAD * torch.get_num_threads())


def _branch_dtype(x: Tensor) -> torch.dtype:
    """The dtype of attention and MLP."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return x.dtype
    return torch.get_autocast_dtype("cpu")


def _sequences(tensor: Tensor, dims: int, count: int) -> Sequence[Tensor]:
    """The tensor by `count` sequences at a time: ``[count, 1, ..., tokens ...]``, with as many dimensions."""
    parts = tensor.flatten(0, dims - 1).split(count)
    return [part.unflatten(0, (-1, *[1] * (dims - 1))) for part in parts]
