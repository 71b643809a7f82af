"""Sparse global attention: tokens of all times and views exchange information at a fraction of the dense cost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.block import Block
from vggt_mv.layers.grid import GridContext
from vggt_mv_ext import block_dilated_attention, landmark_attention, memory_read, memory_write

__all__ = ["DILATIONS", "STRATEGIES", "SparseGlobal", "check_sparse_options", "dilated_neighbours", "landmark_indices"]

#: What stands in for dense attention: a memory that all write and read, landmarks of every frame, or nearby frames.
STRATEGIES = ("memory_bank", "landmark", "block_dilated")

#: How far the neighbours of a frame are from it, in times and in views.
DILATIONS = (1, 2, 4)


def dilated_neighbours(times: int, views: int, device: torch.device | str | None = None) -> Tensor:
    """The frames that each frame of the grid looks at: itself and those around it in a dilated pattern.

    Those are the frames ``(t + dt, v + dv)`` with ``(dt, dv)`` in ``{-l, 0, l}^2`` and l in {1, 2, 4}, as far as they
    exist: nothing wraps around. Each is there once.

    Args:
        times: T.
        views: N.
        device: where the tensor is made.

    Returns:
        ``[T * N, W]`` int64, W at most 25: numbers ``t N + v`` in increasing order, then -1.

    Example:
        >>> dilated_neighbours(3, 1).tolist()
        [[0, 1, 2, -1, -1], [0, 1, 2, -1, -1], [0, 1, 2, -1, -1]]
    """
    offsets = sorted({(dt, dv) for length in DILATIONS for dt in (-length, 0, length) for dv in (-length, 0, length)})
    frames = torch.arange(times * views, device=device)
    columns = []
    for dt, dv in offsets:
        if abs(dt) < times and abs(dv) < views:
            time, view = frames // views + dt, frames % views + dv
            exists = (time >= 0) & (time < times) & (view >= 0) & (view < views)
            columns.append(torch.where(exists, time * views + view, times * views))
    found = torch.stack(columns, dim=1).sort(dim=1).values
    return torch.where(found == times * views, -1, found)


@dataclass(frozen=True)
class SparseGlobal:
    """The sparse exchange among all frames of the grid after some rounds, with the weights of view (global) blocks.

    Attributes:
        strategy: one of `STRATEGIES`.
        layers: the rounds after which it happens, in increasing order.
        landmark_k: patches of a frame that are landmarks.
        memory_tokens: ``[1, M, C]``, what a memory starts as; None for the other strategies.
        memory_state: ``[streams, layers, B, M, C]``, what it starts as instead, or None.
        confidence: ``[B,T,N,h,w]``: chooses landmarks in place of the norms of the tokens, or None.
    """

    strategy: str
    layers: tuple[int, ...]
    landmark_k: int = 64
    memory_tokens: Tensor | None = None
    memory_state: Tensor | None = None
    confidence: Tensor | None = None

    def start_of(self, stream: int, layer: int, x: Tensor) -> Tensor | None:
        """The memory ``[B, M, C]`` that a stream's exchange after round `layer` starts from."""
        if self.memory_tokens is None:
            return None
        if self.memory_state is not None:
            return self.memory_state[stream, self.layers.index(layer)].to(device=x.device, dtype=x.dtype)
        return self.memory_tokens.to(x.dtype).expand(x.shape[0], -1, -1)

    def exchange(
        self,
        block: Block,
        x: Tensor,
        memory: Tensor | None,
        grid: GridContext,
        normed: Tensor | None,
        next_norm: nn.Module | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``x + ls1(proj(attention over gathered keys))`` with the weights of `block`; no MLP.

        Args:
            block: whose norm1, qkv, q and k norms, RoPE, proj and ls1 are used.
            x: tokens ``[B,T,N,P,C]``.
            memory: ``[B,M,C]`` for the memory bank.
            grid: with the bias of the tokens' keys and the rows that take it.
            normed: ``norm1(x)`` where it has been computed.
            next_norm: the norm that comes after, applied in the same pass as the addition.

        Returns:
            The new tokens, the new memory or None, and ``next_norm`` of the tokens if that is given.
        """
        qkv = block.attn.project(block.norm1(x) if normed is None else normed, grid)
        if self.strategy == "memory_bank":
            assert memory is not None
            memory = memory + block.ls1(self._write(block, qkv, memory, grid.key_bias))
            y = memory_read(qkv, _project_memory(block, memory), scale=block.attn.scale)
        elif self.strategy == "landmark":
            chosen = landmark_indices(x, grid.num_special, self.landmark_k, self.confidence)
            y = _gated(partial(landmark_attention, qkv, chosen, scale=block.attn.scale), grid)
        else:
            near = dilated_neighbours(x.shape[1], x.shape[2], x.device)
            y = _gated(partial(block_dilated_attention, qkv, near, scale=block.attn.scale), grid)
        x, normed = block.add_attention(x, block.attn.merge(y), next_norm)
        return x, memory, normed

    def _write(self, block: Block, qkv: Tensor, memory: Tensor, key_bias: Tensor | None) -> Tensor:
        # Memory tokens count as special tokens: in PAGE-4D's form of the mask they take the whole bias.
        memory_qkv = _project_memory(block, memory)
        return block.attn.merge(memory_write(qkv, memory_qkv, key_bias=key_bias, scale=block.attn.scale))


def _project_memory(block: Block, memory: Tensor) -> Tensor:
    """``[B, M, C]`` -> ``[B, M, 3, h, D]``: a frame without patches, all of whose tokens stand at position (0, 0)."""
    grid = GridContext(axis="frame", grid_hw=(0, 0), num_special=memory.shape[1])
    return block.attn.project(block.norm1(memory)[:, None, None], grid)[:, 0, 0]


def _gated(attend: Callable[..., Tensor], grid: GridContext) -> Tensor:
    """Attention with the key bias of `grid`, which only special rows take where there is a row gate.

    The operators know no gate, so that PAGE-4D's form of the mask costs a second run.
    """
    if grid.key_bias is None or grid.row_gate is None:
        return attend(key_bias=grid.key_bias)
    special, patches = attend(key_bias=grid.key_bias), attend()
    return torch.cat([special[..., : grid.num_special, :], patches[..., grid.num_special :, :]], dim=-2)


def landmark_indices(x: Tensor, num_special: int, count: int, confidence: Tensor | None = None) -> Tensor:
    """The landmarks of all frames: their special tokens, and the patches with the largest norm or confidence.

    Args:
        x: tokens ``[B,T,N,P,C]``; no gradient comes from here.
        num_special: tokens of a frame before the patches.
        count: patches that each frame gives, at most all.
        confidence: ``[B,T,N,h,w]``, taken instead of the L2 norms of the tokens.

    Returns:
        ``[B, K]`` int64: numbers ``(t N + n) P + p``, with ``K = T N (num_special + count)``.

    Example:
        >>> x = torch.tensor([[[[[0.0], [1.0], [3.0], [2.0]]]]])       # one frame: a special token, three patches
        >>> landmark_indices(x, 1, 2).tolist()
        [[0, 2, 3]]
    """
    batch, times, views, tokens, _ = x.shape
    if confidence is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        score = torch.linalg.vector_norm(x.detach()[..., num_special:, :], dim=-1, dtype=wide)
    else:
        score = confidence.detach().flatten(-2)
    best = score.topk(min(count, tokens - num_special), dim=-1).indices + num_special
    special = torch.arange(num_special, device=x.device).expand(batch, times, views, -1)
    first = tokens * torch.arange(times * views, device=x.device).view(times, views, 1)
    return (torch.cat([special, best], dim=-1) + first).flatten(1)


def check_sparse_options(
    strategy: str, layers: Collection[int] | None, depth: int, landmark_k: int, num_memory_tokens: int
) -> tuple[int, ...]:
    """Checks the options of the sparse exchange and returns its layers: by default the last two rounds.

    Raises:
        VggtMvError: an option out of its range.
    """
    if strategy not in STRATEGIES:
        raise VggtMvError(f"Aggregator: sparse_strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
    if layers is None:
        layers = range(max(depth - 2, 0), depth)
    if not layers or not all(isinstance(layer, int) and 0 <= layer < depth for layer in layers):
        raise VggtMvError(
            f"Aggregator: sparse_global_layers must be indices in 0..depth-1 = 0..{depth - 1}, at least one, "
            f"got {list(layers)}"
        )
    for name, value in (("landmark_k", landmark_k), ("num_memory_tokens", num_memory_tokens)):
        if value < 1:
            raise VggtMvError(f"Aggregator: {name} must be at least 1, got {value}")
    return tuple(sorted(set(layers)))
