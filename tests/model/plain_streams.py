"""The rounds of the aggregator written out: every attention a full matrix over all tokens, with what may not be seen
cut out. Dual stream, masks and all strategies of the sparse exchange, straight from their descriptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_mv.layers.rope import PositionGetter


@dataclass
class Plain:
    """What came out: the outputs of each stream ("single", or "pose" and "geo"), the predicted mask, the memories."""

    outputs: dict[str, list[Tensor]]
    predicted: Tensor | None = None
    memory: list[Tensor] = field(default_factory=list)


def heads(block: Any, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of tokens [B, L, C] at positions [L, 2], each [B, h, L, D]."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    pos = pos.expand(len(x), -1, -1)
    return attn.rope(attn.q_norm(q), pos), attn.rope(attn.k_norm(k), pos), v


def look(block: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    """ls1(proj(attention)) [B, Q, C]; allowed [Q, K] or [B, Q, K], bias [B, Q, K]."""
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias[:, None]
    allowed = allowed if allowed.dim() == 3 else allowed[None]
    y = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1) @ v
    return block.ls1.gamma * block.attn.proj(y.transpose(1, 2).flatten(2))


def first_tokens(model: Any, images: Tensor) -> Tensor:
    """All tokens [B, T, N, P, C] before the first round."""
    batch, times, views, *_ = images.shape
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    patches = model.patch_embed((images.flatten(0, 2) - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    patches = patches["x_norm_patchtokens"] if isinstance(patches, dict) else patches
    frames = []
    for i, frame in enumerate(patches.view(batch, times * views, -1, model.embed_dim).unbind(1)):
        variant = min(i, 1)
        special = torch.cat([model.camera_token[:, variant], model.register_token[:, variant]], dim=1)
        frames.append(torch.cat([special.expand(batch, -1, -1), frame], dim=1))
    return torch.stack(frames, dim=1).unflatten(1, (times, views))


def run(
    model: Any,
    images: Tensor,
    order: tuple[str, str],
    *,
    given: Tensor | None = None,
    memory_state: Tensor | None = None,
    confidence: Tensor | None = None,
    predicts: bool = True,
) -> Plain:
    """Outputs [B, T, N, P, 2C] for images [B, T, N, 3, H, W]; given and confidence [B, T, N, H/14, W/14]."""
    x = first_tokens(model, images)
    batch, times, views, tokens, dim = x.shape
    length, special = times * views * tokens, model.patch_start_idx
    grid_hw = (images.shape[-2] // 14, images.shape[-1] // 14)
    pos = torch.zeros(tokens, 2, dtype=torch.int64)
    pos[special:] = PositionGetter()(1, *grid_hw, "cpu")[0] + 1
    pos = pos.repeat(times * views, 1)
    frame = torch.arange(length) // tokens
    time, view = frame // views, frame % views
    is_special = (torch.arange(length) % tokens) < special
    seen = {"view": time[:, None] == time, "time": view[:, None] == view}

    dual = model.enable_dual_stream
    lambdas = {}
    if dual:
        for name in ("pose", "geo"):
            lambdas[name] = F.softplus(getattr(model, f"lambda_{name}_logit")).clamp(0, 4)
    streams = {name: x.flatten(1, 3) for name in (("pose", "geo") if dual else ("single",))}
    result = Plain({name: [] for name in streams})
    memories: dict[str, list[Tensor]] = {name: [] for name in streams}

    def biases(name: str, index: int, joined: int) -> Tensor:
        """Bias [B, Q, K] of a step of round `index` that joins `joined` frames."""
        moving = torch.zeros(batch, times, views, *grid_hw)
        if given is not None and joined > 1:
            moving = torch.maximum(moving, given)
        if result.predicted is not None and index > model.mask_layer and joined > 1:
            moving = torch.maximum(moving, result.predicted)
        m = F.pad(moving.flatten(-2), (special, 0)).flatten(1)
        if name == "single":
            return -0.5 * is_special[:, None] * m[:, None]
        return ({"pose": -1, "geo": 1}[name] * lambdas[name] * m)[:, None].expand(-1, length, -1)

    for index in range(model.depth):
        halves: dict[str, dict[str, Tensor]] = {name: {} for name in streams}
        for kind in order:
            for name in streams:
                prefix = "" if name == "single" else f"{name}_"
                blocks = getattr(model, prefix + {"view": "global_blocks", "time": "frame_blocks"}[kind])
                block, x = blocks[index], streams[name]
                bias = biases(name, index, {"view": views, "time": times}[kind])
                x = x + look(block, *heads(block, x, pos), seen[kind], bias)
                streams[name] = x + block.ls2.gamma * block.mlp(block.norm2(x))
                halves[name][kind] = streams[name]
            if kind == "time" and predicts and model.spatial_mask_head is not None and index == model.mask_layer:
                x = list(streams.values())[-1].detach()
                result.predicted = model.spatial_mask_head(x.view(batch, times, views, tokens, dim), grid_hw, special)
        if index in model.sparse_global_layers:
            for slot, name in enumerate(streams):
                block = getattr(model, ("" if name == "single" else f"{name}_") + "global_blocks")[index]
                bias = biases(name, index, times * views)
                layer = model.sparse_global_layers.index(index)
                start = None if memory_state is None else memory_state[slot, layer]
                x, memory = exchange(model, block, streams[name], pos, bias, (times, views, tokens), start, confidence)
                streams[name] = halves[name][order[-1]] = x
                memories[name] += [memory]
        for name, both in halves.items():
            out = torch.cat([both["time"], both["view"]], dim=-1)
            result.outputs[name].append(out.view(batch, times, views, tokens, 2 * dim))
    if model.sparse_strategy == "memory_bank" and model.sparse_global_layers:
        result.memory = [torch.stack(memory) for memory in memories.values()]
    return result


def exchange(
    model: Any,
    block: Any,
    x: Tensor,
    pos: Tensor,
    bias: Tensor,
    sizes: tuple[int, int, int],
    start: Tensor | None,
    confidence: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sparse exchange of tokens [B, L, C]: the new tokens, and the memory where there is one."""
    times, views, tokens = sizes
    batch, length, _ = x.shape
    q, k, v = heads(block, x, pos)
    if model.sparse_strategy == "memory_bank":
        memory = model.memory_tokens.expand(batch, -1, -1) if start is None else start
        count = memory.shape[1]
        origin = torch.zeros(count, 2, dtype=torch.int64)
        mq, mk, mv = heads(block, memory, origin)
        write_bias = torch.cat([bias[:, :1].expand(-1, count, -1), torch.zeros(batch, count, count)], dim=-1)
        keys, values = torch.cat([k, mk], dim=2), torch.cat([v, mv], dim=2)
        memory = memory + look(block, mq, keys, values, torch.ones(count, length + count, dtype=torch.bool), write_bias)
        _, mk, mv = heads(block, memory, origin)
        everything = torch.ones(length, count, dtype=torch.bool)
        return x + look(block, q, mk, mv, everything, torch.zeros(batch, length, count)), memory
    if model.sparse_strategy == "landmark":
        score = x.detach().norm(dim=-1).view(batch, times * views, tokens)
        if confidence is not None:
            score = F.pad(confidence.flatten(-2).flatten(1, 2), (model.patch_start_idx, 0))
        chosen = torch.zeros(batch, times * views, tokens, dtype=torch.bool)
        chosen[..., : model.patch_start_idx] = True
        for b in range(batch):
            for f in range(times * views):
                ranked = sorted(range(model.patch_start_idx, tokens), key=lambda p: -score[b, f, p].item())
                chosen[b, f, ranked[: model.landmark_k]] = True
        allowed = chosen.flatten(1)[:, None].expand(-1, length, -1)
    else:
        frame = torch.arange(length) // tokens
        dt = frame[:, None] // views - frame // views
        dv = frame[:, None] % views - frame % views
        near = (dt == 0) & (dv == 0)
        for reach in (1, 2, 4):
            near |= ((dt == 0) | (dt.abs() == reach)) & ((dv == 0) | (dv.abs() == reach))
        allowed = near
    return x + look(block, q, k, v, allowed, bias), x
