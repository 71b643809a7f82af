"""The rounds of attention: one stream of tokens, or a pose stream and a geometry stream side by side.

A step of the schedule is ("time", i), ("view", i) or ("sparse", i): attention along one axis of the token grid with
block i of that kind, or the sparse exchange among all frames after round i. Each step knows the norm of the next one,
so that the last residual addition of a block and the norm that follows are one pass over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vggt_mv.layers.block import Block, norm1, run_block
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.precision import without_autocast
from vggt_mv.models.options import StageCallback
from vggt_mv.models.sparse_global import SparseGlobal
from vggt_mv.models.spatial_mask import SpatialMaskHead
from vggt_mv_ext import dual_stream_attention

__all__ = ["DynamicMask", "Rounds", "Step", "Stream", "mask_weight"]

Step = tuple[str, int]


@dataclass
class Stream:
    """Tokens on their way through the blocks of one stream.

    Attributes:
        blocks: kind of step -> blocks.
        x: the tokens, ``[B,T,N,P,C]``.
        keep: indices of the outputs that are wanted.
        weight: lambda of this stream's mask bias; None without dual stream.
        mutes: whether the mask mutes what moves (the pose stream) or amplifies it.
        normed: the next step's norm of `x`, where the last step has computed it.
        outputs: output i, ``concat(time_i, view_i)``, for the wanted ones, None for the others.
        memory: what each sparse layer left in its memory, ``[B, M, C]`` each.
    """

    blocks: dict[str, nn.ModuleList]
    x: Tensor
    keep: set[int]
    weight: Tensor | None = None
    mutes: bool = False
    normed: Tensor | None = None
    outputs: list[Tensor | None] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    _halves: dict[Step, Tensor] = field(default_factory=dict)

    def block(self, step: Step) -> Block:
        """The block whose weights a step uses."""
        kind, index = step
        return self.blocks["view" if kind == "sparse" else kind][index]  # type: ignore[return-value]

    def record(self, kind: str, index: int) -> None:
        """Notes the tokens after block `index` of a kind as that half of output `index`."""
        if index not in self.keep:
            return
        self._halves[kind, index] = self.x
        if ("time", index) in self._halves and ("view", index) in self._halves:
            halves = [self._halves.pop((kind, index)) for kind in ("time", "view")]
            self.outputs[index] = torch.cat(halves, dim=-1)


@dataclass
class DynamicMask:
    """What is known of the moving parts of the scene, as masks ``[B,T,N,h,w]``, in [0, 1].

    Attributes:
        given: by the caller.
        predict_after: the time (frame) block after which the head predicts, None: it does not.
        everywhere: the predicted mask acts in every later attention that joins several frames (dual stream), not in
            the global blocks alone (PAGE-4D).
        predicted: by the head, once it has.
    """

    given: Tensor | None
    predict_after: int | None
    everywhere: bool = False
    predicted: Tensor | None = None

    def acting(self, kind: str, index: int, joins_several: bool) -> Tensor | None:
        """The mask that acts in a step, if any.

        A given mask acts in every attention that joins several frames, the predicted one after round `predict_after`,
        and where both act the larger does.
        """
        given = self.given if joins_several else None
        predicted = None
        sees = joins_several if self.everywhere else kind != "time"
        if self.predict_after is not None and index > self.predict_after and sees:
            predicted = self.predicted
        if given is None or predicted is None:
            return given if predicted is None else predicted
        return torch.maximum(given, predicted)


def mask_weight(logit: Tensor) -> Tensor:
    """A stream's lambda, ``clamp(softplus(logit), 0, 4)``, in float32 (float64 in a float64 model)."""
    with without_autocast(logit.device):
        wide = torch.promote_types(logit.dtype, torch.float32)
        return F.softplus(logit.to(wide)).clamp(0.0, 4.0)


@dataclass
class Rounds:
    """All steps of the aggregator, on one stream or two.

    Attributes:
        grid: what every attention has to know of the token grid; axis and biases change from step to step.
        mask: the moving parts.
        mask_strength: without dual stream, the logit bias of a key is ``-mask_strength * mask``.
        mask_head: predicts the mask, or None.
        sparse: the sparse exchange, or None.
        checkpoint: keep only the input of each step for the backward pass.
    """

    grid: GridContext
    mask: DynamicMask
    mask_strength: float
    mask_head: SpatialMaskHead | None
    sparse: SparseGlobal | None
    checkpoint: bool

    def run(self, streams: Sequence[Stream], steps: Sequence[Step], on_stage: StageCallback | None) -> None:
        """Takes the streams through all steps; what comes out stands in `Stream.outputs` and `Stream.memory`.

        Where there are two, the first is the pose stream and the second, which the mask is predicted from, the geometry
        stream.
        """
        _, times, views, *_ = streams[0].x.shape
        joined = {"time": times, "view": views, "sparse": times * views}
        for done, step in enumerate(steps):
            kind, index = step
            if on_stage is not None:
                on_stage("attention", done, len(steps))
            following = [self._norm(stream, steps[done + 1 : done + 2]) for stream in streams]
            moving = self._tokens(self.mask.acting(kind, index, joins_several=joined[kind] > 1))
            if kind == "sparse":
                for slot, stream in enumerate(streams):
                    self._exchange(stream, slot, step, moving, following[slot])
                kind = steps[done - 1][0]
            else:
                # One time or one view joins no frames: the same sequences as "frame", which lie contiguously.
                self._attend(streams, step, kind if joined[kind] > 1 else "frame", moving, following)
                if kind == "time" and index == self.mask.predict_after:
                    assert self.mask_head is not None
                    self.mask.predicted = self.mask_head(streams[-1].x, self.grid.grid_hw, self.grid.num_special)
                if ("sparse", index) in steps[done + 1 : done + 2]:
                    continue  # the exchange has the last word on this half of the output
            for stream in streams:
                stream.record(kind, index)
        if on_stage is not None:
            on_stage("attention", len(steps), len(steps))

    @staticmethod
    def _norm(stream: Stream, following: Sequence[Step]) -> nn.Module | None:
        return norm1(stream.block(following[0])) if following else None

    def _tokens(self, moving: Tensor | None) -> Tensor | None:
        """Mask ``[B,T,N,h,w]`` -> ``[B,T,N,P]``, 0 for camera and register tokens."""
        return None if moving is None else F.pad(moving.flatten(-2), (self.grid.num_special, 0))

    def _single_bias(self, moving: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Key bias and row gate of PAGE-4D: only camera and register tokens look away from what moves."""
        if moving is None:
            return None, None
        wide = torch.promote_types(x.dtype, torch.float32)
        special_rows = (torch.arange(x.shape[-2], device=x.device) < self.grid.num_special).to(wide)
        return (-self.mask_strength * moving).to(wide), special_rows

    def _attend(
        self,
        streams: Sequence[Stream],
        step: Step,
        axis: str,
        moving: Tensor | None,
        following: Sequence[nn.Module | None],
    ) -> None:
        grid = replace(self.grid, axis=axis)
        if len(streams) == 1:
            (stream,) = streams
            key_bias, row_gate = self._single_bias(moving, stream.x)
            stream.x, stream.normed = run_block(
                stream.block(step),
                stream.x,
                replace(grid, key_bias=key_bias, row_gate=row_gate),
                normed=stream.normed,
                next_norm=following[0],
                checkpoint=self.checkpoint,
            )
            return
        pose, geo = streams
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if moving is not None and pose.weight is not None and geo.weight is not None:
            wide = torch.promote_types(pose.x.dtype, torch.float32)
            biases = moving.to(wide), pose.weight.to(wide), geo.weight.to(wide)
        blocks = pose.block(step), geo.block(step)
        if self.checkpoint:
            (pose.x, geo.x), normed = torch.utils.checkpoint.checkpoint(
                _dual_block, blocks, (pose.x, geo.x), (None, None), (None, None), grid, biases, use_reentrant=False
            )
        else:
            (pose.x, geo.x), normed = _dual_block(
                blocks, (pose.x, geo.x), (pose.normed, geo.normed), following, grid, biases
            )
        pose.normed, geo.normed = normed

    def _exchange(
        self, stream: Stream, slot: int, step: Step, moving: Tensor | None, following: nn.Module | None
    ) -> None:
        """The sparse step of one stream."""
        assert self.sparse is not None
        if stream.weight is None:
            key_bias, row_gate = self._single_bias(moving, stream.x)
        elif moving is None:
            key_bias, row_gate = None, None
        else:
            wide = torch.promote_types(stream.x.dtype, torch.float32)
            bias = stream.weight * moving
            key_bias, row_gate = (-bias if stream.mutes else bias).to(wide), None
        grid = replace(self.grid, axis="global", key_bias=key_bias, row_gate=row_gate)
        start = self.sparse.start_of(slot, step[1], stream.x)
        arguments = (stream.block(step), stream.x, start, grid)
        if self.checkpoint:
            stream.x, memory, stream.normed = torch.utils.checkpoint.checkpoint(
                self.sparse.exchange, *arguments, None, None, use_reentrant=False
            )
        else:
            stream.x, memory, stream.normed = self.sparse.exchange(*arguments, stream.normed, following)
        if memory is not None:
            stream.memory.append(memory)


def _dual_block(
    blocks: Sequence[Block],
    x: Sequence[Tensor],
    normed: Sequence[Tensor | None],
    next_norms: Sequence[nn.Module | None],
    grid: GridContext,
    biases: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """A block of either stream, with one attention for both: mask and lambdas of `biases` or None three times."""
    ready = [block.norm1(a) if n is None else n for block, a, n in zip(blocks, x, normed, strict=True)]
    pose, geo = (block.attn.project(a, grid) for block, a in zip(blocks, ready, strict=True))
    both = dual_stream_attention(pose, geo, grid.axis, *biases, scale=blocks[0].attn.scale)
    results = [
        block.finish(a, block.attn.merge(y), next_norm)
        for block, a, y, next_norm in zip(blocks, x, both, next_norms, strict=True)
    ]
    return [a for a, _ in results], [n for _, n in results]
